"""Pictures of block masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparseattn.errors import argument_error
from sparseattn.masks.columns import scatter_columns
from sparseattn.masks.visibility import in_range, visible_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from sparseattn.masks.block_mask import BlockMask

_COLUMNS = 4


def plot_mask(mask: BlockMask, heads: Sequence[int] | None, *, batch: int, path: str | None) -> Figure:
    """See ``BlockMask.plot``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('BlockMask.plot needs matplotlib: pip install "sparseattn[viz]"') from error

    if heads is None:
        shown = min(mask.heads, _COLUMNS)
        heads = [i * mask.heads // shown for i in range(shown)]
    for head in heads:
        if not 0 <= head < mask.heads:
            raise argument_error("heads", f"heads in [0, {mask.heads})", head)
    if not heads:
        raise argument_error("heads", "at least one head", heads)
    if not 0 <= batch < mask.batch:
        raise argument_error("batch", f"a batch row in [0, {mask.batch})", batch)

    frame = mask.frame
    visible = in_range(visible_range(frame), mask.num_kv_blocks)
    # 0: hidden by causality, window or length; 1: visible and skipped; 2: selected; 3: skipped but for single columns.
    levels = visible.int() + (mask.to_blocks() & visible).int()
    if mask.column_indices is not None:
        lone = scatter_columns(mask.column_indices, mask.num_kv_blocks, mask.block_size[1])
        levels = torch.where(lone & (levels == 1), 3, levels)
    levels = levels.expand(mask.batch, mask.heads, -1, -1)
    levels = levels[batch, torch.tensor(heads, device=mask.device)].cpu()
    densities = mask.densities()[batch].tolist()

    columns = min(len(heads), _COLUMNS)
    rows = -(-len(heads) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    colors = ListedColormap(["#e4e4e7", "#ffffff", "#1d4ed8", "#93c5fd"])
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, head, level in zip(axes, heads, levels, strict=False):
        axis.imshow(level.numpy(), cmap=colors, vmin=0, vmax=3, interpolation="nearest", aspect="auto")
        axis.set_title(f"head {head}: density {100 * densities[head]:.1f} %", fontsize=9)
        axis.set_xlabel(f"key block ({mask.block_size[1]} tokens)", fontsize=8)
        axis.set_ylabel(f"query block ({mask.block_size[0]} tokens)", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(heads) :]:
        axis.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
