"""The Triton kernels of paged attention: one for every kind of call, and the merge of its shares."""

import triton
import triton.language as tl

from sparseattn.kernels.attention import (
    LOG2E,
    cap_scores,
    full_range,
    key_range,
    natural_lse,
    normalise,
    online_softmax,
    visible,
    with_sink,
)
from sparseattn.kernels.rows import custom_seen, load_page_rows
from sparseattn.kernels.tiles import slot_tile
from sparseattn.ops.paged.triton_schedule import first_item, item_share, query_span, share_length, shares_of

# Arguments that change with the batch: specialising on them would compile a kernel per length.
LENGTHS = ["total_q", "batch", "table_width", "num_pages", "list_rows", "list_width", "list_stride_b", "bits"]
LENGTHS += ["limit", "target", "least", "rows_from", "rows_to", "window_left", "window_right"]
LENGTHS += ["stride_k_scale", "stride_v_scale"]


@triton.jit
def tile_columns(list_ptr, i, end, BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr, MASKED: tl.constexpr):
    """Token positions [BLOCK_N] of the i-th tile: of all keys, or of a list's ``end`` keys; -1 where there is none.

    Blocks of any size: small ones are gathered, several to a tile.
    """
    columns = i * BLOCK_N + tl.arange(0, BLOCK_N)
    if MASKED:
        if BLOCK_KV % BLOCK_N == 0:
            block = tl.load(list_ptr + i * BLOCK_N // BLOCK_KV)
            columns = tl.where(block < 0, -1, block * BLOCK_KV + columns % BLOCK_KV)
        else:
            block = tl.load(list_ptr + columns // BLOCK_KV, mask=columns < end, other=-1)
            columns = tl.where(block < 0, -1, block * BLOCK_KV + columns % BLOCK_KV)
    return columns


@triton.jit
def page_span(table_ptr, indptr_ptr, b, k_len, stride_table, table_width, PAGE: tl.constexpr, CSR: tl.constexpr):
    """A sequence's page numbers, and the end of its keys that can have a page: the others are hidden."""
    owned = table_width
    pages_ptr = table_ptr + b.to(tl.int64) * stride_table[0]
    if CSR:
        first = tl.maximum(tl.load(indptr_ptr + b), 0)
        owned = tl.minimum(tl.load(indptr_ptr + b + 1), table_width) - first
        pages_ptr = table_ptr + first
    return pages_ptr, tl.minimum(k_len, owned * PAGE)


@triton.jit
def attend_tile(
    acc, m_i, l_i, q, q_rope, i, list_ptr, list_end, pages_ptr, num_pages, k_end, k_base, v_base, k_rope_base,
    stride_k, stride_v, stride_k_rope, token, row_in, offset, full_lo, full_hi, slope, mask_ptr, mask_first, mask_row,
    bits, scale, softcap, window_left, window_right, theta_log2, rope_scale, dtype: tl.constexpr,
    D: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DR: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, BLOCK_KV: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, ROPE: tl.constexpr,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, SHARED_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the i-th tile of keys into the running softmax of a tile of query rows."""
    cols = tile_columns(list_ptr, i, list_end, BLOCK_N, BLOCK_KV, MASKED)
    page = tl.load(pages_ptr + cols // PAGE, mask=(cols >= 0) & (cols < k_end), other=-1)
    held = (page >= 0) & (page < num_pages)
    page = tl.where(held, page, 0).to(tl.int64)
    in_page = tl.where(held, cols % PAGE, 0)
    kept = held[None, :]
    # Before the products, between which nothing may be awaited if they are to overlap.
    if BITS != "":
        wanted = row_in[:, None] & held[None, :]
        kept = custom_seen(mask_ptr, mask_first, mask_row[:, None] + cols[None, :], bits, wanted, BITS)
    k = load_page_rows(
        k_base, page * stride_k[0] + in_page * stride_k[1], held, stride_k[3], cols, theta_log2, rope_scale, dtype,
        D, BLOCK_D, ROPE, FLOAT8,
    )  # fmt: skip
    s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DR > 0:
        k_rope = load_page_rows(
            k_rope_base, page * stride_k_rope[0] + in_page * stride_k_rope[1], held, stride_k_rope[3], cols, 0.0, 1.0,
            dtype, DR, BLOCK_DR, False, FLOAT8,
        )  # fmt: skip
        s = tl.dot(q_rope, k_rope.T, s, input_precision=PRECISION)
    if ALIBI:
        s += slope[:, None] * (cols[None, :] - token[:, None] - offset).to(tl.float32)
    if SOFTCAP:
        s = cap_scores(s, scale, softcap)
    s = tl.where(kept, s, float("-inf"))
    if CAUSAL or WINDOW:
        if MASKED:  # noqa: SIM114 (a test at compile time)
            seen = visible(token[:, None], cols[None, :], offset, k_end, window_left, window_right, CAUSAL, WINDOW)
            s = tl.where(seen, s, float("-inf"))
        elif (i * BLOCK_N < full_lo) | ((i + 1) * BLOCK_N > full_hi):
            seen = visible(token[:, None], cols[None, :], offset, k_end, window_left, window_right, CAUSAL, WINDOW)
            s = tl.where(seen, s, float("-inf"))
    p, alpha, m_i, l_i = online_softmax(s, m_i, l_i, scale, PRECISION)
    acc = acc * alpha[:, None]
    v = k
    if not SHARED_V:
        v = load_page_rows(
            v_base, page * stride_v[0] + in_page * stride_v[1], held, stride_v[3], cols, 0.0, 1.0, dtype,
            DV, BLOCK_DV, False, FLOAT8,
        )  # fmt: skip
    acc = tl.dot(p.to(dtype), v, acc, input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit
def store_share(
    part_ptr, sums_ptr, at, row, row_in, acc, m_i, l_i, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Leave a share's unnormalised sums in place ``at``, for ``paged_combine_kernel``."""
    columns = tl.arange(0, BLOCK_DV)
    inside = row_in[:, None] & (columns < DV)[None, :]
    tl.store(part_ptr + (at * BLOCK_M + row)[:, None] * DV + columns[None, :], acc, mask=inside)
    tl.store(sums_ptr + at * 2 * BLOCK_M + row, m_i, mask=row_in)
    tl.store(sums_ptr + (at * 2 + 1) * BLOCK_M + row, l_i, mask=row_in)


@triton.jit(do_not_specialize=LENGTHS)
def paged_kernel(
    q_ptr, q_rope_ptr, k_ptr, v_ptr, k_rope_ptr, o_ptr, lse_ptr, part_ptr, sums_ptr,
    cu_ptr, lens_ptr, table_ptr, indptr_ptr, count_ptr, list_ptr, mask_ptr, mask_offset_ptr,
    sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr,
    stride_q, stride_q_rope, stride_k, stride_v, stride_k_rope, stride_o, stride_table, stride_k_scale, stride_v_scale,
    total_q, batch, table_width, num_pages, list_rows, list_width, list_stride_b, bits, limit, target, least, rows_from,
    rows_to, scale, v_factor, softcap, window_left, window_right, theta_log2, rope_scale,
    D: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DR: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr,
    PACK: tl.constexpr, MASK_GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, CSR: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, ALIBI: tl.constexpr, ROPE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr,
    SHARED_V: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, RAGGED_Q: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` rows, ``PACK`` heads of a KV head for each of ``BLOCK_M / PACK`` queries.

    Grid (slots, heads / PACK): the tiles of a head side by side, whose keys then stay in the L2 cache. With ``SPLIT``
    (heads / PACK * TILES, items), heads side by side, whose keys lie side by side: a share of the keys for tile
    ``program_id(0) % TILES`` of the sequence. A share that is not the only one of its sequence leaves unnormalised
    float32 sums for ``paged_combine_kernel``: ``part`` [items, grid[0], BLOCK_M, DV] and ``sums`` [items, grid[0], 2,
    BLOCK_M]. Sequences of less than ``rows_from`` or more than ``rows_to`` queries are another launch's.
    """
    TOKENS: tl.constexpr = BLOCK_M // PACK
    CHUNKS: tl.constexpr = (GROUP + PACK - 1) // PACK  # of a KV head's query heads
    item = tl.program_id(1 if SPLIT else 0)
    column = tl.program_id(0 if SPLIT else 1)
    share = item * 0
    shares = item * 0 + 1
    head_chunk = column // TILES
    if SPLIT:
        b, share, shares = item_share(lens_ptr, item, batch, limit, share_length(lens_ptr, batch, limit, target, least))
        tile = column % TILES
        if b >= batch:
            return
    else:
        # The last slots are the last tiles of their sequences, which see the most keys: they start first.
        b = tl.num_programs(0) - 1 - item
        tile = item * 0
        if RAGGED_Q:
            b, tile = slot_tile(cu_ptr, b, batch, 1, TOKENS)
    q_start, q_len = query_span(cu_ptr, b, total_q, RAGGED_Q)
    first = tile * TOKENS
    if (first >= q_len) | (q_len < rows_from) | (q_len > rows_to):
        return
    k_len = tl.load(lens_ptr + b)
    offset = k_len - q_len
    head_k = head_chunk // CHUNKS
    row = tl.arange(0, BLOCK_M)
    token = first + row // PACK
    sub = (head_chunk % CHUNKS) * PACK + row % PACK  # head within the group
    head = head_k * GROUP + sub
    row_in = (token < q_len) & (sub < GROUP)

    # Which tiles of keys: of the range that some row sees, or of the list of this tile's rows.
    pages_ptr, k_end = page_span(table_ptr, indptr_ptr, b, k_len, stride_table, table_width, PAGE, CSR)
    last = tl.minimum(first + TOKENS, q_len) - 1
    full_lo, full_hi = full_range(first, last, offset, k_end, window_left, window_right, CAUSAL, WINDOW)
    key_lo, list_end = key_range(first, last, offset, k_end, window_left, window_right, CAUSAL, WINDOW)
    begin = key_lo // BLOCK_N
    if MASKED:
        list_row = b.to(tl.int64) * list_stride_b
        list_row += (head_k * GROUP + (head_chunk % CHUNKS) * PACK) // MASK_GROUP * list_rows
        if BLOCK_Q > 0:
            list_row += first // BLOCK_Q
        list_ptr += list_row * list_width
        list_end = tl.minimum(tl.load(count_ptr + list_row), list_width) * BLOCK_KV
        begin = begin * 0
    end = tl.maximum(tl.cdiv(list_end, BLOCK_N), begin)
    if SPLIT:
        size = tl.cdiv(end - begin, shares)
        begin += share * size
        end = tl.minimum(begin + size, end)

    dtype: tl.constexpr = q_ptr.dtype.element_ty
    top = (q_start + first).to(tl.int64)
    q_row = (top + row // PACK) * stride_q[0] + head.to(tl.int64) * stride_q[1]
    q = load_page_rows(
        q_ptr, q_row, row_in, stride_q[2], token + offset, theta_log2, rope_scale, dtype, D, BLOCK_D, ROPE, ""
    )  # [BLOCK_M, BLOCK_D]
    q_rope = q
    if DR > 0:
        q_row = (top + row // PACK) * stride_q_rope[0] + head.to(tl.int64) * stride_q_rope[1]
        q_rope = load_page_rows(
            q_rope_ptr, q_row, row_in, stride_q_rope[2], token, 0.0, 1.0, dtype, DR, BLOCK_DR, False, ""
        )
    if K_SCALE:
        scale *= tl.load(k_scale_ptr + head_k * stride_k_scale)
    slope = token
    if ALIBI:
        slope = tl.load(slopes_ptr + head, mask=row_in, other=0.0) / scale
    mask_first = k_len
    if BITS != "":
        mask_first = tl.load(mask_offset_ptr + b)
    mask_row = token.to(tl.int64) * k_len
    k_base = k_ptr + head_k.to(tl.int64) * stride_k[2]
    v_base = v_ptr + head_k.to(tl.int64) * stride_v[2]
    k_rope_base = k_rope_ptr + head_k.to(tl.int64) * stride_k_rope[2]

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in range(begin, end):
        acc, m_i, l_i = attend_tile(
            acc, m_i, l_i, q, q_rope, i, list_ptr, list_end, pages_ptr, num_pages, k_end, k_base, v_base, k_rope_base,
            stride_k, stride_v, stride_k_rope, token, row_in, offset, full_lo, full_hi, slope, mask_ptr, mask_first,
            mask_row, bits, scale, softcap, window_left, window_right, theta_log2, rope_scale, dtype,
            D, DR, DV, BLOCK_D, BLOCK_DR, BLOCK_DV, BLOCK_N, PAGE, BLOCK_KV, MASKED, CAUSAL, WINDOW, SOFTCAP, ALIBI,
            ROPE, BITS, FLOAT8, SHARED_V, PRECISION,
        )  # fmt: skip
    if V_SCALE:
        v_factor *= tl.load(v_scale_ptr + head_k * stride_v_scale)
    acc = acc * v_factor

    if shares > 1:
        at = item.to(tl.int64) * tl.num_programs(0) + column
        store_share(part_ptr, sums_ptr, at, row, row_in, acc, m_i, l_i, DV, BLOCK_DV, BLOCK_M)
    else:
        tl.store(lse_ptr + head.to(tl.int64) * total_q + q_start + token, natural_lse(m_i, l_i), mask=row_in)
        if SINKS:
            l_i = with_sink(m_i, l_i, tl.load(sinks_ptr + head, mask=row_in, other=0.0))
        o_row = (top + row // PACK) * stride_o[0] + head.to(tl.int64) * stride_o[1]
        offs_dv = tl.arange(0, BLOCK_DV)
        o = normalise(acc, l_i, PRECISION).to(o_ptr.dtype.element_ty)
        o_in = row_in[:, None] & (offs_dv < DV)[None, :]
        tl.store(o_ptr + o_row[:, None] + offs_dv[None, :] * stride_o[2], o, mask=o_in)


@triton.jit(do_not_specialize=["total_q", "batch", "limit", "target", "least", "rows_to", "longest", "columns"])
def paged_combine_kernel(
    part_ptr, sums_ptr, o_ptr, lse_ptr, sinks_ptr, cu_ptr, lens_ptr, stride_o,
    total_q, batch, limit, target, least, rows_to, longest, columns,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
    TILES: tl.constexpr, SINKS: tl.constexpr, RAGGED_Q: tl.constexpr,
):  # fmt: skip
    """One program: merges the shares of one query of one head. Grid (batch * longest, heads).

    ``columns`` is the first grid axis of ``paged_kernel``. Sequences of one share have nothing to merge.
    """
    TOKENS: tl.constexpr = BLOCK_M // PACK
    CHUNKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    b = tl.program_id(0) // longest
    token = tl.program_id(0) % longest
    head = tl.program_id(1)
    q_start, q_len = query_span(cu_ptr, b, total_q, RAGGED_Q)
    if (token >= q_len) | (q_len > rows_to):
        return
    share = share_length(lens_ptr, batch, limit, target, least)
    shares = shares_of(tl.load(lens_ptr + b), limit, share)
    if shares == 1:
        return
    item = first_item(lens_ptr, b, limit, share)
    column = ((head // GROUP) * CHUNKS + (head % GROUP) // PACK) * TILES + token // TOKENS
    row = (token % TOKENS) * PACK + (head % GROUP) % PACK
    offs = tl.arange(0, BLOCK_DV)
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for i in range(shares):
        at = (item + i).to(tl.int64) * columns + column
        m_part = tl.load(sums_ptr + at * 2 * BLOCK_M + row)
        m_new = tl.maximum(m_i, m_part)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((m_i - m_safe) * LOG2E)
        weight = tl.exp2((m_part - m_safe) * LOG2E)
        part = tl.load(part_ptr + (at * BLOCK_M + row) * DV + offs, mask=offs < DV, other=0.0)
        acc = acc * alpha + weight * part
        l_i = l_i * alpha + weight * tl.load(sums_ptr + (at * 2 + 1) * BLOCK_M + row)
        m_i = m_new
    tl.store(lse_ptr + head.to(tl.int64) * total_q + q_start + token, natural_lse(m_i, l_i))
    if SINKS:
        l_i = with_sink(m_i, l_i, tl.load(sinks_ptr + head))
    acc = acc / tl.where(l_i > 0, l_i, 1.0)
    o_row = (q_start + token).to(tl.int64) * stride_o[0] + head.to(tl.int64) * stride_o[1]
    tl.store(o_ptr + o_row + offs * stride_o[2], acc.to(o_ptr.dtype.element_ty), mask=offs < DV)
