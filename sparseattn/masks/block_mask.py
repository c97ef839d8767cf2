"""BlockMask: which KV blocks, and which single keys besides, every query block attends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.algebra import intersection, union
from sparseattn.masks.checks import check_columns, check_contents, check_fields, no_columns
from sparseattn.masks.columns import scatter_columns, tidy_columns
from sparseattn.masks.converters import Converters
from sparseattn.masks.engines import to_block_sparse_tensors, to_minference
from sparseattn.masks.lists import compact, listed_entries, scatter_blocks, transpose_lists
from sparseattn.masks.statistics import kept_and_visible
from sparseattn.masks.visibility import Frame, visible_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    class _Causal:
        """For type checkers: ``mask.causal`` is the flag, ``BlockMask.causal(...)`` the constructor."""

        @overload
        def __get__(self, instance: None, owner: type) -> Callable[..., BlockMask]: ...
        @overload
        def __get__(self, instance: object, owner: type) -> bool: ...
        def __get__(self, instance: object, owner: type) -> Any: ...
        def __set__(self, instance: object, value: bool) -> None: ...


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask(Converters):
    """Which KV blocks every query block attends, which single keys besides, and what is hidden among all of these.

    The lists are FlexAttention's ``kv_num_blocks``/``kv_indices``, compact (as wide as the longest list needs, at most
    NB). Building a mask checks shapes, dtypes and devices only and never waits for a device; :meth:`validate` checks
    the contents. Tensors must not be modified once in a mask.

    Attributes:
        kv_num_blocks: int32 ``[B|1, H, MB]``, how many KV blocks query block m of head h attends. H is 1 (every head
            shares the lists), the number of KV heads (a GQA group shares), or the number of query heads.
        kv_indices: int32 ``[B|1, H, MB, K]``, which: ascending, unique, undefined past the count.
        block_size: ``(block_q, block_kv)`` in tokens, each a multiple of 16 in 16..256.
        seq_lens: ``(Sq, Sk)``; of a ragged batch the longest. MB = ceil(Sq / block_q), NB = ceil(Sk / block_kv).
        causal: Inside the listed blocks, query i sees key j only if ``j <= i + Sk - Sq`` (bottom-right aligned). Blocks
            that lie wholly above the diagonal may be listed; they count as empty.
        window: ``(left, right)``, inclusive counts around that diagonal: key j is visible only if
            ``i + Sk - Sq - left <= j <= i + Sk - Sq + right``. None is unbounded.
        seqused_q: int32 ``[B]``, the true query lengths of a ragged batch. Blocks count from each sequence's own start,
            and the diagonal is aligned by its own lengths.
        seqused_k: int32 ``[B]``, likewise for keys.
        column_indices: int32 ``[B|1, H, MB, C]``, single keys (tokens, counted from the sequence's own start) that
            query block m attends besides its blocks: ascending, unique, outside the listed blocks, -1 padded at the
            end; batch and heads are those of ``kv_num_blocks``. Causality, window and lengths hide tokens among them as
            they do inside blocks. None is no columns; :meth:`with_columns` brings any lists to this form.

    Raises:
        TypeError: A field of the wrong type or dtype.
        ValueError: Shapes, devices or values that do not fit; the message names the field.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: tuple[int, int]
    seq_lens: tuple[int, int]
    # The default comes from a factory because a plain default would replace the constructor of the same name on the
    # class. On instances the field wins.
    causal: _Causal = field(default_factory=bool)  # type: ignore[assignment]
    window: tuple[int | None, int | None] | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    column_indices: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def validate(self) -> BlockMask:
        """Check the contents of the lists and return the mask. Waits for the device.

        Raises:
            ValueError: A count that does not fit the lists, an index out of range, lists that are not ascending or hold
                a duplicate, columns likewise or inside a listed block, or a true length outside ``seq_lens``; the
                message names the field.
        """
        check_contents(self)
        return self

    @property
    def batch(self) -> int:
        """Number of sequences; 1 when one mask serves any batch."""
        used = self.seqused_q if self.seqused_q is not None else self.seqused_k
        return self.kv_num_blocks.shape[0] if used is None else used.shape[0]

    @property
    def heads(self) -> int:
        return self.kv_num_blocks.shape[1]

    @property
    def num_q_blocks(self) -> int:
        """MB, rows of blocks."""
        return -(-self.seq_lens[0] // self.block_size[0])

    @property
    def num_kv_blocks(self) -> int:
        """NB, columns of blocks."""
        return -(-self.seq_lens[1] // self.block_size[1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, Sq, Sk)``."""
        return (self.batch, self.heads, *self.seq_lens)

    @property
    def device(self) -> torch.device:
        return self.kv_num_blocks.device

    @property
    def ragged(self) -> bool:
        """Whether sequences have lengths of their own."""
        return self.seqused_q is not None or self.seqused_k is not None

    @property
    def frame(self) -> Frame:
        """Everything but the lists."""
        return Frame(
            self.block_size, self.seq_lens, self.causal, self.window, self.seqused_q, self.seqused_k, self.device
        )

    def __repr__(self) -> str:
        inside = "".join(
            [
                ", causal" if self.causal else "",
                "" if self.window is None else f", window={self.window}",
                ", ragged" if self.ragged else "",
                "" if self.column_indices is None else f", columns={self.column_indices.shape[-1]}",
            ]
        )
        return (
            f"BlockMask(batch={self.batch}, heads={self.heads}, seq_lens={self.seq_lens}, "
            f"block_size={self.block_size}, blocks={self.num_q_blocks}x{self.num_kv_blocks}, "
            f"width={self.kv_indices.shape[-1]}{inside}, device={self.device})"
        )

    def densities(self) -> Tensor:
        """Share of the visible blocks that is listed, of every batch row and head.

        A block is visible when causality, the window and the true lengths leave at least one of its tokens visible. A
        column counts as the ``1 / block_kv`` of a block that it costs. Where nothing is visible the share is 0.

        Returns:
            float32 ``[batch, H]`` on the mask's device, without waiting for it.
        """
        kept, visible = (t.sum(-1) for t in kept_and_visible(self))
        return (kept / visible.clamp(min=1)).float()

    def row_densities(self) -> Tensor:
        """As :meth:`densities`, of every row of blocks: float32 ``[batch, H, MB]``."""
        kept, visible = kept_and_visible(self)
        return (kept / visible.clamp(min=1)).float()

    @property
    def density(self) -> float:
        """Share of all visible blocks that is listed. Waits for the device; :meth:`densities` does not."""
        kept, visible = (t.sum() for t in kept_and_visible(self))
        return (kept / visible.clamp(min=1)).item()

    def to_blocks(self) -> Tensor:
        """bool ``[B|1, H, MB, NB]``: which blocks are listed, visible or not. Columns are no part of it."""
        return scatter_blocks(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks).contiguous()

    def to_dense(self) -> Tensor:
        """bool ``[batch, H, Sq, Sk]``: which tokens are visible, with causality, window and lengths applied.

        For tests and pictures: this is the one method whose memory grows with Sq * Sk tokens.
        """
        (sq, sk), (block_q, block_kv) = self.seq_lens, self.block_size
        tokens = self.to_blocks()[..., None].expand(-1, -1, -1, -1, block_kv).flatten(3)[..., :sk]
        if self.column_indices is not None:
            tokens = tokens | scatter_columns(self.column_indices, sk)
        tokens = tokens[:, :, :, None].expand(-1, -1, -1, block_q, -1).flatten(2, 3)[:, :, :sq]
        return tokens & visible_tokens(self.frame)

    def column_counts(self) -> Tensor | None:
        """int32 ``[B|1, H, MB]``, how many columns each row lists, on the device; None without columns."""
        return None if self.column_indices is None else (self.column_indices >= 0).sum(-1, dtype=torch.int32)

    def with_columns(self, columns: Tensor, *, sort: bool = False) -> BlockMask:
        """This mask with other columns (it loses those it had). Never waits for the device.

        Args:
            columns: int32 ``[B|1, H|1, MB|1, C]``, or without leading dimensions: keys that the rows attend besides
                their blocks. Negative entries and ones past the end are padding and may stand anywhere. What lies in a
                listed block, or is hidden from all queries of the row, is left out. Batch rows and heads broadcast, on
                either side.
            sort: Sort the lists and remove duplicates. Without it they must ascend already.

        Raises:
            TypeError: ``columns`` is not int32.
            ValueError: Its shape does not fit.
        """
        columns, shape = check_columns(columns, self)
        counts = self.kv_num_blocks.expand(shape)
        indices = self.kv_indices.expand(*shape, -1)
        columns = tidy_columns(columns.expand(*shape, -1), counts, indices, self.frame, sort=sort)
        return replace(self, kv_num_blocks=counts.contiguous(), kv_indices=indices.contiguous(), column_indices=columns)

    def whole_blocks(self) -> BlockMask:
        """This mask with the block of every column listed whole instead: a superset for what knows no columns."""
        if self.column_indices is None:
            return self
        blocks = self.to_blocks() | scatter_columns(self.column_indices, self.num_kv_blocks, self.block_size[1])
        width = min(self.num_kv_blocks, self.kv_indices.shape[-1] + self.column_indices.shape[-1])
        counts, indices = compact(blocks, width)
        return replace(self, kv_num_blocks=counts, kv_indices=indices, column_indices=None)

    def transposed(self) -> tuple[Tensor, Tensor]:
        """Which query blocks attend each KV block: the lists of the backward pass. Columns are no part of it.

        Built on the device without waiting for it, and kept on the mask. Under torch.compile or while a CUDA graph is
        being captured they are built anew, since the memory would belong to the graph.

        Returns:
            ``q_num_blocks`` int32 ``[B|1, H, NB]`` and ``q_indices`` int32 ``[B|1, H, NB, MB]``, ascending, zero past
            the count.
        """
        keep = not torch.compiler.is_compiling() and not (
            self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        )
        if keep and "_transposed" in self.__dict__:
            return self.__dict__["_transposed"]
        lists = transpose_lists(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks)
        if keep:
            self.__dict__["_transposed"] = lists
        return lists

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_transposed"}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BlockMask:
        """This mask on ``device``; the mask itself when it is there already."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=non_blocking)

        counts = move(self.kv_num_blocks)
        if counts is self.kv_num_blocks:
            return self
        return replace(
            self,
            kv_num_blocks=counts,
            kv_indices=move(self.kv_indices),
            seqused_q=None if self.seqused_q is None else move(self.seqused_q),
            seqused_k=None if self.seqused_k is None else move(self.seqused_k),
            column_indices=None if self.column_indices is None else move(self.column_indices),
        )

    def expand_heads(self, heads: int) -> BlockMask:
        """This mask with ``heads`` heads: query head h takes the lists of head ``h // (heads // H)``, as GQA groups do.

        Raises:
            ValueError: ``heads`` is not a multiple of the mask's heads.
        """
        if heads == self.heads:
            return self
        if heads < 1 or heads % self.heads:
            raise argument_error("heads", f"a multiple of the mask's {self.heads} heads", heads)
        group = heads // self.heads
        columns = self.column_indices
        return replace(
            self,
            kv_num_blocks=self.kv_num_blocks.repeat_interleave(group, dim=1),
            kv_indices=self.kv_indices.repeat_interleave(group, dim=1),
            column_indices=None if columns is None else columns.repeat_interleave(group, dim=1),
        )

    def __or__(self, other: BlockMask) -> BlockMask:
        """Blocks and columns listed in either mask. One head or batch row broadcasts to many.

        Raises:
            ValueError: Blocks, lengths, causality or window differ: a union hides the same tokens in all its blocks.
        """
        return union(self, other) if isinstance(other, BlockMask) else NotImplemented

    def __and__(self, other: BlockMask) -> BlockMask:
        """Tokens listed in both masks, hiding what either hides. One head or batch row broadcasts to many.

        Raises:
            ValueError: Blocks or lengths differ. Causality and window may: those of the result are the stricter ones.
        """
        return intersection(self, other) if isinstance(other, BlockMask) else NotImplemented

    def trimmed(self) -> BlockMask:
        """This mask with lists no wider than its longest row. Waits for the device to learn how wide that is."""
        width = int(self.kv_num_blocks.max().item()) if self.kv_num_blocks.numel() else 0
        columns, counts = self.column_indices, self.column_counts()
        if columns is not None and counts is not None:
            columns = columns[..., : int(counts.max().item()) if counts.numel() else 0].contiguous()
        return replace(self, kv_indices=self.kv_indices[..., :width].contiguous(), column_indices=columns)

    def to_bsr(self) -> tuple[Tensor, Tensor]:
        """This mask as block-sparse rows. Waits for the device (the result's size depends on the contents).

        Returns:
            ``indptr`` int32 ``[B|1, H, MB + 1]``, offsets into ``indices`` int32 ``[nnz]``, which holds the lists of
            all rows, heads and batch rows one after another. The matrix of one head is
            ``indptr[b, h] - indptr[b, h, 0]`` with ``indices[indptr[b, h, 0]:indptr[b, h, -1]]``.

        Raises:
            ValueError: The mask has columns.
        """
        no_columns(self, "to_bsr")
        counts, rows = self.kv_num_blocks, self.num_q_blocks
        offsets = torch.nn.functional.pad(counts.flatten().cumsum(0, dtype=torch.int32), (1, 0))
        # The end of one head's rows is the start of the next's.
        first = torch.arange(counts.shape[0] * counts.shape[1], device=self.device) * rows
        indptr = offsets[first[:, None] + torch.arange(rows + 1, device=self.device)]
        indptr = indptr.view(*counts.shape[:2], rows + 1)
        return indptr, self.kv_indices[listed_entries(counts, self.kv_indices)]

    def to_flex(self, num_heads: int | None = None, *, self_contained: bool = True) -> FlexBlockMask:
        """This mask as FlexAttention's ``BlockMask``: full and partial blocks, and the transposed lists of both.

        Blocks of which every token is visible are full. Those cut by the diagonal, the window or a sequence's end are
        partial, and ``mask_mod`` says what is visible in them. FlexAttention wants lists of full width, so memory is
        four int32 tensors of MB * NB entries per head.

        Args:
            num_heads: Query heads. The mask's heads are repeated to it as by :meth:`expand_heads`, except that lists
                shared by all heads stay shared. None keeps the mask's heads.
            self_contained: Let ``mask_mod`` also test whether a block is listed, so that what ignores the lists
                (uncompiled ``flex_attention``, ``create_mask``, context parallelism) is right as well. False leaves
                that lookup out, for compiled kernels only.

        Returns:
            ``torch.nn.attention.flex_attention.BlockMask``.

        Raises:
            ValueError: The mask has columns, or ``num_heads`` does not fit.
        """
        no_columns(self, "to_flex")
        from sparseattn.masks.flex import to_flex

        return to_flex(self, num_heads, self_contained=self_contained)

    def to_block_sparse_tensors(self, num_heads: int | None = None, *, transposed: bool = False) -> dict[str, Any]:
        """The fields of FlashAttention-4's ``BlockSparseTensorsTorch``: ``BlockSparseTensorsTorch(**fields)``.

        Args:
            num_heads: Query heads; lists are repeated to it as by :meth:`to_flex`.
            transposed: Lists of query blocks for every key block, which its backward pass takes.

        Returns:
            ``mask_block_cnt`` int32 ``[B|1, H|1, MB]`` and ``mask_block_idx`` ``[..., K]``, blocks that the diagonal,
            the window or an end cuts; ``full_block_cnt`` and ``full_block_idx``, whole ones; and ``block_size``. The
            kernel hides tokens in the former as its own ``causal`` and ``window_size`` say: pass the mask's.

        Raises:
            ValueError: The mask has columns, or ``num_heads`` does not fit.
        """
        return to_block_sparse_tensors(self, num_heads, transposed=transposed)

    def to_minference(self, num_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The lists of MInference's vertical-slash kernel, tiles of 64 queries and runs of 64 keys.

        Returns:
            ``block_count`` int32 ``[B, H, tiles]``, ``block_offset`` ``[B, H, tiles, S]`` (first tokens of runs),
            ``column_count`` ``[B, H, tiles]`` and ``column_index`` ``[B, H, tiles, C]``, 0 past the counts.

        Raises:
            ValueError: What the kernel cannot do: a mask that is not causal, a window, lengths that differ, blocks that
                are no multiples of 64, columns behind the first row of their tile (found by waiting for the device).
        """
        return to_minference(self, num_heads)

    def plot(self, heads: Sequence[int] | None = None, *, batch: int = 0, path: str | None = None) -> Figure:
        """Draw the block maps of a few heads.

        Args:
            heads: Which heads; by default up to four, spread evenly.
            batch: Which batch row.
            path: Also save the picture here.

        Returns:
            The ``matplotlib.figure.Figure``. It belongs to no global plotting state.

        Raises:
            ImportError: matplotlib is missing (``pip install "sparseattn[viz]"``).
            ValueError: A head or batch row that the mask does not have.
        """
        from sparseattn.masks.plot import plot_mask

        return plot_mask(self, heads, batch=batch, path=path)
