"""FlashInfer's ``flashinfer.prefill``: prefill and append, of one request and of batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._buffers import TableBuffers
from sparseattn.flashinfer._common import (
    Dtypes,
    Options,
    Table,
    check_heads,
    check_indptr,
    csr_table,
    readable,
    resolve_dtypes,
    unsupported,
)
from sparseattn.flashinfer._lengths import lengths_table
from sparseattn.flashinfer._prefill import Masking, PrefillWrapper, float8_scales
from sparseattn.flashinfer._prefill_fronts import cudnn_batch_prefill_with_kv_cache as cudnn_batch_prefill_with_kv_cache
from sparseattn.flashinfer._prefill_fronts import (
    trtllm_batch_context_with_kv_cache as trtllm_batch_context_with_kv_cache,
)
from sparseattn.flashinfer._ragged import BatchPrefillWithRaggedKVCacheWrapper as BatchPrefillWithRaggedKVCacheWrapper
from sparseattn.flashinfer._single_prefill import single_prefill_with_kv_cache as single_prefill_with_kv_cache
from sparseattn.flashinfer._single_prefill import (
    single_prefill_with_kv_cache_return_lse as single_prefill_with_kv_cache_return_lse,
)
from sparseattn.flashinfer._wrapper import PagedPlan
from sparseattn.ops.paged import lengths_from_last_pages

_Dtype = torch.dtype | str | None


class BatchPrefillWithPagedKVCacheWrapper(PrefillWrapper):
    """Prefill and append of a batch over a cache in pages; decode may be mixed in.

    ``run(q, paged_kv_cache)``: q ``[qo_indptr[-1], Hq, D]``. The cache is ``[P, 2, page, Hkv, D]`` ("HND": ``[P, 2,
    Hkv, page, D]``), or keys and values apart. Indptrs on the CPU let the host size launches and check the tensors;
    those on a GPU are never copied back. Nothing but the pages of a request is read.

    Args:
        float_workspace_buffer: Says the device; not written to.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: Plans are copied into the buffers, so that a captured ``run`` follows them.
        qo_indptr_buf: int32 [B + 1].
        paged_kv_indptr_buf: int32 [B + 1].
        paged_kv_indices_buf: int32, of the most pages.
        paged_kv_last_page_len_buf: int32 [B].
        custom_mask_buf: uint8, packed bits, if plans have masks.
        mask_indptr_buf: int32 [B + 1], with it.
        backend: FlashInfer's names, all of which mean this library's choice; or "triton", "reference". "cudnn" says
            that ``qo_indptr`` counts elements instead of tokens, and that the cache is "HND", which FlashInfer's takes
            by the name of "NHD".
        jit_args: Must be None.
        jit_kwargs: Must be None.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, numbers or combinations that do not fit.
    """

    _forward = (
        "causal", "pos_encoding_mode", "use_fp16_qk_reduction", "k_scale", "v_scale", "window_left", "logits_soft_cap",
        "sm_scale", "rope_scale", "rope_theta",
    )  # fmt: skip

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
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
        if backend == "cudnn":
            self._kv_layout = "HND"
        if use_cuda_graph:
            self._buffers = TableBuffers(
                paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf, "buf", "paged_kv_"
            )

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
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
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        data_type: torch.dtype | str | None = None,
    ) -> None:
        """What ``run`` will compute, until the next plan.

        Args:
            qo_indptr: int32 [B + 1], rows of q of each request, ascending from 0.
            paged_kv_indptr: int32 [B + 1], ascending from 0: request b owns the pages
                ``paged_kv_indices[paged_kv_indptr[b]:paged_kv_indptr[b + 1]]``.
            paged_kv_indices: int32, page numbers.
            paged_kv_last_page_len: int32 [B], tokens in the last page, 1..page_size; not read where there is no page.
            num_qo_heads: Hq, a multiple of Hkv.
            num_kv_heads: Hkv.
            head_dim_qk: Of queries and keys.
            page_size: Tokens of a page, 1..256.
            head_dim_vo: Of values and the output; None: as ``head_dim_qk``.
            custom_mask: bool, every request's ``[qo_len, kv_len]`` row by row, one after the other; True keeps. Takes
                the place of ``causal``, for this plan. What a short mask does not cover is hidden (and a named error
                where lengths are on the CPU).
            packed_custom_mask: uint8, the same 8 entries a byte in "little" bit order, every request starting a byte
                of its own (``segment_packbits(mask, indptr, bitorder="little")``). Counts if both are given.
            causal: Query i of a request sees key j only if ``j <= i + kv_len - qo_len``.
            pos_encoding_mode: "NONE", "ROPE_LLAMA" (un-rotated cache) or "ALIBI".
            use_fp16_qk_reduction: Not used: scores are always float32.
            sm_scale: Factor on the scores; None: ``1 / sqrt(head_dim_qk)``.
            window_left: Keys before the diagonal that stay visible; -1: all.
            logits_soft_cap: Scores become ``cap * tanh(score / cap)``; None or 0: not at all.
            rope_scale: Positions are divided by it; None: 1.
            rope_theta: Base of RoPE's frequencies; None: 1e4.
            q_data_type: Of queries, checked by ``run``; None: float16.
            kv_data_type: Of the cache; None: as the queries.
            o_data_type: Of outputs; None: as the queries, bfloat16 for float8 ones.
            non_blocking: Whether copies to the device may be under way when this returns.
            prefix_len_ptr: Integers [B]: multi-item scoring, see ``item_mask``. The mask's size comes from the lengths,
                for which this waits unless they are on the CPU.
            token_pos_in_items_ptr: With it.
            token_pos_in_items_len: With it.
            max_item_len_ptr: Not used.
            seq_lens: int32 or uint32 [B], tokens of each request; None: what pages and ``paged_kv_last_page_len`` say.
            seq_lens_q: Not used: ``qo_indptr`` says it.
            block_tables: Not used: ``paged_kv_indices`` says it.
            max_token_per_sequence: A bound of query lengths, if ``qo_indptr`` is on the device and one is known.
            max_sequence_kv: Not used.
            fixed_split_size: Not used. The same call gives the same bits, whatever was planned.
            disable_split_kv: Not used.
            data_type: Of queries and cache both, where the others are not given.
        """
        if self._backend == "cudnn":
            qo_indptr = qo_indptr // (num_qo_heads * head_dim_qk)
        masking = Masking(
            custom_mask, packed_custom_mask, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len
        )
        self._planned = self._make_plan(
            qo_indptr, (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len), seq_lens, masking,
            max_token_per_sequence, non_blocking, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk, page_size=page_size, head_dim_vo=head_dim_vo,
            options=Options(
                masking.causal(causal), pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale,
                rope_theta,
            ),
            dtypes=self._resolve_dtypes(q_data_type, kv_data_type, o_data_type, data_type),
        )  # fmt: skip

    def _resolve_dtypes(self, q: _Dtype, kv: _Dtype, o: _Dtype, both: _Dtype) -> Dtypes:
        return resolve_dtypes(q, kv, o, both)

    def _make_plan(
        self,
        qo_indptr: Tensor,
        table: tuple[Tensor, Tensor, Tensor],
        seq_lens: Tensor | None,
        masking: Masking,
        longest: int | None,
        non_blocking: bool,
        **fields: Any,
    ) -> PagedPlan:
        rows = self._rows(qo_indptr, longest, non_blocking)
        page_size = fields["page_size"]
        check_indptr("paged_kv_indptr", table[0])
        if table[0].shape != qo_indptr.shape:
            expected = f"shape {tuple(qo_indptr.shape)} like qo_indptr"
            raise argument_error("paged_kv_indptr", expected, f"shape {tuple(table[0].shape)}")
        lengths = seq_lens
        if lengths is None and masking.any and readable(table[0], table[2]):
            lengths = lengths_from_last_pages(table[0], table[2], page_size)
        graph = self.is_cuda_graph_enabled
        pages = mask = None
        if not graph or masking.any or seq_lens is not None:
            pages = self._table(table, seq_lens, page_size, non_blocking)
            kv_host = lengths.tolist() if lengths is not None and readable(lengths) else None
            mask = self._mask(masking, rows, pages.seq_lens, kv_host, non_blocking)
        if graph:  # its buffers are filled last, when all of the plan has turned out well
            check_heads(fields["num_qo_heads"], fields["num_kv_heads"])
            fields["options"].arguments(fields["num_qo_heads"], fields["head_dim"], self.device)
            held = self._buffers.fill(*table, page_size, non_blocking)
            if pages is not None:
                held.seq_lens.copy_(pages.seq_lens)
            pages = held
        assert pages is not None
        rows, mask = self._keep(rows, mask, non_blocking)
        return PagedPlan(
            table=pages, kv_layout=self._kv_layout, device=self.device, cu_seqlens_q=rows.indptr,
            max_seqlen_q=rows.longest, total_q=rows.total, custom_mask=mask, impl=self._impl, follows=graph,
            **fields,
        ).after(self._planned)  # fmt: skip

    def _table(
        self, table: tuple[Tensor, Tensor, Tensor], seq_lens: Tensor | None, page_size: int, non_blocking: bool
    ) -> Table:
        if seq_lens is None:
            return csr_table(*table, page_size, self.device, non_blocking, "paged_kv_")
        names = "paged_kv_indptr", "paged_kv_indices", "seq_lens"
        return lengths_table(*table[:2], seq_lens, page_size, self.device, non_blocking, names)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *args: Any,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: Tensor | tuple[Tensor, Tensor] | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
        sm_scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as planned.

        Args:
            q: ``[qo_indptr[-1], Hq, D]``, any strides. Where the host does not know ``qo_indptr[-1]`` (and under CUDA
                graphs), rows past it are allowed and give 0 and -inf.
            paged_kv_cache: ``[P, 2, page, Hkv, D]`` ("HND": ``[P, 2, Hkv, page, D]``), or keys and values without the
                axis of 2; without the axis of pages, too, if they have one token. Any strides.
            args: ``scale_q, scale_k, scale_v`` with float8 queries.
            q_scale: What queries are multiplied by: a number, or float32 of one element or [Hq].
            k_scale: Likewise; [Hkv].
            v_scale: Likewise; [Hkv].
            out: ``[qo_indptr[-1], Hq, Dv]`` in the planned output dtype.
            lse: float32 ``[qo_indptr[-1], Hq]``.
            return_lse: Also return the LSE.
            enable_pdl: Not used.
            window_left: Another window for this call; None: as planned.
            sinks: Logits [Hq] that join the denominator only; the LSE is without them.
            kv_cache_sf: Must be None.
            skip_softmax_threshold_scale_factor: Not used: nothing is skipped.
            use_fp16_softmax: Not used: the softmax is float32.
            uses_spcompress: Must be None or False.
            sm_scale: Another scale for this call; None: as planned.

        Returns:
            The output ``[qo_indptr[-1], Hq, Dv]``; with ``return_lse`` also the LSE, base 2, float32
            ``[qo_indptr[-1], Hq]``.
        """
        plan = self._planned
        plain = lse is window_left is sinks is kv_cache_sf is sm_scale is None
        if plain and not (uses_spcompress or return_lse or args or self.is_cuda_graph_enabled or plan is None):
            o: Tensor | None = plan.again(q, paged_kv_cache, (q_scale, k_scale, v_scale), out)
            if o is not None:
                return o
        if plan is None or window_left is not None or sm_scale is not None:
            plan = self._variant(window_left=window_left, sm_scale=sm_scale)
        if kv_cache_sf is not None or uses_spcompress:
            hint = "NVFP4 and compressed caches are not served."
            unsupported(hint, kv_cache_sf=kv_cache_sf, uses_spcompress=uses_spcompress or None)
        if self.is_cuda_graph_enabled:
            self._check_rows(q)
        if args:
            q_scale, k_scale, v_scale = float8_scales(args, q, (q_scale, k_scale, v_scale))
        return plan.run(
            q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, sinks=sinks, out=out, lse=lse,
            return_lse=return_lse,
        )  # fmt: skip
