"""Launches that are made again with other tensors, without Triton's search for the compiled kernel.

Triton finds the kernel of a launch by the types and divisibilities of all arguments, in Python, which for a kernel of
many arguments takes longer than a small batch runs. A call that differs from an earlier one in where its tensors lie,
and in nothing else, launches the same kernels with other addresses.

Host code launches with ``launch`` and takes memory that only kernels use with ``scratch``; while a record is open
(``recording``), these note what they do. Nothing else may happen on the device then.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sparseattn.kernels.starts import Again, Map, describer, direct, hooked, start_slowly

# Bytes to which scratch tensors are aligned, as those of PyTorch's allocator are.
_ALIGNMENT = 512
# Tensor maps kept of one argument: caches of many layers recur, and so do places that the allocator hands out.
_MOST_MAPS = 4096

# Bytes of scratch memory that is kept for the next call, and for all calls that share a ``Room``.
_MOST_KEPT, _MOST_TOGETHER = 1 << 26, 1 << 28

_open = threading.local()


class Number(int):
    """A number that differs from call to call as addresses do, for an argument that kernels are not specialised on."""

    name: str

    def __new__(cls, name: str, value: int) -> Number:
        number = super().__new__(cls, value)
        number.name = name
        return number


class Recorder(Protocol):
    """Who does for a thread what ``launch`` and ``scratch`` are asked for."""

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        """In the place of the function."""

    def scratch(self, t: Tensor, zeros: bool = False) -> Tensor:
        """What the function returns instead of ``t``, which it has made."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    """``kernel[grid](*args, **kwargs)``; the compiled kernel, or None where there is none (Triton's interpreter)."""
    record: Recorder | None = getattr(_open, "record", None)
    return kernel[grid](*args, **kwargs) if record is None else record.launch(kernel, grid, *args, **kwargs)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zeros: bool = False) -> Tensor:
    """A tensor, uninitialised or of zeros, that nobody but the launches of a call uses."""
    record: Recorder | None = getattr(_open, "record", None)
    t = (torch.zeros if zeros else torch.empty)(shape, dtype=dtype, device=device)
    return t if record is None else record.scratch(t, zeros)


@contextlib.contextmanager
def recording(record: Recorder) -> Iterator[None]:
    """Have ``launch`` and ``scratch`` of this thread leave to ``record`` what they do."""
    before = getattr(_open, "record", None)
    _open.record = record
    try:
        yield
    finally:
        _open.record = before


def is_recording() -> bool:
    """Whether somebody notes what this thread launches."""
    return getattr(_open, "record", None) is not None


def repeatable(*tensors: Tensor | None) -> bool:
    """Whether launches can stand for a call of these tensors: nobody traces it, and no subclass hides behind one."""
    for t in tensors:
        if type(t) is not Tensor and t is not None and type(t) is not torch.nn.Parameter:
            return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether gradients may be asked for."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


@contextlib.contextmanager
def of_fixed() -> Iterator[None]:
    """Launches in here, and scratch tensors made here, depend on nothing but what calls have in common.

    Whatever else the launches of a call do to these scratch tensors they must undo: ``Launches.repeat`` can keep them.
    """
    before = getattr(_open, "fixed", False)
    _open.fixed = True
    try:
        yield
    finally:
        _open.fixed = before


def form_of(t: Tensor) -> tuple[Any, ...]:
    """All of ``t`` that a launch depends on; Triton tells addresses apart by 16 bytes."""
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15


class Room:
    """How much scratch memory calls of one plan may keep: layers with scales of their own are calls of their own."""

    def __init__(self) -> None:
        self._left = _MOST_TOGETHER

    def take(self, size: int) -> bool:
        """Whether so many bytes may be kept; they are counted then."""
        if size > min(self._left, _MOST_KEPT):
            return False
        self._left -= size
        return True


class Kept(dict[int, tuple[list[Tensor], dict[str, int]]]):
    """By stream, memory that calls may use one after the other, and where its kinds begin.

    Args:
        room: For scratch memory; None: nobody shares it.
    """

    def __init__(self, room: Room | None = None) -> None:
        super().__init__()
        self._room = Room() if room is None else room

    def keep(self, stream: int, memory: dict[str, Tensor], addresses: dict[str, int]) -> None:
        """Keep what the launches of ``of_fixed`` left, and scratch memory as long as there is room."""
        kinds = [k for k, t in memory.items() if k == "kept" or (k == "scratch" and self._room.take(t.nbytes))]
        self[stream] = [memory[kind] for kind in kinds], {kind: addresses[kind] for kind in kinds}


