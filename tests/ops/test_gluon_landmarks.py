"""Landmark scores on Hopper: on that chip the kernel itself, without a GPU its logic, run by the emulator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scores_oracle import lists
from torch import Tensor

from sparseattn.ops.scores import LandmarkFeatures, landmark_blocks, landmark_features, landmark_scores
from sparseattn.ops.sequences import resolve_sequences

gluon = pytest.importorskip("sparseattn.ops.scores.landmark_gluon", reason="needs Triton")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
DEVICE = "cuda" if ON_HOPPER else "cpu"
DTYPE = torch.float16  # the interpreter, which runs the other kernels here, multiplies bfloat16 wrongly


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel under the emulator where there is no GPU."""
    if not ON_HOPPER:
        triton = pytest.importorskip("triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("the kernels around it need TRITON_INTERPRET=1 without a GPU")
        from gluon_emulator import Emulated

        monkeypatch.setattr(gluon, "landmark_scores_kernel", Emulated(gluon.landmark_scores_kernel))
        monkeypatch.setattr(gluon, "unsupported_reason", gluon.refusal)


def make(sq: int, sk: int, heads: int, kv_heads: int, dim: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, heads, dim) * 2
    k = torch.randn(batch, sk, kv_heads, dim)
    k[:, :1] *= 3
    return q.to(DEVICE, DTYPE), k.to(DEVICE, DTYPE)


def both(q: Tensor, k: Tensor, **options: Any) -> list[Tensor]:
    """Scores of the reference and of the kernel, from the same landmarks."""
    sizes = {name: options.get(name) for name in ("clusters", "sequences")}
    f = landmark_features(k, block_size=options["block_size"], **sizes)
    return [landmark_scores(q, k, features=f, impl=impl, **options) for impl in ("reference", "gluon")]


# Sq, Sk, heads, KV heads, D, options
CASES = {
    "half-128": (640, 640, 2, 1, 128, {"block_size": 128}),
    "all-128-group1": (300, 450, 1, 1, 64, {"block_size": 128, "rows": 128}),
    "half-64-odd-heads": (300, 300, 3, 1, 64, {"block_size": 64}),
    "few-rows-16-clusters": (130, 700, 6, 2, 40, {"block_size": 128, "rows": 16, "clusters": 16}),
    "two-clusters-no-sink": (64, 650, 2, 2, 64, {"block_size": 64, "clusters": 2, "keep_sink": False, "rows": 64}),
    "two-sided": (100, 500, 2, 1, 64, {"block_size": 64, "causal": False}),
    "shared": (200, 400, 4, 2, 64, {"block_size": 64, "rows": 64, "group_shared": True}),
    "many-tiles": (70, 2150, 2, 1, 64, {"block_size": 64, "clusters": 16, "rows": 64}),
    "negative-scale": (100, 400, 2, 1, 64, {"block_size": 64, "rows": 64, "scale": -0.1}),
    "no-scale": (64, 300, 1, 1, 64, {"block_size": 64, "rows": 64, "scale": 0.0}),
    "batch-more-queries": (500, 300, 2, 1, 64, {"block_size": 64, "rows": 64}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scores_match_the_reference(case: tuple) -> None:
    *shape, options = case
    expected, got = both(*make(*shape, batch=2 if shape[0] == 500 else 1), **options)
    assert expected.isfinite().any()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_programs_take_many_items_of_unequal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs for all, or one for each: a compiler may not take one item's numbers for the next one's."""
    for options in ({"tau": 0.2}, {"density": 0.4}):
        q, k = make(640, 640, 4, 1, 64)
        options |= {"block_size": 64, "rows": 32, "features": landmark_features(k, block_size=64)}
        found = []
        for programs in (2, 1000):
            monkeypatch.setattr(gluon, "processors_of", lambda device, programs=programs: programs)
            found.append(lists(*landmark_blocks(q, k, impl="gluon", **options)))
        assert found[0] == found[1]


def near(scores: Tensor, taus: tuple[float, ...]) -> Tensor:
    """Blocks so close to the threshold that rounding decides."""
    logs = torch.tensor(taus, device=scores.device).log()[:, None, None]
    return (scores - logs).abs() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.2, "rows": 32},
        {"tau": (0.0, 0.1, 0.3, 1.0), "rows": 64},
        {"tau": (0.05, 0.1, 0.2, 0.5), "rows": 64, "group_shared": True},
        {"tau": 0.2, "rows": 64, "max_blocks": 8},
        {"tau": 0.001, "rows": 64},
        {"density": 0.5, "rows": 64},
    ],
    ids=["tau", "heads-and-zero", "shared", "capped", "small-tau", "density"],
)
def test_lists_match_the_reference(options: dict) -> None:
    q, k = make(400, 900, 4, 2, 64)
    f = landmark_features(k, block_size=64)
    options = {"block_size": 64, "floor": 2, "features": f} | options
    expected, got = (lists(*landmark_blocks(q, k, impl=impl, **options)) for impl in ("reference", "gluon"))
    assert got == expected
    assert len({len(row) for heads in got[0] for row in heads}) > 1


def test_candidates_that_come_late_or_fall_behind() -> None:
    """Each block outweighs all before it, so that rings of candidates go round several times."""
    blocks = 60
    k = torch.zeros(1, 64 * blocks, 1, 64)
    k[0, :, 0, 0] = torch.arange(blocks).repeat_interleave(64) * 0.75
    q = torch.zeros(1, 128, 1, 64)
    q[..., 0] = 2.0
    q, k = q.to(DEVICE, DTYPE), k.to(DEVICE, DTYPE)
    assert gluon.ring_entries(0.02) > 8 > gluon.ring_entries(0.5)
    for tau in (0.02, 0.5):
        options = {"block_size": 64, "rows": 64, "scale": 1.0, "causal": False, "floor": 0}
        expected, got = (lists(*landmark_blocks(q, k, tau, impl=impl, **options)) for impl in ("reference", "gluon"))
        assert got == expected
        assert 0 < len(got[0][0][0]) < 8


@pytest.mark.parametrize("steep", [20.0, 60.0, 300.0])
def test_landmarks_that_outweigh_the_forced_blocks(steep: float) -> None:
    """By so much that sums relative to the forced blocks would overflow, in some blocks only, or by less."""
    q, k = make(256, 900, 2, 1, 64)
    k[:, 400:700] = 0.0
    q[:, 1::2, :, 0], k[:, 400:500, :, 0], k[:, 600:620, :, 0] = 8.0, steep / 8, steep / 16
    expected, got = both(q, k, block_size=64, rows=64, scale=1.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    f = landmark_features(k, block_size=64)
    for tau in (0.05, 0.3):
        options = {"block_size": 64, "rows": 64, "scale": 1.0, "features": f}
        wanted, found = (lists(*landmark_blocks(q, k, tau, impl=impl, **options)) for impl in ("reference", "gluon"))
        assert found == wanted


def test_reach_bounds_all_logits() -> None:
    """Of a block's landmarks and those before: no row's logit is more than its length times the reach."""
    k = make(1, 700, 1, 2, 40, batch=2)[1]
    k[:, 300:400] *= 4
    f = landmark_features(k, block_size=64, clusters=4)
    reach = torch.empty(f.centroids.shape[:3], device=DEVICE)
    gluon.ordered_landmarks(f, 1, reach=reach)
    expected = (f.centroids.double().norm(dim=-1) + f.spreads.double()).masked_fill(f.sizes == 0, 0.0).amax(-1)
    expected[:, :, 0] = 0.0  # forced
    assert (reach >= expected).all()
    torch.testing.assert_close(reach.double(), expected, rtol=2e-3, atol=0)


def test_a_ring_is_long_enough() -> None:
    for tau in (1.0, 0.5, 0.3, 0.1, 0.01):
        assert (1 + tau * 0.99) ** -gluon.ring_entries(tau) < tau


def test_ragged_batches() -> None:
    q, k = make(130, 330, 2, 1, 64, batch=3)
    ranges_q = torch.tensor([[0, 130], [20, 90], [5, 5]], dtype=torch.int32, device=DEVICE)
    ranges_k = torch.tensor([[3, 330], [0, 300], [0, 330]], dtype=torch.int32, device=DEVICE)
    for x, ranges in ((q, ranges_q), (k, ranges_k)):
        for b, (start, end) in enumerate(ranges.tolist()):
            x[b, :start], x[b, end:] = math.nan, math.nan
    s = resolve_sequences(q, k, ranges_q=ranges_q, ranges_k=ranges_k)
    expected, got = both(q, k, block_size=64, rows=64, sequences=s)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused() -> None:
    q, k = make(64, 64, 2, 1, 64)
    assert gluon.refusal(q, k, False) is None
    assert "float8" in gluon.refusal(q, k, True)
    assert "bfloat16 and float16" in gluon.refusal(q.float(), k.float(), False)
    assert "up to 128" in gluon.refusal(q[..., :12], k[..., :12], False)
    assert "expanded" in gluon.refusal(q, k[:, :1].expand(-1, 64, -1, -1), False)


def test_given_features_of_complete_blocks() -> None:
    q, k = make(100, 330, 4, 2, 64)
    whole = landmark_features(k, block_size=64)
    f = LandmarkFeatures(*(t[:, :, :5] for t in whole))  # contiguous or not
    expected = landmark_scores(q, k, block_size=64, rows=64, features=whole, impl="gluon")
    assert torch.equal(landmark_scores(q, k, block_size=64, rows=64, features=f, impl="gluon"), expected)


def check_chunks(q: Tensor, k: Tensor, chunks: tuple[tuple[int, int], ...], **options: Any) -> None:
    """Rows of the prompt's lists are those of its chunks, to the bit."""
    size = options["block_size"]
    whole = lists(*landmark_blocks(q, k, impl="gluon", floor=2, **options))
    for start, stop in chunks:
        part = lists(*landmark_blocks(q[:, start:stop], k[:, :stop], impl="gluon", floor=2, **options))
        for of_part, of_whole in zip(part, whole, strict=True):
            for chunk, prompt in zip(of_part, of_whole, strict=True):
                assert chunk == prompt[start // size : -(-stop // size)]


@pytest.mark.parametrize("options", [{"rows": 32}, {"rows": 64, "group_shared": True}], ids=["half", "shared"])
def test_chunks_select_what_the_prompt_does(options: dict) -> None:
    q, k = make(400, 400, 2, 1, 64)
    check_chunks(q, k, ((192, 400), (128, 320)), block_size=64, tau=0.2, **options)


def test_chunks_select_what_the_prompt_does_before_a_steep_block() -> None:
    """What comes after a chunk must not even choose the way by which its sums are made."""
    q, k = make(400, 400, 2, 1, 64)
    k[:, 290:300] *= 40
    check_chunks(q, k, ((192, 256), (192, 320)), block_size=64, tau=0.2, rows=64)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"rows": 128}, {"group_shared": True}], ids=["half", "all", "shared"])
def test_gpu_chunks_select_what_the_prompt_does(options: dict) -> None:
    """However many programs share the keys: few rows of a chunk, all of a prompt."""
    q, k = (x.bfloat16() for x in make(8192, 8192, 8, 2, 128))
    chunks = ((0, 2048), (2048, 2176), (4096, 8192), (8064, 8192))
    check_chunks(q, k, chunks, block_size=128, tau=0.02, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"block_size": 64}, {"rows": 128}, {"group_shared": True}, {"causal": False}, {"clusters": 16}]
)
def test_gpu_full_tiles(options: dict, dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in make(3000, 5001, 8, 2, 128))
    f = landmark_features(k, block_size=options.get("block_size", 128), clusters=options.get("clusters"))
    whole = {"rows": options.get("block_size", 128)} | options  # nearly equal rows may be chosen otherwise
    expected, got = (landmark_scores(q, k, features=f, impl=impl, **whole) for impl in ("reference", "gluon"))
    close = expected > -60
    torch.testing.assert_close(got[close], expected[close], rtol=0, atol=2e-3)
    for tau in (0.3, 0.02):
        ours = [landmark_blocks(q, k, tau, features=f, impl="gluon", floor=0, **whole) for _ in range(2)]
        assert lists(*ours[0]) == lists(*ours[1])
        counts = landmark_blocks(q, k, tau, features=f, impl="triton", floor=0, **whole)[0]
        slack = near(expected, (tau,)).sum(-1) if not options.get("group_shared") else 1
        assert ((ours[0][0] - counts).abs() <= slack).all()
