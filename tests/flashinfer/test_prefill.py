"""Prefill by FlashInfer's names: one request, and the paged wrapper over its own parameter grid."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from oracle import attention, check, make_batch

from sparseattn.flashinfer import prefill
from sparseattn.flashinfer.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def one(qo, kv, heads=(4, 2), dims=(32, 32), dtype=torch.float16, device="cpu", seed=0):
    """q, k and v of one request."""
    g = torch.Generator().manual_seed(seed)
    shapes = (qo, heads[0], dims[0]), (kv, heads[1], dims[0]), (kv, heads[1], dims[1])
    return tuple(torch.randn(shape, generator=g).to(dtype).to(device) for shape in shapes)


def check_one(got, q, k, v, **options):
    low = torch.bfloat16 if q.element_size() == 1 else q.dtype
    check(got, *(attention(q, k, v, dtype=dtype, **options) for dtype in (torch.float64, low)))


def planned(batch, *, backend="auto", device="cpu", **options):
    """A wrapper with a plan for a batch."""
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(16, device=device), batch.layout, backend=backend)
    options.setdefault("q_data_type", batch.q.dtype)
    options.setdefault("kv_data_type", batch.k.dtype)
    heads = batch.q.shape[1], batch.k.shape[2 if batch.layout == "NHD" else 1]
    options.setdefault("head_dim_vo", batch.v.shape[-1])
    wrapper.plan(batch.qo_indptr, *batch.table, *heads, batch.q.shape[2], batch.page_size, **options)
    return wrapper


# ---- signatures: arguments go by position in code that exists ----

SINGLE = (
    "q k v scale_q scale_k scale_v o_dtype custom_mask packed_custom_mask causal kv_layout pos_encoding_mode "
    "use_fp16_qk_reduction sm_scale window_left logits_soft_cap rope_scale rope_theta backend return_lse kv_cache_sf "
    "k_scale v_scale"
)
PAGED_INIT = (
    "float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf paged_kv_indices_buf "
    "paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend jit_args jit_kwargs"
)
PAGED_PLAN = (
    "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk page_size "
    "head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode use_fp16_qk_reduction sm_scale window_left "
    "logits_soft_cap rope_scale rope_theta q_data_type kv_data_type o_data_type non_blocking prefix_len_ptr "
    "token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr seq_lens seq_lens_q block_tables "
    "max_token_per_sequence max_sequence_kv fixed_split_size disable_split_kv"
)
RAGGED_INIT = (
    "float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf kv_indptr_buf custom_mask_buf mask_indptr_buf "
    "backend jit_args jit_kwargs"
)
RAGGED_PLAN = (
    "qo_indptr kv_indptr num_qo_heads num_kv_heads head_dim_qk head_dim_vo custom_mask packed_custom_mask causal "
    "pos_encoding_mode use_fp16_qk_reduction window_left logits_soft_cap sm_scale rope_scale rope_theta q_data_type "
    "kv_data_type o_data_type non_blocking prefix_len_ptr token_pos_in_items_ptr token_pos_in_items_len "
    "max_item_len_ptr fixed_split_size disable_split_kv seq_lens seq_lens_q max_token_per_sequence max_sequence_kv "
    "v_indptr o_indptr"
)
CONTEXT = (
    "query kv_cache workspace_buffer block_tables seq_lens max_q_len max_kv_len bmm1_scale bmm2_scale batch_size "
    "cum_seq_lens_q cum_seq_lens_kv window_left out out_dtype o_sf_scale o_sf_vec_size kv_layout enable_pdl sinks "
    "kv_cache_sf skip_softmax_threshold_scale_factor uses_shared_paged_kv_idx causal lse return_lse"
)
CUDNN = (
    "q k_cache v_cache scale workspace_buffer max_token_per_sequence max_sequence_kv actual_seq_lens_q "
    "actual_seq_lens_kv block_tables causal return_lse q_scale k_scale v_scale batch_offsets_q batch_offsets_o "
    "batch_offsets_k batch_offsets_v batch_offsets_stats batch_offsets_units out lse is_cuda_graph_compatible backend "
    "o_data_type"
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("single_prefill_with_kv_cache", SINGLE),
        ("BatchPrefillWithPagedKVCacheWrapper.__init__", f"self {PAGED_INIT}"),
        ("BatchPrefillWithPagedKVCacheWrapper.plan", f"self {PAGED_PLAN}"),
        ("BatchPrefillWithRaggedKVCacheWrapper.__init__", f"self {RAGGED_INIT}"),
        ("BatchPrefillWithRaggedKVCacheWrapper.plan", f"self {RAGGED_PLAN}"),
        ("trtllm_batch_context_with_kv_cache", CONTEXT),
        ("cudnn_batch_prefill_with_kv_cache", CUDNN),
    ],
)
def test_arguments_are_in_their_places(name: str, words: str):
    thing = prefill
    for part in name.split("."):
        thing = getattr(thing, part)
    names = list(inspect.signature(thing).parameters)
    assert names[: len(words.split())] == words.split()


# ---- one request ----

SINGLES = [
    # qo, kv, heads, dims, dtype, layout, options
    (37, 101, (4, 4), (64, 64), torch.float16, "NHD", {"causal": True}),
    (127, 127, (7, 7), (32, 32), torch.float16, "HND", {"causal": True, "positions": "ROPE_LLAMA"}),
    (17, 81, (6, 2), (80, 80), torch.bfloat16, "NHD", {"positions": "ALIBI", "causal": True}),
    (34, 1, (2, 2), (32, 32), torch.float16, "NHD", {"causal": True}),
    (34, 1, (2, 2), (32, 32), torch.float16, "NHD", {"causal": True, "positions": "ROPE_LLAMA"}),
    (20, 50, (7, 1), (192, 128), torch.float16, "HND", {"causal": True}),
    (20, 50, (3, 3), (192, 128), torch.float16, "NHD", {"positions": "ALIBI"}),
    (9, 60, (4, 1), (32, 32), torch.float32, "NHD", {"window_left": 13, "causal": True, "softcap": 8.0}),
    (9, 60, (4, 1), (32, 16), torch.float16, "HND", {"window_left": 13, "positions": "ROPE_LLAMA", "scale": 0.3}),
    (0, 5, (2, 1), (32, 32), torch.float16, "NHD", {}),
    (5, 0, (2, 1), (32, 32), torch.float16, "NHD", {"causal": True}),
    (5, 0, (2, 1), (32, 32), torch.float16, "HND", {"positions": "ALIBI"}),
]
WORDS = {"positions": "pos_encoding_mode", "softcap": "logits_soft_cap", "scale": "sm_scale"}


@pytest.mark.parametrize(("qo", "kv", "heads", "dims", "dtype", "layout", "options"), SINGLES)
def test_single_prefill(qo, kv, heads, dims, dtype, layout, options, device):
    q, k, v = one(qo, kv, heads, dims, dtype, device)
    said = {WORDS.get(name, name): value for name, value in options.items()}
    cache = (k, v) if layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    o, lse = single_prefill_with_kv_cache_return_lse(q, *cache, kv_layout=layout, **said)
    assert o.dtype == dtype
    assert o.shape == (qo, heads[0], dims[1])
    assert lse.shape == (qo, heads[0])
    check_one((o, lse), q, k, v, **options)
    assert torch.equal(o, single_prefill_with_kv_cache(q, *cache, kv_layout=layout, **said))


def test_more_causal_queries_than_keys_see_nothing(device: str):
    """Bit for bit, in the dense and in the paged kernels."""
    q, k, v = one(34, 3, device=device)
    for mode in ("NONE", "ROPE_LLAMA"):
        o, lse = single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode=mode, return_lse=True)
        assert (o[:31] == 0).all()
        assert (lse[:31] == -math.inf).all()
        assert lse[31:].isfinite().all()


def test_views_of_packed_projections(device: str):
    packed = torch.randn(40, 8, 32, device=device).half()
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    for mode in ("NONE", "ROPE_LLAMA"):
        got = single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode=mode, return_lse=True)
        check_one(got, q, k, v, causal=True, positions=mode)


@pytest.mark.parametrize("scale", [1.7e3, 2e4])
def test_extreme_scores(scale: float, device: str):
    """Scores below what once stood for a hidden one."""
    q, k, v = one(12, 40, dtype=torch.bfloat16, device=device)
    q, k = -q.abs(), k.abs()
    for mode in ("NONE", "ALIBI"):
        got = single_prefill_with_kv_cache(
            q, k, v, causal=True, sm_scale=scale, pos_encoding_mode=mode, return_lse=True
        )
        assert got[1].max() < -1e4
        check_one(got, q, k, v, causal=True, scale=scale, positions=mode)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_float8_of_one_request(fp8: torch.dtype, device: str):
    q, k, v = one(10, 50, (4, 2), dtype=fp8, device=device)
    by_head = [torch.linspace(0.5, 1.5, n, device=device) for n in (4, 2, 2)]
    got = single_prefill_with_kv_cache(q, k, v, *by_head, torch.float16, causal=True, return_lse=True)
    assert got[0].dtype == torch.float16
    exact = [(t.cpu().double() * s.cpu().double()[:, None]) for t, s in zip((q, k, v), by_head, strict=True)]
    check(got, *(attention(*exact, causal=True, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)))
    half = q.half()
    got = single_prefill_with_kv_cache(half, k, v, k_scale=0.5, v_scale=2.0, return_lse=True)
    check_one(got, half, k, v.cpu().double() * 2, scale=0.5 * 32**-0.5)
    assert single_prefill_with_kv_cache(q, k, v).dtype == torch.bfloat16


def test_custom_masks_of_one_request(device: str):
    q, k, v = one(11, 37, device=device)
    mask = torch.rand(11, 37) < 0.4
    mask[3] = False
    flat = mask.flatten().tolist()
    eights = (flat[i : i + 8] for i in range(0, len(flat), 8))
    bits = torch.tensor([sum(bit << i for i, bit in enumerate(byte)) for byte in eights], dtype=torch.uint8)
    for said in ({"custom_mask": mask.to(device)}, {"packed_custom_mask": bits.to(device)}):
        got = single_prefill_with_kv_cache(q, k, v, **said, causal=True, return_lse=True)
        check_one(got, q, k, v, mask=mask)
        got = single_prefill_with_kv_cache(
            q, k, v, **said, window_left=9, pos_encoding_mode="ROPE_LLAMA", return_lse=True
        )
        check_one(got, q, k, v, mask=mask, window_left=9, positions="ROPE_LLAMA")


def test_bad_single_input():
    q, k, v = one(5, 9)
    mask = torch.ones(5, 9, dtype=torch.bool)
    for match, kind, kwargs in (
        ("custom_mask: expected shape", ValueError, {"custom_mask": mask[:, :8]}),
        ("custom_mask: expected 45 entries", ValueError, {"custom_mask": mask.flatten()[:44]}),
        ("custom_mask: expected a torch.bool", TypeError, {"custom_mask": mask.float()}),
        ("packed_custom_mask: expected 6 entries", ValueError, {"packed_custom_mask": mask.flatten()[:5].byte()}),
        ("packed_custom_mask: expected a torch.uint8", TypeError, {"packed_custom_mask": mask}),
        ("kv_layout", ValueError, {"kv_layout": "DHN"}),
        ("pos_encoding_mode", ValueError, {"pos_encoding_mode": "ROPE"}),
        ("kv_cache_sf: expected None", ValueError, {"kv_cache_sf": (k, v)}),
        ("k_scale: expected None beside scale_k", ValueError, {"scale_k": torch.ones(2), "k_scale": 2.0}),
        ("backend", ValueError, {"backend": "fa9"}),
    ):
        with pytest.raises(kind, match=match):
            single_prefill_with_kv_cache(q, k, v, **kwargs)
    with pytest.raises(TypeError, match="bfloat16"):
        single_prefill_with_kv_cache(q, k.bfloat16(), v.bfloat16())
    with pytest.raises(ValueError, match="q: expected a tensor of 3"):
        single_prefill_with_kv_cache(q[None], k, v)
    with pytest.raises(ValueError, match="multiple"):
        single_prefill_with_kv_cache(q[:, :3], k, v)


MODES = ((True, "NONE", 0), (False, "NONE", 30), (True, "ROPE_LLAMA", 0), (False, "ALIBI", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("kv", [501, 2042, 3771, 4932])
@pytest.mark.parametrize("qo", [37, 127, 577, 1024])
@pytest.mark.parametrize("heads", [(4, 4), (7, 7), (8, 1), (12, 4)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_single_prefill_grid(kv, qo, heads, dim):
    q, k, v = one(qo, kv, heads, (dim, dim), device="cuda")
    for causal, mode, cap in MODES:
        got = single_prefill_with_kv_cache(
            q, k, v, causal=causal, pos_encoding_mode=mode, logits_soft_cap=cap, return_lse=True
        )
        check_one(got, q, k, v, causal=causal, positions=mode, softcap=cap)


# ---- batches over pages ----

SAMPLES = [
    # (query lengths, lengths), page, heads, dims, layout, dtype of the cache, options
    (([37, 17], [54, 97]), 1, (4, 4), (64, 64), "NHD", torch.float16, {"causal": True}),
    (([17, 0, 3], [97, 12, 0]), 5, (8, 4), (32, 32), "HND", torch.float16, {"causal": True}),
    (([1, 37, 1], [150, 54, 1]), 16, (16, 4), (32, 32), "NHD", torch.float16, {"positions": "ROPE_LLAMA"}),
    (([37, 2], [54, 70]), 16, (7, 1), (32, 32), "NHD", torch.bfloat16, {"causal": True, "window_left": 13}),
    (([9, 20], [54, 7]), 8, (6, 2), (32, 32), "HND", torch.float16, {"causal": True, "softcap": 3.0}),
    (([9, 20], [54, 70]), 8, (6, 2), (32, 32), "NHD", torch.float16, {"causal": True, "positions": "ALIBI"}),
    (([5, 12], [40, 12]), 16, (3, 3), (192, 128), "NHD", torch.float16, {"causal": True}),
    (([17, 3], [54, 97]), 16, (4, 2), (64, 64), "NHD", E4M3, {"causal": True, "scale": 0.2}),
    (([17, 3], [54, 97]), 256, (4, 4), (80, 80), "HND", E5M2, {}),
    (([34, 5], [1, 5]), 16, (2, 2), (32, 32), "NHD", torch.float16, {"causal": True}),
]


@pytest.mark.parametrize(("lengths", "page", "heads", "dims", "layout", "dtype", "options"), SAMPLES)
def test_batch_prefill(lengths, page, heads, dims, layout, dtype, options, device):
    q_dtype = torch.float16 if dtype in (E4M3, E5M2) else dtype
    batch = make_batch(
        lengths[1], lengths[0], heads=heads, dim=dims[0], dim_v=dims[1], page_size=page, layout=layout, dtype=q_dtype,
        kv_dtype=dtype, device=device,
    )  # fmt: skip
    said = {WORDS.get(name, name): value for name, value in options.items()}
    wrapper = planned(batch, device=device, **said)
    o, lse = wrapper.run(batch.q, (batch.k, batch.v), return_lse=True)
    assert lse.shape == batch.q.shape[:2]
    batch.check((o, lse), **options)
    out, sums = torch.full_like(o, math.nan), torch.full_like(lse, math.nan)
    assert wrapper.run(batch.q, (batch.k, batch.v), out=out, lse=sums) is out
    assert torch.equal(out, o)
    assert torch.equal(sums, lse)
    if dims[0] == dims[1]:
        assert torch.equal(wrapper.run_return_lse(batch.q, batch.combined)[1], lse)


def test_batch_prefill_by_triton(device: str):
    pytest.importorskip("triton")
    batch = make_batch([54, 0, 97, 20], [17, 3, 1, 30], heads=(6, 2), device=device)
    masks = [torch.rand(a, b) < 0.5 for a, b in zip(batch.qo_lens, batch.kv_lens, strict=True)]
    flat = torch.cat([m.flatten() for m in masks]).to(device)
    for said, options in (
        ({"causal": True, "logits_soft_cap": 5.0}, {"causal": True, "softcap": 5.0}),
        ({"custom_mask": flat}, {"masks": masks}),
    ):
        wrapper = planned(batch, backend="triton", device=device, **said)
        batch.check(wrapper.run(batch.q, (batch.k, batch.v), return_lse=True), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [12, 17, 128])
@pytest.mark.parametrize("kv", [54, 97, 512, 2048])
@pytest.mark.parametrize("qo", [37, 17, 127, 577])
@pytest.mark.parametrize("heads", [4, 32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_batch_prefill_grid(batch_size, kv, qo, heads, dim):
    """FlashInfer's parameters, host and device plans; the oracle reads the first and the last request."""
    g = torch.Generator(device="cuda").manual_seed(0)
    q = torch.randn(batch_size * qo, heads, dim, generator=g, device="cuda").half()
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(16, device="cuda"))
    steps = torch.arange(batch_size + 1, dtype=torch.int32)
    for page, (causal, mode, cap), place in itertools.product((1, 5, 16), MODES[:3], ("cpu", "cuda")):
        pages = -(-kv // page)
        k, v = (torch.randn(batch_size * pages, page, 4, dim, generator=g, device="cuda").half() for _ in range(2))
        order = torch.randperm(batch_size * pages, generator=g, device="cuda").int()
        last = torch.full((batch_size,), (kv - 1) % page + 1, dtype=torch.int32)
        wrapper.plan(
            (steps * qo).to(place), (steps * pages).to(place), order, last.to(place), heads, 4, dim, page,
            causal=causal, pos_encoding_mode=mode, logits_soft_cap=cap,
        )  # fmt: skip
        o, lse = wrapper.run(q, (k, v), return_lse=True)
        for b in (0, batch_size - 1):
            owned = order[b * pages : (b + 1) * pages].long()
            keys, values = (t[owned].flatten(0, 1)[:kv] for t in (k, v))
            rows = slice(b * qo, (b + 1) * qo)
            options = {"causal": causal, "positions": mode, "softcap": cap}
            check_one((o[rows], lse[rows]), q[rows], keys, values, **options)


def test_scales_sinks_and_dtypes_of_a_batch(device: str):
    by_head = torch.tensor([0.5, 2.0])
    batch = make_batch([54, 97], [9, 20], kv_dtype=E4M3, device=device)
    wrapper = planned(batch, sm_scale=0.2, o_data_type=torch.float32, device=device)
    sinks = torch.linspace(-1, 2, 4, device=device)
    got = wrapper.run(
        batch.q, batch.combined, q_scale=torch.tensor(2.0), k_scale=by_head.to(device),
        v_scale=torch.tensor([3.0], device=device), sinks=sinks, return_lse=True,
    )  # fmt: skip
    assert got[0].dtype == torch.float32
    right = []
    for dtype in (torch.float64, torch.float16):
        parts = []
        for b, q in enumerate(batch.q.split(batch.qo_lens)):
            k, v = batch.keys(b)
            pair = k.double() * by_head[:, None], v.double() * 3
            parts.append(attention(q, *pair, scale=0.4, sinks=sinks, dtype=dtype))
        right.append(tuple(torch.cat(t) for t in zip(*parts, strict=True)))
    check(got, *right)


def test_float8_queries_of_a_batch(device: str):
    batch = make_batch([54, 97], [9, 20], dtype=E4M3, device=device)
    wrapper = planned(batch, causal=True, device=device)
    scales = [torch.full((n,), x, device=device) for n, x in ((4, 0.5), (2, 2.0), (2, 1.0))]
    o, lse = wrapper.run(batch.q, batch.combined, *scales, return_lse=True)
    assert o.dtype == torch.bfloat16
    batch.check((o, lse), causal=True)
    narrow = planned(batch, causal=True, o_data_type=E4M3, device=device).run(batch.q, batch.combined)
    assert narrow.dtype == E4M3
    huge = planned(batch, o_data_type=E4M3, device=device).run(batch.q, batch.combined, v_scale=1e4)
    assert huge.float().abs().max() == 448, "limited, not NaN"
