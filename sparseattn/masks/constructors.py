"""Masks that follow from the lengths alone. BlockMask inherits these constructors as classmethods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.checks import check_frame, pair
from sparseattn.masks.lists import compact, interval_lists
from sparseattn.masks.visibility import Frame, in_range, visible_range

if TYPE_CHECKING:
    from sparseattn.masks.block_mask import BlockMask

Pair = int | tuple[int, int]
Window = tuple[int | None, int | None]


def make_frame(
    seq_lens: Pair,
    block_size: Pair,
    causal: bool,
    window: Window | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    device: torch.device | str | None,
) -> Frame:
    """Check and normalize the arguments every constructor shares. Lengths on a device decide the device."""
    check_frame(block_size, seq_lens, causal, window, seqused_q, seqused_k)
    used = seqused_q if seqused_q is not None else seqused_k
    if device is None:
        device = torch.get_default_device() if used is None else used.device
    return Frame(
        pair("block_size", block_size),
        pair("seq_lens", seq_lens),
        causal,
        window,
        seqused_q,
        seqused_k,
        torch.device(device),
    )


def _span_width(frame: Frame) -> int:
    """Most blocks that the visible interval of one row of blocks can touch; known without the device."""
    nb = frame.blocks[1]
    if frame.left is None or frame.right is None:
        return nb
    tokens = frame.left + frame.right + frame.block_size[0]
    return min(nb, (tokens - 2) // frame.block_size[1] + 2)


def at_least_zero(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise argument_error(name, "an int", repr(value), kind=TypeError)
    if value < 0:
        raise argument_error(name, "at least 0", value)
    return value


class Constructors:
    """Patterns that need no queries or keys.

    Shared arguments: ``seq_lens`` is ``(Sq, Sk)`` or one length for both; ``block_size`` is ``(block_q, block_kv)`` or
    one size for both; ``seqused_q``/``seqused_k`` (int32 [B]) are the true lengths of a ragged batch, by which each
    sequence's diagonal is aligned; ``device`` defaults to theirs, or to torch's default device. Patterns that do not
    depend on the head have one head; ``expand_heads`` repeats it.
    """

    @classmethod
    def _build(cls, counts: Tensor, indices: Tensor, frame: Frame) -> BlockMask:
        # By its global name: torch.compile cannot construct a class it only knows as an argument.
        from sparseattn.masks.block_mask import BlockMask

        return BlockMask(
            counts,
            indices,
            block_size=frame.block_size,
            seq_lens=frame.seq_lens,
            causal=frame.causal,
            window=frame.window,
            seqused_q=frame.seqused_q,
            seqused_k=frame.seqused_k,
        )

    @classmethod
    def causal(
        cls,
        seq_lens: Pair,
        *,
        block_size: Pair = 128,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Every block that holds a key at or before the diagonal; ``causal`` is set.

        With Sq > Sk the first ``Sq - Sk`` queries see no key.
        """
        frame = make_frame(seq_lens, block_size, True, None, seqused_q, seqused_k, device)
        return cls._from_intervals(frame)

    @classmethod
    def sliding_window(
        cls,
        seq_lens: Pair,
        window: Window,
        *,
        causal: bool = True,
        block_size: Pair = 128,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Every block that holds a key inside the window; ``window`` (and ``causal``) are set, so it is exact by token.

        Args:
            seq_lens: ``(Sq, Sk)`` or one length for both.
            window: ``(left, right)`` inclusive token counts around the diagonal; None is unbounded. A causal window
                over the W latest tokens is ``(W - 1, 0)``.
            causal: Also hide keys past the diagonal.
            block_size: ``(block_q, block_kv)`` or one size for both.
            seqused_q: int32 [B] true query lengths.
            seqused_k: int32 [B] true key lengths.
            device: Where the lists go.
        """
        if window is None:
            raise argument_error("window", "a pair (left, right)", None, "BlockMask.causal has no window.", TypeError)
        frame = make_frame(seq_lens, block_size, causal, window, seqused_q, seqused_k, device)
        return cls._from_intervals(frame)

    @classmethod
    def _from_intervals(cls, frame: Frame) -> BlockMask:
        first, last = visible_range(frame)
        return cls._build(*interval_lists(torch.zeros_like(first), first, last, _span_width(frame)), frame)

    @classmethod
    def streaming(
        cls,
        seq_lens: Pair,
        *,
        num_sink_tokens: int,
        num_local_tokens: int,
        causal: bool = True,
        block_size: Pair = 128,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Attention sinks and a local window (StreamingLLM, Xiao et al. 2023), in whole blocks.

        Lists the blocks that hold one of the first ``num_sink_tokens`` keys or, for some query of the block, one of its
        ``num_local_tokens`` latest keys (its own included). Blocks are kept whole, so every query sees at least these.

        Args:
            seq_lens: ``(Sq, Sk)`` or one length for both.
            num_sink_tokens: Keys kept at the start.
            num_local_tokens: Keys kept at the diagonal; without ``causal`` as many on its other side.
            causal: Hide keys past the diagonal.
            block_size: ``(block_q, block_kv)`` or one size for both.
            seqused_q: int32 [B] true query lengths.
            seqused_k: int32 [B] true key lengths.
            device: Where the lists go.
        """
        frame = make_frame(seq_lens, block_size, causal, None, seqused_q, seqused_k, device)
        sinks = -(-at_least_zero("num_sink_tokens", num_sink_tokens) // frame.block_size[1])
        lead = (visible_range(frame)[1] + 1).clamp(max=sinks)
        first, last, width = _local_range(frame, num_local_tokens)
        return cls._build(*interval_lists(lead, first, last, min(frame.blocks[1], sinks + width)), frame)

    @classmethod
    def strided(
        cls,
        seq_lens: Pair,
        *,
        stride: int,
        num_local_tokens: int = 0,
        causal: bool = True,
        block_size: Pair = 128,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Every ``stride``-th block counted back from the diagonal, and a local window (Child et al. 2019, strided).

        Args:
            seq_lens: ``(Sq, Sk)`` or one length for both.
            stride: Distance between kept blocks, in blocks; 1 keeps all.
            num_local_tokens: Keys kept at the diagonal besides, as in :meth:`streaming`.
            causal: Hide keys past the diagonal.
            block_size: ``(block_q, block_kv)`` or one size for both.
            seqused_q: int32 [B] true query lengths.
            seqused_k: int32 [B] true key lengths.
            device: Where the lists go.
        """
        if at_least_zero("stride", stride) == 0:
            raise argument_error("stride", "at least 1", stride)
        frame = make_frame(seq_lens, block_size, causal, None, seqused_q, seqused_k, device)
        nb = frame.blocks[1]
        first, last, width = _local_range(frame, num_local_tokens)
        _, diagonal = visible_range(frame._replace(causal=True))
        n = torch.arange(nb, dtype=torch.int32, device=frame.device)
        kept = ((diagonal.unsqueeze(-1) - n) % stride == 0).unsqueeze(1)
        kept = (kept | in_range((first, last), nb)) & in_range(visible_range(frame), nb)
        return cls._build(*compact(kept, min(nb, -(-nb // stride) + width)), frame)


def _local_range(frame: Frame, num_local_tokens: int) -> tuple[Tensor, Tensor, int]:
    """Blocks that hold one of the local keys of some query of each row of blocks, and the most there can be."""
    left = at_least_zero("num_local_tokens", num_local_tokens) - 1
    if left < 0:
        _, last = visible_range(frame)
        return torch.zeros_like(last), torch.full_like(last, -1), 0
    local = frame._replace(window=(left, None if frame.causal else left))
    return (*visible_range(local), _span_width(local))
