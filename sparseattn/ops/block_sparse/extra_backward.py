"""Gradients through extra keys (columns, means of skipped blocks): dQ by row tile, dK and dV by tile of extra keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import exp_scores, sequence_span
from sparseattn.kernels.tiles import LENGTHS, WINDOW, load_rows
from sparseattn.masks.columns import scatter_columns
from sparseattn.masks.lists import compact
from sparseattn.ops.block_sparse.extra import (
    EXTRA,
    Extra,
    call_facts,
    column_tile,
    extra_scores,
    gather_rows,
    mean_range,
    mean_tile,
)
from sparseattn.ops.block_sparse.geometry import Geometry, list_arguments

# Keys of a program: more would spill, and for wgmma's 64 ptxas warns that it serializes the products in branches.
COLUMN_KEYS = 32


@triton.jit
def _dq_step(
    dq, q, k, v, do, norm, delta, rows, first, last, weight, offset, k_len, scale, softcap, window_left, window_right,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a tile of extra keys contributes to a row tile's dQ."""
    s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_E]
    s, slope = extra_scores(
        s, rows[:, None], first[None, :], last[None, :], weight[None, :], offset, k_len, scale, softcap,
        window_left, window_right, CAUSAL, WINDOW, SOFTCAP,
    )  # fmt: skip
    p = exp_scores(s, scale, norm[:, None], PRECISION) * weight[None, :]
    ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None])
    if SOFTCAP:
        ds = ds * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def dq_columns(
    dq, q, do, norm, delta, rows, k_base, v_base, count_ptr, column_ptr, list_row, column_width, offset, k_len,
    stride_k, stride_v, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a row of blocks' columns contribute to a row tile's dQ."""
    count = tl.load(count_ptr + list_row)
    list_ptr = column_ptr + list_row * column_width
    once = tl.full([BLOCK_E], 1.0, tl.float32)
    for begin in range(0, count, BLOCK_E):
        cols = column_tile(list_ptr, begin, count, k_len, BLOCK_E)
        k = gather_rows(k_base, cols, k_len, stride_k[1], stride_k[3], D, BLOCK_D, WIDE)
        v = gather_rows(v_base, cols, k_len, stride_v[1], stride_v[3], DV, BLOCK_DV, WIDE)
        dq = _dq_step(
            dq, q, k, v, do, norm, delta, rows, cols, cols, once, offset, k_len, scale, softcap,
            window_left, window_right, CAUSAL, WINDOW, SOFTCAP, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit
def dq_means(
    dq, q, do, norm, delta, rows, k_base, v_base, bits_ptr, taken_ptr, list_row, num_blocks, first_token, last_token,
    offset, k_len, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_KV: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the means of skipped blocks contribute to a row tile's dQ."""
    begin, end = mean_range(
        first_token, last_token, offset, k_len, window_left, window_right, BLOCK_E, BLOCK_KV, CAUSAL, WINDOW
    )
    for j in range(begin, end, BLOCK_E):
        first, last, weight = mean_tile(bits_ptr, taken_ptr, list_row, j, num_blocks, k_len, BLOCK_E, BLOCK_KV, COLUMNS)
        k = load_rows(k_base, j, num_blocks, D, 1, BLOCK_E, D, BLOCK_D, True, False)
        v = load_rows(v_base, j, num_blocks, DV, 1, BLOCK_E, DV, BLOCK_DV, True, False)
        dq = _dq_step(
            dq, q, k, v, do, norm, delta, rows, first, last, weight, offset, k_len, scale, softcap,
            window_left, window_right, CAUSAL, WINDOW, SOFTCAP, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q_base, do_base, norm_ptr, delta_ptr, m0, q_len, first, last, weight, k_len, offset,
    stride_q, stride_do, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the query rows ``m0 .. m0 + BLOCK_M`` of one head contribute to dK and dV of a tile of extra keys."""
    m0 += tl.full((), 0, tl.int32)  # the interpreter counts loops in plain ints
    rows = m0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_base, m0, q_len, stride_q[1], stride_q[3], BLOCK_M, D, BLOCK_D, True, WIDE)
    do = load_rows(do_base, m0, q_len, stride_do[1], stride_do[3], BLOCK_M, DV, BLOCK_DV, True, WIDE)
    norm = tl.load(norm_ptr + rows, mask=rows < q_len, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=rows < q_len, other=0.0)
    s = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    s, slope = extra_scores(
        s, rows[None, :], first[:, None], last[:, None], weight[:, None], offset, k_len, scale, softcap,
        window_left, window_right, CAUSAL, WINDOW, SOFTCAP,
    )  # fmt: skip
    p = exp_scores(s, scale, norm[None, :], PRECISION) * weight[:, None]
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - delta[None, :])
    if SOFTCAP:
        ds = ds * slope
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _first_at_least(list_ptr, count, least, search_steps):
    """Position of the first entry of each ascending list that is at least ``least``; binary searches side by side."""
    low = count * 0
    high = count
    for _ in range(search_steps):
        middle = (low + high) // 2
        before = tl.load(list_ptr + middle, mask=middle < high, other=2147483647) < least
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _column_member(list_ptr, begin, count, cols, TILE: tl.constexpr):
    """1 for the tile's columns that a list holds among its ``count`` entries from ``begin`` on, 0 for others."""
    offs = tl.arange(0, TILE)
    entry = tl.load(list_ptr + begin + offs, mask=offs < count, other=-1)
    return tl.max((entry[None, :] == cols[:, None]).to(tl.float32), 1)


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, *EXTRA, "q_blocks", "key_width", "key_stride_b", "key_stride_h",
                               "search_steps"])  # fmt: skip
