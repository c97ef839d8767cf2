"""Key tiles of the Hopper forward kernel whose rows do not lie together: which they are, and how they are brought.

Such a tile is made of boxes of ``BOX`` rows, which a tensor map copies one by one; rows of a box that are no keys load
as zeros, whatever memory holds. Two kinds of calls have them:

A paged cache ``[pages, page, heads, dim]`` is a matrix of rows to the tensor map, page p from row p * ``page_rows`` on,
and boxes are the largest power of two that divides pages and mask blocks. ``source`` is (pointer to the page numbers of
the sequence, end of its tokens that can have one, pages of the cache).

Masks of variable blocks list tiles by their first key and the one past their last, whole ones and, from an entry of
their own on, short ones; where whole ones are key tiles or more (``ENDS``), short ones are boxes, which fill the key
tiles behind those. ``source`` is (whole entries of the row tile's walk, where short ones begin, entries of a list).
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from sparseattn.kernels.hopper import async_load, box_coordinates, tile_layout, view
from sparseattn.kernels.hopper_attention import HIDDEN

# A name that changed between Triton 3.7 and 3.8.
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def tile_tokens(list_ptr, tile, entries, end, offs, F: gl.constexpr):
    """Positions in a paged sequence of rows ``offs`` of a key tile; ``HIDDEN`` where no block is listed."""
    if F.MASKED:
        if F.GATHER:
            entry = tile * (F.TILE_N // F.BLOCK_KV) + offs // F.BLOCK_KV
            block = gl.load(list_ptr + entry, mask=entry < entries, other=-1)
            inner = offs % F.BLOCK_KV
        else:
            PARTS: gl.constexpr = F.BLOCK_KV // F.TILE_N
            block = gl.load(list_ptr + tile // PARTS) + offs * 0
            inner = tile % PARTS * F.TILE_N + offs
        listed = (block >= 0) & (block <= end // F.BLOCK_KV)
        tokens = gl.where(listed, block, 0) * F.BLOCK_KV + inner
        tokens = gl.where(listed, tokens, HIDDEN)
    else:
        tokens = tile * F.TILE_N + offs
    return tokens


@gluon.jit
def tile_span(list_ptr, tile, source, offs, F: gl.constexpr):
    """Keys that rows ``offs`` of a tile of variable blocks would be, and the ends of their entries."""
    whole, short_from, width = source
    if F.GATHER:
        entry = tile * (F.TILE_N // F.BLOCK_KV) + offs // F.BLOCK_KV
        inner = offs % F.BLOCK_KV
        entry = gl.where(entry < whole, entry, entry - whole + short_from)
    else:
        PARTS: gl.constexpr = F.BLOCK_KV // F.TILE_N
        behind = tile - whole * PARTS
        entry = gl.where(behind < 0, tile // PARTS, short_from + behind * (F.TILE_N // F.BOX) + offs // F.BOX)
        inner = gl.where(behind < 0, tile % PARTS * F.TILE_N + offs, offs % F.BOX)
    first = gl.load(list_ptr + 2 * entry, mask=entry < width, other=0)
    return first + inner, gl.load(list_ptr + 2 * entry + 1, mask=entry < width, other=0)


@gluon.jit
def page_numbers(source, tokens, F: gl.constexpr):
    """Pages of token positions; negative where there is none."""
    table_ptr, end, num_pages = source
    page = gl.load(table_ptr + tokens // F.PAGE, mask=tokens < end, other=-1)
    return gl.where(page < num_pages, page, -1)


@gluon.jit
def box_columns(list_ptr, tile, entries, source, offs, F: gl.constexpr):
    """Which key each column of a key tile is; ``HIDDEN`` where there is none."""
    if F.PAGED:
        tokens = tile_tokens(list_ptr, tile, entries, source[1], offs, F)
        cols = gl.where(page_numbers(source, tokens, F) >= 0, tokens, HIDDEN)
    else:
        tokens, ends = tile_span(list_ptr, tile, source, offs, F)
        cols = gl.where(tokens < ends, tokens, HIDDEN)
    return cols


@gluon.jit
def seek_boxes(list_ptr, tile, entries, source, F: gl.constexpr):
    """What memory says of a key tile's boxes, int32 [32] of which they come first: see ``found_boxes``.

    ``SCATTERED``: of its rows, int32 [TILE_N].

    Tokens and their page numbers, or first keys and ends. Nothing is computed from what is loaded, so that loads of
    one tile travel under the work on another.
    """
    if F.SCATTERED:
        offs = gl.arange(0, F.TILE_N, gl.BlockedLayout([1], [32], [4], [0]))
    else:
        lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        offs = gl.minimum(gl.arange(0, 32, lane), F.TILE_N // F.BOX - 1) * F.BOX
    if F.PAGED:
        tokens = tile_tokens(list_ptr, tile, entries, source[1], offs, F)
        found = gl.load(source[0] + tokens // F.PAGE, mask=tokens < source[1], other=-1)
    else:
        tokens, found = tile_span(list_ptr, tile, source, offs, F)
    return tokens, found


@gluon.jit
def seek_whole(list_ptr, tile, source, F: gl.constexpr):
    """Where in its entry a key tile in one piece of ``ENDS`` begins, and the entry's first key.

    Of tiles of boxes, which lie behind, a number that nobody needs.
    """
    whole, short_from, _width = source
    PARTS: gl.constexpr = F.BLOCK_KV // F.TILE_N
    entry = gl.where(tile < whole * PARTS, tile // PARTS, short_from)
    return tile % PARTS * F.TILE_N, gl.load(list_ptr + 2 * entry)


@gluon.jit
def found_boxes(tokens, found, source, F: gl.constexpr):
    """(rows, counts) int32 [32] of the boxes that ``seek_boxes`` found: first row of a box, and keys in it.

    Rows of a cache count tokens of pages that lie side by side. ``SCATTERED``: rows of the tile, -1 for none, and
    which keys they are.
    """
    if F.PAGED:
        page = gl.where(found < source[2], found, -1)
    if F.SCATTERED:
        counts = gl.where(page >= 0, tokens, HIDDEN)
        rows = gl.where(page >= 0, page * F.PAGE + tokens % F.PAGE, -1)
    elif F.PAGED:
        counts = gl.where(page >= 0, gl.minimum(source[1] - tokens, F.BOX), 0)
        rows = gl.maximum(page, 0) * F.PAGE + gl.where(page >= 0, tokens % F.PAGE, 0)
    else:
        counts = gl.maximum(gl.minimum(found - tokens, F.BOX), 0)
        rows = gl.where(counts > 0, tokens, 0)
    return rows, counts


@gluon.jit
def key_boxes(list_ptr, tile, entries, source, F: gl.constexpr):
    """(rows, counts) int32 [32], of which a key tile's boxes come first."""
    tokens, found = seek_boxes(list_ptr, tile, entries, source, F)
    return found_boxes(tokens, found, source, F)


