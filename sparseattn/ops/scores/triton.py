"""Triton kernels for antidiagonal scores and top-p selection (Ampere and newer; the CPU under the interpreter).

Three launches per chunk of query cells, no host sync and nothing compiled per length:

1. ``_cells_kernel``, a tiled product over cells, is nearly all of the work. It keeps neither logits nor probabilities:
   of each tile it writes the row maxima, the row sums and, for each *block*, the sums of ``exp2(logit - maximum)``:
   ``block_size / stride`` times less than the tile.
2. ``_scores_kernel`` brings the tiles of a query block to one maximum and denominator and sums over its rows.
3. ``_top_p_kernel`` finds the cut-off of a row by bisection over the bit pattern of its scores: no sort, no float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import LOG2E, sequence_span
from sparseattn.ops.scores.chunks import WHOLE_BYTES, WORKSPACE_BYTES, ScoreChunks
from sparseattn.ops.scores.cut_triton import batch_stride
from sparseattn.ops.scores.lists_triton import within_cap, write_list
from sparseattn.ops.scores.problem import RowBounds, ScoreProblem, row_bounds
from sparseattn.ops.scores.rules_problem import ListBounds
from sparseattn.ops.scores.rules_triton import empty_lists

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["max_q", "max_k", "first_cell", "first_block", "num_cells", "k_tiles", "num_blocks", "bounds_stride_b"]
_PITCHES = ["pitch", "scores_pitch", "scores_stride_b", "scores_stride_h", "lists_rows", "lists_pitch",
            "max_blocks"]  # fmt: skip
# Views into larger tensors: aligned or not as the batch size or chunk has it.
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr", "scores_ptr"]


_MANY = 4096  # tiles of a launch: more and those at the ends of sequences get one of their own


class Tiles(NamedTuple):
    """Tile of ``_cells_kernel``: query cells, key cells, head dimensions of a step; warps and pipeline stages."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _cells_kernel(
    q_ptr, k_ptr, sums_ptr, tile_max_ptr, tile_sum_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    stride_q, stride_k, max_q, max_k, first_cell, num_cells, k_tiles, scale,
    STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SWIZZLE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_M query cells against BLOCK_N key cells, reduced to block sums of ``exp2(logit - row maximum)``.

    Grid (q tiles * k tiles, Hq, B). Writes ``sums [B, Hq, num_cells, k_tiles * BLOCK_N / PER_BLOCK]``, ``tile_max`` and
    ``tile_sum [B, Hq, k_tiles, num_cells]``, all float32. Tiles no row of which sees a key are left unwritten.

    TILES: "whole" are those all of whose tokens exist, which is not asked of each then; "edge" the others; or "all".
    """
    # SWIZZLE q tiles share each k tile while it is in L2; the tiles of the last rows, which are the longest under a
    # causal mask, come first.
    tiles_m = num_cells // BLOCK_M
    pid = tl.program_id(0)
    band = pid // (SWIZZLE * k_tiles)
    in_band = pid % (SWIZZLE * k_tiles)
    band_size = tl.minimum(tiles_m - band * SWIZZLE, SWIZZLE)
    tile_m = tiles_m - 1 - band * SWIZZLE - in_band % band_size
    tile_n = in_band // band_size
    h = tl.program_id(1)
    b = tl.program_id(2)

    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    row_0 = (first_cell + tile_m * BLOCK_M) * STRIDE  # first query row, first key of the tile
    col_0 = tile_n * BLOCK_N * STRIDE
    row_end = tl.minimum(row_0 + BLOCK_M * STRIDE, q_len)
    if (row_0 >= q_len) | (col_0 >= k_len):
        return
    if CAUSAL and col_0 > row_end - 1 + offset:
        return
    if TILES != "all":  # noqa: SIM102 (a constant, and a condition of the device)
        if ((row_0 + BLOCK_M * STRIDE <= q_len) & (col_0 + BLOCK_N * STRIDE <= k_len)) != (TILES == "whole"):
            return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    rows = row_0 + offs_m * STRIDE  # first token of each cell
    cols = col_0 + offs_n * STRIDE
    q_rows = rows + (STRIDE - 1)  # antidiagonal s pairs query rows + STRIDE - 1 - s with key cols + s
    q_base = q_ptr + b.to(tl.int64) * stride_q[0] + h.to(tl.int64) * stride_q[2]
    k_base = k_ptr + b.to(tl.int64) * stride_k[0] + (h // GROUP).to(tl.int64) * stride_k[2]
    q_ptrs = q_base + (q_start + q_rows).to(tl.int64)[:, None] * stride_q[1] + offs_d[None, :] * stride_q[3]
    k_ptrs = k_base + (k_start + cols).to(tl.int64)[None, :] * stride_k[1] + offs_d[:, None] * stride_k[3]

    STEPS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, STRIDE * STEPS):
        s = step // STEPS
        d = (step % STEPS) * BLOCK_D
        q_step = q_ptrs - s * stride_q[1] + d * stride_q[3]  # [BLOCK_M, BLOCK_D]
        k_step = k_ptrs + s * stride_k[1] + d * stride_k[3]  # [BLOCK_D, BLOCK_N]
        if TILES == "whole" and D % BLOCK_D == 0:
            q = tl.load(q_step)
            k = tl.load(k_step)
        else:
            # Tokens that do not exist are zeros, so that pairs with them add nothing.
            q_inside = (q_rows - s < q_len)[:, None]
            k_inside = (cols + s < k_len)[None, :]
            if D % BLOCK_D != 0:
                q_inside = q_inside & (d + offs_d < D)[None, :]
                k_inside = k_inside & (d + offs_d < D)[:, None]
            q = tl.load(q_step, mask=q_inside, other=0.0)
            k = tl.load(k_step, mask=k_inside, other=0.0)
        acc = tl.dot(q, k, acc, input_precision=PRECISION)

    acc *= scale * (LOG2E / STRIDE)
    inside = (row_0 + BLOCK_M * STRIDE <= q_len) & (col_0 + BLOCK_N * STRIDE <= k_len)
    if CAUSAL:
        inside = inside & (col_0 + (BLOCK_N - 1) * STRIDE <= row_0 + STRIDE - 1 + offset)
    if not inside:
        # Only the last cell of a side is short, so means over fewer pairs differ by a factor of a row, one of a column
        # and, where both meet, a correction. (A matrix of divisors would not fit the registers beside acc; nor would
        # comparing tokens instead of cells, whose column numbers are constants but for the lane's share.)
        q_lack = (STRIDE - q_len % STRIDE) % STRIDE
        k_lack = (STRIDE - k_len % STRIDE) % STRIDE
        fix_q = STRIDE / (STRIDE - q_lack).to(tl.float32)
        fix_k = STRIDE / (STRIDE - k_lack).to(tl.float32)
        fix_both = STRIDE / tl.maximum(STRIDE - q_lack - k_lack, 1).to(tl.float32)
        missing = tl.maximum(rows + STRIDE - q_len, 0)  # rows the query cell lacks
        short_q = missing > 0
        short_k = offs_n == (k_len - col_0) // STRIDE
        fix = tl.where(short_q, fix_q, 1.0)[:, None] * tl.where(short_k, fix_k, 1.0)[None, :]
        fix += tl.where(short_q, 1.0, 0.0)[:, None] * tl.where(short_k, fix_both - fix_q * fix_k, 0.0)[None, :]
        # A pair exists up to the key k_len - 1 - missing; a cell wholly past the end has none.
        limit = tl.full([BLOCK_M], 0, tl.int32) + k_len - 1
        if CAUSAL:
            limit = tl.minimum(limit, rows + (STRIDE - 1) + offset)
        limit = tl.where(missing < STRIDE, limit - missing, -1)
        last = (tl.maximum(limit - col_0, -STRIDE) + STRIDE) // STRIDE - 1  # in cells of this tile
        acc = tl.where(offs_n[None, :] <= last[:, None], acc * fix, float("-inf"))

    m = tl.max(acc, 1)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    p = tl.exp2(acc - m_safe[:, None])
    BLOCKS: tl.constexpr = BLOCK_N // PER_BLOCK
    sums = tl.sum(tl.reshape(p, [BLOCK_M, BLOCKS, PER_BLOCK]), 2)  # [BLOCK_M, BLOCKS]

    head = b.to(tl.int64) * tl.num_programs(1) + h
    cell = tile_m * BLOCK_M + offs_m
    tile_row = (head * k_tiles + tile_n) * num_cells
    tl.store(tile_max_ptr + tile_row + cell, m)
    tl.store(tile_sum_ptr + tile_row + cell, tl.sum(sums, 1))
    pitch = k_tiles * BLOCKS
    block = tile_n * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(sums_ptr + head * num_cells * pitch + cell.to(tl.int64)[:, None] * pitch + block[None, :], sums)


@triton.jit(do_not_specialize=_LENGTHS + _PITCHES, do_not_specialize_on_alignment=_VIEWS)
def _scores_kernel(
    sums_ptr, tile_max_ptr, tile_sum_ptr, visible_ptr, scores_ptr, bounds_stride_b, first_block, num_cells, k_tiles,
    scores_stride_b, scores_stride_h, scores_pitch,
    PER_BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_TILES: tl.constexpr,
    MAX: tl.constexpr,
):  # fmt: skip
    """Scores of one query block of the chunk: the softmax over all tiles, summed over the block's cells or their MAX.

    Grid (query blocks of the chunk, Hq, B). Writes ``scores [B, Hq, rows, NB]``, float32, visible blocks only.
    """
    m_block = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    head = b.to(tl.int64) * tl.num_programs(1) + h
    visible = tl.load(visible_ptr + b * bounds_stride_b + first_block + m_block)
    tiles = (visible + TILE_BLOCKS - 1) // TILE_BLOCKS
    cell = m_block * PER_BLOCK + tl.arange(0, PER_BLOCK)
    tile_max_ptr += head * k_tiles * num_cells
    tile_sum_ptr += head * k_tiles * num_cells

    m_i = tl.full([PER_BLOCK], float("-inf"), tl.float32)
    l_i = tl.zeros([PER_BLOCK], tl.float32)
    for t in range(0, tiles, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        offs = offs_t.to(tl.int64)[:, None] * num_cells + cell[None, :]  # [BLOCK_T, PER_BLOCK]
        inside = (offs_t < tiles)[:, None]
        tile_max = tl.load(tile_max_ptr + offs, mask=inside, other=float("-inf"))
        tile_sum = tl.load(tile_sum_ptr + offs, mask=inside, other=0.0)
        m_new = tl.maximum(m_i, tl.max(tile_max, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tile_sum * tl.exp2(tile_max - m_safe[None, :]), 0)
        m_i = m_new

    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
    inverse = tl.where(l_i > 0, 1.0 / tl.where(l_i > 0, l_i, 1.0), 0.0)  # a cell that pairs with nothing weighs nothing
    pitch = k_tiles * TILE_BLOCKS
    sums_ptr += head * num_cells * pitch
    scores_ptr += b.to(tl.int64) * scores_stride_b + h.to(tl.int64) * scores_stride_h
    scores_ptr += m_block.to(tl.int64) * scores_pitch
    offs_t = tl.arange(0, BLOCK_TILES)
    offs_n = offs_t[:, None] * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[None, :]  # [BLOCK_TILES, TILE_BLOCKS]
    sums_ptrs = sums_ptr + cell.to(tl.int64)[:, None, None] * pitch + offs_n[None, :, :]
    max_ptrs = tile_max_ptr + offs_t.to(tl.int64)[None, :] * num_cells + cell[:, None]
    for t in range(0, tiles, BLOCK_TILES):
        seen = t * TILE_BLOCKS + offs_n < visible
        inside = (t + offs_t < tiles)[None, :]
        tile_max = tl.load(max_ptrs + tl.cast(t, tl.int64) * num_cells, mask=inside, other=float("-inf"))
        weight = tl.exp2(tile_max - m_i[:, None]) * inverse[:, None]  # [PER_BLOCK, BLOCK_TILES]
        mass = tl.load(sums_ptrs + t * TILE_BLOCKS, mask=seen[None, :, :], other=0.0) * weight[:, :, None]
        if MAX:
            score = tl.max(mass, 0)
        else:
            score = tl.sum(mass, 0)
        tl.store(scores_ptr + t * TILE_BLOCKS + offs_n, score, mask=seen)


@triton.jit
def _free_mass(row, row_ptr, first_free, recent, least, FITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the scores of the blocks in ``[first_free, recent)`` whose bit pattern is at least ``least``.

    ``row`` holds those of the first BLOCK, and 0 elsewhere: with FITS, of all.
    """
    mass = 0.0
    if FITS:
        mass = tl.sum(tl.where(row.to(tl.int32, bitcast=True) >= least, row, 0.0))
    else:
        for n in range(0, recent, BLOCK):
            offs_n = n + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + offs_n, mask=(offs_n >= first_free) & (offs_n < recent), other=0.0)
            mass += tl.sum(tl.where(x.to(tl.int32, bitcast=True) >= least, x, 0.0))
    return mass


