"""Landmark scores in loops and float64, one sequence and one key or query at a time: slow, too simple to be wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clusters_of(keys: Tensor, count: int) -> list[Tensor]:
    """The content clusters of one block of keys ``[n, D]``: greedy k-center, then one Lloyd pass; never empty ones."""
    mean = keys.mean(0)
    centres = [min(range(len(keys)), key=lambda i: (keys[i] - mean).square().sum().item())]
    while len(centres) < min(count, len(keys)):
        gap = [min((x - keys[c]).square().sum().item() for c in centres) for x in keys]
        centres.append(max(range(len(keys)), key=lambda i: gap[i]))
    groups = assign(keys, [keys[c] for c in centres])
    return [g for g in assign(keys, [g.mean(0) for g in groups]) if len(g)]


def assign(keys: Tensor, points: list[Tensor]) -> list[Tensor]:
    nearest = [min(range(len(points)), key=lambda t: (x - points[t]).square().sum().item()) for x in keys]
    groups = [keys[[i for i, t in enumerate(nearest) if t == p]] for p in range(len(points))]
    return [g for g in groups if len(g)]


def landmark(group: Tensor) -> tuple[Tensor, float, int]:
    """Centroid, spread and size of a cluster."""
    n, centroid = len(group), group.mean(0)
    variance = (group - centroid).square().mean().item()
    return centroid, math.sqrt(2 * math.log(n) * variance), n


def prefix_of(blocks: int) -> int:
    """The longest of 0..7, 8, 10, 12, 14, 16, 20, 24, 28, 32, ... that is not longer."""
    lengths = [*range(8), *(m << e for e in range(1, 12) for m in (4, 5, 6, 7))]
    return max(n for n in lengths if n <= blocks)


def covariance(blocks: list[list[Tensor]]) -> Tensor:
    """Of the centroids, each weighing the square root of its keys."""
    groups = [g for block in blocks for g in block]
    weights = torch.tensor([math.sqrt(len(g)) for g in groups], dtype=torch.float64)
    centroids = torch.stack([g.mean(0) for g in groups])
    return torch.cov(centroids.mT, correction=0, aweights=weights)


def scores(
    q: Tensor, k: Tensor, block: int, rows: int, *, clusters: int = 0, causal: bool = True, sink: bool | None = None
) -> Tensor:
    """``q [Sq, Hq, D]``, ``k [Sk, Hkv, D]`` in float64 -> ``[Hq, MB, NB]``, -inf where nothing is estimated."""
    (sq, hq, d), (sk, hkv, _) = q.shape, k.shape
    sink = causal if sink is None else sink
    clusters = clusters or block // 16
    mb, nb = -(-sq // block), -(-sk // block)
    out = torch.full((hq, mb, nb), -math.inf, dtype=torch.float64)
    scale = d**-0.5
    found = [[clusters_of(k[j * block : (j + 1) * block, g], clusters) for j in range(nb)] for g in range(hkv)]
    for h in range(hq):
        blocks, keys = found[h * hkv // hq], k[:, h * hkv // hq]
        for m in range(mb):
            tile = range(m * block, min((m + 1) * block, sq))
            recent = max(0, tile[0] + sk - sq) // block if causal else nb
            free = range(1 if sink else 0, recent)
            if not free:
                continue
            chosen = list(tile)
            if len(chosen) > rows:
                shape = covariance(blocks[: prefix_of(recent)])
                mean = q[tile[0] : tile[-1] + 1, h].mean(0)
                sharp = {i: ((q[i, h] - mean) @ shape @ (q[i, h] - mean)).item() for i in tile}
                chosen = sorted(tile, key=lambda i: -sharp[i])[:rows]
            for i in chosen:
                last = i + sk - sq if causal else sk - 1
                forced = [n for n in range(last + 1) if (sink and n < block) or n >= recent * block]
                logits = [scale * (q[i, h] @ keys[n]).item() for n in forced]
                weights = []
                for j in free:
                    terms = []
                    for centroid, spread, _ in map(landmark, blocks[j]):
                        terms.append(scale * ((q[i, h] @ centroid).item() + q[i, h].norm().item() * spread))
                    weights.append(torch.tensor(terms, dtype=torch.float64).logsumexp(0))
                norm = torch.tensor([*logits, *weights], dtype=torch.float64).logsumexp(0)
                for j, weight in zip(free, weights, strict=True):
                    out[h, m, j] = torch.maximum(out[h, m, j], weight - norm)
    return out


def forced_blocks(m: int, sq: int, sk: int, block: int, causal: bool, sink: bool, floor: int) -> tuple[set[int], int]:
    """Blocks that query block m must list, and how many it may."""
    if not causal:
        visible = -(-sk // block)
        return (set(range(visible)) if visible <= floor else {0} if sink else set()), visible
    diagonals = [i + sk - sq for i in range(m * block, min((m + 1) * block, sq)) if i + sk - sq >= 0]
    if not diagonals:
        return set(), 0
    visible = diagonals[-1] // block + 1
    if visible <= floor:
        return set(range(visible)), visible
    return {n // block for n in diagonals} | ({0} if sink else set()), visible
