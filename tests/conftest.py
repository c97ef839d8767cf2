"""Shared by the whole suite: Triton's interpreter where there is no GPU, a device fixture, seeds and threads."""

from __future__ import annotations

import os

import pytest
import torch
from quick_interpreter import quicken

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before any test imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, torch.get_num_threads()))


if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()

# Warnings of other people's code that no change of ours can mend.
FOREIGN_WARNINGS = (
    # The interpreter computes both sides of a where with NumPy, which warns about the side that is dropped.
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning",
    "ignore:Synchronization debug mode is a prototype feature:UserWarning",
    "ignore:.torch.jit.[a-z_]+. is deprecated:DeprecationWarning",  # torch's own, when it loads Inductor
)


def pytest_configure(config: pytest.Config) -> None:
    for line in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _spread_longest(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def _spread_longest(items: list[pytest.Item]) -> None:
    """Put the two longest tests at the front and in the middle, where the second of two workers begins."""
    longest = [item for item in items if item.name.startswith("test_kernels_compile_everywhere")]
    if len(longest) == 2:
        count = len(items)
        items[:] = [longest[0], *(item for item in items if item not in longest)]
        items.insert(count // 2, longest[1])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine: "cpu" always, "cuda" skipped where there is none."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget() -> None:
    """No test repeats launches of another, which may have replaced kernels or limits."""
    from sparseattn.kernels.launches import Store

    Store.forget()
