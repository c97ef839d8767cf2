"""Calls are gone through once to compile their kernels side by side."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiling kernels needs Triton")

SCRIPT = Path(__file__).with_name("rehearse_offline.py")
ROOT = SCRIPT.parents[2]
OLDEST = Path(sys.prefix) / "triton-3.6"
# What launches on its own in modules whose calls are rehearsed: it is no part of those calls.
OTHERS = {"ops/paged/pages_triton.py": "append_kernel"}


@pytest.mark.parametrize("triton", ["newest", "oldest"])
def test_a_rehearsal_compiles_and_launches_nothing(triton: str, tmp_path: Path) -> None:
    if triton == "oldest" and not OLDEST.is_dir():
        pytest.skip("Triton 3.6 is not installed beside this environment; `make test` does it")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*([str(OLDEST)] if triton == "oldest" else []), str(ROOT)])
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)
    assert said == {"compiled": ["double_kernel", "negate_kernel"], "times": 1, "beside": True}


def test_rehearsed_calls_launch_nothing_of_their_own() -> None:
    package = ROOT / "sparseattn"
    files = [*package.glob("kernels/*.py"), *package.glob("ops/paged/*.py"), *package.glob("ops/scores/landmark*.py")]
    files += [package / "ops/scores" / f"{name}.py" for name in ("cut_triton", "bounds_triton")]
    files += [package / "ops/block_sparse" / f"{name}.py" for name in ("gluon", "gluon_gradients", "triton")]
    assert len(files) > 30
    for file in files:
        for kernel in re.findall(r"(\w+_kernel)\[", file.read_text()):
            assert OTHERS.get(str(file.relative_to(package))) == kernel, f"{file}: launch({kernel}, ...)"
