"""XQA, decode over paged caches with a dense page table, by FlashInfer's names."""

from __future__ import annotations

from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._checks import described
from sparseattn.flashinfer._common import (
    as_queries,
    check_heads,
    check_layout,
    dtype_of,
    fold_scales,
    unsupported,
    window_of,
)
from sparseattn.flashinfer._decode_fronts import draft_mask, query_rows, tabled_cache
from sparseattn.flashinfer._wrapper import attend
from sparseattn.ops.paged import PagedCache


def xqa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    output: Tensor | None = None,
    workspace_buffer: Tensor | None = None,
    semaphores: Tensor | None = None,
    num_kv_heads: int | None = None,
    page_size: int | None = None,
    sinks: Tensor | None = None,
    q_scale: float | Tensor = 1.0,
    kv_scale: float | Tensor = 1.0,
    sliding_win_size: int = 0,
    kv_layout: str = "NHD",
    sm_count: int | None = None,
    enable_pdl: bool | None = None,
    rcp_out_scale: float = 1.0,
    q_seq_len: int = 1,
    mask: Tensor | None = None,
    *,
    q_cu_seq_lens: Tensor | None = None,
    k_sf_cache: Tensor | None = None,
    v_sf_cache: Tensor | None = None,
    head_dim: int | None = None,
) -> Tensor:
    """Decode of a batch over a paged cache, into ``output`` or a new tensor.

    Args:
        q: ``[B, Hq, D]`` or ``[B, 1, Hq, D]``; drafts ``[B, 1, q_seq_len, Hq, D]``, or packed ``[tokens, Hq, D]``.
        k_cache: ``[P, page, Hkv, D]`` ("HND": ``[P, Hkv, page, D]``); or ``[P, 2, ...]``, whose first half is taken.
        v_cache: Likewise; of ``[P, 2, ...]`` the second half.
        page_table: int32 ``[B, max_pages]``.
        seq_lens: int32 or uint32, ``[B]`` or ``[B, 1]``, tokens of each request, its queries included.
        output: Where to write, of q's shape; None: a new tensor.
        workspace_buffer: Accepted; not used.
        semaphores: Accepted; not used.
        num_kv_heads: None, or as in the cache.
        page_size: None, or as in the cache.
        sinks: float32 ``[Hkv, Hq / Hkv]`` or ``[Hq]``, logits that join the softmax denominator only.
        q_scale: Factor on the queries; scores are ``q_scale * kv_scale / sqrt(D) * q . k``.
        kv_scale: Factor on keys and values.
        sliding_win_size: Keys that each query sees, itself included; 0: all.
        kv_layout: "NHD" or "HND".
        sm_count: Accepted.
        enable_pdl: Accepted.
        rcp_out_scale: Factor on the output.
        q_seq_len: Queries of each request, its last tokens; the most, with ``q_cu_seq_lens``.
        mask: uint16 ``[B, q_seq_len, words]``, which drafts each draft sees (``draft_mask``); None: causal.
        q_cu_seq_lens: int32 or uint32 ``[B + 1]``, where each request's queries begin in packed q.
        k_sf_cache: None (NVFP4 caches are not served).
        v_sf_cache: None, likewise.
        head_dim: None, or D.

    Returns:
        ``output``, or a new tensor of q's shape.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or numbers that do not fit, or something not served.
    """
    unsupported("NVFP4 caches are not served.", k_sf_cache=k_sf_cache, v_sf_cache=v_sf_cache)
    check_layout(kv_layout)
    packed = _packed(q)
    k = k_cache[:, 0] if isinstance(k_cache, Tensor) and k_cache.dim() == 5 else k_cache
    v = v_cache[:, 1] if isinstance(v_cache, Tensor) and v_cache.dim() == 5 and v_cache.shape[1] == 2 else v_cache
    cache = tabled_cache(k, v, kv_layout, page_table, seq_lens)
    for name, value, held in (
        ("num_kv_heads", num_kv_heads, cache.num_kv_heads),
        ("page_size", page_size, cache.page_size),
        ("head_dim", head_dim, q.shape[-1]),
    ):
        if value is not None and value != held:
            raise argument_error(name, f"{held}, as in the tensors", value)
    check_heads(packed.shape[1], cache.num_kv_heads)
    if q.shape[-1] == 0:
        raise argument_error("q", "a head_dim of at least 1", 0)
    scales = fold_scales(q.shape[-1] ** -0.5, q_scale, kv_scale, kv_scale * rcp_out_scale)
    rows = query_rows(packed, cache.batch, q_seq_len, q_cu_seq_lens, q_seq_len)
    if mask is not None and rows:
        rows |= {"custom_mask": draft_mask(mask, cache, packed.shape[0], **rows), "causal": False}
    o = attend(
        as_queries(packed, scales.q),
        cache,
        out=None if output is None else _packed(output, "output"),
        o_dtype=None if output is None else dtype_of("output", output.dtype),
        scale=scales.scale,
        k_scale=scales.k,
        v_scale=scales.v,
        window=window_of(sliding_win_size - 1),
        sinks=None if sinks is None else sinks.reshape(-1),
        **rows,
    )
    assert isinstance(o, Tensor)
    return o.view(*q.shape[:-1], o.shape[-1]) if output is None else output


