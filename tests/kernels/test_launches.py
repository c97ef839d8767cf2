"""Launches made again: which argument each tensor of a later call becomes."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparseattn.kernels import launches as module
from sparseattn.kernels.launches import Kept, Launches, Number, Room, launch, of_fixed, recording, repeatedly, scratch


class Kernel:
    """A kernel of Triton's form that notes what it is launched with."""

    arg_names = ("a", "b", "c")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any) -> Kernel:
            self.launched.append(args)
            return self

        return start


def addresses(**tensors: torch.Tensor) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in tensors.items()}


def test_tensors_columns_and_scratch_move():
    kernel = Kernel()
    q, k = torch.zeros(4, 3, 24).unbind(1)[0], torch.zeros(4, 24)
    table = torch.zeros(7)
    launches = Launches({"q": q, "k": k}, [table])
    part = launches.scratch(torch.zeros(5))
    launches.launch(kernel, (1,), k[:, 16:], table, part)
    assert launches.complete
    other = torch.ones(4, 24)
    assert launches.repeat(torch.device("cpu"), addresses(q=q, k=other))
    first, second, third = kernel.launched[1]
    assert (first, second) == (other[:, 16:].data_ptr(), table.data_ptr())
    assert third not in (part.data_ptr(), other.data_ptr())


def test_numbers_change_like_addresses():
    kernel = Kernel()
    made = []
    for size in (3, 7):
        x, number = torch.zeros(4), Number("size", size)

        def call(x: torch.Tensor, number: Number = number) -> None:
            made.append(number)
            launch(kernel, (1,), x, number, 2)

        repeatedly(call, ("numbers",), number, x=x)
        assert kernel.launched[-1] == (x if size == 3 else x.data_ptr(), size, 2)
        assert type(kernel.launched[-1][1]) is int
    assert made == [3]


@pytest.mark.parametrize("start", [0, 8])
def test_tensors_that_overlapped_must_overlap_again(start: int):
    """Which of two overlapping tensors an argument was cannot be told afterwards."""
    kernel = Kernel()
    x, y, z = torch.zeros(3, 4, 24).unbind()
    launches = Launches({"k": x, "v": x[:, start:]}, [])
    launches.launch(kernel, (1,), x, x[:, start:], 0)
    assert launches.complete
    assert not launches.repeat(torch.device("cpu"), addresses(k=y, v=z))
    assert len(kernel.launched) == 1
    assert launches.repeat(torch.device("cpu"), addresses(k=z, v=z[:, start:]))
    assert kernel.launched[1] == (z.data_ptr(), z[:, start:].data_ptr(), 0)


def test_packed_projections_do_not_count_as_overlapping():
    """Queries, keys and values of one tensor: heads of a token side by side, rows between another's."""
    kernel = Kernel()
    q, k, v = torch.zeros(5, 3, 2, 8).unbind(1)
    launches = Launches({"q": q, "k": k, "v": v}, [])
    launches.launch(kernel, (1,), q, k, v)
    x, y, z = torch.zeros(3, 5, 2, 8).unbind()
    assert launches.repeat(torch.device("cpu"), addresses(q=x, k=y, v=z))
    assert kernel.launched[1] == (x.data_ptr(), y.data_ptr(), z.data_ptr())


def test_what_is_neither_given_nor_kept_cannot_be_repeated():
    launches = Launches({"q": torch.zeros(4)}, [])
    launches.launch(Kernel(), (1,), torch.zeros(4), 0, 0)
    assert not launches.complete


@dataclass
class Map:
    """A tensor map of Triton's form."""

    base: Any
    shape: tuple[int, ...] = (4, 24)
    strides: tuple[int, ...] = (24, 1)
    padding: str = "zero"


CPU = torch.device("cpu")


def test_host_code_that_knows_nothing_of_a_record_is_recorded():
    kernel = Kernel()
    q = torch.zeros(4, 24)
    record = Launches({"q": q})
    with recording(record):
        part = scratch((5,), torch.float32, CPU, zeros=True)
        launch(kernel, (1,), q, part, 3)
    launch(kernel, (1,), q, part, 4)
    assert record.close() is record
    other = torch.ones(4, 24)
    assert record.repeat(CPU, addresses(q=other))
    assert len(kernel.launched) == 3
    first, second, third = kernel.launched[2]
    assert (first, third) == (other.data_ptr(), 3)
    assert second not in (part.data_ptr(), other.data_ptr())


