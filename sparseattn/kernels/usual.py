"""A recorded call made again in as few steps as Python can make it: a model's layers over one plan.

What a launch depends on was found out when the call was recorded. All that is left for every layer is to see that its
tensors have the form of that call, to allocate the output, and to put addresses into arguments that stand ready.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.kernels.launches import Kept, Recorded, differentiable, make_map, repeatable
from sparseattn.kernels.starts import Again, hooked

# Forms of calls that one plan remembers.
_MOST_FORMS = 8


def same_form(tensors: tuple[Tensor, ...], fixed: int | None = None) -> Callable[..., bool]:
    """What says of as many tensors whether they have types, shapes, strides, dtypes and devices of these.

    It says no, too, where somebody traces calls or may ask for gradients, and nobody did when this was made. Of tensors
    behind the first ``fixed`` ones the first size may differ.
    """
    fixed = len(tensors) if fixed is None else fixed
    if _guards_work() and not any(t.requires_grad for t in tensors):
        return _guard(*tensors, fixed=fixed)
    forms = [(t.shape[n >= fixed :], t.stride(), t.dtype, t.device) for n, t in enumerate(tensors)]

    def compare(*others: Tensor) -> bool:
        return (
            not any(t is None for t in others)
            and repeatable(*others)
            and not differentiable(*others)
            and [(t.shape[n >= fixed :], t.stride(), t.dtype, t.device) for n, t in enumerate(others)] == forms
        )

    return compare


def _guard(*tensors: Tensor, fixed: int) -> Callable[..., bool]:
    """TorchDynamo's ``same_form``, which takes a tenth of the time."""
    from torch._C._dynamo.guards import TensorGuards

    sizes: list[Any] = [[*t.shape] if n < fixed else [None, *t.shape[1:]] for n, t in enumerate(tensors)]
    strides: list[Any] = [list(t.stride()) for t in tensors]
    guards: Any = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guards.check
    return check


@functools.cache
def _guards_work() -> bool:
    """Whether this PyTorch has what ``_guard`` uses, and it tells tensors apart: nobody has promised either."""
    t = torch.empty(2, 2)
    others = (t[:1], t.t(), t.double(), torch.nn.Parameter(t), torch.empty(2, 2, requires_grad=True))
    try:
        with torch.enable_grad():
            check = _guard(t, t, fixed=1)
            same = all(check(t, torch.empty(n, 2)) is True for n in (2, 3))
            return same and not check(t[:1], t) and not any(check(t, other) for other in others[1:])
    except (ImportError, TypeError, SystemError):
        return False


def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """What makes contiguous tensors of one form on ``device``, which must be the current one of its kind."""
    make = _quick_empty(device.type)
    if make is None:
        return lambda: torch.empty(shape, dtype=dtype, device=device)
    form = shape, row_major(shape), dtype
    return lambda: make(*form)


