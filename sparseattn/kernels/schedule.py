"""The tile order of a persistent kernel, built on the device: longest tiles first, claimed one by one.

A tile is one block of query rows of one head (or of a group's heads that share their lists), or a share of its keys.
Tiles of one KV head form a section; sections follow one another, so that the heads that read the same keys run
together. Inside a section the tiles with most key tiles start first and the short ones fill the gaps at its end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import full_range, key_range, sequence_span
from sparseattn.kernels.launches import launch, of_fixed, scratch
from sparseattn.kernels.tiles import LENGTHS, WINDOW

# int32 fields of a record; see ``schedule_kernel``.
RECORD = 8
_TILES = 32
_OTHERS = 256


@triton.jit
def _decode(e, num_row_tiles, splits, HEADS: tl.constexpr):
    """(row tile, head, share) of tile ``e`` of a section: late rows first, heads of a row tile side by side."""
    share = e % splits
    head = e // splits % HEADS
    return num_row_tiles - 1 - e // (splits * HEADS), head, share


@triton.jit
def key_tile_range(
    entries, m0, m1, offset, k_len, window_left, window_right, BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(first, count) of the key tiles that query rows ``m0..m1`` walk: of a list's ``entries``, or of all keys."""
    if MASKED:
        base = entries * 0
        if BLOCK_KV >= TILE_N:
            count = entries * (BLOCK_KV // TILE_N)
        else:
            count = tl.cdiv(entries, TILE_N // BLOCK_KV)
    else:
        lo, hi = key_range(m0, m1, offset, k_len, window_left, window_right, CAUSAL, WINDOW)
        base = lo // TILE_N + m0 * 0
        count = tl.maximum(tl.cdiv(hi, TILE_N) - base, 0)
    return base, count


@triton.jit
def cut_tiles(
    list_ptr, entries, inside, base, total, first, length, lo, hi, BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, VARIABLE: tl.constexpr,
):  # fmt: skip
    """How many tiles at the end and at the start of a share may hide a key: all rows see keys ``lo .. hi`` whole.

    The walk has tiles ``base .. base + total``, the share ``first .. first + length``. With ``VARIABLE`` blocks ``hi``
    counts the tiles that they see whole, which come first.
    """
    lo = tl.maximum(lo, 0)
    hi = tl.maximum(hi, 0)
    if VARIABLE:
        late = total - hi
        early = entries * 0
    elif MASKED:
        late, early = _cut_entries(list_ptr, entries, inside, hi // BLOCK_KV, lo, BLOCK_KV, WINDOW)
        if BLOCK_KV >= TILE_N:
            late = late * (BLOCK_KV // TILE_N)
            early = early * (BLOCK_KV // TILE_N)
        else:
            late = total - (entries - late) // (TILE_N // BLOCK_KV)
            early = tl.cdiv(early, TILE_N // BLOCK_KV)
    else:
        late = base + total - hi // TILE_N
        early = tl.cdiv(lo, TILE_N) - base
    # Of the whole row tile; a share has what of them falls into it.
    late = late - (base + total - first - length)
    early = early - (first - base)
    late = tl.maximum(tl.minimum(late, length), 0)
    early = tl.maximum(tl.minimum(early, length - late), 0)
    return late, early


@triton.jit
def _key_tiles(
    e, inside, b, section_head, count_ptr, mask_stride_b, mask_stride_h, q_len, k_len, num_row_tiles, splits,
    window_left, window_right, TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    TILE_N: tl.constexpr, HEADS: tl.constexpr, MASK_GROUP: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, VARIABLE: tl.constexpr,
):  # fmt: skip
    """Key tiles of tile ``e``: first and count of the whole row tile, then of its share; -1 for rows past the end.

    Returns:
        (first key tile of the row tile, its key tiles, first of the share, count of the share, list entries, list row).
    """
    m, head, share = _decode(e, num_row_tiles, splits, HEADS)
    m0 = m * TOKENS
    m1 = tl.minimum(m0 + TOKENS, q_len) - 1
    if VARIABLE:
        row = b.to(tl.int64) * mask_stride_b + ((section_head + head) // MASK_GROUP) * mask_stride_h + m
        walk = count_ptr + row * 8
        m0 = tl.load(walk, mask=inside, other=0)
        m1 = tl.load(walk + 1, mask=inside, other=0) - 1
        entries = tl.load(walk + 4, mask=inside, other=0)
    elif MASKED:
        row = b.to(tl.int64) * mask_stride_b + ((section_head + head) // MASK_GROUP) * mask_stride_h + m0 // BLOCK_Q
        entries = tl.load(count_ptr + row, mask=inside, other=0)
    else:
        row = m0.to(tl.int64)
        entries = m0 * 0
    if VARIABLE:
        base, count = entries * 0, entries
    else:
        base, count = key_tile_range(
            entries, m0, m1, k_len - q_len, k_len, window_left, window_right, BLOCK_KV, TILE_N, MASKED, CAUSAL, WINDOW
        )
    part = tl.cdiv(count, splits)
    skip = tl.minimum(share * part, count)
    length = tl.where(m0 <= m1, tl.minimum(part, count - skip), -1)
    first = base + tl.where(skip < count, skip, 0)  # an empty share looks at the first tile, not past the last
    return base, count, first, length, entries, row


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, "num_row_tiles", "splits"])
def schedule_kernel(
    record_ptr, counter_ptr, count_ptr, index_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    mask_stride_b, mask_stride_h, idx_width, max_q, max_k, num_row_tiles, splits, window_left, window_right,
    TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr, HEADS: tl.constexpr,
    MASK_GROUP: tl.constexpr, TILES: tl.constexpr, OTHERS: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
    VARIABLE: tl.constexpr,
):  # fmt: skip
    """One program: the records of ``TILES`` tiles of one section, each written where its length ranks it.

    Grid (tiles of a section / TILES, sections of a sequence, batch). ``HEADS`` tiles heads (a packed group is one)
    make a section. A record is int32 [8]: row tile, head, sequence, share, key tiles (-1: nothing to do), first key
    tile, how many at the end and how many at the start of the share may hide a key from a row. With ``VARIABLE`` blocks
    the row tiles are those of ``piece_walks_kernel``, whose result takes the place of the counts.
    """
    b = tl.program_id(2)
    section = b * tl.num_programs(1) + tl.program_id(1)
    section_head = tl.program_id(1) * HEADS
    _q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    _k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    size = num_row_tiles * HEADS * splits
    if (tl.program_id(0) == 0) & (section == 0):
        tl.store(counter_ptr, 0)

    e = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = e < size
    base, total, first, length, entries, row = _key_tiles(
        e, inside, b, section_head, count_ptr, mask_stride_b, mask_stride_h, q_len, k_len, num_row_tiles,
        splits, window_left, window_right, TOKENS, BLOCK_Q, BLOCK_KV, TILE_N, HEADS, MASK_GROUP, MASKED, CAUSAL, WINDOW,
        VARIABLE,
    )  # fmt: skip
    rank = tl.zeros([TILES], tl.int32)
    for start in range(0, size, OTHERS):
        f = start + tl.arange(0, OTHERS)
        _base, _total, _first, other, _entries, _row = _key_tiles(
            f, f < size, b, section_head, count_ptr, mask_stride_b, mask_stride_h, q_len, k_len, num_row_tiles,
            splits, window_left, window_right, TOKENS, BLOCK_Q, BLOCK_KV, TILE_N, HEADS, MASK_GROUP, MASKED, CAUSAL,
            WINDOW, VARIABLE,
        )  # fmt: skip
        other = tl.where(f < size, other, -2)
        before = (other[None, :] > length[:, None]) | ((other[None, :] == length[:, None]) & (f[None, :] < e[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)

    m, head, share = _decode(e, num_row_tiles, splits, HEADS)
    m0 = m * TOKENS
    lo, hi = full_range(
        m0, tl.minimum(m0 + TOKENS, q_len) - 1, k_len - q_len, k_len, window_left, window_right, CAUSAL, WINDOW
    )
    if VARIABLE:
        hi = tl.load(count_ptr + row * 8 + 5, mask=inside, other=0)
    late, early = cut_tiles(
        index_ptr + row * idx_width, entries, inside, base, total, first, length, lo, hi, BLOCK_KV, TILE_N, MASKED,
        WINDOW, VARIABLE,
    )  # fmt: skip

    record = record_ptr + (section.to(tl.int64) * size + rank) * 8
    tl.store(record, m, mask=inside)
    tl.store(record + 1, section_head + head, mask=inside)
    tl.store(record + 2, tl.zeros([TILES], tl.int32) + b, mask=inside)
    tl.store(record + 3, share, mask=inside)
    tl.store(record + 4, length, mask=inside)
    tl.store(record + 5, first, mask=inside)
    tl.store(record + 6, late, mask=inside)
    tl.store(record + 7, early, mask=inside)


@triton.jit
def _cut_entries(list_ptr, entries, inside, limit, lo, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """How many of a list's last blocks reach to ``limit`` or past it, and how many of its first begin before ``lo``."""
    late = entries * 0
    going = inside & (entries > 0)
    while tl.max(going.to(tl.int32), 0) > 0:
        entry = tl.load(list_ptr + entries - 1 - late, mask=going, other=-1)
        going = going & (entry >= limit)
        late += going.to(tl.int32)
        going = going & (late < entries)
    early = entries * 0
    if WINDOW:
        going = inside & (entries > 0)
        while tl.max(going.to(tl.int32), 0) > 0:
            entry = tl.load(list_ptr + early, mask=going, other=0)
            going = going & (entry * BLOCK < lo)
            early += going.to(tl.int32)
            going = going & (early < entries)
    return late, early


@triton.jit
def _starts_below(tile_ptr, count, limit):
    """How many of ``count`` ascending tiles begin below ``limit``."""
    low = count * 0
    high = count
    going = low < high
    while tl.max(going.to(tl.int32), 0) > 0:
        middle = (low + high) // 2
        below = tl.load(tile_ptr + 2 * middle, mask=going, other=0) < limit
        low = tl.where(going & below, middle + 1, low)
        high = tl.where(going & ~below, middle, high)
        going = low < high
    return low


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, "num_pieces", "num_row_tiles", "num_rows", "whole_slots"])
def piece_walks_kernel(
    walk_ptr, piece_ptr, count_ptr, tile_ptr, num_pieces, num_row_tiles, num_rows, idx_width, whole_slots, max_q, max_k,
    window_left, window_right, TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    TILE_N: tl.constexpr, END: tl.constexpr, TILES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program: what ``TILES`` row tiles of a mask of variable blocks (see ``Tiling``) walk.

    Grid (row tiles / TILES, heads of the mask, its batch). A walk is int32 [8]: first query, one past the last (not
    above the former: nothing to do), list row, whole entries, key tiles of ``TILE_N``, how many of them, the first
    ones, all queries see whole, and where in a list the short entries begin. What lies past the keys that the queries
    may see is left out. With ``END`` short entries are of so many keys (see ``cut_ends``), and lie in tiles of their
    own; else they are of ``BLOCK_KV`` keys like the others, behind which they come.
    """
    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    e = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = e < num_row_tiles
    PARTS: tl.constexpr = BLOCK_Q // TOKENS
    piece = piece_ptr + (tl.program_id(1) * num_pieces + e // PARTS) * 3
    m0 = tl.load(piece, mask=inside, other=0) + e % PARTS * TOKENS
    m1 = tl.minimum(tl.load(piece + 1, mask=inside, other=0), m0 + TOKENS)
    row = group * num_rows + tl.load(piece + 2, mask=inside, other=0)
    COUNTS: tl.constexpr = 3 if END > 0 else 2
    whole = tl.load(count_ptr + COUNTS * row, mask=inside, other=0)
    short = tl.load(count_ptr + COUNTS * row + 1, mask=inside, other=0)
    clear = whole
    if CAUSAL or WINDOW:
        list_ptr = tile_ptr + row.to(tl.int64) * (2 * idx_width)
        offset = max_k - max_q
        _lo, hi = key_range(m0, m1 - 1, offset, max_k, window_left, window_right, CAUSAL, WINDOW)
        whole = _starts_below(list_ptr, whole, hi)
        short = _starts_below(list_ptr + 2 * whole_slots, short, hi)
        lo, hi = full_range(m0, m1 - 1, offset, max_k, window_left, window_right, CAUSAL, WINDOW)
        clear = _starts_below(list_ptr, whole, hi - BLOCK_KV + 1)
        clear = tl.where(lo > 0, 0, clear)
    walk = walk_ptr + (group.to(tl.int64) * num_row_tiles + e) * 8
    tl.store(walk, m0, mask=inside)
    tl.store(walk + 1, m1, mask=inside)
    tl.store(walk + 2, row, mask=inside)
    tl.store(walk + 3, whole, mask=inside)
    if END > 0:
        tl.store(walk + 4, whole * (BLOCK_KV // TILE_N) + tl.cdiv(short, TILE_N // END), mask=inside)
        clear = clear * (BLOCK_KV // TILE_N)
        if not (CAUSAL or WINDOW):
            clear += tl.load(count_ptr + COUNTS * row + 2, mask=inside, other=0) // (TILE_N // END)
        tl.store(walk + 5, clear, mask=inside)
    else:
        tl.store(walk + 4, tl.cdiv(whole + short, TILE_N // BLOCK_KV), mask=inside)
        tl.store(walk + 5, clear // (TILE_N // BLOCK_KV), mask=inside)
    tl.store(walk + 6, tl.zeros([TILES], tl.int32) + whole_slots, mask=inside)


@triton.jit(do_not_specialize=["whole_slots", "slots", "end_slots"])
def cut_ends_kernel(
    end_count_ptr, end_tile_ptr, count_ptr, tile_ptr, whole_slots, slots, end_slots, BLOCK_KV: tl.constexpr,
    END: tl.constexpr, ENTRIES: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """One program: a list with its short tiles cut into ``END`` keys each, the last of which has fewer. Grid (lists,).

    Takes ``count`` and ``tile`` of a ``Tiling``, whose lists have ``slots`` entries, and writes the like with
    ``end_slots`` ones; counts are of whole tiles, ends, and those that come first and have ``END`` keys. Ends ascend if
    ``ORDERED``. Zeros follow the last one, as many as fill a tile.
    """
    row = tl.program_id(0)
    whole = tl.load(count_ptr + 2 * row)
    short = tl.load(count_ptr + 2 * row + 1)
    source = tile_ptr + row.to(tl.int64) * (2 * slots)
    target = end_tile_ptr + row.to(tl.int64) * (2 * end_slots)
    for base in range(0, 2 * whole, 2 * ENTRIES):
        at = base + tl.arange(0, 2 * ENTRIES)
        tl.store(target + at, tl.load(source + at, mask=at < 2 * whole), mask=at < 2 * whole)
    source += 2 * whole_slots
    target += 2 * whole_slots
    full = short * 0
    if not ORDERED:
        for base in range(0, short, ENTRIES):
            at = base + tl.arange(0, ENTRIES)
            first = tl.load(source + 2 * at, mask=at < short, other=0)
            end = tl.load(source + 2 * at + 1, mask=at < short, other=0)
            full += tl.sum((end - first) // END, 0)
    part = tl.arange(0, BLOCK_KV // END)[None, :]
    ends = short * 0
    rests = full
    for base in range(0, short, ENTRIES):
        at = base + tl.arange(0, ENTRIES)
        first = tl.load(source + 2 * at, mask=at < short, other=0)
        end = tl.load(source + 2 * at + 1, mask=at < short, other=0)
        count = tl.cdiv(end - first, END)
        if ORDERED:
            place = (ends + tl.cumsum(count, 0) - count)[:, None] + part
            ends += tl.sum(count, 0)
        else:
            filled = (end - first) // END
            rest = count - filled
            place = (ends + tl.cumsum(filled, 0) - filled)[:, None] + part
            place = tl.where(part < filled[:, None], place, (rests + tl.cumsum(rest, 0) - rest)[:, None])
            ends += tl.sum(filled, 0)
            rests += tl.sum(rest, 0)
        begin = first[:, None] + part * END
        used = part < count[:, None]
        tl.store(target + 2 * place, begin, mask=used)
        tl.store(target + 2 * place + 1, tl.minimum(begin + END, end[:, None]), mask=used)
    ends = tl.maximum(ends, rests)
    rest = 2 * ends + tl.arange(0, 2 * BLOCK_KV // END)
    tl.store(target + rest, rest * 0, mask=rest < 2 * (end_slots - whole_slots))
    tl.store(end_count_ptr + 3 * row, whole)
    tl.store(end_count_ptr + 3 * row + 1, ends)
    tl.store(end_count_ptr + 3 * row + 2, full)


@of_fixed()
def cut_ends(
    counts: Tensor, tiles: Tensor, keys: int, block_kv: int, end: int, *, ordered: bool
) -> tuple[Tensor, Tensor]:
    """The lists of a ``Tiling`` with short tiles cut into entries of ``end`` keys, so that a key tile holds several.

    What is left of a run of blocks would cost a whole key tile each; so it costs less than ``end`` keys.

    Args:
        counts: int32 [B|1, H, MB + 1, 2] of a ``Tiling``.
        tiles: int32 [B|1, H, MB + 1, W + R, 2].
        keys: Sk.
        block_kv: Keys of a whole tile.
        end: A divisor of it.
        ordered: Entries ascend, as causality and windows want them; else those of ``end`` keys come first, whose key
            tiles are seen whole.

    Returns:
        int32 [B|1, H, MB + 1, 3]: whole tiles, entries of ``end`` keys or less, and the first ones that are known to
        have as many; and the lists, with such entries in the place of the short tiles, nothing but zeros up to the next
        multiple of ``block_kv / end`` of them, and then nobody's.
    """
    whole, slots = keys // block_kv, tiles.shape[3]
    parts = block_kv // end
    short = slots - whole
    width = whole + triton.cdiv(min(short * parts, keys // end + short), parts) * parts
    made = scratch((*counts.shape[:3], 3), torch.int32, counts.device)
    lists = scratch((*tiles.shape[:3], width, 2), torch.int32, counts.device)
    launch(
        cut_ends_kernel, (counts.numel() // 2,), made, lists, counts, tiles, whole, slots, width,
        BLOCK_KV=block_kv, END=end, ENTRIES=_TILES, ORDERED=ordered, num_warps=1, **LAUNCH,
    )  # fmt: skip
    return made, lists


@of_fixed()
def piece_walks(
    pieces: Tensor,
    counts: Tensor,
    tiles: Tensor,
    lengths: tuple[int, int],
    window: tuple[int, int],
    *,
    tokens: int,
    block: tuple[int, int],
    tile_n: int,
    end: int,
    causal: bool,
) -> Tensor:
    """What the row tiles of a mask of variable blocks walk, for ``tile_schedule`` and the forward kernel.

    Args:
        pieces: int32 [H, P, 3] of a ``Tiling`` for ``block``.
        counts: int32 [B|1, H, MB + 1, 2]; those of ``cut_ends``, if it made the lists.
        tiles: int32 [B|1, H, MB + 1, W + R, 2]; likewise.
        lengths: (Sq, Sk).
        window: (left, right), -1 for unbounded.
        tokens: Query tokens of a row tile, a divisor of ``block[0]``.
        block: Most queries of a piece, keys of a whole tile.
        tile_n: Keys of a key tile.
        end: Keys of a short entry, if ``cut_ends`` made the lists; else 0.
        causal: Bottom-right aligned.

    Returns:
        int32 [B|1, H, P * block[0] / tokens, 8]; see ``piece_walks_kernel``.
    """
    batch, heads, rows, width, _ = tiles.shape
    row_tiles = pieces.shape[1] * (block[0] // tokens)
    walks = scratch((batch, heads, row_tiles, 8), torch.int32, pieces.device)
    launch(
        piece_walks_kernel, (triton.cdiv(row_tiles, _TILES), heads, batch),
        walks, pieces, counts, tiles, pieces.shape[1], row_tiles, rows, width, lengths[1] // block[1], *lengths,
        *window, TOKENS=tokens, BLOCK_Q=block[0], BLOCK_KV=block[1], TILE_N=tile_n, END=end, TILES=_TILES,
        CAUSAL=causal,
        WINDOW=window[0] >= 0 or window[1] >= 0, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return walks


@of_fixed()
def tile_schedule(
    counts: Tensor | None,
    indices: Tensor | None,
    lists: tuple[int, int, int],
    spans: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: tuple[int, int],
    window: tuple[int, int],
    *,
    batch: int,
    sections: int,
    heads: int,
    tokens: int,
    block: tuple[int, int],
    tile_n: int,
    mask_group: int,
    splits: int,
    causal: bool,
    ragged: tuple[bool, bool],
    device: torch.device,
    walks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Records of all tiles in the order in which they should start, and the counter that hands them out.

    Args:
        counts: int32 [B|1, H, MB] of the block lists, or None for dense attention.
        indices: int32 [B|1, H, MB, K].
        lists: List rows per batch entry and per head, width of a list.
        spans: q_start, q_end, k_start, k_end, int32 [batch] each; any tensors where ``ragged`` says no.
        lengths: (max_q, max_k).
        window: (left, right), -1 for unbounded.
        batch: Number of sequences.
        sections: KV heads.
        heads: Tiles heads of a section: query heads of a group, or packs of them.
        tokens: Query tokens of a row tile.
        block: (rows, columns) of a mask block.
        tile_n: Keys of a key tile.
        mask_group: Tiles heads that share a list.
        splits: Shares into which the keys of a row tile are cut.
        causal: Bottom-right aligned.
        ragged: Whether (query, key) spans are given.
        device: Of the results.
        walks: Of variable blocks, from ``piece_walks``; then ``lists`` counts their row tiles instead of list rows.

    Returns:
        int32 [batch * sections * heads * row tiles * splits, 8] and int32 [1], zero.
    """
    rows = triton.cdiv(lengths[0], tokens) if walks is None else walks.shape[2]
    counts = counts if walks is None else walks
    size = rows * heads * splits
    records = scratch((batch * sections * size, RECORD), torch.int32, device)
    counter = scratch((1,), torch.int32, device)
    stand_in = counter if counts is None else counts
    launch(
        schedule_kernel, (triton.cdiv(size, _TILES), sections, batch),
        records, counter, stand_in, stand_in if indices is None else indices, *spans, *lists, *lengths,
        rows, splits, *window,
        TOKENS=tokens, BLOCK_Q=block[0], BLOCK_KV=block[1], TILE_N=tile_n, HEADS=heads, MASK_GROUP=mask_group,
        TILES=_TILES, OTHERS=_OTHERS, MASKED=counts is not None, CAUSAL=causal,
        WINDOW=window[0] >= 0 or window[1] >= 0, RAGGED_Q=ragged[0], RAGGED_K=ragged[1],
        VARIABLE=walks is not None, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return records, counter
