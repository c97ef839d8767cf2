"""Tables and pictures of evaluation rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from sparseattn.cli.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparseattn.integrations.eval_rows import EvalRow

CAPTION = """\
Density: computed share of the visible blocks, mean over layers, heads and prompts; in brackets what was asked for.
Right: answers, and one standard error as if questions were independent. Recall: share of the attention mass kept, mean
over rows, 5th percentile of rows, and between random blocks (0) and the best ones (1) at the same density; error:
relative L2 distance of attention outputs; all of one prompt, mean over layers and heads. Seconds: median prefill (for
tasks that generate, the whole answer); speed-up over dense attention as the model comes with it."""

COLORS = (
    "#1d4ed8", "#c2410c", "#0e9f6e", "#7c3aed", "#a16207", "#be185d", "#0891b2", "#4d7c0f", "#57534e", "#e11d48",
)  # fmt: skip
MARKERS = "osD^vPX<>*"
#: Kinds of methods that stand for something else than themselves are drawn as broken lines.
YARDSTICKS = ("oracle", "streaming")


def groups(rows: list[EvalRow]) -> list[tuple[str, str, int]]:
    """Model, task and length of every group of comparable rows."""
    return list(dict.fromkeys((row.model, row.task, row.length) for row in rows))


def of_group(rows: list[EvalRow], group: tuple[str, str, int]) -> tuple[EvalRow | None, list[EvalRow]]:
    """The dense row of a group, if there is one, and the others."""
    mine = [row for row in rows if (row.model, row.task, row.length) == group]
    return next((row for row in mine if row.method == "dense"), None), [r for r in mine if r.method != "dense"]


def table(rows: list[EvalRow]) -> Table:
    shown = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("model", "task", "tokens", "method"):
        shown.add_column(name, justify="right" if name == "tokens" else "left", no_wrap=name != "model")
    for name in ("density", "right", "", "recall", "p05", "of best", "error", "seconds", "speed-up"):
        shown.add_column(name, justify="right", no_wrap=True)
    for group in groups(rows):
        dense, others = of_group(rows, group)
        for row in ([dense] if dense else []) + others:
            shown.add_row(*group[:2], f"{group[2]:,}", *cells(row, dense))
        shown.add_section()
    return shown


def cells(row: EvalRow, dense: EvalRow | None) -> list[str]:
    """A row from the method on, as text."""
    kept = row.fidelity

    def number(name: str) -> str:
        return f"{kept[name]:.3f}" if name in kept else ""

    asked = "" if row.target is None else f" ({100 * row.target:g})"
    speed = f"{dense.seconds / row.seconds:.2f}x" if dense is not None and dense is not row else ""
    right = f"{row.correct:g}/{row.total}"
    accuracy = f"{100 * row.accuracy:.0f} ± {100 * row.standard_error:.0f} %"
    density = f"{100 * row.density:.1f}{asked} %"
    numbers = [number(name) for name in ("recall", "p05", "normalised", "output_error")]
    return [row.label, density, right, accuracy, *numbers, f"{row.seconds:.3g}", speed]


def verdict(rows: list[EvalRow]) -> str:
    """For every group, which method keeps most answers at the least density asked for."""
    said = []
    for group in groups(rows):
        dense, others = of_group(rows, group)
        asked = [row.target for row in others if row.target is not None]
        if not asked:
            continue
        least = [row for row in others if row.target == min(asked)]
        # What cannot get down to the density is no answer to it.
        fair = [row for row in least if row.density <= 1.2 * min(asked) and row.method != "oracle"]
        name = f"{group[0]}, {group[1]} at {group[2]:,} tokens"
        if not fair:
            said.append(f"{name}: no method came down to {100 * min(asked):g} % of the blocks.")
            continue
        most = max(row.accuracy for row in fair)
        best = [row for row in fair if row.accuracy == most]
        rest = sorted((row for row in fair if row.accuracy < most), key=lambda row: -row.accuracy)
        bar = "" if dense is None else f" (dense: {100 * dense.accuracy:.0f} %)"
        behind = f"; {', '.join(f'{row.label} {100 * row.accuracy:.0f}' for row in rest)}" if rest else ""
        missed = [row for row in least if row not in fair and row.method != "oracle"]
        above = ", ".join(f"{row.label} ({100 * row.density:.0f} %)" for row in missed)
        who = ", ".join(row.label for row in best)
        kept = (
            f"most answers are kept by {who}: {100 * most:.0f} %{bar}{behind}"
            if most
            else f"no answer is kept by {who}{bar}"
        )
        left_out = f" Not compared, since they kept more blocks: {above}." if missed else ""
        said.append(f"{name}: at {100 * min(asked):g} % of the blocks {kept}.{left_out}")
    return "\n".join(said) or "Dense attention alone: nothing to compare."


def write_plots(rows: list[EvalRow], folder: Path) -> list[Path]:
    """A picture of every model and length, and one of needle depths of every model; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        for length in sorted({row.length for row in mine}):
            written.append(folder / f"compare_{model}_{length}.png")
            comparison([row for row in mine if row.length == length]).savefig(written[-1], dpi=120)
        figure = needle_map(mine)
        if figure is not None:
            written.append(folder / f"needles_{model}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def comparison(rows: list[EvalRow]) -> Figure:
    """Accuracy of every task, and recall, over density and over time; one line a method."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    labels = list(dict.fromkeys(row.label for row in rows if row.method != "dense"))  # alike wherever they are drawn
    figure = new_figure(11, 3.3 * (len(tasks) + 1))
    grid = figure.subplots(len(tasks) + 1, 2, squeeze=False)
    for axes, task in zip(grid, tasks, strict=False):
        dense, others = of_group(rows, (rows[0].model, task, rows[0].length))
        _lines(axes, others, labels, lambda row: 100 * row.accuracy, f"{task}: right answers, %")
        for ax, x in zip(axes, (100.0, dense.seconds if dense else 0.0), strict=True):
            if dense is not None:
                ax.plot([x], [100 * dense.accuracy], "*", color="#3f3f46", markersize=11, label="dense", zorder=3)
                ax.axhline(100 * dense.accuracy, color="#3f3f46", linewidth=1, linestyle="--", zorder=1)
            ax.set_ylim(-3, 104)
    _, others = of_group(rows, (rows[0].model, tasks[0], rows[0].length))
    _lines(grid[-1], others, labels, lambda row: row.fidelity.get("recall"), "recall of attention mass")
    grid[0][0].legend(frameon=False, fontsize=7, loc="lower right", ncols=2)
    device = rows[0].environment.get("device", "")
    figure.suptitle(f"{rows[0].model}, {rows[0].length:,} tokens ({device})", fontsize=11, fontweight="bold")
    return figure


def _lines(axes: Any, rows: list[EvalRow], labels: list[str], value: Any, title: str) -> None:
    """One line a method over density on the left, over seconds on the right."""
    x_of = (lambda row: 100 * row.density), (lambda row: row.seconds)
    names = ("density: computed share of the visible blocks, %", "seconds a prompt")
    for ax, x, name in zip(axes, x_of, names, strict=True):
        for i, label in enumerate(labels):
            mine = sorted((row for row in rows if row.label == label), key=lambda row: row.density)
            points = [(x(row), value(row)) for row in mine if value(row) is not None]
            if points:
                broken = label.split(" ")[0] in YARDSTICKS
                style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
                ax.plot(*zip(*points, strict=True), linestyle="--" if broken else "-", label=label, **style)
        ax.set_xlabel(name, fontsize=8)
        ax.set_ylabel(title, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(color="#e4e4e7", linewidth=0.8)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_xlim(0, 103)
    axes[1].set_xlim(left=0)


def needle_map(rows: list[EvalRow]) -> Figure | None:
    """Right answers over prompt length and needle depth, a panel a method, at the least density asked for."""
    asked = [row.target for row in rows if row.target is not None]
    rows = [r for r in rows if r.by_depth is not None and (r.target is None or r.target == min(asked))]
    labels, lengths = list(dict.fromkeys(row.label for row in rows)), sorted({row.length for row in rows})
    if not labels:
        return None
    columns = min(5, len(labels))
    lines = -(-len(labels) // columns)
    figure = new_figure(2.3 * columns + 0.8, 2.6 * lines + 0.8)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    image = None
    for ax, label in zip(panels, labels, strict=False):
        cells = [_depths([r for r in rows if r.label == label and r.length == n]) for n in lengths]
        image = ax.imshow(
            list(zip(*cells, strict=True)), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", interpolation="nearest"
        )
        ax.set_facecolor("#e4e4e7")
        density = [r.density for r in rows if r.label == label]
        ax.set_title(f"{label}, {100 * sum(density) / len(density):.0f} %", fontsize=8)
        ax.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths], fontsize=7)
        ax.set_yticks((0, 4.5, 9), ("start", "middle", "end"), fontsize=7)
    for ax in panels[len(labels) :]:
        ax.set_axis_off()
    assert image is not None
    figure.colorbar(image, ax=panels.tolist(), shrink=0.8, label="right answers")
    tasks = ", ".join(dict.fromkeys(row.task for row in rows))
    figure.suptitle(f"{rows[0].model}: needle depth over prompt length ({tasks}; grey: not asked)", fontsize=9)
    return figure


def _depths(rows: list[EvalRow]) -> list[float]:
    """Share of right answers by tenths of the prompt, NaN where nothing was asked."""
    counted = [row.by_depth for row in rows if row.by_depth is not None]
    sums = [(sum(c[i][0] for c in counted), sum(c[i][1] for c in counted)) for i in range(10)]
    return [right / total if total else float("nan") for right, total in sums]
