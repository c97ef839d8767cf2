"""What the backward passes need around their large kernels: a row's numbers before, and whole gradients after."""

import triton
import triton.language as tl

from sparseattn.kernels.attention import LOG2E, sequence_span
from sparseattn.kernels.walks import first_query_tile


@triton.jit
def row_numbers(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, b, head, q_start, q_len, row, stride_o, stride_do,
    lse_stride_b, lse_stride_h, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """What the gradients of the scores of some rows need besides the scores.

    Args:
        o_ptr: Outputs; ``do_ptr`` their gradients.
        lse_ptr: Natural-log LSE without the sink, -inf for a row that saw nothing; ``dlse_ptr`` its gradient.
        sinks_ptr: Sink logits of the heads.
        row: [M] query rows of head ``head`` of sequence ``b``, which has ``q_len`` from ``q_start`` on.

    Returns:
        ``norm`` [M], log of the full denominator (+inf for a row that saw nothing or lies past the end, so that its
        probabilities are 0); ``delta`` [M], rowsum(o * do) less the LSE's own gradient; each row's share of the sink's
        gradient; and where in ``lse`` the rows are, and whether.
    """
    b64 = b.to(tl.int64)
    head64 = head.to(tl.int64)
    row_in = row < q_len
    offs = tl.arange(0, BLOCK_DV)
    at = (q_start + row).to(tl.int64)
    inside = row_in[:, None] & (offs < DV)[None, :]
    o_base = o_ptr + b64 * stride_o[0] + head64 * stride_o[2]
    do_base = do_ptr + b64 * stride_do[0] + head64 * stride_do[2]
    o = tl.load(o_base + at[:, None] * stride_o[1] + offs[None, :] * stride_o[3], mask=inside, other=0.0)
    do = tl.load(do_base + at[:, None] * stride_do[1] + offs[None, :] * stride_do[3], mask=inside, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse_at = b64 * lse_stride_b + head64 * lse_stride_h + at
    lse = tl.load(lse_ptr + lse_at, mask=row_in, other=float("-inf"))
    empty = lse == float("-inf")
    lse = tl.where(empty, 0.0, lse)
    norm = lse
    share = lse * 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        top = tl.maximum(lse, sink)
        norm = top + tl.log(tl.exp(lse - top) + tl.exp(sink - top))
        share = tl.where(empty, 0.0, -tl.exp(sink - norm) * delta)
    if DLSE:
        dlse = tl.load(dlse_ptr + lse_at, mask=row_in, other=0.0)
        # A sink e^60 times the sum of all keys leaves no probability to move: the bound only keeps 0 * inf away.
        delta -= tl.where(empty, 0.0, dlse * tl.exp(tl.minimum(norm - lse, 60.0)))
    return tl.where(empty, float("inf"), norm), delta, share, lse_at, row_in


@triton.jit(do_not_specialize=["lse_stride_b", "lse_stride_h", "max_q", "row_tiles"])
def tile_numbers_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, numbers_ptr, norm_ptr, delta_ptr, sums_ptr, dsink_ptr, q_start_ptr,
    q_end_ptr, stride_o, stride_do, lse_stride_b, lse_stride_h, max_q, row_tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_D: tl.constexpr, SINKS: tl.constexpr, DLSE: tl.constexpr,
    ZERO: tl.constexpr, PLAIN: tl.constexpr, RAGGED_Q: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: the row numbers of 64 query rows of one head, packed for one copy, and zeros for their dQ.

    Grid (heads, row tiles, batch): neighbours read the heads of the same tokens, which lie side by side. Writes
    ``numbers`` float32 [heads * row_tiles, 2, 64]: the norm in base 2 (+inf past the sequence's end) and delta; with
    ``PLAIN`` both again in the LSE's order, the norm in natural log; with ``ZERO`` zeros to ``sums`` float32
    [heads * row_tiles, 64 * BLOCK_D].
    """
    b = tl.program_id(2)
    head = tl.program_id(0)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    m0 = tl.program_id(1) * 64
    if m0 >= q_len:
        return
    tile = head.to(tl.int64) * row_tiles + first_query_tile(q_start, b, max_q, PACKED) + tl.program_id(1)
    if ZERO:
        offs = tl.arange(0, 4096)
        for part in tl.static_range(BLOCK_D // 64):
            tl.store(sums_ptr + (tile * (64 * BLOCK_D) + part * 4096 + offs), tl.zeros([4096], tl.float32))
    row = tl.arange(0, 64)
    norm, delta, share, lse_at, row_in = row_numbers(
        o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, b, head, q_start, q_len, m0 + row, stride_o, stride_do,
        lse_stride_b, lse_stride_h, DV, BLOCK_DV, SINKS, DLSE,
    )  # fmt: skip
    if SINKS:
        tl.store(dsink_ptr + lse_at, share, mask=row_in)
    if PLAIN:
        tl.store(norm_ptr + lse_at, norm, mask=row_in)
        tl.store(delta_ptr + lse_at, delta, mask=row_in)
    tl.store(numbers_ptr + tile * 128 + row, norm * LOG2E)
    tl.store(numbers_ptr + tile * 128 + 64 + row, delta)


# A float32 tile of dQ, [64 rows, BLOCK_D], lies in memory as wgmma's accumulators hold it: BLOCK_D / 64 pieces of 64
# columns, in each [8 columns of 8, 4 warps, 8 rows, 4 threads, 2 halves of 8 rows, 2 columns].


@triton.jit
def to_wgmma_order(tile, BLOCK_D: tl.constexpr):
    """[64, BLOCK_D] as the [64 * BLOCK_D] numbers that lie in memory."""
    tile = tl.reshape(tile, (4, 2, 8, BLOCK_D // 64, 8, 4, 2))
    return tl.reshape(tl.permute(tile, (3, 4, 0, 2, 5, 1, 6)), (64 * BLOCK_D,))


@triton.jit
def from_wgmma_order(numbers, BLOCK_D: tl.constexpr):
    """[64 * BLOCK_D] numbers as they lie in memory as [64, BLOCK_D]."""
    numbers = tl.reshape(numbers, (BLOCK_D // 64, 8, 4, 8, 4, 2, 2))
    return tl.reshape(tl.permute(numbers, (2, 5, 3, 0, 1, 4, 6)), (64, BLOCK_D))


@triton.jit(do_not_specialize=["max_q", "row_tiles"])
def dq_from_sums_kernel(
    sums_ptr, dq_ptr, q_start_ptr, q_end_ptr, stride_dq, max_q, row_tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED_Q: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: 64 rows of dQ of one head, from the float32 sums in the order of wgmma's accumulators.

    Grid (heads, row tiles, batch).
    """
    b = tl.program_id(2)
    head = tl.program_id(0)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    m0 = tl.program_id(1) * 64
    if m0 >= q_len:
        return
    tile = head.to(tl.int64) * row_tiles + first_query_tile(q_start, b, max_q, PACKED) + tl.program_id(1)
    sums = tl.load(sums_ptr + tile * (64 * BLOCK_D) + tl.arange(0, 64 * BLOCK_D))
    dq = from_wgmma_order(sums, BLOCK_D)
    row = tl.arange(0, 64)
    offs_d = tl.arange(0, BLOCK_D)
    at = (q_start + m0 + row).to(tl.int64)
    dq_base = dq_ptr + b.to(tl.int64) * stride_dq[0] + head.to(tl.int64) * stride_dq[2]
    dq_ptrs = dq_base + at[:, None] * stride_dq[1] + offs_d[None, :] * stride_dq[3]
    inside = (m0 + row < q_len)[:, None] & (offs_d < D)[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows(part_ptr, out_ptr, row, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Rows [ROWS] of ``out`` [rows, D] as sums of ``part`` [rows, PARTS, D]."""
    offs = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows)[:, None] & (offs < D)
    at = row.to(tl.int64)[:, None]
    total = tl.zeros([row.shape[0], BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(part_ptr + (at * PARTS + part) * D + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at * D + offs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def sum_parts_kernel(
    dk_part_ptr, dv_part_ptr, dk_ptr, dv_ptr, rows,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` rows of dK or of dV, each the sum of ``PARTS`` partial ones.

    Grid (rows / ROWS, 2). ``dk_part`` is [rows, PARTS, D], ``dk`` [rows, D], a row one KV head of a token; dv likewise.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(1) == 0:
        _sum_rows(dk_part_ptr, dk_ptr, row, rows, D, BLOCK_D, PARTS)
    else:
        _sum_rows(dv_part_ptr, dv_ptr, row, rows, DV, BLOCK_D, PARTS)
