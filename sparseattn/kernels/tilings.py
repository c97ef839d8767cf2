"""Where the pieces and tiles of a mask of variable blocks lie: device functions over ``masks.tilings.Tiling``.

And a kernel that cuts them, in the place of the sixty operators of ``masks.tilings.make_tiling``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch, repeatedly
from sparseattn.kernels.offline import offline_case
from sparseattn.kernels.usual import empty

_COLUMNS = 64
_TILES = 8


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


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _size(size_ptr, stride, at, count):
    """The size of blocks ``at``, none outside of ``0 .. count``."""
    return tl.maximum(tl.load(size_ptr + at * stride, mask=(at >= 0) & (at < count), other=0), 0)


@triton.jit
def _spans(size_ptr, stride, at, count, before):
    """Tokens before blocks ``at``, which come after ``before``, and up to their ends, by their sizes; and of them all.

    Blocks from ``count`` on have no tokens.
    """
    size = _size(size_ptr, stride, at, count).to(tl.int64)
    last = before + tl.cumsum(size, 0)
    return last - size, last, before + tl.sum(size, 0)


@triton.jit
def _chosen(block_ptr, stride, at, count, empty):
    """Whether blocks are selected, or have no tokens: those part nothing."""
    inside = (at >= 0) & (at < count)
    return inside & (empty | (tl.load(block_ptr + at * stride, mask=inside, other=0).to(tl.int32) != 0))


@triton.jit
def _write_pieces(piece_ptr, size_ptr, stride, rows, pieces, length, size, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """The pieces of a head's rows of blocks, the tokens past the last among them."""
    before = tl.zeros([], tl.int64)
    done = rows * 0
    for base in range(0, rows + 1, COLUMNS):
        row = base + tl.arange(0, COLUMNS)
        start, last, before = _spans(size_ptr, stride, row, rows, before)
        start = tl.minimum(start, length).to(tl.int32)
        end = tl.where(row == rows, length, tl.minimum(last, length).to(tl.int32))
        count = tl.where(row <= rows, tl.cdiv(end - start, size), 0)
        place = done + tl.cumsum(count, 0) - count
        done += tl.sum(count, 0)
        for k in range(0, tl.max(count, 0), TILES):
            number = k + tl.arange(0, TILES)
            used = (number[None, :] < count[:, None]) & (place[:, None] + number[None, :] < pieces)
            first = start[:, None] + number[None, :] * size
            target = piece_ptr + (place[:, None] + number[None, :]) * 3
            tl.store(target, first, mask=used)
            tl.store(target + 1, tl.minimum(first + size, end[:, None]), mask=used)
            tl.store(target + 2, first * 0 + row[:, None], mask=used)
    for base in range(done, pieces, COLUMNS):
        number = base + tl.arange(0, COLUMNS)
        tl.store(piece_ptr + number * 3, number * 0, mask=number < pieces)
        tl.store(piece_ptr + number * 3 + 1, number * 0, mask=number < pieces)
        tl.store(piece_ptr + number * 3 + 2, number * 0 + rows, mask=number < pieces)


