"""Where the entries of sequences begin in a custom mask of which nobody says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch, scratch


@triton.jit(do_not_specialize=["batch"])
def mask_starts_kernel(starts_ptr, lens_ptr, cu_ptr, batch, PACKED: tl.constexpr, RAGGED: tl.constexpr):
    """One program: where each sequence's entries begin in a custom mask, one right behind the other. Grid (1,)."""
    end = tl.zeros([], tl.int64)
    tl.store(starts_ptr, end)
    for c in range(0, batch, 128):
        b = c + tl.arange(0, 128)
        inside = b < batch
        size = tl.load(lens_ptr + b, mask=inside, other=0).to(tl.int64)
        if RAGGED:
            size *= tl.load(cu_ptr + b + 1, mask=inside, other=0) - tl.load(cu_ptr + b, mask=inside, other=0)
        if PACKED:
            size = (size + 7) // 8
        tl.store(starts_ptr + 1 + b, end + tl.cumsum(size, 0), mask=inside)
        end += tl.sum(size, 0)


def mask_starts(lens: Tensor, cu_seqlens_q: Tensor | None, packed: bool) -> Tensor:
    """int64 [B + 1], where entries begin of sequences that lie right behind one another, packed ones in whole bytes.

    Args:
        lens: int32 [B], keys.
        cu_seqlens_q: int32 [B + 1]; None: one query each.
        packed: 8 entries a byte.
    """
    starts = scratch((lens.shape[0] + 1,), torch.int64, lens.device)
    cu = lens if cu_seqlens_q is None else cu_seqlens_q
    ragged = cu_seqlens_q is not None
    launch(mask_starts_kernel, (1,), starts, lens, cu, lens.shape[0], PACKED=packed, RAGGED=ragged, **LAUNCH)
    return starts
