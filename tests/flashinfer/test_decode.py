"""Decode by FlashInfer's names: the wrapper over its own parameter grid, one request, and calls without a plan."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from oracle import attention, check, make_batch, visible

from sparseattn.flashinfer import decode
from sparseattn.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    cudnn_batch_decode_with_kv_cache,
    fast_decode_plan,
    single_decode_with_kv_cache,
    trtllm_batch_decode_with_kv_cache,
    xqa_batch_decode_with_kv_cache,
)


def planned(batch, heads=(4, 2), dim=32, *, device="cpu", backend="auto", **options):
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, device=device), batch.layout, backend=backend)
    options.setdefault("data_type", batch.k.dtype)
    options.setdefault("q_data_type", batch.q.dtype)
    wrapper.plan(*batch.table, *heads, dim, batch.page_size, **options)
    return wrapper


# ---- one request ----


@pytest.mark.parametrize("length", [0, 1, 9, 81, 512])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("mode", ["NONE", "ROPE_LLAMA", "ALIBI"])
def test_single_decode(length: int, layout: str, mode: str, device: str):
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(*s, generator=g).half() for s in ((8, 64), (length, 2, 64), (length, 2, 64)))
    cache = [(t if layout == "NHD" else t.transpose(0, 1).contiguous()).to(device) for t in (k, v)]
    o, lse = single_decode_with_kv_cache(q.to(device), *cache, layout, mode, return_lse=True)
    assert o.shape == (8, 64)
    assert lse.shape == (8,)
    oracle, eager = (attention(q[None], k, v, positions=mode, dtype=d) for d in (torch.float64, torch.float16))
    check((o[None], lse[None]), oracle, eager)
    assert torch.equal(o, single_decode_with_kv_cache(q.to(device), *cache, layout, mode, True))


def test_single_decode_options(device: str):
    q, k, v = torch.randn(6, 32).half(), torch.randn(77, 3, 32).half(), torch.randn(77, 3, 16).half()
    got = single_decode_with_kv_cache(
        *(t.to(device) for t in (q, k, v)), q_scale=0.5, k_scale=torch.tensor(3.0), v_scale=2.0, window_left=30,
        logits_soft_cap=5.0, sm_scale=0.3, return_lse=True,
    )  # fmt: skip
    options = {"scale": 0.45, "softcap": 5.0, "window_left": 30}
    oracle, eager = (attention(q[None], k, 2 * v, **options, dtype=d) for d in (torch.float64, torch.float16))
    check((got[0][None], got[1][None]), oracle, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 81, 729, 2042, 33001])
@pytest.mark.parametrize(("heads", "heads_k"), [(4, 4), (8, 4), (32, 4), (7, 7), (32, 8)])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mode", ["NONE", "ROPE_LLAMA", "ALIBI"])
@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_single_decode_grid(length: int, heads: int, heads_k: int, dim: int, mode: str, cap: float):
    q, k, v = (torch.randn(*s).half() for s in ((heads, dim), (length, heads_k, dim), (length, heads_k, dim)))
    got = single_decode_with_kv_cache(
        q.cuda(), k.cuda(), v.cuda(), pos_encoding_mode=mode, logits_soft_cap=cap, return_lse=True
    )
    options = {"positions": mode, "softcap": cap}
    oracle, eager = (attention(q[None], k, v, **options, dtype=d) for d in (torch.float64, torch.float16))
    check((got[0][None], got[1][None]), oracle, eager)


# ---- the wrapper ----

SAMPLES = [
    # batch of lengths, page, heads, dim, layout, mode, cache dtype
    ([54, 97, 12], 1, (4, 4), 128, "NHD", "NONE", torch.float16),
    ([54, 97, 12], 8, (32, 4), 128, "NHD", "ROPE_LLAMA", torch.float16),
    ([512, 3], 16, (4, 4), 256, "NHD", "NONE", torch.float8_e4m3fn),
    ([54, 0, 97], 16, (32, 4), 128, "HND", "NONE", torch.float16),
    ([128, 1, 0], 8, (8, 8), 64, "HND", "ALIBI", torch.float16),
    ([33, 260], 5, (7, 1), 64, "NHD", "NONE", torch.bfloat16),
    ([70], 256, (6, 2), 80, "NHD", "NONE", torch.float32),
]


@pytest.mark.parametrize(("lengths", "page", "heads", "dim", "layout", "mode", "dtype"), SAMPLES)
@pytest.mark.parametrize("form", ["combined", "tuple"])
def test_batch_decode(lengths, page, heads, dim, layout, mode, dtype, form, device):
    q_dtype = torch.float16 if dtype == torch.float8_e4m3fn else dtype
    batch = make_batch(
        lengths, heads=heads, dim=dim, page_size=page, layout=layout, dtype=q_dtype, kv_dtype=dtype, device=device
    )
    wrapper = planned(batch, heads, dim, pos_encoding_mode=mode, device=device)
    cache = batch.combined if form == "combined" else (batch.k, batch.v)
    batch.check(wrapper.run(batch.q, cache, return_lse=True), positions=mode)
    out, lse = torch.full_like(batch.q, math.nan), torch.full(batch.q.shape[:2], math.nan, device=device)
    batch.check(wrapper.run(batch.q, cache, out=out, lse=lse, return_lse=True), positions=mode)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_batch_decode_by_triton(layout: str, device: str):
    pytest.importorskip("triton")
    batch = make_batch([54, 0, 97], heads=(4, 2), dim=32, layout=layout, device=device)
    wrapper = planned(batch, device=device, backend="triton", logits_soft_cap=9.0, window_left=40)
    sinks = torch.linspace(-1, 2, 4, device=device)
    got = wrapper.run(batch.q, (batch.k, batch.v), return_lse=True, sinks=sinks)
    batch.check(got, softcap=9.0, window_left=40, sinks=sinks)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [12, 17, 128])
@pytest.mark.parametrize("kv_len", [54, 97, 512, 2048, 16384])
@pytest.mark.parametrize("page", [1, 8, 16])
@pytest.mark.parametrize("heads", [4, 32])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("mode", ["NONE", "ROPE_LLAMA"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_batch_decode_grid(batch_size, kv_len, page, heads, dim, mode, dtype):
    """FlashInfer's parameters; the oracle reads the first, the last and a middle request."""
    g = torch.Generator(device="cuda").manual_seed(0)
    pages = -(-kv_len // page)
    k, v = (
        torch.randn(batch_size * pages, page, 4, dim, generator=g, device="cuda").half().to(dtype) for _ in range(2)
    )
    order = torch.randperm(batch_size * pages, generator=g, device="cuda").int()
    q = torch.randn(batch_size, heads, dim, generator=g, device="cuda").half()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, device="cuda"))
    indptr = torch.arange(batch_size + 1, dtype=torch.int32, device="cuda") * pages
    last = torch.full((batch_size,), (kv_len - 1) % page + 1, dtype=torch.int32, device="cuda")
    wrapper.plan(
        indptr, order, last, heads, 4, dim, page, pos_encoding_mode=mode, data_type=dtype, q_data_type=torch.float16
    )
    o, lse = wrapper.run(q, (k, v), return_lse=True)
    for b in (0, batch_size // 2, batch_size - 1):
        owned = order[b * pages : (b + 1) * pages].long()
        keys, values = (t[owned].flatten(0, 1)[:kv_len] for t in (k, v))
        oracle, eager = (
            attention(q[b : b + 1], keys, values, positions=mode, dtype=d) for d in (torch.float64, torch.float16)
        )
        check((o[b : b + 1], lse[b : b + 1]), oracle, eager)


@pytest.mark.parametrize("q_len", [2, 5])
def test_several_queries_a_request(q_len: int, device: str):
    batch = make_batch([40, 3, 0, 64], [q_len] * 4, device=device)
    wrapper = planned(batch, q_len_per_req=q_len, window_left=20, device=device)
    batch.check(wrapper.run(batch.q, batch.combined, return_lse=True), causal=True, window_left=20)
    late = planned(batch, window_left=20, device=device)
    assert torch.equal(late.run(batch.q, batch.combined, q_len_per_req=q_len), wrapper.run(batch.q, batch.combined))
    with pytest.raises(ValueError, match="q_len_per_req: expected"):
        wrapper.run(batch.q, batch.combined, q_len_per_req=0)
    with pytest.raises(ValueError, match=r"q: expected .* rows, q_len_per_req"):
        wrapper.run(batch.q[:4], batch.combined)


def test_scores_far_below_zero(device: str):
    """Logits of -46341, which the historical -5e4 for masked ones was too near to, and an LSE of a coarse float32."""
    q = torch.full((1, 4, 128), 64.0, dtype=torch.float16, device=device)
    k = torch.full((17, 1, 2, 128), -64.0, dtype=torch.float16, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, device=device))
    table = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2], [15, 16], [1]))
    wrapper.plan(*table, 4, 2, 128, 1)
    o, lse = wrapper.run(q, (k, torch.ones_like(k)), return_lse=True)
    assert (o == 1).all()
    expected = torch.full((1, 4), (math.log(2) - 64 * 64 * 128 / 128**0.5) / math.log(2), device=device)
    torch.testing.assert_close(lse, expected, rtol=1e-6, atol=0)


