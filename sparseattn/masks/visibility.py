"""What causality, a window and the true lengths hide, by block and by token.

Row i of a sequence with Sq queries and Sk keys has its diagonal at key ``i + Sk - Sq``. The keys it sees form one
interval, and so do the blocks that a row of blocks sees, so everything here is a pair of bounds per block row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Frame(NamedTuple):
    """A mask without its lists: what would be visible if every block were listed.

    Attributes:
        block_size: ``(block_q, block_kv)`` in tokens.
        seq_lens: ``(Sq, Sk)``, the longest of the batch.
        causal: Hide keys past the bottom-right aligned diagonal.
        window: ``(left, right)`` inclusive token counts around that diagonal, None = unbounded.
        seqused_q: int32 [B] true query lengths, or None when all equal Sq.
        seqused_k: int32 [B] true key lengths, or None when all equal Sk.
        device: Where results go.
    """

    block_size: tuple[int, int]
    seq_lens: tuple[int, int]
    causal: bool
    window: tuple[int | None, int | None] | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    device: torch.device

    @property
    def blocks(self) -> tuple[int, int]:
        """``(MB, NB)``."""
        return -(-self.seq_lens[0] // self.block_size[0]), -(-self.seq_lens[1] // self.block_size[1])

    @property
    def left(self) -> int | None:
        return None if self.window is None else self.window[0]

    @property
    def right(self) -> int | None:
        right = None if self.window is None else self.window[1]
        # Causality is a right bound of 0, and a window's right bound is never negative.
        return 0 if self.causal else right

    def lengths(self) -> tuple[Tensor, Tensor]:
        """int32 ``[B|1, 1]`` query and key lengths."""
        sq, sk = (
            torch.full((1,), n, dtype=torch.int32, device=self.device) if used is None else used
            for n, used in zip(self.seq_lens, (self.seqused_q, self.seqused_k), strict=True)
        )
        return sq.unsqueeze(-1), sk.unsqueeze(-1)


def _floor_div(x: Tensor, y: int) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


def visible_span(frame: Frame) -> tuple[Tensor, Tensor]:
    """First and last token (inclusive) visible to some row of each row of blocks.

    Returns:
        int32 ``[B|1, MB]`` twice; ``(0, -1)`` where nothing is visible.
    """
    block_q = frame.block_size[0]
    sq, sk = frame.lengths()
    top = torch.arange(frame.blocks[0], dtype=torch.int32, device=frame.device) * block_q
    bottom = torch.minimum(top + block_q, sq) - 1
    shift = sk - sq
    low = torch.zeros_like(bottom + shift) if frame.left is None else (top + shift - frame.left).clamp(min=0)
    high = sk - 1 if frame.right is None else torch.minimum(bottom + shift + frame.right, sk - 1)
    empty = (top >= sq) | (high < low)
    return torch.where(empty, 0, low), torch.where(empty, -1, high)


def visible_range(frame: Frame) -> tuple[Tensor, Tensor]:
    """First and last block (inclusive) that holds a token visible to some row of each row of blocks.

    Returns:
        int32 ``[B|1, MB]`` twice; ``(0, -1)`` where nothing is visible.
    """
    low, high = visible_span(frame)
    return low // frame.block_size[1], _floor_div(high, frame.block_size[1])


def full_range(frame: Frame) -> tuple[Tensor, Tensor]:
    """First and last block (inclusive) of which every token is visible to every row of each row of blocks.

    Blocks cut by the diagonal, the window or the end of a sequence (in either direction) are not full.

    Returns:
        int32 ``[B|1, MB]`` twice; ``(0, -1)`` where there is none.
    """
    block_q, block_kv = frame.block_size
    sq, sk = frame.lengths()
    top = torch.arange(frame.blocks[0], dtype=torch.int32, device=frame.device) * block_q
    bottom = top + block_q - 1
    shift = sk - sq
    low = torch.zeros_like(bottom + shift) if frame.left is None else (bottom + shift - frame.left).clamp(min=0)
    high = sk - 1 if frame.right is None else torch.minimum(top + shift + frame.right, sk - 1)
    first = _floor_div(low + block_kv - 1, block_kv)
    last = _floor_div(high + 1, block_kv) - 1
    empty = (bottom >= sq) | (last < first)
    return torch.where(empty, 0, first), torch.where(empty, -1, last)


def in_range(bounds: tuple[Tensor, Tensor], num_kv_blocks: int) -> Tensor:
    """bool ``[B|1, 1, MB, NB]``: blocks between the inclusive bounds."""
    n = torch.arange(num_kv_blocks, dtype=torch.int32, device=bounds[0].device)
    return ((n >= bounds[0].unsqueeze(-1)) & (n <= bounds[1].unsqueeze(-1))).unsqueeze(1)


def visible_tokens(frame: Frame) -> Tensor:
    """bool ``[B|1, 1, Sq, Sk]``: what the frame leaves visible, token by token."""
    sq, sk = (n.unsqueeze(-1) for n in frame.lengths())
    i = torch.arange(frame.seq_lens[0], dtype=torch.int32, device=frame.device).unsqueeze(-1)
    j = torch.arange(frame.seq_lens[1], dtype=torch.int32, device=frame.device)
    distance = j - (i + sk - sq)
    visible = (i < sq) & (j < sk)
    if frame.left is not None:
        visible = visible & (distance >= -frame.left)
    if frame.right is not None:
        visible = visible & (distance <= frame.right)
    return visible.unsqueeze(1)


def uncut_blocks(frame: Frame) -> Tensor:
    """bool ``[B|1, 1, MB, NB]``: blocks whose tokens, as far as they exist, are neither past the diagonal nor outside
    the window."""
    (mb, nb), (block_q, block_kv) = frame.blocks, frame.block_size
    sq, sk = (n[:, None, None] for n in frame.lengths())
    top = torch.arange(mb, device=frame.device)[:, None] * block_q
    start = torch.arange(nb, device=frame.device) * block_kv
    nearest = start - (torch.minimum(top + block_q, sq) - 1 + sk - sq)
    farthest = torch.minimum(start + block_kv, sk) - 1 - (top + sk - sq)
    uncut = (top >= sq) | (start >= sk)
    left, right = (max(frame.seq_lens) if bound is None else bound for bound in (frame.left, frame.right))
    return uncut | ((nearest >= -left) & (farthest <= right))
