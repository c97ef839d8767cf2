"""Landmark scores: the reference against the definition, the kernels against the reference."""

from __future__ import annotations

import math

import landmark_oracle as oracle
import pytest
import torch
from scores_oracle import lists
from torch import Tensor

from sparseattn.ops.scores import (
    LandmarkFeatures,
    landmark_blocks,
    landmark_features,
    landmark_scores,
    unsupported_landmark_reason,
)
from sparseattn.ops.scores.landmark_problem import num_snapshots, snapshot_index, snapshot_length
from sparseattn.ops.sequences import resolve_sequences

# Sq, Sk, rows, causal, sink
SHAPES = {
    "aligned": (256, 256, 32, True, None),
    "odd": (283, 283, 64, True, None),
    "offset": (70, 300, 32, True, None),
    "offset_block": (128, 320, 16, True, False),
    "decode": (1, 200, 32, True, None),
    "more_queries": (300, 200, 32, True, None),
    "two_sided": (100, 233, 32, False, None),
    "two_sided_sink": (70, 192, 64, False, True),
    "tiny": (3, 5, 32, True, None),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(
    sq: int, sk: int, dim: int = 12, dtype: torch.dtype = torch.float64, device: str = "cpu", batch: int = 1
) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, 4, dim, dtype=torch.float64) * 3
    k = torch.randn(batch, sk, 2, dim, dtype=torch.float64)
    k[:, :1] *= 5
    return q.to(device, dtype), k.to(device, dtype)


def test_features_follow_the_definition() -> None:
    _, k = make(0, 150)
    f = landmark_features(k, block_size=64)
    assert f.centroids.shape == (1, 2, 3, 4, 12)
    assert f.sizes.sum(-1).tolist() == [[[64, 64, 22]] * 2]
    for h in range(2):
        for j in range(3):
            expected = [oracle.landmark(g) for g in oracle.clusters_of(k[0, j * 64 : (j + 1) * 64, h], 4)]
            got = [x for x in zip(f.centroids[0, h, j], f.spreads[0, h, j], f.sizes[0, h, j], strict=True) if x[2] > 0]
            assert len(got) == len(expected)
            for (c, s, n), (centroid, spread, size) in zip(got, expected, strict=True):
                torch.testing.assert_close(c, centroid, rtol=1e-12, atol=1e-12)
                assert s.item() == pytest.approx(spread, abs=1e-7)
                assert n == size


def test_an_outlier_is_a_landmark_of_its_own() -> None:
    _, k = make(0, 128)
    k[0, 77] = 40.0
    f = landmark_features(k, block_size=128)
    for h in range(2):
        (t,) = (f.centroids[0, h, 0, :, 0] == 40).nonzero()[:, 0].tolist()
        assert f.sizes[0, h, 0, t] == 1
        assert f.spreads[0, h, 0, t] == 0


def test_equal_keys_leave_clusters_empty() -> None:
    k = torch.ones(1, 70, 1, 16)
    f = landmark_features(k, block_size=64)
    assert f.sizes.tolist() == [[[[64, 0, 0, 0], [6, 0, 0, 0]]]]
    assert f.spreads.abs().max() < 1e-3
    scores = landmark_scores(torch.ones(1, 192, 1, 16), torch.ones(1, 192, 1, 16), block_size=64)
    assert scores[0, 0, 2, 1].isfinite()


