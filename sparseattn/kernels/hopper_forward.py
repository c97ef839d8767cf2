"""The Hopper forward kernel of block-sparse and of paged attention.

A persistent program a multiprocessor. One warp, the producer, claims row tiles and has the copy engine bring their
queries, keys and values; one or two warpgroups, the consumers, take 64 rows each. A consumer walks the key tiles of a
row tile from the last to the first, so that those which the diagonal cuts come first, and overlaps each tile's softmax
with the products around it: the scores of one tile and the output of the tile before are in flight together.
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
    begin_early,
    next_stage,
    read_record,
    receive,
    ring,
    store_rows,
    tile_layout,
)
from sparseattn.kernels.hopper_attention import (
    cap_scores,
    custom_kept,
    custom_rows,
    extra_of,
    finish_sums,
    hide,
    leave_part,
    leave_sums,
    next_softmax,
    row_sums,
    thread_sums,
)
from sparseattn.kernels.hopper_bits import bits_of, keep_bits, load_bits
from sparseattn.kernels.hopper_facts import Facts as Facts
from sparseattn.kernels.hopper_loader import producer
from sparseattn.kernels.hopper_merge import merge_by_last
from sparseattn.kernels.hopper_records import first_head, row_span, tile_spans

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
NUMBERS = [
    "mask_stride_b", "mask_stride_h", "idx_width", "max_q", "max_k", "num_tiles", "q_rows", "k_rows", "v_rows",
    "o_rows", "lse_stride_b", "lse_stride_h", "window_left", "window_right", "lse_split_stride", "o_split_stride",
    "num_pages", "bit_rows", "bit_groups", "k_stride", "v_stride", "k_head", "v_head", "bit_queries",
    "out_stride", "out_head", "custom_size",
]  # fmt: skip


@gluon.jit
def score(q, keys, stage, phase, zeros, F: gl.constexpr):
    """Start ``q k^T`` of a stage's keys."""
    tiles, full, empty = keys
    mbarrier.wait(full.index(stage), phase)
    if F.SCATTERED:
        fence_async_shared()
    if F.PANELS > 0:
        s = zeros
        for panel in gl.static_range(F.PANELS):
            k = tiles.index(stage * F.PANELS + panel).permute((1, 0))
            s = warpgroup_mma(q[panel], k, s, use_acc=panel > 0, is_async=True)
    elif F.DEPTH == F.BLOCK_D:
        k = tiles.index(stage)
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:  # the columns behind DEPTH are zeros
        k = tiles.index(stage)
        HALF: gl.constexpr = F.BLOCK_D // 2
        REST: gl.constexpr = F.DEPTH - HALF
        near = k.slice(0, HALF, dim=1).permute((1, 0))
        far = k.slice(HALF, REST, dim=1).permute((1, 0))
        s = warpgroup_mma(q.slice(0, HALF, dim=1), near, zeros, use_acc=False, is_async=True)
        s = warpgroup_mma(q.slice(HALF, REST, dim=1), far, s, is_async=True)
    return s


@gluon.jit
def weigh(p, values, stage, phase, acc, F: gl.constexpr):
    """Start ``acc + p v`` with a stage's values."""
    tiles, full, empty = values
    mbarrier.wait(full.index(stage), phase)
    if F.SCATTERED:
        fence_async_shared()
    return warpgroup_mma(p, tiles.index(stage), acc, is_async=True)


