"""Every kernel compiles for Ampere, Hopper and Blackwell under the newest and the oldest Triton, and fits the chip."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from compile_kernels import loose_arrivals

pytest.importorskip("triton", reason="compiling kernels needs Triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = SCRIPT.parents[2]
OLDEST = Path(sys.prefix) / "triton-3.6"  # `make test` installs it there
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}

# What the time of a test run allows: under the newest Triton nearly all of Hopper's kernels, elsewhere one or two
# variants of every kernel (of the operator, the one that does everything); the script alone compiles all. Of the Gluon
# kernels' variants that differ in one thing, a head dimension or a page size, each Triton compiles its own. (The oldest
# cannot compile landmark_features and pooled-cut for Blackwell; they are not used there.)
SKIPPED = {
    "newest": r"^(forward|dkdv|dq)-(?!all-128x128|decode).*/(80|100)|^extra-.*/100|"
    r"^(forward-(dense|plain)|(dkdv|dq)-(dense|plain))-(64x64|192x128|256x256).*/90|"
    r"(cells-64|cells-96|-ragged|pooled-exact|pooled-bound.*fp32|landmark_score-(all|fp8)|bsr-r|paged-(decode|custom)|"
    r"query-mass-(64|.*fp32)).*/(80|100)|cells-(64|96|128-stride8).*-ragged|"
    r"^gluon-forward-(split|dense|gather|packed)|gluon-landmarks-(all|scores)|"
    r"gluon-paged-(decode1-|prefill1-|latent-64|decode128-e5m2|prefill64-e4m3|prefill16-rope|alibi)|"
    r"^gradients-(queries|keys|fused).*-64",
    "oldest": r"^(forward|dkdv|dq)-(?!all-128x128|decode).*/(80|100)|-dense-|64x64|192x128|256x256|-ragged|"
    r"(-plain|-means|-variable|cells-64|cells-96).*/100|cells-(64|128-stride8).*/90|"
    r"gluon-landmarks-(all|scores|shared)|landmark.*/(80|100)|bsr-(r16|r64|everything).*/(80|100)|"
    r"landmark_score-(all|fp8)|gluon-paged-(decode16|decode128|latent-1|.*e4m3|alibi)|"
    r"^gradients-(queries-(softcap|started)|keys-softcap|fused-(softcap|parts))-128|"
    r"^extra-.*/100|(last-query|row-lse|descend|row-top|block-lists).*/(80|100)|query-mass.*fp32|descend-last|"
    r"pooled-cut.*/100",
}

# The most bytes that a thread may spill, by name/target; the first pattern that fits counts. A few registers around a
# loop cost nothing that shows; thousands of bytes are a kernel that runs from local memory.
SPILLS = {
    r"^dkdv-.*/90": 1280,
    r"^gradients-fused-softcap-128": 512,  # a soft cap on top of five accumulators: a few loads a step, newest Triton
    r"^gradients-.*-boxes": 384,  # the loading warp's scalars, of which a step of boxes has more than its 24 registers
    r"^pooled-.*-fp32-sm80": 768,  # full-precision products in three passes; Triton 3.6 keeps more of them apart
    r"^gluon-paged-latent-all": 384,  # addresses for the merge, saved once under the newest Triton
    # The scalars of a row tile, saved once a tile under the newest Triton.
    r"^gluon-(paged-(prefill|listed)|forward-(variable|bits)|landmarks)": 1024,
    r"/100": 3072,  # Hopper's tiles: nothing was tuned for Blackwell
    r"": 256,
}


def spill_limit(row: dict[str, Any]) -> int:
    return next(limit for pattern, limit in SPILLS.items() if re.search(pattern, f"{row['name']}/{row['target']}"))


@cache
def rows(triton: str) -> tuple[dict[str, Any], ...]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT)]
    if triton == "oldest":
        if not OLDEST.is_dir():
            pytest.skip("Triton 3.6 is not installed beside this environment; `make test` does it")
        path.insert(0, str(OLDEST))
    environment["PYTHONPATH"] = os.pathsep.join(path)
    # A sixth of the time, for a few registers at most. The script alone compiles as users do.
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    jobs = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 1
    command = [sys.executable, str(SCRIPT), "--jobs", str(jobs), f"--skip={SKIPPED[triton]}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return tuple(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["newest", "oldest"])
def test_kernels_compile_everywhere(triton: str) -> None:
    compiled = rows(triton)
    problems = [f"{row['name']}: {row['error']}" for row in compiled if row["target"] is None]
    compiled = tuple(row for row in compiled if row["target"] is not None)
    assert {row["target"] for row in compiled} == set(SHARED_LIMIT)
    if triton == "oldest":
        assert {row["triton"] for row in compiled} == {"3.6.0"}
    for row in compiled:
        where = f"{row['name']} for sm_{row['target']} (Triton {row['triton']})"
        if "error" in row:
            problems.append(f"{where}: {row['error']}")
            continue
        assert row["log"], f"{where}: ptxas said nothing"
        if row["spills"] > spill_limit(row):
            problems.append(f"{where}: {row['spills']} bytes of spills at {row['registers']} registers")
        if row["warnings"]:
            problems.append(f"{where}: {row['warnings']}")
        if row["loose"]:
            problems.append(f"{where}: {row['loose']} arrivals do not wait for their warpgroup")
        if row["shared"] > SHARED_LIMIT[row["target"]]:
            problems.append(f"{where}: {row['shared']} bytes of shared memory")
    assert not problems, "\n".join(problems)


def test_loose_arrivals_are_seen() -> None:
    arrive, meet, read = (
        "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];",
        "bar.sync 2, 128;",
        "ld.shared.b32 %r2, [%r3];",
    )
    assert loose_arrivals("\n".join([read, meet, arrive, arrive])) == 0
    assert loose_arrivals("\n".join([meet, read, arrive])) == 1
    assert loose_arrivals("\n".join([meet, "wgmma.wait_group.sync.aligned 0;", arrive, meet, arrive])) == 1
    for announced in ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 16384;",
                      "cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];"):  # fmt: skip
        assert loose_arrivals("\n".join([read, announced])) == 0


def test_the_script_refuses_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr
