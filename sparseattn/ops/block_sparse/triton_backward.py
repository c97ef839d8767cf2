"""The backward kernels of block-sparse attention: row numbers, dK and dV by key tile, dQ by row tile."""

import triton
import triton.language as tl

from sparseattn.kernels.attention import (
    cap_scores,
    exp_scores,
    full_range,
    key_range,
    schedule,
    sequence_span,
    visible,
)
from sparseattn.kernels.gradients import row_numbers
from sparseattn.kernels.tiles import (
    LENGTHS,
    WINDOW,
    key_tiles,
    list_length,
    load_rows,
    slot_tile,
    tile_start,
    whole_tiles,
)
from sparseattn.kernels.tilings import piece_rows, tile_first, tiles_between
from sparseattn.ops.block_sparse.extra import EXTRA
from sparseattn.ops.block_sparse.extra_backward import dq_columns, dq_means


@triton.jit(do_not_specialize=["max_q", "batch", "lse_stride_b", "lse_stride_h"])
def preprocess_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, norm_ptr, delta_ptr, dsink_ptr, q_start_ptr, q_end_ptr,
    stride_o, stride_do, lse_stride_b, lse_stride_h, max_q, batch,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, SINKS: tl.constexpr, DLSE: tl.constexpr,
    RAGGED_Q: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: per-row numbers of ``BLOCK_M`` query rows that both gradient kernels need.

    Grid (row tiles, heads, batch), ``PACKED`` (slots, heads): see ``slot_tile``. Writes ``norm``, ``delta`` and each
    row's share of the sink gradient: see ``row_numbers``.
    """
    b = tl.program_id(2)
    tile = tl.program_id(0)
    head = tl.program_id(1)
    if PACKED:
        b, tile = slot_tile(q_start_ptr, tile, batch, 1, BLOCK_M)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    norm, delta, share, lse_at, row_in = row_numbers(
        o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, b, head, q_start, q_len, row, stride_o, stride_do,
        lse_stride_b, lse_stride_h, DV, BLOCK_DV, SINKS, DLSE,
    )  # fmt: skip
    if SINKS:
        tl.store(dsink_ptr + lse_at, share, mask=row_in)
    tl.store(norm_ptr + lse_at, norm, mask=row_in)
    tl.store(delta_ptr + lse_at, delta, mask=row_in)


@triton.jit
def _probabilities(
    s, norm, rows, cols, m0, m1, n0, n1, offset, k_len, scale, softcap, window_left, window_right,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities of one tile from raw scores and the rows' ``norm``, and the soft cap's derivative.

    ``rows``, ``cols`` and ``norm`` broadcast against ``s``, so both orientations use it; the tile spans query rows
    ``m0 .. m1`` inclusive and keys ``n0 .. n1`` exclusive.
    """
    slope = 1.0
    if SOFTCAP:
        s = cap_scores(s, scale, softcap)
        capped = s * (scale / softcap)
        slope = 1.0 - capped * capped
    p = exp_scores(s, scale, norm, PRECISION)
    if CAUSAL or WINDOW or BOUNDED:
        lo, hi = full_range(m0, m1, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
        if (n0 < lo) | (n1 > hi):
            seen = visible(rows, cols, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
    return p, slope


@triton.jit
def _row_numbers(norm_ptr, delta_ptr, rows, q_len, BLOCK_M: tl.constexpr, BOUNDED: tl.constexpr):
    """``norm`` and ``delta`` of a tile's rows, for use along a score tile's columns.

    Loaded as one [BLOCK_M, 4] tile (two columns stay empty): loads of fewer elements than threads are repeated by every
    thread that needs a value, 16 times each here, which made a quarter of the loop's instructions.
    """
    pick = tl.arange(0, 4)
    ptrs = tl.where(pick < 1, norm_ptr, delta_ptr)[None, :] + rows[:, None]
    inside = (pick < 2)[None, :]
    if BOUNDED:
        inside = inside & (rows < q_len)[:, None]
    numbers = tl.load(ptrs, mask=inside, other=0.0)
    pair, _ = tl.split(tl.permute(tl.reshape(numbers, [BLOCK_M, 2, 2]), (0, 2, 1)))
    norm, delta = tl.split(pair)
    if BOUNDED:
        norm = tl.where(rows < q_len, norm, float("inf"))
    return norm, delta


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q_base, do_base, norm_ptr, delta_ptr, m0, n0, q_len, k_len, offset,
    stride_q, stride_do, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the query rows ``m0 .. m0 + BLOCK_M`` of one head contribute to a key tile's dK and dV.

    Keys past the end get garbage that is never stored; query rows past the end have norm = +inf, so probability 0.
    """
    rows = m0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_base, m0, q_len, stride_q[1], stride_q[3], BLOCK_M, D, BLOCK_D, BOUNDED, WIDE)
    do = load_rows(do_base, m0, q_len, stride_do[1], stride_do[3], BLOCK_M, DV, BLOCK_DV, BOUNDED, WIDE)
    norm, delta = _row_numbers(norm_ptr, delta_ptr, rows, q_len, BLOCK_M, BOUNDED)
    s = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p, slope = _probabilities(
        s, norm[None, :], rows[None, :], (n0 + tl.arange(0, BLOCK_N))[:, None], m0, m0 + BLOCK_M - 1, n0, n0 + BLOCK_N,
        offset, k_len, scale, softcap, window_left, window_right, CAUSAL, WINDOW, SOFTCAP, False, PRECISION,
    )  # fmt: skip
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, do.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds = ds * slope
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkdv_list(
    dk, dv, k, v, q_base, do_base, norm_ptr, delta_ptr, count_ptr, list_ptr, n0, q_len, k_len, offset,
    stride_q, stride_do, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr, RAGGED_Q: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one head's query rows of a list of blocks, or all that see it, contribute to a key tile's dK and dV."""
    if MASKED:
        begin = tl.full((), 0, tl.int32)
        end = list_length(count_ptr, list_ptr) * (BLOCK_Q // BLOCK_M)
    else:
        row_lo, row_hi = _row_range(n0, n0 + BLOCK_N, q_len, offset, window_left, window_right, CAUSAL, WINDOW)
        begin = row_lo // BLOCK_M
        end = tl.cdiv(row_hi, BLOCK_M)
    whole = whole_tiles(list_ptr, begin, end, q_len, BLOCK_Q, BLOCK_M, MASKED, RAGGED_Q)
    for i in range(begin, whole):
        m0 = tile_start(list_ptr, i, BLOCK_Q, BLOCK_M, MASKED)
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_base, do_base, norm_ptr, delta_ptr, m0, n0, q_len, k_len, offset,
            stride_q, stride_do, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, False, WIDE, PRECISION,
        )  # fmt: skip
    if whole < end:
        for i in range(whole, end):
            m0 = tile_start(list_ptr, i, BLOCK_Q, BLOCK_M, MASKED)
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_base, do_base, norm_ptr, delta_ptr, m0, n0, q_len, k_len, offset,
                stride_q, stride_do, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True, WIDE, PRECISION,
            )  # fmt: skip
    return dk, dv


@triton.jit
def _dkdv_tiling(
    dk, dv, k, v, q_base, do_base, norm_ptr, delta_ptr, count_ptr, tile_ptr, n0, n1, q_len, k_len, offset,
    stride_q, stride_do, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the query rows of a column of variable blocks contribute to keys ``n0 .. n1``: whole and short tiles."""
    row_lo, row_hi = _row_range(n0, n1, q_len, offset, window_left, window_right, CAUSAL, WINDOW)
    begin, end = tiles_between(count_ptr, tile_ptr, row_lo, row_hi, CAUSAL or WINDOW)
    short_ptr = tile_ptr + 2 * (q_len // BLOCK_Q)
    short, short_end = tiles_between(count_ptr + 1, short_ptr, row_lo, row_hi, CAUSAL or WINDOW)
    for i in range(begin * (BLOCK_Q // BLOCK_M), end * (BLOCK_Q // BLOCK_M)):
        m0 = tile_first(tile_ptr, i, BLOCK_Q, BLOCK_M)
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_base, do_base, norm_ptr, delta_ptr, m0, n0, q_len, k_len, offset,
            stride_q, stride_do, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, False, WIDE, PRECISION,
        )  # fmt: skip
    for i in range(short, short_end):
        tile_end = tl.load(short_ptr + 2 * i + 1)
        for m0 in range(tl.load(short_ptr + 2 * i), tile_end, BLOCK_S):
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_base, do_base, norm_ptr, delta_ptr, m0, n0, tile_end, k_len, offset,
                stride_q, stride_do, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_S, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True, WIDE, PRECISION,
            )  # fmt: skip
    return dk, dv


@triton.jit
def _row_range(n0, n1, q_len, offset, window_left, window_right, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Query rows ``[lo, hi)`` that see some key of ``n0 .. n1``."""
    row_lo = tl.full((), 0, tl.int32)
    row_hi = q_len
    if CAUSAL:
        row_lo = tl.maximum(n0 - offset, row_lo)
    if WINDOW:
        row_lo = tl.where(window_right < 0, row_lo, tl.maximum(row_lo, n0 - offset - window_right))
        row_hi = tl.where(window_left < 0, row_hi, tl.minimum(row_hi, n1 - offset + window_left))
    return row_lo, tl.maximum(row_hi, 0)


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, "batch", "num_pieces"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr, count_ptr, index_ptr, piece_ptr, num_pieces,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, idx_width, max_q, max_k, batch, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    GROUP: tl.constexpr, MASK_GROUP: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    VARIABLE: tl.constexpr, BLOCK_S: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of ``BLOCK_N`` keys of one KV head, over every query head of its group.

    Grid (key tiles * CHUNK, KV heads / CHUNK, batch), ``PACKED`` (slots * CHUNK, KV heads / CHUNK). Walks the
    transposed lists (which query blocks attend this key block); nothing is accumulated across programs, so the result
    is deterministic. ``VARIABLE`` blocks have the pieces and tiles of their transposed tiling, with one partition of
    the keys for all query heads of the group.
    """
    tile, head_k = schedule(CHUNK)
    b = tl.program_id(2)
    if PACKED:
        b, tile = slot_tile(k_start_ptr, tile, batch, 1, BLOCK_N)
    b64 = b.to(tl.int64)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    n0 = tile * BLOCK_N
    key_end = k_len
    block = n0 // BLOCK_KV
    if VARIABLE:
        mask_head = head_k * GROUP // MASK_GROUP
        n0, key_end, block = piece_rows(piece_ptr, mask_head, num_pieces, tile, BLOCK_KV, BLOCK_N)
    if n0 >= key_end:
        return

    k_base = k_ptr + b64 * stride_k[0] + head_k.to(tl.int64) * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
    v_base = v_ptr + b64 * stride_v[0] + head_k.to(tl.int64) * stride_v[2] + k_start.to(tl.int64) * stride_v[1]
    k = load_rows(k_base, n0, key_end, stride_k[1], stride_k[3], BLOCK_N, D, BLOCK_D, True, WIDE)
    v = load_rows(v_base, n0, key_end, stride_v[1], stride_v[3], BLOCK_N, DV, BLOCK_DV, True, WIDE)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for sub_head in range(GROUP):
        head_q = head_k * GROUP + sub_head
        head64 = head_q.to(tl.int64)
        q_base = q_ptr + b64 * stride_q[0] + head64 * stride_q[2] + q_start.to(tl.int64) * stride_q[1]
        do_base = do_ptr + b64 * stride_do[0] + head64 * stride_do[2] + q_start.to(tl.int64) * stride_do[1]
        row_base = b64 * lse_stride_b + head64 * lse_stride_h + q_start
        list_row = b64 * mask_stride_b + (head_q // MASK_GROUP) * mask_stride_h + block
        if VARIABLE:
            dk, dv = _dkdv_tiling(
                dk, dv, k, v, q_base, do_base, norm_ptr + row_base, delta_ptr + row_base, count_ptr + 2 * list_row,
                index_ptr + 2 * list_row * idx_width, n0, tl.minimum(n0 + BLOCK_N, key_end), q_len, k_len, offset,
                stride_q, stride_do, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, BLOCK_Q, BLOCK_S, CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
            )  # fmt: skip
        else:
            dk, dv = _dkdv_list(
                dk, dv, k, v, q_base, do_base, norm_ptr + row_base, delta_ptr + row_base, count_ptr + list_row,
                index_ptr + list_row * idx_width, n0, q_len, k_len, offset,
                stride_q, stride_do, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, BLOCK_Q, MASKED, RAGGED_Q, CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
            )  # fmt: skip

    cols = n0 + tl.arange(0, BLOCK_N)
    offs = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    at = (k_start + n0).to(tl.int64)
    in_k = (cols < key_end)[:, None] & (offs_d < D)[None, :]
    in_v = (cols < key_end)[:, None] & (offs_dv < DV)[None, :]
    dk_base = dk_ptr + b64 * stride_dk[0] + head_k.to(tl.int64) * stride_dk[2] + at * stride_dk[1]
    dv_base = dv_ptr + b64 * stride_dv[0] + head_k.to(tl.int64) * stride_dv[2] + at * stride_dv[1]
    dk_ptrs = dk_base + offs[:, None] * stride_dk[1] + offs_d[None, :] * stride_dk[3]
    dv_ptrs = dv_base + offs[:, None] * stride_dv[1] + offs_dv[None, :] * stride_dv[3]
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_k)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=in_v)


@triton.jit
def _dq_step(
    dq, q, do, norm, delta, rows, m0, last, k_base, v_base, n0, k_len, offset, stride_k, stride_v,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys ``n0 .. n0 + BLOCK_N`` contribute to a row tile's dQ."""
    k = load_rows(k_base, n0, k_len, stride_k[1], stride_k[3], BLOCK_N, D, BLOCK_D, BOUNDED, WIDE)
    v = load_rows(v_base, n0, k_len, stride_v[1], stride_v[3], BLOCK_N, DV, BLOCK_DV, BOUNDED, WIDE)
    s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    cols = n0 + tl.arange(0, BLOCK_N)
    p, slope = _probabilities(
        s, norm[:, None], rows[:, None], cols[None, :], m0, last, n0, n0 + BLOCK_N,
        offset, k_len, scale, softcap, window_left, window_right, CAUSAL, WINDOW, SOFTCAP, BOUNDED, PRECISION,
    )  # fmt: skip
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds = ds * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _dq_tiling(
    dq, q, do, norm, delta, rows, m0, last, k_base, v_base, count_ptr, tile_ptr, k_len, offset, stride_k, stride_v,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys of a row of variable blocks contribute to a row tile's dQ: whole tiles, then short ones."""
    key_lo, key_hi = key_range(m0, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
    begin, end = tiles_between(count_ptr, tile_ptr, key_lo, key_hi, CAUSAL or WINDOW)
    short_ptr = tile_ptr + 2 * (k_len // BLOCK_KV)
    short, short_end = tiles_between(count_ptr + 1, short_ptr, key_lo, key_hi, CAUSAL or WINDOW)
    for i in range(begin * (BLOCK_KV // BLOCK_N), end * (BLOCK_KV // BLOCK_N)):
        n0 = tile_first(tile_ptr, i, BLOCK_KV, BLOCK_N)
        dq = _dq_step(
            dq, q, do, norm, delta, rows, m0, last, k_base, v_base, n0, k_len, offset, stride_k, stride_v,
            scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            CAUSAL, WINDOW, SOFTCAP, False, WIDE, PRECISION,
        )  # fmt: skip
    for i in range(short, short_end):
        tile_end = tl.load(short_ptr + 2 * i + 1)
        for n0 in range(tl.load(short_ptr + 2 * i), tile_end, BLOCK_S):
            dq = _dq_step(
                dq, q, do, norm, delta, rows, m0, last, k_base, v_base, n0, tile_end, offset, stride_k, stride_v,
                scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_S,
                CAUSAL, WINDOW, SOFTCAP, True, WIDE, PRECISION,
            )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, *EXTRA, "batch", "num_pieces"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, norm_ptr, delta_ptr, dq_ptr, count_ptr, index_ptr, piece_ptr, num_pieces,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    column_count_ptr, column_ptr, mean_k_ptr, mean_v_ptr, bits_ptr, taken_ptr, column_width, num_blocks, taken_stride_b,
    stride_q, stride_k, stride_v, stride_do, stride_dq, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, idx_width, max_q, max_k, batch, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    GROUP: tl.constexpr, MASK_GROUP: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, MEANS: tl.constexpr, BLOCK_E: tl.constexpr, VARIABLE: tl.constexpr, BLOCK_S: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program: dQ of ``BLOCK_M`` query rows of one head, over the key blocks and extra keys they attend.

    Grid (row tiles * CHUNK, query heads / CHUNK, batch), ``PACKED`` (slots * CHUNK, query heads / CHUNK).
    """
    tile, head = schedule(CHUNK)
    tile = tl.num_programs(0) // CHUNK - 1 - tile
    b = tl.program_id(2)
    if PACKED:
        b, tile = slot_tile(q_start_ptr, tile, batch, 1, BLOCK_M)
    b64 = b.to(tl.int64)
    head_k = (head // GROUP).to(tl.int64)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    m0 = tile * BLOCK_M
    row_end = q_len
    block = m0 // BLOCK_Q
    if VARIABLE:
        m0, row_end, block = piece_rows(piece_ptr, head // MASK_GROUP, num_pieces, tile, BLOCK_Q, BLOCK_M)
    if m0 >= row_end:
        return

    head64 = head.to(tl.int64)
    q_base = q_ptr + b64 * stride_q[0] + head64 * stride_q[2] + q_start.to(tl.int64) * stride_q[1]
    do_base = do_ptr + b64 * stride_do[0] + head64 * stride_do[2] + q_start.to(tl.int64) * stride_do[1]
    k_base = k_ptr + b64 * stride_k[0] + head_k * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
    v_base = v_ptr + b64 * stride_v[0] + head_k * stride_v[2] + k_start.to(tl.int64) * stride_v[1]
    q = load_rows(q_base, m0, row_end, stride_q[1], stride_q[3], BLOCK_M, D, BLOCK_D, True, WIDE)
    do = load_rows(do_base, m0, row_end, stride_do[1], stride_do[3], BLOCK_M, DV, BLOCK_DV, True, WIDE)
    rows = m0 + tl.arange(0, BLOCK_M)
    row_in = rows < row_end
    row_base = b64 * lse_stride_b + head64 * lse_stride_h + q_start
    norm = tl.load(norm_ptr + row_base + rows, mask=row_in, other=float("inf"))
    delta = tl.load(delta_ptr + row_base + rows, mask=row_in, other=0.0)

    last = tl.minimum(m0 + BLOCK_M, row_end) - 1
    list_row = b64 * mask_stride_b + (head // MASK_GROUP) * mask_stride_h + block
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if VARIABLE:
        dq = _dq_tiling(
            dq, q, do, norm, delta, rows, m0, last, k_base, v_base, count_ptr + 2 * list_row,
            index_ptr + 2 * list_row * idx_width, k_len, offset, stride_k, stride_v, scale, softcap, window_left,
            window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BLOCK_KV, BLOCK_S, CAUSAL, WINDOW, SOFTCAP, WIDE,
            PRECISION,
        )  # fmt: skip
    else:
        list_ptr, begin, end = key_tiles(
            count_ptr + list_row, index_ptr + list_row * idx_width, m0, last, offset, k_len, window_left, window_right,
            BLOCK_KV, BLOCK_N, MASKED, CAUSAL, WINDOW,
        )  # fmt: skip
        whole = whole_tiles(list_ptr, begin, end, k_len, BLOCK_KV, BLOCK_N, MASKED, RAGGED_K)
        for i in range(begin, whole):
            n0 = tile_start(list_ptr, i, BLOCK_KV, BLOCK_N, MASKED)
            dq = _dq_step(
                dq, q, do, norm, delta, rows, m0, last, k_base, v_base, n0, k_len, offset, stride_k, stride_v,
                scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
                CAUSAL, WINDOW, SOFTCAP, False, WIDE, PRECISION,
            )  # fmt: skip
        if whole < end:
            for i in range(whole, end):
                n0 = tile_start(list_ptr, i, BLOCK_KV, BLOCK_N, MASKED)
                dq = _dq_step(
                    dq, q, do, norm, delta, rows, m0, last, k_base, v_base, n0, k_len, offset, stride_k, stride_v,
                    scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
                    CAUSAL, WINDOW, SOFTCAP, True, WIDE, PRECISION,
                )  # fmt: skip
    if COLUMNS:
        dq = dq_columns(
            dq, q, do, norm, delta, rows, k_base, v_base, column_count_ptr, column_ptr, list_row, column_width,
            offset, k_len, stride_k, stride_v, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_E, CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
        )  # fmt: skip
    if MEANS:
        means = (b64 * (tl.num_programs(1) * CHUNK // GROUP) + head_k) * num_blocks
        dq = dq_means(
            dq, q, do, norm, delta, rows, mean_k_ptr + means * D, mean_v_ptr + means * DV, bits_ptr,
            taken_ptr + b64 * taken_stride_b, list_row, num_blocks, m0, last, offset, k_len, scale, softcap,
            window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_E, BLOCK_KV, CAUSAL, WINDOW, SOFTCAP, COLUMNS,
            PRECISION,
        )  # fmt: skip

    offs_d = tl.arange(0, BLOCK_D)
    at = (q_start + rows).to(tl.int64)
    dq_ptrs = dq_ptr + b64 * stride_dq[0] + head64 * stride_dq[2] + at[:, None] * stride_dq[1]
    dq_ptrs = dq_ptrs + offs_d[None, :] * stride_dq[3]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=row_in[:, None] & (offs_d < D)[None, :])
