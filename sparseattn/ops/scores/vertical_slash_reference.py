"""Plain PyTorch attention mass of the last queries: any device, any dtype. This file defines what is correct."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.ops.scores.vertical_slash import LastQueries
from sparseattn.ops.scores.vertical_slash import slash_bands as slash_bands


def last_query_mass(q: Tensor, k: Tensor, p: LastQueries) -> Tensor:
    """``vertical`` and ``slash``, ``[2, B, Hq, Sk]``. See ``vertical_slash.last_query_mass``."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    s, heads = p.sequences, q.shape[-2]
    both = q.new_zeros((2, s.batch, heads, s.max_k), dtype=dtype)
    vertical, slash = both
    group = heads // k.shape[-2]
    for b, (q_start, q_end, k_start, k_end) in enumerate(s.bounds()):
        k_len = k_end - k_start
        rows = min(p.num_queries, q_end - q_start, k_len if p.causal else p.num_queries)
        if rows <= 0 or k_len <= 0:
            continue
        q_rows = (q if s.packed else q[b])[q_end - rows : q_end].to(dtype)
        k_rows = (k if s.packed else k[b])[k_start:k_end]
        position = torch.arange(k_len - rows, k_len, device=q.device)
        for g in range(k.shape[-2]):  # one key head at a time, for the [G, rows, Sk] product
            part = slice(g * group, (g + 1) * group)
            logits = torch.einsum("ihd,jd->hij", q_rows[:, part], k_rows[:, g].to(dtype)) * p.scale
            if p.causal:
                hidden = torch.arange(k_len, device=q.device) > position[:, None]
                logits = logits.masked_fill(hidden, -torch.inf)
            mass = logits.softmax(-1) / rows
            vertical[b, part, :k_len] = mass.sum(1)
            for r in range(rows):
                last = max(k_len - rows + r, -1)  # without causality there may be fewer keys than rows
                slash[b, part, : last + 1] += mass[:, r, : last + 1].flip(-1)
    return both


def largest(values: Tensor, counts: Tensor) -> Tensor:
    """bool ``[..., N]``. See ``vertical_slash.largest``."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    take = torch.arange(values.shape[-1], device=values.device) < counts[..., None]
    return torch.zeros_like(take.expand_as(values)).scatter(-1, order, take.expand_as(values))


def coverage_counts(values: Tensor, share: float) -> Tensor:
    """int64 ``[...]``. See ``vertical_slash.coverage_counts``."""
    value = values.double().sort(dim=-1, descending=True).values
    before = value.cumsum(-1) - value
    return ((before < share) & (value > 0)).sum(-1).clamp(min=1)
