"""dQ by query rows: the second kernel of the deterministic backward pass, for Hopper."""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparseattn.kernels.hopper import load_rows, next_stage, opaque_zero, ring, store_rows
from sparseattn.kernels.walks import (
    HEAD,
    MASKED_STEPS,
    OFFSET,
    OUT_ROW,
    RECORD,
    SEQUENCE,
    STEPS,
    TILE,
    X0,
    X_LENGTH,
    X_START,
    Y_LENGTH,
    Y_START,
)
from sparseattn.ops.block_sparse.gluon_backward import LENGTHS
from sparseattn.ops.block_sparse.gluon_backward_boxes import load_list_boxes, post_entries, seen, slot_size, step_rows
from sparseattn.ops.block_sparse.gluon_backward_parts import field, next_place, post_tile, probabilities, step_row

K_STAGES: gl.constexpr = gl.constexpr(3)
V_STAGES: gl.constexpr = gl.constexpr(2)


@gluon.jit
def dq_loader(
    q_desc, do_desc, k_desc, v_desc, q_s, do_s, k_s, v_s, steps_s, tiles_s, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, tile_full, tile_empty, record_ptr, ranges_ptr, counter_ptr, index_ptr, total, mask_stride_b,
    mask_stride_h, idx_width, q_rows, k_rows, v_rows, do_rows, group, mask_group, block_q, block_kv,
    MASKED: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """The loading warp of ``dq_kernel``: claims tiles, and feeds Q and dO once and keys step by step."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    k_stage = 0
    k_phase = 1
    v_stage = 0
    v_phase = 1
    it = 0
    turn = 0
    position = gl.program_id(0)
    while position < total:
        record = record_ptr + position * RECORD
        post_tile(record, tiles_s, tile_full, tile_empty, turn)
        x0 = gl.load(record + X0)
        head = gl.load(record + HEAD)
        b = gl.load(record + SEQUENCE)
        q_start = gl.load(record + X_START)
        q_len = gl.load(record + X_LENGTH)
        k_start = gl.load(record + Y_START)
        k_len = gl.load(record + Y_LENGTH)
        steps = gl.load(record + STEPS)
        list_row = b * mask_stride_b + head // mask_group * mask_stride_h + x0 // block_q
        list_ptr = index_ptr + list_row.to(gl.int64) * idx_width
        part = -1
        at = -1
        end = 0
        for c in gl.static_range(2):
            mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            load_rows(q_desc, b * q_rows + q_start, q_len, x0 + 64 * c, head, q_full.index(c), q_s.index(c))
            load_rows(do_desc, b * do_rows + q_start, q_len, x0 + 64 * c, head, q_full.index(c), do_s.index(c))
        for _ in range(steps):
            part, at, end = next_place(ranges_ptr + position * 6, part, at, end)
            mbarrier.wait(k_empty.index(k_stage), k_phase)
            if BOX:
                load_key_step(
                    k_desc, v_desc, k_s.index(k_stage), v_s.index(v_stage), steps_s, k_full.index(k_stage),
                    v_full.index(v_stage), v_empty.index(v_stage), v_phase, it, b * k_rows + k_start,
                    b * v_rows + k_start, k_len, list_ptr + at * (128 // BOX), head // group, BOX,
                )  # fmt: skip
            else:
                row = step_row(list_ptr, at, block_kv, 128, MASKED, BOX)
                steps_s.index(it & 3).store(gl.full([1], row, gl.int32, one))
                mbarrier.expect(k_full.index(k_stage), k_desc.block_type.nbytes)
                load_rows(
                    k_desc, b * k_rows + k_start, k_len, row, head // group, k_full.index(k_stage), k_s.index(k_stage)
                )
                mbarrier.wait(v_empty.index(v_stage), v_phase)
                mbarrier.expect(v_full.index(v_stage), v_desc.block_type.nbytes)
                load_rows(
                    v_desc, b * v_rows + k_start, k_len, row, head // group, v_full.index(v_stage), v_s.index(v_stage)
                )
            k_stage, k_phase = next_stage(k_stage, k_phase, K_STAGES)
            v_stage, v_phase = next_stage(v_stage, v_phase, V_STAGES)
            it += 1
        turn += 1
        position = gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)
    post_tile(record_ptr + total * RECORD, tiles_s, tile_full, tile_empty, turn)


@gluon.jit
def load_key_step(
    k_desc, v_desc, k, v, steps_s, k_full, v_full, v_empty, v_phase, it, k_start, v_start, k_len, list_ptr, head,
    BOX: gl.constexpr,
):  # fmt: skip
    """Ask for the 128 keys, and the values, of the boxes at ``list_ptr``."""
    post_entries(steps_s, 8 * (it & 3), list_ptr, k_len, 128 // BOX, BOX)
    load_list_boxes(k_desc, k_start, k_len, list_ptr, head, k_full, k, BOX)
    mbarrier.wait(v_empty, v_phase)
    load_list_boxes(v_desc, v_start, k_len, list_ptr, head, v_full, v, BOX)


@gluon.jit
def dq_step(
    acc, dsa, zeros, q_s, do_s, k_s, v_s, steps_s, count_s, k_full, k_empty, v_full, v_empty,
    norm, delta,
    k_stage, k_phase, v_stage, v_phase, it, first_key, last_key, qk_scale, softcap,
    CID: gl.constexpr, MASK: gl.constexpr, SOFTCAP: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """S of these keys, dQ of the ones before (whose dS is ``dsa``) under its softmax, then dP and the new dS."""
    S_LAYOUT: gl.constexpr = zeros.type.layout
    zero = opaque_zero()
    before = k_stage
    k_stage, k_phase = next_stage(k_stage, k_phase, K_STAGES)
    mbarrier.wait(k_full.index(k_stage), k_phase)
    s = warpgroup_mma(q_s.index(CID), k_s.index(k_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(dsa, k_s.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p, slope = probabilities(s, norm[:, None], qk_scale, softcap, SOFTCAP)
    slot = slot_size(BOX, 1) * (it & 3)
    if MASK:
        keys = step_rows(steps_s, slot, count_s, BOX, gl.SliceLayout(0, S_LAYOUT))
        p = gl.where((keys[None, :] >= first_key[:, None]) & (keys[None, :] <= last_key[:, None]), p, 0.0)
    if BOX:
        p = seen(p, steps_s, slot, BOX, CID)
    if SOFTCAP:
        p = p * slope
    acc, dsa = warpgroup_mma_wait(0, deps=(acc, dsa))
    mbarrier.wait(v_full.index(v_stage), v_phase)
    dp = warpgroup_mma(do_s.index(CID + zero), v_s.index(v_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.arrive(k_empty.index(before), count=1)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    v_stage, v_phase = next_stage(v_stage, v_phase, V_STAGES)
    dsa = gl.convert_layout((p * (dp - delta[:, None])).to(q_s.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    return acc, dsa, k_stage, k_phase, v_stage, v_phase


@gluon.jit
def load_sums(sums_ptr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """A [64, BLOCK_D] tile of dQ that lies in memory in the order of ``emit_dq``."""
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    col = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    of_row = row // 16 * 128 + row % 8 * 16 + row % 16 // 8 * 2
    of_col = col // 64 * 4096 + col % 64 // 8 * 512 + col % 8 // 2 * 4 + col % 2
    return gl.load(sums_ptr + (of_row[:, None] + of_col[None, :]))


@gluon.jit
def dq_consumer(
    dq_desc, q_s, do_s, k_s, v_s, steps_s, count_s, tiles_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tile_full, tile_empty, numbers_ptr, sums_ptr, row_tiles, reach_back, reach_ahead, qk_scale, softcap, scale,
    CID: gl.constexpr, BLOCK_D: gl.constexpr, SOFTCAP: gl.constexpr, STARTED: gl.constexpr,
    BOX: gl.constexpr,
):  # fmt: skip
    """A warpgroup of ``dq_kernel``: dQ of 64 query rows."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = q_s.dtype
    zeros = gl.zeros([64, 128], gl.float32, S_LAYOUT)
    q = q_s.index(CID)
    # The stage behind the last key tile: the one that a tile's first step takes comes next.
    k_stage = K_STAGES - 1
    k_phase = 1
    v_stage = 0
    v_phase = 0
    it = 0
    turn = 0
    mbarrier.wait(tile_full.index(0), 0)
    head = field(tiles_s.index(0), HEAD)
    while head >= 0:
        record = tiles_s.index(turn & 1)
        x0 = field(record, X0) + 64 * CID
        out_row = field(record, OUT_ROW)
        q_len = field(record, X_LENGTH)
        masked = field(record, MASKED_STEPS)
        steps = field(record, STEPS)
        offset = field(record, OFFSET)
        k_len = field(record, Y_LENGTH)
        tile = field(record, TILE)
        mbarrier.arrive(tile_empty.index(turn & 1), count=1)
        in_tile = gl.arange(0, 64, ROWS)
        rows = x0 + in_tile
        numbers = numbers_ptr + (head * row_tiles + tile + x0 // 64).to(gl.int64) * 128
        # A tile that lies past the sequence's end has no numbers of its own.
        norm = gl.load(numbers + in_tile, mask=rows < q_len, other=float("inf"))
        delta = gl.load(numbers + 64 + in_tile, mask=rows < q_len, other=0.0)
        first_key = rows + offset - reach_back
        last_key = gl.minimum(rows + offset + reach_ahead, k_len - 1)
        acc = gl.zeros([64, BLOCK_D], gl.float32, LAYOUT)
        if STARTED:
            # Nor sums: it takes those of the last tile that does, for rows that are never stored.
            present = gl.minimum(x0, gl.maximum(q_len - 1, 0)) // 64
            sums = sums_ptr + (head * row_tiles + tile + present).to(gl.int64) * (64 * BLOCK_D)
            acc = load_sums(sums, BLOCK_D, LAYOUT)
        mbarrier.wait(q_full.index(CID), turn & 1)
        k_stage, k_phase, v_stage, v_phase, acc = dq_tile(
            acc, zeros, q_s, do_s, k_s, v_s, steps_s, count_s, k_full, k_empty, v_full, v_empty,
            norm, delta,
            k_stage, k_phase, v_stage, v_phase, it, masked, steps, first_key, last_key, qk_scale, softcap,
            CID, A_LAYOUT, SOFTCAP, BOX,
        )  # fmt: skip
        it += steps
        turn += 1
        mbarrier.wait(tile_full.index(turn & 1), (turn >> 1) & 1)
        next_head = field(tiles_s.index(turn & 1), HEAD)
        q.store((acc * scale).to(dtype))
        fence_async_shared()
        store_rows(dq_desc, out_row, q_len, x0, head, q)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(CID), count=1)
        head = next_head


@gluon.jit
def dq_tile(
    acc, zeros, q_s, do_s, k_s, v_s, steps_s, count_s, k_full, k_empty, v_full, v_empty,
    norm, delta,
    k_stage, k_phase, v_stage, v_phase, it, masked, steps, first_key, last_key, qk_scale, softcap,
    CID: gl.constexpr, A_LAYOUT: gl.constexpr, SOFTCAP: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """All steps of one tile; nothing happens where there are none."""
    S_LAYOUT: gl.constexpr = zeros.type.layout
    if steps > 0:
        k_stage, k_phase = next_stage(k_stage, k_phase, K_STAGES)
        mbarrier.wait(k_full.index(k_stage), k_phase)
        s = warpgroup_mma(q_s.index(CID), k_s.index(k_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        dp = warpgroup_mma(do_s.index(CID), v_s.index(v_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        p, slope = probabilities(s, norm[:, None], qk_scale, softcap, SOFTCAP)
        slot = slot_size(BOX, 1) * (it & 3)
        keys = step_rows(steps_s, slot, count_s, BOX, gl.SliceLayout(0, S_LAYOUT))
        p = gl.where((keys[None, :] >= first_key[:, None]) & (keys[None, :] <= last_key[:, None]), p, 0.0)
        if BOX:
            p = seen(p, steps_s, slot, BOX, CID)
        if SOFTCAP:
            p = p * slope
        dp = warpgroup_mma_wait(0, deps=(dp,))
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        v_stage, v_phase = next_stage(v_stage, v_phase, V_STAGES)
        dsa = gl.convert_layout((p * (dp - delta[:, None])).to(q_s.dtype), A_LAYOUT)
        for i in range(1, masked):
            acc, dsa, k_stage, k_phase, v_stage, v_phase = dq_step(
                acc, dsa, zeros, q_s, do_s, k_s, v_s, steps_s, count_s, k_full, k_empty, v_full, v_empty,
                norm, delta,
                k_stage, k_phase, v_stage, v_phase, it + i, first_key, last_key, qk_scale, softcap, CID, True, SOFTCAP,
                BOX,
            )  # fmt: skip
        for i in range(gl.maximum(masked, 1), steps):
            acc, dsa, k_stage, k_phase, v_stage, v_phase = dq_step(
                acc, dsa, zeros, q_s, do_s, k_s, v_s, steps_s, count_s, k_full, k_empty, v_full, v_empty,
                norm, delta,
                k_stage, k_phase, v_stage, v_phase, it + i, first_key, last_key, qk_scale, softcap, CID, False, SOFTCAP,
                BOX,
            )  # fmt: skip
        acc = warpgroup_mma(dsa, k_s.index(k_stage), acc, is_async=True)
        acc, dsa = warpgroup_mma_wait(0, deps=(acc, dsa))
        mbarrier.arrive(k_empty.index(k_stage), count=1)
    return k_stage, k_phase, v_stage, v_phase, acc


@gluon.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, numbers_ptr, sums_ptr, record_ptr, ranges_ptr, counter_ptr, index_ptr,
    total, mask_stride_b, mask_stride_h, idx_width, row_tiles, q_rows, k_rows, v_rows, do_rows, group, mask_group,
    block_q, block_kv, reach_back, reach_ahead, qk_scale, softcap, scale,
    BLOCK_D: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr, STARTED: gl.constexpr,
    BOX: gl.constexpr,
):  # fmt: skip
    """Persistent programs: dQ of 128 query rows of one head over the keys that they see, 128 a step.

    ``STARTED``: rows begin with what ``sums`` float32 [heads * row_tiles, 64 * BLOCK_D] holds for them, in the order of
    ``emit_dq``. Grid: any number of programs, at most a tile each. Tiles, their order and the steps of each come from
    ``walk_kernel``.
    """
    dtype: gl.constexpr = q_desc.dtype
    tile_2d: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s, q_full, q_empty = ring(dtype, 2, [64, BLOCK_D], tile_2d, 1, 1)
    k_s, k_full, k_empty = ring(dtype, K_STAGES, [128, BLOCK_D], tile_2d, 1, 2)
    v_s, v_full, v_empty = ring(dtype, V_STAGES, [128, BLOCK_D], tile_2d, 1, 2)
    tiles_s, tile_full, tile_empty = ring(gl.int32, 2, [RECORD], plain, 1, 2)
    do_s = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], tile_2d)
    steps_s = gl.allocate_shared_memory(gl.int32, [4 * slot_size(BOX, 1), 1], plain)
    # 0 .. 127: read where they are needed; computed, they would stay in registers throughout.
    count_s = gl.allocate_shared_memory(gl.int32, [128], plain)
    count_s.store(gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])))
    fence_async_shared()
    gl.warp_specialize([
        (dq_consumer, (
            dq_desc, q_s, do_s, k_s, v_s, steps_s, count_s, tiles_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            tile_full, tile_empty, numbers_ptr, sums_ptr, row_tiles, reach_back, reach_ahead, qk_scale, softcap, scale,
            0, BLOCK_D, SOFTCAP, STARTED, BOX,
        )),
        (dq_consumer, (
            dq_desc, q_s, do_s, k_s, v_s, steps_s, count_s, tiles_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            tile_full, tile_empty, numbers_ptr, sums_ptr, row_tiles, reach_back, reach_ahead, qk_scale, softcap, scale,
            1, BLOCK_D, SOFTCAP, STARTED, BOX,
        )),
        (dq_loader, (
            q_desc, do_desc, k_desc, v_desc, q_s, do_s, k_s, v_s, steps_s, tiles_s, q_full, q_empty, k_full, k_empty,
            v_full, v_empty, tile_full, tile_empty, record_ptr, ranges_ptr, counter_ptr, index_ptr, total,
            mask_stride_b, mask_stride_h, idx_width, q_rows, k_rows, v_rows, do_rows,
            group, mask_group, block_q, block_kv, MASKED, BOX,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
