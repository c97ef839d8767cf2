"""Choosing an implementation: what operators share that have a reference and Triton kernels.

Each implementation is a module of its operator's package that answers ``unsupported_reason(*problem) -> str | None``.
Triton is imported when its implementation is asked for, and not before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.kernels.launches import repeatable

P = ParamSpec("P")
T = TypeVar("T")

IMPLEMENTATIONS = ("triton", "reference")
# What "auto" tries by device, where an operator has it: everything here is meant to be fast there, so nothing is slow
# unasked.
AUTO = {"cuda": ("gluon", "triton"), "cpu": ("reference",)}


def check_impl(impl: str, names: Sequence[str] = IMPLEMENTATIONS) -> None:
    """Raise unless ``impl`` is "auto" or the name of an implementation."""
    if impl != "auto" and impl not in names:
        raise argument_error("impl", f"one of {('auto', *names)}", repr(impl))


def implementations(impl: str, t: Tensor, auto: Mapping[str, tuple[str, ...]] = AUTO) -> tuple[str, ...]:
    """The implementations that ``impl`` means on ``t``'s device, to be tried in this order."""
    return auto.get(t.device.type, ("reference",)) if impl == "auto" else (impl,)


def _module(package: str, name: str) -> str:
    return package.format(name) if "{}" in package else f"{package}.{name}"


@functools.cache
def _exists(package: str, name: str) -> bool:
    """Whether an operator has an implementation of this name."""
    return importlib.util.find_spec(_module(package, name)) is not None


def implementation(package: str, name: str) -> ModuleType:
    """The module of an implementation; ``package`` is as ``resolve`` takes it."""
    return importlib.import_module(_module(package, name))


def resolve(package: str, names: Sequence[str], *problem: object) -> tuple[ModuleType | None, str | None]:
    """The first implementation that can run a call, or why none can.

    Args:
        package: Of the operator, such as ``sparseattn.ops.paged``; or, where one package holds several, a pattern of
            module names such as ``sparseattn.ops.scores.pooled_{}``.
        names: Implementations to try; of several, those that the operator does not have are passed over.
        problem: What an implementation's ``unsupported_reason`` takes.
    """
    reasons = []
    for name in names:
        if len(names) > 1 and not _exists(package, name):
            continue
        reason = triton_missing() if name != "reference" else None
        if reason is None:
            module = implementation(package, name)
            reason = module.unsupported_reason(*problem)
            if reason is None:
                return module, None
        reasons.append(reason)
    return None, "; ".join(reasons)


def require(package: str, impl: str, names: Sequence[str], *problem: object, of: str = "call") -> ModuleType:
    """As ``resolve``, but the module.

    Raises:
        ValueError: None can run this call (or what else it is one ``of``); the message says why.
    """
    module, reason = resolve(package, names, *problem)
    if module is None:
        got = f"{impl!r}, where {' and '.join(names)} cannot: {reason}"
        hint = 'impl="reference" runs anything, slowly.'
        raise argument_error("impl", f"an implementation that can run this {of}", got, hint)
    return module


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` with the GPU of its first tensor as the current one, where Triton launches kernels.

    Layers of one model may lie on several GPUs, and nobody else switches between these.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        t = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        # Without an initialised CUDA no tensor is really there: fake ones are.
        if t is None or not t.is_cuda or torch.compiler.is_compiling() or not torch.cuda.is_initialized():
            return function(*args, **kwargs)
        if t.get_device() == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(t.device):
            return function(*args, **kwargs)

    return guarded


def triton_device_reason(t: Tensor) -> str | None:
    """Why Triton kernels cannot run on ``t``'s device, or None. Imports Triton."""
    import triton

    if t.is_cuda:
        if torch.cuda.get_device_capability(t.device)[0] < 8:
            return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
        return None
    if not triton.knobs.runtime.interpret:
        return f"the Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1), not one on {t.device}"
    if t.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 with TRITON_INTERPRET=1"
    return None


def triton_missing() -> str | None:
    """Why Triton cannot be used, or None. Imports it."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return None if (major, minor) >= (3, 6) else f"Triton {triton.__version__} is older than 3.6"


def launchable(*tensors: Tensor) -> bool:
    """Whether Triton kernels may take the place of PyTorch's operators on these tensors: nobody traces the call."""
    return tensors[0].is_cuda and repeatable(*tensors) and _kernels_run(tensors[0].device)


@functools.cache
def launcher(module: str, name: str) -> Callable[..., Any]:
    """A function that launches kernels, on the GPU of its first tensor; for ``launchable`` ones. Imports its module."""
    return on_its_device(getattr(importlib.import_module(module), name))


@functools.cache
def _kernels_run(device: torch.device) -> bool:
    """Whether Triton's kernels can run on a GPU."""
    return triton_missing() is None and torch.cuda.get_device_capability(device)[0] >= 8
