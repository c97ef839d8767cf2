"""What prefill plans hold: masks of single tokens, items, buffers of CUDA graphs, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import make_batch, visible
from test_prefill import planned

from sparseattn.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper


def drawn(batch, seed: int = 0) -> list[torch.Tensor]:
    """A mask for each request, with a row that sees nothing."""
    g = torch.Generator().manual_seed(seed)
    masks = [torch.rand(a, b, generator=g) < 0.5 for a, b in zip(batch.qo_lens, batch.kv_lens, strict=True)]
    masks[0][-1] = False
    return masks


def flat(masks: list[torch.Tensor], device: str = "cpu") -> torch.Tensor:
    return torch.cat([m.flatten() for m in masks]).to(device)


def bits(masks: list[torch.Tensor], device: str = "cpu") -> torch.Tensor:
    """Packed by the book: entry i of a request is bit i % 8 of its byte i // 8."""
    out = []
    for mask in masks:
        entries = mask.flatten().tolist()
        for i in range(0, len(entries), 8):
            out.append(sum(bit << n for n, bit in enumerate(entries[i : i + 8])))
    return torch.tensor(out, dtype=torch.uint8, device=device)


# ---- masks ----


@pytest.mark.parametrize("form", ["custom_mask", "packed_custom_mask"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_masks_of_a_batch(form: str, layout: str, device: str):
    """Sizes of 9 * 37 and 5 * 13 entries: neither ends with a byte, so a wrong offset shows."""
    batch = make_batch([37, 13, 0, 40], [9, 5, 2, 7], layout=layout, device=device)
    masks = drawn(batch)
    given = {form: flat(masks, device) if form == "custom_mask" else bits(masks, device)}
    wrapper = planned(batch, **given, causal=True, device=device)
    batch.check(wrapper.run(batch.q, (batch.k, batch.v), return_lse=True), masks=masks)
    batch.check(wrapper.forward(batch.q, (batch.k, batch.v), causal=True), masks=masks)
    wrapper = planned(batch, **given, window_left=8, logits_soft_cap=4.0, device=device)
    got = wrapper.run(batch.q, (batch.k, batch.v), return_lse=True)
    batch.check(got, masks=masks, window_left=8, softcap=4.0)


def test_triangles_are_causality(device: str):
    batch = make_batch([54, 97], [37, 17], device=device)
    masks = [visible(a, b, causal=True) for a, b in zip(batch.qo_lens, batch.kv_lens, strict=True)]
    for said in ({"custom_mask": flat(masks, device)}, {"causal": True}):
        batch.check(planned(batch, **said, device=device).run_return_lse(batch.q, batch.combined), causal=True)


def test_a_mask_is_for_one_plan(device: str):
    batch = make_batch([37, 13], [9, 5], device=device)
    masks = drawn(batch)
    wrapper = planned(batch, custom_mask=flat(masks, device), device=device)
    batch.check(wrapper.run(batch.q, batch.combined), masks=masks)
    wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 32, 16, causal=True)
    batch.check(wrapper.run(batch.q, batch.combined), causal=True)


def test_packed_masks_count_where_both_are_given():
    batch = make_batch([37, 13], [9, 5])
    masks = drawn(batch)
    both = {"custom_mask": torch.ones_like(flat(masks)), "packed_custom_mask": bits(masks)}
    batch.check(planned(batch, **both).run(batch.q, batch.combined), masks=masks)


def test_masks_that_do_not_fit():
    batch = make_batch([37, 13], [9, 5])
    masks = drawn(batch)
    for match, kind, given in (
        ("^custom_mask: expected 398 entries", ValueError, {"custom_mask": flat(masks)[:-1]}),
        ("packed_custom_mask: expected 51 entries", ValueError, {"packed_custom_mask": bits(masks)[:-1]}),
        ("custom_mask: expected a torch.bool", TypeError, {"custom_mask": flat(masks).half()}),
        ("packed_custom_mask: expected a torch.uint8", TypeError, {"packed_custom_mask": flat(masks)}),
    ):
        with pytest.raises(kind, match=match):
            planned(batch, **given)
    longer = torch.cat([flat(masks), torch.ones(50, dtype=torch.bool)])
    batch.check(planned(batch, custom_mask=longer).run(batch.q, batch.combined), masks=masks)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["custom_mask", "packed_custom_mask"])
