"""The Hopper kernel of attention over a latent (MLA) cache: one KV head, whose values are columns of its keys.

A row of the output is as wide as a warpgroup's accumulators allow for two, so two warpgroups share a row tile: each
scores a key tile of its own, and each computes its half of the output columns from both. Key tiles then go round in
pairs: the row maxima of a pair are exchanged through shared memory, and so are the probabilities, which take the place
of the rotary columns that their scores have used up.
"""

# Annotations must stay objects for the Gluon front end: no ``from __future__ import annotations``.
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
    async_store,
    box_coordinates,
    opaque_zero,
    post,
    read_record,
    receive,
    ring,
    sequence_span,
    tile_layout,
    view,
)
from sparseattn.kernels.hopper_attention import cap_scores, finish_sums, hide, leave_part, leave_sums
from sparseattn.kernels.hopper_boxes import box_columns, key_boxes, load_key_boxes

NUMBERS = ["mask_stride_b", "mask_stride_h", "idx_width", "k_rows", "k_rope_rows", "total_q", "sums_stride"]
NUMBERS += ["part_stride", "window_left", "window_right", "num_pages"]


@gluon.jit
def list_of(count_ptr, index_ptr, b, head_q, m, strides, F: gl.constexpr):
    """A row tile's list of blocks and how many of them a key tile may gather."""
    mask_stride_b, mask_stride_h, idx_width = strides
    entries = 1
    list_ptr = index_ptr
    if F.MASKED:
        list_row = b.to(gl.int64) * mask_stride_b + head_q // F.MASK_GROUP * mask_stride_h + m * F.TOKENS // F.BLOCK_Q
        list_ptr = index_ptr + list_row * idx_width
        entries = gl.minimum(gl.load(count_ptr + list_row), idx_width)
    return list_ptr, entries


