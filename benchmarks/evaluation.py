"""Rows and tables that compare methods by answers and by recall, for docs/evaluation.md.

    python -m benchmarks.evaluation answers --device cuda --dtype bfloat16    # minutes; hours on a CPU; resumes
    python -m benchmarks.evaluation families --device cuda --dtype bfloat16
    python -m benchmarks.evaluation tables --docs docs/evaluation.md --plots docs

``answers`` is ``sparseattn eval`` over both shipped models. ``families`` puts every method to the head families of
``sparseattn.testing`` and measures recall: no model, one head each.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.report import table
from sparseattn import BlockMask, models, selectors
from sparseattn.calibrate import Curve, Knob, knob_of
from sparseattn.fidelity import head_fidelity, recall
from sparseattn.integrations.eval_rows import EvalRow
from sparseattn.testing import families, structured, structured_qkv
from sparseattn.testing.inputs import QKV

if TYPE_CHECKING:
    from sparseattn.integrations.evaluation import Contender

RESULTS = Path(__file__).parent / "results"
BEGIN = "<!-- evaluation: begin (written by python -m benchmarks.evaluation tables) -->"
END = "<!-- evaluation: end -->"
METHODS = (
    "landmark", "xattention", "flashprefill", "flexprefill", "minference", "streaming", "topk", "bound",
    "oracle:density",
)  # fmt: skip
DENSITIES = (0.1, 0.2, 0.4)
#: Where the rows of ``answers`` and ``families`` are kept.
ANSWERS, FAMILIES = RESULTS / "eval.jsonl", RESULTS / "families.jsonl"
KINDS = ("vertical", "slash", "block_topic", "needle", *families.KINDS, "vertical_slash_1000_6096")


def answers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of both models, or of one, that are not in the file yet."""
    from transformers import AutoModelForCausalLM

    from sparseattn.integrations.evaluation import Contender, evaluate
    from sparseattn.integrations.workloads import Retrieval

    kept = rows_of(args.out)
    contenders = [Contender.parse(spec, args.block_size) for spec in args.method or METHODS]
    for name in args.model or models.names():
        model = AutoModelForCausalLM.from_pretrained(models.path(name), dtype=getattr(torch, args.dtype))
        model = torch.nn.Module.to(model, args.device).eval()
        done = {(r.task, r.length, r.label, r.target) for r in kept if r.model == name}
        tasks = [Retrieval(task, args.length, args.prompts, device=args.device) for task in args.task]
        measured = evaluate(
            model, tasks, contenders, args.density, name=name, skip=functools.partial(_among, done), progress=print
        )
        for row in measured:
            yield row.to_dict()


def _among(keys: set[tuple[Any, ...]], *key: Any) -> bool:
    return key in keys