def test_short_masks_hide_what_they_do_not_cover(form: str):
    """Lengths are on the GPU, so the host cannot see it."""
    batch = make_batch([37, 13], [9, 5], device="cuda")
    masks = drawn(batch)
    if form == "custom_mask":
        masks[1].view(-1)[-20:] = False
        given = flat(masks, "cuda")[:-20].clone()
    else:
        masks[1].view(-1)[-17:] = False  # 65 entries in 9 bytes: two bytes less
        given = bits(masks, "cuda")[:-2].clone()
    batch.check(planned(batch, **{form: given}, device="cuda").run_return_lse(batch.q, batch.combined), masks=masks)


# ---- multi-item scoring ----


def items(q_len: int, kv_len: int, prefix: int, places: list[int]) -> torch.Tensor:
    """Prefix tokens are causal; a token of an item sees the prefix and its item so far; delimiters the prefix."""
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len):
        p = kv_len - q_len + i
        if p < prefix:
            mask[i, : p + 1] = True
            continue
        mask[i, :prefix] = True
        n = places[p - prefix]
        for j in range(p - n + 1, p + 1):
            mask[i, j] = True
    return mask


ONE = (54, 37, [17], [*range(17), *range(19), 0], 100)
TWO = (54, 37, [17, 17], [*range(17), *range(19), 0, *[0] * 63, *range(15), *range(21), 0], 100)
WHOLE = (40, 40, [16, 10], [*range(20), *range(3), 0, *[0] * 6, *range(29), 0], 30)


