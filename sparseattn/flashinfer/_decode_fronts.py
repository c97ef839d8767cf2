"""Batch decode without a plan, by the names of FlashInfer's cuDNN, TensorRT-LLM and XQA fronts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._checks import described
from sparseattn.flashinfer._common import (
    as_queries,
    check_heads,
    check_layout,
    dense_table,
    dtype_of,
    fold_scales,
    implementation,
    number_of,
    split_cache,
    unsupported,
    window_of,
)
from sparseattn.flashinfer._wrapper import attend, check_results
from sparseattn.ops.paged import CustomMask, PagedCache

_LN2 = math.log(2)
_Cache = Tensor | tuple[Tensor, Tensor]


def trtllm_batch_decode_with_kv_cache(
    query: Tensor,
    kv_cache: _Cache,
    workspace_buffer: Tensor | None,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    bmm1_scale: float | Tensor = 1.0,
    bmm2_scale: float | Tensor = 1.0,
    window_left: int = -1,
    out: Tensor | None = None,
    out_dtype: torch.dtype | str | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    sinks: Tensor | list[Tensor] | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    backend: str = "auto",
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: Tensor | None = None,
    max_q_len: int | None = None,
    cum_seq_lens_q: Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    kv_cache_sf: object = None,
    uses_shared_paged_kv_idx: bool = True,
    lse: Tensor | None = None,
    return_lse: bool = False,
    bmm1_scale_log2: Tensor | None = None,
    multi_ctas_kv_counter_buffer: Tensor | None = None,
    enable_block_sparse_attention: bool = False,
    bf16q_fp8kv_transform_mode: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode of a batch over a paged cache with a dense page table. The layout is "HND" unless said otherwise.

    Args:
        query: ``[tokens, Hq, D]``, request by request; float8 is computed in bfloat16.
        kv_cache: ``[P, 2, Hkv, page, D]``, or ``[P, 1, ...]`` for values that are the keys, or the two apart.
        workspace_buffer: Accepted; not used.
        block_tables: int32 ``[B, max_pages]``; with ``enable_block_sparse_attention`` ``[Hkv, B, max_pages]``.
        seq_lens: int32 or uint32 ``[B]``, tokens of each request, its queries included; with block sparsity ``[Hkv,
            B]``, tokens in the listed pages.
        max_seq_len: Accepted; the width of the table counts.
        bmm1_scale: Factor on q . k, ``1 / sqrt(D)`` included (the default is 1!): a number, or float32 ``[1]`` on the
            device.
        bmm2_scale: Factor on the values, likewise.
        window_left: Keys before a query that stay visible; negative: all.
        out: ``[tokens, Hq, D]``, where to write.
        out_dtype: Of the output; default that of ``out``, or of the query (bfloat16 for float8).
        o_sf_scale: None (NVFP4 outputs are not served).
        o_sf_vec_size: None, likewise.
        sinks: float32 ``[Hq]``, or a list of one such tensor: logits that join the softmax denominator only.
        kv_layout: "HND" or "NHD".
        enable_pdl: Accepted.
        backend: FlashInfer's names leave the choice to this library; "triton" or "reference" is run or refused.
        q_len_per_req: Queries of each request, its last tokens, causal among themselves.
        o_scale: Accepted; ``bmm2_scale`` is ``v_scale / o_scale`` already.
        mask: Which of its request's drafts each draft token sees, see ``draft_mask``; takes the place of causality.
        max_q_len: Longest query length, with ``cum_seq_lens_q``.
        cum_seq_lens_q: int32 ``[B + 1]``, where each request's queries begin, if they are not equally many.
        skip_softmax_threshold_scale_factor: Accepted: nothing is skipped, results are those of exact attention.
        kv_cache_sf: None (NVFP4 caches are not served).
        uses_shared_paged_kv_idx: Only True.
        lse: float32 ``[tokens, Hq]``, where to write.
        return_lse: Also return the LSE.
        bmm1_scale_log2: float32 ``[1]`` on the device, ``bmm1_scale * log2(e)``, in the place of ``bmm1_scale``.
        multi_ctas_kv_counter_buffer: Accepted; not used.
        enable_block_sparse_attention: Every KV head has its own pages: ``block_tables`` lists, ascending, the pages
            that it attends, and only the last may be partly filled. Causality counts in the listed tokens.
        bf16q_fp8kv_transform_mode: Accepted.

    Returns:
        The output ``[tokens, Hq, D]``, and with ``return_lse`` the base-2 LSE, float32 ``[tokens, Hq]``.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or combinations that do not fit, or something not served.
    """
    unsupported("NVFP4 is not served.", o_sf_scale=o_sf_scale, o_sf_vec_size=o_sf_vec_size, kv_cache_sf=kv_cache_sf)
    if not uses_shared_paged_kv_idx:
        raise argument_error("uses_shared_paged_kv_idx", "True", False, "Keys and values have one page table.")
    k, v = pages_of(kv_cache, kv_layout)
    q = as_queries(query)
    check_heads(q.shape[-2], k.shape[1 if kv_layout == "HND" else 2])
    if bmm1_scale_log2 is not None:
        bmm1_scale = bmm1_scale_log2 * _LN2
    scales = fold_scales(1.0, bmm1_scale, None, bmm2_scale)
    arguments: dict[str, Any] = {
        "scale": scales.scale, "k_scale": scales.k, "v_scale": scales.v, "window": window_of(window_left),
        "impl": implementation(backend), "sinks": sinks_of(sinks),
    }  # fmt: skip
    q = as_queries(q, scales.q)
    o_dtype = dtype_of("out", out.dtype) if out is not None else q.dtype
    results = {"o_dtype": o_dtype if out_dtype is None else dtype_of("out_dtype", out_dtype)}
    if enable_block_sparse_attention:
        unsupported(
            "Block sparsity by KV head takes neither.", cum_seq_lens_q=cum_seq_lens_q, mask=mask,
            window_left=None if window_left < 0 else window_left,
        )  # fmt: skip
        return _attend_by_head(
            q, k, v, kv_layout, block_tables, seq_lens, q_len_per_req or 1, out, lse, return_lse, results | arguments
        )
    cache = tabled_cache(k, v, kv_layout, block_tables, seq_lens)
    rows = query_rows(q, cache.batch, q_len_per_req or 1, cum_seq_lens_q, max_q_len)
    if mask is not None and rows:
        arguments |= {"custom_mask": draft_mask(mask, cache, q.shape[0], **rows), "causal": False}
    return attend(q, cache, out=out, lse=lse, return_lse=return_lse, **results, **arguments, **rows)


