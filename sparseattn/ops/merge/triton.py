"""Merging attention states in Triton: one pass, every byte read once."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch
from sparseattn.ops.dispatch import triton_device_reason

# Bytes of one state that a program reads, and the most states that it asks for at once.
_TILE_BYTES, _AHEAD, _WARPS = 4096, 8, 4
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _states(o_at, lse_at, stride_o, stride_lse, first, num_states, inside, at, COUNT: tl.constexpr):
    """``COUNT`` states from ``first`` on and their sums, none of them waited for; those past the last are empty."""
    states = ()
    sums = ()
    for i in tl.static_range(COUNT):
        step = tl.zeros(inside.shape, tl.int64) + first + i
        there = step < num_states
        lse = tl.load(lse_at + step * stride_lse[0], mask=inside & there, other=float("-inf"))
        o = tl.load(o_at + (step * stride_o[0])[:, None], mask=at & there[:, None], other=0.0)
        sums, states = sums + (lse,), states + (o,)  # type: ignore[assignment] # noqa: RUF005 (no * in Triton)
    return states, sums


@triton.jit
def _fold(acc, m_i, l_i, states, sums, base2, COUNT: tl.constexpr):
    """Add ``COUNT`` states. What a state over no keys holds counts nothing.

    Differences are scaled, not scaled logarithms subtracted: fused into one operation those would differ from their own
    maximum by its rounding, of which 2^ is infinite where logarithms are huge.
    """
    m_new = m_i
    for i in tl.static_range(COUNT):
        m_new = tl.maximum(m_new, sums[i])
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m_i - m_safe) * base2)
    acc, l_i = acc * alpha[:, None], l_i * alpha
    for i in tl.static_range(COUNT):
        weight = tl.exp2((sums[i] - m_safe) * base2)
        acc += weight[:, None] * tl.where((sums[i] == float("-inf"))[:, None], 0.0, states[i].to(tl.float32))
        l_i += weight
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["length", "heads", "num_states"])
def merge_kernel(
    o_ptr, lse_ptr, other_ptr, other_lse_ptr, out_ptr, out_lse_ptr, mask_ptr,
    stride_o, stride_lse, stride_other, stride_other_lse, stride_out, stride_out_lse, stride_mask,
    length, heads, num_states, base2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, AHEAD: tl.constexpr,
    LOOP: tl.constexpr, OTHER: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One program: ``HEADS`` heads of ``TOKENS`` tokens. Grid (batch * ceil(length / TOKENS), ceil(heads / HEADS)).

    Strides: outputs (state, batch, token, head, dim), LSE (state, batch, head, token), without the state where there is
    one; mask (batch, token). ``AHEAD`` states are asked for before the first of them has come; ``LOOP`` where there may
    be more.
    """
    blocks = tl.cdiv(length, TOKENS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, TOKENS * HEADS)
    token = (tl.program_id(0) % blocks * TOKENS + row // HEADS).to(tl.int64)
    head = (tl.program_id(1) * HEADS + row % HEADS).to(tl.int64)
    inside = (token < length) & (head < heads)
    if MASK:
        chosen = tl.load(mask_ptr + b * stride_mask[0] + token * stride_mask[1], mask=inside, other=0)
        inside = inside & (chosen != 0)
    offs = tl.arange(0, BLOCK_D)
    at = inside[:, None] & (offs < D)[None, :]
    acc = tl.zeros([TOKENS * HEADS, BLOCK_D], tl.float32)
    m_i = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
    l_i = tl.zeros([TOKENS * HEADS], tl.float32)
    o_at = o_ptr + (b * stride_o[1] + token * stride_o[2] + head * stride_o[3])[:, None] + offs[None, :] * stride_o[4]
    lse_at = lse_ptr + b * stride_lse[1] + head * stride_lse[2] + token * stride_lse[3]
    if OTHER:
        other_at = (b * stride_other[0] + token * stride_other[1] + head * stride_other[2])[:, None]
        other = tl.load(other_ptr + other_at + offs[None, :] * stride_other[3], mask=at, other=0.0)
        other_at = b * stride_other_lse[0] + head * stride_other_lse[1] + token * stride_other_lse[2]
        other_lse = tl.load(other_lse_ptr + other_at, mask=inside, other=float("-inf"))
    if LOOP:
        for first in range(0, num_states, AHEAD):
            states, sums = _states(o_at, lse_at, stride_o, stride_lse, first, num_states, inside, at, AHEAD)
            acc, m_i, l_i = _fold(acc, m_i, l_i, states, sums, base2, AHEAD)
        if OTHER:
            acc, m_i, l_i = _fold(acc, m_i, l_i, (other,), (other_lse,), base2, 1)
    else:
        states, sums = _states(o_at, lse_at, stride_o, stride_lse, 0, num_states, inside, at, AHEAD)
        if OTHER:
            states, sums = states + (other,), sums + (other_lse,)  # noqa: RUF005
        acc, m_i, l_i = _fold(acc, m_i, l_i, states, sums, base2, AHEAD + OTHER)
    safe = tl.where(l_i > 0, l_i, 1.0)
    o = (acc * (1.0 / safe)[:, None]).to(out_ptr.dtype.element_ty)
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
    rows = max(1, _TILE_BYTES // (block_d * o.element_size()))
    head_rows = min(rows, triton.next_power_of_2(heads))
    tokens = rows // head_rows
    other, other_lse = (out, out_lse) if o_b is None or lse_b is None else (o_b, lse_b)
    launch(
        merge_kernel, (batch * triton.cdiv(length, tokens), triton.cdiv(heads, head_rows)),
        o, lse, other, other_lse, out, out_lse, out_lse if mask is None else mask,
        *(_strides(t, 2) for t in (o, lse)), *(_strides(t, 1) for t in (other, other_lse, out, out_lse)),
        (0, 0) if mask is None else _strides(mask, 1), length, heads, states, math.log2(base),
        D=dim, BLOCK_D=block_d, TOKENS=tokens, HEADS=head_rows, AHEAD=min(_AHEAD, triton.next_power_of_2(states)),
        LOOP=states > _AHEAD, OTHER=o_b is not None, MASK=mask is not None, num_warps=_WARPS, **LAUNCH,
    )  # fmt: skip


def _strides(t: Tensor, leading: int) -> tuple[int, ...]:
    """Strides, 0 along ``leading`` dimensions of one: what PyTorch says of these grows with a prompt, for nobody."""
    return (
        *(step if n > 1 else 0 for n, step in zip(t.shape, t.stride()[:leading], strict=False)),
        *t.stride()[leading:],
    )


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    tile = {"D": 128, "BLOCK_D": 128, "TOKENS": 1, "HEADS": 16}
    cases = {
        "merge-2": {"AHEAD": 1, "LOOP": False, "OTHER": True, "MASK": True},
        "merge-n": {"AHEAD": 8, "LOOP": True, "OTHER": False, "MASK": False},
    }
    return [(name, *_offline({**tile, **flags}), _WARPS, 1) for name, flags in cases.items()]


def _offline(constants: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Kernel, signature, constexprs and attributes of a bfloat16 call with contiguous tensors."""
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
    return merge_kernel, signature, constexprs, attributes
