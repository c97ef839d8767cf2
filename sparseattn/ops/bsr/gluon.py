"""Hopper implementation (sm_90a) in Gluon of patterns that are bits: block-sparse attention over tiles of 128 x 128.

The kernel is that of ``block_sparse_attention``, which looks at bits besides. A product with a weight of 0 is not 0
where the value is not finite, so values that no query lists are replaced before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.ops.block_sparse import gluon as block_sparse
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.bsr.gluon_bits import TILE
from sparseattn.ops.bsr.problem import BSRProblem


def unsupported_reason(q: Tensor, p: BSRProblem) -> str | None:
    """Why this kernel cannot run the call, or None."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"the Gluon kernels need a Hopper GPU (compute capability 9.0), not {q.device}"
    return refusal(q, p)


def refusal(q: Tensor, p: BSRProblem) -> str | None:
    """Why this kernel could not run the call on any GPU, or None."""
    if p.words is None:
        return "the Gluon kernel takes blocks of multiples of 16, or of fewer queries in dense patterns, without a mask"
    others = (p.slopes, p.k_scale, p.v_scale)
    if any(t is not None for t in others) or p.rope_theta > 0 or p.v_factor != 1 or p.gathered:
        return "the Gluon kernel takes no positions, scales or gathered"
    if p.k.dtype != q.dtype:
        return f"the Gluon kernel takes k and v of q's dtype, not {p.k.dtype}"
    return block_sparse.refusal(q, p.k, p.v, _geometry(q, p))


def attend(q: Tensor, out: Tensor, lse: Tensor, p: BSRProblem) -> None:
    """Attention into ``out`` and ``lse``; see ``reference.attend``, which this matches."""
    assert p.words is not None
    assert p.keys is not None
    keys, heads_k = p.keys, p.k.shape[2]
    if keys.shape[1] > heads_k:
        keys = keys.unflatten(1, (heads_k, -1)).any(2)
    v = torch.where(keys.transpose(1, 2)[..., None], p.v, 0)
    o = out if block_sparse.writable(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    block_sparse.forward_into(q, p.k, v, o, lse, p.sinks, _geometry(q, p), (p.words, p.rows))
    if o is not out:
        out.copy_(o)


def _geometry(q: Tensor, p: BSRProblem) -> Geometry:
    """The tiles that the bits are about."""
    return Geometry(
        p.counts, p.tiles, None, None, TILE, TILE, None, None, None, None, q.shape[0], q.shape[1], p.k.shape[1], False,
        p.causal, p.window_left, p.window_right, p.scale, p.softcap,
    )  # fmt: skip
