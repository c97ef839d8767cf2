"""Launches that are made again with other tensors, without Triton's search for the compiled kernel.

Triton finds the kernel of a launch by the types and divisibilities of all arguments, in Python, which for a kernel of
many arguments takes longer than a small batch runs. A call that differs from an earlier one in where its tensors lie,
and in nothing else, launches the same kernels with other addresses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    """``kernel[grid](*args, **kwargs)``; the compiled kernel, or None where there is none (Triton's interpreter)."""
    return kernel[grid](*args, **kwargs)


class Launches:
    """The launches of one call: recorded as they are made, then made again.

    Args:
        moving: Tensors by name whose places change from call to call.
        staying: Tensors that stay where they are. Whoever holds the record must hold them.
    """

    def __init__(self, moving: dict[str, Tensor], staying: Iterable[Tensor | None]) -> None:
        self._moving = [(name, t.data_ptr(), _width(t), _storage(t)) for name, t in moving.items()]
        self._ties: set[tuple[str, str, int]] = set()
        self._staying = {_storage(t) for t in staying if t is not None}
        self._scratch: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        self._launches: list[tuple[Any, list[Any], list[tuple[int, str, int]]]] = []
        self._complete = True

    @property
    def complete(self) -> bool:
        """Whether all launches can be repeated."""
        return self._complete and bool(self._launches)

    def scratch(self, t: Tensor) -> Tensor:
        """``t``, a contiguous tensor that only the launches of the call use, made anew for every repetition."""
        name = f"scratch {len(self._scratch)}"
        self._scratch.append((name, tuple(t.shape), t.dtype))
        self._moving.append((name, t.data_ptr(), _width(t), _storage(t)))
        return t

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        """As the function, and recorded."""
        compiled = kernel[grid](*args, **kwargs)
        named = [] if compiled is None else kernel.arg_names[len(args) :]
        if compiled is None or not kwargs.keys() >= set(named):
            self._complete = False
            return compiled
        values = [*args, *(kwargs[name] for name in named)]
        slots = []
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                found = self._find(value)
                if found is not None:
                    slots.append((i, *found))
                values[i] = value.data_ptr()
        self._launches.append((compiled[(*grid, 1, 1)[:3]], values, slots))
        return compiled

    def _find(self, t: Tensor) -> tuple[str, int] | None:
        """Which moving tensor ``t`` is, or is columns of, and how many bytes from its beginning; None if it stays.

        Tensors of a call may overlap, as an output written over the queries does. Then ``t`` may be of either, and what
        was recorded holds for calls whose tensors lie like that.
        """
        address, storage = t.data_ptr(), _storage(t)
        views = [
            (address - start, name)
            for name, start, width, of in self._moving
            if of == storage and 0 <= address - start < width
        ]
        if views:
            offset, name = min(reversed(views), key=lambda view: view[0])  # a later tensor may lie where one was freed
            if not name.startswith("scratch"):
                self._ties |= {(name, other, offset - far) for far, other in views if other != name}
            return name, offset
        if storage not in self._staying:
            self._complete = False
        return None

    def repeat(self, device: torch.device, addresses: dict[str, int]) -> bool:
        """Make the launches again, on the current stream.

        Args:
            device: For scratch tensors.
            addresses: Where each moving tensor begins. Their shapes, strides, dtypes and alignments must be the same,
                and so must be the device.

        Returns:
            Whether they were made: not if tensors overlapped when they were recorded, and lie otherwise now.
        """
        if any(addresses[other] - addresses[name] != apart for name, other, apart in self._ties):
            return False
        kept = []
        for name, shape, dtype in self._scratch:
            kept.append(torch.empty(shape, dtype=dtype, device=device))
            addresses[name] = kept[-1].data_ptr()
        for start, values, slots in self._launches:
            values = values.copy()
            for i, name, offset in slots:
                values[i] = addresses[name] + offset
            start(*values)
        return True


def _width(t: Tensor) -> int:
    """Bytes from the first column of a row to the end of the last."""
    return ((t.shape[-1] - 1) * t.stride(-1) + 1) * t.element_size()


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
