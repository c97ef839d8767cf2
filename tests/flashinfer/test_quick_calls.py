"""Appending and merging from the second call on: what is launched then, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparseattn.flashinfer.cascade import merge_state_in_place
from sparseattn.flashinfer.page import append_paged_kv_cache

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


def test_compiled_calls_are_one_graph() -> None:
    def step(new: torch.Tensor, cache: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> None:
        append_paged_kv_cache(new, -new, *numbers[:2], cache, *numbers[2:])
        merge_state_in_place(v, s, v.flip(0), s.flip(0))

    numbers = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0, 3], [2, 1], [0, 1, 2], [4, 4])]
    new, v, s = torch.randn(2, 1, 8), torch.randn(5, 4, 8), torch.randn(5, 4)
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        results.append([torch.zeros(4, 2, 4, 1, 8), v.clone(), s.clone()])
        call(new, *results[-1])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert (results[0][0][2, 1, 0] == -new[0]).all()
