"""Blocks of any sizes cut into tiles of one size, on the device: what kernels walk.

Rows of blocks are cut into pieces of at most ``size_q`` queries. The keys that a row of blocks selects are its runs of
neighbouring selected blocks, whatever the borders inside them, and runs are cut into tiles of ``size_kv`` keys; only
the last tile of a run may be shorter. So a row that selects everything has the tiles of dense attention, and waste
grows with the number of gaps, not of blocks.

All shapes follow from the shapes of the inputs; nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.masks.lists import compact, search


class Tiling(NamedTuple):
    """Pieces of query rows, and for each row of blocks the tiles of its keys.

    Attributes:
        pieces: int32 ``[H, P, 3]``: first query, one past the last, and row of blocks of each piece, in order of
            position. Every query is in exactly one piece, those past the last block in row MB. Unused entries, at the
            end, are ``(0, 0, MB)``. P = ``min(Sq, (Sq + (MB + 1) * (size_q - 1)) // size_q)``.
        counts: int32 ``[B|1, H, MB + 1, 2]``: whole and short tiles of each row of blocks; row MB selects nothing.
        tiles: int32 ``[B|1, H, MB + 1, W + R, 2]``: first key and one past the last. Whole tiles (exactly ``size_kv``
            keys) are entries 0, 1, ...; short ones entries W, W + 1, ...; each kind ascends. Zero past the counts.
            W = ``Sk // size_kv`` and R = ``(NB + 1) // 2``.

    Example:
        >>> blocks = torch.tensor([[[[True, True, False, True]]]])
        >>> sizes = torch.tensor([[30]], dtype=torch.int32), torch.tensor([[10, 26, 5, 3]], dtype=torch.int32)
        >>> tiling = make_tiling(blocks, *sizes, (30, 44), (16, 16))
        >>> tiling.pieces[0].tolist()
        [[0, 16, 0], [16, 30, 0], [0, 0, 1]]
        >>> tiling.counts[0, 0].tolist()
        [[2, 2], [0, 0]]
        >>> tiling.tiles[0, 0, 0].tolist()  # W is 2
        [[0, 16], [16, 32], [32, 36], [41, 44]]
    """

    pieces: Tensor
    counts: Tensor
    tiles: Tensor


def make_tiling(
    blocks: Tensor, row_sizes: Tensor, col_sizes: Tensor, seq_lens: tuple[int, int], size: tuple[int, int]
) -> Tiling:
    """Cut the blocks of a mask into tiles; transposed blocks with exchanged sizes give the tiling of a backward pass.

    Sizes that do not add up to the lengths do no harm: what is past the end is cut, what is left belongs to no block.

    Args:
        blocks: bool ``[B|1, H, MB, NB]``.
        row_sizes: int32 ``[H, MB]``, queries of each row of blocks.
        col_sizes: int32 ``[H, NB]``, keys of each column of blocks.
        seq_lens: ``(Sq, Sk)``.
        size: ``(size_q, size_kv)``, the most queries of a piece and the keys of a tile.
    """
    counts, tiles = _key_tiles(blocks, *block_spans(col_sizes, seq_lens[1]), seq_lens[1], size[1])
    # Queries past the last block: one more row, which selects nothing.
    return Tiling(_row_pieces(row_sizes, seq_lens[0], size[0]), _with_empty_row(counts), _with_empty_row(tiles))


def block_spans(sizes: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First token of each block and one past the last, int32 ``[H, N]``, within ``0..length`` whatever the sizes."""
    ends = sizes.clamp(min=0).cumsum(-1).clamp(max=length).int()
    return torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], -1), ends


def _row_pieces(sizes: Tensor, length: int, size: int) -> Tensor:
    heads, blocks = sizes.shape
    starts, ends = block_spans(sizes, length)
    starts = torch.cat([starts, ends[:, -1:]], -1)
    ends = torch.cat([ends, torch.full_like(ends[:, :1], length)], -1)
    counts = (ends - starts + (size - 1)) // size
    last = counts.cumsum(-1, dtype=torch.int32)
    width = min(length, (length + (blocks + 1) * (size - 1)) // size)
    number = torch.arange(width, dtype=torch.int32, device=sizes.device).expand(heads, width).contiguous()
    row = search(last, number, right=True)
    used = row <= blocks
    row = row.clamp(max=blocks)
    first = starts.gather(1, row) + (number - (last - counts).gather(1, row)) * size
    end = torch.minimum(first + size, ends.gather(1, row))
    return torch.stack([torch.where(used, first, 0), torch.where(used, end, 0), row.int()], -1)


def _key_tiles(blocks: Tensor, starts: Tensor, ends: Tensor, length: int, size: int) -> tuple[Tensor, Tensor]:
    *rows, cols = blocks.shape
    # An empty block between two selected ones parts nothing.
    chosen = blocks | (starts == ends)[:, None]
    edge = torch.zeros_like(chosen[..., :1])
    opens = chosen & ~torch.cat([edge, chosen[..., :-1]], -1)
    closes = chosen & ~torch.cat([chosen[..., 1:], edge], -1)
    runs = (cols + 1) // 2
    number, opens_at = compact(opens, runs)
    _, closes_at = compact(closes, runs)
    first, end = (
        t[:, None].expand(*rows, cols).gather(-1, at.long())
        for t, at in ((starts, opens_at), (ends, closes_at))
    )  # fmt: skip
    run = torch.arange(runs, dtype=torch.int32, device=blocks.device) < number[..., None]
    whole_in = torch.where(run, (end - first) // size, 0)
    rest = first + whole_in * size

    width = length // size
    last = whole_in.cumsum(-1, dtype=torch.int32)
    tile = torch.arange(width, dtype=torch.int32, device=blocks.device).expand(*rows, width).contiguous()
    owner = search(last, tile, right=True)
    used = owner < runs
    owner = owner.clamp(max=runs - 1)
    at = first.gather(-1, owner) + (tile - (last - whole_in).gather(-1, owner)) * size
    whole = torch.where(used[..., None], torch.stack([at, at + size], -1), 0)

    short, short_at = compact(run & (rest < end), runs)
    used = torch.arange(runs, dtype=torch.int32, device=blocks.device) < short[..., None]
    short_at = short_at.long()
    span = torch.stack([rest.gather(-1, short_at), end.gather(-1, short_at)], -1)
    counts = torch.stack([last[..., -1], short], -1)
    return counts, torch.cat([whole, torch.where(used[..., None], span, 0)], -2)


def _with_empty_row(t: Tensor) -> Tensor:
    """``t`` with one more row of blocks, of zeros."""
    return torch.cat([t, torch.zeros_like(t[:, :, :1])], 2)
