"""Compile every Triton kernel for GPUs this machine need not have, and print what ptxas says of each.

    python tests/compile/compile_kernels.py [--jobs 2] [--target 80 90 100] [--only REGEX] [--skip REGEX]

One JSON line a kernel and target: ``name``, ``target``, ``triton``, ``registers``, ``spills`` (bytes stored and
loaded), ``shared`` (bytes), ``warnings`` (ptxas's own), ``loose`` (see ``loose_arrivals``), ``seconds``; or ``error``
where compilation failed. A script of its own because the test process imports Triton for its interpreter, which leaves
nothing to compile, and because the oldest Triton allowed needs a process of its own, too. It must not run with
``TRITON_INTERPRET`` set.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

MODULES = (
    "sparseattn.kernels.lists",
    "sparseattn.kernels.tilings",
    "sparseattn.kernels.unions",
    "sparseattn.ops.block_sparse.triton",
    "sparseattn.ops.block_sparse.gluon",
    "sparseattn.ops.block_sparse.gluon_gradients",
    "sparseattn.ops.block_sparse.gluon_extra",
    "sparseattn.ops.scores.triton",
    "sparseattn.ops.scores.bounds_triton",
    "sparseattn.ops.scores.cut_triton",
    "sparseattn.ops.scores.landmark_triton",
    "sparseattn.ops.scores.landmark_triton_order",
    "sparseattn.ops.scores.landmark_gluon",
    "sparseattn.ops.scores.pooled_triton",
    "sparseattn.ops.scores.rules_triton",
    "sparseattn.ops.scores.vertical_slash_triton",
    "sparseattn.ops.scores.block_lists_triton",
    "sparseattn.ops.merge.triton",
    "sparseattn.ops.paged.pages_triton",
    "sparseattn.ops.paged.triton",
    "sparseattn.ops.paged.gluon",
    "sparseattn.ops.bsr.triton",
    "sparseattn.ops.bsr.gluon_bits",
    "sparseattn.ops.bsr.lists_triton",
)
TARGETS = (80, 90, 100)


def belongs(case: tuple[Any, ...], target: int) -> bool:
    """Whether a case is for a target: ``...-sm80`` for Ampere, ``...-sm90`` for Hopper and newer, others for all.

    Gluon kernels are written for one generation, Hopper.
    """
    name, function = case[:2]
    if function.is_gluon():
        return target == 90
    return {"sm80": target < 90, "sm90": target >= 90}.get(name.rpartition("-")[2], True)


def forgotten() -> list[str]:
    """Kernels of this package (by convention ``..._kernel``) for which no module lists a case."""
    for package in ("sparseattn.kernels", "sparseattn.ops"):  # some are imported when they are first launched
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(found.name)
    listed = {id(case[1]) for name in MODULES for case in importlib.import_module(name).compile_cases()}
    kernels = {
        f"{module.__name__}.{name}": function
        for module in list(sys.modules.values())
        if module.__name__.startswith("sparseattn.")
        for name, function in vars(module).items()
        if name.endswith("_kernel") and hasattr(function, "arg_names")
    }
    return sorted(name for name, function in kernels.items() if id(function) not in listed)


def loose_arrivals(ptx: str) -> int:
    """Arrivals at an mbarrier, by one thread for all of a warpgroup, that do not wait for the others.

    What a warpgroup reads from shared memory, or writes there, must be over before its thread says so: a barrier among
    its warps stands between, which the compiler puts there. compute-sanitizer's racecheck does not see through the two.
    (Copies announce their own end, thread by thread.)
    """
    loose, met = 0, False
    for line in ptx.splitlines():
        if re.search(r"\bbar(rier)?\.(warp\.)?(cta\.)?sync", line):
            met = True
        elif re.search(r"(?<!async\.)\bmbarrier\.arrive\.(?!expect_tx)", line):
            loose += not met
        elif re.search(r"\b(ld|st|atom|red)\.(volatile\.)?shared|\b(ld|st)matrix|wgmma\.wait_group", line):
            met = False
    return loose


def compile_one(job: tuple[str, int, int]) -> dict[str, Any]:
    """Compile case ``index`` of ``module`` for compute capability ``target``."""
    module, index, target = job
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    from sparseattn.kernels import LAUNCH

    case = importlib.import_module(module).compile_cases()[index]
    name, kernel, signature, constexprs, attributes, num_warps, num_stages, *options = case
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    row: dict[str, Any] = {"name": name, "target": target, "triton": triton.__version__}
    started = time.perf_counter()
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source(kernel, signature, constexprs, attributes),
                target=GPUTarget("cuda", target, 32),
                options={"num_warps": num_warps, "num_stages": num_stages, **LAUNCH, **(options[0] if options else {})},
            )
    except Exception as error:  # a kernel that does not compile is a result, too: the others are still wanted
        return {**row, "error": f"{type(error).__name__}: {error}"[-2000:]}
    text = log.getvalue()
    return {
        **row,
        "registers": max((int(n) for n in re.findall(r"Used (\d+) registers", text)), default=0),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", text)),
        "shared": int(compiled.metadata.shared),
        "warnings": re.findall(r"[^\n]*\bC75\d\d\b[^\n]*", text),
        "loose": loose_arrivals(compiled.asm["ptx"]),
        "log": bool(re.search(r"Used \d+ registers", text)),
        "seconds": round(time.perf_counter() - started, 2),
    }


def compile_all(targets: tuple[int, ...], jobs: int, only: str, skip: str) -> Iterator[dict[str, Any]]:
    work = [
        (module, index, target)
        for module in MODULES
        for index, case in enumerate(importlib.import_module(module).compile_cases())
        for target in targets
        if belongs(case, target)
        and re.search(only, f"{case[0]}/{target}")
        and not (skip and re.search(skip, f"{case[0]}/{target}"))
    ]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(compile_one, work)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel offline.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--target", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--only", default="", help="pattern of name/target, such as 'forward.*/90'")
    parser.add_argument("--skip", default="", help="likewise, of what to leave out")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("compile_kernels.py: TRITON_INTERPRET is set, so there is nothing to compile. Unset it.")
    with tempfile.TemporaryDirectory() as cache:  # a cached kernel would come without its ptxas log
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
        gc.disable()  # garbage is little beside what is imported, which every collection would walk
        for name in [] if arguments.only else forgotten():
            print(json.dumps({"name": name, "target": None, "triton": None, "error": "no compile case"}), flush=True)
        for row in compile_all(tuple(arguments.target), arguments.jobs, arguments.only, arguments.skip):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
