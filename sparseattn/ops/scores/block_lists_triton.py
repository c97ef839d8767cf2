"""Triton kernels for ranked block lists.

Ranking never stores a ``[MB, NB]`` slab: every pass over the pairs computes their scores anew from the means, which are
``block_size ** 2`` times fewer than the pairs of tokens. Scores become nonnegative integers of the same order (*keys*),
and a cut-off among them is found digit by digit, over all rows of a head or row by row. The last kernel walks every row
once and writes its list in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import LOG2E
from sparseattn.kernels.digits import SHIFTS, digit_sums, next_digit
from sparseattn.ops.scores.block_lists import ListPlan, Ranking
from sparseattn.ops.scores.block_lists_triton_tokens import block_means as block_means
from sparseattn.ops.scores.block_lists_triton_tokens import compile_cases as token_cases
from sparseattn.ops.scores.block_lists_triton_tokens import list_columns as list_columns
from sparseattn.ops.scores.block_lists_triton_tokens import list_tokens as list_tokens
from sparseattn.ops.scores.vertical_slash_triton_mass import offline, precision

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["num_rows", "num_cols", "visible_stride", "step", "shift", "width", "most_stride"]
# Views into larger tensors: aligned or not as the number of blocks has it.
_VIEWS = ["vertical_ptr", "band_ptr", "mass_ptr", "mass_band_ptr"]
_POOL_ROWS = 32  # rows of blocks that share a tile of means in the passes over all pairs
_SHORT = 64  # rows and columns of blocks whose scores one program holds
_ALL: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_POOLED: tl.constexpr = tl.constexpr(1)


@triton.jit
def _pooled_scores(
    q_means_ptr, k_means_ptr, rows, cols, visible, num_rows, num_cols, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 scores of mean queries against mean keys, -inf where a block is hidden from a row."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    q_rows = (b * tl.num_programs(1) + h) * num_rows + rows
    k_rows = (b * (tl.num_programs(1) // GROUP) + h // GROUP) * num_cols + cols
    q_inside = (rows < num_rows)[:, None] & (offs_d < D)[None, :]
    k_inside = (cols < num_cols)[:, None] & (offs_d < D)[None, :]
    q = tl.load(q_means_ptr + q_rows[:, None] * D + offs_d[None, :], mask=q_inside, other=0.0)
    k = tl.load(k_means_ptr + k_rows[:, None] * D + offs_d[None, :], mask=k_inside, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    return tl.where(cols[None, :] < visible[:, None], s, float("-inf"))


@triton.jit
def _pooled_key(s, lse):
    """Integers in [0, _ALL) that order like the log-probabilities ``s - lse``; rounding above 0 is cut off."""
    return tl.maximum(tl.abs(tl.minimum(s - lse[:, None], 0.0)).to(tl.int32, bitcast=True), 1) ^ _ALL


@triton.jit
def _visible_rows(visible_ptr, rows, num_rows, visible_stride):
    """Visible blocks of ``rows``, 0 past the end."""
    return tl.load(visible_ptr + tl.program_id(2) * visible_stride + rows, mask=rows < num_rows, other=0)


@triton.jit(do_not_specialize=_LENGTHS)
def _pooled_lse_kernel(
    q_means_ptr, k_means_ptr, mode_ptr, visible_ptr, lse_ptr, num_rows, num_cols, visible_stride, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Base-2 LSE of the pooled scores of each row -> ``lse [B, H, MB]``. Grid (row tiles, H, B); POOLED heads only."""
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if tl.load(mode_ptr + head) != _POOLED:
        return
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    visible = _visible_rows(visible_ptr, rows, num_rows, visible_stride)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for n in range(0, tl.max(visible, 0), BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        s = _pooled_scores(
            q_means_ptr, k_means_ptr, rows, cols, visible, num_rows, num_cols, scale, GROUP, D, BLOCK_D, PRECISION
        )
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(s - m_safe[:, None]), 1)
        m_i = m_new
    lse = tl.where(l_i > 0, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * num_rows + rows, lse, mask=rows < num_rows)


