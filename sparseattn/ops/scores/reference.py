"""Plain PyTorch block scores and top-p selection: any device, any dtype. This file defines what is correct.

The reference walks over query blocks in chunks, so that no ``[Sq / stride, Sk / stride]`` slab ever exists whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseattn.ops.scores.chunks import ScoreChunks
from sparseattn.ops.scores.problem import RowBounds, ScoreProblem
from sparseattn.ops.scores.rules_problem import ListBounds

_CHUNK_ELEMENTS = 1 << 23  # logits (or scores) held at once; 32 MB in float32


def unsupported_reason(q: Tensor, k: Tensor | None = None) -> str | None:
    """The reference takes everything."""
    return None


def xattention_blocks(
    q: Tensor, k: Tensor, p: ScoreProblem, threshold: Tensor, bounds: RowBounds, keep_sink: bool, cap: int, width: int
) -> tuple[Tensor, Tensor]:
    """Score, then select. See ``api.xattention_blocks``."""
    return top_p_blocks(antidiagonal_scores(q, k, p), threshold, bounds, keep_sink, cap, width)


def score_chunks(q: Tensor, k: Tensor, p: ScoreProblem, bounds: ListBounds, whole: bool) -> ScoreChunks:
    """The scores of all rows as one chunk."""
    return ScoreChunks(lambda first, rows: antidiagonal_scores(q, k, p), p.num_q_blocks, p.num_q_blocks)


def antidiagonal_scores(q: Tensor, k: Tensor, p: ScoreProblem, chunk_blocks: int | None = None) -> Tensor:
    """Softmax mass of each block, estimated from strided antidiagonals. See ``api.antidiagonal_scores``.

    Args:
        q: ``[B, Sq, Hq, D]`` or packed ``[total_q, Hq, D]``.
        k: ``[B, Sk, Hkv, D]`` or packed.
        p: The problem.
        chunk_blocks: Query blocks scored at once; the result does not depend on it. Default: bounded memory.

    Returns:
        float32 (float64 for float64 inputs) ``[B, Hq, MB, NB]``; 0 where nothing is visible.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = q.shape[-2]
    scores = q.new_zeros((p.sequences.batch, heads, p.num_q_blocks, p.num_kv_blocks), dtype=dtype)
    for b, (q_start, q_end, k_start, k_end) in enumerate(p.sequences.bounds()):
        if q_start < q_end and k_start < k_end:
            q_rows = (q if p.sequences.packed else q[b])[q_start:q_end]
            k_rows = (k if p.sequences.packed else k[b])[k_start:k_end]
            _score_sequence(q_rows, k_rows, p, scores[b], chunk_blocks)
    return scores