@pytest.mark.parametrize(("kv_len", "q_len", "prefixes", "places", "padded"), [ONE, TWO, WHOLE])
@pytest.mark.parametrize("ragged", [False, True])
def test_multi_item_scoring(kv_len, q_len, prefixes, places, padded, ragged, device):
    count = len(prefixes)
    batch = make_batch([kv_len] * count, [q_len] * count, page_size=5, device=device)
    own = [places[b * padded :] for b in range(count)]
    masks = [items(q_len, kv_len, prefix, at) for prefix, at in zip(prefixes, own, strict=True)]
    said = {
        "prefix_len_ptr": torch.tensor(prefixes).to(torch.uint32).to(device),
        "token_pos_in_items_ptr": torch.tensor(places).to(torch.uint16).to(device),
        "token_pos_in_items_len": padded,
        "max_item_len_ptr": torch.tensor([20] * count).to(torch.uint16).to(device),
        "causal": True,
    }
    if ragged:
        wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(16, device=device))
        wrapper.plan(batch.qo_indptr, batch.qo_indptr // q_len * kv_len, 4, 2, 32, **said)
        k, v = (torch.cat(t).to(device) for t in zip(*(batch.keys(b) for b in range(count)), strict=True))
        got = wrapper.run(batch.q, k, v, return_lse=True)
    else:
        got = planned(batch, **said, device=device).run(batch.q, batch.combined, return_lse=True)
    batch.check(got, masks=masks)


def test_items_that_do_not_fit():
    batch = make_batch([54, 54], [37, 37])
    two = torch.tensor([17, 17])
    for match, said in (
        ("prefix_len_ptr: expected shape", {"prefix_len_ptr": torch.tensor([17])}),
        ("token_pos_in_items_ptr: expected a flat", {"prefix_len_ptr": two}),
        ("token_pos_in_items_len", {"prefix_len_ptr": two, "token_pos_in_items_ptr": torch.zeros(74).int()}),
        (
            "custom_mask: expected None with prefix_len_ptr",
            {"prefix_len_ptr": two, "custom_mask": torch.ones(2 * 37 * 54, dtype=torch.bool)},
        ),
    ):
        with pytest.raises(ValueError, match=match):
            planned(batch, **said)


# ---- forward and run ----


def test_forward_keeps_what_was_planned(device: str):
    batch = make_batch([54, 97], [9, 20], device=device)
    wrapper = planned(batch, causal=True, sm_scale=0.5, window_left=20, logits_soft_cap=4.0, device=device)
    cache = batch.combined
    options = {"causal": True, "scale": 0.5, "window_left": 20, "softcap": 4.0}
    o = wrapper.run(batch.q, cache)
    batch.check(o, **options)
    assert torch.equal(wrapper.forward(batch.q, cache), o)
    batch.check(wrapper.forward(batch.q, cache, False), **{**options, "causal": False})
    batch.check(wrapper.forward_return_lse(batch.q, cache, sm_scale=0.2), **{**options, "scale": 0.2})
    batch.check(wrapper.run(batch.q, cache, window_left=-1), **{**options, "window_left": -1})
    batch.check(wrapper.run(batch.q, cache, sm_scale=0.1), **{**options, "scale": 0.1})
    assert torch.equal(wrapper.run(batch.q, cache), o)
    assert wrapper._variant(window_left=-1) is wrapper._variant(window_left=-1), "layers take turns"
    for window_left in range(40):
        wrapper._variant(window_left=window_left)
    assert len(wrapper._variants[1]) <= 17
    wrapper.end_forward()
    wrapper.begin_forward(batch.qo_indptr, *batch.table, 4, 2, 32, 16)
    batch.check(wrapper.run_return_lse(batch.q, cache))


def test_lengths_that_are_said(device: str):
    """``seq_lens`` may be less than the pages hold."""
    batch = make_batch([54, 97], [9, 20], device=device)
    fewer = torch.tensor([40, 90], dtype=torch.int32, device=device)
    wrapper = planned(
        batch, seq_lens=fewer.to(torch.uint32), causal=True, block_tables=batch.block_tables, device=device
    )
    got = wrapper.run(batch.q, batch.combined, return_lse=True)
    batch.kv_lens = [40, 90]
    batch.check(got, causal=True)


def test_offsets_in_elements(device: str):
    """As FlashInfer's cuDNN backend counts, whose caches are "HND" by the name of "NHD"."""
    batch = make_batch([54, 97], [9, 20], layout="HND", device=device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(16, device=device), backend="cudnn")
    wrapper.plan(batch.qo_indptr * 4 * 32, *batch.table, 4, 2, 32, 16, causal=True)
    batch.check(wrapper.run(batch.q, batch.combined, return_lse=True), causal=True)


def test_bad_prefill_input():
    batch = make_batch([54, 97], [9, 20])
    cache = batch.combined
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(16))
    with pytest.raises(RuntimeError, match=r"plan\(\) to be called first"):
        wrapper.run(batch.q, cache)
    wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 32, 16, data_type=torch.float16)
    for match, kind, call in (
        ("q: expected torch.float16, as planned", TypeError, lambda: wrapper.run(batch.q.bfloat16(), cache)),
        ("cache: expected torch.float16, as planned", TypeError, lambda: wrapper.run(batch.q, cache.bfloat16())),
        ("q: expected shape", ValueError, lambda: wrapper.run(batch.q[:-1], cache)),
        ("q: expected shape", ValueError, lambda: wrapper.run(batch.q[:, :2], cache)),
        ("paged_kv_cache: expected pages of 16", ValueError, lambda: wrapper.run(batch.q, cache[:, :, :8])),
        ("run: expected no further arguments", ValueError, lambda: wrapper.run(batch.q, cache, torch.ones(4))),
        ("kv_cache_sf: expected None", ValueError, lambda: wrapper.run(batch.q, cache, kv_cache_sf=cache)),
        ("lse: expected", ValueError, lambda: wrapper.run(batch.q, cache, lse=torch.empty(4, 29))),
        ("out: expected", TypeError, lambda: wrapper.run(batch.q, cache, out=batch.q.float())),
        ("sinks: expected shape", ValueError, lambda: wrapper.run(batch.q, cache, sinks=torch.zeros(2))),
    ):
        with pytest.raises(kind, match=match):
            call()
    qo, table = batch.qo_indptr, batch.table
    for match, kind, args, kwargs in (
        ("num_qo_heads", ValueError, (qo, *table, 3, 2, 32, 16), {}),
        ("qo_indptr: expected numbers that ascend", ValueError, (qo.flip(0), *table, 4, 2, 32, 16), {}),
        ("qo_indptr: expected an int32", TypeError, (qo.long(), *table, 4, 2, 32, 16), {}),
        ("paged_kv_indptr: expected shape", ValueError, (qo[:2], *table, 4, 2, 32, 16), {}),
        ("paged_kv_indptr: expected numbers of at most", ValueError, (qo, table[0] * 2, *table[1:], 4, 2, 32, 16), {}),
        ("paged_kv_last_page_len: expected 1..16", ValueError, (qo, *table[:2], table[2] + 16, 4, 2, 32, 16), {}),
        ("max_token_per_sequence", ValueError, (qo, *table, 4, 2, 32, 16), {"max_token_per_sequence": 19}),
        ("seq_lens: expected 0", ValueError, (qo, *table, 4, 2, 32, 16), {"seq_lens": batch.seq_lens + 30}),
        ("pos_encoding_mode", ValueError, (qo, *table, 4, 2, 32, 16), {"pos_encoding_mode": "ROPE"}),
    ):
        with pytest.raises(kind, match=match):
            wrapper.plan(*args, **kwargs)
    with pytest.raises(ValueError, match="jit_args"):
        BatchPrefillWithPagedKVCacheWrapper(torch.empty(16), jit_args=["x"])
    batch.check(wrapper.run(batch.q, cache))


