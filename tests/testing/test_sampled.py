"""The sampled oracle is dense attention with a mask, wherever it looks."""

from __future__ import annotations

import pytest
import torch

from sparseattn import BlockMask
from sparseattn.testing import dense_attention, make_qkv, random_block_mask, sampled

CPU = torch.device("cpu")

CASES = {
    "causal": {"heads": 4},
    "not causal": {"heads": 4, "causal": False},
    "few queries": {"heads": 4, "sq": 40},
    "lists by KV head": {"heads": 2},
    "one list": {"heads": 1, "sq": 70, "causal": False},
    "blocks that do not fill": {"heads": 4, "n": 90, "block": (32, 16)},
    "rows that select nothing": {"heads": 4, "empty_rows": 0.5, "diagonal": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_samples_are_rows_and_columns_of_dense_attention(case: dict) -> None:
    n, sq = case.get("n", 96), case.get("sq", case.get("n", 96))
    q, k, v = make_qkv(1, sq, n, 4, 2, 16, 24, dtype=torch.float64).requires_grad_()
    do = make_qkv(1, sq, 1, 4, 1, 24, dtype=torch.float64, seed=1).q
    mask = random_block_mask(
        (sq, n), case.get("block", (16, 16)), case["heads"], density=0.4, causal=case.get("causal", True),
        diagonal=case.get("diagonal", True), empty_rows=case.get("empty_rows", 0.0),
    )  # fmt: skip
    o, lse = dense_attention(q, k, v, mask.to_dense())
    expected = torch.autograd.grad(o, (q, k, v), do)
    selected = sampled.Selected.of(mask)
    rows, cols = sampled.sample(sq, 20, CPU), sampled.sample(n, 20, CPU, seed=1)
    with torch.no_grad():
        got, got_lse = sampled.attend(q, k, v, selected, rows, torch.float64)
        dq, dk, dv = sampled.gradients(q, k, v, do, selected, rows, cols, torch.float64)
    torch.testing.assert_close(got, o[0, rows])
    torch.testing.assert_close(got_lse, lse[0, :, rows])
    torch.testing.assert_close((dq, dk, dv), (expected[0][0, rows], expected[1][0, cols], expected[2][0, cols]))


def test_dense_needs_no_blocks() -> None:
    q, k, v = make_qkv(1, 48, 64, 4, 2, 16, dtype=torch.float64)
    causal = BlockMask.causal((48, 64), block_size=16).to_dense()
    for is_causal, allowed in ((True, causal), (False, torch.ones_like(causal))):
        selected = sampled.Selected(None, causal=is_causal, offset=16)
        got, _ = sampled.attend(q, k, v, selected, torch.arange(48), torch.float64)
        torch.testing.assert_close(got, dense_attention(q, k, v, allowed)[0][0])


def test_the_last_block_may_be_longer() -> None:
    blocks = torch.tensor([[True, False], [False, True]])[None, None]
    selected = sampled.Selected(blocks, (4, 3), causal=False)
    seen = selected.visible(torch.arange(9), torch.arange(8), heads=2)
    assert seen.shape == (2, 9, 8)
    assert seen[0, :4, :3].all()
    assert not seen[0, :4, 3:].any()
    assert seen[0, 4:, 3:].all()
    assert not seen[0, 4:, :3].any()


@pytest.mark.parametrize("heads", [4, 2])
def test_columns_beside_the_blocks(heads: int) -> None:
    q, k, v = make_qkv(1, 64, 96, 4, 2, 16, dtype=torch.float64)
    mask = random_block_mask((64, 96), (16, 16), heads, density=0.3)
    columns = torch.tensor([5, 30, 61, 90]).expand(1, heads, 4, 4).clone()
    columns[:, 1, :, 2:] = -1
    mask = mask.with_columns(columns.int())
    assert (mask.column_indices >= 0).any()
    rows = sampled.sample(64, 20, CPU)
    got, lse = sampled.attend(q, k, v, sampled.Selected.of(mask), rows, torch.float64)
    o, expected = dense_attention(q, k, v, mask.to_dense())
    torch.testing.assert_close(got, o[0, rows])
    torch.testing.assert_close(lse, expected[0, :, rows])
    few = sampled.attend(q, k, v, sampled.Selected.of(mask), rows[:1], torch.float64)[0]  # fewer keys than columns name
    torch.testing.assert_close(few, o[0, rows[:1]])


def test_sample_has_both_ends() -> None:
    for n, count in ((1, 1), (2, 5), (100, 8)):
        rows = sampled.sample(n, min(n, count), CPU)
        assert rows[0] == 0
        assert rows[-1] == n - 1
        assert rows.tolist() == sorted(set(rows.tolist()))


def test_gate() -> None:
    exact = torch.ones(4, 2, 3, dtype=torch.float64)
    eager = (exact + 1e-3).float()
    close = (exact + 1.5e-3).float()
    row = sampled.gate(("o",), (close,), (exact,), (eager,))
    assert row["gate"]["o"] == pytest.approx([1.5e-3, 1e-3], rel=1e-2)
    with pytest.raises(AssertionError, match="o: largest error"):
        sampled.gate(("o",), ((exact + 3e-3).float(),), (exact,), (eager,))
