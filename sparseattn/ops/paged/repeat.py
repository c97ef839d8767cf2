"""One call of paged attention made again and again with other tensors, as a model's layers do over one page table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.kernels.launches import (
    Kept,
    Launches,
    Recorded,
    Room,
    Store,
    differentiable,
    recording,
    repeatable,
)
from sparseattn.kernels.rehearsal import rehearse
from sparseattn.kernels.usual import Usual
from sparseattn.ops.arguments import check_apart, starts_with
from sparseattn.ops.dispatch import implementations, on_its_device, require
from sparseattn.ops.paged.cache import PagedCache
from sparseattn.ops.paged.calls import (
    HOLDERS,
    call_key,
    facts_of,
    moving_tensors,
    ordinary,
    output_for,
    problem_of,
)
from sparseattn.ops.paged.library import PACKAGE
from sparseattn.ops.paged.problem import PagedProblem
from sparseattn.ops.results import empty_lse


class _Known(NamedTuple):
    """What a form of call came to: its problem, without the tensors of the call."""

    module: Any
    problem: PagedProblem


# Recorded calls of all page tables: what a plan costs must not be paid again by the next of the same shapes.
_recorded = Store()


class RepeatedAttention:
    """``paged_attention`` over one page table with one set of options.

    The first call of a form (shapes, strides, dtypes, devices and alignments of all tensors, and options) is checked in
    full. What it came to, down to the compiled kernels, serves those like it, over other page tables, too, which cost
    the host a fraction of such a call. Contents of the tensors given here may change between calls, in place: where
    something had to be computed from them (a table made contiguous, say), and under ``torch.compile``, every call is
    an ordinary one.

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
        fixed: Contents of the tensors given here do not change, so that what follows from them alone is computed once.
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
        fixed: bool = False,
    ) -> None:
        self._table = (seq_lens, page_table, indptr, indices)
        self._layout = layout
        self._room = Room() if fixed else None
        self._options: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q, "causal": causal, "window": window,
            "softcap": softcap, "positions": positions, "custom_mask": custom_mask, "mask": mask, "impl": impl,
        }  # fmt: skip
        self._known: dict[tuple[Any, ...], _Known | Recorded] = {}
        self._fixed: dict[str, Tensor] | None = None
        self._places: dict[str, int] = {}
        self._form: tuple[Any, ...] = ()

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
            return ordinary(
                q if q_rope is None else (q, q_rope), PagedCache(k, v, *self._table, k_rope, self._layout),
                (scale, k_scale, v_scale), sinks, out, self._options,
            )  # fmt: skip
        device = q.device
        key = call_key(q, k, v, q_rope, k_rope, (scale, k_scale, v_scale), sinks, out)
        try:
            known = self._known.get(key)
        except TypeError:  # something that is no number, as the checks will say
            known = None
        if type(known) is not Recorded or (device.type == "cuda" and device.index != torch._C._cuda_getDevice()):
            return self._slowly(q, key, k, v, q_rope, k_rope, (scale, k_scale, v_scale), sinks, out)
        given = out
        if out is None:
            out = torch.empty((*q.shape[:2], known.dim), dtype=q.dtype, device=device)
        lse = empty_lse(q)
        places = {
            "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "out": out.data_ptr(), "lse": lse.data_ptr(),
            **self._places,
        }  # fmt: skip
        if q_rope is not None and k_rope is not None:
            places["q_rope"], places["k_rope"] = q_rope.data_ptr(), k_rope.data_ptr()
        if sinks is not None:
            places["sinks"] = sinks.data_ptr()
        if not known.launches.repeat(device, places, known.kept):
            return self._first(key, q, k, v, q_rope, k_rope, (scale, k_scale, v_scale), sinks, given)
        return out, lse

    def usual(
        self,
        tensors: tuple[Tensor, ...],
        places: tuple[int, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *rope: Tensor,
        scales: tuple[float | None, Any, Any],
        out: Tensor | None = None,
        lse: bool = False,
    ) -> Usual | None:
        """What makes again a call that was made with these tensors; None if nothing can.

        Args:
            tensors: What the caller's caller gives, by which calls will be known; ``out`` last, if it is given.
            places: In which of them each of the others lies, however they may come.
            q: As in a call.
            k: Likewise.
            v: Likewise.
            rope: ``q_rope`` and ``k_rope``, or nothing.
            scales: The call's ``scale``, ``k_scale`` and ``v_scale``.
            out: As in a call.
            lse: Return the LSE, too.
        """
        if isinstance(scales[1], Tensor) or isinstance(scales[2], Tensor):
            return None
        q_rope, k_rope = rope or (None, None)
        known = self._known.get(call_key(q, k, v, q_rope, k_rope, scales, None, out))
        if not isinstance(known, Recorded) or known.kept is None or (out is not None and starts_with(out, q, k, v)):
            return None
        names = zip(("q", "k", "v", "q_rope", "k_rope"), (q, k, v, *rope), places, strict=False)
        origins = {name: (at, t.data_ptr() - tensors[at].data_ptr()) for name, t, at in names}
        shape, results = (*q.shape[:2], known.dim), ("out", "lse")
        return Usual(
            known, tensors, origins, self._places, shape, results, q.shape[0] * q.shape[1], out is not None,
            (q.shape[1], q.shape[0]) if lse else None,
        )  # fmt: skip

    def _unusual(
        self, q: Tensor, k: Tensor, v: Tensor, q_rope: Tensor | None, k_rope: Tensor | None, sinks: Tensor | None
    ) -> bool:
        """Whether a call must be an ordinary one."""
        return (
            not repeatable(q, k, v, q_rope, k_rope)
            or (q_rope is None) != (k_rope is None)
            or (sinks is not None and not (isinstance(sinks, Tensor) and sinks.is_contiguous()))
            or differentiable(q, k, v, q_rope, k_rope, sinks)
        )

    @on_its_device
    def _slowly(
        self,
        q: Tensor,
        key: tuple[Any, ...],
        k: Tensor,
        v: Tensor,
        q_rope: Tensor | None,
        k_rope: Tensor | None,
        scales: tuple[float | None, float | None, float | None],
        sinks: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A call of a form that this table has not recorded, or on another GPU than the current one."""
        self._describe()
        try:
            known = self._known.get(key) or (_recorded.get((self._form, key)) if self._form else None)
        except TypeError:
            known = None
        if known is None:
            return self._first(key, q, k, v, q_rope, k_rope, scales, sinks, out)
        if isinstance(known, Recorded) and self._room and known.kept is None:
            known = known._replace(kept=Kept(self._room))
        self._known[key] = known
        if isinstance(known, Recorded):
            tensors = moving_tensors(q, q_rope, k, v, k_rope, sinks, *self._results(q, known.dim, out))
            places = {name: t.data_ptr() for name, t in tensors.items()} | self._places
            if known.launches.repeat(q.device, places, known.kept):
                return tensors["out"], tensors["lse"]
            return self._first(key, q, k, v, q_rope, k_rope, scales, sinks, out)
        if self._layout == "HND":
            k, v, k_rope = k.transpose(1, 2), v.transpose(1, 2), None if k_rope is None else k_rope.transpose(1, 2)
        problem = known.problem._replace(k=k, v=v, k_rope=k_rope, sinks=sinks)
        out, lse = self._results(q, v.shape[-1], out)
        with torch.no_grad():
            known.module.attend(q, q_rope, out, lse, problem)
        return out, lse

    def _results(self, q: Tensor, dim: int, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where a call writes."""
        if out is None:
            out = torch.empty((*q.shape[:2], dim), dtype=q.dtype, device=q.device)
        return out, empty_lse(q)

    def _describe(self) -> None:
        """Name the tensors that calls have in common, and say all that launches depend on but the call's tensors."""
        if self._fixed is not None:
            return
        self._fixed = {}
        given = dict(zip(("seq_lens", "page_table", "indptr", "indices"), self._table, strict=True)) | self._options
        for name, value in given.items():
            if isinstance(value, Tensor):
                self._fixed[name] = value
            elif isinstance(value, HOLDERS):
                parts = vars(value).items()
                self._fixed |= {f"{name}.{part}": t for part, t in parts if isinstance(t, Tensor)}
        self._places = {name: t.data_ptr() for name, t in self._fixed.items()}
        form = (self._layout, *[facts_of(value) for value in given.values()])
        try:
            hash(form)
        except TypeError:  # an option that is not what it should be, as the first call will say
            return
        self._form = form

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
        cache = PagedCache(k, v, *self._table, k_rope, self._layout)
        p, main, rest = problem_of(q if q_rope is None else (q, q_rope), cache, scales, sinks, self._options)
        impl = self._options["impl"]
        out = output_for(out, main, v.shape[-1])
        check_apart(out, q, k, v)
        lse = empty_lse(q)
        module = require(PACKAGE, impl, implementations(impl, main), main, rest, p)
        if q.numel() == 0 or k.numel() == 0 or p.batch == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        assert self._fixed is not None
        kind = (main.dtype, main.shape[1:], *_kind_of(p))
        rehearse(module, kind, q.device, lambda: module.attend(main, rest, out, lse, p))
        launches = Launches(moving_tensors(main, rest, k, v, k_rope, sinks, out, lse) | self._fixed)
        with torch.no_grad(), recording(launches):
            module.attend(main, rest, out, lse, p)
        recorded = launches.close()
        if recorded is not None:
            found = Recorded(recorded, v.shape[-1])
            self._known[key] = found._replace(kept=Kept(self._room)) if self._room else found
            if self._form:
                _recorded.keep((self._form, key), found)
            return out, lse
        staying = [t for t in p._replace(k=q, v=q, k_rope=None, sinks=None) if isinstance(t, Tensor)]
        given = {t.data_ptr() for t in (q, *self._fixed.values())}
        if all(t.data_ptr() in given for t in staying):
            table = self._table[0]  # in the place of tensors that this must not keep alive
            self._known[key] = _Known(module, p._replace(k=table, v=table, k_rope=None, sinks=None))
        return out, lse


def _kind_of(p: PagedProblem) -> tuple[Any, ...]:
    """What of a problem decides which kernels it launches, and no number that changes with a prompt."""
    given = [x if isinstance(x, bool) else x is None for x in p if x is None or isinstance(x, (bool, Tensor))]
    numbers = (p.max_q == 1, p.block_q, p.block_kv, p.window_left >= 0, p.window_right >= 0, p.softcap > 0)
    return p.k.dtype, p.k.shape[1:], p.v.shape[-1], *given, *numbers