def xqa_mla(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    output: Tensor | None = None,
    workspace_buffer: Tensor | None = None,
    semaphores: Tensor | None = None,
    page_size: int | None = None,
    q_scale: float | Tensor = 1.0,
    kv_scale: float | Tensor = 1.0,
    sm_count: int | None = None,
    enable_pdl: bool | None = None,
) -> Tensor:
    """Decode of absorbed queries over a paged latent cache of one KV head, into ``output`` or a new tensor.

    Args:
        q: ``[B, Hq, D]`` or ``[B, 1, Hq, D]``, D of 576 being 512 latent columns and 64 rotary ones.
        k_cache: ``[P, page, 1, D]``, ``[P, page, D]``, or ``[P * page, D]`` with ``page_size``.
        v_cache: Likewise; the first columns, 512 of 576, are the values. May be ``k_cache``, which is fast.
        page_table: int32 ``[B, max_pages]``.
        seq_lens: int32 or uint32, ``[B]`` or ``[B, 1]``.
        output: ``[B, 1, Hq, Dv]``, where to write; its Dv is the number of value columns. None: a new tensor.
        workspace_buffer: Accepted; not used.
        semaphores: Accepted; not used.
        page_size: None, or as in the cache.
        q_scale: Factor on the scores, ``1 / sqrt(head dimension before absorption)`` included.
        kv_scale: Factor on keys and values.
        sm_count: Accepted.
        enable_pdl: Accepted.

    Returns:
        ``output``, or a new tensor.
    """
    packed = _packed(q)
    pages_k, pages_v = (_latent_pages(name, t, page_size) for name, t in (("k_cache", k_cache), ("v_cache", v_cache)))
    width = pages_v.shape[-1] * 8 // 9 if pages_v.shape[-1] == q.shape[-1] else pages_v.shape[-1]
    width = width if output is None else output.shape[-1]
    cache = tabled_cache(pages_k, pages_v[..., :width], "NHD", page_table, seq_lens)
    if page_size is not None and page_size != cache.page_size:
        raise argument_error("page_size", f"{cache.page_size}, as in the cache", page_size)
    if pages_k.data_ptr() == pages_v.data_ptr() and pages_k.stride() == pages_v.stride():
        cache = PagedCache.latent(pages_k[:, :, 0], None, cache.seq_lens, cache.page_table, value_dim=width)
    scales = fold_scales(1.0, q_scale, kv_scale, kv_scale)
    o = attend(
        as_queries(packed, scales.q),
        cache,
        out=None if output is None else _packed(output, "output"),
        o_dtype=None if output is None else dtype_of("output", output.dtype),
        scale=scales.scale,
        k_scale=scales.k,
        v_scale=scales.v,
    )
    assert isinstance(o, Tensor)
    return o.view(*q.shape[:-1], o.shape[-1]) if output is None else output


def _packed(t: Tensor, name: str = "q") -> Tensor:
    """Queries ``[tokens, Hq, D]`` of any of XQA's forms; a view."""
    if not isinstance(t, Tensor) or t.dim() not in (3, 4, 5) or (t.dim() > 3 and t.shape[1] != 1):
        expected = "[B, Hq, D], [B, 1, Hq, D], [B, 1, q_seq_len, Hq, D] or [tokens, Hq, D]"
        raise argument_error(name, expected, described(t), "The beam width is 1.")
    if t.dim() > 3:
        t = t[:, 0]
    if t.dim() == 3:
        return t
    try:
        return t.view(-1, *t.shape[2:])
    except RuntimeError:
        raise argument_error(name, "requests that a view can join", f"strides {t.stride()}") from None


def _latent_pages(name: str, t: Tensor, page_size: int | None) -> Tensor:
    """``[P, page, 1, D]``."""
    if not isinstance(t, Tensor):
        raise argument_error(name, "a tensor [P, page, 1, D]", type(t).__name__, kind=TypeError)
    if t.dim() == 2 and page_size:
        t = t.view(-1, page_size, t.shape[-1])
    if t.dim() == 3:
        t = t[:, :, None]
    if t.dim() != 4 or t.shape[2] != 1:
        raise argument_error(name, "[P, page, 1, D]", f"shape {tuple(t.shape)}")
    return t


# ``from .xqa import xqa`` puts the function in the place of this module's name in the package, as in FlashInfer; its
# documentation still writes ``flashinfer.xqa.xqa_mla``.
for _function in (xqa, xqa_mla):
    setattr(xqa, _function.__name__, _function)
