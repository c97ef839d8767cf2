"""Attention over block-sparse rows against the book: the reference, the Triton kernel, and what must always hold."""

from __future__ import annotations

import math
import re

import pytest
import torch
from bsr_cases import CASES, Case, build, by_the_book

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.ops.bsr import BlockRows, RepeatedRows, attend_rows, bsr_attention, make_rows, unsupported_reason
from sparseattn.ops.bsr.rows import ascending_lists
from sparseattn.ops.paged import ALiBi, CustomMask, RoPE
from sparseattn.testing import assert_close_to_oracle

IDS = {case.id: case for case in CASES}


@pytest.fixture(autouse=True)
def _short_shares(monkeypatch: pytest.MonkeyPatch):
    """Shares of one tile, so that short lists are cut, too."""
    triton = pytest.importorskip("sparseattn.ops.bsr.triton", reason="needs Triton")
    monkeypatch.setattr(triton, "_LEAST_TILES", 1)


def check(case: Case, dtype: torch.dtype, impl: str, device: str) -> None:
    problem = build(case, dtype, device)
    o, lse = bsr_attention(
        problem.q, problem.k, problem.v, *problem.arguments, **problem.kwargs, validate=True, return_lse=True, impl=impl
    )
    assert o.dtype == dtype
    assert o.shape == (*problem.q.shape[:-1], case.dims[1])
    assert lse.shape == (*problem.q.shape[:-3], case.heads[0], case.lengths[0])
    if not case.batch:
        o, lse = o[None], lse[None]
    oracle, eager = by_the_book(problem, torch.float64), by_the_book(problem, dtype)
    if dtype == torch.float64:
        for got, expected in zip((o, lse), oracle, strict=True):
            torch.testing.assert_close(got.cpu(), expected, atol=1e-10, rtol=1e-10)
        return
    assert_close_to_oracle(o, oracle[0], eager[0], "o")
    assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=torch.finfo(dtype).eps)
    empty = oracle[1] == -math.inf
    assert (o[empty.transpose(1, 2).to(o.device)] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case, device: str):
    check(case, torch.float64, "reference", device)
    check(case, torch.bfloat16, "reference", device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case: Case, device: str):
    check(case, torch.float16, "triton", device)


@pytest.mark.parametrize("name", ["r3-c7", "mask-little", "rope-dim80", "r2-c320-one-row"])
def test_triton_full_precision(name: str, device: str):
    check(IDS[name], torch.float32, "triton", device)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 16, 20, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 20, 64, 128])
def test_sizes(rows: int, columns: int):
    for heads, causal, mask in (((4, 4), False, ""), ((8, 2), True, ""), ((4, 1), True, "blocks")):
        for dtype in (torch.float16, torch.bfloat16):
            case = Case("sizes", (rows, columns), (333, 500), heads, (128, 128), causal=causal, mask=mask)
            check(case, dtype, "triton", "cuda")


# ---- what must hold whatever the numbers ----


