"""One call of paged attention made again and again with other tensors, as a model's layers do over one page table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.kernels.launches import Kept, Launches, differentiable, recording, repeatable
from sparseattn.masks import BlockMask
from sparseattn.ops.arguments import check_apart, starts_with
from sparseattn.ops.dispatch import implementations, on_its_device, require
from sparseattn.ops.paged.cache import PagedCache
from sparseattn.ops.paged.checks import make_problem
from sparseattn.ops.paged.library import PACKAGE, attend
from sparseattn.ops.paged.options import ALiBi, CustomMask, PageLists
from sparseattn.ops.paged.problem import PagedProblem

_Scales = tuple[float | None, float | Tensor | None, float | Tensor | None]


class _Known(NamedTuple):
    """What a form of call came to: its problem, without the tensors of the call."""

    module: Any
    problem: PagedProblem


class _Recorded(NamedTuple):
    """What a form of call came to: its launches, and columns of its output."""

    launches: Launches
    dim: int
    kept: Kept | None = None


class _Usual(NamedTuple):
    """A recorded call of queries, keys and values whose LSE nobody wants: sums by stream take it."""

    recorded: _Recorded
    shape: tuple[int, ...]
    apart: int
    sums: dict[int, Tensor]


# Recorded calls of all page tables: what a plan costs must not be paid again by the next of the same shapes.
_recorded: dict[tuple[Any, ...], _Recorded] = {}
_MOST_RECORDED = 4096


class RepeatedAttention:
    """``paged_attention`` over one page table with one set of options.

    The first call of a form (shapes, strides, dtypes, devices and alignments of all tensors, and options) is checked in
    full. What it came to, down to the compiled kernels, serves those like it, over other page tables, too, which cost
    the host a fraction of such a call. Contents of the tensors given here may change between calls, in place: where
    something had to be computed from them (offsets of a custom mask, say), and under ``torch.compile``, every call is
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
        self._kept = fixed
        self._options: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q, "causal": causal, "window": window,
            "softcap": softcap, "positions": positions, "custom_mask": custom_mask, "mask": mask, "impl": impl,
        }  # fmt: skip
        self._known: dict[tuple[Any, ...], _Known | _Recorded] = {}
        self._usual: dict[tuple[Any, ...], _Usual] = {}
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
        key = _key(q, k, v, q_rope, k_rope, (scale, k_scale, v_scale), sinks, out)
        try:
            known = self._known.get(key)
        except TypeError:  # something that is no number, as the checks will say
            known = None
        if type(known) is not _Recorded or (device.type == "cuda" and device.index != torch._C._cuda_getDevice()):
            return self._slowly(q, key, k, v, q_rope, k_rope, (scale, k_scale, v_scale), sinks, out)
        given = out
        if out is None:
            out = torch.empty((*q.shape[:2], known.dim), dtype=q.dtype, device=device)
        lse = _sums(q)
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

    def again(self, form: tuple[Any, ...], q: Tensor, places: dict[str, int], *others: Tensor) -> Tensor | None:
        """The output of a call in a form that ``learn`` knows; None where it does not, or where something is unusual.

        Args:
            form: What the caller calls it: all that launches depend on, which are shapes, strides, dtypes, devices and
                alignments, and what else it varies.
            q: Queries.
            places: Addresses of ``q``, ``k``, ``v`` and what else the call has; without ``v`` it lies as far from
                ``k`` as it did.
            others: Tensors of keys and values.
        """
        usual = self._usual.get(form)
        if usual is None or not repeatable(q, *others) or differentiable(q, *others):
            return None
        device, stream = q.device, 0
        if device.type == "cuda":
            if device.index != torch._C._cuda_getDevice() or torch._C._cuda_isCurrentStreamCapturing():
                return None
            stream = torch._C._cuda_getCurrentRawStream(device.index)
        out = torch.empty(usual.shape, dtype=q.dtype, device=device)
        lse = usual.sums.get(stream)
        if lse is None:
            lse = usual.sums[stream] = _sums(q)
        if "v" not in places:
            places["v"] = places["k"] + usual.apart
        places.update(self._places)
        places["out"], places["lse"] = out.data_ptr(), lse.data_ptr()
        return out if usual.recorded.launches.repeat(device, places, usual.recorded.kept) else None

    def learn(
        self,
        form: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Have ``again`` know by ``form`` the call that was made with these tensors."""
        known = self._known.get(_key(q, k, v, q_rope, k_rope, (scale, None, None), None, None))
        if isinstance(known, _Recorded) and known.kept is not None:
            apart = v.data_ptr() - k.data_ptr()
            self._usual[form] = _Usual(known, (*q.shape[:2], known.dim), apart, {})

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
        if isinstance(known, _Recorded) and self._kept and known.kept is None:
            known = known._replace(kept={})
        self._known[key] = known
        if isinstance(known, _Recorded):
            tensors = _moving(q, q_rope, k, v, k_rope, sinks, *self._results(q, known.dim, out))
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
        return out, _sums(q)

    def _describe(self) -> None:
        """Name the tensors that calls have in common, and say all that launches depend on but the call's tensors."""
        if self._fixed is not None:
            return
        self._fixed = {}
        given = dict(zip(("seq_lens", "page_table", "indptr", "indices"), self._table, strict=True)) | self._options
        for name, value in given.items():
            if isinstance(value, Tensor):
                self._fixed[name] = value
            elif isinstance(value, ALiBi | CustomMask | PageLists | BlockMask):
                parts = vars(value).items()
                self._fixed |= {f"{name}.{part}": t for part, t in parts if isinstance(t, Tensor)}
        self._places = {name: t.data_ptr() for name, t in self._fixed.items()}
        form = (self._layout, *((name, _facts(value)) for name, value in given.items()))
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
        p, main, rest = _problem(q if q_rope is None else (q, q_rope), cache, scales, sinks, self._options)
        impl = self._options["impl"]
        out = output_for(out, main, v.shape[-1])
        check_apart(out, q, k, v)
        lse = _sums(q)
        module = require(PACKAGE, impl, implementations(impl, main), main, rest, p)
        if q.numel() == 0 or k.numel() == 0 or p.batch == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        assert self._fixed is not None
        launches = Launches(_moving(main, rest, k, v, k_rope, sinks, out, lse) | self._fixed)
        with torch.no_grad(), recording(launches):
            module.attend(main, rest, out, lse, p)
        recorded = launches.close()
        if recorded is not None:
            found = _Recorded(recorded, v.shape[-1])
            self._known[key] = found._replace(kept={}) if self._kept else found
            if len(_recorded) >= _MOST_RECORDED:
                _recorded.clear()
            if self._form:
                _recorded[self._form, key] = found
            return out, lse
        staying = [t for t in p._replace(k=q, v=q, k_rope=None, sinks=None) if isinstance(t, Tensor)]
        given = {t.data_ptr() for t in (q, *self._fixed.values())}
        if all(t.data_ptr() in given for t in staying):
            table = self._table[0]  # in the place of tensors that this must not keep alive
            self._known[key] = _Known(module, p._replace(k=table, v=table, k_rope=None, sinks=None))
        return out, lse


def ordinary(
    q: Tensor | tuple[Tensor, Tensor],
    cache: PagedCache,
    scales: _Scales,
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
    p, main, rest = _problem(q, cache, scales, sinks, options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (main, rest, p.k, p.v, sinks)):
        raise argument_error(
            "q", "tensors without gradients", "one that requires them",
            "Paged attention has no backward: call it under torch.no_grad(), or use block_sparse_attention.",
        )  # fmt: skip
    out = output_for(out, main, p.v.shape[-1])
    lse = _sums(main)
    attend(main, rest, out, lse, options["impl"], p)
    return out, lse


def _problem(
    q: Tensor | tuple[Tensor, Tensor],
    cache: PagedCache,
    scales: _Scales,
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


def _key(
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
        key += tuple(None if t is None else _form(t) for t in (q_rope, k_rope, sinks, out))
        key += (out is not None and starts_with(out, q, k, v),)
    return key


def _form(t: Tensor) -> tuple[Any, ...]:
    """All of ``t`` that a launch depends on; Triton tells addresses apart by 16 bytes."""
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15


def _facts(value: Any) -> Any:
    """All of an option that a launch depends on."""
    if isinstance(value, Tensor):
        return _form(value)
    if isinstance(value, ALiBi | CustomMask | PageLists | BlockMask):
        return type(value), *((name, _facts(part)) for name, part in vars(value).items())
    return type(value), value


def _sums(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty((q.shape[1], q.shape[0]), dtype=dtype, device=q.device)
