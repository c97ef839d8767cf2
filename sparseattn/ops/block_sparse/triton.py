"""Portable Triton kernels (Ampere and newer): forward, and a deterministic two-kernel backward.

Every kernel walks block lists when the call has a mask and a closed-form key range when it has none, so dense
attention is the same code. Nothing that grows with a prompt is a constexpr or specialised on: a new length, batch or
density reuses the compiled kernel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels.attention import (
    LOG2E,
    cap_scores,
    full_range,
    key_range,
    natural_lse,
    online_softmax,
    reversed_schedule,
    schedule,
    sequence_span,
    visible,
)
from sparseattn.ops.block_sparse.geometry import Geometry

# Arguments that change with the prompt: specialising on their divisibility would compile a kernel per length.
_LENGTHS = ["max_q", "max_k", "mask_stride_b", "mask_stride_h", "idx_width", "lse_stride_b", "lse_stride_h"]
_WINDOW = ["window_left", "window_right"]
_SPLITS = ["num_splits", "split_stride_o", "split_stride_lse"]


@triton.jit
def _list_length(count_ptr, list_ptr):
    """Entries of a block list.

    The first entry is asked for together with the count, so that the list travels from memory before its length is
    known; its sign, which only an empty list's undefined entry can set, keeps the load alive and the length at 0.
    """
    return tl.minimum(tl.load(count_ptr), tl.load(list_ptr) | 0x7FFFFFFF)


@triton.jit
def _tile_start(list_ptr, i, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """First row of the i-th tile: of a block list whose blocks hold ``BLOCK // TILE`` tiles each, or of all rows."""
    if MASKED:
        first = tl.load(list_ptr + i // (BLOCK // TILE)) * BLOCK + (i % (BLOCK // TILE)) * TILE
    else:
        first = i * TILE
    return first


@triton.jit
def _rows(
    base, first, count, stride_s, stride_d,
    TILE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Load rows ``first .. first + TILE`` of a [rows, D] matrix, zero past ``D`` columns and, if asked, ``count`` rows."""
    offs = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base + first.to(tl.int64) * stride_s + offs[:, None] * stride_s + offs_d[None, :] * stride_d
    if BOUNDED:
        rows = tl.load(ptrs, mask=(first + offs < count)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        rows = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    else:
        rows = tl.load(ptrs)
    return rows


@triton.jit
def _whole_tiles(
    list_ptr, begin, end, length, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr
):
    """Where in ``begin .. end`` the tiles begin that may reach past row ``length`` and need bounded loads.

    Lists ascend, so only the last block of an even batch can be cut short; a ragged batch bounds every load.
    """
    if RAGGED:
        whole = begin
    elif MASKED:
        whole = end
        if (length % TILE != 0) & (end > begin):
            entry = (end - 1) // (BLOCK // TILE)
            first = tl.load(list_ptr + entry) * BLOCK
            whole = entry * (BLOCK // TILE) + tl.maximum(length - first, 0) // TILE
            whole = tl.maximum(tl.minimum(whole, end), begin)
    else:
        whole = tl.maximum(tl.minimum(length // TILE, end), begin)
    return whole


# ----------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _attend(
    acc, m_i, l_i, q, k_base, v_base, n0, token, offset, k_len, full_lo, full_hi, stride_k, stride_v,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys ``n0 .. n0 + BLOCK_N`` into the running softmax of a tile of query rows."""
    k = _rows(k_base, n0, k_len, stride_k[1], stride_k[3], BLOCK_N, D, BLOCK_D, BOUNDED)
    s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if SOFTCAP:
        s = cap_scores(s, scale, softcap)
    if CAUSAL or WINDOW or BOUNDED:
        if (n0 < full_lo) | (n0 + BLOCK_N > full_hi):
            cols = n0 + tl.arange(0, BLOCK_N)
            seen = visible(token[:, None], cols[None, :], offset, k_len, window_left, window_right, CAUSAL, WINDOW, BOUNDED)
            s = tl.where(seen, s, float("-inf"))
    p, alpha, m_i, l_i = online_softmax(s, m_i, l_i, scale * LOG2E)
    acc = acc * alpha[:, None]
    v = _rows(v_base, n0, k_len, stride_v[1], stride_v[3], BLOCK_N, DV, BLOCK_DV, BOUNDED)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=[*_LENGTHS, *_WINDOW, *_SPLITS])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr, count_ptr, index_ptr,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    stride_q, stride_k, stride_v, stride_o, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, idx_width, max_q, max_k, num_splits, split_stride_o, split_stride_lse,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    GROUP: tl.constexpr, PACK: tl.constexpr, MASK_GROUP: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` query rows of one head against their key blocks.

    Grid (row tiles * heads, batch * splits). ``PACK`` > 1 packs a GQA group's heads into the rows of a tile (row =
    token * PACK + head within the group) and the head axis counts KV heads; ``SPLIT`` gives each program a share of
    the key tiles and writes float32 partial results for ``_combine_kernel``.
    """
    tile, head = reversed_schedule(tl.program_id(0), tl.cdiv(max_q * PACK, BLOCK_M), CHUNK)
    b = tl.program_id(1) // num_splits
    split = tl.program_id(1) % num_splits
    b64 = b.to(tl.int64)
    head_q = head * PACK
    head_k = head_q // GROUP
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    m0 = tile * BLOCK_M
    if m0 >= q_len * PACK:
        return

    # The list is asked for before q is: both then travel from memory at the same time.
    first = m0 // PACK
    last = tl.minimum((m0 + BLOCK_M - 1) // PACK, q_len - 1)
    full_lo, full_hi = full_range(first, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
    if MASKED:
        list_row = b64 * mask_stride_b + (head // MASK_GROUP) * mask_stride_h + m0 // BLOCK_Q
        list_ptr = index_ptr + list_row * idx_width
        begin = tl.full((), 0, tl.int32)
        end = _list_length(count_ptr + list_row, list_ptr) * (BLOCK_KV // BLOCK_N)
    else:
        key_lo, key_hi = key_range(first, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
        begin = key_lo // BLOCK_N
        end = tl.cdiv(key_hi, BLOCK_N)
        list_ptr = index_ptr
    if SPLIT:
        share = tl.cdiv(tl.maximum(end - begin, 0), num_splits)
        begin = begin + split * share
        end = tl.minimum(begin + share, end)


    row = m0 + tl.arange(0, BLOCK_M)
    token = row // PACK
    sub_head = row % PACK
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_in = token < q_len
    q_row = (q_start + token).to(tl.int64) * stride_q[1] + sub_head * stride_q[2]
    q_in = row_in[:, None] & (offs_d < D)[None, :]
    q_base = q_ptr + b64 * stride_q[0] + head_q * stride_q[2]
    q = tl.load(q_base + q_row[:, None] + offs_d[None, :] * stride_q[3], mask=q_in, other=0.0)  # [BLOCK_M, BLOCK_D]
    k_base = k_ptr + b64 * stride_k[0] + head_k.to(tl.int64) * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
    v_base = v_ptr + b64 * stride_v[0] + head_k.to(tl.int64) * stride_v[2] + k_start.to(tl.int64) * stride_v[1]

    whole = _whole_tiles(list_ptr, begin, end, k_len, BLOCK_KV, BLOCK_N, MASKED, RAGGED_K)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in range(begin, whole):
        n0 = _tile_start(list_ptr, i, BLOCK_KV, BLOCK_N, MASKED)
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, k_base, v_base, n0, token, offset, k_len, full_lo, full_hi, stride_k, stride_v,
            scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            CAUSAL, WINDOW, SOFTCAP, False, PRECISION,
        )  # fmt: skip
    for i in range(whole, end):
        n0 = _tile_start(list_ptr, i, BLOCK_KV, BLOCK_N, MASKED)
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, k_base, v_base, n0, token, offset, k_len, full_lo, full_hi, stride_k, stride_v,
            scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            CAUSAL, WINDOW, SOFTCAP, True, PRECISION,
        )  # fmt: skip

    lse = natural_lse(m_i, l_i)
    if SINKS:
        sink = tl.load(sinks_ptr + head_q + sub_head).to(tl.float32)
        l_i += tl.where(l_i > 0, tl.exp2(sink * LOG2E - m_i), 0.0)
    acc = acc * (1.0 / tl.where(l_i > 0, l_i, 1.0))[:, None]
    o_row = (q_start + token).to(tl.int64) * stride_o[1] + sub_head * stride_o[2]
    o_base = o_ptr + b64 * stride_o[0] + head_q * stride_o[2] + split.to(tl.int64) * split_stride_o
    o_in = row_in[:, None] & (offs_dv < DV)[None, :]
    tl.store(o_base + o_row[:, None] + offs_dv[None, :] * stride_o[3], acc.to(o_ptr.dtype.element_ty), mask=o_in)
    lse_base = lse_ptr + b64 * lse_stride_b + split.to(tl.int64) * split_stride_lse
    tl.store(lse_base + (head_q + sub_head).to(tl.int64) * lse_stride_h + q_start + token, lse, mask=row_in)


@triton.jit(do_not_specialize=["rows", "heads", "num_splits", "tokens"])
def _combine_kernel(
    o_part_ptr, lse_part_ptr, o_ptr, lse_ptr, sinks_ptr, rows, heads, tokens, num_splits, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program: one (batch, token, head) row; merges its partial results by their LSE.

    Grid (rows,), rows ordered [batch, token, head] like ``o``. ``o_part`` float32 [splits, rows, DV], ``lse_part``
    [splits, batch, heads, tokens].
    """
    row = tl.program_id(0).to(tl.int64)
    head = row % heads
    token = (row // heads) % tokens
    lse_at = ((row // heads // tokens) * heads + head) * tokens + token
    offs = tl.arange(0, BLOCK_DV)
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(num_splits):
        lse = tl.load(lse_part_ptr + split * rows.to(tl.int64) + lse_at) * LOG2E
        m_new = tl.maximum(m_i, lse)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(lse - m_safe)
        alpha = tl.exp2(m_i - m_safe)
        part = tl.load(o_part_ptr + (split * rows.to(tl.int64) + row) * DV + offs, mask=offs < DV, other=0.0)
        acc = acc * alpha + part * weight
        l_i = l_i * alpha + weight
        m_i = m_new
    lse = natural_lse(m_i, l_i)
    if SINKS:
        l_i += tl.where(l_i > 0, tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2E - m_i), 0.0)
    acc = acc / tl.where(l_i > 0, l_i, 1.0)
    tl.store(o_ptr + row * DV + offs, acc.to(o_ptr.dtype.element_ty), mask=offs < DV)
    tl.store(lse_ptr + lse_at, lse)


# ---------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["max_q", "lse_stride_b", "lse_stride_h"])
def _preprocess_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, norm_ptr, delta_ptr, dsink_ptr, q_start_ptr, q_end_ptr,
    stride_o, stride_do, lse_stride_b, lse_stride_h, max_q,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, SINKS: tl.constexpr, DLSE: tl.constexpr,
    RAGGED_Q: tl.constexpr,
):  # fmt: skip
    """One program: per-row numbers of ``BLOCK_M`` query rows that both gradient kernels need.

    Grid (row tiles, heads, batch). Writes ``norm`` = log2 of the full denominator (+inf for a row that saw nothing, so
    that its probabilities are 0), ``delta`` = rowsum(o * do) less the LSE's own gradient, and each row's share of the
    sink gradient.
    """
    b = tl.program_id(2)
    head = tl.program_id(1)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_in = row < q_len
    offs = tl.arange(0, BLOCK_DV)
    at = (q_start + row).to(tl.int64)
    inside = row_in[:, None] & (offs < DV)[None, :]
    b64 = b.to(tl.int64)
    o_base = o_ptr + b64 * stride_o[0] + head * stride_o[2]
    do_base = do_ptr + b64 * stride_do[0] + head * stride_do[2]
    o = tl.load(o_base + at[:, None] * stride_o[1] + offs[None, :] * stride_o[3], mask=inside, other=0.0)
    do = tl.load(do_base + at[:, None] * stride_do[1] + offs[None, :] * stride_do[3], mask=inside, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse_at = b64 * lse_stride_b + head.to(tl.int64) * lse_stride_h + at
    lse = tl.load(lse_ptr + lse_at, mask=row_in, other=float("-inf"))
    empty = lse == float("-inf")
    lse = tl.where(empty, 0.0, lse)
    norm = lse
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        top = tl.maximum(lse, sink)
        norm = top + tl.log(tl.exp(lse - top) + tl.exp(sink - top))
        share = tl.where(empty, 0.0, -tl.exp(sink - norm) * delta)
        tl.store(dsink_ptr + lse_at, share, mask=row_in)
    if DLSE:
        dlse = tl.load(dlse_ptr + lse_at, mask=row_in, other=0.0)
        delta -= tl.where(empty, 0.0, dlse * tl.exp(norm - lse))
    tl.store(norm_ptr + lse_at, tl.where(empty, float("inf"), norm * LOG2E), mask=row_in)
    tl.store(delta_ptr + lse_at, delta, mask=row_in)


@triton.jit
def _probabilities(
    s, norm, rows, cols, m0, m1, n0, n1, offset, k_len, scale, softcap, window_left, window_right,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr,
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
    p = tl.exp2(s * (scale * LOG2E) - norm)
    if CAUSAL or WINDOW or BOUNDED:
        lo, hi = full_range(m0, m1, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
        if (n0 < lo) | (n1 > hi):
            seen = visible(rows, cols, offset, k_len, window_left, window_right, CAUSAL, WINDOW, BOUNDED)
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
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the query rows ``m0 .. m0 + BLOCK_M`` of one head contribute to a key tile's dK and dV.

    Keys past the end get garbage that is never stored; query rows past the end have norm = +inf, so probability 0.
    """
    rows = m0 + tl.arange(0, BLOCK_M)
    q = _rows(q_base, m0, q_len, stride_q[1], stride_q[3], BLOCK_M, D, BLOCK_D, BOUNDED)
    do = _rows(do_base, m0, q_len, stride_do[1], stride_do[3], BLOCK_M, DV, BLOCK_DV, BOUNDED)
    norm, delta = _row_numbers(norm_ptr, delta_ptr, rows, q_len, BLOCK_M, BOUNDED)
    s = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p, slope = _probabilities(
        s, norm[None, :], rows[None, :], (n0 + tl.arange(0, BLOCK_N))[:, None], m0, m0 + BLOCK_M - 1, n0, n0 + BLOCK_N,
        offset, k_len, scale, softcap, window_left, window_right, CAUSAL, WINDOW, SOFTCAP, False,
    )  # fmt: skip
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, do.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds = ds * slope
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*_LENGTHS, *_WINDOW])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr, count_ptr, index_ptr,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, idx_width, max_q, max_k, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    GROUP: tl.constexpr, MASK_GROUP: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of ``BLOCK_N`` keys of one KV head, over every query head of its group.

    Grid (key tiles * KV heads, batch). Walks the transposed lists (which query blocks attend this key block); nothing
    is accumulated across programs, so the result is deterministic.
    """
    tile, head_k = schedule(tl.program_id(0), tl.cdiv(max_k, BLOCK_N), CHUNK)
    b = tl.program_id(1)
    b64 = b.to(tl.int64)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    n0 = tile * BLOCK_N
    if n0 >= k_len:
        return

    k_base = k_ptr + b64 * stride_k[0] + head_k.to(tl.int64) * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
    v_base = v_ptr + b64 * stride_v[0] + head_k.to(tl.int64) * stride_v[2] + k_start.to(tl.int64) * stride_v[1]
    k = _rows(k_base, n0, k_len, stride_k[1], stride_k[3], BLOCK_N, D, BLOCK_D, True)
    v = _rows(v_base, n0, k_len, stride_v[1], stride_v[3], BLOCK_N, DV, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for sub_head in range(GROUP):
        head_q = head_k * GROUP + sub_head
        head64 = head_q.to(tl.int64)
        if MASKED:
            list_row = b64 * mask_stride_b + (head_q // MASK_GROUP) * mask_stride_h + n0 // BLOCK_KV
            list_ptr = index_ptr + list_row * idx_width
            begin = tl.full((), 0, tl.int32)
            end = _list_length(count_ptr + list_row, list_ptr) * (BLOCK_Q // BLOCK_M)
        else:
            row_lo = tl.full((), 0, tl.int32)
            row_hi = q_len
            if CAUSAL:
                row_lo = tl.maximum(n0 - offset, row_lo)
            if WINDOW:
                row_lo = tl.where(window_right < 0, row_lo, tl.maximum(row_lo, n0 - offset - window_right))
                last_row = n0 + BLOCK_N - offset + window_left
                row_hi = tl.where(window_left < 0, row_hi, tl.minimum(row_hi, last_row))
            begin = row_lo // BLOCK_M
            end = tl.cdiv(tl.maximum(row_hi, 0), BLOCK_M)
            list_ptr = index_ptr
        q_base = q_ptr + b64 * stride_q[0] + head64 * stride_q[2] + q_start.to(tl.int64) * stride_q[1]
        do_base = do_ptr + b64 * stride_do[0] + head64 * stride_do[2] + q_start.to(tl.int64) * stride_do[1]
        row_base = b64 * lse_stride_b + head64 * lse_stride_h + q_start
        whole = _whole_tiles(list_ptr, begin, end, q_len, BLOCK_Q, BLOCK_M, MASKED, RAGGED_Q)
        for i in range(begin, whole):
            m0 = _tile_start(list_ptr, i, BLOCK_Q, BLOCK_M, MASKED)
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_base, do_base, norm_ptr + row_base, delta_ptr + row_base, m0, n0, q_len, k_len, offset,
                stride_q, stride_do, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, False, PRECISION,
            )  # fmt: skip
        for i in range(whole, end):
            m0 = _tile_start(list_ptr, i, BLOCK_Q, BLOCK_M, MASKED)
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_base, do_base, norm_ptr + row_base, delta_ptr + row_base, m0, n0, q_len, k_len, offset,
                stride_q, stride_do, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True, PRECISION,
            )  # fmt: skip

    cols = n0 + tl.arange(0, BLOCK_N)
    offs = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    at = (k_start + n0).to(tl.int64)
    in_k = (cols < k_len)[:, None] & (offs_d < D)[None, :]
    in_v = (cols < k_len)[:, None] & (offs_dv < DV)[None, :]
    dk_base = dk_ptr + b64 * stride_dk[0] + head_k * stride_dk[2] + at * stride_dk[1]
    dv_base = dv_ptr + b64 * stride_dv[0] + head_k * stride_dv[2] + at * stride_dv[1]
    dk_ptrs = dk_base + offs[:, None] * stride_dk[1] + offs_d[None, :] * stride_dk[3]
    dv_ptrs = dv_base + offs[:, None] * stride_dv[1] + offs_dv[None, :] * stride_dv[3]
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_k)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=in_v)


@triton.jit
def _dq_step(
    dq, q, do, norm, delta, rows, m0, last, k_base, v_base, n0, k_len, offset, stride_k, stride_v,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys ``n0 .. n0 + BLOCK_N`` contribute to a row tile's dQ."""
    k = _rows(k_base, n0, k_len, stride_k[1], stride_k[3], BLOCK_N, D, BLOCK_D, BOUNDED)
    v = _rows(v_base, n0, k_len, stride_v[1], stride_v[3], BLOCK_N, DV, BLOCK_DV, BOUNDED)
    s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    cols = n0 + tl.arange(0, BLOCK_N)
    p, slope = _probabilities(
        s, norm[:, None], rows[:, None], cols[None, :], m0, last, n0, n0 + BLOCK_N,
        offset, k_len, scale, softcap, window_left, window_right, CAUSAL, WINDOW, SOFTCAP, BOUNDED,
    )  # fmt: skip
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds = ds * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=[*_LENGTHS, *_WINDOW])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, norm_ptr, delta_ptr, dq_ptr, count_ptr, index_ptr,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_dq, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, idx_width, max_q, max_k, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    GROUP: tl.constexpr, MASK_GROUP: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dQ of ``BLOCK_M`` query rows of one head, over the key blocks they attend.

    Grid (row tiles * query heads, batch).
    """
    tile, head = reversed_schedule(tl.program_id(0), tl.cdiv(max_q, BLOCK_M), CHUNK)
    b = tl.program_id(1)
    b64 = b.to(tl.int64)
    head_k = (head // GROUP).to(tl.int64)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    m0 = tile * BLOCK_M
    if m0 >= q_len:
        return

    head64 = head.to(tl.int64)
    q_base = q_ptr + b64 * stride_q[0] + head64 * stride_q[2] + q_start.to(tl.int64) * stride_q[1]
    do_base = do_ptr + b64 * stride_do[0] + head64 * stride_do[2] + q_start.to(tl.int64) * stride_do[1]
    k_base = k_ptr + b64 * stride_k[0] + head_k * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
    v_base = v_ptr + b64 * stride_v[0] + head_k * stride_v[2] + k_start.to(tl.int64) * stride_v[1]
    q = _rows(q_base, m0, q_len, stride_q[1], stride_q[3], BLOCK_M, D, BLOCK_D, True)
    do = _rows(do_base, m0, q_len, stride_do[1], stride_do[3], BLOCK_M, DV, BLOCK_DV, True)
    rows = m0 + tl.arange(0, BLOCK_M)
    row_in = rows < q_len
    row_base = b64 * lse_stride_b + head64 * lse_stride_h + q_start
    norm = tl.load(norm_ptr + row_base + rows, mask=row_in, other=float("inf"))
    delta = tl.load(delta_ptr + row_base + rows, mask=row_in, other=0.0)

    last = tl.minimum(m0 + BLOCK_M, q_len) - 1
    if MASKED:
        list_row = b64 * mask_stride_b + (head // MASK_GROUP) * mask_stride_h + m0 // BLOCK_Q
        list_ptr = index_ptr + list_row * idx_width
        begin = tl.full((), 0, tl.int32)
        end = _list_length(count_ptr + list_row, list_ptr) * (BLOCK_KV // BLOCK_N)
    else:
        key_lo, key_hi = key_range(m0, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
        begin = key_lo // BLOCK_N
        end = tl.cdiv(key_hi, BLOCK_N)
        list_ptr = index_ptr
    whole = _whole_tiles(list_ptr, begin, end, k_len, BLOCK_KV, BLOCK_N, MASKED, RAGGED_K)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(begin, whole):
        n0 = _tile_start(list_ptr, i, BLOCK_KV, BLOCK_N, MASKED)
        dq = _dq_step(
            dq, q, do, norm, delta, rows, m0, last, k_base, v_base, n0, k_len, offset, stride_k, stride_v,
            scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            CAUSAL, WINDOW, SOFTCAP, False, PRECISION,
        )  # fmt: skip
    for i in range(whole, end):
        n0 = _tile_start(list_ptr, i, BLOCK_KV, BLOCK_N, MASKED)
        dq = _dq_step(
            dq, q, do, norm, delta, rows, m0, last, k_base, v_base, n0, k_len, offset, stride_k, stride_v,
            scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            CAUSAL, WINDOW, SOFTCAP, True, PRECISION,
        )  # fmt: skip

    offs_d = tl.arange(0, BLOCK_D)
    at = (q_start + rows).to(tl.int64)
    dq_ptrs = dq_ptr + b64 * stride_dq[0] + head64 * stride_dq[2] + at[:, None] * stride_dq[1]
    dq_ptrs = dq_ptrs + offs_d[None, :] * stride_dq[3]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=row_in[:, None] & (offs_d < D)[None, :])


# --------------------------------------------------------------------------------------------------------- launchers


class Tiles(NamedTuple):
    """Tile shape and pipeline of one kernel: rows, keys, warps, stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def config_for(kernel: str, head_dim: int, itemsize: int, major: int) -> Tiles:
    """Largest tiles that fit for a kernel ("forward", "dkdv", "dq"), padded head dim, element size and GPU generation."""
    if itemsize == 4:  # float32 multiplies run at full precision: small tiles, shared memory fills twice as fast
        return Tiles(64, 32, 4, 1) if head_dim > 128 else Tiles(64, 32, 4, 2)
    big = major >= 9
    if kernel == "forward":
        if head_dim <= 64:
            return Tiles(128, 128, 8 if big else 4, 3 if big else 2)
        if head_dim <= 128:
            return Tiles(128, 128, 8, 2) if big else Tiles(128, 64, 8, 2)
        return Tiles(128, 64, 8, 2) if big else Tiles(64, 32, 4, 2)
    if kernel == "dkdv":
        if head_dim <= 128:
            return Tiles(64, 128, 8, 2) if big else Tiles(32, 128, 8, 1)
        return Tiles(64, 64, 8, 1) if big else Tiles(32, 64, 8, 1)
    if head_dim <= 128:
        return Tiles(128, 64, 8, 3) if big else Tiles(128, 32, 8, 1)
    return Tiles(64, 64, 8, 1) if big else Tiles(64, 32, 8, 1)


def _power_of_two_divisor(n: int) -> int:
    return n & -n


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _tiles(kernel: str, q: Tensor, v: Tensor, g: Geometry, override: Tiles | None) -> Tiles:
    """The configured tiles, shrunk until they divide the mask's blocks."""
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8
    tiles = override or config_for(kernel, max(_padded(q.shape[-1]), _padded(v.shape[-1])), q.element_size(), major)
    if g.kv_num_blocks is None:
        return tiles
    block_m = min(tiles.block_m, _power_of_two_divisor(g.block_q))
    block_n = min(tiles.block_n, _power_of_two_divisor(g.block_kv))
    warps = min(tiles.num_warps, max(1, block_m * block_n // 1024))
    return Tiles(block_m, block_n, warps if warps & (warps - 1) == 0 else 4, tiles.num_stages)


def _strides(t: Tensor, packed: bool) -> tuple[int, int, int, int]:
    """(batch, seq, head, dim) strides; a packed tensor's sequences differ only by their start row."""
    return (0, *t.stride()) if packed else t.stride()  # type: ignore[return-value]


def _common(q: Tensor, k: Tensor, v: Tensor, g: Geometry) -> dict[str, object]:
    """Compile-time facts shared by all kernels."""
    return {
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "BLOCK_D": _padded(q.shape[-1]),
        "BLOCK_DV": _padded(v.shape[-1]),
        "GROUP": q.shape[-2] // k.shape[-2],
        "CAUSAL": g.causal,
        "WINDOW": g.window_left >= 0 or g.window_right >= 0,
        "SOFTCAP": g.softcap > 0,
        "RAGGED_Q": g.q_start is not None,
        "RAGGED_K": g.k_start is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _list_arguments(counts: Tensor | None, indices: Tensor | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """Block lists as kernel arguments: pointers, list rows per batch entry and per head, width of a list."""
    if counts is None or indices is None:
        return stand_in, stand_in, 0, 0, 0
    batch, heads, rows = counts.shape
    if indices.shape[-1] == 0:  # no list has an entry; kernels still look at the first
        indices = counts[..., None]
    return counts.contiguous(), indices.contiguous(), 0 if batch == 1 else heads * rows, rows, indices.shape[-1]


def _spans(g: Geometry, stand_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_start, q_end = (stand_in, stand_in) if g.q_start is None else (g.q_start, g.q_end)
    k_start, k_end = (stand_in, stand_in) if g.k_start is None else (g.k_start, g.k_end)
    return q_start, q_end, k_start, k_end  # type: ignore[return-value]


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, g: Geometry) -> str | None:
    """Why these kernels cannot run the call, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels take bfloat16, float16 and float32, not {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"the Triton kernels take head dimensions up to 256, not {max(q.shape[-1], v.shape[-1])}"
    if g.scale <= 0:
        return f"the Triton kernels need a positive scale, not {g.scale}"
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        return f"the Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1), not one on {q.device}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return None


def _split_plan(q: Tensor, k: Tensor, g: Geometry) -> tuple[int, int]:
    """(heads packed into a tile, shares of the keys) for a call; (1, 1) unless a dense call has very few rows."""
    if g.kv_num_blocks is not None or g.max_q > 16:
        return 1, 1
    group = q.shape[-2] // k.shape[-2]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    programs = g.batch * k.shape[-2] * triton.cdiv(g.max_q * group, 16)
    return group, max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(g.max_k, 256), 64))


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, g: Geometry, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs and LSE; see ``reference.forward``, which this matches."""
    heads, dim_v = q.shape[-2], v.shape[-1]
    ragged = g.q_start is not None
    rows = q.shape[0] if g.packed else q.shape[1]
    o = (torch.zeros if ragged else torch.empty)((*q.shape[:-1], dim_v), dtype=q.dtype, device=q.device)
    lse_shape = (heads, rows) if g.packed else (g.batch, heads, rows)
    lse = torch.full(lse_shape, float("-inf"), device=q.device) if ragged else q.new_empty(lse_shape, dtype=torch.float32)
    if q.numel() == 0 or g.max_q == 0:
        return o, lse
    pack, splits = _split_plan(q, k, g)
    config = _tiles("forward", q, v, g, tiles)
    if pack > 1 or splits > 1:
        config = config._replace(block_m=max(16, min(64, triton.next_power_of_2(g.max_q * pack))), num_warps=4)
    o_out, lse_out = o, lse
    if splits > 1:
        o_out = torch.zeros((splits, *o.shape), dtype=torch.float32, device=q.device)
        lse_out = torch.full((splits, *lse.shape), float("-inf"), device=q.device)
    counts, indices, mask_b, mask_h, width = _list_arguments(g.kv_num_blocks, g.kv_indices, lse)
    grid = (triton.cdiv(g.max_q * pack, config.block_m) * (heads // pack), g.batch * splits)
    _forward_kernel[grid](
        q, k, v, o_out, lse_out, lse if sinks is None else sinks, counts, indices, *_spans(g, lse),
        _strides(q, g.packed), _strides(k, g.packed), _strides(v, g.packed), _strides(o, g.packed),
        0 if g.packed else heads * rows, rows,
        mask_b, mask_h, width, g.max_q, g.max_k, splits, o.numel(), lse.numel(),
        g.scale, g.softcap, g.window_left, g.window_right,
        **_common(q, k, v, g),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_Q=g.block_q if g.kv_num_blocks is not None else config.block_m,
        BLOCK_KV=g.block_kv if g.kv_num_blocks is not None else config.block_n,
        PACK=pack, CHUNK=1 if pack > 1 else heads // k.shape[-2], MASK_GROUP=1 if g.kv_num_blocks is None else heads // g.kv_num_blocks.shape[1],
        MASKED=g.kv_num_blocks is not None, SINKS=sinks is not None and splits == 1, SPLIT=splits > 1,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        count = lse.numel()
        _combine_kernel[(count,)](
            o_out, lse_out, o, lse, lse if sinks is None else sinks, count, heads, rows, splits,
            DV=dim_v, BLOCK_DV=_padded(dim_v), SINKS=sinks is not None, num_warps=1,
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    g: Geometry,
    tiles: tuple[Tiles | None, Tiles | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the sinks; see ``reference.backward``, which this matches. Deterministic."""
    heads, heads_k = q.shape[-2], k.shape[-2]
    ragged_q, ragged_k = g.q_start is not None, g.k_start is not None
    dq = torch.zeros_like(q) if ragged_q else torch.empty_like(q)
    dk = torch.zeros_like(k) if ragged_k else torch.empty_like(k)
    dv = torch.zeros_like(v) if ragged_k else torch.empty_like(v)
    if q.numel() == 0 or k.numel() == 0 or g.max_q == 0 or g.max_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), None if sinks is None else torch.zeros_like(sinks)
    norm, delta = torch.empty_like(lse), torch.empty_like(lse)
    dsink = torch.zeros_like(lse) if sinks is not None else lse
    rows = q.shape[0] if g.packed else q.shape[1]
    lse_b, lse_h = 0 if g.packed else heads * rows, rows
    common = _common(q, k, v, g)
    spans = _spans(g, lse)
    _preprocess_kernel[(triton.cdiv(g.max_q, 64), heads, g.batch)](
        o, do, lse, lse if dlse is None else dlse, lse if sinks is None else sinks, norm, delta, dsink, *spans[:2],
        _strides(o, g.packed), _strides(do, g.packed), lse_b, lse_h, g.max_q,
        DV=common["DV"], BLOCK_DV=common["BLOCK_DV"], BLOCK_M=64, SINKS=sinks is not None, DLSE=dlse is not None,
        RAGGED_Q=ragged_q, num_warps=4,
    )  # fmt: skip

    masked = g.kv_num_blocks is not None
    mask_group = 1 if g.kv_num_blocks is None else heads // g.kv_num_blocks.shape[1]
    numbers = (g.max_q, g.max_k, g.scale, g.softcap, g.window_left, g.window_right)
    inputs = tuple(_strides(t, g.packed) for t in (q, k, v, do))
    config = _tiles("dkdv", q, v, g, tiles[0])
    counts, indices, mask_b, mask_h, width = _list_arguments(g.q_num_blocks, g.q_indices, lse)
    _dkdv_kernel[(triton.cdiv(g.max_k, config.block_n) * heads_k, g.batch)](
        q, k, v, do, norm, delta, dk, dv, counts, indices, *spans,
        *inputs, _strides(dk, g.packed), _strides(dv, g.packed), lse_b, lse_h, mask_b, mask_h, width, *numbers,
        **common, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_Q=g.block_q if masked else config.block_m, BLOCK_KV=g.block_kv if masked else config.block_n,
        MASK_GROUP=mask_group, CHUNK=math.gcd(heads_k, 2), MASKED=masked, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    config = _tiles("dq", q, v, g, tiles[1])
    counts, indices, mask_b, mask_h, width = _list_arguments(g.kv_num_blocks, g.kv_indices, lse)
    _dq_kernel[(triton.cdiv(g.max_q, config.block_m) * heads, g.batch)](
        q, k, v, do, norm, delta, dq, counts, indices, *spans,
        *inputs, _strides(dq, g.packed), lse_b, lse_h, mask_b, mask_h, width, *numbers,
        **common, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_Q=g.block_q if masked else config.block_m, BLOCK_KV=g.block_kv if masked else config.block_n,
        MASK_GROUP=mask_group, CHUNK=heads // heads_k, MASKED=masked, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, None
    over = (1,) if g.packed else (0, 2)
    return dq, dk, dv, dsink.sum(over).to(sinks.dtype)


def compile_cases() -> list[tuple[str, object, dict[str, object], dict[object, object], dict[object, object], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    variants = {
        "plain": {"MASKED": True, "CAUSAL": True},
        "dense": {"MASKED": False, "CAUSAL": True},
        "all": dict.fromkeys(("MASKED", "CAUSAL", "WINDOW", "SOFTCAP", "SINKS", "RAGGED_Q", "RAGGED_K"), True),
    }
    kernels = {"forward": _forward_kernel, "dkdv": _dkdv_kernel, "dq": _dq_kernel}
    for major in (8, 9):
        for dim, dim_v in ((64, 64), (128, 128), (192, 128), (256, 256)):
            for variant, flags in variants.items():
                for kernel, function in kernels.items():
                    tiles = config_for(kernel, _padded(dim), 2, major)
                    constants: dict[str, object] = dict.fromkeys(
                        ("MASKED", "CAUSAL", "WINDOW", "SOFTCAP", "SINKS", "RAGGED_Q", "RAGGED_K", "SPLIT"), False
                    )
                    constants |= flags
                    constants |= {
                        "D": dim, "DV": dim_v, "BLOCK_D": _padded(dim), "BLOCK_DV": _padded(dim_v),
                        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_Q": 128, "BLOCK_KV": 128,
                        "GROUP": 4, "PACK": 1, "MASK_GROUP": 1, "CHUNK": 4, "PRECISION": "tf32",
                    }  # fmt: skip
                    name = f"{kernel}-{variant}-{dim}x{dim_v}-sm{major}0"
                    cases.append((name, *_offline(function, constants), tiles.num_warps, tiles.num_stages))
    return cases


def _offline(function: object, constants: dict[str, object]) -> tuple[object, dict, dict, dict]:
    """Signature, constexprs and attributes of a bfloat16 call with contiguous tensors."""
    floats = {"lse_ptr", "norm_ptr", "delta_ptr", "sinks_ptr"}
    signature: dict[str, object] = {}
    constexprs: dict[object, object] = {}
    attributes: dict[object, object] = {}
    for i, param in enumerate(function.params):  # type: ignore[attr-defined]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants[param.name]
        elif param.name.startswith("stride_"):
            signature[param.name] = ("i64", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif param.name.endswith("_ptr"):
            index = param.name in ("count_ptr", "index_ptr") or "start" in param.name or "end" in param.name
            signature[param.name] = "*fp32" if param.name in floats else "*i32" if index else "*bf16"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name in ("scale", "softcap") else "i32"
    return function, signature, constexprs, attributes
