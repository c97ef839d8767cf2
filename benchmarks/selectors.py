"""Every selector on structured inputs: selection apart, attention apart, both together, against dense attention.

    python -m benchmarks.selectors --set table
    python -m benchmarks.selectors --set prefill --method landmark xattention --impl gluon --out rows.jsonl
    python -m benchmarks.selectors --set short      # from which length on selecting pays: see benchmarks.report

A row of phase ``selection`` (a mask ready to be attended) is gated against the float64 reference on a prefix of the
inputs, a row of phase ``attention`` against the float64 oracle on sampled rows of the full length, a row of phase
``both`` against both. The oracle also gives ``recall`` and ``recall_min``, the share of the true attention mass that
the selected keys hold in those rows, on average and at the least. ``peak_bytes`` is the most that a selection allocates
at once, ``list_bytes`` what stays. TFLOP/s count what is listed (4 * D a pair, diagonal blocks whole) and, for dense
attention, all blocks of 128 up to the diagonal.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarks.harness import RESULTS, Row, Writer, arguments, finish, quietly
from benchmarks.rivals.selection import RIVALS, measure_rival
from benchmarks.selector_problems import Case, Problem, measure, measure_dense
from benchmarks.selector_sets import SETS, Plan
from sparseattn.testing import structured
from sparseattn.testing.workloads import DTYPES

IMPLS = ("gluon", "triton", "reference")


def run_problem(writer: Writer, name: str, plan: Plan, problem: Problem, options: Any) -> None:
    """The rows of one length."""
    budget = 1e3 * options.budget
    common = {"set": name, **problem.row()}
    if plan.dense:
        for impl in ("cudnn_dense", *(f"sparseattn_{impl}_dense" for impl in options.impl)):
            body = partial(measure_dense, problem, impl, budget, clock=plan.clock)
            writer.measure({**common, "phase": "attention", "impl": impl}, body)
    for setting in plan.settings(problem.n):
        if options.method and setting.method not in options.method:
            continue
        case = Case(problem, setting, options.selector_impl)
        for phase in plan.phases:
            for impl in ("",) if phase == "selection" else options.impl:
                by = f"sparseattn_{impl}" if impl else case.selected_by
                body = partial(measure, case, phase, impl, budget, clock=plan.clock, recall=plan.dense)
                writer.measure({**common, **setting.row(), "phase": phase, "impl": by}, body)
    for rival in RIVALS.values():
        if rival.phase in plan.phases and (not options.method or rival.setting.method in options.method):
            row = {**common, **rival.setting.row(), "phase": rival.phase, "impl": rival.name}
            writer.measure(row, partial(measure_rival, problem, rival, budget, oracle=plan.dense))


def parse(argv: list[str] | None) -> Any:
    parser = arguments(
        "Selectors, alone and with the attention over their masks, against dense attention.", "selectors"
    )
    parser.set_defaults(out=None)
    parser.add_argument("--set", choices=list(SETS), default="table", help="which workloads")
    parser.add_argument("--n", type=int, nargs="+", help="tokens; default those of the set")
    parser.add_argument("--method", nargs="+", help="only these")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, help="of the attention; default all kernels there are")
    parser.add_argument("--selector-impl", default="auto", help="of the selectors")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of repeated runs a measurement")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--kinds", nargs="+", choices=[*structured.KINDS, "blend"], default=["blend"], help="of heads")
    options = parser.parse_args(argv)
    known = {setting.method for setting in SETS[options.set].settings(1)}
    if unknown := set(options.method or ()) - known:
        parser.error(f"--method: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    if options.impl is None:
        options.impl = ["gluon", "triton"] if options.device.startswith("cuda") else ["reference"]
    if options.out is None:
        options.out = RESULTS / f"selectors_{options.set}.jsonl"
    return options


def main(argv: list[str] | None = None) -> list[Row]:
    options = parse(argv)
    plan = SETS[options.set]
    shape = (options.heads, options.kv_heads, options.head_dim, options.dtype, torch.device(options.device))
    lengths = options.n or plan.lengths
    with Writer(options.out, "selectors", options.commit) as writer, ExitStack() as stack:
        quietly(stack)
        for n in lengths[:1] if options.quick else lengths:
            run_problem(writer, options.set, plan, Problem(n, *shape, tuple(options.kinds)), options)
            if options.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return writer.rows


if __name__ == "__main__":
    finish(main())
