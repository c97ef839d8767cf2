"""Plain PyTorch landmark scores: any device, any dtype. This file defines what is correct."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.masks.lists import compact
from sparseattn.ops.scores.landmark_problem import (
    FP8,
    FP8_MAX,
    LandmarkFeatures,
    LandmarkProblem,
    free_budget,
    log_taus_on,
    num_snapshots,
    snapshot_index,
    snapshot_length,
)
from sparseattn.ops.scores.problem import RowBounds
from sparseattn.ops.sequences import Sequences

_CHUNK_ELEMENTS = 1 << 23  # Gram matrices held at once; 32 MB in float32


def unsupported_reason(q: Tensor, k: Tensor, fp8: bool) -> str | None:
    """The reference takes everything; it emulates float8 products by rounding their operands."""
    return None


def features(k: Tensor, s: Sequences, block_size: int, clusters: int) -> LandmarkFeatures:
    """Landmarks of every block. See ``landmark.landmark_features``."""
    dtype = _working_dtype(k)
    heads, dim = k.shape[-2:]
    shape = (s.batch, heads, -(-s.max_k // block_size), clusters)
    centroids = k.new_zeros((*shape, dim))
    spreads = k.new_zeros(shape, dtype=dtype)
    sizes = k.new_zeros(shape, dtype=torch.int32)
    for b, (_, _, start, end) in enumerate(s.bounds()):
        if start >= end:
            continue
        x = (k if s.packed else k[b])[start:end].transpose(0, 1).to(dtype)  # [Hkv, Sk, D]
        blocks = -(-x.shape[1] // block_size)
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % block_size)).view(heads, blocks, block_size, dim)
        valid = torch.arange(blocks * block_size, device=k.device).view(blocks, block_size) < end - start
        step = max(1, _CHUNK_ELEMENTS // (heads * block_size * block_size))
        for first in range(0, blocks, step):
            part = slice(first, min(first + step, blocks))
            c, v, n = _cluster(x[:, part], valid[part], clusters)
            centroids[b, :, part] = c.to(k.dtype)
            spreads[b, :, part], sizes[b, :, part] = v, n
    return LandmarkFeatures(centroids, spreads, sizes)


def _cluster(x: Tensor, valid: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids ``[H, NB, m, D]``, spreads and sizes ``[H, NB, m]`` of ``x [H, NB, B, D]``; ``valid [NB, B]``."""
    gram = x @ x.mT
    square = gram.diagonal(dim1=-2, dim2=-1)  # [H, NB, B]
    count = valid.sum(-1).clamp(min=1)[:, None].to(x.dtype)
    # |x - mean|^2 but for what all keys share; padding is zero and adds nothing.
    centre = (square - 2 * gram.sum(-1) / count).masked_fill(~valid, torch.inf).argmin(-1)
    distance = torch.where(valid, torch.inf, -1.0).to(x.dtype).expand_as(square)
    assigned = torch.zeros_like(centre)[..., None].expand_as(square)
    for t in range(clusters):
        row = gram.gather(-2, centre[..., None, None].expand(*centre.shape, 1, gram.shape[-1])).squeeze(-2)
        new = square + square.gather(-1, centre[..., None]) - 2 * row
        closer = new < distance
        assigned = torch.where(closer, t, assigned)
        distance = torch.where(closer, new, distance)
        centre = distance.argmax(-1)
    # One Lloyd pass: each key to the nearest mean. |c|^2 - 2 x.c orders the means as the distance does.
    member = _members(assigned, valid, clusters, x.dtype)
    means = (member.mT @ x) / member.sum(-2)[..., None].clamp(min=1)
    order = means.square().sum(-1)[..., None, :] - 2 * x @ means.mT
    order = order.masked_fill(member.sum(-2)[..., None, :] == 0, torch.inf)
    member = _members(order.argmin(-1), valid, clusters, x.dtype)
    sizes = member.sum(-2)
    means = (member.mT @ x) / sizes[..., None].clamp(min=1)
    far = (x[..., :, None, :] - means[..., None, :, :]).square().sum(-1) * member  # [H, NB, B, m]
    variance = far.sum(-2) / sizes.clamp(min=1) / x.shape[-1]
    spreads = (2 * sizes.clamp(min=1).log() * variance).sqrt()
    return means, spreads, sizes.int()


