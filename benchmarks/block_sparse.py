"""Block-sparse attention, forward and backward: ours and every rival that is installed, on the same inputs.

    python -m benchmarks.block_sparse --set targets
    python -m benchmarks.block_sparse --set short --impl sparseattn_gluon fa4 --out rows.jsonl
    python -m benchmarks.block_sparse --set custom --op forward --n 32768 --density 1 .1 --head-dim 64

TFLOP/s count the selected blocks: 2 * (D + Dv) * block_q * block_kv a block and query head, diagonal blocks whole, and
2.5 times that for a backward pass. Dense rivals are counted as the mask of density 1. A backward time is the whole
gradient; transposing the block lists, done once a mask and kept on it, is not in it, nor are rivals' transposed lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarks import first_call, sets
from benchmarks.harness import RESULTS, Row, Writer, arguments, finish, quietly
from benchmarks.rivals import IMPLEMENTATIONS
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.workloads import DTYPES, Problem

SHAPE = ("heads", "kv_heads", "head_dim", "head_dim_v", "block", "block_q", "mask_heads", "nq", "dtype")


def measure(problem: Problem, name: str, budget_ms: float) -> Row:
    """Gate and time one implementation.

    Raises:
        Unsupported: It is not installed, or does not do this.
        AssertionError: It is wrong.
    """
    one = IMPLEMENTATIONS[name]
    reason = one.missing()
    if reason is not None:
        raise Unsupported(reason)
    prepared = one.prepare(problem)
    share = 1.0 if one.dense else round(problem.selected, 4)
    return {"selected": share, **prepared.said, **problem.gate_and_time(prepared.run, budget_ms)}


def run_cases(
    writer: Writer, name: str, cases: Iterable[sets.Case], wanted: list[str] | None, budget_ms: float
) -> None:
    """A row for every case and every implementation of it that is ``wanted`` (None: all)."""
    length = None
    for problem, impls in cases:
        if (problem.op, problem.n, problem.queries) != length:
            length = (problem.op, problem.n, problem.queries)
            torch.compiler.reset()  # a length must not make a rival fall back to a shape-generic kernel
            if problem.device.type == "cuda":
                torch.cuda.empty_cache()
        for impl in impls:
            if (wanted is None or impl in wanted) and IMPLEMENTATIONS[impl].takes(problem):
                row = {"set": name, **problem.row(), "impl": impl}
                writer.measure(row, partial(measure, problem, impl, budget_ms))


def run_first_calls(writer: Writer, name: str, wanted: list[str] | None, device: torch.device) -> None:
    """Rows of the first call of our kernels in fresh processes; nothing to compile on a CPU."""
    for impl in sets.OURS if device.type == "cuda" else ():
        if wanted is None or impl in wanted:
            for op in ("forward", "backward"):
                short = impl.removeprefix("sparseattn_")
                body = partial(first_call.in_a_fresh_process, short, op, str(device))
                writer.measure({"set": name, "op": op, "impl": impl, "device": str(device)}, body)


def parse(argv: list[str] | None) -> Any:
    parser = arguments("Block-sparse attention against every installed rival.", "block_sparse")
    parser.set_defaults(out=None)
    parser.add_argument("--set", choices=[*sets.SETS, "custom"], default="targets", help="which workloads")
    parser.add_argument("--impl", nargs="+", choices=list(IMPLEMENTATIONS), help="only these; default all of the set's")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of repeated runs a measurement")
    custom = parser.add_argument_group("--set custom")
    custom.add_argument("--op", nargs="+", choices=["forward", "backward"])
    custom.add_argument("--n", type=int, nargs="+", help="keys, and queries unless --nq")
    custom.add_argument("--density", type=float, nargs="+")
    for option in SHAPE[:-1]:
        custom.add_argument(f"--{option.replace('_', '-')}", type=int)
    custom.add_argument("--dtype", choices=list(DTYPES))
    custom.add_argument("--not-causal", action="store_true", default=None)
    options = parser.parse_args(argv)
    given = [name for name in ("op", "n", "density", *SHAPE, "not_causal") if getattr(options, name) is not None]
    if given and options.set != "custom":
        parser.error(f"--{given[0].replace('_', '-')} goes with --set custom")
    if options.out is None:
        suffix = "" if options.set == "targets" else f"_{options.set}"
        options.out = RESULTS / f"block_sparse{suffix}.jsonl"
    return options


def custom_cases(options: Any, device: torch.device) -> Iterator[sets.Case]:
    """The workloads that the options of ``--set custom`` span."""
    shape = {name: getattr(options, name) for name in SHAPE if getattr(options, name) is not None}
    return sets.grid(
        options.op or ["forward", "backward"],
        options.n or [16384],
        options.density or [1.0, 0.25, 0.1],
        tuple(IMPLEMENTATIONS),
        **shape,
        device=device,
        causal=not options.not_causal,
    )


def main(argv: list[str] | None = None) -> list[Row]:
    options = parse(argv)
    device = torch.device(options.device)
    chosen = custom_cases(options, device) if options.set == "custom" else sets.cases(options.set, device)
    if options.quick:
        chosen = itertools.islice(chosen, 2)
    with Writer(options.out, "block_sparse", options.commit) as writer, ExitStack() as stack:
        quietly(stack)
        if options.set in sets.FIRST_CALLS and not options.quick:
            run_first_calls(writer, options.set, options.impl, device)
        run_cases(writer, options.set, chosen, options.impl, 1e3 * options.budget)
    return writer.rows


if __name__ == "__main__":
    finish(main())