@gluon.jit
def attend(
    acc, p, m_i, l_i, words, q, keys, values, cols_s, bits, extra, tile, ks, kp, vs, vp, zeros, position, qk_scale,
    softcap, F: gl.constexpr,
):  # fmt: skip
    """Fold in a key tile that every row sees whole, its softmax under the previous tile's product with the values.

    Whole but for bits: ``words`` are those of key tile ``tile`` of the list, and next comes the tile before it.
    """
    s = score(q, keys, ks, kp, zeros, F)
    acc = weigh(p, values, vs, vp, acc, F)
    seen = words
    if F.BITS:
        words = load_bits(bits, gl.maximum(tile - 1, 0), F)
    s = warpgroup_mma_wait(1, deps=(s,))
    if F.ALIBI:
        cols = cols_s.index(ks).load(gl.SliceLayout(0, s.type.layout))
        s += extra[0][:, None] * (cols[None, :] - position[:, None]).to(gl.float32)
    mbarrier.arrive(keys[2].index(ks), count=1)
    ks, kp = next_stage(ks, kp, F.K_STAGES)
    if F.SOFTCAP:
        s = cap_scores(s, qk_scale, softcap)
    if F.BITS:
        s = keep_bits(s, seen, F)
    probabilities, alpha, m_i, l_i = next_softmax(s, m_i, l_i, qk_scale, F.BITS)
    if F.CONSUMERS == 1 or F.BITS:
        # Over since before the product; but the compiler moves no softmax past this, and would past the wait for it.
        mbarrier.wait(values[1].index(vs), vp)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(values[2].index(vs), count=1)
    vs, vp = next_stage(vs, vp, F.V_STAGES)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    p = gl.convert_layout(probabilities.to(p.dtype), p.type.layout)
    return acc, p, m_i, l_i, words, ks, kp, vs, vp


@gluon.jit
def cut_tile(
    acc, m_i, l_i, q, keys, cols_s, bits, extra, tile, ks, kp, zeros, tokens, offset, k_len, window, qk_scale, softcap,
    P: gl.constexpr, F: gl.constexpr,
):  # fmt: skip
    """Probabilities of a key tile that some row does not see whole; ``acc`` comes back shrunk to the new maximum."""
    s = score(q, keys, ks, kp, zeros, F)
    if F.BITS:
        words = load_bits(bits, tile, F)
    if F.CUSTOM != "":
        cols = cols_s.index(ks).load(gl.SliceLayout(0, zeros.type.layout))
        first, bit, left = custom_rows(extra[1], tokens, k_len - offset, k_len, F.CUSTOM)
        kept = custom_kept(extra[1][0], first[:, None], bit[:, None], left[:, None], cols[None, :], F.CUSTOM)
    s = warpgroup_mma_wait(0, deps=(s,))
    cols = cols_s.index(ks).load(gl.SliceLayout(0, s.type.layout))
    mbarrier.arrive(keys[2].index(ks), count=1)
    ks, kp = next_stage(ks, kp, F.K_STAGES)
    if F.ALIBI:
        s += extra[0][:, None] * (cols[None, :] - (tokens + offset)[:, None]).to(gl.float32)
    if F.SOFTCAP:
        s = cap_scores(s, qk_scale, softcap)
    s = hide(s, tokens, cols, offset, k_len, window[0], window[1], F.CAUSAL, F.WINDOW)
    if F.CUSTOM != "":
        s = gl.where(kept, s, float("-inf"))
    if F.BITS:
        s = keep_bits(s, words, F)
    probabilities, alpha, m_i, l_i = next_softmax(s, m_i, l_i, qk_scale, True)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    p = gl.convert_layout(probabilities.to(keys[0].dtype), P)
    return acc, p, m_i, l_i, ks, kp


@gluon.jit
def attend_cut(
    acc, m_i, l_i, q, keys, values, cols_s, bits, extra, tile, ks, kp, vs, vp, zeros, tokens, offset, k_len, window,
    qk_scale, softcap, P: gl.constexpr, F: gl.constexpr,
):  # fmt: skip
    """Fold in a key tile that some row does not see whole; nothing overlaps, as these are few."""
    acc, p, m_i, l_i, ks, kp = cut_tile(
        acc, m_i, l_i, q, keys, cols_s, bits, extra, tile, ks, kp, zeros, tokens, offset, k_len, window, qk_scale,
        softcap, P, F,
    )  # fmt: skip
    acc = weigh(p, values, vs, vp, acc, F)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(values[2].index(vs), count=1)
    vs, vp = next_stage(vs, vp, F.V_STAGES)
    return acc, m_i, l_i, ks, kp, vs, vp


