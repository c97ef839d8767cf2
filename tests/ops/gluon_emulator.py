"""Runs Gluon kernels on a CPU: their Python, with what the chip would do emulated by torch and threads.

Gluon has no interpreter, and a warp-specialised kernel goes wrong in ways that compiling does not show: a barrier that
waits for the wrong parity, a buffer handed back while a product still reads it, a coordinate one tile off. Here every
partition of every program is a thread; barriers, tensor-map copies and asynchronous products behave as on the chip, and
as unkindly as it may:

* A tensor-map load fills its tile with NaN at once and with data some time later; a store reads its tile later still.
* An asynchronous product reads its operands when it is waited for, not when it is issued.
* An ordinary write that has not been fenced is NaN to the tensor cores, and an error to the copy engine.
* When every thread waits, the deadlock is an error that names the barriers.

What this cannot show: speed, registers, and the order in which real memory becomes visible.
"""

from __future__ import annotations

import math
import random
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper as hopper_module

from sparseattn.kernels import hopper as ours
from sparseattn.kernels import hopper_latent as latent
from sparseattn.kernels import hopper_merge, hopper_turned

_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "int64": torch.int64,
    "int1": torch.bool, "int16": torch.int16, "uint8": torch.uint8,
}  # fmt: skip


def torch_dtype(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else _DTYPES[str(unwrap(dtype))]


def unwrap(value: Any) -> Any:
    return value.value if isinstance(value, gl.constexpr) else value


class EmulationError(AssertionError):
    """The kernel did what the chip would punish."""


class Int(int):
    """A scalar of kernel code: an int that knows ``.to``."""

    def to(self, dtype: Any) -> Any:
        return float(self) if torch_dtype(dtype).is_floating_point else self


def _wrap(value: Any) -> Any:
    return Int(value) if type(value) in (int, Int) else value


for _name in (
    "add",
    "sub",
    "mul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "radd",
    "rsub",
    "rmul",
    "rand",
    "ror",
    "rxor",
):

    def _operation(self: Int, other: Any, name: str = f"__{_name}__") -> Any:
        other = unwrap(other)
        return _wrap(getattr(int, name)(self, other)) if isinstance(other, int) else NotImplemented

    setattr(Int, f"__{_name}__", _operation)


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


# Integer division truncates in kernels and floors in Python.
Int.__floordiv__ = lambda a, b: Int(_truncated(a, b)) if isinstance(b, int) else NotImplemented  # type: ignore[method-assign]
Int.__mod__ = lambda a, b: Int(a - b * _truncated(a, b)) if isinstance(b, int) else NotImplemented  # type: ignore[method-assign]


class Tile:
    """A register tensor: data and layout. ``pending`` while an asynchronous product still owes the data."""

    def __init__(self, data: Tensor | None, layout: Any = None, shape: Sequence[int] | None = None) -> None:
        self._data = data
        self.layout = layout
        self._shape = tuple(data.shape) if data is not None else tuple(shape or ())

    @property
    def data(self) -> Tensor:
        if self._data is None:
            raise EmulationError("a product's result was read before it was waited for")
        return self._data

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=self.layout, shape=self._shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, dtype: Any) -> Tile:
        return Tile(self.data.to(torch_dtype(dtype)), self.layout)

    def __getitem__(self, key: Any) -> Tile:
        layout = self.layout.parent if isinstance(self.layout, gl.SliceLayout) else self.layout
        return Tile(self.data[key], layout)


def _data(value: Any) -> Any:
    value = unwrap(value)
    return value.data if isinstance(value, Tile) else value


def _layout(*values: Any) -> Any:
    return next((v.layout for v in values if isinstance(v, Tile)), None)


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*values: Any) -> Any:
        if not any(isinstance(v, Tile) for v in values):
            return _wrap(function(*(unwrap(v) for v in values)))
        return Tile(function(*(_data(v) for v in values)), _layout(*values))

    return run


