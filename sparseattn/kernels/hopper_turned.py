"""The Hopper kernel of paged attention that changes keys on their way: float8 caches, and RoPE.

What tensor cores take from registers can be changed there, with nothing written back to shared memory: float8 keys and
values are widened, keys are rotated. So the products are turned around: scores are ``k q^T`` [keys, rows] and outputs
``v^T p^T`` [columns, rows], whose right sides, few rows of queries and probabilities, lie in shared memory.

Columns of the cache come as two halves with products of their own. Neighbouring columns of a float8 cache travel as one
16-bit element, which transposes as one, too: its halves are the even and the odd columns. Those of a 16-bit cache are
the lower and the upper columns.
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparseattn.kernels.hopper import begin_early, next_stage, read_record, receive, ring, tile_layout, view
from sparseattn.kernels.hopper_attention import cap_scores, custom_kept, custom_rows, extra_of, finish_sums, leave_sums
from sparseattn.kernels.hopper_loader import producer
from sparseattn.kernels.hopper_merge import merge_by_last, thread_barrier
from sparseattn.kernels.hopper_records import first_head, row_span, tile_spans

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
NUMBERS = [
    "mask_stride_b", "mask_stride_h", "idx_width", "k_rows", "v_rows", "lse_stride", "sums_stride", "part_stride",
    "window_left", "window_right", "num_pages", "q_stride", "q_head", "out_stride", "out_head",
    "k_step", "v_step", "custom_size", "k_stride", "v_stride", "k_head", "v_head",
]  # fmt: skip


@gluon.constexpr_function
def scores_layout(rows: int) -> gl.NVMMADistributedLayout:
    """Layout of products whose rows are keys or columns of values: a thread has pairs of a tile's ``rows``."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 16])


@gluon.constexpr_function
def halves_code(kind: str, bfloat16: bool) -> str:
    """Assembly from two pairs of float8 numbers to two even and two odd ones, float16 or bfloat16."""
    if kind == "e5m2":  # the upper half of a float16
        code = "mov.b32 t, $2; prmt.b32 $0, t, 0, 0x2404; prmt.b32 $1, t, 0, 0x3414;"
    else:
        code = "prmt.b32 t, $2, 0, 0x3120; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;"
    if bfloat16:
        for out in ("$0", "$1"):
            code += f" mov.b32 {{a, b}}, {out}; cvt.f32.f16 x, a; cvt.f32.f16 y, b; cvt.rn.bf16x2.f32 {out}, y, x;"
    return f"{{ .reg .b32 t; .reg .b16 a, b; .reg .f32 x, y; {code} }}"


@gluon.jit
def widened_halves(pairs, KIND: gl.constexpr, dtype: gl.constexpr):
    """Even and odd elements of int16 ``pairs`` of float8 numbers, exactly."""
    if dtype == gl.bfloat16:
        even, odd = gl.inline_asm_elementwise(
            halves_code(KIND, True), "=&r,=&r,r", [pairs], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
        )
    else:
        even, odd = gl.inline_asm_elementwise(
            halves_code(KIND, False), "=&r,=&r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
        )
    return even, odd


@gluon.jit
def give_back(empty):
    """Frees a stage that threads have read into registers: a copy may follow only once their loads have ended.

    An arrival alone does not wait for them, nor does a barrier, as copies are not ordered with what threads load.
    """
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def load_halves(tiles, stage, TURNED: gl.constexpr, F: gl.constexpr):
    """A stage of the cache, as ``halves_of`` takes it; ``TURNED``: columns by keys."""
    A: gl.constexpr = gl.DotOperandLayout(0, scores_layout(F.ROWS), 2)
    tile = tiles.index(stage)
    HALF: gl.constexpr = tile.shape[1] // 2
    if F.KEY_BYTES == 1:
        first = view(tile, gl.int16, [tile.shape[0], HALF], tile_layout(2))
        second = first
    else:
        first = tile.slice(0, HALF, dim=1)
        second = tile.slice(HALF, HALF, dim=1)
    if TURNED:
        first = first.permute((1, 0))
        second = second.permute((1, 0))
    first = first.load(A)
    if F.KEY_BYTES == 2:
        second = second.load(A)
    else:
        second = first
    return first, second


