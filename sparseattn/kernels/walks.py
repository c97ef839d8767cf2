"""Walks of a backward pass, planned on the device: for each stationary tile, which steps of the other side it takes.

Stationary are 128 keys that query rows walk past (dK and dV; transposed lists), or 128 query rows that keys walk past
(dQ; forward lists). Call a stationary row x and a walking one y: x and y meet iff ``x + back <= y <= x + ahead``. Steps
are counted along the list, whose blocks hold several each or whose boxes fill one together (``unions``), or along the
whole sequence where there is no mask. Because lists ascend, the steps that may hide an element from another lie at a
walk's two ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch
from sparseattn.kernels.unions import ROWS, SHIFT

# Fields of a record.
X0 = tl.constexpr(0)  # first stationary row of the tile, within its sequence
HEAD = tl.constexpr(1)  # stationary head; -1 says stop
OUT_ROW = tl.constexpr(2)  # first row of the sequence in a contiguous [B * S, H, D] result
X_LENGTH = tl.constexpr(3)
MASKED_STEPS = tl.constexpr(4)  # steps that need an element mask; they come first
STEPS = tl.constexpr(5)
OFFSET = tl.constexpr(6)  # Sk - Sq
Y_LENGTH = tl.constexpr(7)
TILE = tl.constexpr(8)  # the sequence's first tile of 64 query rows, of each head
SEQUENCE = tl.constexpr(9)
X_START = tl.constexpr(10)  # first row of the sequence
Y_START = tl.constexpr(11)
SEEN = tl.constexpr(12)  # with lists of ``unions``, bits of the stationary rows that any walking one sees
RECORD = tl.constexpr(16)

# The largest reach of a window: none.
UNBOUNDED = 1 << 29

_TILES = 8
_OTHERS = 512
_PROBES = 16
# Sections whose short tiles wait for the end, and which share of each head's tiles is short.
_RESERVED = 6
_SHORT = 4
# Tiles of a program that are few.
_FEW = 8


@triton.jit
def first_query_tile(q_start, b, max_q, PACKED: tl.constexpr):
    """Number of a sequence's first tile of 64 query rows: every sequence has whole tiles, packed or not."""
    if PACKED:
        tile = q_start // 64 + b
    else:
        tile = tl.cdiv(max_q, 64) * b
    return tile


