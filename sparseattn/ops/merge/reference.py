"""Merging attention states in plain PyTorch: the definition, on any device and in any float dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unsupported_reason(o: Tensor) -> str | None:
    """The reference takes everything that passes validation."""
    return None


def merge(
    o: Tensor,
    lse: Tensor,
    o_b: Tensor | None,
    lse_b: Tensor | None,
    out: Tensor,
    out_lse: Tensor,
    mask: Tensor | None,
    base: float,
) -> None:
    """Merge n states, and one more if there is, into ``out`` and ``out_lse`` (which may be the inputs).

    Args:
        o: ``[n, B, S, H, D]``.
        lse: ``[n, B, H, S]``.
        o_b: ``[B, S, H, D]`` or None.
        lse_b: ``[B, H, S]`` or None.
        out: ``[B, S, H, D]``, written.
        out_lse: ``[B, H, S]``, written.
        mask: bool ``[B, S]``, rows to write; None: all.
        base: Of the logarithms.
    """
    if o_b is not None and lse_b is not None:
        o, lse = torch.cat([o, o_b[None]]), torch.cat([lse, lse_b[None]])
    natural = lse * math.log(base)
    top = natural.amax(0)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (natural - top).exp()
    total = weights.sum(0)
    shares = (weights / total.clamp(min=torch.finfo(lse.dtype).tiny)).transpose(-1, -2)[..., None]
    # A state over no keys counts nothing, even if its output holds NaN.
    merged = (shares * o.to(lse.dtype)).masked_fill(shares == 0, 0).sum(0).to(out.dtype)
    merged_lse = (total.log() + top) / math.log(base)
    if mask is not None:
        merged = torch.where(mask[..., None, None], merged, out)
        merged_lse = torch.where(mask[:, None], merged_lse, out_lse)
    out.copy_(merged)
    out_lse.copy_(merged_lse)
