"""Masks from other forms: booleans by block or token, index lists, block-sparse rows, FlexAttention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.checks import pair
from sparseattn.masks.constructors import Constructors, Pair, Window, at_least_zero, make_frame
from sparseattn.masks.engines import RUN, block_sparse_lists, minference_lists
from sparseattn.masks.lists import compact, listed_entries, scatter_blocks
from sparseattn.masks.variable import VariableBlocks
from sparseattn.masks.visibility import Frame, visible_tokens

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    from sparseattn.masks.block_mask import BlockMask


class Converters(Constructors, VariableBlocks):
    """Classmethods ``from_*``. Shared arguments are those of :class:`Constructors`, and

    ``causal`` and ``window``, which hide tokens inside the listed blocks and list nothing by themselves.
    """

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        *,
        seq_lens: Pair,
        block_size: Pair = 128,
        causal: bool = False,
        window: Window | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_blocks: int | None = None,
        repeat: Pair = 1,
    ) -> BlockMask:
        """From one boolean a block, or a few. Never waits for the device.

        Args:
            blocks: bool ``[B|1, H, MB, NB]``, or without the leading dimensions.
            seq_lens: ``(Sq, Sk)`` or one length for both.
            block_size: ``(block_q, block_kv)`` or one size for both.
            causal: Hide keys past the diagonal inside the listed blocks.
            window: Hide keys outside ``(left, right)`` of the diagonal inside the listed blocks.
            seqused_q: int32 [B] true query lengths.
            seqused_k: int32 [B] true key lengths.
            max_blocks: Width of the lists when an upper bound on a row's blocks is known; NB otherwise, since finding
                the longest row would have to wait for the device. Blocks past it are dropped.
            repeat: Rows and columns of blocks that each boolean stands for, a pair or one number for both: for choices
                among larger blocks. Then MB and NB are that much smaller, rounded up.

        Raises:
            TypeError: ``blocks`` is not a bool tensor.
            ValueError: Its shape does not fit the lengths.
        """
        blocks = _booleans("blocks", blocks, "[B|1, H, MB, NB], [H, MB, NB] or [MB, NB]")
        frame = make_frame(seq_lens, block_size, causal, window, seqused_q, seqused_k, blocks.device)
        repeat = pair("repeat", repeat)
        if min(repeat) < 1:
            raise argument_error("repeat", "numbers of at least 1", repeat)
        rows, cols = (-(-n // r) for n, r in zip(frame.blocks, repeat, strict=True))
        if blocks.shape[2:] != (rows, cols):
            lengths = f"seq_lens={frame.seq_lens} and block_size={frame.block_size}"
            expected = f"{rows} x {cols} blocks for {lengths}" + ("" if repeat == (1, 1) else f", repeat={repeat}")
            raise argument_error("blocks", expected, f"shape {tuple(blocks.shape)}")
        width = None if max_blocks is None else min(at_least_zero("max_blocks", max_blocks), frame.blocks[1])
        return cls._build(*compact(blocks, width, size=frame.blocks, repeat=repeat), frame)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        *,
        block_size: Pair = 128,
        causal: bool = False,
        window: Window | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        superset: bool = False,
    ) -> BlockMask:
        """From one boolean a token (True = visible).

        A block is listed when one of its tokens is True. A mask hides tokens inside its blocks by ``causal``,
        ``window`` and the lengths only, so the result is checked to be ``dense``, token by token (which waits for the
        device). ``superset=True`` accepts that it shows more; it never shows less.

        Args:
            dense: bool ``[B|1, H, Sq, Sk]``, or without the leading dimensions.
            block_size: ``(block_q, block_kv)`` or one size for both.
            causal: ``dense`` hides keys past the diagonal, and so does the mask inside its blocks.
            window: ``dense`` hides keys outside ``(left, right)`` of the diagonal, and so does the mask.
            seqused_q: int32 [B] true query lengths.
            seqused_k: int32 [B] true key lengths.
            superset: Keep blocks whole where the pattern inside them cannot be expressed.

        Raises:
            TypeError: ``dense`` is not a bool tensor.
            ValueError: ``dense`` cannot be expressed exactly; or, even with ``superset``, it shows tokens that
                ``causal``, ``window`` or the lengths hide.
        """
        dense = _booleans("dense", dense, "[B|1, H, Sq, Sk], [H, Sq, Sk] or [Sq, Sk]")
        seq_lens = (dense.shape[2], dense.shape[3])
        frame = make_frame(seq_lens, block_size, causal, window, seqused_q, seqused_k, dense.device)
        blocks = _any_token(dense, frame)
        hides = causal or window is not None or seqused_q is not None or seqused_k is not None
        if hides:
            lost = int((dense & ~visible_tokens(frame)).sum().item())
            if lost:
                raise argument_error(
                    "dense", "nothing visible that causal, window or the lengths hide", f"{lost} such tokens"
                )
        mask = cls._build(*compact(blocks), frame)
        if superset:
            return mask
        more = int((mask.to_dense() & ~dense).sum().item())
        if more:
            hint = "superset=True keeps whole blocks and shows these tokens too."
            if not causal and not (dense & ~visible_tokens(frame._replace(causal=True))).any():
                hint += " Nothing past the diagonal is visible: pass causal=True if the mask is causal."
            raise argument_error("dense", "whole blocks, cut by causal and window only", f"{more} hidden tokens", hint)
        return mask.trimmed()

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        counts: Tensor | None = None,
        *,
        seq_lens: Pair,
        block_size: Pair = 128,
        causal: bool = False,
        window: Window | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        sort: bool = False,
        validate: bool = True,
    ) -> BlockMask:
        """From lists of block indices.

        Args:
            indices: integer ``[B|1, H, MB, K]``, or without the leading dimensions.
            counts: integer ``[B|1, H, MB]`` likewise, how many entries of each list count. Without it -1 is padding:
                at the end of a list, or anywhere with ``sort``.
            seq_lens: ``(Sq, Sk)`` or one length for both.
            block_size: ``(block_q, block_kv)`` or one size for both.
            causal: Hide keys past the diagonal inside the listed blocks.
            window: Hide keys outside ``(left, right)`` of the diagonal inside the listed blocks.
            seqused_q: int32 [B] true query lengths.
            seqused_k: int32 [B] true key lengths.
            sort: Sort the lists and remove duplicates and padding.
            validate: Check the contents, which waits for the device. Without it the lists must be right: with ``sort``
                indices out of range are dropped, without they reach the kernels.

        Raises:
            TypeError: ``indices`` or ``counts`` hold no integers.
            ValueError: Shapes that do not fit; with ``validate`` also contents that do not (see ``validate()``).
        """
        indices = _integers("indices", indices)
        if not 2 <= indices.dim() <= 4:
            raise argument_error("indices", "[B|1, H, MB, K], [H, MB, K] or [MB, K]", f"shape {tuple(indices.shape)}")
        frame = make_frame(seq_lens, block_size, causal, window, seqused_q, seqused_k, indices.device)
        nb = frame.blocks[1]
        # Without counts, sorting drops the padding; lists taken as they are must not hold any before their end.
        least = -1 if counts is None and sort else 0
        indices = indices[(None,) * (4 - indices.dim())]
        if counts is None:
            listed = indices >= 0 if not sort else torch.ones_like(indices, dtype=torch.bool)
            counts = listed.sum(-1, dtype=torch.int32)
        else:
            counts = _integers("counts", counts)
            counts = counts[(None,) * (3 - counts.dim())]
        if counts.shape != indices.shape[:3] or counts.shape[2] != frame.blocks[0] or counts.device != indices.device:
            raise argument_error(
                "indices/counts",
                f"[B|1, H, {frame.blocks[0]}, K] and [B|1, H, {frame.blocks[0]}] on one device "
                f"for {frame.seq_lens[0]} queries in blocks of {frame.block_size[0]}",
                f"{tuple(indices.shape)} on {indices.device} and {tuple(counts.shape)} on {counts.device}",
            )
        if validate:
            _check_range(indices, counts, least, nb)
        counts, indices = counts.to(torch.int32), indices.to(torch.int32)
        if sort:
            width = min(nb, indices.shape[-1])
            return cls._build(*compact(scatter_blocks(counts, indices, nb), width), frame)
        mask = cls._build(counts, indices[..., :nb].contiguous(), frame)
        return mask.validate() if validate else mask

    @classmethod
    def from_bsr(
        cls,
        indptr: Tensor,
        indices: Tensor,
        *,
        seq_lens: Pair,
        block_size: Pair = 128,
        causal: bool = False,
        window: Window | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_blocks: int | None = None,
        sort: bool = False,
        validate: bool = True,
    ) -> BlockMask:
        """From block-sparse rows, as SciPy and FlashInfer hold them, for one matrix or one a head.

        Args:
            indptr: integer ``[MB + 1]``, ``[H, MB + 1]`` or ``[B|1, H, MB + 1]``: row m of a head lists
                ``indices[indptr[m]:indptr[m + 1]]``. Heads share one ``indices``, so their offsets are absolute.
            indices: integer ``[nnz]``, column blocks.
            seq_lens: ``(Sq, Sk)`` or one length for both.
            block_size: ``(block_q, block_kv)`` or one size for both.
            causal: Hide keys past the diagonal inside the listed blocks.
            window: Hide keys outside ``(left, right)`` of the diagonal inside the listed blocks.
            seqused_q: int32 [B] true query lengths.
            seqused_k: int32 [B] true key lengths.
            max_blocks: Width of the lists, at least the longest row; NB by default.
            sort: Sort the rows and remove duplicates.
            validate: Check the contents, which waits for the device.

        Raises:
            TypeError: ``indptr`` or ``indices`` hold no integers.
            ValueError: Shapes that do not fit; with ``validate`` also contents that do not.
        """
        indptr, indices = _integers("indptr", indptr), _integers("indices", indices)
        rows, nb = make_frame(seq_lens, block_size, causal, window, None, None, indptr.device).blocks
        if not 1 <= indptr.dim() <= 3 or indptr.shape[-1] != rows + 1:
            raise argument_error(
                "indptr", f"[MB + 1], [H, MB + 1] or [B|1, H, MB + 1] with MB = {rows}", f"shape {tuple(indptr.shape)}"
            )
        if indices.dim() != 1 or indices.device != indptr.device:
            raise argument_error(
                "indices", f"[nnz] on {indptr.device}", f"shape {tuple(indices.shape)} on {indices.device}"
            )
        counts = indptr.diff()
        width = nb if max_blocks is None else min(at_least_zero("max_blocks", max_blocks), nb)
        if validate:
            _check_indptr(indptr, counts, indices.shape[0], width)
        entry = torch.arange(width, device=indptr.device)
        where = (indptr[..., :-1, None] + entry).clamp(min=0, max=max(indices.shape[0] - 1, 0))
        lists = indices[where.long()] if indices.shape[0] else torch.zeros_like(where)
        return cls.from_indices(
            lists, counts, seq_lens=seq_lens, block_size=block_size, causal=causal, window=window, seqused_q=seqused_q,
            seqused_k=seqused_k, sort=sort, validate=validate,
        )  # fmt: skip

    @classmethod
    def from_flex(
        cls, block_mask: FlexBlockMask, *, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None
    ) -> BlockMask:
        """From FlexAttention's ``BlockMask``. Waits for the device.

        Partial and full blocks are listed alike. What ``mask_mod`` hides is found by calling it on the tokens of the
        partial blocks (``noop_mask`` excepted): it must hide nothing, or what one causal diagonal or one window hides.

        Args:
            block_mask: ``torch.nn.attention.flex_attention.BlockMask`` with lists ``[B, H, MB, NB]``.
            seqused_q: int32 [B] true query lengths, when the ``mask_mod`` hides what lies past them.
            seqused_k: int32 [B] true key lengths, likewise.

        Raises:
            TypeError: Not a FlexAttention BlockMask.
            ValueError: Its blocks are no multiples of 16 in 16..256, or its ``mask_mod`` is something else.
        """
        from sparseattn.masks.flex import from_flex

        return cls._build(*from_flex(block_mask, seqused_q, seqused_k)).trimmed()

    @classmethod
    def from_block_sparse_tensors(
        cls,
        tensors: Any,
        *,
        seq_lens: Pair,
        block_size: Pair | None = None,
        causal: bool = False,
        window: Window | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        validate: bool = True,
    ) -> BlockMask:
        """From FlashAttention-4's ``BlockSparseTensorsTorch`` (forward lists), or a dict of its fields.

        Args:
            tensors: ``mask_block_cnt``, ``mask_block_idx`` and, if any, ``full_block_cnt``, ``full_block_idx``; batch
                and head dimensions may be 1. Lists need not ascend.
            seq_lens: ``(Sq, Sk)`` or one length for both.
            block_size: ``(block_q, block_kv)``; by default the tensors' own.
            causal: What the kernel was told, which hides tokens in the partial blocks.
            window: Likewise.
            seqused_q: int32 [B] true query lengths.
            seqused_k: int32 [B] true key lengths.
            validate: Check the contents, which waits for the device.

        Raises:
            TypeError: Fields that are no int32 tensors.
            ValueError: Shapes that do not fit; with ``validate`` also contents that do not, full blocks that ``causal``
                or ``window`` would cut among them.
        """
        own = tensors.get("block_size") if isinstance(tensors, dict) else getattr(tensors, "block_size", None)
        size = own if block_size is None else block_size
        if size is None:
            raise argument_error("block_size", "given where the tensors do not say", None)
        counts = tensors.get("mask_block_cnt") if isinstance(tensors, dict) else tensors.mask_block_cnt
        device = getattr(counts, "device", None)
        frame = make_frame(seq_lens, size, causal, window, seqused_q, seqused_k, device)
        return cls._build(*block_sparse_lists(tensors, frame, validate), frame)

    @classmethod
    def from_minference(
        cls,
        block_count: Tensor,
        block_offset: Tensor,
        column_count: Tensor,
        column_index: Tensor,
        *,
        seq_lens: Pair,
        superset: bool = False,
    ) -> BlockMask:
        """From the lists of MInference's vertical-slash kernel. Waits for the device.

        Its runs of 64 keys start anywhere. Blocks of 64 that runs and columns cover are listed, and the keys left over
        become columns, so the mask shows exactly what the kernel does (causally, also among its columns).

        Args:
            block_count: int32 ``[B, H, tiles]``, runs of every tile of 64 queries.
            block_offset: int32 ``[B, H, tiles, S]``, their first tokens.
            column_count: int32 ``[B, H, tiles]``.
            column_index: int32 ``[B, H, tiles, C]``, tokens.
            seq_lens: ``(Sq, Sk)`` or one length for both.
            superset: List every block that a run touches instead; columns stay columns.

        Raises:
            TypeError: Lists that are not int32.
            ValueError: Shapes that do not fit.
        """
        frame = make_frame(seq_lens, RUN, True, None, None, None, getattr(block_count, "device", None))
        lists = (block_count, block_offset, column_count, column_index)
        blocks, columns = minference_lists(lists, frame, superset)
        return cls._build(*compact(blocks), frame).with_columns(columns, sort=True).trimmed()


def _any_token(dense: Tensor, frame: Frame) -> Tensor:
    """bool ``[B|1, H, MB, NB]``: blocks with a True token."""
    (rows, cols), (block_q, block_kv) = frame.blocks, frame.block_size
    pad = (0, cols * block_kv - dense.shape[3], 0, rows * block_q - dense.shape[2])
    padded = torch.nn.functional.pad(dense, pad)
    return padded.unflatten(3, (cols, block_kv)).any(4).unflatten(2, (rows, block_q)).any(3)


def _booleans(name: str, mask: Tensor, layout: str) -> Tensor:
    if not isinstance(mask, Tensor):
        raise argument_error(name, "a torch.Tensor", type(mask).__name__, kind=TypeError)
    if mask.dtype != torch.bool:
        raise argument_error(name, "bool", mask.dtype, "True means visible.", kind=TypeError)
    if not 2 <= mask.dim() <= 4:
        raise argument_error(name, layout, f"shape {tuple(mask.shape)}")
    return mask[(None,) * (4 - mask.dim())]


def _integers(name: str, t: Any) -> Tensor:
    t = torch.as_tensor(t)
    if t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
        raise argument_error(name, "integers", t.dtype, kind=TypeError)
    return t


def _check_range(indices: Tensor, counts: Tensor, least: int, nb: int) -> None:
    """Raise unless counts fit and every entry before its count is at least ``least`` and below ``nb``."""
    width = indices.shape[-1]
    wrong_count = (counts < 0) | (counts > width)
    wrong = listed_entries(counts, indices) & ((indices < least) | (indices >= nb))
    bad_count, bad_index = torch.stack([wrong_count.any(), wrong.any()]).tolist()
    if bad_count:
        raise argument_error("counts", f"0..{width} (the width of indices)", counts[wrong_count][0].item())
    if bad_index:
        hint = "Padding (-1) before the end of a list needs sort=True." if least == 0 else ""
        raise argument_error("indices", f"block indices in [0, {nb})", indices[wrong][0].item(), hint)


def _check_indptr(indptr: Tensor, counts: Tensor, nnz: int, width: int) -> None:
    outside = (indptr < 0) | (indptr > nnz)
    bad = torch.stack([outside.any(), (counts < 0).any(), (counts > width).any()]).tolist()
    if bad[0]:
        raise argument_error("indptr", f"offsets in 0..{nnz} (the length of indices)", indptr[outside][0].item())
    if bad[1]:
        raise argument_error("indptr", "offsets that never decrease", "a row of negative length")
    if bad[2]:
        raise argument_error(
            "indptr", f"rows of at most {width} blocks", int(counts.max().item()), "Is max_blocks too small?"
        )
