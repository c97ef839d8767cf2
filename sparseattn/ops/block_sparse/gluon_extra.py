"""Extra keys (columns, means of skipped blocks) in the Hopper implementation: portable kernels around its own.

The Hopper kernels attend listed blocks only. Forward, they leave unnormalised float32 sums, from which
``finish_kernel`` goes on with the extra keys; nothing is rounded in between. Backward, every gradient is a plain sum
once the LSE is known: ``start_dq_kernel`` leaves the extra keys' part of dQ where the Hopper kernels go on adding, and
``extra_backward`` adds to the dK and dV of theirs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import (
    join_softmax,
    natural_lse,
    normalise,
    schedule,
    sequence_span,
    with_sink,
)
from sparseattn.kernels.gradients import to_wgmma_order
from sparseattn.kernels.tiles import LENGTHS, WINDOW, load_rows
from sparseattn.kernels.walks import first_query_tile
from sparseattn.ops.block_sparse.extra import (
    EXTRA,
    Extra,
    attend_columns,
    attend_means,
    call_facts,
    extra_facts,
    extra_tile,
)
from sparseattn.ops.block_sparse.extra_backward import dq_columns, dq_means
from sparseattn.ops.block_sparse.geometry import Geometry, list_arguments


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, *EXTRA, "num_splits", "split_stride_o", "split_stride_lse"])
def finish_kernel(
    q_ptr, k_ptr, v_ptr, o_part_ptr, lse_part_ptr, o_ptr, lse_ptr, sinks_ptr,
    q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    column_count_ptr, column_ptr, mean_k_ptr, mean_v_ptr, bits_ptr, taken_ptr, column_width, num_blocks, taken_stride_b,
    stride_q, stride_k, stride_v, stride_o, lse_stride_b, lse_stride_h, mask_stride_b, mask_stride_h,
    max_q, max_k, num_splits, split_stride_o, split_stride_lse, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, GROUP: tl.constexpr, MASK_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, MEANS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` query rows of one head, from the sums over their blocks to their outputs and LSE.

    Grid (row tiles * GROUP, KV heads, batch). ``o_part`` float32 [splits, ...] is shaped like ``o``, ``lse_part``
    [splits, 2, ...] like ``lse``: running maximum and sum of each share of the blocks.
    """
    tile, head = schedule(GROUP)
    tile = tl.cdiv(max_q, BLOCK_M) - 1 - tile  # long rows of a causal mask start first
    b = tl.program_id(2)
    b64 = b.to(tl.int64)
    head64 = head.to(tl.int64)
    head_k = head64 // GROUP
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    m0 = tile * BLOCK_M
    if m0 >= q_len:
        return

    token = m0 + tl.arange(0, BLOCK_M)
    row_in = token < q_len
    offs_dv = tl.arange(0, BLOCK_DV)
    at = (q_start + token).to(tl.int64)
    o_at = b64 * stride_o[0] + head64 * stride_o[2] + at[:, None] * stride_o[1] + offs_dv[None, :] * stride_o[3]
    o_in = row_in[:, None] & (offs_dv < DV)[None, :]
    lse_at = b64 * lse_stride_b + head64 * lse_stride_h + at
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in range(num_splits):
        lse_part = lse_part_ptr + 2 * split * split_stride_lse.to(tl.int64)
        m_part = tl.load(lse_part + lse_at, mask=row_in, other=float("-inf"))
        l_part = tl.load(lse_part + split_stride_lse + lse_at, mask=row_in, other=0.0)
        o_part = tl.load(o_part_ptr + split * split_stride_o.to(tl.int64) + o_at, mask=o_in, other=0.0)
        m_i, l_i, alpha, weight = join_softmax(m_i, l_i, m_part, l_part)
        acc = acc * alpha[:, None] + o_part * weight[:, None]

    q_base = q_ptr + b64 * stride_q[0] + head64 * stride_q[2] + q_start.to(tl.int64) * stride_q[1]
    q = load_rows(q_base, m0, q_len, stride_q[1], stride_q[3], BLOCK_M, D, BLOCK_D, True, WIDE)
    list_row = b64 * mask_stride_b + (head // MASK_GROUP) * mask_stride_h + m0 // BLOCK_Q
    if COLUMNS:
        k_base = k_ptr + b64 * stride_k[0] + head_k * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
        v_base = v_ptr + b64 * stride_v[0] + head_k * stride_v[2] + k_start.to(tl.int64) * stride_v[1]
        acc, m_i, l_i = attend_columns(
            acc, m_i, l_i, q, k_base, v_base, column_count_ptr, column_ptr, list_row, column_width, token, offset,
            k_len, stride_k, stride_v, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_E,
            CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
        )  # fmt: skip
    if MEANS:
        means = (b64 * tl.num_programs(1) + head_k) * num_blocks
        acc, m_i, l_i = attend_means(
            acc, m_i, l_i, q, mean_k_ptr + means * D, mean_v_ptr + means * DV, bits_ptr,
            taken_ptr + b64 * taken_stride_b, list_row, num_blocks, token, m0, tl.minimum(m0 + BLOCK_M, q_len) - 1,
            offset, k_len, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_E, BLOCK_KV,
            CAUSAL, WINDOW, SOFTCAP, COLUMNS, PRECISION,
        )  # fmt: skip

    tl.store(lse_ptr + lse_at, natural_lse(m_i, l_i), mask=row_in)
    if SINKS:
        l_i = with_sink(m_i, l_i, tl.load(sinks_ptr + head))
    tl.store(o_ptr + o_at, normalise(acc, l_i, PRECISION).to(o_ptr.dtype.element_ty), mask=o_in)


@triton.jit(do_not_specialize=[*LENGTHS, *WINDOW, *EXTRA, "row_tiles"])
def start_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, norm_ptr, delta_ptr, sums_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr,
    column_count_ptr, column_ptr, mean_k_ptr, mean_v_ptr, bits_ptr, taken_ptr, column_width, num_blocks, taken_stride_b,
    stride_q, stride_k, stride_v, stride_do, lse_stride_b, lse_stride_h, mask_stride_b, mask_stride_h,
    max_q, max_k, row_tiles, scale, softcap, window_left, window_right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, GROUP: tl.constexpr, MASK_GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, MEANS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: what the extra keys of 64 query rows of one head contribute to their dQ, still unscaled.

    Grid (row tiles * GROUP, KV heads, batch). Writes whole tiles of ``sums`` float32 [heads * row_tiles, 64 * BLOCK_D]
    in the order in which the Hopper kernels hold and add them.
    """
    tile, head = schedule(GROUP)
    tile = tl.cdiv(max_q, 64) - 1 - tile
    b = tl.program_id(2)
    b64 = b.to(tl.int64)
    head64 = head.to(tl.int64)
    head_k = head64 // GROUP
    q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    offset = k_len - q_len
    m0 = tile * 64
    if m0 >= q_len:
        return

    q_base = q_ptr + b64 * stride_q[0] + head64 * stride_q[2] + q_start.to(tl.int64) * stride_q[1]
    do_base = do_ptr + b64 * stride_do[0] + head64 * stride_do[2] + q_start.to(tl.int64) * stride_do[1]
    q = load_rows(q_base, m0, q_len, stride_q[1], stride_q[3], 64, D, BLOCK_D, True, WIDE)
    do = load_rows(do_base, m0, q_len, stride_do[1], stride_do[3], 64, DV, BLOCK_DV, True, WIDE)
    rows = m0 + tl.arange(0, 64)
    numbers = b64 * lse_stride_b + head64 * lse_stride_h + q_start + rows
    norm = tl.load(norm_ptr + numbers, mask=rows < q_len, other=float("inf"))
    delta = tl.load(delta_ptr + numbers, mask=rows < q_len, other=0.0)
    list_row = b64 * mask_stride_b + (head // MASK_GROUP) * mask_stride_h + m0 // BLOCK_Q
    dq = tl.zeros([64, BLOCK_D], tl.float32)
    if COLUMNS:
        k_base = k_ptr + b64 * stride_k[0] + head_k * stride_k[2] + k_start.to(tl.int64) * stride_k[1]
        v_base = v_ptr + b64 * stride_v[0] + head_k * stride_v[2] + k_start.to(tl.int64) * stride_v[1]
        dq = dq_columns(
            dq, q, do, norm, delta, rows, k_base, v_base, column_count_ptr, column_ptr, list_row, column_width,
            offset, k_len, stride_k, stride_v, scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_E, CAUSAL, WINDOW, SOFTCAP, WIDE, PRECISION,
        )  # fmt: skip
    if MEANS:
        means = (b64 * tl.num_programs(1) + head_k) * num_blocks
        dq = dq_means(
            dq, q, do, norm, delta, rows, mean_k_ptr + means * D, mean_v_ptr + means * DV, bits_ptr,
            taken_ptr + b64 * taken_stride_b, list_row, num_blocks, m0, tl.minimum(m0 + 64, q_len) - 1, offset, k_len,
            scale, softcap, window_left, window_right, D, DV, BLOCK_D, BLOCK_DV, BLOCK_E, BLOCK_KV,
            CAUSAL, WINDOW, SOFTCAP, COLUMNS, PRECISION,
        )  # fmt: skip
    at = head64 * row_tiles + first_query_tile(q_start, b, max_q, PACKED) + tile
    tl.store(sums_ptr + at * (64 * BLOCK_D) + tl.arange(0, 64 * BLOCK_D), to_wgmma_order(dq, BLOCK_D))


def _numbers(g: Geometry) -> tuple[float, ...]:
    return g.scale, g.softcap, g.window_left, g.window_right


def finish_config(head_dim: int, block_q: int) -> tuple[int, int, int]:
    """Rows, warps and stages of ``finish_kernel``: the most that stay in registers."""
    rows, warps, stages = (64, 8, 1) if head_dim > 128 else (128, 8, 2)
    divisor = block_q & -block_q
    return (rows, warps, stages) if divisor >= rows else (divisor, 4, stages)


def finish(
    q: Tensor, k: Tensor, v: Tensor, o_part: Tensor, lse_part: Tensor, o: Tensor, lse: Tensor, sinks: Tensor | None,
    extra: Extra, g: Geometry,
) -> None:  # fmt: skip
    """Outputs and LSE from the sums over listed blocks, by attending the extra keys.

    Args:
        q: Queries; k and v as in the call.
        o_part: float32 [splits, *o.shape], unnormalised.
        lse_part: float32 [splits, 2, *lse.shape], running maximum and sum.
        o: Outputs, contiguous, written.
        lse: float32, written.
        sinks: Sink logits [Hq] or None.
        extra: As ``prepare_extra`` returned it.
        g: The call.
    """
    heads, heads_k = q.shape[-2], k.shape[-2]
    block_m, num_warps, num_stages = finish_config(max(q.shape[-1], v.shape[-1]), g.block_q)
    group = heads // heads_k
    list_strides = list_arguments(g.kv_num_blocks, g.kv_indices, q)[2:4]
    finish_kernel[(triton.cdiv(g.max_q, block_m) * group, heads_k, g.batch)](
        q, k, v, o_part, lse_part, o, lse, lse if sinks is None else sinks, *g.spans(lse), *extra,
        *(g.strides(t) for t in (q, k, v, o)), *g.lse_strides(q), *list_strides,
        g.max_q, g.max_k, o_part.shape[0], o.numel(), lse.numel(), *_numbers(g),
        **call_facts(q, k, v, g), **extra_facts("forward", q, v, g), BLOCK_M=block_m, BLOCK_Q=g.block_q,
        BLOCK_KV=g.block_kv, SINKS=sinks is not None, num_warps=num_warps, num_stages=num_stages, **LAUNCH,
    )  # fmt: skip


def start_dq(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, norm: Tensor, delta: Tensor, sums: Tensor, row_tiles: int,
    block_d: int, extra: Extra, g: Geometry,
) -> None:  # fmt: skip
    """Set the float32 sums of dQ to what the extra keys contribute.

    Args:
        do: Gradient of the output; q, k and v as in the call.
        norm: float32, shaped like the LSE: log of each row's full denominator.
        delta: Likewise, ``sum(o * do)`` less the gradient of the LSE.
        sums: float32 [heads * row_tiles * 64 * block_d], written.
        row_tiles: Tiles of 64 query rows of one head.
        block_d: Padded head dimension of a tile.
        extra: As ``prepare_extra`` returned it.
        g: The call.
    """
    heads, heads_k = q.shape[-2], k.shape[-2]
    group = heads // heads_k
    list_strides = list_arguments(g.kv_num_blocks, g.kv_indices, q)[2:4]
    facts = call_facts(q, k, v, g, do) | extra_facts("dq", q, v, g) | {"BLOCK_D": block_d}
    start_dq_kernel[(triton.cdiv(g.max_q, 64) * group, heads_k, g.batch)](
        q, k, v, do, norm, delta, sums, *g.spans(norm), *extra,
        *(g.strides(t) for t in (q, k, v, do)), *g.lse_strides(q), *list_strides,
        g.max_q, g.max_k, row_tiles, *_numbers(g),
        **facts, BLOCK_Q=g.block_q, BLOCK_KV=g.block_kv, PACKED=g.packed, num_warps=4, num_stages=1, **LAUNCH,
    )  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    everything = dict.fromkeys(("WINDOW", "SOFTCAP", "SINKS", "RAGGED_Q", "RAGGED_K", "PACKED"), True)
    cases = []
    for name, dim, flags in (("128", 128, {}), ("256", 256, {}), ("all-128", 128, everything)):
        rows, warps, stages = finish_config(dim, 128)
        tiles = {"BLOCK_M": rows, "BLOCK_E": extra_tile("forward", dim, 2, 9)}
        cases.append((f"extra-finish-{name}-sm90", *_offline(finish_kernel, dim, flags | tiles), warps, stages))
    for name, flags in (("128", {}), ("all-128", everything)):
        cases.append((f"extra-start-dq-{name}-sm90", *_offline(start_dq_kernel, 128, flags), 4, 1))
    return cases


def _offline(
    function: Any, dim: int, flags: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Kernel, signature, constexprs and attributes of a causal bfloat16 call with contiguous tensors and 128-blocks."""
    constants = {
        "D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim, "BLOCK_M": 128, "BLOCK_E": 64, "BLOCK_Q": 128,
        "BLOCK_KV": 128, "GROUP": 4, "MASK_GROUP": 1, "PRECISION": "tf32", "CAUSAL": True, "COLUMNS": True,
        "MEANS": True, **flags,
    }  # fmt: skip
    tensors = {f"{name}_ptr" for name in ("q", "k", "v", "o", "do", "mean_k", "mean_v", "sinks")}
    floats = {f"{name}_ptr" for name in ("o_part", "lse_part", "lse", "norm", "delta", "sums")}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(function.params):
        name = param.name
        if param.is_constexpr:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name, False)
        elif name in ("stride_q", "stride_k", "stride_v", "stride_o", "stride_do"):
            signature[name] = ("i32", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif name.endswith("_ptr"):
            signature[name] = "*bf16" if name in tensors else "*fp32" if name in floats else "*i32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
    return function, signature, constexprs, attributes
