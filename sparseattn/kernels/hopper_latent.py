"""The Hopper kernel of attention over a latent (MLA) cache: one KV head, whose values are columns of its keys.

A row of the output is as wide as a warpgroup's accumulators allow for two, so two warpgroups share a row tile: one
scores every key tile and weighs its left half, the other weighs the right half with the probabilities that it finds in
shared memory. It does so while the next tile's probabilities are made, so that the tensor cores do not wait for these;
the halves of a key tile come and go one by one.

Rows of pages too small for a tensor map's boxes are gathered by the threads of a loading warpgroup.
"""

# Annotations must stay objects for the Gluon front end: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
    begin_early,
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
from sparseattn.kernels.hopper_attention import (
    HIDDEN,
    cap_scores,
    finish_sums,
    hide,
    leave_part,
    leave_sums,
    next_softmax,
    row_sums,
    thread_sums,
)
from sparseattn.kernels.hopper_boxes import (
    box_columns,
    copy_rows,
    fetch_page,
    key_boxes,
    load_key_boxes,
    page_numbers,
    tile_tokens,
)
from sparseattn.kernels.hopper_merge import first_claim, merge_tiles, post_merges, work_of

# Arrivals of a warpgroup whose threads gather rows.
GATHERED: gl.constexpr = gl.constexpr(128)
NUMBERS = ["mask_stride_b", "mask_stride_h", "idx_width", "k_rows", "k_rope_rows", "total_q", "sums_stride"]
NUMBERS += ["part_stride", "window_left", "window_right", "num_pages", "fetched", "k_stride", "k_rope_stride"]
NUMBERS.append("out_stride")


@gluon.jit
def list_of(count_ptr, index_ptr, b, head_q, m, strides, F: gl.constexpr):
    """A row tile's list of blocks and how many of them a key tile may gather; of a tile without keys, anybody's."""
    mask_stride_b, mask_stride_h, idx_width = strides
    entries = 1
    list_ptr = index_ptr
    if F.MASKED:
        list_row = b.to(gl.int64) * mask_stride_b + head_q // F.MASK_GROUP * mask_stride_h + m * F.TOKENS // F.BLOCK_Q
        list_ptr = index_ptr + list_row * idx_width
        entries = gl.minimum(gl.load(count_ptr + list_row), idx_width)
    return list_ptr, entries


@gluon.jit
def quarter(half, part: gl.constexpr, dtype: gl.constexpr, F: gl.constexpr):
    """One half of the columns of half a tile."""
    return view(half, dtype, [2, half.shape[0], F.BLOCK_DV // 2], tile_layout(2)).index(part)


@gluon.jit
def post_columns(columns, stage, cols, last, WARPS: gl.constexpr):
    """Say which keys a tile has, and the last of them, ``HIDDEN`` where one is missing."""
    cols_s, last_s = columns
    cols_s.index(stage).store(cols)
    last_s.index(stage).store(gl.full([1], last, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0])))


