"""Keys in pages for the Hopper forward kernel: which rows of a cache a key tile is, and how they are brought together.

A cache ``[pages, page, heads, dim]`` is a matrix of rows to the tensor map, page p from row p * ``page_rows`` on. A key
tile is made of boxes of ``BOX`` rows, the largest power of two that divides pages and mask blocks. Positions without a
page, and rows that the sequence does not own, load as zeros whatever memory holds.

``pages`` is (pointer to the page numbers of the sequence, end of its tokens that can have one, pages of the cache).
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from sparseattn.kernels.hopper import async_load, box_coordinates, tile_layout, view
from sparseattn.kernels.hopper_attention import HIDDEN


@gluon.jit
def tile_tokens(list_ptr, tile, entries, end, offs, F: gl.constexpr):
    """Positions in the sequence of rows ``offs`` of a key tile; ``HIDDEN`` where no block before ``end`` is listed."""
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
def page_numbers(pages, tokens, F: gl.constexpr):
    """Pages of token positions; -1 where there is none."""
    table_ptr, end, num_pages = pages
    page = gl.load(table_ptr + tokens // F.PAGE, mask=tokens < end, other=-1)
    return gl.where(page < num_pages, page, -1)


@gluon.jit
def page_columns(list_ptr, tile, entries, pages, offs, F: gl.constexpr):
    """Which key each column of a key tile is; ``HIDDEN`` where there is none."""
    tokens = tile_tokens(list_ptr, tile, entries, pages[1], offs, F)
    return gl.where(page_numbers(pages, tokens, F) >= 0, tokens, HIDDEN)


@gluon.jit
def key_boxes(list_ptr, tile, entries, pages, F: gl.constexpr):
    """(rows, counts) int32 [32], of which a key tile's boxes come first.

    Rows count tokens of pages that lie side by side; counts, how many of a box are the sequence's, 0 without a page.
    """
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    offs = gl.minimum(gl.arange(0, 32, lane), F.TILE_N // F.BOX - 1) * F.BOX
    tokens = tile_tokens(list_ptr, tile, entries, pages[1], offs, F)
    page = page_numbers(pages, tokens, F)
    counts = gl.where(page >= 0, gl.minimum(pages[1] - tokens, F.BOX), 0)
    return gl.maximum(page, 0) * F.PAGE + gl.where(page >= 0, tokens % F.PAGE, 0), counts


@gluon.jit
def load_pages(desc, page_rows, rows, counts, head, full, tile, F: gl.constexpr):
    """Fill a tile with the boxes of ``key_boxes``; they arrive at ``full``."""
    rows = rows // F.PAGE * page_rows + rows % F.PAGE
    lanes = gl.arange(0, 32, rows.type.layout)
    COUNT: gl.constexpr = F.TILE_N // F.BOX
    PANELS: gl.constexpr = tile.shape[1] // desc.block_type.shape[4]
    boxes = view(tile, desc.dtype, [PANELS * COUNT, F.BOX, desc.block_type.shape[4]], tile_layout(2))
    for i in gl.static_range(COUNT):
        row = gl.sum(gl.where(lanes == i, rows, 0), 0)
        count = gl.sum(gl.where(lanes == i, counts, 0), 0)
        for panel in gl.static_range(PANELS):
            box = view(boxes.index(panel * COUNT + i), desc.dtype, desc.block_type.shape, desc.layout)
            async_load(desc, box_coordinates(row, count, 0, head, panel * 64), full, box)
