"""Workloads of FlashInfer's two block-sparse wrappers, not causal: blocks of one size (BSR), and of any sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.paged_problems import Attention, Heads, Part
from sparseattn.testing import sampled


@dataclasses.dataclass(frozen=True)
class _Blocks(Heads, Attention):
    """One sequence of ``n`` queries and keys, and the share of its blocks that is selected."""

    n: int = 16384
    density: float = 0.25

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """``[n, H, D]`` each, KV heads for the keys and values."""
        q, k, v = (
            self.draw(self.n, heads, self.head_dim, seed=seed)
            for seed, heads in enumerate((self.heads, self.kv_heads, self.kv_heads))
        )
        return q, k, v

    def _drawn(self, *shape: int) -> Tensor:
        """Blocks, no row of them empty."""
        generator = torch.Generator(self.device).manual_seed(4)
        blocks = torch.rand(shape, generator=generator, device=self.device) < self.density
        blocks[..., 0] |= ~blocks.any(-1)
        return blocks

    @property
    def blocks(self) -> Tensor:
        raise NotImplementedError

    @property
    def drawn_size(self) -> tuple[int, int]:
        raise NotImplementedError

    def parts(self) -> Iterator[Part]:
        rows = sampled.sample(self.n, min(self.n, 64), self.device)
        selected = sampled.Selected(self.blocks, self.drawn_size, causal=False)
        q, k, v = (t[None] for t in self.qkv)
        yield Part((q, k, v), selected, rows, 0)

    @property
    def selected_pairs(self) -> float:
        """Query-key pairs of all KV heads that are selected."""
        raise NotImplementedError

    @property
    def flops(self) -> float:
        return 4.0 * self.selected_pairs * (self.heads // self.kv_heads) * self.head_dim

    @property
    def moved(self) -> float:
        return float(self.torch_dtype.itemsize * self.n * 2 * (self.heads + self.kv_heads) * self.head_dim)


@dataclasses.dataclass(frozen=True)
class BSR(_Blocks):
    """Blocks of R queries and C keys, one pattern for all heads.

    Attributes:
        R: Queries of a block.
        C: Keys of a block.
    """

    kind = "bsr"
    toy_shape: ClassVar = {"n": 256, "heads": 4, "kv_heads": 2, "head_dim": 64}

    R: int = 64
    C: int = 64

    @cached_property
    def blocks(self) -> Tensor:
        return self._drawn(1, 1, self.n // self.R, self.n // self.C)

    @property
    def drawn_size(self) -> tuple[int, int]:
        return self.R, self.C

    @cached_property
    def bsr(self) -> tuple[Tensor, Tensor]:
        """indptr int32 [MB + 1] and indices int32 [nnz]."""
        blocks = self.blocks[0, 0]
        indptr = torch.nn.functional.pad(blocks.sum(1).cumsum(0), (1, 0)).int()
        return indptr, blocks.nonzero()[:, 1].int()

    @property
    def selected_pairs(self) -> float:
        return float(self.bsr[1].shape[0]) * self.R * self.C * self.kv_heads


@dataclasses.dataclass(frozen=True)
class Variable(_Blocks):
    """A grid of blocks, the last of a row or column with the remainder, one pattern a KV head.

    Attributes:
        grid: Rows and columns of blocks.
    """

    kind = "variable"
    toy_shape: ClassVar = {"n": 130, "heads": 4, "kv_heads": 2, "head_dim": 64}

    grid: tuple[int, int] = (20, 50)
    dtype: str = "fp16"

    @cached_property
    def blocks(self) -> Tensor:
        return self._drawn(1, self.kv_heads, *self.grid)

    @property
    def drawn_size(self) -> tuple[int, int]:
        return self.n // self.grid[0], self.n // self.grid[1]

    @cached_property
    def sizes(self) -> tuple[Tensor, Tensor]:
        """int32 [Hkv, MB] and [Hkv, NB]."""
        both = []
        for size, count in zip(self.drawn_size, self.grid, strict=True):
            sizes = torch.full((self.kv_heads, count), size, dtype=torch.int32, device=self.device)
            sizes[:, -1] = self.n - size * (count - 1)
            both.append(sizes)
        return both[0], both[1]

    @property
    def selected_pairs(self) -> float:
        rows, cols = (t.double() for t in self.sizes)
        return torch.einsum("hmn,hm,hn->", self.blocks[0].double(), rows, cols).item()

    def gate(self, result: Any) -> dict[str, Any]:
        """Of ``[Hq, n, D]``, the layout of this wrapper."""
        return super().gate(result.transpose(0, 1))
