"""Zeros and -inf for the rows of a ragged batch that belong to no sequence: all others are written by attention."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch

_ROWS = 32


@triton.jit(do_not_specialize=["lse_stride_b", "lse_stride_h", "rows", "batch", "max_q", "heads"])
def clear_rows_kernel(
    o_ptr, lse_ptr, start_ptr, end_ptr, stride_out, lse_stride_b, lse_stride_h, rows,
    batch, max_q, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` rows of all heads, which it leaves alone if they are all within sequences.

    Grid (rows / ROWS, batch entries; 1 if ``PACKED``). Sequence b has the first ``max_q`` of the rows from
    ``start_ptr`` to ``end_ptr``, int32 [batch]: of all rows if ``PACKED``, else of its batch entry's. Where sequences
    are not in order, every row is cleared. ``stride_out``: batch, row, head, dim.
    """
    entry = tl.program_id(1)
    first = 0
    last = batch
    if not PACKED:
        first = entry
        last = entry + 1
    r0 = tl.program_id(0) * ROWS
    r1 = tl.minimum(r0 + ROWS, rows)
    held = r0 * 0
    unordered = r0 * 0
    for c in range(first, last, CHUNK):
        b = c + tl.arange(0, CHUNK)
        start = tl.load(start_ptr + b, mask=b < last, other=0)
        end = tl.load(end_ptr + b, mask=b < last, other=0)
        following = tl.load(start_ptr + b + 1, mask=b + 1 < last, other=0x7FFFFFFF)
        unordered += tl.sum(((start < 0) | (end < start) | ((following < end) & (b < last))).to(tl.int32), 0)
        end = tl.minimum(end, start + max_q)
        held += tl.sum(tl.maximum(tl.minimum(end, r1) - tl.maximum(start, r0), 0), 0)
    if (held < r1 - r0) | (unordered > 0):
        row = r0 + tl.arange(0, ROWS)
        owned = row * 0
        for c in range(first, last, CHUNK):
            b = c + tl.arange(0, CHUNK)
            start = tl.load(start_ptr + b, mask=b < last, other=0)
            end = tl.load(end_ptr + b, mask=b < last, other=0)
            end = tl.minimum(end, start + max_q)
            within = (row[:, None] >= start[None, :]) & (row[:, None] < end[None, :])
            owned = tl.maximum(owned, tl.max(within.to(tl.int32), 1))
        free = (tl.where(unordered > 0, 0, owned) == 0) & (row < rows)
        columns = tl.arange(0, BLOCK_DV)
        o_row = entry.to(tl.int64) * stride_out[0] + row.to(tl.int64) * stride_out[1]
        o_at = o_ptr + o_row[:, None] + (columns * stride_out[3])[None, :]
        lse_at = lse_ptr + entry.to(tl.int64) * lse_stride_b + row
        nothing = tl.zeros([ROWS, BLOCK_DV], o_ptr.dtype.element_ty)
        for _head in range(0, heads):
            tl.store(o_at, nothing, mask=free[:, None] & (columns < DV)[None, :])
            tl.store(lse_at, row * 0.0 - float("inf"), mask=free)
            o_at += stride_out[2]
            lse_at += lse_stride_h


def clear_rows(o: Tensor, lse: Tensor, start: Tensor, end: Tensor, max_q: int, *, packed: bool) -> None:
    """Write 0 to ``o`` and -inf to ``lse`` where no sequence has a row, before attention writes the others.

    Args:
        o: ``[total, H, Dv]`` if ``packed``, else ``[B, S, H, Dv]``; any strides.
        lse: float32, contiguous ``[H, total]`` or ``[B, H, S]``.
        start: int32 [B], first row of each sequence.
        end: int32 [B], one past the last.
        max_q: Rows of a sequence at most; others beyond it are cleared.
        packed: Sequences lie in one run of rows, not each in its batch entry.
    """
    rows, heads, dim = o.shape[-3:]
    strides = (0, *o.stride()) if packed else o.stride()
    entries = 1 if packed else o.shape[0]
    launch(
        clear_rows_kernel, (triton.cdiv(rows, _ROWS), entries),
        o, lse, start, end, strides, heads * rows, rows, rows, start.shape[0], max_q, heads,
        DV=dim, BLOCK_DV=triton.next_power_of_2(dim), ROWS=_ROWS, CHUNK=128, PACKED=packed, num_warps=4, **LAUNCH,
    )  # fmt: skip
