"""Head families: what is planted carries the mass, and is as rare as it says."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from sparseattn import BlockMask
from sparseattn.fidelity import head_fidelity
from sparseattn.testing import structured_qkv
from sparseattn.testing.families import KINDS, MIXES, mixed_kinds, plant, turn_ends
from sparseattn.testing.plots import Plot

BUDGETS = [kind for kind in MIXES["minference_llama"]]
# Least mean mass on the wanted keys, and the most of all visible keys that these may be.
EXPECTED = {
    "lone_columns": (0.85, 0.02),
    "row_spans": (0.9, 0.03),
    "row_keys": (0.85, 0.01),
    "rare_spans": (0.9, 0.03),
    "rare_keys": (0.9, 0.01),
    "outliers": (0.9, 0.2),
    "alternating": (0.9, 0.1),
    "straddling": (0.95, 0.2),
    "middle": (0.9, 0.05),
    "multi_turn": (0.9, 0.05),
    "streaming": (0.9, 0.5),
    **{kind: (0.8, 0.75) for kind in BUDGETS},
}


def mass(plot: Plot, kind: str) -> tuple[Tensor, Tensor]:
    """Attention mass on the wanted keys, and their share of the visible ones, for a sample of rows."""
    planted = plant(plot, kind)
    q = plot.normal(plot.n, plot.head_dim) + planted.queries
    k = plot.normal(plot.n, plot.head_dim) + planted.keys
    rows = planted.rows
    rows = rows[torch.linspace(0, len(rows) - 1, min(128, len(rows))).long()]
    visible = torch.arange(plot.n)[None, :] <= rows[:, None]
    scores = (q[rows] @ k.T / math.sqrt(plot.head_dim)).masked_fill(~visible, -math.inf)
    wanted = planted.wanted(rows) & visible
    return (scores.softmax(-1) * wanted).sum(-1), wanted.sum(-1) / visible.sum(-1)


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize(("n", "head_dim"), [(2048, 64), (4096, 128)])
def test_planted_keys_carry_the_mass(kind: str, n: int, head_dim: int) -> None:
    least, most = EXPECTED[kind]
    found, share = mass(Plot(n, head_dim, "cpu", 0), kind)
    assert found.mean() >= least
    assert share.mean() <= most


def test_every_family_is_tested() -> None:
    assert {*KINDS, *(kind for mix in MIXES.values() for kind in mix)} - set(EXPECTED) <= {
        "vertical", "needle", "block_topic",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["rare_spans", "rare_keys"])
def test_rare_queries_are_one_of_a_tile(kind: str) -> None:
    planted = plant(Plot(4096, 64, "cpu", 0), kind)
    tiles = planted.rows // 128
    assert len(tiles.unique()) == len(tiles) >= 24
    wanted = planted.wanted(planted.rows)
    assert (wanted.sum(-1) == (16 if kind == "rare_spans" else 1)).all()
    far = planted.rows - wanted.int().argmax(-1)
    assert (far > 128).all()


def test_alternating_keys_cancel_in_sums() -> None:
    plot = Plot(2048, 64, "cpu", 0)
    planted = plant(plot, "alternating")
    columns = planted.keys.norm(dim=-1) > 0
    assert planted.keys[columns].sum(0).norm() < 0.2 * planted.keys[columns].norm(dim=-1).sum()


def test_straddling_runs_cross_borders() -> None:
    planted = plant(Plot(4096, 64, "cpu", 0), "straddling")
    wanted = planted.wanted(torch.tensor([4095]))[0]
    border = torch.arange(128, 4096, 128)
    assert torch.equal(wanted[border], wanted[border - 1])
    assert wanted[border].any()
    assert wanted.sum() == 16 * wanted[border].sum()


def test_the_last_rows_of_a_prompt_know_nothing_of_its_middle() -> None:
    planted = plant(Plot(4096, 64, "cpu", 0), "middle")
    assert planted.rows.max() < 3072
    assert planted.rows.min() >= 1024


def test_turns() -> None:
    assert turn_ends(1000) == [250, 500, 750, 1000]
    planted = plant(Plot(4096, 64, "cpu", 0), "multi_turn")
    ends = torch.tensor(turn_ends(4096))
    turn = torch.searchsorted(ends, planted.rows, right=True)
    assert set(turn.tolist()) == {0, 1, 2, 3}
    assert (ends[turn] - planted.rows <= 64).all()
    starts = planted.wanted(planted.rows).int().argmax(-1)
    for i in range(4):
        assert len(starts[turn == i].unique()) == 1
        assert starts[turn == i][0] < turn_ends(4096)[i] // 2


def test_mixes_have_their_shares() -> None:
    kinds = mixed_kinds(100)
    assert Counter(kinds) == MIXES["minference_llama"]
    assert kinds == mixed_kinds(100)
    assert kinds != mixed_kinds(100, seed=1)
    few = Counter(mixed_kinds(8))
    assert sum(few.values()) == 8
    assert few["vertical_slash_100_800"] == 2
    with pytest.raises(ValueError, match="mix: expected one of minference_llama, duo_gqa, adversarial, got 'x'"):
        mixed_kinds(4, "x")


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_heads_are_inputs_like_others(mix: str) -> None:
    kinds = mixed_kinds(4, mix)
    q, k, v = structured_qkv(1024, 8, 4, 32, torch.float32, "cpu", kinds=kinds)
    assert q.shape == (1, 1024, 8, 32)
    found = head_fidelity(
        q, k, v, BlockMask.streaming((1024, 1024), num_sink_tokens=64, num_local_tokens=128), bounds=True
    )
    for values in found:
        assert values.isfinite().all()


@pytest.mark.parametrize("kind", [*KINDS, "streaming", "vertical_slash_1000_6096"])
def test_short_sequences_work(kind: str) -> None:
    for n in (1, 2, 17, 300):
        for t in structured_qkv(n, 2, 1, 16, torch.float32, "cpu", kinds=(kind,)):
            assert t.isfinite().all()
        plot = Plot(n, 16, "cpu", 0)
        planted = plant(plot, kind)
        assert planted.wanted(plot.position).shape == (n, n)
