"""Merged states and cascades against attention over all keys at once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle import Batch, attention, check, make_batch

from sparseattn.flashinfer.cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
    merge_state,
    merge_state_in_place,
    merge_states,
)

SIZES = (37, 0, 8, 120)


def states(dtype: torch.dtype, device: str):
    """States ``[9, 4, H, D]`` over shares of the keys, and both of attention over all."""
    q, k, v = torch.randn(9, 4, 32).to(dtype), torch.randn(165, 2, 32).to(dtype), torch.randn(165, 2, 32).to(dtype)
    parts = [attention(q, a, b) for a, b in zip(k.split(SIZES), v.split(SIZES), strict=True)]
    o = torch.stack([p[0] for p in parts], 1).to(dtype).to(device)
    lse = torch.stack([p[1] for p in parts], 1).float().to(device)
    return o, lse, attention(q, k, v), attention(q, k, v, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merging(dtype: torch.dtype, device: str):
    o, lse, oracle, eager = states(dtype, device)
    merged = merge_states(o, lse)
    check(merged, oracle, eager)
    assert merged[1].is_contiguous()
    pair = (o[:, 0], lse[:, 0])
    for i in range(1, 4):
        pair = merge_state(*pair, o[:, i], lse[:, i].half() if i == 1 else lse[:, i])
    assert pair[0].dtype == dtype
    assert pair[1].is_contiguous()
    check(pair, oracle, eager)


def test_states_over_no_keys(device: str):
    v, s = torch.full((3, 2, 8), math.nan, device=device), torch.full((3, 2), -math.inf, device=device)
    o, lse = merge_state(v, s, v, s)
    assert (o == 0).all()
    assert (lse == -math.inf).all()
    other = torch.randn(3, 2, 8, device=device), torch.randn(3, 2, device=device)
    o, lse = merge_states(torch.stack([v, other[0], v], 1), torch.stack([s, other[1], s], 1))
    torch.testing.assert_close(o, other[0])
    torch.testing.assert_close(lse, other[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lse_dtype", [torch.float32, torch.float16])
def test_merging_in_place(masked: bool, lse_dtype: torch.dtype, device: str):
    """``s`` is updated whatever its dtype, and rows outside the mask stay."""
    o, lse, _, _ = states(torch.float32, device)
    mask = torch.arange(9, device=device) % 3 != 0 if masked else None
    v, s = o[:, 0].clone(), lse[:, 0].to(lse_dtype)
    before = v.clone(), s.clone()
    expected = merge_state(v, s, o[:, 2], lse[:, 2])
    merge_state_in_place(v, s, o[:, 2], lse[:, 2], mask)
    rows = slice(None) if mask is None else mask
    torch.testing.assert_close(v[rows], expected[0][rows])
    torch.testing.assert_close(s[rows], expected[1][rows].to(lse_dtype))
    if mask is not None:
        assert torch.equal(v[~mask], before[0][~mask])
        assert torch.equal(s[~mask], before[1][~mask])


def test_bad_states():
    v, s = torch.randn(3, 2, 8), torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"s_b: expected shape \(3, 2\) like v_b, tokens first, got \(2, 2\)"):
        merge_state(v, s, v, s[:2])
    with pytest.raises(ValueError, match=r"s_a: expected shape \(3, 2\) like v_a, tokens first, got \(2, 3\)"):
        merge_state(v, s.t(), v, s)
    with pytest.raises(TypeError, match=r"v_b: expected torch.float32 like v_a, got torch.float16"):
        merge_state(v, s, v.half(), s)
    with pytest.raises(ValueError, match=r"v_other: expected shape \(3, 2, 8\) like v"):
        merge_state_in_place(v, s, v[:2], s[:2])
    with pytest.raises(ValueError, match="v: expected"):
        merge_states(v, s)
    with pytest.raises(ValueError, match=r"s: expected shape \(3, 4, 2\) like v, tokens first"):
        merge_states(v[:, None].expand(-1, 4, -1, -1), s[:, None].expand(-1, 3, -1))
    with pytest.raises(TypeError, match="mask"):
        merge_state_in_place(v, s, v, s, torch.ones(3))


# ---- cascades ----


def levels(own: list[int], tokens: list[int], qo_lens: list[int] | None = None, **options) -> tuple[list[Batch], Batch]:
    """A batch a level in one cache; the last is the requests', whose queries and cache count."""
    whole = make_batch([*own, *tokens], [*(qo_lens or [1] * len(own)), *[0] * len(tokens)], **options)
    last = replace(
        whole, qo_lens=whole.qo_lens[: len(own)], kv_lens=whole.kv_lens[: len(own)], numbers=whole.numbers[: len(own)]
    )
    return whole, last


