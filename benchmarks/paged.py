"""Serving: paged and ragged attention, MLA, block-sparse wrappers, appending and merging, beside FlashInfer.

    python -m benchmarks.paged --set decode
    python -m benchmarks.paged --set bsr --impl sparseattn_flashinfer flashinfer_fa3 --out rows.jsonl
    python -m benchmarks.paged --set all --toy --device cpu     # that everything runs and is right, at toy sizes

A row has both TB/s, of bytes that have to be moved, and TFLOP/s, of what was selected. ``ms`` is ``run()`` alone, the
median with a cold L2; ``plan_ms`` and ``plan_run_ms`` are wall-clock times of ``plan()`` and of both, which is what a
pattern costs that changes; ``run_host_us`` and ``plan_host_us`` are for how long the calls keep the host, and
``plan_waits`` how often ``plan()`` waits for the device (as far as torch sees it), all inputs lying on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarks.harness import RESULTS, Row, Writer, arguments, finish, quietly
from benchmarks.paged_problems import Workload
from benchmarks.paged_sets import SETS, Case
from benchmarks.rivals.paged import SERVERS, Call
from sparseattn.testing.timing import gpu_state, host_us, time_ms, waits, wall_ms


def planning(call: Call, device: torch.device, runs: int) -> Row:
    """What the host and planning cost."""
    found: Row = {"run_host_us": host_us(call.run, device, runs=runs), "run_waits": waits(call.run, device)}
    if call.plan is None:
        return found
    plan = call.plan

    def both() -> None:
        plan()
        call.run()

    return {
        **found,
        "plan_ms": wall_ms(plan, device, runs=3),
        "plan_run_ms": wall_ms(both, device, runs=3),
        "plan_host_us": host_us(plan, device, runs=min(runs, 5)),
        "plan_waits": waits(plan, device),
    }


def measure(workload: Workload, name: str, budget_ms: float) -> Row:
    """Gate and time one server.

    Raises:
        Unsupported: It is not installed, or does not do this.
        AssertionError: It is wrong; nothing is timed then.
    """
    call = SERVERS[name].call(workload)
    workload.reset()
    gate = workload.gate(call.run())
    device = workload.device
    timing = time_ms(call.run, device, budget_ms=budget_ms)
    state = gpu_state() if device.type == "cuda" else None
    seconds = timing["ms"] * 1e-3
    counted: Row = {"tbps": round(workload.moved / seconds * 1e-12, 4)}
    if workload.flops:
        counted |= {"tflops": round(workload.flops / seconds * 1e-12, 4), "flops": workload.flops}
    return {**timing, **counted, **planning(call, device, 50 if device.type == "cuda" else 1), **gate, "gpu": state}


def cases(name: str, device: torch.device, *, toy: bool = False) -> Iterator[Case]:
    """The workloads of a set, one by one: each holds its inputs for as long as it lives."""
    seen = set()
    for case in SETS[name](device):
        workload = case.workload.toy() if toy else case.workload
        if workload not in seen:
            seen.add(workload)
            # What is drawn later hangs on the workload, which must not live as long as what was seen.
            yield Case(workload.copy(), case.impls)


def run_cases(writer: Writer, name: str, chosen: Iterator[Case], wanted: list[str] | None, budget_ms: float) -> None:
    """A row for every case and every server of it that is ``wanted`` (None: all)."""
    for workload, impls in chosen:
        if workload.device.type == "cuda":
            torch.cuda.empty_cache()
        extra = ("sparseattn_reference",) if workload.device.type == "cpu" else ()
        for impl in (*impls, *extra):
            if wanted is None or impl in wanted:
                row = {"set": name, **workload.row(), "impl": impl}
                writer.measure(row, partial(measure, workload, impl, budget_ms))


def parse(argv: list[str] | None) -> Any:
    parser = arguments("Paged, ragged, latent and block-sparse attention beside FlashInfer.", "paged")
    parser.set_defaults(out=None)
    parser.add_argument("--set", choices=[*SETS, "all"], default="decode", help="which workloads")
    parser.add_argument("--impl", nargs="+", choices=list(SERVERS), help="only these; default all of the set's")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of repeated runs a measurement")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU: gates say something, times do not")
    options = parser.parse_args(argv)
    if options.out is None:
        options.out = RESULTS / f"paged_{options.set}.jsonl"
    return options


def main(argv: list[str] | None = None) -> list[Row]:
    options = parse(argv)
    with Writer(options.out, "paged", options.commit) as writer, ExitStack() as stack:
        quietly(stack)
        for name in SETS if options.set == "all" else (options.set,):
            chosen = cases(name, torch.device(options.device), toy=options.toy)
            some = itertools.islice(chosen, 2) if options.quick else chosen
            run_cases(writer, name, some, options.impl, 1e3 * options.budget)
    return writer.rows


if __name__ == "__main__":
    finish(main())
