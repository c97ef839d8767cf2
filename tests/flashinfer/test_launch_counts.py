"""How much a plan asks of the GPU: every launch keeps the host for microseconds, and a step of a model waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparseattn.flashinfer as fi
from sparseattn import BlockMask
from sparseattn.ops.block_sparse import tiles

pytest.importorskip("triton", reason="needs Triton")

META = torch.device("meta")
# What allocates or looks at memory in another way, and starts nothing.
FREE = {
    "empty",
    "empty_strided",
    "view",
    "expand",
    "slice",
    "select",
    "alias",
    "transpose",
    "unsqueeze",
    "as_strided",
    "detach",
}


class Started(TorchDispatchMode):
    """Notes operators that would launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Notes launches, too, of tensors that lie nowhere: what happens to those on a GPU, which nobody looks into."""
    from sparseattn.kernels import tilings
    from sparseattn.ops.bsr import lists_triton, rows
    from sparseattn.ops.paged import pages, pages_triton

    mode = Started()
    for module in (lists_triton, pages_triton, tilings):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **kwargs: mode.names.append(kernel.fn.__name__))
    for module in (rows, pages, tiles):
        monkeypatch.setattr(module, "launchable", lambda *tensors: True)
    return mode


def numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=META)


def decode(workspace: Tensor) -> Callable[[], None]:
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace)
    tables = numbers(5), numbers(40), numbers(4)
    return lambda: wrapper.plan(*tables, 8, 2, 64, 16, q_data_type=torch.bfloat16)


def prefill(workspace: Tensor) -> Callable[[], None]:
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace)
    tables = numbers(5), numbers(5), numbers(40), numbers(4)
    return lambda: wrapper.plan(*tables, 8, 2, 64, 16, causal=True, q_data_type=torch.bfloat16)


def ragged(workspace: Tensor) -> Callable[[], None]:
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    tables = numbers(5), numbers(5)
    return lambda: wrapper.plan(*tables, 8, 2, 64, causal=True, q_data_type=torch.bfloat16)


def latent(workspace: Tensor) -> Callable[[], None]:
    wrapper = fi.mla.BatchMLAPagedAttentionWrapper(workspace)
    tables = numbers(5), numbers(5), numbers(40), numbers(4)
    return lambda: wrapper.plan(*tables, 16, 512, 64, 16, False, 0.07, torch.bfloat16, torch.bfloat16)


def blocks(workspace: Tensor) -> Callable[[], None]:
    wrapper = fi.BlockSparseAttentionWrapper(workspace)
    lists = numbers(17), numbers(60)
    return lambda: wrapper.plan(*lists, 1024, 1024, 64, 64, 8, 2, 64, q_data_type=torch.bfloat16)


def variable(workspace: Tensor) -> Callable[[], None]:
    wrapper = fi.VariableBlockSparseAttentionWrapper(workspace)
    chosen = torch.empty((2, 4, 5), dtype=torch.bool, device=META)
    sizes = numbers(2, 4), numbers(2, 5)
    return lambda: wrapper.plan(chosen, *sizes, 8, 2, 64, q_data_type=torch.bfloat16)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (decode, ["lengths_kernel"]),
        (prefill, ["lengths_kernel"]),
        (ragged, ["diff"]),
        (latent, []),
        (blocks, ["lists_kernel"]),
        (variable, ["clone"] * 3),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_plans(plan: Callable[[Tensor], Callable[[], None]], expected: list[str], started: Started) -> None:
    make = plan(torch.empty(8, dtype=torch.uint8, device=META))
    with started:
        make()
    # ``diff`` of offsets is one subtraction of two views.
    assert [{"sub": "diff"}.get(name, name) for name in started.names] == expected


def test_variable_blocks_are_cut_at_once(started: Started) -> None:
    chosen = torch.empty((2, 4, 5), dtype=torch.bool, device=META)
    mask = BlockMask.from_variable_blocks(chosen, numbers(2, 4), numbers(2, 5), seq_lens=(300, 400))
    with started:
        for _ in range(2):
            tiles.tiling_of(mask, (64, 64))
        assert started.names == ["tiling_kernel"]
        tiles.tiling_of(mask, (64, 64), transposed=True)
    assert started.names == ["tiling_kernel"] * 2


@pytest.mark.parametrize("host", [False, True])
def test_buffers_of_graphs_are_filled_by_one_launch(host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a plan, of lengths and of copies; what lies on the CPU is copied by itself."""
    from sparseattn.ops.paged import pages, pages_triton

    names: list[str] = []
    launch = pages_triton.launch

    def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kernel.fn.__name__)
        return launch(kernel, *args, **kwargs)

    monkeypatch.setattr(pages_triton, "launch", noted)
    monkeypatch.setattr(pages, "launchable", lambda *tensors: not host)
    buffers = [torch.full((n,), -7, dtype=torch.int32) for n in (4, 2000, 3)]
    wrapper = fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(torch.empty(8, dtype=torch.uint8), *buffers)
    pages_of = torch.randperm(1500, dtype=torch.int32)
    given = torch.tensor([0, 700, 700, 1500], dtype=torch.int32), pages_of, torch.tensor([3, 1, 16], dtype=torch.int32)
    for _ in range(2):
        wrapper.plan(*given, 8, 2, 64, 16)
    for buffer, t in zip(buffers, given, strict=True):
        assert torch.equal(buffer[: len(t)], t)
    assert (buffers[1][1500:] == -7).all()
    assert wrapper._planned.table.seq_lens.tolist() == [699 * 16 + 3, 0, 800 * 16]
    wrapper.plan(*buffers, 8, 2, 64, 16)
    assert wrapper._planned.table.seq_lens.tolist() == [699 * 16 + 3, 0, 800 * 16], "what is in its place stays there"
    expected = ["lengths_kernel", "copies_kernel"]
    assert names == ([] if host else expected * 3)
