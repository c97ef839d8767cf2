"""Block scores from pooled pages in plain PyTorch: any device, any dtype. This file defines what is correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseattn.ops.scores import rules_reference
from sparseattn.ops.scores.pooled_problem import PooledProblem
from sparseattn.ops.scores.rules_problem import ListBounds, Rule

_CHUNK_ELEMENTS = 1 << 23  # logits held at once; 32 MB in float32


def unsupported_reason(q: Tensor, k: Tensor) -> str | None:
    """The reference takes everything."""
    return None


def pool(k: Tensor, feature: str, page_size: int) -> tuple[Tensor, ...]:
    """Features of every page of one sequence: ``k [S, H, D]`` -> one or two ``[pages, H, D]`` in k's dtype.

    The last page has the keys it has.
    """
    if page_size == 1:
        return (k, k) if feature == "bound" else (k,)
    pages, lack = -(-k.shape[0] // page_size), -k.shape[0] % page_size

    def paged(value: float, dtype: torch.dtype) -> Tensor:
        filled = F.pad(k.to(dtype), (0, 0, 0, 0, 0, lack), value=value)
        return filled.view(pages, page_size, *k.shape[1:])

    if feature == "bound":
        return paged(-torch.inf, k.dtype).amax(1), paged(torch.inf, k.dtype).amin(1)
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    sizes = (k.shape[0] - torch.arange(pages, device=k.device) * page_size).clamp(max=page_size)
    return ((paged(0.0, wide).sum(1) / sizes.to(wide)[:, None, None]).to(k.dtype),)


def block_scores(q: Tensor, k: Tensor, p: PooledProblem, chunk_blocks: int | None = None) -> Tensor:
    """Natural-log scores. See ``pooled.pooled_scores``.

    Args:
        q: ``[B, Sq, Hq, D]`` or packed ``[total_q, Hq, D]``.
        k: ``[B, Sk, Hkv, D]`` or packed.
        p: The problem.
        chunk_blocks: Query blocks scored at once; the result does not depend on it. Default: bounded memory.

    Returns:
        float32 (float64 for float64 inputs) ``[B, Hq, MB, NB]``; -inf where no row of the block sees a page.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (p.sequences.batch, q.shape[-2], p.num_q_blocks, p.num_kv_blocks)
    scores = torch.full(shape, -torch.inf, dtype=dtype, device=q.device)
    for b, (q_start, q_end, k_start, k_end) in enumerate(p.sequences.bounds()):
        if q_start < q_end and k_start < k_end:
            q_rows = (q if p.sequences.packed else q[b])[q_start:q_end]
            k_rows = (k if p.sequences.packed else k[b])[k_start:k_end]
            _score_sequence(q_rows, k_rows, p, scores[b], chunk_blocks)
    return scores


def _score_sequence(q: Tensor, k: Tensor, p: PooledProblem, scores: Tensor, chunk_blocks: int | None) -> None:
    """Fill ``scores [Hq, MB, NB]`` for one sequence ``q [Sq, Hq, D]``, ``k [Sk, Hkv, D]``."""
    (sq, hq, _), (sk, hkv, _) = q.shape, k.shape
    features = [f.to(scores.dtype).permute(1, 2, 0) for f in pool(k, p.feature, p.page_size)]  # [Hkv, D, pages]
    if p.feature == "bound" and p.scale < 0:
        features.reverse()  # the greatest product is then the one with the least key
    pages, size, per_block = features[0].shape[-1], p.block_size, p.block_size // p.page_size
    chunk = size * (chunk_blocks or max(1, _CHUNK_ELEMENTS // max(1, hq * pages * size)))
    j = torch.arange(pages, device=q.device)
    for start in range(0, sq, chunk):
        rows = torch.arange(start, min(start + chunk, sq), device=q.device)
        last = sk - sq + int(rows[-1])
        n = min(pages, max(0, (last + 1) // p.page_size)) if p.causal else pages
        if n == 0:
            continue
        part = q[start : start + chunk].to(scores.dtype).transpose(0, 1).reshape(hkv, -1, q.shape[-1])
        if p.feature == "bound":
            high, low = (f[..., :n] for f in features)
            logits = part.clamp(min=0) @ high + part.clamp(max=0) @ low
        else:
            logits = part @ features[0][..., :n]
        logits = logits.view(hq, rows.numel(), n).mul_(p.scale)
        if p.causal:
            logits.masked_fill_(((j[:n] + 1) * p.page_size - 1) > (rows + (sk - sq))[:, None], -torch.inf)
        if p.row_softmax:
            total = logits.logsumexp(-1, keepdim=True)
            logits -= total.masked_fill(total == -torch.inf, 0.0)
        logits = F.pad(logits, (0, -n % per_block, 0, -rows.numel() % size), value=-torch.inf)
        blocks, columns = logits.shape[1] // size, logits.shape[2] // per_block
        logits = logits.view(hq, blocks, size, columns, per_block)
        if p.aggregate == "max":
            score = logits.logsumexp(4).amax(2)
        else:
            present = (sq - start - torch.arange(blocks, device=q.device) * size).clamp(max=size)
            score = logits.logsumexp((2, 4)) - present.to(logits.dtype).log()[:, None]
        scores[:, start // size : start // size + blocks, :columns] = score


def group_scores(scores: Tensor, group: int, aggregate: str) -> Tensor:
    """One score for the heads of a GQA group: ``[B, Hq, ...]`` -> ``[B, Hq / group, ...]``, by the same aggregate."""
    scores = scores.unflatten(1, (-1, group))
    if aggregate == "max":
        return scores.amax(2)
    return scores.logsumexp(2) - torch.tensor(float(group), dtype=scores.dtype).log().item()


def pooled_blocks(
    q: Tensor, k: Tensor, p: PooledProblem, rule: Rule, thresholds: Tensor, bounds: ListBounds, group: int, width: int
) -> tuple[Tensor, Tensor]:
    """Score, then select. See ``pooled.pooled_blocks``."""
    scores = group_scores(block_scores(q, k, p), group, p.aggregate)
    return rules_reference.choose(scores, rule, thresholds, bounds, width)
