"""``BatchAttention`` and attention with sinks by FlashInfer's names."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from oracle import attention, check, make_batch

from sparseattn.flashinfer.attention import BatchAttention, BatchAttentionWithAttentionSinkWrapper

E4M3 = torch.float8_e4m3fn


def planned(batch, device="cpu", wrapper=None, **said):
    wrapper = wrapper or BatchAttention(batch.layout, device=device)
    heads = batch.q.shape[1], batch.k.shape[2 if batch.layout == "NHD" else 1]
    dims = batch.q.shape[2], batch.v.shape[3]
    wrapper.plan(batch.qo_indptr, batch.indptr, batch.indices, batch.seq_lens, *heads, *dims, batch.page_size, **said)
    return wrapper


def test_arguments_are_in_their_places():
    words = (
        "self qo_indptr kv_indptr kv_indices kv_len_arr num_qo_heads num_kv_heads head_dim_qk head_dim_vo page_size "
        "causal sm_scale logits_soft_cap q_data_type kv_data_type use_profiler"
    )
    assert list(inspect.signature(BatchAttention.plan).parameters) == words.split()
    words = "self q kv_cache out lse k_scale v_scale logits_soft_cap profiler_buffer kv_cache_sf"
    assert list(inspect.signature(BatchAttention.run).parameters) == words.split()
    words = (
        "self float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf paged_kv_indices_buf "
        "paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend pos_encoding_mode use_fp16_qk_reduction "
        "q_data_type kv_data_type head_dim_qk head_dim_vo window_left"
    )
    assert list(inspect.signature(BatchAttentionWithAttentionSinkWrapper.__init__).parameters) == words.split()


SAMPLES = [
    # (query lengths, lengths), page, heads, dims, layout, dtype, causal, soft cap
    (([30, 67], [30, 67]), 1, (4, 1), (64, 64), "NHD", torch.bfloat16, True, 0.0),
    (([1] * 5 + [129], [100, 1, 20, 77, 0, 150]), 8, (4, 4), (64, 64), "HND", torch.float16, True, 50.0),
    (([12, 1, 0], [66, 24, 5]), 16, (7, 1), (32, 32), "NHD", torch.float16, False, 0.0),
    (([12, 30], [66, 12]), 16, (8, 1), (192, 128), "NHD", torch.float16, True, 0.0),
    (([12, 3], [40, 90]), 16, (32, 4), (32, 32), "HND", torch.float32, True, 50.0),
]


@pytest.mark.parametrize(("lengths", "page", "heads", "dims", "layout", "dtype", "causal", "cap"), SAMPLES)
def test_mixed_batches(lengths, page, heads, dims, layout, dtype, causal, cap, device):
    batch = make_batch(
        lengths[1], lengths[0], heads=heads, dim=dims[0], dim_v=dims[1], page_size=page, layout=layout, dtype=dtype,
        device=device,
    )  # fmt: skip
    wrapper = planned(batch, device, causal=causal, logits_soft_cap=cap)
    o, lse = wrapper.run(batch.q, (batch.k, batch.v))
    batch.check((o, lse), causal=causal, softcap=cap)
    out, sums = torch.full_like(o, math.nan), torch.full_like(lse, math.nan)
    got = wrapper.run(batch.q, (batch.k, batch.v), out, sums, logits_soft_cap=cap)
    assert got[0] is out
    assert torch.equal(out, o)
    assert torch.equal(sums, lse)


def test_a_planned_cap_holds_unless_another_is_given(device: str):
    batch = make_batch([54, 97], [9, 20], device=device)
    wrapper = planned(batch, device, logits_soft_cap=4.0)
    for said, cap in (({}, 4.0), ({"logits_soft_cap": 0.0}, 4.0), ({"logits_soft_cap": 2.0}, 2.0), ({}, 4.0)):
        batch.check(wrapper.run(batch.q, batch.combined, **said), softcap=cap)
    batch.check(planned(batch, device).run(batch.q, batch.combined, logits_soft_cap=3.0), softcap=3.0)


def test_scales_of_float8_caches(device: str):
    batch = make_batch([54, 97], [9, 20], kv_dtype=E4M3, device=device)
    for said in ({}, {"kv_data_type": E4M3}, {"q_data_type": torch.float16, "kv_data_type": E4M3}):
        wrapper = planned(batch, device, causal=True, sm_scale=0.4, **said)
        o, lse = wrapper.run(batch.q, batch.combined, k_scale=torch.tensor([0.5], device=device), v_scale=2.0)
        batch.check((o / 2, lse), causal=True, scale=0.2)


def test_dtypes_are_those_of_the_tensors_unless_said():
    batch = make_batch([54], [9])
    assert planned(batch).run(batch.q, batch.combined)[0].dtype == torch.float16
    wrapper = planned(batch, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    with pytest.raises(TypeError, match=r"q: expected torch\.bfloat16, as planned"):
        wrapper.run(batch.q, batch.combined)
    wrapper = planned(batch, kv_data_type=E4M3)
    with pytest.raises(TypeError, match=r"kv_cache: expected torch\.float8_e4m3fn"):
        wrapper.run(batch.q, batch.combined)
    with pytest.raises(TypeError, match=r"cache: expected torch\.float16"):
        planned(batch).run(batch.q, batch.combined.bfloat16())


def test_the_documents_form(device: str):
    """Packed keys and values: indices count tokens, whatever the page size says; the output comes alone."""
    g = torch.Generator().manual_seed(0)
    kv_lens, qo_lens = [40, 0, 25], [20, 3, 25]
    q, k, v = (torch.randn(n, h, 32, generator=g).half().to(device) for n, h in ((48, 4), (70, 2), (70, 2)))
    k[65:], v[65:] = math.nan, math.nan
    order = torch.randperm(65, generator=g).int()
    qo, kv = (
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32, device=device) for n in (qo_lens, kv_lens)
    )
    lengths = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    right = []
    for dtype in (torch.float64, torch.float16):
        parts, first = [], 0
        for rows, length in zip(q.split(qo_lens), kv_lens, strict=True):
            own = order[first : first + length].long().to(device)
            parts.append(attention(rows, k[own], v[own], causal=True, dtype=dtype))
            first += length
        right.append(tuple(torch.cat(t) for t in zip(*parts, strict=True)))
    for layout in ("NHD", "HND"):
        wrapper = BatchAttention(kv_layout=layout, device=device)
        wrapper.plan(qo, kv, order.to(device), lengths, 4, 2, 32, 32, 16, causal=True)
        o = wrapper.forward(q, k, v)
        check(o, *right)
        check(wrapper.run(q, (k, v)), *right)
        assert torch.equal(wrapper.forward(q, torch.stack([k, v], 1)), o)


def test_single_tokens_where_pages_were_planned():
    batch = make_batch([54, 97], [9, 20])
    wrapper = planned(batch)
    with pytest.raises(ValueError, match=r"kv_cache: expected pages of 16 .* kv_indptr and kv_indices count tokens"):
        wrapper.run(batch.q, (batch.k[:, 0], batch.v[:, 0]))


def test_bad_input():
    batch = make_batch([54, 97], [9, 20])
    wrapper = BatchAttention(device="cpu")
    with pytest.raises(RuntimeError, match=r"plan\(\) to be called first"):
        wrapper.run(batch.q, batch.combined)
    planned(batch, wrapper=wrapper)
    for match, call in (
        ("q: expected shape", lambda: wrapper.run(batch.q[1:], batch.combined)),
        ("paged_kv_cache: expected pages", lambda: wrapper.run(batch.q, batch.combined[:, :, :5])),
        ("kv_cache_sf: expected None", lambda: wrapper.run(batch.q, batch.combined, kv_cache_sf=batch.k)),
        ("profiler_buffer: expected None", lambda: wrapper.run(batch.q, batch.combined, profiler_buffer=batch.k)),
        ("use_profiler", lambda: planned(batch, use_profiler=True)),
        ("kv_layout", lambda: BatchAttention("DHN", device="cpu")),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    arguments = [batch.qo_indptr, batch.indptr, batch.indices, batch.seq_lens]
    for match, place, value in (
        ("kv_len_arr: expected 0..64", 3, batch.seq_lens + 20),
        ("kv_len_arr: expected 2 lengths", 3, batch.seq_lens[:1]),
        ("kv_indptr: expected numbers of at most", 2, batch.indices[:5]),
        ("kv_indptr: expected numbers that ascend", 1, batch.indptr.flip(0)),
    ):
        wrong = [value if i == place else t for i, t in enumerate(arguments)]
        with pytest.raises(ValueError, match=match):
            wrapper.plan(*wrong, 4, 2, 32, 32, 16)


MIXES = [
    [(146, 146)], [(67, 67)], [(8190, 7939)], [(2048, 1)] * 77, [(4099, 129)] * 2, [(600, 1)] * 20 + [(5000, 3)] * 9,
    [(1024, 1)] * 100 + [(8192, 17)] * 8, [(766, 2)] * 99 + [(1024, 512)], [(2, 235), (1, 13353)],
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: f"{len(mix)}x{mix[0]}")
@pytest.mark.parametrize("page", [1, 8, 16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 1), (32, 4)])
@pytest.mark.parametrize(
    ("dim", "dtype", "causal", "cap"), [(64, torch.float16, True, 0.0), (128, torch.bfloat16, False, 50.0)]
)
def test_mixed_batches_grid(mix, page, heads, dim, dtype, causal, cap):
    """FlashInfer's mixes of (length, queries); the oracle reads some rows of the first and the last request."""
    g = torch.Generator(device="cuda").manual_seed(0)
    kv, qo = (torch.tensor([pair[i] for pair in mix], dtype=torch.int32) for i in (0, 1))
    pages = (kv + page - 1) // page
    total = int(pages.sum())
    k, v = (torch.randn(total, page, heads[1], dim, generator=g, device="cuda").to(dtype) for _ in range(2))
    q = torch.randn(int(qo.sum()), heads[0], dim, generator=g, device="cuda").to(dtype)
    indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    qo_indptr = torch.nn.functional.pad(qo.cumsum(0), (1, 0)).int()
    order = torch.randperm(total, generator=g, device="cuda").int()
    wrapper = BatchAttention(device="cuda")
    wrapper.plan(
        qo_indptr.cuda(), indptr.cuda(), order, kv.cuda(), *heads, dim, dim, page, causal=causal, logits_soft_cap=cap
    )
    o, lse = wrapper.run(q, (k, v))
    for b in (0, len(mix) - 1):
        n, length = int(qo[b]), int(kv[b])
        owned = order[int(indptr[b]) : int(indptr[b + 1])].long()
        keys, values = (t[owned].flatten(0, 1)[:length] for t in (k, v))
        rows = torch.linspace(0, n - 1, min(n, 9)).long().unique()
        at = int(qo_indptr[b]) + rows.cuda()
        seen = torch.arange(length) <= rows[:, None] + length - n if causal else torch.ones(len(rows), length).bool()
        right = (attention(q[at], keys, values, mask=seen, softcap=cap, dtype=d) for d in (torch.float64, dtype))
        check((o[at], lse[at]), *right)