@shapes
def test_scores_follow_the_definition(shape: tuple) -> None:
    sq, sk, rows, causal, sink = shape
    q, k = make(sq, sk)
    got = landmark_scores(q, k, block_size=64, rows=rows, causal=causal, keep_sink=sink)
    expected = oracle.scores(q[0], k[0], 64, rows, causal=causal, sink=sink)
    torch.testing.assert_close(got[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("block", "clusters"), [(128, 8), (128, 2), (64, 16)])
def test_other_sizes_follow_the_definition(block: int, clusters: int) -> None:
    q, k = make(64, 300)
    got = landmark_scores(q, k, block_size=block, clusters=clusters, rows=16)
    torch.testing.assert_close(got[0], oracle.scores(q[0], k[0], block, 16, clusters=clusters), rtol=1e-9, atol=1e-9)


@shapes
@pytest.mark.parametrize("floor", [0, 3])
def test_selection_follows_the_definition(shape: tuple, floor: int) -> None:
    sq, sk, rows, causal, sink = shape
    q, k = make(sq, sk)
    options = {"block_size": 64, "rows": rows, "causal": causal, "keep_sink": sink}
    scores = landmark_scores(q, k, **options)
    tau = 0.2
    forced = [
        oracle.forced_blocks(m, sq, sk, 64, causal, causal if sink is None else sink, floor)
        for m in range(scores.shape[2])
    ]
    got = lists(*landmark_blocks(q, k, tau, floor=floor, **options))[0]
    for h, m in [(h, m) for h in range(4) for m in range(scores.shape[2])]:
        must, visible = forced[m]
        passing = {j for j in range(visible) if scores[0, h, m, j] >= math.log(tau)}
        assert got[h][m] == sorted(must | passing), (h, m)
    # With a density: as many of the best free blocks of all heads as it takes.
    total = 4 * sum(visible for _, visible in forced)
    rank = {
        (h, m, j): scores[0, h, m, j].item()
        for h in range(4)
        for m, (must, visible) in enumerate(forced)
        for j in range(visible)
        if j not in must
    }
    budget = max(0, math.floor(0.6 * total + 0.5) - 4 * sum(len(must) for must, _ in forced))
    best = set(sorted(rank, key=lambda key: -rank[key])[:budget])
    got = lists(*landmark_blocks(q, k, density=0.6, floor=floor, **options))[0]
    for h, m in [(h, m) for h in range(4) for m in range(scores.shape[2])]:
        assert got[h][m] == sorted(forced[m][0] | {j for a, b, j in best if (a, b) == (h, m)}), (h, m)


def test_ties_at_the_budget_are_in_if_all_fit() -> None:
    q, k = torch.zeros(1, 512, 1, 16), torch.ones(1, 512, 1, 16)
    counts, _ = landmark_blocks(q, k, density=0.97, block_size=64, floor=0)  # one block too few for the last tie
    assert counts.sum() < 36
    counts, _ = landmark_blocks(q, k, density=1.0, block_size=64, floor=0)
    assert counts.sum() == 36
    counts, _ = landmark_blocks(q, k, density=0.01, block_size=64, floor=0)
    assert counts.flatten().tolist() == [1, 2, 2, 2, 2, 2, 2, 2]  # forced blocks alone


def test_snapshots() -> None:
    lengths = [snapshot_length(t) for t in range(60)]
    assert lengths == sorted(set(lengths))
    index = snapshot_index(torch.arange(1 << 13, dtype=torch.int32)).tolist()
    for blocks, t in enumerate(index):
        assert lengths[t] == oracle.prefix_of(blocks)
        assert num_snapshots(blocks) == t + 1


def test_float8_scores_are_close() -> None:
    q, k = make(256, 256, 32, torch.float32)
    exact, rounded = (landmark_scores(q, k, block_size=64, fp8=fp8) for fp8 in (False, True))
    finite = exact.isfinite()
    assert 0 < (exact - rounded)[finite].abs().max() < 0.5
    assert torch.equal(finite, rounded.isfinite())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    q, k = make(150, 150, 16, dtype)
    low = landmark_scores(q, k, block_size=64, rows=64)
    assert low.dtype == torch.float32
    f = landmark_features(k.double(), block_size=64)
    assert landmark_features(k, block_size=64).centroids.dtype == dtype
    f = LandmarkFeatures(f.centroids.to(dtype).double(), f.spreads, f.sizes)  # centroids travel in the keys' dtype
    high = landmark_scores(q.double(), k.double(), block_size=64, rows=64, features=f)
    torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-4)


def test_scale_of_any_sign() -> None:
    q, k = make(200, 200)
    torch.testing.assert_close(
        landmark_scores(q, k, block_size=64, scale=-0.2), landmark_scores(-q, k, block_size=64, scale=0.2)
    )
    assert landmark_scores(q, k, block_size=64, scale=0.0)[0, 0, 3, 1].isfinite()


# ------------------------------------------------------------------------------------------------------------ kernels


@pytest.fixture
def triton_device(device: str) -> str:
    """A device the kernels run on here: the CPU under the interpreter, or the GPU."""
    probe = torch.zeros(1, 1, 1, 16, device=device)
    reason = unsupported_landmark_reason(probe, probe, impl="triton")
    if reason is not None and device == "cpu":
        pytest.skip(reason)
    assert reason is None
    return device


def both(q: Tensor, k: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    return tuple(landmark_scores(q, k, block_size=64, impl=impl, **options) for impl in ("reference", "triton"))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(("length", "dtype"), [(150, torch.float32), (64, torch.float16)])
def test_triton_features_match_the_reference(length: int, dtype: torch.dtype, triton_device: str) -> None:
    _, k = make(0, length, 24, dtype, triton_device)
    expected, got = (landmark_features(k, block_size=64, impl=impl) for impl in ("reference", "triton"))
    assert torch.equal(got.sizes, expected.sizes)
    torch.testing.assert_close(
        got.centroids, expected.centroids, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5
    )
    torch.testing.assert_close(got.spreads, expected.spreads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"rows": 64, "keep_sink": False}, {"rows": 16}, {"causal": False}],
    ids=["all_rows", "some_rows", "two_sided"],
)
def test_triton_scores_match_the_reference(options: dict, triton_device: str) -> None:
    q, k = make(100, 290, 24, torch.float32, triton_device)
    expected, got = both(q, k, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["tau", "heads", "shared", "density", "shared_density"])
