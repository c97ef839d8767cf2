"""The plan of a backward pass against a plain loop over every tile, head and step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="the plan is a Triton kernel")

from sparseattn.kernels.unions import ROWS, SHIFT, box_rows, unions
from sparseattn.kernels.walks import (
    HEAD,
    MASKED_STEPS,
    OFFSET,
    OUT_ROW,
    SEQUENCE,
    STEPS,
    TILE,
    UNBOUNDED,
    X0,
    X_LENGTH,
    X_START,
    Y_LENGTH,
    Y_START,
    walks,
)
from sparseattn.masks import BlockMask


@dataclass(frozen=True)
class Plan:
    """One plan: sequences as ((first row, rows) of queries, of keys), and what a row sees."""

    id: str
    spans: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = (((0, 600), (0, 600)),)
    ragged: bool = False
    packed: bool = False
    heads: tuple[int, int] = (4, 2)
    parts: int = 1
    blocks: tuple[int, int] | None = (128, 128)
    mask_heads: int = 4
    mask_batch: int = 1
    window: tuple[int, int] = (UNBOUNDED, 0)

    def __str__(self) -> str:
        return self.id


RAGGED = (((0, 300), (0, 300)), ((300, 0), (300, 70)), ((300, 129), (370, 513)), ((429, 65), (883, 10)))
PLANS = [
    Plan("causal"),
    Plan("causal-split", parts=2),
    Plan("dense", blocks=None),
    Plan("dense-window", blocks=None, window=(200, 77)),
    Plan("not-causal", window=(UNBOUNDED, UNBOUNDED), mask_heads=2),
    Plan("blocks-64x256", blocks=(64, 256), mask_heads=1),
    Plan("blocks-256x128", blocks=(256, 128), mask_heads=2, parts=2),
    Plan("window", window=(300, 0)),
    Plan("two-sided-window", window=(130, 190)),
    Plan("chunk", spans=(((0, 200), (0, 500)),)),
    Plan("more-queries", spans=(((0, 500), (0, 330)),)),
    Plan("packed", spans=RAGGED, ragged=True, packed=True, mask_batch=4),
    Plan("packed-dense", spans=RAGGED, ragged=True, packed=True, blocks=None),
    Plan(
        "ranges", spans=(((0, 300), (10, 290)), ((13, 287), (0, 300)), ((9, 0), (5, 200))), ragged=True, parts=2,
        window=(150, 0),
    ),
    Plan("three-heads", heads=(3, 1), mask_heads=3),
    Plan("blocks-64x64", blocks=(64, 64)),
    Plan("blocks-16x32-window", blocks=(16, 32), spans=(((0, 200), (0, 300)),), window=(100, 30), heads=(2, 1),
         mask_heads=2),
    Plan("blocks-48x80-packed", blocks=(48, 80), spans=RAGGED, ragged=True, packed=True, heads=(2, 1), mask_heads=1),
]  # fmt: skip


def test_short_tiles_of_earlier_heads_start_last(device: str):
    unused = torch.zeros(1, dtype=torch.int32, device=device)
    records, _, _, total = walks(
        None, (unused,) * 4, keys=True, batch=1, lengths=(1024, 1024), window=(UNBOUNDED, 0), heads=9, per_head=1,
        section_heads=1, mask_group=1, blocks=(128, 64), step=64, out_rows=0, packed=False, ragged=(False, False),
        processors=9, device=torch.device(device),
    )  # fmt: skip
    order = [(r[HEAD.value], r[X0.value], r[STEPS.value]) for r in records[:total].tolist()]
    # Nine sections of eight tiles: two whole, six without their two shortest, which go with the last.
    longest_first = [(head, 128 * i) for head in range(8) for i in range(8 if head < 2 else 6)]
    assert [o[:2] for o in order[: len(longest_first)]] == longest_first
    steps = [o[2] for o in order[len(longest_first) :]]
    assert len(steps) == 8 + 6 * 2
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "queries"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_walks_meet_every_visible_pair_once(plan: Plan, keys: bool, device: str):
    max_q, max_k = (max(span[i][1] for span in plan.spans) for i in range(2))
    heads_q, heads_k = plan.heads
    lists, dense = _lists(plan, max_q, max_k, keys, device)
    spans = tuple(
        torch.tensor(column, dtype=torch.int32, device=device)
        for column in (
            [q[0] for q, _ in plan.spans], [q[0] + q[1] for q, _ in plan.spans],
            [k[0] for _, k in plan.spans], [k[0] + k[1] for _, k in plan.spans],
        )
    )  # fmt: skip
    per_head = heads_q // heads_k // plan.parts if keys else 1
    heads = heads_k * plan.parts if keys else heads_q
    step = 64 if keys else 128
    blocks = plan.blocks or (128, 128)
    blocks = (blocks[1], blocks[0]) if keys else blocks
    gather = 0
    if lists and (blocks[0] % ROWS or blocks[1] % step):
        shape, lengths = (plan.mask_batch, plan.mask_heads), (max_k, max_q) if keys else (max_q, max_k)
        box = box_rows(blocks[1], step)
        lists, blocks, gather = unions(lists, shape, blocks, lengths, step), (ROWS, box), step // box
    records, ranges, counter, total = walks(
        lists, spans, keys=keys, batch=len(plan.spans), lengths=(max_q, max_k), window=plan.window, heads=heads,
        per_head=per_head, section_heads=heads // heads_k, mask_group=heads_q // plan.mask_heads if lists else 1,
        blocks=blocks, step=step // max(gather, 1), gather=gather, out_rows=0 if plan.packed else 5000,
        packed=plan.packed, ragged=(plan.ragged, plan.ragged), processors=1, device=torch.device(device),
    )  # fmt: skip
    records, ranges = records.cpu(), ranges.cpu()
    assert counter.item() == 0
    assert (records[total] == -1).all()
    tiles = -(-(max_k if keys else max_q) // ROWS)
    expected = set(itertools.product(range(len(plan.spans)), range(heads), range(0, tiles * ROWS, ROWS)))
    assert {(r[SEQUENCE.value], r[HEAD.value], r[X0.value]) for r in records[:total].tolist()} == expected

    for place, record in enumerate(records[:total].tolist()):
        b, head, x0 = record[SEQUENCE.value], record[HEAD.value], record[X0.value]
        q_span, k_span = plan.spans[b]
        x_span, y_span = (k_span, q_span) if keys else (q_span, k_span)
        assert (record[X_LENGTH.value], record[Y_LENGTH.value]) == (x_span[1], y_span[1])
        assert (record[X_START.value], record[Y_START.value]) == (x_span[0], y_span[0])
        assert record[OFFSET.value] == k_span[1] - q_span[1]
        assert record[OUT_ROW.value] == (0 if plan.packed else 5000) * b + x_span[0]
        first_tile = q_span[0] // 64 + b if plan.packed else -(-max_q // 64) * b
        assert record[TILE.value] == first_tile
        masked = steps = 0
        for h in range(per_head):
            seen = _visible(plan, dense, b, head * per_head + h if keys else head, max_q, max_k)
            seen = seen.T if keys else seen
            covered = torch.zeros_like(seen[x0 : x0 + ROWS])
            for part, (first, end) in enumerate(ranges[place, :, h].tolist()):
                count = max(end - first, 0)
                steps += count
                masked += count if part < 2 else 0
                for at in range(first, end):
                    y_head = head * per_head + h if keys else head
                    rows, listed = _rows(lists, record, plan, y_head, at, blocks, step, gather)
                    assert 0 <= rows[0] < y_span[1]
                    # Of a step of boxes the last may be past the end.
                    inside = rows < (y_span[1] if gather else covered.shape[1])
                    assert not covered[:, rows[inside]].any()
                    covered[:, rows[inside]] = listed[: covered.shape[0], inside]
                    if part == 2:  # no element mask: whatever of the tile exists and is listed is seen
                        inside = rows < y_span[1]
                        x_rows = min(ROWS, x_span[1] - x0)
                        assert torch.equal(seen[x0 : x0 + x_rows][:, rows[inside]], listed[:x_rows, inside])
                        assert keys or gather or inside.all()
                        assert not keys or x0 + ROWS <= x_span[1]
            assert covered[seen[x0 : x0 + ROWS]].all()
        assert (masked, steps) == (record[MASKED_STEPS.value], record[STEPS.value])
    _check_order(records[:total], tiles * heads // heads_k)


def _lists(plan: Plan, max_q: int, max_k: int, keys: bool, device: str):
    if plan.blocks is None:
        return None, None
    shape = (plan.mask_batch, plan.mask_heads, -(-max_q // plan.blocks[0]), -(-max_k // plan.blocks[1]))
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BlockMask.from_blocks(dense.to(device), block_size=plan.blocks, seq_lens=(max_q, max_k))
    counts, indices = mask.transposed() if keys else (mask.kv_num_blocks, mask.kv_indices)
    rows = counts.shape[-1]
    stride = 0 if plan.mask_batch == 1 else plan.mask_heads * rows
    return (counts.contiguous(), indices.contiguous(), stride, rows, indices.shape[-1]), dense


def _visible(plan: Plan, dense: torch.Tensor | None, b: int, head: int, max_q: int, max_k: int) -> torch.Tensor:
    """bool [max_q, max_k] of one head and sequence, False past its ends."""
    (_, q_len), (_, k_len) = plan.spans[b]
    i = torch.arange(max_q)[:, None]
    j = torch.arange(max_k)[None, :]
    offset = k_len - q_len
    seen = (i < q_len) & (j < k_len) & (j >= i + offset - plan.window[0]) & (j <= i + offset + plan.window[1])
    if dense is not None and plan.blocks is not None:
        blocks = dense[b if plan.mask_batch > 1 else 0, head // (plan.heads[0] // plan.mask_heads)]
        seen &= blocks[i // plan.blocks[0], j // plan.blocks[1]]
    return seen


def _rows(lists, record: list[int], plan: Plan, head: int, at: int, blocks, step: int, gather: int):
    """Rows of a step [step], and which of them the stationary rows' lists have: bool [ROWS, step]."""
    everywhere = torch.ones((ROWS, step), dtype=torch.bool)
    if lists is None:
        return at * step + torch.arange(step), everywhere
    _, indices, *_ = lists
    b = record[SEQUENCE.value] if plan.mask_batch > 1 else 0
    entries = indices[b, head // (plan.heads[0] // plan.mask_heads), record[X0.value] // blocks[0]].cpu()
    if gather:
        entries = entries[at * gather : (at + 1) * gather]
        assert (entries[1:] >= entries[:-1]).all()
        rows = (entries >> SHIFT.value)[:, None] * blocks[1] + torch.arange(blocks[1])
        bits = (entries >> torch.arange(ROWS // 16)[:, None]) & 1 != 0
        return rows.flatten(), bits.repeat_interleave(16, 0).repeat_interleave(blocks[1], 1)
    parts = blocks[1] // step
    return entries[at // parts] * blocks[1] + at % parts * step + torch.arange(step), everywhere


def _check_order(records: torch.Tensor, section: int) -> None:
    """Long tiles start before those of a third of their length, within a section."""
    steps = records[:, STEPS.value].tolist()
    for first in range(0, len(steps), section):
        part = steps[first : first + section]
        shortest = float("inf")
        for n in part:
            assert n <= 3 * shortest + 30
            shortest = min(shortest, n)