def test_maps_move_with_their_tensors():
    kernel = Kernel()
    q, out = torch.zeros(2, 4, 24)
    record = Launches({"q": q, "out": out})
    record.launch(kernel, (1,), Map(q), Map(out[:, 8:]), 0)
    assert record.complete
    for x, y in torch.ones(2, 2, 4, 24).unbind():
        assert record.repeat(CPU, addresses(q=x, out=y))
        first, second, _ = kernel.launched[-1]
        assert (first.base.data_ptr(), second.base.data_ptr()) == (x.data_ptr(), y[:, 8:].data_ptr())
        assert first.shape == (4, 24)
    record = Launches({"q": q})
    record.launch(kernel, (1,), Map(out), 0, 0)
    assert not record.complete, "nobody knows where it lies next time"


def test_what_follows_from_common_tensors_is_computed_once():
    kernel = Kernel()
    q, table = torch.zeros(4), torch.zeros(7)
    record = Launches({"q": q, "table": table})
    with recording(record):
        with of_fixed():
            order = scratch((9,), torch.int32, CPU)
            launch(kernel, (1,), order, table, 1)
        launch(kernel, (1,), q, order, 2)
    assert record.complete
    kernel.launched.clear()
    kept = Kept()
    for _ in range(3):
        assert record.repeat(CPU, addresses(q=q, table=table), kept)
    assert [args[2] for args in kernel.launched] == [1, 2, 2, 2]
    assert len({kernel.launched[0][0], *(args[1] for args in kernel.launched[1:])}) == 1
    kernel.launched.clear()
    assert record.repeat(CPU, addresses(q=q, table=table))
    assert [args[2] for args in kernel.launched] == [1, 2], "others keep nothing"


def test_calls_of_a_plan_keep_no_more_memory_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
    """Layers with scales of their own are calls of their own; those that come late allocate their memory each time."""
    monkeypatch.setattr(module, "_MOST_TOGETHER", 1500)
    kernel, room, q = Kernel(), Room(), torch.zeros(4)
    kept = [Kept(room) for _ in range(3)]
    for mine in kept:
        record = Launches({"q": q})
        with recording(record):
            with of_fixed():
                order = scratch((9,), torch.int32, CPU)
                launch(kernel, (1,), order, q, 1)
            launch(kernel, (1,), q, order, scratch((5,), torch.float32, CPU))
        for _ in range(2):
            assert record.repeat(CPU, addresses(q=q), mine)
    assert [sorted(mine[0][1]) for mine in kept] == [["kept", "scratch"], ["kept", "scratch"], ["kept"]]
    assert len(kernel.launched) == 3 * (2 + 2 + 1)


def test_the_function_beneath_the_launcher_is_given_what_the_launcher_gives_it(monkeypatch: pytest.MonkeyPatch):
    """Grid, stream, the compiled function, and every argument, tensor maps followed by their shapes and strides."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    from sparseattn.kernels import starts

    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(starts, "encoder", lambda described, meta: lambda address: (meta["name"], address))

    def launcher(*args: Any) -> None:
        given.append(args)

    def inner(*args: Any) -> None:
        launcher(*args)

    class CudaLauncher:
        launch = staticmethod(inner)
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid, launch_pdl = False, True

    metas = [{"fp4_padded": False, "name": "a"}, {"fp4_padded": False, "name": "b"}]
    kernel = Kernel()
    vars(kernel).update(
        run=CudaLauncher(), function=17, packed_metadata=(4, 1, 0), metadata=SimpleNamespace(tensordesc_meta=metas)
    )
    q, k = torch.zeros(2, 4, 24)
    record = Launches({"q": q, "k": k})
    record.launch(kernel, (5, 6), Map(q), k, Map(k))
    x, y = torch.ones(2, 4, 24)
    assert record.repeat(CPU, addresses(q=x, k=y))
    start = (5, 6, 1, 0, 17, False, True, None, None, (4, 1, 0), None, None, None)
    sizes = (4, 24, 24, 1)
    at_x, at_y = x.data_ptr(), y.data_ptr()
    assert given == [(*start, ("a", at_x), *sizes, at_y, ("b", at_y), *sizes)]
    assert record.repeat(CPU, addresses(q=q, k=y))
    assert given[1] == (*start, ("a", q.data_ptr()), *sizes, at_y, ("b", at_y), *sizes)