@triton.jit
def _first_steps(
    list_ptr, count, limit, rounds, inside,
    BLOCK: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, PROBES: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The first steps of walks that begin at rows ``limit`` or later, or how many there are; [A, B, C] each.

    A round asks for ``PROBES`` entries at once and leaves one part in ``PROBES + 1`` of a list: rounds wait for one
    another, entries do not.
    """
    if MASKED:
        block = limit // BLOCK
        low = (count + block) * 0
        high = count + block * 0
        probe = tl.arange(0, PROBES)[None, None, None, :] + 1
        for _ in range(rounds):
            size = high - low
            at = low[:, :, :, None] + size[:, :, :, None] * probe // (PROBES + 1)
            present = (inside & (size > 0))[:, :, :, None] & (probe > 0)
            entry = tl.load(list_ptr[:, :, :, None] + at, mask=present, other=0) >> SHIFT
            before = tl.sum((present & (entry < block[:, :, :, None])).to(tl.int32), 3)
            high = tl.where(before < PROBES, low + size * (before + 1) // (PROBES + 1), high)
            low = tl.where(before > 0, low + size * before // (PROBES + 1) + 1, low)
        entry = tl.load(list_ptr + low, mask=inside & (low < count), other=-1) >> SHIFT
        step = low * (BLOCK // STEP) + tl.where(entry == block, (limit % BLOCK + STEP - 1) // STEP, 0)
    else:
        step = (limit + STEP - 1) // STEP
    return step


@triton.jit
def _length(
    e, inside, count_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, mask_stride_b, mask_stride_h, max_q, max_k,
    back, ahead, tiles, heads,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, MASK_GROUP: tl.constexpr, BLOCK_X: tl.constexpr, STEP: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """About how long tile ``e`` takes: list entries, or steps where there are no lists; -1 past a sequence's end."""
    b = e // (heads * tiles)
    head = e // tiles % heads
    x0 = e % tiles * ROWS
    _, q_len = _spans(q_start_ptr, q_end_ptr, b, max_q, inside, RAGGED_Q)
    _, k_len = _spans(k_start_ptr, k_end_ptr, b, max_k, inside, RAGGED_K)
    x_len = k_len if KEYS else q_len
    y_len = q_len if KEYS else k_len
    if MASKED:
        h = tl.arange(0, HEADS_P2)
        row = (b * mask_stride_b + x0 // BLOCK_X)[:, None] + (head[:, None] * HEADS + h[None, :]) // MASK_GROUP * (
            mask_stride_h
        )
        counts = tl.load(count_ptr + row, mask=inside[:, None] & (h < HEADS)[None, :] & (x0 < x_len)[:, None], other=0)
        length = tl.sum(counts, 1)
    else:
        shift = k_len - q_len if KEYS else q_len - k_len
        low = tl.minimum(tl.maximum(x0 - shift + back, 0), y_len)
        high = tl.minimum(tl.maximum(x0 + ROWS - shift + ahead, 0), y_len)
        length = tl.maximum(high - low, 0) // STEP
    return tl.where(inside & (x0 < x_len), length, -1)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _spans(start_ptr, end_ptr, b, length, inside, RAGGED: tl.constexpr):
    """``sequence_span`` of many sequences."""
    start = b * 0
    length = start + length
    if RAGGED:
        start = tl.load(start_ptr + b, mask=inside, other=0)
        length = tl.load(end_ptr + b, mask=inside, other=0) - start
    return start, length


@triton.jit
def _group(e, tiles, section, tail, reserve, cut):
    """First place of tiles that are ordered together with ``e``, and whether they are the last ones; see below."""
    number = e // section
    longer = section // tiles * cut
    final = (e >= tail) | ((number >= reserve) & (e % tiles >= cut))
    first = tl.minimum(number, reserve) * section + tl.maximum(number - reserve, 0) * longer
    return tl.where(final, reserve * section + (tail // section - reserve) * longer, first), final


@triton.jit(
    do_not_specialize=[
        "mask_stride_b", "mask_stride_h", "idx_width", "rounds", "max_q", "max_k", "out_rows", "back", "ahead",
        "tiles", "heads", "section", "tail", "reserve", "cut", "total",
    ]
)  # fmt: skip
def walk_kernel(
    record_ptr, ranges_ptr, counter_ptr, count_ptr, index_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    mask_stride_b, mask_stride_h, idx_width, rounds, max_q, max_k, out_rows, back, ahead,
    tiles, heads, section, tail, reserve, cut, total,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, MASK_GROUP: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, OTHERS: tl.constexpr,
    PROBES: tl.constexpr, GATHER: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One program: records and walks of ``TILES`` tiles, each written to its place in the order of their lengths.

    Grid (tiles / TILES,). Tiles are ordered [sequence, stationary head, 128 rows]; a stationary head walks past
    ``HEADS`` heads of the other side. ``section`` tiles in a row (those of one KV head) start together, longest first;
    tiles from ``tail`` on are one section, so that the last to start are short, and take in the tiles from number
    ``cut`` on, of each head, of the sections from number ``reserve`` on. ``GATHER`` entries of a list make a step (0:
    an entry makes one or more), and their blocks are shifted by ``SHIFT``.

    Writes ``record`` int32 [total + 1, 16] (the last says stop), ``ranges`` int32 [total, 3, HEADS, 2], the first step
    and the end of each head's walk: steps with element masks before the others, steps with them behind, the others;
    and a zero counter.
    """
    e = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = e < total
    if tl.program_id(0) == 0:
        tl.store(counter_ptr, 0)
        tl.store(record_ptr + total * RECORD + tl.arange(0, RECORD), tl.full([RECORD], -1, tl.int32))

    length = _length(
        e, inside, count_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, mask_stride_b, mask_stride_h,
        max_q, max_k, back, ahead, tiles, heads, HEADS, HEADS_P2, MASK_GROUP, BLOCK_X, STEP, KEYS, MASKED, RAGGED_Q,
        RAGGED_K, ROWS,
    )  # fmt: skip
    first, final = _group(e, tiles, section, tail, reserve, cut)
    rank = first
    begin = tl.program_id(0) * TILES // section * section
    end = tl.minimum((tl.program_id(0) * TILES + TILES - 1) // section * section + section, total)
    if tl.max((final & inside).to(tl.int32), 0) > 0:
        begin = tl.minimum(begin, reserve * section)
        end = total
    for start in range(begin, end, OTHERS):
        f = start + tl.arange(0, OTHERS)
        other = _length(
            f, f < total, count_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, mask_stride_b, mask_stride_h,
            max_q, max_k, back, ahead, tiles, heads, HEADS, HEADS_P2, MASK_GROUP, BLOCK_X, STEP, KEYS, MASKED,
            RAGGED_Q, RAGGED_K, ROWS,
        )  # fmt: skip
        theirs, _ = _group(f, tiles, section, tail, reserve, cut)
        earlier = (other[None, :] > length[:, None]) | ((other[None, :] == length[:, None]) & (f[None, :] < e[:, None]))
        earlier = earlier & (theirs[None, :] == first[:, None]) & (f < total)[None, :]
        rank += tl.sum(earlier.to(tl.int32), 1)

    b = e // (heads * tiles)
    head = e // tiles % heads
    x0 = e % tiles * ROWS
    q_start, q_len = _spans(q_start_ptr, q_end_ptr, b, max_q, inside, RAGGED_Q)
    k_start, k_len = _spans(k_start_ptr, k_end_ptr, b, max_k, inside, RAGGED_K)
    x_start = k_start if KEYS else q_start
    y_start = q_start if KEYS else k_start
    x_len = k_len if KEYS else q_len
    y_len = q_len if KEYS else k_len
    low = x0 - (k_len - q_len if KEYS else q_len - k_len) + back
    high = low - back + ahead
    # Walking rows that some, and that all, of the stationary ones meet.
    some_lo = low - (STEP - 1)
    some_hi = tl.minimum(high + ROWS, y_len)
    full_lo = low + (ROWS - 1)
    full_hi = high - (STEP - 2)
    if KEYS:  # keys past the end would meet every row
        full_lo = tl.where(x0 + ROWS > x_len, y_len, full_lo)
    else:
        full_hi = tl.minimum(full_hi, y_len - (STEP - 1))
    some_hi = tl.where((x0 < x_len) & inside, some_hi, 0)

    h = tl.arange(0, HEADS_P2)
    present = inside[:, None] & (h < HEADS)[None, :]
    row = (b * mask_stride_b + x0 // BLOCK_X)[:, None] + (head[:, None] * HEADS + h[None, :]) // MASK_GROUP * (
        mask_stride_h
    )
    count = row * 0
    list_ptr = index_ptr + row.to(tl.int64) * idx_width
    if MASKED:
        count = tl.load(count_ptr + row, mask=present, other=0)
    # [TILES, HEADS_P2, 4]: the four bounds in one search, whose loads then wait together.
    which = tl.arange(0, 4)[None, None, :]
    limit = tl.where(which < 1, some_lo[:, None, None], full_lo[:, None, None])
    limit = tl.where(which < 2, limit, tl.where(which < 3, full_hi[:, None, None], some_hi[:, None, None]))
    limit = tl.maximum(tl.minimum(limit, y_len[:, None, None]), 0)
    steps = _first_steps(
        list_ptr[:, :, None],
        count[:, :, None],
        limit,
        rounds,
        present[:, :, None],
        BLOCK_Y,
        STEP,
        MASKED,
        PROBES,
        SHIFT,
    )
    steps += (count * 0)[:, :, None]
    n0 = tl.sum(tl.where(which == 0, steps, 0), 2)
    n1 = tl.sum(tl.where(which == 1, steps, 0), 2)
    n2 = tl.sum(tl.where(which == 2, steps, 0), 2)
    n3 = tl.sum(tl.where(which == 3, steps, 0), 2)
    if GATHER:  # these were boxes: whatever one of them needs, its step does
        n0 //= GATHER
        n1 = tl.cdiv(n1, GATHER)
        n2 //= GATHER
        n3 = tl.cdiv(n3, GATHER)
    n0 = tl.minimum(n0, n3)
    n1 = tl.minimum(tl.maximum(n1, n0), n3)
    n2 = tl.minimum(tl.maximum(n2, n1), n3)
    masked = tl.sum(tl.where(present, n1 - n0 + n3 - n2, 0), 1)
    total_steps = tl.sum(tl.where(present, n3 - n0, 0), 1)

    record = record_ptr + rank * RECORD
    tl.store(record + X0, x0, mask=inside)
    tl.store(record + HEAD, head, mask=inside)
    tl.store(record + OUT_ROW, b * out_rows + x_start, mask=inside)
    tl.store(record + X_LENGTH, x_len, mask=inside)
    tl.store(record + MASKED_STEPS, masked, mask=inside)
    tl.store(record + STEPS, total_steps, mask=inside)
    tl.store(record + OFFSET, k_len - q_len, mask=inside)
    tl.store(record + Y_LENGTH, y_len, mask=inside)
    tl.store(record + TILE, first_query_tile(q_start, b, max_q, PACKED), mask=inside)
    tl.store(record + SEQUENCE, b, mask=inside)
    tl.store(record + X_START, x_start, mask=inside)
    tl.store(record + Y_START, y_start, mask=inside)
    if GATHER:
        bits = tl.load(list_ptr + (idx_width - 1), mask=present, other=0)
        tl.store(record + SEEN, tl.reduce(bits, 1, _either), mask=inside)
    ranges = ranges_ptr + (rank[:, None] * (3 * HEADS) + h[None, :]) * 2
    tl.store(ranges, n0, mask=present)
    tl.store(ranges + 1, n1, mask=present)
    tl.store(ranges + 2 * HEADS, n2, mask=present)
    tl.store(ranges + 2 * HEADS + 1, n3, mask=present)
    tl.store(ranges + 4 * HEADS, n1, mask=present)
    tl.store(ranges + 4 * HEADS + 1, n2, mask=present)


def walks(
    lists: tuple[Tensor, Tensor, int, int, int] | None,
    spans: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    keys: bool,
    batch: int,
    lengths: tuple[int, int],
    window: tuple[int, int],
    heads: int,
    per_head: int,
    section_heads: int,
    mask_group: int,
    blocks: tuple[int, int],
    step: int,
    out_rows: int,
    packed: bool,
    ragged: tuple[bool, bool],
    processors: int,
    device: torch.device,
    gather: int = 0,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Records, ranges and the zero counter of a persistent kernel, and how many tiles there are; see ``walk_kernel``.

    Args:
        lists: int32 counts and indices, list rows per batch entry and per head, width of a list; None without a mask.
        spans: q_start, q_end, k_start, k_end, int32 [batch] each; any tensors where ``ragged`` says no.
        keys: Keys are stationary.
        batch: Number of sequences.
        lengths: (max_q, max_k).
        window: Keys that a row sees (before, after) its diagonal; ``UNBOUNDED`` for all.
        heads: Stationary heads.
        per_head: Walking heads that each of them passes.
        section_heads: Stationary heads of a KV head.
        mask_group: Query heads that share a list.
        blocks: Stationary and walking rows of a mask block.
        step: Walking rows of a step.
        out_rows: Rows of a sequence of the result (0 when packed).
        packed: Sequences lie behind one another.
        ragged: Whether (query, key) spans are given.
        processors: Programs that will share the tiles.
        device: Of the results.
        gather: Entries that make a step, of lists as ``unions`` makes them; ``step`` are the rows of each then.
    """
    tiles = triton.cdiv(lengths[1] if keys else lengths[0], ROWS)
    total = batch * heads * tiles
    records = torch.empty((total + 1, RECORD.value), dtype=torch.int32, device=device)
    ranges = torch.empty((total, 3, per_head, 2), dtype=torch.int32, device=device)
    counter = torch.empty(1, dtype=torch.int32, device=device)
    section = section_heads * tiles
    # Whole sections at the end that give each program one tile or more, or two sections where three tiles each are no
    # more: the longer the tail, the better the balance, and the more KV heads' queries take turns in the L2 cache.
    last = min(triton.cdiv(3 * processors, section), max(2, triton.cdiv(3 * processors // 2, section)))
    reach_back, reach_ahead = window
    # Where all later rows see a key, the last keys of each head are few rows' work. With few tiles a program, that of
    # some sections waits for the last one: it fills what long tiles leave, without taking the cache from their queries.
    few = keys and reach_ahead == 0 and reach_back == UNBOUNDED and total <= _FEW * processors
    cut = tiles - tiles // _SHORT if few else tiles
    sections = max(0, total // section - (1 if few else last))
    back, ahead = (-reach_ahead, reach_back) if keys else (-reach_back, reach_ahead)
    counts, indices, *strides = lists or (records, records, 0, 0, 0)
    rounds, width = 0, strides[2]
    while width > 0:
        rounds, width = rounds + 1, width // (_PROBES + 1)
    launch(
        walk_kernel, (triton.cdiv(total, _TILES),),
        records, ranges, counter, counts, indices, *spans, *strides, rounds,
        *lengths, out_rows, back, ahead, tiles, heads, section, sections * section, max(0, sections - _RESERVED), cut,
        total, HEADS=per_head, HEADS_P2=triton.next_power_of_2(per_head), MASK_GROUP=mask_group, BLOCK_X=blocks[0],
        BLOCK_Y=blocks[1], STEP=step, KEYS=keys, MASKED=lists is not None, RAGGED_Q=ragged[0], RAGGED_K=ragged[1],
        PACKED=packed, ROWS=ROWS, TILES=_TILES, OTHERS=_OTHERS, PROBES=_PROBES, GATHER=gather,
        SHIFT=SHIFT.value if gather else 0, num_warps=8, **LAUNCH,
    )  # fmt: skip
    return records, ranges, counter, total