def xqa_batch_decode_with_kv_cache(
    query: Tensor,
    kv_cache: _Cache,
    workspace_buffer: Tensor | None,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    bmm1_scale: float | Tensor = 1.0,
    bmm2_scale: float | Tensor = 1.0,
    window_left: int = -1,
    out: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_layout: str = "NHD",
    enable_pdl: bool | None = None,
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: Tensor | None = None,
    kv_cache_sf: object = None,
    q_cu_seq_lens: Tensor | None = None,
) -> Tensor:
    """``trtllm_batch_decode_with_kv_cache`` by another name: the layout is "NHD" and there is no LSE.

    ``q_cu_seq_lens`` int32 ``[B + 1]`` says where each request's queries begin; ``q_len_per_req`` is then the longest.
    """
    ragged = q_cu_seq_lens is not None
    o = trtllm_batch_decode_with_kv_cache(
        query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale, bmm2_scale, window_left,
        out, sinks=sinks, kv_layout=kv_layout, q_len_per_req=q_len_per_req, o_scale=o_scale, mask=mask,
        max_q_len=q_len_per_req if ragged else None, cum_seq_lens_q=q_cu_seq_lens, kv_cache_sf=kv_cache_sf,
    )  # fmt: skip
    assert isinstance(o, Tensor)
    return o