def dense(shape: tuple[int, int], block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every block, in CSR form."""
    mb, nb = (-(-length // size) for length, size in zip(shape, block, strict=True))
    return torch.arange(mb + 1, dtype=torch.int32) * nb, torch.arange(nb, dtype=torch.int32).repeat(mb)


@pytest.mark.parametrize("block", [(1, 1), (3, 7), (64, 64)])
def test_all_blocks_are_dense_attention(block: tuple[int, int]):
    q, k, v = torch.randn(1, 70, 4, 16), torch.randn(1, 90, 2, 16), torch.randn(1, 90, 2, 16)
    o, lse = bsr_attention(q, k, v, *dense((70, 90), block), block, causal=True, return_lse=True)
    expected, expected_lse = block_sparse_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("block", [(2, 3), (64, 64)])
def test_numbers_of_no_block_are_skipped(block: tuple[int, int], impl: str, device: str):
    """Also ones whose first token is past the range of int32; three times one of them is 2 there."""
    rows, columns = block
    q = torch.randn(rows + 1, 2, 16, dtype=torch.float16, device=device)
    k, v = torch.randn(2, 3 * columns - 1, 2, 16, dtype=torch.float16, device=device).unbind()
    wild = torch.tensor([-1, 0, 3, 2, 2**31 - 1, (2**32 + 2) // 3, -(2**31)], dtype=torch.int32, device=device)
    indptr = torch.tensor([0, 7, 7], dtype=torch.int32, device=device)
    lists = make_rows(indptr, wild, block, (rows + 1, 3 * columns - 1))
    if lists.lists is not None:  # a row of more entries than there are blocks
        wild, indptr = wild[:3], indptr.clamp(max=3)
        lists = make_rows(indptr, wild, block, (rows + 1, 3 * columns - 1))
    got = attend_rows(q, k, v, lists, impl=impl)
    kept = wild[(wild >= 0) & (wild < 3)]
    indptr = torch.tensor([0, len(kept), len(kept)], dtype=torch.int32, device=device)
    torch.testing.assert_close(got, bsr_attention(q, k, v, indptr, kept, block, impl=impl))
    with pytest.raises(ValueError, match="indices"):
        lists.validate()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("size", [2, 64])
def test_wrong_offsets_read_nothing(size: int, impl: str, device: str):
    """What an offset names before the first or past the last block number is no block."""
    q, k, v = torch.randn(3, 3 * size, 1, 16, dtype=torch.float16, device=device).unbind()
    indices = torch.tensor([0, 2], dtype=torch.int32, device=device)
    wrong = torch.tensor([-1, 1, 0, 2**30], dtype=torch.int32, device=device)
    o, lse = bsr_attention(q, k, v, wrong, indices, (size, size), return_lse=True, impl=impl)
    right = torch.tensor([0, 1, 1, 3], dtype=torch.int32, device=device)
    indices = torch.tensor([0, 0, 2], dtype=torch.int32, device=device)
    expected, expected_lse = bsr_attention(q, k, v, right, indices, (size, size), return_lse=True, impl=impl)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("block", [(1, 1), (5, 3), (64, 64)])
def test_perturbed_future_keys_leave_no_trace(block: tuple[int, int], impl: str, device: str):
    q, k, v = torch.randn(3, 18, 2, 16, dtype=torch.float16, device=device).unbind()
    pattern = [t.to(device) for t in dense((18, 18), block)]
    o = bsr_attention(q, k, v, *pattern, block, causal=True, impl=impl)
    k, v = k.clone(), v.clone()
    k[11:] += 1
    v[11:] *= -3
    changed = bsr_attention(q, k, v, *pattern, block, causal=True, impl=impl)
    assert torch.equal(o[:11], changed[:11])
    assert not torch.equal(o[11:], changed[11:])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_scores_far_from_zero(impl: str, device: str):
    """Equal logits of -46341, and values of 1: an LSE in float32 is too coarse to divide by."""
    q = torch.full((3, 4, 128), 64.0, dtype=torch.float16, device=device)
    k = torch.full((7, 2, 128), -64.0, dtype=torch.float16, device=device)
    pattern = [t.to(device) for t in dense((3, 7), (2, 3))]
    o, lse = bsr_attention(q, k, torch.ones_like(k), *pattern, (2, 3), return_lse=True, impl=impl)
    assert (o == 1).all()
    expected = torch.full((4, 3), math.log(7) - 64 * 64 * 128 / 128**0.5, device=device)
    torch.testing.assert_close(lse, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["r3-c7", "batch-own", "r64-c64", "r2-c320-one-row"])
def test_strides_and_out(name: str, impl: str, device: str):
    problem = build(IDS[name], torch.float16, device)
    tensors = problem.q, problem.k, problem.v
    plain, plain_lse = bsr_attention(*tensors, *problem.arguments, **problem.kwargs, return_lse=True, impl=impl)
    turned = [t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in tensors]
    out = torch.full((*plain.shape[:-1], 2 * plain.shape[-1]), math.nan, dtype=plain.dtype, device=device)[..., ::2]
    o, lse = bsr_attention(*turned, *problem.arguments, **problem.kwargs, out=out, return_lse=True, impl=impl)
    assert o is out
    assert torch.equal(o, plain)
    assert torch.equal(lse, plain_lse)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("block", [(2, 3), (64, 64)])
def test_empty_tensors(lengths: tuple[int, int], block: tuple[int, int], device: str):
    m, n = lengths
    q, k = torch.randn(m, 4, 16, device=device), torch.randn(n, 2, 16, device=device)
    indptr = torch.zeros(-(-m // block[0]) + 1, dtype=torch.int32, device=device)
    indices = torch.zeros(0, dtype=torch.int32, device=device)
    o, lse = bsr_attention(q, k, k, indptr, indices, block, causal=True, return_lse=True)
    assert o.shape == (m, 4, 16)
    assert (o == 0).all()
    assert (lse == -math.inf).all()


def test_large_blocks_go_to_block_sparse_attention():
    rows = make_rows(*dense((256, 256), (64, 128)), (64, 128), (256, 256))
    assert isinstance(rows.lists, BlockMask)
    small = make_rows(*dense((256, 256), (32, 128)), (32, 128), (256, 256))
    assert small.lists is None
    q, k, v = torch.randn(3, 256, 2, 16).unbind()
    q.requires_grad_()
    pattern = dense((256, 256), (64, 128))
    bsr_attention(q, k, v, *pattern, (64, 128), causal=True).sum().backward()
    mine, q.grad = q.grad, None
    block_sparse_attention(q[None], k[None], v[None]).sum().backward()
    torch.testing.assert_close(mine, q.grad)
    with pytest.raises(ValueError, match="q: expected tensors without gradients"):
        bsr_attention(q, k, v, *dense((256, 256), (1, 1)), (1, 1))


def test_single_tokens_need_no_matrix_of_blocks(monkeypatch: pytest.MonkeyPatch):
    """16K by 16K tokens: the lists alone are held."""
    n, kept = 1 << 14, 1 << 15
    indptr = torch.linspace(0, kept, n + 1).int()
    indices = torch.randint(n, (kept,), dtype=torch.int32)
    rows = make_rows(indptr, indices, (1, 1), (n, n))
    assert rows.lists is None
    assert rows.bounds.numel() + rows.indices.numel() <= n + 1 + kept
    # And wide lists are not made of a pattern that is too large for them.
    monkeypatch.setattr("sparseattn.ops.bsr.rows._MOST_ENTRIES", 15)
    assert make_rows(*dense((256, 256), (64, 64)), (64, 64), (256, 256)).lists is None


@pytest.mark.parametrize("form", ["ascending", "mixed", "heads", "wrong", "padded"])
def test_lists_by_a_kernel(form: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """The kernel that takes the place of a sort and a dozen operators, lists longer than its steps among them."""
    kernels = pytest.importorskip("sparseattn.ops.bsr.lists_triton", reason="needs Triton")
    monkeypatch.setattr(kernels, "_BLOCK", 16)
    monkeypatch.setattr(kernels, "_OTHERS", 8)
    heads, mb, nb = 2 if form == "heads" else 1, 4, 23
    if form == "padded":
        indices = torch.randint(-2, nb + 3, (2, heads, mb, nb + 3), dtype=torch.int32)
        bounds = torch.randint(-1, nb + 5, (2, heads, mb), dtype=torch.int32)
    else:
        chosen = torch.rand(heads * mb, nb) < torch.tensor([1.0, 0.5, 0.0, 0.3]).repeat(heads)[:, None]
        rows = [row.nonzero()[:, 0] for row in chosen]
        rows = rows if form == "ascending" else [row[torch.randperm(len(row))] for row in rows]
        indices = torch.cat(rows).int()
        ends = chosen.sum(1).cumsum(0).view(heads, mb)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1, -1]])
        bounds = torch.cat([first[:, None], ends], 1).int()[None]
        if form == "wrong":
            indices[::3] = torch.tensor([-1, nb, 3, -(2**31)], dtype=torch.int32).repeat(9)[: len(indices[::3])]
            bounds[0, 0, [0, 2]] = torch.tensor([-3, 10**6], dtype=torch.int32)
    given = bounds.to(device), indices.to(device), nb, min(nb, indices.shape[-1])
    for _ in range(2):
        for got, expected in zip(kernels.lists(*given), ascending_lists(*given), strict=True):
            assert torch.equal(got, expected)


def test_says_what_would_run():
    problem = build(IDS["r3-c7"])
    tensors = (problem.q, problem.k, problem.v)
    rows = make_rows(*problem.arguments, problem.case.lengths)
    assert unsupported_reason(*tensors, rows) is None
    assert "float64" in unsupported_reason(*(t.double() for t in tensors), rows, impl="triton")
    wide = [torch.zeros(t.shape[0], t.shape[1], 512) for t in tensors]
    assert "512" in unsupported_reason(*wide, rows, impl="triton")
    large = make_rows(*dense((128, 128), (64, 64)), (64, 64), (128, 128))
    q = torch.randn(128, 2, 16, dtype=torch.float64)
    assert "float64" in unsupported_reason(q, q, q, large, impl="triton")


# ---- torch ----


@pytest.mark.parametrize("name", ["mask-little", "r4-c2-q-heads-lists"])
def test_opcheck(name: str, device: str):
    from sparseattn.ops.bsr.api import Options, make_call

    problem = build(IDS[name], torch.float32, device)
    mask = problem.kwargs.pop("block_mask", None)
    rows = make_rows(*problem.arguments, problem.case.lengths, mask)
    call = make_call(problem.q, problem.k, problem.v, rows, "auto", Options(**problem.kwargs))
    q = problem.q[None]
    out = torch.empty_like(q)
    lse = torch.empty(1, out.shape[2], out.shape[1], device=device)
    torch.library.opcheck(torch.ops.sparseattn.bsr_attention.default, (q, out, lse, "auto", *call.problem))


@pytest.mark.parametrize("block", [(3, 7), (64, 64)])
def test_compile(block: tuple[int, int], device: str):
    case = Case("compile", block, (70, 150), causal=True)
    problem = build(case, torch.float32, device)
    inputs = (problem.q, problem.k, problem.v, *problem.arguments[:2])

    def step(q, k, v, indptr, indices):
        return bsr_attention(q, k, v, indptr, indices, block, causal=True, return_lse=True)

    expected = step(*inputs)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (64, 64)])
def test_graph_follows_other_patterns(block: tuple[int, int]):
    """No wait for the device anywhere, and a captured call reads the pattern anew."""
    first, second = (
        build(Case("graph", block, (200, 300), causal=True), torch.float16, "cuda", seed) for seed in (0, 1)
    )
    nnz = min(len(p.arguments[1]) for p in (first, second))
    patterns = [(p.arguments[0].clamp(max=nnz), p.arguments[1][:nnz].contiguous()) for p in (first, second)]
    inputs = [t.nan_to_num(0).clone() for t in (first.q, first.k, first.v)]
    held = [t.clone() for t in patterns[0]]
    bsr_attention(*inputs, *held, block, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = bsr_attention(*inputs, *held, block, causal=True)
    for mine, other in zip(held, patterns[1], strict=True):
        mine.copy_(other)
    graph.replay()
    assert torch.equal(o, bsr_attention(*inputs, *patterns[1], block, causal=True))


# ---- bad input ----


def wrong(**changes: object) -> dict[str, object]:
    q, k, v = torch.randn(10, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    indptr, indices = dense((10, 12), (2, 3))
    return {"q": q, "k": k, "v": v, "indptr": indptr, "indices": indices, "block_size": (2, 3), **changes}


BAD = [
    ({"q": [1]}, TypeError, "q: expected a tensor"),
    ({"q": torch.randn(10, 64)}, ValueError, "q: expected [length, heads, D]"),
    ({"k": torch.randn(1, 12, 2, 16)}, ValueError, "k: expected [length, heads, D]"),
    ({"q": torch.zeros(10, 4, 16, dtype=torch.int32)}, TypeError, "q: expected bfloat16"),
    ({"k": torch.randn(12, 2, 16).half()}, TypeError, "k: expected torch.float32 like q"),
    ({"v": torch.randn(12, 2, 16).half()}, TypeError, "v: expected torch.float32 like k"),
    ({"k": torch.randn(12, 2, 8)}, ValueError, "k: expected head_dim 16"),
    ({"v": torch.randn(11, 2, 16)}, ValueError, "v: expected shape"),
    ({"q": torch.randn(10, 3, 16)}, ValueError, "q: expected heads that are a multiple of k's 2"),
    ({"indptr": torch.arange(6)}, TypeError, "indptr: expected an int32 tensor"),
    ({"indices": torch.zeros(3)}, TypeError, "indices: expected an int32 tensor"),
    ({"indptr": torch.zeros(5, dtype=torch.int32)}, ValueError, "indptr: expected [MB + 1]"),
    ({"indices": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, "indptr: expected [B, H, MB]"),
    ({"block_size": 64}, TypeError, "block_size: expected a pair"),
    ({"block_size": (2, 0)}, ValueError, "block_size: expected numbers of at least 1"),
    ({"block_mask": torch.ones(20, 2, 3)}, TypeError, "block_mask: expected bool"),
    ({"block_mask": torch.ones(19, 2, 3, dtype=torch.bool)}, ValueError, "block_mask: expected shape (20, 2, 3)"),
    ({"block_mask": torch.ones(119, dtype=torch.bool)}, ValueError, "block_mask: expected 120 entries"),
    ({"block_mask": torch.ones(14, dtype=torch.uint8)}, ValueError, "block_mask: expected 120 entries"),
    ({"causal": 1}, TypeError, "causal: expected True or False"),
    ({"window": 3}, TypeError, "window: expected (left, right)"),
    ({"softcap": -1.0}, ValueError, "softcap: expected a positive number"),
    ({"sinks": torch.zeros(2)}, ValueError, "sinks: expected shape (4,)"),
    ({"positions": "rope"}, TypeError, "positions: expected RoPE"),
    ({"positions": ALiBi(torch.zeros(2))}, ValueError, "positions: expected slopes of shape (4,)"),
    ({"k_scale": -1.0}, ValueError, "k_scale: expected a positive number"),
    ({"block_size": (2, 5), "indptr": torch.zeros(6, dtype=torch.int32), "gathered": True, "causal": True},
     ValueError, "gathered: expected N a multiple of C = 5"),
    ({"out": torch.empty(10, 4, 16).half()}, TypeError, "out: expected torch.float32 like q"),
    ({"out": torch.empty(10, 4, 8)}, ValueError, "out: expected shape (10, 4, 16)"),
    ({"impl": "gluon"}, ValueError, "impl: expected an implementation that can run this call"),
    ({"impl": "fa3"}, ValueError, "impl: expected one of"),
    ({"indices": dense((10, 12), (2, 3))[1] + 1, "validate": True}, ValueError, "indices: expected column blocks"),
    ({"indices": dense((10, 12), (2, 3))[1] // 2, "validate": True}, ValueError, "indices: expected no block twice"),
    ({"indptr": dense((10, 12), (2, 3))[0] + 1, "validate": True}, ValueError, "indptr: expected numbers ascending"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(changes: dict[str, object], kind: type[Exception], message: str):
    with pytest.raises(kind, match=re.escape(message)):
        bsr_attention(**wrong(**changes))


def test_bad_rows():
    q, k = torch.randn(10, 4, 16), torch.randn(12, 2, 16)
    rows = make_rows(*dense((10, 12), (2, 3)), (2, 3), (10, 12))
    assert isinstance(rows.validate(), BlockRows)
    with pytest.raises(ValueError, match="lengths"):
        attend_rows(q[:9], k, k, rows)
    with pytest.raises(TypeError, match="rows: expected what make_rows returns"):
        attend_rows(q, k, k, None)
    counts = torch.full((1, 4, 5), 4, dtype=torch.int32)
    lists = torch.zeros(1, 4, 5, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="indptr: expected counts"):
        make_rows(counts, lists, (2, 3), (10, 12), validate=True)
    with pytest.raises(ValueError, match="indptr: expected 1, Hkv"):
        attend_rows(q[:, :2], k, k[:, :1].expand(-1, 2, -1), make_rows(counts, lists, (2, 3), (10, 12)))
    bits = CustomMask(torch.zeros(200, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="no offsets"):
        make_rows(*dense((10, 12), (2, 3)), (2, 3), (10, 12), bits)
    with pytest.raises(ValueError, match="even head_dim"):
        attend_rows(q[..., :15], k[..., :15], k, rows, positions=RoPE())


# ---- repeated calls ----


@pytest.mark.parametrize(
    ("impl", "device"),
    [("reference", "cpu"), *(pytest.param(impl, "cuda", marks=pytest.mark.gpu) for impl in ("reference", "triton"))],
)
@pytest.mark.parametrize("name", ["r3-c7", "batch-own", "r64-c64", "e4m3-scales", "r2-c320-one-row", "nothing-listed"])
def test_repeated(name: str, impl: str, device: str):
    """The second call of a form, and calls of other forms between, are what single calls are."""
    problem = build(IDS[name], torch.float16, device)
    scales = {n: problem.kwargs.pop(n) for n in ("scale", "k_scale", "v_scale") if n in problem.kwargs}
    if IDS[name].scales:
        scales["k_scale"] = 0.5
    rows = make_rows(*problem.arguments, problem.case.lengths)
    repeated = RepeatedRows(rows, impl=impl, **problem.kwargs)
    tensors = [t.nan_to_num(0) if t.element_size() > 1 else t for t in (problem.q, problem.k, problem.v)]
    for step in range(3):
        # CUDA rolls no float8.
        q, k, v = (t.view(torch.uint8).roll(step, -3).view(t.dtype) for t in tensors)
        if step == 2:
            q = q.transpose(-3, -2).contiguous().transpose(-3, -2)
        out = torch.empty_like(q) if step == 2 else None
        o, lse = repeated(q, k, v, **scales, out=out)
        expected = attend_rows(q, k, v, rows, **problem.kwargs, **scales, return_lse=True, impl=impl)
        assert torch.equal(o, expected[0])
        assert torch.equal(lse, expected[1])
        assert out is None or o is out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_repeated_with_tensors_that_were_one(device: str):
    """What was one tensor in the first call may be several in the next."""
    x, y, z = torch.randn(3, 20, 2, 16, dtype=torch.float16, device=device).unbind()
    rows = make_rows(*(t.to(device) for t in dense((20, 20), (4, 5))), (4, 5), (20, 20))
    repeated = RepeatedRows(rows)
    for tensors in ((x, x, x), (x, y, z), (y, z, z), (y, z, x), (z, x, z), (x, x, y)):
        assert torch.equal(repeated(*tensors)[0], attend_rows(*tensors, rows))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_strided_sinks_and_outputs_among_the_inputs(impl: str, device: str):
    q, k, v = torch.randn(3, 20, 2, 16, dtype=torch.float16, device=device).unbind()
    rows = make_rows(*(t.to(device) for t in dense((20, 20), (4, 5))), (4, 5), (20, 20))
    sinks = torch.randn(2, 2, device=device)[:, 0]
    o = attend_rows(q, k, v, rows, sinks=sinks, impl=impl)
    assert torch.equal(o, attend_rows(q, k, v, rows, sinks=sinks.contiguous(), impl=impl))
    repeated = RepeatedRows(rows, impl=impl)
    repeated(q, k, v, out=torch.empty_like(q))
    for out in (q, k, v):
        with pytest.raises(ValueError, match="out: expected memory of its own"):
            attend_rows(q, k, v, rows, out=out, impl=impl)
        with pytest.raises(ValueError, match="out: expected memory of its own"):
            repeated(q, k, v, out=out)


def test_repeated_differentiates_where_single_calls_do():
    q, k, v = torch.randn(3, 128, 2, 16).unbind()
    rows = make_rows(*dense((128, 128), (64, 64)), (64, 64), (128, 128))
    repeated = RepeatedRows(rows, causal=True)
    repeated(q, k, v)
    q = q.clone().requires_grad_()
    repeated(q, k, v)[0].sum().backward()
    assert q.grad is not None
    small = RepeatedRows(make_rows(*dense((128, 128), (32, 32)), (32, 32), (128, 128)))
    with pytest.raises(ValueError, match="without gradients"):
        small(q, k, v)
    with torch.no_grad():
        small(q, k, v)