def cascade(device: str, qo_lens: list[int] | None = None, layout: str = "NHD", page: int = 16, seed: int = 0):
    """Three levels: keys shared by all five requests, by the first three and the last two, and their own."""
    own, tops = [20, 0, 33, 16, 7], [70, 40, 25]
    rows = qo_lens or [1] * 5
    whole, last = levels(own, tops, qo_lens, page_size=page, layout=layout, device=device, seed=seed)
    starts = [sum(rows[:b]) for b in range(6)]
    first = replace(whole, qo_lens=[starts[5]], kv_lens=[70], numbers=[whole.numbers[5]])
    middle = replace(whole, qo_lens=[starts[3], starts[5] - starts[3]], kv_lens=[40, 25], numbers=whole.numbers[6:8])
    members = [[5, 6], [5, 6], [5, 6], [5, 7], [5, 7]]
    return whole, [first, middle, last], members


def joined(whole: Batch, last: Batch, members: list[list[int]], causal: bool, dtype: torch.dtype):
    """Attention of every request over what it shares and its own keys, in this order."""
    rows = []
    for b, q in enumerate(whole.q.cpu().split(last.qo_lens)):
        parts = [whole.keys(i) for i in [*members[b], b]]
        k, v = (torch.cat([p[i] for p in parts]) for i in (0, 1))
        prefix = k.shape[0] - last.kv_lens[b]
        seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
        if causal:
            for i in range(q.shape[0]):
                seen[i, max(prefix, prefix + i + 1 + last.kv_lens[b] - q.shape[0]) :] = False
        rows.append(attention(q, k, v, mask=seen, dtype=dtype))
    return tuple(torch.cat(t) for t in zip(*rows, strict=True))


def arrays(batches: list[Batch]) -> list[list[torch.Tensor]]:
    return [[getattr(b, n) for b in batches] for n in ("qo_indptr", "indptr", "indices", "last_page_len")]


