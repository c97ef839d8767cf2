"""The pictures that commands write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseattn.masks import BlockMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparseattn.cli.measure import Row

HIDDEN, SKIPPED, SELECTED = "#e4e4e7", "#ffffff", "#1d4ed8"
COLORS = ("#1d4ed8", "#0e9f6e", "#c2410c", "#7c3aed", "#a16207")
MARKERS = "osD^v"


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no global plotting state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def levels(mask: BlockMask, head: int) -> Tensor:
    """uint8 [MB, NB] of the first batch row: 0 hidden by causality, 1 visible and skipped, 2 selected."""
    (rows, columns), (block_q, block_kv) = (mask.num_q_blocks, mask.num_kv_blocks), mask.block_size
    visible = torch.ones(rows, columns, dtype=torch.bool)
    if mask.causal:
        last_row = (torch.arange(rows) + 1).mul(block_q).clamp(max=mask.seq_lens[0]) - 1
        last_key = last_row + mask.seq_lens[1] - mask.seq_lens[0]
        visible = torch.arange(columns)[None] * block_kv <= last_key[:, None]
    blocks = mask.to_blocks()[0, head % mask.heads].cpu()
    return visible.to(torch.uint8) + (visible & blocks)


def draw_mask(axes: Axes, mask: BlockMask, head: int, title: str) -> None:
    from matplotlib.colors import ListedColormap

    colors = ListedColormap([HIDDEN, SKIPPED, SELECTED])
    axes.imshow(levels(mask, head).numpy(), cmap=colors, vmin=0, vmax=2, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#a1a1aa")


def demo_figure(rows: list[Row], length: int, device: str) -> Figure:
    """Masks of six heads, from the sparsest to the densest, beside answers right over density."""
    figure = new_figure(13, 5.6)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.25, 1))
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    pictured = next((row for row in rows if row.masks), None)
    if pictured is not None:
        _head_masks(left, pictured)
    _curve(right, rows)
    figure.suptitle(f"Sparse prefill of {length:,} tokens ({device})", fontsize=12, fontweight="bold")
    return figure


def _head_masks(figure: Any, row: Row, shown: int = 6) -> None:
    density = {(layer, h): d for layer, m in row.masks.items() for h, d in enumerate(m.densities()[0].tolist())}
    ordered = sorted(density, key=lambda at: density[at])
    picks = [ordered[round(i * (len(ordered) - 1) / max(1, shown - 1))] for i in range(min(shown, len(ordered)))]
    block = next(iter(row.masks.values())).block_size[0]
    figure.suptitle(
        f"Blocks of {block} tokens that {row.setting.method} ({row.setting.label}) selects, by head", fontsize=10
    )
    axes = figure.subplots(2, -(-len(picks) // 2), squeeze=False).flatten()
    for ax, (layer, head) in zip(axes, picks, strict=False):
        draw_mask(ax, row.masks[layer], head, f"layer {layer}, head {head}: {100 * density[layer, head]:.0f} %")
    for ax in axes[len(picks) :]:
        ax.set_axis_off()
    axes[0].set_ylabel("queries", fontsize=8)
    figure.supxlabel("keys; blue: computed, white: skipped, grey: hidden by causality", fontsize=8)


def _curve(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    figure.suptitle("Answers to questions spread through the text", fontsize=10)
    dense = rows[0]
    axes.axhline(100 * dense.stream.accuracy, color="#3f3f46", linewidth=1, linestyle="--", zorder=1)
    axes.plot([100], [100 * dense.stream.accuracy], "*", color="#3f3f46", markersize=11, label="dense")
    curves = list(dict.fromkeys(row.setting.curve for row in rows[1:]))
    for i, name in enumerate(curves):
        points = sorted((100 * r.density, 100 * r.stream.accuracy) for r in rows if r.setting.curve == name)
        x, y = zip(*points, strict=True)
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5.5}
        axes.plot(x, y, linewidth=1.8, label=name, **style)
    axes.set_xlim(0, 103)
    axes.set_ylim(0, 104)
    axes.set_xlabel("density: computed share of the visible blocks, %")
    axes.set_ylabel("right answers, %")
    axes.grid(color="#e4e4e7", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
