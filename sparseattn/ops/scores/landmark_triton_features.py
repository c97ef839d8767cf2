"""What of the landmark kernels looks at keys or queries alone: clusters, covariances, the choice of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels.attention import sequence_span

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["max_q", "max_k", "blocks", "snapshots", "bounds_stride_b"]
# Views into larger tensors: aligned or not as the batch size has it.
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr"]


class FeatureTiles(NamedTuple):
    """Sizes of the kernels of this file.

    Attributes:
        cluster_warps: Warps of ``features_kernel``.
        columns: Columns of a step of ``sharpness_kernel``.
        terms: Parts of the queries' dtype that stand for a covariance there; 0: float32 products.
        num_stages: Its pipeline stages.
    """

    cluster_warps: int
    columns: int
    terms: int
    num_stages: int


def tiles_for(dtype: torch.dtype, head_dim: int, block_size: int, capability: tuple[int, int]) -> FeatureTiles:
    """Tiles by GPU generation.

    Covariances in bfloat16 move fewer rows across the cut than the rounding of the queries does. In float16 they might
    overflow.
    """
    warps = 8 if block_size > 64 and (capability[0] < 9 or dtype == torch.float32) else 4
    terms = 1 if dtype == torch.bfloat16 else 0
    if terms and head_dim <= 128 and capability[0] >= 9:
        return FeatureTiles(warps, max(16, triton.next_power_of_2(head_dim)), terms, 3)
    return FeatureTiles(warps, min(32, max(16, triton.next_power_of_2(head_dim))), terms, 1)


def feature_tiles(x: Tensor, block_size: int) -> FeatureTiles:
    """Tiles for keys or queries ``x [..., H, D]``."""
    if not x.is_cuda:
        return FeatureTiles(1, 16, 0, 1)  # the interpreter
    return tiles_for(x.dtype, x.shape[-1], block_size, torch.cuda.get_device_capability(x.device))


@triton.jit
def _means(x, cluster, valid):
    """Of the keys ``x [BLOCK, BLOCK_D]`` by cluster: means ``[BLOCK_D, 16]`` (float32), their squares, counts, members.

    16, the smallest side of a product, is enough for all clusters; ``members [BLOCK, 16]`` are 0 or 1 in x's dtype.
    """
    members = (cluster[:, None] == tl.arange(0, 16)[None, :]) & valid[:, None]
    counts = tl.sum(members.to(tl.float32), 0)
    members = members.to(x.dtype)
    means = tl.dot(tl.trans(x), members, input_precision="tf32x3") / tl.maximum(counts, 1.0)[None, :]
    return means, tl.sum(means * means, 0), counts, members


@triton.jit
def _dots(x, means):
    """``x [BLOCK, BLOCK_D]`` times float32 means ``[BLOCK_D, 16]``, in parts where keys have fewer bits."""
    if x.dtype == tl.float32:
        return tl.dot(x, means, input_precision="tf32x3")
    else:
        # Eight more bits a part; as much larger, they stay among the normal numbers of float16.
        high = means.to(x.dtype)
        rest = (means - high.to(tl.float32)) * 256.0
        middle = rest.to(x.dtype)
        low = ((rest - middle.to(tl.float32)) * 256.0).to(x.dtype)
        small = tl.dot(x, middle) + tl.dot(x, low) * (1.0 / 256.0)
        return tl.dot(x, high) + small * (1.0 / 256.0)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def features_kernel(
    k_ptr, centroids_ptr, spreads_ptr, sizes_ptr, k_start_ptr, k_end_ptr, stride_k, max_k, blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Landmarks of one block of keys. Grid (NB, Hkv, B).

    K-center reads columns of the matrix of distances, whose rows lie in few threads each; clusters are products with
    the matrix of who is in which.
    """
    j = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    valid = j * BLOCK + offs < k_len
    rows = (k_start + j * BLOCK + offs).to(tl.int64)
    base = k_ptr + b.to(tl.int64) * stride_k[0] + h.to(tl.int64) * stride_k[2]
    x = tl.load(
        base + rows[:, None] * stride_k[1] + offs_d[None, :] * stride_k[3],
        mask=valid[:, None] & (offs_d < D)[None, :], other=0.0,
    )  # fmt: skip  # [BLOCK, BLOCK_D]
    g = tl.dot(x, tl.trans(x), input_precision=PRECISION)  # [BLOCK, BLOCK]
    square = tl.sum(tl.where(offs[:, None] == offs[None, :], g, 0.0), 1)

    # Greedy k-center, from the key nearest to the mean (padding is zero and adds nothing to sums).
    count = tl.maximum(tl.minimum(k_len - j * BLOCK, BLOCK), 1).to(tl.float32)
    far = tl.where(valid, 2.0 * tl.sum(g, 1) / count - square, float("-inf"))
    apart = square[:, None] + square[None, :] - 2.0 * g
    distance = tl.where(valid, float("inf"), -1.0)
    assigned = tl.zeros([BLOCK], tl.int32)
    for t in range(0, CLUSTERS):
        centre = tl.argmax(far, 0)
        new = tl.sum(tl.where(offs[None, :] == centre, apart, 0.0), 1)
        closer = new < distance
        assigned = tl.where(closer, t, assigned)
        distance = tl.where(closer, new, distance)
        far = distance

    # One Lloyd pass: each key to the nearest mean. |c|^2 - 2 x.c orders the means as the distance does.
    means, mean_square, counts, _ = _means(x, assigned, valid)
    offset = tl.where(counts > 0, mean_square, float("inf"))
    nearest = tl.argmin(offset[None, :] - 2.0 * _dots(x, means), 1)

    means, mean_square, counts, members = _means(x, nearest, valid)
    each = tl.maximum(counts, 1.0)
    variance = tl.maximum(tl.sum(members.to(tl.float32) * square[:, None], 0) / each - mean_square, 0.0) / D
    offs_t = tl.arange(0, 16)
    out = ((b.to(tl.int64) * tl.num_programs(1) + h) * blocks + j) * CLUSTERS + offs_t
    tl.store(spreads_ptr + out, tl.sqrt(2.0 * tl.log(each) * variance), mask=offs_t < CLUSTERS)
    tl.store(sizes_ptr + out, counts.to(tl.int32), mask=offs_t < CLUSTERS)
    tl.store(
        centroids_ptr + out[None, :] * D + offs_d[:, None], means.to(x.dtype),
        mask=(offs_t < CLUSTERS)[None, :] & (offs_d < D)[:, None],
    )  # fmt: skip


