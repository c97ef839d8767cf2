"""What the Hopper backward kernels' steps share: records and places of a walk, probabilities, dQ on its way out."""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from sparseattn.kernels import unions
from sparseattn.kernels.hopper import async_reduce_add, view
from sparseattn.kernels.walks import RECORD

SHIFT: gl.constexpr = gl.constexpr(unions.SHIFT.value)
# A tile of dQ beyond any sum's end, where additions go that are none: the map bounds them. (Additions at negative
# coordinates stop the kernel with an illegal instruction.)
NOWHERE: gl.constexpr = gl.constexpr(1 << 24)


@gluon.jit
def field(record, at: gl.constexpr):
    """A number of a record in shared memory, for every thread of a warpgroup."""
    return gl.max(record.slice(at, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def next_place(ranges_ptr, part, at, end):
    """The step after ``at``, in this range of a walk or the first of a later one."""
    at += 1
    while at >= end:
        part += 1
        at = gl.load(ranges_ptr + 2 * part)
        end = gl.load(ranges_ptr + 2 * part + 1)
    return part, at, end


@gluon.jit
def step_row(list_ptr, at, block, STEP: gl.constexpr, MASKED: gl.constexpr, BOX: gl.constexpr):
    """First row of step ``at`` of a block list, or of all rows."""
    if BOX:
        row = (gl.load(list_ptr + at) >> SHIFT) * STEP
    elif MASKED:
        entry = at * STEP // block
        row = gl.load(list_ptr + entry) * block + at * STEP - entry * block
    else:
        row = at * STEP
    return row


@gluon.jit
def post_tile(record_ptr, tiles, full, empty, turn):
    """Hand the record of tile number ``turn`` of this program to the warpgroups; ``record_ptr`` may point to a stop."""
    slot = turn & 1
    mbarrier.wait(empty.index(slot), ((turn >> 1) & 1) ^ 1)
    fields = gl.arange(0, RECORD, gl.BlockedLayout([1], [32], [1], [0]))
    tiles.index(slot).store(gl.load(record_ptr + fields))
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def probabilities(s, norm, qk_scale, softcap, SOFTCAP: gl.constexpr):
    """``exp2(scaled scores - norm)`` of raw scores, and the soft cap's derivative.

    With a soft cap ``qk_scale`` gives twice the base-2 logits over the cap, and ``softcap`` is in base 2.
    """
    slope = 1.0
    if SOFTCAP:
        capped = 1.0 - 2.0 / (1.0 + gl.exp2(s * qk_scale))  # tanh
        slope = 1.0 - capped * capped
        p = gl.exp2(capped * softcap - norm)
    else:
        p = gl.exp2(s * qk_scale - norm)
    return p, slope


@gluon.jit
def issue_dq(ds_s, k_s, slot, zeros, zero, CID: gl.constexpr, SHARED: gl.constexpr):
    """Start dQ of 64 query rows: this warpgroup's half of the columns from all 128 keys, or all columns of its keys."""
    if SHARED:
        dq = warpgroup_mma(
            ds_s.index(2 * slot).permute((1, 0)), k_s.index(zero).slice(64 * CID, 64, 1), zeros, use_acc=False,
            is_async=True,
        )  # fmt: skip
        dq = warpgroup_mma(
            ds_s.index(2 * slot + 1).permute((1, 0)), k_s.index(zero + 1).slice(64 * CID, 64, 1), dq, is_async=True
        )
    else:
        dq = warpgroup_mma(
            ds_s.index(2 * slot + CID).permute((1, 0)), k_s.index(zero + CID), zeros, use_acc=False, is_async=True
        )
    return dq


@gluon.jit
def emit_dq(dq, dq_desc, out_s, tile, CID: gl.constexpr, SHARED: gl.constexpr):
    """Add a [64, 64] piece of dQ to its float32 tile, in the order in which the accumulator's threads hold it.

    A thread's four neighbours in that order are 16 bytes and a warp's 512, so neither the stores to shared memory nor
    the addition meet a conflict; ``from_wgmma_order`` puts rows and columns back. Tile ``NOWHERE`` is out of the map's
    bounds: nothing is added.
    """
    flat = gl.reshape(gl.permute(gl.reshape(dq, [4, 2, 8, 8, 4, 2]), (3, 0, 2, 4, 1, 5)), [4096])
    flat = gl.convert_layout(flat, gl.BlockedLayout([4], [32], [4], [0]), assert_trivial=True)
    if SHARED:
        piece = 2 * tile + CID
    else:
        piece = tile
    tma.store_wait(0)
    view(out_s, gl.float32, [4096], gl.SwizzledSharedLayout(1, 1, 1, [0])).store(flat)
    fence_async_shared()
    async_reduce_add(dq_desc, [piece * 32, 0], view(out_s, gl.float32, [32, 128], dq_desc.layout))