def _members(assigned: Tensor, valid: Tensor, clusters: int, dtype: torch.dtype) -> Tensor:
    """One-hot ``[H, NB, B, m]``; padding belongs nowhere."""
    member = assigned[..., None] == torch.arange(clusters, device=assigned.device)
    return (member & valid[..., None]).to(dtype)


def covariances(f: LandmarkFeatures) -> Tensor:
    """Covariance of the landmarks before each snapshot: ``[B, Hkv, T, D, D]``.

    A landmark weighs the square root of its keys. Rows chosen so lose fewer blocks, on trained models, than by the
    covariance of the keys themselves: lone keys, the ones that are looked for, count for more.
    """
    c, weights = f.centroids.to(f.spreads.dtype), f.sizes.to(f.spreads.dtype).sqrt()
    batch, heads, blocks, _, dim = c.shape
    out = c.new_zeros((batch, heads, num_snapshots(blocks), dim, dim))
    for t in range(1, out.shape[2]):
        w = weights[:, :, : snapshot_length(t)].flatten(2)[..., None]
        x = c[:, :, : snapshot_length(t)].flatten(2, 3)
        total = w.sum(-2, keepdim=True).clamp(min=1)
        mean = (w * x).sum(-2, keepdim=True) / total
        out[:, :, t] = (w * x).mT @ x / total - mean.mT @ mean
    return out


def _choose_rows(tile: Tensor, covariance: Tensor, rows: int) -> Tensor:
    """The sharpest rows of ``tile [Hq, n, D]`` by ``covariance [Hq, D, D]``: int64 ``[Hq, rows]``, n > rows."""
    x = tile - tile.mean(1, keepdim=True)
    sharpness = ((x @ covariance) * x).sum(-1)
    return sharpness.sort(dim=-1, descending=True, stable=True).indices[:, :rows]


def scores(q: Tensor, k: Tensor, f: LandmarkFeatures, p: LandmarkProblem, bounds: RowBounds) -> Tensor:
    """Log of the largest probability of each block. See ``landmark.landmark_scores``."""
    out = q.new_full(
        (p.sequences.batch, q.shape[-2], p.num_q_blocks, p.num_kv_blocks), -torch.inf, dtype=_working_dtype(q)
    )
    recents = bounds.recent.expand(p.sequences.batch, -1)
    snapshots = snapshot_index(recents).tolist()
    covariance = covariances(f) if p.rows < p.block_size else None
    for b, (q_start, q_end, k_start, k_end) in enumerate(p.sequences.bounds()):
        q_rows = (q if p.sequences.packed else q[b])[q_start:q_end].transpose(0, 1)  # [Hq, Sq, D]
        k_rows = (k if p.sequences.packed else k[b])[k_start:k_end].transpose(0, 1)
        own = LandmarkFeatures(*(t[b] for t in f))
        for m, recent in enumerate(recents[b].tolist()):
            if recent > p.first_free:
                shape = None if covariance is None else covariance[b, :, snapshots[b][m]]
                out[b, :, m, p.first_free : recent] = _score_tile(q_rows, k_rows, own, p, m, recent, shape)
    if p.group_shared:
        out = out.unflatten(1, (k.shape[-2], -1)).amax(2)
    return out


