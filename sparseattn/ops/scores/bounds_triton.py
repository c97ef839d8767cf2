"""Triton: which blocks lie near the diagonal of each query block, in one launch instead of one per operation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import sequence_span
from sparseattn.kernels.launches import launch
from sparseattn.kernels.offline import offline_case
from sparseattn.ops.sequences import Sequences

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["max_q", "max_k", "rows", "pitch", "before", "after"]
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr"]
_BLOCK = 256


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _diagonal_kernel(
    runs_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, max_q, max_k, rows, pitch, before, after,
    BLOCK_SIZE: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``runs [2, pitch]``: first and stop of the runs of query blocks ``[B, MB]``. Grid (tiles of query blocks, B)."""
    b = tl.program_id(1)
    _, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    _, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = block * BLOCK_SIZE
    last = tl.minimum(row + BLOCK_SIZE, q_len) - 1 + (k_len - q_len) + after
    stop = tl.where(last >= 0, tl.maximum(last, 0) // BLOCK_SIZE + 1, 0)
    stop = tl.minimum(stop, (k_len + BLOCK_SIZE - 1) // BLOCK_SIZE)
    stop = tl.where(row < q_len, stop, 0)
    first = tl.minimum(tl.maximum(row + (k_len - q_len) - before, 0) // BLOCK_SIZE, stop)
    at = runs_ptr + b * rows + block
    tl.store(at, first, mask=block < rows)
    tl.store(at + pitch, stop, mask=block < rows)


def diagonal_blocks(
    s: Sequences, block_size: int, before: int, after: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """int32 ``[B|1, MB]`` each. See ``problem.diagonal_blocks``."""
    batch, rows = s.batch if s.ragged else 1, -(-s.max_q // block_size)
    # Both begin at a multiple of 16 bytes: kernels that read them are compiled for what is aligned and what is not.
    runs = torch.empty((2, -(-batch * rows // 4) * 4), dtype=torch.int32, device=device)
    if runs.numel():
        launch(
            _diagonal_kernel, (-(-rows // _BLOCK), batch),
            runs, s.q_start, s.q_end, s.k_start, s.k_end, s.max_q, s.max_k, rows, runs.shape[1], before, after,
            BLOCK_SIZE=block_size, RAGGED_Q=s.q_start is not None, RAGGED_K=s.k_start is not None, BLOCK=_BLOCK,
            num_warps=4, **LAUNCH,
        )  # fmt: skip
    first, stop = (run[: batch * rows].view(batch, rows) for run in runs)
    return first, stop


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    constants = {"BLOCK_SIZE": 128, "RAGGED_Q": True, "RAGGED_K": True, "BLOCK": _BLOCK}
    return [("diagonal-blocks", *offline_case(_diagonal_kernel, constants), 4, 3)]
