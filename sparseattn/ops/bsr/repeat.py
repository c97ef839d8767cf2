"""Attention over one pattern of blocks made again and again with other tensors, as a model's layers do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.kernels.launches import Launches, differentiable, form_of, repeatable
from sparseattn.kernels.usual import Usual
from sparseattn.ops.arguments import check_apart
from sparseattn.ops.block_sparse import RepeatedBlocks
from sparseattn.ops.bsr.api import Options, attend_rows, check_output, make_call
from sparseattn.ops.bsr.library import PACKAGE
from sparseattn.ops.bsr.problem import BSRProblem
from sparseattn.ops.bsr.rows import BlockRows
from sparseattn.ops.dispatch import implementations, on_its_device, require
from sparseattn.ops.results import empty_lse


class _Known(NamedTuple):
    """What a form of call came to, without the tensors of the call."""

    blocks: RepeatedBlocks | None = None
    module: Any = None
    problem: BSRProblem | None = None
    launches: Launches | None = None


class RepeatedRows:
    """``attend_rows`` over one pattern with one set of options.

    The first call of a form (shapes, strides, dtypes, devices and alignments of its tensors) is checked in full. What
    it came to, down to the compiled kernels, serves those like it. Under ``torch.compile``, and where a gradient may be
    asked for, every call is an ordinary one.

    Args:
        rows: The pattern.
        options: Of ``attend_rows``, but ``scale``, ``k_scale`` and ``v_scale``.
        impl: As there.
    """

    def __init__(self, rows: BlockRows, *, impl: str = "auto", **options: Any) -> None:
        self._rows = rows
        self._options = options
        self._impl = impl
        sinks = options.get("sinks")
        self._sinks = sinks.contiguous() if isinstance(sinks, Tensor) else None
        self._known: dict[tuple[Any, ...], _Known] = {}

    def over(self, rows: BlockRows) -> RepeatedRows:
        """The same over another pattern."""
        return RepeatedRows(rows, impl=self._impl, **self._options)

    @on_its_device
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (``out``, if given) and the natural-log LSE; arguments and errors of ``attend_rows``."""
        if (
            not repeatable(q, k, v)
            or isinstance(k_scale, Tensor)
            or isinstance(v_scale, Tensor)
            or differentiable(q, k, v)
        ):
            scales: dict[str, Any] = {"scale": scale, "k_scale": k_scale, "v_scale": v_scale}
            both = attend_rows(
                q, k, v, self._rows, **self._options, **scales, out=out, return_lse=True, impl=self._impl
            )
            assert isinstance(both, tuple)
            return both
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        key = _key(q, k, v, scale, k_scale, v_scale)
        if out is not None:
            key += (*form_of(out), out.data_ptr() in (at_q, at_k, at_v))
        known = self._known.get(key)
        if known is None:
            return self._first(key, q, k, v, scale, k_scale, v_scale, out)
        if known.blocks is not None:
            return known.blocks(q, k, v, self._sinks, out)
        if out is None:
            out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        lse = empty_lse(q)
        if known.launches is None:
            assert known.problem is not None
            k, v = (k, v) if k.dim() == 4 else (k[None], v[None])
            known.module.attend(*_batched(q, out, lse), known.problem._replace(k=k, v=v))
            return out, lse
        places = {"q": at_q, "k": at_k, "v": at_v, "out": out.data_ptr(), "lse": lse.data_ptr()}
        if not known.launches.repeat(q.device, places):
            return self._first(key, q, k, v, scale, k_scale, v_scale, out)
        return out, lse

    def usual(
        self, tensors: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, scale: float | None, o: Tensor, lse: Tensor
    ) -> Usual | None:
        """What makes again a call that had the results ``o`` and ``lse``: ``RepeatedBlocks.usual``, if that made it."""
        known = None if self._sinks is not None else self._known.get(_key(q, k, v, scale, None, None))
        return None if known is None or known.blocks is None else known.blocks.usual(tensors, q, k, v, None, o, lse)

    def _first(
        self,
        key: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        k_scale: float | None,
        v_scale: float | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A call of a form that is not known yet: checked, made and remembered."""
        options = Options(**self._options, scale=scale, k_scale=k_scale, v_scale=v_scale)
        call = make_call(q, k, v, self._rows, self._impl, options)
        out = check_output(out, q, v.shape[-1])
        if call.geometry is not None:
            blocks = RepeatedBlocks(call.geometry, self._impl, fixed=True)
            if out is not None:
                check_apart(out, q, k, v)
            self._known[key] = _Known(blocks)
            return blocks(q, k, v, self._sinks, out)
        p = call.problem
        assert p is not None
        if out is None:
            out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        check_apart(out, q, k, v)
        lse = empty_lse(q)
        tensors = _batched(q, out, lse)
        module = require(PACKAGE, self._impl, implementations(self._impl, q), tensors[0], p)
        if q.numel() == 0 or k.numel() == 0 or p.indices.numel() == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        launches = None
        if hasattr(module, "attend_recorded"):
            moving = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
            launches = Launches(moving, [t for t in p._replace(k=p.indices, v=p.indices) if isinstance(t, Tensor)])
            module.attend_recorded(*tensors, p, launches)
            launches = launches.close()
        else:
            module.attend(*tensors, p)
        # In the place of tensors that this must not keep alive stands one that the pattern holds anyway.
        self._known[key] = _Known(None, module, p._replace(k=p.indices, v=p.indices), launches)
        return out, lse


def _key(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, k_scale: float | None, v_scale: float | None
) -> tuple[Any, ...]:
    at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    return (*form_of(q), *form_of(k), *form_of(v), scale, k_scale, v_scale, at_q == at_k, at_k == at_v, at_q == at_v)


def _batched(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``q``, ``out`` and ``lse`` with a batch dimension."""
    return tensors if tensors[0].dim() == 4 else tuple(t[None] for t in tensors)
