"""The tile order of paged attention on Hopper, built on the device from lengths, and the merge of shares of keys.

All sequences are cut by one share length, so that a batch of unequal ones is balanced; how many tiles, shares and
places for their sums there can be depends on shapes alone. One counting of the batch serves all that a tile needs to
know, so a program builds some tiles without asking another.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparseattn.kernels.attention import LOG2E, full_range, natural_lse, with_sink
from sparseattn.kernels.schedule import cut_tiles, key_tile_range

CHUNK: tl.constexpr = tl.constexpr(128)  # sequences, or shares, looked at together
NUMBERS = [
    "batch", "total_q", "max_q", "table_stride", "table_width", "max_records", "max_places", "max_merges",
    "mask_stride_b", "mask_stride_h", "idx_width", "sections", "limit", "target", "least",
    "window_left", "window_right", "span_stride", "programs",
]  # fmt: skip


@triton.jit
def sequence(
    b, inside, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, PAGE: tl.constexpr,
    CSR: tl.constexpr, RAGGED: tl.constexpr, real=0, FREE: tl.constexpr = False,
):  # fmt: skip
    """Of sequences ``b``: first query row, queries, keys, where page numbers begin, and keys that can have a page.

    ``FREE``: from ``real`` on, of the rows in front of each sequence, and of those behind the last; see ``all_rows``.
    """
    q_start = b
    q_len = inside.to(tl.int32)
    if FREE:
        free = inside & (b >= real)
        after = b - real  # a sequence
        inside = inside & (b < real)
        first = tl.maximum(tl.load(cu_ptr + after - 1, mask=free & (after > 0), other=0), 0)
        bound = tl.load(cu_ptr + after, mask=free, other=0)
        held_rows = tl.where(after > 0, tl.maximum(tl.minimum(tl.minimum(bound, total_q) - first, max_q), 0), 0)
        free_start = first + held_rows
        free_len = tl.maximum(tl.minimum(tl.where(after < real, bound, total_q), total_q) - free_start, 0)
    if RAGGED:
        q_start = tl.maximum(tl.load(cu_ptr + b, mask=inside, other=0), 0)
        q_len = tl.minimum(tl.load(cu_ptr + b + 1, mask=inside, other=0), total_q) - q_start
        q_len = tl.maximum(tl.minimum(q_len, max_q), 0)
    if FREE:
        q_start = tl.where(free, free_start, q_start)
        q_len = tl.where(free, free_len, q_len)
    k_len = tl.maximum(tl.load(lens_ptr + b, mask=inside, other=0), 0)
    first = b * table_stride
    owned = table_width
    if CSR:
        first = tl.maximum(tl.load(indptr_ptr + b, mask=inside, other=0), 0)
        owned = tl.minimum(tl.load(indptr_ptr + b + 1, mask=inside, other=0), table_width) - first
    if FREE:
        first = tl.where(inside, first, 0)
    return q_start, q_len, k_len, first, tl.minimum(k_len, tl.maximum(owned, 0) * PAGE)


@triton.jit
def all_rows(batch, cu_ptr, total_q, max_q):
    """How many sequences there are, and how many together with the stretches of rows that belong to none.

    Those are 0 where no row is free. Where sequences are not in order, there is none, and all rows are one stretch.
    """
    held = batch * 0
    unordered = batch * 0
    for c in range(0, batch, CHUNK):
        b = c + tl.arange(0, CHUNK)
        start = tl.load(cu_ptr + b, mask=b < batch, other=0)
        end = tl.load(cu_ptr + b + 1, mask=b < batch, other=0)
        unordered += tl.sum(((start < 0) | (end < start)).to(tl.int32), 0)
        held += tl.sum(tl.maximum(tl.minimum(tl.minimum(end, total_q) - start, max_q), 0), 0)
    real = tl.where(unordered > 0, 0, batch)
    return real, real + tl.where(unordered > 0, 1, tl.where(held < total_q, batch + 1, 0))


@triton.jit
def share_keys(
    batch, heads, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, limit, target, least,
    TOKENS: tl.constexpr, TILE_N: tl.constexpr, PAGE: tl.constexpr, CSR: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Keys of a share, so that all row tiles together make no more than ``target`` shares; none shorter than ``least``.

    Shares of the mean length would be more than that, as every row tile rounds them up, and the few in excess would
    have the GPU for themselves at the end: of 32 lengths up to twice the mean, the least that makes few enough.
    """
    work = tl.full((), 0, tl.int64)
    for c in range(0, batch, CHUNK):
        b = c + tl.arange(0, CHUNK)
        _start, q_len, _k_len, _first, held = sequence(
            b, b < batch, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, PAGE, CSR, RAGGED
        )
        work += tl.sum(tl.cdiv(q_len, TOKENS).to(tl.int64) * tl.minimum(held, limit), 0)
    mean = tl.minimum((work * heads + target - 1) // target, 0x20000000).to(tl.int32)
    mean = tl.maximum(mean, least)
    lengths = tl.cdiv(mean + (mean // 32 + 1) * tl.arange(0, 32), TILE_N) * TILE_N
    shares = lengths * 0
    for c in range(0, batch, CHUNK):
        b = c + tl.arange(0, CHUNK)
        _start, q_len, _k_len, _first, held = sequence(
            b, b < batch, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, PAGE, CSR, RAGGED
        )
        seen = tl.minimum(held, limit)
        each = tl.maximum((seen[:, None] + (lengths - 1)[None, :]) // lengths[None, :], 1)
        shares += tl.sum((tl.cdiv(q_len, TOKENS) * heads)[:, None] * each, 0)
    fits = tl.min(tl.where(shares <= target, lengths, 0x7FFFFFFF), 0)
    return tl.minimum(fits, tl.max(lengths, 0))


@triton.jit
def balanced_keys(
    batch, heads, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, limit, target, least,
    programs, real, TOKENS: tl.constexpr, TILE_N: tl.constexpr, PAGE: tl.constexpr, CSR: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Keys of a share, by which ``programs`` that take shares in turn should end first; for long computations.

    Of 16 lengths, from the longest sequence's down to what makes ``target`` shares. Shares of one length end in rounds,
    others on average half a length after the mean; every one that has to be merged costs as much as two keys.
    """
    work = tl.full((), 0, tl.int64)
    longest = batch * 0
    tiles = batch * 0
    for c in range(0, batch, CHUNK):
        b = c + tl.arange(0, CHUNK)
        _start, q_len, _k_len, _first, held = sequence(
            b, b < batch, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, PAGE, CSR, RAGGED,
            real, RAGGED,
        )  # fmt: skip
        rows = tl.cdiv(q_len, TOKENS) * heads
        seen = tl.where(rows > 0, tl.minimum(held, limit), 0)
        work += tl.sum(rows.to(tl.int64) * seen, 0)
        longest = tl.maximum(longest, tl.max(seen, 0))
        tiles += tl.sum(rows, 0)
    floor = tl.maximum(tl.minimum(tl.cdiv(work, target), 0x20000000).to(tl.int32), least)
    step = tl.cdiv(target, 16 * tl.maximum(tiles, 1))
    lengths = tl.maximum(tl.cdiv(longest, tl.maximum(step * tl.arange(0, 16), 1)), floor)
    lengths = tl.cdiv(lengths, TILE_N) * TILE_N
    inverse = 1.0 / lengths.to(tl.float32)  # integers would divide for longer than memory takes to answer
    shares = inverse * 0.0
    merged = inverse * 0.0
    for c in range(0, batch, CHUNK):
        b = c + tl.arange(0, CHUNK)
        _start, q_len, _k_len, _first, held = sequence(
            b, b < batch, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, PAGE, CSR, RAGGED,
            real, RAGGED,
        )  # fmt: skip
        rows = (tl.cdiv(q_len, TOKENS) * heads).to(tl.float32)
        each = tl.maximum(tl.ceil(tl.minimum(held, limit).to(tl.float32)[:, None] * inverse[None, :] - 1e-6), 1.0)
        shares += tl.sum(rows[:, None] * each, 0)
        merged += tl.sum(tl.where(each > 1.0, rows[:, None] * each, 0.0), 0)
    mean = work.to(tl.float32) / programs
    even = shares * lengths <= 1.06 * mean * programs
    rounds = tl.ceil(shares / programs) * lengths
    end = tl.where(even, rounds, tl.minimum(rounds, mean + lengths * 0.5)) + 2.0 * merged
    return tl.max(tl.where(end == tl.min(end, 0), lengths, 0), 0)


@triton.jit
def find_tiles(
    e, keys, heads, batch, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, limit, real,
    TOKENS: tl.constexpr, PAGE: tl.constexpr, CSR: tl.constexpr, RAGGED: tl.constexpr, SPLIT: tl.constexpr,
    MERGED: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Of records ``e`` their sequences, and how many records, merges and places come before these; then all of them."""
    b = e * 0
    before = e * 0
    merges_before = e * 0
    places_before = e * 0
    records = keys * 0
    merges = keys * 0
    for c in range(0, batch, CHUNK):
        offs = c + tl.arange(0, CHUNK)
        _start, q_len, _k_len, _first, held = sequence(
            offs, offs < batch, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, PAGE, CSR,
            RAGGED, real, FREE,
        )  # fmt: skip
        tiles = tl.cdiv(q_len, TOKENS) * heads
        items = tiles
        cut = tiles * (1 if MERGED else 0)
        if SPLIT:
            shares = tl.maximum(tl.cdiv(tl.minimum(held, limit), keys), 1)
            items = tiles * shares
            cut = tl.where((shares > 1) | MERGED, tiles, 0)
        past = (records + tl.cumsum(items, 0))[None, :] <= e[:, None]
        b += tl.sum((past & (offs < batch)[None, :]).to(tl.int32), 1)
        before += tl.sum(tl.where(past, items[None, :], 0), 1)
        merges_before += tl.sum(tl.where(past, cut[None, :], 0), 1)
        places_before += tl.sum(tl.where(past & (cut > 0)[None, :], items[None, :], 0), 1)
        records += tl.sum(items, 0)
        merges += tl.sum(cut, 0)
    return b, before, merges_before, places_before, records, merges


@triton.jit
def store_row(row, a, b, c, d, e, f, g, h, inside):
    """Eight numbers side by side."""
    tl.store(row, a, mask=inside)
    tl.store(row + 1, b, mask=inside)
    tl.store(row + 2, c, mask=inside)
    tl.store(row + 3, d, mask=inside)
    tl.store(row + 4, e, mask=inside)
    tl.store(row + 5, f, mask=inside)
    tl.store(row + 6, g, mask=inside)
    tl.store(row + 7, h, mask=inside)


@triton.jit
def store_merge(merge, row, rows, head, place, shares, inside):
    """Note a row tile whose shares ``merge_shares_kernel`` has to merge."""
    tl.store(merge, row, mask=inside)
    tl.store(merge + 1, rows, mask=inside)
    tl.store(merge + 2, head, mask=inside)
    tl.store(merge + 3, place, mask=inside)
    tl.store(merge + 4, shares, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def paged_schedule_kernel(
    record_ptr, counter_ptr, merge_ptr, span_ptr, cu_ptr, lens_ptr, indptr_ptr, gap_ptr, count_ptr, index_ptr,
    batch, total_q, max_q, table_stride, table_width, max_records, max_places, max_merges,
    mask_stride_b, mask_stride_h, idx_width, sections, limit, target, least, window_left, window_right,
    span_stride, programs,
    TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, MASK_GROUP: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr, CSR: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RAGGED: tl.constexpr, SPLIT: tl.constexpr, MERGED: tl.constexpr,
    GAPS: tl.constexpr, SPREAD: tl.constexpr, EARLY: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program: ``TILES`` records of the Hopper forward kernel, those of a sequence's KV head side by side.

    Grid (records / TILES,). ``HEADS`` tiles heads (a packed group is one) of each of ``sections`` KV heads, late rows
    first. ``record`` int32 [2, max_records, 8]: the records, and of each: first query of the sequence, queries, where
    page numbers begin, keys, keys that can have a page, first place and shares of the row tile, and at the first place
    how many of these have arrived. ``counter`` int32 [4]: 0, records, merges, 0; ``span`` int32 [5, span_stride]: first
    and end of the queries, where page numbers begin and that plus the keys, keys that can have a page; ``merge`` int32
    [.., 8]: first row, rows, tile head, first place and shares of a row tile whose keys were cut; with ``MERGED`` of
    every row tile. Without ``GAPS`` (see ``page_gaps_kernel``) every key tile counts as one that may hide a key.
    ``SPREAD``: heads of a share lie side by side, as their keys do, rather than shares of a head.
    ``EARLY``: the next kernel may be launched, and wait for this one's end. ``EVEN``: shares as ``balanced_keys`` says,
    records end in where page numbers begin and keys that can have a page, and rows of no sequence are some of one
    without keys, behind all others in ``span``.
    """
    if EARLY:
        gdc_launch_dependents()
    heads = sections * HEADS
    FREE: tl.constexpr = EVEN and RAGGED
    real = batch
    if FREE:
        real, batch = all_rows(batch, cu_ptr, total_q, max_q)
    keys = least
    if SPLIT:
        if EVEN:
            keys = balanced_keys(
                batch, heads, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, limit, target,
                least, programs, real, TOKENS, TILE_N, PAGE, CSR, RAGGED,
            )  # fmt: skip
        else:
            keys = share_keys(
                batch, heads, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, limit, target,
                least, TOKENS, TILE_N, PAGE, CSR, RAGGED,
            )  # fmt: skip
    e = tl.program_id(0) * TILES + tl.arange(0, TILES)
    b, before, merges_before, places_before, records, merges = find_tiles(
        e, keys, heads, batch, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, limit, real,
        TOKENS, PAGE, CSR, RAGGED, SPLIT, MERGED, FREE,
    )  # fmt: skip
    records = tl.minimum(records, max_records)
    if tl.program_id(0) == 0:
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, records)
        tl.store(counter_ptr + 2, tl.minimum(merges, max_merges))
        tl.store(counter_ptr + 3, 0)

    inside = (e < records) & (b < batch)
    q_start, q_len, k_len, table_at, held = sequence(
        b, inside, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, PAGE, CSR, RAGGED, real,
        FREE,
    )  # fmt: skip
    shares = e * 0 + 1
    if SPLIT:
        shares = tl.maximum(tl.cdiv(tl.minimum(held, limit), keys), 1)
    rows = tl.maximum(tl.cdiv(q_len, TOKENS), 1)
    local = tl.maximum(e - before, 0)
    share = local % shares
    tile = local // shares
    if SPREAD:
        tile = local % (heads * rows)
        share = local // (heads * rows)
    head = tile // (HEADS * rows) * HEADS + tile % HEADS
    m = rows - 1 - tile // HEADS % rows
    m0 = m * TOKENS
    m1 = tl.minimum(m0 + TOKENS, q_len) - 1
    entries = e * 0
    row = e.to(tl.int64) * 0
    if MASKED:
        row = b.to(tl.int64) * mask_stride_b + head // MASK_GROUP * mask_stride_h + m0 // BLOCK_Q
        known = inside & (b < real)
        entries = tl.maximum(tl.minimum(tl.load(count_ptr + row, mask=known, other=0), idx_width), 0)
    base, total = key_tile_range(
        entries, m0, m1, k_len - q_len, held, window_left, window_right, BLOCK_KV, TILE_N, MASKED, CAUSAL, WINDOW
    )
    part = tl.cdiv(total, shares)
    skip = tl.minimum(share * part, total)
    length = tl.minimum(part, total - skip)
    start = base + tl.where(skip < total, skip, 0)  # an empty share looks at the first tile, not past the last
    late = length
    early = e * 0
    if GAPS:
        lead = tl.load(gap_ptr + b, mask=inside, other=0)
        gap = tl.load(gap_ptr + batch + b, mask=inside, other=0)
        lo, hi = full_range(m0, m1, k_len - q_len, gap, window_left, window_right, CAUSAL, WINDOW)
        if WINDOW:
            lo = tl.maximum(lo, lead)
        else:
            hi = tl.where(lead > 0, 0, hi)
        late, early = cut_tiles(
            index_ptr + row * idx_width, entries, inside, base, total, start, length, lo, hi, BLOCK_KV, TILE_N,
            MASKED, WINDOW, False,
        )  # fmt: skip

    if EVEN:  # kernels of long computations do not ask for cut tiles, and find their pages with the first load
        late = table_at
        early = held
    merged = (shares > 1) | MERGED
    place = tl.where(merged, places_before + tile * shares + share, -1)
    length = tl.where(place < max_places, length, -1)  # bounds out of order could ask for more
    origin = tl.where(merged, places_before + tile * shares, 0)
    known = tl.where(origin + shares <= max_places, shares, 0)
    record = record_ptr + e.to(tl.int64) * 8
    store_row(record, m, head, b, place, length, start, late, early, inside)
    detail = record + max_records.to(tl.int64) * 8
    store_row(detail, q_start, q_len, table_at, k_len, held, origin, known, 0, inside)
    one = inside & (local == 0)
    tl.store(span_ptr + b, q_start, mask=one)
    tl.store(span_ptr + span_stride + b, q_start + q_len, mask=one)
    tl.store(span_ptr + 2 * span_stride + b, table_at, mask=one)
    tl.store(span_ptr + 3 * span_stride + b, table_at + k_len, mask=one)
    tl.store(span_ptr + 4 * span_stride + b, held, mask=one)
    if SPLIT or MERGED:
        merge = merges_before + tile
        one = inside & (share == 0) & merged & (merge < max_merges)
        store_merge(merge_ptr + merge.to(tl.int64) * 8, q_start + m0, m1 + 1 - m0, head, place, known, one)


@triton.jit(do_not_specialize=[*NUMBERS[:5], "num_pages"])
def page_gaps_kernel(
    gap_ptr, cu_ptr, lens_ptr, indptr_ptr, table_ptr, batch, total_q, max_q, table_stride, table_width, num_pages,
    PAGE: tl.constexpr, CSR: tl.constexpr, RAGGED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: from which to which key of a sequence every one has a page. Grid (batch,); ``gap`` int32 [2, batch].

    The first stretch that has; keys behind a later gap do not count.
    """
    b = tl.program_id(0)
    _start, _q_len, _k_len, first, held = sequence(
        b, b < batch, cu_ptr, lens_ptr, indptr_ptr, total_q, max_q, table_stride, table_width, PAGE, CSR, RAGGED
    )
    pages = tl.cdiv(held, PAGE)
    lead = pages
    gap = pages
    for start in range(0, pages, WIDTH):
        at = start + tl.arange(0, WIDTH)
        page = tl.load(table_ptr + first + at, mask=at < pages, other=-1)
        present = (page >= 0) & (page < num_pages)
        lead = tl.minimum(lead, tl.min(tl.where(present, at, pages), 0))
        gap = tl.minimum(gap, tl.min(tl.where(present | (at < lead), pages, at), 0))
    tl.store(gap_ptr + b, tl.minimum(lead * PAGE, held))
    tl.store(gap_ptr + batch + b, tl.minimum(gap * PAGE, held))


@triton.jit(do_not_specialize=["total_q", "rows"])
def merge_shares_kernel(
    part_ptr, sums_ptr, merge_ptr, counter_ptr, o_ptr, lse_ptr, sinks_ptr, stride_o, total_q, rows,
    DV: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, SHARES: tl.constexpr,
    COLUMNS: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: merges the shares of ``ROWS`` rows of a row tile, queries of its ``PACK`` heads, in some columns.

    Grid (merges, rows of a tile / ROWS, DV / COLUMNS). ``part`` float32 [places, rows, DV], ``sums`` float32 [places,
    2, rows], running maximum and sum; ``SHARES`` of them are read together. ``EARLY``: the program may begin before
    the kernel that leaves the shares has ended.
    """
    if EARLY:
        gdc_wait()
    merge = merge_ptr + tl.program_id(0).to(tl.int64) * 8
    first_row = tl.load(merge)
    tokens = tl.load(merge + 1)
    tile_head = tl.load(merge + 2)
    place = tl.load(merge + 3).to(tl.int64)
    shares = tl.load(merge + 4)
    if tl.program_id(0) >= tl.load(counter_ptr + 2):
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = row // PACK
    CHUNKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    in_group = tile_head % CHUNKS * PACK + row % PACK
    mine = (token < tokens) & (in_group < GROUP)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < DV
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, shares, SHARES):
        share = start + tl.arange(0, SHARES)
        at = place + share
        inside = mine[:, None] & (share < shares)[None, :]
        sums = sums_ptr + (at * 2 * rows)[None, :] + row[:, None]
        m_part = tl.load(sums, mask=inside, other=float("-inf"))  # [ROWS, SHARES]
        l_part = tl.load(sums + rows, mask=inside, other=0.0)
        at_part = ((at * rows)[None, :] + row[:, None]) * DV
        part_in = inside[:, :, None] & within[None, None, :]
        part = tl.load(part_ptr + at_part[:, :, None] + columns[None, None, :], mask=part_in, other=0.0)
        m_new = tl.maximum(m_i, tl.max(m_part, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: exp(-inf) = 0, not NaN
        alpha = tl.exp2((m_i - m_safe) * LOG2E)
        weight = tl.exp2((m_part - m_safe[:, None]) * LOG2E)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * part, 1)
        l_i = l_i * alpha + tl.sum(weight * l_part, 1)
        m_i = m_new
    head = (tile_head // CHUNKS * GROUP + in_group).to(tl.int64)
    q_row = first_row + token
    if tl.program_id(2) == 0:
        tl.store(lse_ptr + head * total_q + q_row, natural_lse(m_i, l_i), mask=mine)
    if SINKS:
        l_i = with_sink(m_i, l_i, tl.load(sinks_ptr + head, mask=mine, other=0.0))
    acc = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    o_row = q_row.to(tl.int64) * stride_o[0] + head * stride_o[1]
    o_at = o_ptr + o_row[:, None] + (columns * stride_o[2])[None, :]
    tl.store(o_at, acc.to(o_ptr.dtype.element_ty), mask=mine[:, None] & within[None, :])
