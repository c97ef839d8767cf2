"""Block scores from pooled pages: the reference against the definition, the kernels against the reference."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from scores_oracle import lists
from torch import Tensor

from sparseattn.ops.scores import (
    Forced,
    Rule,
    antidiagonal_scores,
    chunks,
    pool_pages,
    pooled_blocks,
    pooled_reference,
    pooled_scores,
    pooled_unsupported_reason,
)
from sparseattn.ops.scores.antidiagonal_rules import antidiagonal_blocks
from sparseattn.ops.scores.pooled_problem import PooledProblem
from sparseattn.ops.sequences import resolve_sequences

# feature, page size, row softmax, aggregate: FlashPrefill, Quest by tile and by row, the oracles, finer means.
METHODS = {
    "flashprefill": ("mean", 64, False, "mean"),
    "bound": ("bound", 16, False, "mean"),
    "bound_rows": ("bound", 32, True, "max"),
    "mass": ("mean", 1, True, "mean"),
    "peak": ("mean", 1, True, "max"),
    "fine": ("mean", 8, False, "max"),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
# Sq, Sk, causal, head_dim: aligned, ragged, chunks at every kind of offset, rows that see nothing, decoding.
SHAPES = {
    "aligned": (128, 128, True, 16),
    "odd": (131, 131, True, 24),
    "offset": (70, 197, True, 16),
    "decode": (1, 200, True, 16),
    "more_queries": (150, 70, True, 16),
    "two_sided": (100, 133, False, 16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(
    sq: int, sk: int, dim: int, dtype: torch.dtype, device: str = "cpu", batch: int = 1, heads: int = 4
) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, heads, dim, dtype=torch.float64) * 2
    k = torch.randn(batch, sk, heads // 2, dim, dtype=torch.float64)
    return q.to(device, dtype), k.to(device, dtype)


def options_of(method: tuple) -> dict[str, Any]:
    feature, page_size, row_softmax, aggregate = method
    return {"feature": feature, "page_size": page_size, "row_softmax": row_softmax, "aggregate": aggregate}


def slow_scores(q: Tensor, k: Tensor, method: tuple, block: int, causal: bool, scale: float) -> Tensor:
    """``q [Sq, Hq, D]``, ``k [Sk, Hkv, D]`` -> linear scores ``[Hq, MB, NB]``, a row and a page at a time."""
    feature, page, softmax, aggregate = method
    (sq, hq, _), (sk, hkv, _) = q.shape, k.shape
    k = k.repeat_interleave(hq // hkv, 1)
    out = torch.zeros(hq, -(-sq // block), -(-sk // block), dtype=torch.float64)
    peak = out.clone()
    for i in range(sq):
        values = torch.zeros(hq, out.shape[2], dtype=torch.float64)
        for start in range(0, sk, page):
            if causal and start + page - 1 > i + sk - sq:
                break
            keys = k[start : start + page]
            if feature == "mean":
                logit = scale * (q[i] * keys.mean(0)).sum(-1)
            else:  # the largest sum of elementwise products that the page's box allows
                ends = torch.stack([scale * q[i] * keys.amax(0), scale * q[i] * keys.amin(0)])
                logit = ends.amax(0).sum(-1)
            values[:, start // block] += logit.exp()
        if softmax:
            values /= values.sum(-1, keepdim=True).clamp(min=1e-300)
        out[:, i // block] += values
        peak[:, i // block] = torch.maximum(peak[:, i // block], values)
    rows = torch.tensor([min(block, sq - m * block) for m in range(out.shape[1])])
    return peak if aggregate == "max" else out / rows[:, None]


@shapes
@methods
def test_scores_follow_the_definition(shape: tuple, method: tuple) -> None:
    sq, sk, causal, dim = shape
    q, k = make(sq, sk, dim, torch.float64)
    scores = pooled_scores(q, k, block_size=64, causal=causal, scale=0.2, **options_of(method))
    expected = slow_scores(q[0], k[0], method, 64, causal, 0.2)
    torch.testing.assert_close(scores[0].exp(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("method", [METHODS["bound"], METHODS["mass"]], ids=["bound", "mass"])
def test_negative_and_zero_scale(scale: float, method: tuple) -> None:
    q, k = make(131, 140, 16, torch.float64)
    scores = pooled_scores(q, k, block_size=64, scale=scale, **options_of(method))
    torch.testing.assert_close(scores[0].exp(), slow_scores(q[0], k[0], method, 64, True, scale), rtol=1e-10, atol=0)


def test_the_oracle_is_the_softmax() -> None:
    q, k = make(100, 230, 16, torch.float64, heads=2)
    logits = torch.einsum("ihd,jd->hij", q[0], k[0, :, 0]) / 4
    hidden = torch.arange(230) > torch.arange(100)[:, None] + 130
    p = torch.nn.functional.pad(logits.masked_fill(hidden, -math.inf).softmax(-1), (0, 26)).view(2, 100, 4, 64).sum(-1)
    exact = {"page_size": 1, "row_softmax": True, "block_size": 64}
    mass = pooled_scores(q, k, aggregate="mean", **exact)[0].exp()
    torch.testing.assert_close(mass, torch.stack([p[:, :64].mean(1), p[:, 64:].mean(1)], 1))
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    peak = pooled_scores(q, k, aggregate="max", **exact)[0].exp()
    torch.testing.assert_close(peak, torch.stack([p[:, :64].amax(1), p[:, 64:].amax(1)], 1))


@pytest.mark.parametrize("feature", ["mean", "bound"])
def test_bounds_bound_and_means_are_means(feature: str, device: str) -> None:
    k = torch.randn(2, 70, 3, 8, device=device)
    pages = pool_pages(k, feature, 16)
    assert all(page.shape == (2, 5, 3, 8) for page in pages)
    if feature == "mean":
        torch.testing.assert_close(pages[0][:, 4], k[:, 64:].mean(1))
        torch.testing.assert_close(pages[0][1, 1], k[1, 16:32].mean(0))
    else:
        high, low = pages
        q = torch.randn(3, 8, device=device)
        bound = (q.clamp(min=0) * high + q.clamp(max=0) * low).sum(-1)
        exact = torch.nn.functional.pad((q * k).sum(-1), (0, 0, 0, 10), value=-math.inf).view(2, 5, 16, 3).amax(2)
        assert (bound >= exact - 1e-5).all()


@pytest.mark.parametrize("chunk_blocks", [1, 3])
def test_every_chunking_scores_alike(chunk_blocks: int) -> None:
    q, k = make(250, 300, 16, torch.float64, heads=2)
    s = resolve_sequences(q, k)
    for method in METHODS.values():
        feature, page, softmax, aggregate = method
        p = PooledProblem(s, feature, page, 64, True, 0.2, softmax, aggregate)
        got = pooled_reference.block_scores(q, k, p, chunk_blocks=chunk_blocks)
        expected = pooled_reference.block_scores(q, k, p)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture
def triton_device(device: str) -> str:
    """A device the kernels run on here: the CPU under the interpreter, or the GPU."""
    probe = torch.zeros(1, 1, 1, 16, device=device)
    reason = pooled_unsupported_reason(probe, probe, "triton")
    if reason is not None and device == "cpu":
        pytest.skip(reason)
    assert reason is None
    return device


@shapes
@methods
def test_triton_scores_match_the_reference(shape: tuple, method: tuple, triton_device: str) -> None:
    sq, sk, causal, dim = shape
    q, k = make(sq, sk, dim, torch.float32, triton_device, heads=2)
    options = {"block_size": 64, "causal": causal, **options_of(method)}
    expected = pooled_scores(q, k, impl="reference", **options)
    torch.testing.assert_close(pooled_scores(q, k, impl="triton", **options), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("dim", "scale"), [(80, None), (36, -0.4)])
def test_triton_takes_any_head_dim_and_scale(dim: int, scale: float | None, triton_device: str) -> None:
    q, k = make(133, 200, dim, torch.float16, triton_device, heads=2)
    for method in (METHODS["flashprefill"], METHODS["bound"]):
        options = {"block_size": 128, "scale": scale, **options_of(method)}
        expected = pooled_scores(q, k, impl="reference", **options)
        torch.testing.assert_close(pooled_scores(q, k, impl="triton", **options), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["flashprefill", "bound_rows", "mass"])
def test_triton_takes_ragged_batches(name: str, triton_device: str) -> None:
    method = METHODS[name]
    lengths = [(130, 130), (64, 149), (0, 10), (7, 65)]
    parts = [make(sq, sk, 16, torch.float32, triton_device, heads=2) for sq, sk in lengths]
    q, k = (torch.cat([p[i][0] for p in parts]) for i in (0, 1))
    cu_q, cu_k = (
        torch.tensor([0, *[n[i] for n in lengths]], dtype=torch.int32, device=triton_device).cumsum(0).int()
        for i in (0, 1)
    )
    s = resolve_sequences(q, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=130, max_seqlen_k=149)
    options = {"block_size": 64, **options_of(method)}
    scores = pooled_scores(q, k, sequences=s, impl="triton", **options)
    expected = pooled_scores(q, k, sequences=s, impl="reference", **options)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=2e-4)
    for b, (sq, sk) in enumerate(lengths):
        if sq:
            alone = pooled_scores(*parts[b], impl="triton", **options)[0]
            torch.testing.assert_close(scores[b, :, : -(-sq // 64), : -(-sk // 64)], alone, rtol=1e-4, atol=2e-4)
    padded_q, padded_k = make(100, 140, 16, torch.float32, triton_device, 2, heads=2)
    ranges_q = torch.tensor([[0, 100], [20, 90]], dtype=torch.int32, device=triton_device)
    ranges_k = torch.tensor([[3, 140], [0, 77]], dtype=torch.int32, device=triton_device)
    s = resolve_sequences(padded_q, padded_k, ranges_q=ranges_q, ranges_k=ranges_k)
    got = [pooled_scores(padded_q, padded_k, sequences=s, impl=impl, **options) for impl in ("triton", "reference")]
    torch.testing.assert_close(*got, rtol=1e-4, atol=2e-4)


def test_triton_reads_any_strides(triton_device: str) -> None:
    q, k = make(100, 140, 16, torch.float32, triton_device, heads=2)
    bhsd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    interleaved = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in (q, k)]
    for method in (METHODS["bound"], METHODS["mass"]):
        options = {"block_size": 64, "impl": "triton", **options_of(method)}
        expected = pooled_scores(q, k, **options)
        assert torch.equal(pooled_scores(*bhsd, **options), expected)
        assert torch.equal(pooled_scores(*interleaved, **options), expected)


RULES = {
    "relative": Rule("relative", (0.2,)),
    "cumulative": Rule("cumulative", (0.7,)),
    "budget": Rule("topk", num_blocks=2),
    "share": Rule("global", density=0.4),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("group_shared", [False, True])
def test_triton_blocks_match_the_reference(rule: Rule, group_shared: bool, triton_device: str) -> None:
    q, k = make(130, 230, 16, torch.float32, triton_device)
    for aggregate in ("mean", "max") if group_shared else ("mean",):
        options = {"block_size": 64, "page_size": 64, "aggregate": aggregate, "group_shared": group_shared}
        got = [lists(*pooled_blocks(q, k, rule, impl=impl, **options)) for impl in ("triton", "reference")]
        assert got[0] == got[1]


def test_triton_selects_in_chunks(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    pytest.importorskip("triton")
    q, k = make(200, 300, 16, torch.float32, triton_device)
    rule, options = Rule("relative", (0.3,)), {"block_size": 64, "page_size": 32, "group_shared": True}
    whole = lists(*pooled_blocks(q, k, rule, impl="triton", **options))
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 1)  # one row of blocks at a time
    assert lists(*pooled_blocks(q, k, rule, impl="triton", **options)) == whole


# -------------------------------------------------------------------------------------------------------- operator


def test_a_group_shares_by_its_aggregate() -> None:
    q, k = make(200, 300, 16, torch.float64)
    scores = pooled_scores(q, k, block_size=64, page_size=64).exp().unflatten(1, (2, 2))
    mean = pooled_reference.group_scores(scores.flatten(1, 2).log(), 2, "mean").exp()
    torch.testing.assert_close(mean, scores.mean(2))
    assert torch.equal(pooled_reference.group_scores(scores.flatten(1, 2), 2, "max"), scores.amax(2))


def test_budgets_bound_the_lists() -> None:
    q, k = make(640, 640, 16, torch.float32)
    forced = Forced(1, 0)
    counts, indices = pooled_blocks(q, k, Rule("topk", num_blocks=3), block_size=64, page_size=64, forced=forced)
    assert indices.shape[-1] == 3
    assert counts[0, 0].tolist() == [1, 2, *[3] * 8]
    _, indices = pooled_blocks(q, k, Rule("relative", (0.0,), max_blocks=4), block_size=64, page_size=64, forced=forced)
    assert indices.shape[-1] == 4
    _, indices = pooled_blocks(q, k, Rule("topk", num_blocks=1), block_size=64, page_size=64, forced=Forced(64, 64, 64))
    assert indices.shape[-1] == 10  # the last query blocks list all they see


def test_operators_pass_opcheck(device: str) -> None:
    q, k = make(100, 130, 16, torch.float32, device)
    layout = (q, k, None, None, None, None, 1, 100, 130)
    rule = ("relative", [0.5], None, None, None, 1, 0, 0, "reference")
    args = (*layout, "mean", 64, 64, 0.25, True, False, "mean", True, *rule)
    torch.library.opcheck(torch.ops.sparseattn.pooled_blocks.default, args)
    args = (*layout, 8, 64, 0.25, True, "max", "topk", [0.5], 0.3, None, 2, 1, 0, 0, "reference")
    torch.library.opcheck(torch.ops.sparseattn.antidiagonal_blocks.default, args)


def test_operator_compiles_whole(device: str) -> None:
    q, k = make(200, 200, 16, torch.float32, device)

    def select(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return pooled_blocks(q, k, Rule("relative", (0.5, 0.6, 0.7, 0.8)), block_size=64, page_size=64)

    compiled = torch.compile(select, fullgraph=True, backend="eager" if device == "cpu" else "inductor")
    assert lists(*compiled(q, k)) == lists(*select(q, k))


def test_empty_tensors(triton_device: str) -> None:
    for sq, sk in ((0, 5), (5, 0)):
        q, k = make(sq, sk, 16, torch.float32, triton_device)
        for impl in ("reference", "triton"):
            counts, indices = pooled_blocks(q, k, Rule(), block_size=64, page_size=64, impl=impl)
            assert counts.shape == (1, 4, -(-sq // 64))
            assert indices.shape == (1, 4, -(-sq // 64), -(-sk // 64))
            assert not counts.any()


def test_antidiagonal_scores_by_their_largest_row() -> None:
    q, k = make(64, 128, 16, torch.float64)
    # A chunk of eight queries is one row of cells: the score is the largest of the block's eight.
    rows = [antidiagonal_scores(q[:, i : i + 8], k[:, : i + 72], block_size=64)[0, :, 0] for i in range(0, 64, 8)]
    expected = torch.stack([torch.nn.functional.pad(row, (0, 2 - row.shape[-1])) for row in rows]).amax(0)
    got = antidiagonal_scores(q, k, block_size=64, aggregate="max")
    torch.testing.assert_close(got[0, :, 0], expected)


def test_triton_antidiagonal_rules_match_the_reference(triton_device: str) -> None:
    q, k = make(70, 200, 16, torch.float32, triton_device, heads=2)
    for aggregate, rule in (("mean", Rule("global", density=0.5)), ("max", Rule("topk", num_blocks=2))):
        options = {"block_size": 64, "aggregate": aggregate}
        got = [lists(*antidiagonal_blocks(q, k, rule, impl=impl, **options)) for impl in ("triton", "reference")]
        assert got[0] == got[1]


@pytest.mark.gpu
def test_a_new_length_compiles_nothing() -> None:
    pooled = importlib.import_module("sparseattn.ops.scores.pooled_triton")
    chosen = importlib.import_module("sparseattn.ops.scores.rules_triton")

    def compiled() -> int:
        functions = (pooled._pool_kernel, pooled._pooled_scores_kernel, pooled._group_kernel, chosen._choose_kernel)
        return sum(len(caches[0]) for f in functions for caches in f.device_caches.values())

    def select(batch: int, sq: int, sk: int) -> None:
        q, k = make(sq, sk, 64, torch.bfloat16, "cuda", batch)
        pooled_blocks(q, k, Rule(), group_shared=True)

    select(1, 1024, 1024)
    before = compiled()
    for batch, sq, sk in ((1, 2048, 2048), (2, 1001, 1001), (1, 77, 4099), (3, 16, 16), (1, 1, 1)):
        select(batch, sq, sk)
    assert compiled() == before


@pytest.mark.gpu
@methods
def test_gpu_scores_at_full_tiles(method: tuple) -> None:
    for dtype, block in ((torch.bfloat16, 128), (torch.float32, 128), (torch.float16, 64)):
        q, k = make(1500, 2001, 128, dtype, "cuda")
        options = {"block_size": block, **options_of(method)}
        got = pooled_scores(q, k, **options)
        torch.testing.assert_close(got, pooled_scores(q, k, impl="reference", **options), rtol=2e-2, atol=2e-2)
        assert torch.equal(got, pooled_scores(q, k, **options))


@pytest.mark.gpu
def test_selection_in_a_cuda_graph_without_waiting() -> None:
    q, k = make(3000, 3000, 64, torch.bfloat16, "cuda")
    rules = (Rule("relative", (0.1,)), Rule("global", density=0.2))
    expected = [lists(*pooled_blocks(q, k, rule)) for rule in rules]
    static_q = torch.zeros_like(q)
    for rule, right in zip(rules, expected, strict=True):
        torch.cuda.set_sync_debug_mode("error")
        try:
            pooled_blocks(static_q, k, rule)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        static_q.zero_()
        with torch.cuda.graph(graph):
            counts, indices = pooled_blocks(static_q, k, rule)
        static_q.copy_(q)
        graph.replay()
        assert lists(counts, indices) == right


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "median"}, "feature: expected one of"),
        ({"page_size": 24}, r"page_size: expected one of \(1, 8, 16, 32, 64, 128\), got 24"),
        ({"page_size": 128, "block_size": 64}, r"page_size: expected one of \(1, 8, 16, 32, 64\), got 128"),
        ({"block_size": 96}, "block_size: expected one of"),
        ({"aggregate": "sum"}, "aggregate: expected one of"),
        ({"scale": math.nan}, "scale: expected a finite number"),
        ({"impl": "cuda"}, "impl: expected one of"),
        ({"impl": "triton"}, r"float64.*impl=.reference"),
        ({"rule": Rule("relative", (0.5, 0.5))}, "threshold: expected a number or 4 numbers"),
        ({"rule": Rule("relative", (0.5,) * 4), "group_shared": True}, "threshold: expected a number or 2 numbers"),
        ({"rule": Rule("relative", (math.nan,))}, r"threshold: expected a number in \[0, 1\]"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    q, k = make(64, 64, 16, torch.float64)
    with pytest.raises(ValueError, match=message):
        pooled_blocks(q, k, **({"rule": Rule()} | options))


@pytest.mark.parametrize(
    ("q", "k", "kind", "message"),
    [
        (torch.zeros(64, 4, 16), torch.zeros(64, 4, 16), ValueError, "q: expected a 4-D tensor"),
        (torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 3, 16), ValueError, "q: expected heads that are a multiple"),
        (torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 4, 32), ValueError, "k: expected a positive head_dim"),
        (torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 4, 16).double(), TypeError, "k: expected dtype"),
        (torch.zeros(1, 64, 4, 16).int(), torch.zeros(1, 64, 4, 16).int(), TypeError, "q: expected a floating-point"),
    ],
    ids=["rank", "heads", "head_dim", "dtype", "int"],
)
def test_bad_tensors(q: Tensor, k: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        pooled_scores(q, k)
