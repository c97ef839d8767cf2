"""Calls made quickly launch what ordinary ones do: compiled for a GPU, launched nowhere. Run by ``test_quick_calls``.

Prints, as JSON, how many forms each function learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched: list[tuple[Any, ...]] = []


class Utils:
    """What Triton asks of a GPU."""

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return object(), name, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def unload_module(self, _: Any) -> None:
        pass


class Launcher:
    """Notes launches."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *args: Any) -> None:
        launched.append((function, (x, y, z), *args[4:]))


class Driver:
    """A driver of GPUs whose memory is the host's."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


driver.set_active(Driver())

import sparseattn.ops.merge.triton as merging  # noqa: E402 (kernels are compiled for the driver)
import sparseattn.ops.paged.pages_triton as pages  # noqa: E402
from sparseattn.flashinfer import cascade, page  # noqa: E402
from sparseattn.ops import dispatch  # noqa: E402
from sparseattn.ops.paged import append_kv  # noqa: E402

merging.triton_device_reason = pages.triton_device_reason = lambda t: None  # type: ignore[attr-defined]
page.append_kv = partial(append_kv, impl="triton")  # type: ignore[attr-defined]
dispatch.AUTO["cpu"] = ("triton", "reference")


def numbers(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int32)


def append(form: str, n: int, batch: int, pages: int) -> list[Any]:
    """Keys and values between the queries' heads of one tensor, and a cache of one tensor, its halves, or two."""
    joined = torch.zeros(9, 2, 16, 2, 64, dtype=torch.bfloat16)
    halves = joined[:, 0], joined[:, 1]
    cache = {"joined": joined, "halves": halves, "apart": tuple(t.contiguous() for t in halves)}[form]
    qkv = torch.zeros(n, 6, 64, dtype=torch.bfloat16)
    return [qkv[:, 2:4], qkv[:, 4:], numbers(n), numbers(n), cache, numbers(pages), numbers(batch + 1), numbers(batch)]


def latent(n: int, batch: int, pages: int) -> list[Tensor]:
    new, cache = ([torch.zeros(*shape, d).half() for d in (512, 64)] for shape in ((n,), (9, 16)))
    return [*new, numbers(n), numbers(n), *cache, numbers(pages), numbers(batch + 1), numbers(batch)]


def states(n: int, *between: int, apart: int = 1) -> list[Tensor]:
    """Outputs and LSE of two calls; or ``between`` of each, ``apart`` rows of memory from one to the next."""
    shapes = [(n * apart, *between, 4, 64), (n * apart, *between, 4)] * (1 if between else 2)
    return [torch.zeros(shape)[::apart] for shape in shapes]


def same(function: Callable[..., Any], tensors: list[Any], quick: bool) -> None:
    """Compare a call with an ordinary one."""
    both = []
    for known in (True, False):
        kept = [dict(one._calls) for one in QUICK.values()]
        if not known:
            for one in QUICK.values():
                one._calls.clear()
        launched.clear()
        results = function(*tensors)
        for one, calls in zip(QUICK.values(), kept, strict=True):
            one._calls = calls if not known else one._calls
        if known:
            passed = all(not isinstance(x, Tensor) for args in launched for x in args)
            assert passed == quick, f"{function.__name__}: quick is {passed}"
        places = {t.data_ptr(): f"result {i}" for i, t in enumerate(results or ())}
        made = [[x.data_ptr() if isinstance(x, Tensor) else x for x in args] for args in launched]
        both.append([[places.get(x, x) if isinstance(x, int) else x for x in args] for args in made])
    assert both[0] == both[1], f"{function.__name__}: {both}"
    assert len(both[0]) == 1, "one launch"


QUICK = {f"append {layout} {count}": quick for (layout, count), quick in page._APPENDS.items()}
QUICK |= {"latent": page._LATENT, "two": cascade._two, "many": cascade._many, "in place": cascade._in_place}

for form in ("joined", "halves", "apart"):
    for step, sizes in enumerate(((5, 3, 7), (1, 1, 1), (700, 20, 33))):
        same(page.append_paged_kv_cache, append(form, *sizes), step > 0)
for step, sizes in enumerate(((5, 3, 7), (1, 1, 1), (700, 20, 33))):
    same(page.append_paged_mla_kv_cache, latent(*sizes), step > 0)
for step, n in enumerate((1, 5, 700, 1)):
    same(cascade.merge_state, states(n), step > 0)
    same(cascade.merge_state_in_place, states(n), step > 0)
    same(cascade.merge_state_in_place, [*states(n), torch.ones(n, dtype=torch.bool)], step > 0)
    for between in (3, 20):
        same(cascade.merge_states, states(n, between), step > 0)
for step, n in enumerate((1, 1, 5, 700, 5)):  # one row says nothing of the next, two rows apart
    same(cascade.merge_state, states(n, apart=2), step not in (0, 2))
    same(cascade.merge_state_in_place, states(n, apart=2), step not in (0, 2))
half = [t.half() for t in states(5)]  # LSE of another dtype are converted, which is another launch
for _ in range(2):
    launched.clear()
    cascade.merge_state(*half)
    assert any(isinstance(x, Tensor) for x in launched[-1]), "what was converted would not be again"
print(json.dumps({name: sum(map(len, quick._calls.values())) for name, quick in QUICK.items()}))
