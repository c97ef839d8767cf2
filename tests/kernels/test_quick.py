"""Quick calls: which calls they are, and what their launches get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn.kernels import quick as module
from sparseattn.kernels import usual
from sparseattn.kernels.launches import Launches, launch, recording, scratch
from sparseattn.kernels.quick import Lengths, QuickCalls


class Kernel:
    """A kernel of Triton's form that notes what it is launched with."""

    arg_names = ("a", "b", "out", "count", "step", "TILE")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any, **kwargs: Any) -> Kernel:
            places = [x.data_ptr() if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
            self.launched.append((grid, *places))
            return self

        return start


def lengths(cache: Tensor, a: Tensor, b: Tensor) -> tuple[int] | None:
    return (a.shape[0],) if a.shape[0] == b.shape[0] else None


class Adding:
    """``out = a + b``, beside a cache, four rows a program; as an adapter would write it."""

    def __init__(self) -> None:
        self.kernel, self.slow = Kernel(), 0
        self.quick = QuickCalls(Lengths(lengths, ("count",), "TILE"), fixed=1, aligned=2)
        self.extra: Callable[[Tensor], Any] = lambda a: None

    def __call__(self, cache: Tensor, a: Tensor, b: Tensor) -> Any:
        found, made = self.quick(cache, a, b)
        return found if made else self.quick.learn((cache, a, b), lambda: self._call(cache, a, b))

    def _call(self, cache: Tensor, a: Tensor, b: Tensor) -> Tensor:
        self.slow += 1
        self.extra(a)
        out, rows = torch.empty(a.shape), -(-a.shape[0] // 4)
        launch(self.kernel, (rows, 3), cache[1], b.contiguous(), out, a.shape[0], a.stride(0), TILE=4)
        return out


@pytest.fixture(params=["quick", "plain"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what PyTorch happens to have for its own use, and without."""
    if request.param == "plain":
        monkeypatch.setattr(usual, "_guards_work", lambda: False)
        monkeypatch.setattr(usual, "_quick_empty", lambda kind: None)


def test_lengths_and_addresses() -> None:
    add = Adding()
    for n in (5, 700, 1, 4):
        cache, a, b = torch.zeros(2, 3), torch.zeros(n, 8), torch.zeros(n, 8)
        out = add(cache, a, b)
        assert (out.shape, out.dtype, out.stride()) == (a.shape, torch.float32, (8, 1))
        grid = (-(-n // 4), 3, 1) if n != 5 else (2, 3)
        assert add.kernel.launched[-1] == (grid, cache[1].data_ptr(), b.data_ptr(), out.data_ptr(), n, 8, 4)
    assert (add.slow, len(add.kernel.launched)) == (1, 4)


def test_calls_unlike_the_first_are_made_in_full() -> None:
    add, t = Adding(), torch.zeros(4, 8)
    cache = torch.zeros(2, 3)
    add(cache, t, t.clone())
    unaligned = torch.zeros(33)[1:].view(4, 8)
    for n, tensors in enumerate((
        (torch.zeros(3, 3), t, t.clone()),
        (cache, torch.zeros(4, 9), torch.zeros(4, 9)),
        (cache, t.double(), t.clone()),
        (cache, torch.zeros(4, 16)[:, :8], t.clone()),
        (cache, unaligned, t.clone()),
        (cache, torch.nn.Parameter(t.clone()), t.clone()),
    )):  # fmt: skip
        add(*tensors)
        assert add.slow == 2 + n
    assert add.quick(cache, t, torch.zeros(5, 8)) == (None, False), "lengths that do not fit"
    assert add.quick(cache, t) == (None, False)
    assert add.quick(cache, t, None) == (None, False)
    with recording(Launches({"a": t})):
        add.quick.learn((cache, t, t.clone()), lambda: None)


def test_calls_that_do_more_than_launch_are_not_repeated() -> None:
    cache, a, b = torch.zeros(2, 3), torch.zeros(4, 8), torch.zeros(4, 8)
    for extra in (
        lambda a: launch(Kernel(), (1,), a, a, a, 0, 0, TILE=1),
        lambda a: launch(Kernel(), (1,), scratch((3,), torch.int32, a.device), a, a, 0, 0, TILE=1),
    ):
        add = Adding()
        add.extra = extra
        add(cache, a, b)
        add(cache, a, b)
        assert add.slow == 2
    converted = Adding()
    converted(cache, a, torch.zeros(8, 4).T)  # not contiguous: what the kernel reads is nobody's tensor
    converted(cache, a, torch.zeros(8, 4).T)
    assert converted.slow == 2


def test_steps_along_one_row_say_nothing() -> None:
    """What was seen of one row, which may be any step from the next, holds for one row."""
    add, cache = Adding(), torch.zeros(2, 3)
    one = torch.zeros(1, 2, 8)[:, 0]
    assert one.stride(0) == 16
    for n in (1, 6, 1):
        add(cache, torch.zeros(n, 2, 8)[:, 0], torch.zeros(n, 8))
    assert add.slow == 2
    assert [args[5] for args in add.kernel.launched] == [16, 16, 16]


def test_the_function_beneath_triton_s_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments stand behind the grid, the stream and what else it takes."""
    started: list[tuple[Any, ...]] = []

    def direct(compiled: Any, grid: tuple[int, ...], again: Any) -> Any:
        values = [*grid, 1, 7, "function", *again.values]
        return again._replace(
            start=lambda *args: started.append(args),
            values=values,
            slots=[(5 + at, *rest) for at, *rest in again.slots],
        )

    monkeypatch.setattr(module, "direct", direct)
    add = Adding()
    for n in (5, 9):
        cache, a, b = torch.zeros(2, 3), torch.zeros(n, 8), torch.zeros(n, 8)
        out = add(cache, a, b)
    assert started == [(3, 3, 1, 0, "function", cache[1].data_ptr(), b.data_ptr(), out.data_ptr(), 9, 8, 4)]


def test_nobody_is_quick_while_others_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Quiet(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    add = Adding()
    cache, a, b = torch.zeros(2, 3), torch.zeros(4, 8), torch.zeros(4, 8)
    add(cache, a, b)
    with Quiet():
        add(cache, a, b)
    assert add.slow == 2
    monkeypatch.setattr(module, "hooked", lambda: True)
    add(cache, a, b)
    assert add.slow == 3
    gradient = torch.zeros(4, 8, requires_grad=True)
    add.quick = QuickCalls(Lengths(lengths, ("count",), "TILE"), fixed=1, aligned=2)
    monkeypatch.setattr(module, "hooked", lambda: False)
    for _ in range(2):
        add(cache, a, gradient)
    assert add.slow == 5


def test_few_forms_are_remembered() -> None:
    add, cache = Adding(), torch.zeros(2, 3)
    for d in (*range(8, 8 + 4 * 20, 4), 84, 80):
        add(cache, torch.zeros(4, d), torch.zeros(4, d))
    assert add.slow == 20
    add(cache, torch.zeros(4, 8), torch.zeros(4, 8))
    assert add.slow == 21