def test_triton_lists_match_the_reference(kind: str, triton_device: str) -> None:
    q, k = make(150, 300, 16, torch.float16, triton_device)
    options = {
        "tau": {"tau": 0.2},
        "heads": {"tau": (0.0, 0.1, 0.3, 1.0)},
        "shared": {"tau": (0.1, 0.2, 0.3, 0.4), "group_shared": True},
        "density": {"density": 0.7},
        "shared_density": {"density": 0.7, "group_shared": True},
    }[kind]
    expected, got = (
        lists(*landmark_blocks(q, k, block_size=64, floor=2, impl=impl, **options)) for impl in ("reference", "triton")
    )
    assert got == expected
    assert len({len(row) for heads in got[0] for row in heads}) > 1


def test_triton_takes_ragged_batches_and_never_reads_padding(triton_device: str) -> None:
    q, k = make(130, 230, 16, torch.float32, triton_device, batch=3)
    ranges_q = torch.tensor([[0, 130], [20, 90], [5, 5]], dtype=torch.int32, device=triton_device)
    ranges_k = torch.tensor([[3, 230], [0, 200], [0, 230]], dtype=torch.int32, device=triton_device)
    for x, ranges in ((q, ranges_q), (k, ranges_k)):
        for b, (start, end) in enumerate(ranges.tolist()):
            x[b, :start], x[b, end:] = math.nan, math.nan
    s = resolve_sequences(q, k, ranges_q=ranges_q, ranges_k=ranges_k)
    expected, got = both(q, k, sequences=s)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    counts, _ = landmark_blocks(q, k, block_size=64, sequences=s, impl="triton")
    assert counts[2].eq(0).all()
    assert counts[1, :, 2].eq(0).all()


