"""Rehearse a call of three kernels, one of which does not compile, for a GPU that need not be there; a script.

Prints which kernels are compiled afterwards, how many launches were made, and how often the call was gone through.
"""

from __future__ import annotations

import contextlib
import json
import threading
from types import ModuleType

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver

from sparseattn.kernels.launches import launch, scratch
from sparseattn.kernels.offline import HopperDriver
from sparseattn.kernels.rehearsal import rehearse


@triton.jit
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 2 * tl.load(x_ptr + offs))


@triton.jit
def negate_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, -tl.load(x_ptr + offs))


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0)


KERNELS = (double_kernel, negate_kernel, broken_kernel)


def main() -> None:
    driver.set_active(HopperDriver())
    torch.cuda.device = lambda _device: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    threads: set[int] = set()
    CompiledKernel.run = property(lambda _: threads.add(threading.get_ident()))
    times = 0

    def call() -> None:
        nonlocal times
        times += 1
        x = scratch((64,), torch.float32, torch.device("cpu"))
        for kernel in KERNELS:
            launch(kernel, (1,), x, BLOCK=64)

    for name in ("kernels", "kernels", "reference"):
        rehearse(ModuleType(f"somewhere.{name}"), ("kind", 1), torch.device("cuda", 0), call)
    compiled = [kernel.__name__ for kernel in KERNELS if any(caches[0] for caches in kernel.device_caches.values())]
    beside = threading.get_ident() not in threads and bool(threads)
    print(json.dumps({"compiled": compiled, "times": times, "beside": beside}))


if __name__ == "__main__":
    main()
