"""Paged attention as torch knows it, and what it says about arguments that do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_cases import CASES, Case, build
from torch.testing import assert_close

from sparseattn import BlockMask
from sparseattn.ops.paged import ALiBi, CustomMask, PagedCache, PageLists, RoPE, paged_attention
from sparseattn.ops.paged.checks import make_problem

IDS = {case.id: case for case in CASES}


@pytest.mark.parametrize("name", ["mixed", "decode", "custom-big", "mla"])
def test_opcheck(name: str, device: str):
    problem = build(IDS[name], torch.float32, device)
    k = problem.kwargs
    p, q, q_rope = make_problem(
        problem.q, problem.cache, k.get("cu_seqlens_q"), k.get("max_seqlen_q"), k["causal"], k["scale"], k["window"],
        k["softcap"], k.get("sinks"), k.get("positions"), k.get("custom_mask"), k.get("k_scale"), k.get("v_scale"),
        None, "auto",
    )  # fmt: skip
    out, lse = q.new_zeros(*q.shape[:2], p.v.shape[-1]), q.new_zeros(q.shape[1], q.shape[0])
    torch.library.opcheck(torch.ops.sparseattn.paged_attention.default, (q, q_rope, out, lse, "auto", *p))


def test_compiles_as_one_graph(device: str):
    problem = build(IDS["window-softcap-sinks"], torch.float32, device)
    c = problem.cache

    def step(q, k, v, lens, table):
        cache = PagedCache(k, v, lens, table)
        o, lse = paged_attention(q * 2, cache, **problem.kwargs, return_lse=True)
        return o + 1, lse

    arguments = (problem.q, c.k, c.v, c.seq_lens, c.page_table)
    expected = step(*arguments)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 9])
def test_cuda_graph_follows_new_lengths(q_len: int):
    """One capture, other lengths, tables and queries, the same padded batch."""
    longest = build(Case("a", ((q_len, 900), (q_len, 40))), torch.bfloat16, "cuda")
    other = build(Case("b", ((q_len, 30), (q_len, 700))), torch.bfloat16, "cuda", seed=2)
    pages = max(longest.cache.num_pages, other.cache.num_pages)
    width = longest.cache.page_table.shape[1]

    def sized(c: PagedCache) -> PagedCache:
        pad = pages - c.num_pages
        k, v = (torch.cat([t, t.new_zeros(pad, *t.shape[1:])]) for t in (c.k, c.v))
        table = torch.nn.functional.pad(c.page_table, (0, max(0, width - c.page_table.shape[1])), value=-1)
        return PagedCache(k, v, c.seq_lens.clone(), table[:, :width].contiguous())

    static, q = sized(longest.cache), longest.q.clone()
    kwargs = longest.kwargs
    for _ in range(2):
        paged_attention(q, static, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = paged_attention(q, static, **kwargs, return_lse=True)
    for problem in (longest, other):
        now = sized(problem.cache)
        for name in ("k", "v", "seq_lens", "page_table"):
            getattr(static, name).copy_(getattr(now, name))
        q.copy_(problem.q)
        graph.replay()
        expected = paged_attention(problem.q, now, **kwargs, return_lse=True)
        assert torch.equal(o, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    problem = build(IDS["custom-little-causal"], torch.float16, "cuda")
    paged_attention(problem.q, problem.cache, **problem.kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        paged_attention(problem.q, problem.cache, **problem.kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


INT = torch.int32
K = torch.zeros(4, 8, 2, 16)
LENS = torch.tensor([5, 9], dtype=INT)
LONG = torch.zeros(1, 257, 1, 1)
COLUMNS = BlockMask.streaming((1, 16), num_sink_tokens=0, num_local_tokens=1, block_size=16)
TABLE = torch.tensor([[0, -1], [1, 2]], dtype=INT)
INDPTR, INDICES = torch.tensor([0, 1, 3], dtype=INT), torch.tensor([0, 1, 2], dtype=INT)
CACHE = PagedCache(K, K.clone(), LENS, TABLE)
LATENT = PagedCache.latent(torch.zeros(4, 8, 16), torch.zeros(4, 8, 8), LENS, TABLE, value_dim=16)
Q = torch.zeros(2, 4, 16)
CU = torch.tensor([0, 1, 2], dtype=INT)

BAD_CACHES = {
    "layout: expected one of": lambda: PagedCache(K, K, LENS, TABLE, layout="NDH"),
    r"k: expected a tensor \[P, page, Hkv, D\]": lambda: PagedCache(K[0], K, LENS, TABLE),
    "goes through PagedCache.combined": lambda: PagedCache(torch.zeros(4, 2, 8, 2, 16), K, LENS, TABLE),
    "v: expected shape": lambda: PagedCache(K, K[:3], LENS, TABLE),
    "v: expected torch.float32 like k": lambda: PagedCache(K, K.half(), LENS, TABLE),
    "k: expected a float dtype": lambda: PagedCache(K.int(), K.int(), LENS, TABLE),
    "k: expected pages of 1..256": lambda: PagedCache(LONG, LONG, LENS, TABLE),
    "seq_lens: expected an int32": lambda: PagedCache(K, K, LENS.long(), TABLE),
    "page_table: expected an int32": lambda: PagedCache(K, K, LENS, TABLE.long()),
    "page_table: expected 2 rows": lambda: PagedCache(K, K, LENS, TABLE[:1]),
    "page_table: expected either": lambda: PagedCache(K, K, LENS),
    "page_table: expected either page_table": lambda: PagedCache(K, K, LENS, TABLE, INDPTR, INDICES),
    r"indptr: expected shape \(3,\)": lambda: PagedCache(K, K, LENS, None, INDPTR[:2], INDICES),
    r"kv: expected a tensor \[P, 2": lambda: PagedCache.combined(K, LENS, TABLE),
    "ckv: expected 512 columns": lambda: PagedCache.latent(torch.zeros(4, 8, 16), None, LENS, TABLE),
    r"kpe: expected a tensor \[P, page, D\]": lambda: PagedCache.latent(K[:, :, 0], K, LENS, TABLE, value_dim=16),
    "seq_lens: expected lengths of at least 0": lambda: PagedCache(K, K, LENS - 6, TABLE).validate(),
    "indices: expected page numbers below 4": lambda: PagedCache(K, K, LENS, None, INDPTR, INDICES + 2).validate(),
    "indptr: expected numbers ascending": lambda: PagedCache(K, K, LENS, None, INDPTR.flip(0), INDICES).validate(),
    "indices: expected pages for the 9 tokens of sequence 1": lambda: PagedCache(
        K, K, LENS, None, torch.tensor([0, 2, 3], dtype=INT), INDICES
    ).validate(),
}


@pytest.mark.parametrize("message", BAD_CACHES)
def test_bad_cache(message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD_CACHES[message]()


def call(q=Q, cache=CACHE, **kwargs):
    return lambda: paged_attention(q, cache, **kwargs)


BOOLS = torch.ones(14, dtype=torch.bool)
BAD = {
    "cache: expected a PagedCache": call(cache=K),
    "cache: expected torch.float16 like q": call(Q.half()),
    "q: expected bfloat16": call(Q.int()),
    r"q: expected \[B, Hq, D\]": call(Q[None]),
    "q: expected head_dim 16": call(Q[..., :8]),
    "q: expected heads that are a multiple": call(Q[:, :3]),
    "q: expected 2 rows, one a sequence": call(Q[:1]),
    "q: expected one tensor": call((Q, Q)),
    r"q: expected head_dim 16 \+ 8": call(cache=LATENT, scale=1.0),
    "q: expected a rotary part": call((Q, Q), LATENT, scale=1.0),
    "scale: expected a number, for a cache with k_rope": call((Q, Q[..., :8]), LATENT),
    "q: expected tensors without gradients": call(Q.clone().requires_grad_()),
    "max_seqlen_q: expected None or 1": call(max_seqlen_q=2),
    "cu_seqlens_q: expected an int32": call(cu_seqlens_q=CU.long()),
    r"cu_seqlens_q: expected shape \(3,\)": call(cu_seqlens_q=CU[:2]),
    "max_seqlen_q: expected a length": call(cu_seqlens_q=CU, max_seqlen_q=-1),
    "causal: expected True or False": call(causal=None),
    "scale: expected a finite number": call(scale=float("nan")),
    "window: expected": call(window=(1, -1)),
    "softcap: expected a positive": call(softcap=-1.0),
    r"sinks: expected shape \(4,\)": call(sinks=torch.zeros(2)),
    "positions: expected RoPE": call(positions="rope"),
    "positions: expected an even head_dim without k_rope": call((Q, Q[..., :8]), LATENT, scale=1.0, positions=RoPE()),
    r"positions: expected slopes of shape \(4,\)": call(positions=ALiBi(torch.zeros(3))),
    "custom_mask: expected a bool tensor": call(custom_mask=torch.ones(3)),
    "custom_mask: expected a flat tensor": call(custom_mask=BOOLS[None]),
    "custom_mask: expected offsets of shape": call(custom_mask=CustomMask(BOOLS, torch.zeros(2, dtype=INT))),
    "k_scale: expected a positive number": call(k_scale=0.0),
    "k_scale: expected float32": call(k_scale=torch.ones(1).double()),
    "v_scale: expected shape": call(v_scale=torch.ones(4)),
    "mask: expected a BlockMask, PageLists": call(mask=torch.ones(2, 2)),
    "mask: expected Sq = 1": call(mask=BlockMask.causal((2, 16), block_size=16)),
    r"mask: expected Sk of at most 16 \(the page table": call(mask=BlockMask.causal((1, 100), block_size=16)),
    "mask: expected blocks only": call(mask=COLUMNS.with_columns(TABLE[:1, :1])),
    "mask: expected batch size 1 or 2": call(mask=PageLists(torch.zeros(3, 1, 1, dtype=INT))),
    "mask: expected 1, Hkv = 2 or Hq = 4 heads": call(mask=PageLists(torch.zeros(2, 3, 1, dtype=INT))),
    "out: expected torch.float32 like q": call(out=Q.half()),
    r"out: expected shape \(2, 4, 16\)": call(out=Q[:1]),
    "impl: expected one of": call(impl="cuda"),
    "theta: expected a positive number": lambda: RoPE(theta=0),
    "slopes: expected a float32 tensor": lambda: ALiBi(torch.zeros(3).double()),
    "bitorder: expected": lambda: CustomMask(BOOLS, bitorder="middle"),
    "custom_mask.offsets: expected int32": lambda: CustomMask(BOOLS, torch.zeros(3)),
    "pages: expected an int32": lambda: PageLists(torch.zeros(1, 1, 1)),
    r"counts: expected shape \(1, 1\)": lambda: PageLists(TABLE[:1, :1, None], TABLE[:, :1]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


def test_the_reference_finds_a_sequence_that_is_longer_than_announced():
    bounds = torch.tensor([0, 1, 5], dtype=INT)
    with pytest.raises(ValueError, match="max_seqlen_q: expected at least 4, the longest sequence, got 3"):
        paged_attention(torch.zeros(5, 4, 16), CACHE, cu_seqlens_q=bounds, max_seqlen_q=3)


def test_repr():
    assert repr(CACHE) == (
        "PagedCache(batch=2, pages=4x8, kv_heads=2, dims=(16, 16), torch.float32, NHD, page_table, device=cpu)"
    )
    assert "dims=(16+8, 16)" in repr(LATENT)
    assert replace(CACHE, page_table=None, indptr=INDPTR, indices=INDICES).capacity == 24
