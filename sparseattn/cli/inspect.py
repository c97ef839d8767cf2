"""``sparseattn inspect``: what a method selects for a prompt, layer by layer and head by head."""

from __future__ import annotations

import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from sparseattn.cli.common import (
    UserError,
    clean_errors,
    describe_device,
    load_model,
    make_folder,
    need,
    notes,
    parse_options,
    pick_device,
    read_prompt,
    settle_threads,
    sparse,
)
from sparseattn.cli.run import (
    ChatOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelArgument,
    OptionOption,
    PromptOption,
)
from sparseattn.integrations.options import DEFAULT_METHOD
from sparseattn.masks import BlockMask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparseattn.integrations.records import CallRecord


@dataclass
class LayerStatistics:
    """What one attention call selected.

    Attributes:
        layer: Its index.
        mask: The selection.
        density: By head.
        mean: Recall of attention mass by head, mean over query rows.
        p05: Its 5th percentile.
        worst: Its worst row.
    """

    layer: int
    mask: BlockMask
    density: list[float]
    mean: list[float]
    p05: list[float]
    worst: list[float]

    def to_dict(self) -> dict[str, Any]:
        recall = {"mean": self.mean, "p05": self.p05, "worst": self.worst}
        return {"layer": self.layer, "density": self.density, "recall": recall}


@clean_errors
def inspect(
    model: ModelArgument,
    prompt_file: PromptOption,
    method: MethodOption = DEFAULT_METHOD,
    option: OptionOption = None,
    out: Annotated[Path, typer.Option(help="Folder for masks.png, statistics.png and statistics.json.")] = Path(
        "inspect"
    ),
    layers: Annotated[
        str | None, typer.Option(help="Layers to draw, e.g. 0,8,16; default four, spread evenly.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads to draw, e.g. 0,1; default up to eight, spread evenly.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    chat: ChatOption = False,
    json: JsonOption = False,
) -> None:
    """Draw the blocks a method selects for a prompt, and write density and recall of every layer and head."""
    need("viz", "matplotlib")
    # Which blocks a method would choose is the question here, not from which length on that pays.
    options = parse_options(method, ("min_seq_len=1024", *(option or ())))
    if method == "dense":
        raise UserError("--method: expected a method that selects blocks, got 'dense'.")
    text = read_prompt(prompt_file)
    place = pick_device(device)
    settle_threads(place)
    loaded = load_model(model, place, dtype)
    prompt = loaded.encode(text, chat).to(place)
    notes.print(f"[bold]{model}[/], {prompt.shape[1]:,} prompt tokens, {describe_device(place)}")
    from sparseattn.integrations.records import record

    with sparse(loaded.model, options), record(masks=True, fidelity=True) as calls, torch.no_grad():
        loaded.model(prompt, use_cache=False, logits_to_keep=1)
    found = [s for s in map(_statistics, calls) if s is not None]
    dense = {call.reason or "dense" for call in calls if call.mask is None}
    if not found:
        raise UserError(
            f"nothing to inspect: every layer ran dense ({'; '.join(sorted(dense)) or 'by other functions'}). "
            f"Give a longer prompt or --option min_seq_len={prompt.shape[1]}."
        )
    drawn_layers = _pick("--layers", layers, [s.layer for s in found], 4)
    drawn_heads = _pick("--heads", heads, list(range(len(found[0].mean))), 8)

    folder = make_folder(out)
    title = f"{model}: {method} on {prompt.shape[1]:,} tokens"
    _draw_masks([s for s in found if s.layer in drawn_layers], drawn_heads, title).savefig(
        folder / "masks.png", dpi=130
    )
    _draw_statistics(found, title).savefig(folder / "statistics.png", dpi=130)
    result = {
        "model": model,
        "prompt_tokens": prompt.shape[1],
        "method": method,
        "options": options.to_dict(),
        "density": _mean([d for s in found for d in s.density]),
        "recall": _mean([r for s in found for r in s.mean]),
        "dense_reasons": sorted(dense),
        "layers": [s.to_dict() for s in found],
    }
    (folder / "statistics.json").write_text(json_format.dumps(result, indent=1) + "\n", encoding="utf-8")
    if json:
        print(json_format.dumps(result, indent=1))
        return
    console = Console(highlight=False)
    console.print(_table(found))
    for reason in sorted(dense):
        console.print(f"Some layers ran dense: {reason}.", style="yellow")
    console.print(f"Written to {folder}: masks.png, statistics.png, statistics.json", soft_wrap=True)


def _statistics(call: CallRecord) -> LayerStatistics | None:
    """Of a call that selected blocks; None of one that ran dense."""
    if call.mask is None or call.heads is None:
        return None
    numbers = call.heads.to_dict()
    return LayerStatistics(
        call.layer or 0, call.mask.to("cpu"), *(numbers[name] for name in ("density", "recall", "p05", "worst"))
    )


def _pick(name: str, given: str | None, available: list[int], count: int) -> list[int]:
    if given is None:
        count = min(count, len(available))
        return [available[round(i * (len(available) - 1) / max(1, count - 1))] for i in range(count)]
    try:
        picked = [int(part) for part in given.split(",")]
    except ValueError:
        raise UserError(f"{name}: expected numbers such as 0,1, got {given!r}.") from None
    missing = [n for n in picked if n not in available]
    if missing:
        raise UserError(f"{name}: expected some of {available[0]}..{available[-1]}, got {missing[0]}.")
    return picked


def _draw_masks(found: list[LayerStatistics], heads: list[int], title: str) -> Figure:
    """One row of pictures a layer, one column a head."""
    from sparseattn.cli.figures import draw_mask, new_figure

    figure = new_figure(1.9 * len(heads) + 0.4, 2.15 * len(found) + 0.8)
    axes = figure.subplots(len(found), len(heads), squeeze=False)
    for row, s in zip(axes, found, strict=True):
        for ax, head in zip(row, heads, strict=True):
            draw_mask(ax, s.mask, head * s.mask.heads // len(s.mean), f"head {head}: {100 * s.density[head]:.0f} %")
        row[0].set_ylabel(f"layer {s.layer}", fontsize=9)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.supxlabel("keys; blue: computed, white: skipped, grey: hidden by causality", fontsize=8)
    return figure


def _draw_statistics(found: list[LayerStatistics], title: str) -> Figure:
    """Density, mean recall and the 5th percentile of recall, layers by heads."""
    from sparseattn.cli.figures import new_figure

    figure = new_figure(13, max(2.6, 0.42 * len(found) + 1.6))
    panels = (
        ("density", [s.density for s in found], "Blues"),
        ("recall, mean", [s.mean for s in found], "viridis"),
        ("recall, 5th percentile of rows", [s.p05 for s in found], "viridis"),
    )
    for ax, (name, values, colors) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        image = ax.imshow(values, vmin=0, vmax=1, cmap=colors, aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("head")
        ax.set_ylabel("layer")
        ax.set_yticks(range(len(found)), [str(s.layer) for s in found], fontsize=8)
        figure.colorbar(image, ax=ax)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure


def _table(found: list[LayerStatistics]) -> Table:
    table = Table(header_style="bold", title="mean over heads; worst: the worst row of any head")
    for name in ("layer", "density", "recall", "5th percentile", "worst"):
        table.add_column(name, justify="right")
    for s in found:
        table.add_row(
            str(s.layer),
            f"{100 * _mean(s.density):.1f} %",
            f"{_mean(s.mean):.3f}",
            f"{_mean(s.p05):.3f}",
            f"{min(s.worst):.3f}",
        )
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
