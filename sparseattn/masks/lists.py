"""Block lists and how they are made: every constructor, set operation and transpose goes through these functions.

All of them are shape-static torch code (no ``nonzero``, no host reads), deterministic, and usable in a CUDA graph.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
# On a GPU ``sparseattn.ops.lists`` does these two in one launch each.
_LIBRARY.define(
    "compact(Tensor blocks, int rows, int cols, int width, int repeat_rows, int repeat_cols) -> (Tensor, Tensor)"
)
_LIBRARY.define("transpose_lists(Tensor counts, Tensor indices, int cols) -> (Tensor, Tensor)")
_LIBRARY.define("search(Tensor ascending, Tensor values, bool right, bool out_int32) -> Tensor")
_LIBRARY.impl(
    "search",
    lambda ascending, values, right, out_int32: torch.searchsorted(ascending, values, right=right, out_int32=out_int32),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "sparseattn::search",
    lambda ascending, values, right, out_int32: values.new_empty(
        values.shape, dtype=torch.int32 if out_int32 else torch.int64
    ),
    lib=_LIBRARY,
)


def search(ascending: Tensor, values: Tensor, right: bool = False, out_int32: bool = False) -> Tensor:
    """``torch.searchsorted``, which compiled graphs call as it is.

    Inductor would write a search of its own into the kernels around it: that of torch 2.11 has the wrong shape next to
    a reduction, and searches the wrong entries of a slice (pytorch issue 182343).

    Args:
        ascending: ``[..., N]``, ascending along the last dimension, contiguous.
        values: ``[..., M]`` of the same leading shape, contiguous.
        right: Find the first entry above a value, not the first of at least it.
        out_int32: Give int32, not int64.
    """
    if torch.compiler.is_compiling():
        return cast("Tensor", torch.ops.sparseattn.search(ascending, values, right, out_int32))
    return torch.searchsorted(ascending, values, right=right, out_int32=out_int32)


def compact(
    blocks: Tensor, width: int | None = None, *, size: tuple[int, int] | None = None, repeat: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Turn rows of booleans into counts and ascending column lists.

    Args:
        blocks: bool ``[..., rows, cols]``.
        width: Length of the lists; as many as columns by default. Columns past the first ``width`` set ones of a row
            are dropped, so a caller who passes it must know that it suffices.
        size: Rows and columns of blocks; by default as many as booleans stand for. Booleans past them are dropped.
        repeat: Rows and columns of blocks that each boolean stands for.

    Returns:
        ``counts`` int32 ``[..., rows]`` and ``indices`` int32 ``[..., rows, width]``, zero past the count.

    Example:
        >>> compact(torch.tensor([[False, True, False, True]]))
        (tensor([2], dtype=torch.int32), tensor([[1, 3, 0, 0]], dtype=torch.int32))
    """
    rows, cols = size or (blocks.shape[-2] * repeat[0], blocks.shape[-1] * repeat[1])
    width = cols if width is None else width
    compacted = torch.ops.sparseattn.compact if _alone(blocks) and 2 <= blocks.dim() <= 4 else compact_by_operators
    return cast("tuple[Tensor, Tensor]", compacted(blocks, rows, cols, width, *repeat))


def compact_by_operators(
    blocks: Tensor, rows: int, cols: int, width: int, repeat_rows: int, repeat_cols: int
) -> tuple[Tensor, Tensor]:
    """:func:`compact` on any device.

    Entry j of a list is the first column whose running count reaches j + 1, found by binary search in the running
    count. That needs no sort, no atomics and no int64 temporaries, and it writes only the ``width`` entries kept.
    """
    if repeat_rows > 1:
        blocks = blocks.repeat_interleave(repeat_rows, -2)
    if repeat_cols > 1:
        blocks = blocks.repeat_interleave(repeat_cols, -1)
    blocks = blocks[..., :rows, :cols]
    if cols == 0 or width == 0:
        counts = torch.zeros(blocks.shape[:-1], dtype=torch.int32, device=blocks.device)
        return counts, counts.unsqueeze(-1).expand(*blocks.shape[:-1], width).contiguous()
    running = blocks.cumsum(-1, dtype=torch.int32).contiguous()
    counts = running[..., -1].clamp(max=width)
    rank = torch.arange(1, width + 1, dtype=torch.int32, device=blocks.device)
    indices = search(running, rank.expand(*blocks.shape[:-1], width).contiguous(), out_int32=True)
    return counts, torch.where(rank <= counts.unsqueeze(-1), indices, 0)


