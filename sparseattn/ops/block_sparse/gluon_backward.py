"""The Hopper backward kernels of block-sparse attention: one fused pass, and two that give the same bits every time.

``gradients_kernel`` keeps 128 keys of one KV head in shared memory and walks the query rows that see them, 64 at a
time (128 where the head dimension is small), through every query head of its share of the group: five products a step,
of which dQ leaves the chip by tensor-map additions into float32 tiles. Without dQ it is the first of the deterministic
pair, ``dq_kernel`` the second.

Three partitions: a loading warp, and two warpgroups of 64 keys (or, in ``dq_kernel``, query rows) each. The loader
alone walks the lists; it hands over a record a tile and two numbers a step, steps with element masks first, so that
the warpgroups run two plain loops. Every ring has two stages, of which step ``it`` takes ``it & 1``, but that of the
queries may have three (``query_stages``). Small mask blocks come as boxes, see ``gluon_backward_boxes``.
"""

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

from sparseattn.kernels.hopper import (
    async_load,
    load_rows,
    opaque_zero,
    ring,
    store_rows,
    tile_layout,
    view,
)
from sparseattn.kernels.walks import (
    HEAD,
    MASKED_STEPS,
    OFFSET,
    OUT_ROW,
    RECORD,
    SEEN,
    SEQUENCE,
    STEPS,
    TILE,
    X0,
    X_LENGTH,
    X_START,
    Y_LENGTH,
    Y_START,
)
from sparseattn.ops.block_sparse.gluon_backward_boxes import (
    emit_step_dq,
    gathers,
    hidden_step,
    load_query_boxes,
    load_seen_halves,
    query_fills,
    seen,
    sees_any,
    slot_size,
    step_rows,
)
from sparseattn.ops.block_sparse.gluon_backward_parts import (
    NOWHERE,
    field,
    issue_dq,
    next_place,
    post_tile,
    probabilities,
    step_row,
)
from sparseattn.ops.block_sparse.gluon_backward_wide import issue_rows_of_dq, load_wide_numbers, wide_step

# Integer arguments that change with the prompt: specialising on them would compile a kernel per length.
LENGTHS = [
    "total", "mask_stride_b", "mask_stride_h", "idx_width", "row_tiles", "q_rows", "k_rows", "v_rows", "do_rows",
    "reach_back", "reach_ahead", "heads", "group", "mask_group", "block_q", "block_kv",
]  # fmt: skip
# A query row that no key is seen from.
NEVER: gl.constexpr = gl.constexpr(1 << 30)


@gluon.constexpr_function
def query_stages(with_dq, float32, block_d):
    """Tiles of queries in flight.

    Queries stay until the end of their step, so with two stages the next but one have a step to arrive. A third, 2 %
    faster, takes the place of one of the two tiles that a warpgroup has for results, where one takes all of dK.
    """
    return 3 if with_dq and not (float32 and block_d > 64) else 2


@gluon.jit
def rows_that_see(keys, offset, k_len, reach_back, reach_ahead):
    """First and last query row that see each of some ``keys``.

    ``offset`` is ``Sk - Sq``; a row sees from ``reach_back`` keys before its diagonal to ``reach_ahead`` after it.
    """
    return gl.where(keys < k_len, keys - offset - reach_ahead, NEVER), keys - offset + reach_back


# ---------------------------------------------------------------- the loader: which query rows come next


