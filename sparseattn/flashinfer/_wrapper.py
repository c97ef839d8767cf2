"""What plan/run wrappers share: their aliases, page tables at fixed addresses, and one paged attention call."""

from __future__ import annotations

import functools
import numbers
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import (
    FLOAT8,
    Dtypes,
    Options,
    Scales,
    Table,
    as_queries,
    base2,
    check_dtype,
    check_heads,
    check_indptr,
    check_layout,
    check_output,
    fold_scales,
    index_tensor,
    readable,
    split_cache,
)
from sparseattn.kernels.launches import form_of
from sparseattn.kernels.usual import UsualCalls
from sparseattn.masks import BlockMask
from sparseattn.ops.paged import CustomMask, PagedCache, PageLists, RepeatedAttention, paged_attention

_MOST_VARIANTS = 16
_PLAIN = frozenset((type(None), bool, int, float, str))
# Scales of layers that a plan remembers, and how many of them the next one does, which takes time.
_MOST_SCALES, _MOST_FOLLOWED = 512, 8


class Wrapper:
    """Base of all wrappers: ``plan``, then ``run`` any number of times.

    The workspace says on which device the wrapper works. Nothing is written to it: this library's operators take what
    they need from PyTorch's allocator, so any size will do.

    Attributes:
        device: Of the workspace.
    """

    #: Leading arguments of ``run`` that are tensors, and the deprecated arguments that ``forward`` takes after them.
    _tensors = 2
    _forward: tuple[str, ...] = ()

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        self._kv_layout = check_layout(kv_layout)
        self._planned: Any = None
        self._variants: tuple[Any, dict[Any, Any]] | None = None
        self.reset_workspace_buffer(float_workspace_buffer)

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None = None
    ) -> None:
        """Name another workspace; neither is used, the first one says the device."""
        for name, t in (
            ("float_workspace_buffer", float_workspace_buffer),
            ("int_workspace_buffer", int_workspace_buffer),
        ):
            if not isinstance(t, Tensor) and (t is not None or name[0] == "f"):
                raise argument_error(name, "a tensor", type(t).__name__, kind=TypeError)
        self.device = float_workspace_buffer.device

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Bytes of float and integer workspace that a plan of these arguments needs: none."""
        return 0, 0

    def plan(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def begin_forward(self, *args: Any, **kwargs: Any) -> None:
        """``plan`` by its old name."""
        self.plan(*args, **kwargs)

    def end_forward(self) -> None:
        """Nothing; kept for old code."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``run`` by its old name.

        Options of the plan (``causal``, ``sm_scale``, ``window_left``, ...) that are given here and not None count for
        this call; the others stay as planned (FlashInfer puts its defaults in their place).
        """
        kwargs.update(zip(self._forward, args[self._tensors :], strict=False))
        kwargs.pop("use_fp16_qk_reduction", None)
        options = {n: kwargs.pop(n) for n in Options._fields if n in kwargs}
        kept = self._plan()
        try:
            self._planned = self._variant(**options)
            return self.run(*args[: self._tensors], **kwargs)
        finally:
            self._planned = kept

    def run_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        """``run`` with ``return_lse=True``."""
        return self.run(*args, **kwargs, return_lse=True)

    def forward_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        """``forward`` with ``return_lse=True``."""
        return self.forward(*args, **kwargs, return_lse=True)

    def _variant(self, **options: Any) -> Any:
        """The plan with other options, None being as planned. Those of a plan are kept, since layers take turns."""
        plan = self._plan()
        said = {n: value for n, value in options.items() if value is not None}
        for name, value in said.items():  # a tensor could change while it is a key here
            if not isinstance(value, str | numbers.Real):
                raise argument_error(name, "a number, or as planned", type(value).__name__, kind=TypeError)
        changed = plan.options._replace(**said) if said else plan.options
        if changed == plan.options:
            return plan
        if self._variants is None or self._variants[0] is not plan or len(self._variants[1]) > _MOST_VARIANTS:
            self._variants = plan, {}
        known = self._variants[1]
        if changed not in known:
            known[changed] = plan.replaced(**said)
        return known[changed]

    def _plan(self) -> Any:
        """What ``plan`` left."""
        if self._planned is None:
            raise argument_error(
                f"{type(self).__name__}.run", "plan() to be called first", "no plan", kind=RuntimeError
            )
        return self._planned


@dataclass
class PagedPlan:
    """A plan of paged attention: everything but the tensors of a layer.

    Attributes:
        table: Which pages requests own.
        num_qo_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: Of queries and keys.
        page_size: Tokens of a page.
        kv_layout: "NHD" or "HND".
        options: Causality, window, scale, positions.
        device: Where everything lies.
        dtypes: Declared ones, checked at every run; None: those of the tensors.
        head_dim_vo: Of values; None: as ``head_dim``.
        cu_seqlens_q: int32 [B + 1], rows of each request; None: one each.
        max_seqlen_q: Longest query length.
        total_q: Rows, where the host knows.
        custom_mask: See ``paged_attention``.
        mask: Likewise.
        impl: Likewise.
        follows: Contents of the table may change without another plan, as those of a graph's buffers do.
    """

    table: Table
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_layout: str
    options: Options
    device: torch.device
    dtypes: Dtypes | None = None
    head_dim_vo: int | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int | None = None
    total_q: int | None = None
    custom_mask: Tensor | CustomMask | None = None
    mask: BlockMask | PageLists | None = None
    impl: str = "auto"
    follows: bool = True
    _arguments: dict[str, Any] = field(init=False, repr=False)
    _scale: float = field(init=False, repr=False)
    _call: RepeatedAttention | None = field(init=False, repr=False, default=None)
    _accepted: set[tuple[Any, ...]] = field(init=False, repr=False, default_factory=set)
    _usual: dict[Any, UsualCalls] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_heads(self.num_qo_heads, self.num_kv_heads)
        self._arguments = self.options.arguments(self.num_qo_heads, self.head_dim, self.device)
        self._scale = self._arguments.pop("scale")

    def _attention(self) -> RepeatedAttention:
        """The call that all runs make."""
        if self._call is None:
            self._call = RepeatedAttention(
                *self.table, layout=self.kv_layout, cu_seqlens_q=self.cu_seqlens_q, max_seqlen_q=self.max_seqlen_q,
                custom_mask=self.custom_mask, mask=self.mask, impl=self.impl, fixed=not self.follows,
                **self._arguments,
            )  # fmt: skip
        return self._call

    @functools.cached_property
    def _likeness(self) -> tuple[Any, ...] | None:
        """All that runs depend on but addresses and contents of tensors; None where that is not known."""
        if self.follows or not (self.custom_mask is self.mask is None and plain_options(self.options)):
            return None
        tensors = [t if t is None else form_of(t) for t in (*self.table, self.cu_seqlens_q)]
        return (
            self.num_qo_heads, self.num_kv_heads, self.head_dim, self.page_size, self.kv_layout, self.options,
            self.device, self.dtypes, self.head_dim_vo, self.max_seqlen_q, self.total_q, self.impl, *tensors,
        )  # fmt: skip

    def after(self, before: PagedPlan | None) -> PagedPlan:
        """This plan, which knows from the one before it what calls come to, if only their contents differ."""
        if before is not None and self._likeness is not None and self._likeness == before._likeness:
            named = {**self.table._asdict(), "cu_seqlens_q": self.cu_seqlens_q}
            places = {n: t.data_ptr() for n, t in named.items() if t is not None}
            recent = list(before._usual.items())[-_MOST_FOLLOWED:]
            self._usual = {form: calls.moved(places) for form, calls in recent}
        return self

    def replaced(self, **options: Any) -> PagedPlan:
        """The plan with other options; a custom mask has taken the place of causality."""
        if self.custom_mask is not None:
            options.pop("causal", None)
        return replace(self, options=self.options._replace(**options))

    def again(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        scales: tuple[Any, Any, Any],
        out: Tensor | None,
        natural_lse: bool = False,
    ) -> Any:
        """What ``run`` of these returns, if it has seen such tensors, and such scales of q, k and v; else None."""
        try:
            calls = self._usual[scales, out is None, natural_lse]
        except (KeyError, TypeError):  # not seen, or what cannot be a key
            return None
        if type(paged_kv_cache) is tuple:
            return calls(q, *paged_kv_cache) if out is None else calls(q, *paged_kv_cache, out)
        return calls(q, paged_kv_cache) if out is None else calls(q, paged_kv_cache, out)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        natural_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of ``q`` ``[tokens, Hq, D]``; the output ``[tokens, Hq, Dv]``, and base-2 LSE ``[tokens, Hq]``.

        With ``natural_lse``, both are as the operator leaves them, the LSE ``[Hq, tokens]``.
        """
        if not isinstance(q, Tensor) or q.dim() == 0:
            got = "a number" if isinstance(q, Tensor) else type(q).__name__
            raise argument_error("q", "a tensor [tokens, Hq, D]", got, kind=TypeError)
        k, v = split_cache(paged_kv_cache, self.kv_layout)
        shapes = (q.dtype, q.shape, k.dtype, k.shape, v.shape)
        if shapes not in self._accepted:
            self._check(q, k, v)
            self._accepted.add(shapes)
        scales = fold_scales(self._scale, q_scale, k_scale, v_scale)
        queries = as_queries(q, scales.q)
        o_dtype = queries.dtype if self.dtypes is None else self.dtypes.o
        if out is not None or lse is not None:
            check_results(queries, v.shape[-1], o_dtype, out, lse)
        o, natural = self._attention()(
            queries, k, v, scale=scales.scale, k_scale=scales.k, v_scale=scales.v, sinks=sinks,
            out=out if o_dtype == queries.dtype else None,
        )  # fmt: skip
        direct = queries is q and (o.dtype == o_dtype if out is None else o is out)
        if direct and sinks is lse is None and not (return_lse or self.follows):
            self._learn(q, paged_kv_cache, k, v, scales, (q_scale, k_scale, v_scale), out, natural_lse)
        if natural_lse:
            return o, natural
        return as_results(o, natural, o_dtype, out, lse, return_lse)

    def _learn(
        self,
        q: Tensor,
        cache: Tensor | tuple[Tensor, Tensor],
        k: Tensor,
        v: Tensor,
        folded: Scales,
        scales: tuple[Any, Any, Any],
        out: Tensor | None,
        lse: bool,
    ) -> None:
        """Have ``again`` know a call that was made."""
        if not all(x is None or isinstance(x, numbers.Real) for x in scales):  # a tensor may change
            return
        tensors = (q, cache) if isinstance(cache, Tensor) else (q, *cache)
        places = (0, 1, len(tensors) - 1)
        given = tensors if out is None else (*tensors, out)
        if len(self._usual) > _MOST_SCALES:
            self._usual.clear()
        calls = self._usual.setdefault((scales, out is None, lse), UsualCalls())
        factors = folded.scale, folded.k, folded.v
        calls.learn(given, lambda: self._attention().usual(given, places, q, k, v, scales=factors, out=out, lse=lse))

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise unless queries, keys and values are as planned."""
        if self.dtypes is not None:
            check_dtype("q", q, self.dtypes.q)
            check_dtype("paged_kv_cache", k, self.dtypes.kv)
        rows = q.shape[0] if self.total_q is None else self.total_q
        if tuple(q.shape) != (rows, self.num_qo_heads, self.head_dim):
            expected = f"shape {(rows, self.num_qo_heads, self.head_dim)}, as planned"
            raise argument_error("q", expected, f"shape {tuple(q.shape)}")
        token, head = (1, 2) if self.kv_layout == "NHD" else (2, 1)
        dims = (k.shape[token], k.shape[head], v.shape[-1]) if k.dim() == v.dim() == 4 else ()
        planned = (self.page_size, self.num_kv_heads, self.head_dim_vo or self.head_dim)
        if dims != planned:
            expected = f"pages of {planned[0]} tokens, {planned[1]} KV heads and values of {planned[2]}, as planned"
            raise argument_error("paged_kv_cache", expected, f"keys {tuple(k.shape)}, values {tuple(v.shape)}")


def plain_options(options: Options) -> bool:
    """Whether options can be compared: a tensor among them would have to be waited for."""
    return _PLAIN.issuperset(map(type, options))


def attend(
    q: Tensor,
    cache: PagedCache,
    *,
    o_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``paged_attention``, with results as FlashInfer returns them.

    Args:
        q: ``[tokens, Hq, D]``, not float8 (``as_queries``).
        cache: What they attend.
        o_dtype: Of the output; None: of the queries.
        out: ``[tokens, Hq, Dv]``, where to write.
        lse: float32 ``[tokens, Hq]``, where to write.
        return_lse: Also return the LSE.
        arguments: Others of ``paged_attention``.

    Returns:
        The output ``[tokens, Hq, Dv]``, and with ``return_lse`` the base-2 LSE, float32 ``[tokens, Hq]``.
    """
    o_dtype = q.dtype if o_dtype is None else o_dtype
    check_results(q, cache.v.shape[-1], o_dtype, out, lse)
    direct = out if o_dtype == q.dtype else None
    o, natural = paged_attention(q, cache, **arguments, out=direct, return_lse=True)
    return as_results(o, natural, o_dtype, out, lse, return_lse)


