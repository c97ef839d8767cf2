"""To and from FlexAttention's BlockMask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.constructors import make_frame
from sparseattn.masks.lists import compact, scatter_blocks
from sparseattn.masks.visibility import Frame, full_range, in_range, uncut_blocks, visible_range

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    from sparseattn.masks.block_mask import BlockMask

    MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Tokens on which from_flex evaluates a mask_mod at once: about 100 MB of indices.
_TOKENS_AT_ONCE = 1 << 22


def to_flex(mask: BlockMask, num_heads: int | None, *, self_contained: bool) -> FlexBlockMask:
    """See ``BlockMask.to_flex``."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    heads = mask.heads if num_heads is None else num_heads
    if heads < 1 or heads % mask.heads:
        raise argument_error("num_heads", f"a multiple of the mask's {mask.heads} heads", num_heads)
    frame, nb = mask.frame, mask.num_kv_blocks
    blocks = mask.to_blocks()
    full = in_range(full_range(frame), nb)
    visible = in_range(visible_range(frame), nb)
    # Lists that all heads share stay shared; FlexAttention broadcasts them.
    group = 1 if mask.heads == 1 else heads // mask.heads

    def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
        counts, indices = compact(chosen)
        if group == 1:
            return counts, indices
        return counts.repeat_interleave(group, dim=1), indices.repeat_interleave(group, dim=1)

    partial_blocks, full_blocks = blocks & visible & ~full, blocks & full
    kv_num_blocks, kv_indices = lists(partial_blocks)
    q_num_blocks, q_indices = lists(partial_blocks.transpose(-1, -2))
    full_kv_num_blocks, full_kv_indices = lists(full_blocks)
    full_q_num_blocks, full_q_indices = lists(full_blocks.transpose(-1, -2))
    return FlexBlockMask(
        seq_lengths=mask.seq_lens,
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=mask.block_size,
        mask_mod=_mask_mod(frame, blocks if self_contained else None, group),
    )


