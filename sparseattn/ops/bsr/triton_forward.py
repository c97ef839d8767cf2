"""The Triton kernel of block-sparse rows: blocks of any size, gathered a tile of keys at a time."""

import triton
import triton.language as tl

from sparseattn.kernels.attention import cap_scores, natural_lse, normalise, online_softmax, visible, with_sink
from sparseattn.kernels.rows import custom_seen, load_page_rows

# Arguments that change from call to call: specialising on them would compile a kernel per length.
LENGTHS = ["len_q", "len_k", "rows", "row_blocks", "bound_stride_b", "width", "nnz", "bits", "shares"]
LENGTHS += ["window_left", "window_right", "stride_k_scale", "stride_v_scale"]


@triton.jit
def listed_blocks(bound_ptr, at, width, nnz, CSR: tl.constexpr):
    """Where the ``at``-th list begins among the indices, and how many of them it has."""
    if CSR:
        first = tl.maximum(tl.load(bound_ptr + at), 0)
        owned = tl.minimum(tl.load(bound_ptr + at + 1), nnz) - first
        first = first.to(tl.int64)
    else:
        first = at * width
        owned = tl.minimum(tl.load(bound_ptr + at), width)
    return first, tl.maximum(owned, 0)


@triton.jit
def block_columns(list_ptr, i, end, num_blocks, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr):
    """Token positions [BLOCK_N] of the i-th tile of a list of ``end`` keys; -1 where a block number names no block.

    Small blocks are gathered, several to a tile.
    """
    entry = i * BLOCK_N + tl.arange(0, BLOCK_N)
    if COLUMNS % BLOCK_N == 0:
        block = tl.load(list_ptr + i * BLOCK_N // COLUMNS)
    else:
        block = tl.load(list_ptr + entry // COLUMNS, mask=entry < end, other=-1)
    return tl.where((block < 0) | (block >= num_blocks), -1, block * COLUMNS + entry % COLUMNS)


@triton.jit
def attend_blocks(
    acc, m_i, l_i, q, i, list_ptr, list_end, len_k, k_base, v_base, stride_k, stride_v, token, row_in, offset, k_end,
    slope, mask_ptr, mask_first, mask_step, bits, rows, scale, softcap, window_left, window_right, theta_log2,
    rope_scale, dtype: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, ROPE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the i-th tile of a row's gathered keys into the running softmax of a tile of query rows."""
    cols = block_columns(list_ptr, i, list_end, tl.cdiv(len_k, COLUMNS), BLOCK_N, COLUMNS)
    held = (cols >= 0) & (cols < len_k)
    entry = i * BLOCK_N + tl.arange(0, BLOCK_N)  # among the gathered keys
    place = cols
    if GATHERED:
        place = entry
    at = tl.where(held, cols, 0).to(tl.int64)
    kept = held[None, :]
    # Before the products, between which nothing may be awaited if they are to overlap.
    if BITS != "":
        wide = entry.to(tl.int64)
        if BITS == "blocks":  # [nnz, R, C]
            wide = wide // COLUMNS * COLUMNS * rows + wide % COLUMNS
        wanted = row_in[:, None] & held[None, :]
        kept = custom_seen(
            mask_ptr, mask_first, token.to(tl.int64)[:, None] * mask_step + wide[None, :], bits, wanted,
            "bool" if BITS == "blocks" else BITS,
        )  # fmt: skip
    k = load_page_rows(
        k_base, at * stride_k[1], held, stride_k[3], place, theta_log2, rope_scale, dtype, D, BLOCK_D, ROPE, FLOAT8
    )
    s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if ALIBI:
        s += slope[:, None] * (place[None, :] - token[:, None] - offset).to(tl.float32)
    if SOFTCAP:
        s = cap_scores(s, scale, softcap)
    s = tl.where(kept, s, float("-inf"))
    if CAUSAL or WINDOW:
        seen = visible(token[:, None], place[None, :], offset, k_end, window_left, window_right, CAUSAL, WINDOW)
        s = tl.where(seen, s, float("-inf"))
    p, alpha, m_i, l_i = online_softmax(s, m_i, l_i, scale, PRECISION)
    v = load_page_rows(v_base, at * stride_v[1], held, stride_v[3], cols, 0.0, 1.0, dtype, DV, BLOCK_DV, False, FLOAT8)
    return tl.dot(p.to(dtype), v, acc * alpha[:, None], input_precision=PRECISION), m_i, l_i


@triton.jit(do_not_specialize=LENGTHS)
def bsr_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, part_ptr, sums_ptr, bound_ptr, index_ptr, mask_ptr, mask_offset_ptr,
    sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr,
    stride_q, stride_k, stride_v, stride_o, stride_k_scale, stride_v_scale,
    len_q, len_k, rows, row_blocks, bound_stride_b, width, nnz, bits, shares,
    scale, v_factor, softcap, window_left, window_right, theta_log2, rope_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, LIST_GROUP: tl.constexpr,
    CSR: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    ALIBI: tl.constexpr, ROPE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, GATHERED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` rows, ``PACK`` heads of a KV head for each of ``BLOCK_M / PACK`` queries of a block row.

    Grid (batch * row_blocks * tiles of a block row, heads / PACK, shares). With ``SPLIT`` a program takes a share of
    its list and leaves unnormalised float32 sums for ``combine_kernel``: ``part`` [shares, batch, len_q, heads, DV] and
    ``sums`` [shares, 2, batch, heads, len_q]. Strides are those of ``[batch, length, heads, dim]``.
    """
    TOKENS: tl.constexpr = BLOCK_M // PACK
    CHUNKS: tl.constexpr = (GROUP + PACK - 1) // PACK  # of a KV head's query heads
    heads = tl.num_programs(1) // CHUNKS * GROUP
    tiles = tl.cdiv(rows, TOKENS)
    # The last rows of blocks, which see the most keys under a diagonal, start first.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    first = slot % tiles * TOKENS
    block = slot // tiles % row_blocks
    b = slot // tiles // row_blocks
    q_len = tl.minimum(rows, len_q - block * rows)
    if first >= q_len:
        return
    head_k = tl.program_id(1) // CHUNKS
    row = tl.arange(0, BLOCK_M)
    token = first + row // PACK  # within the block row
    sub = tl.program_id(1) % CHUNKS * PACK + row % PACK  # head within the group
    head = head_k * GROUP + sub
    row_in = (token < q_len) & (sub < GROUP)
    query = block * rows + token

    list_head = (head_k * GROUP + tl.program_id(1) % CHUNKS * PACK) // LIST_GROUP
    at = b.to(tl.int64) * bound_stride_b + list_head * (row_blocks + (1 if CSR else 0)) + block
    list_first, owned = listed_blocks(bound_ptr, at, width, nnz, CSR)
    list_end = owned * COLUMNS
    offset = block * rows + len_k - len_q
    k_end = len_k
    if GATHERED:
        offset = list_end - q_len
        k_end = list_end
    begin = 0
    end = tl.cdiv(list_end, BLOCK_N)
    if SPLIT:
        size = tl.cdiv(end, shares)
        begin = tl.program_id(2) * size
        end = tl.minimum(begin + size, end)

    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q_row = query.to(tl.int64) * stride_q[1] + head.to(tl.int64) * stride_q[2]
    q_base = q_ptr + b.to(tl.int64) * stride_q[0]
    q = load_page_rows(
        q_base, q_row, row_in, stride_q[3], token + offset, theta_log2, rope_scale, dtype, D, BLOCK_D, ROPE, ""
    )  # [BLOCK_M, BLOCK_D]
    if K_SCALE:
        scale *= tl.load(k_scale_ptr + head_k * stride_k_scale)
    slope = token
    if ALIBI:
        slope = tl.load(slopes_ptr + head, mask=row_in, other=0.0) / scale
    mask_first = list_first
    mask_step = list_end  # of the flat layouts, [R, gathered keys] for each row of blocks
    if BITS == "blocks":
        mask_step = list_end * 0 + COLUMNS
    if (BITS == "little") | (BITS == "big"):
        mask_first = tl.load(mask_offset_ptr + at)
    elif BITS != "":
        mask_first = list_first * COLUMNS * rows
    k_base = k_ptr + b.to(tl.int64) * stride_k[0] + head_k.to(tl.int64) * stride_k[2]
    v_base = v_ptr + b.to(tl.int64) * stride_v[0] + head_k.to(tl.int64) * stride_v[2]

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in range(begin, end):
        acc, m_i, l_i = attend_blocks(
            acc, m_i, l_i, q, i, index_ptr + list_first, list_end, len_k, k_base, v_base, stride_k, stride_v, token,
            row_in, offset, k_end, slope, mask_ptr, mask_first, mask_step, bits, rows, scale, softcap, window_left,
            window_right, theta_log2, rope_scale, dtype, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, COLUMNS, CAUSAL, WINDOW,
            SOFTCAP, ALIBI, ROPE, BITS, FLOAT8, GATHERED, PRECISION,
        )  # fmt: skip
    if V_SCALE:
        v_factor *= tl.load(v_scale_ptr + head_k * stride_v_scale)
    acc = acc * v_factor

    offs_dv = tl.arange(0, BLOCK_DV)
    o_in = row_in[:, None] & (offs_dv < DV)[None, :]
    lse_at = (b.to(tl.int64) * heads + head) * len_q + query
    if SPLIT:
        batch = tl.num_programs(0) // tiles // row_blocks
        share = tl.program_id(2).to(tl.int64) * batch * len_q * heads
        part_row = share + (b.to(tl.int64) * len_q + query) * heads + head
        tl.store(part_ptr + part_row[:, None] * DV + offs_dv[None, :], acc, mask=o_in)
        tl.store(sums_ptr + 2 * share + lse_at, m_i, mask=row_in)
        tl.store(sums_ptr + 2 * share + batch * len_q * heads + lse_at, l_i, mask=row_in)
    else:
        tl.store(lse_ptr + lse_at, natural_lse(m_i, l_i), mask=row_in)
        if SINKS:
            l_i = with_sink(m_i, l_i, tl.load(sinks_ptr + head, mask=row_in, other=0.0))
        o_row = query.to(tl.int64) * stride_o[1] + head.to(tl.int64) * stride_o[2]
        o = normalise(acc, l_i, PRECISION).to(o_ptr.dtype.element_ty)
        o_base = o_ptr + b.to(tl.int64) * stride_o[0]
        tl.store(o_base + o_row[:, None] + offs_dv[None, :] * stride_o[3], o, mask=o_in)
