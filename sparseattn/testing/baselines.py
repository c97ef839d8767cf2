"""What torch itself offers to compare with: ``scaled_dot_product_attention`` and compiled FlexAttention.

Everything a baseline needs is prepared outside of what is timed; what comes back takes no arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sparseattn.masks import BlockMask

Prepared = tuple[Callable[[], Tensor], dict[str, Any]]


class Unsupported(Exception):
    """Why an implementation does not run here or does not do this: no failure, and nothing to time."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, cudnn: bool = False) -> Prepared:
    """Dense attention by ``scaled_dot_product_attention``, with KV heads as they are where the backend takes them.

    Args:
        q: ``[B, S, Hq, D]``.
        k: ``[B, S, Hkv, D]``; torch aligns its causal diagonal top-left, so as many keys as queries.
        v: ``[B, S, Hkv, Dv]``.
        causal: Key j is visible to query i only if ``j <= i``.
        cudnn: Only cuDNN's kernels; otherwise whatever torch chooses.

    Returns:
        What runs it, giving ``[B, S, Hq, Dv]``, and in which form it takes KV heads: "native", or "repeated", which
        happens here and not inside what is timed.

    Raises:
        Unsupported: cuDNN without a GPU, or causal attention over another number of keys than queries.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if cudnn and q.device.type != "cuda":
        raise Unsupported("cuDNN attention needs a CUDA GPU")
    if causal and q.shape[1] != k.shape[1]:
        raise Unsupported("torch aligns the causal diagonal top-left: as many keys as queries only")

    def attend(q: Tensor, k: Tensor, v: Tensor, native: bool) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else nullcontext():
            o = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=native
            )
        return o.transpose(1, 2)

    native = True
    try:
        attend(q[:, :256], k[:, :256], v[:, :256], True)
    except RuntimeError:
        native = False
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    return lambda: attend(q, k, v, native), {"kv_heads_are": "native" if native else "repeated"}


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Prepared:
    """Compiled FlexAttention over the blocks of a mask. It compiles on its first call, for tens of seconds.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, Dv]``.
        mask: Which blocks.

    Raises:
        Unsupported: Not on a GPU.
    """
    if q.device.type != "cuda":
        raise Unsupported("FlexAttention is compared on a GPU, where it is compiled")
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile(flex.flex_attention, dynamic=False)
    # Compiled kernels walk the lists, so the mask function need not look up what is listed.
    flex_mask = mask.to_flex(q.shape[2], self_contained=False)
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: compiled(qt, kt, vt, block_mask=flex_mask, enable_gqa=True).transpose(1, 2), {}
