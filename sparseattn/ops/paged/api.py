"""Paged attention: what a user calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.masks import BlockMask
from sparseattn.ops.dispatch import implementations, resolve
from sparseattn.ops.paged.cache import PagedCache
from sparseattn.ops.paged.calls import ordinary
from sparseattn.ops.paged.checks import make_problem
from sparseattn.ops.paged.library import PACKAGE
from sparseattn.ops.paged.options import ALiBi, CustomMask, PageLists, RoPE
from sparseattn.ops.paged.repeat import RepeatedAttention


def paged_attention(
    q: Tensor | tuple[Tensor, Tensor],
    cache: PagedCache,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    positions: RoPE | ALiBi | None = None,
    custom_mask: Tensor | CustomMask | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    mask: BlockMask | PageLists | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of a ragged batch of queries over a paged cache: decode, append and prefill in one call.

    The cache holds all tokens of a sequence, those of the queries included (``append_kv`` writes them). Query i of a
    sequence stands at position ``seq_len - q_len + i``. A query that sees no key gives output 0 and LSE -inf. Not
    differentiable. Nothing waits for the device, so that calls can be captured in a CUDA graph and replayed with other
    lengths and tables; few queries a sequence are spread over the GPU by cutting keys into shares on the device.

    Ragged prefill without pages is ``block_sparse_attention`` with ``cu_seqlens_q`` and ``cu_seqlens_k``.

    Args:
        q: ``[B, Hq, D]``, one query a sequence; or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``; bfloat16,
            float16, float32 or (reference) float64, any strides. D counts the columns of ``cache.k`` and
            ``cache.k_rope``; with the latter a pair of tensors (latent and rotary part) is taken, too.
        cache: Keys and values, in q's dtype or in float8; Hq is a multiple of its KV heads.
        cu_seqlens_q: int32 [B + 1], ascending from 0 to total_q: rows of each sequence in q.
        max_seqlen_q: Longest query length; default ``total_q``, which is right but may run many short queries in a
            form meant for long ones.
        causal: Query i sees key j only if ``j <= i + seq_len - q_len``.
        scale: Factor on the scores ``q . k``; default ``1 / sqrt(D)``. A cache with ``k_rope`` needs it said, since its
            scale comes from the head dimension before absorption, 1 / sqrt(192) for DeepSeek's.
        window: ``(left, right)``, how many keys before and after the aligned diagonal stay visible; None is unbounded.
        softcap: Scores, scaled and biased, become ``softcap * tanh(score / softcap)``; None or 0: not at all.
        sinks: Logits [Hq], any float dtype, that join the softmax denominator only.
        positions: ``RoPE(theta, scale)`` rotates q and k in the kernel, ``ALiBi(slopes)`` adds a linear bias; None.
        custom_mask: A flat bool tensor or a ``CustomMask``: single tokens to keep, besides what ``causal`` and
            ``window`` leave (pass ``causal=False`` for the mask alone).
        k_scale: What keys are multiplied by: a positive number, or float32 ``[1]`` or ``[Hkv]`` on the device.
        v_scale: Likewise for values.
        mask: Which blocks of keys each block of queries attends: a ``BlockMask`` from any selector, with 1, Hkv or Hq
            heads, batch 1 or B and Sq = ``max_seqlen_q`` (1 for decode), its blocks counted in token positions,
            whatever the page size; or ``PageLists``, pages for all queries of a sequence.
        out: Where to write: q's shape with the values' head dimension, q's dtype, any strides; not where q,
            keys or values lie.
        return_lse: Also return the LSE.
        impl: "auto" (on CUDA Gluon where it can, else Triton; reference elsewhere), "gluon" (Hopper), "triton" or
            "reference".

    Returns:
        ``o`` ``[total_q, Hq, Dv]`` in q's dtype (``out``, if given); with ``return_lse`` also the natural-log LSE of
        the scores, without the sink: float32 (float64 for float64 queries) ``[Hq, total_q]``.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or numbers that do not fit; q or a cache that requires a gradient; or ``impl``
            cannot run this call, with the reason.
    """
    options: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q, "causal": causal, "window": window,
        "softcap": softcap, "positions": positions, "custom_mask": custom_mask, "mask": mask, "impl": impl,
    }  # fmt: skip
    scales: dict[str, Any] = {"scale": scale, "k_scale": k_scale, "v_scale": v_scale}
    main, rest = (q[0], q[1]) if isinstance(q, tuple) and len(q) == 2 else (q, None)
    traced = torch.compiler.is_compiling() or not isinstance(main, Tensor) or not isinstance(cache, PagedCache)
    if traced or (rest is None) != (cache.k_rope is None):
        o, lse = ordinary(q, cache, (scale, k_scale, v_scale), sinks, out, options)
    else:
        call = RepeatedAttention(cache.seq_lens, cache.page_table, cache.indptr, cache.indices, cache.layout, **options)
        o, lse = call(main, cache.k, cache.v, q_rope=rest, k_rope=cache.k_rope, **scales, sinks=sinks, out=out)
    return (o, lse) if return_lse else o


def unsupported_reason(
    q: Tensor | tuple[Tensor, Tensor],
    cache: PagedCache,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    positions: RoPE | ALiBi | None = None,
    custom_mask: Tensor | CustomMask | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    mask: BlockMask | PageLists | None = None,
    impl: str = "auto",
) -> str | None:
    """Why ``paged_attention`` with these arguments and this ``impl`` would not run, or None if it would.

    Arguments are those of ``paged_attention``. Ones that no implementation accepts raise, as they do there.
    """
    p, main, rest = make_problem(
        q, cache, cu_seqlens_q, max_seqlen_q, causal, scale, window, softcap, sinks, positions, custom_mask, k_scale,
        v_scale, mask, impl,
    )  # fmt: skip
    return resolve(PACKAGE, implementations(impl, main), main, rest, p)[1]
