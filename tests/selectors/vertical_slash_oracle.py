"""FlexPrefill and MInference in loops and float64, one sequence and head at a time: slow, and simple enough to read.

Tensors are ``q [Sq, D]`` and ``k [Sk, D]``; results are one set of key blocks a query block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def last_mass(q: Tensor, k: Tensor, count: int, causal: bool) -> tuple[list[float], list[float]]:
    """Mean probability of every column and of every distance under the last rows that see a key."""
    sq, sk = len(q), len(k)
    vertical, slash = [0.0] * sk, [0.0] * sk
    rows = [i for i in range(max(0, sq - count), sq) if not causal or i + sk - sq >= 0]
    for i in rows:
        position = i + sk - sq
        p = (k[: position + 1 if causal else sk] @ q[i] / math.sqrt(q.shape[-1])).softmax(0) / len(rows)
        for j, mass in enumerate(p.tolist()):
            vertical[j] += mass
            if j <= position:
                slash[position - j] += mass
    return vertical, slash


def top(values: list[float], count: int, forced: set[int]) -> set[int]:
    order = sorted(range(len(values)), key=lambda i: (i not in forced, -values[i], i))
    return set(order[:count])


def cover(values: list[float], share: float) -> int:
    """How many of the largest values it takes to reach a share."""
    total, taken = 0.0, 0
    for value in sorted(values, reverse=True):
        if total >= share or value <= 0:
            break
        total += value
        taken += 1
    return max(1, taken)


def blocks_of(values: list[float], block: int) -> list[float]:
    return [math.fsum(values[i : i + block]) for i in range(0, len(values), block)]


def positions(m: int, block: int, sq: int, sk: int) -> range:
    """Where the rows of a query block stand among the keys; whole blocks, as a slash is drawn."""
    return range(m * block + sk - sq, (m + 1) * block + sk - sq)


def visible_blocks(m: int, block: int, sq: int, sk: int, causal: bool) -> int:
    last = min((m + 1) * block, sq) - 1 + sk - sq if causal else sk - 1
    return max(0, last // block + 1)


def crossed(distances: set[int], m: int, block: int, sq: int, sk: int) -> set[int]:
    """Blocks that hold a key at one of the distances from some row of the query block."""
    return {(p - d) // block for p in positions(m, block, sq, sk) for d in distances if p - d >= 0}


def divergence(p: list[float], q: list[float]) -> float:
    """sqrt of the Jensen-Shannon divergence, natural log."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        total += sum(x * math.log(2 * x / (a + b)) for x in (a, b) if x > 0) / 2
    return math.sqrt(max(0.0, total))


def pooled(q: Tensor, k: Tensor, block: int, causal: bool) -> list[list[float]]:
    """softmax of mean queries against mean keys, over the blocks each query block sees."""
    sq, sk = len(q), len(k)
    rows = [q[i : i + block].mean(0) for i in range(0, sq, block)]
    columns = torch.stack([k[j : j + block].mean(0) for j in range(0, sk, block)])
    seen = [visible_blocks(m, block, sq, sk, causal) for m in range(len(rows))]
    logits = [columns[:n] @ row / math.sqrt(q.shape[-1]) for row, n in zip(rows, seen, strict=True)]
    return [row.softmax(0).tolist() for row in logits]


def flexprefill(
    q: Tensor, k: Tensor, gamma: float, tau: float, budgets: tuple[int, int | None], block: int, causal: bool
) -> tuple[list[set[int]], bool]:
    """The lists of one head, and whether it is query-aware."""
    sq, sk = len(q), len(k)
    columns = -(-sk // block)
    count = min(block, sq, sk) if causal else min(block, sq)
    vertical, slash = last_mass(q, k, block, causal)
    vertical_blocks, slash_blocks = blocks_of(vertical, block), blocks_of(slash, block)
    means = torch.stack([k[j : j + block].mean(0) for j in range(0, sk, block)])
    sizes = torch.tensor([min(block, sk - j) for j in range(0, sk, block)])
    estimate = (means @ q[sq - count :].mean(0) / math.sqrt(q.shape[-1]) + sizes.log()).softmax(0).tolist()
    query_aware = divergence(estimate, vertical_blocks) < tau
    least, most = -(-budgets[0] // block), columns if budgets[1] is None else -(-budgets[1] // block)
    counts = [min(max(cover(mass, gamma) // block + 1, least), most) for mass in (vertical, slash)]
    if query_aware:
        counts = [least, least]
    kept = top(vertical_blocks, counts[0], {0})
    runs = top(slash_blocks, counts[1], {0})
    distances = {e * block + i for e in runs for i in range(block)}
    lists = []
    for m in range(-(-sq // block)):
        seen = visible_blocks(m, block, sq, sk, causal)
        lists.append({n for n in kept | crossed(distances, m, block, sq, sk) if n < seen})
    if query_aware:
        pairs = [(p, m, n) for m, row in enumerate(pooled(q, k, block, causal)) for n, p in enumerate(row)]
        need = gamma * sum(1 for row in range(len(lists)) if visible_blocks(row, block, sq, sk, causal))
        total = 0.0
        for p, m, n in sorted(pairs, reverse=True):
            if total >= need:
                break
            lists[m].add(n)
            total += p
    return lists, query_aware


def minference(
    q: Tensor, k: Tensor, pattern: tuple, forced: tuple[int, int], block: int, causal: bool
) -> tuple[list[set[int]], list[set[int]]]:
    """The block lists of one head and the lone columns of each row."""
    sq, sk = len(q), len(k)
    rows = range(-(-sq // block))
    seen = [visible_blocks(m, block, sq, sk, causal) for m in rows]
    kind, *sizes = pattern
    columns: set[int] = set()
    if kind == "dense":
        lists = [set(range(n)) for n in seen]
    elif kind == "block_sparse":
        scores = pooled(q, k, block, causal)
        lists = [top(row, sizes[0], set()) & set(range(len(row))) for row in scores]
    elif kind == "vertical_slash":
        vertical, slash = last_mass(q, k, 64, causal)
        sink, local = forced
        columns = top(vertical, min(sk, max(sizes[0], sink)), set(range(sink)))
        distances = top(slash, min(sk, max(sizes[1], local)), set(range(local)))
        first = set(range(-(-sink // block)))
        lists = [first | crossed(distances, m, block, sq, sk) for m in rows]
    else:
        first = set(range(-(-sizes[0] // block)))
        lists = [first | crossed(set(range(sizes[1])), m, block, sq, sk) for m in rows]
        if kind == "tri_shape":
            for m in rows:
                if min((m + 1) * block, sq) > sq - sizes[2]:
                    lists[m] = set(range(seen[m]))
    lists = [{n for n in row if n < seen[m]} for m, row in zip(rows, lists, strict=True)]
    lone = []
    for m in rows:
        last = min((m + 1) * block, sq) - 1 + sk - sq if causal else sk - 1
        lone.append({j for j in columns if j // block not in lists[m] and j <= last})
    return lists, lone