def test_scales(device: str):
    heads_k = torch.tensor([0.5, 2.0])
    batch = make_batch([54, 97], kv_dtype=torch.float8_e4m3fn, device=device)
    wrapper = planned(batch, sm_scale=0.2, device=device)
    got = wrapper.run(batch.q, batch.combined, q_scale=2.0, k_scale=heads_k.to(device), v_scale=3.0, return_lse=True)
    outputs = []
    for dtype in (torch.float64, torch.float16):
        parts = []
        for b in range(2):
            k, v = batch.keys(b)
            pair = (k.double() * heads_k[:, None], v.double() * 3)
            parts.append(attention(batch.q[b : b + 1], *pair, scale=0.4, dtype=dtype))
        outputs.append(tuple(torch.cat(t) for t in zip(*parts, strict=True)))
    check(got, *outputs)
    factor = torch.tensor([1.0, 2.0, 0.5, 1.0], device=device)
    got = wrapper.run(batch.q, batch.combined, q_scale=factor)
    scaled = wrapper.run(batch.q * factor[:, None].half(), batch.combined)
    assert torch.equal(got, scaled)


def test_float8_queries_are_computed_in_bfloat16(device: str):
    batch = make_batch([54, 97], dtype=torch.float8_e4m3fn, device=device)
    wrapper = planned(batch, device=device)
    o, lse = wrapper.run(batch.q, batch.combined, q_scale=0.5, return_lse=True)
    assert o.dtype == torch.bfloat16
    batch.check((o, lse), scale=0.5 * 32**-0.5)
    narrow = planned(batch, o_data_type=torch.float8_e4m3fn, device=device).run(batch.q, batch.combined, q_scale=0.5)
    assert torch.equal(narrow, o.to(torch.float8_e4m3fn))


