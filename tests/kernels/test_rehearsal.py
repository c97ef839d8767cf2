"""Calls are gone through once to compile their kernels side by side."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparseattn

pytest.importorskip("triton", reason="compiling kernels needs Triton")

SCRIPT = Path(__file__).with_name("rehearse_offline.py")
ROOT = SCRIPT.parents[2]
OLDEST = Path(sys.prefix) / "triton-3.6"


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


def test_each_pass_is_rehearsed_by_who_will_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's kernels take forward passes whose gradients are Triton's."""
    from sparseattn.ops.block_sparse import library

    ran: list[str] = []

    def required(q: Any, k: Any, v: Any, g: Any, impl: str, gradients: str | None = None) -> Any:
        who = "triton" if gradients else "gluon"

        def forward(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            ran.append(f"{who} forward")
            return torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])

        return SimpleNamespace(forward=forward, backward=lambda *_, **__: ran.append(f"{who} backward"))

    def rehearse(module: Any, kind: tuple[Any, ...], device: torch.device, *calls: Callable[[], Any]) -> None:
        for call in calls:
            call()
        ran.append("rehearsed")
        raise InterruptedError

    monkeypatch.setattr(library, "_require", required)
    monkeypatch.setattr(library, "rehearse", rehearse)
    q = torch.zeros(1, 64, 1, 16, requires_grad=True)
    with pytest.raises(InterruptedError):
        sparseattn.block_sparse_attention(q, q, q)
    assert ran == ["triton backward", "gluon forward", "rehearsed"]


def test_rehearsed_calls_launch_nothing_of_their_own() -> None:
    package = ROOT / "sparseattn"
    files = [*package.glob("kernels/*.py"), *package.glob("ops/paged/*.py"), *package.glob("ops/scores/landmark*.py")]
    files += [package / "ops/scores" / f"{name}.py" for name in ("cut_triton", "bounds_triton")]
    files += [package / "ops/block_sparse" / f"{name}.py" for name in ("gluon", "gluon_gradients", "triton")]
    assert len(files) > 30
    for file in files:
        for kernel in re.findall(r"(\w+_kernel)\[", file.read_text()):
            raise AssertionError(f"{file}: launch({kernel}, ...)")
