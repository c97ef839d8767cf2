"""The merge of a row tile's shares in the Hopper kernels themselves: by the program that ends last, or by all of them.

Shares are read in their order, whoever ends last, so that every run gives the same bits.
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from sparseattn.kernels.hopper import post, receive
from sparseattn.kernels.hopper_attention import LOG2E, finish_sums

# A name that changed after Triton 3.6.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.constexpr_function
def shares_at_once(rows: int, columns: int) -> int:
    """Shares that four warps read together, in 64 registers a thread."""
    return max(2, 16 // (max(1, rows // 4 // max(1, 128 // columns)) * max(1, columns // 128)))


@gluon.constexpr_function
def merge_layout(rows: int, columns: int) -> gl.BlockedLayout:
    """Layout of [shares, rows, columns]: a thread has all shares of its 4 columns."""
    lanes = min(32, columns // 4)
    return gl.BlockedLayout([shares_at_once(rows, columns), 1, 4], [1, 32 // lanes, lanes], [1, 4, 1], [2, 1, 0])


@gluon.jit
def last_to_arrive(arrivals_ptr, shares):
    """Whether this program is the last of ``shares`` to have left its sums; the counter then is 0 again."""
    # The barrier puts all threads' stores before the release of one; its acquire, and the barrier through which the
    # others learn of the count, put all loads that follow after what the other programs released.
    thread_barrier()
    last = gl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == shares - 1
    if last:
        gl.store(arrivals_ptr, 0)
    return last


@gluon.jit
def merge_shares(part_ptr, sums_ptr, place, shares, rows, row, inside, LAYOUT: gl.constexpr, F: gl.constexpr):
    """Outputs, natural-log maxima and sums of ``row``, where ``inside`` a row tile, from ``shares`` at ``place`` .."""
    SHARES: gl.constexpr = shares_at_once(F.MERGE, F.BLOCK_DV)
    SUMS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    SUM: gl.constexpr = gl.SliceLayout(0, SUMS)
    OUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    nth = gl.arange(0, SHARES, gl.SliceLayout(1, SUMS))
    cols = gl.arange(0, F.BLOCK_DV, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    m_i = gl.full([F.MERGE], float("-inf"), gl.float32, SUM)
    l_i = gl.zeros([F.MERGE], gl.float32, SUM)
    acc = gl.zeros([F.MERGE, F.BLOCK_DV], gl.float32, OUT)
    for start in range(0, shares, SHARES):
        first = (place + start + nth).to(gl.int64) * rows
        there = (start + nth < shares)[:, None] & inside[None, :]  # [SHARES, MERGE]
        sums = sums_ptr + (first * 2)[:, None] + row[None, :]
        m_part = gl.load(sums, mask=there, other=float("-inf"))
        l_part = gl.load(sums + rows, mask=there, other=0.0)
        at_part = (first[:, None] + row[None, :]) * F.DV
        part_in = there[:, :, None] & (cols < F.DV)[None, None, :]
        part = gl.load(part_ptr + at_part[:, :, None] + cols[None, None, :], mask=part_in, other=0.0)
        m_new = gl.maximum(m_i, gl.max(m_part, 0))
        top = gl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: exp(-inf) = 0, not NaN
        alpha = gl.exp2((m_i - top) * LOG2E)
        weight = gl.exp2((m_part - top[None, :]) * LOG2E)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None] + gl.sum(weight[:, :, None] * part, 0)
        l_i = l_i * alpha + gl.sum(weight * l_part, 0)
        m_i = m_new
    return acc, m_i, l_i


@gluon.jit
def merge_by_last(
    arrivals_ptr, part_ptr, sums_ptr, place, shares, rows, out, lse_ptr, lse_stride, sinks_ptr, tile, F: gl.constexpr
):  # fmt: skip
    """Say that a share of a row tile has left its sums; if it was the last one, write output and LSE of the rows.

    ``out`` is (pointer, strides of rows and heads in 8 elements), ``tile`` (first output row, tokens, tile head, its
    first query head). ``rows`` of the tile are in use, token by token.
    """
    if last_to_arrive(arrivals_ptr, shares):
        LAYOUT: gl.constexpr = merge_layout(F.MERGE, F.BLOCK_DV)
        OUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
        first_row, tokens, tile_head, first_head = tile
        row = gl.arange(0, F.MERGE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
        in_group = tile_head % F.CHUNKS * F.PACK + row % F.PACK
        inside = (row // F.PACK < tokens) & (in_group < F.GROUP)
        acc, m_i, l_i = merge_shares(part_ptr, sums_ptr, place, shares, rows, row, inside, LAYOUT, F)
        heads = gl.minimum(first_head + row % F.PACK, F.HEADS - 1)
        o_row = first_row + row // F.PACK
        lse_at = heads.to(gl.int64) * lse_stride + o_row
        factor = finish_sums(lse_ptr, lse_at, sinks_ptr, heads, m_i, l_i, inside, LOG2E, F)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        o_ptr, row_stride, head_stride = out
        o_at = o_row.to(gl.int64) * (row_stride * 8) + heads.to(gl.int64) * (head_stride * 8)
        o_at = gl.convert_layout(o_at, gl.SliceLayout(1, OUT))[:, None]
        cols = gl.arange(0, F.BLOCK_DV, gl.SliceLayout(0, OUT))
        o_in = gl.convert_layout(inside, gl.SliceLayout(1, OUT))[:, None] & (cols < F.DV)[None, :]
        gl.store(o_ptr + o_at + cols[None, :], acc.to(o_ptr.dtype.element_ty), mask=o_in)


@gluon.jit
def work_of(counter_ptr, merged, F: gl.constexpr):
    """Row tiles and shares; row tiles that have to be merged; all items, those of the merge included, which come last.

    ``merged`` is what ``merge_rows`` needs.
    """
    num_tiles = gl.load(counter_ptr + 1)
    merges = num_tiles * 0
    total = num_tiles
    if F.MERGE:
        merges = gl.load(counter_ptr + 2)
        total += merges * pieces_of(merged[3], F)
    return num_tiles, merges, total


@gluon.jit
def pieces_of(rows, F: gl.constexpr):
    """Items of a row tile's merge."""
    return (rows + (2 * F.MERGE - 1)) // (2 * F.MERGE)


