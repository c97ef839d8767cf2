"""Triton kernels for the attention mass of the last queries.

The last rows of a head meet all of its keys twice: once for the rows' LSE, once for the probabilities, which are summed
over columns and diagonals in registers. No ``[rows, Sk]`` slab is written and nothing is added atomically.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import LOG2E, sequence_span
from sparseattn.ops.scores.vertical_slash import LastQueries

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["max_q", "max_k", "chunks", "heads", "tiles"]
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr"]
_CHUNK_TILES = 16  # of keys, for whose LSE one program goes over them


@triton.jit
def _last_rows(
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, b, max_q, max_k,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
):  # fmt: skip
    """First of the last rows that count and how many do; first key and how many there are."""
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    rows = tl.minimum(q_len, ROWS)
    if CAUSAL:
        rows = tl.minimum(rows, k_len)
    return q_start + q_len - rows, rows, k_start, k_len


@triton.jit
def _last_visible(row, inside, rows, k_len, CAUSAL: tl.constexpr):
    """The last key each of the last rows sees, -1 for what is no row."""
    last = tl.full(row.shape, 0, tl.int32) + k_len - 1
    if CAUSAL:
        last = tl.minimum(last, k_len - rows + row)
    return tl.where(inside, last, -1)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _row_lse_kernel(
    q_ptr, k_ptr, lse_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, stride_q, stride_k, max_q, max_k, scale,
    ROWS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Base-2 LSE of each of the last rows over a chunk of TILES tiles of keys -> ``lse [B, Hq, chunks, ROWS]``.

    Grid (Hkv * parts of a group * steps, chunks, B): STEP rows of HEADS heads that share their keys go together.
    """
    STEPS: tl.constexpr = ROWS // STEP
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(0) // (STEPS * PARTS)
    chunk = tl.program_id(1)
    b = tl.program_id(2)
    first_row, rows, k_start, k_len = _last_rows(
        q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, b, max_q, max_k, ROWS, CAUSAL, RAGGED_Q, RAGGED_K
    )
    offs_m = tl.arange(0, HEADS * STEP)
    offs_d = tl.arange(0, BLOCK_D)
    member = tl.program_id(0) // STEPS % PARTS * HEADS + offs_m // STEP
    row = tl.program_id(0) % STEPS * STEP + offs_m % STEP
    inside = (member < GROUP) & (row < rows)
    head = kv_head * GROUP + member
    q_ptrs = q_ptr + b.to(tl.int64) * stride_q[0] + head.to(tl.int64)[:, None] * stride_q[2]
    q_ptrs += (first_row + row).to(tl.int64)[:, None] * stride_q[1] + offs_d[None, :] * stride_q[3]
    k_ptr += b.to(tl.int64) * stride_k[0] + kv_head.to(tl.int64) * stride_k[2]
    q = tl.load(q_ptrs, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)
    last = _last_visible(row, inside, rows, k_len, CAUSAL)
    m_i = tl.full([HEADS * STEP], float("-inf"), tl.float32)
    l_i = tl.zeros([HEADS * STEP], tl.float32)
    for n in range(chunk * TILES * BLOCK_N, tl.minimum((chunk + 1) * TILES * BLOCK_N, k_len), BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        acc = tl.zeros([HEADS * STEP, BLOCK_N], tl.float32)
        for d in tl.static_range(0, D, BLOCK_D):
            if D > BLOCK_D:
                q = tl.load(q_ptrs + d * stride_q[3], mask=inside[:, None] & (d + offs_d < D)[None, :], other=0.0)
            k_ptrs = k_ptr + (k_start + cols).to(tl.int64)[None, :] * stride_k[1] + (d + offs_d)[:, None] * stride_k[3]
            k = tl.load(k_ptrs, mask=(cols < k_len)[None, :] & (d + offs_d < D)[:, None], other=0.0)
            acc = tl.dot(q, k, acc, input_precision=PRECISION)
        s = tl.where(cols[None, :] <= last[:, None], acc * (scale * LOG2E), float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(s - m_safe[:, None]), 1)
        m_i = m_new
    out = (b * (tl.num_programs(0) // (STEPS * PARTS) * GROUP) + head).to(tl.int64) * tl.num_programs(1) + chunk
    lse = tl.where(l_i > 0, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), float("-inf"))
    tl.store(lse_ptr + out * ROWS + row, lse, mask=member < GROUP)


@triton.jit(do_not_specialize=_LENGTHS)
def _join_lse_kernel(chunk_lse_ptr, lse_ptr, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Base-2 LSE over all chunks of keys: ``[B * Hq, chunks, ROWS] -> [B * Hq, ROWS]``. Grid (B * Hq, ROWS / 16)."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    m_i = tl.full([16], float("-inf"), tl.float32)
    l_i = tl.zeros([16], tl.float32)
    for c in range(0, chunks, BLOCK):
        chunk = c + tl.arange(0, BLOCK)
        ptrs = chunk_lse_ptr + (head * chunks + chunk)[:, None] * ROWS + row[None, :]
        x = tl.load(ptrs, mask=(chunk < chunks)[:, None], other=float("-inf"))
        m_new = tl.maximum(m_i, tl.max(x, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(x - m_safe[None, :]), 0)
        m_i = m_new
    lse = tl.where(l_i > 0, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), float("-inf"))
    tl.store(lse_ptr + head * ROWS + row, lse)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _mass_kernel(
    q_ptr, k_ptr, lse_ptr, columns_ptr, diagonals_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    stride_q, stride_k, max_q, max_k, scale,
    ROWS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Column and diagonal sums of a parallelogram of probabilities: STEP rows at a time, each step STEP keys further.

    Rows and keys move along together, so that a diagonal stays in one place of the accumulator and all steps add up
    before anything is rotated. Writes ``columns [B, Hq, ROWS / STEP, Sk]``, the column sums of each step, and
    ``diagonals [B, Hq, tiles, BLOCK_N + STEP]``: of local row r and key c at ``r - c + BLOCK_N``. The keys of tile t
    begin, at the first step, at ``t * BLOCK_N - (ROWS - STEP)``: the last step then begins at a multiple.

    Grid (Hkv * parts of a group, tiles, B); ``lse [B, Hq, ROWS]``, in base 2.
    """
    STEPS: tl.constexpr = ROWS // STEP
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(0) // PARTS
    tile = tl.program_id(1)
    b = tl.program_id(2)
    first_row, rows, k_start, k_len = _last_rows(
        q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, b, max_q, max_k, ROWS, CAUSAL, RAGGED_Q, RAGGED_K
    )
    offs_m = tl.arange(0, HEADS * STEP)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    member = tl.program_id(0) % PARTS * HEADS + offs_m // STEP
    first_head = b * (tl.num_programs(0) // PARTS * GROUP) + kv_head * GROUP  # of the group, in the output
    q_ptr += b.to(tl.int64) * stride_q[0]
    k_ptr += b.to(tl.int64) * stride_k[0] + kv_head.to(tl.int64) * stride_k[2]
    q_heads = (kv_head * GROUP + member).to(tl.int64) * stride_q[2]
    out_member = tl.program_id(0) % PARTS * HEADS + tl.arange(0, HEADS)
    out_head = (first_head + out_member).to(tl.int64)
    weight = tl.log2(tl.maximum(rows, 1).to(tl.float32))
    total = tl.zeros([BLOCK_N, HEADS * STEP], tl.float32)
    for step in range(0, STEPS):
        row = step * STEP + offs_m % STEP
        inside = (member < GROUP) & (row < rows)
        cols = tile * BLOCK_N - (ROWS - STEP) + step * STEP + offs_n
        seen = (cols >= 0) & (cols < k_len)
        q_ptrs = q_ptr + q_heads[None, :] + (first_row + row).to(tl.int64)[None, :] * stride_q[1]
        k_ptrs = k_ptr + (k_start + cols).to(tl.int64)[:, None] * stride_k[1]
        acc = tl.zeros([BLOCK_N, HEADS * STEP], tl.float32)
        for d in tl.static_range(0, D, BLOCK_D):
            within = d + offs_d < D
            k = tl.load(k_ptrs + (d + offs_d)[None, :] * stride_k[3], mask=seen[:, None] & within[None, :], other=0.0)
            q = tl.load(q_ptrs + (d + offs_d)[:, None] * stride_q[3], mask=inside[None, :] & within[:, None], other=0.0)
            acc = tl.dot(k, q, acc, input_precision=PRECISION)
        lse = tl.load(lse_ptr + (first_head + member).to(tl.int64) * ROWS + row, mask=inside, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse) + weight
        p = tl.exp2(acc * (scale * LOG2E) - lse[None, :])
        last = _last_visible(row, inside, rows, k_len, CAUSAL)
        p = tl.where((cols[:, None] <= last[None, :]) & (cols >= 0)[:, None], p, 0.0)
        sums = tl.sum(tl.reshape(p, [BLOCK_N, HEADS, STEP]), 2)
        at = columns_ptr + (out_head * STEPS + step)[None, :] * max_k + cols[:, None]
        tl.store(at, sums, mask=((cols >= 0) & (cols < max_k))[:, None] & (out_member < GROUP)[None, :])
        if not CAUSAL:
            p = tl.where(cols[:, None] <= (k_len - rows + row)[None, :], p, 0.0)
        total += p
    # Rotating row r by r brings diagonal x or x - BLOCK_N to column x: one gather and two sums add up all diagonals.
    local = offs_m % STEP
    rotated = tl.gather(total, (local[None, :] - offs_n[:, None] + BLOCK_N) % BLOCK_N, 0)
    wrapped = local[None, :] < offs_n[:, None]
    below = tl.sum(tl.reshape(tl.where(wrapped, rotated, 0.0), [BLOCK_N, HEADS, STEP]), 2)
    above = tl.sum(tl.reshape(tl.where(wrapped, 0.0, rotated), [BLOCK_N, HEADS, STEP]), 2)
    at = diagonals_ptr + (out_head * tl.num_programs(1) + tile)[None, :] * (BLOCK_N + STEP) + offs_n[:, None]
    tl.store(at, below, mask=(out_member < GROUP)[None, :])
    tl.store(at + BLOCK_N, above, mask=(out_member < GROUP)[None, :] & (offs_n < STEP)[:, None])


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _join_mass_kernel(
    columns_ptr, diagonals_ptr, mass_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, heads, tiles, max_q, max_k,
    ROWS: tl.constexpr, STEP: tl.constexpr, CAUSAL: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``mass [2, B * Hq, Sk]`` of the parts that ``_mass_kernel`` leaves. Grid (blocks of keys, B * Hq).

    A diagonal runs through two neighbouring tiles at most.
    """
    head = tl.program_id(1)
    _, rows, _, k_len = _last_rows(
        q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, head // heads, max_q, max_k, ROWS, CAUSAL, RAGGED_Q, RAGGED_K
    )
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < max_k
    columns_ptr += head.to(tl.int64) * (ROWS // STEP) * max_k
    vertical = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(0, ROWS // STEP):
        vertical += tl.load(columns_ptr + tl.cast(step * max_k, tl.int64) + offs, mask=inside, other=0.0)
    # Where the diagonal of distance ``offs`` meets the first row, counted from the first key of tile 0 at that row.
    column = k_len - rows - offs + (ROWS - STEP)
    tile = (column + BLOCK_N) // BLOCK_N - 1  # column is at least 1 - STEP
    entry = (tile + 1) * BLOCK_N - column
    reached = offs < k_len
    diagonals_ptr += head.to(tl.int64) * tiles * (BLOCK_N + STEP)
    at = diagonals_ptr + tile * (BLOCK_N + STEP) + entry
    slash = tl.load(at, mask=reached & (tile >= 0) & (tile < tiles), other=0.0)
    further = (tile + 1 < tiles) & (entry < STEP)
    slash += tl.load(at + (BLOCK_N + STEP) + BLOCK_N, mask=reached & further, other=0.0)
    out = mass_ptr + head.to(tl.int64) * max_k + offs
    tl.store(out, vertical, mask=inside)
    tl.store(out + tl.num_programs(1).to(tl.int64) * max_k, slash, mask=inside)


class Tiles(NamedTuple):
    """Key columns and head dimensions of a step; warps and pipeline stages."""

    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


class Shares(NamedTuple):
    """How the last rows of the heads of a group are cut: heads and rows of each that go together."""

    heads: int
    step: int


def config_for(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles of the products: small ones, of which several share a multiprocessor and hide each other's waits."""
    block_d = min(128, max(16, triton.next_power_of_2(head_dim)))
    return Tiles(64, min(block_d, 32), 8, 2) if dtype == torch.float32 else Tiles(64, block_d, 4, 2)


def shares_of(group: int, num_queries: int, dtype: torch.dtype) -> Shares:
    """128 rows at a time where there are as many; not all of one head, whose diagonals would need as many rotations.

    Fewer of float32, whose products take registers of their own.
    """
    heads = min(triton.next_power_of_2(group), 8)
    return Shares(heads, min(num_queries, 64, (32 if dtype == torch.float32 else 128) // heads))


def last_query_mass(q: Tensor, k: Tensor, p: LastQueries) -> Tensor:
    """``vertical`` and ``slash``, float32 ``[2, B, Hq, Sk]``. See ``vertical_slash.last_query_mass``."""
    s, (heads, head_dim) = p.sequences, q.shape[-2:]
    mass = torch.empty((2, s.batch, heads, s.max_k), dtype=torch.float32, device=q.device)
    if 0 in (s.batch, s.max_q, s.max_k):
        return mass.zero_()
    tiles, group = config_for(q.dtype, head_dim), heads // k.shape[-2]
    shares = shares_of(group, p.num_queries, q.dtype)
    steps, parts = p.num_queries // shares.step, -(-group // shares.heads)
    chunks = -(-s.max_k // (tiles.block_n * _CHUNK_TILES))
    count = -(-(s.max_k + p.num_queries - shares.step) // tiles.block_n)
    rows = (s.batch, heads)
    chunk_lse, lse, columns, diagonals = (
        torch.empty((*rows, *shape), dtype=torch.float32, device=q.device)
        for shape in (
            (chunks, p.num_queries), (p.num_queries,), (steps, s.max_k), (count, tiles.block_n + shares.step)
        )
    )  # fmt: skip
    spans = (s.q_start, s.q_end, s.k_start, s.k_end)
    shape = (_strides(q, s.packed), _strides(k, s.packed), s.max_q, s.max_k, p.scale)
    layout = {
        "ROWS": p.num_queries, "STEP": shares.step, "CAUSAL": p.causal, "RAGGED_Q": s.q_start is not None,
        "RAGGED_K": s.k_start is not None, "BLOCK_N": tiles.block_n, **LAUNCH,
    }  # fmt: skip
    options = {
        **layout, "GROUP": group, "HEADS": shares.heads, "D": head_dim, "PRECISION": precision(q.dtype),
        "BLOCK_D": tiles.block_d, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip
    programs = k.shape[-2] * parts
    _row_lse_kernel[(programs * steps, chunks, s.batch)](q, k, chunk_lse, *spans, *shape, **options, TILES=_CHUNK_TILES)
    _join_lse_kernel[(s.batch * heads, p.num_queries // 16)](
        chunk_lse, lse, chunks, ROWS=p.num_queries, BLOCK=64, num_warps=4, **LAUNCH
    )
    _mass_kernel[(programs, count, s.batch)](q, k, lse, columns, diagonals, *spans, *shape, **options)
    _join_mass_kernel[(-(-s.max_k // 1024), s.batch * heads)](
        columns, diagonals, mass, *spans, heads, count, s.max_q, s.max_k, **layout, BLOCK=1024, num_warps=4
    )
    return mass


def _strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """(batch, row, head, dim) strides; packed rows are counted from the start of the tensor."""
    return (0, *x.stride()) if packed else x.stride()


def precision(dtype: torch.dtype) -> str:
    """Of the products, by the dtype of q and k."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    names = ("lse_ptr", "chunk_lse_ptr", "columns_ptr", "diagonals_ptr", "mass_ptr")
    floats = dict.fromkeys(names, "*fp32")
    for rows, head_dim, ragged, dtype in ((128, 128, False, "bf16"), (64, 96, True, "bf16"), (128, 128, False, "fp32")):
        wide = torch.float32 if dtype == "fp32" else torch.bfloat16
        tiles, shares = config_for(wide, head_dim), shares_of(4, rows, wide)
        layout = {
            "ROWS": rows, "STEP": shares.step, "CAUSAL": True, "RAGGED_Q": ragged, "RAGGED_K": ragged,
            "BLOCK_N": tiles.block_n,
        }  # fmt: skip
        constants = {
            **layout, "GROUP": 4, "HEADS": shares.heads, "D": head_dim, "BLOCK_D": tiles.block_d, "TILES": _CHUNK_TILES,
            "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        }  # fmt: skip
        types = floats | {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}"}
        name = f"{rows}-{head_dim}-{dtype}{'-ragged' * ragged}"
        cases.append((f"last-query-mass-{name}", *offline(_mass_kernel, constants, types), *tiles[2:]))
        if rows == 128 and dtype == "bf16":
            cases.append((f"row-lse-{name}", *offline(_row_lse_kernel, constants, types), *tiles[2:]))
        if ragged:
            cases.append((f"join-mass-{name}", *offline(_join_mass_kernel, {**layout, "BLOCK": 1024}, floats), 4, 3))
    cases.append(("join-lse", *offline(_join_lse_kernel, {"ROWS": 128, "BLOCK": 64}, floats), 4, 3))
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
            signature[param.name] = "fp32" if param.name in ("scale", "share") else "i32"
    return function, signature, constexprs, attributes
