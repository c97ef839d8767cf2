"""What the Hopper kernel of landmark scores does with the masses of blocks, tile by tile and in the end.

A row's denominator is known when the last tile is. Until then either all masses lie in a strip of memory, or those that
may still reach a threshold.
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from sparseattn.kernels.hopper_attention import LN2, LOG2E

TILE: gl.constexpr = gl.constexpr(128)  # landmarks, or keys, of a tile


@gluon.constexpr_function
def mass_layout(groups: int) -> gl.DistributedLinearLayout:
    """Layout of a tile's masses [64, 4, groups]: each of a row's four threads holds ``groups`` neighbouring blocks."""
    registers = [[0, 0, 1 << i] for i in range(groups.bit_length() - 1)] + [[8, 0, 0]]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, 4, groups])


@gluon.jit
def fast_log2(x):
    """Base-2 logarithm by the special function unit: 22 bits."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def places(layout: gl.constexpr):
    """Where a strip keeps the masses [64, 4, groups] of a tile, in rows of blocks."""
    G: gl.constexpr = layout.shape[2]
    rows = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    threads = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    blocks = gl.arange(0, G, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return rows, threads[None, :, None] * G + blocks[None, None, :]


@gluon.jit
def leave_masses(strip, i, mass, top, F: gl.constexpr):
    """Leave the base-2 logits of a tile's blocks in the strip, float32 [NB / 128, 64, 128]."""
    BLOCKS: gl.constexpr = TILE // F.CLUSTERS
    rows, blocks = places(mass_layout(32 // F.CLUSTERS))
    top = gl.convert_layout(top, rows.type.layout, assert_trivial=True)
    at = i // F.CLUSTERS * (64 * 128) + i % F.CLUSTERS * BLOCKS
    gl.store(strip + at + (rows[:, None, None] * 128 + blocks), fast_log2(mass) + top[:, None, None])


@gluon.jit
def note_candidates(strip, capacity, counts, i, mass, top, l_i, tau, F: gl.constexpr):
    """Keep a thread's masses of a row if one is ``tau`` of what the row has seen so far, in rings of some entries.

    ``strip`` is float32 [capacity, 128 / clusters + 8, 64]: of an entry the masses [64, 4, groups], the logits [64, 4]
    that they are relative to, and their tiles [64, 4]. ``counts`` [64, 4] are the entries so far. Only a mass of at
    least ``tau`` [64] now can be so in the end, and each multiplies the sum by 1 + tau: one that has been overwritten
    is less than tau by now.
    """
    PART: gl.constexpr = 64 * TILE // F.CLUSTERS
    layout: gl.constexpr = mass_layout(32 // F.CLUSTERS)
    rows, blocks = places(layout)
    threads = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    top = gl.convert_layout(top, rows.type.layout, assert_trivial=True)
    least = gl.convert_layout(gl.sum(l_i, 1), rows.type.layout, assert_trivial=True) * tau
    keep = gl.max(mass, 2) >= least[:, None]
    entry = (counts & (capacity - 1)) * (PART + 512)
    each = entry + PART + (rows[:, None] * 4 + threads[None, :])
    gl.store(strip + (entry[:, :, None] + (rows[:, None, None] * (PART // 64) + blocks)), mass, mask=keep[:, :, None])
    gl.store(strip + each, gl.where(keep, top[:, None], 0.0), mask=keep)
    gl.store(strip + each + 256, gl.where(keep, i, counts).to(gl.float32), mask=keep)
    return counts + keep.to(gl.int32)


@gluon.jit
def load_candidate(strip, entry, counts, capacity, rows, blocks, F: gl.constexpr):
    """An entry of ``note_candidates``: whether there is one [64, 4], its masses, their logit, its first block."""
    PART: gl.constexpr = 64 * TILE // F.CLUSTERS
    threads = gl.arange(0, 4, gl.SliceLayout(0, counts.type.layout))
    inside = entry < gl.minimum(counts, capacity)
    held_at = strip + entry * (PART + 512)
    mass = gl.load(held_at + (rows[:, None, None] * (PART // 64) + blocks), mask=inside[:, :, None], other=1.0)
    each = held_at + PART + (rows[:, None] * 4 + threads[None, :])
    top = gl.load(each, mask=inside, other=0.0)
    tile = gl.load(each + 256, mask=inside, other=0.0).to(gl.int32)
    return inside, mass, top, tile * (TILE // F.CLUSTERS) + threads[None, :] * (32 // F.CLUSTERS)


@gluon.constexpr_function
def raising(groups):
    """Assembly, and its constraints, that raises the scores of a thread's ``groups`` neighbouring blocks.

    Few masses are enough, so what follows the comparison is jumped over by most. Scores that are not negative are
    ordered as their bits are, and -inf is a negative number.
    """
    at, mass, enough, least = (groups * i for i in range(1, 5))
    lines = ["{ .reg .pred p; .reg .f32 t; .reg .b32 b;", f"mov.f32 t, ${mass};"]
    lines += [f"max.f32 t, t, ${mass + i};" for i in range(1, groups)]
    lines += [f"setp.ge.f32 p, t, ${enough};", "@!p bra nothing_${:uid};"]
    for i in range(groups):
        lines += [
            f"setp.ge.f32 p, ${mass + i}, ${enough};",
            f"lg2.approx.f32 t, ${mass + i};",
            f"sub.f32 t, t, ${least};",
            "mul.f32 t, t, 0f3F317218;",
            "max.f32 t, t, 0f00000000;",
            "mov.b32 b, t;",
            f"@p red.relaxed.gpu.global.max.s32 [${at}+{4 * i}], b;",
        ]
    lines += ["nothing_${:uid}:"] + [f"mov.u32 ${i}, 0;" for i in range(groups)] + ["}"]
    return "\n".join(lines), ",".join(["=r"] * groups + ["l"] * groups + ["f"] * (3 * groups))


@gluon.jit
def raise_scores(scores_ptr, row, candidate, norm, F: gl.constexpr):
    """Raise the scores that a candidate's blocks have so far, if they reach the threshold. ``norm`` has it in it."""
    inside, mass, top, first = candidate
    least = norm[:, None] - top
    enough = gl.where(inside, gl.exp2(least), float("inf"))
    groups = gl.arange(0, mass.shape[2], gl.SliceLayout(0, gl.SliceLayout(1, mass_layout(mass.shape[2]))))
    at = scores_ptr + ((row[:, None] + first)[:, :, None] + groups[None, None, :])
    gl.inline_asm_elementwise(
        raising(mass.shape[2])[0], raising(mass.shape[2])[1],
        [at.to(gl.int64), mass, enough[:, :, None], least[:, :, None]], dtype=gl.int32, is_pure=False,
        pack=mass.shape[2],
    )  # fmt: skip


@gluon.jit
def write_candidates(strip, capacity, counts, norm, scores_ptr, taus_ptr, place, F: gl.constexpr):
    """Scores of those candidates that reach the threshold, less the threshold; others stay what they were."""
    b, kv_head, m, slot, recent, num_columns, first_row, rows_here = place
    rows, blocks = places(mass_layout(32 // F.CLUSTERS))
    at = slot * 64 + rows
    head = kv_head * F.GROUP + gl.minimum(at // F.ROWS, F.GROUP - 1)
    row = (b * (F.HEADS // F.SHARED) + head // F.SHARED).to(gl.int64) * rows_here + m - first_row
    row = row * num_columns
    norm = gl.convert_layout(norm, rows.type.layout, assert_trivial=True)
    norm += gl.load(taus_ptr + head * F.HEAD_TAUS) * LOG2E
    most = gl.max(gl.max(gl.minimum(counts, capacity), 1), 0)
    for entry in range(0, most, 2):
        # Both are asked for before either is looked at.
        one = load_candidate(strip, entry, counts, capacity, rows, blocks, F)
        two = load_candidate(strip, entry + 1, counts, capacity, rows, blocks, F)
        raise_scores(scores_ptr, row, one, norm, F)
        raise_scores(scores_ptr, row, two, norm, F)


@gluon.jit
def write_scores(strip, norm_s, scores_ptr, taus_ptr, place, F: gl.constexpr):
    """Maxima over the rows of each head, less the rows' denominators."""
    b, kv_head, m, slot, recent, num_columns, first_row, rows_here = place
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    offs = gl.arange(0, 128, gl.SliceLayout(0, layout))
    for n in range(0, recent, 128):
        cols = n + offs
        free = (cols >= F.FIRST) & (cols < recent)
        for sub in gl.static_range(64 // F.HEAD_ROWS):
            at = slot * 64 + sub * F.HEAD_ROWS
            best = gl.full([128], float("-inf"), gl.float32, gl.SliceLayout(0, layout))
            for part in gl.static_range(F.HEAD_ROWS // 16):
                norm = norm_s.slice(sub * F.HEAD_ROWS + part * 16, 16).load(gl.SliceLayout(1, layout))
                w = gl.load(strip + n * 64 + ((sub * F.HEAD_ROWS + part * 16 + rows)[:, None] * 128 + offs[None, :]))
                best = gl.maximum(best, gl.max(w - norm[:, None], 0))
            score = best * LN2
            head = kv_head * F.GROUP + gl.minimum(at // F.ROWS, F.GROUP - 1)
            if F.LISTS:
                shift = gl.load(taus_ptr + head * F.HEAD_TAUS)
                # A threshold of nothing keeps all, but what is capped needs an order.
                score = gl.where(shift == float("-inf"), gl.maximum(score + 128.0, 0.0), score - shift)
            row = (b * (F.HEADS // F.SHARED) + head // F.SHARED).to(gl.int64) * rows_here + m - first_row
            inside = free & (at < F.GROUP * F.ROWS)
            if F.COMBINE:
                gl.atomic_max(scores_ptr + row * num_columns + cols, score, mask=inside, sem="relaxed")
            else:
                gl.store(scores_ptr + row * num_columns + cols, score, mask=inside)


@gluon.jit
def keep_masses(strip, capacity, counts, i, mass, top, l_i, tau, F: gl.constexpr):
    """Keep a tile's masses until the rows' denominators are known."""
    if F.CANDIDATES:
        counts = note_candidates(strip, capacity, counts, i, mass, top, l_i, tau, F)
    else:
        leave_masses(strip, i, mass, top, F)
    return counts
