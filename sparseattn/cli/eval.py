"""``sparseattn eval``: what a model still answers with sparse attention, by task, length, method and density."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparseattn.cli.common import (
    Loaded,
    UserError,
    clean_errors,
    describe_device,
    load_model,
    make_folder,
    need,
    notes,
    pick_device,
    settle_threads,
)

if TYPE_CHECKING:
    from sparseattn.integrations.eval_rows import EvalRow
    from sparseattn.integrations.evaluation import Workload

DENSITIES = (0.1, 0.2, 0.4)


@clean_errors
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A folder, a hub id, or a shipped model: retrieval-d64, retrieval-d128.")
    ] = "retrieval-d64",
    task: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable. Retrieval models: stream, multiquery, ...; others: RULER's niah_single_1, ..."),
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt, repeatable; default 4096.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable: a method, or method:density for its exact budget; default landmark."),
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Share of blocks to keep, repeatable; default .1, .2, .4.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Scored prompts of each task and length.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a block; default 128, below 8192 tokens 64.")
    ] = None,
    even: Annotated[
        bool, typer.Option(help="Every method keeps the first block and the diagonal's, or its own default blocks.")
    ] = True,
    bounds: Annotated[bool, typer.Option(help="Also measure recall between random and the best blocks.")] = True,
    compare: Annotated[
        bool, typer.Option("--compare", help="All methods, unless --method says which; write plots as well.")
    ] = False,
    rows: Annotated[Path | None, typer.Option(help="Show the rows of this file instead of measuring any.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl and plots; rows already there are kept.")] = Path(
        "eval"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto: the checkpoint's on a GPU, float32 on a CPU.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of a table.")] = False,
) -> None:
    """Ask a model questions with dense attention and with every method at every density.

    One line a task, length, method and density: right answers, attention mass kept, time. With --compare also plots
    of accuracy and recall over density and over time, and a map of right answers over needle depth and length.
    """
    need("hf", "transformers", "safetensors")
    if compare:
        need("viz", "matplotlib")
    if rows is not None:
        found = read_rows(rows)
    else:
        place = pick_device(device)
        lengths = length or [4096]
        _check(lengths, density or DENSITIES, prompts)
        specs = method or (_all_methods() if compare else ["landmark"])
        size = block_size if block_size is not None else 64 if min(lengths) < 8192 else 128
        contenders = _contenders(specs, size, even)
        settle_threads(place)
        loaded = load_model(model, place, dtype)
        workloads = _workloads(loaded, task, lengths, prompts, seed, str(place))
        notes.print(f"[bold]{Path(model).name}[/] on [bold]{describe_device(place)}[/]")
        make_folder(out)
        found = _run(loaded, workloads, contenders, density or DENSITIES, seed, bounds, out / "rows.jsonl")
    _show(found, compare, out, json)


def read_rows(path: Path) -> list[EvalRow]:
    """Rows of a JSON-lines file.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    from sparseattn.integrations.eval_rows import EvalRow

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [EvalRow.from_dict(json_format.loads(line)) for line in lines]
    except OSError as error:
        raise UserError(f"--rows: cannot read {str(path)!r} ({error.strerror}).") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--rows: expected rows of sparseattn eval in {str(path)!r} ({error}).") from error


def _check(lengths: Sequence[int], densities: Sequence[float], prompts: int) -> None:
    for value in lengths:
        if value < 512:
            raise UserError(f"--length: expected at least 512, got {value}.")
    for share in densities:
        if not 0 < share <= 1:
            raise UserError(f"--density: expected more than 0 and at most 1, got {share:g}.")
    if prompts < 1:
        raise UserError(f"--prompts: expected at least 1, got {prompts}.")


def _all_methods() -> list[str]:
    from sparseattn.calibrate import KNOBS

    return [*(name for name in KNOBS if name != "oracle"), "oracle:density"]


def _contenders(specs: Sequence[str], block_size: int, even: bool) -> list[Any]:
    from sparseattn.calibrate import knob_of
    from sparseattn.integrations.evaluation import Contender

    found = []
    for spec in specs:
        try:
            found.append(Contender.parse(spec, block_size, even))
        except (ValueError, TypeError) as error:
            raise UserError(f"--method: {error}") from error
        if knob_of(found[-1].method, 1, found[-1].knob) is None:
            raise UserError(f"--method: {spec!r} has no option that brings it to a density.")
    return found


def _workloads(
    loaded: Loaded, tasks: Sequence[str] | None, lengths: Sequence[int], prompts: int, seed: int, device: str
) -> list[Workload]:
    from sparseattn.integrations.workloads import Retrieval, Ruler
    from sparseattn.testing import retrieval, ruler

    bytewise = loaded.tokenizer is None
    known = retrieval.TASKS if bytewise else ruler.TASKS
    chosen = tasks or (("stream", "multiquery") if bytewise else ("niah_single_1", "niah_multikey_2", "vt"))
    for name in chosen:
        if name not in known:
            raise UserError(f"--task: expected {', '.join(known)} for this model, got {name!r}.")
    common: dict[str, Any] = {"prompts": prompts, "seed": seed, "device": device}
    if bytewise:
        return [Retrieval(name, n, **common) for n in lengths for name in chosen]
    speech: dict[str, Any] = {"encode": loaded.encode, "decode": loaded.decode}
    return [Ruler(name, n, **speech, **common) for n in lengths for name in chosen]


def _run(
    loaded: Loaded, workloads: list[Workload], contenders: list[Any], densities: Sequence[float], seed: int,
    bounds: bool, path: Path,
) -> list[EvalRow]:  # fmt: skip
    """Measure what the file does not have, and append it line by line."""
    from sparseattn.integrations.evaluation import evaluate as measure

    name = Path(loaded.name).name
    settings = {(w.task, w.length): w.prompts for w in workloads}
    kept = read_rows(path) if path.exists() else []
    mine = [
        row
        for row in kept
        if row.model == name and row.seed == seed and settings.get((row.task, row.length)) == row.prompts
    ]
    done = {(row.task, row.length, row.label, row.target) for row in mine}
    try:
        with path.open("a", encoding="utf-8") as file, notes.status("") as status:
            fidelity = "bounds" if bounds else True
            for row in measure(
                loaded.model, workloads, contenders, densities, name=name, seed=seed, fidelity=fidelity,
                skip=lambda *key: key in done, progress=status.update,
            ):  # fmt: skip
                file.write(json_format.dumps(row.to_dict()) + "\n")
                file.flush()
                mine.append(row)
    except ValueError as error:
        raise UserError(str(error)) from error
    return mine


def _show(rows: list[EvalRow], compare: bool, out: Path, json: bool) -> None:
    from sparseattn.cli.eval_report import CAPTION, table, verdict, write_plots

    pictures = write_plots(rows, make_folder(out)) if compare else []
    if json:
        print(json_format.dumps([row.to_dict() for row in rows], indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table(rows))
    console.print(" ".join(CAPTION.split("\n")), style="dim")
    console.print()
    console.print(verdict(rows), soft_wrap=True)
    for picture in pictures:
        console.print(f"Written: [bold]{picture}[/]", soft_wrap=True)
