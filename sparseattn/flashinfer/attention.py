"""FlashInfer's ``flashinfer.attention``: prefill and decode mixed in one call, and attention with sinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import Dtypes, Options, check_dtype, dtype_of, readable, resolve_dtypes, unsupported
from sparseattn.flashinfer._lengths import lengths_table
from sparseattn.flashinfer._wrapper import PagedPlan, Wrapper, query_rows
from sparseattn.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

_Dtype = torch.dtype | str | None


class BatchAttention(Wrapper):
    """Attention of a batch that mixes prefill and decode over a paged cache, in one call.

    ``run(q, kv_cache)`` returns the output and the LSE. ``forward(q, k, v)``, the form of the documents, returns the
    output alone.

    Keys and values of 3 dimensions, ``[tokens, Hkv, D]``, are a cache of pages of one token: then ``kv_indptr`` and
    ``kv_indices`` count tokens, whatever ``page_size`` the plan said.

    Args:
        kv_layout: "NHD" or "HND".
        device: Where to work; None: CUDA where there is a GPU, else the CPU.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, numbers or combinations that do not fit.
    """

    def __init__(self, kv_layout: str = "NHD", device: str | torch.device | None = None) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(torch.empty(0, device=device), kv_layout)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str | None = None,
        kv_data_type: torch.dtype | str | None = None,
        use_profiler: bool = False,
    ) -> None:
        """What ``run`` will compute, until the next plan.

        Args:
            qo_indptr: int32 [B + 1], rows of q of each request, ascending from 0.
            kv_indptr: int32 [B + 1], ascending from 0: which of ``kv_indices`` a request owns.
            kv_indices: int32, page numbers.
            kv_len_arr: int32 [B], tokens of each request (not of its last page).
            num_qo_heads: Hq, a multiple of Hkv.
            num_kv_heads: Hkv.
            head_dim_qk: Of queries and keys.
            head_dim_vo: Of values and the output.
            page_size: Tokens of a page, 1..256.
            causal: Query i of a request sees key j only if ``j <= i + kv_len - qo_len``.
            sm_scale: Factor on the scores; None: ``1 / sqrt(head_dim_qk)``.
            logits_soft_cap: Scores become ``cap * tanh(score / cap)``; None or 0: not at all. Holds for ``run``.
            q_data_type: Of queries, checked by ``run``; None: whatever comes.
            kv_data_type: Of keys and values, likewise; None: as the queries, or float8.
            use_profiler: Must be False.
        """
        unsupported("Profile with torch.profiler.", use_profiler=use_profiler or None)
        alone = kv_data_type if q_data_type is None else None
        self._kv_dtype = None if alone is None else dtype_of("kv_data_type", alone)
        rows, longest, total = query_rows(qo_indptr, self.device)
        dtypes = None if q_data_type is None else resolve_dtypes(q_data_type, kv_data_type)
        self._planned = PagedPlan(
            lengths_table(kv_indptr, kv_indices, kv_len_arr, page_size, self.device),
            num_qo_heads, num_kv_heads, head_dim_qk, page_size, self._kv_layout,
            Options(bool(causal), sm_scale=sm_scale, logits_soft_cap=logits_soft_cap), self.device,
            dtypes, head_dim_vo, rows, longest, total, follows=False,
        )  # fmt: skip
        self._fits_tokens = not (
            readable(kv_indptr, kv_len_arr) and bool((kv_len_arr.reshape(-1).long() > kv_indptr.diff()).any())
        )
        self._token_plan: tuple[PagedPlan, PagedPlan] | None = None

    def run(
        self,
        q: Tensor,
        kv_cache: Tensor | tuple[Tensor, Tensor],
        out: Tensor | None = None,
        lse: Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        logits_soft_cap: float | None = None,
        profiler_buffer: Tensor | None = None,
        kv_cache_sf: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention as planned.

        Args:
            q: ``[qo_indptr[-1], Hq, D]``, any strides.
            kv_cache: ``[P, 2, page, Hkv, D]`` ("HND": ``[P, 2, Hkv, page, D]``), or keys and values without the axis of
                2. Without the axis of pages they are pages of one token, whatever was planned.
            out: ``[qo_indptr[-1], Hq, Dv]`` in q's dtype (bfloat16 for float8).
            lse: float32 ``[qo_indptr[-1], Hq]``.
            k_scale: What keys are multiplied by: a number, or float32 of one element or [Hkv].
            v_scale: Likewise for values.
            logits_soft_cap: Another cap for this call; None or 0: as planned.
            profiler_buffer: Must be None.
            kv_cache_sf: Must be None.

        Returns:
            The output ``[qo_indptr[-1], Hq, Dv]`` and the LSE, base 2, float32 ``[qo_indptr[-1], Hq]``.
        """
        if profiler_buffer is not None or kv_cache_sf is not None:
            hint = "There are no NVFP4 caches, and no profiler."
            unsupported(hint, profiler_buffer=profiler_buffer, kv_cache_sf=kv_cache_sf)
        plan = self._plan_for(kv_cache, logits_soft_cap or None)
        if self._kv_dtype is not None:
            check_dtype("kv_cache", kv_cache if isinstance(kv_cache, Tensor) else kv_cache[0], self._kv_dtype)
        got = plan.run(q, kv_cache, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse, return_lse=True)
        assert isinstance(got, tuple)
        return got

    def forward(self, q: Tensor, k: Tensor | tuple[Tensor, Tensor], v: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``run`` on keys and values apart (or on a cache); the output alone.

        Args:
            q: ``[qo_indptr[-1], Hq, D]``.
            k: Keys, or a cache as ``run`` takes it.
            v: Values; None with a cache.
            kwargs: Others of ``run``.
        """
        return self.run(q, k if v is None else (k, v), **kwargs)[0]  # type: ignore[arg-type]

    def _plan_for(self, kv_cache: Tensor | tuple[Tensor, Tensor], cap: float | None) -> PagedPlan:
        """The plan with that soft cap, if it is given, and in pages of one token if that is what the cache has."""
        plan: PagedPlan = self._variant(logits_soft_cap=cap)
        one = kv_cache[0] if isinstance(kv_cache, tuple | list) and kv_cache else kv_cache
        if not isinstance(one, Tensor):
            raise argument_error("kv_cache", "a tensor, or keys and values", type(one).__name__, kind=TypeError)
        if plan.page_size == 1 or one.dim() != (4 if one is kv_cache else 3):
            return plan
        if not self._fits_tokens:
            hint = "Without an axis of pages, kv_indptr and kv_indices count tokens."
            raise argument_error("kv_cache", f"pages of {plan.page_size} tokens, as planned", "single tokens", hint)
        if self._token_plan is None or self._token_plan[0] is not plan:
            self._token_plan = plan, replace(plan, page_size=1)
        return self._token_plan[1]


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """Batch prefill and decode over a paged cache with attention sinks: ``run(q, kv_cache, sink, sm_scale)``.

    A sink is a logit of each query head, on the scale of scaled scores, that joins the softmax denominator only; the
    LSE is without it. Dtypes, head dimensions and the window are said here, and hold for plans that do not say them.

    Args:
        float_workspace_buffer: As for ``BatchPrefillWithPagedKVCacheWrapper``, and so up to ``backend``.
        kv_layout: Likewise.
        use_cuda_graph: Likewise.
        qo_indptr_buf: Likewise.
        paged_kv_indptr_buf: Likewise.
        paged_kv_indices_buf: Likewise.
        paged_kv_last_page_len_buf: Likewise.
        custom_mask_buf: Likewise.
        mask_indptr_buf: Likewise.
        backend: Likewise.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI".
        use_fp16_qk_reduction: Not used: scores are always float32.
        q_data_type: Of queries.
        kv_data_type: Of the cache.
        head_dim_qk: Of queries and keys.
        head_dim_vo: Of values.
        window_left: Keys before the diagonal that stay visible; -1: all.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, numbers or combinations that do not fit, such as a plan that says something else.
    """

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
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: torch.dtype | str = torch.bfloat16,
        kv_data_type: torch.dtype | str = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf,
            paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf, backend,
        )  # fmt: skip
        self._dtypes = resolve_dtypes(q_data_type, kv_data_type)
        self._dims = head_dim_qk, head_dim_vo
        self._said = Options(pos_encoding_mode=pos_encoding_mode, window_left=window_left)

    def _resolve_dtypes(self, q: _Dtype, kv: _Dtype, o: _Dtype, both: _Dtype) -> Dtypes:
        if both is None:
            q, kv = q or self._dtypes.q, kv or self._dtypes.kv
        said = super()._resolve_dtypes(q, kv, o, both)
        if said[:2] != self._dtypes[:2]:
            expected = f"{self._dtypes[:2]}, as the wrapper was made for"
            raise argument_error("q_data_type, kv_data_type", expected, said[:2], kind=TypeError)
        return said

    def _make_plan(self, *args: Any, **fields: Any) -> PagedPlan:
        options: Options = fields["options"]
        dims = fields["head_dim"], fields["head_dim_vo"] or self._dims[1]
        if dims != self._dims:
            raise argument_error("head_dim_qk, head_dim_vo", f"{self._dims}, as the wrapper was made for", dims)
        for name, none in (("window_left", -1), ("pos_encoding_mode", "NONE")):
            said, planned = getattr(self._said, name), getattr(options, name)
            if planned not in (none, said):
                raise argument_error(name, f"{said!r}, as the wrapper was made for", repr(planned))
            options = options._replace(**{name: said})
        return super()._make_plan(*args, **{**fields, "head_dim_vo": dims[1], "options": options})

    def run(  # type: ignore[override]
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        sink: Tensor | None = None,
        sm_scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as planned.

        Args:
            q: As for ``BatchPrefillWithPagedKVCacheWrapper.run``.
            paged_kv_cache: Likewise.
            sink: float32 [Hq]; None: no sinks, unless by the name ``sinks``.
            sm_scale: Factor on the scores of this call; None: as planned.
            kwargs: Others of that ``run``.
        """
        if sink is not None:
            if kwargs.get("sinks") is not None:
                raise argument_error("sinks", "None beside sink", "both")
            kwargs["sinks"] = sink
        return super().run(q, paged_kv_cache, sm_scale=sm_scale, **kwargs)
