"""Compiling the kernels of a call side by side, before its first launch.

Triton compiles a kernel when it is first launched, one after the other, which for a call of many kernels adds up to
many times the longest of them. A call whose host code only launches (see ``launches``) can be gone through once without
launching: what it would launch is then compiled by several threads, of which Triton's passes and ptxas make good use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparseattn.kernels.launches import recording

# Kinds of calls that have been rehearsed in this process.
_rehearsed: set[Hashable] = set()


class Rehearsal:
    """Stands where a record of launches does: what is launched is compiled."""

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        kernel.warmup(*args, grid=grid, **kwargs)

    def scratch(self, t: Tensor, zeros: bool = False) -> Tensor:
        return t


class _Workers(ThreadPoolExecutor):
    """Threads that compile for one GPU and load what they have compiled."""

    def __init__(self, device: torch.device) -> None:
        # Their share that is Python takes turns, so that more of them than this only delay one another.
        super().__init__(min(8, os.cpu_count() or 1), "sparseattn-compile")
        self._device = device

    def submit(self, compile_one: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def ready() -> Any:
            compiled = compile_one(*args, **kwargs)
            with torch.cuda.device(self._device):
                compiled.run  # noqa: B018 - Triton 3.6 builds a launcher, with a C compiler, when it is asked for this
            return compiled

        return super().submit(ready)


def rehearse(module: ModuleType, kind: tuple[Hashable, ...], device: torch.device, *calls: Callable[[], Any]) -> None:
    """Compile what ``calls`` launch, unless calls of this kind have been here before.

    They run as they will later, on tensors whose contents mean nothing, and launch nothing: all launches must be
    ``launches.launch``, and nothing may wait for the device or look up memory by what other launches have written.

    Args:
        module: The implementation of the calls; nothing happens unless it launches kernels.
        kind: What decides which kernels are launched, or most of it: a kernel that is forgotten here is compiled when
            it is launched.
        device: Where the calls run; the current device.
        calls: The longest to compile come first.
    """
    kind = (module.__name__, device, *kind)
    if kind in _rehearsed or device.type != "cuda" or module.__name__.endswith("reference"):
        return
    if torch.cuda.is_current_stream_capturing():
        return
    _rehearsed.add(kind)
    import triton
    from triton.runtime._async_compile import active_mode

    if triton.knobs.runtime.interpret or active_mode.get() is not None:
        return
    # What fails to compile says so when it is launched.
    with _Workers(device) as workers, triton.AsyncCompileMode(workers, ignore_errors=True), torch.no_grad():
        try:
            with recording(Rehearsal()):
                for call in calls:
                    call()
        except torch.OutOfMemoryError:
            return  # a rehearsed backward pass wants memory that the call may not