def test_rope_parameters(device: str):
    batch = make_batch([54, 97], device=device)
    wrapper = planned(batch, pos_encoding_mode="ROPE_LLAMA", rope_scale=4.0, rope_theta=5e5, device=device)
    options = {"positions": "ROPE_LLAMA", "rope_scale": 4.0, "rope_theta": 5e5}
    batch.check(wrapper.run(batch.q, batch.combined, return_lse=True), **options)


def test_dtypes_of_a_plan():
    batch = make_batch([54], dtype=torch.bfloat16)
    for options in (
        {"data_type": torch.bfloat16},
        {"q_data_type": "bfloat16"},
        {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16},
    ):
        wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16))
        wrapper.plan(*batch.table, 4, 2, 32, 16, **options)
        assert wrapper.run(batch.q, batch.combined).dtype == torch.bfloat16
    wrapper.plan(*batch.table, 4, 2, 32, 16)
    with pytest.raises(TypeError, match=r"q: expected torch\.float16, as planned, got torch\.bfloat16"):
        wrapper.run(batch.q, batch.combined)
    with pytest.raises(TypeError, match="kv_data_type"):
        wrapper.plan(*batch.table, 4, 2, 32, 16, data_type=torch.bfloat16, q_data_type=torch.float16)


def test_positional_arguments_in_their_old_order():
    batch = make_batch([54, 97])
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16), "NHD")
    half = torch.float16
    wrapper.plan(*batch.table, 4, 2, 32, 16, "ROPE_LLAMA", 20, 3.0, half, half, half, half, 0.3, 2.0, 1e5)
    options = {"window_left": 20, "softcap": 3.0, "scale": 0.3, "rope_scale": 2.0, "rope_theta": 1e5}
    expected = {"positions": "ROPE_LLAMA", **options}
    batch.check(wrapper.run(batch.q, batch.combined, return_lse=True), **expected)
    batch.check(wrapper.forward(batch.q, batch.combined), **expected)
    changed = {**expected, "positions": "NONE", "window_left": 5}
    batch.check(wrapper.forward(batch.q, batch.combined, "NONE", None, None, None, 5), **changed)


