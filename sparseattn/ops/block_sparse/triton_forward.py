"""The portable forward kernel of block-sparse attention."""

import triton
import triton.language as tl

from sparseattn.kernels.attention import (
    cap_scores,
    full_range,
    key_range,
    natural_lse,
    normalise,
    online_softmax,
    schedule,
    sequence_span,
    visible,
    with_sink,
)
from sparseattn.kernels.tiles import LENGTHS, WINDOW, key_tiles, load_rows, slot_tile, tile_start, whole_tiles
from sparseattn.kernels.tilings import piece_rows, tile_first, tiles_between
from sparseattn.ops.block_sparse.extra import EXTRA, attend_columns, attend_means

SHARES = ["num_splits", "split_stride_o", "split_stride_lse"]


@triton.jit
def _attend(
    acc, m_i, l_i, q, k_base, v_base, n0, token, offset, k_len, full_lo, full_hi, stride_k, stride_v,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys ``n0 .. n0 + BLOCK_N`` into the running softmax of a tile of query rows."""
    k = load_rows(k_base, n0, k_len, stride_k[1], stride_k[3], BLOCK_N, D, BLOCK_D, BOUNDED, WIDE)
    s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if SOFTCAP:
        s = cap_scores(s, scale, softcap)
    if CAUSAL or WINDOW or BOUNDED:  # noqa: SIM102 (one test at compile time, one at run time)
        if (n0 < full_lo) | (n0 + BLOCK_N > full_hi):
            cols = n0 + tl.arange(0, BLOCK_N)
            seen = visible(token[:, None], cols[None, :], offset, k_len, window_left, window_right, CAUSAL, WINDOW)
            s = tl.where(seen, s, float("-inf"))
    p, alpha, m_i, l_i = online_softmax(s, m_i, l_i, scale, PRECISION)
    acc = acc * alpha[:, None]
    v = load_rows(v_base, n0, k_len, stride_v[1], stride_v[3], BLOCK_N, DV, BLOCK_DV, BOUNDED, WIDE)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit
def _attend_list(
    acc, m_i, l_i, q, k_base, v_base, list_ptr, begin, end, token, offset, k_len, full_lo, full_hi, stride_k, stride_v,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_KV: tl.constexpr, MASKED: tl.constexpr, RAGGED_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the key tiles ``begin .. end`` of a list of blocks, or of all keys, into the running softmax."""
    whole = whole_tiles(list_ptr, begin, end, k_len, BLOCK_KV, BLOCK_N, MASKED, RAGGED_K)
    for i in range(begin, whole):
        n0 = tile_start(list_ptr, i, BLOCK_KV, BLOCK_N, MASKED)
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, k_base, v_base, n0, token, offset, k_len, full_lo, full_hi, stride_k, stride_v,
            scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            CAUSAL, WINDOW, SOFTCAP, False, WIDE, PRECISION,
        )  # fmt: skip
    if whole < end:
        for i in range(whole, end):
            n0 = tile_start(list_ptr, i, BLOCK_KV, BLOCK_N, MASKED)
            acc, m_i, l_i = _attend(
                acc, m_i, l_i, q, k_base, v_base, n0, token, offset, k_len, full_lo, full_hi, stride_k, stride_v,
                scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
                CAUSAL, WINDOW, SOFTCAP, True, WIDE, PRECISION,
            )  # fmt: skip
    return acc, m_i, l_i


