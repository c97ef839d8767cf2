"""A new length, batch, density or stride needs no new kernel, but for those that a call's size chooses among."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="launching kernels needs Triton")

SCRIPT = Path(__file__).with_name("count_kernels.py")
ROOT = SCRIPT.parents[2]
OLDEST = Path(sys.prefix) / "triton-3.6"

# Kernels of which calls of one kind may need several, by the name of the kind. No call needs more than one, and what
# decides is a number of a few values.
SEVERAL = {
    # Few row tiles leave sums, which are combined; without a mask few rows make tiles of their own. A decode whose keys
    # are cut merges their sums itself.
    "forward_kernel": {"blocks": 2, "dense": 3, "ragged": 3, "paged decode": 2},
    "schedule_kernel": {"dense": 2, "ragged": 2},
    # Query heads that one program of the fused backward walks, divisors of the group; all walk alone in dQ's pass.
    "walk_kernel": {"blocks": 3, "dense": 3, "ragged": 3},
    "gradients_kernel": {"fast": 2},
    "sum_parts_kernel": {"fast": 2},
    # Whether keys are cut, and how many shares a program merges at once: 4 to 64.
    "paged_schedule_kernel": {"paged": 2},
    "merge_shares_kernel": {"paged": 5},
}


def allowed(kernel: str, kind: str) -> int:
    return next((count for part, count in SEVERAL.get(kernel, {}).items() if part in kind), 1)


def counted(triton: str) -> Iterator[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*([str(OLDEST)] if triton == "oldest" else []), str(ROOT)])
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return map(json.loads, done.stdout.splitlines())


@pytest.mark.parametrize("triton", ["newest", "oldest"])
def test_lengths_batches_and_densities_share_kernels(triton: str) -> None:
    """And the rehearsal of a first call knows all kernels that the call needs."""
    if triton == "oldest" and not OLDEST.is_dir():
        pytest.skip("Triton 3.6 is not installed beside this environment; `make test` does it")
    rows = list(counted(triton))
    assert {row["kind"].split(",")[0] for row in rows} >= {"forward", "fast", "deterministic", "paged decode"}
    assert all(row["calls"] > 3 and row["kernels"] for row in rows)
    assert not [row for row in rows if row["missed"]]
    many = [
        f"{row['kind']}: {count} of {kernel}, not {allowed(kernel, row['kind'])}"
        for row in rows
        for kernel, count in row["kernels"].items()
        if count > allowed(kernel, row["kind"])
    ]
    assert not many, "\n".join(many)
