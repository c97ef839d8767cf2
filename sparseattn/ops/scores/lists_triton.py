"""Triton: the list of one row from its scores, a cut-off and a cap. Shared by the kernels that choose blocks.

Scores become integers that order alike (``ordered_keys``). A choice is the lowest integer that is in whatever its index
(``least``), and how many blocks one below it are in as well, the lower indices first (``ties``).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_keys(row_ptr, offs, mask):
    """Scores, and int32 that order as they do; -inf where masked out."""
    x = tl.load(row_ptr + offs, mask=mask, other=float("-inf")) + 0.0  # turns -0.0, which orders below 0.0, into it
    bits = x.to(tl.int32, bitcast=True)
    return x, bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def count_from(row_ptr, first, stop, least, BLOCK: tl.constexpr):
    """Blocks in ``[first, stop)`` whose key is at least ``least``."""
    count = 0
    for n in range(first, stop, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        inside = offs_n < stop
        _, key = ordered_keys(row_ptr, offs_n, inside)
        count += tl.sum(((key >= least) & inside).to(tl.int32))
    return count


@triton.jit
def best_keys(row_ptr, first, stop, need, BLOCK: tl.constexpr):
    """(least, ties) of the ``need`` best blocks in ``[first, stop)``, which holds at least one and as many."""
    cut = tl.full((), -2147483648, tl.int32)
    if count_from(row_ptr, first, stop, 0, BLOCK) >= need:
        cut = tl.full((), 0, tl.int32)
    for i in range(0, 31):
        candidate = cut | (1 << (30 - i))
        if count_from(row_ptr, first, stop, candidate, BLOCK) >= need:
            cut = candidate
    least = cut + 1
    return least, need - count_from(row_ptr, first, stop, least, BLOCK)


@triton.jit
def within_cap(row_ptr, first, stop, least, ties, allowed, BLOCK: tl.constexpr):
    """(least, ties) of the best ``allowed`` of the blocks in ``[first, stop)`` that ``least`` and ``ties`` choose."""
    chosen = count_from(row_ptr, first, stop, least, BLOCK)
    if ties > 0:  # there may be fewer than there is room for
        chosen += tl.minimum(ties, count_from(row_ptr, first, stop, least - 1, BLOCK) - chosen)
    if chosen > allowed:
        if allowed > 0:
            least, ties = best_keys(row_ptr, first, stop, allowed, BLOCK)
        else:
            least = tl.full((), 0x7FFFFFFF, tl.int32)
            ties = tl.full((), 0, tl.int32)
    return least, ties


@triton.jit
def write_list(row_ptr, list_ptr, first, recent, visible, least, ties, BLOCK: tl.constexpr):
    """Write ``[0, first)``, what is chosen of ``[first, recent)``, and ``[recent, visible)``, ascending; the count."""
    count = 0
    tied = 0
    for n in tl.range(0, visible, BLOCK, num_stages=1):
        offs_n = n + tl.arange(0, BLOCK)
        free = (offs_n >= first) & (offs_n < recent)
        _, key = ordered_keys(row_ptr, offs_n, free)
        tie = (free & (key == least - 1) & (ties > 0)).to(tl.int32)
        tie_rank = tied + tl.cumsum(tie, 0) - tie
        keep = (~free) | (key >= least) | ((tie > 0) & (tie_rank < ties))
        count = append_kept(list_ptr, count, keep & (offs_n < visible), offs_n)
        tied += tl.sum(tie)
    return count


@triton.jit
def append_kept(list_ptr, count, keep, offs_n):
    """Write the kept ones of ``offs_n`` behind ``count`` entries of a list; the new count."""
    kept = keep.to(tl.int32)
    slot = count + tl.cumsum(kept, 0) - kept
    tl.store(list_ptr + slot, offs_n, mask=keep)
    return count + tl.sum(kept)
