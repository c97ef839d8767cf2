"""Union and intersection of masks, columns included."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.columns import in_blocks, tidy_columns
from sparseattn.masks.lists import compact, search

if TYPE_CHECKING:
    from sparseattn.masks.block_mask import BlockMask


def union(a: BlockMask, b: BlockMask) -> BlockMask:
    """See ``BlockMask.__or__``."""
    _check_same(a, b, ("block_size", "seq_lens", "causal", "window", "device"))
    out = _with_blocks(a, a.to_blocks() | b.to_blocks(), a.kv_indices.shape[-1] + b.kv_indices.shape[-1])
    parts = [_spread(m.column_indices, out) for m in (a, b) if m.column_indices is not None]
    return _with_columns(out, parts)


def intersection(a: BlockMask, b: BlockMask) -> BlockMask:
    """See ``BlockMask.__and__``."""
    _check_same(a, b, ("block_size", "seq_lens", "device"))
    out = _with_blocks(a, a.to_blocks() & b.to_blocks(), min(a.kv_indices.shape[-1], b.kv_indices.shape[-1]))
    parts = []
    # A token is in both masks if both list its block, or one its block and the other its column, or both its column.
    for mine, other in ((a, b), (b, a)):
        if mine.column_indices is None:
            continue
        columns = _spread(mine.column_indices, out)
        shared = in_blocks(
            columns, _spread(other.kv_num_blocks, out), _spread(other.kv_indices, out), other.block_size[1]
        )
        if mine is a and b.column_indices is not None:
            shared = shared | _among(columns, _spread(b.column_indices, out))
        parts.append(torch.where(shared, columns, -1))
    out = replace(out, causal=a.causal or b.causal, window=_stricter(a.window, b.window))
    return _with_columns(out, parts)


def _with_blocks(mask: BlockMask, blocks: Tensor, width: int) -> BlockMask:
    counts, indices = compact(blocks, min(width, mask.num_kv_blocks))
    return replace(mask, kv_num_blocks=counts, kv_indices=indices, column_indices=None)


def _with_columns(mask: BlockMask, parts: list[Tensor]) -> BlockMask:
    if not parts:
        return mask
    columns = tidy_columns(
        torch.cat(parts, -1), mask.kv_num_blocks, mask.kv_indices, mask.frame, sort=True, visible=False
    )
    return replace(mask, column_indices=columns)


def _spread(t: Tensor, out: BlockMask) -> Tensor:
    """Lists of one operand with the batch and heads of the result."""
    return t.expand(*out.kv_num_blocks.shape[:2], *t.shape[2:])


def _among(columns: Tensor, others: Tensor) -> Tensor:
    """Which columns are also in the other lists; both as masks hold them."""
    if others.shape[-1] == 0:
        return torch.zeros_like(columns, dtype=torch.bool)
    ascending = torch.where(others < 0, 2**31 - 1, others).contiguous()
    at = search(ascending, columns.contiguous()).clamp(max=others.shape[-1] - 1)
    return (ascending.gather(-1, at) == columns) & (columns >= 0)


def _check_same(a: BlockMask, b: BlockMask, names: tuple[str, ...]) -> None:
    for name in names:
        mine, theirs = getattr(a, name), getattr(b, name)
        if mine != theirs:
            raise argument_error(name, f"the same in both masks ({mine})", theirs)
    for name in ("seqused_q", "seqused_k"):
        mine, theirs = getattr(a, name), getattr(b, name)
        # The same tensor needs no look at the device; another one with equal contents is as good.
        if mine is not theirs and (mine is None or theirs is None or not torch.equal(mine, theirs)):
            raise argument_error(name, "the same lengths in both masks", "different ones")
    for name, mine, theirs, hint in (
        ("heads", a.heads, b.heads, "Use expand_heads() to go from KV heads to query heads."),
        ("batch", a.kv_num_blocks.shape[0], b.kv_num_blocks.shape[0], ""),
    ):
        if mine != theirs and 1 not in (mine, theirs):
            raise argument_error(name, f"1 or the same in both masks ({mine})", theirs, hint)


def _stricter(
    a: tuple[int | None, int | None] | None, b: tuple[int | None, int | None] | None
) -> tuple[int | None, int | None] | None:
    """Window that is visible through both."""
    if a is None or b is None:
        return b if a is None else a
    left, right = (y if x is None else x if y is None else min(x, y) for x, y in zip(a, b, strict=True))
    return left, right
