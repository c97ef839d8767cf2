"""What both implementations of landmark scores must agree on: the problem, its bounds, its covariance snapshots."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.ops.scores.problem import RowBounds, list_cap, row_bounds, share_of
from sparseattn.ops.sequences import Sequences

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest finite float8_e4m3fn


class LandmarkFeatures(NamedTuple):
    """The landmarks of key blocks: content clusters, in no particular order.

    Attributes:
        centroids: ``[B, Hkv, NB, clusters, D]``, means of the clusters in the dtype of the keys; 0 where empty.
        spreads: float32 (float64 for float64 keys) ``[B, Hkv, NB, clusters]``, ``sqrt(2 ln(n) v)`` with n keys and v
            their mean squared distance from the centroid, per dimension; 0 for single keys.
        sizes: int32 ``[B, Hkv, NB, clusters]``, keys of each cluster; the sizes of a block add up to its keys.
    """

    centroids: Tensor
    spreads: Tensor
    sizes: Tensor


class LandmarkProblem(NamedTuple):
    """One scoring problem; the fields are the arguments of ``landmark.landmark_blocks``, resolved."""

    sequences: Sequences
    block_size: int
    clusters: int
    rows: int
    causal: bool
    keep_sink: bool
    floor: int
    fp8: bool
    group_shared: bool
    scale: float
    max_blocks: int | None = None

    @property
    def num_q_blocks(self) -> int:
        return (self.sequences.max_q + self.block_size - 1) // self.block_size

    @property
    def num_kv_blocks(self) -> int:
        return (self.sequences.max_k + self.block_size - 1) // self.block_size

    @property
    def first_free(self) -> int:
        """The first block that is not forced as the sink."""
        return 1 if self.keep_sink else 0

    def cap(self, density: float | None) -> int:
        """No list is longer, but for its forced blocks. What is not asked for does not cut into a density."""
        if self.max_blocks is not None or density is None:
            return list_cap(self.max_blocks)
        return max(list_cap(None), share_of(self.num_kv_blocks, density))

    def width(self, density: float | None) -> int:
        """Entries of a list: forced are a floor row's blocks, or block 0 and two of the diagonal."""
        return min(self.num_kv_blocks, max(self.cap(density), self.floor, 3))

    def mask_heads(self, q: Tensor, k: Tensor) -> int:
        return (k if self.group_shared else q).shape[-2]


@functools.lru_cache(maxsize=1024)
def log_taus_on(device: torch.device, taus: tuple[float, ...]) -> Tensor:
    """float32 ``[1]`` or ``[H]``, natural logs; copied from the host once, before any CUDA graph."""
    logs = [math.log(tau) if tau > 0 else -math.inf for tau in taus]
    return torch.tensor(logs, dtype=torch.float32, device=device)


def landmark_bounds(p: LandmarkProblem, device: torch.device) -> RowBounds:
    """Blocks ``[0, visible)`` may be listed, ``[recent, visible)`` must be: the diagonal's, or a floor row's all."""
    visible, recent = row_bounds(p.sequences, p.block_size, p.causal, True, device)
    return RowBounds(visible, torch.where(visible <= p.floor, 0, recent))


def free_budget(p: LandmarkProblem, bounds: RowBounds, heads: int, density: float) -> Tensor:
    """How many blocks besides the forced ones make up a density, over all heads: int64 ``[B|1]``."""
    visible, recent = bounds.visible.long(), bounds.recent.long()
    forced = visible - recent
    if p.keep_sink:
        forced = forced + (recent > 0)
    total = (visible.sum(-1).double() * (density * heads) + 0.5).floor().long()
    return (total - forced.sum(-1) * heads).clamp(min=0)


# Covariances are not kept for every prefix of the key blocks but for those whose length is a number of three leading
# bits (0..7, 8, 10, 12, 14, 16, 20, ...): a prefix differs by less than a quarter from the one that stands for it, and
# a million keys need about 50 of them.


def num_snapshots(blocks: int) -> int:
    """How many snapshots lie at prefixes of up to ``blocks`` blocks."""
    exponent = max(blocks.bit_length() - 3, 0)
    return 4 * exponent + (blocks >> exponent) + 1


def snapshot_length(t: int) -> int:
    """Blocks before snapshot ``t``."""
    return t if t < 8 else (t % 4 + 4) << (t // 4 - 1)


def snapshot_index(prefix: Tensor) -> Tensor:
    """The last snapshot at or before each prefix: int32 of ``prefix``'s shape."""
    exponent = torch.zeros_like(prefix)
    for bit in range(3, 31):
        exponent = exponent + (prefix >= 1 << bit)
    return (4 * exponent + (prefix >> exponent)).int()