@gluon.jit
def load_query_step(
    q_desc, do_desc, numbers_desc, q_s, do_s, numbers_s, steps_s, q_full, q_empty, do_full, do_empty,
    it, q_start, do_start, q_len, row, head, tile, note, STAGES: gl.constexpr, STEP: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Ask for the ``STEP`` query rows at ``row`` of one head: Q and the row numbers together, dO on its own."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    stage = it & 1
    parity = ((it >> 1) & 1) ^ 1
    held = it % STAGES
    mbarrier.wait(q_empty.index(held), (it // STAGES & 1) ^ 1)
    slot = slot_size(BOX, STEP // 32) * (it & 3)
    steps_s.index(slot).store(gl.full([1], tile, gl.int32, one))
    steps_s.index(slot + 1).store(gl.full([1], note, gl.int32, one))
    if STEP == 128:
        steps_s.index(slot + 2).store(gl.full([1], gl.where(row + 64 < q_len, tile + 1, NOWHERE), gl.int32, one))
    mbarrier.expect(q_full.index(held), q_desc.block_type.nbytes + STEP * 8)
    load_rows(q_desc, q_start, q_len, row, head, q_full.index(held), q_s.index(held))
    if STEP == 128:
        load_wide_numbers(numbers_desc, tile, row + 64 < q_len, q_full.index(held), numbers_s.index(held))
    else:
        async_load(numbers_desc, [tile * 128], q_full.index(held), numbers_s.index(held))
    mbarrier.wait(do_empty.index(stage), parity)
    mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes)
    load_rows(do_desc, do_start, q_len, row, head, do_full.index(stage), do_s.index(stage))


@gluon.jit
def load_halves(desc, start, length, row, head, full, empty, tiles, turn):
    """Ask for the 128 keys (or values) at ``row``, once the tile before has let go of its own."""
    mbarrier.wait(empty, (turn & 1) ^ 1)
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    for half in gl.static_range(2):
        load_rows(desc, start, length, row + 64 * half, head, full, tiles.index(half))


@gluon.jit
def gradients_loader(
    q_desc, do_desc, numbers_desc, k_desc, v_desc, q_s, do_s, numbers_s, k_s, v_s, steps_s, tiles_s,
    q_full, q_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty, numbers_ptr,
    record_ptr, ranges_ptr, counter_ptr, index_ptr, total, mask_stride_b, mask_stride_h, idx_width, row_tiles,
    q_rows, k_rows, v_rows, do_rows, heads, group, mask_group, block_q, block_kv, MASKED: gl.constexpr,
    STAGES: gl.constexpr, STEP: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """The loading warp of ``gradients_kernel``: claims tiles, and feeds K and V once and query rows step by step."""
    it = 0
    turn = 0
    position = gl.program_id(0)
    while position < total:
        record = record_ptr + position * RECORD
        post_tile(record, tiles_s, tile_full, tile_empty, turn)
        x0 = gl.load(record + X0)
        first_head = gl.load(record + HEAD) * heads
        b = gl.load(record + SEQUENCE)
        k_start = gl.load(record + X_START)
        k_len = gl.load(record + X_LENGTH)
        q_start = gl.load(record + Y_START)
        q_len = gl.load(record + Y_LENGTH)
        base = gl.load(record + TILE)
        steps = gl.load(record + STEPS)
        list_base = index_ptr + (b.to(gl.int64) * mask_stride_b + x0 // block_kv) * idx_width
        walk = ranges_ptr + position * (6 * heads)
        part = -1
        at = -1
        end = 0
        for i in range(steps + 1):
            # Step 0 goes ahead of V and K, whose tiles are free one after the other when the walk before has ended.
            if (i == 1) | (steps == 0):
                head = first_head // group
                if BOX:
                    bits = gl.load(record + SEEN)
                    load_seen_halves(v_desc, b * v_rows + k_start, k_len, x0, bits, head, v_full, v_empty, v_s, turn)
                    load_seen_halves(k_desc, b * k_rows + k_start, k_len, x0, bits, head, k_full, k_empty, k_s, turn)
                else:
                    load_halves(v_desc, b * v_rows + k_start, k_len, x0, head, v_full, v_empty, v_s, turn)
                    load_halves(k_desc, b * k_rows + k_start, k_len, x0, head, k_full, k_empty, k_s, turn)
            if i < steps:
                part, at, end = next_place(walk, part, at, end)
                head = first_head + part % heads
                list_ptr = list_base + (head // mask_group * mask_stride_h).to(gl.int64) * idx_width
                if gathers(BOX):
                    load_query_boxes(
                        q_desc, do_desc, numbers_ptr, q_s, do_s, numbers_s, steps_s, q_full, q_empty, do_full, do_empty,
                        it, b * q_rows + q_start, b * do_rows + q_start, q_len, list_ptr + at * (64 // BOX), head,
                        head * row_tiles + base, BOX, STAGES,
                    )  # fmt: skip
                else:
                    row = step_row(list_ptr, at, block_q, STEP, MASKED, BOX)
                    note = gl.load(list_ptr + at) if BOX else row
                    load_query_step(
                        q_desc, do_desc, numbers_desc, q_s, do_s, numbers_s, steps_s, q_full, q_empty, do_full,
                        do_empty, it, b * q_rows + q_start, b * do_rows + q_start, q_len, row, head,
                        head * row_tiles + base + row // 64, note, STAGES, STEP, BOX,
                    )  # fmt: skip
                it += 1
        turn += 1
        # Claimed only now: a tile claimed while a long one runs would wait for it.
        position = gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)
    post_tile(record_ptr + total * RECORD, tiles_s, tile_full, tile_empty, turn)


# ---------------------------------------------------------------- the warpgroups: gradients of 64 keys


@gluon.jit
def last_dq(ds_s, k_s, slot, zeros, CID: gl.constexpr, SHARED: gl.constexpr):
    """Start the dQ that a tile's last step left."""
    if ds_s.shape[2] == 128:
        dq = issue_rows_of_dq(ds_s, k_s, slot, zeros, 0, CID)
    else:
        dq = issue_dq(ds_s, k_s, slot, zeros, 0, CID, SHARED)
    return dq


@gluon.jit
def gradient_step(
    dk, dv, earlier, zeros, q_s, do_s, numbers_s, k_s, v_s, ds_s, out_s, steps_s, count_s,
    q_full, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release, dq_desc,
    it, first_row, last_row, qk_scale, softcap,
    CID: gl.constexpr, MASK: gl.constexpr, WITH_DQ: gl.constexpr, SHARED: gl.constexpr, SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """One step: S and dP, then dV, then dK, and dQ of the step before.

    dQ waits a step (``earlier`` is the tile it goes to) so that the warpgroups, which exchange their halves of dS
    through shared memory, may run a little apart. A tile's last dQ is made after its steps; its first step has none to
    make, and sends the product of what is there to tile ``NOWHERE``: cheaper than a branch around it.
    """
    S_LAYOUT: gl.constexpr = zeros.type.layout
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    COLS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q_s.dtype
    stage = it & 1
    other = stage ^ 1
    parity = (it >> 1) & 1
    held = it % STAGES
    zero = opaque_zero()
    mbarrier.wait(q_full.index(held), it // STAGES & 1)
    s = warpgroup_mma(
        k_s.index(CID + zero), q_s.index(held).permute((1, 0)), zeros, use_acc=False, is_async=True
    )  # [keys, rows]
    mbarrier.wait(do_full.index(stage), parity)
    dp = warpgroup_mma(
        v_s.index(CID + zero), do_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
    )  # [keys, rows]
    norm = numbers_s.index(held).slice(0, 64, 0).load(COLS)
    slot = slot_size(BOX, 2) * (it & 3)
    tile = field(steps_s.index(slot), 0)
    s = warpgroup_mma_wait(1, deps=(s,))
    p, slope = probabilities(s, norm[None, :], qk_scale, softcap, SOFTCAP)
    if MASK:
        rows = step_rows(steps_s, slot + 1, count_s, BOX, COLS)
        p = gl.where((rows[None, :] >= first_row[:, None]) & (rows[None, :] <= last_row[:, None]), p, 0.0)
    if BOX:
        p = seen(p, steps_s, slot + 1, BOX, CID)
    pa = gl.convert_layout(p.to(dtype), A_LAYOUT)
    if SOFTCAP:
        p = p * slope
    dp = warpgroup_mma_wait(0, deps=(dp,))
    dv = warpgroup_mma(pa, do_s.index(stage), dv, is_async=True)
    delta = numbers_s.index(held).slice(64, 64, 0).load(COLS)
    ds = (p * (dp - delta[None, :])).to(dtype)
    dsa = gl.convert_layout(ds, A_LAYOUT)
    if WITH_DQ:
        mbarrier.wait(ds_other.index(other), ((it - 1) >> 1) & 1)
        dq = issue_dq(ds_s, k_s, other, zeros, zero, CID, SHARED)
    dk = warpgroup_mma(dsa, q_s.index(held), dk, is_async=True)
    if WITH_DQ:
        mbarrier.wait(ds_free.index(stage), parity ^ 1)
        ds_s.index(2 * stage + CID).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_mine.index(stage), count=1)
        dv, pa = warpgroup_mma_wait(3 if SHARED else 2, deps=(dv, pa))
        mbarrier.arrive(do_empty.index(stage), count=1)
        dq = warpgroup_mma_wait(1, deps=(dq,))
        mbarrier.arrive(ds_release.index(other), count=1, pred=it > 0)
        emit_step_dq(dq, dq_desc, out_s, steps_s, it - 1, earlier, CID, SHARED, BOX)
    else:
        dv, pa = warpgroup_mma_wait(1, deps=(dv, pa))
        mbarrier.arrive(do_empty.index(stage), count=1)
    dk, dsa = warpgroup_mma_wait(0, deps=(dk, dsa))
    mbarrier.arrive(q_empty.index(held), count=1)
    return dk, dv, tile


@gluon.jit
def boxes_step(
    dk, dv, earlier, zeros, q_s, do_s, numbers_s, k_s, v_s, ds_s, out_s, steps_s, count_s,
    q_full, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release, dq_desc,
    it, first_row, last_row, qk_scale, softcap,
    CID: gl.constexpr, MASK: gl.constexpr, WITH_DQ: gl.constexpr, SHARED: gl.constexpr, SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """``gradient_step``; where no query sees any of these keys, only what the other warpgroup needs of it."""
    sees = True
    if WITH_DQ and BOX:
        mbarrier.wait(q_full.index(it % STAGES), it // STAGES & 1)
        sees = sees_any(steps_s, 8 * (it & 3) + 1, BOX, CID)
    if sees:
        dk, dv, tile = gradient_step(
            dk, dv, earlier, zeros, q_s, do_s, numbers_s, k_s, v_s, ds_s, out_s, steps_s, count_s,
            q_full, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release, dq_desc,
            it, first_row, last_row, qk_scale, softcap, CID, MASK, WITH_DQ, SHARED, SOFTCAP, STAGES, BOX,
        )  # fmt: skip
    else:
        tile = hidden_step(
            earlier, zeros, k_s, ds_s, out_s, steps_s, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free,
            ds_release, dq_desc, it, CID, SHARED, STAGES, BOX,
        )  # fmt: skip
    return dk, dv, tile


@gluon.jit
def ahead_step(
    dk, dv, p, zeros, q_s, do_s, numbers_s, k_s, v_s, steps_s, count_s, q_full, q_empty, do_full, do_empty,
    it, more, first_row, last_row, qk_scale, CID: gl.constexpr, MASK: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """One step without dQ: dP, dV and dK of this step, and S of the next under them.

    ``p`` is this step's, the result the next one's; after the last step it is of no use (``more`` is false).
    """
    S_LAYOUT: gl.constexpr = zeros.type.layout
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    COLS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q_s.dtype
    stage = it & 1
    other = stage ^ 1
    parity = (it >> 1) & 1
    zero = opaque_zero()
    mbarrier.wait(do_full.index(stage), parity)
    dp = warpgroup_mma(v_s.index(CID + zero), do_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    pa = gl.convert_layout(p.to(dtype), A_LAYOUT)
    dv = warpgroup_mma(pa, do_s.index(stage), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    delta = numbers_s.index(stage).slice(64, 64, 0).load(COLS)
    dsa = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), A_LAYOUT)
    mbarrier.wait(q_full.index(other), ((it + 1) >> 1) & 1, pred=more)
    s = warpgroup_mma(k_s.index(CID + zero), q_s.index(other).permute((1, 0)), zeros, use_acc=False, is_async=True)
    dv, pa = warpgroup_mma_wait(1, deps=(dv, pa))
    mbarrier.arrive(do_empty.index(stage), count=1)
    dk = warpgroup_mma(dsa, q_s.index(stage), dk, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = next_probabilities(
        s, numbers_s.index(other), steps_s, count_s, it + 1, first_row, last_row, qk_scale, CID, MASK, BOX
    )
    dk, dsa = warpgroup_mma_wait(0, deps=(dk, dsa))
    mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv, p


@gluon.jit
def next_probabilities(
    s, numbers, steps_s, count_s, it, first_row, last_row, qk_scale, CID: gl.constexpr, MASK: gl.constexpr,
    BOX: gl.constexpr,
):  # fmt: skip
    """Probabilities of step ``it`` from its raw scores."""
    COLS: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    norm = numbers.slice(0, 64, 0).load(COLS)
    p, _ = probabilities(s, norm[None, :], qk_scale, 0.0, False)
    slot = slot_size(BOX, 2) * (it & 3) + 1
    if MASK:
        rows = step_rows(steps_s, slot, count_s, BOX, COLS)
        p = gl.where((rows[None, :] >= first_row[:, None]) & (rows[None, :] <= last_row[:, None]), p, 0.0)
    if BOX:
        p = seen(p, steps_s, slot, BOX, CID)
    return p


@gluon.jit
def half(results_s, i: gl.constexpr):
    """16 KB of a warpgroup's memory for results: where it has 32, the first take dV, the second dQ and dK."""
    HALVES: gl.constexpr = results_s.shape[0] // 64
    return view(results_s, results_s.dtype, [HALVES, 64, 128], tile_layout(2)).index(i % HALVES)


@gluon.jit
def put_rows(x, desc, start, length, row, head, results_s, i: gl.constexpr, FLOAT32: gl.constexpr):
    """Round results to the dtype of their map and send them off, through half ``i`` or, if they need it, all memory."""
    COLS: gl.constexpr = x.shape[1]
    if FLOAT32:
        if COLS == 128:
            tile = view(results_s, gl.float32, [64, COLS], tile_layout(2, 32))
        else:
            tile = view(half(results_s, i), gl.float32, [64, COLS], tile_layout(2, 32))
        tile.store(x)
    else:
        tile = view(half(results_s, i), results_s.dtype, [128 // COLS, 64, COLS], tile_layout(2)).index(0)
        tile.store(x.to(results_s.dtype))
    fence_async_shared()
    store_rows(desc, start, length, row, head, tile)


@gluon.jit
def gradients_consumer(
    dk_desc, dv_desc, dq_desc, q_s, do_s, numbers_s, k_s, v_s, ds_s, results_s, steps_s, count_s, tiles_s,
    q_full, q_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
    ds_mine, ds_other, ds_free, ds_release, reach_back, reach_ahead, qk_scale, softcap, scale,
    CID: gl.constexpr, BLOCK_D: gl.constexpr, WITH_DQ: gl.constexpr, SOFTCAP: gl.constexpr, FLOAT32: gl.constexpr,
    STEP: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """A warpgroup of ``gradients_kernel``: dK and dV of 64 keys, and its part of dQ."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    SHARED: gl.constexpr = BLOCK_D == 128
    AHEAD: gl.constexpr = not WITH_DQ and not SOFTCAP
    STAGES: gl.constexpr = query_stages(WITH_DQ, FLOAT32, BLOCK_D)
    zeros = gl.zeros([64, STEP], gl.float32, S_LAYOUT)
    dq_zeros = gl.zeros([64, 64], gl.float32, DQ_LAYOUT)
    out_s = half(results_s, 1)
    it = 0
    turn = 0
    mbarrier.wait(tile_full.index(0), 0)
    while field(tiles_s.index(turn & 1), HEAD) >= 0:
        record = tiles_s.index(turn & 1)
        masked = field(record, MASKED_STEPS)
        steps = field(record, STEPS)
        keys = field(record, X0) + 64 * CID + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
        first_row, last_row = rows_that_see(
            keys, field(record, OFFSET), field(record, X_LENGTH), reach_back, reach_ahead
        )
        dk = gl.zeros([64, BLOCK_D], gl.float32, LAYOUT)
        dv = gl.zeros([64, BLOCK_D], gl.float32, LAYOUT)
        mbarrier.wait(k_full, turn & 1)
        mbarrier.wait(v_full, turn & 1)
        if AHEAD:
            mbarrier.wait(q_full.index(it & 1), (it >> 1) & 1, pred=steps > 0)
            s = warpgroup_mma(k_s.index(CID), q_s.index(it & 1).permute((1, 0)), zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            p = next_probabilities(
                s, numbers_s.index(it & 1), steps_s, count_s, it, first_row, last_row, qk_scale, CID, True, BOX
            )
            for i in range(0, masked - 1):
                dk, dv, p = ahead_step(
                    dk, dv, p, zeros, q_s, do_s, numbers_s, k_s, v_s, steps_s, count_s,
                    q_full, q_empty, do_full, do_empty,
                    it + i, i + 1 < steps, first_row, last_row, qk_scale, CID, True, BOX,
                )  # fmt: skip
            for i in range(gl.maximum(masked - 1, 0), steps):
                dk, dv, p = ahead_step(
                    dk, dv, p, zeros, q_s, do_s, numbers_s, k_s, v_s, steps_s, count_s,
                    q_full, q_empty, do_full, do_empty,
                    it + i, i + 1 < steps, first_row, last_row, qk_scale, CID, False, BOX,
                )  # fmt: skip
            it += steps
        elif STEP == 128:
            tile = steps * 0 + NOWHERE
            for i in range(0, masked):
                dk, dv, tile = wide_step(
                    dk, dv, tile, zeros, dq_zeros, q_s, do_s, numbers_s, k_s, v_s, ds_s, out_s, steps_s, count_s,
                    q_full, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release, dq_desc,
                    it + i, first_row, last_row, qk_scale, softcap, CID, True, SOFTCAP, STAGES,
                )  # fmt: skip
            for i in range(masked, steps):
                dk, dv, tile = wide_step(
                    dk, dv, tile, zeros, dq_zeros, q_s, do_s, numbers_s, k_s, v_s, ds_s, out_s, steps_s, count_s,
                    q_full, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release, dq_desc,
                    it + i, first_row, last_row, qk_scale, softcap, CID, False, SOFTCAP, STAGES,
                )  # fmt: skip
            it += steps
        else:
            tile = steps * 0 + NOWHERE
            for i in range(0, masked):
                dk, dv, tile = boxes_step(
                    dk, dv, tile, zeros, q_s, do_s, numbers_s, k_s, v_s, ds_s, out_s, steps_s, count_s,
                    q_full, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release, dq_desc,
                    it + i, first_row, last_row, qk_scale, softcap, CID, True, WITH_DQ, SHARED, SOFTCAP,
                    STAGES, BOX,
                )  # fmt: skip
            for i in range(masked, steps):
                dk, dv, tile = boxes_step(
                    dk, dv, tile, zeros, q_s, do_s, numbers_s, k_s, v_s, ds_s, out_s, steps_s, count_s,
                    q_full, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release, dq_desc,
                    it + i, first_row, last_row, qk_scale, softcap, CID, False, WITH_DQ, SHARED, SOFTCAP,
                    STAGES, BOX,
                )  # fmt: skip
            it += steps
        # V is free, K once dQ is done: the next tile's travel while this one's results are written.
        mbarrier.arrive(v_empty, count=1)
        if WITH_DQ:
            # The dQ that the last step left; the next tile's first step gives its dS back.
            last = (it - 1) & 1
            mbarrier.wait(ds_other.index(last), ((it - 1) >> 1) & 1)
            dq = last_dq(ds_s, k_s, last, dq_zeros, CID, SHARED)
        else:
            mbarrier.arrive(k_empty, count=1)
            tma.store_wait(0)
        # The record again: its numbers would otherwise take registers all along.
        head = field(record, HEAD)
        x0 = field(record, X0) + 64 * CID
        out_row = field(record, OUT_ROW)
        k_len = field(record, X_LENGTH)
        mbarrier.arrive(tile_empty.index(turn & 1), count=1)
        if FLOAT32 or STAGES > 2:
            tma.store_wait(0)
        put_rows(dv, dv_desc, out_row, k_len, x0, head, results_s, 0, FLOAT32)
        if WITH_DQ:
            dq = warpgroup_mma_wait(0, deps=(dq,))
            mbarrier.arrive(k_empty, count=1)
            emit_step_dq(dq, dq_desc, out_s, steps_s, it - 1, tile, CID, SHARED, BOX)
        if WITH_DQ or FLOAT32:
            tma.store_wait(0)
        put_rows(dk * scale, dk_desc, out_row, k_len, x0, head, results_s, 1, FLOAT32)
        turn += 1
        mbarrier.wait(tile_full.index(turn & 1), (turn >> 1) & 1)
    tma.store_wait(0)


@gluon.jit
def one_barrier(ARRIVALS: gl.constexpr):
    """A barrier on its own."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=ARRIVALS)
    return barrier


@gluon.jit
def one_barrier_a_stage():
    """Two barriers that count one arrival each."""
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit(do_not_specialize=LENGTHS)
def gradients_kernel(
    q_desc, do_desc, numbers_desc, k_desc, v_desc, dk_desc, dv_desc, dq_desc,
    numbers_ptr, record_ptr, ranges_ptr, counter_ptr, index_ptr, total, mask_stride_b, mask_stride_h, idx_width,
    row_tiles, q_rows, k_rows, v_rows, do_rows, heads, group, mask_group, block_q, block_kv,
    reach_back, reach_ahead, qk_scale, softcap, scale,
    BLOCK_D: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr, WITH_DQ: gl.constexpr, FLOAT32: gl.constexpr,
    STEP: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Persistent programs: dK and dV of 128 keys of one KV head over ``heads`` query heads, and what they add to dQ.

    Grid: any number of programs, at most a tile each. Tiles, their order and the steps of each come from
    ``walk_kernel``; a step is ``STEP`` query rows, 64 or, with dQ and heads of up to 64, 128. With ``BOX`` not 0 lists
    are those of ``unions``, of boxes of ``BOX`` rows, and steps 64. dK and dV leave in the inputs' dtype, or in float32
    (``FLOAT32``) where more is added to them. Without ``WITH_DQ`` nothing is added across programs, so the results are
    deterministic.
    """
    dtype: gl.constexpr = q_desc.dtype
    tile_2d: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    STAGES: gl.constexpr = query_stages(WITH_DQ, FLOAT32, BLOCK_D)
    q_s, q_full, q_empty = ring(dtype, STAGES, [STEP, BLOCK_D], tile_2d, query_fills(BOX), 2)
    do_s, do_full, do_empty = ring(dtype, 2, [STEP, BLOCK_D], tile_2d, 1, 2)
    tiles_s, tile_full, tile_empty = ring(gl.int32, 2, [RECORD], plain, 1, 2)
    k_s = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], tile_2d)
    v_s = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], tile_2d)
    results_s = gl.allocate_shared_memory(dtype, [2, 64 if STAGES > 2 else 128, 128], tile_2d)
    numbers_s = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * STEP], numbers_desc.layout)
    steps_s = gl.allocate_shared_memory(gl.int32, [4 * slot_size(BOX, STEP // 32), 1], plain)
    # 0 .. STEP - 1: read where they are needed; computed, they would stay in registers throughout.
    count_s = gl.allocate_shared_memory(gl.int32, [STEP], plain)
    count_s.store(gl.arange(0, STEP, gl.BlockedLayout([1], [32], [4], [0])))
    k_full = one_barrier(1)
    k_empty = one_barrier(2)
    v_full = one_barrier(1)
    v_empty = one_barrier(2)
    # A warpgroup's dS halves are at 0 and 2 or at 1 and 3. Their barriers are allocations of their own: the compiler
    # orders uses of one allocation with barriers across the warpgroup.
    ds_s = gl.allocate_shared_memory(dtype, [4 if WITH_DQ else 1, 64, STEP], tile_2d)
    full_0 = one_barrier_a_stage()
    full_1 = one_barrier_a_stage()
    free_0 = one_barrier_a_stage()
    free_1 = one_barrier_a_stage()
    fence_async_shared()
    # A warpgroup that needs no other's dS waits for its own.
    ALONE: gl.constexpr = BLOCK_D != 128 and STEP == 64
    gl.warp_specialize([
        (gradients_consumer, (
            dk_desc, dv_desc, dq_desc, q_s, do_s, numbers_s, k_s, v_s, ds_s, results_s.index(0), steps_s, count_s,
            tiles_s,
            q_full, q_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
            full_0, full_0 if ALONE else full_1, free_0, free_0 if ALONE else free_1,
            reach_back, reach_ahead, qk_scale, softcap, scale, 0, BLOCK_D, WITH_DQ, SOFTCAP,
            FLOAT32, STEP, BOX,
        )),
        (gradients_consumer, (
            dk_desc, dv_desc, dq_desc, q_s, do_s, numbers_s, k_s, v_s, ds_s, results_s.index(1), steps_s, count_s,
            tiles_s,
            q_full, q_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
            full_1, full_1 if ALONE else full_0, free_1, free_1 if ALONE else free_0,
            reach_back, reach_ahead, qk_scale, softcap, scale, 1, BLOCK_D, WITH_DQ, SOFTCAP,
            FLOAT32, STEP, BOX,
        )),
        (gradients_loader, (
            q_desc, do_desc, numbers_desc, k_desc, v_desc, q_s, do_s, numbers_s, k_s, v_s, steps_s, tiles_s,
            q_full, q_empty, do_full, do_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
            numbers_ptr, record_ptr, ranges_ptr, counter_ptr, index_ptr, total, mask_stride_b, mask_stride_h, idx_width,
            row_tiles, q_rows, k_rows, v_rows, do_rows, heads, group, mask_group, block_q, block_kv, MASKED, STAGES,
            STEP, BOX,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
