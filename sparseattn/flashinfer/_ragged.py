"""Ragged prefill: keys and values packed like the queries, without pages."""

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
    check_dtype,
    check_heads,
    check_indptr,
    fold_scales,
    index_tensor,
    readable,
    resolve_dtypes,
    unsupported,
    usual_form,
)
from sparseattn.flashinfer._prefill import Masking, PrefillWrapper, Rows, float8_scales
from sparseattn.flashinfer._wrapper import as_results, check_fits, check_results, fill
from sparseattn.kernels.launches import differentiable, repeatable
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
        self._usual: dict[tuple[Any, ...], RepeatedBlocks] = {}
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
        usual = None
        if scales[0] is scales[1] is scales[2] is out is lse is None and not return_lse:
            usual = usual_form(q, k, v)
            if usual is not None and usual in self._usual:
                o = self._usual[usual].again(usual, q, k, v)
                if o is not None:
                    return o
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
            return self._dense(q, k, v, folded.scale, out, lse, return_lse, usual)
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
        usual: tuple[Any, ...] | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        o_dtype = self.dtypes.o
        if out is not None or lse is not None:
            check_results(q, self.dims[1], o_dtype, out, lse)
        arguments = {**self._plain_arguments, "scale": scale, "impl": self.impl}
        form = (q.dtype, v.dtype, q.device, q.shape, k.shape, v.shape, scale)
        if not repeatable(q, k, v) or differentiable(q, k, v):
            o, natural = block_sparse_attention(q, k, v, **arguments, **self._lengths(q, k), return_lse=True)
            return as_results(o, natural, o_dtype, out, lse, return_lse)
        if form not in self._blocks:
            self._blocks[form] = repeated_blocks(q, k, v, **arguments, **self._lengths(q, k), fixed=not self.follows)
        direct = out if out is not None and o_dtype == q.dtype and not starts_with(out, q, k, v) else None
        blocks = self._blocks[form]
        o, natural = blocks(q, k, v, None, direct)
        if usual is not None and o.dtype == o_dtype:
            blocks.learn(usual, q, k, v, None, o, natural)
            self._usual[usual] = blocks
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
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing and self._calls is not None and self._calls[0] >= pages:
            return self._calls[1]
        numbers = torch.arange(pages, dtype=torch.int32, device=self.device)
        call = RepeatedAttention(
            self.kv_lens, None, self._page_indptr, numbers, cu_seqlens_q=self.rows.indptr,
            max_seqlen_q=self.rows.longest, custom_mask=self.mask, impl=self.impl, fixed=not self.follows,
            **self._arguments,
        )  # fmt: skip
        if not capturing:  # a graph owns what it allocates, and outlives plans
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


