"""One call of paged attention made again and again with other tensors, as a model's layers do over one page table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.kernels.launches import Launches
from sparseattn.masks import BlockMask
from sparseattn.ops.arguments import check_apart, starts_with
from sparseattn.ops.dispatch import implementations, on_its_device, require
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

    @on_its_device
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
        scale: float | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of ``q`` over pages of ``k`` and ``v``: arguments, results and errors of ``paged_attention``.

        Further columns of queries and keys, as latent caches have them, are ``q_rope`` and ``k_rope``.

        Returns:
            The output (``out``, if given), and the natural-log LSE ``[Hq, total_q]``.
        """
        if isinstance(k_scale, Tensor) or isinstance(v_scale, Tensor) or self._unusual(q, k, v, q_rope, k_rope, sinks):
            return self._ordinary(q, k, v, q_rope, k_rope, (scale, k_scale, v_scale), sinks, out)
        key = (*_form(q), *_form(k), *_form(v), k.data_ptr() == v.data_ptr(), scale, k_scale, v_scale)
        key += tuple(None if t is None else _form(t) for t in (q_rope, k_rope, sinks, out))
        if out is not None:
            key += (starts_with(out, q, k, v),)
        known = self._known.get(key)
        if known is None:
            return self._first(key, q, k, v, q_rope, k_rope, (scale, k_scale, v_scale), sinks, out)
        if out is None:
            out = torch.empty((*q.shape[:2], known.dim), dtype=q.dtype, device=q.device)
        lse = _sums(q)
        if known.launches is None:
            if self._layout == "HND":
                k, v, k_rope = k.transpose(1, 2), v.transpose(1, 2), None if k_rope is None else k_rope.transpose(1, 2)
            problem = known.problem._replace(k=k, v=v, k_rope=k_rope, sinks=sinks)
            with torch.no_grad():
                known.module.attend(q, q_rope, out, lse, problem)
            return out, lse
        known.module.clear(out, lse, known.problem)
        moving = _moving(q, q_rope, k, v, k_rope, sinks, out, lse)
        if not known.launches.repeat(q.device, {name: t.data_ptr() for name, t in moving.items()}):
            return self._first(key, q, k, v, q_rope, k_rope, (scale, k_scale, v_scale), sinks, out)
        return out, lse

    def _unusual(
        self, q: Tensor, k: Tensor, v: Tensor, q_rope: Tensor | None, k_rope: Tensor | None, sinks: Tensor | None
    ) -> bool:
        """Whether a call must be an ordinary one."""
        return (
            torch.compiler.is_compiling()
            or not type(q) is type(k) is type(v) is Tensor
            or (q_rope is None) != (k_rope is None)
            or (sinks is not None and not (isinstance(sinks, Tensor) and sinks.is_contiguous()))
            or (
                torch.is_grad_enabled()
                and any(t is not None and t.requires_grad for t in (q, k, v, q_rope, k_rope, sinks))
            )
        )

    def _ordinary(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_rope: Tensor | None,
        k_rope: Tensor | None,
        scales: tuple[float | None, float | Tensor | None, float | Tensor | None],
        sinks: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        both = paged_attention(
            q if q_rope is None else (q, q_rope), PagedCache(k, v, *self._table, k_rope, self._layout),
            **self._options, scale=scales[0], k_scale=scales[1], v_scale=scales[2], sinks=sinks, out=out,
            return_lse=True,
        )  # fmt: skip
        assert isinstance(both, tuple)
        return both

    def _first(
        self,
        key: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_rope: Tensor | None,
        k_rope: Tensor | None,
        scales: tuple[float | None, float | None, float | None],
        sinks: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A call of a form that is not known yet: checked, made and remembered."""
        cache, o = PagedCache(k, v, *self._table, k_rope, self._layout), self._options
        scale, k_scale, v_scale = scales
        p, main, rest = make_problem(
            q if q_rope is None else (q, q_rope), cache, o["cu_seqlens_q"], o["max_seqlen_q"], o["causal"], scale,
            o["window"], o["softcap"], sinks, o["positions"], o["custom_mask"], k_scale, v_scale, o["mask"], o["impl"],
        )  # fmt: skip
        out = output_for(out, main, v.shape[-1])
        check_apart(out, q, k, v)
        lse = _sums(q)
        module = require(PACKAGE, o["impl"], implementations(o["impl"], main), main, rest, p)
        if q.numel() == 0 or k.numel() == 0 or p.batch == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        staying = [t for t in p._replace(k=q, v=q, k_rope=None, sinks=None) if isinstance(t, Tensor)]
        moving = _moving(main, rest, k, v, k_rope, sinks, out, lse)
        launches = Launches(moving, staying) if hasattr(module, "clear") else None
        with torch.no_grad():
            if launches is None:
                module.attend(main, rest, out, lse, p)
            else:
                module.attend(main, rest, out, lse, p, launches)
        given = {t.data_ptr() for t in (q, *_tensors(self._table), *_tensors(o.values()))}
        if all(t.data_ptr() in given for t in staying):
            table = self._table[0]  # in the place of tensors that this must not keep alive
            launches = launches if launches is not None and launches.complete else None
            problem = p._replace(k=table, v=table, k_rope=None, sinks=None)
            self._known[key] = _Known(module, problem, launches, v.shape[-1])
        return out, lse


def _moving(
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
