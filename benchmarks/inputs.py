"""What the benchmarks run on: random block masks, and queries and keys with the structure that trained heads have."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_blocks(heads: int, num_blocks: int, density: float, device: torch.device, seed: int = 0) -> Tensor:
    """Keep each causally visible block with probability ``density``, and the diagonal always: bool [1, H, NB, NB]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (1, heads, num_blocks, num_blocks)
    blocks = (torch.rand(shape, device=device, generator=generator) < density).tril_()
    return blocks | torch.eye(num_blocks, device=device, dtype=torch.bool)


def random_qkv(
    n: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent normal ``q [1, N, Hq, D]``, ``k`` and ``v [1, N, Hkv, D]``."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(h: int) -> Tensor:
        return torch.randn((1, n, h, head_dim), dtype=dtype, device=device, generator=generator)

    return normal(heads), normal(kv_heads), normal(kv_heads)


def structured_qkv(
    n: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys whose attention looks like a trained model's, so that a selector has something to find.

    On a background of unit normal q and k, a planted logit L adds ``sqrt(L * sqrt(D))`` times a common direction to
    the queries and the keys that should meet. Every head attends its own mix of a sink (the first four keys), a band
    near the diagonal, columns (spans of 16 keys that all queries want) and topics (segments of 256 tokens that want
    the earlier segments of their own topic); KV head by KV head the mix moves from sink-and-local to topics, so that
    densities differ by head as they do in models.

    Returns:
        ``q [1, N, Hq, D]``, ``k [1, N, Hkv, D]``, ``v [1, N, Hkv, D]``.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    position = torch.arange(n, device=device)
    group = heads // kv_heads
    floor = math.log(max(n, 2))  # a logit near ln N outweighs N background keys
    q = torch.empty((1, n, heads, head_dim), dtype=dtype, device=device)
    k = torch.empty((1, n, kv_heads, head_dim), dtype=dtype, device=device)

    def direction(count: int) -> Tensor:
        u = torch.randn((count, head_dim), device=device, generator=generator)
        return u / u.norm(dim=-1, keepdim=True)

    def gain(logit: float) -> float:
        return math.sqrt(logit * math.sqrt(head_dim))

    pairs = head_dim // 8
    frequencies = torch.logspace(-1.5, -3.5, pairs, device=device)  # a bump some hundreds of tokens wide
    basis = torch.linalg.qr(torch.randn((head_dim, 2 * pairs), device=device, generator=generator))[0].T
    angles = position[:, None] * frequencies[None, :]
    band = torch.cat((angles.cos(), angles.sin()), dim=1) / math.sqrt(pairs) @ basis  # [N, D], unit rows
    sink, column = direction(1), direction(1)
    num_topics = 6
    topics = direction(num_topics)
    segments = -(-n // 256)
    spans = torch.randint(0, max(1, n - 16), (12,), device=device, generator=generator)
    in_span = ((position[:, None] >= spans) & (position[:, None] < spans + 16)).any(1)

    for h in range(kv_heads):
        share = h / max(1, kv_heads - 1)  # 0: sink and local, 1: columns and topics
        topic = torch.randint(0, num_topics, (segments,), device=device, generator=generator)
        topic_of = topics[topic].repeat_interleave(256, 0)[:n]
        local, far = gain(floor + 1 - 3 * share), gain(floor * (0.35 + 0.75 * share))
        keys = torch.randn((n, head_dim), device=device, generator=generator)
        keys += local * band + far * topic_of
        keys[:4] += gain(floor + 4) * sink
        keys += far * column * in_span[:, None]
        k[0, :, h] = keys.to(dtype)
        for member in range(h * group, (h + 1) * group):
            queries = torch.randn((n, head_dim), device=device, generator=generator)
            queries += local * band + far * topic_of + gain(floor + 4) * sink + far * column
            q[0, :, member] = queries.to(dtype)
    v = torch.randn((1, n, kv_heads, head_dim), dtype=dtype, device=device, generator=generator)
    return q, k, v
