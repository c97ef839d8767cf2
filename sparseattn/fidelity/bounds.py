"""What random blocks and the best blocks would keep at a mask's density, by true attention mass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.fidelity.mass import window_intersection
from sparseattn.masks import BlockMask
from sparseattn.masks.visibility import Frame, in_range, visible_range
from sparseattn.ops.sequences import resolve_sequences

# Scores that exist at a time: 64 MB of float32 on a GPU, a cache's worth on a CPU.
_SCORES, _SCORES_CPU = 1 << 24, 1 << 18


class RecallBounds(NamedTuple):
    """Mean recall by query head, float32 [Hq] each.

    Attributes:
        random: Expected recall of blocks drawn at random.
        oracle: Recall of the blocks with the most attention mass: no other choice of as many keeps more on average.
    """

    random: Tensor
    oracle: Tensor


def block_mass(
    q: Tensor, k: Tensor, frame: Frame, scale: float | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """True attention mass of the blocks of one head and sequence, by chunks of rows.

    Args:
        q: ``[Sq, D]``.
        k: ``[Sk, D]``.
        frame: Block size, causality and window; its lengths are those of ``q`` and ``k``.
        scale: Default ``1 / sqrt(D)``.
        softcap: ``softcap * tanh(score / softcap)``.

    Returns:
        float64 ``[MB, NB]``, softmax weights summed over the keys of a block and the rows of a query block, and the
        number of rows that see a key, a float64 scalar.
    """
    (block_q, block_kv), (sq, sk) = frame.block_size, (q.shape[0], k.shape[0])
    rows, columns = -(-sq // block_q), -(-sk // block_kv)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = q.to(work) * factor, k.to(work).T.contiguous()
    mass = torch.zeros(rows, columns, dtype=torch.float64, device=q.device)
    seen = torch.zeros((), dtype=torch.float64, device=q.device)
    step = max(1, (_SCORES_CPU if q.device.type == "cpu" else _SCORES) // max(1, block_q * sk))
    for first in range(0, rows, step):
        top, end = first * block_q, min(sq, (first + step) * block_q)
        # Only the blocks of keys that some row of the chunk may see.
        low = 0 if frame.left is None else max(0, top + sk - sq - frame.left) // block_kv
        high = sk if frame.right is None else max(0, min(sk, end + sk - sq + frame.right))
        if high <= low * block_kv:
            continue
        at = torch.arange(top, end, device=q.device)[:, None] + sk - sq
        position = torch.arange(low * block_kv, high, device=q.device)[None, :]
        visible = torch.ones((), dtype=torch.bool, device=q.device)
        if frame.left is not None:
            visible = visible & (position >= at - frame.left)
        if frame.right is not None:
            visible = visible & (position <= at + frame.right)
        scores = queries[top:end] @ keys[:, low * block_kv : high]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # Rows that see nothing have NaN for weights: they have no mass.
        weights = scores.masked_fill_(~visible, -math.inf).softmax(-1).nan_to_num_(0.0)
        seen += visible.expand_as(weights).any(-1).sum()
        blocks = _sum_runs(_sum_runs(weights, block_kv).double().T, block_q).T
        mass[first : first + step, low : low + blocks.shape[1]] = blocks
    return mass, seen


def recall_bounds(
    q: Tensor,
    k: Tensor,
    mask: BlockMask,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    **layout: Any,
) -> RecallBounds:
    """Mean recall that random blocks and the best blocks would have, as many a head as the mask keeps.

    What the mask keeps of the first key block and of the blocks on the diagonal is given to both, since methods keep
    those without looking; only the rest is drawn (any visible block, with the same probability) or chosen (by true
    mass, anywhere in the head). So 0 is a method that found out nothing, and 1 is the most that can be kept on average.
    A column counts as the part of a block that it costs, which lets masks with columns exceed 1.

    Args:
        q: Queries ``[B, Sq, Hq, D]``, or packed ``[total, Hq, D]``.
        k: Keys, likewise.
        mask: The selection.
        causal: None: as the mask says.
        scale: Default ``1 / sqrt(D)``.
        window: Intersected with the mask's.
        softcap: As in ``block_sparse_attention``.
        **layout: Of a ragged batch, as the operator takes it.

    Returns:
        One number a query head each; rows of all sequences count alike. NaN where no row sees a key.

    Raises:
        TypeError: ``mask`` is no BlockMask.
        ValueError: As ``resolve_sequences``.
    """
    if not isinstance(mask, BlockMask):
        raise argument_error("mask", "a BlockMask", type(mask).__name__, kind=TypeError)
    sequences = resolve_sequences(q, k, **layout)
    frame = mask.frame._replace(
        causal=mask.causal if causal is None else causal,
        window=window_intersection(mask.window, window),
        seqused_q=None,
        seqused_k=None,
    )
    listed = mask.to_blocks()
    columns = None if mask.column_indices is None else mask.column_indices
    group, per_list = q.shape[-2] // k.shape[-2], q.shape[-2] // mask.heads
    totals = torch.zeros(3, q.shape[-2], dtype=torch.float64, device=q.device)
    for b, (q_start, q_end, k_start, k_end) in enumerate(sequences.bounds()):
        if q_end <= q_start or k_end <= k_start:
            continue
        rows, keys = (q, k) if sequences.packed else (q[b], k[b])
        own = frame._replace(seq_lens=(q_end - q_start, k_end - k_start))
        for h in range(q.shape[-2]):
            mass, seen = block_mass(
                rows[q_start:q_end, h], keys[k_start:k_end, h // group], own, scale=scale, softcap=softcap
            )
            at = min(b, listed.shape[0] - 1), h // per_list
            blocks = listed[at][: mass.shape[0], : mass.shape[1]]
            extra = None if columns is None else columns[min(b, columns.shape[0] - 1), at[1]][: mass.shape[0]]
            random, oracle = _kept(mass, blocks, extra, own)
            totals[:, h] += torch.stack((random, oracle, seen))
    random, oracle = (totals[:2] / totals[2]).float()
    return RecallBounds(random, oracle)


def _kept(mass: Tensor, listed: Tensor, columns: Tensor | None, frame: Frame) -> tuple[Tensor, Tensor]:
    """Mass that random and the best blocks hold, as many as one head's mask keeps; float64 scalars."""
    visible = in_range(visible_range(frame), mass.shape[1])[0, 0]
    listed = listed & visible
    forced = listed & _always(frame, mass)
    budget = (listed & ~forced).sum().double()
    if columns is not None:
        first, last = (bound[0, :, None] * frame.block_size[1] for bound in visible_range(frame))
        inside = (columns >= first) & (columns < last + frame.block_size[1])
        budget = budget + inside.sum() / frame.block_size[1]
    given = mass[forced].sum()
    free = mass[visible & ~forced].sort(descending=True).values
    random = given + free.sum() * (budget / max(1, len(free))).clamp(max=1)
    best = torch.nn.functional.pad(free.cumsum(0), (1, 0))
    whole = budget.floor().long().clamp(max=len(free))
    more = best[(whole + 1).clamp(max=len(free))] - best[whole]
    return random, given + best[whole] + (budget - budget.floor()) * more


def _always(frame: Frame, mass: Tensor) -> Tensor:
    """bool [MB, NB]: the first key block, and the blocks that the diagonal of a row touches."""
    (block_q, block_kv), (sq, sk) = frame.block_size, frame.seq_lens
    top = torch.arange(mass.shape[0], device=mass.device)[:, None] * block_q + sk - sq
    bottom = (top + block_q - 1).clamp(max=sk - 1)
    start = torch.arange(mass.shape[1], device=mass.device)[None, :] * block_kv
    return (start == 0) | ((start <= bottom) & (start + block_kv > top))


def _sum_runs(values: Tensor, run: int) -> Tensor:
    """Sums over runs of columns: ``[R, n]`` to ``[R, ceil(n / run)]``."""
    short = -values.shape[-1] % run
    return torch.nn.functional.pad(values, (0, short)).unflatten(-1, (-1, run)).sum(-1)
