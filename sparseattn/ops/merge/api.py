"""Merging attention states: what a user calls, and the operators as torch knows them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseattn.errors import argument_error
from sparseattn.ops.dispatch import check_impl, implementations, on_its_device, require, resolve

_PACKAGE = "sparseattn.ops.merge"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def merge_state(
    o_a: Tensor,
    lse_a: Tensor,
    o_b: Tensor,
    lse_b: Tensor,
    *,
    base: float = math.e,
    tokens_first: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    With p = exp(lse_a) and r = exp(lse_b): ``o = (p o_a + r o_b) / (p + r)``, ``lse = log(p + r)``, computed in float32
    (float64 for float64 outputs) without overflow. A state over no keys (LSE -inf) leaves the other unchanged, whatever
    its ``o`` holds, and two of them give (0, -inf). Differentiable in all four.

    Args:
        o_a: ``[..., S, H, D]`` in bfloat16, float16, float32 or float64, any strides: ``[B, S, H, D]``, packed
            ``[total, H, D]``.
        lse_a: float32 (float64 for float64 outputs) ``[..., H, S]``, any strides: what attention operators return.
        o_b: As ``o_a``.
        lse_b: As ``lse_a``.
        base: Of the LSE logarithms, in and out.
        tokens_first: Lay ``lse`` out as a contiguous ``[..., S, H]``, of which it is a view then.
        impl: "auto" (Triton on CUDA, reference elsewhere), "triton" or "reference".

    Returns:
        ``o`` ``[..., S, H, D]`` in the inputs' dtype and ``lse`` ``[..., H, S]``, contiguous.

    Raises:
        TypeError: A wrong dtype.
        ValueError: Shapes, devices or numbers that do not fit, or an implementation that cannot run this.
    """
    base = _check(o_a, lse_a, o_b, lse_b, ("o_a", "lse_a", "o_b", "lse_b"), base, impl)
    batch = o_a.shape[:-3]
    o, lse = _attach(_stack(o_a, 3), _stack(lse_a, 2), _stack(o_b, 3)[0], _stack(lse_b, 2)[0], base, impl, tokens_first)
    return o.view(*batch, *o.shape[1:]), lse.view(*batch, *lse.shape[1:])


