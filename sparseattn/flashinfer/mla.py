"""FlashInfer's ``flashinfer.mla``: multi-head latent attention over paged caches, in absorbed form."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._buffers import check_fits
from sparseattn.flashinfer._common import (
    FLOAT8,
    Table,
    as_queries,
    check_dtype,
    check_indptr,
    dense_table,
    dtype_of,
    implementation,
    number_of,
    unsupported,
)
from sparseattn.flashinfer._latent import Parts, joined_cache
from sparseattn.flashinfer._lengths import lengths_table
from sparseattn.flashinfer._mla_fronts import (
    trtllm_batch_decode_with_kv_cache_mla as trtllm_batch_decode_with_kv_cache_mla,
)
from sparseattn.flashinfer._wrapper import Wrapper, as_results, check_results, query_rows
from sparseattn.kernels.launches import form_of
from sparseattn.kernels.usual import UsualCalls
from sparseattn.ops.paged import RepeatedAttention, copy_vectors

#: DeepSeek's: 128 columns of a head before absorption, and 64 rotary ones.
DEFAULT_SCALE = (128 + 64) ** -0.5
#: Columns of a joined cache that are values.
LATENT = 512


@dataclass(frozen=True)
class _Plan:
    """A plan: everything but the tensors of a layer. Without a table: one query a request, whose pages ``run`` names.

    Attributes:
        table: Which pages requests own.
        rows: int32 [B + 1], rows of q.
        longest: Longest query length, if the host knows; and the number of rows.
        total: See there.
        heads: Hq.
        dims: Columns of ckv and of kpe.
        page_size: Tokens of a page.
        causal: Whether queries of a request see those behind them.
        scale: Factor on the scores.
        dtypes: Of queries and of the cache.
    """

    scale: float
    table: Table | None = None
    rows: Tensor | None = None
    longest: int | None = None
    total: int | None = None
    heads: int | None = None
    dims: tuple[int, int] | None = None
    page_size: int | None = None
    causal: bool = False
    dtypes: tuple[torch.dtype, torch.dtype] | None = None

    @functools.cached_property
    def likeness(self) -> tuple[Any, ...]:
        """All that runs depend on but addresses and contents of tensors."""
        tensors = [t if t is None else form_of(t) for t in (*(self.table or ()), self.rows)]
        return (
            self.scale, self.longest, self.total, self.heads, self.dims, self.page_size, self.causal, self.dtypes,
            *tensors,
        )  # fmt: skip

    @property
    def places(self) -> dict[str, int]:
        """Addresses of its tensors, by the names that ``paged_attention`` has for them."""
        named = {**({} if self.table is None else self.table._asdict()), "cu_seqlens_q": self.rows}
        return {name: t.data_ptr() for name, t in named.items() if t is not None}


class BatchMLAPagedAttentionWrapper(Wrapper):
    """Latent attention of a batch, decode or prefill, over a paged cache of one latent head.

    Three forms. After ``plan``: ``run(q_nope, q_pe, ckv_cache, kpe_cache)``. With ``kv_len`` and ``page_table``, one
    query a request and no plan needed (FlashInfer's cutlass backend): the same. And that of the documents, which needs
    no plan either: ``forward(q, kv_cache, page_table, seq_lens)`` on joined tensors. Without a plan scores are scaled
    by ``1 / sqrt(128 + 64)``, since the head dimension before absorption is nowhere said.

    Args:
        float_workspace_buffer: Says the device; not written to.
        use_cuda_graph: Plans are copied into the buffers, so that a captured ``run`` follows them.
        qo_indptr: int32 [B + 1], a buffer.
        kv_indptr: int32 [B + 1], likewise.
        kv_indices: int32, likewise, of the most pages.
        kv_len_arr: int32 [B], likewise.
        backend: FlashInfer's names, all of which mean this library's choice; or "triton", "reference".
        kv_layout: "NHD" or "HND", which are the same with one head.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, numbers or combinations that do not fit.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
        kv_layout: str = "NHD",
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self._impl = implementation(backend)
        self._graph = use_cuda_graph
        self._call: tuple[_Plan, RepeatedAttention] | None = None
        self._again = UsualCalls()
        self._accepted: set[tuple[Any, ...]] = set()
        self._buffers: dict[str, Tensor] = {}
        if use_cuda_graph:
            names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
            for name, t in zip(names, (qo_indptr, kv_indptr, kv_indices, kv_len_arr), strict=True):
                if not isinstance(t, Tensor) or t.dim() != 1 or t.dtype != torch.int32:
                    raise argument_error(name, "a flat int32 tensor with use_cuda_graph", t)
                self._buffers[name] = t

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype | str,
        kv_data_type: torch.dtype | str,
        use_profiler: bool = False,
    ) -> None:
        """What ``run`` will compute, until the next plan.

        Args:
            qo_indptr: int32 [B + 1], rows of q of each request, ascending from 0.
            kv_indptr: int32 [B + 1] or more, ascending from 0: which of ``kv_indices`` a request owns.
            kv_indices: int32, page numbers.
            kv_len_arr: int32 [B], tokens of each request.
            num_heads: Hq.
            head_dim_ckv: Latent columns, values too.
            head_dim_kpe: Rotary columns; 0: none.
            page_size: Tokens of a page, 1..256.
            causal: Query i of a request sees key j only if ``j <= i + kv_len - qo_len``.
            sm_scale: Factor on the scores, ``1 / sqrt(head dimension before absorption)``.
            q_data_type: Of queries and outputs, checked by ``run``.
            kv_data_type: Of the cache: the same, or float8.
            use_profiler: Must be False.
        """
        unsupported("Profile with torch.profiler.", use_profiler=use_profiler or None)
        dtypes = dtype_of("q_data_type", q_data_type), dtype_of("kv_data_type", kv_data_type)
        if dtypes[1] not in (dtypes[0], *FLOAT8):
            raise argument_error("kv_data_type", f"{dtypes[0]} like q_data_type, or float8", dtypes[1], kind=TypeError)
        rows, longest, total = query_rows(qo_indptr, self.device)
        check_indptr("kv_indptr", kv_indptr)
        if not isinstance(kv_len_arr, Tensor):
            raise argument_error("kv_len_arr", "an int32 tensor", type(kv_len_arr).__name__, kind=TypeError)
        kv_indptr = kv_indptr[: kv_len_arr.numel() + 1]  # as in FlashInfer, more entries than requests are not read
        table = lengths_table(kv_indptr, kv_indices, kv_len_arr, page_size, self.device)
        if table.seq_lens.shape[0] != rows.shape[0] - 1:
            expected = f"{rows.shape[0] - 1} requests like qo_indptr"
            raise argument_error("kv_len_arr", expected, table.seq_lens.shape[0])
        if self._graph:
            assert table.indptr is not None
            assert table.indices is not None
            planned = {"qo_indptr": rows, "kv_indptr": table.indptr, "kv_len_arr": table.seq_lens}
            for name, t in planned.items():
                check_fits(name, self._buffers[name], t, exact=True)
            check_fits("kv_indices", self._buffers["kv_indices"], table.indices)
            copy_vectors([(t, self._buffers[n]) for n, t in {"kv_indices": table.indices, **planned}.items()])
            rows, longest, total = self._buffers["qo_indptr"], None, None
            table = Table(self._buffers["kv_len_arr"], None, self._buffers["kv_indptr"], self._buffers["kv_indices"])
        self._accepted.clear()
        before, plan = self._planned, _Plan(
            number_of("sm_scale", sm_scale), table, rows, longest, total, num_heads, (head_dim_ckv, head_dim_kpe),
            page_size, bool(causal), dtypes,
        )  # fmt: skip
        alike = before is not None and not self._graph and plan.likeness == before.likeness
        self._planned, self._again = plan, self._again.moved(plan.places) if alike else UsualCalls()

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: Tensor | None = None,
        kv_len: Tensor | None = None,
        page_table: Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: Tensor | None = None,
        kpe_scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as planned.

        Args:
            q_nope: ``[tokens, Hq, 512]``, absorbed queries.
            q_pe: ``[tokens, Hq, 64]``, their rotary part.
            ckv_cache: ``[P, page, 512]``, latent keys, which are the values.
            kpe_cache: ``[P, page, 64]``, rotary columns of the keys.
            out: ``[tokens, Hq, 512]`` in q's dtype, where to write.
            lse: float32 ``[tokens, Hq]``, where to write.
            return_lse: Also return the LSE.
            profiler_buffer: Must be None.
            kv_len: int32 [B], tokens of each request: with ``page_table`` the place of a plan's pages; one query each.
            page_table: int32 [B, max_pages].
            return_lse_base_on_e: The LSE is natural instead of base 2.
            o_scale: Must be None.
            ckv_scale: What a float8 ``ckv_cache`` is multiplied by.
            ckv_scale_arr: float32 ``[P, page, 512 / 128]``, the same for each token and 128 columns. The pages of the
                call are then written out in q's dtype first, which takes three times their traffic.
            kpe_scale: What a float8 ``kpe_cache`` is multiplied by. Where it is not ``ckv_scale`` times a power of two,
                ``q_pe`` times their ratio is rounded to q's dtype.

        Returns:
            The output ``[tokens, Hq, 512]``, in latent space; with ``return_lse`` also the LSE, float32 ``[tokens,
            Hq]``, base 2.
        """
        plain = out is lse is kv_len is page_table is ckv_scale is ckv_scale_arr is kpe_scale is None and not return_lse
        if plain and profiler_buffer is o_scale is None:
            o = self._again(q_nope, q_pe, ckv_cache, kpe_cache)
            if o is not None:
                return o
        if profiler_buffer is not None or o_scale is not None:
            hint = "Outputs are not scaled; profile with torch.profiler."
            unsupported(hint, profiler_buffer=profiler_buffer, o_scale=o_scale)
        plan = self._plan_for(kv_len, page_table, ckv_cache)
        form = tuple([(t.dtype, t.shape) for t in (q_nope, q_pe, ckv_cache, kpe_cache) if isinstance(t, Tensor)])
        if plan is not self._planned or form not in self._accepted:
            self._check(plan, q_nope, q_pe, ckv_cache, kpe_cache)
            if plan is self._planned:
                self._accepted.add(form)
        assert plan.table is not None
        parts = Parts(as_queries(q_nope), as_queries(q_pe), ckv_cache, kpe_cache, plan.table)
        if ckv_cache.dtype in FLOAT8:
            parts = parts.scaled(ckv_scale, ckv_scale_arr, kpe_scale)
        elif ckv_scale is not None or ckv_scale_arr is not None or kpe_scale is not None:
            scales = {"ckv_scale": ckv_scale, "ckv_scale_arr": ckv_scale_arr, "kpe_scale": kpe_scale}
            unsupported("Scales are for float8 caches.", **scales)
        result = self._attend(plan, parts, out, lse, return_lse, return_lse_base_on_e)
        if plain and self._call is not None and self._call[0] is plan and parts.q_nope is q_nope:
            k, k_rope = ckv_cache.unsqueeze(2), kpe_cache.unsqueeze(2)
            if kpe_cache.shape[-1] and parts.ckv is ckv_cache:
                call, factors = self._call[1], (plan.scale, None, None)
                tensors = q_nope, q_pe, ckv_cache, kpe_cache
                self._again.learn(
                    tensors, lambda: call.usual(tensors, (0, 2, 2, 1, 3), q_nope, k, k, q_pe, k_rope, scales=factors)
                )
        return result

    def forward(
        self,
        q: Tensor,
        kv_cache: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        *,
        sm_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One query a request on joined tensors; the form of the documents, without a plan.

        Args:
            q: ``[B, Hq, 576]``, absorbed queries, rotary columns last.
            kv_cache: ``[P, page, 576]``, likewise; an axis of one head, where the layout has it, may stand in it.
            page_table: int32 [B, max_pages].
            seq_lens: int32 or uint32 [B], tokens of each request.
            sm_scale: Factor on the scores; None: as planned, or ``1 / sqrt(128 + 64)``.
            out: ``[B, Hq, 512]`` in q's dtype, where to write.
            lse: float32 ``[B, Hq]``, where to write.
            return_lse: Also return the LSE.

        Returns:
            The output ``[B, Hq, 512]`` (as many columns as the plan says, if there is one); with ``return_lse`` also
            the LSE, base 2, float32 ``[B, Hq]``.
        """
        kv_cache = joined_cache(kv_cache, self._kv_layout)
        plan = self._plan_for(seq_lens, page_table, kv_cache)
        if sm_scale is not None:
            plan = replace(plan, scale=number_of("sm_scale", sm_scale))
        dim, width = LATENT if plan.dims is None else plan.dims[0], kv_cache.shape[-1]
        if not isinstance(q, Tensor) or q.dim() != 3 or q.shape[-1] != width or width < dim:
            got = tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__
            raise argument_error("q", f"[B, Hq, D] over a cache of D >= {dim} columns", f"{got} over {width}")
        assert plan.table is not None
        q = as_queries(q)
        parts = Parts(q[..., :dim], q[..., dim:], kv_cache[..., :dim], kv_cache[..., dim:], plan.table)
        return self._attend(plan, parts, out, lse, return_lse)

    def forward_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        """``forward`` with ``return_lse=True``."""
        return self.forward(*args, **kwargs, return_lse=True)

    def _plan_for(self, lengths: Tensor | None, page_table: Tensor | None, cache: Tensor) -> _Plan:
        """The plan, or that of one query a request over pages that a call names."""
        if lengths is None and page_table is None:
            plan: _Plan = self._plan()
            return plan
        if lengths is None or page_table is None:
            got = "kv_len" if page_table is None else "page_table"
            raise argument_error("kv_len, page_table", "both or neither", f"{got} alone")
        plan = self._planned or _Plan(DEFAULT_SCALE)
        table = dense_table(page_table, lengths, cache.shape[1], cache.device)
        return replace(plan, table=table, rows=None, longest=None, total=None, page_size=None)

    def _check(self, plan: _Plan, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor) -> None:
        """Raise unless tensors are as planned."""
        named = {"q_nope": q_nope, "q_pe": q_pe, "ckv_cache": ckv_cache, "kpe_cache": kpe_cache}
        for name, t in named.items():
            if not isinstance(t, Tensor) or t.dim() != 3:
                got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                raise argument_error(name, "a tensor of 3 dimensions", got)
        if plan.dtypes is not None:
            for (name, t), dtype in zip(named.items(), (plan.dtypes[0], *plan.dtypes, plan.dtypes[1]), strict=True):
                check_dtype(name, t, dtype)
        if plan.heads is None or plan.dims is None:
            return
        rows = q_nope.shape[0] if plan.total is None else plan.total
        pages = ckv_cache.shape[0], plan.page_size or ckv_cache.shape[1]
        shapes = [(rows, plan.heads, plan.dims[0]), (rows, plan.heads, plan.dims[1])]
        shapes += [(*pages, plan.dims[0]), (*pages, plan.dims[1])]
        for (name, t), shape in zip(named.items(), shapes, strict=True):
            if tuple(t.shape) != shape:
                raise argument_error(name, f"shape {shape}, as planned", f"shape {tuple(t.shape)}")

    def _attend(
        self,
        plan: _Plan,
        parts: Parts,
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
        natural: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k = parts.q_nope, parts.ckv.unsqueeze(2)
        rotary = {"q_rope": parts.q_pe, "k_rope": parts.kpe.unsqueeze(2)} if parts.kpe.shape[-1] else {}
        if out is not None or lse is not None:
            check_results(q, k.shape[-1], q.dtype, out, lse)
        o, sums = self._attention(plan, parts.table)(
            q, k, k, **rotary, scale=plan.scale, k_scale=parts.factor, v_scale=parts.factor, out=out
        )
        if not natural:
            return as_results(o, sums, o.dtype, o, lse, return_lse)
        sums = sums.t().contiguous() if lse is None else lse.copy_(sums.t())
        return (o, sums) if return_lse else o

    def _attention(self, plan: _Plan, table: Table) -> RepeatedAttention:
        """The call that all runs of a plan make; those of other tables are made once."""
        if self._call is not None and self._call[0] is plan and plan.table is table:
            return self._call[1]
        planned = plan is self._planned and plan.table is table
        call = RepeatedAttention(
            *table, cu_seqlens_q=plan.rows, max_seqlen_q=plan.longest, causal=plan.causal, impl=self._impl,
            fixed=planned and not self._graph,
        )  # fmt: skip
        if planned:
            self._call = plan, call
        return call