def transpose_lists(counts: Tensor, indices: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Lists of the rows that list each column.

    Args:
        counts: int32 ``[B, H, rows]``.
        indices: int32 ``[B, H, rows, width]``, ascending, undefined past the count.
        cols: Number of columns.

    Returns:
        int32 ``[B, H, cols]`` and ``[B, H, cols, rows]``, ascending, zero past the count.
    """
    transposed = torch.ops.sparseattn.transpose_lists if _alone(counts) else transpose_by_operators
    return cast("tuple[Tensor, Tensor]", transposed(counts, indices, cols))


def transpose_by_operators(counts: Tensor, indices: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """:func:`transpose_lists` on any device."""
    blocks = scatter_blocks(counts, indices, cols).transpose(-1, -2)
    rows = blocks.shape[-1]
    return compact_by_operators(blocks, cols, rows, rows, 1, 1)


def _alone(t: Tensor) -> bool:
    """Whether ``t`` lies on a GPU, and nobody traces what happens to it: compiled graphs do best with operators."""
    return t.is_cuda and type(t) is Tensor and not torch.compiler.is_compiling()


def _fake_compact(
    blocks: Tensor, rows: int, cols: int, width: int, repeat_rows: int, repeat_cols: int
) -> tuple[Tensor, Tensor]:
    shape = (*blocks.shape[:-2], rows)
    return blocks.new_empty(shape, dtype=torch.int32), blocks.new_empty((*shape, width), dtype=torch.int32)


for _name, _operators, _fake in (
    ("compact", compact_by_operators, _fake_compact),
    (
        "transpose_lists",
        transpose_by_operators,
        lambda counts, indices, cols: (
            counts.new_empty((*counts.shape[:-1], cols)),
            counts.new_empty((*counts.shape[:-1], cols, counts.shape[-1])),
        ),
    ),
):
    _LIBRARY.impl(_name, _operators, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparseattn::{_name}", _fake, lib=_LIBRARY)


def scatter_blocks(counts: Tensor, indices: Tensor, cols: int) -> Tensor:
    """Inverse of :func:`compact`: bool ``[..., rows, cols]`` with the listed columns set.

    Lists need be neither sorted nor unique, and entries outside ``[0, cols)`` are dropped (``validate`` finds those).

    Args:
        counts: int32 ``[..., rows]``.
        indices: int32 ``[..., rows, width]``, undefined past the count.
        cols: Number of columns.
    """
    listed = listed_entries(counts, indices) & (indices >= 0) & (indices < cols)
    # Entries that do not count go to one column past the end, so that they cannot unset a column that does.
    target = torch.where(listed, indices, cols).long()
    blocks = torch.zeros(*counts.shape, cols + 1, dtype=torch.bool, device=counts.device)
    return blocks.scatter_(-1, target, True)[..., :cols]


def listed_entries(counts: Tensor, indices: Tensor) -> Tensor:
    """bool of ``indices``' shape: which entries lie before their row's count."""
    position = torch.arange(indices.shape[-1], dtype=torch.int32, device=indices.device)
    return position < counts.unsqueeze(-1)


def interval_lists(lead: Tensor, first: Tensor, last: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lists of the columns ``[0, lead)`` and ``[first, last]`` of every row, without a dense row in between.

    Args:
        lead: int32 ``[B|1, rows]``, how many columns at the start.
        first: int32 ``[B|1, rows]``, inclusive.
        last: int32 ``[B|1, rows]``, inclusive; below ``first`` for an empty interval.
        width: Length of the lists, at least the longest.

    Returns:
        ``counts`` int32 ``[B|1, 1, rows]`` and ``indices`` int32 ``[B|1, 1, rows, width]``, zero past the count.
    """
    start = torch.maximum(first, lead)
    counts = lead + (last + 1 - start).clamp(min=0)
    k = torch.arange(width, dtype=torch.int32, device=lead.device)
    lead, start = lead.unsqueeze(-1), start.unsqueeze(-1)
    indices = torch.where(k < lead, k, k - lead + start)
    indices = torch.where(k < counts.unsqueeze(-1), indices, 0)
    return counts.unsqueeze(1), indices.unsqueeze(1)
