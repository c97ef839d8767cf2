"""Where the pieces and tiles of a mask of variable blocks lie: device functions over ``masks.tilings.Tiling``."""

import triton
import triton.language as tl


@triton.jit
def piece_rows(piece_ptr, head, num_pieces, tile, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The rows of the ``tile``-th tile of ``TILE`` rows, of pieces of up to ``BLOCK`` (a multiple) each.

    Returns:
        Its first row, the first row past its piece (not above the former: no row), and the piece's row of blocks.
    """
    entry = piece_ptr + (head * num_pieces + tile // (BLOCK // TILE)) * 3
    return tl.load(entry) + tile % (BLOCK // TILE) * TILE, tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def _below(ptr, count, limit):
    """How many of ``count`` ascending numbers, two int32 apart, lie below ``limit``."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(ptr + 2 * middle) < limit
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def tiles_between(count_ptr, tile_ptr, lo, hi, CUT: tl.constexpr):
    """``begin`` and ``end`` of the tiles of one kind in a row of blocks; if ``CUT``, those that meet ``lo .. hi``."""
    begin = tl.full((), 0, tl.int32)
    end = tl.load(count_ptr)
    if CUT:
        end = _below(tile_ptr, end, hi)
        begin = _below(tile_ptr + 1, end, lo + 1)
    return begin, end


@triton.jit
def tile_first(tile_ptr, i, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """First row of the i-th tile of ``TILE`` rows, of whole tiles of ``BLOCK`` (a multiple) each."""
    return tl.load(tile_ptr + 2 * (i // (BLOCK // TILE))) + i % (BLOCK // TILE) * TILE
