"""What a plan of ragged attention holds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import (
    Dtypes,
    Options,
    Scales,
    as_queries,
    capturing,
    check_dtype,
    check_heads,
    fold_scales,
)
from sparseattn.flashinfer._prefill import Rows
from sparseattn.flashinfer._wrapper import as_results, check_results
from sparseattn.kernels.launches import differentiable, repeatable
from sparseattn.kernels.usual import UsualCalls
from sparseattn.ops.arguments import starts_with
from sparseattn.ops.block_sparse import RepeatedBlocks, block_sparse_attention, repeated_blocks
from sparseattn.ops.paged import CustomMask, RepeatedAttention

# Requests times queries up to which tiles are made for requests of all queries.
_FEW_ROWS = 1 << 16


@dataclass
class RaggedPlan:
    """A plan of ragged attention: everything but the tensors of a layer.

    Where a call is plain and lengths were given on the CPU, or tiles for the longest that they can be are few, the
    dense kernels of block-sparse attention run. Others see keys as a cache of small pages that lie one after the other:
    its kernels rotate, mask and scale, and make their schedule on the device when the host knows no length.

    Attributes:
        rows: Rows of queries.
        kv_indptr: int32 [B + 1] on the device, rows of keys.
        kv_lens: int32 [B], their differences.
        kv_host: The same numbers as ``kv_indptr``, if the host knows.
        num_qo_heads: Hq.
        num_kv_heads: Hkv.
        dims: Of keys and of values.
        kv_layout: "NHD" or "HND".
        options: Causality, window, scale, positions.
        device: Where everything lies.
        dtypes: Declared ones.
        mask: A custom mask or None.
        impl: See ``paged_attention``.
        follows: Captured calls follow later plans.
    """

    rows: Rows
    kv_indptr: Tensor
    kv_lens: Tensor
    kv_host: list[int] | None
    num_qo_heads: int
    num_kv_heads: int
    dims: tuple[int, int]
    kv_layout: str
    options: Options
    device: torch.device
    dtypes: Dtypes
    mask: CustomMask | None
    impl: str
    follows: bool = False
    _arguments: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_heads(self.num_qo_heads, self.num_kv_heads)
        self._arguments = self.options.arguments(self.num_qo_heads, self.dims[0], self.device)
        self._scale = self._arguments.pop("scale")
        self._known = self.kv_host is not None and bool(self.rows.lengths)  # so nothing past the end is read
        self._plain = self.mask is None and self._arguments["positions"] is None
        self._blocks: dict[tuple[Any, ...], RepeatedBlocks] = {}
        self.again = UsualCalls()
        self._plain_arguments = {n: value for n, value in self._arguments.items() if n != "positions"}
        # The largest page that all requests fill: fewer numbers to look up. Powers of two only, for few kernels.
        self._page = 1 if self.kv_host is None else math.gcd(256, *self.kv_host)
        self._page_indptr = self.kv_indptr if self._page == 1 else self.kv_indptr // self._page
        self._calls: tuple[int, RepeatedAttention] | None = None
        self._accepted: set[tuple[Any, ...]] = set()
        if self.kv_host is not None:
            self._longest_k = max((b - a for a, b in itertools.pairwise(self.kv_host)), default=0)

    def replaced(self, **options: Any) -> RaggedPlan:
        """The plan with other options; a custom mask has taken the place of causality."""
        if self.mask is not None:
            options.pop("causal", None)
        return replace(self, options=self.options._replace(**options))

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: tuple[float | Tensor | None, float | Tensor | None, float | Tensor | None],
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of ``q`` ``[tokens, Hq, D]``; the output ``[tokens, Hq, Dv]``, and base-2 LSE ``[tokens, Hq]``."""
        if not isinstance(q, Tensor) or not isinstance(k, Tensor) or not isinstance(v, Tensor):
            got = ", ".join(type(t).__name__ for t in (q, k, v))
            raise argument_error("q, k, v", "tensors", got, kind=TypeError)
        given = None
        if scales[0] is scales[1] is scales[2] is out is lse is None and not (return_lse or self.follows):
            given = q, k, v
        if self.kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        form = (q.dtype, k.dtype, v.dtype, q.shape, k.shape, v.shape)
        if form not in self._accepted:
            self._check(q, k, v)
            self._accepted.add(form)
        folded = fold_scales(self._scale, *scales)
        q = as_queries(q, folded.q)
        plain = self._plain and q.dtype == k.dtype and folded.k is None and folded.v is None
        if plain and (self._known or self._few(q)):
            return self._dense(q, k, v, folded.scale, out, lse, return_lse, given)
        return self._paged(q, k, v, folded, out, lse, return_lse)

    def _dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
        given: tuple[Tensor, ...] | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        o_dtype = self.dtypes.o
        if out is not None or lse is not None:
            check_results(q, self.dims[1], o_dtype, out, lse)
        arguments = {**self._plain_arguments, "scale": scale, "impl": self.impl}
        form = (q.dtype, v.dtype, q.device, k.device, v.device, q.shape, k.shape, v.shape, scale)
        if not repeatable(q, k, v) or differentiable(q, k, v):
            o, natural = block_sparse_attention(q, k, v, **arguments, **self._lengths(q, k), return_lse=True)
            return as_results(o, natural, o_dtype, out, lse, return_lse)
        blocks = self._blocks.get(form)
        # What is made from lengths while a graph is captured is the graph's.
        own = not self._known and capturing(q.device)
        if blocks is None or own:
            blocks = repeated_blocks(q, k, v, **arguments, **self._lengths(q, k), fixed=not self.follows)
        if not own:
            self._blocks[form] = blocks
        direct = out if out is not None and o_dtype == q.dtype and not starts_with(out, q, k, v) else None
        o, natural = blocks(q, k, v, None, direct)
        if given is not None and given[0] is q and o.dtype == o_dtype and not own:
            self.again.learn(given, lambda: blocks.usual(given, q, k, v, None, o, natural))
        return as_results(o, natural, o_dtype, out, lse, return_lse)

    def _few(self, q: Tensor) -> bool:
        """Whether tiles for as many queries and keys as there can be, for every request, are few.

        Bounds of lengths on the device are not those of a graph's later plans.
        """
        return not self.follows and 0 < self.kv_lens.shape[0] * q.shape[0] <= _FEW_ROWS

    def _lengths(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """Lengths as block-sparse attention takes them; those that the host does not know end where tensors do."""
        starts_q, starts_k = self.rows.indptr, self.kv_indptr
        if self._known:
            longest = {"max_seqlen_q": self.rows.longest, "max_seqlen_k": self._longest_k}
            return {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, **longest}
        ends = (starts_q, q.shape[0]), (starts_k, k.shape[0])
        starts_q, starts_k = (t.clamp(0, end).cummax(0).values for t, end in ends)
        longest_q = q.shape[0] if self.rows.longest is None else min(self.rows.longest, q.shape[0])
        return {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_q": longest_q}

    def _paged(
        self, q: Tensor, k: Tensor, v: Tensor, folded: Scales, out: Tensor | None, lse: Tensor | None, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        o_dtype = self.dtypes.o
        if out is not None or lse is not None:
            check_results(q, self.dims[1], o_dtype, out, lse)
        pages = k.shape[0] // self._page
        if self._page == 1:
            k, v = k.unsqueeze(1), v.unsqueeze(1)
        else:
            k, v = (t[: pages * self._page].unflatten(0, (pages, self._page)) for t in (k, v))
        o, natural = self._attention(pages)(
            q, k, v, scale=folded.scale, k_scale=folded.k, v_scale=folded.v, out=out if o_dtype == q.dtype else None
        )
        return as_results(o, natural, o_dtype, out, lse, return_lse)

    def _attention(self, pages: int) -> RepeatedAttention:
        """The call that all runs make, over at least so many pages that lie one after the other."""
        own = capturing(self.device)
        if not own and self._calls is not None and self._calls[0] >= pages:
            return self._calls[1]
        numbers = torch.arange(pages, dtype=torch.int32, device=self.device)
        call = RepeatedAttention(
            self.kv_lens, None, self._page_indptr, numbers, cu_seqlens_q=self.rows.indptr,
            max_seqlen_q=self.rows.longest, custom_mask=self.mask, impl=self.impl, fixed=not self.follows,
            **self._arguments,
        )  # fmt: skip
        if not own:  # a graph owns what it allocates, and outlives plans
            self._calls = pages, call
        return call

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        check_dtype("q", q, self.dtypes.q)
        check_dtype("k", k, self.dtypes.kv)
        check_dtype("v", v, self.dtypes.kv)
        rows = q.shape[0] if self.rows.total is None else self.rows.total
        if tuple(q.shape) != (rows, self.num_qo_heads, self.dims[0]):
            expected = f"shape {(rows, self.num_qo_heads, self.dims[0])}, as planned"
            raise argument_error("q", expected, f"shape {tuple(q.shape)}")
        least = 0 if self.kv_host is None else self.kv_host[-1]
        for name, t, dim in (("k", k, self.dims[0]), ("v", v, self.dims[1])):
            if t.dim() != 3 or tuple(t.shape) != (k.shape[0], self.num_kv_heads, dim) or t.shape[0] < least:
                expected = f"{least or 'n'} rows of {self.num_kv_heads} heads and {dim} columns ({self.kv_layout})"
                raise argument_error(name, f"{expected}, as planned", f"shape {tuple(t.shape)}, tokens first")
