"""Masks of variable blocks as the tiles that kernels walk: their sizes, and who cuts them."""

from __future__ import annotations

from torch import Tensor

from sparseattn.masks import VariableBlockMask
from sparseattn.masks.tilings import Tiling, make_tiling
from sparseattn.ops.dispatch import launchable, launcher


def tile_size(mask: VariableBlockMask) -> tuple[int, int]:
    """Queries and keys of a tile: powers of two in 16..128, not below the average block unless that is larger.

    What is left at the end of a block costs a whole tile, and small tiles are slow: both want tiles about as large as
    blocks. Lengths and numbers of blocks alone decide, so nothing waits, and a pattern's contents recompile nothing.
    """

    def fit(length: int, blocks: int) -> int:
        return next((size for size in (16, 32, 64) if size * blocks >= length), 128)

    return fit(mask.seq_lens[0], mask.num_q_blocks), fit(mask.seq_lens[1], mask.num_kv_blocks)


def tiling_of(mask: VariableBlockMask, size: tuple[int, int], *, transposed: bool = False) -> Tiling:
    """``mask.tiling``; by one kernel where kernels run."""
    return mask.tiling(size, transposed=transposed, cut=_cut if launchable(mask.blocks) else make_tiling)


def _cut(
    blocks: Tensor, row_sizes: Tensor, col_sizes: Tensor, seq_lens: tuple[int, int], size: tuple[int, int]
) -> Tiling:
    """``make_tiling`` by a kernel."""
    return Tiling(*launcher("sparseattn.kernels.tilings", "cut_tiles")(blocks, row_sizes, col_sizes, seq_lens, size))
