"""What the Triton and the Gluon implementation of landmark scores share: landmarks, the choice of rows, lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch
from sparseattn.ops.scores.chunks import ScoreChunks, chunk_rows
from sparseattn.ops.scores.cut_triton import batch_stride, find_cut
from sparseattn.ops.scores.landmark_problem import LandmarkFeatures, LandmarkProblem, free_budget, num_snapshots
from sparseattn.ops.scores.landmark_triton_choice import choose_kernel
from sparseattn.ops.scores.landmark_triton_features import (
    covariance_kernel,
    feature_tiles,
    features_kernel,
    moments_kernel,
    rows_kernel,
    sharpness_kernel,
)
from sparseattn.ops.scores.problem import RowBounds
from sparseattn.ops.sequences import Sequences


def features(k: Tensor, s: Sequences, block_size: int, clusters: int) -> LandmarkFeatures:
    """Landmarks of every block. See ``landmark.landmark_features``."""
    heads, dim = k.shape[-2:]
    shape = (s.batch, heads, -(-s.max_k // block_size), clusters)
    centroids = torch.empty((*shape, dim), dtype=k.dtype, device=k.device)
    spreads = torch.empty(shape, dtype=torch.float32, device=k.device)
    sizes = torch.empty(shape, dtype=torch.int32, device=k.device)
    if spreads.numel():
        warps = feature_tiles(k, block_size).cluster_warps
        launch(
            features_kernel, (shape[2], heads, s.batch),
            k, centroids, spreads, sizes, s.k_start, s.k_end, row_strides(k, s.packed), s.max_k, shape[2],
            D=dim, BLOCK=block_size, CLUSTERS=clusters, BLOCK_D=padded_dim(dim), RAGGED=s.k_start is not None,
            PRECISION=dot_precision(k.dtype), num_warps=warps, num_stages=1, **LAUNCH,
        )  # fmt: skip
    return LandmarkFeatures(centroids, spreads, sizes)


def chosen_rows(q: Tensor, f: LandmarkFeatures, p: LandmarkProblem, bounds: RowBounds) -> Tensor:
    """int32 ``[B, Hq, MB, rows]``: rows of each block to score, -1 past the last; undefined where nothing is free."""
    s = p.sequences
    batch, kv_heads, blocks, _, dim = f.centroids.shape
    heads = q.shape[-2]
    snapshots = num_snapshots(blocks)
    block_d, wide = padded_dim(dim), 32 if q.is_cuda else 16  # the interpreter: more steps at small shapes
    columns = min(wide, block_d)
    moments = torch.empty((batch, kv_heads, snapshots, dim + 2, dim), dtype=torch.float32, device=q.device)
    launch(
        moments_kernel, (snapshots, triton.cdiv(dim, columns), batch * kv_heads),
        f.centroids, f.sizes, moments, blocks, snapshots, D=dim, CLUSTERS=p.clusters, BLOCK_D=block_d,
        COLUMNS=columns, BLOCK_L=wide, num_warps=4, num_stages=2, **LAUNCH,
    )  # fmt: skip
    covariances = torch.empty((batch, kv_heads, snapshots, dim, dim), dtype=torch.float32, device=q.device)
    launch(
        covariance_kernel, (triton.cdiv(dim, 8), batch * kv_heads),
        moments, covariances, snapshots, D=dim, BLOCK_D=block_d, ROWS=8, num_warps=4, num_stages=1, **LAUNCH,
    )  # fmt: skip
    sharpness = torch.empty((batch, heads, p.num_q_blocks, p.block_size), dtype=torch.float32, device=q.device)
    recent = bounds.recent.contiguous()
    sharp = feature_tiles(q, p.block_size)
    launch(
        sharpness_kernel, (p.num_q_blocks, kv_heads, batch),
        q, covariances, sharpness, recent, s.q_start, s.q_end, row_strides(q, s.packed), s.max_q, snapshots,
        batch_stride(recent), GROUP=heads // kv_heads, D=dim, BLOCK=p.block_size, FIRST=p.first_free, BLOCK_D=block_d,
        COLUMNS=sharp.columns, RAGGED=s.q_start is not None, PRECISION=dot_precision(q.dtype), TERMS=sharp.terms,
        num_warps=8, num_stages=sharp.num_stages, **LAUNCH,
    )  # fmt: skip
    rows = torch.empty((batch, heads, p.num_q_blocks, p.rows), dtype=torch.int32, device=q.device)
    launch(
        rows_kernel, (p.num_q_blocks, heads, batch),
        sharpness, rows, recent, batch_stride(recent), BLOCK=p.block_size, ROWS=p.rows, FIRST=p.first_free,
        num_warps=2, **LAUNCH,
    )  # fmt: skip
    return rows


class Scoring(Protocol):
    """Scores of one problem's query blocks, some at a time."""

    p: LandmarkProblem

    def scores(self, out: Tensor, first: int) -> None:
        """Fill ``out [B, H, rows, NB]`` (contiguous, where free) with the scores of the query blocks from ``first``."""


