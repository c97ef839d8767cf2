"""Usual calls: which calls they are, and which arguments their launches get."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn.kernels import usual as module
from sparseattn.kernels.launches import Kept, Launches, Recorded, launch, of_fixed, recording, scratch
from sparseattn.kernels.usual import Usual, UsualCalls, allocator, empty, same_form

CPU = torch.device("cpu")


class Kernel:
    """A kernel of Triton's form that notes what it is launched with."""

    arg_names = ("a", "b", "c", "d", "e")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.pause = 0.0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any) -> Kernel:
            self.launched.append(args)
            time.sleep(self.pause)
            return self

        return start


@pytest.fixture(params=["quick", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With what PyTorch happens to have for its own use, and without."""
    if request.param == "plain":
        monkeypatch.setattr(module, "_guards_work", lambda: False)
        monkeypatch.setattr(module, "_quick_empty", lambda kind: None)
    return request.param


def recorded(
    kernel: Kernel, q: Tensor, cache: Tensor, table: Tensor, zeros: bool = False
) -> tuple[Recorded, dict[str, tuple[int, int]]]:
    """A call that orders its table once, and attends keys and values of one cache."""
    k, v = cache.unbind(0)
    out, lse = torch.empty_like(q), torch.empty(q.shape[0])
    record = Launches({"q": q, "k": k, "v": v, "out": out, "lse": lse, "table": table})
    with recording(record):
        with of_fixed():
            order = scratch((9,), torch.int32, CPU)
            launch(kernel, (1,), order, table, "order", 0, 0)
        part = scratch((5,), torch.float32, CPU, zeros=zeros)
        launch(kernel, (1,), q, k, v, order, part)
        launch(kernel, (1,), part, out, lse, table, "merge")
    assert record.close() is record
    kernel.launched.clear()
    origins = {"q": (0, 0), "k": (1, 0), "v": (1, v.data_ptr() - cache.data_ptr())}
    return Recorded(record, q.shape[-1], Kept()), origins


def usual_of(kernel: Kernel, zeros: bool = False) -> tuple[Usual, Tensor, Tensor, Tensor]:
    q, cache, table = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.zeros(7)
    known, origins = recorded(kernel, q, cache, table, zeros)
    return Usual(known, (q, cache), origins, {"table": table.data_ptr()}, (4, 8), ("out", "lse"), 4), q, cache, table


@pytest.mark.parametrize("zeros", [False, True])
def test_arguments(way: str, zeros: bool) -> None:
    """The first call orders, later ones do not; all get the addresses of their tensors, and memory that stays."""
    kernel = Kernel()
    usual, _, _, table = usual_of(kernel, zeros)
    seen, kept = set(), []
    for _ in range(3):
        q, cache = torch.ones(4, 8), torch.ones(2, 6, 8)
        o = usual(q, cache)
        assert o is not None
        assert (o.shape, o.dtype, o.is_contiguous()) == ((4, 8), torch.float32, True)
        attended, merged = kernel.launched[-2:]
        assert attended[:3] == (q.data_ptr(), cache.data_ptr(), cache[1].data_ptr())
        assert (merged[0], merged[1], merged[3]) == (attended[4], o.data_ptr(), table.data_ptr())
        seen.add((attended[3], merged[2], None if zeros else attended[4]))
        kept.append((q, cache, o))
    assert len(seen) == 1, "orders, LSE and scratch stay where they are, but for zeros, which must be new"
    assert [args[2] for args in kernel.launched].count("order") == 1


@pytest.mark.parametrize("zeros", [False, True])
def test_both_results(way: str, zeros: bool) -> None:
    """Callers who want the LSE get a new one each time, written by the same launches."""
    kernel = Kernel()
    q, cache, table = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.zeros(7)
    known, origins = recorded(kernel, q, cache, table, zeros)
    places = {"table": table.data_ptr()}
    usual = Usual(known, (q, cache), origins, places, (4, 8), ("out", "lse"), 4, lse=(2, 2))
    kept = []
    for _ in range(3):
        q = torch.ones(4, 8)
        o, lse = usual(q, cache)
        assert (o.shape, lse.shape, lse.dtype) == ((4, 8), (2, 2), torch.float32)
        attended, merged = kernel.launched[-2:]
        assert (attended[0], merged[1], merged[2]) == (q.data_ptr(), o.data_ptr(), lse.data_ptr())
        assert merged[0] == attended[4]
        kept.append((q, o, lse))
    assert len({lse.data_ptr() for _, _, lse in kept}) == 3


def test_forms(way: str) -> None:
    t = torch.zeros(3, 4, 8)
    fits = same_form((t, t))
    others = {
        "shape": torch.zeros(3, 5, 8), "strides": torch.zeros(3, 8, 4).mT, "dtype": t.half(), "rank": t[None],
        "parameter": torch.nn.Parameter(t), "gradient": torch.zeros(3, 4, 8, requires_grad=True),
        "device": torch.zeros(3, 4, 8, device="meta"),
    }  # fmt: skip
    assert fits(t, torch.ones(3, 4, 8))
    assert [name for name, other in others.items() if fits(t, other)] == []
    assert not torch.vmap(lambda x: torch.tensor(fits(t, x)))(torch.zeros(2, 3, 4, 8)).any()
    with torch.no_grad():
        later = same_form((others["gradient"],))
        assert later(others["gradient"])
    assert not later(others["gradient"])


def test_unusual_calls_do_nothing(way: str) -> None:
    kernel = Kernel()
    usual, q, cache, _ = usual_of(kernel)
    assert usual(q, cache) is not None
    kernel.launched.clear()
    calls = UsualCalls()
    calls.learn((q, cache), lambda: usual)
    unaligned = torch.zeros(4 * 8 + 1)[1:].view(4, 8)
    for tensors in (
        (unaligned, cache),
        (q, torch.zeros(2, 5, 8)),
        (q, *cache.unbind(0)),
        (q, None),
        (q,),
        (q, "cache"),
    ):
        assert calls(*tensors) is None, tensors
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert calls(q, cache) is None
    assert kernel.launched == []
    assert calls(q, cache) is not None


def test_outputs_that_are_given(way: str) -> None:
    kernel = Kernel()
    q, cache, out, table = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.zeros(4, 8), torch.zeros(7)
    known, origins = recorded(kernel, q, cache, table)
    usual = Usual(
        known, (q, cache, out), origins, {"table": table.data_ptr()}, (4, 8), ("out", "lse"), 4, into=True
    )  # fmt: skip
    for _ in range(2):
        other = torch.ones(4, 8)
        assert usual(q, cache, other) is other
        assert kernel.launched[-1][1] == other.data_ptr()
    kernel.launched.clear()
    assert usual(q, cache, q[:]) is None, "another call: it reads what it writes"
    assert usual(q, cache, torch.zeros(8, 4).t()) is None
    assert kernel.launched == []


def test_another_plan_computes_anew_what_follows_from_its_tables(way: str) -> None:
    kernel = Kernel()
    usual, q, cache, table = usual_of(kernel)
    first = UsualCalls()
    first.learn((q, cache), lambda: usual)
    assert first(q, cache) is not None
    other = torch.ones(7)
    second = first.moved({"table": other.data_ptr()})
    kernel.launched.clear()
    for calls, at in ((second, other), (first, table), (second, other)):
        assert calls(q, cache) is not None
        assert kernel.launched[-1][3] == at.data_ptr()
    ordered = [args for args in kernel.launched if args[2] == "order"]
    assert [args[1] for args in ordered] == [other.data_ptr()]
    orders = [args[3] for args in kernel.launched if args[0] == q.data_ptr()]
    assert orders[0] == orders[2] == ordered[0][0] != orders[1]


def test_known_forms_are_learnt_once_and_old_ones_forgotten() -> None:
    calls, made = UsualCalls(), []
    for rows in (1, 2, 1, *range(3, 12)):
        q, cache, table = torch.zeros(rows, 8), torch.zeros(2, 6, 8), torch.zeros(7)

        def make(q: Tensor = q, cache: Tensor = cache, table: Tensor = table) -> Usual:
            made.append(q.shape[0])
            known, origins = recorded(Kernel(), q, cache, table)
            return Usual(known, (q, cache), origins, {"table": table.data_ptr()}, (*q.shape,), ("out", "lse"), len(q))

        calls.learn((q, cache), make)
    assert made == list(range(1, 12))
    assert calls(torch.zeros(11, 8), torch.zeros(2, 6, 8)) is not None
    assert calls(torch.zeros(1, 8), torch.zeros(2, 6, 8)) is None


def test_tensors_that_overlapped_take_the_slow_way(way: str) -> None:
    """Keys that are the values, given as two tensors, may be two others next time."""
    kernel = Kernel()
    q, k = torch.zeros(4, 8), torch.zeros(6, 8)
    out, lse = torch.zeros(4, 8), torch.zeros(4)
    record = Launches({"q": q, "k": k, "v": k, "out": out, "lse": lse})
    with recording(record):
        launch(kernel, (1,), q, k, k, out, lse)
    origins = {"q": (0, 0), "k": (1, 0), "v": (2, 0)}

    def make() -> Usual:
        return Usual(Recorded(record, 8, Kept()), (q, k, k[:]), origins, {}, (4, 8), ("out", "lse"), 4)

    kernel.launched.clear()
    calls = UsualCalls()
    calls.learn((q, k, k), make)
    assert calls(q, k, k) is None
    calls.learn((q, k, k[:]), make)
    for _ in range(2):
        assert calls(q, k, k[:]) is not None
        assert calls(q, k, k.clone()) is None
    assert [args[:3] for args in kernel.launched] == [(q.data_ptr(), k.data_ptr(), k.data_ptr())] * 2


def test_starts_and_ends_of_one_tensor(way: str) -> None:
    """Common tensors may overlap, as long as those of every plan do so alike."""
    kernel = Kernel()
    q, k, offsets = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(9)
    out, lse = torch.zeros(4, 8), torch.zeros(4)
    given = {"q": q, "k": k, "out": out, "lse": lse}
    record = Launches(given | {"start": offsets[:-1], "end": offsets[1:]})
    with recording(record):
        launch(kernel, (1,), q, k, offsets[:-1], offsets[1:], out)
    calls = UsualCalls()
    places = {"start": offsets.data_ptr(), "end": offsets[1:].data_ptr()}
    origins = {"q": (0, 0), "k": (1, 0)}
    calls.learn((q, k), lambda: Usual(Recorded(record, 8, Kept()), (q, k), origins, places, (4, 8), ("out", "lse"), 4))
    for _ in range(2):
        assert calls(q, k) is not None
        assert kernel.launched[-1][2:4] == tuple(places.values())
    [[usual]] = calls._calls.values()
    assert usual._ready
    assert calls.moved({"end": torch.zeros(9).data_ptr()})(q, k) is None


def test_threads_do_not_mix_addresses(way: str) -> None:
    """Arguments stand in one list: nobody may change them between another's addresses and launches."""
    kernel = Kernel()
    usual, q, cache, _ = usual_of(kernel)
    assert usual(q, cache) is not None
    kernel.launched.clear()
    pairs = [(torch.zeros(4, 8), torch.zeros(2, 6, 8)) for _ in range(4)]

    def work(q: Tensor, cache: Tensor) -> None:
        for _ in range(200):
            usual(q, cache)

    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attended = kernel.launched[::2]
    assert len(attended) == 800
    assert {args[:2] for args in attended} == {(q.data_ptr(), cache.data_ptr()) for q, cache in pairs}


def test_other_ways_to_make_the_call_wait_for_memory_that_it_uses(way: str) -> None:
    """Who wants the LSE, too, has the record itself make the launches, in the memory that is kept for them."""
    kernel = Kernel()
    q, cache, table = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.zeros(7)
    known, origins = recorded(kernel, q, cache, table)
    places = {"table": table.data_ptr()}
    usual = Usual(known, (q, cache), origins, places, (4, 8), ("out", "lse"), 4)
    assert usual(q, cache) is not None
    kernel.launched.clear()
    kernel.pause = 0.001
    out, lse = torch.zeros(4, 8), torch.zeros(4)
    given = {"q": q, "k": cache[0], "v": cache[1], "out": out, "lse": lse}

    def wanting_sums() -> None:
        for _ in range(20):
            known.launches.repeat(CPU, {name: t.data_ptr() for name, t in given.items()} | places, known.kept)

    other = threading.Thread(target=wanting_sums)
    other.start()
    for _ in range(20):
        usual(q, cache)
    other.join()
    steps = [args[3] == table.data_ptr() for args in kernel.launched]
    assert steps == [False, True] * 40


def test_a_map_that_could_not_be_made_is_made_by_the_next_call() -> None:
    values, failures = [0], [RuntimeError("busy")]

    def make(address: int) -> str:
        if failures:
            raise failures.pop()
        return f"map of {address}"

    places, moves = [-1], [([], [(values, 0, 0, 16, make, {})])]
    with pytest.raises(RuntimeError, match="busy"):
        module._place(moves, places, [512])
    module._place(moves, places, [512])
    assert values == ["map of 528"]


def test_outputs(way: str) -> None:
    for shape in ((3, 4), (0, 4), (5,), (1, 2, 3)):
        for t in (allocator(shape, torch.bfloat16, CPU)(), empty(shape, torch.bfloat16, CPU)):
            assert (tuple(t.shape), t.dtype, t.is_contiguous()) == (shape, torch.bfloat16, True)
