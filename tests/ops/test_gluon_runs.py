"""What only a Hopper GPU shows of its kernels: the same bits in every run, on several streams and in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.testing import make_qkv, random_block_mask

pytest.importorskip("triton", reason="needs Triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


def _problem(seq: int, density: float | None, batch: int = 1, dim: int = 128) -> tuple[list[Tensor], Any]:
    leaves = [t.requires_grad_() for t in make_qkv(batch, seq, seq, 8, 2, dim, dtype=torch.bfloat16, device="cuda")]
    if density is None:
        return leaves, None
    return leaves, random_block_mask((seq, seq), (128, 128), 8, density=density, diagonal=True, device="cuda")


def _run(leaves: list[Tensor], mask: Any, deterministic: bool = True) -> list[Tensor]:
    o, lse = block_sparse_attention(*leaves, mask, return_lse=True, impl="gluon", deterministic=deterministic)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, torch.ones_like(o))]


@pytest.mark.parametrize("density", [0.3, None], ids=["masked", "dense"])
def test_ten_runs_give_the_same_bits(density: float | None) -> None:
    leaves, mask = _problem(2000, density)
    first, fast = _run(leaves, mask), _run(leaves, mask, deterministic=False)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(_run(leaves, mask), first, strict=True))
        # The fast form adds up dQ in no fixed order, and nothing else.
        again = _run(leaves, mask, deterministic=False)
        assert all(torch.equal(again[i], fast[i]) for i in (0, 1, 3, 4))


def test_streams_do_not_disturb_each_other() -> None:
    problems = [_problem(seq, density) for seq, density in ((1500, 0.3), (700, None), (2300, 0.1), (260, 0.9))]
    expected = [_run(*problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results: list[list[list[Tensor]]] = [[] for _ in problems]
    for _ in range(5):
        for problem, stream, found in zip(problems, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(_run(*problem))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        for one in found:
            assert all(torch.equal(a, b) for a, b in zip(one, right, strict=True))


@pytest.mark.parametrize("density", [0.3, None], ids=["masked", "dense"])
def test_a_cuda_graph_follows_new_contents(density: float | None) -> None:
    leaves, mask = _problem(1000, density)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _run(leaves, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = _run(leaves, mask)
    with torch.no_grad():
        for t in leaves:
            t.normal_()
    for _ in range(2):  # work left over by one replay would disturb the next
        graph.replay()
    with torch.cuda.stream(side):
        again = _run(leaves, mask)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))