@gluon.jit
def load_key_boxes(desc, start, rows, counts, head, col, full, tile, F: gl.constexpr):
    """Fill a tile with the boxes of ``key_boxes``, from column ``col`` on; they arrive at ``full``.

    ``start`` is how many rows a page has from the one before, or where the sequence's rows begin.
    """
    if F.PAGED:
        rows = rows // F.PAGE * start + rows % F.PAGE
    else:
        rows = rows + start
    lanes = gl.arange(0, 32, rows.type.layout)
    COUNT: gl.constexpr = F.TILE_N // F.BOX
    WIDTH: gl.constexpr = desc.block_type.shape[4]
    PANELS: gl.constexpr = tile.shape[1] // WIDTH
    boxes = view(tile, desc.dtype, [PANELS * COUNT, F.BOX, WIDTH], tile_layout(2, 8 * F.KEY_BYTES))
    for i in gl.static_range(COUNT):
        row = gl.sum(gl.where(lanes == i, rows, 0), 0)
        count = gl.sum(gl.where(lanes == i, counts, 0), 0)
        for panel in gl.static_range(PANELS):
            box = view(boxes.index(panel * COUNT + i), desc.dtype, desc.block_type.shape, desc.layout)
            async_load(desc, box_coordinates(row, count, 0, head, col + panel * WIDTH), full, box)