@gluon.jit
def first_claim(counter_ptr, merges, total):
    """A program's first item, what is added to later claims to have an item, and the last claim of all programs.

    The first items are the programs' own, without a claim; but who waits for others must know that they run, so where
    anything is merged these are claimed, too. Whoever makes the last claim leaves the counter as it was.
    """
    position = gl.program_id(0)
    unclaimed = gl.num_programs(0)
    last_claim = total - 1
    if merges > 0:
        last_claim = total + unclaimed - 1
        unclaimed = unclaimed * 0
        position = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if position == last_claim:
            gl.store(counter_ptr, 0)
    return position, unclaimed, last_claim


@gluon.jit
def post_merges(info, turn, position, num_tiles, total, counter_ptr, last_claim, WARPS: gl.constexpr):
    """Claim items of the merge, and tell the consumers of each, from -2 downwards; returns the next turn."""
    while position < total:
        post(info, turn, num_tiles - 2 - position, WARPS)
        turn += 1
        position = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if position == last_claim:
            gl.store(counter_ptr, 0)
    return turn


@gluon.jit
def merge_rows(merged, item, half: gl.constexpr, F: gl.constexpr):
    """Some rows of a row tile whose keys were cut, half of their columns: their outputs, and their LSE."""
    part_ptr, sums_ptr, merge_ptr, rows, lse_ptr, sinks_ptr, total_q, out_ptr, out_stride = merged
    LAYOUT: gl.constexpr = merge_layout(F.MERGE, F.BLOCK_DV)
    OUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    pieces = pieces_of(rows, F)
    merge = merge_ptr + (item // pieces).to(gl.int64) * 8
    first_row = gl.load(merge)
    tokens = gl.load(merge + 1)
    head = gl.load(merge + 2)
    place = gl.load(merge + 3)
    shares = gl.load(merge + 4)
    cols = half * F.BLOCK_DV + gl.arange(0, F.BLOCK_DV, gl.SliceLayout(0, OUT))
    for part in range(2):
        row = (item % pieces * 2 + part) * F.MERGE + gl.arange(0, F.MERGE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
        inside = row // F.PACK < tokens
        acc, m_i, l_i = merge_shares(
            part_ptr + half * F.BLOCK_DV, sums_ptr, place, shares, rows, row, inside, LAYOUT, F
        )
        heads = head * F.PACK + row % F.PACK
        o_row = first_row + row // F.PACK
        lse_at = heads.to(gl.int64) * total_q + o_row
        factor = finish_sums(lse_ptr, lse_at, sinks_ptr, heads, m_i, l_i, inside, LOG2E, F)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        o_at = (o_row.to(gl.int64) * F.HEADS + heads) * (out_stride * 8)
        o_at = gl.convert_layout(o_at, gl.SliceLayout(1, OUT))[:, None] + cols[None, :]
        o_in = gl.convert_layout(inside, gl.SliceLayout(1, OUT))[:, None] & (cols < F.DV)[None, :]
        gl.store(out_ptr + o_at, acc.to(out_ptr.dtype.element_ty), mask=o_in)


@gluon.jit
def merge_tiles(info, turn, position, counter_ptr, merged, half: gl.constexpr, F: gl.constexpr):
    """A warpgroup's part in the merge: wait until all shares have left their sums, then take items in turn.

    ``counter_ptr`` + 3 counts what warpgroups have done. Whoever has claimed a share runs, and waits for nothing, so
    this ends.
    """
    num_tiles, merges, total = work_of(counter_ptr, merged, F)
    if merges > 0:
        # The barrier puts all threads' stores before the release of one; its acquire, and the barrier by which the
        # others learn of it, put all loads that follow after what the other programs released.
        thread_barrier()
        gl.atomic_add(counter_ptr + 3, turn, sem="release")
        if position < -1:
            while gl.atomic_add(counter_ptr + 3, 0, sem="acquire") < 2 * num_tiles:
                pass
        before = turn
        while position < -1:
            merge_rows(merged, -2 - position, half, F)
            turn += 1
            position = receive(info, turn)
        if gl.atomic_add(counter_ptr + 3, turn - before, sem="relaxed") + turn - before == 2 * total:
            gl.store(counter_ptr + 3, 0)
