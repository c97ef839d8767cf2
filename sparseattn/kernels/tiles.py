"""Where the tiles of a block list begin, and how their rows are loaded."""

import triton
import triton.language as tl

from sparseattn.kernels.attention import key_range

# Arguments that change with the prompt: specialising on their divisibility would compile a kernel per length.
LENGTHS = ["max_q", "max_k", "mask_stride_b", "mask_stride_h", "idx_width", "lse_stride_b", "lse_stride_h"]
WINDOW = ["window_left", "window_right"]

SEQUENCES: tl.constexpr = tl.constexpr(128)  # of a batch, looked at together


@triton.jit
def slot_tile(start_ptr, slot, batch, PACK: tl.constexpr, TILE: tl.constexpr):
    """Sequence of a slot of packed rows, ``PACK`` a token, and which of its tiles of ``TILE`` rows it is.

    Sequence b owns the slots from ``start[b] * PACK // TILE + b`` on: always enough for its rows, and never those of
    another, ``rows // TILE + batch`` in all. A tile may lie past its sequence's end.
    """
    b = slot * 0 - 1
    for c in range(0, batch, SEQUENCES):
        offs = c + tl.arange(0, SEQUENCES)
        first = tl.load(start_ptr + offs, mask=offs < batch, other=0) * PACK // TILE + offs
        b += tl.sum(((first <= slot) & (offs < batch)).to(tl.int32), 0)
    b = tl.maximum(b, 0)
    return b, tl.maximum(slot - (tl.load(start_ptr + b) * PACK // TILE + b), 0)


@triton.jit
def list_length(count_ptr, list_ptr):
    """Entries of a block list.

    The first entry is asked for together with the count, so that the list travels from memory before its length is
    known; its sign, which only an empty list's undefined entry can set, keeps the load alive and the length at 0.
    """
    return tl.minimum(tl.load(count_ptr), tl.load(list_ptr) | 0x7FFFFFFF)


@triton.jit
def key_tiles(
    count_ptr, list_ptr, first, last, offset, k_len, window_left, window_right,
    BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The key tiles of query rows ``first..last``: their list and its tiles, or of all keys those that some row sees.

    Returns:
        ``list_ptr``, and ``begin`` and ``end``, tile numbers for ``tile_start``.
    """
    if MASKED:
        begin = tl.full((), 0, tl.int32)
        end = list_length(count_ptr, list_ptr) * (BLOCK // TILE)
    else:
        key_lo, key_hi = key_range(first, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
        begin = key_lo // TILE
        end = tl.cdiv(key_hi, TILE)
    return list_ptr, begin, end


@triton.jit
def tile_start(list_ptr, i, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """First row of the i-th tile: of a block list whose blocks hold ``BLOCK // TILE`` tiles each, or of all rows."""
    if MASKED:
        first = tl.load(list_ptr + i // (BLOCK // TILE)) * BLOCK + (i % (BLOCK // TILE)) * TILE
    else:
        first = i * TILE
    return first


@triton.jit
def load_rows(
    base, first, count, stride_s, stride_d,
    TILE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Load rows ``first .. first + TILE`` of a [rows, D] matrix; 0 past column ``D`` and, if asked, row ``count``."""
    offs = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    if WIDE:
        base += first.to(tl.int64) * stride_s
        ptrs = base + offs[:, None] * stride_s + offs_d[None, :] * stride_d
    else:
        ptrs = base + (first + offs)[:, None] * stride_s + offs_d[None, :] * stride_d
    if BOUNDED:
        rows = tl.load(ptrs, mask=(first + offs < count)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        rows = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    else:
        rows = tl.load(ptrs)
    return rows


@triton.jit
def whole_tiles(
    list_ptr, begin, end, length, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr
):
    """Where in ``begin .. end`` the tiles begin that may reach past row ``length`` and need bounded loads.

    Lists ascend, so only the last block of an even batch can be cut short; a ragged batch bounds every load.
    """
    if RAGGED:
        whole = begin
    elif MASKED:
        whole = end
        if (length % BLOCK != 0) & (end > begin):  # a block cut short may end in tiles that lie past it
            entry = (end - 1) // (BLOCK // TILE)
            first = tl.load(list_ptr + entry) * BLOCK
            whole = entry * (BLOCK // TILE) + tl.maximum(length - first, 0) // TILE
            whole = tl.maximum(tl.minimum(whole, end), begin)
    else:
        whole = tl.maximum(tl.minimum(length // TILE, end), begin)
    return whole
