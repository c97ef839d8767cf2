"""Workloads: what is drawn, what is counted, and what is let through to the clock."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from sparseattn import block_sparse_attention
from sparseattn.masks import VariableBlockMask
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.workloads import Problem

CPU = torch.device("cpu")
SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 16, "block": 32, "dtype": "fp32", "device": CPU}
SHAPES = {
    "plain": {},
    "few queries": {"nq": 40},
    "not causal": {"causal": False},
    "shared lists": {"mask_heads": 1},
    "lists by KV head": {"mask_heads": 2},
    "narrow values": {"head_dim_v": 8},
    "blocks of two sizes": {"block_q": 64},
    "a grid": {"grid": (2, 4), "causal": False, "mask_heads": 2},
}


def problem(op: str = "forward", n: int = 256, density: float = 0.3, **shape: object) -> Problem:
    return Problem(op, n, density, **{**SMALL, **shape})


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_our_operator_passes_the_gate(op: str, shape: dict) -> None:
    p = problem(op, **shape)
    row = p.gate_and_time(partial(block_sparse_attention, *p.qkv, p.mask), 1.0)
    assert set(row["gate"]) == ({"o"} if op == "forward" else {"dq", "dk", "dv"})
    assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
    assert row["tflops"] == pytest.approx(p.flops / row["ms"] * 1e-9, abs=1e-4)
    assert 0 < p.selected <= 1
    assert json.loads(json.dumps({**p.row(), **row}))


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_what_is_wrong_is_not_timed(op: str) -> None:
    p = problem(op)
    with pytest.raises(AssertionError, match=r"^(o|dq): largest error"):
        p.gate_and_time(partial(block_sparse_attention, *p.qkv), 1.0)  # dense attention is not what was asked for


def test_flops_count_selected_blocks_whole() -> None:
    whole = problem(density=1.0)
    assert whole.flops == 4 * (8 * 9 / 2) * 4 * 16 * 32 * 32  # heads * blocks * 4 D * block_q * block_kv
    assert problem("backward", density=1.0).flops == 2.5 * whole.flops
    assert problem(density=1.0, mask_heads=1).flops == whole.flops
    assert problem(density=1.0, head_dim_v=8).flops == 0.75 * whole.flops
    assert problem(density=1.0, causal=False).flops == whole.flops * 64 / 36
    sparse = problem()
    assert sparse.flops == pytest.approx(whole.flops * sparse.selected)
    assert sparse.selected == pytest.approx(sparse.mask.density)


def test_grid_blocks_take_the_remainder_at_their_ends() -> None:
    p = problem(n=100, grid=(3, 7), causal=False, density=1.0)
    rows, cols = p.drawn_sizes
    assert rows[0].tolist() == [33, 33, 34]
    assert cols[0].tolist() == [14] * 6 + [16]
    assert p.flops == 4 * 4 * 16 * 100 * 100
    assert not problem(n=256, grid=(2, 4), density=1e-9).blocks.any(-1).logical_not().any(), "no row is empty"


def test_a_grid_is_cut_into_blocks_of_the_mask() -> None:
    p = problem(grid=(2, 4), causal=False, density=0.5)
    assert p.mask.block_size == (32, 32)
    dense = p.blocks.repeat_interleave(128, 2).repeat_interleave(64, 3)
    assert torch.equal(p.mask.to_dense(), dense)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_blocks_of_odd_sizes_are_variable_blocks(heads: int) -> None:
    p = problem(n=100, grid=(3, 7), causal=False, mask_heads=heads)
    assert isinstance(p.selection, VariableBlockMask)
    assert all(sizes.sum(-1).tolist() == [100] * heads for sizes in p.drawn_sizes)
    assert p.gate_and_time(lambda: block_sparse_attention(*p.qkv, p.selection), 0.01)["gate"]
    with pytest.raises(Unsupported, match=r"blocks of \(33, 14\) tokens"):
        _ = p.mask


def test_a_row_says_the_defaults() -> None:
    row = problem().row()
    assert {k: row[k] for k in ("nq", "head_dim_v", "block_q", "mask_heads", "device")} == {
        "nq": 256, "head_dim_v": 16, "block_q": 32, "mask_heads": 4, "device": "cpu",
    }  # fmt: skip