def cudnn_batch_decode_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    workspace_buffer: Tensor | None,
    *,
    max_sequence_kv: int,
    actual_seq_lens_kv: Tensor | None = None,
    block_tables: Tensor | None = None,
    is_cuda_graph_compatible: bool = False,
    batch_offsets_q: Tensor | None = None,
    batch_offsets_o: Tensor | None = None,
    batch_offsets_k: Tensor | None = None,
    batch_offsets_v: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decode of one query a request over a paged cache in layout "HND".

    Args:
        q: ``[B, Hq, D]``.
        k_cache: ``[P, Hkv, page, D]``.
        v_cache: ``[P, Hkv, page, Dv]``.
        scale: Factor on the scores.
        workspace_buffer: Accepted; not used.
        max_sequence_kv: Longest request; the length of all if ``actual_seq_lens_kv`` is None.
        actual_seq_lens_kv: int32 of B elements, any shape and device.
        block_tables: int32 ``[B, max_pages]``, or more dimensions of 1.
        is_cuda_graph_compatible: Accepted; every call is.
        batch_offsets_q: Accepted: rows of ``q`` follow each other.
        batch_offsets_o: Likewise.
        batch_offsets_k: Likewise.
        batch_offsets_v: Likewise.
        out: ``[B, Hq, Dv]``, where to write.

    Returns:
        ``[B, Hq, Dv]``.
    """
    if not isinstance(block_tables, Tensor) or block_tables.dim() < 2:
        got = described(block_tables)
        raise argument_error("block_tables", "an int32 tensor [B, max_pages]", got, "The cache is paged.")
    q = as_queries(q)
    if actual_seq_lens_kv is None:
        actual_seq_lens_kv = torch.full((q.shape[0],), max_sequence_kv, dtype=torch.int32, device=q.device)
    cache = tabled_cache(k_cache, v_cache, "HND", block_tables.flatten(1), actual_seq_lens_kv)
    o = attend(q, cache, out=out, scale=number_of("scale", scale))
    assert isinstance(o, Tensor)
    return o


def draft_mask(mask: Tensor, cache: PagedCache, total: int, cu_seqlens_q: Tensor, max_seqlen_q: int) -> CustomMask:
    """A mask among draft tokens, the last of their requests, as one over all keys; earlier keys are visible.

    Args:
        mask: uint16 ``[B, q_len, words]``, or ``[tokens, words]`` for drafts of unequal length: bit j of a row, from
            the least significant of the first word, is whether that draft token sees the j-th of its request's.
        cache: What is attended; its table bounds the lengths.
        total: Rows of queries.
        cu_seqlens_q: int32 ``[B + 1]``.
        max_seqlen_q: Longest query length.
    """
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.uint16, torch.uint8) or mask.dim() < 2:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise argument_error("mask", "uint16 words of packed bits, some a row", got, kind=TypeError)
    packed = mask.contiguous().view(torch.uint8)
    packed = packed.view(-1, packed.shape[-1])
    if packed.shape[0] != total:
        expected = f"[B, q_len, words], or [tokens, words], of {total} rows like the queries"
        raise argument_error("mask", expected, f"shape {tuple(mask.shape)}")
    if packed.shape[-1] * 8 < max_seqlen_q:
        raise argument_error("mask", f"{max_seqlen_q} bits a row", f"shape {tuple(mask.shape)}")
    if cache.page_table is None:
        raise argument_error("mask", "a dense page table", "indptr and indices")
    # Entry e of a request is query e // length and key e % length; how far they go is known to the device only.
    size = max_seqlen_q * cache.capacity
    lengths = cache.seq_lens.long()[:, None]
    rows = cu_seqlens_q.diff()[:, None]
    entry = torch.arange(size, device=cache.device)
    query, key = entry // lengths.clamp(min=1), entry % lengths.clamp(min=1)
    draft = key - (lengths - rows)
    row = (cu_seqlens_q[:-1, None] + query).clamp(0, max(0, packed.shape[0] - 1))
    column = draft.clamp(0, packed.shape[-1] * 8 - 1)
    bits = packed[row, column // 8] >> (column % 8).to(torch.uint8)
    offsets = torch.arange(cache.batch + 1, device=cache.device) * size
    return CustomMask(((draft < 0) | (bits & 1 != 0)).flatten(), offsets)


def _attend_by_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str,
    block_tables: Tensor,
    seq_lens: Tensor,
    rows: int,
    out: Tensor | None,
    lse: Tensor | None,
    return_lse: bool,
    arguments: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where each KV head has pages of its own: every head of a request becomes a request of one KV head.

    The cache of all heads is a cache of one head with ``stride of a page / stride of a head`` times the pages.
    """
    if block_tables.dim() != 3 or seq_lens.shape != block_tables.shape[:2]:
        expected = "[num_kv_heads, B, max_pages], and seq_lens [num_kv_heads, B]"
        got = f"shapes {tuple(block_tables.shape)} and {tuple(seq_lens.shape)}"
        raise argument_error("block_tables", expected, got)
    heads, batch, width = block_tables.shape
    if q.shape[0] != batch * rows or heads != k.shape[1 if kv_layout == "HND" else 2]:
        expected = f"tables of {k.shape[1 if kv_layout == 'HND' else 2]} KV heads and {q.shape[0]} / {rows} requests"
        raise argument_error("block_tables", expected, f"shape {tuple(block_tables.shape)}")
    (k, steps), (v, steps_v) = (_one_head(t, kv_layout) for t in (k, v))
    if steps != steps_v:
        raise argument_error("kv_cache", "keys and values of the same strides", f"{steps} and {steps_v} heads a page")
    head = torch.arange(heads, dtype=torch.int32, device=block_tables.device)[:, None, None]
    pages = (block_tables * steps + head).transpose(0, 1).reshape(batch * heads, width)
    cache = tabled_cache(k, v, "NHD", pages, seq_lens.t().reshape(-1))
    group = q.shape[1] // heads
    split = q.view(batch, rows, heads, group, q.shape[-1]).transpose(1, 2).reshape(-1, group, q.shape[-1])
    sinks = arguments.pop("sinks")
    o, sums = attend(split, cache, return_lse=True, **arguments, **query_rows(split, batch * heads, rows))
    shape = (batch, heads, rows, group)
    o = o.view(*shape, -1).transpose(1, 2).reshape(*q.shape[:2], -1)
    sums = sums.view(shape).transpose(1, 2).reshape(q.shape[:2])
    if sinks is not None:  # they differ by head, so they join the denominator afterwards
        o = (o.float() * torch.sigmoid(sums * _LN2 - sinks.float())[..., None]).to(o.dtype)
    check_results(q, o.shape[-1], o.dtype, out, lse)
    o = o if out is None else out.copy_(o)
    sums = sums if lse is None else lse.copy_(sums)
    return (o, sums) if return_lse else o


