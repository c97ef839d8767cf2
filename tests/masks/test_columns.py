"""Columns: single keys that a row of blocks attends besides its listed blocks."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import (
    any_block,
    blocks_for,
    columns_for,
    frames,
    masks_with_columns,
    quick,
    repeat_blocks,
    repeat_columns,
    visible_tokens,
)

from sparseattn.masks import BlockMask


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def framed(draw, count=1):
    """A frame, and blocks and raw columns for ``count`` masks of it."""
    frame = draw(frames())
    out = []
    for _ in range(count):
        blocks = draw(blocks_for(frame, heads=2))
        out.append((blocks, draw(columns_for(blocks, frame))))
    return frame, out


@quick
@given(framed())
def test_any_lists_become_columns(case):
    frame, [(blocks, columns)] = case
    mask = BlockMask.from_blocks(blocks, **frame).with_columns(columns, sort=True).validate()
    tokens = repeat_blocks(blocks, frame) | repeat_columns(columns, frame)
    assert torch.equal(mask.to_dense(), tokens & visible_tokens(frame))
    assert torch.equal(mask.to_blocks(), blocks)
    for row in mask.column_indices.flatten(0, 2).tolist():
        kept = [j for j in row if j >= 0]
        assert kept == sorted(set(kept)) == row[: len(kept)]
    assert torch.equal(mask.column_counts(), (mask.column_indices >= 0).sum(-1).int())


@quick
@given(masks_with_columns())
def test_ascending_lists_need_no_sort(mask):
    padded = torch.cat([torch.full_like(mask.column_indices[..., :1], -1), mask.column_indices], -1)
    again = mask.with_columns(padded)
    assert torch.equal(again.trimmed().column_indices, mask.trimmed().column_indices)
    whole = mask.whole_blocks().validate()
    assert whole.column_indices is None
    assert (mask.to_dense() <= whole.to_dense()).all()
    assert torch.equal(whole.with_columns(mask.column_indices, sort=True).to_dense(), whole.to_dense())


@quick
@given(framed())
def test_density_counts_a_column_as_its_share_of_a_block(case):
    frame, [(blocks, columns)] = case
    mask = BlockMask.from_blocks(blocks, **frame).with_columns(columns, sort=True)
    visible = any_block(visible_tokens(frame), frame)
    kept = (blocks & visible).sum(-1).double()
    b, h, mb = kept.shape
    for at in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(mb)).tolist():
        row = mask.column_indices[min(at[0], mask.column_indices.shape[0] - 1), at[1], at[2]].tolist()
        seen = visible[min(at[0], visible.shape[0] - 1), 0, at[2]]
        kept[tuple(at)] += sum(bool(seen[j // mask.block_size[1]]) for j in row if j >= 0) / mask.block_size[1]
    total = visible.sum(-1).expand_as(kept)
    torch.testing.assert_close(mask.row_densities(), (kept / total.clamp(min=1)).float())
    torch.testing.assert_close(mask.densities(), (kept.sum(-1) / total.sum(-1).clamp(min=1)).float())
    assert mask.density == pytest.approx(float(kept.sum()) / max(int(total.sum()), 1))
    assert mask.density <= 1.0


@quick
@given(framed(2))
def test_sets_are_boolean_algebra_of_tokens(case):
    frame, pairs = case
    masks = [BlockMask.from_blocks(b, **frame).with_columns(c, sort=True) for b, c in pairs]
    plain = BlockMask.from_blocks(pairs[1][0], **frame)
    for a, b in (masks, (masks[0], plain), (plain, masks[0])):
        assert torch.equal((a | b).validate().to_dense(), a.to_dense() | b.to_dense())
        assert torch.equal((a & b).validate().to_dense(), a.to_dense() & b.to_dense())


def test_one_head_or_batch_row_broadcasts_in_sets():
    one = BlockMask.causal(64, block_size=16).with_columns(ints(3, 20))
    many = BlockMask.from_blocks(torch.rand(2, 2, 4, 4) < 0.3, seq_lens=64, block_size=16, causal=True)
    many = many.with_columns(torch.arange(0, 64, 7, dtype=torch.int32))
    for a, b in ((one, many), (many, one)):
        assert torch.equal((a | b).validate().to_dense(), one.to_dense() | many.to_dense())
        assert torch.equal((a & b).validate().to_dense(), one.to_dense() & many.to_dense())


@quick
@given(masks_with_columns())
def test_copies_keep_everything(mask):
    for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), mask.trimmed(), mask.expand_heads(mask.heads)):
        assert torch.equal(twin.to_dense(), mask.to_dense())
    wide = mask.expand_heads(2 * mask.heads)
    assert torch.equal(wide.to_dense(), mask.to_dense().repeat_interleave(2, 1))
    counts = mask.column_counts()
    assert mask.trimmed().column_indices.shape[-1] == (int(counts.max()) if counts.numel() else 0)
    assert mask.to("meta").column_indices.device.type == "meta"


def test_columns_no_query_sees_are_dropped():
    mask = BlockMask.from_blocks(torch.zeros(4, 4).bool(), seq_lens=64, block_size=16, causal=True, window=(20, None))
    mask = mask.with_columns(torch.arange(64, dtype=torch.int32))
    assert mask.column_indices[0, 0, 0].tolist() == [*range(16), *[-1] * 48]
    assert mask.column_indices[0, 0, 2].tolist() == [*range(12, 48), *[-1] * 28]


def test_columns_may_have_more_heads_and_batch_rows_than_the_lists():
    mask = BlockMask.streaming(64, num_sink_tokens=16, num_local_tokens=16, block_size=16)
    wide = mask.with_columns(ints(17, 40).expand(2, 3, 1, 2))
    assert wide.kv_num_blocks.shape == (2, 3, 4)
    assert wide.column_indices.shape == (2, 3, 4, 2)
    assert wide.column_indices[1, 2].tolist() == [[-1, -1], [-1, -1], [-1, -1], [17, -1]]
    assert "columns=2" in repr(wide.validate())


lists = {"seq_lens": (60, 100), "block_size": (16, 32)}


def mask_of(columns, **changes):
    counts = ints(1, 1, 1, 1)[None, None]
    return BlockMask(counts, torch.zeros(1, 1, 4, 1, dtype=torch.int32), **lists, column_indices=columns, **changes)


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        ([40], TypeError, r"column_indices: expected a torch\.Tensor"),
        (torch.zeros(1, 1, 4, 2), TypeError, "column_indices: expected int32"),
        (ints(40, 41), ValueError, "column_indices: expected a 4-D tensor"),
        (ints(40, 41).expand(1, 2, 4, 2), ValueError, r"column_indices: expected shape \[1, 1, 4\] \+ \[C\]"),
        (ints(40).expand(1, 1, 4, 1).to("meta"), ValueError, "column_indices: expected device cpu"),
        (ints(40, 100), ValueError, r"column_indices: expected tokens in \[0, 100\).*got 100"),
        (ints(-2, 40), ValueError, "column_indices: .*got -2"),
        (ints(-1, 40), ValueError, "column_indices: expected padding .* at the end"),
        (ints(50, 40), ValueError, "column_indices: expected ascending lists"),
        (ints(40, 40, -1), ValueError, "column_indices: expected unique entries"),
        (ints(31, 40), ValueError, r"column_indices: expected keys outside .*got 31, .*attended twice.*with_columns"),
    ],
)
def test_wrong_columns_are_named(columns, kind, message):
    if isinstance(columns, torch.Tensor) and columns.dim() == 1 and "4-D" not in message:
        columns = columns.expand(1, 1, 4, len(columns))
    with pytest.raises(kind, match=message):
        mask_of(columns).validate()
    assert mask_of(ints(32, 99, -1).expand(1, 1, 4, 3)).validate().column_counts().tolist() == [[[2] * 4]]


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        ([1], TypeError, r"columns: expected a torch\.Tensor"),
        (torch.tensor([1]), TypeError, "columns: expected int32"),
        (ints(40).to("meta"), ValueError, "columns: expected device cpu"),
        (torch.zeros(3, 1, dtype=torch.int32), ValueError, r"columns: expected \[B\|1, H\|1, MB\|1, C\]"),
        (torch.zeros((), dtype=torch.int32), ValueError, "columns: "),
    ],
)
def test_with_columns_names_its_argument(columns, kind, message):
    with pytest.raises(kind, match=message):
        mask_of(None).with_columns(columns)


def test_what_knows_blocks_only_says_so():
    mask = mask_of(ints(40).expand(1, 1, 4, 1))
    for convert in (mask.to_bsr, mask.to_flex):
        with pytest.raises(ValueError, match=r"column_indices: expected None.*whole_blocks\(\)"):
            convert()
    assert mask.whole_blocks().to_flex().seq_lengths == (60, 100)


def everything(blocks, columns, used):
    """What promises not to wait for the device, as one function of tensors."""
    mask = BlockMask.from_blocks(blocks, seq_lens=(70, 100), block_size=(16, 32), causal=True, seqused_q=used)
    mask = mask.with_columns(columns, sort=True)
    other = mask.with_columns(columns[..., :3].sort(-1).values)
    out = []
    for m in (mask, other, mask | other, mask & other, mask.expand_heads(4), mask.whole_blocks()):
        out += [m.kv_indices, m.densities(), m.row_densities(), m.to_dense()]
        out += [] if m.column_indices is None else [m.column_indices, m.column_counts()]
    return out


def inputs():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(2, 2, 5, 4, generator=generator) < 0.3
    return blocks, torch.randint(-1, 100, (2, 2, 5, 9), generator=generator, dtype=torch.int32), ints(70, 33)


def test_columns_compile_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(*inputs()), everything(*inputs()), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_columns_never_wait_for_the_gpu():
    arguments = [t.cuda() for t in inputs()]
    everything(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = everything(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(got, everything(*inputs()), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_the_field_can_be_replaced():
    mask = mask_of(ints(40).expand(1, 1, 4, 1))
    assert dataclasses.replace(mask, column_indices=None).to_dense().sum() < mask.to_dense().sum()
