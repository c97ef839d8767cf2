"""Checks of scalar arguments that attention operators have in common."""

from __future__ import annotations

import math

from torch import Tensor

from sparseattn.errors import argument_error

# Positions and window sides are added up in 32 bits.
_WIDEST = 1 << 30


def check_number(name: str, value: float) -> float:
    """``value`` as a float, if it is a finite number."""
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float):
        hint = "A learnable scale belongs into q: pass q * scale and scale=1." if isinstance(value, Tensor) else ""
        raise argument_error(name, "a finite number", type(value).__name__, hint, kind=TypeError)
    if not math.isfinite(value):
        raise argument_error(name, "a finite number", value)
    return float(value)


def check_softcap(softcap: float | None) -> float:
    """``softcap``, 0 for none."""
    if softcap is None:
        return 0.0
    value = check_number("softcap", softcap)
    if value < 0:
        raise argument_error("softcap", "a positive number, or None for no cap", softcap)
    return value


def check_window(window: tuple[int | None, int | None] | None, name: str = "window") -> tuple[int, int]:
    """``(left, right)`` with -1 for unbounded, which a side wider than any sequence is, too."""
    if window is None:
        return -1, -1
    expected = "(left, right) token counts, each at least 0 or None"
    hint = "(w, 0) keeps w keys before each query."
    if not isinstance(window, tuple | list):
        raise argument_error(name, expected, repr(window), hint, kind=TypeError)
    if len(window) != 2:
        raise argument_error(name, expected, repr(window), hint)
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise argument_error(name, expected, repr(window), kind=TypeError)
        if side is not None and side < 0:
            raise argument_error(name, expected, repr(window), "None is unbounded.")
    left, right = (-1 if side is None or side >= _WIDEST else side for side in window)
    return left, right


def narrower(a: int, b: int) -> int:
    """The smaller of two window sides, -1 being unbounded."""
    return max(a, b) if a < 0 or b < 0 else min(a, b)


def check_sinks(sinks: Tensor, heads: int, q: Tensor) -> None:
    """Raise unless ``sinks`` is a float logit per query head on q's device."""
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        got = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise argument_error("sinks", "a floating-point tensor", got, kind=TypeError)
    if tuple(sinks.shape) != (heads,):
        raise argument_error("sinks", f"shape ({heads},), a logit per query head", tuple(sinks.shape))
    if sinks.device != q.device:
        raise argument_error("sinks", f"device {q.device} like q", sinks.device)


def starts_with(out: Tensor, *read: Tensor) -> bool:
    """Whether ``out`` begins where one of the tensors does."""
    place = out.data_ptr()
    return place != 0 and any(t.data_ptr() == place for t in read)


def check_apart(out: Tensor, *read: Tensor) -> None:
    """Raise if ``out`` is one of the tensors that are read while it is written."""
    if starts_with(out, *read):
        hint = "Write into another tensor, or leave out away."
        raise argument_error("out", "memory of its own", "that of q, k or v", hint)
