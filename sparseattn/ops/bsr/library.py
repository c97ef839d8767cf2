"""Attention over block-sparse rows as torch knows it: one operator that writes into tensors it is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.ops.arguments import check_apart
from sparseattn.ops.bsr.problem import SCHEMA, BSRProblem
from sparseattn.ops.dispatch import implementations, on_its_device, require

PACKAGE = "sparseattn.ops.bsr"

_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
_LIBRARY.define(f"bsr_attention(Tensor q, Tensor(a!) out, Tensor(b!) lse, str impl, {SCHEMA}) -> ()")


@on_its_device
def _attend(q: Tensor, out: Tensor, lse: Tensor, impl: str, *problem: Any) -> None:
    p = BSRProblem(*problem)
    module = require(PACKAGE, impl, implementations(impl, q), q, p)
    check_apart(out, q, p.k, p.v)
    if q.numel() == 0 or p.k.numel() == 0 or p.indices.numel() == 0:
        out.zero_()
        lse.fill_(-math.inf)
        return
    module.attend(q, out, lse, p)


_LIBRARY.impl("bsr_attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("sparseattn::bsr_attention", lambda *_: None, lib=_LIBRARY)
_operator = torch.ops.sparseattn.bsr_attention.default


def attend(q: Tensor, out: Tensor, lse: Tensor, impl: str, p: BSRProblem) -> None:
    """Attention of ``q [B, M, Hq, D]`` into ``out [B, M, Hq, Dv]`` and ``lse [B, Hq, M]``."""
    with torch.no_grad():
        _operator(q, out, lse, impl, *p)