def test_plans_take_tensors_of_the_cpu(device: str):
    batch = make_batch([54, 0, 97], device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, device=device))
    wrapper.plan(*(t.cpu() for t in batch.table), 4, 2, 32, 16)
    batch.check(wrapper.run(batch.q, batch.combined, return_lse=True))


def test_pages_of_one_token_without_their_axis(device: str):
    batch = make_batch([54, 7], page_size=1, device=device)
    wrapper = planned(batch, device=device)
    flat = (batch.k[:, 0], batch.v[:, 0])
    batch.check(wrapper.run(batch.q, flat))
    batch.check(wrapper.run(batch.q, torch.stack(flat, 1)))


def test_bad_decode_input():
    batch = make_batch([54, 97])
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16))
    cache = batch.combined
    with pytest.raises(RuntimeError, match=r"plan\(\) to be called first"):
        wrapper.run(batch.q, cache)
    wrapper.plan(*batch.table, 4, 2, 32, 16, window_left=7)
    for match, kwargs in (
        ("window_left: expected 7, as planned", {"window_left": -1}),
        ("kv_cache_sf: expected None", {"kv_cache_sf": cache}),
        ("out: expected shape", {"out": batch.q[:1]}),
        ("sinks: expected shape", {"sinks": torch.zeros(2)}),
    ):
        with pytest.raises(ValueError, match=match):
            wrapper.run(batch.q, cache, **kwargs)
    with pytest.raises(ValueError, match="no further positional"):
        wrapper.run(batch.q, cache, torch.ones(4))
    with pytest.raises(TypeError, match="out: expected"):
        wrapper.run(batch.q, cache, out=batch.q.float())
    with pytest.raises(ValueError, match="num_qo_heads"):
        wrapper.plan(*batch.table, 3, 2, 32, 16)
    with pytest.raises(ValueError, match="window_right"):
        wrapper.plan(*batch.table, 4, 2, 32, 16, window_right=3)
    with pytest.raises(ValueError, match="jit_args"):
        BatchDecodeWithPagedKVCacheWrapper(torch.empty(16), jit_args=["x"])
    with pytest.raises(ValueError, match="backend"):
        BatchDecodeWithPagedKVCacheWrapper(torch.empty(16), backend="fa7")
    assert wrapper.run(batch.q, cache, window_left=7).shape == batch.q.shape, "a refused plan leaves the last one"


def test_pages_out_of_range_are_hidden(device: str):
    """What FlashInfer reads out of bounds: keys without a page do not exist."""
    batch = make_batch([60, 40], device=device)
    indptr, indices, last = batch.table
    indices = indices.clone()
    indices[1], indices[5] = 1_000_000, -3
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, device=device))
    wrapper.plan(indptr, indices, last, 4, 2, 32, 16)
    masks = [torch.ones(1, 60, dtype=torch.bool), torch.ones(1, 40, dtype=torch.bool)]
    masks[0][:, 16:32] = False
    masks[1][:, 16:32] = False
    batch.check(wrapper.run(batch.q, batch.combined, return_lse=True), masks=masks)


# ---- CUDA graphs ----


def graph_wrapper(batch: int, pages: int, device: str) -> CUDAGraphBatchDecodeWithPagedKVCacheWrapper:
    sizes = (batch + 1, pages, batch)
    return CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        torch.empty(16, device=device), *(torch.zeros(n, dtype=torch.int32, device=device) for n in sizes)
    )


def test_buffers_follow_plans(device: str):
    wrapper = graph_wrapper(3, 40, device)
    assert wrapper.is_cuda_graph_enabled
    for seed, lengths in enumerate(([54, 0, 97], [1, 300, 200], [16, 16, 16])):
        batch = make_batch(lengths, seed=seed, device=device)
        wrapper.plan(*batch.table, 4, 2, 32, 16)
        batch.check(wrapper.run(batch.q, batch.combined, return_lse=True))
    with pytest.raises(ValueError, match=r"indptr: .* batch size"):
        wrapper.plan(*make_batch([54, 1]).table, 4, 2, 32, 16)
    with pytest.raises(ValueError, match="at most 40"):
        wrapper.plan(*make_batch([700, 1, 1], device=device).table, 4, 2, 32, 16)
    with pytest.raises(ValueError, match="q_len_per_req"):
        wrapper.plan(*batch.table, 4, 2, 32, 16, q_len_per_req=2)
    with pytest.raises(ValueError, match="q_len_per_req: expected 1, as planned"):
        wrapper.run(batch.q, batch.combined, q_len_per_req=2)
    batch.check(wrapper.run(batch.q, batch.combined))