@gluon.jit
def gather_rows(source, head, rows, page_rows, rows_s, full, tile, dtype: gl.constexpr, F: gl.constexpr):
    """Fill a tile with the ``rows`` of ``found_boxes``, zeros where there is none; threads arrive at ``full``.

    ``source`` is (pointer, strides of rows and heads in 16 bytes), and of float8 rows how many columns they have;
    ``page_rows`` is how many rows a page has from the one before. Four warps copy 16 bytes a thread, 64 rows by 128
    bytes at a time.
    """
    UNIT: gl.constexpr = 16 // F.KEY_BYTES
    WIDTH: gl.constexpr = 8 * UNIT
    LANES: gl.constexpr = gl.BlockedLayout([1, UNIT], [4, 8], [4, 1], [1, 0])
    COUNT: gl.constexpr = F.TILE_N // 64
    PANELS: gl.constexpr = tile.shape[1] // WIDTH
    boxes = view(tile, dtype, [PANELS * COUNT, 64, WIDTH], tile_layout(2, 8 * F.KEY_BYTES))
    ptr = source[0] + head.to(gl.int64) * (source[2] * UNIT)
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, LANES))
    rows_s.store(rows)
    for i in gl.static_range(COUNT):
        row = rows_s.slice(i * 64, 64).load(gl.SliceLayout(1, LANES))
        there = (row >= 0)[:, None]
        row = gl.maximum(row, 0)
        row = row // F.PAGE * page_rows + row % F.PAGE
        ptrs = ptr + (row.to(gl.int64) * (source[1] * UNIT))[:, None] + cols[None, :]
        for panel in gl.static_range(PANELS):
            held = there & (cols < (source[3] - panel * WIDTH if F.KEY_BYTES == 1 else WIDTH))[None, :]
            copy_rows(boxes.index(panel * COUNT + i), ptrs + panel * WIDTH, mask=held)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def fetch_page(rows_of, token, page, end, F: gl.constexpr):
    """Have L2 fetch a key tile of a latent cache that lies in one page.

    Where latent and rotary parts lie in the same rows, all of these at once; nothing where rows lie far apart.
    """
    k_ptr, k_rope_ptr, k_rows, k_rope_rows, k_stride, k_rope_stride, fetched = rows_of
    count = gl.where(page >= 0, gl.minimum(end - token, F.TILE_N), 0) * fetched
    inner = gl.where(page >= 0, token % F.PAGE, 0)
    page = gl.maximum(page, 0).to(gl.int64)
    k_at = k_ptr + (page * k_rows + inner) * (k_stride * 8)
    rope_at = k_rope_ptr + (page * k_rope_rows + inner) * (k_rope_stride * 8)
    k_bytes = gl.where((count > 0) & (k_stride * 8 <= 2 * F.DV), (count - 1) * (k_stride * 16) + 2 * F.DV, 0)
    rope_bytes = gl.where((count > 0) & (k_rope_stride == 8), count * 128, 0)
    gl.inline_asm_elementwise(
        """{
            .reg .pred p, q, r; .reg .b32 lane;
            mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0;
            setp.gt.and.s32 q, $3, 0, p; setp.gt.and.s32 r, $4, 0, p;
            @q cp.async.bulk.prefetch.L2.global [$1], $3;
            @r cp.async.bulk.prefetch.L2.global [$2], $4;
            mov.u32 $0, 0; }""",
        "=r,l,l,r,r", [k_at, rope_at, k_bytes, rope_bytes], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
