"""Batch prefill without a plan, by the names of FlashInfer's TensorRT-LLM and cuDNN fronts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._checks import described
from sparseattn.flashinfer._common import (
    FLOAT8,
    Table,
    as_queries,
    base2,
    check_count,
    check_output,
    dense_table,
    dtype_of,
    fold_scales,
    index_tensor,
    number_of,
    readable,
    unsupported,
    window_of,
)
from sparseattn.flashinfer._decode_fronts import pages_of, sinks_of, tabled_cache
from sparseattn.flashinfer._wrapper import as_results, attend, query_rows
from sparseattn.ops.paged import paged_attention


def trtllm_batch_context_with_kv_cache(
    query: Tensor,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    workspace_buffer: Tensor | None,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float | Tensor,
    bmm2_scale: float | Tensor,
    batch_size: int,
    cum_seq_lens_q: Tensor,
    cum_seq_lens_kv: Tensor | None,
    window_left: int = -1,
    out: Tensor | None = None,
    out_dtype: torch.dtype | str | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    sinks: Tensor | list[Tensor] | None = None,
    kv_cache_sf: object = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    uses_shared_paged_kv_idx: bool = True,
    causal: bool = True,
    lse: Tensor | None = None,
    return_lse: bool = False,
    multi_ctas_kv_counter_buffer: Tensor | None = None,
    use_fp16_softmax: bool | None = None,
    uses_spcompress: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Prefill of a batch over a paged cache with a dense page table: layout "HND" and causal unless said otherwise.

    Args:
        query: ``[tokens, Hq, D]``, request by request; float8 is computed in bfloat16.
        kv_cache: ``[P, 2, Hkv, page, D]``, or ``[P, 1, ...]`` for values that are the keys, or the two apart.
        workspace_buffer: Accepted; not used.
        block_tables: int32 ``[B, max_pages]``.
        seq_lens: int32 or uint32 ``[B]``, tokens of each request, its queries included.
        max_q_len: Longest query length.
        max_kv_len: Accepted; the width of the table counts.
        bmm1_scale: Factor on q . k, ``1 / sqrt(D)`` included: a number, or float32 ``[1]`` on the device.
        bmm2_scale: Factor on the values, likewise.
        batch_size: B.
        cum_seq_lens_q: int32 or uint32 ``[B + 1]``, where each request's queries begin.
        cum_seq_lens_kv: Accepted; ``seq_lens`` says it.
        window_left: Keys before the diagonal that stay visible; negative: all.
        out: ``[tokens, Hq, Dv]``, where to write.
        out_dtype: Of the output; default that of ``out``, or of the query (bfloat16 for float8).
        o_sf_scale: None (NVFP4 outputs are not served).
        o_sf_vec_size: None, likewise.
        kv_layout: "HND" or "NHD".
        enable_pdl: Accepted.
        sinks: float32 ``[Hq]``, or a list of one such tensor: logits that join the softmax denominator only.
        kv_cache_sf: None (NVFP4 caches are not served).
        skip_softmax_threshold_scale_factor: Accepted: nothing is skipped, results are those of exact attention.
        uses_shared_paged_kv_idx: Only True.
        causal: Query i of a request sees key j only if ``j <= i + kv_len - q_len``.
        lse: float32 ``[tokens, Hq]``, where to write.
        return_lse: Also return the LSE.
        multi_ctas_kv_counter_buffer: Accepted; not used.
        use_fp16_softmax: Accepted: the softmax is float32.
        uses_spcompress: None or False.

    Returns:
        The output ``[tokens, Hq, Dv]``, and with ``return_lse`` the base-2 LSE, float32 ``[tokens, Hq]``.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or combinations that do not fit, or something not served.
    """
    unsupported(
        "NVFP4 and compressed caches are not served.", o_sf_scale=o_sf_scale, o_sf_vec_size=o_sf_vec_size,
        kv_cache_sf=kv_cache_sf, uses_spcompress=uses_spcompress or None,
    )  # fmt: skip
    if not uses_shared_paged_kv_idx:
        raise argument_error("uses_shared_paged_kv_idx", "True", False, "Keys and values have one page table.")
    cache = tabled_cache(*pages_of(kv_cache, kv_layout), kv_layout, block_tables, seq_lens)
    if cache.batch != batch_size:
        raise argument_error("batch_size", f"{cache.batch} like seq_lens", batch_size)
    scales = fold_scales(1.0, bmm1_scale, None, bmm2_scale)
    q = as_queries(query, scales.q)
    check_count("max_q_len", max_q_len, 0)
    if isinstance(cum_seq_lens_q, Tensor) and cum_seq_lens_q.dtype == torch.uint32:
        cum_seq_lens_q = cum_seq_lens_q.view(torch.int32)
    starts, longest, total = query_rows(cum_seq_lens_q, query.device)
    if total is not None and total != query.shape[0]:
        raise argument_error("query", f"{total} rows like cum_seq_lens_q", query.shape[0])
    if longest is not None and longest > max_q_len:
        raise argument_error("max_q_len", f"at least {longest}, as in cum_seq_lens_q", max_q_len)
    o_dtype = dtype_of("out", out.dtype) if out is not None else q.dtype
    return attend(
        q, cache, o_dtype=o_dtype if out_dtype is None else dtype_of("out_dtype", out_dtype), out=out, lse=lse,
        return_lse=return_lse, cu_seqlens_q=starts, max_seqlen_q=max_q_len, causal=causal, scale=scales.scale,
        k_scale=scales.k, v_scale=scales.v, window=window_of(window_left), sinks=sinks_of(sinks),
    )  # fmt: skip


