"""The warp of the Hopper forward kernel that loads: it claims row tiles and brings their queries, keys and values."""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparseattn.kernels.hopper import load_boxes, load_rows, next_stage, post, read_record
from sparseattn.kernels.hopper_attention import HIDDEN
from sparseattn.kernels.hopper_boxes import (
    box_columns,
    found_boxes,
    gather_rows,
    key_boxes,
    load_key_boxes,
    seek_boxes,
    seek_whole,
)
from sparseattn.kernels.hopper_records import first_head, row_span, tile_spans, walk_of


@gluon.jit
def seek(list_ptr, tile, entries, pages, F: gl.constexpr):
    """What memory says of where a key tile lies, for ``key_row``: asked for a tile ahead, as the answer takes time."""
    if F.ENDS:
        where, found = seek_whole(list_ptr, tile, pages, F)
    elif F.BOXED:
        where, found = seek_boxes(list_ptr, tile, entries, pages, F)
    else:
        where = tile * F.TILE_N
        found = 0
        if F.MASKED and not F.GATHER:
            PARTS: gl.constexpr = F.BLOCK_KV // F.TILE_N
            where = tile % PARTS * F.TILE_N
            found = gl.load(list_ptr + tile // PARTS)
    return where, found


@gluon.jit
def key_row(where, found, pages, F: gl.constexpr):
    """First key of a key tile: of a listed block's share, or of all keys'.

    In a paged cache, and of variable blocks, the rows of its boxes and how many of each are keys; with ``ENDS`` the
    first key of a tile in one piece, and nothing that says anything of others.
    """
    row = where
    held = 0
    if F.ENDS:
        row = found + where
    elif F.BOXED:
        row, held = found_boxes(where, found, pages, F)
    elif F.MASKED and not F.GATHER:
        row = found * F.BLOCK_KV + where
    return row, held


@gluon.jit
def load_keys(
    desc, scattered, keys, stage, phase, start, length, list_ptr, tile, row, held, entries, head,
    STAGES: gl.constexpr, F: gl.constexpr, PANELS: gl.constexpr = 1,
):  # fmt: skip
    """Bring key tile ``tile`` (or its values), ``PANELS`` tiles of memory, into the ring's next free stage.

    ``scattered`` is what ``gather_rows`` needs; with ``ENDS``, the tensor map of boxes and what ``key_boxes`` needs.
    """
    tiles, full, empty = keys
    mbarrier.wait(empty.index(stage), phase)
    full = full.index(stage)
    if not F.SCATTERED:
        mbarrier.expect(full, F.TILE_N * PANELS * tiles.shape[2] * F.KEY_BYTES)
    for panel in gl.static_range(PANELS):
        buffer = tiles.index(stage * PANELS + panel)
        if F.SCATTERED:
            source, rows_s = scattered
            gather_rows(source, head, row, start, rows_s, full, buffer, desc.dtype, F)
        elif F.ENDS:
            box_desc, source = scattered
            if tile < entries:
                load_rows(desc, start, length, row, head, full, buffer, panel * 64)
            else:
                rows, counts = key_boxes(list_ptr, tile, entries, source, F)
                load_key_boxes(box_desc, start, rows, counts, head, panel * 64, full, buffer, F)
        elif F.BOXED:
            load_key_boxes(desc, start, row, held, head, panel * 64, full, buffer, F)
        elif F.GATHER:
            first = tile * (F.TILE_N // F.BLOCK_KV)
            load_boxes(desc, start, length, list_ptr, first, entries - 1, head, panel * 64, full, buffer, F.BLOCK_KV)
        else:
            load_rows(desc, start, length, row, head, full, buffer, panel * 64)
    return next_stage(stage, phase, STAGES)


@gluon.jit
def post_columns(cols_s, full, stage, list_ptr, tile, row, held, entries, nothing, pages, F: gl.constexpr):
    """Say which key each column of a key tile is; columns without one are hidden from every row."""
    lane: gl.constexpr = gl.BlockedLayout([F.TILE_N // 32 if F.WARPS == 1 else 1], [32], [F.WARPS], [0])
    offs = gl.arange(0, F.TILE_N, lane)
    if F.SCATTERED:
        cols = held
    elif F.ENDS:
        cols = row + offs
        if tile >= entries:
            cols = box_columns(list_ptr, tile, entries, pages, offs, F)
    elif F.BOXED:
        cols = box_columns(list_ptr, tile, entries, pages, offs, F)
    elif F.GATHER:
        entry = tile * (F.TILE_N // F.BLOCK_KV) + offs // F.BLOCK_KV
        cols = gl.load(list_ptr + gl.minimum(entry, entries - 1)) * F.BLOCK_KV + offs % F.BLOCK_KV
        cols = gl.where(entry < entries, cols, HIDDEN)
    else:
        cols = row + offs
    cols_s.index(stage).store(gl.where(nothing, HIDDEN, cols))
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def producer(call, F: gl.constexpr):
    """The warp that loads: per row tile its queries, its keys one tile ahead of its values."""
    (
        q_desc, k_desc, v_desc, queries, keys, values, info, cols_s, record_ptr, counter_ptr, count_ptr, index_ptr,
        spans, mask_stride_b, mask_stride_h, idx_width, max_q, max_k, num_tiles, q_rows, k_rows, v_rows, cache,
        scattered,
    ) = call  # fmt: skip
    table_ptr, details_ptr, num_pages = cache
    QK_PANELS: gl.constexpr = F.PANELS if F.PANELS > 0 else 1
    if F.PAGED:
        num_tiles = gl.load(counter_ptr + 1)
    q_s, q_full, q_empty = queries
    ks = 0
    kp = 1
    vs = 0
    vp = 1
    turn = 0
    position = gl.program_id(0)
    m, head, b, share, count, first, late, early = read_record(record_ptr, position)
    while position < num_tiles:
        claimed = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if count >= 0:
            post(info, turn, position, F.WARPS)
            q_start, q_len, k_start, k_len, mapped, _place, _shares = tile_spans(
                details_ptr, position, b, spans, max_q, max_k, F
            )
            q_start += b * q_rows
            k_row0 = k_start + b * k_rows
            v_row0 = k_start + b * v_rows
            head_q = first_head(head, F)
            head_k = head_q // F.GROUP
            entries = 1
            list_ptr = index_ptr
            lists = (count_ptr, mask_stride_b, mask_stride_h)
            q_first, bound, list_row = row_span(m, head_q, b, q_len, lists, F)
            if F.VARIABLE:
                list_ptr = index_ptr + list_row * idx_width * 2
            elif F.MASKED:
                list_ptr = index_ptr + list_row * idx_width
                if F.GATHER:
                    entries = gl.maximum(gl.load(count_ptr + list_row), 1)
                    if F.PAGED:  # counts of page lists are anybody's
                        entries = gl.minimum(entries, idx_width)
            # A row tile without keys still has one key tile: no rows of it exist, so it loads zeros.
            nothing = count == 0
            if nothing:
                k_len = 0
            pages = cache
            k_from, v_from = scattered
            if F.PAGED:
                k_row0 = k_rows
                v_row0 = v_rows
                pages = (table_ptr + k_start, gl.where(nothing, 0, mapped), num_pages)
            if F.VARIABLE:
                walk = walk_of(m, head_q, b, lists, F)
                pages = (gl.load(walk + 3), gl.load(walk + 6), gl.where(nothing, 0, idx_width))
                if F.ENDS:
                    entries = pages[0] * (F.BLOCK_KV // F.TILE_N)
                    k_from, v_from = (scattered[0], pages), (scattered[1], pages)
            last = gl.maximum(count, 1) - 1
            tile = first + last
            where, found = seek(list_ptr, tile, entries, pages, F)
            row, held = key_row(where, found, pages, F)
            where, found = seek(list_ptr, gl.maximum(tile - 1, first), entries, pages, F)
            if not F.BOXED or F.ENDS:
                row = gl.where(nothing, 0, row)
            stage = ks
            ks, kp = load_keys(
                k_desc, k_from, keys, ks, kp, k_row0, k_len, list_ptr, tile, row, held, entries, head_k, F.K_STAGES,
                F, QK_PANELS,
            )  # fmt: skip
            post_columns(cols_s, keys[1], stage, list_ptr, tile, row, held, entries, nothing, pages, F)
            for c in gl.static_range(0 if F.FETCHED else F.CONSUMERS):
                mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes * QK_PANELS)
                for panel in gl.static_range(QK_PANELS):
                    buffer = q_s.index(c * QK_PANELS + panel)
                    load_rows(
                        q_desc, q_start, bound, q_first + c * F.SLOTS, head_q, q_full.index(c), buffer, panel * 64
                    )
            turn += 1
            for i in range(0, last):
                above = row
                above_held = held
                tile -= 1
                row, held = key_row(where, found, pages, F)
                where, found = seek(list_ptr, gl.maximum(tile - 1, first), entries, pages, F)
                stage = ks
                ks, kp = load_keys(
                    k_desc, k_from, keys, ks, kp, k_row0, k_len, list_ptr, tile, row, held, entries, head_k,
                    F.K_STAGES, F, QK_PANELS,
                )  # fmt: skip
                post_columns(cols_s, keys[1], stage, list_ptr, tile, row, held, entries, nothing, pages, F)
                vs, vp = load_keys(
                    v_desc, v_from, values, vs, vp, v_row0, k_len, list_ptr, tile + 1, above, above_held, entries,
                    head_k, F.V_STAGES, F,
                )  # fmt: skip
            vs, vp = load_keys(
                v_desc, v_from, values, vs, vp, v_row0, k_len, list_ptr, tile, row, held, entries, head_k,
                F.V_STAGES, F,
            )  # fmt: skip
        if claimed == num_tiles - 1:  # as many claims as tiles: the last one leaves the counter as it was
            gl.store(counter_ptr, 0)
        position = claimed + gl.num_programs(0)
        m, head, b, share, count, first, late, early = read_record(record_ptr, gl.minimum(position, num_tiles - 1))
    post(info, turn, -1, F.WARPS)
