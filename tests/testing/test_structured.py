"""Structured inputs: what is planted is where the attention mass is."""

from __future__ import annotations

import math

import pytest
import torch

from sparseattn import xattention
from sparseattn.testing import structured, structured_qkv
from sparseattn.testing.structured import KINDS, Plot, plant

# Least mean mass on the wanted keys, and the most of all visible keys that these may be.
EXPECTED = {
    "sink": (0.95, 0.05),
    "local": (0.93, 0.5),
    "vertical": (0.97, 0.2),
    "slash": (0.93, 0.5),
    "block_topic": (0.95, 0.45),
    "needle": (0.8, 0.01),
    "blend": (0.97, 0.6),
}


def mass(plot: Plot, kind: str, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass on the wanted keys, and their share of the visible ones, for a sample of rows."""
    planted = plant(plot, kind, share=0.5)
    q = plot.normal(plot.n, plot.head_dim) + planted.queries
    k = plot.normal(plot.n, plot.head_dim) + planted.keys
    rows = planted.rows if rows is None else rows
    rows = rows[torch.linspace(0, len(rows) - 1, min(128, len(rows))).long()]
    visible = torch.arange(plot.n)[None, :] <= rows[:, None]
    scores = (q[rows] @ k.T / math.sqrt(plot.head_dim)).masked_fill(~visible, -math.inf)
    wanted = planted.wanted(rows) & visible
    return (scores.softmax(-1) * wanted).sum(-1), wanted.sum(-1) / visible.sum(-1)


@pytest.mark.parametrize("kind", [*KINDS, "blend"])
@pytest.mark.parametrize(("n", "head_dim"), [(2048, 64), (4096, 128)])
def test_planted_keys_carry_the_mass(kind: str, n: int, head_dim: int) -> None:
    least, most = EXPECTED[kind]
    found, share = mass(Plot(n, head_dim, "cpu", 0), kind)
    assert found.mean() >= least
    assert share.mean() <= most


def test_queries_that_want_nothing_look_elsewhere() -> None:
    plot = Plot(2048, 64, "cpu", 0)
    found, _ = mass(plot, "slash", rows=torch.arange(plot.n // 3, plot.n))
    before, _ = mass(Plot(2048, 64, "cpu", 0), "slash", rows=torch.arange(16, plot.n // 3))
    assert found.mean() > 0.9
    assert before.mean() < 0.5


def test_a_needle_is_far_and_asked_for_by_few() -> None:
    planted = plant(Plot(4096, 64, "cpu", 0), "needle")
    assert len(planted.rows) == structured.NEEDLES * structured.ASKERS
    assert planted.wanted(planted.rows).sum(-1).tolist() == [1] * len(planted.rows)
    distance = planted.rows - planted.wanted(planted.rows).int().argmax(-1)
    assert distance.min() >= 4096 // 4
    others = torch.tensor([0, 1, 2, 3])
    assert not planted.wanted(others).any()


@pytest.mark.parametrize("kind", [*KINDS, "blend"])
def test_short_sequences_work(kind: str) -> None:
    for n in (1, 2, 17):
        q, k, v = structured_qkv(n, 2, 1, 16, torch.float32, "cpu", kinds=(kind,))
        assert q.shape == (1, n, 2, 16)
        for t in (q, k, v):
            assert t.isfinite().all()


def test_heads_take_turns_and_a_group_shares_a_pattern(device: str) -> None:
    q, k, v = structured_qkv(1024, 4, 2, 64, torch.float32, device, kinds=("sink", "local"))
    assert (q.shape, k.shape, v.shape) == ((1, 1024, 4, 64), (1, 1024, 2, 64), (1, 1024, 2, 64))
    norms = k[0, :, :, :].norm(dim=-1)
    assert norms[:4, 0].min() > norms[8:, 0].mean() + 2  # the sink's keys stand out, in the first head only
    assert norms[:4, 1].mean() < norms[8:, 1].mean() + 2
    assert not torch.equal(q[..., 0, :], q[..., 1, :])
    means = q[0].mean(0)
    assert torch.cosine_similarity(means[0], means[1], dim=0) > 0.9


def test_seeds() -> None:
    draw = [structured_qkv(256, 2, 1, 32, torch.float32, "cpu", seed=seed) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(draw[0], draw[1], strict=True))
    assert not torch.equal(draw[0].q, draw[2].q)


def test_blended_heads_are_those_of_the_committed_rows() -> None:
    """Other numbers would be another benchmark: these are of the mix that the rows in benchmarks/results had."""
    q, k, v = structured_qkv(1024, 4, 2, 64, torch.float32, "cpu")
    sums = [t.double().abs().sum().item() for t in (q, k, v)]
    assert sums == pytest.approx([474673.688, 164840.091, 104891.857], rel=1e-5)


def test_there_is_something_to_skip() -> None:
    q, k, _ = structured_qkv(4096, 4, 2, 64, torch.float32, "cpu")
    assert xattention(q, k).density < 0.5


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of .*'needle'.*, got 'spiral'"):
        structured_qkv(64, 2, 1, 16, torch.float32, "cpu", kinds=("spiral",))
    with pytest.raises(ValueError, match="kinds: expected at least one"):
        structured_qkv(64, 2, 1, 16, torch.float32, "cpu", kinds=())
    with pytest.raises(ValueError, match=r"heads: expected a multiple of kv_heads \(2\), got 3"):
        structured_qkv(64, 3, 2, 16, torch.float32, "cpu")