def test_buffers_that_the_caller_has_filled(device: str):
    """As SGLang does: page numbers are written into the buffer itself, and ``fast_decode_plan`` follows."""
    batch = make_batch([54, 0, 97], device=device)
    buffers = [t.clone() for t in batch.table]
    wrapper = CUDAGraphBatchDecodeWithPagedKVCacheWrapper(torch.empty(16, device=device), *buffers)
    wrapper.plan = partial(fast_decode_plan, wrapper)
    wrapper.plan(*buffers, 4, 2, 32, 16, global_override_indptr_cpu=batch.indptr.cpu())
    batch.check(wrapper.run(batch.q, batch.combined, return_lse=True))


@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 3])
def test_replay_follows_new_lengths(q_len: int):
    wrapper = graph_wrapper(3, 400, "cuda")
    batches = [
        make_batch(lengths, [q_len] * 3, seed=seed, device="cuda")
        for seed, lengths in enumerate(([54, 0, 97], [1, 3000, 200], [160, 16, 2000]))
    ]
    pages = max(b.k.shape[0] for b in batches)
    first = batches[0]
    q = torch.zeros_like(first.q)
    k, v = (torch.zeros(pages, *first.k.shape[1:], dtype=first.k.dtype, device="cuda") for _ in range(2))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    wrapper.plan(*batches[0].table, 4, 2, 32, 16, q_len_per_req=q_len)
    wrapper.run(q, (k, v), out=out, lse=lse, return_lse=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, (k, v), out=out, lse=lse, return_lse=True)
    for batch in batches:
        for buffer, t in ((q, batch.q), (k, batch.k), (v, batch.v)):
            buffer[: t.shape[0]] = t
        wrapper.plan(*batch.table, 4, 2, 32, 16, q_len_per_req=q_len)
        graph.replay()
        batch.check((out, lse), causal=True)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    batch = make_batch([54, 0, 97], device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, device="cuda"))
    cache = batch.combined
    table = batch.table
    wrapper.plan(*table, 4, 2, 32, 16)
    wrapper.run(batch.q, cache, return_lse=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapper.plan(*table, 4, 2, 32, 16)
        wrapper.run(batch.q, cache, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- calls without a plan ----


def test_trtllm(device: str):
    batch = make_batch([54, 1, 97], layout="HND", device=device)
    call = (batch.q, batch.combined, None, batch.block_tables, batch.seq_lens, 97)
    got = trtllm_batch_decode_with_kv_cache(*call, 0.3, 2.0, return_lse=True, window_left=40)
    twice = make_batch([54, 1, 97], layout="HND", device=device)
    twice.v = twice.v * 2
    twice.check(got, scale=0.3, window_left=40)
    device_scales = (torch.tensor([0.3], device=device), torch.tensor([2.0], device=device))
    twice.check(trtllm_batch_decode_with_kv_cache(*call, *device_scales, window_left=40), scale=0.3, window_left=40)
    log2 = torch.tensor([0.3 / math.log(2)], device=device)
    got = trtllm_batch_decode_with_kv_cache(*call, bmm2_scale=2.0, bmm1_scale_log2=log2, window_left=40)
    twice.check(got, scale=0.3, window_left=40)
    got = trtllm_batch_decode_with_kv_cache(*call, 0.3, 2.0, o_scale=8.0)
    twice.check(got, scale=0.3)  # a bmm2_scale has been divided by o_scale
    out = torch.empty(3, 4, 32, device=device)
    assert trtllm_batch_decode_with_kv_cache(*call, 0.3, out=out) is out
    batch.check(out, scale=0.3, eps=2**-10)
    sinks = torch.linspace(-1, 1, 4, device=device)
    batch.check(trtllm_batch_decode_with_kv_cache(*call, 0.3, sinks=[sinks]), scale=0.3, sinks=sinks)
    same = trtllm_batch_decode_with_kv_cache(batch.q, batch.k[:, None], None, *call[3:], 0.3)
    assert torch.equal(same, trtllm_batch_decode_with_kv_cache(batch.q, (batch.k, batch.k), None, *call[3:], 0.3))


def test_trtllm_drafts(device: str):
    lengths = [54, 3, 97]
    batch = make_batch(lengths, [4] * 3, layout="HND", device=device)
    call = (batch.q, batch.combined, None, batch.block_tables, batch.seq_lens.to(torch.uint32), 97, 0.2)
    batch.check(trtllm_batch_decode_with_kv_cache(*call, q_len_per_req=4, return_lse=True), scale=0.2, causal=True)
    uneven = make_batch(lengths, [2, 0, 5], layout="HND", device=device)
    got = trtllm_batch_decode_with_kv_cache(
        uneven.q, (uneven.k, uneven.v), None, *call[3:], cum_seq_lens_q=uneven.qo_indptr, max_q_len=5, return_lse=True
    )
    uneven.check(got, scale=0.2, causal=True)
    with pytest.raises(ValueError, match="query: expected 3 x 2 rows"):
        trtllm_batch_decode_with_kv_cache(*call, q_len_per_req=2)


def tree(rows: list[int], seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Which drafts each draft sees, itself among them; and packed, 32 bits a row, rows of all requests on end."""
    g = torch.Generator().manual_seed(seed)
    sees = [torch.tril(torch.rand(n, n, generator=g) < 0.5) | torch.eye(n, dtype=torch.bool) for n in rows]
    words = [[sum(1 << j for j in range(n) if t[i, j]) for i in range(n)] for n, t in zip(rows, sees, strict=True)]
    packed = torch.tensor([w for part in words for w in part], dtype=torch.int64).to(torch.int32)
    return sees, packed[:, None].view(torch.uint16)


@pytest.mark.parametrize("rows", [[4, 4, 4], [2, 0, 6]])
def test_tree_masks_of_drafts(rows: list[int], device: str):
    lengths = [54, 4, 97]
    batch = make_batch(lengths, rows, layout="HND", device=device)
    sees, packed = tree(rows)
    masks = [
        torch.cat([torch.ones(n, length - n, dtype=torch.bool), t], 1)
        for n, length, t in zip(rows, lengths, sees, strict=True)
    ]
    even = len(set(rows)) == 1
    packed = packed.view(3, rows[0], 2) if even else packed
    kwargs = {"q_len_per_req": rows[0]} if even else {"cum_seq_lens_q": batch.qo_indptr, "max_q_len": max(rows)}
    got = trtllm_batch_decode_with_kv_cache(
        batch.q, batch.combined, None, batch.block_tables, batch.seq_lens, 97, 0.2, mask=packed.to(device),
        return_lse=True, **kwargs,
    )  # fmt: skip
    batch.check(got, masks=masks, scale=0.2)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("form", ["combined", "tuple"])
def test_pages_of_each_kv_head(layout: str, q_len: int, form: str, device: str):
    """Block sparsity by KV head: the pages that a head does not list hold NaN for it."""
    lengths, page = [70, 100, 33], 16
    batch = make_batch(lengths, [q_len] * 3, heads=(6, 2), layout=layout, device=device)
    kept = {(0, 0): [0, 2, 4], (0, 1): [1, 6], (0, 2): [2], (1, 0): [3], (1, 1): [0, 1, 2, 3], (1, 2): []}
    tables = torch.full((2, 3, 8), 10_000, dtype=torch.int32)
    surviving = torch.zeros(2, 3, dtype=torch.int32)
    parts: dict[tuple[int, int], list[torch.Tensor]] = {}
    for (h, b), pages in kept.items():
        tables[h, b, : len(pages)] = torch.tensor([batch.numbers[b][i] for i in pages], dtype=torch.int32)
        tokens = [j for i in pages for j in range(i * page, min((i + 1) * page, lengths[b]))]
        surviving[h, b] = len(tokens)
        parts[h, b] = [t[tokens, h : h + 1] for t in batch.keys(b)]
    for (h, b), pages in kept.items():
        for i, number in enumerate(batch.numbers[b]):
            if i not in pages:
                for t in (batch.k, batch.v):
                    (t[number, h] if layout == "HND" else t[number, :, h]).fill_(math.nan)
    cache = batch.combined if form == "combined" else (batch.k, batch.v)
    sinks = torch.linspace(-1, 1, 6)
    for joined in (None, sinks):
        got = trtllm_batch_decode_with_kv_cache(
            batch.q, cache, None, tables.to(device), surviving.to(device), 100, 0.2, kv_layout=layout,
            enable_block_sparse_attention=True, q_len_per_req=q_len, return_lse=True,
            sinks=None if joined is None else joined.to(device),
        )  # fmt: skip
        both = []
        for dtype in (torch.float64, torch.float16):
            rows = []
            for b, h in itertools.product(range(3), range(2)):
                q = batch.q[b * q_len : (b + 1) * q_len, h * 3 : h * 3 + 3]
                own = None if joined is None else joined[h * 3 : h * 3 + 3]
                rows.append(attention(q, *parts[h, b], scale=0.2, causal=True, sinks=own, dtype=dtype))
            o, lse = (torch.cat([torch.cat([rows[2 * b][i], rows[2 * b + 1][i]], 1) for b in range(3)]) for i in (0, 1))
            both.append((o, lse))
        check(got, *both)
    with pytest.raises(ValueError, match="window_left"):
        trtllm_batch_decode_with_kv_cache(
            batch.q, cache, None, tables, surviving, 100, window_left=3, kv_layout=layout,
            enable_block_sparse_attention=True,
        )  # fmt: skip


def test_bad_trtllm_input():
    batch = make_batch([54, 1], layout="HND")
    call = (batch.q, batch.combined, None, batch.block_tables, batch.seq_lens, 97)
    for name, kwargs in (
        ("uses_shared_paged_kv_idx", {"uses_shared_paged_kv_idx": False}),
        ("o_sf_scale", {"o_sf_scale": 1.0}),
        ("kv_layout", {"kv_layout": "nhd"}),
        ("block_tables", {"enable_block_sparse_attention": True}),
        ("lse", {"lse": torch.empty(3)}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            trtllm_batch_decode_with_kv_cache(*call, **kwargs)
    with pytest.raises(ValueError, match="block_tables: expected pages for 999 tokens"):
        trtllm_batch_decode_with_kv_cache(*call[:4], torch.tensor([999, 1]).int(), 999)
    with pytest.raises(TypeError, match="out_dtype"):
        trtllm_batch_decode_with_kv_cache(*call, out_dtype="nvfp4")


def test_xqa_front(device: str):
    batch = make_batch([54, 1, 97], device=device)
    call = (batch.q, batch.combined, None, batch.block_tables, batch.seq_lens.to(torch.uint32), 97)
    batch.check(xqa_batch_decode_with_kv_cache(*call, 0.3), scale=0.3)
    uneven = make_batch([54, 1, 97], [2, 1, 5], device=device)
    got = xqa_batch_decode_with_kv_cache(
        uneven.q, uneven.combined, *call[2:], 0.3, q_len_per_req=5, q_cu_seq_lens=uneven.qo_indptr
    )
    uneven.check(got, scale=0.3, causal=True)


def test_cudnn(device: str):
    batch = make_batch([54, 1, 97], layout="HND", dim_v=16, device=device)
    lens = batch.seq_lens.view(3, 1, 1, 1)
    got = cudnn_batch_decode_with_kv_cache(
        batch.q, batch.k, batch.v, 0.3, None, max_sequence_kv=97, actual_seq_lens_kv=lens,
        block_tables=batch.block_tables,
    )  # fmt: skip
    batch.check(got, scale=0.3)
    even = make_batch([32, 32], layout="HND", device=device)
    out = torch.empty_like(even.q)
    table = even.block_tables.view(2, 1, 2, 1)
    got = cudnn_batch_decode_with_kv_cache(
        even.q, even.k, even.v, 0.3, None, max_sequence_kv=32, block_tables=table, out=out
    )
    assert got is out
    even.check(got, scale=0.3)
    with pytest.raises(ValueError, match="block_tables"):
        cudnn_batch_decode_with_kv_cache(even.q, even.k, even.v, 0.3, None, max_sequence_kv=32)


def test_visible_is_by_the_book():
    assert visible(2, 4, True, 1).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert decode.single_decode_with_kv_cache is single_decode_with_kv_cache