@triton.jit(do_not_specialize=_LENGTHS)
def _pooled_descend_kernel(
    q_means_ptr, k_means_ptr, mode_ptr, visible_ptr, lse_ptr, need_ptr, state_ptr, histogram_ptr, num_rows, num_cols,
    visible_stride, step, shift, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Pass ``step`` of the search for the key above which a head's probabilities sum to ``need [B, H]``.

    As ``vertical_slash_triton._descend_kernel``, with the values computed instead of loaded: a row of values is a head,
    a chunk a tile of rows. Grid (row tiles, H, B).
    """
    tile = tl.program_id(0)
    heads = tl.num_programs(1) * tl.num_programs(2)
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if tl.load(mode_ptr + head) != _POOLED:
        return
    # LAST launches one tile; the histograms are as many as the rows have tiles.
    chunks = (num_rows + BLOCK_M - 1) // BLOCK_M
    histogram_ptr += (step * heads + head).to(tl.int64) * chunks * 16
    state_ptr += step * 2 * heads + head
    prefix = tl.full((), 0, tl.int32)
    if not FIRST:
        prefix = tl.load(state_ptr - 2 * heads)
        above = tl.load(state_ptr - heads).to(tl.float32, bitcast=True)
        before = histogram_ptr - heads.to(tl.int64) * chunks * 16
        prefix, above = next_digit(before, chunks, prefix, above, tl.load(need_ptr + head), 32)
        if tile == 0:
            tl.store(state_ptr, prefix)
            tl.store(state_ptr + heads, above.to(tl.int32, bitcast=True))
    if not LAST:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        visible = _visible_rows(visible_ptr, rows, num_rows, visible_stride)
        lse = tl.load(lse_ptr + head.to(tl.int64) * num_rows + rows, mask=rows < num_rows, other=0.0)
        sums = tl.zeros([16], tl.float32)
        for n in range(0, tl.max(visible, 0), BLOCK_N):
            cols = n + tl.arange(0, BLOCK_N)
            s = _pooled_scores(
                q_means_ptr, k_means_ptr, rows, cols, visible, num_rows, num_cols, scale, GROUP, D, BLOCK_D, PRECISION
            )
            key = tl.reshape(_pooled_key(s, lse), [BLOCK_M * BLOCK_N])
            p = tl.reshape(tl.exp2(s - lse[:, None]), [BLOCK_M * BLOCK_N])
            sums += tl.sum(digit_sums(key, p, prefix, shift, FIRST), 0)
        tl.store(histogram_ptr + tile * 16 + tl.arange(0, 16), sums)


def _compiles_whole(t: Tensor) -> bool:
    """Whether ``_pooled_cut_kernel`` compiles for the device: Triton 3.6 fails on it for Blackwell."""
    old = t.is_cuda and triton.__version__.startswith("3.6.")
    return not (old and torch.cuda.get_device_capability(t.device) >= (10, 0))


@triton.jit(do_not_specialize=_LENGTHS)
def _pooled_cut_kernel(
    q_means_ptr, k_means_ptr, mode_ptr, visible_ptr, lse_ptr, cut_ptr, num_rows, num_cols, visible_stride, share, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The key at and above which a head's probabilities hold the share, for heads that a program holds.

    At most SIDE rows and columns of blocks; 31 halvings. Grid (1, H, B).
    """
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if tl.load(mode_ptr + head) != _POOLED:
        return
    offs = tl.arange(0, SIDE)
    visible = _visible_rows(visible_ptr, offs, num_rows, visible_stride)
    lse = tl.load(lse_ptr + head.to(tl.int64) * num_rows + offs, mask=offs < num_rows, other=0.0)
    s = _pooled_scores(
        q_means_ptr, k_means_ptr, offs, offs, visible, num_rows, num_cols, scale, GROUP, D, BLOCK_D, PRECISION
    )
    key = _pooled_key(s, lse)
    p = tl.exp2(s - lse[:, None])
    need = share * tl.sum((visible > 0).to(tl.float32), 0)
    cut = tl.full((), 0, tl.int32)
    for i in range(0, 31):
        candidate = cut | (1 << (30 - i))
        mass = tl.sum(tl.sum(tl.where(key >= candidate, p, 0.0), 1), 0)
        cut = tl.where(mass >= need, candidate, cut)
    tl.store(cut_ptr + head, cut)


@triton.jit
def _band_entries(band_ptr, head, rows, cols, num_rows, num_cols, known):
    """Entries of a band for every pair of rows and columns, 0 where not ``known``."""
    offs = rows[:, None] - cols[None, :] + (num_cols - 1)
    return tl.load(band_ptr + head.to(tl.int64) * (num_rows + num_cols - 1) + offs, mask=known, other=0)


@triton.jit
def _keys(
    mode, head, q_means_ptr, k_means_ptr, lse, vertical_ptr, band_ptr, rows, cols, visible, num_rows, num_cols, scale,
    HAS_POOLED: tl.constexpr, HAS_MASS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Integers in [0, 2^31) that order like the head's scores; -1 where hidden."""
    seen = cols[None, :] < visible[:, None]
    key = tl.full([BLOCK_M, BLOCK_N], 0, tl.int32)
    if HAS_POOLED:  # noqa: SIM102
        if mode == _POOLED:
            s = _pooled_scores(
                q_means_ptr, k_means_ptr, rows, cols, visible, num_rows, num_cols, scale, GROUP, D, BLOCK_D, PRECISION
            )
            key = _pooled_key(s, lse)
    if HAS_MASS:  # noqa: SIM102
        if mode != _POOLED:
            vertical = tl.load(vertical_ptr + head.to(tl.int64) * num_cols + cols, mask=cols < num_cols, other=0.0)
            band = _band_entries(band_ptr, head, rows, cols, num_rows, num_cols, seen)
            key = tl.maximum(band, vertical[None, :]).to(tl.int32, bitcast=True)
    return tl.where(seen, key, -1)


@triton.jit
def _planned(vertical_ptr, band_ptr, dense_ptr, head, rows, cols, visible, num_rows, num_cols, HAS_DENSE: tl.constexpr):
    """Whether the plan lists each pair of rows and columns."""
    seen = cols[None, :] < visible[:, None]
    vertical = tl.load(vertical_ptr + head.to(tl.int64) * num_cols + cols, mask=cols < num_cols, other=0)
    keep = (vertical[None, :] != 0) | (_band_entries(band_ptr, head, rows, cols, num_rows, num_cols, seen) != 0)
    if HAS_DENSE:
        keep = keep | (rows >= tl.load(dense_ptr + head))[:, None]
    return keep & seen


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _row_top_kernel(
    mode_ptr, q_means_ptr, k_means_ptr, lse_ptr, mass_ptr, mass_band_ptr, vertical_ptr, band_ptr, dense_ptr,
    visible_ptr, top_ptr, cut_ptr, ties_ptr, num_rows, num_cols, visible_stride, scale,
    HAS_POOLED: tl.constexpr, HAS_MASS: tl.constexpr, HAS_DENSE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Per row the key of its ``top``-th best block, and how many equal to it are in. Grid (row tiles, H, B).

    31 halvings over the keys of the row, each of which counts them anew. Blocks of the plan have the highest key.
    """
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    mode = tl.load(mode_ptr + head)
    if mode == 0:
        return
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    visible = _visible_rows(visible_ptr, rows, num_rows, visible_stride)
    at = head.to(tl.int64) * num_rows + rows
    lse = tl.zeros([BLOCK_M], tl.float32)
    if HAS_POOLED:
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    top = tl.load(top_ptr + at, mask=inside, other=0)
    cut = tl.full([BLOCK_M], 0, tl.int32)
    above = tl.full([BLOCK_M], 0, tl.int32)
    for i in range(0, 32):
        # The last round counts what lies strictly above the cut-off.
        candidate = tl.where(i < 31, cut | (1 << tl.maximum(30 - i, 0)), cut)
        count = tl.full([BLOCK_M], 0, tl.int32)
        for n in range(0, tl.max(visible, 0), BLOCK_N):
            cols = n + tl.arange(0, BLOCK_N)
            key = _keys(
                mode, head, q_means_ptr, k_means_ptr, lse, mass_ptr, mass_band_ptr, rows, cols, visible, num_rows,
                num_cols, scale, HAS_POOLED, HAS_MASS, GROUP, D, BLOCK_D, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            plan = _planned(vertical_ptr, band_ptr, dense_ptr, head, rows, cols, visible, num_rows, num_cols, HAS_DENSE)
            key = tl.where(plan, _ALL, key)
            least = tl.where(i < 31, candidate - 1, cut)
            count += tl.sum((key > least[:, None]).to(tl.int32), 1)
        cut = tl.where((i < 31) & (count >= top), candidate, cut)
        above = count
    tl.store(cut_ptr + at, cut, mask=inside)
    tl.store(ties_ptr + at, top - above, mask=inside)


@triton.jit
def _cap_key(plan, key, mass_ptr, mass_band_ptr, head, rows, cols, num_rows, num_cols):
    """Integers that order the listed blocks: those of the plan by mass, above the others by ``key``."""
    vertical = tl.load(mass_ptr + head.to(tl.int64) * num_cols + cols, mask=cols < num_cols, other=0.0)
    band = _band_entries(mass_band_ptr, head, rows, cols, num_rows, num_cols, plan)
    mass = tl.maximum(band, vertical[None, :]).to(tl.int32, bitcast=True)
    # Masses are below 2, whose bits are 2^30, or infinite, which makes the highest of all integers.
    return tl.where(plan, (1 << 30) + tl.minimum(mass, (1 << 30) - 1), key >> 1)


@triton.jit
def _listed_above(
    least, mode, share, head, q_means_ptr, k_means_ptr, lse, mass_ptr, mass_band_ptr, vertical_ptr, band_ptr, dense_ptr,
    rows, visible, num_rows, num_cols, scale,
    HAS_POOLED: tl.constexpr, HAS_DENSE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """How many listed blocks of each row have a ``_cap_key`` above ``least``."""
    count = tl.full([BLOCK_M], 0, tl.int32)
    for n in range(0, tl.max(visible, 0), BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        plan = _planned(vertical_ptr, band_ptr, dense_ptr, head, rows, cols, visible, num_rows, num_cols, HAS_DENSE)
        key = tl.full([BLOCK_M, BLOCK_N], -1, tl.int32)
        if HAS_POOLED:  # noqa: SIM102
            if mode == _POOLED:
                s = _pooled_scores(
                    q_means_ptr, k_means_ptr, rows, cols, visible, num_rows, num_cols, scale, GROUP, D, BLOCK_D,
                    PRECISION,
                )  # fmt: skip
                key = _pooled_key(s, lse)
                key = tl.where((key >= share[:, None]) & (cols[None, :] < visible[:, None]), key, -1)
        key = _cap_key(plan, key, mass_ptr, mass_band_ptr, head, rows, cols, num_rows, num_cols)
        count += tl.sum((key > least[:, None]).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _cap_kernel(
    mode_ptr, q_means_ptr, k_means_ptr, lse_ptr, mass_ptr, mass_band_ptr, vertical_ptr, band_ptr, dense_ptr,
    visible_ptr, most_ptr, cut_ptr, cap_ptr, cap_ties_ptr, num_rows, num_cols, visible_stride, most_stride, scale,
    HAS_POOLED: tl.constexpr, HAS_MASS: tl.constexpr, HAS_DENSE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Per row the key of the last block that its head's cap admits, and how many equal to it. Grid (row tiles, H, B).

    As ``_row_top_kernel``, over the blocks that are listed. A tile of rows that list no more than the cap admits all.
    """
    b = tl.program_id(2)
    head = b * tl.num_programs(1) + tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    visible = _visible_rows(visible_ptr, rows, num_rows, visible_stride)
    most = tl.load(most_ptr + b * most_stride + tl.program_id(1))
    at = head.to(tl.int64) * num_rows + rows
    mode = tl.full((), 0, tl.int32)
    lse = tl.zeros([BLOCK_M], tl.float32)
    share = tl.full([BLOCK_M], 0, tl.int32)
    if HAS_POOLED:
        mode = tl.load(mode_ptr + head)
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
        share = tl.load(cut_ptr + at, mask=inside, other=0)
    cut = tl.full([BLOCK_M], 0, tl.int32)
    above = tl.full([BLOCK_M], 0, tl.int32)
    rounds = 0
    if tl.max(visible, 0) > most:
        listed = _listed_above(
            cut - 1, mode, share, head, q_means_ptr, k_means_ptr, lse, mass_ptr, mass_band_ptr, vertical_ptr, band_ptr,
            dense_ptr, rows, visible, num_rows, num_cols, scale, HAS_POOLED, HAS_DENSE, GROUP, D, BLOCK_D, PRECISION,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        rounds = tl.where(tl.max(listed, 0) > most, 32, 0)
    for i in range(0, rounds):
        # The last round counts what lies strictly above the cut-off.
        candidate = tl.where(i < 31, cut | (1 << tl.maximum(30 - i, 0)), cut)
        count = _listed_above(
            tl.where(i < 31, candidate - 1, cut), mode, share, head, q_means_ptr, k_means_ptr, lse, mass_ptr,
            mass_band_ptr, vertical_ptr, band_ptr, dense_ptr, rows, visible, num_rows, num_cols, scale, HAS_POOLED,
            HAS_DENSE, GROUP, D, BLOCK_D, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        cut = tl.where((i < 31) & (count >= most), candidate, cut)
        above = count
    # Blocks of infinite mass have the highest key, and stay however many they are.
    ties = tl.where((rounds == 0) | (cut == _ALL), 1 << 30, most - above)
    tl.store(cap_ptr + at, cut, mask=inside)
    tl.store(cap_ties_ptr + at, ties, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _lists_kernel(
    mode_ptr, q_means_ptr, k_means_ptr, lse_ptr, mass_ptr, mass_band_ptr, vertical_ptr, band_ptr, dense_ptr,
    visible_ptr, cut_ptr, ties_ptr, cap_ptr, cap_ties_ptr, counts_ptr, indices_ptr, num_rows, num_cols, visible_stride,
    width, scale,
    HAS_POOLED: tl.constexpr, HAS_MASS: tl.constexpr, HAS_DENSE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The lists of BLOCK_M rows: planned blocks, and ranked ones above (or, the first few, at) the row's cut-off.

    With ``cap``, of these the ones above, or the first few at, the row's cap.

    Grid (row tiles, H, B).
    """
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    visible = _visible_rows(visible_ptr, rows, num_rows, visible_stride)
    at = head.to(tl.int64) * num_rows + rows
    mode = tl.full((), 0, tl.int32)
    lse = tl.zeros([BLOCK_M], tl.float32)
    cut = tl.full([BLOCK_M], 0, tl.int32)
    ties = tl.full([BLOCK_M], 0, tl.int32)
    if HAS_POOLED or HAS_MASS:
        mode = tl.load(mode_ptr + head)
        cut = tl.load(cut_ptr + at, mask=inside, other=0)
        ties = tl.load(ties_ptr + at, mask=inside, other=0)
    if HAS_POOLED:
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    count = tl.full([BLOCK_M], 0, tl.int32)
    tied = tl.full([BLOCK_M], 0, tl.int32)
    cap = tl.full([BLOCK_M], 0, tl.int32)
    cap_ties = tl.full([BLOCK_M], 0, tl.int32)
    cap_tied = tl.full([BLOCK_M], 0, tl.int32)
    if cap_ptr is not None:
        cap = tl.load(cap_ptr + at, mask=inside, other=0)
        cap_ties = tl.load(cap_ties_ptr + at, mask=inside, other=0)
    for n in range(0, tl.max(visible, 0), BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        plan = _planned(vertical_ptr, band_ptr, dense_ptr, head, rows, cols, visible, num_rows, num_cols, HAS_DENSE)
        keep = plan
        key = tl.full([BLOCK_M, BLOCK_N], 0, tl.int32)
        if HAS_POOLED or HAS_MASS:  # noqa: SIM102
            if mode != 0:
                key = _keys(
                    mode, head, q_means_ptr, k_means_ptr, lse, mass_ptr, mass_band_ptr, rows, cols, visible, num_rows,
                    num_cols, scale, HAS_POOLED, HAS_MASS, GROUP, D, BLOCK_D, PRECISION, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                key = tl.where(plan, _ALL, key)
                tie = (key == cut[:, None]).to(tl.int32)
                rank = tied[:, None] + tl.cumsum(tie, 1) - tie
                ranked = (key > cut[:, None]) | ((tie > 0) & (rank < ties[:, None]))
                keep = keep | (ranked & (cols[None, :] < visible[:, None]))
                tied += tl.sum(tie, 1)
        if cap_ptr is not None:
            cap_key = _cap_key(plan, key, mass_ptr, mass_band_ptr, head, rows, cols, num_rows, num_cols)
            tie = (keep & (cap_key == cap[:, None])).to(tl.int32)
            rank = cap_tied[:, None] + tl.cumsum(tie, 1) - tie
            keep = keep & ((cap_key > cap[:, None]) | ((tie > 0) & (rank < cap_ties[:, None])))
            cap_tied += tl.sum(tie, 1)
        kept = keep.to(tl.int32)
        slot = count[:, None] + tl.cumsum(kept, 1) - kept
        out = indices_ptr + at[:, None] * width + slot
        tl.store(out, tl.broadcast_to(cols[None, :], [BLOCK_M, BLOCK_N]), mask=keep & (slot < width))
        count += tl.sum(kept, 1)
    tl.store(counts_ptr + at, tl.minimum(count, width), mask=inside)


def list_blocks(plan: ListPlan, ranking: Ranking | None, width: int) -> tuple[Tensor, Tensor]:
    """int32 counts ``[B, H, MB]`` and indices ``[B, H, MB, width]``. See ``block_lists_reference.list_blocks``."""
    batch, heads, columns = plan.vertical.shape
    rows = plan.visible.shape[-1]
    device = plan.visible.device
    counts = torch.zeros((batch, heads, rows), dtype=torch.int32, device=device)
    indices = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=device)
    if 0 in (batch, rows, columns, width):
        return counts, indices
    launch = _Launch(plan, ranking, (batch, heads, rows, columns))
    cut, ties = launch.cuts() if ranking is not None else (None, None)
    cap, cap_ties = (None, None) if plan.cap is None else launch.cap(plan.cap.most, cut)
    launch.run(_lists_kernel, (cut, ties, cap, cap_ties, counts, indices), (width,))
    return counts, indices


class _Launch:
    """The arguments that the list kernels share, and the search for the cut-offs."""

    def __init__(self, plan: ListPlan, ranking: Ranking | None, shape: tuple[int, int, int, int]) -> None:
        r = Ranking(plan.visible) if ranking is None else ranking
        self.shape, self.ranking = shape, r
        self.visible = plan.visible.contiguous()
        self.stride = 0 if self.visible.shape[0] == 1 else self.visible.stride(0)
        self.mode = None if ranking is None else r.mode.int().contiguous()
        dense = None if plan.dense_from is None else plan.dense_from.expand(shape[:2]).int().contiguous()
        self.means = tuple(None if x is None else x.float().contiguous() for x in (r.q_means, r.k_means))
        masses = (r.vertical, r.band) if plan.cap is None else (plan.cap.vertical, plan.cap.band)
        mass = tuple(None if x is None else x.float().contiguous() for x in masses)
        self.lse: Tensor | None = None
        head_dim = 16 if r.q_means is None else r.q_means.shape[-1]
        self.tile = {
            "GROUP": 1 if r.q_means is None or r.k_means is None else r.q_means.shape[1] // r.k_means.shape[1],
            "D": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "PRECISION": precision(torch.float16 if r.half else torch.float32), "num_warps": 4 if r.half else 8,
            "num_stages": 1, **LAUNCH,
        }  # fmt: skip
        self.flags = {
            "HAS_POOLED": r.q_means is not None, "HAS_MASS": r.band is not None, "HAS_DENSE": dense is not None,
        }  # fmt: skip
        planned = (x.contiguous().view(torch.uint8) for x in (plan.vertical, plan.band))
        self.lists = (*mass, *planned, dense)
        if r.q_means is not None:
            self.lse = self._pooled_lse()

    def run(self, kernel: triton.JITFunction, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
        """Launch a kernel that walks the rows in tiles of 16."""
        batch, heads, rows, columns = self.shape
        kernel[(-(-rows // 16), heads, batch)](
            self.mode, *self.means, self.lse, *self.lists, self.visible, *tensors, rows, columns, self.stride, *sizes,
            self.ranking.scale, **self.flags, **self.tile, BLOCK_M=16, BLOCK_N=64,
        )  # fmt: skip

    def cuts(self) -> tuple[Tensor, Tensor]:
        """int32 ``[B, H, MB]`` keys, and how many blocks equal to each are in."""
        if self.ranking.share is not None:
            cut = self._share_cut(self.ranking.share)[..., None].expand(self.shape[:3]).contiguous()
            return cut, torch.full_like(cut, 1 << 30)
        assert self.ranking.top is not None
        top = self.ranking.top.expand(self.shape[:3]).int().contiguous()
        cut, ties = torch.empty_like(top), torch.empty_like(top)
        self.run(_row_top_kernel, (top, cut, ties), ())
        return cut, ties

    def cap(self, most: Tensor, cut: Tensor | None) -> tuple[Tensor, Tensor]:
        """int32 ``[B, H, MB]``: the keys above which lists stay, and how many blocks equal to each do."""
        most = most.int().contiguous()
        keys = torch.empty(self.shape[:3], dtype=torch.int32, device=most.device)
        ties = torch.empty_like(keys)
        self.run(_cap_kernel, (most, cut, keys, ties), (0 if most.shape[0] == 1 else most.stride(0),))
        return keys, ties

    def _pooled_lse(self) -> Tensor:
        batch, heads, rows, columns = self.shape
        lse = torch.zeros((batch, heads, rows), dtype=torch.float32, device=self.visible.device)
        _pooled_lse_kernel[(-(-rows // _POOL_ROWS), heads, batch)](
            *self.means, self.mode, self.visible, lse, rows, columns, self.stride, self.ranking.scale,
            **{**self.tile, "num_warps": 8}, BLOCK_M=_POOL_ROWS, BLOCK_N=64,
        )  # fmt: skip
        return lse

    def _share_cut(self, share: float) -> Tensor:
        """int32 ``[B, H]``: the key at and above which a head's probabilities hold the share."""
        batch, heads, rows, columns = self.shape
        if max(rows, columns) <= _SHORT and self.tile["BLOCK_D"] <= 128 and _compiles_whole(self.visible):
            cut = torch.zeros((batch, heads), dtype=torch.int32, device=self.visible.device)
            _pooled_cut_kernel[(1, heads, batch)](
                *self.means, self.mode, self.visible, self.lse, cut, rows, columns, self.stride, share,
                self.ranking.scale, **{**self.tile, "num_warps": 8}, SIDE=_SHORT,
            )  # fmt: skip
            return cut
        need = share * (self.visible > 0).sum(-1, dtype=torch.float32)
        need = need[:, None].expand(batch, heads).contiguous()
        tiles, passes = -(-rows // _POOL_ROWS), len(SHIFTS)
        state = torch.zeros((passes + 1, 2, batch, heads), dtype=torch.int32, device=need.device)
        histogram = torch.empty((passes, batch, heads, tiles, 16), dtype=torch.float32, device=need.device)
        for step, shift in enumerate((*SHIFTS, 0)):
            last = step == passes
            _pooled_descend_kernel[(1 if last else tiles, heads, batch)](
                *self.means, self.mode, self.visible, self.lse, need, state, histogram, rows, columns, self.stride,
                step, shift, self.ranking.scale, **{**self.tile, "num_warps": 8}, BLOCK_M=_POOL_ROWS, BLOCK_N=64,
                FIRST=step == 0, LAST=last,
            )  # fmt: skip
        return state[-1, 0]


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    floats = ("q_means_ptr", "k_means_ptr", "lse_ptr", "mass_ptr", "mass_band_ptr", "need_ptr", "histogram_ptr")
    types = dict.fromkeys(floats, "*fp32") | {"vertical_ptr": "*u8", "band_ptr": "*u8"}
    cases = token_cases()
    shape = {"GROUP": 4, "D": 128, "BLOCK_D": 128, "PRECISION": "tf32", "BLOCK_M": _POOL_ROWS, "BLOCK_N": 64}
    cases.append(("pooled-lse-128", *offline(_pooled_lse_kernel, shape, types), 8, 1))
    for last in (False, True):
        case = offline(_pooled_descend_kernel, {**shape, "FIRST": False, "LAST": last}, types)
        cases.append((f"pooled-descend{'-last' * last}", *case, 8, 1))
    short = {**shape, "SIDE": _SHORT}
    cases.append(("pooled-cut", *offline(_pooled_cut_kernel, short, types), 8, 1))
    walk = {**shape, "BLOCK_M": 16, "HAS_POOLED": True, "HAS_MASS": True, "HAS_DENSE": True}
    cases.append(("row-top-128", *offline(_row_top_kernel, walk, types), 4, 1))
    cases.append(("block-lists-precise", *offline(_lists_kernel, {**walk, "PRECISION": "tf32x3"}, types), 8, 1))
    cases.append(("block-lists-cap", *offline(_cap_kernel, {**walk, "HAS_MASS": False}, types), 4, 1))
    return cases
