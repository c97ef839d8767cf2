"""Launches made again: which argument each tensor of a later call becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseattn.kernels.launches import Launches


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