@triton.jit
def _attend_tiling(
    acc, m_i, l_i, q, k_base, v_base, count_ptr, tile_ptr, token, first, last, offset, k_len, stride_k, stride_v,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys of a row of variable blocks into the running softmax: whole tiles, then short ones."""
    key_lo, key_hi = key_range(first, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
    full_lo, full_hi = full_range(first, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
    begin, end = tiles_between(count_ptr, tile_ptr, key_lo, key_hi, CAUSAL or WINDOW)
    short_ptr = tile_ptr + 2 * (k_len // BLOCK_KV)
    short, short_end = tiles_between(count_ptr + 1, short_ptr, key_lo, key_hi, CAUSAL or WINDOW)
    for i in range(begin * (BLOCK_KV // BLOCK_N), end * (BLOCK_KV // BLOCK_N)):
        n0 = tile_first(tile_ptr, i, BLOCK_KV, BLOCK_N)
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, k_base, v_base, n0, token, offset, k_len, full_lo, full_hi, stride_k, stride_v,
            scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N,
            CAUSAL, WINDOW, SOFTCAP, False, WIDE, PRECISION,
        )  # fmt: skip
    for i in range(short, short_end):
        tile_end = tl.load(short_ptr + 2 * i + 1)
        for n0 in range(tl.load(short_ptr + 2 * i), tile_end, BLOCK_S):
            acc, m_i, l_i = _attend(
                acc, m_i, l_i, q, k_base, v_base, n0, token, offset, tile_end, full_lo, tl.minimum(full_hi, tile_end),
                stride_k, stride_v, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_S,
                CAUSAL, WINDOW, SOFTCAP, True, WIDE, PRECISION,
            )  # fmt: skip
    return acc, m_i, l_i


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, *EXTRA, *SHARES, "batch", "num_pieces"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr, count_ptr, index_ptr, piece_ptr, num_pieces,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    column_count_ptr, column_ptr, mean_k_ptr, mean_v_ptr, bits_ptr, taken_ptr, column_width, num_blocks, taken_stride_b,
    stride_q, stride_k, stride_v, stride_o, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, idx_width, max_q, max_k, batch, num_splits, split_stride_o, split_stride_lse,
    scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    GROUP: tl.constexpr, PACK: tl.constexpr, MASK_GROUP: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, MEANS: tl.constexpr, BLOCK_E: tl.constexpr, VARIABLE: tl.constexpr, BLOCK_S: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` query rows of one head against their key blocks, then their extra keys.

    Grid (row tiles * CHUNK, heads / CHUNK, batch * splits); ``PACKED`` (slots * CHUNK, heads / CHUNK, splits): as many
    tiles as the rows of all sequences need, however long the longest is (see ``slot_tile``). ``PACK`` > 1 packs a GQA
    group's heads into the rows of a tile (row = token * PACK + head within the group) and the head axis counts KV
    heads; ``SPLIT`` gives each program a share of the key tiles and leaves its unnormalised float32 sums to
    ``combine_kernel``. ``VARIABLE`` blocks have pieces of rows and tiles of keys (see ``Tiling``), of which short ones
    are read ``BLOCK_S`` keys at a time.
    """
    tile, head = schedule(CHUNK)  # long rows of a causal mask start first, short ones end a launch
    tile = tl.num_programs(0) // CHUNK - 1 - tile
    b = tl.program_id(2)
    split = b * 0
    if SPLIT:
        b = tl.program_id(2) // num_splits
        split = tl.program_id(2) % num_splits
    if PACKED:
        b, tile = slot_tile(q_start_ptr, tile, batch, PACK, BLOCK_M)
    b64 = b.to(tl.int64)
    head_q = head * PACK
    head_k = head_q // GROUP
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    m0 = tile * BLOCK_M
    row_end = q_len
    block = m0 // BLOCK_Q
    if VARIABLE:
        m0, row_end, block = piece_rows(piece_ptr, head // MASK_GROUP, num_pieces, tile, BLOCK_Q, BLOCK_M)
    if m0 >= row_end * PACK:
        return

    # The list is asked for before q is: both then travel from memory at the same time.
    first = m0 // PACK
    last = tl.minimum((m0 + BLOCK_M - 1) // PACK, row_end - 1)
    full_lo, full_hi = full_range(first, last, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
    list_row = b64 * mask_stride_b + (head // MASK_GROUP) * mask_stride_h + block
    if not VARIABLE:
        list_ptr, begin, end = key_tiles(
            count_ptr + list_row, index_ptr + list_row * idx_width, first, last, offset, k_len, window_left,
            window_right, BLOCK_KV, BLOCK_N, MASKED, CAUSAL, WINDOW,
        )  # fmt: skip
    if SPLIT:
        share = tl.cdiv(tl.maximum(end - begin, 0), num_splits)
        begin = begin + split * share
        end = tl.minimum(begin + share, end)

    row = m0 + tl.arange(0, BLOCK_M)
    token = row // PACK
    sub_head = row % PACK
    offs_d = tl.arange(0, BLOCK_D)
    row_in = token < row_end
    top = (q_start + first).to(tl.int64)  # the tile's first token: offsets within a tile stay in 32 bits
    q_row = (token - first) * stride_q[1]
    o_row = (token - first) * stride_o[1]
    if PACK > 1:
        q_row = q_row + sub_head.to(tl.int64) * stride_q[2]
        o_row = o_row + sub_head.to(tl.int64) * stride_o[2]
    q_base = q_ptr + b64 * stride_q[0] + head_q.to(tl.int64) * stride_q[2] + top * stride_q[1]
    q_in = row_in[:, None] & (offs_d < D)[None, :]
    q = tl.load(q_base + q_row[:, None] + offs_d[None, :] * stride_q[3], mask=q_in, other=0.0)  # [BLOCK_M, BLOCK_D]
    k_base = k_ptr + b64 * stride_k[0] + head_k.to(tl.int64) * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
    v_base = v_ptr + b64 * stride_v[0] + head_k.to(tl.int64) * stride_v[2] + k_start.to(tl.int64) * stride_v[1]

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if VARIABLE:
        acc, m_i, l_i = _attend_tiling(
            acc, m_i, l_i, q, k_base, v_base, count_ptr + 2 * list_row, index_ptr + 2 * list_row * idx_width, token,
            first, last, offset, k_len, stride_k, stride_v, scale, softcap, window_left, window_right,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BLOCK_KV, BLOCK_S, CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
        )  # fmt: skip
    else:
        acc, m_i, l_i = _attend_list(
            acc, m_i, l_i, q, k_base, v_base, list_ptr, begin, end, token, offset, k_len, full_lo, full_hi,
            stride_k, stride_v, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BLOCK_KV,
            MASKED, RAGGED_K, CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
        )  # fmt: skip
    if COLUMNS:
        acc, m_i, l_i = attend_columns(
            acc, m_i, l_i, q, k_base, v_base, column_count_ptr, column_ptr, list_row, column_width, token, offset,
            k_len, stride_k, stride_v, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_E,
            CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
        )  # fmt: skip
    if MEANS:
        means = (b64 * (tl.num_programs(1) * CHUNK // GROUP) + head_k) * num_blocks
        acc, m_i, l_i = attend_means(
            acc, m_i, l_i, q, mean_k_ptr + means * D, mean_v_ptr + means * DV, bits_ptr,
            taken_ptr + b64 * taken_stride_b, list_row, num_blocks, token, first, last, offset, k_len, scale, softcap,
            window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_E, BLOCK_KV, CAUSAL, WINDOW, SOFTCAP, COLUMNS,
            PRECISION,
        )  # fmt: skip

    offs_dv = tl.arange(0, BLOCK_DV)
    o_base = o_ptr + b64 * stride_o[0] + head_q.to(tl.int64) * stride_o[2] + top * stride_o[1]
    o_ptrs = o_base + o_row[:, None] + offs_dv[None, :] * stride_o[3]
    o_in = row_in[:, None] & (offs_dv < DV)[None, :]
    lse_ptrs = lse_ptr + b64 * lse_stride_b + (head_q.to(tl.int64) * lse_stride_h + top)
    lse_ptrs = lse_ptrs + (sub_head * lse_stride_h + token - first)
    if SPLIT:
        part = split.to(tl.int64)
        tl.store(o_ptrs + part * split_stride_o, acc, mask=o_in)
        tl.store(lse_ptrs + part * 2 * split_stride_lse, m_i, mask=row_in)
        tl.store(lse_ptrs + (part * 2 + 1) * split_stride_lse, l_i, mask=row_in)
    else:
        tl.store(lse_ptrs, natural_lse(m_i, l_i), mask=row_in)
        if SINKS:
            l_i = with_sink(m_i, l_i, tl.load(sinks_ptr + head_q + sub_head))
        tl.store(o_ptrs, normalise(acc, l_i, PRECISION).to(o_ptr.dtype.element_ty), mask=o_in)
