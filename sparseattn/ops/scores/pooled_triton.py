"""Triton kernels for block scores from pooled pages (Ampere and newer; the CPU under the interpreter).

Three launches per chunk of query blocks, no host sync and nothing compiled per length: ``_pool_kernel`` (once) reads
the keys and writes a page's features; ``_pooled_scores_kernel`` compares a tile of queries with all of them and keeps
one number a block; ``_choose_kernel`` (``rules_triton``) turns a row of those into a list. Logits never reach memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import LOG2E, sequence_span
from sparseattn.ops.scores.chunks import ScoreChunks, chunk_rows
from sparseattn.ops.scores.pooled_problem import PooledProblem
from sparseattn.ops.scores.pooled_triton_values import running_lse, score_of
from sparseattn.ops.scores.problem import row_bounds
from sparseattn.ops.scores.rules_problem import ListBounds, Rule
from sparseattn.ops.scores.rules_triton import choose_chunks, empty_lists

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = [
    "max_q", "max_k", "page_pitch", "first_block", "bounds_stride_b", "scores_stride_b", "scores_stride_h",
    "scores_pitch", "heads_stride", "columns", "rows",
]  # fmt: skip
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr", "scores_ptr"]


class Tiles(NamedTuple):
    """Pages of a step of ``_pooled_scores_kernel``; warps and pipeline stages; head dimensions of a product.

    ``step`` 0 keeps whole queries at hand; otherwise they are read anew for every step of pages, so many dimensions at
    a time, where whole ones would not fit (float32 products take several times the shared memory). ``by_page`` makes
    pages the rows of a tile, so that sums over queries stay within a few threads; ``ahead`` then fetches a step's pages
    into registers during the step before, in place of a pipeline that needs twice the shared memory.
    """

    block_n: int
    num_warps: int
    num_stages: int
    step: int = 0
    ahead: bool = False
    by_page: bool = False


@triton.jit
def _first_page(k_start, b, page_pitch, PAGE: tl.constexpr, PACKED: tl.constexpr):
    """Row of the features at which the pages of sequence ``b`` begin.

    Sequences of a padded batch have ``page_pitch`` rows each. Packed ones begin at ``k_start // PAGE + b``, which
    leaves enough room for the short last pages of those before without reading their lengths.
    """
    if PACKED:
        row = k_start // PAGE + b
    else:
        row = b * page_pitch
    return row


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _pool_kernel(
    k_ptr, f_ptr, k_start_ptr, k_end_ptr, stride_k, stride_f, max_k, page_pitch,
    PAGE: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUND: tl.constexpr,
    PACKED: tl.constexpr, RAGGED_K: tl.constexpr,
):  # fmt: skip
    """Features of the pages of KEYS keys: means, or greatest and least. Grid (key tiles, Hkv, B).

    Writes ``[rows, Hkv, D]``, or ``[rows, Hkv, 2, D]`` with the greatest before the least.
    """
    tile = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    first = tile * KEYS
    if first >= k_len:
        return
    PAGES: tl.constexpr = KEYS // PAGE
    offs_d = tl.arange(0, BLOCK_D)
    base = k_ptr + b.to(tl.int64) * stride_k[0] + h.to(tl.int64) * stride_k[2] + offs_d[None, :] * stride_k[3]
    page = first // PAGE + tl.arange(0, PAGES)
    rows = (_first_page(k_start, b, page_pitch, PAGE, PACKED) + page).to(tl.int64)
    out = rows[:, None] * stride_f[0] + h.to(tl.int64) * stride_f[1] + offs_d[None, :] * stride_f[2]
    inside = (page * PAGE < k_len)[:, None] & (offs_d < D)[None, :]
    if BOUND:
        # A row of every page at a time: whole rows meet in registers, none in shared memory. A short last page has its
        # last key several times.
        last = tl.minimum((page + 1) * PAGE, k_len) - 1
        high = tl.full([PAGES, BLOCK_D], float("-inf"), tl.float32)
        low = tl.full([PAGES, BLOCK_D], float("inf"), tl.float32)
        for i in tl.static_range(0, PAGE):
            row = (k_start + tl.minimum(page * PAGE + i, last)).to(tl.int64)
            x = tl.load(base + row[:, None] * stride_k[1], mask=inside, other=0.0).to(tl.float32)
            high = tl.maximum(high, x)
            low = tl.minimum(low, x)
        tl.store(f_ptr + out + D, low.to(f_ptr.dtype.element_ty), mask=inside)
    else:
        offs = first + tl.arange(0, KEYS)
        ptrs = base + (k_start + offs).to(tl.int64)[:, None] * stride_k[1]
        x = tl.load(ptrs, mask=(offs < k_len)[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
        size = tl.minimum(tl.maximum(k_len - page * PAGE, 1), PAGE).to(tl.float32)
        high = tl.sum(tl.reshape(x, [PAGES, PAGE, BLOCK_D]), 1) / size[:, None]
    tl.store(f_ptr + out, high.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _queries(
    q_rows, inside, d, stride_d, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Columns ``d .. d + WIDTH`` of queries ``[BLOCK_M, WIDTH]``: the dimensions, padded to BLOCK_D.

    BOUND: twice as many, what is above zero and then what is below. Queries take the sign of ``scale``: the largest
    products are the largest logits then.
    """
    offs = d + tl.arange(0, WIDTH)
    offs_d = offs % BLOCK_D
    mask = inside[:, None] & (offs_d < D)[None, :]
    q = tl.load(q_rows[:, None] + offs_d[None, :] * stride_d, mask=mask, other=0.0)
    q = tl.where(scale < 0, -q, q)
    if BOUND:
        q = tl.where((q > 0) == (offs < BLOCK_D)[None, :], q, tl.zeros(q.shape, q.dtype))
    return q