def family_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Recall of every method on every family at one density; masks alone, each head by itself."""
    from sparseattn.integrations.evaluation import Contender

    for kind in KINDS:
        heads = [
            structured_qkv(
                args.length, 1, 1, args.head_dim, getattr(torch, args.dtype), args.device, seed, kinds=(kind,)
            )
            for seed in range(args.seeds)
        ]
        rows = [_wanted_rows(args, kind, seed) for seed in range(args.seeds)]
        for spec in args.method or METHODS:
            contender = Contender.parse(spec, args.block_size)
            knob = knob_of(contender.method, args.length, contender.knob)
            assert knob is not None
            masks = functools.partial(_masks, contender, knob, heads)
            curve = Curve(functools.partial(_mean_density, masks), knob)
            for density in args.density:
                value = curve.find(density).value
                found = [
                    _recall(head, mask, at) for head, mask, at in zip(heads, masks(value), rows, strict=True)
                ]  # fmt: skip
                mean = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
                names = ("length", "head_dim", "block_size", "seeds", "dtype")
                said = {name: getattr(args, name) for name in names} | {"device": _place(args.device)}
                yield {"kind": kind, "method": spec, "target": density, "value": value, **said, **mean}


def _masks(contender: Contender, knob: Knob, heads: Sequence[QKV], value: float) -> list[BlockMask]:
    method = selectors.get(contender.method)
    config = method.config.from_dict({**contender.options, knob.option: value})
    return [method.select(q, k, config) for q, k, _ in heads]


def _mean_density(masks: Callable[[float], list[BlockMask]], value: float) -> float:
    return statistics.fmean(mask.density for mask in masks(value))


def _place(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"


def _wanted_rows(args: argparse.Namespace, kind: str, seed: int) -> torch.Tensor:
    """The rows for whose sake the head is what it is."""
    return structured.plant(structured.Plot(args.length, args.head_dim, args.device, seed), kind).rows


def _recall(head: QKV, mask: BlockMask, rows: torch.Tensor) -> dict[str, float]:
    """Of one head: recall over all rows, over those that want what was planted, and between its bounds."""
    found = head_fidelity(*head, mask, bounds=True).summary()
    found["density"] = mask.density
    found["planted"] = recall(head.q, head.k, None, mask)[0, 0, rows].mean().item()
    return found


def rows_of(path: Path) -> list[EvalRow]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [EvalRow.from_dict(json.loads(line)) for line in lines]


def label(row: EvalRow) -> str:
    return "oracle" if row.method == "oracle" else row.label


def answers_table(rows: Sequence[EvalRow]) -> str:
    """A line a method, columns by density: right answers of both models, and recall."""
    tasks, lengths = list(dict.fromkeys(r.task for r in rows)), sorted({r.length for r in rows})
    parts = []
    for length in lengths:
        for model in dict.fromkeys(r.model for r in rows):
            mine = [r for r in rows if r.model == model and r.length == length]
            if not mine:
                continue
            targets = sorted({r.target for r in mine if r.target is not None})
            header = ["method", *(f"{task}, {100 * t:g} %" for t in targets for task in tasks)]
            recall = targets if any(r.fidelity for r in mine) else []
            header += [f"recall (of best), {100 * t:g} %" for t in recall]
            lines = []
            for name in dict.fromkeys(label(r) for r in mine if r.target is not None):
                cells = [_answer(mine, name, t, task) for t in targets for task in tasks]
                lines.append([name, *cells, *(_kept(mine, name, t) for t in recall)])
            dense = [next((r for r in mine if r.method == "dense" and r.task == task), None) for task in tasks]
            bar = ", ".join(f"{r.task} {r.correct:g}/{r.total}" for r in dense if r is not None)
            head = mine[0]
            place = head.environment["device"].split(",")[0]
            said = f"{head.prompts} prompts a task, blocks of {_block(mine)}, {head.environment['dtype']}, {place}"
            parts.append(f"**{model}**, {length:,} tokens, {said}. Dense: {bar}.\n\n{table(header, lines)}")
    where = dict.fromkeys(f"{r.environment['device'].split(',')[0]}, torch {r.environment['torch']}" for r in rows)
    return "\n\n".join(parts) + f"\n\nMeasured on: {'; '.join(where)}."


def _block(rows: Sequence[EvalRow]) -> str:
    return ", ".join(dict.fromkeys(str(r.options["block_size"]) for r in rows if "block_size" in r.options))


def _answer(rows: Sequence[EvalRow], name: str, target: float, task: str) -> str:
    row = next((r for r in rows if (label(r), r.target, r.task) == (name, target, task)), None)
    if row is None:
        return ""
    missed = f" at {100 * row.density:.0f} %" if abs(row.density - target) > 0.05 * target else ""
    return f"{100 * row.accuracy:.0f} ± {100 * row.standard_error:.0f}{missed}"


def _kept(rows: Sequence[EvalRow], name: str, target: float) -> str:
    row = next((r for r in rows if (label(r), r.target) == (name, target) and r.fidelity), None)
    return "" if row is None else f"{row.fidelity['recall']:.2f} ({row.fidelity['normalised']:.2f})"


def families_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a family, a column a method: recall of the rows that want what was planted."""
    if not rows:
        return ""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    lines = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        found = {r["method"]: r for r in rows if r["kind"] == kind}
        cells = [f"{found[m]['planted']:.2f}{_over(found[m])}" if m in found else "" for m in methods]
        lines.append([f"`{kind}`", *cells])
    head = rows[0]
    title = (
        f"Recall of the rows that want what was planted, at {100 * head['target']:g} % of the blocks of "
        f"{head['block_size']}; heads of {head['length']:,} tokens and {head['head_dim']} dims, mean of "
        f"{head['seeds']} seeds, {head['dtype']}, {head['device']}; in brackets the density in percent where it missed "
        "by more than a tenth."
    )
    return f"{title}\n\n{table(['head', *(m.split(':')[0] for m in methods)], lines)}"


def _over(row: dict[str, Any]) -> str:
    missed = abs(row["density"] - row["target"]) > 0.1 * row["target"]
    return f" ({100 * row['density']:.0f})" if missed else ""


def tables(rows: Sequence[EvalRow], kinds: Sequence[dict[str, Any]]) -> str:
    parts = [answers_table(rows) if rows else "No rows yet.", families_table(kinds)]
    return "\n\n".join(part for part in parts if part)


def inject(document: str, text: str) -> str:
    """``document`` with ``text`` between the markers.

    Raises:
        ValueError: The markers are not there.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"document: expected the markers {BEGIN!r} and {END!r}, got neither or one.")
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def read_json(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(rows: Iterable[dict[str, Any]], path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description="Methods compared by answers.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, out in (("answers", ANSWERS), ("families", FAMILIES)):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=out)
        command.add_argument("--method", action="append", help=f"repeatable; default {', '.join(METHODS)}")
        command.add_argument("--length", type=int, default=4096)
        command.add_argument("--block-size", type=int, default=64)
        command.add_argument("--device", default="cpu")
        command.add_argument("--dtype", default="float32")
        command.add_argument("--density", type=float, nargs="+", default=DENSITIES if name == "answers" else (0.1,))
        if name == "answers":
            command.add_argument("--model", action="append", help="repeatable; default every shipped model")
            command.add_argument("--task", nargs="+", default=("stream", "multiquery"))
            command.add_argument("--prompts", type=int, default=3)
        else:
            command.add_argument("--head-dim", type=int, default=128)
            command.add_argument("--seeds", type=int, default=2)
    report = commands.add_parser("tables")
    report.add_argument("--rows", type=Path, default=ANSWERS)
    report.add_argument("--families", type=Path, default=FAMILIES)
    report.add_argument("--docs", type=Path, help="rewrite the tables between the markers of this file")
    report.add_argument("--plots", type=Path, help="folder for the plots")
    args = parser.parse_args(argv)
    if args.command != "tables":
        write(answers(args) if args.command == "answers" else family_rows(args), args.out)
        return
    rows = rows_of(args.rows)
    text = tables(rows, read_json(args.families))
    print(text)
    if args.docs:
        args.docs.write_text(inject(args.docs.read_text(encoding="utf-8"), text), encoding="utf-8")
    if args.plots:
        from sparseattn.cli.eval_report import write_plots

        print(*write_plots(rows, args.plots), sep="\n")


if __name__ == "__main__":
    main()