def _score_tile(
    q: Tensor, k: Tensor, f: LandmarkFeatures, p: LandmarkProblem, m: int, recent: int, covariance: Tensor | None
) -> Tensor:
    """Scores ``[Hq, recent - first_free]`` of query block ``m`` of a sequence ``q [Hq, Sq, D]``, ``k [Hkv, Sk, D]``."""
    size, (heads, sq, _), (kv_heads, sk, _) = p.block_size, q.shape, k.shape
    group, dtype = heads // kv_heads, _working_dtype(q)
    tile = q[:, m * size : (m + 1) * size].to(dtype)
    rows = torch.arange(m * size, min((m + 1) * size, sq), device=q.device).expand(heads, -1)
    if covariance is not None and rows.shape[1] > p.rows:
        chosen = _choose_rows(tile, covariance.repeat_interleave(group, 0), p.rows)
        rows = rows.gather(1, chosen)
        tile = tile.gather(1, chosen[..., None].expand(-1, -1, tile.shape[-1]))
    # [Hkv, G * R, D]: the rows of a group of heads meet their keys in one product.
    grouped = tile.reshape(kv_heads, -1, tile.shape[-1])

    # The last key a row of the block sees; without causality no block but the sink is forced.
    stop = min((m + 1) * size, sq) + sk - sq if p.causal else 0
    exact = torch.arange(sk, device=q.device)
    exact = torch.cat([exact[: size if p.keep_sink else 0], exact[recent * size : stop]])
    logits = (grouped @ k[:, exact].to(dtype).mT).view(*tile.shape[:2], exact.numel()) * p.scale
    if p.causal:
        logits = logits.masked_fill(exact > (rows + sk - sq)[..., None], -torch.inf)
    norm = logits.logsumexp(-1) if exact.numel() else torch.full_like(tile[..., 0], -torch.inf)

    free = slice(p.first_free, recent)
    centroids = f.centroids[:, free].flatten(1, 2).to(dtype)
    if p.fp8:
        (a, a_scale), (c, c_scale) = _to_fp8(grouped), _to_fp8(centroids)
        dots = (a @ c.mT) * a_scale * c_scale.mT
    else:
        dots = grouped @ centroids.mT
    length = grouped.norm(dim=-1, keepdim=True) * abs(p.scale)
    logits = dots * p.scale + length * f.spreads[:, free].flatten(1)[:, None]
    logits = logits.masked_fill((f.sizes[:, free].flatten(1) == 0)[:, None], -torch.inf)
    weights = logits.view(heads, tile.shape[1], recent - p.first_free, p.clusters).logsumexp(-1)
    norm = torch.logaddexp(norm, weights.logsumexp(-1))
    return (weights - norm[..., None]).amax(1)


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., D]`` rounded to float8 with one scale a vector: the rounded values and ``[..., 1]`` scales."""
    scale = (x.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).float().to(FP8).to(x.dtype), scale


def blocks(
    q: Tensor,
    k: Tensor,
    f: LandmarkFeatures,
    p: LandmarkProblem,
    bounds: RowBounds,
    taus: tuple[float, ...],
    density: float | None,
) -> tuple[Tensor, Tensor]:
    """Score, then compare with a threshold. See ``landmark.landmark_blocks``."""
    score = scores(q, k, f, p if density is not None else p._replace(group_shared=False), bounds)
    n = torch.arange(p.num_kv_blocks, device=q.device)
    visible = n < bounds.visible[:, None, :, None]
    free = visible & (n >= p.first_free) & (n < bounds.recent[:, None, :, None])
    if density is None:
        cut = log_taus_on(q.device, taus).to(score.dtype)[:, None, None]
        # A threshold of nothing keeps all, but what is capped needs an order.
        score = torch.where(cut == -torch.inf, (score + 128).clamp(min=0), score - cut)
        if p.group_shared:
            score = score.unflatten(1, (k.shape[-2], -1)).amax(2)
        keep = score >= 0
    elif score.numel():
        keep = score >= _cut(score, free, free_budget(p, bounds, score.shape[1], density))[:, None, None, None]
    else:
        keep = torch.zeros_like(score, dtype=torch.bool)
    forced = visible & ~free
    keep = _best(score, keep & free, p.cap(density) - forced.sum(-1, keepdim=True))
    return compact(keep | forced, p.width(density))


def _best(score: Tensor, keep: Tensor, allowed: Tensor) -> Tensor:
    """The best ``allowed [B, 1, MB, 1]`` of the kept blocks; the lower ones among equals."""
    order = torch.where(keep, score, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(score.shape[-1], device=score.device) < allowed
    return keep & torch.zeros_like(keep).scatter(-1, order, first.expand_as(keep))


def _cut(score: Tensor, free: Tensor, budget: Tensor) -> Tensor:
    """The lowest score ``[B]`` such that at most ``budget [B|1]`` free blocks of a sequence reach it."""
    free = free.expand_as(score).flatten(1)
    order = torch.where(free, score.flatten(1), torch.nan).sort(-1, descending=True)[0]  # NaN sorts first
    budget = torch.minimum(budget.expand(score.shape[0]), free.sum(-1))
    first = order.shape[1] - free.sum(-1)
    last = order.gather(1, (first + budget - 1).clamp(min=0)[:, None])
    ties_fit = ((order >= last).sum(-1) <= budget) & (budget > 0)
    above = torch.where(order > last, order, torch.inf).amin(-1)
    return torch.where(ties_fit, last[:, 0], torch.where(budget > 0, above, torch.inf))


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
