"""Paged attention against the book: the reference and the Triton kernels, and what must hold whatever the numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from paged_cases import CASES, DECODE, FLOAT8, Case, build, by_the_book, visible

from sparseattn import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.ops.paged import PagedCache, PageLists, paged_attention, unsupported_reason
from sparseattn.testing import assert_close_to_oracle, random_block_mask

IDS = {case.id: case for case in CASES}


@pytest.fixture(autouse=True)
def _short_shares(monkeypatch: pytest.MonkeyPatch):
    """Shares of one tile, so that short sequences are cut, too, and mixed batches go two ways."""
    triton = pytest.importorskip("sparseattn.ops.paged.triton", reason="needs Triton")
    monkeypatch.setattr(triton, "_LEAST_TILES", 1)
    monkeypatch.setattr(triton, "_LONG", 0)


def check(case: Case, dtype: torch.dtype, impl: str, device: str) -> None:
    problem = build(case, dtype, device)
    o, lse = paged_attention(problem.q, problem.cache.validate(), **problem.kwargs, return_lse=True, impl=impl)
    assert o.dtype == dtype
    assert o.shape == (*problem.q.shape[:2], case.dims[1])
    assert lse.shape == (case.heads[0], problem.q.shape[0])
    oracle, eager = by_the_book(problem, torch.float64), by_the_book(problem, dtype)
    assert_close_to_oracle(o, oracle[0], eager[0], "o")
    assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=torch.finfo(dtype).eps)
    empty = oracle[1] == -math.inf
    assert (o[empty.T.to(o.device)] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case, device: str):
    problem = build(case, torch.float64, device)
    got = paged_attention(problem.q, problem.cache.validate(), **problem.kwargs, return_lse=True, impl="reference")
    for x, expected in zip(got, by_the_book(problem, torch.float64), strict=True):
        torch.testing.assert_close(x.cpu(), expected, atol=1e-10, rtol=1e-10)
    check(case, torch.bfloat16, "reference", device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case: Case, device: str):
    check(case, torch.float16, "triton", device)


@pytest.mark.parametrize("name", ["mixed", "decode", "rope-dim80-decode", "mla"])
def test_triton_full_precision(name: str, device: str):
    check(IDS[name], torch.float32, "triton", device)


@pytest.mark.parametrize("page", [1, 5, 16])
@pytest.mark.parametrize("q_len", [1, 37])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 128), ((32, 4), 64)])
def test_reference_over_a_published_grid(page: int, q_len: int, heads: tuple[int, int], dim: int):
    """FlashInfer's own parameters, fewer sequences."""
    lengths = ((q_len, 54), (q_len, 97), (q_len, 512))
    for index, causal in enumerate((True, False)):
        form = ("dense", "csr")[index]
        case = Case("grid", lengths, heads, (dim, dim), page, form=form, causal=causal)
        check(case, torch.float16, "reference", "cpu")


# ---- lists: block masks and pages ----


def listed(mask_tokens: torch.Tensor, case: Case) -> list[torch.Tensor]:
    """What each sequence may see, bool [Hq, q_len, k_len], from bool [B, H, max_q, max_k]."""
    tokens = mask_tokens.expand(len(case.lengths), -1, -1, -1)
    tokens = tokens.repeat_interleave(case.heads[0] // tokens.shape[1], 1)
    return [tokens[b, :, :a, :c] & visible(a, c, case.causal, case.window) for b, (a, c) in enumerate(case.lengths)]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("mask_heads", "blocks", "batch"), [(1, (16, 64), 1), (2, (32, 16), 4), (4, (16, 48), 4)])
def test_block_masks(impl: str, mask_heads: int, blocks: tuple[int, int], batch: int, device: str):
    case = Case("blocks", ((40, 130), (7, 9), (0, 3), (1, 100)), page=8)
    problem = build(case, torch.float16, device)
    mask = random_block_mask((40, 144), blocks, mask_heads, batch=batch, density=0.5, causal=False, device=device)
    o, lse = paged_attention(problem.q, problem.cache, mask=mask, **problem.kwargs, return_lse=True, impl=impl)
    seen = listed(mask.to_dense().cpu(), case)
    oracle, eager = (by_the_book(problem, d, seen) for d in (torch.float64, torch.float16))
    assert_close_to_oracle(o, oracle[0], eager[0], "o")
    assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=2**-10)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("list_heads", [2, 4])
