"""Planning a sparse pattern is part of a CUDA graph, if it is captured: a replay reads the pattern's tensors anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import attention, check
from torch import Tensor

import sparseattn.flashinfer as flashinfer

MB, NB, SIZE, LENGTH = 4, 6, 64, (256, 384)


def drawn(heads: int) -> Tensor:
    """bool [heads, MB, NB] with three blocks in every row: patterns that may take each other's place."""
    return torch.rand(heads, MB, NB).argsort(-1) < 3


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(0, 3 * MB + 1, 3, dtype=torch.int32), blocks[0].nonzero()[:, 1].int()


def rows(device: str, blocks: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., None]]:
    wrapper = flashinfer.BlockSparseAttentionWrapper(torch.empty(0, device=device))
    pattern = tuple(t.to(device) for t in listed(blocks))

    def plan_and_run(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        wrapper.plan(*pattern, *LENGTH, SIZE, SIZE, 4, 2, 64)
        wrapper.run(q, k, v, out=out)

    return pattern, plan_and_run


def fine_rows(device: str, blocks: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., None]]:
    """The same keys, listed one by one."""
    wrapper = flashinfer.BlockSparseAttentionWrapper(torch.empty(0, device=device))
    pattern = fine(*(t.to(device) for t in listed(blocks)))

    def plan_and_run(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        wrapper.plan(*pattern, *LENGTH, SIZE, 1, 4, 2, 64)
        wrapper.run(q, k, v, out=out)

    return pattern, plan_and_run


def fine(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    keys = indices[:, None] * SIZE + torch.arange(SIZE, dtype=torch.int32, device=indices.device)
    return indptr * SIZE, keys.flatten()


def variable(device: str, blocks: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., None]]:
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(torch.empty(0, device=device))
    pattern = (blocks.to(device),)
    sizes = [torch.full((2, n), SIZE, dtype=torch.int32, device=device) for n in (MB, NB)]

    def plan_and_run(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        wrapper.plan(*pattern, *sizes, 4, 2, 64)
        wrapper.run(*(t.transpose(0, 1) for t in (q, k, v)), out=out.transpose(0, 1))

    return pattern, plan_and_run


@pytest.mark.parametrize(
    ("form", "heads"), [(rows, 1), (fine_rows, 1), (variable, 2)], ids=["bsr", "tokens", "variable"]
)
def test_a_graph_of_plan_and_run_follows_its_pattern(form: Any, heads: int, device: str) -> None:
    first, second = drawn(heads), drawn(heads)
    q, k, v = (
        torch.randn(n, h, 64, dtype=torch.float16, device=device)
        for n, h in ((LENGTH[0], 4), (LENGTH[1], 2), (LENGTH[1], 2))
    )
    pattern, plan_and_run = form(device, first)
    out = torch.empty_like(q)
    plan_and_run(q, k, v, out)
    graph = None
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan_and_run(q, k, v, out)
    for blocks in (second, first):
        anew = (blocks,) if form is variable else listed(blocks)
        for old, new in zip(pattern, fine(*anew) if form is fine_rows else anew, strict=True):
            old.copy_(new)
        out.fill_(torch.nan)
        plan_and_run(q, k, v, out) if graph is None else graph.replay()
        seen = blocks.repeat_interleave(SIZE, 1).repeat_interleave(SIZE, 2)
        seen = seen.repeat_interleave(4 // heads, 0)
        check(out, *(attention(q, k, v, mask=seen, dtype=dtype) for dtype in (torch.float64, torch.float16)))
