"""Key tiles of the Hopper forward kernel whose rows do not lie together: which they are, and how they are brought.

Such a tile is made of boxes of ``BOX`` rows, which a tensor map copies one by one; rows of a box that are no keys load
as zeros, whatever memory holds. Two kinds of calls have them:

A paged cache ``[pages, page, heads, dim]`` is a matrix of rows to the tensor map, page p from row p * ``page_rows`` on,
and boxes are the largest power of two that divides pages and mask blocks. ``source`` is (pointer to the page numbers of
the sequence, end of its tokens that can have one, pages of the cache).

Masks of variable blocks list tiles by their first key and the one past their last, whole ones and, from an entry of
their own on, short ones. ``source`` is (whole tiles of the row tile's walk, where short ones begin, entries of a list).
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from sparseattn.kernels.hopper import async_load, box_coordinates, tile_layout, view
from sparseattn.kernels.hopper_attention import HIDDEN


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
    else:
        PARTS: gl.constexpr = F.BLOCK_KV // F.TILE_N
        entry = tile // PARTS + offs * 0
        inner = tile % PARTS * F.TILE_N + offs
    entry = gl.where(entry < whole, entry, entry - whole + short_from)
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
def key_boxes(list_ptr, tile, entries, source, F: gl.constexpr):
    """(rows, counts) int32 [32], of which a key tile's boxes come first: first row of a box, and keys in it.

    Rows of a cache count tokens of pages that lie side by side.
    """
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    offs = gl.minimum(gl.arange(0, 32, lane), F.TILE_N // F.BOX - 1) * F.BOX
    if F.PAGED:
        tokens = tile_tokens(list_ptr, tile, entries, source[1], offs, F)
        page = page_numbers(source, tokens, F)
        counts = gl.where(page >= 0, gl.minimum(source[1] - tokens, F.BOX), 0)
        rows = gl.maximum(page, 0) * F.PAGE + gl.where(page >= 0, tokens % F.PAGE, 0)
    else:
        tokens, ends = tile_span(list_ptr, tile, source, offs, F)
        counts = gl.maximum(gl.minimum(ends - tokens, F.BOX), 0)
        rows = gl.where(counts > 0, tokens, 0)
    return rows, counts


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
    PANELS: gl.constexpr = tile.shape[1] // desc.block_type.shape[4]
    boxes = view(tile, desc.dtype, [PANELS * COUNT, F.BOX, desc.block_type.shape[4]], tile_layout(2))
    for i in gl.static_range(COUNT):
        row = gl.sum(gl.where(lanes == i, rows, 0), 0)
        count = gl.sum(gl.where(lanes == i, counts, 0), 0)
        for panel in gl.static_range(PANELS):
            box = view(boxes.index(panel * COUNT + i), desc.dtype, desc.block_type.shape, desc.layout)
            async_load(desc, box_coordinates(row, count, 0, head, col + panel * 64), full, box)
