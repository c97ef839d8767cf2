"""BlockMask: which KV blocks every query block attends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.checks import check_contents, check_fields
from sparseattn.masks.converters import Converters
from sparseattn.masks.lists import compact, listed_entries, scatter_blocks
from sparseattn.masks.visibility import Frame, visible_range, visible_tokens

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
    """Which KV blocks every query block attends, and what is hidden inside those blocks.

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

    def __post_init__(self) -> None:
        check_fields(self)

    def validate(self) -> BlockMask:
        """Check the contents of the lists and return the mask. Waits for the device.

        Raises:
            ValueError: A count that does not fit the lists, an index out of range, lists that are not ascending or hold
                a duplicate, or a true length outside ``seq_lens``; the message names the field.
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
            ]
        )
        return (
            f"BlockMask(batch={self.batch}, heads={self.heads}, seq_lens={self.seq_lens}, "
            f"block_size={self.block_size}, blocks={self.num_q_blocks}x{self.num_kv_blocks}, "
            f"width={self.kv_indices.shape[-1]}{inside}, device={self.device})"
        )

    def densities(self) -> Tensor:
        """Share of the visible blocks that is listed, of every batch row and head.

        A block is visible when causality, the window and the true lengths leave at least one of its tokens visible.
        Where nothing is visible the share is 0.

        Returns:
            float32 ``[batch, H]`` on the mask's device, without waiting for it.
        """
        kept, visible = self._kept_and_visible()
        return (kept.double() / visible.clamp(min=1)).float()

    @property
    def density(self) -> float:
        """Share of all visible blocks that is listed. Waits for the device; :meth:`densities` does not."""
        kept, visible = self._kept_and_visible()
        return (kept.double().sum() / visible.sum().clamp(min=1)).item()

    def _kept_and_visible(self) -> tuple[Tensor, Tensor]:
        """How many visible blocks are listed, and how many there are: int64 ``[batch, H]`` twice."""
        first, last = visible_range(self.frame)
        visible = (last + 1 - first).sum(-1).unsqueeze(-1)
        first, last = first[:, None, :, None], last[:, None, :, None]
        kept = listed_entries(self.kv_num_blocks, self.kv_indices)
        kept = kept & (self.kv_indices >= first) & (self.kv_indices <= last)
        kept = kept.sum((-1, -2))
        return kept, visible.expand_as(kept)

    def to_blocks(self) -> Tensor:
        """bool ``[B|1, H, MB, NB]``: which blocks are listed, visible or not."""
        return scatter_blocks(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks).contiguous()

    def to_dense(self) -> Tensor:
        """bool ``[batch, H, Sq, Sk]``: which tokens are visible, with causality, window and lengths applied.

        For tests and pictures: this is the one method whose memory grows with Sq * Sk tokens.
        """
        blocks = scatter_blocks(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks)
        tokens = blocks[:, :, :, None, :, None].expand(-1, -1, -1, self.block_size[0], -1, self.block_size[1])
        tokens = tokens.flatten(4).flatten(2, 3)[:, :, : self.seq_lens[0], : self.seq_lens[1]]
        return tokens & visible_tokens(self.frame)

    def transposed(self) -> tuple[Tensor, Tensor]:
        """Which query blocks attend each KV block: the lists of the backward pass.

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
        lists = compact(scatter_blocks(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks).transpose(-1, -2))
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
        return replace(
            self,
            kv_num_blocks=self.kv_num_blocks.repeat_interleave(group, dim=1),
            kv_indices=self.kv_indices.repeat_interleave(group, dim=1),
        )

    def __or__(self, other: BlockMask) -> BlockMask:
        """Blocks listed in either mask. One head or batch row broadcasts to many.

        Raises:
            ValueError: Blocks, lengths, causality or window differ: a union hides the same tokens in all its blocks.
        """
        if not isinstance(other, BlockMask):
            return NotImplemented
        self._check_same(other, ("block_size", "seq_lens", "causal", "window", "device"))
        blocks = self.to_blocks() | other.to_blocks()
        return self._with_blocks(blocks, self.kv_indices.shape[-1] + other.kv_indices.shape[-1])

    def __and__(self, other: BlockMask) -> BlockMask:
        """Blocks listed in both masks, hiding what either hides. One head or batch row broadcasts to many.

        Raises:
            ValueError: Blocks or lengths differ. Causality and window may: those of the result are the stricter ones.
        """
        if not isinstance(other, BlockMask):
            return NotImplemented
        self._check_same(other, ("block_size", "seq_lens", "device"))
        blocks = self.to_blocks() & other.to_blocks()
        both = self._with_blocks(blocks, min(self.kv_indices.shape[-1], other.kv_indices.shape[-1]))
        return replace(both, causal=self.causal or other.causal, window=_stricter(self.window, other.window))

    def _with_blocks(self, blocks: Tensor, width: int) -> BlockMask:
        counts, indices = compact(blocks, min(width, self.num_kv_blocks))
        return replace(self, kv_num_blocks=counts, kv_indices=indices)

    def _check_same(self, other: BlockMask, names: tuple[str, ...]) -> None:
        for name in names:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise argument_error(name, f"the same in both masks ({mine})", theirs)
        for name in ("seqused_q", "seqused_k"):
            mine, theirs = getattr(self, name), getattr(other, name)
            # The same tensor needs no look at the device; another one with equal contents is as good.
            if mine is not theirs and (mine is None or theirs is None or not torch.equal(mine, theirs)):
                raise argument_error(name, "the same lengths in both masks", "different ones")
        for name, mine, theirs, hint in (
            ("heads", self.heads, other.heads, "Use expand_heads() to go from KV heads to query heads."),
            ("batch", self.kv_num_blocks.shape[0], other.kv_num_blocks.shape[0], ""),
        ):
            if mine != theirs and 1 not in (mine, theirs):
                raise argument_error(name, f"1 or the same in both masks ({mine})", theirs, hint)

    def trimmed(self) -> BlockMask:
        """This mask with lists no wider than its longest row. Waits for the device to learn how wide that is."""
        width = int(self.kv_num_blocks.max().item()) if self.kv_num_blocks.numel() else 0
        return replace(self, kv_indices=self.kv_indices[..., :width].contiguous())

    def to_bsr(self) -> tuple[Tensor, Tensor]:
        """This mask as block-sparse rows. Waits for the device (the result's size depends on the contents).

        Returns:
            ``indptr`` int32 ``[B|1, H, MB + 1]``, offsets into ``indices`` int32 ``[nnz]``, which holds the lists of
            all rows, heads and batch rows one after another. The matrix of one head is
            ``indptr[b, h] - indptr[b, h, 0]`` with ``indices[indptr[b, h, 0]:indptr[b, h, -1]]``.
        """
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
        """
        from sparseattn.masks.flex import to_flex

        return to_flex(self, num_heads, self_contained=self_contained)

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


def _stricter(
    a: tuple[int | None, int | None] | None, b: tuple[int | None, int | None] | None
) -> tuple[int | None, int | None] | None:
    """Window that is visible through both."""
    if a is None or b is None:
        return b if a is None else a
    left, right = (y if x is None else x if y is None else min(x, y) for x, y in zip(a, b, strict=True))
    return left, right