def column_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    column_count_ptr, column_ptr, key_count_ptr, key_ptr, column_width, q_blocks, key_width, key_stride_b, key_stride_h,
    search_steps, stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, max_q, max_k, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, MASK_GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: adds to dK and dV of ``BLOCK_N`` keys what they receive as columns.

    Grid (key tiles, KV heads, batch). ``key`` lists, ascending, every key that is a column anywhere in the head's
    group, so the columns of one row that lie between a tile's first and last key are all among the tile's. Rows of
    blocks are searched for them ``ROWS`` at a time; those without any cost nothing more. A key belongs to one program:
    the float32 sums are read, added to and written without atomics.
    """
    tile = tl.program_id(0)
    head_k = tl.program_id(1)
    b = tl.program_id(2)
    b64 = b.to(tl.int64)
    key_row = b64 * key_stride_b + head_k * key_stride_h
    keys = tl.load(key_count_ptr + key_row)
    u0 = tile * BLOCK_N
    if u0 >= keys:
        return
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    key_list = key_ptr + key_row * key_width
    cols = column_tile(key_list, u0, keys, k_len, BLOCK_N)
    smallest = tl.load(key_list + u0)
    largest = tl.load(key_list + tl.minimum(u0 + BLOCK_N, keys) - 1)

    head64 = head_k.to(tl.int64)
    k_base = k_ptr + b64 * stride_k[0] + head64 * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
    v_base = v_ptr + b64 * stride_v[0] + head64 * stride_v[2] + k_start.to(tl.int64) * stride_v[1]
    k = gather_rows(k_base, cols, k_len, stride_k[1], stride_k[3], D, BLOCK_D, WIDE)
    v = gather_rows(v_base, cols, k_len, stride_v[1], stride_v[3], DV, BLOCK_DV, WIDE)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    offs_r = tl.arange(0, ROWS)
    for sub_head in range(GROUP):
        head_q = (head_k * GROUP + sub_head).to(tl.int64)
        q_base = q_ptr + b64 * stride_q[0] + head_q * stride_q[2] + q_start.to(tl.int64) * stride_q[1]
        do_base = do_ptr + b64 * stride_do[0] + head_q * stride_do[2] + q_start.to(tl.int64) * stride_do[1]
        row_base = b64 * lse_stride_b + head_q * lse_stride_h + q_start
        first_row = b64 * mask_stride_b + (head_q // MASK_GROUP) * mask_stride_h
        for r0 in range(0, tl.cdiv(q_len, BLOCK_Q), ROWS):
            r = r0 + offs_r
            count = tl.load(column_count_ptr + first_row + r, mask=r < q_blocks, other=0)
            lists = column_ptr + (first_row + r) * column_width
            low = _first_at_least(lists, count, smallest, search_steps)
            found = _first_at_least(lists, count, largest + 1, search_steps) - low
            if tl.max(found, 0) > 0:
                for i in range(0, ROWS):
                    n = tl.sum(tl.where(offs_r == i, found, 0), 0)
                    if n > 0:
                        begin = tl.sum(tl.where(offs_r == i, low, 0), 0)
                        list_ptr = column_ptr + (first_row + r0 + i) * column_width
                        weight = _column_member(list_ptr, begin, n, cols, BLOCK_N)
                        end = tl.minimum((r0 + i + 1) * BLOCK_Q, q_len)
                        for m0 in range((r0 + i) * BLOCK_Q, end, BLOCK_M):
                            dk, dv = _dkdv_step(
                                dk, dv, k, v, q_base, do_base, norm_ptr + row_base, delta_ptr + row_base, m0, q_len,
                                cols, cols, weight, k_len, offset, stride_q, stride_do, scale, softcap,
                                window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M,
                                CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
                            )  # fmt: skip

    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    at = (k_start + cols).to(tl.int64)[:, None]
    in_k = (cols < k_len)[:, None] & (offs_d < D)[None, :]
    in_v = (cols < k_len)[:, None] & (offs_dv < DV)[None, :]
    dk_base = dk_ptr + b64 * stride_dk[0] + head64 * stride_dk[2]
    dv_base = dv_ptr + b64 * stride_dv[0] + head64 * stride_dv[2]
    dk_ptrs = dk_base + at * stride_dk[1] + offs_d[None, :] * stride_dk[3]
    dv_ptrs = dv_base + at * stride_dv[1] + offs_dv[None, :] * stride_dv[3]
    tl.store(dk_ptrs, tl.load(dk_ptrs, mask=in_k, other=0.0) + dk * scale, mask=in_k)
    tl.store(dv_ptrs, tl.load(dv_ptrs, mask=in_v, other=0.0) + dv, mask=in_v)


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, *EXTRA])
def mean_dkdv_kernel(
    q_ptr, mean_k_ptr, mean_v_ptr, do_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, bits_ptr, taken_ptr, num_blocks, taken_stride_b,
    stride_q, stride_do, lse_stride_b, lse_stride_h, mask_stride_b, mask_stride_h, max_q, max_k,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    GROUP: tl.constexpr, MASK_GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: gradients of ``BLOCK_N`` mean keys and values of one KV head, over every query head of its group.

    Grid (tiles of blocks, KV heads, batch). Writes ``dk`` float32 [batch, KV heads, blocks, D] and ``dv`` likewise.
    """
    j0 = tl.program_id(0) * BLOCK_N
    head_k = tl.program_id(1)
    b = tl.program_id(2)
    b64 = b.to(tl.int64)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    _, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    rows = (b64 * tl.num_programs(1) + head_k) * num_blocks
    k = load_rows(mean_k_ptr + rows * D, j0, num_blocks, D, 1, BLOCK_N, D, BLOCK_D, True, False)
    v = load_rows(mean_v_ptr + rows * DV, j0, num_blocks, DV, 1, BLOCK_N, DV, BLOCK_DV, True, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    row_lo = b * 0
    row_hi = q_len
    if CAUSAL:  # a row sees the tile's first block whole from its last token on
        row_lo = tl.maximum(tl.minimum((j0 + 1) * BLOCK_KV, k_len) - 1 - offset, row_lo)
    if WINDOW:
        row_hi = tl.where(window_left < 0, row_hi, tl.minimum(row_hi, (j0 + BLOCK_N) * BLOCK_KV - offset + window_left))
    for sub_head in range(GROUP):
        head_q = (head_k * GROUP + sub_head).to(tl.int64)
        q_base = q_ptr + b64 * stride_q[0] + head_q * stride_q[2] + q_start.to(tl.int64) * stride_q[1]
        do_base = do_ptr + b64 * stride_do[0] + head_q * stride_do[2] + q_start.to(tl.int64) * stride_do[1]
        row_base = b64 * lse_stride_b + head_q * lse_stride_h + q_start
        first_row = b64 * mask_stride_b + (head_q // MASK_GROUP) * mask_stride_h
        for m0 in range(row_lo // BLOCK_M * BLOCK_M, row_hi, BLOCK_M):
            first, last, weight = mean_tile(
                bits_ptr, taken_ptr + b64 * taken_stride_b, first_row + m0 // BLOCK_Q, j0, num_blocks, k_len,
                BLOCK_N, BLOCK_KV, COLUMNS,
            )  # fmt: skip
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_base, do_base, norm_ptr + row_base, delta_ptr + row_base, m0, q_len, first, last,
                weight, k_len, offset, stride_q, stride_do, scale, softcap, window_left, window_right,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
            )  # fmt: skip
    j = j0 + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    dk_ptrs = dk_ptr + (rows + j)[:, None] * D + offs_d[None, :]
    dv_ptrs = dv_ptr + (rows + j)[:, None] * DV + offs_dv[None, :]
    tl.store(dk_ptrs, dk * scale, mask=(j < num_blocks)[:, None] & (offs_d < D)[None, :])
    tl.store(dv_ptrs, dv, mask=(j < num_blocks)[:, None] & (offs_dv < DV)[None, :])


@triton.jit(do_not_specialize=["max_k", "num_blocks"])
def spread_kernel(
    sum_ptr, mean_grad_ptr, k_start_ptr, k_end_ptr, stride_dk, max_k, num_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr, ROWS: tl.constexpr, RAGGED_K: tl.constexpr,
):  # fmt: skip
    """One program: adds to ``ROWS`` float32 gradients their share of the gradient of their block's mean.

    Grid (parts of blocks, KV heads, batch).
    """
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2)
    b64 = b.to(tl.int64)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    j = first // BLOCK_KV
    count = tl.minimum(k_len - j * BLOCK_KV, BLOCK_KV)
    offs_d = tl.arange(0, BLOCK_D)
    at = (b64 * tl.num_programs(1) + head) * num_blocks + j
    share = tl.load(mean_grad_ptr + at * D + offs_d, mask=offs_d < tl.where(count > 0, D, 0), other=0.0)
    share = share / tl.maximum(count, 1).to(tl.float32)
    token = first + tl.arange(0, ROWS)
    row = (k_start + token).to(tl.int64)[:, None]
    ptrs = sum_ptr + b64 * stride_dk[0] + head * stride_dk[2] + row * stride_dk[1] + offs_d[None, :] * stride_dk[3]
    inside = (token < k_len)[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + share[None, :], mask=inside)


def _column_keys(g: Geometry, heads_k: int) -> tuple[Tensor, Tensor, int, int]:
    """Every key that is a column in some row, one list a KV head (or one for all): counts, lists, their strides."""
    columns = g.column_indices
    assert columns is not None
    heads = 1 if columns.shape[1] == 1 else heads_k
    rows = columns.reshape(columns.shape[0], heads, -1)
    counts, keys = compact(scatter_columns(rows, g.max_k), min(g.max_k, rows.shape[-1]))
    return counts, keys, 0 if columns.shape[0] == 1 else heads, 0 if heads == 1 else 1


def add_extra_gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    extra: Extra,
    g: Geometry,
) -> None:
    """Add to the float32 sums ``dk`` and ``dv`` what keys and values receive as columns and through means.

    Args:
        do: Gradient of the output.
        q: Queries.
        k: Keys.
        v: Values.
        norm: Log of each row's full denominator, float32, shaped like the LSE.
        delta: Each row's ``sum(o * do)``, less the gradient of its LSE; likewise.
        dk: float32 sums, changed.
        dv: float32 sums, changed.
        extra: As ``prepare_extra`` returned it.
        g: The call.
    """
    heads_k = k.shape[-2]
    block_m = min(64, g.block_q & -g.block_q) if q.element_size() == 2 else min(32, g.block_q & -g.block_q)
    list_strides = list_arguments(g.kv_num_blocks, g.kv_indices, q)[2:4]
    numbers = (
        *g.lse_strides(q), *list_strides, g.max_q, g.max_k, g.scale, g.softcap, g.window_left, g.window_right,
    )  # fmt: skip
    spans = g.spans(norm)
    facts = call_facts(q, k, v, g, do)
    common = facts | {"BLOCK_M": block_m, "BLOCK_Q": g.block_q, **LAUNCH}
    common |= {"num_warps": 8 if q.element_size() == 4 or block_m == 64 else 4, "num_stages": 1}
    if g.column_indices is not None:
        key_counts, keys, key_b, key_h = _column_keys(g, heads_k)
        width = keys.shape[-1]
        column_dkdv_kernel[(triton.cdiv(width, COLUMN_KEYS), heads_k, g.batch)](
            q, k, v, do, norm, delta, dk, dv, *spans, extra.column_counts, extra.columns, key_counts, keys,
            extra.column_width, g.column_indices.shape[2], width, key_b, key_h, extra.column_width.bit_length(),
            *(g.strides(t) for t in (q, k, v, do, dk, dv)), *numbers, BLOCK_N=COLUMN_KEYS, ROWS=64, **common,
        )  # fmt: skip
    if g.mean_correction:
        shape = (g.batch, heads_k, extra.num_blocks)
        mean_dk, mean_dv = (torch.empty((*shape, t.shape[-1]), dtype=torch.float32, device=k.device) for t in (k, v))
        block_n = 16 if extra.num_blocks <= 2048 else 32
        mean_dkdv_kernel[(triton.cdiv(extra.num_blocks, block_n), heads_k, g.batch)](
            q, extra.mean_k, extra.mean_v, do, norm, delta, mean_dk, mean_dv, *spans, extra.bits, extra.taken,
            extra.num_blocks, extra.taken_stride_b, g.strides(q), g.strides(do), *numbers, BLOCK_N=block_n,
            BLOCK_KV=g.block_kv, COLUMNS=g.column_indices is not None, **common,
        )  # fmt: skip
        rows = min(32, g.block_kv & -g.block_kv)
        for sums, grad, padded in ((dk, mean_dk, "BLOCK_D"), (dv, mean_dv, "BLOCK_DV")):
            spread_kernel[(triton.cdiv(g.max_k, rows), heads_k, g.batch)](
                sums, grad, *spans[2:], g.strides(sums), g.max_k, extra.num_blocks,
                D=grad.shape[-1], BLOCK_D=facts[padded], BLOCK_KV=g.block_kv, ROWS=rows, RAGGED_K=facts["RAGGED_K"],
                num_warps=4, **LAUNCH,
            )  # fmt: skip
