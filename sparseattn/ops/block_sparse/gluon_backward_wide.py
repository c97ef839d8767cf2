"""Steps of 128 query rows in the Hopper backward, for head dimensions of up to 64.

A step of 64 rows is half as much work there as at 128, for the same exponentials, barriers and additions to dQ. Of 128
rows each warpgroup takes dQ of 64 from all keys, so that half as many numbers are added in memory. Scores and gradients
of probabilities, 128 registers, leave none for both P and dS in float32: the two are made by halves.
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

from sparseattn.kernels.hopper import async_load, opaque_zero, view
from sparseattn.ops.block_sparse.gluon_backward_parts import emit_dq, field, probabilities

# A row number past all there are: what is loaded from there is zero.
BEYOND: gl.constexpr = gl.constexpr(1 << 30)


@gluon.jit
def load_wide_numbers(desc, tile, whole, full, numbers):
    """Ask for the norms of 128 rows, then their deltas, whose tiles of 64 rows lie apart.

    Without a second tile (``whole`` is false) its numbers are zeros, and so are Q and dO: such rows have P of 1 and dS
    of 0, and add nothing to any gradient.
    """
    quarters = view(numbers, gl.float32, [4, 64], desc.layout)
    for i in gl.static_range(2):
        at = tile * 128 + 64 * i
        async_load(desc, [at], full, quarters.index(2 * i))
        async_load(desc, [gl.where(whole, at + 128, BEYOND)], full, quarters.index(2 * i + 1))


@gluon.jit
def halves(x):
    """The left and the right half of a tile's columns, which every thread has of its own."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def joined(a, b, layout: gl.constexpr):
    """The tile whose ``halves`` these are."""
    x = gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def half_probabilities(
    s, numbers, row, count_s, first_row, last_row, qk_scale, softcap,
    HALF: gl.constexpr, MASK: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Probabilities of 64 columns from their raw scores, and the soft cap's derivative."""
    ROWS: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    COLS: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    norm = numbers.slice(64 * HALF, 64, 0).load(COLS)
    p, slope = probabilities(s, norm[None, :], qk_scale, softcap, SOFTCAP)
    if MASK:
        rows = row + count_s.slice(64 * HALF, 64, 0).load(COLS)
        first = gl.convert_layout(first_row, ROWS, assert_trivial=True)
        last = gl.convert_layout(last_row, ROWS, assert_trivial=True)
        p = gl.where((rows[None, :] >= first[:, None]) & (rows[None, :] <= last[:, None]), p, 0.0)
    return p, slope


@gluon.jit
def half_ds(p, slope, dp, numbers, HALF: gl.constexpr):
    """dS of 64 columns."""
    delta = numbers.slice(128 + 64 * HALF, 64, 0).load(gl.SliceLayout(0, p.type.layout))
    return p * slope * (dp - delta[None, :])


@gluon.jit
def issue_rows_of_dq(ds_s, k_s, slot, zeros, zero, CID: gl.constexpr):
    """Start dQ of this warpgroup's 64 of a step's 128 query rows, from all 128 keys."""
    dq = warpgroup_mma(
        ds_s.index(2 * slot).slice(64 * CID, 64, 1).permute((1, 0)), k_s.index(zero), zeros, use_acc=False,
        is_async=True,
    )  # fmt: skip
    return warpgroup_mma(
        ds_s.index(2 * slot + 1).slice(64 * CID, 64, 1).permute((1, 0)), k_s.index(zero + 1), dq, is_async=True
    )


@gluon.jit
def wide_step(
    dk, dv, earlier, zeros, dq_zeros, q_s, do_s, numbers_s, k_s, v_s, ds_s, out_s, steps_s, count_s,
    q_full, q_empty, do_full, do_empty, ds_mine, ds_other, ds_free, ds_release, dq_desc,
    it, first_row, last_row, qk_scale, softcap,
    CID: gl.constexpr, MASK: gl.constexpr, SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``gradient_step`` of 128 rows: S and dP, then dQ of the step before, dK and dV.

    Half of dS is stored before the other is made: the wait for its memory, which ends a block of instructions, keeps
    the compiler from making both at once.
    """
    S_LAYOUT: gl.constexpr = zeros.type.layout
    HALF_LAYOUT: gl.constexpr = dq_zeros.type.layout
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    dtype: gl.constexpr = q_s.dtype
    stage = it & 1
    other = stage ^ 1
    parity = (it >> 1) & 1
    held = it % STAGES
    zero = opaque_zero()
    numbers = numbers_s.index(held)
    mbarrier.wait(q_full.index(held), it // STAGES & 1)
    s = warpgroup_mma(
        k_s.index(CID + zero), q_s.index(held).permute((1, 0)), zeros, use_acc=False, is_async=True
    )  # [keys, rows]
    mbarrier.wait(do_full.index(stage), parity)
    dp = warpgroup_mma(
        v_s.index(CID + zero), do_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
    )  # [keys, rows]
    tile = field(steps_s.index(4 * (it & 3) + 2 * CID), 0)
    row = 0
    if MASK:
        row = field(steps_s.index(4 * (it & 3) + 1), 0)
    if SOFTCAP:  # whose derivative takes the registers of an early start
        s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    else:
        s = warpgroup_mma_wait(1, deps=(s,))
    s0, s1 = halves(s)
    p0, slope0 = half_probabilities(
        s0, numbers, row, count_s, first_row, last_row, qk_scale, softcap, 0, MASK, SOFTCAP
    )  # [keys, 64]
    if not SOFTCAP:
        dp = warpgroup_mma_wait(0, deps=(dp,))
    dp0, dp1 = halves(dp)
    ds0 = half_ds(p0, slope0, dp0, numbers, 0).to(dtype)
    p0 = p0.to(dtype)
    ds = ds_s.index(2 * stage + CID)
    mbarrier.wait(ds_free.index(stage), parity ^ 1)
    ds.slice(0, 64, 1).store(gl.convert_layout(ds0, HALF_LAYOUT, assert_trivial=True))
    p1, slope1 = half_probabilities(
        s1, numbers, row, count_s, first_row, last_row, qk_scale, softcap, 1, MASK, SOFTCAP
    )  # [keys, 64]
    ds1 = half_ds(p1, slope1, dp1, numbers, 1).to(dtype)
    ds.slice(64, 64, 1).store(gl.convert_layout(ds1, HALF_LAYOUT, assert_trivial=True))
    fence_async_shared()
    pa = gl.convert_layout(joined(p0, p1.to(dtype), S_LAYOUT), A_LAYOUT)
    dsa = gl.convert_layout(joined(ds0, ds1, S_LAYOUT), A_LAYOUT)
    mbarrier.wait(ds_other.index(other), ((it - 1) >> 1) & 1)
    dq = issue_rows_of_dq(ds_s, k_s, other, dq_zeros, zero, CID)
    dk = warpgroup_mma(dsa, q_s.index(held), dk, is_async=True)
    dv = warpgroup_mma(pa, do_s.index(stage), dv, is_async=True)
    mbarrier.arrive(ds_mine.index(stage), count=1)
    dq = warpgroup_mma_wait(2, deps=(dq,))
    mbarrier.arrive(ds_release.index(other), count=1, pred=it > 0)
    emit_dq(dq, dq_desc, out_s, earlier, CID, False)
    dk, dsa, dv, pa = warpgroup_mma_wait(0, deps=(dk, dsa, dv, pa))
    mbarrier.arrive(do_empty.index(stage), count=1)
    mbarrier.arrive(q_empty.index(held), count=1)
    return dk, dv, tile
