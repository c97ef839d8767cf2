"""Tokens into paged caches, by FlashInfer's names."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._checks import described
from sparseattn.flashinfer._common import (
    LAYOUTS,
    check_count,
    check_indptr,
    check_last_pages,
    check_layout,
    check_output,
    split_cache,
)
from sparseattn.kernels.quick import Lengths, QuickCalls
from sparseattn.ops.paged import PagedCache, append_kv, appended_positions, lengths_from_last_pages


def _lengths(*tensors: Tensor) -> tuple[int, int, int] | None:
    """Tokens, sequences and entries of the page table of a call's tensors, if these fit."""
    first, second, batch_indices, positions, indices, indptr, last = tensors[-7:]
    tokens, batch = batch_indices.numel(), last.numel()  # of a vector, in a third of the time that its shape takes
    if tokens != positions.numel() or tokens != first.shape[0] or tokens != second.shape[0]:
        return None
    return (tokens, batch, indices.numel()) if tokens and indptr.numel() == batch + 1 else None


_LENGTHS = Lengths(_lengths, ("tokens", "batch", "table_width"), "TOKENS")
_APPENDS = {(layout, pages): QuickCalls(_LENGTHS, pages, pages + 2) for layout in LAYOUTS for pages in (1, 2)}
_LATENT = QuickCalls(_LENGTHS, 2, 4)


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Tokens of each request.

    Args:
        kv_indptr: int32 ``[B + 1]``.
        kv_last_page_len: int32 ``[B]``, tokens in the last page.
        page_size: Tokens of a page.

    Returns:
        int32 ``[B]``; 0 for a request without pages, whatever its ``kv_last_page_len``.
    """
    check_indptr("kv_indptr", kv_indptr)
    check_last_pages("kv_last_page_len", kv_indptr, kv_last_page_len, page_size)
    return lengths_from_last_pages(kv_indptr, kv_last_page_len, page_size)


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Request and position of every appended token: each request's tokens are its last ones.

    With ``append_indptr = [0, 1, 3]`` and ``seq_lens = [5, 5]``: ``[0, 1, 1]`` and ``[4, 3, 4]``.

    Args:
        append_indptr: int32 ``[B + 1]``, ascending from 0.
        seq_lens: int32 ``[B]``, lengths that count the appended tokens; moved to ``append_indptr``'s device.
        nnz: Number of rows; those past ``append_indptr[-1]`` are padding.
        batch_indices: int32 ``[nnz]``, where to write.
        positions: int32 ``[nnz]``, where to write.

    Returns:
        int32 ``[nnz]`` each; -1 for padding, which ``append_paged_kv_cache`` leaves out.
    """
    check_indptr("append_indptr", append_indptr)
    check_count("nnz", nnz, 0)
    if not isinstance(seq_lens, Tensor) or seq_lens.shape != (append_indptr.shape[0] - 1,):
        expected = f"shape ({append_indptr.shape[0] - 1},), one less than append_indptr"
        raise argument_error("seq_lens", expected, described(seq_lens))
    if seq_lens.dtype not in (torch.int32, torch.int64):
        raise argument_error("seq_lens", "an int32 tensor", seq_lens.dtype, kind=TypeError)
    lengths = seq_lens.to(append_indptr.device, torch.int32, non_blocking=True)
    results = appended_positions(append_indptr, lengths, nnz)
    outputs = (batch_indices, positions)
    for name, t in zip(("batch_indices", "positions"), outputs, strict=True):
        check_output(name, t, (nnz,), torch.int32, append_indptr)
    b, p = (x if out is None else out.copy_(x) for x, out in zip(results, outputs, strict=True))
    return b, p


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write keys and values into the pages of a cache, whose table counts them already.

    Tokens of no request (index out of range, or -1) or without a page are left out.

    Args:
        append_key: ``[nnz, Hkv, D]``, in the dtype of the cache, or any float dtype if that is float8.
        append_value: Likewise.
        batch_indices: int32 ``[nnz]``, request of every token.
        positions: int32 ``[nnz]``, its position there.
        paged_kv_cache: ``[P, 2, page, Hkv, D]`` ("HND": ``[P, 2, Hkv, page, D]``), or keys and values apart.
        kv_indices: int32, page numbers.
        kv_indptr: int32 ``[B + 1]``.
        kv_last_page_len: int32 ``[B]``.
        kv_layout: "NHD" or "HND".

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes or devices that do not fit.
    """
    pages = paged_kv_cache if type(paged_kv_cache) is tuple else (paged_kv_cache,)
    tensors = (*pages, append_key, append_value, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    quick = _APPENDS.get((kv_layout, len(pages)))
    if quick is not None and quick(*tensors)[1]:
        return
    k, v = split_cache(paged_kv_cache, check_layout(kv_layout))
    cache = PagedCache(k, v, kv_last_page_len, None, kv_indptr, kv_indices, layout=kv_layout)  # positions say the rest
    call = partial(append_kv, cache, append_key, append_value, batch_indices=batch_indices, positions=positions)
    if quick is None:
        call()
    else:
        quick.learn(tensors, call)


def append_paged_mla_kv_cache(
    append_ckv: Tensor,
    append_kpe: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """``append_paged_kv_cache`` for a latent cache, of any dimensions.

    Args:
        append_ckv: ``[nnz, R]``, latent columns.
        append_kpe: ``[nnz, Dr]``, rotary columns.
        batch_indices: int32 ``[nnz]``.
        positions: int32 ``[nnz]``.
        ckv_cache: ``[P, page, R]``.
        kpe_cache: ``[P, page, Dr]``.
        kv_indices: int32, page numbers.
        kv_indptr: int32 ``[B + 1]``.
        kv_last_page_len: int32 ``[B]``.
    """
    places = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    tensors = (ckv_cache, kpe_cache, append_ckv, append_kpe, *places)
    if _LATENT(*tensors)[1]:
        return
    for name, t in (("append_ckv", append_ckv), ("append_kpe", append_kpe)):
        if not isinstance(t, Tensor) or t.dim() != 2:
            raise argument_error(name, "[nnz, D]", described(t))
    if not isinstance(ckv_cache, Tensor) or ckv_cache.dim() != 3:
        raise argument_error("ckv_cache", "[P, page, R]", described(ckv_cache))
    cache = PagedCache.latent(
        ckv_cache, kpe_cache, kv_last_page_len, indptr=kv_indptr, indices=kv_indices, value_dim=ckv_cache.shape[-1]
    )
    rope = append_kpe[:, None] if append_kpe.shape[-1] else None
    new = append_ckv[:, None]
    call = partial(append_kv, cache, new, k_rope=rope, batch_indices=batch_indices, positions=positions)
    _LATENT.learn(tensors, call)