@triton.jit
def _pages(
    f_ptr, n, pages, d, stride_row, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Columns ``d .. d + WIDTH`` (as :func:`_queries` has them) of pages ``n .. n + BLOCK_N``; MASKED: up to ``pages``.

    What goes with negative queries lies LOW elements behind the rest.
    """
    offs_n = n + tl.arange(0, BLOCK_N)
    offs = d + tl.arange(0, WIDTH)
    columns = offs % BLOCK_D * stride_d + offs // BLOCK_D * LOW
    inside = tl.full([BLOCK_N, 1], True, tl.int1)
    if MASKED:
        inside = (offs_n < pages)[:, None]
    if D != BLOCK_D:
        inside = inside & (offs % BLOCK_D < D)[None, :]
    return tl.load(f_ptr + offs_n.to(tl.int64)[:, None] * stride_row + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _product(acc, q, x, PRECISION: tl.constexpr, BY_PAGE: tl.constexpr):
    """``acc`` plus the product of queries ``q`` and pages ``x``; BY_PAGE: pages are its rows."""
    if BY_PAGE:
        return tl.dot(x, tl.trans(q), acc, input_precision=PRECISION)
    else:
        return tl.dot(q, tl.trans(x), acc, input_precision=PRECISION)


@triton.jit
def _logits(
    q, q_rows, rows_inside, f_ptr, n, pages, limit, stride_qd, stride_row, stride_d, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUND: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, BY_PAGE: tl.constexpr,
):  # fmt: skip
    """Products of a query tile and pages ``n .. n + BLOCK_N``; MASKED: -inf from each row's ``limit`` on.

    BY_PAGE: ``[BLOCK_N, BLOCK_M]``, yet to be scaled; otherwise ``[BLOCK_M, BLOCK_N]``, logits (base 2).
    """
    offs_n = n + tl.arange(0, BLOCK_N)
    s = tl.zeros([BLOCK_N, BLOCK_M] if BY_PAGE else [BLOCK_M, BLOCK_N], tl.float32)
    if STEP == 0:
        x = _pages(f_ptr, n, pages, 0, stride_row, stride_d, D, BLOCK_D, 2 * BLOCK_D if BOUND else BLOCK_D, LOW,
                   BLOCK_N, MASKED)  # fmt: skip
        s = _product(s, q, x, PRECISION, BY_PAGE)
    else:
        for d in range(0, BLOCK_D + D if BOUND else D, STEP):
            part = _queries(q_rows, rows_inside, d, stride_qd, scale, D, BLOCK_D, STEP, BOUND)
            x = _pages(f_ptr, n, pages, d, stride_row, stride_d, D, BLOCK_D, STEP, LOW, BLOCK_N, MASKED)
            s = _product(s, part, x, PRECISION, BY_PAGE)
    if BY_PAGE:
        if MASKED:
            s = tl.where(offs_n[:, None] < limit[None, :], s, float("-inf"))
    else:
        s *= tl.abs(scale) * LOG2E
        if MASKED:
            s = tl.where(offs_n[None, :] < limit[:, None], s, float("-inf"))
    return s


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _pooled_scores_kernel(
    q_ptr, f_ptr, visible_ptr, scores_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    stride_q, stride_f, stride_f_batch, max_q, max_k, page_pitch, first_block, bounds_stride_b, scores_stride_b,
    scores_stride_h, scores_pitch, scale,
    PAGE: tl.constexpr, PER_BLOCK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PACKED: tl.constexpr,
    BOUND: tl.constexpr, ROW_SOFTMAX: tl.constexpr, MAX: tl.constexpr, PRECISION: tl.constexpr,
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr, BY_PAGE: tl.constexpr,
):  # fmt: skip
    """Scores of one query block against every block it sees. Grid (query blocks of the chunk, Hq, B).

    Writes ``scores [B, Hq, rows, NB]``, float32, natural log, visible blocks only. With PAGE 1 the features are the
    keys themselves, by their own strides. ROW_SOFTMAX goes over the pages twice, first for the rows' normalisers.
    """
    # The last rows, which are the longest under a causal mask, come first.
    m_block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    visible = tl.load(visible_ptr + b * bounds_stride_b + first_block + m_block)
    if visible == 0:
        return
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    rows = (first_block + m_block) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < q_len
    q_base = q_ptr + b.to(tl.int64) * stride_q[0] + h.to(tl.int64) * stride_q[2]
    q_rows = q_base + (q_start + rows).to(tl.int64) * stride_q[1]
    WIDTH: tl.constexpr = 2 * BLOCK_D if BOUND else BLOCK_D
    LOW: tl.constexpr = 0 if PAGE == 1 else D
    q = _queries(q_rows, inside, 0, stride_q[3], scale, D, BLOCK_D, WIDTH if STEP == 0 else STEP, BOUND)

    # Pages that each row sees are those before its limit.
    pages = (k_len + PAGE - 1) // PAGE
    limit = tl.zeros([BLOCK_M], tl.int32) + pages
    if CAUSAL:
        limit = tl.maximum(rows + (k_len - q_len + 1), 0) // PAGE
    limit = tl.where(inside, limit, 0)
    whole = tl.min(limit) // BLOCK_N * BLOCK_N
    seen = tl.max(limit)
    if PAGE == 1:
        first = k_start
    else:
        first = _first_page(k_start, b, page_pitch, PAGE, PACKED)
    feature = b.to(tl.int64) * stride_f_batch + first.to(tl.int64) * stride_f[0]
    feature += (h // GROUP).to(tl.int64) * stride_f[1]
    f_ptr += feature

    z = tl.zeros([BLOCK_M], tl.float32)
    if ROW_SOFTMAX:
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        for n in range(0, whole, BLOCK_N):
            s = _logits(q, q_rows, inside, f_ptr, n, pages, limit, stride_q[3], stride_f[0],
                        stride_f[2], scale, D, BLOCK_D, STEP, BLOCK_M, BLOCK_N, BOUND, LOW, PRECISION, False,
                        BY_PAGE)  # fmt: skip
            m_i, l_i = running_lse(s, m_i, l_i)
        for n in range(whole, seen, BLOCK_N):
            s = _logits(q, q_rows, inside, f_ptr, n, pages, limit, stride_q[3], stride_f[0],
                        stride_f[2], scale, D, BLOCK_D, STEP, BLOCK_M, BLOCK_N, BOUND, LOW, PRECISION, True,
                        BY_PAGE)  # fmt: skip
            m_i, l_i = running_lse(s, m_i, l_i)
        z = tl.where(l_i > 0, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), 0.0)

    BLOCKS: tl.constexpr = BLOCK_N // PER_BLOCK
    factor = tl.maximum(tl.abs(scale) * LOG2E, 1e-30)
    shift = 0.0
    if not MAX:
        count = tl.maximum(tl.minimum(q_len - (first_block + m_block) * BLOCK_M, BLOCK_M), 1)
        shift = tl.log2(count.to(tl.float32))
    scores_ptr += b.to(tl.int64) * scores_stride_b + h.to(tl.int64) * scores_stride_h
    scores_ptr += m_block.to(tl.int64) * scores_pitch
    if AHEAD:
        x = _pages(f_ptr, 0, pages, 0, stride_f[0], stride_f[2], D, BLOCK_D, WIDTH, LOW, BLOCK_N, True)
        for n in range(0, visible * PER_BLOCK, BLOCK_N):
            s = _product(tl.zeros([BLOCK_N, BLOCK_M], tl.float32), q, x, PRECISION, True)
            # The next pages, while this product runs: not before it, as its fence would wait for them, nor when the
            # compiler would, after the exponentials.
            x = _pages(f_ptr, n + BLOCK_N, pages, 0, stride_f[0], stride_f[2], D, BLOCK_D, WIDTH, LOW, BLOCK_N, True)
            tl.debug_barrier()
            if n >= whole:
                s = tl.where((n + tl.arange(0, BLOCK_N))[:, None] < limit[None, :], s, float("-inf"))
            score = score_of(s, z, factor, BLOCK_M, BLOCK_N, PER_BLOCK, MAX, ROW_SOFTMAX, BY_PAGE)
            block = n // PER_BLOCK + tl.arange(0, BLOCKS)
            tl.store(scores_ptr + block, (score - shift) * LN2, mask=block < visible)
    else:
        for n in range(0, whole, BLOCK_N):
            s = _logits(q, q_rows, inside, f_ptr, n, pages, limit, stride_q[3], stride_f[0],
                        stride_f[2], scale, D, BLOCK_D, STEP, BLOCK_M, BLOCK_N, BOUND, LOW, PRECISION, False,
                        BY_PAGE)  # fmt: skip
            score = score_of(s, z, factor, BLOCK_M, BLOCK_N, PER_BLOCK, MAX, ROW_SOFTMAX, BY_PAGE)
            block = n // PER_BLOCK + tl.arange(0, BLOCKS)
            tl.store(scores_ptr + block, (score - shift) * LN2, mask=block < visible)
        for n in range(whole, visible * PER_BLOCK, BLOCK_N):
            s = _logits(q, q_rows, inside, f_ptr, n, pages, limit, stride_q[3], stride_f[0],
                        stride_f[2], scale, D, BLOCK_D, STEP, BLOCK_M, BLOCK_N, BOUND, LOW, PRECISION, True,
                        BY_PAGE)  # fmt: skip
            score = score_of(s, z, factor, BLOCK_M, BLOCK_N, PER_BLOCK, MAX, ROW_SOFTMAX, BY_PAGE)
            block = n // PER_BLOCK + tl.arange(0, BLOCKS)
            tl.store(scores_ptr + block, (score - shift) * LN2, mask=block < visible)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _group_kernel(
    scores_ptr, visible_ptr, bounds_stride_b, first_block, scores_stride_b, scores_stride_h, scores_pitch,
    GROUP: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One score for the GROUP heads of a key head, written over the first one's. Grid (rows, Hkv, B)."""
    m_block = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    visible = tl.load(visible_ptr + b * bounds_stride_b + first_block + m_block)
    scores_ptr += b.to(tl.int64) * scores_stride_b + (h * GROUP).to(tl.int64) * scores_stride_h
    scores_ptr += m_block.to(tl.int64) * scores_pitch
    for n in range(0, visible, BLOCK):
        offs = n + tl.arange(0, BLOCK)
        m = tl.full([BLOCK], float("-inf"), tl.float32)
        for g in range(0, GROUP):
            ptrs = scores_ptr + tl.cast(g, tl.int64) * scores_stride_h + offs
            m = tl.maximum(m, tl.load(ptrs, mask=offs < visible, other=float("-inf")))
        if not MAX:
            m_safe = tl.where(m == float("-inf"), 0.0, m)
            total = tl.zeros([BLOCK], tl.float32)
            for g in range(0, GROUP):
                ptrs = scores_ptr + tl.cast(g, tl.int64) * scores_stride_h + offs
                x = tl.load(ptrs, mask=offs < visible, other=float("-inf"))
                total += tl.exp2((x - m_safe) * LOG2E)
            m = tl.where(total > 0, m_safe + tl.log(tl.where(total > 0, total / GROUP, 1.0)), m)
        tl.store(scores_ptr + offs, m, mask=offs < visible)


def config_for(
    dtype: torch.dtype, head_dim: int, page_size: int, bound: bool, rows_first: bool, capability: tuple[int, int]
) -> Tiles:
    """Tiles by GPU generation; ``rows_first`` is what :func:`_rows_first` says."""
    wide, hopper = head_dim > 128, capability[0] >= 9
    if dtype == torch.float32:
        return Tiles(64, 8, 1, 32, by_page=rows_first and not hopper)
    by_page = rows_first and hopper  # Ampere's products would keep the queries, the second operand, in registers
    if wide and (bound or page_size == 1):
        return Tiles(64, 8, 2, 64, by_page=by_page)
    if page_size == 1:
        return Tiles(128, 8, 2, by_page=by_page)  # a step must hold the keys of a whole block
    if by_page:
        # Small enough for two or three programs a processor: one's exponentials, as many as its products take cycles,
        # run beside the others' products.
        return Tiles(64, 4, 1, ahead=True, by_page=True) if wide or bound else Tiles(64, 4, 2, by_page=True)
    if hopper:
        return Tiles(64, 8, 2 if wide or bound else 3)
    return Tiles(32 if wide else 64, 8, 2)


def _rows_first(p: PooledProblem) -> bool:
    """Whether the sum over rows may come before the one over pages.

    Rows that are normalised need sums over pages, and peaks are sums of pages before they are the largest of rows.
    """
    return not p.row_softmax and (p.page_size == p.block_size or p.aggregate == "mean")


def _tiles(q: Tensor, p: PooledProblem) -> Tiles:
    per_block = p.block_size // p.page_size
    if not q.is_cuda:
        # The interpreter: small tiles reach every branch at small shapes.
        dim, by_page = q.shape[-1], _rows_first(p) and p.causal
        step = 16 if dim > 32 else 0 if dim > 16 else 32
        return Tiles(max(32, per_block), 1, 1, step, by_page and step == 0 and p.feature == "bound", by_page)
    capability = torch.cuda.get_device_capability(q.device)
    tiles = config_for(q.dtype, q.shape[-1], p.page_size, p.feature == "bound", _rows_first(p), capability)
    return tiles._replace(block_n=max(tiles.block_n, per_block))


def unsupported_reason(q: Tensor, k: Tensor) -> str | None:
    """Why these kernels cannot score q and k, or None."""
    if q.dtype not in _DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"head_dim {q.shape[-1]} is above 256"
    if q.is_cuda or triton.knobs.runtime.interpret:
        return None
    return f"Triton runs on {q.device.type} only under TRITON_INTERPRET=1"


class _Features(NamedTuple):
    """Features of all pages, their strides (row, head, dim) and the stride of a batch row."""

    values: Tensor
    strides: tuple[int, int, int]
    batch_stride: int


def _pool_keys(page_size: int, bound: bool) -> int:
    """Keys that one program of the pooling kernel reads: extremes are taken of a few pages at a time."""
    return 8 * page_size if bound else 128


def _pool(k: Tensor, p: PooledProblem) -> _Features:
    s, bound = p.sequences, p.feature == "bound"
    batch_stride, row, head, dim = _strides(k, s.packed)
    if p.page_size == 1:
        return _Features(k, (row, head, dim), batch_stride)
    heads, d = k.shape[-2:]
    rows = k.shape[0] // p.page_size + s.batch + 1 if s.packed else s.batch * p.num_pages
    values = torch.empty((rows, heads, 2 * d if bound else d), dtype=k.dtype, device=k.device)
    keys = _pool_keys(p.page_size, bound)
    _pool_kernel[(-(-s.max_k // keys), heads, s.batch)](
        k, values, s.k_start, s.k_end, (batch_stride, row, head, dim), values.stride(), s.max_k, p.num_pages,
        PAGE=p.page_size, KEYS=keys, D=d, BLOCK_D=_padded(d), BOUND=bound, PACKED=s.packed,
        RAGGED_K=s.k_start is not None, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return _Features(values, values.stride(), 0)  # type: ignore[arg-type]


def _score(
    q: Tensor, features: _Features, p: PooledProblem, visible: Tensor, first: int, scores: Tensor, kv_heads: int
) -> None:
    """Write ``scores [B, Hq, blocks, NB]`` of the query blocks from ``first`` on, where visible."""
    s, tiles, (heads, d) = p.sequences, _tiles(q, p), q.shape[-2:]
    _pooled_scores_kernel[(scores.shape[2], heads, s.batch)](
        q, features.values, visible, scores, s.q_start, s.q_end, s.k_start, s.k_end, _strides(q, s.packed),
        features.strides, features.batch_stride, s.max_q, s.max_k, p.num_pages, first,
        0 if visible.shape[0] == 1 else visible.stride(0), *scores.stride()[:3], p.scale,
        PAGE=p.page_size, PER_BLOCK=p.block_size // p.page_size, GROUP=heads // kv_heads, D=d, BLOCK_D=_padded(d),
        CAUSAL=p.causal, RAGGED_Q=s.q_start is not None, RAGGED_K=s.k_start is not None, PACKED=s.packed,
        BOUND=p.feature == "bound", ROW_SOFTMAX=p.row_softmax, MAX=p.aggregate == "max",
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", STEP=min(tiles.step, _padded(d)),
        BLOCK_M=p.block_size, BLOCK_N=tiles.block_n, AHEAD=tiles.ahead, BY_PAGE=tiles.by_page,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **LAUNCH,
    )  # fmt: skip


def block_scores(q: Tensor, k: Tensor, p: PooledProblem) -> Tensor:
    """float32 ``[B, Hq, MB, NB]``, natural log. See ``pooled.pooled_scores``."""
    shape = (p.sequences.batch, q.shape[-2], p.num_q_blocks, p.num_kv_blocks)
    scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    if scores.numel():
        visible = row_bounds(p.sequences, p.block_size, p.causal, False, q.device).visible.contiguous()
        _score(q, _pool(k, p), p, visible, 0, scores, k.shape[-2])
    return scores


def pooled_blocks(
    q: Tensor, k: Tensor, p: PooledProblem, rule: Rule, thresholds: Tensor, bounds: ListBounds, group: int, width: int
) -> tuple[Tensor, Tensor]:
    """Score and select chunk by chunk; only one chunk's scores exist at a time. See ``pooled.pooled_blocks``."""
    batch, heads, rows, columns = p.sequences.batch, q.shape[-2], p.num_q_blocks, p.num_kv_blocks
    shape = (batch, heads // group, rows, columns)
    if 0 in shape:
        return empty_lists(shape, width, q.device)
    step = chunk_rows(rows, 4 * batch * heads * columns, rule.name == "global" and rule.density is not None)
    buffer = torch.empty((batch, heads, step, columns), dtype=torch.float32, device=q.device)
    visible = bounds.visible.contiguous()
    features = _pool(k, p)

    def score(first: int, count: int) -> Tensor:
        scores = buffer[:, :, :count]
        _score(q, features, p, visible, first, scores, k.shape[-2])
        if group > 1:
            _group_kernel[(count, heads // group, batch)](
                scores, visible, 0 if visible.shape[0] == 1 else visible.stride(0), first, *scores.stride()[:3],
                GROUP=group, MAX=p.aggregate == "max", BLOCK=256, num_warps=4, **LAUNCH,
            )  # fmt: skip
        return scores[:, ::group]

    return choose_chunks(ScoreChunks(score, rows, step), shape, rule, thresholds, bounds, width)


def _strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """(batch, row, head, dim) strides; packed rows are counted from the start of the tensor."""
    return (0, *x.stride()) if packed else x.stride()


def _padded(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def compile_cases() -> list[
    tuple[str, object, dict[str, object], dict[object, object], dict[object, object], int, int]
]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    variants = (
        ("mean", 128, 128, False, False, torch.bfloat16),
        ("bound", 16, 128, False, False, torch.bfloat16),
        ("exact", 1, 128, True, True, torch.bfloat16),
        ("bound", 16, 128, False, False, torch.float32),
    )
    for major in (8, 9):
        for feature, page, block, softmax, maximum, dtype in variants:
            bound, per_block = feature == "bound", block // page
            tiles = config_for(dtype, 128, page, bound, not softmax, (major, 0))
            constants: dict[str, Any] = {
                "PAGE": page, "PER_BLOCK": per_block, "GROUP": 4, "D": 128, "BLOCK_D": 128, "CAUSAL": True,
                "RAGGED_Q": maximum, "RAGGED_K": maximum, "PACKED": maximum, "BOUND": bound, "ROW_SOFTMAX": softmax,
                "MAX": maximum, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", "STEP": tiles.step,
                "BLOCK_M": block, "BLOCK_N": max(tiles.block_n, per_block), "AHEAD": tiles.ahead,
                "BY_PAGE": tiles.by_page,
            }  # fmt: skip
            kind = "-fp32" if dtype == torch.float32 else "-softmax" * softmax
            offline = _offline(_pooled_scores_kernel, constants, "*fp32" if dtype == torch.float32 else "*bf16")
            name = f"pooled-{feature}{page}-block{block}{kind}-sm{major}0"
            cases.append((name, *offline, tiles.num_warps, tiles.num_stages))
    for bound in (False, True):
        page = 16 if bound else 128
        constants = {
            "PAGE": page, "KEYS": _pool_keys(page, bound), "D": 128, "BLOCK_D": 128, "BOUND": bound, "PACKED": bound,
            "RAGGED_K": bound,
        }  # fmt: skip
        cases.append((f"pool-{'bound' if bound else 'mean'}", *_offline(_pool_kernel, constants), 4, 1))
    cases.append(("group", *_offline(_group_kernel, {"GROUP": 4, "MAX": False, "BLOCK": 256}), 4, 1))
    return cases


def _offline(function: object, constants: dict[str, Any], inputs: str = "*bf16") -> tuple[object, dict, dict, dict]:
    """Signature, constexprs and attributes of a call with contiguous tensors."""
    signature: dict[str, object] = {}
    constexprs: dict[object, object] = {}
    attributes: dict[object, object] = {}
    for i, param in enumerate(function.params):  # type: ignore[attr-defined]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants[param.name]
        elif param.name in ("stride_q", "stride_k", "stride_f"):
            size = 3 if param.name == "stride_f" else 4
            signature[param.name] = (*(["i64"] if size == 4 else []), "i32", "i32", "constexpr")
            constexprs[(i, size - 1)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(size - 1)}
        elif param.name.endswith("_ptr"):
            index = param.name == "visible_ptr" or "start" in param.name or "end" in param.name
            is_input = param.name in ("q_ptr", "k_ptr", "f_ptr")
            signature[param.name] = inputs if is_input else "*i32" if index else "*fp32"
            if param.name not in _VIEWS:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name == "scale" else "i32"
            if param.name == "stride_f_batch":
                attributes[(i,)] = [["tt.divisibility", 16]]
    return function, signature, constexprs, attributes