@triton.jit(do_not_specialize=_LENGTHS + _PITCHES, do_not_specialize_on_alignment=_VIEWS)
def _top_p_kernel(
    scores_ptr, threshold_ptr, visible_ptr, recent_ptr, counts_ptr, indices_ptr, bounds_stride_b, first_block,
    scores_stride_b, scores_stride_h, scores_pitch, lists_rows, lists_pitch, max_blocks,
    HEAD_THRESHOLDS: tl.constexpr, KEEP_SINK: tl.constexpr, CAPPED: tl.constexpr, FITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The block list of one row: forced blocks, then the fewest others that reach the share. Grid (rows, H, B).

    Nonnegative floats order like their bit patterns, so 31 halvings find the largest pattern t for which the free
    blocks with a score of at least t hold the mass still needed. Blocks above t are in; of those at t, the first few.
    """
    m_block = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    bound = b * bounds_stride_b + first_block + m_block
    visible = tl.load(visible_ptr + bound)
    recent = tl.minimum(tl.load(recent_ptr + bound), visible)
    threshold = tl.load(threshold_ptr + h) if HEAD_THRESHOLDS else tl.load(threshold_ptr)
    row_ptr = scores_ptr + b.to(tl.int64) * scores_stride_b + h.to(tl.int64) * scores_stride_h
    row_ptr += m_block.to(tl.int64) * scores_pitch

    total = 0.0
    forced = 0.0
    for n in range(0, visible, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + offs_n, mask=offs_n < visible, other=0.0)
        total += tl.sum(x)
        must = offs_n >= recent
        if KEEP_SINK:
            must = must | (offs_n == 0)
        forced += tl.sum(tl.where(must, x, 0.0))
    need = threshold * total - forced

    first_free = 1 if KEEP_SINK else 0
    if (not KEEP_SINK) and recent == visible:
        # Nothing is forced: any need above zero takes the best block, and a row without mass takes block 0.
        need = tl.maximum(need, 1.2e-38)
        if total == 0.0:
            first_free = 1

    least = tl.full((), 0x7FFFFFFF, tl.int32)  # the lowest bit pattern that is in whatever its index
    ties = tl.full((), 0, tl.int32)  # how many blocks one pattern below are in as well
    if threshold >= 1.0:
        least = tl.full((), 0, tl.int32)
    elif need > 0.0:
        cut = tl.full((), 0, tl.int32)
        # A row that fits is loaded once; a longer one is looked through anew for every bit.
        offs = tl.arange(0, BLOCK)
        row = tl.load(row_ptr + offs, mask=(offs >= first_free) & (offs < recent), other=0.0)
        for i in range(0, 31):
            candidate = cut | (1 << (30 - i))
            if _free_mass(row, row_ptr, first_free, recent, candidate, FITS, BLOCK) >= need:
                cut = candidate
        # Rounding may put the need a little above everything there is: then cut is 0 and all that have mass are in.
        least = cut + 1
        if cut > 0:
            above = _free_mass(row, row_ptr, first_free, recent, least, FITS, BLOCK)
            value = cut.to(tl.float32, bitcast=True)
            ties = tl.maximum(tl.minimum(tl.ceil((need - above) / value), 1.0e9), 1.0).to(tl.int32)

    if CAPPED:
        num_free = tl.maximum(recent - first_free, 0)
        allowed = max_blocks - (visible - num_free)
        if num_free > allowed:
            least, ties = within_cap(row_ptr, first_free, recent, least, ties, tl.maximum(allowed, 0), BLOCK)

    list_row = (b.to(tl.int64) * tl.num_programs(1) + h) * lists_rows + first_block + m_block
    list_ptr = indices_ptr + list_row * lists_pitch
    tl.store(counts_ptr + list_row, write_list(row_ptr, list_ptr, first_free, recent, visible, least, ties, BLOCK))


def config_for(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> Tiles:
    """Tiles of the product by GPU generation; float32 goes through three TF32 products, which take more registers."""
    block_d = next((d for d in (64, 32, 16) if head_dim % d == 0), 16)
    if dtype == torch.float32:
        return Tiles(64, 64, min(block_d, 32), 4, 2)
    if capability[0] in (9, 10):
        # Two warp groups of 64 x 256, the largest tile whose accumulator fits their registers: a quarter less traffic
        # from L2 per product than 128 x 128, which would need more than L2 gives at full speed.
        return Tiles(128, 256, block_d, 8, 4)
    if capability in ((8, 0), (8, 7)):
        return Tiles(128, 128, block_d, 8, 4)  # 128 KB of shared memory
    return Tiles(128, 128, min(block_d, 32), 8, 3)  # consumer parts: 99 KB


def _tiles(q: Tensor) -> Tiles:
    if not q.is_cuda:
        return Tiles(32, 64, 16, 1, 1)  # the interpreter: small tiles reach every branch at small shapes
    return config_for(q.dtype, q.shape[-1], torch.cuda.get_device_capability(q.device))


def unsupported_reason(q: Tensor, k: Tensor | None = None) -> str | None:
    """Why these kernels cannot score q and k, or select by scores (one tensor), or None."""
    if k is None:
        if q.dtype != torch.float32:
            return f"the selection kernel takes float32 scores, not {q.dtype}"
    elif q.dtype not in _DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {q.dtype}"
    elif q.shape[-1] > 256:
        return f"head_dim {q.shape[-1]} is above 256"
    if q.is_cuda or triton.knobs.runtime.interpret:
        return None
    return f"Triton runs on {q.device.type} only under TRITON_INTERPRET=1"


def antidiagonal_scores(q: Tensor, k: Tensor, p: ScoreProblem) -> Tensor:
    """float32 ``[B, Hq, MB, NB]``. See ``api.antidiagonal_scores``."""
    scores = torch.zeros(
        (p.sequences.batch, q.shape[-2], p.num_q_blocks, p.num_kv_blocks), dtype=torch.float32, device=q.device
    )
    if scores.numel():
        bounds = row_bounds(p.sequences, p.block_size, p.causal, False, q.device)
        plan = _Plan(q, p)
        for first, blocks in plan.chunks():
            plan.score(q, k, bounds, first, blocks, scores[:, :, first : first + blocks])
    return scores


def top_p_blocks(scores: Tensor, threshold: Tensor, bounds: RowBounds, keep_sink: bool) -> tuple[Tensor, Tensor]:
    """int32 counts ``[B, H, MB]`` and indices ``[B, H, MB, NB]``. See ``api.top_p_blocks``."""
    counts, indices = empty_lists(scores.shape, scores.shape[3], scores.device)
    if 0 not in scores.shape:
        scores = scores if scores.stride(-1) == 1 else scores.contiguous()
        _select(scores, threshold, bounds, keep_sink, scores.shape[3], 0, counts, indices)
    return counts, indices


def xattention_blocks(
    q: Tensor, k: Tensor, p: ScoreProblem, threshold: Tensor, bounds: RowBounds, keep_sink: bool, cap: int, width: int
) -> tuple[Tensor, Tensor]:
    """Score and select chunk by chunk; only one chunk's scores exist at a time. See ``api.xattention_blocks``."""
    shape = (p.sequences.batch, q.shape[-2], p.num_q_blocks, p.num_kv_blocks)
    counts, indices = empty_lists(shape, width, q.device)
    if 0 not in shape:
        for first, scores in score_chunks(q, k, p, bounds, False):
            _select(scores, threshold, bounds, keep_sink, cap, first, counts, indices)
    return counts, indices


def score_chunks(q: Tensor, k: Tensor, p: ScoreProblem, bounds: RowBounds | ListBounds, whole: bool) -> ScoreChunks:
    """Scores, a chunk of rows at a time; undefined where not visible.

    Args:
        q: Queries.
        k: Keys.
        p: The problem.
        bounds: Which blocks are visible.
        whole: All scores are needed several times: one chunk if that fits.
    """
    shape = (p.sequences.batch, q.shape[-2], p.num_q_blocks, p.num_kv_blocks)
    if 0 in shape:
        return ScoreChunks(lambda first, rows: q.new_empty(shape, dtype=torch.float32), shape[2], shape[2])
    plan = _Plan(q, p)
    fits = whole and 4 * math.prod(shape) <= WHOLE_BYTES
    step = shape[2] if fits else plan.chunk_blocks
    buffer = torch.empty((*shape[:2], step, shape[3]), dtype=torch.float32, device=q.device)

    def score(first: int, rows: int) -> Tensor:
        for at in range(0, rows, plan.chunk_blocks):
            blocks = min(plan.chunk_blocks, rows - at)
            plan.score(q, k, bounds, first + at, blocks, buffer[:, :, at : at + blocks])
        return buffer[:, :, :rows]

    return ScoreChunks(score, shape[2], step)


def _select(
    scores: Tensor, threshold: Tensor, bounds: RowBounds, keep_sink: bool, cap: int, first: int, counts: Tensor,
    indices: Tensor,
) -> None:  # fmt: skip
    """Write the lists of the rows ``[first, first + scores.shape[2])`` from ``scores [B, H, rows, NB]``."""
    batch, heads, rows, columns = scores.shape
    visible, recent = bounds.visible.contiguous(), bounds.recent.contiguous()
    # A warp or two hold a row in registers and sum with few others to wait for.
    block = next((size for size in (128, 1024) if columns <= size), 1024)
    warps = 4 if columns > block else 1 + block // 1024
    _top_p_kernel[(rows, heads, batch)](
        scores, threshold, visible, recent, counts, indices, batch_stride(visible), first,
        *scores.stride()[:3], counts.shape[2], indices.shape[3], cap,
        HEAD_THRESHOLDS=threshold.numel() > 1, KEEP_SINK=keep_sink, CAPPED=cap < columns, FITS=columns <= block,
        BLOCK=block, num_warps=warps, **LAUNCH,
    )  # fmt: skip


class _Plan:
    """How a problem is cut into chunks of query blocks, and the workspace they share."""

    def __init__(self, q: Tensor, p: ScoreProblem) -> None:
        self.p = p
        self.tiles = _tiles(q)
        self.per_block = p.block_size // p.stride
        self.heads = p.sequences.batch * q.shape[-2]
        block_m, block_n = self.tiles.block_m, self.tiles.block_n
        self.tile_blocks = block_n // self.per_block
        k_tiles = -(-p.num_kv_blocks // self.tile_blocks)
        q_tiles = -(-p.num_q_blocks * self.per_block // block_m)
        fit = WORKSPACE_BYTES // (4 * self.heads * k_tiles * self.tile_blocks * block_m)
        # Chunks of one size: a short last one would leave the GPU idle for as long as a full one.
        chunks = -(-q_tiles // max(1, fit))
        cells = -(-q_tiles // chunks) * block_m
        self.chunk_blocks = min(cells // self.per_block, p.num_q_blocks)
        self.cells = cells
        size = self.heads * k_tiles * cells
        self.sums = torch.empty(size * self.tile_blocks, dtype=torch.float32, device=q.device)
        self.tile_max = torch.empty(size, dtype=torch.float32, device=q.device)
        self.tile_sum = torch.empty_like(self.tile_max)

    def chunks(self) -> list[tuple[int, int]]:
        """(first query block, query blocks) of each chunk."""
        total, step = self.p.num_q_blocks, self.chunk_blocks
        return [(first, min(step, total - first)) for first in range(0, total, step)]

    def score(
        self, q: Tensor, k: Tensor, bounds: RowBounds | ListBounds, first: int, blocks: int, scores: Tensor
    ) -> None:
        """Write ``scores [B, Hq, blocks, NB]`` of the query blocks ``[first, first + blocks)``, where visible."""
        p, s, tiles = self.p, self.p.sequences, self.tiles
        heads, head_dim = q.shape[-2:]
        cells = -(-blocks * self.per_block // tiles.block_m) * tiles.block_m
        columns = p.num_kv_blocks
        if p.causal and not s.ragged:
            last_row = min((first + blocks) * p.block_size, s.max_q) - 1
            columns = min(columns, max(0, (s.max_k - s.max_q + last_row) // p.block_size + 1))
        k_tiles = -(-columns // self.tile_blocks)
        if k_tiles == 0:
            return
        grid = (cells // tiles.block_m * k_tiles, heads, s.batch)
        for part in self._parts(first * self.per_block + cells, k_tiles, math.prod(grid)):
            _cells_kernel[grid](
                q, k, self.sums, self.tile_max, self.tile_sum, s.q_start, s.q_end, s.k_start, s.k_end,
                _strides(q, s.packed), _strides(k, s.packed), s.max_q, s.max_k, first * self.per_block, cells, k_tiles,
                p.scale, STRIDE=p.stride, PER_BLOCK=self.per_block, GROUP=heads // k.shape[-2], D=head_dim,
                CAUSAL=p.causal, RAGGED_Q=s.q_start is not None, RAGGED_K=s.k_start is not None,
                PRECISION=_precision(q.dtype), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=tiles.block_d,
                SWIZZLE=8, TILES=part, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **LAUNCH,
            )  # fmt: skip
        visible = bounds.visible.contiguous()
        _scores_kernel[(blocks, heads, s.batch)](
            self.sums, self.tile_max, self.tile_sum, visible, scores, batch_stride(visible), first, cells, k_tiles,
            *scores.stride()[:3], PER_BLOCK=self.per_block, TILE_BLOCKS=self.tile_blocks, BLOCK_T=32,
            BLOCK_TILES=max(1, 64 // self.tile_blocks), MAX=p.aggregate == "max", num_warps=1, **LAUNCH,
        )  # fmt: skip

    def _parts(self, cells: int, k_tiles: int, programs: int) -> tuple[str, ...]:
        """Which tiles each launch takes: whole ones apart, where there are enough for that to be worth a launch.

        Args:
            cells: Up to the last query cell of the chunk.
            k_tiles: Of its keys.
            programs: Tiles of all heads.
        """
        s, stride = self.p.sequences, self.p.stride
        fits = cells * stride <= s.max_q and k_tiles * self.tiles.block_n * stride <= s.max_k
        if fits and not s.ragged:
            return ("whole",)
        return ("whole", "edge") if programs >= _MANY else ("all",)


def _strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """(batch, row, head, dim) strides; packed rows are counted from the start of the tensor."""
    return (0, *x.stride()) if packed else x.stride()


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def compile_cases() -> list[
    tuple[str, object, dict[str, object], dict[object, object], dict[object, object], int, int]
]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    for major in (8, 9):
        for head_dim, stride, block_size in ((128, 16, 128), (128, 8, 128), (64, 16, 64), (96, 4, 128)):
            for ragged in (False, True):
                tiles = config_for(torch.bfloat16, head_dim, (major, 0))
                constants = {
                    "STRIDE": stride, "PER_BLOCK": block_size // stride, "GROUP": 4, "D": head_dim, "CAUSAL": True,
                    "RAGGED_Q": ragged, "RAGGED_K": ragged, "PRECISION": "tf32", "BLOCK_M": tiles.block_m,
                    "BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d, "SWIZZLE": 8,
                    "TILES": "all" if ragged else "whole",
                }  # fmt: skip
                name = f"cells-{head_dim}-stride{stride}-block{block_size}{'-ragged' * ragged}-sm{major}0"
                cases.append((name, *_offline(_cells_kernel, constants), tiles.num_warps, tiles.num_stages))
    for per_block in (8, 16, 32):
        blocks = 256 // per_block
        constants = {"PER_BLOCK": per_block, "TILE_BLOCKS": blocks, "BLOCK_T": 32, "BLOCK_TILES": max(1, 64 // blocks)}
        constants["MAX"] = per_block == 32
        cases.append((f"scores-{per_block}", *_offline(_scores_kernel, constants), 1, 1))
    for sink in (False, True):
        constants = {"HEAD_THRESHOLDS": not sink, "KEEP_SINK": sink, "CAPPED": sink, "FITS": sink, "BLOCK": 1024}
        cases.append((f"top_p-sink{int(sink)}", *_offline(_top_p_kernel, constants), 2 if sink else 4, 1))
    return cases


def _offline(function: object, constants: dict[str, object]) -> tuple[object, dict, dict, dict]:
    """Signature, constexprs and attributes of a bfloat16 call with contiguous tensors."""
    integers = {"visible_ptr", "recent_ptr", "counts_ptr", "indices_ptr"}
    signature: dict[str, object] = {}
    constexprs: dict[object, object] = {}
    attributes: dict[object, object] = {}
    for i, param in enumerate(function.params):  # type: ignore[attr-defined]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants[param.name]
        elif param.name in ("stride_q", "stride_k"):
            signature[param.name] = ("i64", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif param.name.endswith("_ptr"):
            index = param.name in integers or "start" in param.name or "end" in param.name
            signature[param.name] = "*bf16" if param.name in ("q_ptr", "k_ptr") else "*i32" if index else "*fp32"
            if param.name not in _VIEWS:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name == "scale" else "i32"
    return function, signature, constexprs, attributes
