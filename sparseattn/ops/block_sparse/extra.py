"""Keys that a row of blocks attends besides its listed blocks: single columns, and the means of skipped blocks.

Both are tiles of extra keys with three numbers each: a row sees an extra key if it sees all tokens from ``first`` to
``last``, and ``weight`` is how many keys it stands for (0: it is none).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import LOG2E, cap_scores, exp_scores, key_range, sequence_span, visible
from sparseattn.kernels.tiles import load_rows
from sparseattn.ops.block_sparse.geometry import Geometry

# Arguments that change with the prompt.
EXTRA = ["column_width", "num_blocks", "taken_stride_b"]


@triton.jit
def extra_scores(
    s, rows, first, last, weight, offset, k_len, scale, softcap, window_left, window_right,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Raw scores of extra keys, -inf where hidden, and the soft cap's derivative.

    ``rows``, ``first``, ``last`` and ``weight`` broadcast against ``s``.
    """
    slope = 1.0
    if SOFTCAP:
        s = cap_scores(s, scale, softcap)
        capped = s * (scale / softcap)
        slope = 1.0 - capped * capped
    seen = visible(rows, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
    if WINDOW:
        seen = seen & visible(rows, first, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
    return tl.where(seen & (weight > 0), s, float("-inf")), slope


@triton.jit
def column_tile(list_ptr, begin, count, k_len, TILE: tl.constexpr):
    """Tokens of ``TILE`` columns of a list; ``k_len``, which nobody sees, past its end."""
    at = begin + tl.arange(0, TILE)
    cols = tl.load(list_ptr + at, mask=at < count, other=-1)
    return tl.where((cols >= 0) & (cols < k_len), cols, k_len)


@triton.jit
def gather_rows(base, rows, count, stride_s, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Load the given rows of a [count, D] matrix; 0 for rows past its end."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (offs_d < D)[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
    return tl.load(base + rows[:, None] * stride_s + offs_d[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit
def mean_tile(
    bits_ptr, taken_ptr, list_row, begin, num_blocks, k_len,
    TILE: tl.constexpr, BLOCK_KV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``first``, ``last`` and ``weight`` of the means of ``TILE`` blocks, for one row of blocks."""
    j = begin + tl.arange(0, TILE)
    first = j * BLOCK_KV
    last = tl.minimum(first + BLOCK_KV, k_len) - 1
    count = last - first + 1
    words = tl.cdiv(num_blocks, 32)
    word = tl.load(bits_ptr + list_row * words + j // 32, mask=j < num_blocks, other=-1)
    if COLUMNS:
        count -= tl.load(taken_ptr + list_row * num_blocks + j, mask=j < num_blocks, other=0)
    listed = (word >> (j % 32)) & 1
    return first, last, tl.where(listed == 0, tl.maximum(count, 0), 0).to(tl.float32)


@triton.jit
def mean_range(
    first, last, offset, k_len, window_left, window_right,
    TILE: tl.constexpr, BLOCK_KV: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Blocks ``[begin, end)`` that some row of ``first..last`` may see whole; ``begin`` is a multiple of ``TILE``."""
    lo, hi = key_range(first, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
    end = tl.where(hi >= k_len, tl.cdiv(k_len, BLOCK_KV), hi // BLOCK_KV)
    return lo // BLOCK_KV // TILE * TILE, end


@triton.jit
def _attend_extra(
    acc, m_i, l_i, q, k, v, token, first, last, weight, offset, k_len, scale, softcap, window_left, window_right,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold a tile of extra keys into the running softmax of a tile of query rows."""
    s = tl.dot(q, k.T, input_precision=PRECISION)
    s, _ = extra_scores(
        s, token[:, None], first[None, :], last[None, :], weight[None, :], offset, k_len, scale, softcap,
        window_left, window_right, CAUSAL, WINDOW, SOFTCAP,
    )  # fmt: skip
    # ``online_softmax`` with weights. They are factors behind the exponential, not logs in the scores: less to round.
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = exp_scores(s, scale, m_safe[:, None], PRECISION) * weight[None, :]
    alpha = tl.exp2((m_i - m_safe) * LOG2E)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def attend_columns(
    acc, m_i, l_i, q, k_base, v_base, count_ptr, column_ptr, list_row, column_width, token, offset, k_len,
    stride_k, stride_v, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold a row of blocks' columns into the running softmax of a tile of its query rows."""
    count = tl.load(count_ptr + list_row)
    list_ptr = column_ptr + list_row * column_width
    once = tl.full([BLOCK_E], 1.0, tl.float32)
    for begin in range(0, count, BLOCK_E):
        cols = column_tile(list_ptr, begin, count, k_len, BLOCK_E)
        k = gather_rows(k_base, cols, k_len, stride_k[1], stride_k[3], D, BLOCK_D, WIDE)
        v = gather_rows(v_base, cols, k_len, stride_v[1], stride_v[3], DV, BLOCK_DV, WIDE)
        acc, m_i, l_i = _attend_extra(
            acc, m_i, l_i, q, k, v, token, cols, cols, once, offset, k_len, scale, softcap,
            window_left, window_right, CAUSAL, WINDOW, SOFTCAP, PRECISION,
        )  # fmt: skip
    return acc, m_i, l_i


@triton.jit
def attend_means(
    acc, m_i, l_i, q, k_base, v_base, bits_ptr, taken_ptr, list_row, num_blocks, token, first_token, last_token,
    offset, k_len, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_KV: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the means of skipped blocks (``[num_blocks, D]`` rows) into the running softmax of a tile of query rows."""
    begin, end = mean_range(
        first_token, last_token, offset, k_len, window_left, window_right, BLOCK_E, BLOCK_KV, CAUSAL, WINDOW
    )
    for j in range(begin, end, BLOCK_E):
        first, last, weight = mean_tile(bits_ptr, taken_ptr, list_row, j, num_blocks, k_len, BLOCK_E, BLOCK_KV, COLUMNS)
        k = load_rows(k_base, j, num_blocks, D, 1, BLOCK_E, D, BLOCK_D, True, False)
        v = load_rows(v_base, j, num_blocks, DV, 1, BLOCK_E, DV, BLOCK_DV, True, False)
        acc, m_i, l_i = _attend_extra(
            acc, m_i, l_i, q, k, v, token, first, last, weight, offset, k_len, scale, softcap,
            window_left, window_right, CAUSAL, WINDOW, SOFTCAP, PRECISION,
        )  # fmt: skip
    return acc, m_i, l_i


@triton.jit
def _block_mean(base, j, k_len, stride_s, stride_d, BLOCK_KV: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
                BLOCK_D: tl.constexpr):  # fmt: skip
    """Mean of a block's rows in float32, 0 for a block without any."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for part in range(BLOCK_KV // ROWS):
        n0 = j.to(tl.int64) * BLOCK_KV + part * ROWS
        rows = load_rows(base, n0, k_len, stride_s, stride_d, ROWS, D, BLOCK_D, True, True)
        total += tl.sum(rows.to(tl.float32), 0)
    count = tl.minimum(k_len - j * BLOCK_KV, BLOCK_KV)
    return total / tl.maximum(count, 1).to(tl.float32)


@triton.jit(do_not_specialize=["max_k", "num_blocks"])
def mean_kernel(
    k_ptr, v_ptr, mean_k_ptr, mean_v_ptr, k_start_ptr, k_end_ptr, stride_k, stride_v, max_k, num_blocks,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KV: tl.constexpr,
    ROWS: tl.constexpr, RAGGED_K: tl.constexpr,
):  # fmt: skip
    """One program: mean key and mean value of one block of one KV head.

    Grid (blocks, KV heads, batch). Writes ``mean_k`` [batch, KV heads, blocks, D] and ``mean_v`` likewise.
    """
    j = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    k_base = k_ptr + b.to(tl.int64) * stride_k[0] + head * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
    v_base = v_ptr + b.to(tl.int64) * stride_v[0] + head * stride_v[2] + k_start.to(tl.int64) * stride_v[1]
    mean_k = _block_mean(k_base, j, k_len, stride_k[1], stride_k[3], BLOCK_KV, ROWS, D, BLOCK_D)
    mean_v = _block_mean(v_base, j, k_len, stride_v[1], stride_v[3], BLOCK_KV, ROWS, DV, BLOCK_DV)
    at = (b.to(tl.int64) * tl.num_programs(1) + head) * num_blocks + j
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    tl.store(mean_k_ptr + at * D + offs_d, mean_k.to(mean_k_ptr.dtype.element_ty), mask=offs_d < D)
    tl.store(mean_v_ptr + at * DV + offs_dv, mean_v.to(mean_v_ptr.dtype.element_ty), mask=offs_dv < DV)


@triton.jit(do_not_specialize=["idx_width", "column_width", "num_blocks", "taken_stride_b", "batch_rows", "max_k"])
def listed_kernel(
    count_ptr, index_ptr, column_count_ptr, column_ptr, bits_ptr, taken_ptr, k_start_ptr, k_end_ptr,
    idx_width, column_width, num_blocks, taken_stride_b, batch_rows, max_k,
    COLUMNS: tl.constexpr, RAGGED_K: tl.constexpr, BLOCK_KV: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: which blocks a row of blocks lists, a bit each, and how many columns it has in each block.

    Grid (rows of blocks, sequences that share them). ``bits`` int32 [rows, blocks / 32] and ``taken`` int32 [sequences,
    rows, blocks] hold zeros before. Columns past a sequence's end are not counted, so sequences count for themselves.
    """
    row = tl.program_id(0).to(tl.int64)
    shared = tl.program_id(1)
    offs = tl.arange(0, TILE)
    if shared == 0:
        count = tl.load(count_ptr + row)
        for begin in range(0, count, TILE):
            inside = begin + offs < count
            j = tl.load(index_ptr + row * idx_width + begin + offs, mask=inside, other=0)
            bit = tl.full([TILE], 1, tl.int32) << (j % 32)
            tl.atomic_or(bits_ptr + row * tl.cdiv(num_blocks, 32) + j // 32, bit, mask=inside)
    if COLUMNS:
        _, k_len = sequence_span(k_start_ptr, k_end_ptr, shared + row // batch_rows, max_k, RAGGED_K)
        taken_ptr += shared.to(tl.int64) * taken_stride_b + row * num_blocks
        count = tl.load(column_count_ptr + row)
        for begin in range(0, count, TILE):
            column = tl.load(column_ptr + row * column_width + begin + offs, mask=begin + offs < count, other=k_len)
            tl.atomic_add(taken_ptr + column // BLOCK_KV, tl.full([TILE], 1, tl.int32), mask=column < k_len)


class Extra(NamedTuple):
    """Arguments of the kernels about extra keys; any tensor where there are none.

    Attributes:
        column_counts: int32 [B|1, H, MB].
        columns: int32 [B|1, H, MB, C].
        mean_k: [B, Hkv, NB, D] in the keys' dtype.
        mean_v: [B, Hkv, NB, Dv].
        bits: int32 [B|1, H, MB, NB / 32], the listed blocks.
        taken: int32 [B|1, H, MB, NB], columns in each block.
        column_width: C.
        num_blocks: NB.
        taken_stride_b: From one sequence of ``taken`` to the next where they share the lists, else 0.
    """

    column_counts: Tensor
    columns: Tensor
    mean_k: Tensor
    mean_v: Tensor
    bits: Tensor
    taken: Tensor
    column_width: int
    num_blocks: int
    taken_stride_b: int


def prepare_extra(k: Tensor, v: Tensor, g: Geometry, stand_in: Tensor) -> Extra:
    """Means and tables that a call with extra keys needs; nothing but stand-ins without any."""
    num_blocks = triton.cdiv(g.max_k, g.block_kv)
    columns = g.column_counts is not None and g.column_indices is not None
    counts = g.column_counts.contiguous() if columns else stand_in  # type: ignore[union-attr]
    indices = g.column_indices.contiguous() if columns else stand_in  # type: ignore[union-attr]
    extra = Extra(counts, indices, k, v, stand_in, stand_in, indices.shape[-1] if columns else 0, num_blocks, 0)
    if not g.mean_correction or g.kv_num_blocks is None or g.kv_indices is None:
        return extra
    shape = (g.batch, k.shape[-2], num_blocks)
    mean_k, mean_v = k.new_empty((*shape, k.shape[-1])), v.new_empty((*shape, v.shape[-1]))
    spans = g.spans(stand_in)[2:]
    block_d, block_dv = (max(16, triton.next_power_of_2(t.shape[-1])) for t in (k, v))
    mean_kernel[(num_blocks, k.shape[-2], g.batch)](
        k, v, mean_k, mean_v, *spans, g.strides(k), g.strides(v), g.max_k, num_blocks,
        D=k.shape[-1], DV=v.shape[-1], BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_KV=g.block_kv,
        ROWS=min(32, g.block_kv & -g.block_kv), RAGGED_K=g.k_start is not None, num_warps=4, **LAUNCH,
    )  # fmt: skip
    lists, rows = g.kv_num_blocks.shape, g.kv_num_blocks.numel()
    # Sequences of their own lengths that share one mask have columns of their own: some lie past the end.
    sharing = g.batch if lists[0] == 1 and columns and g.k_start is not None else 1
    bits = torch.zeros((*lists, triton.cdiv(num_blocks, 32)), dtype=torch.int32, device=k.device)
    taken = torch.zeros((sharing, *lists, num_blocks), dtype=torch.int32, device=k.device) if columns else stand_in
    extra = extra._replace(taken_stride_b=rows * num_blocks if sharing > 1 else 0)
    if rows:
        listed_kernel[(rows, sharing)](
            g.kv_num_blocks.contiguous(), g.kv_indices.contiguous(), counts, indices, bits, taken, *spans,
            g.kv_indices.shape[-1], extra.column_width, num_blocks, extra.taken_stride_b, lists[1] * lists[2], g.max_k,
            COLUMNS=columns, RAGGED_K=g.k_start is not None, BLOCK_KV=g.block_kv, TILE=64, num_warps=1, **LAUNCH,
        )  # fmt: skip
    return extra._replace(mean_k=mean_k, mean_v=mean_v, bits=bits, taken=taken)


def call_facts(q: Tensor, k: Tensor, v: Tensor, g: Geometry, *others: Tensor) -> dict[str, object]:
    """Compile-time facts about a call that all kernels over its queries and keys share."""
    return {
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "BLOCK_DV": max(16, triton.next_power_of_2(v.shape[-1])),
        "GROUP": q.shape[-2] // k.shape[-2],
        "MASK_GROUP": 1 if g.kv_num_blocks is None else q.shape[-2] // g.kv_num_blocks.shape[1],
        "CAUSAL": g.causal,
        "WINDOW": g.window_left >= 0 or g.window_right >= 0,
        "SOFTCAP": g.softcap > 0,
        "RAGGED_Q": g.q_start is not None,
        "RAGGED_K": g.k_start is not None,
        # Row offsets within one sequence and head, in 64 bits only where 32 do not reach.
        "WIDE": any((max(g.max_q, g.max_k) + 256) * t.stride(-3) >= 2**31 for t in (q, k, v, *others)),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def extra_tile(kernel: str, head_dim: int, itemsize: int, major: int) -> int:
    """Extra keys of a tile, so that a kernel ("forward", "dq") keeps to its registers."""
    narrow = itemsize == 4 or head_dim > 128 or (major < 9 and kernel == "dq")
    return 32 if narrow else 64


def extra_facts(kernel: str, q: Tensor, v: Tensor, g: Geometry) -> dict[str, object]:
    """Compile-time facts about extra keys, for the kernels whose programs own query rows."""
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8
    return {
        "COLUMNS": g.column_indices is not None,
        "MEANS": g.mean_correction,
        "BLOCK_E": extra_tile(kernel, max(q.shape[-1], v.shape[-1]), q.element_size(), major),
    }
