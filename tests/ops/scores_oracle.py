"""The definition of XAttention in loops and float64, one sequence at a time: slow, and too simple to be wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_scores(q: Tensor, k: Tensor, stride: int, block: int, causal: bool, scale: float | None = None) -> Tensor:
    """``q [Sq, Hq, D]``, ``k [Sk, Hkv, D]`` -> float64 block scores ``[Hq, MB, NB]``."""
    (sq, hq, d), (sk, hkv, _) = q.shape, k.shape
    scale = d**-0.5 if scale is None else scale
    tokens = torch.einsum("ihd,jhd->hij", q.double(), k.double().repeat_interleave(hq // hkv, 1)) * scale
    out = torch.zeros(hq, -(-sq // block), -(-sk // block), dtype=torch.float64)
    for i in range(-(-sq // stride)):
        last_row = min(i * stride + stride, sq) - 1
        columns, logits = [], []
        for j in range(-(-sk // stride)):
            if causal and j * stride > sk - sq + last_row:
                continue
            pairs = [(i * stride + stride - 1 - s, j * stride + s) for s in range(stride)]
            pairs = [(a, b) for a, b in pairs if a < sq and b < sk]
            if pairs:
                columns.append(j * stride // block)
                logits.append(torch.stack([tokens[:, a, b] for a, b in pairs]).mean(0))
        if columns:
            mass = torch.stack(logits, -1).softmax(-1)
            out[:, i * stride // block].index_add_(-1, torch.tensor(columns), mass)
    return out


def greedy_top_p(row: list[float], threshold: float, forced: set[int], visible: int) -> list[int]:
    """The blocks of one row: forced ones, then the largest until the share is reached."""
    if threshold >= 1:
        return list(range(visible))
    kept = {n for n in forced if n < visible}
    need = threshold * math.fsum(row[:visible])
    mass = math.fsum(row[n] for n in kept)
    for n in sorted(set(range(visible)) - kept, key=lambda n: (-row[n], n)):
        if mass >= need or row[n] <= 0:
            break
        kept.add(n)
        mass += row[n]
    return sorted(kept) or ([max(range(visible), key=lambda n: row[n])] if visible else [])


def forced_blocks(m: int, sq: int, sk: int, block: int) -> tuple[set[int], int]:
    """Forced blocks and number of visible blocks of causal query block m: block 0 and the diagonal's blocks."""
    rows = range(m * block, min(m * block + block, sq))
    diagonals = [i + sk - sq for i in rows if i + sk - sq >= 0]
    if not diagonals:
        return set(), 0
    return {0} | {d // block for d in diagonals}, diagonals[-1] // block + 1


def lists(counts: Tensor, indices: Tensor) -> list:
    """Nested lists ``[B][H][MB]`` of the listed blocks."""
    return [
        [[row[:c] for c, row in zip(cs, rows, strict=True)] for cs, rows in zip(ch, ih, strict=True)]
        for ch, ih in zip(counts.tolist(), indices.tolist(), strict=True)
    ]
