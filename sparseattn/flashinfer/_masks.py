"""Custom masks of prefill plans: flat, packed, at fixed addresses, and those of multi-item scoring."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._buffers import check_fits, fill
from sparseattn.ops.paged import CustomMask, packbits, segment_packbits


def prepare_mask(
    custom_mask: Tensor | None,
    packed_custom_mask: Tensor | None,
    q_lens: Tensor,
    kv_lens: Tensor,
    host_sizes: list[int] | None,
    device: torch.device,
    non_blocking: bool = True,
) -> CustomMask | None:
    """What a plan says of single tokens, with where each request's part begins.

    Args:
        custom_mask: bool, every request's ``[q_len, kv_len]`` row by row, one after the other; True keeps.
        packed_custom_mask: uint8, the same 8 entries a byte, entry i being bit ``i % 8`` from the least significant
            ("little" order), every request starting a byte of its own (``segment_packbits``). Counts if both are given.
        q_lens: int32 [B] on ``device``.
        kv_lens: Likewise.
        host_sizes: Entries of each request, if the host knows: then a mask that is too short is refused. Otherwise it
            hides what it does not cover.
        device: Of the call.
        non_blocking: Whether the mask may still be on its way there when this returns.
    """
    if packed_custom_mask is not None:
        mask = _flat("packed_custom_mask", packed_custom_mask, torch.uint8)
        hint, sizes = "Every request starts a byte of its own.", _bytes(host_sizes)
        offsets = _starts((q_lens.long() * kv_lens + 7) // 8)
    elif custom_mask is not None:
        mask = _flat("custom_mask", custom_mask, torch.bool)
        hint, sizes = "", host_sizes
        offsets = _starts(q_lens.long() * kv_lens)
    else:
        return None
    if sizes is not None and mask.shape[0] < sum(sizes):
        name = "custom_mask" if mask.dtype == torch.bool else "packed_custom_mask"
        raise argument_error(name, f"{sum(sizes)} entries, q_len * kv_len of every request", mask.shape[0], hint)
    return CustomMask(mask.to(device, non_blocking=non_blocking), offsets)


class MaskBuffers:
    """A caller's tensors for masks at fixed addresses, read by captured CUDA graphs.

    Attributes:
        mask: uint8, packed.
        indptr: int32 [B + 1], first byte of each request.
    """

    def __init__(self, mask: Tensor | None, indptr: Tensor | None) -> None:
        for name, t, dtype in (("custom_mask_buf", mask, torch.uint8), ("mask_indptr_buf", indptr, torch.int32)):
            if t is not None and (not isinstance(t, Tensor) or t.dtype != dtype or t.dim() != 1):
                got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
                raise argument_error(name, f"a flat {dtype} tensor", got, kind=TypeError)
        self.mask, self.indptr = mask, indptr

    def packed(self, mask: CustomMask, kv_lens: Tensor, q_lens: Tensor) -> CustomMask:
        """``mask`` as the buffers can take it; bools are packed."""
        if self.mask is None or self.indptr is None:
            name = "custom_mask_buf" if self.mask is None else "mask_indptr_buf"
            raise argument_error(name, "a tensor", None, "CUDA graphs need buffers that stay.")
        bits, offsets = mask.mask, mask.offsets
        if bits.dtype == torch.bool:  # with a False behind its end, which is what entries past that become
            bits, offsets = segment_packbits(torch.nn.functional.pad(bits, (0, 1)), _starts(q_lens.long() * kv_lens))
        assert offsets is not None
        offsets = offsets.int()
        check_fits("mask_indptr", self.indptr, offsets, exact=True)
        check_fits("custom_mask", self.mask, bits)
        return CustomMask(bits, offsets)

    def keep(self, packed: CustomMask, non_blocking: bool = True) -> CustomMask:
        """The buffers as a mask, with what ``packed`` returned in them."""
        assert self.mask is not None
        assert self.indptr is not None
        assert packed.offsets is not None
        fill("custom_mask", self.mask, packed.mask, non_blocking)
        fill("mask_indptr", self.indptr, packed.offsets, non_blocking)
        return CustomMask(self.mask, self.indptr)


def item_mask(
    prefix_len_ptr: Tensor,
    token_pos_in_items_ptr: Tensor | None,
    token_pos_in_items_len: int,
    q_lens: list[int],
    kv_lens: list[int],
    device: torch.device,
) -> CustomMask:
    """The mask of multi-item scoring: every token sees the prefix, and of the items those of its own before it.

    A token at position p from the prefix on, whose item began n tokens before it, sees keys ``j < prefix`` and
    ``p - n < j <= p``; a delimiter, n = 0, the prefix alone. Tokens of the prefix see what came before them.

    Args:
        prefix_len_ptr: Integers [B], length of each prefix.
        token_pos_in_items_ptr: Integers, n of every token behind the prefix; those of request b begin at ``b *
            token_pos_in_items_len``. Tokens past the end of the tensor count as delimiters.
        token_pos_in_items_len: Length to which requests are padded there.
        q_lens: Query lengths.
        kv_lens: Tokens of each request in the cache.
        device: Of the call.
    """
    batch = len(q_lens)
    prefix_len_ptr = prefix_len_ptr.reshape(-1)  # of one request, it may come without its axis
    if prefix_len_ptr.shape != (batch,):
        raise argument_error("prefix_len_ptr", f"shape ({batch},)", f"shape {tuple(prefix_len_ptr.shape)}")
    if token_pos_in_items_ptr is None or token_pos_in_items_ptr.dim() != 1 or token_pos_in_items_ptr.numel() == 0:
        got = None if token_pos_in_items_ptr is None else f"shape {tuple(token_pos_in_items_ptr.shape)}"
        raise argument_error("token_pos_in_items_ptr", "a flat tensor with prefix_len_ptr", got)
    if batch > 1 and token_pos_in_items_len <= 0:
        raise argument_error("token_pos_in_items_len", "the padded length of a request", token_pos_in_items_len)
    prefixes, items = (t.to(device).long() for t in (prefix_len_ptr, token_pos_in_items_ptr))
    parts = []
    for b, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        own = items[b * token_pos_in_items_len :][: token_pos_in_items_len if batch > 1 else None]
        i = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
        j = torch.arange(kv_len, device=device)
        prefix = prefixes[b]
        behind = i - prefix
        inside = (behind >= 0) & (behind < own.shape[0])
        n = torch.where(inside, own[behind.clamp(0, max(0, own.shape[0] - 1))] if own.numel() else 0, 0)
        parts.append(packbits(((j <= i) & ((i < prefix) | (j < prefix) | (i < j + n))).flatten()))
    sizes = [0, *itertools.accumulate(part.shape[0] for part in parts)]
    return CustomMask(
        torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device),
        torch.tensor(sizes, dtype=torch.int64).to(device, non_blocking=True),
    )


def _flat(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != dtype:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise argument_error(name, f"a {dtype} tensor", got, kind=TypeError)
    return mask.reshape(-1)


def _bytes(sizes: list[int] | None) -> list[int] | None:
    return None if sizes is None else [(n + 7) // 8 for n in sizes]


def _starts(sizes: Tensor) -> Tensor:
    """int64 [B + 1]: sums of the sizes before."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