class _Move(NamedTuple):
    """Where the addresses of one moving tensor stand: arguments ``(values, at, offset)``, and maps likewise."""

    name: str
    slots: list[tuple[list[Any], int, int]]
    maps: list[tuple[list[Any], int, int, Callable[[int], Any], dict[int, Any]]]


class Launches:
    """The launches of one call: recorded as they are made, then made again.

    Args:
        moving: Tensors by name whose places change from call to call.
        staying: Tensors that stay where they are. Whoever holds the record must hold them.
    """

    def __init__(self, moving: dict[str, Tensor], staying: Iterable[Tensor | None] = ()) -> None:
        self._moving = [(name, t.data_ptr(), _width(t), _storage(t)) for name, t in moving.items()]
        self.ties: set[tuple[str, str, int]] = set()
        self._staying = {_storage(t) for t in staying if t is not None}
        self._tensors: list[Tensor] = []  # so that no two scratch tensors lie in the same place while this is recorded
        self._bytes = {"scratch": 0, "zeros": 0, "kept": 0}
        self._parts: dict[str, tuple[str, int]] = {}
        self.launches: list[Again] = []
        self._hooked: list[Any] = []
        self._complete = True
        #: Held from placing addresses to the last launch, which may use memory that other calls of the record use, too.
        self.lock = threading.Lock()
        self._moves: list[_Move] | None = None
        self._places: list[int] = []

    @functools.cached_property
    def sizes(self) -> list[tuple[str, int]]:
        """Bytes of scratch memory of each kind that there is; asked for when all is recorded."""
        return [(kind, size) for kind, size in self._bytes.items() if size]

    @property
    def complete(self) -> bool:
        """Whether all launches can be repeated."""
        return self._complete and bool(self.launches)

    def close(self) -> Launches | None:
        """The record, if it is complete; nothing is recorded after this."""
        self._tensors.clear()
        return self if self.complete else None

    def scratch(self, t: Tensor, zeros: bool = False) -> Tensor:
        """``t``, a contiguous tensor that only the launches of the call use, made anew for every repetition."""
        kind = "zeros" if zeros else "kept" if getattr(_open, "fixed", False) else "scratch"
        name = f"scratch {len(self._tensors)}"
        self._parts[name] = kind, self._bytes[kind]
        self._bytes[kind] += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._moving.append((name, t.data_ptr(), max(1, t.nbytes), _storage(t)))
        self._tensors.append(t)
        return t

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        """As the function, and recorded."""
        given = [int(value) if isinstance(value, Number) else value for value in args]
        compiled = kernel[grid](*given, **kwargs)
        if compiled is None:
            self._complete = False
            return compiled
        names = kernel.arg_names[len(args) :]
        values = [*given, *(kwargs[n] if n in kwargs else kernel.signature.parameters[n].default for n in names)]
        slots = [(i, value.name, 0) for i, value in enumerate(args) if isinstance(value, Number)]
        maps = []
        for i, value in enumerate(values):
            base = value if isinstance(value, Tensor) else getattr(value, "base", None)
            if not isinstance(base, Tensor):
                continue
            found = self._find(base)
            if base is value:
                values[i] = base.data_ptr()
                if found is not None:
                    slots.append((i, *found))
            else:
                name, offset = found or ("", base.data_ptr())
                values[i] = described = copy.copy(value)
                described.base = None  # the record keeps no tensor of the call alive
                maps.append(Map(i, name, offset, describer(described), {}))
        again = Again(compiled[(*grid, 1, 1)[:3]], values, slots, maps, -1, getattr(_open, "fixed", False))
        self._hooked.append(again)
        self.launches.append(direct(compiled, grid, again) or again)
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
            if name in self._parts:
                kind, part = self._parts[name]
                return kind, part + offset
            self.ties |= {(name, other, offset - far) for far, other in views if other != name}
            return name, offset
        if storage not in self._staying:
            self._complete = False
        return None

    def repeat(self, device: torch.device, addresses: dict[str, int], kept: Kept | None = None) -> bool:
        """Make the launches again, on the current stream.

        Args:
            device: For scratch tensors.
            addresses: Where each moving tensor begins. Their shapes, strides, dtypes and alignments must be the same,
                and so must be the device.
            kept: What launches of ``of_fixed`` left, which need not be made again then, and memory for the others: the
                same for calls whose common tensors have the same contents. None: all launches are made, in memory of
                their own. So they are while a graph is captured, which outlives whoever holds this.

        Returns:
            Whether they were made: not if tensors overlapped when they were recorded, and lie otherwise now.
        """
        if self.ties and any(addresses[other] - addresses[name] != apart for name, other, apart in self.ties):
            return False
        stream = 0
        if device.type == "cuda":
            stream = torch._C._cuda_getCurrentRawStream(device.index or 0)
            if kept is not None and torch._C._cuda_isCurrentStreamCapturing():
                kept = None
        held = None if kept is None else kept.get(stream)
        if held is not None:
            addresses.update(held[1])
        memory = self._memory(device, addresses)
        addresses[""] = 0
        if hooked():
            for one in self._hooked:
                if held is None or not one.once:
                    start_slowly(one, addresses)
        else:
            with self.lock:  # arguments stay where they are from one call to the next, for most are the same
                self._place(addresses)
                for start, values, _slots, _maps, stream_at, once in self.launches:
                    if held is None or not once:
                        if stream_at >= 0:
                            values[stream_at] = stream
                        start(*values)
        if kept is not None and held is None:
            kept.keep(stream, memory, addresses)
        return True

    def _memory(self, device: torch.device, addresses: dict[str, int]) -> dict[str, Tensor]:
        """Scratch memory, but for what has an address."""
        memory = {}
        for kind, size in self.sizes:
            if kind not in addresses:
                make = torch.zeros if kind == "zeros" else torch.empty
                memory[kind] = t = make(size, dtype=torch.uint8, device=device)
                addresses[kind] = t.data_ptr()
        return memory

    def _place(self, addresses: dict[str, int]) -> None:
        """Put the addresses that differ from those of the last call into the arguments."""
        if self._moves is None:
            self._moves = _moves(self.launches)
            self._places = [-1] * len(self._moves)
        places = self._places
        for n, (name, slots, maps) in enumerate(self._moves):
            address = addresses[name]
            if places[n] == address:
                continue
            for values, at, offset in slots:
                values[at] = address + offset
            for values, at, offset, make, made in maps:
                described = made.get(address)
                values[at] = make_map(made, address, make, offset) if described is None else described
            places[n] = address