def _divide(a: Any, b: Any) -> Any:
    return (
        torch.div(a, b, rounding_mode="trunc") if isinstance(a, Tensor) or isinstance(b, Tensor) else _truncated(a, b)
    )


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "truediv": lambda a, b: a / b,
    "floordiv": _divide, "mod": lambda a, b: a - b * _divide(a, b), "and": lambda a, b: a & b,
    "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "lshift": lambda a, b: a << b, "rshift": lambda a, b: a >> b,
}  # fmt: skip
for _name, _function in _BINARY.items():

    def _forward(self: Tile, other: Any, f: Callable[[Any, Any], Any] = _function) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return elementwise(f)(self, other)

    def _backward(self: Tile, other: Any, f: Callable[[Any, Any], Any] = _function) -> Any:
        return elementwise(f)(other, self)

    setattr(Tile, f"__{_name}__", _forward)
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Tile, f"__r{_name}__", _backward)
Tile.__neg__ = lambda self: Tile(-self.data, self.layout)  # type: ignore[attr-defined]
Tile.__invert__ = lambda self: Tile(~self.data, self.layout)  # type: ignore[attr-defined]
Tile.__hash__ = None  # type: ignore[assignment]


class Pointer:
    """An address in a tensor's memory, or one of each element of a tile."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory = memory
        self.offset = offset

    @staticmethod
    def of(t: Tensor) -> Pointer:
        memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        return Pointer(memory, Int(t.storage_offset()))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + unwrap(other))

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset - unwrap(other))

    __radd__ = __add__

    def to(self, dtype: Any) -> Pointer:
        """Its address, which only assembly gets."""
        return self

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def check(self, index: Tensor) -> Tensor:
        if index.numel():
            first, last = index.aminmax()
            self._check(int(first), int(last))
        return index

    def _check(self, first: int, last: int) -> None:
        if first < 0 or last >= self.memory.numel():
            raise EmulationError("an address outside of its tensor's memory")

    def strided(self, first: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        """A view of the memory, whose strides are not negative."""
        self._check(first, first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
        return self.memory.as_strided(shape, strides, first)

    def at(self, offset: Any) -> Tensor:
        """The one element there: a view."""
        return self.strided(int(offset), (), ())


def _poison(dtype: torch.dtype) -> float:
    """What memory holds that nobody has written: NaN, of bytes that of either float8."""
    return math.nan if dtype.is_floating_point else 255 if dtype == torch.uint8 else -(2**31)


class Memory:
    """Shared memory: elements of one allocation, and where among them each logical element lies.

    ``cells`` is a view of the elements with two dimensions for each logical one, of which the outer counts the panels
    that a swizzled layout keeps one after another.
    """

    def __init__(
        self, storage: Tensor, fenced: Tensor, barriers: dict[int, Barrier], cells: Tensor, layout: Any
    ) -> None:
        self.storage, self.fenced, self.barriers = storage, fenced, barriers
        self.cells, self.layout = cells, layout
        sizes = cells.shape
        self.shape = tuple(sizes[i] * sizes[i + 1] for i in range(0, len(sizes), 2))

    @staticmethod
    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Memory:
        dtype = torch_dtype(dtype)
        storage = torch.full((math.prod(shape),), _poison(dtype), dtype=dtype)
        fenced = torch.ones(storage.nbytes, dtype=torch.bool)
        return Memory(storage, fenced, {}, cells(storage, 0, shape, layout), layout)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def first(self) -> int:
        """Place of the first element."""
        return self.cells.storage_offset()

    def _part(self, cells: Tensor) -> Memory:
        return Memory(self.storage, self.fenced, self.barriers, cells, self.layout)

    def index(self, i: Any) -> Memory:
        i = int(unwrap(i))
        if not 0 <= i < self.shape[0]:
            raise EmulationError(f"stage {i} of {self.shape[0]}")
        panel = self.cells.shape[1]
        return self._part(self.cells[i // panel, i % panel])

    def slice(self, start: Any, length: Any, dim: int = 0) -> Memory:
        start, length = int(unwrap(start)), int(unwrap(length))
        panel = self.cells.shape[2 * dim + 1]
        cells = self.cells.narrow(2 * dim, start // panel, -(-length // panel))
        if length >= panel:
            assert start % panel == length % panel == 0
            return self._part(cells)
        return self._part(cells.narrow(2 * dim + 1, start % panel, length))

    def permute(self, order: Sequence[int]) -> Memory:
        return self._part(self.cells.permute([2 * i + j for i in order for j in range(2)]))

    def load(self, layout: Any = None) -> Tile:
        return Tile(self.read(), layout)

    def store(self, tile: Tile) -> None:
        if tuple(tile.shape) != self.shape:
            raise EmulationError(f"a tile of shape {tile.shape} stored to memory of shape {self.shape}")
        self.write(tile.data)
        context().written.append(self.unfence())

    def read(self) -> Tensor:
        """A copy of the elements."""
        return self.cells.clone().reshape(self.shape)

    def write(self, data: Tensor) -> None:
        self.cells.copy_(data.reshape(self.cells.shape))

    def flags(self) -> Tensor:
        """Of each element, whether the asynchronous units see it: a view, of its first byte's flag."""
        size = self.storage.element_size()
        strides = [stride * size for stride in self.cells.stride()]
        return self.fenced.as_strided(self.cells.shape, strides, self.first * size)

    def unfence(self) -> Tensor:
        """Note an ordinary write; returns the flags that a fence sets."""
        return self.flags().fill_(False)

    def check_fenced(self) -> None:
        """What the copy engine reads must have been fenced."""
        if not bool(self.flags().all()):
            raise EmulationError("a tensor-map store reads shared memory that was written without a fence")

    def operand(self) -> Tensor:
        """What the tensor cores read: NaN where an ordinary write has not been fenced.

        No error, because a kernel may drop a product whose operands another warpgroup is still writing.
        """
        flags = self.flags()
        if bool(flags.all()):
            return self.read()
        return self.cells.masked_fill(~flags, math.nan).reshape(self.shape)