def test_triton_float8_matches_its_emulation(triton_device: str) -> None:
    # Small integers are float8 numbers at their scale: the interpreter rounds others wrongly.
    q, k = make(64, 200, 16, torch.float32, triton_device)
    q = (q * 2).round().clamp(-7, 7)
    q[..., 0] = 7
    expected, got = both(q, k, fp8=True, rows=64)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_triton_reads_any_strides_and_given_features(triton_device: str) -> None:
    q, k = make(64, 260, 20, torch.float32, triton_device)
    expected = landmark_scores(q, k, block_size=64, impl="triton")
    strided = [torch.stack([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for x in (q, k)]
    f = landmark_features(strided[1], block_size=64, impl="triton")
    f = LandmarkFeatures(*(t[:, :, :4] for t in f))  # complete blocks are enough, contiguous or not
    assert torch.equal(landmark_scores(*strided, block_size=64, features=f, impl="triton"), expected)


# ----------------------------------------------------------------------------------------------------------- operator


def test_operator_passes_opcheck(device: str) -> None:
    q, k = make(100, 230, 16, torch.float32, device)
    args = (q, k, None, None, None, None, None, None, None, 1, 100, 230, [0.1], None, 64, 4, 32, True, True, 1, False,
            False, 0.25, 2, "reference")  # fmt: skip
    torch.library.opcheck(torch.ops.sparseattn.landmark_blocks.default, args)


def test_operator_compiles_whole(device: str) -> None:
    q, k = make(200, 200, 16, torch.float32, device)

    def select(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return landmark_blocks(q, k, (0.5, 0.1, 0.2, 0.3), block_size=64, floor=0)

    compiled = torch.compile(select, fullgraph=True, backend="eager" if device == "cpu" else "inductor")
    assert lists(*compiled(q, k)) == lists(*select(q, k))


def test_selection_carries_no_gradient() -> None:
    q, k = make(100, 100)
    counts, indices = landmark_blocks(q.requires_grad_(), k.requires_grad_(), block_size=64)
    assert not counts.requires_grad
    assert not indices.requires_grad


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("density", [None, 0.5])
def test_empty_tensors(impl: str, density: float | None, device: str) -> None:
    for sq, sk in ((0, 5), (5, 0), (0, 0)):
        q, k = make(sq, 1, 16, torch.float32, device)
        k = k[:, :sk]
        reason = unsupported_landmark_reason(q, k, impl=impl)
        if reason is not None and device == "cpu":
            pytest.skip(reason)
        counts, indices = landmark_blocks(q, k, density=density, block_size=64, impl=impl)
        assert counts.shape == (1, 4, -(-sq // 64))
        assert indices.shape == (1, 4, -(-sq // 64), -(-sk // 64))
        assert not counts.any()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"block_size": 96}, ValueError, r"block_size: expected one of \(64, 128\)"),
        ({"clusters": 5}, ValueError, r"clusters: expected one of \(2, 4, 8, 16\), got 5"),
        ({"rows": 128}, ValueError, r"rows: expected one of \(16, 32, 64\), 64 being all of them, got 128"),
        ({"rows": 0}, ValueError, "rows: expected one of"),
        ({"floor": -1}, ValueError, "floor: expected an int >= 0"),
        ({"scale": math.inf}, ValueError, "scale: expected a finite number"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
        ({"tau": math.nan}, ValueError, r"tau: expected a number in \[0, 1\], got nan"),
        ({"tau": (0.5, 0.5)}, ValueError, "tau: expected a number or 4 numbers"),
        ({"density": 0.0}, ValueError, r"density: expected None or a number in \(0, 1\], got 0.0"),
        ({"density": math.nan}, ValueError, "density: expected None or a number"),
    ],
)
def test_bad_options(options: dict, kind: type[Exception], message: str) -> None:
    q, k = make(64, 64, 16, torch.float32)
    with pytest.raises(kind, match=message):
        landmark_blocks(q, k, **({"block_size": 64} | options))


def test_bad_tensors() -> None:
    q, k = make(64, 130, 16, torch.float32)
    for args, kind, message in (
        ((q[0], k[0]), ValueError, "q: expected a 4-D tensor"),
        ((q, k[..., :8]), ValueError, "k: expected a positive head_dim equal to q's 16"),
        ((q[:, :, :3], k), ValueError, "q: expected heads that are a multiple of k's 2"),
        ((q, k.double()), TypeError, "k: expected dtype torch.float32"),
        ((q.int(), k.int()), TypeError, "k: expected a floating-point tensor"),
    ):
        with pytest.raises(kind, match=message):
            landmark_blocks(*args, block_size=64)


def test_features_that_do_not_fit() -> None:
    q, k = make(64, 130, 16, torch.float32)
    f = landmark_features(k, block_size=64)
    for bad, options, kind, message in (
        (
            LandmarkFeatures(*(t[:, :, :1] for t in f)),
            {},
            ValueError,
            r"features.centroids: expected shape \(1, 2, 2, 4",
        ),
        (
            LandmarkFeatures(*(t[:, :, :2] for t in f)),
            {"causal": False},
            ValueError,
            "landmarks of 3 blocks are needed",
        ),
        (f._replace(sizes=f.sizes[:, :1]), {}, ValueError, "features.sizes: expected shape"),
        (f, {"clusters": 8}, ValueError, "with 8 clusters each"),
        (f._replace(centroids=f.centroids.double()), {}, TypeError, "features.centroids: expected torch.float32"),
    ):
        with pytest.raises(kind, match=message):
            landmark_blocks(q, k, block_size=64, features=bad, **options)


def test_explicit_triton_says_why_not() -> None:
    q, k = make(64, 64, 16, torch.float64)
    with pytest.raises(ValueError, match=r"float64.*impl=.reference"):
        landmark_blocks(q, k, block_size=64, impl="triton")
    wide = torch.zeros(1, 8, 1, 512)
    assert "head_dim 512" in (unsupported_landmark_reason(wide, wide, impl="triton") or "")
    assert unsupported_landmark_reason(wide, wide, impl="reference") is None


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"block_size": 64}, {"rows": 128}, {"group_shared": True}, {"causal": False}])
def test_gpu_scores_at_full_tiles(options: dict, dtype: torch.dtype) -> None:
    q, k = make(3000, 5001, 128, dtype, "cuda")
    f = landmark_features(k, block_size=int(options.get("block_size", 128)))  # type: ignore[call-overload]
    whole = {"rows": options.get("block_size", 128)} | options  # nearly equal rows may be chosen otherwise
    expected, got = (landmark_scores(q, k, features=f, impl=impl, **whole) for impl in ("reference", "triton"))
    near = expected > -60
    torch.testing.assert_close(got[near], expected[near], rtol=0, atol=2e-3)
    assert torch.equal(got, landmark_scores(q, k, features=f, impl="triton", **whole))
    chosen = landmark_scores(q, k, features=f, impl="triton", **options)
    assert torch.equal(chosen, landmark_scores(q, k, features=f, impl="triton", **options))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"density": 0.2}, {"fp8": True}])
def test_gpu_selection_waits_for_nothing_and_fits_a_graph(options: dict) -> None:
    q, k = make(3000, 3000, 64, torch.bfloat16, "cuda")
    if options.get("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    expected = lists(*landmark_blocks(q, k, **options))
    torch.cuda.set_sync_debug_mode("error")
    try:
        landmark_blocks(q, k, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = torch.zeros_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts, indices = landmark_blocks(static, k, **options)
    static.copy_(q)
    graph.replay()
    assert lists(counts, indices) == expected