def make_map(made: dict[int, Any], address: int, make: Callable[[int], Any], offset: int) -> Any:
    """A tensor map that begins ``offset`` bytes behind an address by which it will be known."""
    if len(made) >= _MOST_MAPS:
        made.clear()
    described = made[address] = make(address + offset)
    return described


class Recorded(NamedTuple):
    """What a form of call came to: its launches, and columns of its output."""

    launches: Launches
    dim: int
    kept: Kept | None = None


class Store(dict[Any, Any]):
    """What forms of calls came to, all forgotten when they are too many."""

    most = 4096
    stores: ClassVar[list[Store]] = []

    def __init__(self) -> None:
        super().__init__()
        self.stores.append(self)

    def keep(self, form: Any, found: Any) -> None:
        """Remember what a form came to."""
        if len(self) >= self.most:
            self.clear()
        self[form] = found

    @classmethod
    def forget(cls) -> None:
        """Empty all stores: after somebody has replaced kernels, or what chooses among them."""
        for store in cls.stores:
            store.clear()


# Records of ``repeatedly``.
_calls = Store()


def repeatedly(call: Callable[..., None], key: tuple[Any, ...], *numbers: Number, **tensors: Tensor) -> None:
    """``call(**tensors)``, which does nothing but launch; or the launches that it made the last time.

    Args:
        call: What launches.
        key: What else launches depend on, besides shapes, strides, dtypes, device and alignments of the tensors, and
            which call it is.
        numbers: Positional arguments of its launches that may differ from one call to the next.
        tensors: All that it reads and writes, on the current device.
    """
    first = next(iter(tensors.values()))
    key = (key, *[form_of(t) for t in tensors.values()])
    record: Launches | None = _calls.get(key)
    places = {name: t.data_ptr() for name, t in tensors.items()}
    for number in numbers:
        places[number.name] = number
    if record is not None and record.repeat(first.device, places):
        return
    record = Launches(tensors)
    with recording(record):
        call(**tensors)
    if record.close() is not None:
        _calls.keep(key, record)


def _moves(launches: list[Again]) -> list[_Move]:
    """The slots of launches by the tensor whose address they take."""
    moves: dict[str, _Move] = {}
    for _start, values, slots, maps, _at, _once in launches:
        for at, name, offset in slots:
            moves.setdefault(name, _Move(name, [], [])).slots.append((values, at, offset))
        for at, name, offset, make, made in maps:
            moves.setdefault(name, _Move(name, [], [])).maps.append((values, at, offset, make, made))
    return list(moves.values())


def _width(t: Tensor) -> int:
    """Bytes from the first column of a row to the end of the last."""
    return ((t.shape[-1] - 1) * t.stride(-1) + 1) * t.element_size()


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
