"""Where attention operators write."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_lse(q: Tensor) -> Tensor:
    """Memory for the LSE ``[B, Hq, S]`` (packed ``[Hq, total]``) of queries ``[B, S, Hq, D]`` (``[total, Hq, D]``).

    float64 for float64 queries, else float32.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=dtype, device=q.device)


def empty_results(q: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Memory for an output of ``dim`` columns in q's dtype, and for the LSE."""
    return torch.empty((*q.shape[:-1], dim), dtype=q.dtype, device=q.device), empty_lse(q)
