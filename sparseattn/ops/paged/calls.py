"""Calls of paged attention: checked ones, and what tells one from another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.kernels.launches import form_of
from sparseattn.masks import BlockMask
from sparseattn.ops.arguments import starts_with
from sparseattn.ops.paged.cache import PagedCache
from sparseattn.ops.paged.checks import make_problem
from sparseattn.ops.paged.library import attend
from sparseattn.ops.paged.options import ALiBi, CustomMask, PageLists
from sparseattn.ops.paged.problem import PagedProblem
from sparseattn.ops.results import empty_lse

Scales = tuple[float | None, float | Tensor | None, float | Tensor | None]
#: Options that hold tensors.
HOLDERS = (ALiBi, CustomMask, PageLists, BlockMask)


def ordinary(
    q: Tensor | tuple[Tensor, Tensor],
    cache: PagedCache,
    scales: Scales,
    sinks: Tensor | None,
    out: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """A call through the registered operator, as tracing needs it: checked in full, and nothing remembered.

    Args:
        q: As in ``paged_attention``, like ``cache``, ``sinks`` and ``out``.
        cache: As there.
        scales: ``scale``, ``k_scale`` and ``v_scale``.
        sinks: As there.
        out: As there.
        options: Those of ``RepeatedAttention``.
    """
    p, main, rest = problem_of(q, cache, scales, sinks, options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (main, rest, p.k, p.v, sinks)):
        raise argument_error(
            "q", "tensors without gradients", "one that requires them",
            "Paged attention has no backward: call it under torch.no_grad(), or use block_sparse_attention.",
        )  # fmt: skip
    out = output_for(out, main, p.v.shape[-1])
    lse = empty_lse(main)
    attend(main, rest, out, lse, options["impl"], p)
    return out, lse


def problem_of(
    q: Tensor | tuple[Tensor, Tensor],
    cache: PagedCache,
    scales: Scales,
    sinks: Tensor | None,
    o: dict[str, Any],
) -> tuple[PagedProblem, Tensor, Tensor | None]:
    """``make_problem`` of options ``o``."""
    scale, k_scale, v_scale = scales
    return make_problem(
        q, cache, o["cu_seqlens_q"], o["max_seqlen_q"], o["causal"], scale, o["window"], o["softcap"], sinks,
        o["positions"], o["custom_mask"], k_scale, v_scale, o["mask"], o["impl"],
    )  # fmt: skip


def output_for(out: Tensor | None, q: Tensor, dim: int) -> Tensor:
    """Where to write: ``out``, if it fits."""
    shape = (*q.shape[:2], dim)
    if out is None:
        return torch.empty(shape, dtype=q.dtype, device=q.device)
    if out.dtype != q.dtype:
        raise argument_error("out", f"{q.dtype} like q", out.dtype, kind=TypeError)
    if tuple(out.shape) != shape or out.device != q.device:
        raise argument_error("out", f"shape {shape} on {q.device}", f"shape {tuple(out.shape)} on {out.device}")
    return out


def moving_tensors(
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_rope: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> dict[str, Tensor]:
    """Tensors whose places change from call to call."""
    named = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "q_rope": q_rope, "k_rope": k_rope, "sinks": sinks}
    return {name: t for name, t in named.items() if t is not None}


def call_key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rope: Tensor | None,
    k_rope: Tensor | None,
    scales: tuple[float | None, float | None, float | None],
    sinks: Tensor | None,
    out: Tensor | None,
) -> tuple[Any, ...]:
    """All of a call's tensors and numbers that launches depend on."""
    at_k, at_v = k.data_ptr(), v.data_ptr()
    key: tuple[Any, ...] = (
        q.shape, q.stride(), q.dtype, q.device, q.data_ptr() & 15, k.shape, k.stride(), k.dtype, k.device, at_k & 15,
        v.shape, v.stride(), v.dtype, v.device, at_v & 15, at_k == at_v, scales,
    )  # fmt: skip
    if out is not None or q_rope is not None or sinks is not None:
        key += tuple(None if t is None else form_of(t) for t in (q_rope, k_rope, sinks, out))
        key += (out is not None and starts_with(out, q, k, v),)
    return key


def facts_of(value: Any) -> Any:
    """All of an option that a launch depends on."""
    if isinstance(value, Tensor):
        return form_of(value)
    if isinstance(value, HOLDERS):
        return type(value), *((name, facts_of(part)) for name, part in vars(value).items())
    return value if value is None else (type(value), value)
