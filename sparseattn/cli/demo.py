"""``sparseattn demo``: what a small retrieval model still answers when its prefill is sparse."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparseattn import models
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
    settle_threads,
)

if TYPE_CHECKING:
    from sparseattn.cli.measure import Row, Setting

MIN_LENGTH = 512
MAX_LENGTH = 32768  # the model's positions

CAPTION = """\
Answers: questions spread through the text (stream) and after it (end). Dense is PyTorch's scaled_dot_product_attention.
Density: computed share of the causally visible blocks. Recall: share of the attention mass in them, mean over layers,
heads and rows. Error: relative L2 distance of attention outputs from dense ones on the same inputs, mean over layers.
Prefill: the whole model, the faster of two prompts."""


@clean_errors
def demo(
    length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt; default 8192 on a CPU, 32768 on a GPU.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A shipped retrieval model, or a folder with another one.")
    ] = "retrieval-d64",
    block_size: Annotated[int, typer.Option(help="Tokens of a block, 64 or 128.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo"),
    quick: Annotated[bool, typer.Option(help="Two settings only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of a table.")] = False,
) -> None:
    """Ask a small retrieval model questions about a long text, with dense and with sparse prefill.

    Every answer is a number that stands once in thousands of tokens of real text. One line a method and setting:
    answers right, what was computed, what that kept, and the time on this machine.
    """
    need("hf", "transformers", "safetensors")
    need("viz", "matplotlib")
    place = pick_device(device)
    length = (32768 if place.type == "cuda" else 8192) if length is None else length
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise UserError(f"--length: expected {MIN_LENGTH} to {MAX_LENGTH}, got {length}.")
    settings = list(_settings(length, block_size, place, quick))
    folder = make_folder(out)
    settle_threads(place)
    loaded = load_model(model, place)
    if loaded.tokenizer is not None:
        raise UserError(
            f"--model: expected a retrieval model ({', '.join(models.names())} or your own), got {model!r}."
        )
    notes.print(
        f"[bold]{Path(model).name}[/] answers questions about {length:,} tokens of text on"
        f" [bold]{describe_device(place)}[/]"
    )
    rows = _measure_all(loaded.model, settings, length, seed, place)

    from sparseattn.cli.figures import demo_figure

    picture = folder / "demo.png"
    demo_figure(rows, length, describe_device(place)).savefig(picture, dpi=130)
    if json:
        result = {"model": model, "length": length, "seed": seed, "device": describe_device(place)}
        versions = {"torch": torch.__version__, "picture": str(picture), "rows": [row.to_dict() for row in rows]}
        print(json_format.dumps({**result, **versions}, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    console.print(_table(rows))
    console.print(" ".join(CAPTION.split("\n")), style="dim")
    console.print()
    console.print(_verdict(rows))
    console.print(f"Masks of a few heads and the accuracy-density curve: [bold]{picture}[/]", soft_wrap=True)


def _settings(length: int, block_size: int, device: torch.device, quick: bool) -> Iterator[Setting]:
    from sparseattn.cli.measure import Setting

    yield Setting("dense", "sdpa")
    shared = [f"block_size={block_size}", f"min_seq_len={min(1024, length)}"]
    for name, value in (("tau", 0.3),) if quick else (("tau", 0.3), ("tau", 0.1), ("density", 0.1), ("density", 0.2)):
        options = parse_options("landmark", [f"{name}={value}", *shared])
        yield Setting("landmark", f"{name} {value:g}", "landmark", options)
    grid: dict[int, tuple[float, ...]] = {8: (0.8, 0.9, 0.95, 0.99, 0.999), 16: (0.9, 0.95, 0.99)}
    if device.type == "cuda":
        grid = {stride: (0.8, 0.9, 0.95, 0.99, 0.999) for stride in (4, 8, 16)}
    if quick:
        grid = {8: (0.9,)}
    for stride, thresholds in grid.items():
        for threshold in thresholds:
            pairs = [f"stride={stride}", f"threshold={threshold}", *shared]
            options = parse_options("xattention", pairs)
            yield Setting("xattention", f"stride {stride}, {threshold:g}", f"xattention, stride {stride}", options)
    for share in (8,) if quick else (8, 4):
        local = max(block_size, length // share // block_size * block_size)
        pairs = [f"num_sink_tokens={block_size}", f"num_local_tokens={local}", *shared]
        yield Setting("streaming", f"{block_size} + {local}", "streaming", parse_options("streaming", pairs))


def _measure_all(model: object, settings: list[Setting], length: int, seed: int, device: torch.device) -> list[Row]:
    from sparseattn.cli.measure import Prompts, measure, time_prefill

    prompts = Prompts.draw(length, seed, device)
    pictured = next(s for s in settings if s.method == "landmark" and s.label == "tau 0.3")
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=notes, transient=True) as progress:
        task = progress.add_task("", total=len(settings))
        for setting in settings:
            progress.update(task, description=f"{setting.method} {setting.label}")
            row = measure(model, setting, prompts, keep_masks=setting is pictured)
            rows.append(row)
            progress.advance(task)
        # Once more at the end, so that a machine that was busy at the start does not flatter what came after it.
        progress.update(task, description="dense once more")
        rows[0].seconds = min(rows[0].seconds, time_prefill(model, prompts)[0])
    for row in rows[1:]:
        row.speedup = rows[0].seconds / row.seconds
    return rows


def _table(rows: list[Row]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("method")
    table.add_column("setting")
    for name in ("stream", "end", "density", "recall", "error", "prefill", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for row in rows:
        if (previous and row.setting.curve != previous) or (not previous and row is not rows[0]):
            table.add_section()
        previous = row.setting.curve
        table.add_row(
            row.setting.method,
            row.setting.label,
            _answers(row.stream.correct, row.stream.total, rows[0].stream.correct),
            _answers(row.end.correct, row.end.total, rows[0].end.correct),
            f"{100 * row.density:.0f} %",
            f"{row.recall:.3f}",
            f"{row.output_error:.3f}",
            _seconds(row.seconds),
            "" if row.speedup is None else f"[{'green' if row.speedup >= 1 else 'red'}]{row.speedup:.2f}x[/]",
        )
    return table


def _answers(correct: int, total: int, dense: int) -> str:
    color = "green" if correct >= dense else "yellow" if correct >= 0.9 * dense else "red"
    return f"[{color}]{correct}/{total}[/]"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _verdict(rows: list[Row]) -> str:
    """What the table says, whichever way it turned out."""
    dense, sparse = rows[0], rows[1:]
    asked = dense.stream.total + dense.end.total
    right = dense.stream.correct + dense.end.correct
    lines = [f"Dense attention answers {right} of {asked}."]
    best = max(sparse, key=lambda r: (min(right, r.stream.correct + r.end.correct), r.speedup or 0))
    name = f"{best.setting.method} ({best.setting.label})"
    pace = f"{best.speedup:.2f} times as fast as dense" if (best.speedup or 0) >= 1 else "slower than dense here"
    cost = f"at {100 * best.density:.0f} % of the blocks, {pace}"
    if best.stream.correct + best.end.correct >= right:
        lines.append(f"So does {name}, {cost}.")
    else:
        lines.append(f"Closest comes {name} with {best.stream.correct + best.end.correct}, {cost}.")
    slower = sum((r.speedup or 0) < 1 for r in sparse)
    if slower:
        lines.append(
            f"{slower} of {len(sparse)} sparse settings took longer than dense: at this length, on this model and "
            "machine, choosing and skipping blocks costs more than it saves."
        )
    lines.append("High recall is no promise: compare the stream column at equal recall.")
    return " ".join(lines)
