"""Selection rules in plain PyTorch: any device, any dtype. This file defines what is correct."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.ops.scores.chunks import ScoreChunks
from sparseattn.ops.scores.rules_problem import ListBounds, Rule, free_budget, row_budget

_CHUNK_ELEMENTS = 1 << 22  # scores ranked at once


def unsupported_reason(scores: Tensor) -> str | None:
    """The reference takes everything."""
    return None


def choose(scores: Tensor, rule: Rule, thresholds: Tensor, bounds: ListBounds, width: int) -> tuple[Tensor, Tensor]:
    """Lists from natural-log scores. See ``rules.choose_blocks``.

    Args:
        scores: ``[B, H, MB, NB]``; -inf is no score at all.
        rule: The rule.
        thresholds: float32 ``[1]`` or ``[H]``, from ``log_threshold``.
        bounds: What each row may and must list.
        width: Length of the lists.

    Returns:
        int32 counts ``[B, H, MB]`` and indices ``[B, H, MB, width]``, ascending.
    """
    batch, heads, rows, columns = scores.shape
    counts = torch.zeros((batch, heads, rows), dtype=torch.int32, device=scores.device)
    indices = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=scores.device)
    if scores.numel() == 0:
        return counts, indices
    cuts = thresholds.view(1, -1, 1, 1).to(scores.dtype)
    if rule.name == "global" and rule.density is not None:
        cuts = _density_cut(scores, bounds, rule.density).view(-1, 1, 1, 1)
    step = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * columns))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        whole = None if bounds.whole is None else bounds.whole[:, part]
        own = ListBounds(bounds.visible[:, part], bounds.recent[:, part], bounds.sinks, whole)
        keep = _keep(scores[:, :, part], rule, cuts, own)
        counts[:, :, part] = keep.sum(-1, dtype=torch.int32)
        # A stable sort by "not kept" puts the kept blocks first, ascending.
        indices[:, :, part] = torch.argsort((~keep).byte(), dim=-1, stable=True)[..., :width].int()
    return counts, indices


def choose_chunks(
    chunks: ScoreChunks, shape: tuple[int, ...], rule: Rule, thresholds: Tensor, bounds: ListBounds, width: int
) -> tuple[Tensor, Tensor]:
    """As :func:`choose`, of scores ``[B, H, MB, NB]`` (``shape``) that come in chunks."""
    parts = [scores.clone() for _, scores in chunks] if 0 not in shape else []
    scores = torch.cat(parts, 2) if parts else thresholds.new_empty(shape)
    return choose(scores, rule, thresholds, bounds, width)


def _keep(scores: Tensor, rule: Rule, cuts: Tensor, bounds: ListBounds) -> Tensor:
    """Bool ``[B, H, rows, NB]`` of the kept blocks."""
    n = torch.arange(scores.shape[-1], device=scores.device)
    visible = n < bounds.visible[:, None, :, None]
    forced = visible & ((n >= bounds.recent[:, None, :, None]) | (n < bounds.sinks))
    free = (visible & ~forced).expand_as(scores)  # gather would cut what does not broadcast
    x = scores.masked_fill(~visible, -torch.inf)
    # Descending, the lower index first among equals; what is not free comes last. Every rule keeps a prefix of it.
    order = torch.argsort((~free).byte(), dim=-1, stable=True)
    ranked = x.masked_fill(~free, -torch.inf).gather(-1, order)
    order = order.gather(-1, ranked.argsort(dim=-1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, n.expand_as(order))
    num_forced = forced.sum(-1, keepdim=True)
    if rule.name == "topk":
        chosen = free & (rank < row_budget(rule, bounds.visible)[:, None, :, None] - num_forced)
    elif rule.name == "cumulative":
        chosen = free & _cumulative(x, forced, order, rank, cuts)
    else:
        best: Tensor | float = 0.0
        if rule.name != "global":
            best = (x if rule.name == "relative" else x.masked_fill(~free, -torch.inf)).amax(-1, keepdim=True)
        chosen = free & (x >= cuts + best) & ((x > -torch.inf) | (cuts == -torch.inf))
    # No row that sees a block goes without one.
    chosen |= free & (rank == 0) & (num_forced == 0) & ~chosen.any(-1, keepdim=True)
    if bounds.whole is not None:
        chosen = torch.where(bounds.whole[:, None, :, None], free, chosen)
    if rule.max_blocks is not None:
        chosen &= rank < (rule.max_blocks - num_forced)
    return forced | chosen


def _cumulative(x: Tensor, forced: Tensor, order: Tensor, rank: Tensor, shares: Tensor) -> Tensor:
    """Blocks in descending order until they hold the share, together with the forced ones."""
    best = x.amax(-1, keepdim=True)
    mass = (x.double() - best.double().masked_fill(best == -torch.inf, 0.0)).exp()
    need = shares.double() * mass.sum(-1, keepdim=True) - mass.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
    sorted_mass = mass.masked_fill(forced, 0.0).gather(-1, order)
    before = (sorted_mass.cumsum(-1) - sorted_mass).gather(-1, rank)
    return ((before < need) & (mass > 0)) | (shares >= 1)


def _density_cut(scores: Tensor, bounds: ListBounds, density: float) -> Tensor:
    """The score ``[B]`` at and above which free blocks are kept, so that a sequence keeps ``density`` of its blocks."""
    batch, heads, _, columns = scores.shape
    n = torch.arange(columns, device=scores.device)
    free = (n < torch.minimum(bounds.chosen_from, bounds.visible)[:, None, :, None]) & (n >= bounds.sinks)
    # What is not free must not count: NaN sorts first in descending order, so it goes to -inf, below every finite one.
    values = scores.masked_fill(~free, -torch.inf).flatten(1).sort(-1, descending=True).values
    budget = free_budget(bounds, density, heads).expand(batch)
    cut = values.gather(-1, (budget - 1).clamp(0, values.shape[-1] - 1)[:, None])[:, 0]
    return torch.where(budget > 0, cut, torch.inf)
