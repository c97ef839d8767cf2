"""What the programs of the Hopper kernel of landmark scores work at: items, which the loader tells the scorers about.

The loader has time to spare for it. What every scorer works out for itself is code that runs once an item, long and
cold.
"""

# Annotations must stay objects for the Gluon front end: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparseattn.kernels.hopper import sequence_span
from sparseattn.kernels.hopper_masses import TILE


@gluon.jit
def share_of(turn, c, b, bounds, F: gl.constexpr):
    """(query block, share of its rows, recent, visible) of scorer ``c``; recent is 0 where it has nothing to do."""
    visible_ptr, recent_ptr, stride_b, first_row, rows_here = bounds
    at = turn * F.CONSUMERS + c
    m = first_row + rows_here - 1 - gl.minimum(at // F.SLOTS, rows_here - 1)
    visible = gl.load(visible_ptr + b * stride_b + m)
    recent = gl.load(recent_ptr + b * stride_b + m)
    active = (at < rows_here * F.SLOTS) & (recent > F.FIRST)
    return m, at % F.SLOTS, gl.where(active, recent, 0), gl.where(active, visible, 0)


@gluon.jit
def item_of(turn):
    """The item of a program's turn: long items come first, and who starts a round with the longest ends the next."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - pid, pid)


@gluon.jit
def tell(cells, at, number):
    """Leave a number for the scorers, from a partition of one warp."""
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    cells.index(at).store(gl.full([1], number, gl.int32, lane))


@gluon.jit
def told(cells, at):
    """The number that ``tell`` left."""
    return gl.max(cells.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def tell_item(turn, facts, b, kv_head, k_len, share, spans, bounds, max_q, F: gl.constexpr):
    """Tell the scorers about a turn's item: (first key of the diagonal's tiles, tiles of keys, tiles of landmarks)."""
    cells, full, empty = facts
    first = k_len
    last = k_len * 0
    most = k_len * 0
    at = (turn & 1) * (8 + 4 * F.CONSUMERS)
    mbarrier.wait(empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    for c in gl.static_range(F.CONSUMERS):
        m, slot, recent, visible = share_of(share, c, b, bounds, F)
        first = gl.minimum(first, gl.where(recent > 0, recent * F.BLOCK, k_len))
        last = gl.maximum(last, gl.minimum(visible * F.BLOCK, k_len))
        most = gl.maximum(most, recent)
        tell(cells, at + (8 + 4 * c), m)
        tell(cells, at + (9 + 4 * c), slot)
        tell(cells, at + (10 + 4 * c), recent)
        tell(cells, at + (11 + 4 * c), visible)
    diagonal = (gl.maximum(last - first, 0) + (TILE - 1)) // TILE
    forced = gl.where(most > 0, diagonal + F.FIRST, 0)
    count = (most * F.CLUSTERS + (TILE - 1)) // TILE
    q_start, q_len = sequence_span(spans[0], spans[1], b, max_q, F.RAGGED_Q)
    tell(cells, at, b)
    tell(cells, at + 1, kv_head)
    tell(cells, at + 2, q_start)
    tell(cells, at + 3, q_len)
    tell(cells, at + 4, k_len)
    tell(cells, at + 5, first)
    tell(cells, at + 6, forced)
    tell(cells, at + 7, count)
    mbarrier.arrive(full.index(turn & 1), count=1)
    return first, forced, count


@gluon.jit
def item_facts(turn, CID: gl.constexpr, facts, F: gl.constexpr):
    """Scorer ``CID``'s share of a turn's item."""
    cells, full, empty = facts
    mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)
    at = (turn & 1) * (8 + 4 * F.CONSUMERS)
    own = at + (8 + 4 * CID)
    return (
        told(cells, at), told(cells, at + 1), told(cells, at + 2), told(cells, at + 3), told(cells, at + 4),
        told(cells, own), told(cells, own + 1), told(cells, own + 2), told(cells, own + 3),
    )  # fmt: skip


@gluon.jit
def item_tiles(turn, facts, F: gl.constexpr):
    """Of the same item: first key of the diagonal's tiles, tiles of keys, tiles of landmarks."""
    at = (turn & 1) * (8 + 4 * F.CONSUMERS)
    return told(facts[0], at + 5), told(facts[0], at + 6), told(facts[0], at + 7)
