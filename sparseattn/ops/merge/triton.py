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

# Bytes of one state that a program reads, warps, and states on their way to shared memory: of a pair, and of others.
_PAIR, _MANY = (8192, 8, 1), (4096, 4, 6)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _fold(acc, m_i, l_i, o, lse, base2):
    """Add one state. What a state over no keys holds counts nothing.

    Differences are scaled, not scaled logarithms subtracted: fused into one operation those would differ from their own
    maximum by its rounding, of which 2^ is infinite where logarithms are huge.
    """
    m_new = tl.maximum(m_i, lse)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m_i - m_safe) * base2)
    weight = tl.exp2((lse - m_safe) * base2)
    o = tl.where((lse == float("-inf"))[:, None], 0.0, o.to(tl.float32))
    return acc * alpha[:, None] + weight[:, None] * o, m_new, l_i * alpha + weight


@triton.jit
def _pair(o_a, lse_a, o_b, lse_b, base2):
    """Both states' shares of their sum added up, as ``_fold`` would; and maximum and sum of the weights."""
    m = tl.maximum(lse_a, lse_b)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    a, b = tl.exp2((lse_a - m_safe) * base2), tl.exp2((lse_b - m_safe) * base2)
    o_a = tl.where((lse_a == float("-inf"))[:, None], 0.0, o_a.to(tl.float32))
    o_b = tl.where((lse_b == float("-inf"))[:, None], 0.0, o_b.to(tl.float32))
    return a[:, None] * o_a + b[:, None] * o_b, m, a + b


@triton.jit(do_not_specialize=["length", "heads", "num_states"])
def merge_kernel(
    o_ptr, lse_ptr, other_ptr, other_lse_ptr, out_ptr, out_lse_ptr, mask_ptr,
    stride_o, stride_lse, stride_other, stride_other_lse, stride_out, stride_out_lse, stride_mask,
    length, heads, num_states, base2, log_2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
    BATCHED: tl.constexpr, PAIR: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One program: ``HEADS`` heads of ``TOKENS`` tokens. Grid (batch * ceil(length / TOKENS), ceil(heads / HEADS)).

    Strides: outputs (state, batch, token, head, dim), LSE (state, batch, head, token), without the state where there is
    one; mask (batch, token). ``base2`` and ``log_2``: the base's binary logarithm, and 2's to the base. A ``PAIR`` is
    one state and another; of more, ``STAGES`` are on their way to shared memory at a time.
    """
    block, b = tl.program_id(0), tl.zeros((), tl.int64)
    if BATCHED:
        blocks = tl.cdiv(length, TOKENS)
        block, b = block % blocks, (block // blocks).to(tl.int64)
    row = tl.arange(0, TOKENS * HEADS)
    token = (block * TOKENS + row // HEADS).to(tl.int64)
    head = (tl.program_id(1) * HEADS + row % HEADS).to(tl.int64)
    inside = (token < length) & (head < heads)
    if MASK:
        chosen = tl.load(mask_ptr + b * stride_mask[0] + token * stride_mask[1], mask=inside, other=0)
        inside = inside & (chosen != 0)
    offs = tl.arange(0, BLOCK_D)
    at = inside[:, None] & (offs < D)[None, :]
    o_at = o_ptr + (b * stride_o[1] + token * stride_o[2] + head * stride_o[3])[:, None] + offs[None, :] * stride_o[4]
    lse_at = lse_ptr + b * stride_lse[1] + head * stride_lse[2] + token * stride_lse[3]
    if PAIR:
        other_at = (b * stride_other[0] + token * stride_other[1] + head * stride_other[2])[:, None]
        other = tl.load(other_ptr + other_at + offs[None, :] * stride_other[3], mask=at, other=0.0)
        o = tl.load(o_at, mask=at, other=0.0)
        other_at = b * stride_other_lse[0] + head * stride_other_lse[1] + token * stride_other_lse[2]
        other_lse = tl.load(other_lse_ptr + other_at, mask=inside, other=float("-inf"))
        lse = tl.load(lse_at, mask=inside, other=float("-inf"))
        acc, m_i, l_i = _pair(o, lse, other, other_lse, base2)
    else:
        acc = tl.zeros([TOKENS * HEADS, BLOCK_D], tl.float32)
        m_i = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
        l_i = tl.zeros([TOKENS * HEADS], tl.float32)
        for _ in tl.range(0, num_states, num_stages=STAGES):
            lse = tl.load(lse_at, mask=inside, other=float("-inf"))
            acc, m_i, l_i = _fold(acc, m_i, l_i, tl.load(o_at, mask=at, other=0.0), lse, base2)
            o_at += stride_o[0]
            lse_at += stride_lse[0]
    safe = tl.where(l_i > 0, l_i, 1.0)
    o = (acc * (1.0 / safe)[:, None]).to(out_ptr.dtype.element_ty)
    out_at = (b * stride_out[0] + token * stride_out[1] + head * stride_out[2])[:, None]
    tl.store(out_ptr + out_at + offs[None, :] * stride_out[3], o, mask=at)
    lse = tl.where(l_i > 0, m_i + tl.log2(safe) * log_2, float("-inf"))
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
    """See ``reference.merge``, which this matches; with one more there is one other state."""
    states, batch, length, heads, dim = o.shape
    assert states == 1 or o_b is None
    tile_bytes, warps, stages = _MANY if o_b is None else _PAIR
    block_d = triton.next_power_of_2(dim)
    rows = max(1, tile_bytes // (block_d * o.element_size()))
    head_rows = min(rows, triton.next_power_of_2(heads))
    tokens = rows // head_rows
    other, other_lse = (out, out_lse) if o_b is None or lse_b is None else (o_b, lse_b)
    launch(
        merge_kernel, (batch * triton.cdiv(length, tokens), triton.cdiv(heads, head_rows)),
        o, lse, other, other_lse, out, out_lse, out_lse if mask is None else mask,
        *(_strides(t, 2) for t in (o, lse)), *(_strides(t, 1) for t in (other, other_lse, out, out_lse)),
        (0, 0) if mask is None else _strides(mask, 1), length, heads, states, math.log2(base), math.log(2, base),
        D=dim, BLOCK_D=block_d, TOKENS=tokens, HEADS=head_rows, STAGES=stages,
        BATCHED=batch > 1, PAIR=o_b is not None, MASK=mask is not None, num_warps=warps, **LAUNCH,
    )  # fmt: skip


def _strides(t: Tensor, leading: int) -> tuple[int, ...]:
    """Strides, 0 along ``leading`` dimensions of one: what PyTorch says of these grows with a prompt, for nobody."""
    return (
        *(step if n > 1 else 0 for n, step in zip(t.shape, t.stride()[:leading], strict=False)),
        *t.stride()[leading:],
    )


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = {"merge-2": (_PAIR, True), "merge-n": (_MANY, False)}
    tile = {"D": 128, "BLOCK_D": 128, "TOKENS": 1, "BATCHED": True}
    return [
        (name, *_offline({**tile, "HEADS": size // 256, "STAGES": stages, "PAIR": flag, "MASK": flag}), warps, 1)
        for name, ((size, warps, stages), flag) in cases.items()
    ]


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
            signature[param.name] = "fp32" if param.name in ("base2", "log_2") else "i32"
    return merge_kernel, signature, constexprs, attributes