# ---- CUDA graphs ----


def graph_wrapper(batch: int, pages: int, bytes_: int, device: str) -> BatchPrefillWithPagedKVCacheWrapper:
    sizes = (batch + 1, batch + 1, pages, batch)
    buffers = [torch.zeros(n, dtype=torch.int32, device=device) for n in sizes]
    mask = torch.zeros(bytes_, dtype=torch.uint8, device=device), torch.zeros_like(buffers[0])
    return BatchPrefillWithPagedKVCacheWrapper(torch.empty(16, device=device), "NHD", True, *buffers, *mask)


#: Query lengths and lengths of plans that follow each other.
CHANGES = (([17, 20, 3], [54, 20, 97]), ([1, 30, 0], [1, 300, 0]), ([5, 5, 5], [16, 16, 16]))


def test_buffers_follow_plans(device: str):
    wrapper = graph_wrapper(3, 40, 1200, device)
    assert wrapper.is_cuda_graph_enabled
    for seed, (qo, kv) in enumerate(CHANGES):
        batch = make_batch(kv, qo, seed=seed, device=device)
        rows = batch.q.shape[0]
        padded = torch.cat([batch.q, torch.full((45 - rows, 4, 32), math.nan, device=device).half()])
        for form in ("none", "custom_mask", "packed_custom_mask"):
            masks = None if form == "none" else drawn(batch, seed)
            given = (
                {} if masks is None else {form: flat(masks, device) if form == "custom_mask" else bits(masks, device)}
            )
            wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 32, 16, causal=masks is None, **given)
            o, lse = wrapper.run(padded, batch.combined, return_lse=True)
            batch.check((o[:rows], lse[:rows]), masks=masks, causal=True)
            assert (o[rows:] == 0).all()
            assert (lse[rows:] == -math.inf).all()


