"""The named sets of workloads of ``benchmarks.paged``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.paged_blocks import BSR, Variable
from benchmarks.paged_problems import Decode, Latent, Prefill, Workload
from benchmarks.paged_states import Append, Merge

OURS = ("sparseattn_flashinfer", "sparseattn_gluon", "sparseattn_triton")
FLASHINFER = ("flashinfer_fa2", "flashinfer_fa3")


class Case(NamedTuple):
    """A workload and who does it."""

    workload: Workload
    impls: tuple[str, ...]


def decode(device: torch.device) -> Iterator[Case]:
    """Batches of one query a sequence, from many short ones to one long one, in pages of 16 tokens and of one."""
    for batch, length in ((64, 8192), (16, 32768), (1, 131072), (128, 1024)):
        for page in (16, 1):
            workload = Decode(device, batch=batch, length=length, page=page)
            yield Case(workload, (*OURS, *FLASHINFER, "flashinfer_cuda_cores"))


def prefill(device: torch.device) -> Iterator[Case]:
    """The same 128K tokens as many short prompts and as few long ones, and one of 32K; paged and ragged, causal.

    Lengths are on the CPU, as in FlashInfer's own benchmark, and once on the device.
    """
    for batch, length in ((128, 1024), (32, 4096), (8, 16384), (1, 32768)):
        for page, lengths_on in ((16, "cpu"), (16, "device"), (1, "cpu")):
            workload = Prefill(device, batch=batch, length=length, page=page, lengths_on=lengths_on)
            yield Case(workload, (*OURS, *FLASHINFER) if lengths_on == "cpu" else (OURS[0], *FLASHINFER))
        yield Case(Prefill(device, batch=batch, length=length, ragged=True), (*OURS, *FLASHINFER))


def chunked(device: torch.device) -> Iterator[Case]:
    """Chunks of a prompt behind what is already cached."""
    for batch, length, chunk in ((8, 16384, 512), (1, 131072, 2048), (32, 4096, 64)):
        yield Case(Prefill(device, batch=batch, length=length, chunk=chunk), (*OURS, *FLASHINFER))


def bsr(device: torch.device) -> Iterator[Case]:
    """Blocks of one size at 16K tokens, from 128 x 128 down to single tokens, and single keys for blocks of queries."""
    for rows, cols in ((128, 128), (64, 64), (16, 16), (1, 1), (128, 16), (128, 1)):
        for density in (0.05, 0.25, 0.5, 1.0):
            yield Case(BSR(device, R=rows, C=cols, density=density), (*OURS, *FLASHINFER))


def variable(device: torch.device) -> Iterator[Case]:
    """FlashInfer's own benchmark: 20 x 50 blocks, 32 heads without groups, at its lengths."""
    for n in (8192, 16384, 32768):
        for density in (0.1, 0.3, 0.5, 0.7, 0.9):
            yield Case(Variable(device, n=n, density=density, kv_heads=32), (*OURS, *FLASHINFER))


def mla(device: torch.device) -> Iterator[Case]:
    """Decoding DeepSeek's latent attention: 128 heads, 512 + 64 columns, in pages of one token and of 64."""
    for batch in (64, 256, 768):
        for length in (1024, 4096, 8192):
            for page in (1, 64):
                yield Case(Latent(device, batch=batch, length=length, page=page), (*OURS, *FLASHINFER))


def append(device: torch.device) -> Iterator[Case]:
    """Writing new tokens to the cache: one for each of many sequences, chunks, and one long prompt."""
    for batch, tokens in ((128, 1), (1024, 1), (8, 1024), (1, 32768)):
        for page in (16, 1):
            yield Case(Append(device, batch=batch, tokens=tokens, page=page), (OURS[0], FLASHINFER[0]))


def merge(device: torch.device) -> Iterator[Case]:
    """Two states into one, as cascades do, and many, as split keys do."""
    for rows, states in ((128, 2), (8192, 2), (131072, 2), (128, 32), (8192, 8)):
        yield Case(Merge(device, rows=rows, states=states), (OURS[0], FLASHINFER[0]))


def host(device: torch.device) -> Iterator[Case]:
    """Calls so small that what they cost is the host's part: read ``run_host_us`` and ``plan_host_us``."""
    small = ("sparseattn_flashinfer", *FLASHINFER)
    yield Case(Decode(device, batch=16, length=256), (*small, "flashinfer_cuda_cores"))
    for ragged in (False, True):
        yield Case(Prefill(device, batch=4, length=128, ragged=ragged, lengths_on="device"), small)
    yield Case(Latent(device, batch=16, length=256), small)
    yield Case(BSR(device, n=1024), small)
    yield Case(Variable(device, n=1024), small)
    yield Case(Append(device, batch=16), small[:2])
    yield Case(Merge(device, rows=16), small[:2])


SETS: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    one.__name__: one for one in (decode, prefill, chunked, bsr, variable, mla, append, merge, host)
}