def check_results(q: Tensor, dim: int, o_dtype: torch.dtype, out: Tensor | None, lse: Tensor | None) -> None:
    """Raise unless ``out`` ``[tokens, Hq, dim]`` and ``lse`` ``[tokens, Hq]``, where they are given, fit ``q``."""
    check_output("out", out, (*q.shape[:2], dim), o_dtype, q)
    check_output("lse", lse, q.shape[:2], torch.float32, q)


def as_results(
    o: Tensor,
    natural: Tensor,
    o_dtype: torch.dtype,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """An operator's results ``o [tokens, Hq, Dv]`` and ``natural [Hq, tokens]`` as FlashInfer returns them.

    Outputs that become float8 are limited to what it holds.
    """
    if out is None and lse is None and not return_lse and o.dtype == o_dtype:
        return o
    if o_dtype in FLOAT8:
        largest = torch.finfo(o_dtype).max
        o = o.clamp(-largest, largest)
    if out is None:
        o = o.to(o_dtype)
    elif o is not out:
        o = out.copy_(o)
    if not return_lse and lse is None:
        return o
    sums = base2(natural, lse)
    return (o, sums) if return_lse else o


def query_rows(
    qo_indptr: Tensor, device: torch.device, non_blocking: bool = True
) -> tuple[Tensor, int | None, int | None]:
    """Query offsets on the device; and where they were on the CPU, the longest query length and the number of rows."""
    check_indptr("qo_indptr", qo_indptr)
    longest = total = None
    if readable(qo_indptr):
        total = int(qo_indptr[-1])
        longest = int(qo_indptr.diff().max()) if qo_indptr.shape[0] > 1 else 0
    return index_tensor("qo_indptr", qo_indptr, device, 1, non_blocking), longest, total