def _score_sequence(q: Tensor, k: Tensor, p: ScoreProblem, scores: Tensor, chunk_blocks: int | None) -> None:
    """Fill ``scores [Hq, MB, NB]`` for one sequence ``q [Sq, Hq, D]``, ``k [Sk, Hkv, D]``."""
    (sq, hq, _), (sk, hkv, _) = q.shape, k.shape
    stride, offset = p.stride, sk - sq
    per_block = p.block_size // stride
    cells_q, cells_k = -(-sq // stride), -(-sk // stride)
    k_cells = _cells(k, stride, scores.dtype).flatten(2).transpose(-1, -2)  # [Hkv, S * D, cells_k]
    chunk = per_block * (chunk_blocks or max(1, _CHUNK_ELEMENTS // max(1, hq * cells_k * per_block)))
    j = torch.arange(cells_k, device=q.device)
    for start in range(0, cells_q, chunk):
        i = torch.arange(start, min(start + chunk, cells_q), device=q.device)
        first_row, last_row = start * stride, min((start + i.numel()) * stride, sq) - 1
        # Columns past the last diagonal of the chunk carry no mass: leave them out of the product.
        n = min(cells_k, max(0, (offset + last_row) // stride + 1)) if p.causal else cells_k
        if n == 0:
            continue
        # Antidiagonal s pairs query iS + S - 1 - s with key jS + s, hence the flip.
        q_cells = _cells(q[first_row : last_row + 1], stride, scores.dtype).flip(2).flatten(2)
        logits = (q_cells.reshape(hkv, -1, q_cells.shape[-1]) @ k_cells[..., :n]).view(hq, i.numel(), n)
        # Pairs that exist: s >= the rows missing from the query cell, s < the keys present in the key cell.
        missing = (i * stride + stride - sq).clamp(min=0)
        pairs = (sk - j[:n] * stride).clamp(max=stride)[None, :] - missing[:, None]
        visible = pairs > 0
        if p.causal:
            visible &= j[:n] * stride <= (offset + (i + 1) * stride - 1 - missing)[:, None]
        logits = logits.mul_(p.scale / pairs.clamp(min=1).to(logits.dtype)).masked_fill_(~visible, -torch.inf)
        mass = logits.softmax(-1).masked_fill_(~visible, 0.0)  # rows that see nothing come out of the softmax as NaN
        mass = F.pad(mass, (0, -n % per_block, 0, -i.numel() % per_block))
        rows, columns = mass.shape[1] // per_block, mass.shape[2] // per_block
        block_start = start // per_block
        mass = mass.view(hq, rows, per_block, columns, per_block).sum(4)
        score = mass.amax(2) if p.aggregate == "max" else mass.sum(2)
        scores[:, block_start : block_start + rows, :columns] = score


def _cells(x: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
    """``[S, H, D]`` -> ``[H, ceil(S / stride), stride, D]``, the last cell filled up with zeros (they add no logit)."""
    x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -x.shape[0] % stride))
    return x.view(-1, stride, *x.shape[1:]).permute(2, 0, 1, 3)


def top_p_blocks(
    scores: Tensor,
    threshold: Tensor,
    bounds: RowBounds,
    keep_sink: bool,
    cap: int | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Smallest set of blocks that reaches a share of each row's score. See ``api.top_p_blocks``.

    Args:
        scores: ``[B, H, MB, NB]``, nonnegative.
        threshold: ``[H]`` or ``[1]``.
        bounds: What each row may and must list.
        keep_sink: Block 0 must be listed where it is visible.
        cap: No list is longer, but for its forced blocks.
        width: Length of the lists; default NB.

    Returns:
        int32 counts ``[B, H, MB]`` and indices ``[B, H, MB, width]``, ascending.
    """
    batch, heads, rows, columns = scores.shape
    width = columns if width is None else width
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=scores.device)
    indices = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=scores.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * columns))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        own = RowBounds(bounds.visible[:, part], bounds.recent[:, part])
        keep = _top_p_rows(scores[:, :, part], threshold, own, keep_sink, cap)
        counts[:, :, part] = keep.sum(-1, dtype=torch.int32)
        # A stable sort by "not kept" puts the kept blocks first, ascending.
        indices[:, :, part] = torch.argsort((~keep).byte(), dim=-1, stable=True)[..., :width].int()
    return counts, indices


def _top_p_rows(scores: Tensor, threshold: Tensor, bounds: RowBounds, keep_sink: bool, cap: int | None) -> Tensor:
    """Bool ``[B, H, rows, NB]`` of the kept blocks."""
    visible, recent = bounds
    n = torch.arange(scores.shape[-1], device=scores.device)
    is_visible = n < visible[:, None, :, None]
    forced = is_visible & (n >= recent[:, None, :, None])
    if keep_sink:
        forced = forced | (is_visible & (n == 0))
    threshold = threshold.double().view(-1, 1, 1)
    mass = scores.double().masked_fill(~is_visible, 0.0)
    need = threshold * mass.sum(-1, keepdim=True) - mass.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
    free = mass.masked_fill(forced | ~is_visible, -1.0)
    value, order = free.sort(dim=-1, descending=True, stable=True)
    before = value.clamp(min=0).cumsum(-1) - value.clamp(min=0)
    take = (before < need) & (value > 0)
    # No row that can see a block goes without one.
    alone = (visible > 0)[:, None, :] & ~forced.any(-1)
    take[..., :1] |= alone[..., None]
    take |= (value >= 0) & (threshold >= 1)
    if cap is not None:
        take &= torch.arange(take.shape[-1], device=take.device) < cap - forced.sum(-1, keepdim=True)
    return forced | torch.zeros_like(take).scatter(-1, order, take)
