"""Single key columns besides the listed blocks: lists of tokens, -1 padded, one for every row of blocks.

Like the block lists they are made without reading a device: nothing here waits, and no shape depends on contents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.masks.lists import compact, listed_entries, search
from sparseattn.masks.visibility import Frame, visible_span

_NEVER = 2**31 - 1


def in_blocks(columns: Tensor, counts: Tensor, indices: Tensor, block_kv: int) -> Tensor:
    """Which columns lie in a listed block of their row; found by binary search in the list.

    Args:
        columns: int32 ``[..., C]``; negative ones lie in none.
        counts: int32 ``[...]`` of the same leading shape.
        indices: int32 ``[..., K]``, ascending, undefined past the count.
        block_kv: Tokens of a block.

    Returns:
        bool ``[..., C]``.
    """
    width = indices.shape[-1]
    if width == 0 or columns.shape[-1] == 0:
        return torch.zeros_like(columns, dtype=torch.bool)
    listed = torch.where(listed_entries(counts, indices), indices, _NEVER).contiguous()
    block = torch.div(columns, block_kv, rounding_mode="floor").contiguous()
    at = search(listed, block).clamp(max=width - 1)
    return (listed.gather(-1, at) == block) & (columns >= 0)


def keep_columns(columns: Tensor, keep: Tensor) -> Tensor:
    """The kept entries of every list, in their order, moved to its front; -1 past them."""
    if columns.shape[-1] == 0:
        return columns
    counts, at = compact(keep)
    return torch.where(listed_entries(counts, at), columns.gather(-1, at.long()), -1)


def tidy_columns(
    columns: Tensor, counts: Tensor, indices: Tensor, frame: Frame, *, sort: bool, visible: bool = True
) -> Tensor:
    """Lists as a mask holds them: ascending, unique, outside the listed blocks, -1 padded at the end.

    Args:
        columns: int32 ``[B|1, H, MB, C]``; entries outside ``[0, Sk)`` are padding.
        counts: int32 ``[B|1, H, MB]`` of the block lists.
        indices: int32 ``[B|1, H, MB, K]`` of the block lists.
        frame: Of the mask.
        sort: Sort and remove duplicates; without it the entries must ascend already (padding aside).
        visible: Also drop columns that no query of the row can see, as far as the lists can say so (lists shared by
            sequences of different lengths cannot).
    """
    if sort:
        padded = torch.where((columns >= 0) & (columns < frame.seq_lens[1]), columns, _NEVER)
        columns = padded.sort(-1).values
    keep = (columns >= 0) & (columns < frame.seq_lens[1])
    if sort and columns.shape[-1] > 1:
        again = columns[..., 1:] == columns[..., :-1]
        keep = keep & ~torch.nn.functional.pad(again, (1, 0))
    keep = keep & ~in_blocks(columns, counts, indices, frame.block_size[1])
    if visible:
        low, high = visible_span(frame)
        if low.shape[0] in (1, columns.shape[0]):
            keep = keep & (columns >= low[:, None, :, None]) & (columns <= high[:, None, :, None])
    return keep_columns(columns, keep)


def scatter_columns(columns: Tensor, cols: int, size: int = 1) -> Tensor:
    """bool ``[..., cols]``: which tokens (or, with ``size``, which blocks of that many tokens) hold a column."""
    target = torch.where(columns >= 0, torch.div(columns, size, rounding_mode="floor"), cols)
    flags = torch.zeros(*columns.shape[:-1], cols + 1, dtype=torch.bool, device=columns.device)
    return flags.scatter_(-1, target.long(), True)[..., :cols]
