"""Prefill and append of one request, by FlashInfer's names."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import (
    FLOAT8,
    Options,
    Scales,
    as_queries,
    check_layout,
    dense_cache,
    dtype_of,
    fold_scales,
    implementation,
    unsupported,
)
from sparseattn.flashinfer._masks import prepare_mask
from sparseattn.flashinfer._prefill import Masking
from sparseattn.flashinfer._wrapper import as_results, attend
from sparseattn.ops.block_sparse import block_sparse_attention


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: torch.dtype | str | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: tuple[Tensor, Tensor] | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one request's queries over its keys: prefill, or append when there are more keys than queries.

    Args:
        q: ``[qo_len, Hq, D]`` in float16, bfloat16, float32 or float8, any strides.
        k: ``[kv_len, Hkv, D]`` ("HND": ``[Hkv, kv_len, D]``) in q's dtype or float8, any strides.
        v: Likewise, with a head dimension of its own.
        scale_q: What float8 queries are multiplied by: float32 of one element or [Hq].
        scale_k: Likewise for keys, [Hkv].
        scale_v: Likewise for values, [Hkv].
        o_dtype: Of the output; None: as q, and bfloat16 for float8.
        custom_mask: bool ``[qo_len, kv_len]``, True keeps; takes the place of ``causal``.
        packed_custom_mask: uint8, the same row by row, 8 entries a byte in "little" bit order (as
            ``packbits(mask.view(-1), "little")`` makes it). Counts if both are given.
        causal: Query i sees key j only if ``j <= i + kv_len - qo_len``.
        kv_layout: "NHD" or "HND".
        pos_encoding_mode: "NONE"; "ROPE_LLAMA" rotates q and k, which hold un-rotated values; "ALIBI".
        use_fp16_qk_reduction: Not used: scores are always float32.
        sm_scale: Factor on the scores; None: ``1 / sqrt(D)``.
        window_left: Keys before the diagonal that stay visible; -1: all.
        logits_soft_cap: Scores become ``cap * tanh(score / cap)``; None or 0: not at all.
        rope_scale: Positions are divided by it; None: 1.
        rope_theta: Base of RoPE's frequencies; None: 1e4.
        backend: FlashInfer's names, all of which mean this library's choice; or "triton", "reference".
        return_lse: Also return the LSE.
        kv_cache_sf: Must be None.
        k_scale: As ``scale_k``, or a number.
        v_scale: As ``scale_v``, or a number.

    Returns:
        The output ``[qo_len, Hq, Dv]``; with ``return_lse`` also the LSE, base 2, float32 ``[qo_len, Hq]``. A query
        that sees no key gives 0 and -inf.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, numbers or combinations that do not fit.
    """
    unsupported("NVFP4 keys and values are not supported.", kv_cache_sf=kv_cache_sf)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.dim() != 3:
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise argument_error(name, "a tensor of 3 dimensions", got)
    if check_layout(kv_layout) == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    masking = Masking(custom_mask, packed_custom_mask)
    options = Options(
        masking.causal(causal), pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta
    )
    arguments = options.arguments(q.shape[1], q.shape[2], q.device)
    scales = fold_scales(arguments["scale"], scale_q, _one("k", scale_k, k_scale), _one("v", scale_v, v_scale))
    if o_dtype is not None:
        o_dtype = dtype_of("o_dtype", o_dtype)
    else:
        o_dtype = torch.bfloat16 if q.dtype in FLOAT8 else q.dtype
    arguments |= {"scale": scales.scale, "impl": implementation(backend)}
    q = as_queries(q, scales.q)
    plain = not masking.by_tokens and arguments["positions"] is None and scales.k is None and scales.v is None
    if plain and q.dtype == k.dtype:
        arguments.pop("positions")
        o, natural = block_sparse_attention(q[None], k[None], v[None], **arguments, return_lse=True)
        return as_results(o[0], natural[0], o_dtype, return_lse=return_lse)
    return _cached(q, k, v, masking, arguments, scales, o_dtype, return_lse)


#: The same, with the LSE.
single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


def _one(name: str, a: Tensor | None, b: float | Tensor | None) -> float | Tensor | None:
    """The one scale that is given."""
    if a is not None and b is not None:
        raise argument_error(f"{name}_scale", f"None beside scale_{name}", "both")
    return b if a is None else a


def _cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masking: Masking,
    arguments: dict[str, Any],
    scales: Scales,
    o_dtype: torch.dtype,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """By the paged kernels, which know of positions, single tokens and float8: keys are a cache of one request."""
    cache = dense_cache(k, v)
    rows, length = q.shape[0], k.shape[0]
    dense = masking.custom_mask
    if dense is not None and dense.dim() != 1 and tuple(dense.shape) != (rows, length):
        raise argument_error("custom_mask", f"shape {(rows, length)}", f"shape {tuple(dense.shape)}")
    cu_seqlens_q = torch.arange(2, dtype=torch.int32, device=q.device) * rows
    mask = prepare_mask(
        dense, masking.packed_custom_mask, cu_seqlens_q.diff(), cache.seq_lens, [rows * length], q.device
    )
    return attend(
        q, cache, o_dtype=o_dtype, return_lse=return_lse, **arguments, k_scale=scales.k, v_scale=scales.v,
        cu_seqlens_q=cu_seqlens_q, max_seqlen_q=rows, custom_mask=mask,
    )  # fmt: skip