def _one_head(t: Tensor, kv_layout: str) -> tuple[Tensor, int]:
    """A cache as one of single heads ``[pages, page, 1, D]``, a view, and how many pages one of ``t`` makes there."""
    if kv_layout == "HND":
        t = t.transpose(1, 2)
    pages, size, heads, dim = t.shape
    stride, token, head, column = t.stride()
    head = stride if heads == 1 else head
    if head == 0 or stride % head:
        raise argument_error("kv_cache", "pages a whole number of heads apart", f"strides {t.stride()}")
    steps = stride // head
    count = (pages - 1) * steps + heads if pages else 0
    return t.as_strided((count, size, 1, dim), (head, token, head, column)), steps


def pages_of(kv_cache: _Cache, kv_layout: str) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache that may have one half for both: ``[P, 1, ...]``."""
    check_layout(kv_layout)
    if isinstance(kv_cache, Tensor) and kv_cache.dim() == 5 and kv_cache.shape[1] == 1:
        return kv_cache[:, 0], kv_cache[:, 0]
    return split_cache(kv_cache, kv_layout, "kv_cache")


def sinks_of(sinks: Tensor | list[Tensor] | None) -> Tensor | None:
    """Sinks, given as they are or in a list of one."""
    if isinstance(sinks, list | tuple):
        if len(sinks) != 1:
            raise argument_error("sinks", "one tensor", f"{len(sinks)}")
        sinks = sinks[0]
    return None if sinks is None else sinks.reshape(-1)


def tabled_cache(k: Tensor, v: Tensor, kv_layout: str, block_tables: Tensor, seq_lens: Tensor) -> PagedCache:
    """A cache with a dense page table, int32 ``[B, max_pages]``, and int32 or uint32 lengths of B elements."""
    for name, t in (("k_cache", k), ("v_cache", v)):
        if not isinstance(t, Tensor) or t.dim() != 4:
            raise argument_error(name, f"a tensor of 4 dimensions ({kv_layout})", described(t), kind=TypeError)
    page_size = k.shape[1 if kv_layout == "NHD" else 2]
    return dense_table(block_tables, seq_lens, page_size, k.device).cache(k, v, kv_layout)


def query_rows(
    q: Tensor, batch: int, rows: int, cum_seq_lens_q: Tensor | None = None, max_q_len: int | None = None
) -> dict[str, Any]:
    """Where each request's queries begin, as ``paged_attention`` is told: nothing for one query each."""
    if cum_seq_lens_q is not None:
        if cum_seq_lens_q.dtype == torch.uint32:
            cum_seq_lens_q = cum_seq_lens_q.view(torch.int32)
        return {"cu_seqlens_q": cum_seq_lens_q, "max_seqlen_q": q.shape[0] if max_q_len is None else max_q_len}
    if q.shape[0] != batch * rows:
        raise argument_error("query", f"{batch} x {rows} rows, so many a request", q.shape[0])
    if rows == 1:
        return {}
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * rows
    return {"cu_seqlens_q": starts, "max_seqlen_q": rows}
