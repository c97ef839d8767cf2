"""Patterns of small blocks as bits: which keys every row of blocks lists, and which tiles of keys are worth a look.

A few queries that share a list are too few for the tensor cores, and every key is fetched for them alone. Neighbours'
lists have most keys in common once they are dense: 128 queries then read every tile of 128 keys that one of them
lists, once, and bits say who sees what. That is the same work at any density, so sparse patterns stay lists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.offline import offline_case
from sparseattn.masks.lists import compact

# Queries and keys of a tile.
TILE = 128
# Groups of 128 keys that a program looks at, and groups of 16 rows at a time.
_GROUPS = 16
_ROWS = 2


class RowBits(NamedTuple):
    """A pattern as bits.

    Attributes:
        words: int32 [B|1, H, ceil(MB / 16), W, 16, 4], W = ceil(N / 128); bit j % 32 of word [r // 16, j // 128,
            r % 16, j % 128 // 32] is set where row of blocks r lists key j.
        counts: int32 [B|1, H, ceil(M / 128)], of how many tiles of 128 keys some of 128 queries list one.
        tiles: int32 [B|1, H, ceil(M / 128), W], which, ascending.
        keys: bool [B|1, H, N], the keys that any query lists.
    """

    words: Tensor
    counts: Tensor
    tiles: Tensor
    keys: Tensor


@triton.jit
def _either(x, y):
    return x | y


@triton.jit(do_not_specialize=["row_blocks", "width", "num_blocks", "len_k", "nnz"])
def bits_kernel(
    word_ptr, bound_ptr, index_ptr, row_blocks, width, num_blocks, len_k, nnz, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: sets the bits of one list. Grid (row_blocks, lists of a row)."""
    at = tl.program_id(1) * (row_blocks + 1) + tl.program_id(0)
    first = tl.maximum(tl.load(bound_ptr + at), 0)
    end = tl.minimum(tl.load(bound_ptr + at + 1), nnz)
    group = tl.program_id(1).to(tl.int64) * tl.cdiv(row_blocks, 16) + tl.program_id(0) // 16
    words = word_ptr + group * width * 64 + tl.program_id(0) % 16 * 4
    for start in range(0, (end - first) * COLUMNS, BLOCK):
        token = start + tl.arange(0, BLOCK)
        entry = first + token // COLUMNS
        block = tl.load(index_ptr + entry, mask=entry < end, other=-1)
        listed = (block >= 0) & (block < num_blocks)
        col = tl.where(listed, block, 0) * COLUMNS + token % COLUMNS
        bit = tl.full([BLOCK], 1, tl.int32) << (col % 32)
        tl.atomic_or(words + (col // 128 * 64 + col % 128 // 32), bit, mask=listed & (col < len_k), sem="relaxed")


@triton.jit(do_not_specialize=["row_blocks", "width", "len_q", "rows"])
def tiles_kernel(
    word_ptr, tile_ptr, seen_ptr, row_blocks, width, len_q, rows, TILE: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: which of ``GROUPS`` key tiles, and which of their keys, ``TILE`` queries list.

    Grid (query tiles, width / GROUPS, lists of a row). Writes uint8 ``tile`` [lists, query tiles, width] and adds to
    the bits ``seen`` [lists, width, 4].
    """
    head = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = tile < width
    word = tl.arange(0, 64)  # of a group of rows and keys
    first = tl.program_id(0) * TILE // rows
    end = (tl.minimum(tl.program_id(0) * TILE + TILE, len_q) - 1) // rows + 1
    found = tl.zeros([GROUPS, 64], tl.int32)
    for start in range(first // 16, tl.cdiv(end, 16), ROWS):
        group = start + tl.arange(0, ROWS)
        row = group[:, None, None] * 16 + word[None, None, :] // 4
        at = (head * tl.cdiv(row_blocks, 16) + group)[:, None, None] * width + tile[None, :, None]
        some = tl.load(
            word_ptr + at * 64 + word[None, None, :], mask=(row >= first) & (row < end) & inside[None, :, None], other=0
        )  # [ROWS, GROUPS, 64]
        found |= tl.reduce(some, 0, _either)
    keys = tl.reduce(tl.reshape(found, [GROUPS, 16, 4]), 1, _either)
    seen = seen_ptr + (head * width + tile)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.atomic_or(seen, keys, mask=inside[:, None], sem="relaxed")
    at = (head * tl.num_programs(0) + tl.program_id(0)) * width + tile
    tl.store(tile_ptr + at, tl.max((keys != 0).to(tl.int32), 1).to(tl.uint8), mask=inside)


def row_bits(bounds: Tensor, indices: Tensor, block_size: tuple[int, int], seq_lens: tuple[int, int]) -> RowBits:
    """The bits of lists, on their device and without waiting for it.

    Args:
        bounds: int32 [B|1, H, MB + 1] into ``indices``.
        indices: int32 [nnz].
        block_size: (R, C).
        seq_lens: (M, N).
    """
    (rows, columns), (m, n) = block_size, seq_lens
    lead, row_blocks, width = bounds.shape[:2], bounds.shape[2] - 1, triton.cdiv(n, TILE)
    lists, tiles = lead.numel(), triton.cdiv(m, TILE)
    groups = triton.cdiv(row_blocks, 16)
    words = torch.zeros((*lead, groups, width, 16, 4), dtype=torch.int32, device=indices.device)
    seen = torch.zeros((*lead, 4 * width), dtype=torch.int32, device=indices.device)
    some = torch.empty((*lead, tiles, width), dtype=torch.uint8, device=indices.device)
    bits_kernel[(row_blocks, lists)](
        words, bounds, indices, row_blocks, width, triton.cdiv(n, columns), n, indices.shape[0],
        COLUMNS=columns, BLOCK=1024, num_warps=4, **LAUNCH,
    )  # fmt: skip
    tiles_kernel[(tiles, triton.cdiv(width, _GROUPS), lists)](
        words, some, seen, row_blocks, width, m, rows, TILE=TILE, GROUPS=_GROUPS, ROWS=_ROWS, num_warps=4, **LAUNCH
    )
    lane = torch.arange(32, dtype=torch.int32, device=indices.device)
    keys = ((seen[..., None] >> lane) & 1).view(*lead, -1)[..., :n] != 0
    return RowBits(words, *compact(some.view(torch.bool)), keys)


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    constants = {"COLUMNS": 1, "BLOCK": 1024, "TILE": TILE, "GROUPS": _GROUPS, "ROWS": _ROWS}
    types = {"tile_ptr": "*u8"}
    kernels = {"bsr-bits": bits_kernel, "bsr-tiles": tiles_kernel}
    return [(name, *offline_case(kernel, constants, types), 4, 1) for name, kernel in kernels.items()]
