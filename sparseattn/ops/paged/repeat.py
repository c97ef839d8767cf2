"""One call of paged attention made again and again with other tensors, as a model's layers do over one page table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.kernels.launches import Launches
from sparseattn.masks import BlockMask
from sparseattn.ops.dispatch import implementations, require
from sparseattn.ops.paged.api import output_for, paged_attention
from sparseattn.ops.paged.cache import PagedCache
from sparseattn.ops.paged.checks import make_problem
from sparseattn.ops.paged.library import PACKAGE
from sparseattn.ops.paged.options import ALiBi, CustomMask, PageLists
from sparseattn.ops.paged.problem import PagedProblem


class _Known(NamedTuple):
    """What a form of call came to: its problem, without the tensors of the call, and its launches to repeat."""

    module: Any
    problem: PagedProblem
    launches: Launches | None
    dim: int


class RepeatedAttention:
    """``paged_attention`` over one page table with one set of options.

    The first call of a form (shapes, strides, dtypes, devices and alignments of its tensors) is checked in full. What
    it came to, down to the compiled kernels, serves those like it, which cost the host a fraction of an ordinary call.
    Contents of the tensors given here may change between calls, in place: where something had to be computed from them
    (offsets of a custom mask, say), and under ``torch.compile``, every call is an ordinary one.

    Args:
        seq_lens: As in ``PagedCache``, like the next four.
        page_table: As there.
        indptr: As there.
        indices: As there.
        layout: As there.
        cu_seqlens_q: As in ``paged_attention``, like the others.
        max_seqlen_q: As there.
        causal: As there.
        window: As there.
        softcap: As there.
        positions: As there.
        custom_mask: As there.
        mask: As there.
        impl: As there.
    """

    def __init__(
        self,
        seq_lens: Tensor,
        page_table: Tensor | None = None,
        indptr: Tensor | None = None,
        indices: Tensor | None = None,
        layout: str = "NHD",
        *,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        positions: Any = None,
        custom_mask: Any = None,
        mask: Any = None,
        impl: str = "auto",
    ) -> None:
        self._table = (seq_lens, page_table, indptr, indices)
        self._layout = layout
        self._options: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q, "causal": causal, "window": window,
            "softcap": softcap, "positions": positions, "custom_mask": custom_mask, "mask": mask, "impl": impl,
        }  # fmt: skip
        self._known: dict[tuple[Any, ...], _Known] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of ``q`` over pages of ``k`` and ``v``; arguments, results and errors of ``paged_attention``.

        Returns:
            The output (``out``, if given), and the natural-log LSE ``[Hq, total_q]``.
        """
        if (
            torch.compiler.is_compiling()
            or not type(q) is type(k) is type(v) is Tensor
            or isinstance(k_scale, Tensor)
            or isinstance(v_scale, Tensor)
            or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        ):
            cache = PagedCache(k, v, *self._table, layout=self._layout)
            scales: dict[str, Any] = {"scale": scale, "k_scale": k_scale, "v_scale": v_scale}
            both = paged_attention(q, cache, **self._options, **scales, sinks=sinks, out=out, return_lse=True)
            assert isinstance(both, tuple)
            return both
        key, at_k, at_v = _form(q), k.data_ptr(), v.data_ptr()
        key += (*_form(k), *_form(v), at_k == at_v, scale, k_scale, v_scale)
        key += (None if sinks is None else _form(sinks), None if out is None else _form(out))
        known = self._known.get(key)
        if known is None:
            return self._first(key, q, k, v, scale, k_scale, v_scale, sinks, out)
        if out is None:
            out = torch.empty((*q.shape[:2], known.dim), dtype=q.dtype, device=q.device)
        lse = _sums(q)
        if known.launches is None:
            views = (k, v) if self._layout == "NHD" else (k.transpose(1, 2), v.transpose(1, 2))
            problem = known.problem._replace(k=views[0], v=views[1], sinks=sinks)
            with torch.no_grad():
                known.module.attend(q, None, out, lse, problem)
            return out, lse
        known.module.clear(out, lse, known.problem)
        places = {"q": q.data_ptr(), "k": at_k, "v": at_v, "out": out.data_ptr(), "lse": lse.data_ptr()}
        if sinks is not None:
            places["sinks"] = sinks.data_ptr()
        known.launches.repeat(q.device, places)
        return out, lse

    def _first(
        self,
        key: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        k_scale: float | None,
        v_scale: float | None,
        sinks: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A call of a form that is not known yet: checked, made and remembered."""
        cache, o = PagedCache(k, v, *self._table, layout=self._layout), self._options
        p, main, _ = make_problem(
            q, cache, o["cu_seqlens_q"], o["max_seqlen_q"], o["causal"], scale, o["window"], o["softcap"], sinks,
            o["positions"], o["custom_mask"], k_scale, v_scale, o["mask"], o["impl"],
        )  # fmt: skip
        out = output_for(out, main, v.shape[-1])
        lse = _sums(q)
        module = require(PACKAGE, o["impl"], implementations(o["impl"], main), main, None, p)
        if q.numel() == 0 or k.numel() == 0 or p.batch == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        moving = {"q": q, "k": k, "v": v, "out": out, "lse": lse} | ({} if sinks is None else {"sinks": sinks})
        staying = [t for t in p._replace(k=q, v=q, sinks=None) if isinstance(t, Tensor)]
        launches = Launches(moving, staying) if hasattr(module, "clear") else None
        with torch.no_grad():
            if launches is None:
                module.attend(q, None, out, lse, p)
            else:
                module.attend(q, None, out, lse, p, launches)
        given = {t.data_ptr() for t in (q, *_tensors(self._table), *_tensors(o.values()))}
        if all(t.data_ptr() in given for t in staying):
            table = self._table[0]  # in the place of tensors that this must not keep alive
            launches = launches if launches is not None and launches.complete else None
            self._known[key] = _Known(module, p._replace(k=table, v=table, sinks=None), launches, v.shape[-1])
        return out, lse


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among ``values``, and those of masks and positions among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, ALiBi | CustomMask | PageLists | BlockMask):
            yield from (t for t in vars(value).values() if isinstance(t, Tensor))


def _form(t: Tensor) -> tuple[Any, ...]:
    """All of ``t`` that a launch depends on; Triton tells addresses apart by 16 bytes."""
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15


def _sums(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty((q.shape[1], q.shape[0]), dtype=dtype, device=q.device)