@gluon.jit
def halves_of(loaded, dtype: gl.constexpr, F: gl.constexpr):
    """Halves of a stage of the cache, as left sides of products."""
    first, second = loaded
    if F.KEY_BYTES == 1:
        first, second = widened_halves(first, F.FLOAT8, dtype)
    return first, second


@gluon.jit
def column_of(i, half, WIDTH: gl.constexpr, F: gl.constexpr):
    """Column of a row of ``WIDTH`` that is column ``i`` of a half."""
    if F.KEY_BYTES == 1:
        column = 2 * i + half
    else:
        column = i + half * (WIDTH // 2)
    return column


@gluon.jit
def frequencies(pairs, rope, F: gl.constexpr):
    """Turns a position of ``pairs`` of columns i and i + DEPTH / 2; ``rope`` is (log2 theta, positions' divisor)."""
    return gl.exp2(pairs.to(gl.float32) * (-2.0 / F.DEPTH) * rope[0]) * (1.0 / (rope[1] * 6.283185307179586))


@gluon.jit
def rotated(x, y, turns):
    """Columns ``x`` and their partners ``y`` turned by angles, in float32."""
    # To the nearest whole turn; the hardware's functions are exact to 2^-20 within half of one.
    angle = (turns - ((turns + 12582912.0) - 12582912.0)) * 6.283185307179586
    cos = gl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], dtype=gl.float32, is_pure=True, pack=1)
    sin = gl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], dtype=gl.float32, is_pure=True, pack=1)
    x = x.to(gl.float32)
    y = y.to(gl.float32)
    return x * cos - y * sin, y * cos + x * sin


