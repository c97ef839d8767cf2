"""How much of what could be seen a mask lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sparseattn.masks.lists import listed_entries
from sparseattn.masks.visibility import visible_range

if TYPE_CHECKING:
    from sparseattn.masks.block_mask import BlockMask


def kept_and_visible(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """How many visible blocks are listed, columns as parts of one, and how many there are.

    Returns:
        float64 and int64 ``[batch, H, MB]``.
    """
    bounds = visible_range(mask.frame)
    visible = (bounds[1] + 1 - bounds[0]).unsqueeze(1)
    first, last = (bound[:, None, :, None] for bound in bounds)
    kept = listed_entries(mask.kv_num_blocks, mask.kv_indices)
    kept = kept & (mask.kv_indices >= first) & (mask.kv_indices <= last)
    blocks = kept.sum(-1).double()
    if mask.column_indices is not None:
        block_kv = mask.block_size[1]
        columns = (mask.column_indices >= first * block_kv) & (mask.column_indices < (last + 1) * block_kv)
        blocks = blocks + columns.sum(-1) / block_kv
    return blocks, visible.expand_as(blocks)
