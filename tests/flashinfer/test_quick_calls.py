"""Appending and merging from the second call on: what is launched then, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("quick_offline.py")
ROOT = SCRIPT.parents[2]


def test_quick_calls_launch_what_ordinary_ones_do(tmp_path: Path) -> None:
    """Compiled for a GPU, launched nowhere: kernels, grids and every argument, of batches of other sizes."""
    pytest.importorskip("triton", reason="needs Triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    # Caches of one tensor and its halves are told apart by number; two tensors have other strides than halves.
    assert json.loads(done.stdout) == {
        "append NHD 1": 1, "append NHD 2": 2, "append HND 1": 0, "append HND 2": 0, "latent": 1,
        "two": 3, "many": 2, "in place": 4,
    }  # fmt: skip