@gluon.jit
def load_latent(descs, keys, tile_keys, list_ptr, tile, entries, source, phase, SIDE: gl.constexpr, F: gl.constexpr):
    """Bring a key tile of one side of a pair, latent columns in halves and rotary ones, and say which keys it has."""
    k_desc, k_rope_desc, k_rows, k_rope_rows = descs
    latent, rotary, full, empty, cols_s = keys
    rows, counts = tile_keys
    mbarrier.wait(empty.index(SIDE), phase)
    mbarrier.expect(full.index(SIDE), F.TILE_N * (F.DV + rotary.shape[2]) * 2)
    for half in gl.static_range(2):
        buffer = latent.index(2 * SIDE + half)
        load_key_boxes(k_desc, k_rows, rows, counts, 0, half * F.BLOCK_DV, full.index(SIDE), buffer, F)
    load_key_boxes(k_rope_desc, k_rope_rows, rows, counts, 0, 0, full.index(SIDE), rotary.index(SIDE), F)
    lane: gl.constexpr = gl.BlockedLayout([F.TILE_N // 32], [32], [1], [0])
    cols = box_columns(list_ptr, tile, entries, source, gl.arange(0, F.TILE_N, lane), F)
    cols_s.index(SIDE).store(cols)
    mbarrier.arrive(full.index(SIDE), count=1)


@gluon.jit
def latent_producer(call, F: gl.constexpr):
    """The warp that loads: per row tile its queries, then pairs of key tiles."""
    (
        q_desc, q_rope_desc, descs, queries, keys, info, record_ptr, counter_ptr, count_ptr, index_ptr, spans, cache,
        strides,
    ) = call  # fmt: skip
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr = spans
    table_ptr, held_ptr, num_pages = cache
    q_s, q_rope_s, q_full, q_empty = queries
    num_tiles = gl.load(counter_ptr + 1)
    phase = 1
    turn = 0
    position = gl.program_id(0)
    m, head, b, share, count, first, late, early = read_record(record_ptr, position)
    while position < num_tiles:
        claimed = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if claimed == num_tiles - 1:  # as many claims as tiles: the last one leaves the counter as it was
            gl.store(counter_ptr, 0)
        coming = claimed + gl.num_programs(0)
        if count >= 0:
            post(info, turn, position)
            q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, 0, True)
            k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, 0, True)
            head_q = head * F.PACK
            list_ptr, entries = list_of(count_ptr, index_ptr, b, head_q, m, strides, F)
            held = gl.load(held_ptr + b)
            bound = gl.minimum(q_len, m * F.TOKENS + F.TOKENS) * F.HEADS
            row = m * F.TOKENS * F.HEADS + head_q
            mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(0), 64 * (F.DV + q_rope_s.shape[1]) * 2)
            for half in gl.static_range(2):
                buffer = view(q_s.index(half), q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
                at = box_coordinates(q_start * F.HEADS, bound, row, 0, half * F.BLOCK_DV)
                async_load(q_desc, at, q_full.index(0), buffer)
            buffer = view(q_rope_s, q_desc.dtype, q_rope_desc.block_type.shape, q_rope_desc.layout)
            async_load(q_rope_desc, box_coordinates(q_start * F.HEADS, bound, row, 0, 0), q_full.index(0), buffer)
            turn += 1
            for i in range(0, gl.maximum(count, 1), 2):
                # What is past the share has no keys: it loads zeros, and every column is hidden.
                source = (table_ptr + k_start, gl.where(i < count, held, 0), num_pages)
                boxes = key_boxes(list_ptr, first + i, entries, source, F)
                load_latent(descs, keys, boxes, list_ptr, first + i, entries, source, phase, 0, F)
                source = (table_ptr + k_start, gl.where(i + 1 < count, held, 0), num_pages)
                tile = gl.minimum(first + i + 1, first + gl.maximum(count, 1) - 1)
                boxes = key_boxes(list_ptr, tile, entries, source, F)
                load_latent(descs, keys, boxes, list_ptr, tile, entries, source, phase, 1, F)
                phase ^= 1
        position = coming
        m, head, b, share, count, first, late, early = read_record(record_ptr, gl.minimum(position, num_tiles - 1))
    post(info, turn, -1)


@gluon.jit
def exchange(numbers, barrier, use, mine, CID: gl.constexpr, ROWS: gl.constexpr):
    """The other warpgroup's row numbers [64] for this one's; memory of two uses in turn."""
    numbers.index(2 * (use & 1) + CID).store(mine)
    mbarrier.arrive(barrier.index(0), count=1)
    mbarrier.wait(barrier.index(0), use & 1)
    return numbers.index(2 * (use & 1) + 1 - CID).load(ROWS)


@gluon.jit
def latent_consumer(CID: gl.constexpr, call, F: gl.constexpr):
    """A warpgroup: the scores of one key tile of each pair, and its half of the output columns."""
    (
        o_desc, queries, keys, info, numbers, exchanged, p_full, o_ptr, sums_ptr, lse_ptr, sinks_ptr, record_ptr, spans,
        total_q, sums_stride, part_stride, window, qk_scale, softcap,
    ) = call  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.TILE_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.BLOCK_DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    OTHER: gl.constexpr = 1 - CID
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr = spans
    q_s, q_rope_s, q_full, q_empty = queries
    latent, rotary, full, empty, cols_s = keys
    zeros = gl.zeros([64, F.TILE_N], gl.float32, S_LAYOUT)
    phase = 0
    use = 0
    turn = 0
    position = receive(info, 0)
    m, head, b, share, count, first, late, early = read_record(record_ptr, gl.maximum(position, 0))
    while position >= 0:
        q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, 0, True)
        k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, 0, True)
        row = gl.arange(0, 64, ROWS)  # of a tile: the heads of its first token, then of the next
        tokens = m * F.TOKENS + row // F.PACK
        acc = gl.zeros([64, F.BLOCK_DV], gl.float32, O_LAYOUT)
        m_i = gl.full([64], float("-inf"), gl.float32, ROWS)
        l_i = gl.zeros([64], gl.float32, ROWS)
        mbarrier.wait(q_full.index(0), turn & 1)
        for i in range(0, gl.maximum(count, 1), 2):
            mbarrier.wait(full.index(CID), phase)
            zero = opaque_zero()
            s = warpgroup_mma(q_rope_s, rotary.index(CID + zero).permute((1, 0)), zeros, use_acc=False, is_async=True)
            s = warpgroup_mma(q_s.index(zero), latent.index(2 * CID + zero).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma(q_s.index(1 + zero), latent.index(2 * CID + 1 + zero).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            if F.SOFTCAP:
                s = cap_scores(s, qk_scale, softcap)
            cols = cols_s.index(CID).load(gl.SliceLayout(0, S_LAYOUT))
            s = hide(s, tokens, cols, k_len - q_len, k_len, window[0], window[1], F.CAUSAL, F.WINDOW)
            mine = gl.max(s, 1)
            m_new = gl.maximum(m_i, gl.maximum(mine, exchange(numbers, exchanged, use, mine, CID, ROWS)))
            use += 1
            top = gl.where(m_new == float("-inf"), 0.0, m_new) * qk_scale
            alpha = gl.exp2(m_i * qk_scale - top)
            probabilities = gl.exp2(s * qk_scale - top[:, None])
            l_i = l_i * alpha + gl.sum(probabilities, 1)
            m_i = m_new
            p = probabilities.to(o_desc.dtype)
            rotary.index(CID).store(p)
            fence_async_shared()
            mbarrier.arrive(p_full.index(CID), count=1)
            acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
            p = gl.convert_layout(p, P_LAYOUT)
            acc = warpgroup_mma(p, latent.index(3 * CID + zero), acc, is_async=True)
            mbarrier.wait(full.index(OTHER), phase)
            mbarrier.wait(p_full.index(OTHER), phase)
            acc = warpgroup_mma(rotary.index(OTHER + zero), latent.index(2 * OTHER + CID + zero), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(empty.index(0), count=1)
            mbarrier.arrive(empty.index(1), count=1)
            phase ^= 1
        # Past this exchange neither warpgroup reads the queries any more: their memory takes the outputs.
        others = exchange(numbers, exchanged, use, l_i, CID, ROWS)
        use += 1
        l_i = l_i + others
        bound = gl.minimum(q_len, m * F.TOKENS + F.TOKENS)
        head_q = head * F.PACK
        heads = head_q + row % F.PACK
        inside = (tokens < bound) & (CID == 0)
        if share >= 0:
            leave_sums(sums_ptr, row, share, sums_stride, m_i, l_i, inside, qk_scale)
            o_row = gl.convert_layout(row, O_ROWS) * F.DV
            leave_part(o_ptr + CID * F.BLOCK_DV, o_row, share, part_stride, acc, tokens < bound, F)
        else:
            lse_at = heads.to(gl.int64) * total_q + q_start + tokens
            factor = finish_sums(lse_ptr, lse_at, sinks_ptr, heads, m_i, l_i, inside, qk_scale, F)
            acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
            q_s.index(CID).store(acc.to(o_desc.dtype))
            fence_async_shared()
            at = box_coordinates(
                q_start * F.HEADS, bound * F.HEADS, m * F.TOKENS * F.HEADS + head_q, 0, CID * F.BLOCK_DV
            )
            async_store(o_desc, at, view(q_s.index(CID), o_desc.dtype, o_desc.block_type.shape, o_desc.layout))
            tma.store_wait(0)
        mbarrier.arrive(q_empty.index(0), count=1)
        turn += 1
        position = receive(info, turn)
        m, head, b, share, count, first, late, early = read_record(record_ptr, gl.maximum(position, 0))


@gluon.jit(do_not_specialize=NUMBERS)
def latent_kernel(
    q_desc, q_rope_desc, k_desc, k_rope_desc, o_desc, o_ptr, sums_ptr, lse_ptr, sinks_ptr, record_ptr, counter_ptr,
    count_ptr, index_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, table_ptr, held_ptr,
    mask_stride_b, mask_stride_h, idx_width, k_rows, k_rope_rows, total_q, sums_stride, part_stride, window_left,
    window_right, num_pages, qk_scale, softcap, F: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: row tiles of 64 rows as the schedule hands them out, until none is left.

    Rows are tokens times heads, ``PACK`` of these in a tile and ``TOKENS`` tokens. Grid (programs,). Records, spans,
    pages and shares are those of ``forward_kernel`` with ``PAGE``.
    """
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = tile_layout(2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROTARY: gl.constexpr = q_rope_desc.block_type.shape[4]
    q_s, q_full, q_empty = ring(dtype, 2, [64, F.BLOCK_DV], layout, 1, 2)
    q_rope_s = gl.allocate_shared_memory(dtype, [64, ROTARY], layout)
    latent = gl.allocate_shared_memory(dtype, [4, F.TILE_N, F.BLOCK_DV], layout)
    rotary, full, empty = ring(dtype, 2, [F.TILE_N, ROTARY], layout, 2, 2)
    cols_s, p_full, p_empty = ring(gl.int32, 2, [F.TILE_N], plain, 1, 1)
    numbers, exchanged, unused = ring(gl.float32, 4, [64], plain, 2, 1)
    info = ring(gl.int32, 2, [1], plain, 1, 2)
    fence_async_shared()
    spans = (q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr)
    queries = (q_s, q_rope_s, q_full, q_empty)
    keys = (latent, rotary, full, empty, cols_s)
    work = (
        o_desc, queries, keys, info, numbers, exchanged, p_full, o_ptr, sums_ptr, lse_ptr, sinks_ptr, record_ptr, spans,
        total_q, sums_stride, part_stride, (window_left, window_right), qk_scale, softcap,
    )  # fmt: skip
    loads = (
        q_desc, q_rope_desc, (k_desc, k_rope_desc, k_rows, k_rope_rows), queries, keys, info, record_ptr, counter_ptr,
        count_ptr, index_ptr, spans, (table_ptr, held_ptr, num_pages), (mask_stride_b, mask_stride_h, idx_width),
    )  # fmt: skip
    gl.warp_specialize(
        [(latent_consumer, (0, work, F)), (latent_consumer, (1, work, F)), (latent_producer, (loads, F))],
        [4, 1], [232, 40],
    )  # fmt: skip