@triton.jit
def _write_tiles(
    count_ptr, tile_ptr, block_ptr, block_stride, size_ptr, size_stride, cols, whole_slots, slots, length, size,
    COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The tiles of one row of ``cols`` blocks, which selects nothing if there are none; zeros past them."""
    before = tl.zeros([], tl.int64)
    wholes = cols * 0
    shorts = cols * 0
    run = cols * 0
    for base in range(0, cols, COLUMNS):
        at = base + tl.arange(0, COLUMNS)
        begin, last, before = _spans(size_ptr, size_stride, at, cols, before)
        start, end = tl.minimum(begin, length), tl.minimum(last, length)
        chosen = _chosen(block_ptr, block_stride, at, cols, start == end)
        empty = tl.minimum(begin - _size(size_ptr, size_stride, at - 1, cols), length) == start
        opens = chosen & ~_chosen(block_ptr, block_stride, at - 1, cols, empty)
        empty = tl.minimum(last + _size(size_ptr, size_stride, at + 1, cols), length) == end
        closes = chosen & ~_chosen(block_ptr, block_stride, at + 1, cols, empty)
        start, end = start.to(tl.int32), end.to(tl.int32)
        first = tl.maximum(tl.associative_scan(tl.where(opens, start, 0), 0, _larger), run)
        run = tl.max(first, 0)
        whole = tl.where(closes, (end - first) // size, 0)
        rest = first + whole * size
        short = (closes & (rest < end)).to(tl.int32)
        place = wholes + tl.cumsum(whole, 0) - whole
        for k in range(0, tl.max(whole, 0), TILES):
            number = k + tl.arange(0, TILES)
            used = (number[None, :] < whole[:, None]) & (place[:, None] + number[None, :] < whole_slots)
            token = first[:, None] + number[None, :] * size
            target = tile_ptr + (place[:, None] + number[None, :]) * 2
            tl.store(target, token, mask=used)
            tl.store(target + 1, token + size, mask=used)
        target = tile_ptr + (whole_slots + shorts + tl.cumsum(short, 0) - short) * 2
        tl.store(target, rest, mask=short != 0)
        tl.store(target + 1, end, mask=short != 0)
        wholes += tl.sum(whole, 0)
        shorts += tl.sum(short, 0)
    tl.store(count_ptr, wholes)
    tl.store(count_ptr + 1, shorts)
    for base in range(2 * wholes, 2 * whole_slots, 2 * COLUMNS):
        entry = base + tl.arange(0, 2 * COLUMNS)
        tl.store(tile_ptr + entry, entry * 0, mask=entry < 2 * whole_slots)
    for base in range(2 * (whole_slots + shorts), 2 * slots, 2 * COLUMNS):
        entry = base + tl.arange(0, 2 * COLUMNS)
        tl.store(tile_ptr + entry, entry * 0, mask=entry < 2 * slots)


@triton.jit(do_not_specialize=["rows", "cols", "pieces", "slots", "length_q", "length_k", "size_q", "size_k"])
def tiling_kernel(
    block_ptr, row_size_ptr, col_size_ptr, piece_ptr, count_ptr, tile_ptr, block_stride, row_stride, col_stride, rows,
    cols, pieces, slots, length_q, length_k, size_q, size_k, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: the tiles of a row of blocks, or all pieces of a head. Grid (rows + 2, heads, batch).

    Writes ``Tiling``'s tensors: ``pieces`` [heads, pieces, 3], ``counts`` [batch, heads, rows + 1, 2] and ``tiles``
    [batch, heads, rows + 1, slots, 2]. Strides: of blocks by batch, head, row and column, of sizes by head and block.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    if row > rows:
        if batch == 0:
            _write_pieces(
                piece_ptr + head * pieces * 3, row_size_ptr + head * row_stride[0], row_stride[1], rows, pieces,
                length_q, size_q, COLUMNS, TILES,
            )  # fmt: skip
    else:
        block = block_ptr + batch.to(tl.int64) * block_stride[0] + head.to(tl.int64) * block_stride[1]
        block += row.to(tl.int64) * block_stride[2]
        entry = (batch.to(tl.int64) * tl.num_programs(1) + head) * (rows + 1) + row
        _write_tiles(
            count_ptr + entry * 2, tile_ptr + entry * slots * 2, block, block_stride[3],
            col_size_ptr + head * col_stride[0], col_stride[1], tl.where(row == rows, 0, cols), length_k // size_k,
            slots, length_k, size_k, COLUMNS, TILES,
        )  # fmt: skip


def cut_tiles(
    blocks: Tensor, row_sizes: Tensor, col_sizes: Tensor, seq_lens: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``pieces``, ``counts`` and ``tiles`` of ``masks.tilings.make_tiling``, whose arguments these are; one launch."""
    batch, heads, rows, cols = blocks.shape
    (length_q, length_k), (size_q, size_k) = seq_lens, size
    number = min(length_q, (length_q + (rows + 1) * (size_q - 1)) // size_q)
    slots = length_k // size_k + (cols + 1) // 2
    pieces, counts, tiles = (
        empty(shape, torch.int32, blocks.device)
        for shape in ((heads, number, 3), (batch, heads, rows + 1, 2), (batch, heads, rows + 1, slots, 2))
    )

    def call(
        blocks: Tensor, row_sizes: Tensor, col_sizes: Tensor, pieces: Tensor, counts: Tensor, tiles: Tensor
    ) -> None:
        launch(
            tiling_kernel, (rows + 2, heads, batch),
            blocks, row_sizes, col_sizes, pieces, counts, tiles, blocks.stride(), row_sizes.stride(),
            col_sizes.stride(), rows, cols, number, slots, length_q, length_k, size_q, size_k,
            COLUMNS=_COLUMNS, TILES=_TILES, num_warps=2, **LAUNCH,
        )  # fmt: skip

    repeatedly(
        call, ("tiling", seq_lens, size), blocks=blocks, row_sizes=row_sizes, col_sizes=col_sizes, pieces=pieces,
        counts=counts, tiles=tiles,
    )  # fmt: skip
    return pieces, counts, tiles


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    constants = {"COLUMNS": _COLUMNS, "TILES": _TILES}
    types = {
        "block_ptr": "*i1", "block_stride": ("i32",) * 4, "row_stride": ("i32",) * 2, "col_stride": ("i32",) * 2
    }  # fmt: skip
    return [("tiling", *offline_case(tiling_kernel, constants, types), 2, 1)]