def merge_states(
    o: Tensor, lse: Tensor, *, base: float = math.e, tokens_first: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """As ``merge_state``, for n states stacked along the first dimension.

    Another place of that dimension is a view away: ``o.movedim(1, 0)`` of ``[total, n, H, D]`` makes no copy.

    Args:
        o: ``[n, ..., S, H, D]``, n at least 1.
        lse: ``[n, ..., H, S]``.
        base: Of the LSE logarithms, in and out.
        tokens_first: As in ``merge_state``.
        impl: "auto", "triton" or "reference".

    Returns:
        ``o`` ``[..., S, H, D]`` and ``lse`` ``[..., H, S]``, contiguous.

    Raises:
        TypeError: A wrong dtype.
        ValueError: Shapes, devices or numbers that do not fit, or an implementation that cannot run this.
    """
    if not isinstance(o, Tensor) or o.dim() < 4 or o.shape[0] < 1:
        got = f"shape {tuple(o.shape)}" if isinstance(o, Tensor) else type(o).__name__
        raise argument_error("o", "a tensor [n, ..., S, H, D] of at least one state", got)
    base = _check(o, lse, None, None, ("o", "lse", "", ""), base, impl)
    batch = o.shape[1:-3]
    states = o.flatten(1, -4) if batch else o[:, None]
    merged, merged_lse = _attach(states, _flat_lse(lse), None, None, base, impl, tokens_first)
    return merged.view(*batch, *merged.shape[1:]), merged_lse.view(*batch, *merged_lse.shape[1:])


def merge_state_(
    o: Tensor,
    lse: Tensor,
    o_other: Tensor,
    lse_other: Tensor,
    *,
    mask: Tensor | None = None,
    base: float = math.e,
    impl: str = "auto",
) -> None:
    """As ``merge_state``, written over ``o`` and ``lse``. Not differentiable.

    Args:
        o: ``[..., S, H, D]``, overwritten.
        lse: ``[..., H, S]``, overwritten; its dtype must be that of an LSE, so that no copy swallows the result.
        o_other: As ``o``.
        lse_other: As ``lse``.
        mask: bool ``[..., S]``; rows where it is False stay as they are. None: all rows are merged.
        base: Of the LSE logarithms, in and out.
        impl: "auto", "triton" or "reference".

    Raises:
        TypeError: A wrong dtype.
        ValueError: Shapes, devices, strides or numbers that do not fit, an implementation that cannot run this, or
            inputs that ask for a gradient.
    """
    base = _check(o, lse, o_other, lse_other, ("o", "lse", "o_other", "lse_other"), base, impl)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise argument_error("mask", "bool", mask.dtype, kind=TypeError)
        if mask.shape != o.shape[:-2] or mask.device != o.device:
            expected = f"shape {tuple(o.shape[:-2])} on {o.device}, an entry per row"
            raise argument_error("mask", expected, f"shape {tuple(mask.shape)} on {mask.device}")
        mask = mask.reshape(math.prod(mask.shape[:-1]), mask.shape[-1])
    if torch.is_grad_enabled() and any(t.requires_grad for t in (o, lse, o_other, lse_other)):
        raise argument_error("o", "tensors without gradients", "one that requires them", "Use merge_state.")
    try:  # a copy here would swallow the result
        batch = math.prod(o.shape[:-3])
        rows, sums = o.view(batch, *o.shape[-3:]), lse.view(batch, *lse.shape[-2:])
    except RuntimeError:
        raise argument_error("o", "leading dimensions that a view can flatten", f"strides {o.stride()}") from None
    _merge_in_place(rows, sums, _stack(o_other, 3)[0], _stack(lse_other, 2)[0], mask, base, impl)


def unsupported_reason(o: Tensor, impl: str) -> str | None:
    """Why merging states like ``o`` would not run with ``impl``, or None if it would."""
    check_impl(impl)
    return resolve(_PACKAGE, implementations(impl, o), o)[1]


def _check(
    o_a: Tensor,
    lse_a: Tensor,
    o_b: Tensor | None,
    lse_b: Tensor | None,
    names: tuple[str, str, str, str],
    base: float,
    impl: str,
) -> float:
    """Check states against each other; returns ``base`` as a float."""
    check_impl(impl)
    if isinstance(base, bool) or not isinstance(base, int | float) or not base > 1 or not math.isfinite(base):
        raise argument_error("base", "a number above 1", repr(base), "math.e is the natural logarithm, 2 FlashInfer's.")
    for name, t in zip(names, (o_a, lse_a, o_b, lse_b), strict=True):
        if name and not isinstance(t, Tensor):
            raise argument_error(name, "a tensor", type(t).__name__, kind=TypeError)
    if o_a.dtype not in _DTYPES:
        raise argument_error(names[0], "bfloat16, float16, float32 or float64", o_a.dtype, kind=TypeError)
    if o_a.dim() < 3:
        raise argument_error(names[0], "[..., S, H, D]", f"shape {tuple(o_a.shape)}")
    if o_b is not None and (o_b.shape != o_a.shape or o_b.device != o_a.device):
        expected = f"shape {tuple(o_a.shape)} on {o_a.device} like {names[0]}"
        raise argument_error(names[2], expected, f"shape {tuple(o_b.shape)} on {o_b.device}")
    if o_b is not None and o_b.dtype != o_a.dtype:
        raise argument_error(names[2], f"{o_a.dtype} like {names[0]}", o_b.dtype, kind=TypeError)
    lse_dtype = torch.float64 if o_a.dtype == torch.float64 else torch.float32
    shape = (*o_a.shape[:-3], o_a.shape[-2], o_a.shape[-3])
    for name, lse in ((names[1], lse_a), (names[3], lse_b)):
        if lse is None:
            continue
        if lse.dtype != lse_dtype:
            raise argument_error(name, f"{lse_dtype}", lse.dtype, kind=TypeError)
        if lse.shape != shape or lse.device != o_a.device:
            expected = f"shape {shape} ([..., H, S]) on {o_a.device}"
            hint = "Transpose an LSE of [S, H]." if lse.dim() == len(shape) else ""
            raise argument_error(name, expected, f"shape {tuple(lse.shape)} on {lse.device}", hint)
    return float(base)


def _stack(t: Tensor, rank: int) -> Tensor:
    """``t`` as ``[1, batch, *last rank dimensions]``."""
    return t.reshape(1, math.prod(t.shape[:-rank]), *t.shape[-rank:]) if t.dim() != rank else t[None, None]


def _flat_lse(lse: Tensor) -> Tensor:
    return lse.flatten(1, -3) if lse.dim() > 3 else lse[:, None]


# ---- as torch knows it ----

_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
_LIBRARY.define(
    "merge(Tensor o, Tensor lse, Tensor? o_b, Tensor? lse_b, float base, str impl, bool tokens_first=False) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "merge_(Tensor(a!) o, Tensor(b!) lse, Tensor o_other, Tensor lse_other, Tensor? mask, float base, str impl) -> ()"
)


@on_its_device
def _merge(
    o: Tensor, lse: Tensor, o_b: Tensor | None, lse_b: Tensor | None, base: float, impl: str, tokens_first: bool = False
) -> tuple[Tensor, Tensor]:
    merged, merged_lse = _merge_fake(o, lse, o_b, lse_b, base, impl, tokens_first)
    if merged.numel():
        require(_PACKAGE, impl, implementations(impl, o), o).merge(o, lse, o_b, lse_b, merged, merged_lse, None, base)
    elif merged_lse.numel():
        merged_lse.copy_(torch.cat([lse, lse_b[None]] if lse_b is not None else [lse]).logsumexp(0))
    return merged, merged_lse


@on_its_device
def _merge_(
    o: Tensor, lse: Tensor, o_other: Tensor, lse_other: Tensor, mask: Tensor | None, base: float, impl: str
) -> None:
    if o.numel():
        require(_PACKAGE, impl, implementations(impl, o), o).merge(
            o[None], lse[None], o_other, lse_other, o, lse, mask, base
        )


def _merge_fake(
    o: Tensor, lse: Tensor, o_b: Tensor | None, lse_b: Tensor | None, base: float, impl: str, tokens_first: bool = False
) -> tuple[Tensor, Tensor]:
    batch, heads, length = lse.shape[1:]
    shape = (batch, length, heads) if tokens_first else (batch, heads, length)
    sums = torch.empty(shape, dtype=lse.dtype, device=lse.device)
    return torch.empty(o.shape[1:], dtype=o.dtype, device=o.device), sums.transpose(1, 2) if tokens_first else sums


_LIBRARY.impl("merge", _merge, "CompositeExplicitAutograd")
_LIBRARY.impl("merge_", _merge_, "CompositeExplicitAutograd")
torch.library.register_fake("sparseattn::merge", _merge_fake, lib=_LIBRARY)
torch.library.register_fake("sparseattn::merge_", lambda *_: None, lib=_LIBRARY)
_merge_op = torch.ops.sparseattn.merge.default
_merge_in_place = torch.ops.sparseattn.merge_.default


def _attach(
    o: Tensor, lse: Tensor, o_b: Tensor | None, lse_b: Tensor | None, base: float, impl: str, tokens_first: bool
) -> tuple[Tensor, Tensor]:
    """Run the operator, through autograd only if a gradient will be asked for."""
    wanted = any(t is not None and t.requires_grad for t in (o, lse, o_b, lse_b))
    if torch.is_grad_enabled() and wanted:
        return _Merge.apply(o, lse, o_b, lse_b, base, impl, tokens_first)
    return _merge_op(o, lse, o_b, lse_b, base, impl, tokens_first)


class _Merge(torch.autograd.Function):
    """Gradients of a merge, written in plain PyTorch: they are one pass over data that was just read."""

    @staticmethod
    def forward(
        ctx: Any,
        o: Tensor,
        lse: Tensor,
        o_b: Tensor | None,
        lse_b: Tensor | None,
        base: float,
        impl: str,
        tokens_first: bool,
    ) -> tuple[Tensor, Tensor]:
        merged, merged_lse = _merge_op(o, lse, o_b, lse_b, base, impl, tokens_first)
        ctx.save_for_backward(o, lse, o_b, lse_b, merged, merged_lse)
        ctx.base = base
        ctx.set_materialize_grads(False)
        return merged, merged_lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        o, lse, o_b, lse_b, merged, merged_lse = ctx.saved_tensors
        log_base = math.log(ctx.base)
        do = torch.zeros_like(merged) if do is None else do
        total = merged_lse.masked_fill(merged_lse == -math.inf, 0)
        delta = (do.to(lse.dtype) * merged.to(lse.dtype)).sum(-1).transpose(-1, -2)

        def gradients(part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
            # d lse_i = w_i (dlse + log(base) do . (o_i - o)), d o_i = w_i do, where w_i is the state's share.
            weight = ((part_lse - total) * log_base).exp()
            empty = part_lse == -math.inf
            d_part = do.to(lse.dtype) * weight.transpose(-1, -2)[..., None]
            ahead = (do.to(lse.dtype) * part.to(lse.dtype)).sum(-1).transpose(-1, -2) - delta
            d_lse = ahead * log_base if dlse is None else ahead * log_base + dlse
            return d_part.to(part.dtype), (weight * d_lse).masked_fill(empty, 0)

        d_o, d_lse = gradients(o, lse)
        d_other = (None, None) if o_b is None else gradients(o_b, lse_b)
        return d_o, d_lse, *d_other, None, None, None
