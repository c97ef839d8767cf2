"""Seconds of the first call of an implementation of ours in a process that finds no compiled kernel.

    python -m benchmarks.first_call --impl gluon --op forward

prints them as one number. What a user waits for once: importing Triton, compiling, launching; importing torch, starting
CUDA and what PyTorch imports when it is first asked for a gradient (two seconds), which every program pays, are not in
it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import Row
from sparseattn import block_sparse_attention
from sparseattn.testing.workloads import Problem


def seconds(problem: Problem, impl: str) -> float:
    """Of the first call in this process; of a backward pass, its first forward call is in it, too."""
    (q, k, v), mask = problem.qkv, problem.mask
    one = torch.ones(1, device=problem.device, requires_grad=True)
    torch.autograd.grad(one * one, one, torch.ones_like(one))
    if problem.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    o = block_sparse_attention(q, k, v, mask, impl=impl)
    if problem.op == "backward":
        assert isinstance(o, torch.Tensor)
        torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    if problem.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_a_fresh_process(impl: str, op: str, device: str, n: int = 16384) -> Row:
    """``first_call_s`` of a process of its own with an empty Triton cache.

    Raises:
        RuntimeError: It failed; the message ends with its last words.
    """
    command = [sys.executable, "-m", "benchmarks.first_call", "--impl", impl, "--op", op, "--device", device]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        done = subprocess.run(
            [*command, "--n", str(n)], capture_output=True, text=True, env=environment, timeout=300,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"first call: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return {"first_call_s": float(done.stdout.split()[-1])}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=__doc__)
    parser.add_argument("--impl", required=True)
    parser.add_argument("--op", choices=["forward", "backward"], default="forward")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--n", type=int, default=16384)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    print(round(seconds(Problem(options.op, options.n, 0.1, dtype=dtype, device=device), options.impl), 3))


if __name__ == "__main__":
    main()
