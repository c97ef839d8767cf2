"""Kernels read and write nothing that is not theirs, by the word of compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitized import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_memory(family: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    if family.endswith("-gluon") and not HOPPER:
        pytest.skip("needs a Hopper GPU")
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    # Every tensor an allocation of its own, so that what lies behind one is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command += [sys.executable, str(Path(__file__).with_name("sanitized.py")), family]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert family in done.stdout
