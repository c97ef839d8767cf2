"""Merging attention states in Triton: one pass, every byte read once."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.ops.dispatch import triton_device_reason

_TILE = 2048  # elements of a tile of rows: 16 a thread
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _fold(acc, m_i, l_i, o_ptrs, o_in, lse, base2):
    """Add one state. What a state over no keys holds is not even read.

    Differences are scaled, not scaled logarithms subtracted: fused into one operation those would differ from their own
    maximum by its rounding, of which 2^ is infinite where logarithms are huge.
    """
    m_new = tl.maximum(m_i, lse)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m_i - m_safe) * base2)
    weight = tl.exp2((lse - m_safe) * base2)
    o = tl.load(o_ptrs, mask=o_in & (lse != float("-inf"))[:, None], other=0.0).to(tl.float32)
    return acc * alpha[:, None] + weight[:, None] * o, m_new, l_i * alpha + weight


@triton.jit(do_not_specialize=["rows", "length", "heads", "num_states"])
def merge_kernel(
    o_ptr, lse_ptr, other_ptr, other_lse_ptr, out_ptr, out_lse_ptr, mask_ptr,
    stride_o, stride_lse, stride_other, stride_other_lse, stride_out, stride_out_lse, stride_mask,
    rows, length, heads, num_states, base2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, OTHER: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` of the (batch, token, head) rows, heads fastest. Grid (ceil(rows / ROWS),).

    Strides: outputs (state, batch, token, head, dim), LSE (state, batch, head, token), without the state where there is
    one; mask (batch, token).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head = row % heads
    token = (row // heads) % length
    b = row // heads // length
    if MASK:
        chosen = tl.load(mask_ptr + b * stride_mask[0] + token * stride_mask[1], mask=inside, other=0)
        inside = inside & (chosen != 0)
    offs = tl.arange(0, BLOCK_D)
    at = inside[:, None] & (offs < D)[None, :]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    o_ptrs = o_ptr + (b * stride_o[1] + token * stride_o[2] + head * stride_o[3])[:, None] + offs[None, :] * stride_o[4]
    lse_ptrs = lse_ptr + b * stride_lse[1] + head * stride_lse[2] + token * stride_lse[3]
    for _ in range(num_states):
        lse = tl.load(lse_ptrs, mask=inside, other=float("-inf"))
        acc, m_i, l_i = _fold(acc, m_i, l_i, o_ptrs, at, lse, base2)
        o_ptrs += stride_o[0]
        lse_ptrs += stride_lse[0]
    if OTHER:
        lse_at = b * stride_other_lse[0] + head * stride_other_lse[1] + token * stride_other_lse[2]
        lse = tl.load(other_lse_ptr + lse_at, mask=inside, other=float("-inf"))
        o_at = (b * stride_other[0] + token * stride_other[1] + head * stride_other[2])[:, None]
        acc, m_i, l_i = _fold(acc, m_i, l_i, other_ptr + o_at + offs[None, :] * stride_other[3], at, lse, base2)
    safe = tl.where(l_i > 0, l_i, 1.0)
    o = (acc / safe[:, None]).to(out_ptr.dtype.element_ty)
    o_at = (b * stride_out[0] + token * stride_out[1] + head * stride_out[2])[:, None] + offs[None, :] * stride_out[3]
    tl.store(out_ptr + o_at, o, mask=at)
    lse = tl.where(l_i > 0, m_i + tl.log2(safe) / base2, float("-inf"))
    lse_at = b * stride_out_lse[0] + head * stride_out_lse[1] + token * stride_out_lse[2]
    tl.store(out_lse_ptr + lse_at, lse, mask=inside)


def unsupported_reason(o: Tensor) -> str | None:
    """Why the kernel cannot merge states like ``o``, or None."""
    if o.dtype not in _DTYPES:
        return f"the Triton kernels take bfloat16, float16 and float32, not {o.dtype}"
    return triton_device_reason(o)


def merge(
    o: Tensor,
    lse: Tensor,
    o_b: Tensor | None,
    lse_b: Tensor | None,
    out: Tensor,
    out_lse: Tensor,
    mask: Tensor | None,
    base: float,
) -> None:
    """See ``reference.merge``, which this matches."""
    states, batch, length, heads, dim = o.shape
    block_d = triton.next_power_of_2(dim)
    rows = max(1, _TILE // block_d)
    count = batch * length * heads
    other, other_lse = (out, out_lse) if o_b is None or lse_b is None else (o_b, lse_b)
    merge_kernel[(triton.cdiv(count, rows),)](
        o, lse, other, other_lse, out, out_lse, out_lse if mask is None else mask,
        o.stride(), lse.stride(), other.stride(), other_lse.stride(), out.stride(), out_lse.stride(),
        (0, 0) if mask is None else mask.stride(),
        count, length, heads, states, math.log2(base),
        D=dim, BLOCK_D=block_d, ROWS=rows, OTHER=o_b is not None, MASK=mask is not None, num_warps=4, **LAUNCH,
    )  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    constants = {"D": 128, "BLOCK_D": 128, "ROWS": 16, "OTHER": True, "MASK": True}
    sizes = {"stride_o": 5, "stride_lse": 4, "stride_other": 4, "stride_out": 4, "stride_mask": 2}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(merge_kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants[param.name]
        elif param.name.startswith("stride_"):
            size = sizes.get(param.name, 3)
            signature[param.name] = (*["i32"] * (size - 1), "constexpr")
            constexprs[(i, size - 1)] = 1
            if size > 3:
                attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(size - 1)}
        elif param.name.endswith("_ptr"):
            kind = "*i1" if param.name == "mask_ptr" else "*fp32" if "lse" in param.name else "*bf16"
            signature[param.name] = kind
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name == "base2" else "i32"
    return [("merge-128", merge_kernel, signature, constexprs, attributes, 4, 1)]
