"""Block scores and top-p selection: the reference against the definition, the kernels against the reference."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from scores_oracle import dense_scores, forced_blocks, greedy_top_p, lists
from torch import Tensor

from sparseattn.ops.scores import (
    ScoreProblem,
    antidiagonal_scores,
    reference,
    row_bounds,
    top_p_blocks,
    unsupported_reason,
    xattention_blocks,
)
from sparseattn.ops.sequences import resolve_sequences

# Sq, Sk, stride, block, causal, head_dim: aligned, ragged, every kind of offset, tails where no pair of the last cells
# exists (Sq % 8 = 1 and Sk % 8 = 1: the only query row pairs with the last key of a cell that lacks it).
SHAPES = {
    "aligned": (128, 128, 8, 64, True, 16),
    "odd": (131, 131, 8, 64, True, 16),
    "offset_1": (70, 71, 8, 64, True, 16),
    "offset_stride": (70, 86, 16, 64, True, 16),
    "offset_block": (70, 134, 4, 64, True, 16),
    "offset_odd": (99, 301, 16, 128, True, 24),
    "decode": (1, 200, 8, 64, True, 16),
    "more_queries": (201, 70, 4, 64, True, 16),
    "no_last_pair": (129, 129, 8, 64, False, 16),
    "two_sided": (100, 133, 8, 64, False, 16),
    "tiny": (3, 5, 4, 64, True, 16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(sq: int, sk: int, dim: int, dtype: torch.dtype, device: str = "cpu", batch: int = 1) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, 4, dim, dtype=torch.float64) * 3
    k = torch.randn(batch, sk, 2, dim, dtype=torch.float64)
    return q.to(device, dtype), k.to(device, dtype)


@shapes
def test_scores_follow_the_definition(shape: tuple) -> None:
    sq, sk, stride, block, causal, dim = shape
    q, k = make(sq, sk, dim, torch.float64)
    scores = antidiagonal_scores(q, k, stride=stride, block_size=block, causal=causal)
    torch.testing.assert_close(scores[0], dense_scores(q[0], k[0], stride, block, causal), rtol=1e-11, atol=1e-13)


@shapes
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_selection_follows_the_definition(shape: tuple, threshold: float) -> None:
    sq, sk, stride, block, causal, dim = shape
    q, k = make(sq, sk, dim, torch.float64)
    scores = dense_scores(q[0], k[0], stride, block, causal)
    got = lists(*xattention_blocks(q, k, threshold, stride=stride, block_size=block, causal=causal))[0]
    share = torch.tensor(threshold).item()  # thresholds travel as float32
    for h in range(scores.shape[0]):
        for m in range(scores.shape[1]):
            forced, visible = forced_blocks(m, sq, sk, block) if causal else (set(), scores.shape[2])
            assert got[h][m] == greedy_top_p(scores[h, m].tolist(), share, forced, visible), (h, m)


@pytest.mark.parametrize("chunk_blocks", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("length", [256, 250])
def test_history_survives_every_chunking(chunk_blocks: int, length: int) -> None:
    # Published code zeroes everything before the current chunk when the length is a multiple of the chunk.
    q, k = make(length, length, 16, torch.float64)
    p = ScoreProblem(resolve_sequences(q, k), 8, 64, True, 0.25)
    scores = reference.antidiagonal_scores(q, k, p, chunk_blocks=chunk_blocks)
    torch.testing.assert_close(scores[0], dense_scores(q[0], k[0], 8, 64, True, 0.25), rtol=1e-11, atol=1e-13)
    assert (scores[0, :, -1, 0] > 0).all()


def test_padded_keys_have_no_mass() -> None:
    # Published code lets zero-padded keys into the softmax with logit 0, which wins when all real logits are negative.
    q = torch.full((1, 70, 1, 16), 3.0)
    k = torch.full((1, 70, 1, 16), -3.0)
    scores = antidiagonal_scores(q, k, block_size=64, causal=False)
    rows = torch.tensor([8.0, 1.0])  # query cells of each block: 64 / 8 and the last, of 6 rows
    torch.testing.assert_close(scores.sum(-1)[0, 0], rows)
    torch.testing.assert_close(scores[0, 0, 0], torch.tensor([8 * 8 / 9, 8 / 9]))


def test_rows_sum_to_their_cells() -> None:
    q, k = make(300, 400, 16, torch.float32)
    total = antidiagonal_scores(q, k, stride=16, block_size=64).sum(-1)
    cells = torch.tensor([4.0, 4.0, 4.0, 4.0, 3.0])
    torch.testing.assert_close(total, cells.expand_as(total))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    q, k = make(131, 131, 16, dtype)
    low = antidiagonal_scores(q, k, block_size=64)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, antidiagonal_scores(q.float(), k.float(), block_size=64), rtol=0, atol=0)


def test_negative_and_zero_scale() -> None:
    q, k = make(131, 131, 16, torch.float64)
    for scale in (-0.3, 0.0):
        scores = antidiagonal_scores(q, k, block_size=64, scale=scale)
        torch.testing.assert_close(scores[0], dense_scores(q[0], k[0], 8, 64, True, scale), rtol=1e-11, atol=1e-13)


# ------------------------------------------------------------------------------------------------------- selection


def run(impl: str, device: str, scores: Tensor, threshold: float | tuple[float, ...], **options: object) -> list:
    scores = scores.to(device)
    reason = unsupported_reason(scores, impl=impl)
    if reason is not None and device == "cpu":
        pytest.skip(reason)  # a machine with a GPU has no interpreter
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return lists(*top_p_blocks(scores, threshold, impl=impl, **options))  # type: ignore[arg-type]


both = pytest.mark.parametrize("impl", ["reference", "triton"])


@both
def test_top_p_by_hand(impl: str, device: str) -> None:
    row = torch.tensor([[[[5.0, 1.0, 3.0, 1.0]]]])
    assert run(impl, device, row, 0.85) == [[[[0, 1, 2]]]]  # the first of two equal scores
    assert run(impl, device, row, 0.8125) == [[[[0, 1, 2]]]]
    assert run(impl, device, row, 0.5) == [[[[0]]]]
    assert run(impl, device, row, 0.0) == [[[[0]]]]  # never an empty row
    assert run(impl, device, row, 1.0) == [[[[0, 1, 2, 3]]]]
    assert run(impl, device, row.flip(-1), 0.5, keep_sink=True) == [[[[0, 3]]]]


@both
def test_top_p_respects_bounds(impl: str, device: str) -> None:
    scores = torch.tensor([1.0, 8.0, 2.0, 4.0, 64.0]).expand(1, 1, 4, 5)
    visible = torch.tensor([[0, 1, 4, 5]], dtype=torch.int32)
    recent = torch.tensor([[0, 0, 3, 3]], dtype=torch.int32)
    # Row 2: 15 visible, of which 0.6 is 9 and block 3 is forced; row 3: the forced 68 of 79 are enough.
    assert run(impl, device, scores, 0.6, visible=visible, recent=recent) == [[[[], [0], [1, 3], [3, 4]]]]


@both
def test_ties_go_to_the_lower_index(impl: str, device: str) -> None:
    scores = torch.ones(1, 1, 1, 8)
    assert run(impl, device, scores, 0.5) == [[[[0, 1, 2, 3]]]]
    assert run(impl, device, scores, 0.51) == [[[[0, 1, 2, 3, 4]]]]
    recent, visible = torch.tensor([[6]], dtype=torch.int32), torch.tensor([[8]], dtype=torch.int32)
    assert run(impl, device, scores, 0.5, visible=visible, recent=recent, keep_sink=True) == [[[[0, 1, 6, 7]]]]


@both
def test_rows_without_mass(impl: str, device: str) -> None:
    scores = torch.zeros(1, 1, 2, 3)
    visible = torch.tensor([[3, 0]], dtype=torch.int32)
    assert run(impl, device, scores, 0.9, visible=visible) == [[[[0], []]]]
    assert run(impl, device, scores, 0.9, visible=visible, keep_sink=True) == [[[[0], []]]]
    assert run(impl, device, scores, 1.0, visible=visible) == [[[[0, 1, 2], []]]]


@both
@pytest.mark.parametrize("columns", [1, 7, 1024, 1025, 2100])
def test_top_p_is_minimal_and_sufficient(impl: str, device: str, columns: int) -> None:
    # Dyadic scores add up exactly in float32 in any order, so both implementations must agree to the block.
    scores = torch.randint(0, 1 << 10, (2, 2, 3, columns)) / 1024.0
    visible = torch.tensor([[columns, max(1, columns // 2), 1]], dtype=torch.int32)
    thresholds = (0.75, 0.25)
    got = run(impl, device, scores, thresholds, visible=visible)
    for b, h, m in [(b, h, m) for b in range(2) for h in range(2) for m in range(3)]:
        n = visible[0, m].item()
        row = scores[b, h, m].tolist()
        kept = got[b][h][m]
        assert kept == greedy_top_p(row, thresholds[h], set(), n)
        mass, need = math.fsum(row[i] for i in kept), thresholds[h] * math.fsum(row[:n])
        assert mass >= need
        assert len(kept) == 1 or mass - min(row[i] for i in kept) < need


@both
def test_thresholds_close_to_one_keep_all_mass(impl: str, device: str) -> None:
    scores = torch.rand(1, 1, 1, 500) + 0.1
    scores[..., 100:110] = 0
    kept = run(impl, device, scores, 1 - 2**-24)[0][0][0]
    assert len(kept) >= 489
    assert not set(kept) & set(range(100, 110))


def test_float64_scores_stay_with_the_reference() -> None:
    with pytest.raises(ValueError, match=r"impl: .*float32 scores"):
        top_p_blocks(torch.ones(1, 1, 1, 2, dtype=torch.float64), 0.5, impl="triton")


# ------------------------------------------------------------------------------------------------- kernels, operator


@pytest.fixture
def triton_device(device: str) -> str:
    """A device the kernels run on here: the CPU under the interpreter, or the GPU."""
    probe = torch.zeros(1, 1, 1, 16, device=device)
    reason = unsupported_reason(probe, probe, impl="triton")
    if reason is not None and device == "cpu":
        pytest.skip(reason)
    assert reason is None
    return device


@shapes
def test_triton_scores_match_the_reference(shape: tuple, triton_device: str) -> None:
    sq, sk, stride, block, causal, dim = shape
    q, k = make(sq, sk, dim, torch.float32, triton_device)
    expected = antidiagonal_scores(
        q.double(), k.double(), stride=stride, block_size=block, causal=causal, impl="reference"
    )
    got = antidiagonal_scores(q, k, stride=stride, block_size=block, causal=causal, impl="triton")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["offset_odd", "two_sided"])
def test_triton_launches_whole_tiles_apart(shape: str, monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    sq, sk, stride, block, causal, dim = SHAPES[shape]
    q, k = make(sq + 600, sk + 600, dim, torch.float32, triton_device)
    options = {"stride": stride, "block_size": block, "causal": causal}
    together = antidiagonal_scores(q, k, **options, impl="triton")
    monkeypatch.setattr("sparseattn.ops.scores.triton._MANY", 1)
    apart = antidiagonal_scores(q, k, **options, impl="triton")
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)
    expected = antidiagonal_scores(q.double(), k.double(), **options, impl="reference")
    torch.testing.assert_close(apart.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [80, 96, 36])
def test_triton_takes_any_head_dim(dim: int, triton_device: str) -> None:
    q, k = make(133, 200, dim, torch.float16, triton_device)
    expected = antidiagonal_scores(q.double(), k.double(), block_size=64, impl="reference")
    got = antidiagonal_scores(q, k, block_size=64, impl="triton")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_triton_scores_in_chunks(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    kernels = pytest.importorskip("sparseattn.ops.scores.triton")
    q, k = make(200, 300, 16, torch.float32, triton_device)
    whole = xattention_blocks(q, k, 0.8, stride=4, block_size=64, impl="triton")
    scores = antidiagonal_scores(q, k, stride=4, block_size=64, impl="triton")
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 1)  # the smallest chunks there are
    assert lists(*xattention_blocks(q, k, 0.8, stride=4, block_size=64, impl="triton")) == lists(*whole)
    assert torch.equal(antidiagonal_scores(q, k, stride=4, block_size=64, impl="triton"), scores)


def test_triton_takes_ragged_batches(triton_device: str) -> None:
    q, k = make(150, 200, 16, torch.float32, triton_device, batch=3)
    ranges_q = torch.tensor([[0, 150], [20, 90], [5, 5]], dtype=torch.int32, device=triton_device)
    ranges_k = torch.tensor([[3, 200], [0, 77], [0, 200]], dtype=torch.int32, device=triton_device)
    s = resolve_sequences(q, k, ranges_q=ranges_q, ranges_k=ranges_k)
    expected = antidiagonal_scores(q.double(), k.double(), block_size=64, sequences=s, impl="reference")
    got = antidiagonal_scores(q, k, block_size=64, sequences=s, impl="triton")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    counts, _ = xattention_blocks(q, k, 0.5, block_size=64, sequences=s, impl="triton")
    assert counts[2].eq(0).all()
    assert counts[1, :, 2].eq(0).all()


def test_triton_reads_any_strides(triton_device: str) -> None:
    q, k = make(140, 140, 16, torch.float32, triton_device)
    expected = antidiagonal_scores(q, k, block_size=64, impl="triton")
    bhsd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    interleaved = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in (q, k)]
    assert torch.equal(antidiagonal_scores(*bhsd, block_size=64, impl="triton"), expected)
    assert interleaved[0].stride(-1) == 2
    assert torch.equal(antidiagonal_scores(*interleaved, block_size=64, impl="triton"), expected)


def test_operator_passes_opcheck(device: str) -> None:
    q, k = make(100, 130, 16, torch.float32, device)
    args = (q, k, None, None, None, None, 1, 100, 130, [0.5], 8, 64, 0.25, True, True, True, 1, "reference")
    # Entries past the count are undefined for kernels; the reference fills them, so outputs can be compared.
    torch.library.opcheck(torch.ops.sparseattn.xattention_blocks.default, args)


def test_operator_compiles_whole(device: str) -> None:
    q, k = make(200, 200, 16, torch.float32, device)

    def select(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return xattention_blocks(q, k, (0.5, 0.6, 0.7, 0.8), block_size=64)

    compiled = torch.compile(select, fullgraph=True, backend="eager" if device == "cpu" else "inductor")
    assert lists(*compiled(q, k)) == lists(*select(q, k))


def test_selection_carries_no_gradient() -> None:
    q, k = make(100, 100, 16, torch.float32)
    counts, indices = xattention_blocks(q.requires_grad_(), k.requires_grad_(), 0.5, block_size=64)
    assert not counts.requires_grad
    assert not indices.requires_grad


@pytest.mark.gpu
def test_a_new_length_compiles_nothing() -> None:
    kernels = importlib.import_module("sparseattn.ops.scores.triton")

    def compiled() -> int:
        functions = (kernels._cells_kernel, kernels._scores_kernel, kernels._top_p_kernel)
        return sum(len(caches[0]) for f in functions for caches in f.device_caches.values())

    def select(batch: int, sq: int, sk: int) -> None:
        q, k = make(sq, sk, 64, torch.bfloat16, "cuda", batch)
        xattention_blocks(q, k, 0.9)

    select(1, 2048, 2048)
    select(1, 1000, 1000)  # tiles that are cut short have a kernel of their own
    before = compiled()
    for batch, sq, sk in ((1, 4096, 4096), (2, 1001, 1001), (1, 77, 4099), (3, 16, 16), (1, 1, 1)):
        select(batch, sq, sk)
    assert compiled() == before


@pytest.mark.gpu
def test_selection_in_a_cuda_graph() -> None:
    q, k = make(3000, 3000, 64, torch.bfloat16, "cuda")
    thresholds = (0.9, 0.8, 0.7, 0.6)
    expected = lists(*xattention_blocks(q, k, thresholds))
    static_q = torch.zeros_like(q)
    xattention_blocks(static_q, k, thresholds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts, indices = xattention_blocks(static_q, k, thresholds)
    static_q.copy_(q)
    graph.replay()
    assert lists(counts, indices) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_scores_at_full_tiles(stride: int, block: int, dtype: torch.dtype) -> None:
    q, k = make(5000, 6001, 128, dtype, "cuda")
    expected = antidiagonal_scores(q.double(), k.double(), stride=stride, block_size=block, impl="reference")
    got = antidiagonal_scores(q, k, stride=stride, block_size=block)
    torch.testing.assert_close(got.double(), expected, rtol=2e-3 if dtype != torch.float32 else 1e-4, atol=1e-4)
    again = antidiagonal_scores(q, k, stride=stride, block_size=block)
    assert torch.equal(got, again)


@pytest.mark.gpu
def test_selection_never_waits_for_the_host() -> None:
    q, k = make(3000, 3000, 64, torch.bfloat16, "cuda")
    xattention_blocks(q, k, 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        xattention_blocks(q, k, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------------------- bounds, errors


@pytest.mark.parametrize(("sq", "sk"), [(300, 430), (300, 300), (128, 256), (300, 100), (1, 129)])
def test_row_bounds(sq: int, sk: int) -> None:
    q, k = torch.zeros(1, sq, 1, 16), torch.zeros(1, sk, 1, 16)
    visible, recent = row_bounds(resolve_sequences(q, k), 128, True, True, q.device)
    for m in range(-(-sq // 128)):
        forced, count = forced_blocks(m, sq, sk, 128)
        assert visible[0, m] == count
        if count:
            assert recent[0, m] == min(max(0, m * 128 + sk - sq) // 128, count)
            assert {0, *range(recent[0, m], count)} == forced


def test_rows_that_see_nothing() -> None:
    q, k = make(201, 70, 16, torch.float32)
    counts, _ = xattention_blocks(q, k, 0.9, block_size=64)
    assert counts[0, 0].tolist() == [0, 0, 1, 2]  # the last 70 rows see keys


@both
def test_empty_tensors(impl: str, device: str) -> None:
    for sq, sk in ((0, 5), (5, 0), (0, 0)):
        q, k = make(sq, sk, 16, torch.float32, device)
        reason = unsupported_reason(q, k, impl=impl)
        if reason is not None and device == "cpu":
            pytest.skip(reason)
        counts, indices = xattention_blocks(q, k, 0.9, block_size=64, impl=impl)
        assert counts.shape == (1, 4, -(-sq // 64))
        assert indices.shape == (1, 4, -(-sq // 64), -(-sk // 64))
        assert not counts.any()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"stride": 5}, ValueError, "stride: expected one of"),
        ({"block_size": 96}, ValueError, "block_size: expected one of"),
        ({"scale": math.inf}, ValueError, "scale: expected a finite number"),
        ({"scale": math.nan}, ValueError, "scale: expected a finite number"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
        ({"threshold": math.nan}, ValueError, r"threshold: expected a number in \[0, 1\], got nan"),
        ({"threshold": -0.1}, ValueError, r"threshold: expected a number in \[0, 1\]"),
        ({"threshold": 1.5}, ValueError, r"threshold: expected a number in \[0, 1\]"),
        ({"threshold": True}, ValueError, r"threshold: expected a number in \[0, 1\]"),
        ({"threshold": (0.5, 0.5)}, ValueError, "threshold: expected a number or 4 numbers"),
        ({"threshold": (0.5, 0.5, 0.5, 2.0)}, ValueError, r"threshold: expected a number in \[0, 1\]"),
    ],
)
def test_bad_options(options: dict, kind: type[Exception], message: str) -> None:
    q, k = make(64, 64, 16, torch.float32)
    with pytest.raises(kind, match=message):
        xattention_blocks(q, k, **({"threshold": 0.9} | options))


@pytest.mark.parametrize(
    ("q", "k", "kind", "message"),
    [
        (torch.zeros(64, 4, 16), torch.zeros(64, 4, 16), ValueError, "q: expected a 4-D tensor"),
        (torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 3, 16), ValueError, "q: expected heads that are a multiple"),
        (torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 4, 32), ValueError, "k: expected a positive head_dim"),
        (torch.zeros(1, 64, 4, 16), torch.zeros(2, 64, 4, 16), ValueError, "k: expected batch size 1"),
        (torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 4, 16).double(), TypeError, "k: expected dtype"),
        (torch.zeros(1, 64, 4, 16).int(), torch.zeros(1, 64, 4, 16).int(), TypeError, "q: expected a floating-point"),
        (torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 4, 16, device="meta"), ValueError, "k: expected device cpu"),
    ],
    ids=["rank", "heads", "head_dim", "batch", "dtype", "int", "device"],
)
def test_bad_tensors(q: Tensor, k: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        xattention_blocks(q, k, 0.9)


def test_bad_selection_arguments() -> None:
    scores = torch.ones(1, 2, 3, 4)
    for options, kind, message in (
        ({"scores": scores[0]}, ValueError, "scores: expected a 4-D tensor"),
        ({"scores": scores.int()}, TypeError, "scores: expected a floating-point tensor"),
        ({"visible": torch.zeros(1, 3)}, TypeError, "visible: expected int32"),
        ({"recent": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, r"recent: expected shape \(1, 3\)"),
    ):
        with pytest.raises(kind, match=message):
            top_p_blocks(**({"scores": scores, "threshold": 0.5} | options))  # type: ignore[arg-type]


def test_explicit_triton_says_why_not() -> None:
    q, k = make(64, 64, 16, torch.float64)
    assert "float64" in (unsupported_reason(q, k, impl="triton") or "")
    with pytest.raises(ValueError, match=r"float64.*impl=.reference"):
        xattention_blocks(q, k, 0.9, impl="triton")
    wide = torch.zeros(1, 8, 1, 512)
    assert "head_dim 512" in (unsupported_reason(wide, wide, impl="triton") or "")
    assert unsupported_reason(wide, wide, impl="reference") is None
