"""Block lists on the device: booleans to lists, and lists to those of the other side, in one launch each.

Both stand in the place of a dozen operators of ``masks.lists``, whose results they match entry by entry.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch, repeatedly
from sparseattn.kernels.offline import offline_case
from sparseattn.kernels.usual import empty

_ROWS = 8
_COLUMNS = 128
# Columns whose lists a program of ``transpose_kernel`` makes: bits of a word.
_WORD = 32
_LISTS = 64


@triton.jit(do_not_specialize=["rows", "cols", "width", "heads", "repeat_rows", "repeat_cols"])
def compact_kernel(
    block_ptr, count_ptr, index_ptr, stride, rows, cols, width, heads, repeat_rows, repeat_cols,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: counts and ascending lists of ``ROWS`` rows. Grid (row tiles of all heads and batch entries,).

    Writes int32 ``count`` [batch, heads, rows] and ``index`` [batch, heads, rows, width], zero past the count. Each
    boolean stands for ``repeat_rows`` by ``repeat_cols`` blocks. ``stride``: of booleans, by batch, head, row, column.
    """
    tiles = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head = (group % heads).to(tl.int64)
    source = block_ptr + (group // heads).to(tl.int64) * stride[0] + head * stride[1]
    source += (row // repeat_rows).to(tl.int64) * stride[2]
    line = group.to(tl.int64) * rows + row
    target = index_ptr + line * width
    count = row * 0
    for first in range(0, cols, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        at = (col // repeat_cols).to(tl.int64) * stride[3]
        present = inside[:, None] & (col < cols)[None, :]
        kept = (tl.load(source[:, None] + at[None, :], mask=present, other=0).to(tl.int32) != 0).to(tl.int32)
        place = count[:, None] + tl.cumsum(kept, 1) - kept
        tl.store(target[:, None] + place, place * 0 + col[None, :], mask=(kept != 0) & (place < width))
        count += tl.sum(kept, 1)
    count = tl.minimum(count, width)
    tl.store(count_ptr + line, count, mask=inside)
    for first in range(tl.min(tl.where(inside, count, width), 0), width, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        rest = (col[None, :] >= count[:, None]) & inside[:, None] & (col < width)[None, :]
        tl.store(target[:, None] + col[None, :], tl.zeros([ROWS, COLUMNS], tl.int32), mask=rest)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _words(list_ptr, count_ptr, row, rows, width, first, rounds, LISTS: tl.constexpr, WORD: tl.constexpr):
    """Which of columns ``first .. first + WORD`` the ascending lists of ``row`` name, a bit each: int32 [LISTS]."""
    inside = row < rows
    end = tl.minimum(tl.load(count_ptr + row, mask=inside, other=0), width)
    source = list_ptr + row.to(tl.int64) * width
    low = row * 0
    high = end
    for _ in range(rounds):
        middle = (low + high) // 2
        going = low < high
        below = going & (tl.load(source + middle, mask=going, other=0) < first)
        low = tl.where(below, middle + 1, low)
        high = tl.where(going & ~below, middle, high)
    at = low[:, None] + tl.arange(0, WORD)[None, :]
    col = tl.load(source[:, None] + at, mask=at < end[:, None], other=-1) - first
    bit = tl.where((col >= 0) & (col < WORD), 1 << tl.maximum(tl.minimum(col, WORD - 1), 0), 0)
    return tl.reduce(bit, 1, _either)


@triton.jit(do_not_specialize=["rows", "cols", "width", "rounds"])
def transpose_kernel(
    list_ptr, list_count_ptr, index_ptr, count_ptr, rows, cols, width, rounds, LISTS: tl.constexpr, WORD: tl.constexpr
):
    """One program: which rows list each of ``WORD`` columns. Grid (column tiles, lists of all heads and batch entries).

    Takes int32 ``list_count`` [groups, rows] and ascending lists [groups, rows, width]; writes ``count`` [groups, cols]
    and ``index`` [groups, cols, rows], ascending, zero past the count. ``rounds`` halvings find an entry of a list.
    """
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * WORD
    col = first + tl.arange(0, WORD)
    inside = col < cols
    list_ptr += group * rows * width
    list_count_ptr += group * rows
    target = index_ptr + (group * cols + col) * rows
    count = col * 0
    for base in range(0, rows, LISTS):
        row = base + tl.arange(0, LISTS)
        word = _words(list_ptr, list_count_ptr, row, rows, width, first, rounds, LISTS, WORD)
        kept = ((word[None, :] >> tl.arange(0, WORD)[:, None]) & 1) * inside[:, None].to(tl.int32)
        place = count[:, None] + tl.cumsum(kept, 1) - kept
        tl.store(target[:, None] + place, place * 0 + row[None, :], mask=kept != 0)
        count += tl.sum(kept, 1)
    tl.store(count_ptr + group * cols + col, count, mask=inside)
    for base in range(tl.min(tl.where(inside, count, rows), 0), rows, LISTS):
        row = base + tl.arange(0, LISTS)
        rest = (row[None, :] >= count[:, None]) & inside[:, None] & (row < rows)[None, :]
        tl.store(target[:, None] + row[None, :], tl.zeros([WORD, LISTS], tl.int32), mask=rest)


def compact(
    blocks: Tensor, rows: int, cols: int, width: int, repeat_rows: int = 1, repeat_cols: int = 1
) -> tuple[Tensor, Tensor]:
    """Counts and ascending lists of rows of booleans; ``masks.lists.compact`` says of which form.

    Args:
        blocks: bool ``[..., M, N]`` of two to four dimensions, any strides.
        rows: Rows of blocks, at most ``M * repeat_rows``.
        cols: Likewise, columns.
        width: Length of the lists.
        repeat_rows: Rows of blocks that a boolean stands for.
        repeat_cols: Likewise, columns.
    """
    outer = blocks.shape[:-2]
    counts = empty((*outer, rows), torch.int32, blocks.device)
    indices = empty((*outer, rows, width), torch.int32, blocks.device)
    if counts.numel() == 0:
        return counts, indices
    heads = outer[-1] if outer else 1
    groups = counts.numel() // rows
    strides = (0,) * (4 - blocks.dim()) + blocks.stride()

    def call(blocks: Tensor, counts: Tensor, indices: Tensor) -> None:
        launch(
            compact_kernel, (triton.cdiv(rows, _ROWS) * groups,), blocks, counts, indices, strides, rows, cols, width,
            heads, repeat_rows, repeat_cols, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4, **LAUNCH,
        )  # fmt: skip

    key = ("compact", cols, repeat_rows, repeat_cols)
    repeatedly(call, key, blocks=blocks, counts=counts, indices=indices)
    return counts, indices


def transpose(counts: Tensor, indices: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Which rows list each column; ``masks.lists.transpose_lists`` says of which form.

    Args:
        counts: int32 ``[B, H, rows]``, contiguous.
        indices: int32 ``[B, H, rows, width]``, ascending lists, contiguous.
        cols: Number of columns.
    """
    batch, heads, rows, width = indices.shape
    made = empty((batch, heads, cols), torch.int32, counts.device)
    lists = empty((batch, heads, cols, rows), torch.int32, counts.device)
    if made.numel() == 0:
        return made, lists

    def call(indices: Tensor, counts: Tensor, lists: Tensor, made: Tensor) -> None:
        launch(
            transpose_kernel, (triton.cdiv(cols, _WORD), batch * heads), indices, counts, lists, made, rows, cols,
            width, width.bit_length(), LISTS=_LISTS, WORD=_WORD, num_warps=4, **LAUNCH,
        )  # fmt: skip

    repeatedly(call, ("transpose",), indices=indices, counts=counts, lists=lists, made=made)
    return made, lists


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    compacting = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    types = {"block_ptr": "*i1", "stride": ("i32",) * 4}
    transposing = {"LISTS": _LISTS, "WORD": _WORD}
    return [
        ("compact", *offline_case(compact_kernel, compacting, types), 4, 1),
        ("transpose", *offline_case(transpose_kernel, transposing), 4, 1),
    ]
