"""Calls that launch one kernel and do nothing else, made again in as few steps as Python can make them.

Such a call is checked and made in full where tensors of its form are seen for the first time. Later ones cost a
comparison with that form, addresses and lengths put among arguments that stand ready, and the launch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.kernels.launches import Store, differentiable, is_recording, recording, repeatable
from sparseattn.kernels.starts import Again, direct, hooked
from sparseattn.kernels.usual import row_major, same_form, untraced_empty

# Forms of calls that one function remembers.
_MOST_FORMS = 8


class Lengths(NamedTuple):
    """What of a launch follows from first sizes of a call's tensors.

    Attributes:
        of: The lengths that calls of these tensors have; None where they do not fit each other, or nothing is to be
            done. The first one is that of results.
        numbers: The kernel's arguments that take them.
        tile: The kernel's constexpr which says how many of the first one a program takes, along the grid's first axis.
    """

    of: Callable[..., tuple[int, ...] | None]
    numbers: tuple[str, ...]
    tile: str


class _Launched(NamedTuple):
    """A launch, and the kernel that was compiled for it."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    values: list[Any]


class _Taken:
    """Notes what a call launches."""

    def __init__(self) -> None:
        self.launched: list[_Launched] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        """As ``launches.launch``."""
        compiled = kernel[grid](*args, **kwargs)
        values = [*args, *(kwargs[name] for name in kernel.arg_names[len(args) :])]
        self.launched.append(_Launched(kernel, compiled, grid, values))
        return compiled

    def scratch(self, t: Tensor, zeros: bool = False) -> Tensor:
        """As ``launches.scratch``; such memory is of no tensor that the call is given, as ``_origin`` will see."""
        return t


