"""Where heads are planted: their size, random numbers, and the directions that the heads of one call share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SINK_KEYS, SPANS, SPAN, TOPICS, SEGMENT = 4, 12, 16, 6, 256


class Planted(NamedTuple):
    """What is added to the background of one KV head, and where attention mass then belongs.

    Attributes:
        queries: [N, D].
        keys: [N, D].
        wanted: For int64 rows [R], which keys the pattern sends them to: bool [R, N], before causality.
        rows: int64 [R], the queries that want a key they may see, causally.
    """

    queries: Tensor
    keys: Tensor
    wanted: Callable[[Tensor], Tensor]
    rows: Tensor


class Plot:
    """Where one set of heads is planted: its size, its random numbers and the directions that its heads share."""

    def __init__(self, n: int, head_dim: int, device: torch.device | str, seed: int):
        self.n, self.head_dim, self.device = n, head_dim, torch.device(device)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.position = torch.arange(n, device=self.device)
        self.floor = math.log(max(n, 2))  # a logit near ln N outweighs N background keys
        pairs = max(1, head_dim // 8)
        frequencies = torch.logspace(-1.5, -3.5, pairs, device=self.device)  # a bump some hundreds of tokens wide
        basis = torch.linalg.qr(self.normal(head_dim, 2 * pairs))[0].T
        angles = self.position[:, None] * frequencies[None, :]
        self.band = torch.cat((angles.cos(), angles.sin()), dim=1) / math.sqrt(pairs) @ basis  # [N, D], unit rows
        self.sink, self.column = self.direction(1), self.direction(1)
        self.topics = self.direction(TOPICS)
        self.spans = torch.randint(0, max(1, n - SPAN), (SPANS,), device=self.device, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def direction(self, count: int) -> Tensor:
        """Random unit vectors, [count, D]."""
        u = self.normal(count, self.head_dim)
        return u / u.norm(dim=-1, keepdim=True)

    def gain(self, logit: float) -> float:
        """How long a common vector of query and key is that adds ``logit`` to their scaled score."""
        return math.sqrt(logit * math.sqrt(self.head_dim))

    def in_span(self) -> Tensor:
        """Which keys stand in a column, bool [N]."""
        position = self.position[:, None]
        return ((position >= self.spans) & (position < self.spans + SPAN)).any(1)

    def segment_topics(self) -> Tensor:
        """A fresh topic for every segment, int64 [segments]."""
        count = -(-self.n // SEGMENT)
        return torch.randint(0, TOPICS, (count,), device=self.device, generator=self.generator)
