"""``sparseattn bench``: what block-sparse attention costs on this device, and from which density on it pays."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from sparseattn.cli.common import (
    UserError,
    check_writable,
    clean_errors,
    describe_device,
    notes,
    pick_device,
    settle_threads,
)
from sparseattn.ops.block_sparse import IMPLEMENTATIONS, block_sparse_attention, unsupported_reason
from sparseattn.ops.dispatch import implementations
from sparseattn.testing import baselines
from sparseattn.testing.timing import break_even, environment
from sparseattn.testing.workloads import DTYPES, Problem

OURS, OURS_DENSE, FLEX = "sparseattn", "sparseattn, dense", "FlexAttention"
SDPA, CUDNN = "SDPA", "SDPA, cuDNN forced"

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
CAPTION = """\
Random causal masks that always keep the diagonal; density is the share of the visible blocks they came to. Every
result was compared with float64 before it was timed. Times are medians (on a GPU with a cold L2) and, in brackets,
20th and 80th percentiles. TFLOP/s count the selected blocks. Speed-up is over the faster dense SDPA."""
ON_CPU = """\
On a CPU this times the PyTorch reference, which skips blocks but is no kernel, against SDPA: it shows what skipping
can save, not what our kernels do."""


class Entry(NamedTuple):
    """One line of the table.

    Attributes:
        op: "forward" or "backward".
        name: Who.
        density: Share of the visible blocks; 1 for dense attention.
        result: ``ms``, ``ms_p20``, ``ms_p80``, ``tflops`` and more; or ``reason``, why there is none.
    """

    op: str
    name: str
    density: float
    result: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"op": self.op, "name": self.name, "density": self.density, **self.result}


@clean_errors
def bench(
    seq: Annotated[int | None, typer.Option(help="Tokens; default 16384 on a GPU, 2048 on a CPU.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads; default 32 on a GPU, 4 on a CPU.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads; default a quarter of the query heads.")] = None,
    head_dim: Annotated[int, typer.Option(help="Of queries, keys and values.")] = 128,
    block: Annotated[int, typer.Option(help="Tokens of a block, a multiple of 16 up to 256.")] = 128,
    density: Annotated[
        list[float] | None, typer.Option(help="Share of blocks to keep, repeatable; default 1, .5, .25, .1, .05.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default bf16, fp32 on a CPU.")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Also time the gradient.")] = False,
    impl: Annotated[str, typer.Option(help="Which of our implementations; auto is what you get by default.")] = "auto",
    flex: Annotated[bool, typer.Option(help="Also compile FlexAttention, on a GPU.")] = True,
    budget: Annotated[float, typer.Option(help="Seconds of repeated runs a measurement.")] = 0.3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
) -> None:
    """Time block-sparse attention at several densities against dense attention, on your device and shapes.

    Checks every result before timing it, and says at which densities dense attention is the faster one.
    """
    place = pick_device(device)
    on_gpu = place.type == "cuda"
    heads = (32 if on_gpu else 4) if heads is None else heads
    kv_heads = max(1, heads // 4) if kv_heads is None else kv_heads
    dtype = ("bf16" if on_gpu else "fp32") if dtype is None else dtype
    seq = (16384 if on_gpu else 2048) if seq is None else seq
    densities = sorted(set(density or DENSITIES), reverse=True)
    _check(seq, heads, kv_heads, head_dim, block, densities, dtype, impl, budget)
    if json is not None:
        check_writable("--json", json)
    settle_threads(place)
    shape = f"{seq:,} tokens, {heads} query and {kv_heads} KV heads of {head_dim}, {dtype}, blocks of {block}"
    notes.print(f"[bold]{shape}[/] on [bold]{describe_device(place)}[/]")
    if not on_gpu:
        notes.print(" ".join(ON_CPU.split("\n")))
    ops = ("forward", "backward") if backward else ("forward",)
    common = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block": block, "dtype": dtype}
    problems = [[Problem(op, seq, share, device=place, **common) for share in densities] for op in ops]  # type: ignore[arg-type]
    for one_pass in problems:
        _check_impl(one_pass[0], impl)
    entries: list[Entry] = []
    while problems:  # the tensors of a pass that was measured make room for the next one's
        entries += _measure(problems.pop(0), impl, flex and on_gpu, 1e3 * budget)
    if json is not None:
        _write(json, {"device": describe_device(place), "seq": seq, **common}, entries)
    _report(entries, ops)
    failed = [entry for entry in entries if entry.result.get("wrong")]
    if failed:
        raise typer.Exit(1)


def _check(
    seq: int, heads: int, kv_heads: int, head_dim: int, block: int, densities: list[float], dtype: str, impl: str,
    budget: float,
) -> None:  # fmt: skip
    """Complain about options in the form of all commands.

    Raises:
        UserError: The first one that cannot be.
    """
    for option, value in (("seq", seq), ("heads", heads), ("kv-heads", kv_heads), ("head-dim", head_dim)):
        if value < 1:
            raise UserError(f"--{option}: expected at least 1, got {value}.")
    if heads % kv_heads:
        raise UserError(f"--kv-heads: expected a divisor of the {heads} query heads, got {kv_heads}.")
    if block % 16 or not 16 <= block <= 256:
        raise UserError(f"--block: expected a multiple of 16 from 16 to 256, got {block}.")
    for share in densities:
        if not 0 < share <= 1:
            raise UserError(f"--density: expected more than 0 and at most 1, got {share:g}.")
    if dtype not in DTYPES:
        raise UserError(f"--dtype: expected {', '.join(DTYPES)}, got {dtype!r}.")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise UserError(f"--impl: expected auto, {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    if not budget > 0:
        raise UserError(f"--budget: expected more than 0 seconds, got {budget:g}.")


def _check_impl(problem: Problem, impl: str) -> None:
    """Complain about an implementation that cannot run a pass, before any is timed.

    Raises:
        UserError: With the reason.
    """
    reason = unsupported_reason(*problem.qkv, problem.mask, gradients=problem.op == "backward", impl=impl)
    if reason is not None:
        raise UserError(f"--impl: {impl!r} cannot run the {problem.op} pass: {reason}")


def _measure(problems: list[Problem], impl: str, flex: bool, budget_ms: float) -> Iterator[Entry]:
    """Dense attention once, block-sparse attention at every density."""
    # Dense attention is held against, and counted as, the mask that keeps everything.
    first = problems[0]
    dense = first if first.density == 1 else replace(first, density=1.0)
    baseline = {SDPA: False, CUDNN: True} if first.device.type == "cuda" else {SDPA: False}
    for name, cudnn in baseline.items():
        yield _entry(dense, name, 1.0, partial(baselines.sdpa, *dense.qkv, cudnn=cudnn), budget_ms)
    yield _entry(dense, OURS_DENSE, 1.0, partial(_ours, dense, impl, masked=False), budget_ms)
    for problem in problems:
        yield _entry(problem, OURS, problem.selected, partial(_ours, problem, impl), budget_ms)
        if flex:
            prepare = partial(baselines.flex_attention, *problem.qkv, problem.mask)
            yield _entry(problem, FLEX, problem.selected, prepare, budget_ms)


def _ours(problem: Problem, impl: str, masked: bool = True) -> baselines.Prepared:
    """Our operator, over the mask or dense, and which implementation runs the pass that is timed."""
    mask = problem.mask if masked else None
    names = implementations(impl, problem.qkv[0])
    gradients = problem.op == "backward"
    runs = [name for name in names if unsupported_reason(*problem.qkv, mask, gradients=gradients, impl=name) is None]
    return partial(block_sparse_attention, *problem.qkv, mask, impl=impl), {"impl": runs[0] if runs else impl}  # type: ignore[return-value]


def _entry(
    problem: Problem, name: str, density: float, prepare: Callable[[], baselines.Prepared], budget_ms: float
) -> Entry:
    """Measure one line; what does not run here says why instead, and what is wrong fails the command at its end."""
    try:
        attend, said = prepare()
        result = {**said, **problem.gate_and_time(attend, budget_ms)}
    except baselines.Unsupported as reason:
        result = {"reason": str(reason)}
    except AssertionError as error:
        result = {"reason": f"wrong result: {error}", "wrong": True}
    except Exception as error:  # compilers and backends that do not do this fail in all sorts of ways
        if name in (OURS, OURS_DENSE) and not str(error).startswith("impl: "):
            raise
        result = {"reason": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    if "reason" in result:
        notes.print(f"[yellow]{name}, {problem.op}, density {density:.3g}[/]: {result['reason']}", soft_wrap=True)
    return Entry(problem.op, name, density, result)


def _write(path: Path, what: dict[str, Any], entries: list[Entry]) -> None:
    rows = {**what, "environment": environment(), "rows": [entry.to_dict() for entry in entries]}
    try:
        path.write_text(json_format.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: cannot write {str(path)!r} ({error.strerror}).") from error


def dense_ms(entries: list[Entry]) -> float | None:
    """The faster dense SDPA, or None where none ran."""
    times = [entry.result["ms"] for entry in entries if entry.name in (SDPA, CUDNN) and "ms" in entry.result]
    return min(times, default=None)


def verdict(entries: list[Entry]) -> str:
    """Of one pass, in words: where dense attention is faster, and the break-even density."""
    dense = dense_ms(entries)
    ours = sorted((e.density, e.result["ms"]) for e in entries if e.name == OURS and "ms" in e.result)
    if dense is None or not ours:
        return "nothing to compare."
    slower = [density for density, ms in ours if ms > dense]
    if not slower:
        return "block-sparse attention is at least as fast as dense at every measured density."
    density = break_even([d for d, _ in ours], [ms for _, ms in ours], dense)
    if density is None:
        return "break-even density: none, dense is faster at every measured density."
    listed = ", ".join(f"{d:.3g}" for d in reversed(slower))
    return (
        f"dense attention is faster at density {listed}; break-even density: {density:.2f} "
        "(interpolated between measured ones)."
    )


def _report(entries: list[Entry], ops: tuple[str, ...]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("pass", "", "density", "ms", "TFLOP/s", "speed-up"):
        table.add_column(column, justify="left" if column in ("pass", "") else "right")
    for op in ops:
        mine = [entry for entry in entries if entry.op == op]
        dense = dense_ms(mine)
        for entry in mine:
            table.add_row(op, *_cells(entry, dense))
    console.print(table)
    console.print(" ".join(CAPTION.split("\n")), style="dim")
    console.print()
    for op in ops:
        said = verdict([entry for entry in entries if entry.op == op])
        console.print(f"[bold]{op.capitalize()}[/]: {said}", soft_wrap=True)


def _cells(entry: Entry, dense: float | None) -> tuple[str, ...]:
    result = entry.result
    if "ms" not in result:
        return entry.name, f"{entry.density:.3g}", "-", "-", "-"
    ms = f"{result['ms']:.3g} ({result['ms_p20']:.3g}-{result['ms_p80']:.3g})"
    ratio = dense / result["ms"] if dense else None
    color = "green" if ratio is not None and ratio >= 1 else "red"
    speed = "" if ratio is None else f"[{color}]{ratio:.2f}x[/]"
    name = f"[bold]{entry.name}[/]" if entry.name == OURS else entry.name
    name += f" ({result['impl']})" if "impl" in result else ""
    return name, f"{entry.density:.3g}", ms, f"{result['tflops']:.3g}", speed
