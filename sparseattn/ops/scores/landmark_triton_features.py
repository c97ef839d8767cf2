"""What of the landmark kernels looks at keys or queries alone: clusters, covariances, the choice of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from sparseattn.kernels.attention import sequence_span

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["max_q", "max_k", "blocks", "snapshots", "bounds_stride_b"]
# Views into larger tensors: aligned or not as the batch size has it.
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr"]


@triton.jit
def _cluster_means(g, assigned, valid, t):
    """Cluster ``t`` by the Gram matrix: its keys (0 or 1), how many, each key times the mean, the mean's square."""
    member = tl.where(valid & (assigned == t), 1.0, 0.0)
    count = tl.sum(member)
    each = tl.maximum(count, 1.0)
    dots = tl.sum(g * member[None, :], 1) / each
    return member, count, dots, tl.sum(member * dots) / each


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def features_kernel(
    k_ptr, centroids_ptr, spreads_ptr, sizes_ptr, k_start_ptr, k_end_ptr, stride_k, max_k, blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Landmarks of one block of keys. Grid (NB, Hkv, B).

    Everything but the centroids comes from the Gram matrix: k-center reads its rows, the Lloyd pass sums its columns.
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
    centre = tl.argmin(tl.where(valid, square - 2.0 * tl.sum(g, 1) / count, float("inf")), 0)
    distance = tl.where(valid, float("inf"), -1.0)
    assigned = tl.zeros([BLOCK], tl.int32)
    for t in range(0, CLUSTERS):
        here = offs == centre
        new = square + tl.sum(tl.where(here, square, 0.0)) - 2.0 * tl.sum(tl.where(here[:, None], g, 0.0), 0)
        closer = new < distance
        assigned = tl.where(closer, t, assigned)
        distance = tl.where(closer, new, distance)
        centre = tl.argmax(distance, 0)

    best = tl.full([BLOCK], float("inf"), tl.float32)
    nearest = tl.zeros([BLOCK], tl.int32)
    for t in range(0, CLUSTERS):
        member, count, dots, mean_square = _cluster_means(g, assigned, valid, t)
        order = tl.where(count > 0, mean_square - 2.0 * dots, float("inf"))
        nearest = tl.where(order < best, t, nearest)
        best = tl.minimum(best, order)

    out = ((b.to(tl.int64) * tl.num_programs(1) + h) * blocks + j) * CLUSTERS
    for t in range(0, CLUSTERS):
        member, count, dots, mean_square = _cluster_means(g, nearest, valid, t)
        each = tl.maximum(count, 1.0)
        variance = tl.maximum(tl.sum(member * square) / each - mean_square, 0.0) / D
        tl.store(spreads_ptr + out + t, tl.sqrt(2.0 * tl.log(each) * variance))
        tl.store(sizes_ptr + out + t, count.to(tl.int32))

    offs_t = tl.arange(0, 16)  # the smallest side of a product
    members = (nearest[None, :] == offs_t[:, None]) & valid[None, :]  # [16, BLOCK]
    counts = tl.sum(members.to(tl.float32), 1)
    sums = tl.dot(members.to(x.dtype), x, input_precision=PRECISION)  # [16, BLOCK_D]
    means = sums / tl.maximum(counts, 1.0)[:, None]
    tl.store(
        centroids_ptr + (out + offs_t)[:, None] * D + offs_d[None, :], means.to(x.dtype),
        mask=(offs_t < CLUSTERS)[:, None] & (offs_d < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def covariance_kernel(
    centroids_ptr, sizes_ptr, covariances_ptr, blocks, snapshots,
    D: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Some columns of the covariance of the landmarks before one snapshot. Grid (snapshots, columns, B * Hkv)."""
    t = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS
    head = tl.program_id(2).to(tl.int64)
    prefix = tl.where(t < 8, t, (t % 4 + 4) << tl.maximum(t // 4 - 1, 0))
    landmarks = tl.minimum(prefix, blocks) * CLUSTERS
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = column + tl.arange(0, COLUMNS)
    first = head * blocks * CLUSTERS
    acc = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    mean_d = tl.zeros([BLOCK_D], tl.float32)
    mean_c = tl.zeros([COLUMNS], tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    for l in range(0, landmarks, BLOCK_L):
        offs_l = l + tl.arange(0, BLOCK_L)
        inside = offs_l < landmarks
        w = tl.sqrt(tl.load(sizes_ptr + first + offs_l, mask=inside, other=0).to(tl.float32))
        at = centroids_ptr + (first + offs_l)[:, None] * D
        x = tl.load(at + offs_d[None, :], mask=inside[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
        y = tl.load(at + offs_c[None, :], mask=inside[:, None] & (offs_c < D)[None, :], other=0.0).to(tl.float32)
        y *= w[:, None]
        acc = tl.dot(tl.trans(x), y, acc, input_precision="tf32x3")
        mean_d += tl.sum(x * w[:, None], 0)
        mean_c += tl.sum(y, 0)
        total += w
    count = tl.maximum(tl.sum(total), 1.0)
    cov = acc / count - (mean_d / count)[:, None] * (mean_c / count)[None, :]
    out = covariances_ptr + (head * snapshots + t) * D * D
    tl.store(out + offs_d[:, None] * D + offs_c[None, :], cov, mask=(offs_d < D)[:, None] & (offs_c < D)[None, :])


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def rows_kernel(
    q_ptr, covariances_ptr, rows_ptr, recent_ptr, q_start_ptr, q_end_ptr, stride_q, max_q, snapshots,
    bounds_stride_b,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The ROWS sharpest rows of one query block, sharpest first. Grid (MB, Hq, B)."""
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
    at = q_ptr + b.to(tl.int64) * stride_q[0] + h.to(tl.int64) * stride_q[2] + rows[:, None] * stride_q[1]
    x = tl.load(at + offs_d[None, :] * stride_q[3], mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
    x = x.to(tl.float32)
    x = tl.where(valid[:, None], x - (tl.sum(x, 0) / count)[None, :], 0.0)  # [BLOCK, BLOCK_D]
    kv_head = b.to(tl.int64) * (tl.num_programs(1) // GROUP) + h // GROUP
    cov = covariances_ptr + (kv_head * snapshots + snapshot) * D * D
    sharpness = tl.zeros([BLOCK], tl.float32)
    for c in range(0, D, COLUMNS):
        offs_c = c + tl.arange(0, COLUMNS)
        inside = (offs_c < D)[None, :]
        v = tl.load(cov + offs_d[:, None] * D + offs_c[None, :], mask=(offs_d < D)[:, None] & inside, other=0.0)
        y = tl.load(at + offs_c[None, :] * stride_q[3], mask=valid[:, None] & inside, other=0.0).to(tl.float32)
        y = y - (tl.sum(y, 0) / count)[None, :]
        sharpness += tl.sum(tl.dot(x, v, input_precision=PRECISION) * y, 1)
    sharpness = tl.where(valid, sharpness, float("-inf"))
    # How many rows are sharper, or as sharp and earlier: a place of its own for each row, without a sort.
    ahead = (sharpness[None, :] > sharpness[:, None]) | (
        (sharpness[None, :] == sharpness[:, None]) & (offs[None, :] < offs[:, None])
    )
    rank = tl.sum(ahead.to(tl.int32), 1)
    out = rows_ptr + ((b.to(tl.int64) * tl.num_programs(1) + h) * tl.num_programs(0) + m) * ROWS
    tl.store(out + rank, tl.where(valid, offs, -1), mask=rank < ROWS)