# ---- sinks ----


def sink_wrapper(batch, device="cpu", **said):
    said = {"q_data_type": batch.q.dtype, "kv_data_type": batch.k.dtype, **said}
    dims = {"head_dim_qk": batch.q.shape[2], "head_dim_vo": batch.v.shape[3]}
    return BatchAttentionWithAttentionSinkWrapper(torch.empty(16, device=device), batch.layout, **{**dims, **said})


@pytest.mark.parametrize("window_left", [-1, 16])
@pytest.mark.parametrize(("causal", "layout"), [(True, "NHD"), (False, "HND")])
def test_sinks(window_left: int, causal: bool, layout: str, device: str):
    batch = make_batch([54, 12, 0], [20, 12, 2], heads=(8, 2), page_size=1, layout=layout, device=device)
    wrapper = sink_wrapper(batch, device, window_left=window_left)
    sink = torch.linspace(-2, 5, 8, device=device)
    wrapper.plan(batch.qo_indptr, *batch.table, 8, 2, 32, 1, causal=causal)
    got = wrapper.run(batch.q, (batch.k, batch.v), sink, 0.3, return_lse=True)
    options = {"causal": causal, "window_left": window_left}
    batch.check(got, sinks=sink, scale=0.3, **options)
    assert torch.equal(wrapper.run(batch.q, (batch.k, batch.v), sink, 0.3), got[0])
    batch.check(wrapper.run(batch.q, (batch.k, batch.v), sinks=sink), sinks=sink, **options)
    batch.check(wrapper.run(batch.q, (batch.k, batch.v)), **options)


