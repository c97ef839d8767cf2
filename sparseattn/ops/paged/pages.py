"""Helpers around paged caches: tokens into pages, where they belong, and packed masks. Nothing waits for the device."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.dispatch import check_impl, launchable, launcher, on_its_device
from sparseattn.ops.paged.cache import FLOAT8, PagedCache, check_int32
from sparseattn.ops.paged.options import check_bitorder

_KERNELS = "sparseattn.ops.paged.pages_triton"
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def append_kv(
    cache: PagedCache,
    k: Tensor,
    v: Tensor | None = None,
    *,
    k_rope: Tensor | None = None,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Write keys and values into the pages of a cache, whose table and lengths already count them.

    Where a token goes is said by ``batch_indices`` and ``positions``; or by ``cu_seqlens``, each sequence's tokens
    being its last ones; or by neither: one token a sequence, its last. A token of no sequence (negative index) or that
    has no page is left out, so padding may hold anything.

    Args:
        cache: Written to. Two tokens must not share a place.
        k: ``[n, Hkv, D]`` in the dtype of the cache; or any float dtype, if that is float8: then ``k / k_scale`` is
            written, limited to what the format holds.
        v: ``[n, Hkv, Dv]``, likewise; None for latent caches, whose values are columns of the keys.
        k_rope: ``[n, Hkv, R]``, if the cache has it.
        batch_indices: int32 [n], sequence of every token.
        positions: int32 [n], its position there.
        cu_seqlens: int32 [B + 1], which tokens each sequence gets.
        k_scale: As in ``paged_attention``.
        v_scale: As in ``paged_attention``.
        impl: "auto" (Triton on CUDA, reference elsewhere), "triton" or "reference".

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or combinations that do not fit.
    """
    check_impl(impl)
    targets = cache.views()
    same = cache.k is cache.v
    for name, t in (("k", k), ("v", v), ("k_rope", k_rope)):
        if (t is not None or name == "k") and (not isinstance(t, Tensor) or t.dim() != 3):
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise argument_error(
                name, "a tensor [n, Hkv, D]", got, kind=ValueError if isinstance(t, Tensor) else TypeError
            )
    n = k.shape[0]
    if (v is None) != same:
        raise argument_error("v", "None for a latent cache, and only there", "None" if v is None else "a tensor")
    if (k_rope is None) != (cache.k_rope is None):
        raise argument_error("k_rope", "given exactly if the cache has it", "None" if k_rope is None else "a tensor")
    batch_indices, positions = _places(cache, n, batch_indices, positions, cu_seqlens)
    scales = (k_scale, v_scale, k_scale)
    pairs = []
    for name, target, source, scale in zip(("k", "v", "k_rope"), targets, (k, v, k_rope), scales, strict=True):
        if source is None or target is None:
            continue
        if source.shape != (n, *target.shape[2:]) or source.device != target.device:
            expected = f"shape {(n, *target.shape[2:])} on {target.device}"
            raise argument_error(name, expected, f"shape {tuple(source.shape)} on {source.device}")
        source = _as_cached(name, source, target, scale)
        width = _WIDTHS[target.element_size()]  # a copy of bits: no kernel has to know the dtype
        pairs.append((target.view(width), source.view(width)))
    written, new = map(list, zip(*pairs, strict=True))
    _append(written, new, batch_indices, positions, *cache.table(), cache.batch, impl)