@pytest.mark.parametrize("rows", [None, [3, 9, 1, 0, 12]], ids=["decode", "append"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page", [1, 16])
def test_three_levels(rows: list[int] | None, layout: str, causal: bool, page: int, device: str):
    whole, batches, members = cascade(device, rows, layout, page)
    wrapper = MultiLevelCascadeAttentionWrapper(3, torch.empty(16, device=device), layout)
    wrapper.plan(*arrays(batches), 4, 2, 32, page, causal=causal)
    got = wrapper.run(whole.q, whole.combined)
    oracle, eager = (joined(whole, batches[2], members, causal, d) for d in (torch.float64, torch.float16))
    check(got, oracle, eager)
    assert torch.equal(wrapper.forward(whole.q, (whole.k, whole.v)), got)
    wrapper.begin_forward(*([t.cpu() for t in a] for a in arrays(batches)), 4, 2, 32, page, causal=causal)
    check(wrapper.run(whole.q, whole.combined), oracle, eager)


def test_buffers_of_a_cascade_follow_plans(device: str):
    whole, batches, _ = cascade(device)
    buffers = [[torch.zeros_like(t) if i != 2 else t.new_zeros(64) for t in a] for i, a in enumerate(arrays(batches))]
    wrapper = MultiLevelCascadeAttentionWrapper(3, torch.empty(16, device=device), "NHD", True, *buffers)
    assert wrapper.is_cuda_graph_enabled
    for seed in (0, 1):
        whole, batches, members = cascade(device, seed=seed)
        wrapper.plan(*arrays(batches), 4, 2, 32, 16)
        oracle, eager = (joined(whole, batches[2], members, False, d) for d in (torch.float64, torch.float16))
        check(wrapper.run(whole.q, whole.combined), oracle, eager)
    wrapper.reset_workspace_buffer(torch.empty(1, device=device), [None] * 3)
    with pytest.raises(ValueError, match="qo_indptr"):
        wrapper.plan(*arrays([batches[1], batches[1], batches[2]]), 4, 2, 32, 16)


def test_bad_cascades():
    whole, batches, _ = cascade("cpu")
    wrapper = MultiLevelCascadeAttentionWrapper(3, torch.empty(16))
    with pytest.raises(RuntimeError, match=r"plan\(\)"):
        wrapper.run(whole.q, whole.combined)
    with pytest.raises(ValueError, match="qo_indptr_arr: expected 3 tensors"):
        wrapper.plan(*arrays(batches[1:]), 4, 2, 32, 16)
    for kwargs in ({"pos_encoding_mode": "ROPE_LLAMA"}, {"window_left": 3}):
        with pytest.raises(ValueError, match="with several levels"):
            wrapper.plan(*arrays(batches), 4, 2, 32, 16, **kwargs)
    with pytest.raises(ValueError, match="num_levels"):
        MultiLevelCascadeAttentionWrapper(0, torch.empty(16))
    with pytest.raises(ValueError, match="qo_indptr_buf_arr"):
        MultiLevelCascadeAttentionWrapper(1, torch.empty(16), use_cuda_graph=True)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_shared_prefix(layout: str, device: str):
    prefix = 53
    k, v = torch.randn(2, prefix, 2, 32).half()
    pair = [(t if layout == "NHD" else t.transpose(0, 1)).to(device) for t in (k, v)]
    for qo_lens in (None, [4, 0, 9]):
        batch = make_batch([20, 0, 33], qo_lens, layout=layout, device=device)
        workspace = torch.empty(16, device=device)
        if qo_lens is None:
            wrapper = BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace, layout)
            wrapper.begin_forward(*batch.table, 4, 2, 32, 16, data_type=torch.float16)
            got, scale = wrapper.forward(batch.q, *pair, batch.combined), None
        else:
            wrapper = BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace, layout)
            wrapper.begin_forward(batch.qo_indptr, *batch.table, 4, 2, 32, 16)
            got, scale = wrapper.forward(batch.q, *pair, batch.combined, causal=True, sm_scale=0.3), 0.3
        wrapper.end_forward()
        both = []
        for dtype in (torch.float64, torch.float16):
            rows = []
            for b, q in enumerate(batch.q.cpu().split(batch.qo_lens)):
                own = batch.keys(b)
                rows.append(
                    attention(q, torch.cat([k, own[0]]), torch.cat([v, own[1]]), causal=True, scale=scale, dtype=dtype)
                )
            both.append(tuple(torch.cat(t) for t in zip(*rows, strict=True)))
        check(got, *both)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [12, 17])
@pytest.mark.parametrize("unique", [17, 37])
@pytest.mark.parametrize("shared", [128, 512, 2048])
@pytest.mark.parametrize("heads", [8, 16])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("rows", [1, 5])
def test_two_levels_grid(batch_size: int, unique: int, shared: int, heads: int, dim: int, page: int, rows: int):
    whole, last = levels(
        [unique] * batch_size, [shared], [rows] * batch_size, heads=(heads, heads), dim=dim, page_size=page,
        device="cuda",
    )  # fmt: skip
    first = replace(whole, qo_lens=[rows * batch_size], kv_lens=[shared], numbers=whole.numbers[-1:])
    wrapper = MultiLevelCascadeAttentionWrapper(2, torch.empty(16, device="cuda"))
    wrapper.plan(*arrays([first, last]), heads, heads, dim, page, causal=True)
    members = [[batch_size]] * batch_size
    oracle, eager = (joined(whole, last, members, True, d) for d in (torch.float64, torch.float16))
    check(wrapper.run(whole.q, whole.combined), oracle, eager)


@pytest.mark.gpu
def test_a_captured_cascade_follows_plans():
    whole, batches, _ = cascade("cuda")
    buffers = [[torch.zeros_like(t) if i != 2 else t.new_zeros(64) for t in a] for i, a in enumerate(arrays(batches))]
    wrapper = MultiLevelCascadeAttentionWrapper(3, torch.empty(16, device="cuda"), "NHD", True, *buffers)
    q, cache = whole.q.clone(), whole.combined
    wrapper.plan(*arrays(batches), 4, 2, 32, 16)
    wrapper.run(q, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wrapper.run(q, cache)
    for seed in (2, 3):
        whole, batches, members = cascade("cuda", seed=seed)
        q.copy_(whole.q)
        cache.copy_(whole.combined)
        wrapper.plan(*arrays(batches), 4, 2, 32, 16)
        graph.replay()
        check(out, *(joined(whole, batches[2], members, False, d) for d in (torch.float64, torch.float16)))