def untraced_empty(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """What makes tensors of shapes, strides and dtypes on ``device``, which must be the current one of its kind."""
    make = _quick_empty(device.type)
    if make is not None:
        return make
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty`` on the current device of its kind, in half the time; where nobody traces calls."""
    make = _quick_empty(device.type)
    return torch.empty(shape, dtype=dtype, device=device) if make is None else make(shape, row_major(shape), dtype)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


@functools.cache
def _quick_empty(kind: str) -> Callable[..., Tensor] | None:
    """Inductor's ``(shape, strides, dtype) -> tensor``, which does without the dispatcher; None where it does not."""
    try:
        from torch._C._dynamo import guards

        make: Callable[..., Tensor] = getattr(guards, f"_empty_strided_{kind}")
        t = make((2, 3), (3, 1), torch.float16)
    except (ImportError, AttributeError, TypeError):
        return None
    form = t.shape, t.stride(), t.dtype, t.device.type
    return make if form == ((2, 3), (3, 1), torch.float16, kind) else None


class _Ready(NamedTuple):
    """Launches on one stream, with all arguments in place but the addresses of a call's tensors.

    Attributes:
        starts: What to call with which values.
        moves: For each tensor of a call, and then for the output: slots ``(values, argument, offset)``, and maps
            ``(values, argument, where it begins, offset, what makes one, those made)``.
        places: Addresses that stand in the values now.
        memory: Kinds of memory that must be allocated anew, and their bytes.
        lock: The record's, which whoever else makes its launches holds, too.
        held: Tensors that the values point to.
    """

    starts: list[tuple[Any, list[Any]]]
    moves: list[tuple[list[tuple[list[Any], int, int]], list[tuple[Any, ...]]]]
    places: list[int]
    memory: list[tuple[bool, int]]
    lock: Any
    held: Any


class Usual:
    """A recorded call for which all is as usual: no LSE, one GPU, no graph, no gradients.

    Args:
        recorded: The call's launches, whose common tensors do not change.
        tensors: Those that a caller has, of the recorded call; the first says dtype and device of the output.
        origins: For each moving tensor of the record but the output and the LSE, by name, in which of ``tensors`` it
            begins, and how many bytes from its beginning.
        fixed: Addresses of the record's other tensors.
        shape: Of the output.
        results: Names of the output and of the LSE.
        sums: Elements of the LSE, which is float32.
        into: The last of ``tensors`` is the output, and no input begins where it does.
        lse: Shape of the LSE, where callers want that, too; None: nobody reads it.
    """

    def __init__(
        self,
        recorded: Recorded,
        tensors: tuple[Tensor, ...],
        origins: dict[str, tuple[int, int]],
        fixed: dict[str, int],
        shape: tuple[int, ...],
        results: tuple[str, str],
        sums: int,
        into: bool = False,
        lse: tuple[int, ...] | None = None,
    ) -> None:
        first = tensors[0]
        self._record, self._kept, self._device = recorded.launches, recorded.kept, first.device
        self._origins, self._fixed, self._results, self._sums = origins, fixed, results, sums
        self._same = same_form(tensors)
        self._low = [t.data_ptr() & 15 for t in tensors]
        self._empty = None if into else allocator(shape, first.dtype, first.device)
        self._lse = None if lse is None else allocator(lse, torch.float32, first.device)
        self._index = self._device.index if self._device.type == "cuda" else None
        # The current device is not asked for where there is one.
        self._several = self._index is not None and torch.cuda.device_count() > 1
        self._ready: dict[int, _Ready] = {}

    def moved(self, places: dict[str, int]) -> Usual:
        """The same for common tensors that lie elsewhere, with other contents: their addresses by name."""
        other = copy.copy(self)
        other._fixed, other._kept, other._ready = self._fixed | places, Kept(), {}
        return other

    def fits(self, *tensors: Tensor) -> bool:
        """Whether tensors have the form of the call."""
        return self._same(*tensors) and [t.data_ptr() & 15 for t in tensors] == self._low

    def __call__(self, *tensors: Tensor) -> Any:
        """The output, or both results; None where something is not as usual, and then nothing was done."""
        if not self._same(*tensors) or torch._C._len_torch_dispatch_stack():
            return None
        addresses = [t.data_ptr() for t in tensors]
        if [address & 15 for address in addresses] != self._low:
            return None
        stream, index = 0, self._index
        if index is not None:
            if self._several and torch._C._cuda_getDevice() != index:
                return None
            stream = torch._C._cuda_getCurrentRawStream(index)
            if stream and torch._C._cuda_isCurrentStreamCapturing():  # the legacy stream, 0, cannot be captured
                return None
        if hooked():
            return None
        if self._empty is None:
            out = tensors[-1]
            if addresses.index(addresses[-1]) < len(tensors) - 1:
                return None
        else:
            out = self._empty()
            addresses.append(out.data_ptr())
        result: Any = out
        if self._lse is not None:
            result = out, self._lse()
            addresses.append(result[1].data_ptr())
        ready = self._ready.get(stream)
        if ready is None:
            return result if self._first(stream, addresses) else None
        starts, moves, places, memory, lock, _held = ready
        if memory:
            parts = [self._memory(zeros, size) for zeros, size in memory]
            addresses += [t.data_ptr() for t in parts]
        with lock:
            if addresses != places:
                _place(moves, places, addresses)
            for start, values in starts:
                start(*values)
        return result

    def _memory(self, zeros: bool, size: int) -> Tensor:
        return (torch.zeros if zeros else torch.empty)(size, dtype=torch.uint8, device=self._device)

    def _first(self, stream: int, addresses: list[int]) -> bool:
        """The first call on a stream, by the record itself; whether it was made."""
        record, kept = self._record, self._kept
        assert kept is not None
        wanted = self._lse is not None
        *given, out = addresses[:-1] if wanted else addresses
        sums = None if wanted else torch.empty(self._sums, dtype=torch.float32, device=self._device)
        results = dict(zip(self._results, (out, addresses[-1] if sums is None else sums.data_ptr()), strict=True))
        places = {name: given[which] + offset for name, (which, offset) in self._origins.items()}
        if not record.repeat(self._device, places | self._fixed | results, kept):
            return False
        if any(not self._tied(tie) for tie in record.ties):
            return True
        memory, known = kept[stream]
        standing = {"": 0, **results, **self._fixed, **known}
        moving = {**self._origins, **{name: (len(given) + n, 0) for n, name in enumerate(self._results[: 1 + wanted])}}
        fresh = [(kind, size) for kind, size in record.sizes if kind not in known]
        count = len(given) + 1 + wanted
        moving |= {kind: (count + n, 0) for n, (kind, _size) in enumerate(fresh)}
        starts, moves = _bind(record.launches, stream, standing, moving, count + len(fresh))
        anew = [(kind == "zeros", size) for kind, size in fresh]
        self._ready[stream] = _Ready(starts, moves, [-1] * len(moves), anew, record.lock, (sums, memory))
        return True

    def _tied(self, tie: tuple[str, str, int]) -> bool:
        """Whether two names of the record always lie as far apart as they must."""
        name, other, apart = tie
        (a, at), (b, to) = (self._origins.get(n, (None, self._fixed.get(n))) for n in (name, other))
        return at is not None and to is not None and a == b and to - at == apart


class UsualCalls:
    """The usual calls of one plan, by form."""

    def __init__(self) -> None:
        self._calls: dict[int, list[Usual]] = {}

    def __call__(self, *tensors: Any) -> Any:
        """What a call of these tensors returns, where all is as usual; else None, and then nothing was done."""
        if torch.compiler.is_dynamo_compiling():
            return None
        for usual in self._calls.get(len(tensors), ()):
            out = usual(*tensors)
            if out is not None:
                return out
        return None

    def moved(self, places: dict[str, int]) -> UsualCalls:
        """Those of another plan, which differs in nothing but its tensors' addresses and contents: see ``Usual``."""
        other = UsualCalls()
        other._calls = {count: [usual.moved(places) for usual in calls] for count, calls in self._calls.items()}
        return other

    def learn(self, tensors: tuple[Tensor, ...], make: Callable[[], Usual | None]) -> None:
        """Know what ``make`` returns, unless calls of such tensors are known; where there are many the oldest goes."""
        calls = self._calls.get(len(tensors), [])
        twice = len({id(t) for t in tensors}) < len(tensors)  # guards take no tensor for two
        if twice or torch.compiler.is_dynamo_compiling() or any(usual.fits(*tensors) for usual in calls):
            return
        usual = make()
        if usual is not None:
            self._calls[len(tensors)] = [usual, *calls[: _MOST_FORMS - 1]]


def _bind(
    launches: list[Again], stream: int, standing: dict[str, int], moving: dict[str, tuple[int, int]], count: int
) -> tuple[list[tuple[Any, list[Any]]], list[tuple[list[tuple[list[Any], int, int]], list[tuple[Any, ...]]]]]:
    """``starts`` and ``moves`` of launches that are made each time, of ``count`` tensors."""
    starts: list[tuple[Any, list[Any]]] = []
    moves: list[tuple[list[tuple[list[Any], int, int]], list[tuple[Any, ...]]]] = [([], []) for _ in range(count)]
    for one in launches:
        if one.once:
            continue
        values = list(one.values)
        if one.stream_at >= 0:
            values[one.stream_at] = stream
        for at, name, offset in one.slots:
            if name in moving:
                which, begin = moving[name]
                moves[which][0].append((values, at, begin + offset))
            else:
                values[at] = standing[name] + offset
        for at, name, offset, make, made in one.maps:
            if name in moving:
                which, begin = moving[name]
                moves[which][1].append((values, at, begin, offset, make, made))
            else:
                values[at] = make(standing[name] + offset)
        starts.append((one.start, values))
    return starts, moves


def _place(moves: list[tuple[Any, Any]], places: list[int], addresses: list[int]) -> None:
    """Put the addresses that differ from those of the last call into the arguments."""
    for n, address in enumerate(addresses):
        if places[n] != address:
            slots, maps = moves[n]
            for values, at, offset in slots:
                values[at] = address + offset
            for values, at, begin, offset, make, made in maps:
                described = made.get(address + begin)
                if described is None:
                    described = make_map(made, address + begin, make, offset)
                values[at] = described
            places[n] = address  # not before: making a map may fail
