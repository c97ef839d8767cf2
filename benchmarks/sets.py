"""The named sets of workloads of ``benchmarks.block_sparse``, each for a few minutes of a GPU with every rival."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from sparseattn.testing.workloads import Problem

OURS = ("sparseattn_gluon", "sparseattn_triton")
DENSE = ("cudnn_dense", "fa4_dense", "flashinfer_dense")
EVERYONE = (
    *OURS, "sparseattn_gluon_deterministic", "fa4", "flex_attention", "flashprefill", *DENSE, "fa4_dense_deterministic",
)  # fmt: skip
# The densities between which the break-even density against dense attention is looked for.
BREAK_EVEN = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5)


class Case(NamedTuple):
    """A workload and who does it."""

    problem: Problem
    impls: tuple[str, ...]


def targets(**shape: Any) -> Iterator[Case]:
    """Lists by query head, forward and backward, against everybody: the table of the README."""
    for op, lengths, densities in (
        ("forward", (16384, 65536), (1.0, 0.25, 0.1, 0.02)),
        ("backward", (16384, 32768), (1.0, 0.25, 0.1)),
    ):
        for n in lengths:
            for density in densities:
                yield Case(Problem(op, n, density, **shape), EVERYONE)


def shared(**shape: Any) -> Iterator[Case]:
    """Lists that a GQA group or all heads share, which lets kernels pack a group's rows, beside lists by head."""
    for n in (16384, 65536):
        for density in (1.0, 0.25, 0.1, 0.02):
            for heads in (1, 8, 32):
                yield Case(Problem("forward", n, density, mask_heads=heads, **shape), (*OURS, "fa4", "flashprefill"))


def short(**shape: Any) -> Iterator[Case]:
    """The last few queries of a long sequence, as chunked prefill has them."""
    impls = (*OURS, "fa4", "flashprefill", "fa4_dense", "flashinfer_dense")
    for nq in (128, 256, 512, 1024):
        for density in (1.0, 0.25, 0.1):
            for heads in (1, 8, 32):
                yield Case(Problem("forward", 65536, density, nq=nq, mask_heads=heads, **shape), impls)


def dims(**shape: Any) -> Iterator[Case]:
    """Head dims: 64, 96, 128, 192 with values of 128, 256."""
    impls = (*OURS, "fa4", "cudnn_dense", "fa4_dense")
    for op, densities in (("forward", (1.0, 0.25, 0.1)), ("backward", (1.0, 0.1))):
        for dim, value in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
            for density in densities:
                yield Case(Problem(op, 16384, density, head_dim=dim, head_dim_v=value, **shape), impls)


def blocks(**shape: Any) -> Iterator[Case]:
    """Block sizes, beside 128 x 128."""
    for op in ("forward", "backward"):
        for block_q, block in ((128, 128), (128, 64), (64, 64), (32, 32), (16, 16)):
            for density in (1.0, 0.25, 0.1):
                yield Case(Problem(op, 16384, density, block_q=block_q, block=block, **shape), (*OURS, "fa4"))


def flashinfer(**shape: Any) -> Iterator[Case]:
    """FlashInfer's own workload: 20 x 50 blocks of equal size, chosen by head, not causal.

    Its own lengths are powers of two, which 20 and 50 do not divide: masks of variable blocks. At the others every
    block is a multiple of 128 tokens.
    """
    common: dict[str, Any] = {"heads": 32, "kv_heads": 32, "dtype": "fp16", "causal": False, **shape}
    impls = (*OURS, "flashinfer_variable", "fa4", *DENSE)
    for n in (12800, 25600, 8192, 16384, 32768):
        who = impls if n % 12800 == 0 else tuple(name for name in impls if name != "fa4")
        for density in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            yield Case(Problem("forward", n, density, grid=(20, 50), **common), who)
    for density in (0.1, 0.5):
        problem = Problem("forward", 12800, density, mask_heads=1, **common)
        yield Case(problem, (*OURS, "flashinfer_bsr", "flashinfer_variable", "fa4"))


def breakeven(**shape: Any) -> Iterator[Case]:
    """How dense a mask may be before dense attention is faster, and what lists cost over our own dense attention."""
    impls = (*OURS, *(f"{name}_dense" for name in OURS), "cudnn_dense")
    for n in (8192, 16384, 32768, 65536):
        for density in BREAK_EVEN:
            yield Case(Problem("forward", n, density, **shape), impls)


def quick(**shape: Any) -> Iterator[Case]:
    """A look at everything: one length, forward and backward, against everybody."""
    for op in ("forward", "backward"):
        for density in (1.0, 0.1):
            yield Case(Problem(op, 16384, density, **shape), EVERYONE)


SETS: dict[str, Callable[..., Iterator[Case]]] = {
    one.__name__: one for one in (targets, shared, short, dims, blocks, flashinfer, breakeven, quick)
}
#: Sets that also measure the first call of a process that finds no compiled kernel.
FIRST_CALLS = ("targets", "quick")


def cases(name: str, device: torch.device) -> Iterator[Case]:
    """The workloads of a set, on a device, one by one: each holds its inputs for as long as it lives."""
    return SETS[name](device=device)


def grid(
    ops: list[str], lengths: list[int], densities: list[float], impls: tuple[str, ...], **shape: Any
) -> Iterator[Case]:
    """All combinations, for workloads that no set has."""
    for op, n, density in itertools.product(ops, lengths, densities):
        yield Case(Problem(op, n, density, **shape), impls)
