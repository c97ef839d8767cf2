"""Workloads of block-sparse benchmarks: inputs, masks, counted operations, what is right, and how it is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.testing import sampled
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.inputs import make_qkv, random_blocks
from sparseattn.testing.timing import gpu_state, time_ms

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One workload; inputs and oracle results are made once and shared by every implementation.

    Attributes:
        op: "forward" or "backward".
        n: Keys.
        density: Share of the visible blocks that a mask lists, on average; 1 lists all.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: D of queries and keys.
        block: Keys of a block.
        dtype: A key of ``DTYPES``.
        device: Where it runs.
        nq: Queries, the last of the sequence; default ``n``.
        head_dim_v: D of the values; default ``head_dim``.
        block_q: Queries of a block; default ``block``.
        mask_heads: Heads of the mask: 1 (shared), ``kv_heads`` or ``heads`` (default).
        causal: Key j is visible to query i only if ``j <= i + n - nq``.
        grid: Draw this many blocks of queries and of keys, of equal sizes, instead of blocks of ``block`` tokens:
            FlashInfer's workload. The mask still has blocks of ``block_q`` x ``block``, which must divide them.
    """

    op: str
    n: int
    density: float
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 128
    dtype: str = "bf16"
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cuda"))
    nq: int | None = None
    head_dim_v: int | None = None
    block_q: int | None = None
    mask_heads: int | None = None
    causal: bool = True
    grid: tuple[int, int] | None = None

    def row(self) -> dict[str, Any]:
        """What a row says of the workload, defaults filled in."""
        block_q, _ = self.block_size
        filled = {"nq": self.queries, "head_dim_v": self.value_dim, "block_q": block_q, "mask_heads": self.lists}
        return {**dataclasses.asdict(self), **filled, "device": str(self.device)}

    @property
    def queries(self) -> int:
        return self.nq or self.n

    @property
    def value_dim(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def lists(self) -> int:
        return self.mask_heads or self.heads

    @property
    def block_size(self) -> tuple[int, int]:
        return self.block_q or self.block, self.block

    @property
    def drawn_size(self) -> tuple[int, int]:
        """Tokens of a drawn block; with a grid, its last row and column take the remainder, too."""
        return self.block_size if self.grid is None else (self.queries // self.grid[0], self.n // self.grid[1])

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = (1, self.queries, self.n, self.heads, self.kv_heads, self.head_dim, self.value_dim)
        qkv = make_qkv(*shape, dtype=DTYPES[self.dtype], device=self.device, on_device=True)
        return qkv.requires_grad_() if self.op == "backward" else qkv

    @cached_property
    def do(self) -> Tensor:
        shape = (1, self.queries, 1, self.heads, 1, self.value_dim)
        return make_qkv(*shape, dtype=DTYPES[self.dtype], device=self.device, on_device=True, seed=1).q

    @cached_property
    def blocks(self) -> Tensor:
        """Which drawn blocks are selected, bool [1, H, MB, NB]; a causal row always selects its own diagonal."""
        if self.grid is not None:
            generator = torch.Generator().manual_seed(0)
            blocks = torch.rand((1, self.lists, *self.grid), generator=generator) < self.density
            blocks[..., 0] |= ~blocks.any(-1)  # nobody attends nothing
            return blocks.to(self.device)
        return random_blocks(
            (self.queries, self.n), self.block_size, self.lists, density=self.density, diagonal=True,
            hidden=not self.causal, device=self.device,
        )  # fmt: skip

    def build_mask(self) -> BlockMask | VariableBlockMask:
        """The mask, from ``blocks``: what a user pays whose pattern changes."""
        repeat = (1, 1)
        if self.grid is not None:
            sizes, (block_q, block_kv) = self.drawn_size, self.block_size
            exact = (sizes[0] * self.grid[0], sizes[1] * self.grid[1]) == (self.queries, self.n)
            if not exact or sizes[0] % block_q or sizes[1] % block_kv:
                return BlockMask.from_variable_blocks(
                    self.blocks[0], *self.drawn_sizes, seq_lens=(self.queries, self.n), causal=self.causal
                )
            repeat = (sizes[0] // block_q, sizes[1] // block_kv)
        return BlockMask.from_blocks(
            self.blocks, block_size=self.block_size, seq_lens=(self.queries, self.n), causal=self.causal, repeat=repeat
        )

    @property
    def drawn_sizes(self) -> tuple[Tensor, Tensor]:
        """Tokens of every drawn row and column of blocks of every mask head: int32 [H, MB] and [H, NB]."""
        both = []
        for size, count, total in zip(self.drawn_size, self.blocks.shape[2:], (self.queries, self.n), strict=True):
            sizes = torch.full((self.lists, count), size, dtype=torch.int32, device=self.device)
            sizes[:, -1] = total - size * (count - 1)
            both.append(sizes)
        return both[0], both[1]

    @cached_property
    def selection(self) -> BlockMask | VariableBlockMask:
        """The mask; one of variable blocks where those of a grid are no multiples of ``block_q`` x ``block``."""
        return self.build_mask()

    @property
    def mask(self) -> BlockMask:
        """The mask, for who knows equal blocks only.

        Raises:
            Unsupported: It has blocks of other sizes.
        """
        if isinstance(self.selection, VariableBlockMask):
            raise Unsupported(f"blocks of {self.drawn_size} tokens are no multiples of {self.block_size}")
        return self.selection

    @cached_property
    def selected(self) -> float:
        """Share of the visible drawn blocks that is selected."""
        if self.grid is not None:
            return self.blocks.float().mean().item()
        return self.mask.density

    @cached_property
    def flops(self) -> float:
        """Of the selected blocks, those on the diagonal counted whole; a backward pass counts 2.5 times as much."""
        rows, cols = (t.double() for t in self.drawn_sizes)
        tokens = torch.einsum("hmn,hm,hn->", self.blocks[0].double(), rows, cols).item()
        forward = tokens * (self.heads // self.lists) * 2.0 * (self.head_dim + self.value_dim)
        return forward * (2.5 if self.op == "backward" else 1.0)

    @cached_property
    def sampled(self) -> tuple[Tensor, Tensor]:
        """The query rows and the key columns at which results are compared."""
        return (
            sampled.sample(self.queries, min(self.queries, 64), self.device),
            sampled.sample(self.n, min(self.n, 64), self.device, seed=1),
        )

    @cached_property
    def expected(self) -> list[tuple[Tensor, ...]]:
        """The sampled results, exact and as eager code gives them."""
        q, k, v = (t.detach() for t in self.qkv)
        chosen = sampled.Selected(self.blocks, self.drawn_size, self.causal, self.n - self.queries)
        rows, cols = self.sampled
        dtypes = (torch.float64, DTYPES[self.dtype])
        if self.op == "forward":
            return [sampled.attend(q, k, v, chosen, rows, d)[:1] for d in dtypes]
        return [sampled.gradients(q, k, v, self.do, chosen, rows, cols, d) for d in dtypes]

    def gate_and_time(self, attend: Callable[[], Tensor], budget_ms: float) -> dict[str, Any]:
        """Hold one implementation's results against what is right, then time it.

        Args:
            attend: Computes the output ``[1, Sq, Hq, Dv]``, any strides; differentiable in ``qkv`` for a backward pass.
            budget_ms: Time for about this long.

        Returns:
            ``ms`` and its spread, ``tflops``, ``flops``, the errors of the gate, and the GPU's clocks after the runs.

        Raises:
            AssertionError: It is wrong; nothing is timed then.
        """
        rows, cols = self.sampled
        o = attend()
        if self.op == "forward":
            run: Callable[[], Any] = attend
            gate = sampled.gate(("o",), (o[0, rows],), *self.expected)
        else:
            run = partial(torch.autograd.grad, o, self.qkv, self.do, retain_graph=True)
            dq, dk, dv = run()
            gate = sampled.gate(("dq", "dk", "dv"), (dq[0, rows], dk[0, cols], dv[0, cols]), *self.expected)
            del dq, dk, dv
        timing = time_ms(run, self.device, budget_ms=budget_ms)
        state = gpu_state() if self.device.type == "cuda" else None
        counted = {"tflops": round(self.flops / timing["ms"] * 1e-9, 4), "flops": self.flops}
        return {**timing, **counted, **gate, "gpu": state}