def _places(
    cache: PagedCache, n: int, batch_indices: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if (batch_indices is None) != (positions is None) or (positions is not None and cu_seqlens is not None):
        raise argument_error("positions", "batch_indices and positions, or cu_seqlens, or neither", "a mixture")
    if batch_indices is not None and positions is not None:
        for name, t in (("batch_indices", batch_indices), ("positions", positions)):
            check_int32(name, t, 1, cache.device)
            if t.shape[0] != n:
                raise argument_error(name, f"shape ({n},), an entry a token", f"shape {tuple(t.shape)}")
        return batch_indices.contiguous(), positions.contiguous()
    if cu_seqlens is not None:
        check_int32("cu_seqlens", cu_seqlens, 1, cache.device)
        if cu_seqlens.shape[0] != cache.batch + 1:
            raise argument_error("cu_seqlens", f"shape ({cache.batch + 1},)", f"shape {tuple(cu_seqlens.shape)}")
        return appended_positions(cu_seqlens, cache.seq_lens, n)
    if n != cache.batch:
        raise argument_error("k", f"{cache.batch} tokens, one a sequence", n, "Others need cu_seqlens or positions.")
    return torch.arange(n, dtype=torch.int32, device=cache.device), cache.seq_lens - 1


def _as_cached(name: str, source: Tensor, target: Tensor, scale: float | Tensor | None) -> Tensor:
    if target.dtype not in FLOAT8:
        if scale is not None:
            raise argument_error(f"{name[0]}_scale", f"None for a {target.dtype} cache", scale)
        if source.dtype != target.dtype:
            raise argument_error(name, f"{target.dtype} like the cache", source.dtype, kind=TypeError)
        return source
    if source.dtype == target.dtype:
        return source
    if not source.is_floating_point():
        raise argument_error(name, "a float tensor", source.dtype, kind=TypeError)
    x = source.float()
    if scale is not None:
        x = x / (scale.view(-1, 1) if isinstance(scale, Tensor) else scale)
    largest = torch.finfo(target.dtype).max
    return x.clamp(-largest, largest).to(target.dtype)


def appended_positions(cu_seqlens: Tensor, seq_lens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sequence and position of every appended token, each sequence's tokens being its last ones.

    With ``cu_seqlens = [0, 2, 3]`` and ``seq_lens = [5, 1]``: batch indices ``[0, 0, 1]``, positions ``[3, 4, 0]``.

    Args:
        cu_seqlens: int32 [B + 1], ascending from 0.
        seq_lens: int32 [B], lengths that count the appended tokens.
        total: Number of rows; those past ``cu_seqlens[-1]`` are padding.

    Returns:
        int32 [total] each; -1 for padding.
    """
    token = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    b = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True, out_int32=True)
    padding = b >= seq_lens.shape[0]
    at = b.clamp(max=max(0, seq_lens.shape[0] - 1)).long()
    if seq_lens.shape[0] == 0:
        return b - 1, b - 1
    positions = seq_lens[at] - cu_seqlens[1:][at] + token
    return b.masked_fill(padding, -1), positions.masked_fill(padding, -1)


def lengths_from_last_pages(indptr: Tensor, last_page_len: Tensor, page_size: int) -> Tensor:
    """Tokens of each sequence, from its number of pages and how full the last one is.

    Args:
        indptr: int32 [B + 1], ascending: sequence b owns ``indptr[b + 1] - indptr[b]`` pages.
        last_page_len: int32 [B], tokens in the last page, 1..page_size; ignored where there is no page.
        page_size: Tokens of a page.

    Returns:
        int32 [B].
    """
    if launchable(indptr, last_page_len):  # one launch in the place of six
        plain = indptr.dtype == last_page_len.dtype == torch.int32 and last_page_len.device == indptr.device
        if plain and indptr.is_contiguous() and last_page_len.is_contiguous() and last_page_len.shape[0] > 0:
            lengths: Tensor = launcher(_KERNELS, "lengths")(indptr, last_page_len, page_size)
            return lengths
    pages = indptr.diff()
    return torch.where(pages > 0, (pages - 1) * page_size + last_page_len, 0).int()


def copy_vectors(pairs: Sequence[tuple[Tensor, Tensor]], non_blocking: bool = True) -> None:
    """Copy int32 vectors into the beginnings of others, which hold them; by one launch where all are on one GPU.

    Args:
        pairs: Up to four pairs of a vector and where it goes; where that is where it lies already, nothing happens.
        non_blocking: For what is copied from the CPU.
    """
    pairs = [(source, target) for source, target in pairs if source.data_ptr() != target.data_ptr()]
    tensors = [t for pair in pairs for t in pair]
    alike = len({(t.dtype, t.device, t.is_contiguous()) for t in tensors}) == 1
    if alike and launchable(*tensors) and tensors[0].is_contiguous() and all(source.numel() for source, _ in pairs):
        launcher(_KERNELS, "copies")(*tensors)
        return
    for source, target in pairs:
        target[: source.shape[0]].copy_(source, non_blocking=non_blocking)


def packbits(x: Tensor, bitorder: str = "little") -> Tensor:
    """Pack bools into bytes, eight a byte, the last one filled up with zeros.

    Args:
        x: bool ``[n]``.
        bitorder: "little": entry i is bit ``i % 8`` counted from the least significant; "big": from the most.

    Returns:
        uint8 ``[ceil(n / 8)]``.
    """
    _check_bits(x, bitorder)
    bits = torch.nn.functional.pad(x.to(torch.uint8), (0, -x.shape[0] % 8)).view(-1, 8)
    return (bits << _shifts(bitorder, x.device)).sum(-1, dtype=torch.uint8)


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "little") -> tuple[Tensor, Tensor]:
    """Pack segments of bools, every segment starting a byte of its own: what ``CustomMask`` takes.

    Args:
        x: bool ``[n]``.
        indptr: int32 or int64 ``[B + 1]``, ascending from 0 to n. Entries past n are zeros.
        bitorder: As in ``packbits``.

    Returns:
        uint8 ``[n // 8 + B]``, as many bytes as any segments of n entries can need, zeros past the last; and ``[B +
        1]``, in the dtype of ``indptr``, where each segment's bytes begin.
    """
    _check_bits(x, bitorder)
    if indptr.dim() != 1 or indptr.dtype not in (torch.int32, torch.int64) or indptr.shape[0] < 1:
        raise argument_error("indptr", "int32 or int64 [B + 1]", f"{indptr.dtype} {tuple(indptr.shape)}")
    ends = torch.nn.functional.pad(((indptr.diff() + 7) // 8).cumsum(0), (1, 0))
    segments = indptr.shape[0] - 1
    if segments == 0 or x.shape[0] == 0:
        return torch.zeros(x.shape[0] // 8 + segments, dtype=torch.uint8, device=x.device), ends.to(indptr.dtype)
    byte = torch.arange(x.shape[0] // 8 + segments, device=x.device)
    segment = torch.searchsorted(ends[1:], byte, right=True).clamp(max=segments - 1)
    entry = (indptr[segment] + (byte - ends[segment]) * 8)[:, None] + torch.arange(8, device=x.device)
    inside = entry < indptr[segment + 1].clamp(max=x.shape[0])[:, None]  # what x does not have is 0
    bits = x[entry.clamp(0, x.shape[0] - 1)].to(torch.uint8).masked_fill(~inside, 0)
    return (bits << _shifts(bitorder, x.device)).sum(-1, dtype=torch.uint8), ends.to(indptr.dtype)


def _check_bits(x: Tensor, bitorder: str) -> None:
    check_bitorder(bitorder)
    if x.dtype != torch.bool:
        raise argument_error("x", "bool", x.dtype, "Compare with 0.", kind=TypeError)
    if x.dim() != 1:
        raise argument_error("x", "a flat tensor", f"shape {tuple(x.shape)}")


def _shifts(bitorder: str, device: torch.device) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return shifts if bitorder == "little" else 7 - shifts


# ---- as torch knows it ----

_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
_LIBRARY.define(
    "paged_append(Tensor(a!)[] targets, Tensor[] sources, Tensor batch_indices, Tensor positions, Tensor? page_table, "
    "Tensor? indptr, Tensor? indices, SymInt batch, str impl) -> ()"
)


@on_its_device
def _append_impl(
    targets: list[Tensor],
    sources: list[Tensor],
    batch_indices: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor | None,
    batch: int,
    impl: str,
) -> None:
    first = targets[0]
    if sources[0].shape[0] == 0 or first.numel() == 0:
        return
    if impl == "triton" or (impl == "auto" and first.is_cuda):
        module = importlib.import_module(_KERNELS)
        reason = module.unsupported_reason(first)
        if reason is not None:
            raise argument_error("impl", "an implementation that can run this call", f"{impl!r}: {reason}")
        pairs = list(zip(targets, sources, strict=True))
        for n in range(0, len(pairs), 2):
            module.append(pairs[n : n + 2], batch_indices, positions, page_table, indptr, indices, batch)
        return
    size = first.shape[1]
    valid = (batch_indices >= 0) & (batch_indices < batch) & (positions >= 0)
    b, entry = batch_indices.clamp(0, batch - 1).long(), positions.clamp(min=0) // size
    if page_table is not None:
        owned = page_table.shape[1]
        valid &= entry < owned
        page = page_table[b, entry.clamp(max=max(0, owned - 1)).long()] if owned else torch.full_like(entry, -1)
    else:
        assert indptr is not None
        assert indices is not None
        at = indptr[b].clamp(min=0).long() + entry
        valid &= at < indptr[b + 1].clamp(max=indices.shape[0])
        page = indices[at.clamp(max=indices.shape[0] - 1)] if indices.numel() else torch.full_like(entry, -1)
    valid &= (page >= 0) & (page < first.shape[0])
    for target, source in zip(targets, sources, strict=True):
        target[page[valid].long(), positions[valid].long() % size] = source[valid]


_LIBRARY.impl("paged_append", _append_impl, "CompositeExplicitAutograd")
torch.library.register_fake("sparseattn::paged_append", lambda *_: None, lib=_LIBRARY)
_append = torch.ops.sparseattn.paged_append.default
