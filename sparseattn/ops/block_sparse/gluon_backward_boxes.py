"""Steps of the Hopper backward kernels over masks of small blocks: made of boxes that a list names one by one.

Lists are those of ``kernels.unions``: for each tile of stationary rows, boxes of ``BOX`` walking rows and bits that say
which 16 stationary rows see them. As many entries as fill a step make one, and are handed over as they are.
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from sparseattn.kernels import unions
from sparseattn.kernels.hopper import async_load, async_reduce_add, box_coordinates, opaque_zero, tile_layout, view
from sparseattn.kernels.hopper_boxes import copy_rows
from sparseattn.ops.block_sparse.gluon_backward_parts import NOWHERE, SHIFT, emit_dq, field, issue_dq

MISSING: gl.constexpr = gl.constexpr(unions.MISSING.value)


@gluon.constexpr_function
def slot_size(box, plain):
    """Numbers of a step: ``plain``, or with boxes perhaps a tile, and up to eight entries."""
    return 8 if box else plain


@gluon.constexpr_function
def gathers(box):
    """Whether a step of 64 rows is made of several boxes."""
    return 0 < box < 64


@gluon.constexpr_function
def query_fills(box):
    """Arrivals at the barrier of a step's queries: its tile's, and of each thread that copies row numbers."""
    return 33 if 0 < box < 64 else 1


@gluon.jit
def step_entries(steps_s, first, ROWS: gl.constexpr, BOX: gl.constexpr, LAYOUT: gl.constexpr):
    """The entry of each of a step's ``ROWS`` walking rows; they begin at number ``first``."""
    row = gl.arange(0, ROWS, LAYOUT)
    entries = row * 0 + field(steps_s.index(first), 0)
    for i in gl.static_range(1, ROWS // BOX):
        entries = gl.where(row < i * BOX, entries, field(steps_s.index(first + i), 0))
    return entries


@gluon.jit
def step_rows(steps_s, first, count_s, BOX: gl.constexpr, LAYOUT: gl.constexpr):
    """The walking rows of a step, whose first row or entries are number ``first`` and those behind it."""
    if BOX:
        rows = (step_entries(steps_s, first, count_s.shape[0], BOX, LAYOUT) >> SHIFT) * BOX + count_s.load(LAYOUT) % BOX
    else:
        rows = field(steps_s.index(first), 0) + count_s.load(LAYOUT)
    return rows


@gluon.jit
def seen(p, steps_s, first, BOX: gl.constexpr, CID: gl.constexpr):
    """Probabilities [64, walking rows], 0 where bits say that this warpgroup's rows do not see a box."""
    LAYOUT: gl.constexpr = p.type.layout
    entries = step_entries(steps_s, first, p.shape[1], BOX, gl.SliceLayout(0, LAYOUT))
    unit = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) // 16 + 4 * CID
    return gl.where(((entries[None, :] >> unit[:, None]) & 1) != 0, p, 0.0)


@gluon.jit
def load_list_boxes(desc, start, length, list_ptr, head, full, tile, BOX: gl.constexpr):
    """Fill a tile with the boxes of the entries at ``list_ptr``; zeros where they are past the sequence's end.

    The tensor map's boxes are ``BOX`` rows by 64 columns: a tile's memory is one panel of all its rows after another.
    """
    COUNT: gl.constexpr = tile.shape[0] // BOX
    PANELS: gl.constexpr = tile.shape[1] // 64
    boxes = view(tile, desc.dtype, [PANELS * COUNT, BOX, 64], tile_layout(2))
    mbarrier.expect(full, COUNT * PANELS * desc.block_type.nbytes)
    for i in gl.static_range(COUNT):
        row = (gl.load(list_ptr + i) >> SHIFT) * BOX
        for panel in gl.static_range(PANELS):
            box = view(boxes.index(panel * COUNT + i), desc.dtype, desc.block_type.shape, desc.layout)
            async_load(desc, box_coordinates(start, length, row, head, panel * 64), full, box)


