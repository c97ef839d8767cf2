"""Triton kernels for the attention mass of the last queries and for its largest entries.

The last rows of a head meet all of its keys twice: once for the rows' LSE, once for the probabilities, which are summed
over columns and diagonals in registers. No ``[rows, Sk]`` slab is written and nothing is added atomically.

The largest entries of a long row are found without a sort: nonnegative floats order like their bit patterns, and eight
passes fix four bits of the cut-off each. All programs of a pass read the histograms of the pass before and agree on its
digit, so that the passes need neither atomics nor a host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import LOG2E, natural_lse, sequence_span
from sparseattn.kernels.digits import SHIFTS, digit_sums, next_digit
from sparseattn.ops.scores.vertical_slash import LastQueries

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["max_q", "max_k", "length", "step", "shift", "chunks", "chunk", "rows"]
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr", "values_ptr", "need_ptr"]
_SHORT = 2048  # rows of up to so many values are sorted: a block's work, and one launch


@triton.jit
def _scaled_scores(
    q_ptr, k_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, stride_q, stride_k, max_q, max_k, scale,
    ROWS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scaled scores of the last rows of a head against one tile of keys, -inf where hidden; ``rows``, ``position``."""
    h = tl.program_id(0)  # the heads of a group meet each tile of keys side by side, so that L2 serves all but one
    tile = tl.program_id(1)
    b = tl.program_id(2)
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    rows = tl.minimum(q_len, ROWS)
    if CAUSAL:
        rows = tl.minimum(rows, k_len)
    offs_m = tl.arange(0, ROWS)
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    q_rows = q_start + q_len - rows + offs_m
    q_base = q_ptr + b.to(tl.int64) * stride_q[0] + h.to(tl.int64) * stride_q[2]
    k_base = k_ptr + b.to(tl.int64) * stride_k[0] + (h // GROUP).to(tl.int64) * stride_k[2]
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        q_ptrs = q_base + q_rows.to(tl.int64)[:, None] * stride_q[1] + offs_d[None, :] * stride_q[3]
        k_ptrs = k_base + (k_start + cols).to(tl.int64)[None, :] * stride_k[1] + offs_d[:, None] * stride_k[3]
        q = tl.load(q_ptrs, mask=(offs_m < rows)[:, None] & (offs_d < D)[None, :], other=0.0)
        k = tl.load(k_ptrs, mask=(cols < k_len)[None, :] & (offs_d < D)[:, None], other=0.0)
        acc = tl.dot(q, k, acc, input_precision=PRECISION)
    position = k_len - rows + offs_m  # of the keys, bottom-right aligned
    last = tl.where(offs_m < rows, k_len - 1, -1)
    if CAUSAL:
        last = tl.minimum(last, tl.where(offs_m < rows, position, -1))
    return tl.where(cols[None, :] <= last[:, None], acc * scale, float("-inf")), rows, position


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _row_lse_kernel(
    q_ptr, k_ptr, lse_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, stride_q, stride_k, max_q, max_k, scale,
    ROWS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """LSE of each of the last rows over one tile of keys -> ``lse [B, Hq, tiles, ROWS]``. Grid (Hq, tiles, B)."""
    s, _, _ = _scaled_scores(
        q_ptr, k_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, stride_q, stride_k, max_q, max_k, scale,
        ROWS, GROUP, D, CAUSAL, RAGGED_Q, RAGGED_K, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    m = tl.max(s, 1)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    l = tl.sum(tl.exp2((s - m_safe[:, None]) * LOG2E), 1)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    row = head * tl.num_programs(1) + tl.program_id(1)
    tl.store(lse_ptr + row * ROWS + tl.arange(0, ROWS), natural_lse(m_safe, l))


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _mass_kernel(
    q_ptr, k_ptr, lse_ptr, vertical_ptr, partial_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    stride_q, stride_k, max_q, max_k, scale,
    ROWS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Column sums ``vertical [B, Hq, Sk]`` and diagonal sums ``partial [B, Hq, tiles, 2 * BLOCK_N]`` of one tile.

    Grid (Hq, tiles, B); ``lse [B, Hq, ROWS]``. Local row r and column c lie on diagonal ``r - c``; entry e of the
    partial sums is diagonal ``e - BLOCK_N``. Rotating row r by r brings diagonal x or x - BLOCK_N to column x, so one
    gather and two sums add up all diagonals (ROWS <= BLOCK_N).
    """
    s, rows, position = _scaled_scores(
        q_ptr, k_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, stride_q, stride_k, max_q, max_k, scale,
        ROWS, GROUP, D, CAUSAL, RAGGED_Q, RAGGED_K, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    tile = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    offs_m = tl.arange(0, ROWS)
    offs_n = tl.arange(0, BLOCK_N)
    lse = tl.load(lse_ptr + head * ROWS + offs_m)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    weight = 1.0 / tl.maximum(rows, 1).to(tl.float32)
    p = tl.exp2((s - lse[:, None]) * LOG2E) * weight  # [ROWS, BLOCK_N]
    cols = tile * BLOCK_N + offs_n
    tl.store(vertical_ptr + head * max_k + cols, tl.sum(p, 0), mask=cols < max_k)
    if not CAUSAL:
        p = tl.where(cols[None, :] <= position[:, None], p, 0.0)
    rotated = tl.gather(p, (offs_m[:, None] - offs_n[None, :] + BLOCK_N) % BLOCK_N, 1)
    wrapped = offs_m[:, None] < offs_n[None, :]
    partial_ptr += (head * tl.num_programs(1) + tile) * (2 * BLOCK_N)
    tl.store(partial_ptr + offs_n, tl.sum(tl.where(wrapped, rotated, 0.0), 0))
    tl.store(partial_ptr + BLOCK_N + offs_n, tl.sum(tl.where(wrapped, 0.0, rotated), 0))


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _descend_kernel(
    values_ptr, need_ptr, state_ptr, histogram_ptr, length, step, shift, chunks, chunk, rows,
    COUNT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass ``step`` over one chunk of one row: fix the digit of the pass before, add up by the digit at ``shift``.

    Grid (chunks, rows). ``state`` int32 ``[passes + 1, 2, rows]``: prefix and (as bits) the sum above it, before each
    pass; ``histogram`` float32 ``[passes, rows, chunks, 16]``. LAST fixes the last digit and adds up nothing.
    """
    c = tl.program_id(0)
    row = tl.program_id(1)
    histogram_ptr += (step * rows + row).to(tl.int64) * chunks * 16
    state_ptr += step * 2 * rows + row
    prefix = tl.full((), 0, tl.int32)
    if not FIRST:
        prefix = tl.load(state_ptr - 2 * rows)
        above = tl.load(state_ptr - rows).to(tl.float32, bitcast=True)
        before = histogram_ptr - rows.to(tl.int64) * chunks * 16
        prefix, above = next_digit(before, chunks, prefix, above, tl.load(need_ptr + row), 32)
        if c == 0:
            tl.store(state_ptr, prefix)
            tl.store(state_ptr + rows, above.to(tl.int32, bitcast=True))
    if not LAST:
        row_ptr = values_ptr + row.to(tl.int64) * length
        sums = tl.zeros([BLOCK, 16], tl.float32)
        for n in range(c * chunk, tl.minimum((c + 1) * chunk, length), BLOCK):
            offs = n + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + offs, mask=offs < length, other=0.0)
            weights = tl.where(offs < length, 1.0, 0.0) if COUNT else x
            sums += digit_sums(x.to(tl.int32, bitcast=True), weights, prefix, shift, FIRST)
        tl.store(histogram_ptr + c * 16 + tl.arange(0, 16), tl.sum(sums, 0))


class Tiles(NamedTuple):
    """Key columns and head dimensions of a step; warps and pipeline stages."""

    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def config_for(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles of the products. ``block_n`` must be at least the number of rows (128)."""
    block_d = min(64, max(16, triton.next_power_of_2(head_dim)))
    return Tiles(128, 16, 8, 2) if dtype == torch.float32 else Tiles(128, block_d, 8, 3)


def last_query_mass(q: Tensor, k: Tensor, p: LastQueries) -> tuple[Tensor, Tensor]:
    """``vertical`` and ``slash``, float32 ``[B, Hq, Sk]``. See ``vertical_slash.last_query_mass``."""
    s, (heads, head_dim) = p.sequences, q.shape[-2:]
    vertical = torch.zeros((s.batch, heads, s.max_k), dtype=torch.float32, device=q.device)
    if 0 in (s.batch, s.max_q, s.max_k):
        return vertical, torch.zeros_like(vertical)
    tiles = config_for(q.dtype, head_dim)
    count = -(-s.max_k // tiles.block_n)
    grid = (heads, count, s.batch)
    tile_lse = torch.empty((s.batch, heads, count, p.num_queries), dtype=torch.float32, device=q.device)
    partial = torch.empty((s.batch, heads, count, 2 * tiles.block_n), dtype=torch.float32, device=q.device)
    spans = (s.q_start, s.q_end, s.k_start, s.k_end)
    shape = (_strides(q, s.packed), _strides(k, s.packed), s.max_q, s.max_k, p.scale)
    options = {
        "ROWS": p.num_queries, "GROUP": heads // k.shape[-2], "D": head_dim, "CAUSAL": p.causal,
        "RAGGED_Q": s.q_start is not None, "RAGGED_K": s.k_start is not None, "PRECISION": precision(q.dtype),
        "BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d, "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages, **LAUNCH,
    }  # fmt: skip
    _row_lse_kernel[grid](q, k, tile_lse, *spans, *shape, **options)
    lse = tile_lse.logsumexp(2)
    _mass_kernel[grid](q, k, lse, vertical, partial, *spans, *shape, **options)
    return vertical, _join_diagonals(partial, p, tiles.block_n)


def _join_diagonals(partial: Tensor, p: LastQueries, block_n: int) -> Tensor:
    """``slash [B, Hq, Sk]`` from the tiles' partial sums: a diagonal runs through two neighbouring tiles at most."""
    s, tiles = p.sequences, partial.shape[2]
    k_len = s.lengths_k()
    k_len = torch.full((1,), s.max_k, device=partial.device) if k_len is None else k_len.long()
    first = k_len[:, None] - p.rows(partial.device)[:, None]  # position of the first row
    distance = torch.arange(s.max_k, device=partial.device)
    column = first - distance  # where the diagonal meets the first row; [B, Sk]
    tile = torch.div(column + block_n - 1, block_n, rounding_mode="floor") - 1
    entry = (tile + 1) * block_n - column
    slash = torch.zeros((), dtype=torch.float32, device=partial.device)
    for step in (0, 1):
        inside = (tile + step >= 0) & (tile + step < tiles) & (distance < k_len[:, None])
        flat = (tile + step) * (2 * block_n) + entry + step * block_n
        flat = torch.where(inside, flat, 0)[:, None].expand(-1, partial.shape[1], -1)
        slash = slash + torch.where(inside[:, None], partial.flatten(-2).gather(-1, flat), 0.0)
    return slash


def largest(values: Tensor, counts: Tensor) -> Tensor:
    """bool ``[..., N]``. See ``vertical_slash.largest``."""
    if values.shape[-1] <= _SHORT:
        order = values.sort(dim=-1, descending=True, stable=True).indices
        take = torch.arange(values.shape[-1], device=values.device) < counts[..., None]
        return torch.zeros_like(take).scatter(-1, order, take)
    cut, above = _cut(values, counts.float(), True)
    bits = values.contiguous().view(torch.int32)
    tie = bits == cut[..., None]
    rank = tie.cumsum(-1, dtype=torch.int32)
    kept = (bits > cut[..., None]) | (tie & (rank <= (counts - above)[..., None]))
    return kept & (counts > 0)[..., None]


def coverage_counts(values: Tensor, share: float) -> Tensor:
    """int64 ``[...]``. See ``vertical_slash.coverage_counts``."""
    if share <= 0:  # reached by nothing, which has no cut-off
        return torch.ones(values.shape[:-1], dtype=torch.int64, device=values.device)
    need = torch.full(values.shape[:-1], share, dtype=torch.float32, device=values.device)
    cut, above = _cut(values, need, False)
    bits = values.contiguous().view(torch.int32)
    more = (bits > cut[..., None]).sum(-1)
    value = cut.view(torch.float32)
    ties = torch.where(cut > 0, ((need - above) / value.clamp(min=1e-37)).ceil(), 0.0).clamp(max=float(2**30)).long()
    ties = torch.minimum(ties.clamp(min=0), (bits == cut[..., None]).sum(-1))
    return (more + ties).clamp(min=1)


def _cut(values: Tensor, need: Tensor, by_count: bool) -> tuple[Tensor, Tensor]:
    """The largest bit pattern (int32) that the values at or above reach ``need`` with, and the sum strictly above."""
    flat = values.contiguous().view(-1, values.shape[-1])
    rows, length = flat.shape
    need = need.contiguous()
    chunk = 4096
    chunks = -(-length // chunk)
    passes = len(SHIFTS)
    state = torch.zeros((passes + 1, 2, rows), dtype=torch.int32, device=values.device)
    histogram = torch.empty((passes, rows, chunks, 16), dtype=torch.float32, device=values.device)
    for step, shift in enumerate((*SHIFTS, 0) if rows else ()):
        last = step == passes
        _descend_kernel[(1 if last else chunks, rows)](
            flat, need, state, histogram, length, step, shift, chunks, chunk, rows,
            COUNT=by_count, FIRST=step == 0, LAST=last, BLOCK=256, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return state[-1, 0].view(need.shape), state[-1, 1].view(torch.float32).view(need.shape)


def _strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """(batch, row, head, dim) strides; packed rows are counted from the start of the tensor."""
    return (0, *x.stride()) if packed else x.stride()


def precision(dtype: torch.dtype) -> str:
    """Of the products, by the dtype of q and k."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    names = ("lse_ptr", "vertical_ptr", "partial_ptr", "values_ptr", "need_ptr", "histogram_ptr")
    floats = dict.fromkeys(names, "*fp32")
    for rows, head_dim, ragged, dtype in ((128, 128, False, "bf16"), (64, 96, True, "bf16"), (128, 128, False, "fp32")):
        tiles = config_for(torch.float32 if dtype == "fp32" else torch.bfloat16, head_dim)
        constants = {
            "ROWS": rows, "GROUP": 4, "D": head_dim, "CAUSAL": True, "RAGGED_Q": ragged, "RAGGED_K": ragged,
            "PRECISION": "tf32x3" if dtype == "fp32" else "tf32", "BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d,
        }  # fmt: skip
        types = floats | {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}"}
        name = f"{rows}-{head_dim}-{dtype}{'-ragged' * ragged}"
        cases.append((f"last-query-mass-{name}", *offline(_mass_kernel, constants, types), *tiles[2:]))
        if rows == 128 and dtype == "bf16":
            cases.append((f"row-lse-{name}", *offline(_row_lse_kernel, constants, types), *tiles[2:]))
    for last in (False, True):
        constants = {"COUNT": False, "FIRST": False, "LAST": last, "BLOCK": 256}
        cases.append((f"descend{'-last' * last}", *offline(_descend_kernel, constants, floats), 4, 3))
    return cases


def offline(
    function: triton.JITFunction, constants: Mapping[str, object], types: Mapping[str, str]
) -> tuple[triton.JITFunction, dict, dict, dict]:
    """Signature, constexprs, attributes of a call with contiguous tensors; pointers are int32 unless ``types`` say."""
    signature: dict[str, object] = {}
    constexprs: dict[object, object] = {}
    attributes: dict[object, object] = {}
    for i, param in enumerate(function.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants[param.name]
        elif param.name.startswith("stride_"):
            signature[param.name] = ("i64", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif param.name.endswith("_ptr"):
            signature[param.name] = types.get(param.name, "*i32")
            if not param.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name == "scale" else "i32"
    return function, signature, constexprs, attributes
