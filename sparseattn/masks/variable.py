"""VariableBlockMask: blocks of any sizes, chosen and cut head by head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.checks import check_frame, check_tensor, pair
from sparseattn.masks.constructors import Pair, Window
from sparseattn.masks.lists import search
from sparseattn.masks.tilings import Tiling, block_spans, make_tiling
from sparseattn.masks.visibility import Frame, visible_tokens


@dataclass(frozen=True, eq=False, repr=False)
class VariableBlockMask:
    """Which blocks every row of blocks attends, where each head has rows and columns of blocks of sizes of its own.

    The pattern of FlashInfer's ``VariableBlockSparseAttentionWrapper`` (its PR 1177), with causality and windows in
    original positions. ``BlockMask.from_variable_blocks`` builds one. Building checks shapes, dtypes and devices only
    and never waits for a device; :meth:`validate` checks the contents. Where sizes do not add up to the lengths, tokens
    past the last block belong to none (such a query sees no key), and what lies past the end is cut off. Tensors must
    not be modified once in a mask.

    Attributes:
        blocks: bool ``[B|1, H, MB, NB]``, whether row m of blocks attends column n of blocks. H is 1 (every head), the
            number of KV heads (a GQA group shares), or the number of query heads.
        row_sizes: int32 ``[H, MB]``, queries of each row of blocks; 0 is allowed; they add up to Sq.
        col_sizes: int32 ``[H, NB]``, keys of each column of blocks; they add up to Sk.
        seq_lens: ``(Sq, Sk)``.
        causal: Inside the blocks, query i sees key j only if ``j <= i + Sk - Sq`` (bottom-right aligned).
        window: ``(left, right)``, inclusive counts around that diagonal: key j is visible only if
            ``i + Sk - Sq - left <= j <= i + Sk - Sq + right``. None is unbounded.

    Raises:
        TypeError: A field of the wrong type or dtype.
        ValueError: Shapes, devices or values that do not fit; the message names the field.
    """

    blocks: Tensor
    row_sizes: Tensor
    col_sizes: Tensor
    seq_lens: tuple[int, int]
    causal: bool = False
    window: Window | None = None

    def __post_init__(self) -> None:
        # Sizes of blocks are tensors here, so there is none to check.
        check_frame((16, 16), self.seq_lens, self.causal, self.window, None, None)
        blocks = _check_blocks(self.blocks)
        if blocks.dim() != 4 or min(blocks.shape) < 1:
            raise argument_error("blocks", "shape [B|1, H, MB, NB], each at least 1", f"shape {tuple(blocks.shape)}")
        heads, mb, nb = blocks.shape[1:]
        for name, sizes, count in (("row_sizes", self.row_sizes, mb), ("col_sizes", self.col_sizes, nb)):
            check_tensor(name, sizes, 2)
            if sizes.shape != (heads, count):
                raise argument_error(name, f"shape {(heads, count)} like blocks", f"shape {tuple(sizes.shape)}")
            if sizes.device != blocks.device:
                raise argument_error(name, f"device {blocks.device} like blocks", sizes.device)

    def validate(self) -> VariableBlockMask:
        """Check the sizes and return the mask. Waits for the device.

        Raises:
            ValueError: A negative size, or sizes of a head that do not add up to the length.
        """
        for name, sizes, length in zip(
            ("row_sizes", "col_sizes"), (self.row_sizes, self.col_sizes), self.seq_lens, strict=True
        ):
            least, *sums = torch.cat([sizes.min().long()[None], sizes.sum(-1)]).tolist()
            if least < 0:
                raise argument_error(name, "sizes of at least 0", least)
            for head, total in enumerate(sums):
                if total != length:
                    raise argument_error(name, f"sizes that add up to {length}", f"{total} for head {head}")
        return self

    @property
    def batch(self) -> int:
        """Number of sequences; 1 when one mask serves any batch."""
        return self.blocks.shape[0]

    @property
    def heads(self) -> int:
        return self.blocks.shape[1]

    @property
    def num_q_blocks(self) -> int:
        """MB, rows of blocks."""
        return self.blocks.shape[2]

    @property
    def num_kv_blocks(self) -> int:
        """NB, columns of blocks."""
        return self.blocks.shape[3]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, Sq, Sk)``."""
        return (self.batch, self.heads, *self.seq_lens)

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def __repr__(self) -> str:
        inside = (", causal" if self.causal else "") + ("" if self.window is None else f", window={self.window}")
        return (
            f"VariableBlockMask(batch={self.batch}, heads={self.heads}, seq_lens={self.seq_lens}, "
            f"blocks={self.num_q_blocks}x{self.num_kv_blocks}{inside}, device={self.device})"
        )

    def densities(self) -> Tensor:
        """Share of the visible (query, key) pairs that lies in chosen blocks, of every batch row and head.

        Counted in tokens, since blocks differ in size. Where nothing is visible the share is 0.

        Returns:
            float32 ``[batch, H]`` on the mask's device, without waiting for it.
        """
        kept, visible = self._kept_and_visible()
        return (kept / visible.clamp(min=1)).float()

    @property
    def density(self) -> float:
        """Share of all visible pairs that lies in chosen blocks. Waits for the device; :meth:`densities` does not."""
        kept, visible = (t.sum() for t in self._kept_and_visible())
        return (kept / visible.clamp(min=1)).item()

    def _kept_and_visible(self) -> tuple[Tensor, Tensor]:
        """How many visible pairs lie in chosen blocks, and how many there are: int64 ``[batch, H]``."""
        sq, sk = self.seq_lens
        # Not torch.tensor, which would wait for the device.
        whole = [torch.full((1, 1), end, device=self.device) for end in (0, sq, 0, sk)]
        rows, cols = (
            block_spans(sizes, n) for sizes, n in ((self.row_sizes, sq), (self.col_sizes, sk))
        )  # fmt: skip
        pairs = self._pairs(*(t[..., :, None] for t in rows), *(t[..., None, :] for t in cols))
        kept = torch.where(self.blocks, pairs, 0).sum((-1, -2))
        return kept, self._pairs(*whole).expand_as(kept)

    def _pairs(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        """Visible pairs among queries ``q0 .. q1`` and keys ``k0 .. k1``, int64; spans broadcast."""
        sq, sk = self.seq_lens
        q0, q1, k0, k1 = (t.long() for t in (q0, q1, k0, k1))
        left, right = (None, None) if self.window is None else self.window
        # Causality is a right bound of 0, and a window's right bound is never negative.
        right = 0 if self.causal else right

        def below(x: Tensor) -> Tensor:
            """Pairs of one query a key: the sum of min(max(t, 0), k1 - k0) over t up to x."""
            inside = torch.minimum(x, k1 - k0).clamp(min=0)
            return inside * (inside + 1) // 2 + (x - (k1 - k0)).clamp(min=0) * (k1 - k0)

        def up_to(reach: int) -> Tensor:
            """Pairs with ``j <= i + Sk - Sq + reach``."""
            shift = sk - sq + reach + 1
            return below(q1 - 1 + shift - k0) - below(q0 - 1 + shift - k0)

        pairs = (q1 - q0) * (k1 - k0) if right is None else up_to(right)
        return pairs if left is None else pairs - up_to(-left - 1)

    def to_dense(self) -> Tensor:
        """bool ``[batch, H, Sq, Sk]``: which tokens are visible, with causality and the window applied.

        For tests and pictures: this is the one method whose memory grows with Sq * Sk tokens.
        """
        rows, cols = (
            _block_of_tokens(sizes, n) for sizes, n in zip((self.row_sizes, self.col_sizes), self.seq_lens, strict=True)
        )
        blocks = torch.nn.functional.pad(self.blocks, (0, 1, 0, 1))
        heads = torch.arange(self.heads, device=self.device)[:, None, None]
        tokens = blocks[:, heads, rows[:, :, None], cols[:, None, :]]
        frame = Frame((1, 1), self.seq_lens, self.causal, self.window, None, None, self.device)
        return tokens & visible_tokens(frame)

    def tiling(
        self,
        size: tuple[int, int],
        *,
        transposed: bool = False,
        cut: Callable[[Tensor, Tensor, Tensor, tuple[int, int], tuple[int, int]], Tiling] = make_tiling,
    ) -> Tiling:
        """The blocks cut into tiles of ``(size_q, size_kv)`` tokens, which is what kernels walk.

        Built on the device without waiting for it, and kept on the mask. Under torch.compile or while a CUDA graph is
        being captured it is built anew, since the memory would belong to the graph.

        Args:
            size: The most queries of a piece, and the keys of a whole tile.
            transposed: Pieces of keys, and tiles of the queries that attend them: for the backward pass.
            cut: ``make_tiling``, or what makes the same in another way.
        """
        keep = not torch.compiler.is_compiling() and not (
            self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        )
        kept = self.__dict__.setdefault("_tilings", {}) if keep else {}
        key = (size, transposed)
        if key not in kept:
            if transposed:
                turned = (self.blocks.transpose(-1, -2), self.col_sizes, self.row_sizes)
                kept[key] = cut(*turned, self.seq_lens[::-1], size[::-1])
            else:
                kept[key] = cut(self.blocks, self.row_sizes, self.col_sizes, self.seq_lens, size)
        return kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tilings"}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VariableBlockMask:
        """This mask on ``device``; the mask itself when it is there already."""
        blocks = self.blocks.to(device, non_blocking=non_blocking)
        if blocks is self.blocks:
            return self
        rows, cols = (t.to(device, non_blocking=non_blocking) for t in (self.row_sizes, self.col_sizes))
        return replace(self, blocks=blocks, row_sizes=rows, col_sizes=cols)


class VariableBlocks:
    """What BlockMask inherits to make masks of variable blocks."""

    @classmethod
    def from_variable_blocks(
        cls,
        blocks: Tensor,
        row_sizes: Tensor,
        col_sizes: Tensor,
        *,
        seq_lens: Pair,
        causal: bool = False,
        window: Window | None = None,
    ) -> VariableBlockMask:
        """From one boolean a block, where blocks have sizes of their own. Never waits for the device.

        Args:
            blocks: bool ``[B|1, H, MB, NB]``, or without the leading dimensions. Heads broadcast with those of the
                sizes.
            row_sizes: int32 ``[H, MB]`` or ``[MB]``, queries of each row of blocks, which add up to Sq.
            col_sizes: int32 ``[H, NB]`` or ``[NB]``, keys of each column of blocks, which add up to Sk.
            seq_lens: ``(Sq, Sk)`` or one length for both: sums of sizes would have to be waited for.
            causal: Hide keys past the diagonal inside the chosen blocks.
            window: Hide keys outside ``(left, right)`` of the diagonal inside the chosen blocks.

        Raises:
            TypeError: ``blocks`` is not a bool tensor, or sizes are not int32 ones.
            ValueError: Shapes that do not fit. (:meth:`VariableBlockMask.validate` looks at the sizes.)
        """
        blocks = _check_blocks(blocks)
        if not 2 <= blocks.dim() <= 4:
            layout = "[B|1, H, MB, NB], [H, MB, NB] or [MB, NB]"
            raise argument_error("blocks", layout, f"shape {tuple(blocks.shape)}")
        blocks = blocks[(None,) * (4 - blocks.dim())]
        rows, cols = (
            check_tensor(name, t[None] if isinstance(t, Tensor) and t.dim() == 1 else t, 2)
            for name, t in (("row_sizes", row_sizes), ("col_sizes", col_sizes))
        )
        heads = max(blocks.shape[1], rows.shape[0], cols.shape[0])
        blocks = blocks.expand(-1, heads, -1, -1) if blocks.shape[1] == 1 else blocks
        rows, cols = (t.expand(heads, -1) if t.shape[0] == 1 else t for t in (rows, cols))
        return VariableBlockMask(blocks, rows, cols, pair("seq_lens", seq_lens), causal=causal, window=window)


def _check_blocks(blocks: object) -> Tensor:
    if not isinstance(blocks, Tensor):
        raise argument_error("blocks", "a torch.Tensor", type(blocks).__name__, kind=TypeError)
    if blocks.dtype != torch.bool:
        raise argument_error("blocks", "bool", blocks.dtype, "True means visible.", kind=TypeError)
    return blocks


def _block_of_tokens(sizes: Tensor, length: int) -> Tensor:
    """int64 ``[H, length]``: the block of every token; the number of blocks where none holds it."""
    _, ends = block_spans(sizes, length)
    tokens = torch.arange(length, dtype=torch.int32, device=sizes.device).expand(sizes.shape[0], length)
    return search(ends, tokens.contiguous(), right=True)