@triton.jit
def _snapshot(t):
    """Blocks before snapshot ``t``: the numbers of three leading bits."""
    return tl.where(t < 8, t, (t % 4 + 4) << tl.maximum(t // 4 - 1, 0))


@triton.jit(do_not_specialize=_LENGTHS)
def moments_kernel(
    centroids_ptr, sizes_ptr, moments_ptr, blocks, snapshots,
    D: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Weighted moments of the landmarks between one snapshot and the last. Grid (snapshots, columns, B * Hkv).

    Writes ``moments [B * Hkv, snapshots, D + 2, D]``: second moments, some columns a program; a row of first moments;
    a row of the sum of weights.
    """
    t = tl.program_id(0)
    offs_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(2).to(tl.int64)
    stop = _snapshot(t) * CLUSTERS
    offs_d = tl.arange(0, BLOCK_D)
    first = head * blocks * CLUSTERS
    acc = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    mean = tl.zeros([COLUMNS], tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    for l in range(_snapshot(tl.maximum(t - 1, 0)) * CLUSTERS, stop, BLOCK_L):
        offs_l = l + tl.arange(0, BLOCK_L)
        inside = offs_l < stop
        w = tl.sqrt(tl.load(sizes_ptr + first + offs_l, mask=inside, other=0).to(tl.float32))
        at = centroids_ptr + (first + offs_l)[:, None] * D
        x = tl.load(at + offs_d[None, :], mask=inside[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
        y = tl.load(at + offs_c[None, :], mask=inside[:, None] & (offs_c < D)[None, :], other=0.0).to(tl.float32)
        y *= w[:, None]
        acc = tl.dot(tl.trans(x), y, acc, input_precision="tf32x3")
        mean += tl.sum(y, 0)
        total += w
    out = moments_ptr + (head * snapshots + t) * (D + 2) * D + offs_c
    own = offs_c < D
    tl.store(out[None, :] + offs_d[:, None] * D, acc, mask=(offs_d < D)[:, None] & own[None, :])
    tl.store(out + D * D, mean, mask=own)
    tl.store(out + (D + 1) * D, tl.zeros([COLUMNS], tl.float32) + tl.sum(total), mask=own)


@triton.jit(do_not_specialize=_LENGTHS)
def covariance_kernel(
    moments_ptr, covariances_ptr, snapshots, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Covariances of the landmarks before every snapshot, ``[B * Hkv, snapshots, D, D]``. Grid (rows, B * Hkv)."""
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    inside = (offs_r < D)[:, None] & (offs_d < D)[None, :]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    mean_r = tl.zeros([ROWS], tl.float32)
    mean_d = tl.zeros([BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for t in range(0, snapshots):
        at = moments_ptr + (head * snapshots + t) * (D + 2) * D
        acc += tl.load(at + offs_r[:, None] * D + offs_d[None, :], mask=inside, other=0.0)
        mean_r += tl.load(at + D * D + offs_r, mask=offs_r < D, other=0.0)
        mean_d += tl.load(at + D * D + offs_d, mask=offs_d < D, other=0.0)
        total += tl.load(at + (D + 1) * D + offs_d, mask=offs_d < D, other=0.0)
        count = tl.maximum(total, 1.0)
        cov = acc / count[None, :] - mean_r[:, None] * (mean_d / count / count)[None, :]
        out = covariances_ptr + (head * snapshots + t) * D * D
        tl.store(out + offs_r[:, None] * D + offs_d[None, :], cov, mask=inside)


@triton.jit
def _columns(cov, offs_d, offs_c, D: tl.constexpr, dtype: tl.constexpr, TERMS: tl.constexpr):
    """Columns ``offs_c`` of a symmetric matrix ``[BLOCK_D, COLUMNS]``: as they are, or in one or two TERMS of dtype."""
    high = tl.load(
        cov + offs_c[None, :] * D + offs_d[:, None], mask=(offs_d < D)[:, None] & (offs_c < D)[None, :], other=0.0
    )
    low = high
    if TERMS > 0:
        rounded = high.to(dtype)
        low = (high - rounded.to(tl.float32)).to(dtype)
        return rounded, low
    else:
        return high, low


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def sharpness_kernel(
    q_ptr, covariances_ptr, sharpness_ptr, recent_ptr, q_start_ptr, q_end_ptr, stride_q, max_q, snapshots,
    bounds_stride_b,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """How far the logits of each row spread. Grid (MB, Hkv, B); a program does a group of heads.

    Writes ``sharpness [B, Hq, MB, BLOCK]``, up to a factor and a term that the rows of a block share; -inf past the
    last row. As C is symmetric, ``(q - mean) C (q - mean)`` is ``q C . (q - 2 mean)`` and a constant: the product takes
    queries as they are.
    """
    m = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    recent = tl.load(recent_ptr + b * bounds_stride_b + m)
    if recent <= FIRST:
        return  # nothing to score
    exponent = 0
    for bit in range(3, 31):
        exponent += tl.minimum(recent >> bit, 1)
    snapshot = 4 * exponent + (recent >> exponent)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED)
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    valid = m * BLOCK + offs < q_len
    count = tl.minimum(q_len - m * BLOCK, BLOCK).to(tl.float32)
    rows = (q_start + m * BLOCK + offs).to(tl.int64)
    at = q_ptr + b.to(tl.int64) * stride_q[0] + (h * GROUP).to(tl.int64) * stride_q[2] + rows[:, None] * stride_q[1]
    head = b.to(tl.int64) * tl.num_programs(1) + h
    cov = covariances_ptr + (head * snapshots + snapshot) * D * D
    sharpness_ptr += (head * GROUP * tl.num_programs(0) + m) * BLOCK + offs
    # Times queries: ``count * (q - 2 mean)``. All its elements are exact.
    centred = tl.where(offs[:, None] == offs[None, :], count - 2.0, -2.0).to(q_ptr.dtype.element_ty)
    WHOLE: tl.constexpr = COLUMNS == BLOCK_D
    if WHOLE:
        high, low = _columns(cov, offs_d, offs_d, D, q_ptr.dtype.element_ty, TERMS)
    for _ in range(0, GROUP):
        x = tl.load(at + offs_d[None, :] * stride_q[3], mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
        sharpness = tl.zeros([BLOCK], tl.float32)
        for c in tl.static_range(0, D, COLUMNS):
            y = x
            if not WHOLE:
                offs_c = c + tl.arange(0, COLUMNS)
                high, low = _columns(cov, offs_d, offs_c, D, q_ptr.dtype.element_ty, TERMS)
                inside = valid[:, None] & (offs_c < D)[None, :]
                y = tl.load(at + offs_c[None, :] * stride_q[3], mask=inside, other=0.0)
            if TERMS == 0:
                product = tl.dot(x.to(tl.float32), high, input_precision=PRECISION)
            else:
                product = tl.dot(x, high)
            if TERMS == 2:
                product = tl.dot(x, low, product)
            sharpness += tl.sum(product * tl.dot(centred, y, input_precision=PRECISION), 1)
        tl.store(sharpness_ptr, tl.where(valid, sharpness, float("-inf")))
        at += stride_q[2]
        sharpness_ptr += tl.num_programs(0) * BLOCK


@triton.jit(do_not_specialize=_LENGTHS)
def rows_kernel(
    sharpness_ptr, rows_ptr, recent_ptr, bounds_stride_b, BLOCK: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr
):
    """The ROWS sharpest rows of one query block, sharpest first; -1 past the last. Grid (MB, Hq, B)."""
    m = tl.program_id(0)
    b = tl.program_id(2)
    if tl.load(recent_ptr + b * bounds_stride_b + m) <= FIRST:
        return  # nothing to score
    block = (b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + m
    offs = tl.arange(0, BLOCK)
    this = tl.load(sharpness_ptr + block * BLOCK + offs)[None, :]
    other = tl.load(sharpness_ptr + block * BLOCK + offs)[:, None]
    # How many rows are sharper, or as sharp and earlier: a place of its own for each row, without a sort.
    ahead = (other > this) | ((other == this) & (offs[:, None] < offs[None, :]))
    rank = tl.sum(ahead.to(tl.int32), 0)
    row = tl.where(tl.load(sharpness_ptr + block * BLOCK + offs) == float("-inf"), -1, offs)
    tl.store(rows_ptr + block * ROWS + rank, row, mask=rank < ROWS)