def test_plans_that_buffers_do_not_hold():
    wrapper = graph_wrapper(2, 10, 20, "cpu")
    batch = make_batch([54, 60], [9, 5])
    wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 32, 16, causal=True)
    for match, (kv, qo), said in (
        ("qo_indptr: expected 3 entries", ([5, 5, 5], [1, 1, 1]), {}),
        ("qo_indptr: expected at most 14 rows", ([54, 60], [9, 6]), {}),
        ("paged_kv_indices: expected at most 10", ([100, 100], [9, 5]), {}),
        ("custom_mask: expected at most 20", ([50, 60], [9, 5]), {"custom_mask": torch.ones(786, dtype=torch.bool)}),
        ("pos_encoding_mode", ([50, 60], [9, 5]), {"pos_encoding_mode": "ROPE"}),
    ):
        other = make_batch(kv, qo)
        with pytest.raises(ValueError, match=match):
            wrapper.plan(other.qo_indptr, *other.table, 4, 2, 32, 16, **said)
    batch.check(wrapper.run(batch.q, batch.combined), causal=True)
    with pytest.raises(ValueError, match="q: expected at least 14 rows"):
        wrapper.run(batch.q[:10], batch.combined)
    with pytest.raises(ValueError, match="qo_indptr_buf"):
        BatchPrefillWithPagedKVCacheWrapper(torch.empty(16), use_cuda_graph=True)
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (3, 3, 10, 2)]
    bare = BatchPrefillWithPagedKVCacheWrapper(torch.empty(16), "NHD", True, *buffers)
    with pytest.raises(ValueError, match="custom_mask_buf: expected a tensor"):
        bare.plan(batch.qo_indptr, *batch.table, 4, 2, 32, 16, custom_mask=torch.ones(786, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_replay_follows_new_plans(masked: bool):
    wrapper = graph_wrapper(3, 400, 40_000, "cuda")
    batches = [
        make_batch(kv, qo, seed=seed, device="cuda")
        for seed, (qo, kv) in enumerate(
            (([40, 20, 3], [54, 20, 97]), ([1, 30, 0], [1, 900, 0]), ([5, 5, 5], [16, 160, 16]))
        )
    ]
    pages = max(b.k.shape[0] for b in batches)
    q = torch.zeros(63, 4, 32, dtype=torch.float16, device="cuda")
    cache = torch.zeros(pages, 2, 16, 2, 32, dtype=torch.float16, device="cuda")

    def load(batch):
        q[: batch.q.shape[0]] = batch.q
        cache[: batch.k.shape[0]] = batch.combined
        masks = drawn(batch) if masked else None
        given = {"custom_mask": flat(masks, "cuda")} if masks is not None else {"causal": True}
        wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 32, 16, **given)
        return masks

    load(batches[0])
    wrapper.run(q, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = wrapper.run(q, cache, return_lse=True)
    for batch in batches:
        masks = load(batch)
        graph.replay()
        rows = batch.q.shape[0]
        batch.check((o[:rows], lse[:rows]), masks=masks, causal=True)
        assert (o[rows:] == 0).all()


@pytest.mark.gpu
def test_device_plans_never_wait():
    batch = make_batch([54, 97], [9, 20], device="cuda")
    masks = flat(drawn(batch), "cuda")
    table, qo = batch.table, batch.qo_indptr
    cache, wrapper = batch.combined, BatchPrefillWithPagedKVCacheWrapper(torch.empty(16, device="cuda"))
    wrapper.plan(qo, *table, 4, 2, 32, 16)
    wrapper.run(batch.q, cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for said in ({"causal": True}, {"custom_mask": masks}):
            wrapper.plan(qo, *table, 4, 2, 32, 16, **said)
            wrapper.run(batch.q, cache, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