class Quick:
    """One launch, made again for tensors of the form of those it was made for.

    Args:
        tensors: Of the call.
        results: Its results, which it allocated.
        launched: What it did.
        slots: Arguments that are tensors: which, of which one of ``tensors`` and results, how many bytes in.
        lengths: See ``Lengths``.
        fixed: Leading tensors of which the first size counts, too.
        aligned: Leading tensors that begin at multiples of 16 bytes, as kernels may count on.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        results: Any,
        launched: _Launched,
        slots: list[tuple[int, Any, int]],
        lengths: Lengths,
        fixed: int,
        aligned: int,
    ) -> None:
        kernel, compiled, grid, values = launched
        self._same = same_form(tensors, fixed)
        self._device, self._aligned, self._lengths = tensors[0].device, aligned, lengths.of
        self._index = self._device.index if self._device.type == "cuda" else None
        self._several = self._index is not None and torch.cuda.device_count() > 1
        self._tuple = isinstance(results, tuple)
        self._made = [(tuple(t.shape[1:]), row_major(t.shape), t.dtype) for t in _listed(results)]
        self._empty = untraced_empty(self._device)
        plain = [0 if isinstance(value, Tensor) else value for value in values]
        again = Again(None, plain, slots, [], -1, False)
        ready = direct(compiled, grid, again) or _through(compiled, grid, again)
        before = len(ready.values) - len(values)
        names = list(kernel.arg_names)
        self._numbers = [(n, before + names.index(name)) for n, name in enumerate(lengths.numbers)]
        self._tile = values[names.index(lengths.tile)]
        self._start, self._values = ready.start, ready.values
        self._slots: list[tuple[int, Any, int]] = list(ready.slots)
        self._lock = threading.Lock()

    def fits(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether tensors have the form of the call."""
        return self._same(*tensors)

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Any, bool]:
        """The call's results, and whether it was made: not where something is unlike the first call."""
        if not self._same(*tensors):
            return None, False
        lengths = self._lengths(*tensors)
        if lengths is None or torch._C._len_torch_dispatch_stack() or hooked():
            return None, False
        addresses = [t.data_ptr() for t in tensors]
        low = 0
        for address in addresses[: self._aligned]:
            low |= address
        if low & 15:
            return None, False
        stream, index, count = 0, self._index, lengths[0]
        if index is not None:
            if self._several and torch._C._cuda_getDevice() != index:
                return None, False
            stream = torch._C._cuda_getCurrentRawStream(index)
        made = [self._empty((count, *shape), strides, dtype) for shape, strides, dtype in self._made]
        for t in made:
            addresses.append(t.data_ptr())
        values, slots = self._values, self._slots
        with self._lock:
            values[0] = -(-count // self._tile)
            values[3] = stream
            for at, which, offset in slots:
                values[at] = addresses[which] + offset
            for n, at in self._numbers:
                values[at] = lengths[n]
            self._start(*values)
        return (tuple(made) if self._tuple else made[0] if made else None), True


class QuickCalls:
    """The calls of one function, by form.

    Args:
        lengths: What of a launch follows from lengths.
        fixed: Leading tensors of which the first size counts, too; of the others it may differ from call to call.
        aligned: Leading tensors whose alignment kernels are compiled for.
    """

    def __init__(self, lengths: Lengths, fixed: int, aligned: int) -> None:
        self._lengths, self._fixed, self._aligned = lengths, fixed, aligned
        self._calls = Store()  # by number of tensors, the last first

    def __call__(self, *tensors: Any) -> tuple[Any, bool]:
        """The results of a call of these tensors, if such a one was seen; and whether it was made."""
        if torch.compiler.is_dynamo_compiling():
            return None, False
        for quick in self._calls.get(len(tensors), ()):
            found = quick(tensors)
            if found[1]:
                return found
        return None, False

    def learn(self, tensors: tuple[Tensor, ...], call: Callable[[], Any]) -> Any:
        """What ``call`` returns, which is made of these tensors; the next ones of their form will be quick."""
        if not repeatable(*tensors) or differentiable(*tensors) or is_recording():
            return call()
        taken = _Taken()
        with recording(taken):
            results = call()
        quick = self._quick(tensors, results, taken.launched)
        if quick is not None:
            self._calls[len(tensors)] = [quick, *self._calls.get(len(tensors), [])[: _MOST_FORMS - 1]]
        return results

    def _quick(self, tensors: tuple[Tensor, ...], results: Any, launched: list[_Launched]) -> Quick | None:
        """What makes the call again; None if it does something else than to launch one kernel over its tensors."""
        made = _listed(results)
        if len(launched) != 1 or launched[0].compiled is None or len({id(t) for t in tensors}) < len(tensors):
            return None
        if any(t.data_ptr() & 15 for t in tensors[: self._aligned]):
            return None
        if any(quick.fits(tensors) for quick in self._calls.get(len(tensors), ())):
            return None
        if any(not t.is_contiguous() or t.untyped_storage().nbytes() < t.nbytes for t in made):
            return None
        slots = []
        for at, value in enumerate(launched[0].values):
            if isinstance(value, Tensor):
                origin = _origin(value, [*tensors, *made])
                if origin is None:
                    return None
                slots.append((at, *origin))
        # What PyTorch says of a step along a dimension of one, and what becomes of it in views, is true of no more.
        free = all(t.shape[0] > 1 or t.stride() == row_major(t.shape) for t in tensors[self._fixed :])
        fixed = self._fixed if free else len(tensors)
        return Quick(tensors, results, launched[0], slots, self._lengths, fixed, self._aligned)


def _listed(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [] if results is None else [results]


def _origin(t: Tensor, tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Which of ``tensors`` ``t`` is a view of, and how many bytes from its beginning; None if that is not clear.

    What a call converted, or allocated, is of none of them.
    """
    address, storage = t.data_ptr(), t.untyped_storage().data_ptr()
    near = [(n, other.data_ptr()) for n, other in enumerate(tensors) if other.untyped_storage().data_ptr() == storage]
    exact = [(n, start) for n, start in near if start == address]
    found = exact or near
    return (found[0][0], address - found[0][1]) if len(found) == 1 else None


def _through(compiled: Any, grid: tuple[int, ...], again: Again) -> Again:
    """A launch in Triton's own way, with arguments where ``direct`` has them: grid, stream, the kernel's."""
    values = [*(*grid, 1, 1)[:3], 0, *again.values]
    slots = [(4 + at, name, offset) for at, name, offset in again.slots]
    return again._replace(start=functools.partial(_start, compiled), values=values, slots=slots, stream_at=3)


def _start(compiled: Any, x: int, y: int, z: int, _stream: int, *values: Any) -> None:
    compiled[(x, y, z)](*values)