def cudnn_batch_prefill_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    workspace_buffer: Tensor | None,
    *,
    max_token_per_sequence: int,
    max_sequence_kv: int,
    actual_seq_lens_q: Tensor | None = None,
    actual_seq_lens_kv: Tensor | None = None,
    block_tables: Tensor | None = None,
    causal: bool,
    return_lse: bool,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_offsets_q: Tensor | None = None,
    batch_offsets_o: Tensor | None = None,
    batch_offsets_k: Tensor | None = None,
    batch_offsets_v: Tensor | None = None,
    batch_offsets_stats: Tensor | None = None,
    batch_offsets_units: str = "elements",
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_cuda_graph_compatible: bool = False,
    backend: str | None = None,
    o_data_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Prefill of a batch, over pages in layout "HND" or over packed keys.

    Where lengths and offsets are both given there may be rows between requests: these give 0.

    Args:
        q: ``[T, Hq, D]``.
        k_cache: ``[P, Hkv, page, D]``, or packed ``[Tk, Hkv, D]`` without ``block_tables``.
        v_cache: Likewise; packed values lie in the rows of their keys.
        scale: Factor on the scores.
        workspace_buffer: Accepted; not used.
        max_token_per_sequence: Longest query length.
        max_sequence_kv: Accepted.
        actual_seq_lens_q: int32 of B elements, any shape and device: query lengths; None: what offsets say.
        actual_seq_lens_kv: Likewise of keys; needed with pages.
        block_tables: int32 ``[B, max_pages]``.
        causal: Query i of a request sees key j only if ``j <= i + kv_len - q_len``.
        return_lse: Also return the LSE.
        q_scale: float32 of one element, a factor on queries.
        k_scale: Likewise on keys.
        v_scale: Likewise on values.
        batch_offsets_q: int32 ``[B + 1]``, where each request's queries begin; None: one behind the other.
        batch_offsets_o: Likewise of outputs; None: where the queries are.
        batch_offsets_k: Likewise of packed keys; None: one behind the other.
        batch_offsets_v: Accepted, see ``v_cache``.
        batch_offsets_stats: Must be None.
        batch_offsets_units: "elements" (rows times heads times head dimension) or "tokens".
        out: ``[T, Hq, Dv]``, where to write.
        lse: float32 ``[B, max_token_per_sequence, Hq]``, where to write.
        is_cuda_graph_compatible: Accepted; every call is.
        backend: Accepted.
        o_data_type: Of the output; default that of ``out``, or of q (bfloat16 for float8).

    Returns:
        The output ``[T, Hq, Dv]``; and the LSE, base 2, float32 ``[B, max_token_per_sequence, Hq]``, -inf past a
        request's queries; None without ``return_lse``.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or combinations that do not fit, or something not served.
    """
    unsupported("The LSE is padded, not packed.", batch_offsets_stats=batch_offsets_stats)
    if batch_offsets_units not in ("elements", "tokens"):
        raise argument_error("batch_offsets_units", "'elements' or 'tokens'", repr(batch_offsets_units))
    if block_tables is not None and (not isinstance(block_tables, Tensor) or block_tables.dim() < 2):
        raise argument_error("block_tables", "an int32 tensor [B, max_pages]", described(block_tables), kind=TypeError)
    pages_rank = 3 if block_tables is None else 4
    for name, t, rank in (("q", q, 3), ("k_cache", k_cache, pages_rank), ("v_cache", v_cache, pages_rank)):
        if not isinstance(t, Tensor) or t.dim() != rank:
            raise argument_error(name, f"a tensor of {rank} dimensions", described(t), kind=TypeError)
    check_count("max_token_per_sequence", max_token_per_sequence, 0)
    elements = batch_offsets_units == "elements"
    heads, dim, dim_v = q.shape[1], q.shape[2], v_cache.shape[-1]
    own = _Span.of("q", batch_offsets_q, actual_seq_lens_q, heads * dim if elements else 1, q.device)
    batch = own.lengths.shape[0]
    if own.longest is not None and own.longest > max_token_per_sequence:
        expected = f"at least {own.longest}, as the longest request"
        raise argument_error("max_token_per_sequence", expected, max_token_per_sequence)
    if block_tables is not None:
        if actual_seq_lens_kv is None:
            raise argument_error("actual_seq_lens_kv", "lengths of the pages' contents", None)
        table = dense_table(block_tables.flatten(1), actual_seq_lens_kv, k_cache.shape[2], q.device)
        layout = "HND"
    else:
        per = k_cache.shape[1] * dim if elements else 1
        keys = _Span.of("k", batch_offsets_k, actual_seq_lens_kv, per, q.device)
        numbers = torch.arange(k_cache.shape[0], dtype=torch.int32, device=q.device)
        table = Table(keys.lengths, None, keys.starts, numbers)
        k_cache, v_cache, layout = k_cache[:, None], v_cache[:, None], "NHD"
    scales = fold_scales(number_of("scale", scale), q_scale, k_scale, v_scale)
    o_dtype = torch.bfloat16 if q.dtype in FLOAT8 else q.dtype
    o_dtype = o_dtype if out is None else dtype_of("out", out.dtype)
    o_dtype = o_dtype if o_data_type is None else o_data_type
    check_output("out", out, (q.shape[0], heads, dim_v), o_dtype, q)
    check_output("lse", lse, (batch, max_token_per_sequence, heads), torch.float32, q)
    o, natural = paged_attention(
        as_queries(q, scales.q), own.spread(table).cache(k_cache, v_cache, layout), cu_seqlens_q=own.bounds(),
        max_seqlen_q=max_token_per_sequence, causal=causal, scale=scales.scale, k_scale=scales.k, v_scale=scales.v,
        return_lse=True,
    )  # fmt: skip
    if batch_offsets_o is not None and batch_offsets_o is not batch_offsets_q:
        o = own.moved(o, _Span.of("o", batch_offsets_o, own.lengths, heads * dim_v if elements else 1, q.device))
    o = as_results(o, natural, o_dtype, out)
    assert isinstance(o, Tensor)
    return o, own.padded(base2(natural), max_token_per_sequence, lse) if return_lse else None


@dataclass(frozen=True)
class _Span:
    """Where packed requests lie.

    Attributes:
        starts: int32 [B + 1], first rows, and the end.
        lengths: int32 [B].
        gaps: Whether there may be rows between requests.
        longest: Longest length, if the host knows.
    """

    starts: Tensor
    lengths: Tensor
    gaps: bool
    longest: int | None

    @classmethod
    def of(cls, name: str, offsets: Tensor | None, lengths: Tensor | None, per: int, device: torch.device) -> _Span:
        """From offsets in units of ``1 / per`` rows, or lengths, or both."""
        given = offsets.diff() // per if lengths is None and offsets is not None else lengths
        if given is None:
            raise argument_error(f"actual_seq_lens_{name}", f"lengths, or batch_offsets_{name}", "neither")
        given = given.reshape(-1).view(torch.int32) if given.dtype == torch.uint32 else given.reshape(-1)
        longest = None
        if readable(given) and given.numel():
            shortest, longest = (int(t) for t in given.aminmax())
            if shortest < 0:
                raise argument_error(f"actual_seq_lens_{name}", "lengths of at least 0", shortest)
        sizes = index_tensor(f"actual_seq_lens_{name}", given, device)
        if offsets is None:
            starts = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
        else:
            starts = index_tensor(f"batch_offsets_{name}", offsets.reshape(-1), device) // per
            if readable(offsets):
                wrong = bool((offsets < 0).any() or (offsets.reshape(-1).diff() < 0).any())
                if wrong or bool((offsets % per != 0).any()):
                    expected = f"multiples of {per} (a row) that ascend"
                    raise argument_error(f"batch_offsets_{name}", expected, offsets.tolist())
        if starts.shape[0] != sizes.shape[0] + 1:
            expected = f"{sizes.shape[0] + 1} entries, one more than lengths"
            raise argument_error(f"batch_offsets_{name}", expected, starts.shape[0])
        return cls(starts, sizes, offsets is not None and lengths is not None, longest)

    def bounds(self) -> Tensor:
        """Offsets of rows; with gaps each request is followed by one of no keys that owns the rows up to the next."""
        if not self.gaps:
            return self.starts
        first = self.starts[:-1]
        return torch.cat([torch.stack([first, first + self.lengths], 1).flatten(), self.starts[-1:]])

    def spread(self, table: Table) -> Table:
        """A table of the requests as one of those in ``bounds``."""
        if not self.gaps:
            return table
        return Table(
            torch.stack([table.seq_lens, torch.zeros_like(table.seq_lens)], 1).flatten(),
            None if table.page_table is None else table.page_table.repeat_interleave(2, 0),
            None if table.indptr is None else table.indptr.repeat_interleave(2)[1:],
            table.indices,
        )

    def moved(self, o: Tensor, to: _Span) -> Tensor:
        """Rows ``o [T, ...]`` that lie as said here where ``to`` says; others become 0."""
        if o.shape[0] == 0 or self.lengths.shape[0] == 0:
            return o
        row = torch.arange(o.shape[0], device=o.device)
        b = torch.searchsorted(to.starts[1:].contiguous(), row, right=True).clamp(max=self.lengths.shape[0] - 1)
        at = row - to.starts[b]
        held = (at >= 0) & (at < self.lengths[b])
        return torch.where(held[:, None, None], o[(self.starts[b] + at).clamp(0, o.shape[0] - 1)], 0)

    def padded(self, sums: Tensor, longest: int, out: Tensor | None) -> Tensor:
        """An LSE ``[T, Hq]`` as ``[B, longest, Hq]``, -inf where there is no row."""
        at = torch.arange(longest, device=sums.device)
        held = at < self.lengths[:, None]
        rows = (self.starts[:-1, None] + at).clamp(0, max(0, sums.shape[0] - 1))
        if sums.shape[0] == 0:
            sums = sums.new_full((1, sums.shape[1]), -math.inf)
        lse = sums[rows].masked_fill(~held[..., None], -math.inf)
        return lse if out is None else out.copy_(lse)
