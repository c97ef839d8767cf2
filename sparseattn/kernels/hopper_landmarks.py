"""The Hopper kernel of landmark scores: query rows against the landmarks of all earlier blocks, streamed past them.

A persistent program a multiprocessor. One warp, the loader, streams tiles of 128 keys (the forced blocks, exactly) or
landmarks through a ring; two to four warpgroups, the scorers, hold 64 query rows each, of heads that share keys, and
meet every tile. Landmarks come in the order of ``landmark_row``, which gives every thread whole blocks: what a cluster
weighs is summed up without a word to other threads.
"""

# Annotations must stay objects for the Gluon front end: no ``from __future__ import annotations``.
from dataclasses import dataclass, field
from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparseattn.kernels.hopper import async_load, load_rows, next_stage, ring, sequence_span, tile_layout
from sparseattn.kernels.hopper_attention import HIDDEN, LOG2E, row_sums, thread_sums
from sparseattn.kernels.hopper_landmark_items import item_facts, item_of, item_tiles, tell_item
from sparseattn.kernels.hopper_masses import TILE, fast_log2, keep_masses, mass_layout, write_candidates, write_scores

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
NUMBERS = [
    "bounds_stride_b", "max_q", "max_k", "k_rows", "num_rows", "num_columns", "landmark_rows", "reach_blocks",
    "strip_rows", "first_row", "rows_here", "items", "batch",
]  # fmt: skip

# Base-2 logits by which landmarks may exceed the forced blocks: sums relative to these stay far from overflow.
ROOM: gl.constexpr = gl.constexpr(100.0)