@gluon.jit
def load_seen_halves(desc, start, length, row, bits, head, full, empty, tiles, turn):
    """``load_halves`` of the keys whose bits are set; zeros for the others, whatever memory holds."""
    BOX: gl.constexpr = desc.block_type.shape[3]
    COUNT: gl.constexpr = 64 // BOX
    PANELS: gl.constexpr = tiles.shape[2] // 64
    mbarrier.wait(empty, (turn & 1) ^ 1)
    mbarrier.expect(full, 2 * COUNT * PANELS * desc.block_type.nbytes)
    for half in gl.static_range(2):
        boxes = view(tiles.index(half), desc.dtype, [PANELS * COUNT, BOX, 64], tile_layout(2))
        for i in range(COUNT):  # not unrolled, for a warp of few registers
            first = 64 * half + BOX * i
            at = gl.where(((bits >> (first // 16)) & 1) != 0, row + first, length)
            for panel in gl.static_range(PANELS):
                box = view(boxes.index(panel * COUNT + i), desc.dtype, desc.block_type.shape, desc.layout)
                async_load(desc, box_coordinates(start, length, at, head, panel * 64), full, box)


@gluon.jit
def post_entries(steps_s, first, list_ptr, length, COUNT: gl.constexpr, BOX: gl.constexpr):
    """Hand over the entries of a step, ``MISSING`` where they are past the sequence's end."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in gl.static_range(COUNT):
        entry = gl.load(list_ptr + i)
        entry = gl.where((entry >> SHIFT) * BOX < length, entry, MISSING)
        steps_s.index(first + i).store(gl.full([1], entry, gl.int32, one))


@gluon.jit
def load_query_boxes(
    q_desc, do_desc, numbers_ptr, q_s, do_s, numbers_s, steps_s, q_full, q_empty, do_full, do_empty,
    it, q_start, do_start, q_len, list_ptr, head, tile, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``load_query_step`` of the boxes at ``list_ptr``; ``tile`` is that of the sequence's first rows."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    stage = it & 1
    held = it % STAGES
    mbarrier.wait(q_empty.index(held), (it // STAGES & 1) ^ 1)
    steps_s.index(8 * (it & 3)).store(gl.full([1], tile, gl.int32, one))
    post_entries(steps_s, 8 * (it & 3) + 1, list_ptr, q_len, 64 // BOX, BOX)
    load_list_boxes(q_desc, q_start, q_len, list_ptr, head, q_full.index(held), q_s.index(held), BOX)
    # A box's numbers are in two places, too few of them for a tensor map's copies to be aligned.
    offs = gl.arange(0, 128, gl.BlockedLayout([1], [32], [1], [0]))
    row = (gl.load(list_ptr + offs % 64 // BOX) >> SHIFT) * BOX + offs % BOX
    at = tile.to(gl.int64) * 128 + (row // 64 * 128 + offs // 64 * 64 + row % 64)
    copy_rows(numbers_s.index(held), numbers_ptr + at, mask=row < q_len)
    async_copy.mbarrier_arrive(q_full.index(held), increment_count=False)
    mbarrier.wait(do_empty.index(stage), ((it >> 1) & 1) ^ 1)
    load_list_boxes(do_desc, do_start, q_len, list_ptr, head, do_full.index(stage), do_s.index(stage), BOX)


@gluon.jit
def _emit_boxes(dq, dq_desc, out_s, steps_s, it, tile, CID: gl.constexpr, SHARED: gl.constexpr, BOX: gl.constexpr):
    """``emit_dq`` of the boxes of step ``it``, each to its rows of the sums.

    Its entries are still there: the loader is at most three steps ahead of the last one that has let go of its queries.
    """
    COUNT: gl.constexpr = 64 // BOX
    flat = gl.reshape(gl.permute(gl.reshape(dq, [COUNT, BOX // 16, 2, 8, 8, 4, 2]), (0, 4, 1, 3, 5, 2, 6)), [4096])
    tma.store_wait(0)
    view(out_s, gl.float32, [4096], gl.SwizzledSharedLayout(1, 1, 1, [0])).store(flat)
    fence_async_shared()
    boxes = view(out_s, gl.float32, [COUNT, 64 * BOX], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(COUNT):
        entry = field(steps_s.index(8 * (it & 3) + 1 + i), 0)
        # Before the first step there are no entries, and this goes nowhere, but not to a negative row of it.
        row = ((entry >> SHIFT) & (MISSING >> SHIFT)) * BOX
        at = gl.where(entry < MISSING, tile + row // 64, NOWHERE)
        if SHARED:
            at = 2 * at + CID
        async_reduce_add(
            dq_desc, [at * 8, row % 64 // 16, 0], view(boxes.index(i), gl.float32, [8, BOX // 16, 128], dq_desc.layout)
        )


@gluon.jit
def emit_step_dq(
    dq, dq_desc, out_s, steps_s, it, tile, CID: gl.constexpr, SHARED: gl.constexpr, BOX: gl.constexpr
):  # fmt: skip
    """``emit_dq`` of step ``it``, whose first tile is ``tile``."""
    if gathers(BOX):
        _emit_boxes(dq, dq_desc, out_s, steps_s, it, tile, CID, SHARED, BOX)
    else:
        emit_dq(dq, dq_desc, out_s, tile, CID, SHARED)


@gluon.jit
def sees_any(steps_s, first, BOX: gl.constexpr, CID: gl.constexpr):
    """Whether any of this warpgroup's keys is seen from a step's queries."""
    bits = field(steps_s.index(first), 0)
    for i in gl.static_range(1, 64 // BOX):
        bits = bits | field(steps_s.index(first + i), 0)
    return ((bits >> (4 * CID)) & 15) != 0


@gluon.jit
def hidden_step(
    earlier, zeros, k_s, ds_s, out_s, steps_s, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release,
    dq_desc, it, CID: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """A ``gradient_step`` whose queries see none of this warpgroup's keys: dQ of the step before, and no dS."""
    stage = it & 1
    other = stage ^ 1
    zero = opaque_zero()
    tile = field(steps_s.index(8 * (it & 3)), 0)
    # In the order of ``gradient_step``: else this warpgroup might hand over twice what the other has not seen once.
    mbarrier.wait(do_full.index(stage), (it >> 1) & 1)
    mbarrier.wait(ds_other.index(other), ((it - 1) >> 1) & 1)
    dq = issue_dq(ds_s, k_s, other, zeros, zero, CID, SHARED)
    mbarrier.wait(ds_free.index(stage), ((it >> 1) & 1) ^ 1)
    ds_s.index(2 * stage + CID).store(zeros.to(ds_s.dtype))
    fence_async_shared()
    mbarrier.arrive(ds_mine.index(stage), count=1)
    mbarrier.arrive(do_empty.index(stage), count=1)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(ds_release.index(other), count=1, pred=it > 0)
    emit_step_dq(dq, dq_desc, out_s, steps_s, it - 1, earlier, CID, SHARED, BOX)
    mbarrier.arrive(q_empty.index(it % STAGES), count=1)
    return tile