class BatchPrefillWithRaggedKVCacheWrapper(PrefillWrapper):
    """Prefill and append of a batch whose keys and values are packed like its queries.

    ``run(q, k, v)``: q ``[qo_indptr[-1], Hq, D]``; k and v ``[kv_indptr[-1], Hkv, D]`` ("HND": heads first). Indptrs on
    the CPU let the host size launches and check the tensors; those on a GPU are never copied back.

    Args:
        float_workspace_buffer: Says the device; not written to.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: Plans are copied into the buffers, so that a captured ``run`` follows them.
        qo_indptr_buf: int32 [B + 1].
        kv_indptr_buf: int32 [B + 1].
        custom_mask_buf: uint8, packed bits, if plans have masks.
        mask_indptr_buf: int32 [B + 1], with it.
        backend: FlashInfer's names, all of which mean this library's choice; or "triton", "reference". "cudnn" says
            that indptrs count elements instead of tokens.
        jit_args: Must be None.
        jit_kwargs: Must be None.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, numbers or combinations that do not fit.
    """

    _tensors = 3
    _forward = (
        "causal", "pos_encoding_mode", "use_fp16_qk_reduction", "window_left", "logits_soft_cap", "sm_scale",
        "rope_scale", "rope_theta",
    )  # fmt: skip

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, custom_mask_buf, mask_indptr_buf, backend,
            jit_args=jit_args, jit_kwargs=jit_kwargs,
        )  # fmt: skip
        if use_cuda_graph:
            if not isinstance(kv_indptr_buf, Tensor) or kv_indptr_buf.dtype != torch.int32:
                raise argument_error("kv_indptr_buf", "an int32 tensor [B + 1] with use_cuda_graph", kv_indptr_buf)
            self._kv_indptr_buf = kv_indptr_buf
            self._kv_lens_buf = torch.zeros_like(kv_indptr_buf[1:])

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str | None = None,
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Tensor | None = None,
        o_indptr: Tensor | None = None,
        data_type: torch.dtype | str | None = None,
    ) -> None:
        """What ``run`` will compute, until the next plan.

        See ``BatchPrefillWithPagedKVCacheWrapper.plan`` for arguments that are the same; mind the order.

        Args:
            qo_indptr: int32 [B + 1], rows of q of each request.
            kv_indptr: int32 [B + 1], rows of k and v of each request.
            num_qo_heads: Hq, a multiple of Hkv.
            num_kv_heads: Hkv.
            head_dim_qk: Of q and k.
            head_dim_vo: Of v and the output; None: as ``head_dim_qk``.
            seq_lens: Lengths of keys that the indptr says already; not read. Likewise ``seq_lens_q``,
                ``max_sequence_kv``, and ``v_indptr`` and ``o_indptr``: values lie where keys do, outputs where queries
                do.
        """
        if self._backend == "cudnn":
            qo_indptr, kv_indptr = qo_indptr // (num_qo_heads * head_dim_qk), kv_indptr // (num_kv_heads * head_dim_qk)
        dtypes = resolve_dtypes(q_data_type, kv_data_type, o_data_type, data_type)
        rows = self._rows(qo_indptr, max_token_per_sequence, non_blocking)
        check_indptr("kv_indptr", kv_indptr)
        kv_host = kv_indptr.tolist() if readable(kv_indptr) else None
        starts = index_tensor("kv_indptr", kv_indptr, self.device, 1, non_blocking)
        if starts.shape != rows.indptr.shape:
            expected = f"shape {tuple(rows.indptr.shape)} like qo_indptr"
            raise argument_error("kv_indptr", expected, f"shape {tuple(starts.shape)}")
        lengths = starts.diff()
        masking = Masking(
            custom_mask, packed_custom_mask, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len
        )
        options = Options(
            masking.causal(causal), pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta
        )
        kv_sizes = None if kv_host is None else [b - a for a, b in itertools.pairwise(kv_host)]
        mask = self._mask(masking, rows, lengths, kv_sizes, non_blocking)
        if self.is_cuda_graph_enabled:  # its buffers are filled last, when all of the plan has turned out well
            check_heads(num_qo_heads, num_kv_heads)
            options.arguments(num_qo_heads, head_dim_qk, self.device)
            check_fits("kv_indptr", self._kv_indptr_buf, starts, exact=True)
            fill("kv_indptr", self._kv_indptr_buf, starts, non_blocking)
            self._kv_lens_buf.copy_(lengths)
            starts, lengths, kv_host = self._kv_indptr_buf, self._kv_lens_buf, None
        rows, mask = self._keep(rows, mask, non_blocking)
        self._planned = RaggedPlan(
            rows, starts, lengths, kv_host, num_qo_heads, num_kv_heads, (head_dim_qk, head_dim_vo or head_dim_qk),
            self._kv_layout, options, self.device, dtypes, mask, self._impl, self.is_cuda_graph_enabled,
        )  # fmt: skip

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        o_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as planned.

        Args:
            q: ``[qo_indptr[-1], Hq, D]``, any strides.
            k: ``[kv_indptr[-1], Hkv, D]`` ("HND": ``[Hkv, kv_indptr[-1], D]``), any strides.
            v: Likewise, of the planned value dimension.
            args: ``scale_q, scale_k, scale_v`` with float8 queries.
            q_scale: What queries are multiplied by: a number, or float32 of one element or [Hq].
            k_scale: Likewise; [Hkv].
            v_scale: Likewise; [Hkv].
            o_scale: Must be None.
            out: ``[qo_indptr[-1], Hq, Dv]`` in the planned output dtype.
            lse: float32 ``[qo_indptr[-1], Hq]``.
            return_lse: Also return the LSE.
            enable_pdl: Not used.
            kv_cache_sf: Must be None.

        Returns:
            The output ``[qo_indptr[-1], Hq, Dv]``; with ``return_lse`` also the LSE, base 2, float32
            ``[qo_indptr[-1], Hq]``.
        """
        plan = self._plan()
        if o_scale is not None or kv_cache_sf is not None:
            unsupported("NVFP4 caches and scaled outputs are not supported.", o_scale=o_scale, kv_cache_sf=kv_cache_sf)
        if self.is_cuda_graph_enabled:
            self._check_rows(q)
        return plan.run(q, k, v, float8_scales(args, q, (q_scale, k_scale, v_scale)), out, lse, return_lse)