def test_the_wrapper_says_what_a_plan_leaves_out(device: str):
    batch = make_batch([54, 12], [20, 12], dim=32, dim_v=16, dtype=torch.bfloat16, kv_dtype=E4M3, device=device)
    wrapper = sink_wrapper(batch, device, window_left=9, pos_encoding_mode="ALIBI")
    wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 32, 16, causal=True)
    sink = torch.zeros(4, device=device)
    got = wrapper.run(batch.q, (batch.k, batch.v), sink, None, return_lse=True)
    batch.check(got, causal=True, window_left=9, positions="ALIBI", sinks=sink)


def test_plans_that_say_something_else():
    batch = make_batch([54, 12], [20, 12])
    wrapper = sink_wrapper(batch, window_left=9)
    arguments = (batch.qo_indptr, *batch.table, 4, 2)
    for match, kind, dims, said in (
        ("window_left: expected 9", ValueError, (32, 16), {"window_left": 8}),
        ("head_dim_qk, head_dim_vo", ValueError, (64, 16), {}),
        ("q_data_type, kv_data_type", TypeError, (32, 16), {"q_data_type": torch.bfloat16, "kv_data_type": E4M3}),
        ("pos_encoding_mode", ValueError, (32, 16), {"pos_encoding_mode": "ALIBI"}),
    ):
        with pytest.raises(kind, match=match):
            wrapper.plan(*arguments, *dims, **said)
    wrapper.plan(*arguments, 32, 16, window_left=9, data_type="float16")
    with pytest.raises(ValueError, match="sinks: expected None beside sink"):
        wrapper.run(batch.q, batch.combined, torch.zeros(4), sinks=torch.zeros(4))
