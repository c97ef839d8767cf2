"""Triton: the largest estimated probability of each block, and the lists of those above a threshold."""

from __future__ import annotations

import triton
import triton.language as tl

from sparseattn.kernels.attention import LOG2E, sequence_span
from sparseattn.ops.scores.landmark_triton_choice import capped_list

_LENGTHS = ["max_q", "max_k", "num_rows", "num_columns", "landmark_rows", "bounds_stride_b", "first_row",
            "rows_here", "width", "max_blocks", "items"]  # fmt: skip
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr"]


@triton.jit
def _online(u, m_i):
    """``exp2(u - m)`` for the new running row maximum m, the factor on older sums, and m (0 while nothing was seen)."""
    m_new = tl.maximum(m_i, tl.max(u, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return tl.exp2(u - m_safe[:, None]), tl.exp2(m_i - m_safe), m_new, m_safe


@triton.jit
def _forced_blocks(
    q, k_ptrs, stride_s, m_i, l_i, last, recent, visible, k_len, scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum over the first block (if forced) and ``[recent, visible)``, causality included."""
    offs_n = tl.arange(0, KEYS)
    offs_d = tl.arange(0, BLOCK_D)
    for i in range(0, (FIRST + visible - recent) * (BLOCK // KEYS)):
        block = i // (BLOCK // KEYS)
        if FIRST > 0:
            block = tl.where(block == 0, 0, recent + block - 1)
        else:
            block = recent + block
        cols = block * BLOCK + (i % (BLOCK // KEYS)) * KEYS + offs_n
        k = tl.load(
            k_ptrs + cols.to(tl.int64)[None, :] * stride_s,
            mask=(cols < k_len)[None, :] & (offs_d < D)[:, None], other=0.0,
        )  # fmt: skip  # [BLOCK_D, KEYS]
        u = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
        u = tl.where(cols[None, :] <= last[:, None], u, float("-inf"))
        p, alpha, m_i, _ = _online(u, m_i)
        l_i = l_i * alpha + tl.sum(p, 1)
    return m_i, l_i


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def score_kernel(
    q_ptr, k_ptr, landmarks_ptr, scales_ptr, spreads_ptr, rows_ptr, visible_ptr, recent_ptr, log_tau_ptr,
    strip_ptr, scores_ptr, counts_ptr, indices_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, stride_q, stride_k,
    max_q, max_k, num_rows, num_columns, landmark_rows, bounds_stride_b, first_row, rows_here, width, max_blocks,
    items, scale,
    HEADS: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    CLUSTERS: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr, FP8: tl.constexpr, LISTS: tl.constexpr, HEAD_TAUS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Scores (LISTS: lists) of query blocks, one after another, the longest first. Grid (programs).

    Landmarks and spreads are ``landmark_triton_order.ordered_landmarks`` in tiles of ``CHUNK * CLUSTERS``,
    ``landmark_rows`` for each KV head of each sequence.
    An item is a query block of a mask head, which is one query head or SHARED of them. For each head, one sweep over
    the landmarks stores the rows' block logits in this program's strip of ``strip [programs, chunks, ROWS, CHUNK]`` and
    sums up their denominators; one over the strip takes the maxima over the rows. ``scores`` is ``[B, H, rows_here,
    NB]`` and receives natural logs of the query blocks from ``first_row`` on, or ``[programs, NB]`` scratch for logs
    over the threshold, of which a CAPPED list takes the best.
    """
    COLUMNS: tl.constexpr = CHUNK * CLUSTERS
    pid = tl.program_id(0)
    strip_ptr += pid.to(tl.int64) * tl.cdiv(num_columns, CHUNK) * ROWS * CHUNK
    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    offs_b = tl.arange(0, CHUNK)
    offs_l = tl.arange(0, COLUMNS)
    column_blocks = (offs_l % 8 // 2 * (COLUMNS // 4) + offs_l // 8 * 2 + offs_l % 2) // CLUSTERS
    strip_ptrs = strip_ptr + offs_r[:, None] * CHUNK + offs_b[None, :]
    per_row = items // rows_here  # items of one row of blocks: batch * HEADS
    for item in range(pid, items, tl.num_programs(0)):
        m = first_row + rows_here - 1 - item // per_row
        b = (item % per_row) // HEADS
        mask_head = item % HEADS
        visible = tl.load(visible_ptr + b * bounds_stride_b + m)
        recent = tl.load(recent_ptr + b * bounds_stride_b + m)
        row = (b.to(tl.int64) * HEADS + mask_head) * rows_here + m - first_row
        score_row = scores_ptr + (pid.to(tl.int64) if LISTS else row) * num_columns
        if recent > FIRST:
            q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
            k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
            kv_head = mask_head * SHARED // GROUP
            k_base = k_ptr + b.to(tl.int64) * stride_k[0] + kv_head.to(tl.int64) * stride_k[2]
            k_ptrs = k_base + k_start.to(tl.int64) * stride_k[1] + offs_d[:, None] * stride_k[3]
            first = (b.to(tl.int64) * (HEADS * SHARED // GROUP) + kv_head) * landmark_rows
            c_ptrs = landmarks_ptr + first * D + offs_d[:, None]
            spread_ptrs = spreads_ptr + first
            for g in range(0, SHARED):
                h = mask_head * SHARED + g
                if rows_ptr is not None:
                    at = (b.to(tl.int64) * (HEADS * SHARED) + h) * num_rows + m
                    offs_m = tl.load(rows_ptr + at * ROWS + offs_r)
                else:
                    offs_m = offs_r
                rows = m * BLOCK + offs_m
                valid = (offs_m >= 0) & (rows < q_len)
                q_base = q_ptr + b.to(tl.int64) * stride_q[0] + h.to(tl.int64) * stride_q[2]
                q = tl.load(
                    q_base + (q_start + rows).to(tl.int64)[:, None] * stride_q[1] + offs_d[None, :] * stride_q[3],
                    mask=valid[:, None] & (offs_d < D)[None, :], other=0.0,
                )  # fmt: skip  # [ROWS, BLOCK_D]

                # Forced blocks, exactly. Rows that do not exist see no key.
                last = tl.where(valid, k_len - 1, -1)
                if CAUSAL:
                    last = tl.minimum(last, rows + k_len - q_len)
                m_i = tl.full([ROWS], float("-inf"), tl.float32)
                l_i = tl.zeros([ROWS], tl.float32)
                m_i, l_i = _forced_blocks(
                    q, k_ptrs, stride_k[1], m_i, l_i, last, recent, visible, k_len, scale,
                    BLOCK, KEYS, FIRST, D, BLOCK_D, PRECISION,
                )  # fmt: skip

                # The rest by its landmarks: products in units of the rows, then one factor to base-2 logits.
                q32 = q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)
                length = tl.maximum(tl.sqrt(tl.sum(q32 * q32, 1)), 1e-30)
                factor = tl.full([ROWS], 1.0, tl.float32) * tl.maximum(tl.abs(scale) * LOG2E, 1e-30)
                if FP8:
                    q_scale = tl.maximum(tl.max(tl.abs(q32), 1) / 448.0, 1.1754943508222875e-38)
                    a = (q32 / q_scale[:, None]).to(tl.float8e4nv)
                    length = length / q_scale
                    factor = factor * q_scale
                else:
                    a = q32.to(q.dtype)
                for n in range(0, recent, CHUNK):
                    landmarks = n * CLUSTERS + offs_l
                    c = tl.load(c_ptrs + landmarks[None, :] * D, mask=(offs_d < D)[:, None], other=0.0)
                    u = tl.dot(a, c, input_precision=PRECISION)  # [ROWS, COLUMNS]
                    if FP8:
                        u *= tl.load(scales_ptr + first + landmarks)[None, :]
                    u += length[:, None] * tl.load(spread_ptrs + landmarks)[None, :]
                    if n + CHUNK > recent:
                        u = tl.where((n + column_blocks < recent)[None, :], u, float("-inf"))
                    m_new = tl.maximum(m_i, tl.max(u, 1) * factor)
                    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                    p = tl.exp2(u * factor[:, None] - m_safe[:, None])
                    # [row, pair of columns, thread of four, 2], as threads hold them: no sum leaves its thread.
                    mass = tl.sum(tl.reshape(p, [ROWS, COLUMNS // 8, 4, 2]), 3)
                    mass = tl.sum(tl.reshape(mass, [ROWS, CHUNK // 4, CLUSTERS // 2, 4]), 2)
                    l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.sum(mass, 1), 1)
                    m_i = m_new
                    w = tl.permute(tl.log2(mass) + m_safe[:, None, None], (0, 2, 1))
                    tl.store(strip_ptrs + n * ROWS, tl.reshape(w, [ROWS, CHUNK]))
                # Other threads read what these wrote: the strip's layout in registers is another one below.
                tl.debug_barrier()

                norm = tl.where(l_i > 0, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), 0.0)
                norm = tl.where(valid, norm, float("inf"))
                shift = 0.0
                if LISTS:
                    shift = tl.load(log_tau_ptr + h) if HEAD_TAUS else tl.load(log_tau_ptr)
                for n in tl.range(0, recent, CHUNK, num_stages=1):
                    offs_n = n + offs_b
                    free = (offs_n >= FIRST) & (offs_n < recent)
                    w = tl.load(strip_ptrs + n * ROWS)
                    score = tl.max(w - norm[:, None], 0) / LOG2E  # a natural log from here on
                    if LISTS:
                        # A threshold of nothing keeps all, but what is capped needs an order.
                        all_in = tl.maximum(score + 128.0, 0.0)
                        score = tl.where(shift == float("-inf"), all_in, score - shift)
                    if SHARED > 1:
                        before = tl.load(score_row + offs_n, mask=free & (g > 0), other=float("-inf"))
                        score = tl.maximum(score, before)
                    tl.store(score_row + offs_n, score, mask=free)
                tl.debug_barrier()

        if LISTS:
            least = tl.full((), 0, tl.int32)  # the key of 0
            list_ptr = indices_ptr + row * width
            count = capped_list(score_row, list_ptr, least, recent, visible, max_blocks, FIRST, CAPPED, BLOCK_S)
            tl.store(counts_ptr + row, count)
            tl.debug_barrier()  # the next item's scores take the place of these
