"""Triton: landmarks in the order in which the threads of the tensor cores hold whole blocks of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch
from sparseattn.kernels.offline import offline_case
from sparseattn.ops.scores.landmark_problem import LandmarkFeatures

# Landmarks of a tile of products.
TILE = 128


@triton.jit(do_not_specialize=["blocks", "rows"])
def order_kernel(
    centroids_ptr, spreads_ptr, sizes_ptr, ordered_ptr, ordered_spreads_ptr, reach_ptr, blocks, rows,
    D: tl.constexpr, CLUSTERS: tl.constexpr, FIRST: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of ``ordered_landmarks``; with ``reach``, float32 ``[B * Hkv, blocks]``, the reach of each block.

    Grid (tiles, B * Hkv).
    """
    group = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    landmark = tl.program_id(0) * TILE + offs % 8 // 2 * (TILE // 4) + offs // 8 * 2 + offs % 2
    inside = landmark < blocks * CLUSTERS
    at = group * blocks * CLUSTERS + landmark
    to = group * rows + tl.program_id(0) * TILE + offs
    keep = inside[:, None] & (offs_d < D)[None, :]
    x = tl.load(centroids_ptr + at[:, None] * D + offs_d[None, :], mask=keep, other=0.0)
    tl.store(ordered_ptr + to[:, None] * D + offs_d[None, :], x, mask=(offs_d < D)[None, :])
    size = tl.load(sizes_ptr + at, mask=inside, other=0)
    spread = tl.load(spreads_ptr + at, mask=inside, other=0.0)
    counts = (size > 0) & (landmark >= FIRST * CLUSTERS)
    spread = tl.where(counts, spread, float("-inf"))
    tl.store(ordered_spreads_ptr + to, spread)
    if reach_ptr is not None:
        length = tl.sqrt(tl.sum(x.to(tl.float32) * x.to(tl.float32), 1))
        reach = tl.maximum(length + spread, 0.0) * 1.001  # rounded up
        reach = tl.permute(tl.reshape(reach, [TILE // 8, 4, 2]), (1, 0, 2))
        reach = tl.max(tl.reshape(reach, [TILE // CLUSTERS, CLUSTERS]), 1)
        block = tl.program_id(0) * (TILE // CLUSTERS) + tl.arange(0, TILE // CLUSTERS)
        tl.store(reach_ptr + group * blocks + block, reach, mask=block < blocks)


def ordered_landmarks(
    f: LandmarkFeatures, first: int, tile: int = TILE, reach: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Landmarks and their spreads in the order of products' accumulators, padded to whole tiles.

    Of a tile of N products of a row, thread l of four holds columns ``8 j + 2 l + {0, 1}``: there come landmarks
    ``N l / 4 + 2 j + {0, 1}``, whole blocks of up to N / 4 clusters.

    Args:
        f: Features; any strides.
        first: Blocks before it do not count.
        tile: N, a power of two.
        reach: float32 ``[B, Hkv, NB]`` or None; gets the most that a landmark of a block adds to the unscaled logit of
            a row of length 1: its own length and its spread, rounded up.

    Returns:
        ``[B * Hkv * rows, D]`` in the dtype of the features and float32 ``[B * Hkv * rows]``, -inf for what is no
        landmark, empty or before ``first``.
    """
    batch, heads, blocks, clusters, dim = f.centroids.shape
    rows = triton.cdiv(blocks * clusters, tile) * tile
    ordered = torch.empty((batch * heads * rows, dim), dtype=f.centroids.dtype, device=f.centroids.device)
    spreads = torch.empty(batch * heads * rows, dtype=torch.float32, device=f.centroids.device)
    if ordered.numel():
        launch(
            order_kernel, (rows // tile, batch * heads),
            *(t.contiguous() for t in f), ordered, spreads, reach, blocks, rows, D=dim, CLUSTERS=clusters, FIRST=first,
            BLOCK_D=triton.next_power_of_2(dim), TILE=tile, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return ordered, spreads


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """The kernel as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    types = {"centroids_ptr": "*bf16", "ordered_ptr": "*bf16", "sizes_ptr": "*i32"}
    constants = {"D": 128, "CLUSTERS": 8, "FIRST": 1, "BLOCK_D": 128, "TILE": TILE}
    return [("landmark_order", *offline_case(order_kernel, constants, types, "*fp32"), 4, 1)]
