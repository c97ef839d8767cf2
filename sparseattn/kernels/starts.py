"""How a compiled kernel is started with known arguments: in Triton's own way, or by the function beneath it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple


class _Place:
    """What a tensor map describes, as far as Triton asks: memory that begins at an address."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class Map(NamedTuple):
    """An argument that is a tensor map: which argument, of which tensor, how far in, how to make one; those made."""

    at: int
    name: str
    offset: int
    make: Callable[[int], Any]
    made: dict[int, Any]


class Again(NamedTuple):
    """A launch to repeat: ``start(*values)`` with addresses at ``slots``, maps, and the stream in its place, if any."""

    start: Any
    values: list[Any]
    slots: list[tuple[int, str, int]]
    maps: list[Map]
    stream_at: int
    once: bool


def start_slowly(again: Again, addresses: dict[str, int]) -> None:
    """Make one launch in Triton's own way."""
    values = again.values.copy()
    for at, name, offset in again.slots:
        values[at] = addresses[name] + offset
    for at, name, offset, make, _made in again.maps:
        values[at] = make(addresses[name] + offset)
    again.start(*values)


def describer(described: Any) -> Callable[[int], Any]:
    """What makes the host's form of a tensor map for an address."""

    def make(address: int) -> Any:
        one = copy.copy(described)
        one.base = _Place(address)
        return one

    return make


def hooked() -> bool:
    """Whether somebody (a profiler) wants to hear of launches, for which Triton's own way is taken."""
    runtime = _runtime()
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (before is not None and getattr(before, "calls", True)) or (after is not None and getattr(after, "calls", True))
    )


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def direct(compiled: Any, grid: tuple[int, ...], again: Again) -> Again | None:
    """The same launch through the C function beneath Triton's launcher; None where that is not the one known here.

    Triton 3.6 encodes every tensor map at every launch and prepares for hooks that nobody has set: most of a launch's
    time on the host. Here a map is encoded once for an address.
    """
    import triton

    launcher = getattr(compiled, "run", None)
    if not triton.__version__.startswith("3.6.") or type(launcher).__name__ != "CudaLauncher":
        return None
    assert launcher is not None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    start, metas = launcher.launch, getattr(compiled.metadata, "tensordesc_meta", None) or []
    if again.maps:
        cells = dict(zip(start.__code__.co_freevars, start.__closure__ or (), strict=True))
        if "launcher" not in cells or len(metas) != len(again.maps) or any(m is None or m["fp4_padded"] for m in metas):
            return None
        start = cells["launcher"].cell_contents
    values: list[Any] = [
        *(*grid, 1, 1)[:3], 0, compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    ]  # fmt: skip
    moved, maps, metas = {}, [], list(metas)
    for i, value in enumerate(again.values):
        moved[i] = len(values)
        values.append(value)
        if any(m.at == i for m in again.maps):
            values.extend((*value.shape, *value.strides))
    for m in again.maps:
        maps.append(m._replace(at=moved[m.at], make=encoder(again.values[m.at], metas.pop(0)), made={}))
    return Again(start, values, [(moved[i], name, offset) for i, name, offset in again.slots], maps, 3, again.once)


def encoder(described: Any, meta: dict[str, Any]) -> Callable[[int], Any]:
    """What encodes a tensor map for an address."""
    from triton.backends.nvidia import driver
    from triton.runtime import driver as runtime

    encode = runtime.active.utils.fill_tma_descriptor
    kind = driver.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    before = (meta["swizzle"], meta["elem_size"], kind, meta["block_size"])
    after = (list(described.shape), list(described.strides), int(described.padding == "nan"))
    return lambda address: encode(address, *before, *after)
