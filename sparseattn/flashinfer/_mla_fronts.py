"""Latent attention without a plan, by the name of FlashInfer's TensorRT-LLM front."""

from __future__ import annotations

from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._checks import described
from sparseattn.flashinfer._common import (
    as_queries,
    check_output,
    dense_table,
    fold_scales,
    implementation,
    unsupported,
)
from sparseattn.flashinfer._decode_fronts import query_rows, sinks_of
from sparseattn.flashinfer._latent import joined_cache
from sparseattn.flashinfer._wrapper import attend
from sparseattn.ops.paged import PagedCache


def trtllm_batch_decode_with_kv_cache_mla(
    query: Tensor,
    kv_cache: Tensor,
    workspace_buffer: Tensor | None,
    qk_nope_head_dim: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    sparse_mla_top_k: int = 0,
    out: Tensor | None = None,
    bmm1_scale: float | Tensor = 1.0,
    bmm2_scale: float | Tensor = 1.0,
    sinks: Tensor | list[Tensor] | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    enable_pdl: bool | None = None,
    backend: str = "auto",
    is_var_seq: bool = True,
    uses_shared_paged_kv_idx: bool = True,
    lse: Tensor | None = None,
    return_lse: bool = False,
    cute_dsl_impl: str = "auto",
    kv_scale_format: str = "auto",
    cum_seq_lens_q: Tensor | None = None,
    max_q_len: int | None = None,
    multi_ctas_kv_counter_buffer: Tensor | None = None,
    sparse_mla_top_k_lens: Tensor | None = None,
    enable_dcp: bool = False,
    cp_world: int = 1,
    cp_rank: int = 0,
    causal_seqlens_kv_global: Tensor | None = None,
    use_fp16_softmax: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Latent attention of a few queries a request, causal among themselves, over a joined paged cache.

    Args:
        query: ``[B, q_len, Hq, kv_lora_rank + qk_rope_head_dim]``, absorbed; or ``[tokens, Hq, ...]`` with
            ``cum_seq_lens_q``. float8 is computed in bfloat16.
        kv_cache: ``[P, page, kv_lora_rank + qk_rope_head_dim]``, or with an axis of 1 before the page.
        workspace_buffer: Accepted; not used.
        qk_nope_head_dim: Accepted; ``bmm1_scale`` says what it would.
        kv_lora_rank: Latent columns, which are the values.
        qk_rope_head_dim: Rotary columns.
        block_tables: int32 ``[B, max_pages]``.
        seq_lens: int32 or uint32 ``[B]``, tokens of each request, its queries included.
        max_seq_len: Accepted; the width of the table counts.
        sparse_mla_top_k: Must be 0.
        out: ``[B, q_len, Hq, kv_lora_rank]`` (``[tokens, Hq, kv_lora_rank]``) in the query's dtype (bfloat16 for
            float8), where to write.
        bmm1_scale: Factor on q . k, the softmax scale included: a number, or float32 ``[1]`` on the device.
        bmm2_scale: Factor on the values, likewise.
        sinks: float32 ``[Hq]``, or a list of one such tensor: logits that join the softmax denominator only.
        skip_softmax_threshold_scale_factor: Accepted: nothing is skipped.
        enable_pdl: Accepted.
        backend: FlashInfer's names leave the choice to this library; "triton" or "reference" is run or refused.
        is_var_seq: Accepted.
        uses_shared_paged_kv_idx: Only True.
        lse: float32 ``[B * q_len, Hq]`` or ``[B, q_len, Hq]``, where to write.
        return_lse: Also return the LSE.
        cute_dsl_impl: Accepted.
        kv_scale_format: Accepted.
        cum_seq_lens_q: int32 ``[B + 1]``, where each request's queries begin, if they are not equally many.
        max_q_len: Longest query length, with it.
        multi_ctas_kv_counter_buffer: Accepted; not used.
        sparse_mla_top_k_lens: Must be None.
        enable_dcp: Must be False.
        cp_world: Accepted.
        cp_rank: Accepted.
        causal_seqlens_kv_global: Must be None.
        use_fp16_softmax: Accepted: the softmax is float32.

    Returns:
        The output, like the query with ``kv_lora_rank`` columns; with ``return_lse`` also the LSE, base 2 whatever the
        backend, float32 ``[tokens, Hq]``, or of ``lse``'s shape.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or combinations that do not fit, or something not served.
    """
    unsupported(
        "Latent attention is dense and of one device here.", sparse_mla_top_k=sparse_mla_top_k or None,
        sparse_mla_top_k_lens=sparse_mla_top_k_lens, enable_dcp=enable_dcp or None,
        causal_seqlens_kv_global=causal_seqlens_kv_global,
    )  # fmt: skip
    if not uses_shared_paged_kv_idx:
        raise argument_error("uses_shared_paged_kv_idx", "True", False, "Keys and values have one page table.")
    dim, rank = kv_lora_rank + qk_rope_head_dim, 4 if cum_seq_lens_q is None else 3
    if not isinstance(query, Tensor) or query.dim() != rank or query.shape[-1] != dim:
        expected = "[B, q_len, Hq, D]" if rank == 4 else "[tokens, Hq, D] with cum_seq_lens_q"
        raise argument_error("query", f"{expected}, D = {dim}", described(query))
    pages = joined_cache(kv_cache, "HND")
    if pages.shape[-1] != dim:
        raise argument_error("kv_cache", f"{dim} columns", pages.shape[-1])
    table = dense_table(block_tables, seq_lens, pages.shape[1], query.device)
    scales = fold_scales(1.0, bmm1_scale, None, bmm2_scale)
    q = as_queries(query, scales.q)
    flat = q if rank == 3 else q.flatten(0, 1)
    shape = (*q.shape[:-1], kv_lora_rank)
    rows = query_rows(flat, table.seq_lens.shape[0], q.shape[1] if rank == 4 else 1, cum_seq_lens_q, max_q_len)
    check_output("out", out, shape, q.dtype, q)
    for name, t in (("out", out), ("lse", lse)):
        if t is not None and rank == 4 and t.dim() > 2 and t.stride(0) != t.shape[1] * t.stride(1) and t.shape[0] > 1:
            raise argument_error(name, "requests that a view can join", f"strides {t.stride()}")
    got = attend(
        flat, PagedCache.latent(pages, None, table.seq_lens, table.page_table, value_dim=kv_lora_rank),
        out=None if out is None else out.view(flat.shape[0], *shape[-2:]),
        lse=None if lse is None else lse.view(flat.shape[:2]) if lse.numel() == flat[..., 0].numel() else lse,
        return_lse=return_lse, scale=scales.scale, k_scale=scales.k, v_scale=scales.v, sinks=sinks_of(sinks),
        impl=implementation(backend), **rows,
    )  # fmt: skip
    if isinstance(got, Tensor):
        return got.view(shape)
    return got[0].view(shape), got[1] if lse is None else lse