@gluon.jit
def load_latent(descs, keys, list_ptr, tile, entries, source, stage, phase, F: gl.constexpr):
    """Bring a key tile, its left columns and then the right ones with the rotary part, and say which keys it has."""
    k_desc, k_rope_desc, k_rows, k_rope_rows = descs
    latent, rotary, left, right, columns = keys
    rows, counts = key_boxes(list_ptr, tile, entries, source, F)
    lane: gl.constexpr = gl.BlockedLayout([F.TILE_N // 32], [32], [1], [0])
    cols = box_columns(list_ptr, tile, entries, source, gl.arange(0, F.TILE_N, lane), F)
    full = left[0].index(stage)
    mbarrier.wait(left[1].index(stage), phase)
    mbarrier.expect(full, F.TILE_N * (F.BLOCK_DV + rotary.shape[2]) * 2)
    load_key_boxes(k_desc, k_rows, rows, counts, 0, 0, full, latent.index(2 * stage), F)
    load_key_boxes(k_rope_desc, k_rope_rows, rows, counts, 0, 0, full, rotary.index(stage), F)
    post_columns(columns, stage, cols, gl.max(cols, 0), 1)
    mbarrier.arrive(full, count=1)
    mbarrier.wait(right[1].index(stage), phase)
    for part in gl.static_range(2):
        full = right[0].index(2 * stage + part)
        tile = quarter(latent.index(2 * stage + 1), part, k_desc.dtype, F)
        mbarrier.expect(full, F.TILE_N * F.BLOCK_DV)
        load_key_boxes(k_desc, k_rows, rows, counts, 0, F.BLOCK_DV + part * (F.BLOCK_DV // 2), full, tile, F)


@gluon.jit
def tile_pages(list_ptr, tile, entries, source, F: gl.constexpr):
    """Tokens of a key tile's rows, or the first where they lie in one page; and their pages, negative for none."""
    if F.BOX < 8:
        LANES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        offs = gl.arange(0, F.TILE_N, gl.SliceLayout(1, LANES))
    else:
        offs = tile * 0
    tokens = tile_tokens(list_ptr, tile, entries, source[1], offs, F)
    return tokens, page_numbers(source, tokens, F)


@gluon.jit
def load_panels(desc, row, count, col: gl.constexpr, full, tile):
    """Bring ``count`` rows from ``row`` on, from column ``col`` on."""
    PANELS: gl.constexpr = tile.shape[1] // 64
    panels = view(tile, desc.dtype, [PANELS, tile.shape[0], 64], tile_layout(2))
    for panel in gl.static_range(PANELS):
        box = view(panels.index(panel), desc.dtype, desc.block_type.shape, desc.layout)
        async_load(desc, box_coordinates(row, count, 0, 0, col + panel * 64), full, box)


@gluon.jit
def load_page(descs, rows_of, keys, token, page, end, ahead, stage, phase, F: gl.constexpr):
    """``load_latent`` of a key tile that lies in one page; nothing is left to compute when its memory is free.

    ``ahead``: token and page of the tile after it. There is less time between the end of a product and the next that
    needs its memory than DRAM takes to answer.
    """
    k_desc, k_rope_desc, k_rows, k_rope_rows = descs
    latent, rotary, left, right, columns = keys
    count = gl.where(page >= 0, gl.minimum(end - token, F.TILE_N), 0)
    inner = gl.where(page >= 0, token % F.PAGE, 0)
    page = gl.maximum(page, 0)
    k_row = page * k_rows + inner
    rope_row = page * k_rope_rows + inner
    lane: gl.constexpr = gl.BlockedLayout([F.TILE_N // 32], [32], [1], [0])
    offs = gl.arange(0, F.TILE_N, lane)
    cols = gl.where(offs < count, offs + token, HIDDEN)
    full = left[0].index(stage)
    mbarrier.wait(left[1].index(stage), phase)
    mbarrier.expect(full, F.TILE_N * (F.BLOCK_DV + rotary.shape[2]) * 2)
    load_panels(k_desc, k_row, count, 0, full, latent.index(2 * stage))
    load_panels(k_rope_desc, rope_row, count, 0, full, rotary.index(stage))
    post_columns(columns, stage, cols, gl.where(count == F.TILE_N, token + F.TILE_N - 1, HIDDEN), 1)
    mbarrier.arrive(full, count=1)
    fetch_page(rows_of, ahead[0], ahead[1], end, F)
    mbarrier.wait(right[1].index(stage), phase)
    for part in gl.static_range(2):
        full = right[0].index(2 * stage + part)
        tile = quarter(latent.index(2 * stage + 1), part, k_desc.dtype, F)
        mbarrier.expect(full, F.TILE_N * F.BLOCK_DV)
        load_panels(k_desc, k_row, count, F.BLOCK_DV + part * (F.BLOCK_DV // 2), full, tile)


@gluon.jit
def row_pointers(rows_of, tokens, page, F: gl.constexpr):
    """Where a key tile's rows begin, [TILE_N, 1] of the latent part and of the rotary one."""
    k_ptr, k_rope_ptr, k_rows, k_rope_rows, k_stride, k_rope_stride, fetched = rows_of
    inner = gl.where(page >= 0, tokens % F.PAGE, 0)
    page = gl.maximum(page, 0)
    k_at = (page.to(gl.int64) * k_rows + inner) * (k_stride * 8)
    rope_at = (page.to(gl.int64) * k_rope_rows + inner) * (k_rope_stride * 8)
    return k_ptr + k_at[:, None], k_rope_ptr + rope_at[:, None]


@gluon.jit
def gather(ptrs, present, tile):
    """Copy rows of ``tile.shape[1]`` columns, zeros where none is ``present``."""
    cols = gl.arange(0, tile.shape[1], gl.SliceLayout(0, present.type.layout.parent))
    copy_rows(tile, ptrs + cols[None, :], mask=present[:, None] & (cols < tile.shape[1])[None, :])


@gluon.jit
def gather_latent(rows_of, keys, tokens, page, stage, phase, dtype: gl.constexpr, F: gl.constexpr):
    """``load_latent`` by four warps, 16 bytes a thread at a time.

    Threads arrive with their bytes, so that none waits for what it has asked for; who reads the tile must fence.
    """
    latent, rotary, left, right, columns = keys
    present = page >= 0
    ptrs, rope_ptrs = row_pointers(rows_of, tokens, page, F)
    cols = gl.where(present, tokens, HIDDEN)
    last = gl.max(cols, 0)
    full = left[0].index(stage)
    mbarrier.wait(left[1].index(stage), phase)
    post_columns(columns, stage, cols, last, 4)
    mbarrier.arrive(full, count=1)
    gather(ptrs, present, latent.index(2 * stage))
    gather(rope_ptrs, present, rotary.index(stage))
    async_copy.mbarrier_arrive(full, increment_count=False)
    mbarrier.wait(right[1].index(stage), phase)
    for part in gl.static_range(2):
        tile = quarter(latent.index(2 * stage + 1), part, dtype, F)
        gather(ptrs + (F.BLOCK_DV + part * (F.BLOCK_DV // 2)), present, tile)
        async_copy.mbarrier_arrive(right[0].index(2 * stage + part), increment_count=False)


@gluon.jit
def load_queries(q_desc, q_rope_desc, queries, at, turn, F: gl.constexpr):
    """Bring the queries of a row tile."""
    q_s, q_rope_s, q_full, q_empty = queries
    start, bound, row = at
    mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
    mbarrier.expect(q_full.index(0), 64 * (F.DV + q_rope_s.shape[2]) * 2)
    for half in gl.static_range(2):
        buffer = view(q_s.index(half), q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
        async_load(q_desc, box_coordinates(start, bound, row, 0, half * F.BLOCK_DV), q_full.index(0), buffer)
    buffer = view(q_rope_s.index(0), q_desc.dtype, q_rope_desc.block_type.shape, q_rope_desc.layout)
    async_load(q_rope_desc, box_coordinates(start, bound, row, 0, 0), q_full.index(0), buffer)


@gluon.jit
def latent_producer(call, F: gl.constexpr):
    """The warps that load: per row tile its first keys, its queries, then the other keys."""
    (
        q_desc, q_rope_desc, descs, rows_of, queries, keys, info, record_ptr, counter_ptr, count_ptr, index_ptr, spans,
        cache, strides, merged,
    ) = call  # fmt: skip
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr = spans
    table_ptr, num_pages = cache
    WARPS: gl.constexpr = 4 if F.BOX < 8 else 1
    BOXES: gl.constexpr = F.BOX >= 8 and F.BOX < F.TILE_N
    num_tiles, merges, total = work_of(counter_ptr, merged, F)
    position, unclaimed, last_claim = first_claim(counter_ptr, merges, total)
    stage = 0
    phase = 1
    turn = 0
    first_record = gl.maximum(gl.minimum(position, num_tiles - 1), 0)
    m, head, b, share, count, first, pages_at, held = read_record(record_ptr, first_record)
    while position < num_tiles:
        claimed = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if count >= 0:
            post(info, turn, position, WARPS)
            q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, 0, True)
            head_q = head * F.PACK
            listed = gl.where(count > 0, b, 0), gl.where(count > 0, m, 0)
            list_ptr, entries = list_of(count_ptr, index_ptr, listed[0], head_q, listed[1], strides, F)
            # A row tile without keys gets one tile of zeros, whose columns are all hidden.
            source = (table_ptr + pages_at, gl.where(count > 0, held, 0), num_pages)
            bound = gl.minimum(q_len, m * F.TOKENS + F.TOKENS) * F.HEADS
            last = first + gl.maximum(count, 1) - 1
            if not BOXES:
                tokens, page = tile_pages(list_ptr, first, entries, source, F)
                next_tokens, next_page = tile_pages(list_ptr, gl.minimum(first + 1, last), entries, source, F)
            for i in range(0, gl.maximum(count, 1)):
                if BOXES:
                    load_latent(descs, keys, list_ptr, first + i, entries, source, stage, phase, F)
                else:  # page numbers of later tiles travel while this one waits for room
                    far_tokens, far_page = tile_pages(list_ptr, gl.minimum(first + i + 2, last), entries, source, F)
                    if F.BOX < 8:
                        gather_latent(rows_of, keys, tokens, page, stage, phase, q_desc.dtype, F)
                    else:
                        ahead = (next_tokens, next_page)
                        load_page(descs, rows_of, keys, tokens, page, source[1], ahead, stage, phase, F)
                    tokens = next_tokens
                    page = next_page
                    next_tokens = far_tokens
                    next_page = far_page
                if i == 0:
                    at = (q_start * F.HEADS, bound, m * F.TOKENS * F.HEADS + head_q)
                    load_queries(q_desc, q_rope_desc, queries, at, turn, F)
                stage ^= 1
                phase ^= stage ^ 1
            turn += 1
        elif merges > 0:  # nobody else arrives for what is left out
            gl.atomic_add(counter_ptr + 3, 2, sem="relaxed")
        if claimed == last_claim:
            gl.store(counter_ptr, 0)
        position = claimed + unclaimed
        m, head, b, share, count, first, pages_at, held = read_record(record_ptr, gl.minimum(position, num_tiles - 1))
    if F.MERGE:
        turn = post_merges(info, turn, position, num_tiles, total, counter_ptr, last_claim, WARPS)
    post(info, turn, -1, WARPS)


@gluon.jit
def score_left(queries, keys, stage, phase, zeros, F: gl.constexpr):
    """Begin the scores of a key tile: two products under way."""
    q_s, q_rope_s, q_full, q_empty = queries
    latent, rotary, left, right, columns = keys
    mbarrier.wait(left[0].index(stage), phase)
    if F.BOX < 8:
        fence_async_shared()
    zero = opaque_zero()
    at = stage + zero
    s = warpgroup_mma(q_s.index(zero), latent.index(2 * at).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope_s.index(zero), rotary.index(at).permute((1, 0)), s, is_async=True)


@gluon.jit
def score_right(queries, keys, stage, phase, s, F: gl.constexpr):
    """Go on with them: two more."""
    q_s, q_rope_s, q_full, q_empty = queries
    latent, rotary, left, right, columns = keys
    zero = opaque_zero()
    at = stage + zero
    for part in gl.static_range(2):
        mbarrier.wait(right[0].index(2 * stage + part), phase)
        if F.BOX < 8:
            fence_async_shared()
        q_part = quarter(q_s.index(1 + zero), part, q_rope_s.dtype, F)
        k_part = quarter(latent.index(2 * at + 1), part, q_rope_s.dtype, F)
        s = warpgroup_mma(q_part, k_part.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def publish(p, alpha, right, board, stage, phase):
    """Put a tile's probabilities and factors where the other warpgroup finds them."""
    factors, p_s, p_full = board
    factors.index(stage).store(alpha)
    # The other warpgroup has read the probabilities before.
    mbarrier.wait(right[1].index(stage ^ 1), phase ^ stage ^ 1)
    p_s.store(p)
    fence_async_shared()
    mbarrier.arrive(p_full.index(stage), count=1)


@gluon.jit
def probabilities_of(
    s, m_i, l_i, tokens, least, length, window, columns, stage, qk_scale, softcap, dtype: gl.constexpr,
    F: gl.constexpr,
):  # fmt: skip
    """One step of the softmax; up to key ``least`` every row sees all."""
    cols_s, last_s = columns
    if F.SOFTCAP:
        s = cap_scores(s, qk_scale, softcap)
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if F.WINDOW or gl.max(last_s.index(stage).load(lane), 0) > least:
        cols = cols_s.index(stage).load(gl.SliceLayout(0, s.type.layout))
        s = hide(s, tokens, cols, length[0], length[1], window[0], window[1], F.CAUSAL, F.WINDOW)
    p, alpha, m_i, l_i = next_softmax(s, m_i, l_i, qk_scale, True)
    return p.to(dtype), alpha, m_i, l_i


@gluon.jit
def weigh_left(acc, p, alpha, latent, stage):
    """Begin to add a key tile's left columns to outputs that ``alpha`` shrinks."""
    O_LAYOUT: gl.constexpr = acc.type.layout
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    p = gl.convert_layout(p, gl.DotOperandLayout(0, O_LAYOUT, 2))
    return warpgroup_mma(p, latent.index(2 * (stage + opaque_zero())), acc, is_async=True), p


@gluon.jit
def store_half(o_desc, q_s, acc, place, half: gl.constexpr, F: gl.constexpr):
    """Write half of the columns of finished rows, through the memory of their queries, which nobody reads any more."""
    q_start, q_len, m, head = place
    q_s.index(half).store(acc.to(o_desc.dtype))
    fence_async_shared()
    bound = gl.minimum(q_len, m * F.TOKENS + F.TOKENS) * F.HEADS
    row = m * F.TOKENS * F.HEADS + head * F.PACK
    at = box_coordinates(q_start * F.HEADS, bound, row, 0, half * F.BLOCK_DV)
    async_store(o_desc, at, view(q_s.index(half), o_desc.dtype, o_desc.block_type.shape, o_desc.layout))
    tma.store_wait(0)


@gluon.jit
def latent_scorer(call, F: gl.constexpr):
    """A warpgroup: the probabilities of every key tile, and the left half of the output columns.

    The scores of the next tile begin behind the product that uses a tile's probabilities. ``scored`` turns when all of
    a tile's are under way, and once more at the end of a row tile: then the other warpgroup may weigh the tile before.
    """
    (
        queries, keys, info, board, scored, finished, outs, lse_ptr, sinks_ptr, record_ptr, spans, total_q, strides,
        window, qk_scale, softcap, counter_ptr, merged,
    ) = call  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.TILE_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.BLOCK_DV, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr = spans
    q_s, q_rope_s, q_full, q_empty = queries
    latent, rotary, left, right, columns = keys
    factors, p_s, p_full = board
    o_desc, part_ptr, sums_ptr = outs
    part_stride, sums_stride = strides
    zeros = gl.zeros([64, F.TILE_N], gl.float32, S_LAYOUT)
    row = gl.arange(0, 64, ROWS)  # of a tile: the heads of its first token, then of the next
    stage = 0
    phase = 0
    done = 0
    turn = 0
    position = receive(info, 0)
    m, head, b, share, count, first, pages_at, held = read_record(record_ptr, gl.maximum(position, 0))
    while position >= 0:
        q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, 0, True)
        k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, 0, True)
        tokens = m * F.TOKENS + row // F.PACK
        length = (k_len - q_len, k_len)
        least = k_len - 1
        if F.CAUSAL:
            least = gl.minimum(least, m * F.TOKENS + k_len - q_len)
        acc = gl.zeros([64, F.BLOCK_DV], gl.float32, O_LAYOUT)
        m_i = gl.full([64], float("-inf"), gl.float32, ROWS)
        l_i = thread_sums(zeros)
        mbarrier.wait(q_full.index(0), turn & 1)
        s = score_left(queries, keys, stage, phase, zeros, F)
        s = score_right(queries, keys, stage, phase, s, F)
        mbarrier.arrive(scored.index(done & 1), count=1)
        done += 1
        for i in range(1, gl.maximum(count, 1)):
            s = warpgroup_mma_wait(0, deps=(s,))
            p, alpha, m_i, l_i = probabilities_of(
                s, m_i, l_i, tokens, least, length, window, columns, stage, qk_scale, softcap, p_s.dtype, F
            )
            acc, weights = weigh_left(acc, p, alpha, latent, stage)
            publish(p, alpha, right, board, stage, phase)
            before = stage
            stage ^= 1
            phase ^= stage ^ 1
            s = score_left(queries, keys, stage, phase, zeros, F)
            acc, weights = warpgroup_mma_wait(2, deps=(acc, weights))
            mbarrier.arrive(left[1].index(before), count=1)
            s = score_right(queries, keys, stage, phase, s, F)
            mbarrier.arrive(scored.index(done & 1), count=1)
            done += 1
        s = warpgroup_mma_wait(0, deps=(s,))
        p, alpha, m_i, l_i = probabilities_of(
            s, m_i, l_i, tokens, least, length, window, columns, stage, qk_scale, softcap, p_s.dtype, F
        )
        acc, weights = weigh_left(acc, p, alpha, latent, stage)
        publish(p, alpha, right, board, stage, phase)
        mbarrier.arrive(scored.index(done & 1), count=1)
        done += 1
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(left[1].index(stage), count=1)
        stage ^= 1
        phase ^= stage ^ 1
        l_i = row_sums(l_i, ROWS)
        inside = tokens < gl.minimum(q_len, m * F.TOKENS + F.TOKENS)
        if share >= 0:
            mbarrier.arrive(finished.index(turn & 1), count=1)
            leave_sums(sums_ptr, row, share, sums_stride, m_i, l_i, inside, qk_scale)
            leave_part(part_ptr, gl.convert_layout(row, O_ROWS) * F.DV, share, part_stride, acc, inside, F)
        else:
            heads = head * F.PACK + row % F.PACK
            lse_at = heads.to(gl.int64) * total_q + q_start + tokens
            factor = finish_sums(lse_ptr, lse_at, sinks_ptr, heads, m_i, l_i, inside, qk_scale, F)
            factors.index(2 + (turn & 1)).store(factor)
            mbarrier.arrive(finished.index(turn & 1), count=1)
            acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
            store_half(o_desc, q_s, acc, (q_start, q_len, m, head), 0, F)
        mbarrier.arrive(q_empty.index(0), count=1)
        turn += 1
        position = receive(info, turn)
        m, head, b, share, count, first, pages_at, held = read_record(record_ptr, gl.maximum(position, 0))
    if F.MERGE:
        merge_tiles(info, turn, position, counter_ptr, merged, 0, F)


@gluon.jit
def latent_weigher(call, F: gl.constexpr):
    """A warpgroup: the right half of the output columns."""
    (
        queries, keys, info, board, scored, finished, outs, lse_ptr, sinks_ptr, record_ptr, spans, total_q, strides,
        window, qk_scale, softcap, counter_ptr, merged,
    ) = call  # fmt: skip
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.BLOCK_DV, 16])
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr = spans
    q_s, q_rope_s, q_full, q_empty = queries
    latent, rotary, left, right, columns = keys
    factors, p_s, p_full = board
    o_desc, part_ptr, sums_ptr = outs
    part_stride, sums_stride = strides
    row = gl.arange(0, 64, O_ROWS)
    stage = 0
    phase = 0
    done = 0
    turn = 0
    position = receive(info, 0)
    m, head, b, share, count, first, pages_at, held = read_record(record_ptr, gl.maximum(position, 0))
    while position >= 0:
        acc = gl.zeros([64, F.BLOCK_DV], gl.float32, O_LAYOUT)
        done += 1  # the first tile's scores: its probabilities come after them
        for i in range(0, gl.maximum(count, 1)):
            for part in gl.static_range(2):
                mbarrier.wait(right[0].index(2 * stage + part), phase)
            if F.BOX < 8:
                fence_async_shared()
            mbarrier.wait(p_full.index(stage), phase)
            acc = acc * factors.index(stage).load(O_ROWS)[:, None]
            mbarrier.wait(scored.index(done & 1), (done >> 1) & 1)
            done += 1
            acc = warpgroup_mma(p_s, latent.index(2 * (stage + opaque_zero()) + 1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(right[1].index(stage), count=1)
            stage ^= 1
            phase ^= stage ^ 1
        q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, 0, True)
        tokens = m * F.TOKENS + row // F.PACK
        inside = tokens < gl.minimum(q_len, m * F.TOKENS + F.TOKENS)
        mbarrier.wait(finished.index(turn & 1), (turn >> 1) & 1)
        if share >= 0:
            leave_part(part_ptr + F.BLOCK_DV, row * F.DV, share, part_stride, acc, inside, F)
        else:
            acc = acc * factors.index(2 + (turn & 1)).load(O_ROWS)[:, None]
            store_half(o_desc, q_s, acc, (q_start, q_len, m, head), 1, F)
        mbarrier.arrive(q_empty.index(0), count=1)
        turn += 1
        position = receive(info, turn)
        m, head, b, share, count, first, pages_at, held = read_record(record_ptr, gl.maximum(position, 0))
    if F.MERGE:
        merge_tiles(info, turn, position, counter_ptr, merged, 1, F)


@gluon.jit(do_not_specialize=NUMBERS)
def latent_kernel(
    q_desc, q_rope_desc, k_desc, k_rope_desc, o_desc, part_ptr, sums_ptr, lse_ptr, sinks_ptr, record_ptr, counter_ptr,
    count_ptr, index_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, table_ptr, k_ptr, k_rope_ptr,
    merge_ptr, out_ptr, mask_stride_b, mask_stride_h, idx_width, k_rows, k_rope_rows, k_stride, k_rope_stride,
    out_stride, total_q, sums_stride, part_stride, window_left, window_right, num_pages, fetched, qk_scale, softcap,
    F: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: row tiles of 64 rows as the schedule hands them out, until none is left.

    Rows are tokens times heads, ``PACK`` of these in a tile and ``TOKENS`` tokens. Grid (programs,). Records, spans,
    pages and shares are those of ``forward_kernel`` with ``PAGE``; strides of k and k_rope are of rows, in 8 elements.
    ``fetched`` 1: key tiles that lie in one page are fetched to L2 before there is room for them. ``MERGE``: when all
    shares have left their sums, these are merged, so many rows at a time; ``counter_ptr`` + 2 and ``merge_ptr`` say
    which (see ``paged_schedule_kernel``), and + 3 counts what is done. Strides of ``out_ptr`` count 8 elements, too.
    """
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = tile_layout(2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROTARY: gl.constexpr = q_rope_desc.block_type.shape[4]
    q_s, q_full, q_empty = ring(dtype, 2, [64, F.BLOCK_DV], layout, 1, 2)
    q_rope_s = gl.allocate_shared_memory(dtype, [1, 64, ROTARY], layout)
    latent = gl.allocate_shared_memory(dtype, [4, F.TILE_N, F.BLOCK_DV], layout)
    rotary = gl.allocate_shared_memory(dtype, [2, F.TILE_N, ROTARY], layout)
    p_s = gl.allocate_shared_memory(dtype, [64, F.TILE_N], layout)
    # A stage's left half and rotary columns come and go together, its right half does in two parts and at once.
    cols_s, left_full, left_empty = ring(gl.int32, 2, [F.TILE_N], plain, GATHERED + 1 if F.BOX < 8 else 2, 1)
    last_s = gl.allocate_shared_memory(gl.int32, [2, 1], plain)
    unused, right_full, right_empty = ring(gl.int32, 4, [1], plain, GATHERED if F.BOX < 8 else 1, 1)
    # Those of a tile that shrink older sums, by stage; then of a row tile that normalise its outputs, by turn.
    factors, p_full, scored = ring(gl.float32, 4, [64], plain, 1, 1)
    info, info_full, info_empty = ring(gl.int32, 2, [1], plain, 1, 2)
    finished = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(finished.index(i), count=1)
    fence_async_shared()
    begin_early()
    spans = (q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr)
    queries = (q_s, q_rope_s, q_full, q_empty)
    keys = (latent, rotary, (left_full, left_empty), (right_full, right_empty), (cols_s, last_s))
    turns = (info, info_full, info_empty)
    merged = (
        part_ptr, sums_ptr, merge_ptr, sums_stride, lse_ptr, sinks_ptr, total_q, out_ptr, out_stride,
    )  # fmt: skip
    work = (
        queries, keys, turns, (factors, p_s, p_full), scored, finished, (o_desc, part_ptr, sums_ptr), lse_ptr,
        sinks_ptr, record_ptr, spans, total_q, (part_stride, sums_stride), (window_left, window_right),
        qk_scale, softcap, counter_ptr, merged,
    )  # fmt: skip
    loads = (
        q_desc, q_rope_desc, (k_desc, k_rope_desc, k_rows, k_rope_rows),
        (k_ptr, k_rope_ptr, k_rows, k_rope_rows, k_stride, k_rope_stride, fetched), queries, keys, turns, record_ptr,
        counter_ptr, count_ptr, index_ptr, spans, (table_ptr, num_pages),
        (mask_stride_b, mask_stride_h, idx_width), merged,
    )  # fmt: skip
    gl.warp_specialize(
        [(latent_scorer, (work, F)), (latent_weigher, (work, F)), (latent_producer, (loads, F))],
        [4, 4 if F.BOX < 8 else 1], [208, 72] if F.BOX < 8 else [232, 40],
    )  # fmt: skip