@gluon.jit
def rotated_within(x, positions, half, rope, F: gl.constexpr):
    """A half [keys, columns] that holds both columns of each pair, turned to its keys' ``positions``."""
    PAIRS: gl.constexpr = F.DEPTH // 4 if F.KEY_BYTES == 1 else F.DEPTH // 2
    parts = gl.reshape(x, [x.shape[0], x.shape[1] // (2 * PAIRS), 2, PAIRS])
    near, far = gl.split(gl.permute(parts, (0, 1, 3, 2)))  # [keys, parts, pairs]
    L: gl.constexpr = near.type.layout
    pairs = column_of(gl.arange(0, PAIRS, gl.SliceLayout(0, gl.SliceLayout(0, L))), half, F.DEPTH, F)
    at = gl.convert_layout(positions, gl.SliceLayout(1, gl.SliceLayout(2, L))).to(gl.float32)
    turns = at[:, None][:, :, None] * frequencies(pairs, rope, F)[None, :][None, :, :]
    near, far = rotated(near, far, turns)
    both = gl.permute(gl.join(near, far), (0, 1, 3, 2)).to(x.dtype)
    return gl.convert_layout(gl.reshape(both, x.shape), x.type.layout, assert_trivial=True)


@gluon.jit
def rotated_keys(first, second, positions, rope, F: gl.constexpr):
    """Both halves of keys turned to their ``positions``."""
    if F.KEY_BYTES == 2 and F.DEPTH == F.BLOCK_D:
        L: gl.constexpr = first.type.layout
        pairs = gl.arange(0, first.shape[1], gl.SliceLayout(0, L))
        at = gl.convert_layout(positions, gl.SliceLayout(1, L)).to(gl.float32)
        near, far = rotated(first, second, at[:, None] * frequencies(pairs, rope, F)[None, :])
        first = near.to(first.dtype)
        second = far.to(second.dtype)
    else:
        first = rotated_within(first, positions, 0, rope, F)
        if F.KEY_BYTES == 1:  # else they are padding
            second = rotated_within(second, positions, 1, rope, F)
    return first, second


@gluon.jit
def fetch_queries(q, halves, q_start, tokens_first, bound, offset, head, rope, F: gl.constexpr):
    """Halves of a row tile's queries to shared memory, [ROWS, BLOCK_D / 2] each, turned to their positions."""
    q_ptr, stride, head_stride = q
    HALF: gl.constexpr = F.BLOCK_D // 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, F.ROWS, gl.SliceLayout(1, LAYOUT))
    token = tokens_first + row % F.SLOTS
    at = (q_start + token).to(gl.int64) * (stride * 8)
    at += gl.minimum(head + row // F.SLOTS, F.HEADS - 1).to(gl.int64) * (head_stride * 8)
    for half in gl.static_range(2):
        cols = column_of(gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT)), half, F.BLOCK_D, F)
        inside = (token < bound)[:, None] & (cols < F.DEPTH)[None, :]
        x = gl.load(q_ptr + at[:, None] + cols[None, :], mask=inside, other=0.0)
        if F.ROPE:
            low = cols < F.DEPTH // 2
            partner = gl.where(low, cols + F.DEPTH // 2, cols - F.DEPTH // 2)
            y = gl.load(q_ptr + at[:, None] + partner[None, :], mask=inside, other=0.0)
            turns = (token + offset).to(gl.float32)[:, None] * frequencies(cols % (F.DEPTH // 2), rope, F)[None, :]
            # The partner of an upper column is the lower one of their pair, seen from the other side.
            x = rotated(x, y, gl.where(low[None, :], turns, -turns))[0].to(x.dtype)
        halves.index(half).store(x)
    fence_async_shared()


@gluon.jit
def hide_keys(s, tokens, cols, offset, k_len, window, F: gl.constexpr):
    """Scores [keys, rows] with -inf where query ``tokens`` [rows] may not see key ``cols`` [keys]; see ``hide``."""
    last = tokens * 0 + (k_len - 1)
    if F.CAUSAL:
        last = gl.minimum(last, tokens + offset)
    if F.WINDOW:
        last = gl.where(window[1] < 0, last, gl.minimum(last, tokens + offset + window[1]))
    s = gl.where(cols[:, None] <= last[None, :], s, float("-inf"))
    if F.WINDOW:
        first = gl.where(window[0] < 0, tokens * 0, tokens + offset - window[0])
        s = gl.where(cols[:, None] >= first[None, :], s, float("-inf"))
    return s


@gluon.jit
def thread_sums(p):
    """Sums over each thread's own keys, [4, 8, ROWS]: the 32 threads of a row add theirs once, at the end."""
    return gl.sum(gl.sum(gl.reshape(p, [p.shape[0] // 64, 4, 2, 8, p.shape[1]]), 2), 0)


@gluon.jit
def next_softmax(s, m_i, l_i, qk_scale):
    """One step of the running softmax, down the keys of ``s`` [keys, rows]; see ``hopper_attention.next_softmax``."""
    m_new = gl.maximum(m_i, gl.max(s, 0))
    top = gl.where(m_new == float("-inf"), 0.0, m_new) * qk_scale
    alpha = gl.exp2(m_i * qk_scale - top)
    p = gl.exp2(s * qk_scale - top[None, :])
    sums = thread_sums(p)
    SHRINK: gl.constexpr = gl.SliceLayout(0, sums.type.layout)
    shrink = gl.convert_layout(alpha, gl.SliceLayout(0, SHRINK), assert_trivial=True)[None, :]
    return p, alpha, m_new, l_i * shrink[None, :, :] + sums


@gluon.jit
def consumer(call, F: gl.constexpr):
    """The warpgroup that computes: walks the key tiles of every row tile that the producer posts, last to first."""
    (
        q, halves, p_s, keys, values, info, cols_s, part_ptr, sums_ptr, lse_ptr, sinks_ptr,
        record_ptr, details_ptr, lse_stride, sums_stride, part_stride, window, scale, softcap, scales, lists, out,
        extras, rope,
    ) = call  # fmt: skip
    S: gl.constexpr = scores_layout(F.ROWS)
    ROWS: gl.constexpr = gl.SliceLayout(0, S)
    wide: gl.constexpr = q[0].dtype.element_ty
    zeros = gl.zeros([F.TILE_N, F.ROWS], gl.float32, S)
    ks = 0
    kp = 0
    vs = 0
    vp = 0
    turn = 0
    position = receive(info, 0)
    m, head, b, share, count, first, late, early = read_record(record_ptr, gl.maximum(position, 0))
    while position >= 0:
        q_start, q_len, _k_start, k_len, _mapped, place, shares = tile_spans(
            details_ptr, position, b, (0, 0, 0, 0), 0, 0, F
        )
        offset = k_len - q_len
        row = gl.arange(0, F.ROWS, ROWS)  # of a tile: all its heads' first tokens, then their second ones
        head_q = first_head(head, F)
        q_first, bound, _list_row = row_span(m, head_q, b, q_len, lists, F)
        tokens = q_first + row % F.SLOTS
        qk_scale = scale
        k_scale_ptr, k_step, v_scale_ptr, v_step, v_scale = scales
        if k_scale_ptr is not None:
            qk_scale = scale * gl.load(k_scale_ptr + head_q // F.GROUP * k_step)
        if v_scale_ptr is not None:
            v_scale = v_scale * gl.load(v_scale_ptr + head_q // F.GROUP * v_step)
        fetch_queries(q, halves, q_start, q_first, bound, offset, head_q, rope, F)
        acc = gl.zeros([F.BLOCK_DV // 2, F.ROWS], gl.float32, S)
        acc_two = acc
        m_i = gl.full([F.ROWS], float("-inf"), gl.float32, ROWS)
        l_i = thread_sums(zeros)
        extra = extra_of(extras, head_q + row // F.SLOTS, b, qk_scale, F)
        late = gl.maximum(late, 1)
        whole = gl.maximum(count - early, late)
        for i in range(0, gl.maximum(count, 1)):
            mbarrier.wait(keys[1].index(ks), kp)
            loaded = load_halves(keys[0], ks, False, F)
            cols = cols_s.index(ks).load(gl.SliceLayout(1, S))
            give_back(keys[2].index(ks))
            if F.CUSTOM != "":
                at, bit, left = custom_rows(extra[1], tokens, q_len, k_len, F.CUSTOM)
                kept = custom_kept(extra[1][0], at[None, :], bit[None, :], left[None, :], cols[:, None], F.CUSTOM)
            one, two = halves_of(loaded, wide, F)
            if F.ROPE:
                one, two = rotated_keys(one, two, cols, rope, F)
            s = warpgroup_mma(one, halves.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
            s = warpgroup_mma(two, halves.index(1).permute((1, 0)), s, is_async=True)
            mbarrier.wait(values[1].index(vs), vp)
            loaded = load_halves(values[0], vs, True, F)
            give_back(values[2].index(vs))
            s, one, two = warpgroup_mma_wait(0, deps=(s, one, two))
            if F.ALIBI:
                s += extra[0][None, :] * (cols[:, None] - (tokens + offset)[None, :]).to(gl.float32)
            if F.SOFTCAP:
                s = cap_scores(s, qk_scale, softcap)
            if F.ROWS <= 16:  # noqa: SIM114 (a test at compile time: few rows always need care, says the schedule)
                s = hide_keys(s, tokens, cols, offset, k_len, window, F)
            elif (i < late) | (i >= whole):
                s = hide_keys(s, tokens, cols, offset, k_len, window, F)
            if F.CUSTOM != "":
                s = gl.where(kept, s, float("-inf"))
            p, alpha, m_i, l_i = next_softmax(s, m_i, l_i, qk_scale)
            p_s.store(p.to(p_s.dtype))
            fence_async_shared()
            acc = acc * alpha[None, :]
            acc_two = acc_two * alpha[None, :]
            one, two = halves_of(loaded, gl.float16, F)
            acc = warpgroup_mma(one, p_s, acc, is_async=True)
            acc_two = warpgroup_mma(two, p_s, acc_two, is_async=True)
            acc, acc_two, one, two = warpgroup_mma_wait(0, deps=(acc, acc_two, one, two))
            ks, kp = next_stage(ks, kp, F.K_STAGES)
            vs, vp = next_stage(vs, vp, F.V_STAGES)
        turn += 1
        position = receive(info, turn)
        record = read_record(record_ptr, gl.maximum(position, 0))

        l_i = gl.convert_layout(gl.sum(gl.sum(l_i, 0), 0), ROWS)
        inside = tokens < bound
        heads = gl.minimum(head_q + row // F.SLOTS, F.HEADS - 1)
        acc = acc * v_scale
        acc_two = acc_two * v_scale
        if share >= 0:
            at = (tokens - q_first) * F.PACK + row // F.SLOTS
            leave_sums(sums_ptr, at, share, sums_stride, m_i, l_i, inside, qk_scale)
            part = part_ptr + share.to(gl.int64) * part_stride
            leave_halves(part, at * F.DV, acc, acc_two, inside, F)
            if F.MERGE:
                merge_by_last(
                    details_ptr + place.to(gl.int64) * 8 + 7, part_ptr, sums_ptr, place, shares, sums_stride, out,
                    lse_ptr, lse_stride, sinks_ptr, (q_start + q_first, bound - q_first, head, head_q), F,
                )  # fmt: skip
        else:
            lse_at = heads.to(gl.int64) * lse_stride + q_start + tokens
            factor = finish_sums(lse_ptr, lse_at, sinks_ptr, heads, m_i, l_i, inside, qk_scale, F)
            o_ptr, row_stride, head_stride = out
            o_at = (q_start + tokens).to(gl.int64) * (row_stride * 8) + heads.to(gl.int64) * (head_stride * 8)
            leave_halves(o_ptr, o_at, acc * factor[None, :], acc_two * factor[None, :], inside, F)
        m, head, b, share, count, first, late, early = record


@gluon.jit
def leave_halves(ptr, at, one, two, inside, F: gl.constexpr):
    """Store both halves [BLOCK_DV / 2, ROWS] of rows that begin ``at`` [ROWS]."""
    cols = gl.arange(0, F.BLOCK_DV // 2, gl.SliceLayout(1, one.type.layout))
    if F.KEY_BYTES == 1:
        both = gl.join(one, two).to(ptr.dtype.element_ty)  # neighbours, to be stored at once
        PAIR: gl.constexpr = gl.SliceLayout(2, both.type.layout)
        half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, both.type.layout)))
        offs = gl.convert_layout(at[None, :] + 2 * cols[:, None], PAIR, assert_trivial=True)
        there = gl.convert_layout(inside[None, :] & (2 * cols < F.DV)[:, None], PAIR, assert_trivial=True)
        gl.store(ptr + offs[:, :, None] + half[None, :][None, :, :], both, mask=there[:, :, None])
    else:
        for half in gl.static_range(2):
            column = cols + half * (F.BLOCK_DV // 2)
            there = inside[None, :] & (column < F.DV)[:, None]
            value = (two if half else one).to(ptr.dtype.element_ty)
            gl.store(ptr + at[None, :] + column[:, None], value, mask=there)


@gluon.jit
def scattered_rows(sources, F: gl.constexpr):
    """``sources`` of keys and of values, each with the memory in which threads find each other's rows."""
    rows_s = gl.allocate_shared_memory(gl.int32, [F.TILE_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return (sources[0], rows_s), (sources[1], rows_s)


@gluon.jit(do_not_specialize=NUMBERS)
def turned_kernel(
    k_desc, v_desc, q_ptr, out_ptr, part_ptr, sums_ptr, lse_ptr, sinks_ptr, record_ptr, details_ptr,
    counter_ptr, count_ptr, index_ptr, table_ptr,
    mask_stride_b, mask_stride_h, idx_width, k_rows, v_rows, num_pages, lse_stride, sums_stride, part_stride,
    q_stride, q_head, out_stride, out_head, window_left, window_right, qk_scale, softcap, v_factor, theta_log2,
    rope_scale, F: gl.constexpr,
    k_scale_ptr=None, k_step=None, v_scale_ptr=None, v_step=None,
    slopes_ptr=None, custom_ptr=None, custom_starts_ptr=None, custom_size=None,
    k_ptr=None, v_ptr=None, k_stride=None, v_stride=None, k_head=None, v_head=None,
):  # fmt: skip
    """Some programs a multiprocessor: row tiles of ``ROWS`` rows as the schedule hands them out, until none is left.

    Grid (programs,). Arguments are those of ``forward_kernel``; strides of queries and outputs count 8 elements.
    ``DEPTH`` columns of queries and keys are there. ``ROPE``: columns i and i + DEPTH / 2 turn by ``theta^(-2i / DEPTH)
    / rope_scale`` a position.
    """
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    layout: gl.constexpr = tile_layout(2, 8 * F.KEY_BYTES)
    wide: gl.constexpr = q_ptr.dtype.element_ty
    KEPT: gl.constexpr = gl.uint8 if F.KEY_BYTES == 1 else wide
    FILLS: gl.constexpr = 128 if F.SCATTERED else 1  # threads that gather arrive one by one
    keys = ring(KEPT, F.K_STAGES, [F.TILE_N, F.BLOCK_D], layout, FILLS + 1, 1)
    values = ring(KEPT, F.V_STAGES, [F.TILE_N, F.BLOCK_DV], layout, FILLS, 1)
    sources = ((k_ptr, k_stride, k_head, F.DEPTH), (v_ptr, v_stride, v_head, F.DV))
    scattered = scattered_rows(sources, F) if F.SCATTERED else (0, 0)
    info = ring(gl.int32, 2, [1], plain, 1, 1)
    cols_s = gl.allocate_shared_memory(gl.int32, [F.K_STAGES, F.TILE_N], plain)
    halves = gl.allocate_shared_memory(wide, [2, F.ROWS, F.BLOCK_D // 2], tile_layout(2))
    NARROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * F.ROWS), element_bitwidth=16, rank=2)
    p_s = gl.allocate_shared_memory(gl.float16 if F.KEY_BYTES == 1 else wide, [F.TILE_N, F.ROWS], NARROW)
    fence_async_shared()
    begin_early()
    work = (
        (q_ptr, q_stride, q_head), halves, p_s, keys, values, info, cols_s, part_ptr, sums_ptr, lse_ptr, sinks_ptr,
        record_ptr, details_ptr, lse_stride, sums_stride, part_stride, (window_left, window_right), qk_scale, softcap,
        (k_scale_ptr, k_step, v_scale_ptr, v_step, v_factor), (count_ptr, mask_stride_b, mask_stride_h),
        (out_ptr, out_stride, out_head), (slopes_ptr, custom_ptr, custom_starts_ptr, custom_size),
        (theta_log2, rope_scale),
    )  # fmt: skip
    loads = (
        0, k_desc, v_desc, (0, 0, 0), keys, values, info, cols_s, record_ptr, counter_ptr, count_ptr, index_ptr,
        (0, 0, 0, 0), mask_stride_b, mask_stride_h, idx_width, 0, 0, 0, 0, k_rows, v_rows,
        (table_ptr, details_ptr, num_pages), scattered,
    )  # fmt: skip
    gl.warp_specialize([(consumer, (work, F)), (producer, (loads, F))], [F.WARPS], [F.LOADER])
