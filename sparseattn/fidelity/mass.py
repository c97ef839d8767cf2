"""Attention mass that a mask keeps, row by row, by the operator and its log-sum-exp.

Everything goes through the operator and its log-sum-exp, so memory grows with the sequence, never with its square. With
``Z`` the softmax denominator of a query row over all visible keys, and ``Z_s`` over the selected ones,

    recall = Z_s / Z = exp(lse_sparse - lse_dense)

is the share of the row's attention mass that the mask keeps, and ``lse_dense - lse_sparse = -log(recall)`` its deficit.
Attention sinks (learnable logits) are keys to nothing and are left out of both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention

# The LSE does not depend on the values: the narrowest the operator takes keeps its second matmul cheap.
_VALUE_DIM = 16


class MassStatistics(NamedTuple):
    """Summary of a recall tensor over its defined rows. A mean alone hides lost answers: look at the tail.

    Attributes:
        mean: Mean recall.
        p05: 5th percentile: nineteen of twenty rows keep more.
        worst: The row that loses most.
        deficit: Mean LSE deficit, ``-log(recall)``, in nats; infinite when a row keeps nothing.
    """

    mean: float
    p05: float
    worst: float
    deficit: float


def recall(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: BlockMask,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    **layout: Any,
) -> Tensor:
    """Share of every query's attention mass that lies on the selected keys.

    Args:
        q: Queries ``[B, Sq, Hq, D]``, or packed ``[total, Hq, D]``.
        k: Keys ``[B, Sk, Hkv, D]``, or packed.
        v: Not read, None will do: no value moves attention mass. It is here so that the call reads like the operator's.
        mask: The selection. What it masks inside its blocks (causality, window) bounds dense attention too, so recall
            speaks of what was left out, not of what must not be seen.
        causal: As in ``block_sparse_attention``; None: as the mask says.
        scale: Likewise; default ``1 / sqrt(D)``.
        window: Likewise; intersected with the mask's.
        softcap: Likewise.
        impl: Likewise.
        **layout: ``cu_seqlens_*``, ``max_seqlen_*``, ``ranges_*`` of a ragged batch, as the operator takes them.

    Returns:
        float32 ``[B, Hq, Sq]`` (packed ``[Hq, total]``) in [0, 1] up to rounding; NaN for rows that see no key at all
        (padding), which have no mass to keep.

    Raises:
        TypeError: As ``block_sparse_attention``.
        ValueError: Likewise.
    """
    deficit = lse_deficit(q, k, mask, causal=causal, scale=scale, window=window, softcap=softcap, impl=impl, **layout)
    return torch.exp(-deficit)


def lse_deficit(
    q: Tensor,
    k: Tensor,
    mask: BlockMask,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    **layout: Any,
) -> Tensor:
    """``lse_dense - lse_sparse`` of every query, natural log: 0 where nothing is lost, infinite where everything is.

    Unlike recall it keeps its resolution when nearly everything is lost.

    Args:
        q: As ``recall``, like all the others.
        k: Keys.
        mask: The selection.
        causal: As ``recall``.
        scale: As ``recall``.
        window: As ``recall``.
        softcap: As ``recall``.
        impl: As ``recall``.
        **layout: As ``recall``.

    Returns:
        float32 ``[B, Hq, Sq]`` (packed ``[Hq, total]``); NaN for rows that see no key.
    """
    if not isinstance(mask, BlockMask):
        raise argument_error("mask", "a BlockMask", type(mask).__name__, kind=TypeError)
    v = k[..., :_VALUE_DIM]
    common: dict[str, Any] = {"scale": scale, "softcap": softcap, "impl": impl, "return_lse": True, **layout}
    with torch.no_grad():
        _, sparse = block_sparse_attention(q, k, v, mask, causal=causal, window=window, **common)
        dense_causal = mask.causal if causal is None else causal
        dense_window = window_intersection(mask.window, window)
        _, dense = block_sparse_attention(q, k, v, None, causal=dense_causal, window=dense_window, **common)
    return deficit_from_lse(sparse, dense)


def deficit_from_lse(lse_sparse: Tensor, lse_dense: Tensor) -> Tensor:
    """The deficit from LSEs at hand (natural log, any shape), in float32; NaN where the dense one is -inf."""
    # -inf - -inf is NaN already, which is what a row without keys should get.
    return (lse_dense - lse_sparse).float()


def mass_statistics(recall: Tensor) -> MassStatistics:
    """Mean, 5th percentile and worst row of a recall tensor, over its rows that are not NaN. Waits for the device.

    Args:
        recall: As ``recall`` returns it, any shape.

    Raises:
        ValueError: No defined row.
    """
    rows = recall[~recall.isnan()].float()
    if rows.numel() == 0:
        raise argument_error("recall", "at least one row that sees a key", "none")
    # kthvalue where torch.quantile stops at 16 million elements.
    p05 = rows.kthvalue(max(1, -(-rows.numel() // 20))).values
    return MassStatistics(rows.mean().item(), p05.item(), rows.min().item(), -rows.log().mean().item())


def relative_error(o: Tensor, o_ref: Tensor) -> Tensor:
    """``output_error`` as a scalar float32 tensor on the device, without waiting for it."""
    if o.shape != o_ref.shape:
        raise argument_error("o", f"shape {tuple(o_ref.shape)} like o_ref", f"shape {tuple(o.shape)}")
    difference = torch.linalg.vector_norm(o.float() - o_ref.float())
    # 0 / 0 is no error at all.
    return torch.where(difference == 0, 0.0, difference / torch.linalg.vector_norm(o_ref.float()))


def output_error(o: Tensor, o_ref: Tensor) -> float:
    """Relative L2 error ``|o - o_ref| / |o_ref|`` over all elements, in float32. Waits for the device.

    Args:
        o: Output of sparse attention, any shape.
        o_ref: Output of dense attention, the same shape.

    Raises:
        ValueError: Shapes that differ.
    """
    return relative_error(o, o_ref).item()


def window_intersection(
    a: tuple[int | None, int | None] | None, b: tuple[int | None, int | None] | None
) -> tuple[int | None, int | None] | None:
    if a is None or b is None:
        return a if b is None else b

    def tighter(x: int | None, y: int | None) -> int | None:
        return x if y is None else y if x is None else min(x, y)

    return tighter(a[0], b[0]), tighter(a[1], b[1])
