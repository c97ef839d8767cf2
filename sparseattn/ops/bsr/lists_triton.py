"""Lists of a pattern brought to the form of a ``BlockMask`` by Triton: one launch in the place of a dozen."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import Number, launch, repeatedly
from sparseattn.kernels.offline import offline_case
from sparseattn.kernels.usual import empty

_BLOCK = 128
_OTHERS = 32


@triton.jit
def _entries(index_ptr, first, at, end, nnz, num_blocks):
    """Column blocks at entries ``at`` of a list that begins at ``first``; ``num_blocks`` for what names no block."""
    entry = first + at
    inside = (at < end) & (entry >= 0) & (entry < nnz)
    block = tl.load(index_ptr + entry, mask=inside, other=-1)
    return tl.where((block >= 0) & (block < num_blocks), block, num_blocks)


@triton.jit(do_not_specialize=["rows", "nnz", "num_blocks", "width"])
def lists_kernel(
    bound_ptr, index_ptr, count_ptr, list_ptr, rows, nnz, num_blocks, width, CSR: tl.constexpr, BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    """One program: the list of a row, ascending, and how many blocks it names. Grid (rows of all lists).

    With ``CSR`` row r of list h has the entries ``bound[h * (rows + 1) + r]`` to the next one, of ``nnz`` in all, the
    first ``width`` of which count; else the first ``bound[h * rows + r]`` of ``nnz`` entries of its own. Writes
    ``width`` entries, ``num_blocks`` past the count. Lists that ascend are copied; in others every entry counts those
    that come before it.
    """
    at = tl.program_id(0)
    if CSR:
        bound = bound_ptr + at // rows * (rows + 1) + at % rows
        first = tl.load(bound).to(tl.int64)
        length = tl.minimum(tl.maximum(tl.load(bound + 1) - first, 0), width).to(tl.int32)
        source, entries = index_ptr, nnz
    else:
        first = tl.zeros([], tl.int64)
        length = tl.minimum(tl.maximum(tl.load(bound_ptr + at), 0), nnz)
        source, entries = index_ptr + at.to(tl.int64) * nnz, nnz
    target = list_ptr + at.to(tl.int64) * width
    lane = tl.arange(0, BLOCK)
    count = length * 0
    falls = length * 0
    for start in range(0, length, BLOCK):
        e = start + lane
        block = _entries(source, first, e, length, entries, num_blocks)
        following = _entries(source, first, e + 1, length, entries, num_blocks)
        count += tl.sum((block < num_blocks).to(tl.int32), 0)
        falls += tl.sum((block > following).to(tl.int32), 0)
    if falls == 0:
        for start in range(0, length, BLOCK):
            e = start + lane
            block = _entries(source, first, e, length, entries, num_blocks)
            tl.store(target + e, block, mask=(e < length) & (e < width))
    else:
        for start in range(0, length, BLOCK):
            e = start + lane
            block = _entries(source, first, e, length, entries, num_blocks)
            rank = lane * 0
            for begin in range(0, length, OTHERS):
                o = begin + tl.arange(0, OTHERS)
                other = _entries(source, first, o, length, entries, num_blocks)
                before = (other[None, :] < block[:, None]) | (
                    (other[None, :] == block[:, None]) & (o[None, :] < e[:, None])
                )
                rank += tl.sum((before & (o < length)[None, :]).to(tl.int32), 1)
            tl.store(target + rank, block, mask=(e < length) & (rank < width))
    for start in range(length, width, BLOCK):
        e = start + lane
        tl.store(target + e, lane * 0 + num_blocks, mask=e < width)
    tl.store(count_ptr + at, tl.minimum(count, width))


def lists(bounds: Tensor, indices: Tensor, num_blocks: int, width: int) -> tuple[Tensor, Tensor]:
    """Counts and ascending lists of ``width`` entries.

    Args:
        bounds: int32 [B|1, H, MB + 1] into ``indices``; or counts int32 [B|1, H, MB] of padded lists.
        indices: int32 [nnz], or padded lists int32 [B|1, H, MB, K]; contiguous, as ``bounds`` are.
        num_blocks: NB; other numbers name no block and are dropped.
        width: At most as many entries as there are.

    Returns:
        int32 [B|1, H, MB] and [B|1, H, MB, width].
    """
    csr = indices.dim() == 1
    rows, nnz = bounds.shape[2] - csr, indices.shape[-1]
    counts = empty((*bounds.shape[:2], rows), torch.int32, indices.device)
    made = empty((*counts.shape, width), torch.int32, indices.device)

    entries = Number("nnz", nnz)

    def call(bounds: Tensor, indices: Tensor, counts: Tensor, made: Tensor) -> None:
        launch(
            lists_kernel, (counts.numel(),), bounds, indices, counts, made, rows, entries, num_blocks, width,
            CSR=csr, BLOCK=_BLOCK, OTHERS=_OTHERS, num_warps=4, **LAUNCH,
        )  # fmt: skip

    # Patterns of another nnz are launched alike, where it is as wide a number.
    key = ("lists", num_blocks, nnz >> 31)
    repeatedly(call, key, entries, bounds=bounds, indices=indices[:1] if csr else indices, counts=counts, made=made)
    return counts, made


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    constants = {"CSR": True, "BLOCK": _BLOCK, "OTHERS": _OTHERS}
    return [("bsr-lists", *offline_case(lists_kernel, constants), 4, 1)]
