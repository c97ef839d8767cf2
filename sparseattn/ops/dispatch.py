"""Choosing an implementation: what operators share that have a reference and Triton kernels.

Each implementation is a module of its operator's package that answers ``unsupported_reason(*problem) -> str | None``.
Triton is imported when its implementation is asked for, and not before.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from sparseattn.errors import argument_error

IMPLEMENTATIONS = ("triton", "reference")


def check_impl(impl: str) -> None:
    """Raise unless ``impl`` is "auto" or the name of an implementation."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise argument_error("impl", f"one of {('auto', *IMPLEMENTATIONS)}", repr(impl))


def resolve(package: str, impl: str, t: Tensor, *problem: object) -> tuple[ModuleType | None, str | None]:
    """The module that ``impl`` means for a call on ``t``'s device, or why there is none.

    Args:
        package: Of the operator, such as ``sparseattn.ops.paged``.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".
        t: A tensor of the call.
        problem: What the implementation's ``unsupported_reason`` takes.
    """
    name = impl if impl != "auto" else "triton" if t.is_cuda else "reference"
    if name == "triton":
        reason = _triton_missing()
        if reason is not None:
            return None, reason
    module = importlib.import_module(f"{package}.{name}")
    reason = module.unsupported_reason(*problem)
    return (module, None) if reason is None else (None, reason)


def require(package: str, impl: str, t: Tensor, *problem: object) -> ModuleType:
    """As ``resolve``, but the module.

    Raises:
        ValueError: It cannot run this call; the message says why.
    """
    module, reason = resolve(package, impl, t, *problem)
    if module is None:
        expected = "an implementation that can run this call"
        raise argument_error("impl", expected, f"{impl!r}: {reason}", 'impl="reference" runs anything, slowly.')
    return module


def triton_device_reason(t: Tensor) -> str | None:
    """Why Triton kernels cannot run on ``t``'s device, or None. Imports Triton."""
    import torch
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


def _triton_missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return None if (major, minor) >= (3, 6) else f"Triton {triton.__version__} is older than 3.6"
