"""Paged attention as torch knows it: one operator that writes its results into tensors it is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.ops.arguments import check_apart
from sparseattn.ops.dispatch import implementations, on_its_device, require
from sparseattn.ops.paged.problem import SCHEMA, PagedProblem

PACKAGE = "sparseattn.ops.paged"

_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
_LIBRARY.define(f"paged_attention(Tensor q, Tensor? q_rope, Tensor(a!) out, Tensor(b!) lse, str impl, {SCHEMA}) -> ()")


@on_its_device
def _attend(q: Tensor, q_rope: Tensor | None, out: Tensor, lse: Tensor, impl: str, *problem: Any) -> None:
    p = PagedProblem(*problem)
    module = require(PACKAGE, impl, implementations(impl, q), q, q_rope, p)
    check_apart(out, q, p.k, p.v)
    if q.numel() == 0 or p.k.numel() == 0 or p.batch == 0:
        out.zero_()
        lse.fill_(-math.inf)
        return
    module.attend(q, q_rope, out, lse, p)


_LIBRARY.impl("paged_attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("sparseattn::paged_attention", lambda *_: None, lib=_LIBRARY)
_operator = torch.ops.sparseattn.paged_attention.default


def attend(q: Tensor, q_rope: Tensor | None, out: Tensor, lse: Tensor, impl: str, p: PagedProblem) -> None:
    """Attention of ``q`` into ``out`` and ``lse``."""
    with torch.no_grad():
        _operator(q, q_rope, out, lse, impl, *p)