def cells(storage: Tensor, first: int, shape: Sequence[int], layout: Any) -> Tensor:
    """The view that ``Memory`` keeps: swizzled layouts keep panels of 128 bytes a row one after another."""
    shape = [int(unwrap(n)) for n in shape]
    width = getattr(layout, "swizzle_byte_width", 0)
    panel = width // storage.element_size()
    rank = getattr(layout, "rank", len(shape))
    if not panel or shape[-1] <= panel:
        panel = shape[-1]
    lead, inner, panels = shape[:-rank], shape[-rank:-1], shape[-1] // panel
    physical = storage[first : first + math.prod(shape)].view(*lead, panels, *inner, panel)
    physical = physical.movedim(len(lead), -2)
    for dim in range(len(shape) - 1):
        physical = physical.unsqueeze(2 * dim)
    return physical


def view(memory: Memory, dtype: Any, shape: Any, layout: Any) -> Memory:
    """The same bytes under another dtype, shape and layout."""
    count = 1
    for stride, size in sorted(zip(memory.cells.stride(), memory.cells.shape, strict=True)):
        if size > 1 and stride != count:
            raise EmulationError("a view of memory that is not one piece")
        count *= size
    layout, storage = unwrap(layout), memory.storage.view(torch_dtype(dtype))
    first = memory.first * memory.storage.element_size() // storage.element_size()
    return Memory(storage, memory.fenced, memory.barriers, cells(storage, first, unwrap(shape), layout), layout)


class Context(threading.local):
    program: int = 0
    programs: int = 1
    world: World


_context = Context()


def context() -> Context:
    return _context


class World:
    """The threads of a launch, their barriers and the copies that are under way."""

    def __init__(self, seed: int) -> None:
        self.changed = threading.Condition()
        self.threads = 0
        self.waiting: dict[int, tuple[Callable[[], bool], str]] = {}
        self.copies: list[Callable[[], None]] = []
        self.error: BaseException | None = None
        self.random = random.Random(seed)

    def _copy_some(self) -> bool:
        """Finish one copy, in any order; call with the lock held."""
        if not self.copies:
            return False
        self.copies.pop(self.random.randrange(len(self.copies)))()
        self.changed.notify_all()
        return True

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        me = threading.get_ident()
        with self.changed:
            while not ready():
                if self.error is not None:
                    raise EmulationError("another thread failed")
                if self._copy_some():
                    continue
                self.waiting[me] = (ready, what)
                self._look_for_deadlock()
                self.changed.wait(timeout=0.5)
                self.waiting.pop(me)

    def _look_for_deadlock(self) -> None:
        """With the lock held: nobody runs, nobody could."""
        stuck = self.error is None and not self.copies and len(self.waiting) == self.threads > 0
        if stuck and not any(ready() for ready, _ in self.waiting.values()):
            self.error = EmulationError(f"deadlock: all wait, for {sorted(what for _, what in self.waiting.values())}")
            self.changed.notify_all()

    def run(self, target: Callable[[], None], program: int, programs: int) -> list[bool]:
        """Start a thread; the one entry of the result turns true when it has ended."""
        ended = [False]

        def body() -> None:
            _context.world, _context.program, _context.programs = self, program, programs
            _context.written, _context.products, _context.stores = [], [], []
            _context.copying, _context.groups = [], []
            try:
                target()
            except BaseException as error:
                with self.changed:
                    self.error = error if self.error is None else self.error
            finally:
                with self.changed:
                    self.threads -= 1
                    ended[0] = True
                    self._look_for_deadlock()
                    self.changed.notify_all()

        with self.changed:
            self.threads += 1
        threading.Thread(target=body, daemon=True).start()
        return ended


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.phase = self.bytes = 0
        self.copied: list[Tensor] = []

    def settle(self) -> None:
        if self.count and self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
        if self.pending < 0:
            raise EmulationError("more arrivals at a barrier than it counts")


