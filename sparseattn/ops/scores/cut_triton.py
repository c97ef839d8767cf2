"""Triton: the score that a number of blocks of a whole sequence reach, by counting passes over its scores' bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch
from sparseattn.kernels.offline import offline_case
from sparseattn.ops.scores.chunks import ScoreChunks

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["items", "rows", "first_row", "scores_stride_b", "scores_stride_h", "scores_pitch", "bounds_stride_b",
            "recent_stride_b", "first", "shift"]  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=["scores_ptr"])
def histogram_kernel(
    scores_ptr, counted_ptr, prefix_ptr, visible_ptr, recent_ptr, items, rows, first_row, scores_stride_b,
    scores_stride_h, scores_pitch, bounds_stride_b, recent_stride_b, first, shift, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the eight bits at ``shift`` of the free scores whose higher bits are the prefix. Grid (programs, B).

    An item is a row of a head of ``scores [B, H, rows, NB]``, the first of which is row ``first_row`` of the bounds.
    """
    b = tl.program_id(1)
    prefix = tl.load(prefix_ptr + b)
    counted = tl.zeros([256], tl.int32)
    scores_ptr += b.to(tl.int64) * scores_stride_b
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row = first_row + item % rows
        visible = tl.load(visible_ptr + b * bounds_stride_b + row)
        recent = tl.minimum(tl.load(recent_ptr + b * recent_stride_b + row), visible)
        row_ptr = scores_ptr + tl.cast(item // rows, tl.int64) * scores_stride_h
        row_ptr += tl.cast(item % rows, tl.int64) * scores_pitch
        for n in range(0, recent, BLOCK):
            offs_n = n + tl.arange(0, BLOCK)
            free = (offs_n >= first) & (offs_n < recent)
            x = tl.load(row_ptr + offs_n, mask=free, other=0.0) + 0.0  # 0.0, not -0.0, which orders below it
            bits = x.to(tl.int32, bitcast=True)
            flipped = tl.where(bits < 0, ~bits, bits ^ -2147483648)
            key = (flipped.to(tl.int64) & 0xFFFFFFFF) >> shift  # orders like the float before it is shifted
            free = free & ((key >> 8) == prefix)
            counted += tl.histogram((key & 255).to(tl.int32), 256, mask=free)
    # Integer sums: any order gives the same bits.
    tl.atomic_add(counted_ptr + b * 256 + tl.arange(0, 256), counted, mask=counted > 0)


class Cut(NamedTuple):
    """The lowest score among the ``budget`` best free blocks of a sequence.

    Attributes:
        key: int64 ``[B]`` in [0, 2^32): the score's bits, made to order like it. 0 where there are fewer blocks.
        ties: int64 ``[B]``, how many blocks have it.
        fit: int64 ``[B]``, how many of those the budget has room for.
    """

    key: Tensor
    ties: Tensor
    fit: Tensor


def find_cut(chunks: ScoreChunks, visible: Tensor, recent: Tensor, first: int, budget: Tensor) -> Cut:
    """Four passes over all scores settle eight bits of the cut each: no sort, and nothing as large as the scores.

    Args:
        chunks: float32 scores of all rows; gone through four times.
        visible: int32 ``[B|1, MB]``, as ``recent`` of ``rules_problem.ListBounds``.
        recent: int32 ``[B|1, MB]``; blocks ``[first, recent)`` are free.
        first: The first free block.
        budget: int64 ``[B]``, how many free blocks of each sequence.
    """
    batch, device = budget.shape[0], budget.device
    visible, recent = visible.contiguous(), recent.contiguous()
    prefix = torch.zeros(batch, dtype=torch.int64, device=device)
    counted = torch.zeros((batch, 256), dtype=torch.int32, device=device)
    need = ties = budget
    for shift in (24, 16, 8, 0):
        counted.zero_()
        for start, scores in chunks:
            _, heads, rows, _ = scores.shape
            launch(
                histogram_kernel, (min(rows * heads, 2048), batch),
                scores, counted, prefix, visible, recent, heads * rows, rows, start, *scores.stride()[:3],
                batch_stride(visible), batch_stride(recent), first, shift,
                BLOCK=1024 if scores.is_cuda else 32, num_warps=4, **LAUNCH,
            )  # fmt: skip
        falling = counted.flip(-1).cumsum(-1)
        above = (falling < need[:, None]).sum(-1, keepdim=True).clamp(max=255)
        bucket = 255 - above[:, 0]
        ties = counted.gather(1, bucket[:, None])[:, 0]
        need = need - (falling.gather(1, above)[:, 0] - ties)
        prefix = (prefix << 8) | bucket
    return Cut(prefix, ties, need)


def batch_stride(bound: Tensor) -> int:
    """The stride of the batch of bounds ``[B|1, MB]``."""
    return 0 if bound.shape[0] == 1 else bound.stride(0)


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    types = {"scores_ptr": "*fp32", "prefix_ptr": "*i64"}
    return [("histogram", *offline_case(histogram_kernel, {"BLOCK": 1024}, types), 4, 1)]
