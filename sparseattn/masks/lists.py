"""Block lists and how they are made: every constructor, set operation and transpose goes through these functions.

All of them are shape-static torch code (no ``nonzero``, no host reads), deterministic, and usable in a CUDA graph.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
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


def compact(blocks: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Turn rows of booleans into counts and ascending column lists.

    Entry j of a list is the first column whose running count reaches j + 1, found by binary search in the running
    count. That needs no sort, no atomics and no int64 temporaries, and it writes only the ``width`` entries kept.

    Args:
        blocks: bool ``[..., rows, cols]``.
        width: Length of the lists; ``cols`` by default. Columns past the first ``width`` set ones of a row are dropped,
            so a caller who passes it must know that it suffices.

    Returns:
        ``counts`` int32 ``[..., rows]`` and ``indices`` int32 ``[..., rows, width]``, zero past the count.

    Example:
        >>> compact(torch.tensor([[False, True, False, True]]))
        (tensor([2], dtype=torch.int32), tensor([[1, 3, 0, 0]], dtype=torch.int32))
    """
    cols = blocks.shape[-1]
    width = cols if width is None else width
    if cols == 0 or width == 0:
        counts = torch.zeros(blocks.shape[:-1], dtype=torch.int32, device=blocks.device)
        return counts, counts.unsqueeze(-1).expand(*blocks.shape[:-1], width).contiguous()
    running = blocks.cumsum(-1, dtype=torch.int32).contiguous()
    counts = running[..., -1].clamp(max=width)
    rank = torch.arange(1, width + 1, dtype=torch.int32, device=blocks.device)
    indices = search(running, rank.expand(*blocks.shape[:-1], width).contiguous(), out_int32=True)
    return counts, torch.where(rank <= counts.unsqueeze(-1), indices, 0)


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
