"""Plain PyTorch block means, ranked block lists and column lists. This file defines what is correct."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.masks.lists import compact, scatter_blocks
from sparseattn.ops.scores.block_lists import MASS, POOLED, ListPlan, Ranking, difference_index


def block_means(
    x: Tensor, start: Tensor | None, end: Tensor | None, packed: bool, block_size: int, num_blocks: int,
    wanted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Means over blocks of rows, counted from each sequence's start.

    Args:
        x: ``[B, S, H, D]``, or packed ``[total, H, D]``.
        start: int ``[B]``, first row. None, with ``end``, for all rows of an unpacked batch.
        end: int ``[B]``, one past the last.
        packed: Rows count in the packed tensor instead of the batch row.
        block_size: Rows of a block.
        num_blocks: Blocks of the longest sequence.
        wanted: bool ``[B|1, H]``, heads whose means are needed; kernels leave those of others undefined. None: all.

    Returns:
        float32 (float64 for float64 inputs) ``[B, H, num_blocks, D]``; 0 for blocks without rows.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads, head_dim = x.shape[-2:]
    spans = [(0, x.shape[1])] * x.shape[0]
    if start is not None and end is not None:
        spans = list(zip(start.tolist(), end.tolist(), strict=True))
    means = x.new_zeros((len(spans), num_blocks, heads, head_dim), dtype=dtype)
    for b, (first, last) in enumerate(spans):
        rows = (x if packed else x[b])[first:last].to(dtype)
        block = torch.arange(rows.shape[0], device=x.device) // block_size
        means[b].index_add_(0, block, rows)
        sizes = torch.bincount(block, minlength=num_blocks)
        means[b] /= sizes.clamp(min=1)[:, None, None]
    return means.transpose(1, 2)


def list_blocks(plan: ListPlan, ranking: Ranking | None, width: int) -> tuple[Tensor, Tensor]:
    """int32 counts ``[B, H, MB]`` and ascending indices ``[B, H, MB, width]``.

    Args:
        plan: What is listed without ranking.
        ranking: What is listed besides.
        width: Length of the lists; must suffice for the longest.
    """
    columns, rows = plan.vertical.shape[-1], plan.visible.shape[-1]
    n = torch.arange(columns, device=plan.visible.device)
    m = torch.arange(rows, device=n.device)[:, None]
    visible = n < plan.visible[:, None, :, None]
    keep = plan.vertical[:, :, None, :] | plan.band[:, :, difference_index(m, n, columns)]
    if plan.dense_from is not None:
        keep = keep | (m >= plan.dense_from[:, :, None, None])
    keep = keep & visible
    planned, scores = keep, None
    if ranking is not None:
        scores = _scores(ranking, visible, difference_index(m, n, columns))
        ranked = _share(scores, visible, ranking.share) if ranking.share is not None else _top(scores, keep, ranking)
        keep = keep | (ranked & visible & (ranking.mode > 0)[..., None, None])
    if plan.cap is not None:
        mass = torch.maximum(plan.cap.vertical[:, :, None, :], plan.cap.band[:, :, difference_index(m, n, columns)])
        keep = _within_cap(keep, planned, mass.double(), scores, plan.cap.most[..., None, None])
    return compact(keep, width)


def _within_cap(keep: Tensor, planned: Tensor, mass: Tensor, scores: Tensor | None, most: Tensor) -> Tensor:
    """The first ``most [B|1, H, 1, 1]`` of the kept blocks: planned ones by mass, then others by their log-probability.

    All of infinite mass stay.
    """
    order = torch.where(planned, 2 + mass, torch.zeros_like(mass) if scores is None else scores.double().exp())
    order = order.masked_fill(~keep, -torch.inf)
    forced = (order == torch.inf).sum(-1, keepdim=True)
    best = order.sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(keep.shape[-1], device=keep.device) < torch.maximum(most, forced)
    return keep & torch.zeros_like(keep).scatter(-1, best, first.expand_as(keep))


def _scores(r: Ranking, visible: Tensor, index: Tensor) -> Tensor:
    """``[B, H, MB, NB]``, -inf where hidden: log-probabilities of POOLED heads, masses of MASS heads."""
    mode = r.mode[..., None, None]
    pooled: Tensor | None = None
    if r.q_means is not None and r.k_means is not None:
        group = r.q_means.shape[1] // r.k_means.shape[1]
        logits = r.q_means @ r.k_means.repeat_interleave(group, 1).transpose(-1, -2) * r.scale
        pooled = logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
    if r.vertical is None or r.band is None:
        assert pooled is not None
        return torch.where(visible & (mode == POOLED), pooled, -torch.inf)
    mass = torch.maximum(r.vertical[:, :, None, :], r.band[:, :, index])
    scores = mass if pooled is None else torch.where(mode == MASS, mass, pooled)
    return scores.masked_fill(~visible, -torch.inf)


def _share(scores: Tensor, visible: Tensor, share: float) -> Tensor:
    """The most probable pairs of a head that sum to ``share`` per row."""
    if share >= 1:
        return visible.expand_as(scores)
    p = scores.exp().double().flatten(2)
    need = share * visible.any(-1).sum(-1).double()  # [B|1, 1]
    value = p.sort(dim=-1, descending=True).values
    short = (value.cumsum(-1) - value) < need[..., None]
    taken = (short & (value > 0)).sum(-1, keepdim=True)
    cut = value.gather(-1, (taken - 1).clamp(min=0))
    return ((p >= cut) & (taken > 0)).view(scores.shape)


def _top(scores: Tensor, planned: Tensor, r: Ranking) -> Tensor:
    """The best ``top`` blocks of every row, planned ones first."""
    assert r.top is not None
    order = scores.masked_fill(planned, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    take = torch.arange(scores.shape[-1], device=scores.device) < r.top[..., None]
    return torch.zeros_like(planned).scatter(-1, order, take.expand_as(planned))


def list_tokens(selected: Tensor, kept: int, width: int) -> tuple[Tensor, Tensor]:
    """Tokens that any of the query heads selects that share a list.

    Args:
        selected: bool ``[B, H, Sk]``.
        kept: Lists of a sequence.
        width: Tokens of a list, as many as there can be.

    Returns:
        int32 counts ``[B, kept]`` and tokens ``[B, kept, width]``: ascending, undefined past the count.
    """
    return compact(selected.unflatten(1, (kept, -1)).any(2), width)


def list_columns(
    tokens: Tensor, token_counts: Tensor, counts: Tensor, indices: Tensor, last: Tensor, block_size: int, columns: int
) -> Tensor:
    """The columns of every row that its blocks do not hold already.

    Args:
        tokens: int32 ``[B, H, C]``, ascending, undefined past the count.
        token_counts: int32 ``[B, H]``.
        counts: int32 ``[B, H, MB]``, lengths of the block lists.
        indices: int32 ``[B, H, MB, K]``, the block lists.
        last: int32 ``[B, MB]``, the last key that a row may list.
        block_size: Tokens of a block.
        columns: NB.

    Returns:
        int32 ``[B, H, MB, C]``, ascending, -1 past the end.
    """
    listed = scatter_blocks(counts, indices, columns)
    width = tokens.shape[-1]
    slot = torch.arange(width, device=tokens.device)
    valid = slot < token_counts[..., None]
    block = torch.where(valid, tokens // block_size, 0).long()[:, :, None].expand(*counts.shape, -1)
    keep = valid[:, :, None] & ~listed.gather(-1, block) & (tokens[:, :, None] <= last[:, None, :, None])
    kept, order = compact(keep)
    found = tokens[:, :, None].expand_as(keep).gather(-1, order.long())
    return torch.where(slot < kept[..., None], found, -1)