@dataclass(frozen=True, eq=False)
class Facts:
    """What the kernel is compiled for.

    Attributes:
        HEADS: Query heads.
        GROUP: Query heads of a KV head.
        SHARED: Query heads of a row of scores.
        BLOCK_D: Head dimension, padded to a power of two.
        D: Head dimension.
        BLOCK: Rows and keys of a block.
        CLUSTERS: Landmarks of a block.
        ROWS: Scored rows of a query block.
        FIRST: 1 if the first block is forced.
        CAUSAL: Bottom-right aligned.
        RAGGED_Q: Sequences have query spans of their own.
        RAGGED_K: Likewise, key spans.
        LISTS: Scores come less the threshold.
        HEAD_TAUS: Each query head has a threshold.
        CANDIDATES: Only what reaches the threshold is kept.
        CONSUMERS: Warpgroups that compute, 64 rows each.
        STAGES: Tiles in flight.
        IN_TURN: Warpgroups start their products one after another.
        FLIP: Logits fall with products.
        HEAD_ROWS: Rows of one head in a warpgroup.
        SLOTS: Warpgroups' shares of the rows of a query block of one KV head.
        COMBINE: Several warpgroups, or heads, meet in one row of scores.
        MEETS: Scores are raised from -inf, not written.
    """

    HEADS: int
    GROUP: int
    SHARED: int
    D: int
    BLOCK_D: int
    BLOCK: int
    CLUSTERS: int
    ROWS: int
    FIRST: int
    CAUSAL: bool
    RAGGED_Q: bool
    RAGGED_K: bool
    LISTS: bool
    HEAD_TAUS: bool
    CANDIDATES: bool
    CONSUMERS: int
    STAGES: int
    IN_TURN: bool
    FLIP: bool

    HEAD_ROWS: Any = field(init=False, default=0)
    SLOTS: Any = field(init=False, default=0)
    COMBINE: Any = field(init=False, default=False)
    MEETS: Any = field(init=False, default=False)

    def __post_init__(self) -> None:
        combine = self.ROWS > 64 or self.SHARED > 1
        facts = vars(self) | {"HEAD_ROWS": min(self.ROWS, 64), "SLOTS": -(-self.GROUP * self.ROWS // 64)}
        facts |= {"COMBINE": combine, "MEETS": combine or self.CANDIDATES}
        # Attributes of a compile-time argument must be compile-time values themselves.
        for name, value in facts.items():
            object.__setattr__(self, name, gl.constexpr(value))

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@gluon.jit
def key_column(i, first, F: gl.constexpr):
    """The first key of key tile ``i``."""
    return gl.where(i < F.FIRST, 0, first + (i - F.FIRST) * TILE)


@gluon.jit
def loader(call, F: gl.constexpr):
    """The warp that loads."""
    (
        k_desc, c_desc, spreads_ptr, landmarks, spreads_s, facts, spans, bounds, max_q, max_k, k_rows, landmark_rows,
        items, groups,
    ) = call  # fmt: skip
    tiles, full, empty = landmarks
    lane: gl.constexpr = gl.BlockedLayout([TILE // 32], [32], [1], [0])
    offs = gl.arange(0, TILE, lane)
    stage = 0
    phase = 1
    # One item more than there is: scorers look at what comes next.
    for turn in range(0, (items + gl.num_programs(0) - 1) // gl.num_programs(0) + 1):
        item = item_of(turn)
        b = item % groups // (F.HEADS // F.GROUP)
        kv_head = item % groups % (F.HEADS // F.GROUP)
        k_start, k_len = sequence_span(spans[2], spans[3], b, max_k, F.RAGGED_K)
        first, forced, count = tell_item(turn, facts, b, kv_head, k_len, item // groups, spans, bounds, max_q, F)
        for i in range(0, forced):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), TILE * F.BLOCK_D * 2)
            row = key_column(i, first, F)
            load_rows(k_desc, k_start + b * k_rows, k_len, row, kv_head, full.index(stage), tiles.index(stage))
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = next_stage(stage, phase, F.STAGES)
        base = item % groups * landmark_rows
        for i in range(0, count):
            spread = gl.load(spreads_ptr + (base + i * TILE + offs))
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), TILE * F.BLOCK_D * 2)
            async_load(c_desc, (base + i * TILE, 0), full.index(stage), tiles.index(stage))
            spreads_s.index(stage).store(spread)
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = next_stage(stage, phase, F.STAGES)


@gluon.jit
def tokens_of(rows_ptr, b, kv_head, q_len, m, slot, recent, num_rows, F: gl.constexpr):
    """The tokens [64] of a share's rows, -1 where there is no such row: one a thread, not yet where they are needed."""
    at = slot * 64 + gl.arange(0, 64, gl.BlockedLayout([1], [32], [4], [0]))
    inside = (at < F.GROUP * F.ROWS) & (recent > 0)
    chosen = at % F.ROWS
    if rows_ptr is not None:
        row = ((b * F.HEADS + kv_head * F.GROUP + at // F.ROWS).to(gl.int64) * num_rows + m) * F.ROWS + chosen
        chosen = gl.load(rows_ptr + row, mask=inside, other=-1)
    tokens = m * F.BLOCK + chosen
    return gl.where(inside & (chosen >= 0) & (tokens < q_len), tokens, -1)


@gluon.jit
def fetch_queries(q, strides, tokens, b, kv_head, q_start, slot, F: gl.constexpr):
    """A share's rows [64, BLOCK_D], zeros where there is none."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // F.BLOCK_D, F.BLOCK_D // 8], [4, 1], [1, 0])
    at = slot * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    offs_d = gl.arange(0, F.BLOCK_D, gl.SliceLayout(0, layout))
    head = kv_head * F.GROUP + at // F.ROWS
    tokens = gl.convert_layout(tokens, at.type.layout)
    offs = (q_start + tokens).to(gl.int64) * strides[1] + head.to(gl.int64) * strides[2]
    return gl.load(
        q + b.to(gl.int64) * strides[0] + (offs[:, None] + offs_d[None, :]),
        mask=(tokens >= 0)[:, None] & (offs_d < F.D)[None, :], other=0.0,
    )  # fmt: skip


@gluon.jit
def take_turn(turns, CID: gl.constexpr, beat):
    """Wait until the scorer before has started its products: what one weighs, the others multiply meanwhile."""
    mbarrier.wait(turns.index(CID), beat)
    return beat ^ 1


@gluon.jit
def pass_turn(turns, CID: gl.constexpr, F: gl.constexpr):
    """Let the next scorer go on."""
    mbarrier.arrive(turns.index((CID + 1) % F.CONSUMERS), count=1)


@gluon.jit
def start_products(q, tile, turns, CID: gl.constexpr, beat, zeros, F: gl.constexpr):
    """Start the products of the rows with a tile, in turn with the other scorers."""
    if F.IN_TURN:
        beat = take_turn(turns, CID, beat)
    s = warpgroup_mma(q, tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if F.IN_TURN:
        pass_turn(turns, CID, F)
    return s, beat


@gluon.jit
def products(q, tile, turns, CID: gl.constexpr, beat, zeros, F: gl.constexpr):
    """Products of the rows with a tile, in turn with the other scorers."""
    s, beat = start_products(q, tile, turns, CID, beat, zeros, F)
    return warpgroup_mma_wait(0, deps=(s,)), beat


@gluon.jit
def hide_keys(s, cols, first_key, last, i, recent, F: gl.constexpr):
    """Products [64, 128] with -inf where key ``first_key + cols`` is after a row's ``last`` or of no forced block."""
    if F.BLOCK < TILE:
        own = gl.where(i < F.FIRST, cols < F.BLOCK, cols >= recent * F.BLOCK - first_key)
        cols = gl.where(own, cols, HIDDEN)
    return gl.where(cols[None, :] <= (last - first_key)[:, None], s, float("-inf"))


@gluon.jit
def hide_blocks(spread, limit, F: gl.constexpr):
    """Spreads [128] of a tile's landmarks, -inf past its first ``limit`` blocks."""
    offs = gl.arange(0, TILE, spread.type.layout)
    block = (offs % 8 // 2 * 32 + offs // 8 * 2 + offs % 2) // F.CLUSTERS
    return gl.where(block < limit, spread, float("-inf"))


@gluon.jit
def weigh(s, spread, m_i, l_i, length, factor, limit, F: gl.constexpr):
    """One step of the running softmax over landmarks.

    Args:
        s: [64, 128] products.
        spread: [128] spreads of the landmarks, -inf where there is none.
        m_i: [64] running maximum.
        l_i: [64, 4] thread sums.
        length: [64] positive lengths of the rows.
        factor: Positive factor to base-2 logits.
        limit: Blocks of the tile that count.

    Returns:
        Masses [64, blocks] relative to ``top``, the logits [64] that they are relative to, and the new m_i and l_i.
    """
    x = s + length[:, None] * hide_blocks(spread, limit, F)[None, :]
    m_new = gl.maximum(m_i, gl.max(x, 1))
    top = gl.where(m_new == float("-inf"), 0.0, m_new) * factor
    alpha = gl.exp2(m_i * factor - top)
    p = gl.exp2(x * factor - top[:, None])
    mass = block_masses(p, F)
    shrink = gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout), assert_trivial=True)
    return mass, top, m_new, l_i * shrink[:, None] + gl.sum(mass, 2)


@gluon.constexpr_function
def exponentials(count):
    """Assembly, and its constraints, of ``count`` exponentials and of something that nothing is moved across.

    Left to itself, the assembler adds up every two exponentials as soon as it has asked for them and waits for them
    each time. It moves no arithmetic across loops, so one that is never gone through comes before the sums.
    """
    lines = ["{ .reg .pred p;"]
    lines += [f"ex2.approx.ftz.f32 ${i}, ${count + i};" for i in range(count)]
    lines += [f"setp.ge.s32 p, ${2 * count}, -1000000000;", "again_${:uid}:", "@p bra on_${:uid};", "nanosleep.u32 1;"]
    lines += ["bra again_${:uid};", "on_${:uid}: }"]
    return "\n".join(lines), ",".join(["=f"] * count + ["f"] * count + ["r"] * count)


@gluon.jit
def powers(x, number):
    """2 ^ x [64, 128]. ``number`` is any that is not below -1e9, but that the compiler does not know."""
    return gl.inline_asm_elementwise(
        exponentials(64)[0], exponentials(64)[1], [x, number], dtype=gl.float32, is_pure=False, pack=64
    )


@gluon.jit
def block_masses(p, F: gl.constexpr):
    """Masses [64, 4, blocks of a thread] of a tile's landmarks [64, 128]."""
    G: gl.constexpr = 32 // F.CLUSTERS
    # [row, cluster pair, thread of four, 2]: threads hold whole blocks.
    mass = gl.sum(gl.reshape(p, [64, 16, 4, 2]), 3)
    mass = gl.sum(gl.reshape(mass, [64, G, F.CLUSTERS // 2, 4]), 2)
    return gl.convert_layout(gl.permute(mass, (0, 2, 1)), mass_layout(G), assert_trivial=True)


@gluon.jit
def meet_bounded(
    q, landmarks, spreads_s, turns, CID: gl.constexpr, stage, phase, beat, zeros, factor, grown, top, limit,
    F: gl.constexpr,
):  # fmt: skip
    """Likewise, of a tile whose logits cannot exceed ``top`` [64], the forced blocks' largest, by so much as overflows.

    Without a maximum to wait for, a logit is ready for its exponential as it comes from the tensor cores.
    """
    tiles, full, empty = landmarks
    mbarrier.wait(full.index(stage), phase)
    s, beat = start_products(q, tiles.index(stage), turns, CID, beat, zeros, F)
    spread = spreads_s.index(stage).load(gl.SliceLayout(0, zeros.type.layout))
    offset = grown[:, None] * hide_blocks(spread, limit, F)[None, :] - top[:, None]
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = next_stage(stage, phase, F.STAGES)
    return block_masses(powers(s * factor + offset, limit), F), stage, phase, beat


@gluon.jit
def skip_tiles(landmarks, turns, CID: gl.constexpr, count, stage, phase, beat, F: gl.constexpr):
    """Hand back tiles that are the other scorers'."""
    tiles, full, empty = landmarks
    for i in range(0, count):
        mbarrier.wait(full.index(stage), phase)
        if F.IN_TURN:
            beat = take_turn(turns, CID, beat)
            pass_turn(turns, CID, F)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, F.STAGES)
    return stage, phase, beat


@gluon.jit
def meet(
    q, landmarks, spreads_s, turns, CID: gl.constexpr, stage, phase, beat, zeros, m_i, l_i, length, factor, limit,
    F: gl.constexpr,
):  # fmt: skip
    """A tile of landmarks from its arrival to its masses."""
    tiles, full, empty = landmarks
    mbarrier.wait(full.index(stage), phase)
    spread = spreads_s.index(stage).load(gl.SliceLayout(0, zeros.type.layout))
    s, beat = products(q, tiles.index(stage), turns, CID, beat, zeros, F)
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = next_stage(stage, phase, F.STAGES)
    mass, top, m_i, l_i = weigh(s, spread, m_i, l_i, length, factor, limit, F)
    return mass, top, m_i, l_i, stage, phase, beat


@gluon.jit
def forced_keys(
    q, landmarks, turns, CID: gl.constexpr, stage, phase, beat, zeros, last, recent, visible, first, forced, factor,
    MASSES: gl.constexpr, F: gl.constexpr,
):  # fmt: skip
    """Running maximum and thread sums of the rows over their forced blocks, exactly."""
    SUMS: gl.constexpr = thread_sums(zeros).type.layout
    offs_n = gl.arange(0, TILE, gl.SliceLayout(0, zeros.type.layout))
    m_i = gl.full([64], float("-inf"), gl.float32, last.type.layout)
    l_i = thread_sums(zeros)
    for i in range(0, forced):
        first_key = key_column(i, first, F)
        own = gl.where(i < F.FIRST, 0, recent * F.BLOCK)
        if (first_key + TILE > own) & (first_key < visible * F.BLOCK):
            mbarrier.wait(landmarks[1].index(stage), phase)
            s, beat = products(q, landmarks[0].index(stage), turns, CID, beat, zeros, F)
            mbarrier.arrive(landmarks[2].index(stage), count=1)
            if (i >= F.FIRST) | (F.BLOCK < TILE):
                s = hide_keys(s, offs_n, first_key, last, i, recent, F)
            m_new = gl.maximum(m_i, gl.max(s, 1))
            top = gl.where(m_new == float("-inf"), 0.0, m_new) * factor
            shrink = gl.convert_layout(gl.exp2(m_i * factor - top), gl.SliceLayout(1, SUMS), assert_trivial=True)
            sums = gl.convert_layout(thread_sums(powers(s * factor - top[:, None], i)), SUMS, assert_trivial=True)
            l_i = l_i * shrink[:, None] + sums
            m_i = m_new
            stage, phase = next_stage(stage, phase, F.STAGES)
        else:
            stage, phase, beat = skip_tiles(landmarks, turns, CID, 1, stage, phase, beat, F)
    return m_i, gl.convert_layout(l_i, gl.SliceLayout(2, MASSES), assert_trivial=True), stage, phase, beat


@gluon.jit
def scorer(CID: gl.constexpr, call, F: gl.constexpr):
    """A warpgroup that computes: share ``CID`` of the rows that a program scores together."""
    (
        q_ptr, q_strides, rows_ptr, q_s, landmarks, spreads_s, facts, turns, norm_s, strip_ptr, scores_ptr, taus_ptr,
        reach_ptr, reach_blocks, first_row, rows_here, num_rows, num_columns, strip_rows, items, scale,
    ) = call  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    MASSES: gl.constexpr = mass_layout(32 // F.CLUSTERS)
    zeros = gl.zeros([64, TILE], gl.float32, S_LAYOUT)
    factor = gl.maximum(gl.abs(scale) * LOG2E, 1e-30)
    q_own = q_s.index(CID)
    norm_own = norm_s.index(CID)
    strip = strip_ptr + (gl.program_id(0) * F.CONSUMERS + CID).to(gl.int64) * (strip_rows * (64 * 8))
    capacity = strip_rows // (TILE // F.CLUSTERS // 8 + 1)
    stage = 0
    phase = 0
    beat = 0
    if CID == 0:
        beat = 1
    b, kv_head, q_start, q_len, k_len, m, slot, recent, visible = item_facts(0, CID, facts, F)
    tokens = tokens_of(rows_ptr, b, kv_head, q_len, m, slot, recent, num_rows, F)
    x = fetch_queries(q_ptr, q_strides, tokens, b, kv_head, q_start, slot, F)
    for turn in range(0, (items + gl.num_programs(0) - 1) // gl.num_programs(0)):
        # Asked for anew, not carried from turn to turn: Triton 3.6 (LoopAwareCSE) might take the first for every one.
        b, kv_head, q_start, q_len, k_len, m, slot, recent, visible = item_facts(turn, CID, facts, F)
        first, forced, count = item_tiles(turn, facts, F)
        counts = gl.zeros([64, 4], gl.int32, gl.SliceLayout(2, MASSES))
        norm = gl.full([64], float("inf"), gl.float32, ROWS)
        token = gl.convert_layout(tokens, ROWS)
        if recent > 0:
            if F.FLIP:
                x = (0.0 - x.to(gl.float32)).to(x.dtype)
            q_own.store(x)
            fence_async_shared()
            # Where a row lies in four threads its length takes few words between them.
            wide = q_own.load(gl.DotOperandLayout(0, S_LAYOUT, 2)).to(gl.float32)
            length = gl.maximum(gl.convert_layout(gl.sqrt(gl.sum(wide * wide, 1)), ROWS), 1e-30)
            last = gl.where(token >= 0, k_len - 1, -1)
            if F.CAUSAL:
                last = gl.where(token >= 0, gl.minimum(last, token + (k_len - q_len)), -1)
            group = b * (F.HEADS // F.GROUP) + kv_head
            reach = gl.load(reach_ptr + (group * reach_blocks + recent - 1))
            m_i, l_i, stage, phase, beat = forced_keys(
                q_own, landmarks, turns, CID, stage, phase, beat, zeros, last, recent, visible, first, forced, factor,
                MASSES, F,
            )  # fmt: skip
            tau = length
            if F.CANDIDATES:
                at = slot * 64 + gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, MASSES)))
                head = kv_head * F.GROUP + gl.minimum(at // F.ROWS, F.GROUP - 1)
                # A little less: sums are rounded.
                tau = gl.exp2(gl.load(taus_ptr + head * F.HEAD_TAUS) * LOG2E) * 0.999
            grown = gl.maximum(length * factor, 1e-37)
            room = gl.where(last >= 0, (m_i * factor + ROOM) / grown, float("inf"))
            mine = (recent * F.CLUSTERS + (TILE - 1)) // TILE
            if reach <= -gl.max(-room, 0):
                top = gl.where(last >= 0, m_i, 0.0) * factor
                for i in range(0, mine):
                    mass, stage, phase, beat = meet_bounded(
                        q_own, landmarks, spreads_s, turns, CID, stage, phase, beat, zeros, factor, grown, top,
                        recent - i * (TILE // F.CLUSTERS), F,
                    )  # fmt: skip
                    # A mass must be a share of what came before this tile, too, and that is known earlier.
                    counts = keep_masses(strip, capacity, counts, i, mass, top, l_i, tau, F)
                    l_i += gl.sum(mass, 2)
            else:
                for i in range(0, mine):
                    mass, top, m_i, l_i, stage, phase, beat = meet(
                        q_own, landmarks, spreads_s, turns, CID, stage, phase, beat, zeros, m_i, l_i, length, factor,
                        recent - i * (TILE // F.CLUSTERS), F,
                    )  # fmt: skip
                    counts = keep_masses(strip, capacity, counts, i, mass, top, l_i, tau, F)
            stage, phase, beat = skip_tiles(landmarks, turns, CID, count - mine, stage, phase, beat, F)
            total = row_sums(l_i, ROWS)
            norm = gl.where(total > 0, m_i * factor + fast_log2(gl.where(total > 0, total, 1.0)), 0.0)
            norm = gl.where(last >= 0, norm, float("inf"))
        else:
            stage, phase, beat = skip_tiles(landmarks, turns, CID, forced + count, stage, phase, beat, F)

        # The next item's rows travel while this one's scores are written.
        mbarrier.arrive(facts[2].index(turn & 1), count=1)
        coming = item_facts(turn + 1, CID, facts, F)
        tokens = tokens_of(rows_ptr, coming[0], coming[1], coming[3], coming[5], coming[6], coming[7], num_rows, F)
        x = fetch_queries(q_ptr, q_strides, tokens, coming[0], coming[1], coming[2], coming[6], F)
        if recent > 0:
            place = (b, kv_head, m, slot, recent, num_columns, first_row, rows_here)
            if F.CANDIDATES:
                write_candidates(strip, capacity, counts, norm, scores_ptr, taus_ptr, place, F)
            else:
                norm_own.store(norm)  # also the barrier between the strip's writers and its readers
                write_scores(strip, norm_own, scores_ptr, taus_ptr, place, F)


@gluon.jit(do_not_specialize=NUMBERS)
def landmark_scores_kernel(
    q_ptr, k_desc, c_desc, spreads_ptr, reach_ptr, rows_ptr, visible_ptr, recent_ptr, taus_ptr, strip_ptr, scores_ptr,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, q_stride_b, q_stride_s, q_stride_h, bounds_stride_b, max_q, max_k,
    k_rows, num_rows, num_columns, landmark_rows, reach_blocks, strip_rows, first_row, rows_here, items, batch, scale,
    F: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Scores of query blocks ``first_row ..``, ``rows_here`` of them, the last ones first. Grid (programs,).

    An item is ``CONSUMERS`` shares of 64 rows of one KV head's queries. ``scores`` is ``[B, H, rows_here, NB]``; where
    scorers meet (``COMBINE``) it holds -inf before. ``strip`` is float32 ``[programs, CONSUMERS, NB / 128, 64, 128]``.
    ``c_desc`` and ``spreads`` have ``landmark_rows`` landmarks for each KV head of each sequence, in the order of
    ``landmark_row``.
    """
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = k_desc.dtype
    landmarks = ring(dtype, F.STAGES, [TILE, F.BLOCK_D], tile_layout(2), 2, F.CONSUMERS)
    q_s = gl.allocate_shared_memory(dtype, [F.CONSUMERS, 64, F.BLOCK_D], tile_layout(2))
    spreads_s = gl.allocate_shared_memory(gl.float32, [F.STAGES, TILE], plain)
    norm_s = gl.allocate_shared_memory(gl.float32, [F.CONSUMERS, 64], plain)
    turns = gl.allocate_shared_memory(gl.int64, [F.CONSUMERS, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(F.CONSUMERS):
        mbarrier.init(turns.index(c), count=1)
    cells = gl.allocate_shared_memory(gl.int32, [2 * (8 + 4 * F.CONSUMERS), 1], plain)
    told_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    told_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(told_full.index(c), count=1)
        mbarrier.init(told_empty.index(c), count=F.CONSUMERS)
    facts = (cells, told_full, told_empty)
    fence_async_shared()
    spans = (q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr)
    bounds = (visible_ptr, recent_ptr, bounds_stride_b, first_row, rows_here)
    groups = batch * (F.HEADS // F.GROUP)
    work = (
        q_ptr, (q_stride_b, q_stride_s, q_stride_h), rows_ptr, q_s, landmarks, spreads_s, facts, turns, norm_s,
        strip_ptr, scores_ptr, taus_ptr, reach_ptr, reach_blocks, first_row, rows_here, num_rows, num_columns,
        strip_rows, items, scale,
    )  # fmt: skip
    loads = (
        k_desc, c_desc, spreads_ptr, landmarks, spreads_s, facts, spans, bounds, max_q, max_k, k_rows, landmark_rows,
        items, groups,
    )  # fmt: skip
    if F.CONSUMERS == 2:
        gl.warp_specialize(
            [(scorer, (0, work, F)), (scorer, (1, work, F)), (loader, (loads, F))], [4, 1], [REGISTERS, 24]
        )
    elif F.CONSUMERS == 3:
        gl.warp_specialize(
            [(scorer, (0, work, F)), (scorer, (1, work, F)), (scorer, (2, work, F)), (loader, (loads, F))],
            [4, 4, 1], [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (scorer, (0, work, F)), (scorer, (1, work, F)), (scorer, (2, work, F)), (scorer, (3, work, F)),
                (loader, (loads, F)),
            ],
            [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24],
        )  # fmt: skip