def barrier(memory: Memory) -> Barrier:
    return memory.barriers.setdefault(memory.first, Barrier())


class mbarrier:
    """Stands in for ``hopper.mbarrier``."""

    class MBarrierLayout:
        pass

    @staticmethod
    def init(memory: Memory, count: int) -> None:
        b = barrier(memory)
        b.count = b.pending = int(unwrap(count))

    @staticmethod
    def expect(memory: Memory, size: int, pred: Any = True) -> None:
        if unwrap(pred):
            with context().world.changed:
                b = barrier(memory)
                b.bytes += int(unwrap(size))
                b.pending -= 1
                b.settle()
                context().world.changed.notify_all()

    @staticmethod
    def arrive(memory: Memory, *, count: int = 1, pred: Any = True) -> None:
        if unwrap(pred):
            with context().world.changed:
                b = barrier(memory)
                b.pending -= int(unwrap(count))
                b.settle()
                context().world.changed.notify_all()

    @staticmethod
    def wait(memory: Memory, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if unwrap(pred):
            parity = int(unwrap(phase))
            if parity not in (0, 1):
                raise EmulationError(f"a parity of {parity}")
            b = barrier(memory)
            context().world.wait(lambda: b.phase != parity, f"barrier {memory.first} parity {parity}")
            context().written.extend(b.copied)  # what threads have copied is for whoever waits to fence


class Descriptor:
    """A tensor map."""

    def __init__(self, d: Any) -> None:
        self.dtype = d.base.dtype
        self.pointer = Pointer.of(d.base)
        self.extent, self.strides, self.box = list(d.shape), list(d.strides), list(d.block_shape)
        self.layout = d.layout
        size = math.prod(self.box) * d.base.element_size()
        self.block_type = types.SimpleNamespace(shape=self.box, nbytes=size)
        self.nbytes_per_cta = size

    def box_at(self, coordinates: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """What of a box lies inside of the tensor: a view of the tensor's memory, and where in the box that is."""
        at = [int(unwrap(c)) for c in coordinates]
        if any(not -(2**31) <= c < 2**31 for c in at):
            raise EmulationError("a coordinate past 32 bits")
        memory = self.pointer.memory
        size = memory.element_size()
        total = sum(c * s for c, s in zip(at, self.strides, strict=True)) * size % 2**64
        first = (total - 2**64 if total >= 2**63 else total) // size + int(self.pointer.offset)
        inside = [(max(0, -c), max(0, -c, min(n, e - c))) for n, c, e in zip(self.box, at, self.extent, strict=True)]
        # A dimension of one step has no stride: it may be one that wraps.
        strides = [s if n > 1 else 0 for n, s in zip(self.box, self.strides, strict=True)]
        shape = [end - start for start, end in inside]
        where = tuple(slice(start, end) for start, end in inside)
        if 0 in shape:
            return memory.new_empty(shape), where
        first += sum(start * s for (start, _), s in zip(inside, strides, strict=True))
        return self.pointer.strided(first, shape, strides), where


def async_load(d: Descriptor, coordinates: Any, full: Memory, tile: Memory, pred: Any = True) -> None:
    if not unwrap(pred):
        return
    if list(tile.shape) != d.box:
        raise EmulationError(f"a box of {d.box} loaded to memory of shape {tile.shape}")
    source, inside = d.box_at(coordinates)
    tile.cells.fill_(_poison(tile.dtype))

    def copy() -> None:
        data = torch.zeros(d.box, dtype=d.dtype)
        data[inside] = source
        tile.write(data)
        b = barrier(full)
        b.bytes -= d.block_type.nbytes
        b.settle()

    with context().world.changed:
        context().world.copies.append(copy)


def _async_write(d: Descriptor, coordinates: Any, tile: Memory, add: bool) -> None:
    if any(int(unwrap(c)) < 0 for c in coordinates):
        raise EmulationError("a tensor map writes at a negative coordinate: an illegal instruction on an H200")
    target, inside = d.box_at(coordinates)
    tile.check_fenced()
    world, done = context().world, [False]

    def copy() -> None:
        data = tile.read()[inside]
        target.copy_(target + data if add else data)
        done[0] = True

    with world.changed:
        world.copies.append(copy)
    context().stores.append(done)


def async_store(d: Descriptor, coordinates: Any, tile: Memory) -> None:
    _async_write(d, coordinates, tile, add=False)


def async_reduce_add(d: Descriptor, coordinates: Any, tile: Memory) -> None:
    _async_write(d, coordinates, tile, add=True)


class tma:
    """Stands in for ``hopper.tma``."""

    @staticmethod
    def store_wait(pendings: int) -> None:
        stores = context().stores
        oldest = stores[: len(stores) - int(unwrap(pendings))]
        context().world.wait(lambda: all(done[0] for done in oldest), "tensor-map stores")
        del stores[: len(oldest)]


def _parent(layout: Any) -> Any:
    while isinstance(layout, gl.SliceLayout):
        layout = layout.parent
    return layout


def copy_rows(tile: Memory, pointers: Pointer, mask: Any = None) -> None:
    """Copies of a partition's threads, of which the emulator's one thread makes all; masked elements are zeros."""
    where = pointers.offset.data
    if tuple(tile.shape) != tuple(where.shape):
        raise EmulationError(f"{tuple(where.shape)} elements copied to memory of shape {tile.shape}")
    keep = torch.as_tensor(True if mask is None else _data(mask)).expand(where.shape)
    pointers.check(where[keep])
    tile.cells.fill_(_poison(tile.dtype))
    tile.unfence()

    def copy() -> None:
        tile.write(torch.where(keep, pointers.memory[torch.where(keep, where, 0)], 0))

    context().copying.append((tile, copy, 32 * math.prod(_parent(pointers.offset.layout).warps_per_cta)))


class async_copy:
    """Stands in for ``ampere.async_copy``, but for the copies themselves."""

    @staticmethod
    def mbarrier_arrive(memory: Memory, increment_count: Any = True) -> None:
        """Each thread of the partition arrives when the copies that it has asked for are there."""
        if unwrap(increment_count):
            raise EmulationError("the emulator knows no arrivals beyond those that a barrier counts")
        asked, context().copying = context().copying, []
        (threads,) = {threads for _, _, threads in asked}

        def arrive() -> None:
            b = barrier(memory)
            for tile, one, _ in asked:
                one()
                b.copied.append(tile.flags())
            b.pending -= threads
            b.settle()

        with context().world.changed:
            context().world.copies.append(arrive)

    @staticmethod
    def commit_group() -> None:
        asked, context().copying = context().copying, []
        done = [False]

        def copy() -> None:
            for tile, one, _ in asked:
                one()
                context_written.append(tile.flags())
            done[0] = True

        context_written = context().written
        context().groups.append(done)
        with context().world.changed:
            context().world.copies.append(copy)

    @staticmethod
    def wait_group(num_outstanding: int = 0) -> None:
        groups = context().groups
        oldest = groups[: len(groups) - int(unwrap(num_outstanding))]
        context().world.wait(lambda: all(done[0] for done in oldest), "copies")
        del groups[: len(oldest)]


def fence_async_shared(*_: Any, **__: Any) -> None:
    for flags in context().written:
        flags.fill_(True)
    context().written.clear()


def warpgroup_mma(a: Any, b: Memory, acc: Tile, *, use_acc: Any = True, is_async: bool = False, **_: Any) -> Tile:
    shape = (a.shape[0], b.shape[1])
    if tuple(acc.shape) != shape or a.shape[1] != b.shape[0]:
        raise EmulationError(f"a product of {tuple(a.shape)} and {tuple(b.shape)} into {tuple(acc.shape)}")
    result = Tile(None, acc.layout, shape)

    def compute() -> None:
        left = a.operand() if isinstance(a, Memory) else a.data
        product = left.float() @ b.operand().float()
        result._data = product + acc.data if unwrap(use_acc) else product

    context().products.append(compute)
    if not unwrap(is_async):
        warpgroup_mma_wait(0, deps=(result,))
    return result


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    products = context().products
    while len(products) > int(unwrap(num_outstanding)):
        products.pop(0)()
    return deps[0] if len(deps) == 1 else tuple(deps)


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    if not isinstance(pointer.offset, Tile):
        if mask is not None and not unwrap(mask):
            return other
        return _wrap(pointer.at(pointer.offset).item())
    where = pointer.offset.data
    if mask is None:
        return Tile(pointer.memory[pointer.check(where)], pointer.offset.layout)
    keep = torch.as_tensor(_data(mask)).expand(where.shape)
    pointer.check(where[keep])
    fill = torch.full(where.shape, float(unwrap(other))).to(pointer.memory.dtype)
    if not keep.any():  # of a tensor without elements, perhaps
        return Tile(fill, pointer.offset.layout)
    return Tile(torch.where(keep, pointer.memory[torch.where(keep, where, 0)], fill), pointer.offset.layout)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    where = torch.as_tensor(_data(pointer.offset))
    data = torch.as_tensor(_data(value)).to(pointer.memory.dtype)
    keep = torch.as_tensor(True if mask is None else _data(mask))
    where, data, keep = torch.broadcast_tensors(where, data, keep)
    pointer.memory[pointer.check(where[keep])] = data[keep]


def _atomic_add(pointer: Pointer, value: Any, **_: Any) -> Any:
    if type(unwrap(value)) is int and not value:  # a thread that waits for others
        time.sleep(0.001)
    with context().world.changed:
        at = int(pointer.offset)
        old = pointer.memory[at].item()
        pointer.memory[at] = old + int(unwrap(value))
        return _wrap(old)


def _reduce(tensor_op: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(x: Tile, axis: Any = None, **_: Any) -> Any:
        data = tensor_op(x.data, int(unwrap(axis)))
        if data.dim() == 0:
            return _wrap(data.item())
        return Tile(data, gl.SliceLayout(int(unwrap(axis)), x.layout) if x.layout is not None else None)

    return run


def _pick(smaller: bool) -> Callable[[Any, Any], Any]:
    def run(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            like = a if isinstance(a, Tensor) else b
            a, b = (torch.as_tensor(x, dtype=like.dtype) for x in (a, b))
            return torch.minimum(a, b) if smaller else torch.maximum(a, b)
        return min(a, b) if smaller else max(a, b)

    return run


def _select(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Tensor):
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return a if condition else b
        shape = a.shape if isinstance(a, Tensor) else b.shape
        condition = torch.full(shape, bool(condition))
    like = a if isinstance(a, Tensor) else b if isinstance(b, Tensor) else None
    if like is None:
        like = torch.tensor(0.0) if isinstance(a, float) or isinstance(b, float) else torch.tensor(0)
    a, b = (torch.as_tensor(x, dtype=like.dtype) for x in (a, b))
    return torch.where(condition, a, b)


def _math(name: str) -> Callable[[Any], Any]:
    return lambda x: getattr(torch, name)(x) if isinstance(x, Tensor) else getattr(torch, name)(torch.tensor(x)).item()


def _signed_byte(x: Tensor, words: Tensor, selector: Tensor) -> Tensor:
    """``x`` where the byte that the selector names four times, for its sign, is negative; -inf elsewhere."""
    byte = selector & 7
    assert torch.equal(selector, 0x8888 + 0x1111 * byte)
    return torch.where((words >> (8 * byte + 7)) & 1 == 1, x, -math.inf)


def _raise(at: Pointer, mass: Tile, enough: Tile, least: Tile) -> None:
    """Raise what lies at the pointers to log(mass) - least ln 2, but not below 0, where a mass is enough."""
    score = ((torch.log2(mass.data) - least.data) * math.log(2.0)).clamp(min=0.0)
    _atomic_max(at, Tile(score), Tile(mass.data >= enough.data))


def _assembly(code: str, constraints: str, arguments: Sequence[Any], **_: Any) -> Any:
    if code.strip() == "mov.u32 $0, 0;" or code.startswith("griddepcontrol."):
        return Int(0)
    if "cp.async.bulk.prefetch.L2" in code:  # nothing that a kernel could see
        return Int(0)
    for approximate, exact in (("lg2", "log2"), ("cos", "cos"), ("sin", "sin")):
        if code == f"{approximate}.approx.f32 $0, $1;":
            return elementwise(_math(exact))(*arguments)
    if code.startswith("{ .reg .b32 t; prmt.b32 t, $2, 0, $3; lop3.b32 $0, $1, 0xff800000, t, 0xe4; }"):
        return elementwise(_signed_byte)(*arguments)
    if code.startswith("{ .reg .pred p;\nex2.approx.ftz.f32 $0,"):
        return elementwise(_math("exp2"))(arguments[0])
    if "@p red.relaxed.gpu.global.max.s32 [" in code:
        _raise(*arguments)
        return Int(0)
    raise EmulationError(f"the emulator does not know this assembly: {code}")


def _warp_specialize(partitions: Sequence[tuple[Callable[..., Any], Sequence[Any]]], *_: Any, **__: Any) -> None:
    world = context().world
    program, programs = context().program, context().programs
    others = [
        world.run(lambda function=function, args=args: function(*args), program, programs)
        for function, args in partitions[1:]
    ]
    function, args = partitions[0]
    function(*args)
    world.wait(lambda: all(ended[0] for ended in others), "the other partitions")


def _atomic_max(pointer: Pointer, value: Tile, mask: Any = None, **_: Any) -> None:
    where, data = pointer.check(pointer.offset.data[_data(mask)]), value.data[_data(mask)]
    with context().world.changed:
        pointer.memory.scatter_reduce_(0, where, data, "amax")


_LANGUAGE: dict[str, Any] = {
    "load": _load, "store": _store, "atomic_add": _atomic_add, "atomic_max": _atomic_max, "where": elementwise(_select),
    "minimum": elementwise(_pick(True)), "maximum": elementwise(_pick(False)),
    "exp2": elementwise(_math("exp2")), "log2": elementwise(_math("log2")), "abs": elementwise(_math("abs")),
    "sqrt": elementwise(_math("sqrt")),
    "max": _reduce(lambda x, a: x.amax(a)), "sum": _reduce(lambda x, a: x.sum(a)),
    "arange": lambda start, end, layout=None: Tile(torch.arange(unwrap(start), unwrap(end)), unwrap(layout)),
    "full": lambda shape, value, dtype, layout=None: Tile(
        torch.full([int(unwrap(n)) for n in shape], unwrap(value), dtype=torch_dtype(dtype)), unwrap(layout)),
    "zeros": lambda shape, dtype, layout=None: Tile(
        torch.zeros([int(unwrap(n)) for n in shape], dtype=torch_dtype(dtype)), unwrap(layout)),
    "reshape": lambda x, shape: Tile(x.data.reshape([int(unwrap(n)) for n in shape]), x.layout),
    "permute": lambda x, order: Tile(x.data.permute(*order), x.layout),
    "split": lambda x: tuple(Tile(half, x.layout) for half in x.data.unbind(-1)),
    "join": lambda a, b: Tile(torch.stack((a.data, b.data), -1), a.layout),
    "convert_layout": lambda x, layout, assert_trivial=False: Tile(x.data, unwrap(layout)),
    "program_id": lambda axis: Int(context().program), "num_programs": lambda axis: Int(context().programs),
    "static_range": lambda *args: [Int(i) for i in range(*(int(unwrap(a)) for a in args))],
    "allocate_shared_memory": lambda dtype, shape, layout: Memory.allocate(
        dtype, [int(unwrap(n)) for n in shape], unwrap(layout)),
    "inline_asm_elementwise": _assembly, "warp_specialize": _warp_specialize,
}  # fmt: skip


def _widened_halves(pairs: Tile, kind: str, dtype: Any) -> tuple[Tile, Tile]:
    """``hopper_turned.widened_halves``, whose assembly is not elementwise."""
    low = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    halves = pairs.data.contiguous().view(low).reshape(*pairs.shape, 2).to(torch_dtype(dtype))
    return Tile(halves[..., 0], pairs.layout), Tile(halves[..., 1], pairs.layout)


class _Language:
    """Stands in for ``triton.experimental.gluon.language``: names not emulated are the real ones, layouts above all."""

    def __getattr__(self, name: str) -> Any:
        if name in _LANGUAGE:
            return _LANGUAGE[name]
        if name in ("constexpr", "tensor") or name[0].isupper() or name.startswith(("int", "uint", "float", "bfloat")):
            return getattr(gl, name)
        raise EmulationError(f"the emulator does not know gl.{name}")


_SUBSTITUTES: list[tuple[Any, Any]] = [
    (gl, _Language()), (hopper_module.mbarrier, mbarrier), (hopper_module.tma, tma),
    (hopper_module.fence_async_shared, fence_async_shared), (hopper_module.warpgroup_mma, warpgroup_mma),
    (hopper_module.warpgroup_mma_wait, warpgroup_mma_wait), (ours.async_load, async_load),
    (ours.async_store, async_store), (latent.copy_rows, copy_rows), (latent.async_copy, async_copy),
    (ours.async_reduce_add, async_reduce_add), (ours.view, view),
    (hopper_turned.widened_halves, _widened_halves),
    (hopper_merge.thread_barrier, lambda: None),  # a partition is one thread here
]  # fmt: skip
_translated: dict[int, Callable[..., Any]] = {}


def translate(function: GluonJITFunction) -> Callable[..., Any]:
    """The function as plain Python whose globals are the emulator's."""
    if id(function) not in _translated:
        plain = function.fn
        names: dict[str, Any] = {}
        copy = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
        copy.__kwdefaults__ = plain.__kwdefaults__
        _translated[id(function)] = copy
        for name, value in plain.__globals__.items():
            names[name] = _substitute(value)
        names["range"] = _range
        names["min"], names["max"] = min, max
    return _translated[id(function)]


def _range(*args: Any) -> Any:
    return (Int(i) for i in range(*(int(unwrap(a)) for a in args)))


def _substitute(value: Any) -> Any:
    for real, stand_in in _SUBSTITUTES:
        if value is real:
            return stand_in
    if isinstance(value, GluonJITFunction):
        return translate(value)
    if type(value).__name__ == "ConstexprFunction":
        return lambda *args, **kwargs: unwrap(value.fn(*(unwrap(a) for a in args), **kwargs))
    return unwrap(value)


def _argument(value: Any) -> Any:
    """A launch argument as kernel code sees it."""
    if isinstance(value, Tensor):
        return Pointer.of(value)
    if type(value).__name__ == "TensorDescriptor":
        return Descriptor(value)
    if isinstance(value, bool):
        return value
    if hasattr(value, "__dataclass_fields__"):
        return types.SimpleNamespace(**{name: unwrap(v) for name, v in vars(value).items()})
    if isinstance(value, tuple):
        return tuple(_argument(v) for v in value)
    return _wrap(value)


class Emulated:
    """A Gluon kernel that launches on the CPU: ``Emulated(kernel)[grid](*args, **options)``.

    Launches may run for ``timeout`` seconds. ``order`` seeds the order in which copies finish.
    """

    def __init__(self, kernel: GluonJITFunction, timeout: float = 120.0, order: int = 0) -> None:
        self.kernel, self.timeout, self.order = kernel, timeout, order

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        if len(grid) > 1 and math.prod(grid[1:]) != 1:
            raise EmulationError("the emulator launches grids of one dimension")

        def launch(*args: Any, **options: Any) -> None:
            names = self.kernel.arg_names
            values = {name: _argument(value) for name, value in zip(names, args, strict=False)}
            values |= {name: _argument(value) for name, value in options.items() if name in names}
            function = translate(self.kernel)
            world = World(self.order)
            programs = [world.run(lambda: function(**values), i, int(grid[0])) for i in range(int(grid[0]))]
            deadline = time.monotonic() + self.timeout
            with world.changed:
                while not all(ended[0] for ended in programs) and world.error is None:
                    if time.monotonic() > deadline:
                        world.error = EmulationError(f"the launch did not end in {self.timeout} s")
                    world.changed.wait(timeout=0.5)
                while world.error is None and world._copy_some():
                    pass
            if world.error is not None:
                raise world.error

        return launch