def _mask_mod(frame: Frame, table: Tensor | None, group: int) -> MaskMod:
    """What is visible of one (batch, query head, query, key), as FlexAttention asks it.

    Args:
        frame: Causality, window and lengths.
        table: bool ``[B|1, H, MB, NB]`` of listed blocks, or None when only listed blocks are asked about.
        group: Query heads that share one head of ``table``.
    """
    from torch.nn.attention.flex_attention import noop_mask

    left, right = frame.left, frame.right
    (max_q, max_k), (block_q, block_kv) = frame.seq_lens, frame.block_size
    used_q, used_k = frame.seqused_q, frame.seqused_k
    ragged = used_q is not None or used_k is not None
    if left is None and right is None and not ragged and table is None:
        return noop_mask

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        sq = max_q if used_q is None else used_q[b]
        sk = max_k if used_k is None else used_k[b]
        distance = kv_idx - q_idx - (sk - sq)
        visible = (q_idx < sq) & (kv_idx < sk)
        if right is not None:
            visible = visible & (distance <= right)
        if left is not None:
            visible = visible & (distance >= -left)
        if table is not None:
            row = torch.zeros_like(b) if table.shape[0] == 1 else b
            head = torch.zeros_like(h) if table.shape[1] == 1 else h // group
            visible = visible & table[row, head, q_idx // block_q, kv_idx // block_kv]
        return visible

    return mask_mod


def from_flex(
    block_mask: FlexBlockMask, seqused_q: Tensor | None, seqused_k: Tensor | None
) -> tuple[Tensor, Tensor, Frame]:
    """Counts, indices and frame of a FlexAttention mask. See ``BlockMask.from_flex``."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
    from torch.nn.attention.flex_attention import noop_mask

    if not isinstance(block_mask, FlexBlockMask):
        expected = "a torch.nn.attention.flex_attention.BlockMask"
        raise argument_error("block_mask", expected, type(block_mask).__name__, kind=TypeError)
    if any(size % 16 or not 16 <= size <= 256 for size in block_mask.BLOCK_SIZE):
        hint = "Create it with such a BLOCK_SIZE."
        raise argument_error("block_mask", "BLOCK_SIZE of multiples of 16 in 16..256", block_mask.BLOCK_SIZE, hint)
    device = block_mask.kv_num_blocks.device
    frame = make_frame(block_mask.seq_lengths, block_mask.BLOCK_SIZE, False, None, seqused_q, seqused_k, device)
    shape = tuple(block_mask.kv_num_blocks.shape)
    if len(shape) != 3 or shape[2] != frame.blocks[0]:
        hint = "Index a FlexAttention mask with slices only, e.g. mask[:, :1]."
        raise argument_error("block_mask", f"kv_num_blocks [B, H, {frame.blocks[0]}]", f"shape {shape}", hint)

    partial_blocks = scatter_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, frame.blocks[1])
    full_blocks = torch.zeros_like(partial_blocks)
    if block_mask.full_kv_num_blocks is not None:
        assert block_mask.full_kv_indices is not None
        full_blocks = scatter_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, frame.blocks[1])
    if block_mask.mask_mod is not noop_mask:
        frame = _find_bounds(block_mask.mask_mod, partial_blocks, full_blocks, frame)
    return (*compact(partial_blocks | full_blocks), frame)


def _find_bounds(mask_mod: MaskMod, partial_blocks: Tensor, full_blocks: Tensor, frame: Frame) -> Frame:
    """The frame with the causal flag or window that hides what ``mask_mod`` hides in the partial blocks."""
    shown, hidden = _distances(mask_mod, partial_blocks, frame)
    if not hidden.any():
        return frame
    hint = (
        "A mask hides tokens inside its blocks by one causal diagonal or window, aligned at the bottom right "
        "(key <= query + Sk - Sq). Use block_mask.to_dense() with from_blocks, or from_dense(..., superset=True)."
    )

    def error(got: str) -> Exception:
        return argument_error("block_mask", "a mask_mod that is noop, causal or a window", got, hint)

    if not shown.any():
        raise error("one that hides whole blocks listed as partial")
    distance = torch.arange(shown.shape[0], device=shown.device) - frame.seq_lens[1]
    low, high = (int(f(distance[shown]).item()) for f in (torch.min, torch.max))
    if (hidden & (distance >= low) & (distance <= high)).any():
        raise error("one that depends on more than query - key")
    left = -low if (hidden & (distance < low)).any() else None
    right = high if (hidden & (distance > high)).any() else None
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise error(f"a band that leaves out the diagonal (keys {low}..{high} from it)")
    if right == 0:
        found = frame._replace(causal=True, window=None if left is None else (left, None))
    else:
        found = frame._replace(window=(left, right))
    if (full_blocks & ~uncut_blocks(found)).any():
        raise error("full blocks that its mask_mod would cut")
    return found


def _distances(mask_mod: MaskMod, partial_blocks: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Which distances key - diagonal a mask_mod shows and hides in the partial blocks.

    Returns:
        bool ``[Sq + Sk]`` twice; entry d + Sk is about distance d.
    """
    block_q, block_kv = frame.block_size
    max_q, max_k = frame.seq_lens
    lengths_q, lengths_k = (n.squeeze(-1) for n in frame.lengths())
    shown = torch.zeros(max_q + max_k, dtype=torch.bool, device=frame.device)
    hidden = torch.zeros_like(shown)
    # Sequences of their own lengths have diagonals of their own, even when they share the lists.
    batch = max(partial_blocks.shape[0], lengths_q.shape[0], lengths_k.shape[0])
    at = partial_blocks.expand(batch, -1, -1, -1).nonzero()
    row = torch.arange(block_q, device=frame.device)[:, None].expand(block_q, block_kv)
    col = torch.arange(block_kv, device=frame.device).expand(block_q, block_kv)
    step = max(1, _TOKENS_AT_ONCE // (block_q * block_kv))
    for i in range(0, at.shape[0], step):
        b, h, m, n = at[i : i + step].unbind(1)
        q_idx = (m[:, None, None] * block_q + row).flatten()
        kv_idx = (n[:, None, None] * block_kv + col).flatten()
        b, h = b.repeat_interleave(row.numel()), h.repeat_interleave(row.numel())
        sq, sk = (n[b] if n.shape[0] > 1 else n for n in (lengths_q, lengths_k))
        exists = (q_idx < sq) & (kv_idx < sk)
        # A mask_mod may index tensors by token, so ask only about tokens that exist.
        seen = _evaluate(mask_mod, b, h, torch.where(exists, q_idx, 0), torch.where(exists, kv_idx, 0))
        slot = kv_idx - q_idx - (sk - sq) + max_k
        shown[slot[seen & exists]] = True
        hidden[slot[~seen & exists]] = True
    return shown, hidden


def _evaluate(mask_mod: MaskMod, *where: Tensor) -> Tensor:
    try:
        return torch.vmap(mask_mod)(*where)
    except RuntimeError as error:  # how torch refuses the mask_mod of a sliced BlockMask
        hint = "Set the mask_mod of a sliced BlockMask again."
        raise argument_error("block_mask", "a mask_mod that can be called on token indices", error, hint) from error
