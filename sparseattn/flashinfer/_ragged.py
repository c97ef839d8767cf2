"""Ragged prefill: keys and values packed like the queries, without pages."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._buffers import check_fits, fill
from sparseattn.flashinfer._common import (
    Options,
    check_heads,
    check_indptr,
    index_tensor,
    readable,
    resolve_dtypes,
    unsupported,
)
from sparseattn.flashinfer._prefill import Masking, PrefillWrapper, float8_scales
from sparseattn.flashinfer._ragged_plan import RaggedPlan


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
        plan = self._planned
        plain = q_scale is k_scale is v_scale is o_scale is out is lse is kv_cache_sf is None
        if plain and not (return_lse or args or self.is_cuda_graph_enabled or plan is None):
            o: Tensor | None = plan.again(q, k, v)
            if o is not None:
                return o
        plan = self._plan()
        if o_scale is not None or kv_cache_sf is not None:
            unsupported("NVFP4 caches and scaled outputs are not supported.", o_scale=o_scale, kv_cache_sf=kv_cache_sf)
        if self.is_cuda_graph_enabled:
            self._check_rows(q)
        return plan.run(q, k, v, float8_scales(args, q, (q_scale, k_scale, v_scale)), out, lse, return_lse)
