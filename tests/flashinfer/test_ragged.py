"""Ragged prefill by FlashInfer's names: dense kernels where they can, small pages elsewhere, the same numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import attention, check

from sparseattn.flashinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper

E4M3 = torch.float8_e4m3fn
WORDS = {"positions": "pos_encoding_mode", "softcap": "logits_soft_cap", "scale": "sm_scale"}


def offsets(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


class Packed:
    """A ragged batch; rows of keys past the last request are NaN."""

    def __init__(self, qo, kv, heads=(4, 2), dims=(32, 32), dtype=torch.float16, kv_dtype=None, device="cpu", seed=0):
        g = torch.Generator().manual_seed(seed)
        kv_dtype = kv_dtype or dtype
        self.qo, self.kv, self.heads, self.dims = list(qo), list(kv), heads, dims
        self.q = torch.randn(sum(qo), heads[0], dims[0], generator=g).to(dtype).to(device)
        self.k, self.v = (
            torch.cat([torch.randn(sum(kv), heads[1], d, generator=g), torch.full((5, heads[1], d), math.nan)])
            .to(kv_dtype).to(device) for d in dims
        )  # fmt: skip

    def plan(self, device: str = "cpu", wrapper=None, place: str | None = None, **said):
        layout = said.pop("kv_layout", "NHD")
        if wrapper is None:
            backend = said.pop("backend", "auto")
            wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(16, device=device), layout, backend=backend)
        said.setdefault("q_data_type", self.q.dtype)
        said.setdefault("kv_data_type", self.k.dtype)
        indptrs = (offsets(self.qo, place or device), offsets(self.kv, place or device))
        wrapper.plan(*indptrs, *self.heads, *self.dims, **said)
        return wrapper

    def attention(self, dtype, masks=None, v_scale=1.0, **options):
        parts = []
        tensors = (t[: sum(n)].cpu().split(n) for t, n in ((self.q, self.qo), (self.k, self.kv), (self.v, self.kv)))
        for b, (q, k, v) in enumerate(zip(*tensors, strict=True)):
            mask = None if masks is None else masks[b]
            parts.append(attention(q, k, v.double() * v_scale, mask=mask, dtype=dtype, **options))
        return tuple(torch.cat(t) for t in zip(*parts, strict=True))

    def check(self, got, **options):
        low = torch.bfloat16 if self.q.element_size() == 1 else self.q.dtype
        check(got, *(self.attention(dtype, **options) for dtype in (torch.float64, low)))


SAMPLES = [
    # query lengths, lengths, heads, dims, dtype, cache dtype, options
    ([37, 17], [54, 97], (4, 4), (64, 64), torch.float16, None, {"causal": True}),
    ([37, 17], [54, 97], (4, 4), (64, 64), torch.float16, None, {"causal": True, "positions": "ROPE_LLAMA"}),
    ([5, 0, 3, 30], [9, 4, 0, 3], (6, 2), (32, 32), torch.float16, None, {"causal": True}),
    ([5, 0, 3, 30], [9, 4, 0, 3], (6, 2), (32, 32), torch.float16, None, {"causal": True, "positions": "ALIBI"}),
    ([17, 9], [32, 64], (7, 1), (192, 128), torch.bfloat16, None, {"causal": True}),
    ([17, 9], [32, 64], (7, 7), (192, 128), torch.float16, None, {"positions": "ALIBI", "softcap": 30.0}),
    ([17, 9], [40, 30], (4, 2), (32, 32), torch.float32, None, {"window_left": 8, "softcap": 5.0, "scale": 0.3}),
    ([17, 9], [48, 32], (4, 2), (64, 64), torch.float16, E4M3, {"causal": True}),
    ([1, 1], [300, 20], (8, 2), (32, 32), torch.float16, None, {}),
    ([0, 0], [3, 20], (8, 2), (32, 32), torch.float16, None, {}),
]


@pytest.mark.parametrize(("qo", "kv", "heads", "dims", "dtype", "kv_dtype", "options"), SAMPLES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_ragged_prefill(qo, kv, heads, dims, dtype, kv_dtype, options, layout, device):
    batch = Packed(qo, kv, heads, dims, dtype, kv_dtype, device)
    said = {WORDS.get(name, name): value for name, value in options.items()}
    wrapper = batch.plan(device, kv_layout=layout, **said)
    k, v = (t if layout == "NHD" else t.transpose(0, 1).contiguous() for t in (batch.k, batch.v))
    o, lse = wrapper.run(batch.q, k, v, return_lse=True)
    assert o.shape == (sum(qo), heads[0], dims[1])
    batch.check((o, lse), **options)
    out, sums = torch.full_like(o, math.nan), torch.full_like(lse, math.nan)
    assert wrapper.run(batch.q, k, v, out=out, lse=sums) is out
    assert torch.equal(out, o)
    assert torch.equal(sums, lse)
    batch.check(batch.plan(device, wrapper, place="cpu", **said).run_return_lse(batch.q, k, v), **options)


def test_more_causal_queries_than_keys_see_nothing(device: str):
    batch = Packed([34, 9], [1, 4], device=device)
    for mode in ("NONE", "ALIBI"):
        o, lse = batch.plan(device, causal=True, pos_encoding_mode=mode).run_return_lse(batch.q, batch.k, batch.v)
        hidden = [*range(33), *range(34, 39)]
        assert (o[hidden] == 0).all()
        assert (lse[hidden] == -math.inf).all()


def drawn(batch: Packed) -> list[torch.Tensor]:
    masks = [torch.rand(a, b) < 0.5 for a, b in zip(batch.qo, batch.kv, strict=True)]
    masks[0][0] = False
    return masks


def flat(masks: list[torch.Tensor], device: str) -> torch.Tensor:
    return torch.cat([m.flatten() for m in masks]).to(device)


def test_masks(device: str):
    batch = Packed([9, 5, 2], [37, 13, 0], device=device)
    masks = drawn(batch)
    wrapper = batch.plan(device, custom_mask=flat(masks, device), causal=True)
    batch.check(wrapper.run_return_lse(batch.q, batch.k, batch.v), masks=masks)
    batch.check(wrapper.forward(batch.q, batch.k, batch.v, True), masks=masks)
    eights = [m.flatten().tolist() for m in masks]
    packed = [
        sum(bit << n for n, bit in enumerate(entries[i : i + 8]))
        for entries in eights
        for i in range(0, len(entries), 8)
    ]
    said = {"packed_custom_mask": torch.tensor(packed, dtype=torch.uint8, device=device)}
    wrapper = batch.plan(device, wrapper, **said, pos_encoding_mode="ROPE_LLAMA", window_left=12)
    options = {"masks": masks, "positions": "ROPE_LLAMA", "window_left": 12}
    batch.check(wrapper.run_return_lse(batch.q, batch.k, batch.v), **options)
    wrapper = batch.plan(device, wrapper, causal=True)
    batch.check(wrapper.run(batch.q, batch.k, batch.v), causal=True)
    if device == "cpu":
        with pytest.raises(ValueError, match="custom_mask: expected 398 entries"):
            batch.plan(device, wrapper, custom_mask=flat(masks, device)[1:])


def test_scales(device: str):
    batch = Packed([9, 5], [37, 13], device=device)
    wrapper = batch.plan(device, causal=True)
    got = wrapper.run(batch.q, batch.k, batch.v, q_scale=0.5, k_scale=3.0, return_lse=True)
    batch.check(got, causal=True, scale=1.5 * 32**-0.5)
    by_head = torch.tensor([2.0, 2.0], device=device)
    got = wrapper.run(batch.q, batch.k, batch.v, k_scale=by_head, v_scale=3.0, return_lse=True)
    batch.check(got, causal=True, scale=2 * 32**-0.5, v_scale=3)


def test_float8(device: str):
    batch = Packed([9, 5], [37, 13], dtype=E4M3, device=device)
    wrapper = batch.plan(device, causal=True, o_data_type="float16")
    scales = [torch.full((n,), x, device=device) for n, x in ((4, 0.5), (2, 2.0), (2, 3.0))]
    o, lse = wrapper.run(batch.q, batch.k, batch.v, *scales, return_lse=True)
    assert o.dtype == torch.float16
    batch.check((o, lse), causal=True, v_scale=3)


def test_views(device: str):
    packed = torch.randn(60, 8, 32, device=device).half()
    batch = Packed([20, 40], [20, 40], device=device)
    batch.q, batch.k, batch.v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    for mode in ("NONE", "ROPE_LLAMA"):
        wrapper = batch.plan(device, causal=True, pos_encoding_mode=mode)
        batch.check(wrapper.run_return_lse(batch.q, batch.k, batch.v), causal=True, positions=mode)


def test_forward_keeps_what_was_planned(device: str):
    batch = Packed([9, 20], [37, 20], device=device)
    tensors = batch.q, batch.k, batch.v
    wrapper = batch.plan(device, causal=True, sm_scale=0.5, window_left=10)
    o = wrapper.run(*tensors)
    assert torch.equal(wrapper.forward(*tensors), o)
    options = {"causal": True, "scale": 0.5, "window_left": 10}
    batch.check(wrapper.forward(*tensors, False, "ALIBI"), **{**options, "causal": False, "positions": "ALIBI"})
    batch.check(wrapper.forward_return_lse(*tensors, window_left=3), **{**options, "window_left": 3})
    assert torch.equal(wrapper.run(*tensors), o)


def test_no_requests(device: str):
    for mode in ("NONE", "ROPE_LLAMA"):
        wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(16, device=device))
        wrapper.plan(offsets([], device), offsets([], device), 4, 2, 32, pos_encoding_mode=mode)
        nothing = torch.empty(0, 4, 32, device=device).half()
        o, lse = wrapper.run(nothing, nothing[:, :2], nothing[:, :2], return_lse=True)
        assert (o.shape, lse.shape) == ((0, 4, 32), (0, 4))


def test_offsets_in_elements(device: str):
    batch = Packed([9, 20], [37, 20], (4, 2), (32, 16), device=device)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(16, device=device), backend="cudnn")
    qo, kv = offsets(batch.qo, device), offsets(batch.kv, device)
    wrapper.plan(qo * 4 * 32, kv * 2 * 32, 4, 2, 32, 16, causal=True, v_indptr=kv * 2 * 16, o_indptr=qo * 4 * 16)
    batch.check(wrapper.run_return_lse(batch.q, batch.k, batch.v), causal=True)


def test_small_pages_are_as_large_as_offsets_allow():
    for kv, page in (([54, 97], 1), ([32, 64, 0], 32), ([48, 16], 16), ([1024], 256), ([0, 0], 256)):
        batch = Packed([2] * len(kv), kv)
        wrapper = batch.plan(pos_encoding_mode="ROPE_LLAMA")
        assert wrapper._planned._page == page
        batch.check(wrapper.run_return_lse(batch.q, batch.k, batch.v), positions="ROPE_LLAMA")


@pytest.mark.parametrize("said", [{"causal": True}, {"pos_encoding_mode": "ROPE_LLAMA"}])
def test_ragged_by_triton(said: dict, device: str):
    pytest.importorskip("triton")
    batch = Packed([20, 0, 1], [37, 5, 30], device=device)
    options = {"positions" if n == "pos_encoding_mode" else n: value for n, value in said.items()}
    wrapper = batch.plan(device, backend="triton", **said)
    batch.check(wrapper.run_return_lse(batch.q, batch.k, batch.v), **options)


@pytest.mark.parametrize("mode", ["NONE", "ALIBI"])
def test_runs_are_traced_whole(mode: str):
    batch = Packed([20, 9], [37, 12])
    wrapper = batch.plan(causal=True, pos_encoding_mode=mode)
    compiled = torch.compile(
        lambda *tensors: wrapper.run(*tensors, return_lse=True), fullgraph=True, backend="aot_eager"
    )
    batch.check(compiled(batch.q, batch.k, batch.v), causal=True, positions=mode)


# ---- CUDA graphs ----


def graph_wrapper(batch: int, device: str, bytes_: int = 600) -> BatchPrefillWithRaggedKVCacheWrapper:
    indptrs = [torch.zeros(batch + 1, dtype=torch.int32, device=device) for _ in range(3)]
    mask = torch.zeros(bytes_, dtype=torch.uint8, device=device)
    return BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(16, device=device), "NHD", True, *indptrs[:2], mask, indptrs[2]
    )


CHANGES = (([20, 9, 3], [37, 12, 30]), ([1, 30, 0], [1, 60, 0]), ([5, 5, 5], [16, 16, 16]))


def test_buffers_follow_plans(device: str):
    wrapper = graph_wrapper(3, device)
    for seed, (qo, kv) in enumerate(CHANGES):
        batch = Packed(qo, kv, device=device, seed=seed)
        q = torch.cat([batch.q, torch.full((40 - sum(qo), 4, 32), math.nan, device=device).half()])
        for masks in (None, drawn(batch)):
            said = {"causal": True} if masks is None else {"custom_mask": flat(masks, device)}
            o, lse = batch.plan(device, wrapper, **said).run(q, batch.k, batch.v, return_lse=True)
            batch.check((o[: sum(qo)], lse[: sum(qo)]), masks=masks, causal=True)
            assert (o[sum(qo) :] == 0).all()
            assert (lse[sum(qo) :] == -math.inf).all()
    for match, (qo, kv) in (("qo_indptr: expected 4 entries", ([1, 2], [3, 4])),):
        with pytest.raises(ValueError, match=match):
            Packed(qo, kv, device=device).plan(device, wrapper)
    batch.check(wrapper.run(batch.q, batch.k, batch.v), masks=masks)


@pytest.mark.gpu
def test_replay_follows_new_plans():
    wrapper = graph_wrapper(3, "cuda")
    q = torch.zeros(40, 4, 32, device="cuda").half()
    k, v = (torch.zeros(90, 2, 32, device="cuda").half() for _ in range(2))
    batches = [Packed(qo, kv, device="cuda", seed=seed) for seed, (qo, kv) in enumerate(CHANGES)]

    def load(batch):
        for target, source in ((q, batch.q), (k, batch.k), (v, batch.v)):
            target[: source.shape[0]] = source
        batch.plan("cuda", wrapper, causal=True)

    load(batches[0])
    wrapper.run(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = wrapper.run(q, k, v, return_lse=True)
    for batch in batches:
        load(batch)
        graph.replay()
        rows = batch.q.shape[0]
        batch.check((o[:rows], lse[:rows]), causal=True)


@pytest.mark.gpu
def test_device_plans_never_wait():
    batch = Packed([20, 9], [37, 12], device="cuda")
    wrapper = batch.plan("cuda", causal=True)
    wrapper.run(batch.q, batch.k, batch.v)
    indptrs = offsets(batch.qo, "cuda"), offsets(batch.kv, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapper.plan(*indptrs, 4, 2, 32, causal=True)
        wrapper.run(batch.q, batch.k, batch.v, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_ragged_input():
    batch = Packed([9, 20], [37, 20])
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(16))
    q, k, v = batch.q, batch.k, batch.v
    with pytest.raises(RuntimeError, match=r"plan\(\) to be called first"):
        wrapper.run(q, k, v)
    batch.plan(wrapper=wrapper)
    for match, kind, call in (
        ("q: expected torch.float16, as planned", TypeError, lambda: wrapper.run(q.bfloat16(), k, v)),
        ("k: expected torch.float16, as planned", TypeError, lambda: wrapper.run(q, k.bfloat16(), v)),
        ("v: expected torch.float16, as planned", TypeError, lambda: wrapper.run(q, k, v.bfloat16())),
        ("q: expected shape", ValueError, lambda: wrapper.run(q[1:], k, v)),
        ("q, k, v: expected tensors", TypeError, lambda: wrapper.run(q, (k, v), None)),
        ("k: expected 57 rows", ValueError, lambda: wrapper.run(q, k[:56], v[:56])),
        ("v: expected 57 rows", ValueError, lambda: wrapper.run(q, k, v[:-1])),
        ("k: expected 57 rows of 2 heads", ValueError, lambda: wrapper.run(q, k[:, :1], v)),
        ("o_scale: expected None", ValueError, lambda: wrapper.run(q, k, v, o_scale=2.0)),
        ("run: expected no further arguments", ValueError, lambda: wrapper.run(q, k, v, torch.ones(4), 0.3)),
        ("out: expected shape", ValueError, lambda: wrapper.run(q, k, v, out=q[1:])),
    ):
        with pytest.raises(kind, match=match):
            call()
    qo, kv = offsets(batch.qo), offsets(batch.kv)
    for match, kind, args in (
        ("kv_indptr: expected shape", ValueError, (qo, kv[:2], 4, 2, 32)),
        ("kv_indptr: expected numbers that ascend", ValueError, (qo, kv.flip(0), 4, 2, 32)),
        ("kv_indptr: expected an int32", TypeError, (qo, kv.long(), 4, 2, 32)),
        ("num_qo_heads", ValueError, (qo, kv, 4, 3, 32)),
    ):
        with pytest.raises(kind, match=match):
            wrapper.plan(*args)
    with pytest.raises(ValueError, match="kv_indptr_buf"):
        BatchPrefillWithRaggedKVCacheWrapper(torch.empty(16), use_cuda_graph=True, qo_indptr_buf=qo.clone())
    assert wrapper.run(q, k, v).shape == q.shape, "a refused plan leaves the last one"


@pytest.mark.gpu
@pytest.mark.parametrize("count", [12, 17])
@pytest.mark.parametrize("kv", [54, 97, 512, 2048])
@pytest.mark.parametrize("qo", [37, 17, 127, 577])
@pytest.mark.parametrize("heads", [4, 32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_ragged_grid(count, kv, qo, heads, dim):
    """FlashInfer's parameters, host and device plans; the oracle reads two requests."""
    batch = Packed([qo] * count, [kv] * count, (heads, 4), (dim, dim), device="cuda")
    for causal, mode, cap in ((True, "NONE", 0), (False, "ALIBI", 30), (True, "ROPE_LLAMA", 0)):
        said = {"causal": causal, "pos_encoding_mode": mode, "logits_soft_cap": cap}
        for place in ("cpu", "cuda"):
            o, lse = batch.plan("cuda", place=place, **said).run_return_lse(batch.q, batch.k, batch.v)
            for b in (0, count - 1):
                rows, keys = slice(b * qo, (b + 1) * qo), slice(b * kv, (b + 1) * kv)
                tensors = batch.q[rows], batch.k[keys], batch.v[keys]
                options = {"causal": causal, "positions": mode, "softcap": cap}
                right = (attention(*tensors, **options, dtype=dtype) for dtype in (torch.float64, torch.float16))
                check((o[rows], lse[rows]), *right)
