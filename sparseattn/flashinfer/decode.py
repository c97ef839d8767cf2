"""Decode attention by FlashInfer's names: one request, batches over paged caches, and calls without a plan."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._buffers import TableBuffers
from sparseattn.flashinfer._checks import described
from sparseattn.flashinfer._common import (
    Options,
    as_queries,
    check_indptr,
    csr_table,
    dense_cache,
    fold_scales,
    implementation,
    resolve_dtypes,
    unsupported,
)
from sparseattn.flashinfer._decode_fronts import cudnn_batch_decode_with_kv_cache as cudnn_batch_decode_with_kv_cache
from sparseattn.flashinfer._decode_fronts import trtllm_batch_decode_with_kv_cache as trtllm_batch_decode_with_kv_cache
from sparseattn.flashinfer._decode_fronts import xqa_batch_decode_with_kv_cache as xqa_batch_decode_with_kv_cache
from sparseattn.flashinfer._wrapper import PagedPlan, Wrapper, attend

_Dtype = torch.dtype | str | None


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query, the last token of its request, over a dense cache.

    Args:
        q: ``[Hq, D]``, float16, bfloat16 or float32 (float8 is computed in bfloat16).
        k: ``[L, Hkv, D]`` ("HND": ``[Hkv, L, D]``), in q's dtype or float8.
        v: Likewise, its head dimension may differ.
        kv_layout: "NHD" or "HND".
        pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI", see ``_common.positions_of``.
        use_tensor_cores: Accepted; this library chooses.
        q_scale: Factor on q, a number or a tensor of one element or one a head.
        k_scale: Likewise for keys, one a KV head.
        v_scale: Likewise for values.
        window_left: Keys before the query that stay visible; negative: all.
        logits_soft_cap: Scores become ``cap * tanh(score / cap)``; None or 0: not.
        sm_scale: Factor on the scores; default ``1 / sqrt(D)``.
        rope_scale: Positions are divided by it; default 1.
        rope_theta: Default 1e4.
        return_lse: Also return the LSE.

    Returns:
        ``[Hq, D]``, and with ``return_lse`` the base-2 LSE, float32 ``[Hq]``. An empty cache gives 0 and -inf.
    """
    if not isinstance(q, Tensor) or q.dim() != 2:
        raise argument_error("q", "[num_qo_heads, head_dim]", described(q), kind=TypeError)
    options = Options(True, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
    arguments = options.arguments(q.shape[0], q.shape[1], q.device)
    scales = fold_scales(arguments.pop("scale"), q_scale, k_scale, v_scale)
    got = attend(
        as_queries(q[None], scales.q), dense_cache(k, v, kv_layout), return_lse=return_lse, scale=scales.scale,
        k_scale=scales.k, v_scale=scales.v, **arguments,
    )  # fmt: skip
    return got[0] if isinstance(got, Tensor) else (got[0][0], got[1][0])


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    """Decode of a batch over a paged cache: ``plan`` once a step, ``run`` once a layer.

    Nothing waits for the device: lengths are computed where the page table lies, and keys are cut into shares there.
    With ``use_cuda_graph`` a plan is copied into the caller's buffers in place, so a captured ``run`` follows later
    plans of the same batch size.

    Args:
        float_workspace_buffer: Says the device; not written to, any size.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: Keep the page table in the three buffers below.
        use_tensor_cores: Accepted; this library chooses.
        paged_kv_indptr_buffer: int32 ``[batch + 1]``.
        paged_kv_indices_buffer: int32, as many entries as a plan may ever have.
        paged_kv_last_page_len_buffer: int32 ``[batch]``.
        backend: FlashInfer's names leave the choice to this library; "triton" or "reference" is run or refused.
        jit_args: None: variants written in CUDA are not served.
    """

    _forward = (
        "pos_encoding_mode", "q_scale", "k_scale", "v_scale", "window_left", "logits_soft_cap", "sm_scale",
        "rope_scale", "rope_theta",
    )  # fmt: skip

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: object = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        unsupported("Variants compiled from CUDA source have no counterpart here.", jit_args=jit_args)
        self._impl = implementation(backend)
        self.use_tensor_cores = use_tensor_cores
        self._buffers: TableBuffers | None = None
        if use_cuda_graph:
            self._buffers = TableBuffers(paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self._rows: tuple[tuple[int, int], Tensor | None] = ((0, 0), None)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._buffers is not None

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: _Dtype = None,
        kv_data_type: _Dtype = None,
        o_data_type: _Dtype = None,
        data_type: _Dtype = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        window_right: int = 0,
    ) -> None:
        """Say what the next runs work on.

        Args:
            indptr: int32 ``[B + 1]``, on any device: request b owns ``indices[indptr[b]:indptr[b + 1]]``.
            indices: int32 ``[nnz]``, page numbers.
            last_page_len: int32 ``[B]``, tokens in each request's last page, 1..page_size; those of the queries count.
            num_qo_heads: Hq, a multiple of the next.
            num_kv_heads: Hkv.
            head_dim: D.
            page_size: Tokens of a page, 1..256.
            pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI".
            window_left: Keys before a query that stay visible; negative: all.
            logits_soft_cap: Cap of the scores; None or 0: none.
            q_data_type: Of the queries; default float16, or what ``data_type`` says.
            kv_data_type: Of the cache; default as the queries.
            o_data_type: Of the output; default as the queries (bfloat16 for float8).
            data_type: Of queries and cache; float8 of the cache alone.
            sm_scale: Factor on the scores; default ``1 / sqrt(D)``.
            rope_scale: Positions are divided by it; default 1.
            rope_theta: Default 1e4.
            non_blocking: For what is copied from the CPU.
            block_tables: Accepted; the three tensors above say the same.
            seq_lens: Likewise.
            fixed_split_size: Accepted: results never depend on how keys are cut into shares of other requests.
            disable_split_kv: Likewise.
            q_len_per_req: Queries of each request, its last tokens, causal among themselves.
            window_right: Only 0.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: Shapes or numbers that do not fit; with CUDA graphs, another batch size than the buffers'.
        """
        if window_right:
            unsupported("Decode sees nothing right of its queries.", window_right=window_right)
        if isinstance(q_len_per_req, bool) or not isinstance(q_len_per_req, int) or q_len_per_req < 1:
            raise argument_error("q_len_per_req", "a number of at least 1", repr(q_len_per_req))
        if self._buffers is None:
            table = csr_table(indptr, indices, last_page_len, page_size, self.device, non_blocking)
        else:
            if self._planned is not None and self._planned.max_seqlen_q != q_len_per_req:
                hint = "A captured graph has one shape: take another wrapper."
                raise argument_error(
                    "q_len_per_req", f"{self._planned.max_seqlen_q}, as first planned", q_len_per_req, hint
                )
            table = self._buffers.fill(indptr, indices, last_page_len, page_size, non_blocking)
        batch = table.seq_lens.shape[0]
        options = Options(True, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        self._planned = PagedPlan(
            table,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            self._kv_layout,
            options,
            self.device,
            resolve_dtypes(q_data_type, kv_data_type, o_data_type, data_type),
            cu_seqlens_q=self._cu_seqlens(batch, q_len_per_req),
            max_seqlen_q=q_len_per_req,
            total_q=batch * q_len_per_req,
            impl=self._impl,
            follows=self.is_cuda_graph_enabled,
        ).after(self._planned)

    def _with_rows(self, plan: PagedPlan, rows: int) -> PagedPlan:
        """The plan for another number of queries a request, as old code says it at ``run``."""
        batch = plan.table.seq_lens.shape[0]
        if self._buffers is not None or isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            expected = f"{plan.max_seqlen_q}, as planned"
            raise argument_error("q_len_per_req", expected, rows, "A captured graph has one shape.")
        return replace(plan, cu_seqlens_q=self._cu_seqlens(batch, rows), max_seqlen_q=rows, total_q=batch * rows)

    def _cu_seqlens(self, batch: int, rows: int) -> Tensor | None:
        """Where each request's queries begin; the same tensor as long as the shape is, for captured graphs."""
        if rows == 1:
            return None
        if self._rows[0] != (batch, rows):
            self._rows = (batch, rows), torch.arange(batch + 1, dtype=torch.int32, device=self.device) * rows
        return self._rows[1]

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *args: Tensor,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: object = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one layer, as planned.

        Args:
            q: ``[B * q_len_per_req, Hq, D]``, request by request.
            paged_kv_cache: ``[P, 2, page, Hkv, D]`` ("HND": ``[P, 2, Hkv, page, D]``), or keys and values apart.
            args: None: they are for ``jit_args``.
            q_scale: Factor on q, a number or a tensor of one element or one a head.
            k_scale: Likewise for keys, one a KV head.
            v_scale: Likewise for values.
            out: ``[B * q_len_per_req, Hq, D]`` in the planned dtype, where to write.
            lse: float32 ``[B * q_len_per_req, Hq]``, where to write.
            return_lse: Also return the LSE.
            enable_pdl: Accepted.
            window_left: None, or as planned.
            sinks: float32 ``[Hq]``, logits that join the softmax denominator only.
            q_len_per_req: Deprecated: instead of ``plan``'s; None as planned.
            skip_softmax_threshold_scale_factor: Accepted: nothing is skipped, results are those of exact attention.
            kv_cache_sf: None: NVFP4 caches are not served.

        Returns:
            The output, and with ``return_lse`` the base-2 LSE, float32, without the sinks. Requests without tokens
            have output 0 and LSE -inf.

        Raises:
            RuntimeError: No plan yet.
            TypeError: A wrong type or dtype; the message names what was planned.
            ValueError: Shapes, devices or numbers that do not fit.
        """
        plan = self._planned
        plain = lse is window_left is sinks is q_len_per_req is kv_cache_sf is None
        if plain and not (return_lse or args or plan is None):
            o: Tensor | None = plan.again(q, paged_kv_cache, (q_scale, k_scale, v_scale), out)
            if o is not None:
                return o
        plan = self._plan()
        if args:
            raise argument_error("run", "no further positional arguments", f"{len(args)}", "jit_args is not served.")
        if kv_cache_sf is not None:
            unsupported("NVFP4 caches are not served.", kv_cache_sf=kv_cache_sf)
        if window_left is not None and window_left != plan.options.window_left:
            raise argument_error("window_left", f"{plan.options.window_left}, as planned", window_left)
        if q_len_per_req is not None and q_len_per_req != plan.max_seqlen_q:
            plan = self._planned = self._with_rows(plan, q_len_per_req)
        if isinstance(q, Tensor) and q.dim() and q.shape[0] != plan.total_q:
            expected = f"{plan.total_q} rows, q_len_per_req = {plan.max_seqlen_q} a request, as planned"
            raise argument_error("q", expected, f"shape {tuple(q.shape)}")
        return plan.run(
            q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, sinks=sinks, out=out, lse=lse,
            return_lse=return_lse,
        )  # fmt: skip


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """``BatchDecodeWithPagedKVCacheWrapper`` with ``use_cuda_graph=True``."""

    def __init__(
        self,
        workspace_buffer: Tensor,
        indptr_buffer: Tensor,
        indices_buffer: Tensor,
        last_page_len_buffer: Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer
        )


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: _Dtype = None,
    kv_data_type: _Dtype = None,
    data_type: _Dtype = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: Tensor | None = None,
) -> None:
    """``self.plan`` in the form that SGLang calls: plans here copy nothing from the device, so there is one kind.

    ``global_override_indptr_cpu`` is a host copy of ``indptr``, which is checked and not needed otherwise.
    """
    if global_override_indptr_cpu is not None:
        check_indptr("global_override_indptr_cpu", global_override_indptr_cpu)
    type(self).plan(  # not self.plan, in whose place callers put this function
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode,
        window_left, logits_soft_cap, q_data_type, kv_data_type, None, data_type, sm_scale, rope_scale, rope_theta,
        non_blocking, None, None, fixed_split_size, disable_split_kv, q_len_per_req,
    )  # fmt: skip