def all_scores(
    make: Callable[[Tensor, Tensor, LandmarkFeatures, LandmarkProblem, RowBounds], Scoring],
    q: Tensor,
    k: Tensor,
    f: LandmarkFeatures,
    p: LandmarkProblem,
    bounds: RowBounds,
) -> Tensor:
    """float32 ``[B, H, MB, NB]``, -inf where nothing is free. See ``landmark.landmark_scores``."""
    shape = (p.sequences.batch, p.mask_heads(q, k), p.num_q_blocks, p.num_kv_blocks)
    out = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    if out.numel():
        make(q, k, f, p, bounds).scores(out, 0)
    return out


def score_chunks(scoring: Scoring, shape: tuple[int, ...], device: torch.device, whole: bool) -> ScoreChunks:
    """All scores ``shape [B, H, MB, NB]``, as many at a time as memory allows; ``whole`` if they are needed again."""
    batch, heads, rows, columns = shape
    step = chunk_rows(rows, 4 * batch * heads * columns, whole)
    buffer = torch.empty(batch * heads * step * columns, dtype=torch.float32, device=device)

    def score(first: int, count: int) -> Tensor:
        out = buffer[: batch * heads * count * columns].view(batch, heads, count, columns)
        scoring.scores(out, first)
        return out

    return ScoreChunks(score, rows, step)


def choose_by_density(
    scoring: Scoring, shape: tuple[int, ...], density: float, bounds: RowBounds, counts: Tensor, indices: Tensor
) -> None:
    """Write the lists of the forced blocks and the best free ones of each sequence, ``density`` of all."""
    p, (batch, heads) = scoring.p, shape[:2]
    budget = free_budget(p, bounds, heads, density).expand(batch)
    chunks = score_chunks(scoring, shape, counts.device, True)
    visible, recent = bounds.visible.contiguous(), bounds.recent.contiguous()
    key, ties, fit = find_cut(chunks, visible, recent, p.first_free, budget)
    # What ties at the threshold is in if all of it fits; without a budget nothing is.
    cut = torch.where(fit >= ties, key, key + 1)
    least = torch.where(budget > 0, cut - 2**31, 2**31 - 1).clamp(max=2**31 - 1).int()
    choose_by_cut(chunks, p, bounds, least, p.cap(density), counts, indices)


def choose_by_cut(
    chunks: ScoreChunks,
    p: LandmarkProblem,
    bounds: RowBounds,
    least: Tensor,
    cap: int,
    counts: Tensor,
    indices: Tensor,
) -> None:
    """Write the lists of the forced blocks and those whose key is ``least`` int32 ``[B]`` or more, ``cap`` of them."""
    visible, recent = bounds.visible.contiguous(), bounds.recent.contiguous()
    for first, scores in chunks:
        batch, heads, rows, columns = scores.shape
        launch(
            choose_kernel, (rows, heads, batch),
            scores, least, counts, indices, visible, recent, p.num_q_blocks, first, rows, columns, indices.shape[3],
            cap, batch_stride(visible), FIRST=p.first_free, CAPPED=cap < columns,
            BLOCK=1024 if scores.is_cuda else 32, num_warps=4, **LAUNCH,
        )  # fmt: skip


def empty_lists(shape: tuple[int, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists to be written for scores of that shape; zero counts where the kernel has nothing to do."""
    make = torch.zeros if 0 in shape else torch.empty
    counts = make(shape[:3], dtype=torch.int32, device=device)
    return counts, torch.empty((*shape[:3], width), dtype=torch.int32, device=device)


def row_strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """(batch, row, head, dim) strides; packed rows are counted from the start of the tensor."""
    return (0, *x.stride()) if packed else x.stride()


def padded_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def dot_precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"
