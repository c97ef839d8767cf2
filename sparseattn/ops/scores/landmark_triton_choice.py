"""Triton: lists of blocks from landmark scores, by the cut of a whole sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from sparseattn.ops.scores.lists_triton import within_cap, write_list

_LENGTHS = ["num_rows", "first_row", "rows_here", "columns", "width", "max_blocks", "bounds_stride_b"]


@triton.jit
def capped_list(
    row_ptr,
    list_ptr,
    least,
    recent,
    visible,
    max_blocks,
    FIRST: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the list of a row: forced blocks and the free ones whose key is ``least`` or more; how many they are."""
    ties = tl.full((), 0, tl.int32)
    if CAPPED:
        num_free = tl.maximum(recent - FIRST, 0)
        allowed = max_blocks - (visible - num_free)
        if num_free > allowed:
            least, ties = within_cap(row_ptr, FIRST, recent, least, ties, tl.maximum(allowed, 0), BLOCK)
    return write_list(row_ptr, list_ptr, FIRST, recent, visible, least, ties, BLOCK)


@triton.jit(do_not_specialize=_LENGTHS)
def choose_kernel(
    scores_ptr, least_ptr, counts_ptr, indices_ptr, visible_ptr, recent_ptr, num_rows, first_row, rows_here, columns,
    width, max_blocks, bounds_stride_b,
    FIRST: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The list of one row: forced blocks and those that reach the sequence's cut. Grid (rows_here, H, B).

    ``scores`` is ``[B, H, rows_here, NB]``, of the query blocks from ``first_row`` on.
    """
    m = first_row + tl.program_id(0)
    b = tl.program_id(2)
    head = b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    visible = tl.load(visible_ptr + b * bounds_stride_b + m)
    recent = tl.load(recent_ptr + b * bounds_stride_b + m)
    row_ptr = scores_ptr + (head * rows_here + tl.program_id(0)) * columns
    row = head * num_rows + m
    least = tl.load(least_ptr + b)
    count = capped_list(row_ptr, indices_ptr + row * width, least, recent, visible, max_blocks, FIRST, CAPPED, BLOCK)
    tl.store(counts_ptr + row, count)