@gluon.jit
def take_queries(queries, turn, CID: gl.constexpr, LAYOUT: gl.constexpr, F: gl.constexpr):
    """A consumer's queries of its ``turn``-th row tile: in registers, or where they lie in shared memory."""
    q_s, q_full, q_empty = queries
    mbarrier.wait(q_full.index(CID), turn & 1)
    if F.Q_REGISTERS:
        q = q_s.index(CID).load(gl.DotOperandLayout(0, LAYOUT, 2))
        fence_async_shared()
        mbarrier.arrive(q_empty.index(CID), count=1)
    elif F.PANELS > 0:
        q = (q_s.index(CID * 3), q_s.index(CID * 3 + 1), q_s.index(CID * 3 + 2))
    else:
        q = q_s.index(CID)
    return q


@gluon.jit
def finished(acc, factor, dtype: gl.constexpr):
    """Outputs from their sums."""
    return (acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]).to(dtype)


@gluon.jit
def store_output(o_desc, o_s, out, o, start, bound, row, head, CID: gl.constexpr, F: gl.constexpr):
    """Send finished rows off, through shared memory unless ``O_BARE``."""
    if F.O_BARE:
        o_ptr, row_stride, head_stride = out
        at = gl.arange(0, 64, gl.SliceLayout(1, o.type.layout))
        tokens = row + at % F.SLOTS
        o_at = (start + tokens).to(gl.int64) * (row_stride * 8)
        o_at += (head + at // F.SLOTS).to(gl.int64) * (head_stride * 8)
        cols = gl.arange(0, F.BLOCK_DV, gl.SliceLayout(0, o.type.layout))
        o_in = (tokens < bound)[:, None] & (cols < F.DV)[None, :]
        gl.store(o_ptr + o_at[:, None] + cols[None, :], o, mask=o_in)
    else:
        o_tile = o_s.index(CID)
        tma.store_wait(0)
        o_tile.store(o)
        fence_async_shared()
        store_rows(o_desc, start, bound, row, head, o_tile)
        if F.O_IN_Q:
            tma.store_wait(0)


@gluon.jit
def consumer(CID: gl.constexpr, call, F: gl.constexpr):
    """A warpgroup that computes: rows ``CID * 64 ..`` of every row tile that the producer posts."""
    (
        o_desc, queries, keys, values, info, cols_s, o_s, o_ptr, lse_ptr, sinks_ptr, record_ptr, spans, max_q, max_k,
        o_rows, lse_stride_b, lse_stride_h, lse_split_stride, o_split_stride, window, scale, softcap, sums_ptr,
        scales_ptr, lists, listed, details_ptr, out, extras,
    ) = call  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.TILE_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.BLOCK_DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    q_s, q_full, q_empty = queries
    zeros = gl.zeros([64, F.TILE_N], gl.float32, S_LAYOUT)
    ks = 0
    kp = 0
    vs = 0
    vp = 0
    turn = 0
    position = receive(info, 0)
    m, head, b, share, count, first, late, early = read_record(record_ptr, gl.maximum(position, 0))
    while position >= 0:
        q_start, q_len, k_start, k_len, _mapped, place, shares = tile_spans(
            details_ptr, position, b, spans, max_q, max_k, F
        )
        offset = k_len - q_len
        row = gl.arange(0, 64, ROWS)  # of a tile: all its heads' first tokens, then their second ones
        head_q = first_head(head, F)
        q_first, bound, list_row = row_span(m, head_q, b, q_len, lists, F)
        tokens = q_first + CID * F.SLOTS + row % F.SLOTS
        acc = gl.zeros([64, F.BLOCK_DV], gl.float32, O_LAYOUT)
        qk_scale = scale
        if F.SCALED:
            head_k = head_q // F.GROUP
            qk_scale = scale * gl.load(scales_ptr + head_k)
            v_scale = gl.load(scales_ptr + F.HEADS // F.GROUP + head_k)
        q = take_queries(queries, turn, CID, S_LAYOUT, F)
        m_i = gl.full([64], float("-inf"), gl.float32, ROWS)
        l_i = thread_sums(zeros)
        bits = 0
        if F.BITS:
            index_ptr, idx_width, bits_ptr, bit_rows, bit_groups, bit_queries = listed
            bit_row = (b * lists[1] + head_q // F.MASK_GROUP * lists[2]) // gl.maximum(lists[2], 1) * bit_rows
            bit_row += gl.minimum(tokens, q_len - 1) // bit_queries
            bits = bits_of(bits_ptr, bit_groups, index_ptr + list_row * idx_width, bit_row, F)
        extra = extra_of(extras, head_q + row // F.SLOTS, b, qk_scale, F)
        top = first + gl.maximum(count, 1) - 1  # the last key tile
        late = gl.maximum(late, 1)
        for i in range(1, late):
            acc, m_i, l_i, ks, kp, vs, vp = attend_cut(
                acc, m_i, l_i, q, keys, values, cols_s, bits, extra, top + 1 - i, ks, kp, vs, vp, zeros, tokens, offset,
                k_len, window, qk_scale, softcap, P_LAYOUT, F,
            )  # fmt: skip
        acc, p, m_i, l_i, ks, kp = cut_tile(
            acc, m_i, l_i, q, keys, cols_s, bits, extra, top + 1 - late, ks, kp, zeros, tokens, offset, k_len, window,
            qk_scale, softcap, P_LAYOUT, F,
        )  # fmt: skip
        whole = gl.maximum(count - early, late)
        words = 0
        if F.BITS:
            words = load_bits(bits, gl.maximum(top - late, 0), F)
        for i in range(late, whole):
            acc, p, m_i, l_i, words, ks, kp, vs, vp = attend(
                acc, p, m_i, l_i, words, q, keys, values, cols_s, bits, extra, top - i, ks, kp, vs, vp, zeros,
                tokens + offset, qk_scale, softcap, F,
            )  # fmt: skip
        acc = weigh(p, values, vs, vp, acc, F)
        if F.WINDOW:
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(values[2].index(vs), count=1)
            vs, vp = next_stage(vs, vp, F.V_STAGES)
            for i in range(whole, count):
                acc, m_i, l_i, ks, kp, vs, vp = attend_cut(
                    acc, m_i, l_i, q, keys, values, cols_s, bits, extra, top - i, ks, kp, vs, vp, zeros, tokens, offset,
                    k_len, window, qk_scale, softcap, P_LAYOUT, F,
                )  # fmt: skip
        if not F.Q_REGISTERS and not F.O_IN_Q:
            mbarrier.arrive(q_empty.index(CID), count=1)
        turn += 1
        # The next tile's record travels under this tile's end.
        position = receive(info, turn)
        record = read_record(record_ptr, gl.maximum(position, 0))

        l_i = row_sums(l_i, ROWS)
        inside = tokens < bound
        heads = head_q + row // F.SLOTS
        lse_at = b.to(gl.int64) * lse_stride_b + heads.to(gl.int64) * lse_stride_h + q_start + tokens
        if not F.PAGED:
            if F.SPLIT:
                leave_sums(lse_ptr, lse_at, share, lse_split_stride, m_i, l_i, inside, qk_scale)
            else:
                factor = finish_sums(lse_ptr, lse_at, sinks_ptr, heads, m_i, l_i, inside, qk_scale, F)
        if not F.WINDOW:
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(values[2].index(vs), count=1)
            vs, vp = next_stage(vs, vp, F.V_STAGES)
        if F.SCALED:
            acc = acc * v_scale
        q_start += b * o_rows
        row0 = q_first + CID * F.SLOTS
        if F.PAGED:
            # A row tile's only share is finished here; of several, numbered across the call, each leaves its sums.
            if share >= 0:
                at = (tokens - q_first) * F.PACK + row // F.SLOTS
                leave_sums(sums_ptr, at, share, lse_split_stride, m_i, l_i, inside, qk_scale)
                leave_part(o_ptr, gl.convert_layout(at, O_ROWS) * F.DV, share, o_split_stride, acc, inside, F)
                if F.MERGE:
                    merge_by_last(
                        details_ptr + place.to(gl.int64) * 8 + 7, o_ptr, sums_ptr, place, shares, lse_split_stride,
                        out, lse_ptr, lse_stride_h, sinks_ptr, (q_start + q_first, bound - q_first, head, head_q), F,
                    )  # fmt: skip
            else:
                factor = finish_sums(lse_ptr, lse_at, sinks_ptr, heads, m_i, l_i, inside, qk_scale, F)
                o = finished(acc, factor, o_desc.dtype)
                store_output(o_desc, o_s, out, o, q_start, bound, row0, head_q, CID, F)
        elif F.SPLIT:
            o_row = gl.convert_layout(q_start + tokens, O_ROWS).to(gl.int64) * (F.HEADS * F.DV)
            o_row += gl.convert_layout(heads, O_ROWS) * F.DV
            leave_part(o_ptr, o_row, share, o_split_stride, acc, inside, F)
        else:
            o = finished(acc, factor, o_desc.dtype)
            store_output(o_desc, o_s, out, o, q_start, bound, row0, head_q, CID, F)
        if F.O_IN_Q:
            mbarrier.arrive(q_empty.index(CID), count=1)
        m, head, b, share, count, first, late, early = record
    tma.store_wait(0)


@gluon.jit
def gather_sources(k_ptr, v_ptr, k_stride, v_stride, k_head, v_head, F: gl.constexpr):
    """What ``gather_rows`` needs of keys and of values, and the memory in which its threads find each other's rows."""
    rows_s = gl.allocate_shared_memory(gl.int32, [F.TILE_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return ((k_ptr, k_stride, k_head), rows_s), ((v_ptr, v_stride, v_head), rows_s)


@gluon.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, o_ptr, lse_ptr, sinks_ptr, record_ptr, counter_ptr, count_ptr, index_ptr,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    mask_stride_b, mask_stride_h, idx_width, max_q, max_k, num_tiles, q_rows, k_rows, v_rows, o_rows,
    lse_stride_b, lse_stride_h, lse_split_stride, o_split_stride, window_left, window_right, qk_scale, softcap,
    F: gl.constexpr, REGISTERS: gl.constexpr,
    table_ptr=None, details_ptr=None, num_pages=None, sums_ptr=None, scales_ptr=None,
    bits_ptr=None, bit_rows=None, bit_groups=None, bit_queries=None,
    k_ptr=None, v_ptr=None, k_stride=None, v_stride=None, k_head=None, v_head=None,
    out_ptr=None, out_stride=None, out_head=None, k_box_desc=None, v_box_desc=None,
    slopes_ptr=None, custom_ptr=None, custom_starts_ptr=None, custom_size=None,
):  # fmt: skip
    """One program a multiprocessor (or half of one): row tiles as the schedule hands them out, until none is left.

    ``CONSUMERS`` warpgroups of 64 rows make a row tile: ``PACK`` heads of a group, ``TOKENS`` query tokens each. Grid
    (programs,). ``SPLIT`` leaves unnormalised float32 sums of a share of the keys at ``o_ptr`` and ``lse_ptr``.

    ``PAGE``: row p * k_rows + i of k is token i of page p; ``table_ptr`` has the page numbers, ``details_ptr`` int32
    [tiles, 8] more of each record (see ``paged_schedule_kernel``), ``counter_ptr`` behind the counter their number. A
    share that is not negative is a place for sums in ``o_ptr``, float32 [places, o_split_stride], and ``sums_ptr``,
    float32 [places, 2, lse_split_stride]: the rows of the tile, token by token. ``MERGE``: the program that ends last
    merges them, to ``out_ptr``, whose strides count 8 elements. ``SCALED``: ``scales_ptr``, float32 [2, KV heads], has
    factors for scores and outputs. ``VARIABLE``: ``count_ptr`` has walks, ``index_ptr`` the tiles of a ``Tiling``, of
    which ``idx_width`` are in a list, or with ``ENDS`` what ``cut_ends`` makes of them; then there are tensor maps of
    boxes, too. ``BITS``: ``bits_ptr`` has words of bits, a row for ``bit_queries`` queries, ``bit_rows`` rows a list in
    groups of 16, ``bit_groups`` groups of 128 keys a row. ``ALIBI``: ``slopes_ptr`` has float32 [HEADS]. ``CUSTOM``:
    ``custom_ptr`` has ``custom_size`` bytes, a sequence's from where ``custom_starts_ptr`` says, int64.
    """
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = tile_layout(2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PANELS: gl.constexpr = F.PANELS if F.PANELS > 0 else 1
    WIDTH: gl.constexpr = 64 if F.PANELS > 0 else F.BLOCK_D
    queries = ring(dtype, F.CONSUMERS, [64, WIDTH], layout, 1, 1, PANELS)
    FILLS: gl.constexpr = 128 if F.SCATTERED else 1  # threads that gather arrive one by one
    keys = ring(dtype, F.K_STAGES, [F.TILE_N, WIDTH], layout, FILLS + 1, F.CONSUMERS, PANELS)
    values = ring(dtype, F.V_STAGES, [F.TILE_N, F.BLOCK_DV], layout, FILLS, F.CONSUMERS)
    info = ring(gl.int32, 2, [1], plain, 1, F.CONSUMERS)
    cols_s = gl.allocate_shared_memory(gl.int32, [F.K_STAGES, F.TILE_N], plain)
    if F.O_IN_Q or F.O_BARE:
        o_s = queries[0]
    else:
        o_s = gl.allocate_shared_memory(dtype, [F.CONSUMERS, 64, F.BLOCK_DV], layout)
    scattered = (0, 0)
    if F.SCATTERED:
        scattered = gather_sources(k_ptr, v_ptr, k_stride, v_stride, k_head, v_head, F)
    elif F.ENDS:
        scattered = (k_box_desc, v_box_desc)
    fence_async_shared()
    if F.PAGED:
        begin_early()
    spans = (q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr)
    window = (window_left, window_right)
    work = (
        o_desc, queries, keys, values, info, cols_s, o_s, o_ptr, lse_ptr, sinks_ptr, record_ptr, spans, max_q, max_k,
        o_rows, lse_stride_b, lse_stride_h, lse_split_stride, o_split_stride, window, qk_scale, softcap, sums_ptr,
        scales_ptr, (count_ptr, mask_stride_b, mask_stride_h),
        (index_ptr, idx_width, bits_ptr, bit_rows, bit_groups, bit_queries), details_ptr,
        (out_ptr, out_stride, out_head), (slopes_ptr, custom_ptr, custom_starts_ptr, custom_size),
    )  # fmt: skip
    loads = (
        q_desc, k_desc, v_desc, queries, keys, values, info, cols_s, record_ptr, counter_ptr, count_ptr, index_ptr,
        spans, mask_stride_b, mask_stride_h, idx_width, max_q, max_k, num_tiles, q_rows, k_rows, v_rows,
        (table_ptr, details_ptr, num_pages), scattered,
    )  # fmt: skip
    if F.CONSUMERS == 2:
        gl.warp_specialize(
            [(consumer, (0, work, F)), (consumer, (1, work, F)), (producer, (loads, F))],
            [4, F.WARPS],
            [REGISTERS, F.LOADER],
        )
    else:
        gl.warp_specialize([(consumer, (0, work, F)), (producer, (loads, F))], [F.WARPS], [F.LOADER])