def test_page_lists(impl: str, list_heads: int, device: str):
    """Decode over chosen pages of each head, the others poisoned."""
    case = Case("pages", DECODE, page=8)
    problem = build(case, torch.float16, device)
    pages = torch.tensor([[0, 3, -1, 16], [5, -1, 2, 90], [0, 6, 1, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    lists = pages[:list_heads].expand(len(case.lengths), -1, -1).contiguous()
    seen = torch.zeros(1, list_heads, 1, 136, dtype=torch.bool)
    for h in range(list_heads):
        for page in pages[h].tolist():
            if page >= 0:
                seen[0, h, 0, page * 8 : page * 8 + 8] = True
    used = seen.view(2, -1, 17, 8).any(1).any(-1)  # [Hkv, pages]
    for b, (_, length) in enumerate(case.lengths):
        for i in range(-(-length // 8)):
            for head in (~used[:, i]).nonzero()[:, 0].tolist():
                problem.cache.k[problem.tables[b][i], :, head] = math.nan
                problem.cache.v[problem.tables[b][i], :, head] = math.nan
    for counts in (None, torch.full(lists.shape[:2], 2, dtype=torch.int32, device=device)):
        if counts is not None:
            seen = torch.zeros_like(seen)
            for h in range(list_heads):
                for page in pages[h, :2].tolist():
                    seen[0, h, 0, max(page, 0) * 8 : max(page, 0) * 8 + 8 * (page >= 0)] = True
        mask = PageLists(lists.to(device), counts)
        o, lse = paged_attention(problem.q, problem.cache, mask=mask, **problem.kwargs, return_lse=True, impl=impl)
        oracle, eager = (by_the_book(problem, d, listed(seen, case)) for d in (torch.float64, torch.float16))
        assert_close_to_oracle(o, oracle[0], eager[0], "o")
        assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=2**-10)


def test_pages_are_block_sparse_attention_without_pages(device: str):
    """The same mask, the same keys, another operator."""
    case = Case("same", ((70, 100),), dims=(32, 32))
    problem = build(case, torch.float32, device)
    mask = random_block_mask((70, 100), (16, 16), 2, density=0.4, device=device)
    o = paged_attention(problem.q, problem.cache, mask=mask, **problem.kwargs, impl="reference")
    k, v = (t[0][None].to(device) for t in (problem.keys, problem.values))
    expected = block_sparse_attention(problem.q[None], k, v, mask, causal=True, impl="reference")[0]
    torch.testing.assert_close(o, expected)


# ---- invariants ----


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["mixed", "decode", "e5m2-decode"])
def test_where_pages_lie_changes_no_bit(impl: str, name: str, device: str):
    problem = build(IDS[name], torch.float16, device)
    results = [paged_attention(problem.q, problem.cache, **problem.kwargs, return_lse=True, impl=impl)]
    c = problem.cache
    order = torch.randperm(c.num_pages, device=device)
    back = order.argsort().int()
    table = torch.where(c.page_table >= 0, back[c.page_table.clamp(min=0).long()], -1)
    bits = (lambda t: t.view(torch.uint8)[order].view(t.dtype)) if c.k.dtype in FLOAT8 else (lambda t: t[order])
    moved = replace(c, k=bits(c.k), v=bits(c.v), page_table=table)
    results.append(paged_attention(problem.q, moved, **problem.kwargs, return_lse=True, impl=impl))
    results.append(paged_attention(problem.q, problem.cache, **problem.kwargs, return_lse=True, impl=impl))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("positions", ["", "rope", "alibi"])
def test_a_chunk_is_the_rows_of_the_whole_and_decode_the_last(impl: str, positions: str, device: str):
    whole = Case("whole", ((40, 60),), window=(30, 0), softcap=4.0, positions=positions, page=8)
    problem = build(whole, torch.float16, device)
    o, lse = paged_attention(problem.q, problem.cache, **problem.kwargs, return_lse=True, impl=impl)
    tables = {"page_table": problem.cache.page_table}
    for first, last in ((0, 9), (13, 40), (39, 40)):
        # A chunk that ends at row `last` sees a cache that ends there.
        shorter = torch.tensor([60 - 40 + last], dtype=torch.int32, device=device)
        cache = PagedCache(problem.cache.k, problem.cache.v, shorter, **tables)
        cu = torch.tensor([0, last - first], dtype=torch.int32, device=device)
        kwargs = problem.kwargs | {"cu_seqlens_q": cu, "max_seqlen_q": last - first}
        if last - first == 1:
            kwargs |= {"cu_seqlens_q": None, "max_seqlen_q": None}
        part, part_lse = paged_attention(problem.q[first:last], cache, **kwargs, return_lse=True, impl=impl)
        torch.testing.assert_close(part, o[first:last], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(part_lse, lse[:, first:last], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_padding_bounds_and_out(impl: str, device: str):
    """Rows past the last sequence, a missing bound, a strided ``out``, and a cache that is a strided view."""
    problem = build(IDS["mixed"], torch.float16, device)
    plain, plain_lse = paged_attention(problem.q, problem.cache, **problem.kwargs, return_lse=True, impl=impl)
    c = problem.cache
    shape = (*c.k.shape[:2], 2 * c.k.shape[2], c.k.shape[3] + 8)
    wide = [torch.full(shape, math.nan, device=device, dtype=c.k.dtype) for _ in range(2)]
    for w, t in zip(wide, (c.k, c.v), strict=True):
        w[:, :, ::2, 4:-4] = t
    views = [w[:, :, ::2, 4:-4] for w in wide]
    cache = PagedCache(*views, c.seq_lens, torch.nn.functional.pad(c.page_table, (0, 3))[:, :-3])
    rows = problem.q.shape[0]
    q = torch.cat([problem.q, torch.full_like(problem.q[:5], math.nan)])
    out = torch.full((4, rows + 5, 16), 7.0, device=device, dtype=q.dtype).transpose(0, 1)
    kwargs = problem.kwargs | {"max_seqlen_q": None}
    o, lse = paged_attention(q, cache, **kwargs, out=out, return_lse=True, impl=impl)
    assert o is out
    torch.testing.assert_close(o[:rows], plain, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse[:, :rows], plain_lse, atol=1e-4, rtol=1e-4)
    assert (o[rows:] == 0).all()
    assert (lse[:, rows:] == -math.inf).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_has_no_page_is_hidden(impl: str, device: str):
    """Tables that end before their sequence, and page numbers that do not exist."""
    case = Case("short", ((1, 50), (1, 40)), page=16)
    problem = build(case, torch.float16, device)
    table = problem.cache.page_table.clone()[:, :3]
    table[1, 1] = 10_000
    cache = replace(problem.cache, page_table=table)
    with pytest.raises(ValueError, match="page_table: expected page numbers below"):
        cache.validate()
    with pytest.raises(ValueError, match="pages for the 50 tokens of sequence 0"):
        replace(cache, page_table=table.clamp(max=0)).validate()
    seen = [s.clone() for s in problem.seen]
    seen[0][:, 48:] = False
    seen[1][:, 16:32] = False
    o = paged_attention(problem.q, cache, impl=impl)
    oracle, eager = (by_the_book(problem, d, seen) for d in (torch.float64, torch.float16))
    assert_close_to_oracle(o, oracle[0], eager[0], "o")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_short_custom_mask_hides_and_reads_nothing_outside(impl: str, device: str):
    problem = build(Case("short", ((3, 20),), causal=False), torch.float16, device)
    mask = torch.ones(45, dtype=torch.bool, device=device)
    o = paged_attention(problem.q, problem.cache, custom_mask=mask, **problem.kwargs, impl=impl)
    seen = [torch.arange(60).view(3, 20) < 45]
    oracle, eager = (by_the_book(problem, d, seen) for d in (torch.float64, torch.float16))
    assert_close_to_oracle(o, oracle[0], eager[0], "o")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["mixed", "decode-window-sinks", "custom-big"])
@pytest.mark.parametrize("form", ["dense", "csr"])
def test_tables_with_strides(form: str, name: str, impl: str, device: str):
    """Columns of larger tensors: nothing between their entries is read."""
    problem = build(replace(IDS[name], form=form), torch.float16, device)
    cache, kwargs = problem.cache, problem.kwargs

    def spread(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        wide = torch.full((*t.shape, 3), 255 if t.dtype == torch.uint8 else -(2**20), dtype=t.dtype, device=t.device)
        wide[..., 1] = t
        return wide[..., 1]

    names = ("seq_lens", "page_table", "indptr", "indices")
    strided = replace(cache, **{n: spread(getattr(cache, n)) for n in names})
    given = {n: spread(kwargs.get(n)) for n in ("cu_seqlens_q", "sinks")}
    if "custom_mask" in kwargs:
        sizes = [(a * c + 7) // 8 for a, c in problem.case.lengths]
        offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], device=device)
        mask = kwargs["custom_mask"].mask
        given["custom_mask"] = replace(kwargs["custom_mask"], mask=spread(mask), offsets=spread(offsets))
    expected = paged_attention(problem.q, cache, **kwargs, impl=impl, return_lse=True)
    got = paged_attention(problem.q, strided, **(kwargs | given), impl=impl, return_lse=True)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("side", [2**31 - 1, 2**40])
def test_windows_wider_than_any_sequence(side: int, impl: str, device: str):
    problem = build(replace(IDS["mixed"], causal=False), torch.float16, device)
    expected = paged_attention(problem.q, problem.cache, **problem.kwargs, impl=impl)
    for window in ((None, side), (side, side)):
        kwargs = problem.kwargs | {"window": window}
        assert torch.equal(paged_attention(problem.q, problem.cache, **kwargs, impl=impl), expected)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_output_has_memory_of_its_own(impl: str, device: str):
    problem = build(IDS["mixed"], torch.float16, device)
    for out in (problem.q, problem.q.clone()):
        if out is problem.q:
            with pytest.raises(ValueError, match="out: expected memory of its own"):
                paged_attention(problem.q, problem.cache, **problem.kwargs, out=out, impl=impl)
        else:
            assert paged_attention(problem.q, problem.cache, **problem.kwargs, out=out, impl=impl) is out


@pytest.mark.parametrize("bounds", [(9, 3, 0), (5, 0, 3), (-4, 2, 100)])
def test_bounds_out_of_order_stay_inside(bounds: tuple[int, ...], device: str):
    """Results mean nothing then, but nothing outside of the tensors is read or written."""
    problem = build(Case("bounds", ((4, 20), (5, 9))), torch.float16, device)
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    guard = torch.full((3, *problem.q.shape), 7.0, dtype=torch.float16, device=device)
    kwargs = problem.kwargs | {"cu_seqlens_q": cu}
    o = paged_attention(problem.q, problem.cache, **kwargs, out=guard[1], impl="triton")
    assert o.isfinite().all()
    assert (guard[0] == 7).all()
    assert (guard[2] == 7).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nothing_to_do(impl: str, device: str):
    problem = build(Case("none", ((0, 0), (0, 5))), torch.float16, device)
    o, lse = paged_attention(problem.q, problem.cache, **problem.kwargs, return_lse=True, impl=impl)
    assert o.shape == (0, 4, 16)
    assert lse.shape == (4, 0)
    empty = PagedCache(
        *(torch.zeros(0, 16, 2, 16, device=device, dtype=torch.float16) for _ in range(2)),
        torch.zeros(2, dtype=torch.int32, device=device), torch.zeros(2, 0, dtype=torch.int32, device=device),
    )  # fmt: skip
    q = torch.randn(2, 4, 16, device=device, dtype=torch.float16)
    o, lse = paged_attention(q, empty, return_lse=True, impl=impl)
    assert (o == 0).all()
    assert (lse == -math.inf).all()


def test_latent_queries_in_two_parts(device: str):
    problem = build(IDS["mla"], torch.float16, device)
    for impl in ("reference", "triton"):
        joined = paged_attention(problem.q, problem.cache, **problem.kwargs, impl=impl)
        parts = (problem.q[..., :64].contiguous(), problem.q[..., 64:].contiguous())
        assert torch.equal(joined, paged_attention(parts, problem.cache, **problem.kwargs, impl=impl))


def test_reasons():
    problem = build(IDS["decode"], torch.float64)
    assert "float64" in unsupported_reason(problem.q, problem.cache, impl="triton")
    assert unsupported_reason(problem.q, problem.cache, impl="reference") is None
    with pytest.raises(ValueError, match=r"impl: expected .* cannot|impl: expected .* take"):
        paged_attention(problem.q, problem.cache, impl="triton")
    negative = build(IDS["decode"], torch.float16)
    assert "positive scale" in unsupported_reason(negative.q, negative.cache, scale=-1.0, impl="triton")
    far = torch.empty_strided((4, 256, 1, 16), (16, 2**24, 16, 1), dtype=torch.float16, device="meta")
    lens, table = (torch.zeros(shape, dtype=torch.int32, device="meta") for shape in ((1,), (1, 4)))
    cache = PagedCache(far, far, lens, table)
    assert "less than 2^31" in unsupported_reason(far[:1, 0, :], cache, impl="triton")


def test_block_mask_built_for_the_longest(device: str):
    case = Case("chunk", ((5, 64), (5, 20)), page=16)
    problem = build(case, torch.float16, device)
    mask = BlockMask.streaming((5, 64), num_sink_tokens=16, num_local_tokens=16, block_size=16, device=device)
    o = paged_attention(problem.q, problem.cache, mask=mask, **problem.kwargs)
    assert o.isfinite().all()
