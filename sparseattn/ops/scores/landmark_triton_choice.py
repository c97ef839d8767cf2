"""Triton: lists of blocks from landmark scores, by a cut or by how many are wanted."""

from __future__ import annotations

import triton
import triton.language as tl

_LENGTHS = ["total", "rows", "columns", "bounds_stride_b", "shift"]


@triton.jit
def _ordered(x):
    """An int64 in [0, 2^32) that orders like the float32."""
    bits = x.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    return flipped.to(tl.int64) & 0xFFFFFFFF


@triton.jit(do_not_specialize=_LENGTHS)
def histogram_kernel(
    scores_ptr, counted_ptr, prefix_ptr, visible_ptr, recent_ptr, total, rows, columns, bounds_stride_b, shift,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the eight bits at ``shift`` of the free scores whose higher bits are the prefix. Grid (programs, B)."""
    b = tl.program_id(1)
    prefix = tl.load(prefix_ptr + b)
    counted = tl.zeros([256], tl.int32)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        bound = b * bounds_stride_b + item % rows
        recent = tl.minimum(tl.load(recent_ptr + bound), tl.load(visible_ptr + bound))
        row_ptr = scores_ptr + (b.to(tl.int64) * total + item) * columns
        for n in range(0, recent, BLOCK):
            offs_n = n + tl.arange(0, BLOCK)
            free = (offs_n >= FIRST) & (offs_n < recent)
            key = _ordered(tl.load(row_ptr + offs_n, mask=free, other=0.0)) >> shift
            free = free & ((key >> 8) == prefix)
            counted += tl.histogram((key & 255).to(tl.int32), 256, mask=free)
    # Integer sums: any order gives the same bits.
    tl.atomic_add(counted_ptr + b * 256 + tl.arange(0, 256), counted, mask=counted > 0)


@triton.jit
def append_kept(list_ptr, count, keep, offs_n):
    """Write the kept ones of ``offs_n`` behind ``count`` entries of a list; the new count."""
    kept = keep.to(tl.int32)
    slot = count + tl.cumsum(kept, 0) - kept
    tl.store(list_ptr + slot, offs_n, mask=keep)
    return count + tl.sum(kept)


@triton.jit(do_not_specialize=_LENGTHS)
def choose_kernel(
    scores_ptr, cut_ptr, counts_ptr, indices_ptr, visible_ptr, recent_ptr, columns, bounds_stride_b,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The list of one row: forced blocks and those whose score reaches the sequence's cut. Grid (MB, H, B)."""
    m = tl.program_id(0)
    b = tl.program_id(2)
    row = (b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + m
    visible = tl.load(visible_ptr + b * bounds_stride_b + m)
    recent = tl.load(recent_ptr + b * bounds_stride_b + m)
    cut = tl.load(cut_ptr + b)
    count = 0
    for n in range(0, visible, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        free = (offs_n >= FIRST) & (offs_n < recent)
        x = tl.load(scores_ptr + row * columns + offs_n, mask=free, other=0.0)
        keep = (offs_n < visible) & ((~free) | (_ordered(x) >= cut))
        count = append_kept(indices_ptr + row * columns, count, keep, offs_n)
    tl.store(counts_ptr + row, count)
