"""Workloads of serving: what is computed, what counts as right, and how many operations and bytes it takes.

Attention is held against float64 at a sample of rows of some sequences (``sparseattn.testing.sampled``). Pages lie in a
random order, as they do in a server's cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparseattn.testing import sampled
from sparseattn.testing.workloads import DTYPES


class Part(NamedTuple):
    """One sequence of a batch, as the oracle takes it.

    Attributes:
        qkv: ``[1, Sq, Hq, D]``, ``[1, L, Hkv, D]`` and ``[1, L, Hkv, Dv]``.
        selected: Which keys its queries see.
        rows: int64 [R], the queries that are compared.
        first: Where its queries begin in the output.
    """

    qkv: tuple[Tensor, Tensor, Tensor]
    selected: sampled.Selected
    rows: Tensor
    first: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """What all have in common.

    Attributes:
        device: Where it runs.
        dtype: A key of ``DTYPES``.
    """

    kind: ClassVar[str]
    #: What becomes of a workload whose only purpose is to see that it runs.
    toy_shape: ClassVar[dict[str, Any]]

    device: torch.device
    dtype: str = "bf16"

    def row(self) -> dict[str, Any]:
        """What a row says of the workload."""
        return {"kind": self.kind, **dataclasses.asdict(self), "device": str(self.device)}

    def toy(self) -> Workload:
        """The same at a size for a CPU without a kernel: lengths and counts cut down, the form kept."""
        cut = {name: min(getattr(self, name), most) for name, most in self.toy_shape.items()}
        return dataclasses.replace(self, **cut)

    def copy(self) -> Workload:
        """The same, without what was drawn for it."""
        return dataclasses.replace(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> float:
        """Of what was selected; 0 where nothing is multiplied."""
        return 0.0

    @property
    def moved(self) -> float:
        """Bytes that have to be read and written, each once."""
        raise NotImplementedError

    def reset(self) -> None:
        """Undo what an earlier implementation wrote; called before the run that is gated."""

    def gate(self, result: Any) -> dict[str, Any]:
        """Errors of a result, ``{"gate": {name: [error, eager's error]}}``.

        Raises:
            AssertionError: It is wrong.
        """
        raise NotImplementedError

    def draw(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal, drawn in the dtype itself."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=dtype or self.torch_dtype, device=self.device)

    def int32(self, values: list[int] | range) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


class Attention(Workload):
    """Attention of any form: an output ``[rows, Hq, Dv]``."""

    def parts(self) -> Iterator[Part]:
        raise NotImplementedError

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled rows of the output, int64 [R], and what stands there exactly and as eager code gives it."""
        rows: list[Tensor] = []
        exact: list[Tensor] = []
        eager: list[Tensor] = []
        for part in self.parts():
            rows.append(part.rows + part.first)
            for found, dtype in ((exact, torch.float64), (eager, self.torch_dtype)):
                found.append(sampled.attend(*part.qkv, part.selected, part.rows, dtype)[0])
        return torch.cat(rows), torch.cat(exact), torch.cat(eager)

    def gate(self, result: Any) -> dict[str, Any]:
        rows, exact, eager = self.expected
        return sampled.gate(("o",), (result[rows],), (exact,), (eager,))


@dataclasses.dataclass(frozen=True)
class Heads:
    """Query and KV heads and the head dimension."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


@dataclasses.dataclass(frozen=True)
class _Batch(Heads, Attention):
    """``batch`` sequences of ``length`` tokens."""

    batch: int = 1
    length: int = 1024

    @cached_property
    def chosen(self) -> list[int]:
        """Sequences that are compared: up to four, the first and the last among them."""
        return sampled.sample(self.batch, min(self.batch, 4), torch.device("cpu")).tolist()

    @property
    def cached_bytes(self) -> float:
        """Bytes of the keys and values."""
        return 2.0 * self.batch * self.length * self.kv_heads * self.head_dim * self.torch_dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Decode(_Batch):
    """One query a sequence over a paged cache.

    Attributes:
        page: Tokens of a page.
    """

    kind = "decode"
    toy_shape: ClassVar = {"batch": 3, "length": 70, "heads": 4, "kv_heads": 2, "head_dim": 64}

    page: int = 16

    @property
    def pages(self) -> int:
        """Pages of one sequence."""
        return -(-self.length // self.page)

    @cached_property
    def indices(self) -> Tensor:
        """int32 [B * pages]: the page of every page of every sequence."""
        generator = torch.Generator(self.device).manual_seed(3)
        return torch.randperm(self.batch * self.pages, generator=generator, device=self.device).int()

    @cached_property
    def indptr(self) -> Tensor:
        return self.int32(range(0, self.batch * self.pages + 1, self.pages))

    @cached_property
    def last_page_len(self) -> Tensor:
        return self.int32([self.length - (self.pages - 1) * self.page] * self.batch)

    @cached_property
    def seq_lens(self) -> Tensor:
        return self.int32([self.length] * self.batch)

    @property
    def queries(self) -> int:
        """Queries a sequence."""
        return 1

    @cached_property
    def q(self) -> Tensor:
        return self.draw(self.batch * self.queries, self.heads, self.head_dim, seed=0)

    @cached_property
    def cache(self) -> Tensor:
        """``[P, 2, page, Hkv, D]``."""
        return self.draw(self.batch * self.pages, 2, self.page, self.kv_heads, self.head_dim, seed=1)

    def sequence(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, ``[1, L, Hkv, D]`` each."""
        pages = self.cache[self.indices[b * self.pages : (b + 1) * self.pages].long()]
        k, v = (pages[:, i].flatten(0, 1)[None, : self.length] for i in range(2))
        return k, v

    @cached_property
    def rows(self) -> Tensor:
        return sampled.sample(self.queries, min(self.queries, 16), self.device)

    def parts(self) -> Iterator[Part]:
        selected = sampled.Selected(None, causal=True, offset=self.length - self.queries)
        for b in self.chosen:
            q = self.q[b * self.queries : (b + 1) * self.queries][None]
            yield Part((q, *self.sequence(b)), selected, self.rows, b * self.queries)

    @property
    def pairs(self) -> float:
        """Query-key pairs that are visible."""
        first = self.length - self.queries + 1
        return self.batch * self.queries * (first + self.length) / 2

    @property
    def flops(self) -> float:
        return 4.0 * self.pairs * self.heads * self.head_dim

    @property
    def moved(self) -> float:
        return self.cached_bytes + 2.0 * self.batch * self.queries * self.heads * self.head_dim * 2


@dataclasses.dataclass(frozen=True)
class Prefill(Decode):
    """Prompts, or the chunks that are appended to them, causal; over a paged cache, or ragged.

    Attributes:
        chunk: Queries a sequence; default all of its tokens.
        ragged: Keys and values are packed ``[total, Hkv, D]``, without pages.
        lengths_on: Where ``plan()`` finds offsets and lengths: "cpu", as FlashInfer's own benchmark has them, or
            "device", where whoever wants to know them has to wait.
    """

    kind = "prefill"

    chunk: int | None = None
    ragged: bool = False
    lengths_on: str = "cpu"

    def told(self, t: Tensor) -> Tensor:
        """Offsets or lengths, where ``plan()`` finds them."""
        return t.cpu() if self.lengths_on == "cpu" else t

    @property
    def queries(self) -> int:
        return min(self.chunk or self.length, self.length)

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        return self.int32(range(0, self.batch * self.queries + 1, self.queries))

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        return self.int32(range(0, self.batch * self.length + 1, self.length))

    @cached_property
    def kv(self) -> tuple[Tensor, Tensor]:
        """Packed keys and values, ``[B * L, Hkv, D]`` each."""
        shape = (self.batch * self.length, self.kv_heads, self.head_dim)
        return self.draw(*shape, seed=1), self.draw(*shape, seed=2)

    def sequence(self, b: int) -> tuple[Tensor, Tensor]:
        if not self.ragged:
            return super().sequence(b)
        k, v = (t[b * self.length : (b + 1) * self.length][None] for t in self.kv)
        return k, v


@dataclasses.dataclass(frozen=True)
class Latent(Attention):
    """MLA decode over a paged latent cache, absorbed: 512 latent columns, which are the values, and 64 rotary ones.

    Attributes:
        batch: Sequences, one query each.
        length: Tokens of each.
        heads: Query heads.
        page: Tokens of a page.
    """

    kind = "mla"
    toy_shape: ClassVar = {"batch": 3, "length": 40, "heads": 4}
    latent: ClassVar[int] = 512
    rotary: ClassVar[int] = 64

    batch: int = 64
    length: int = 1024
    heads: int = 128
    page: int = 64

    @property
    def scale(self) -> float:
        return (self.latent + self.rotary) ** -0.5

    @property
    def pages(self) -> int:
        return -(-self.length // self.page)

    @cached_property
    def indices(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(3)
        return torch.randperm(self.batch * self.pages, generator=generator, device=self.device).int()

    @cached_property
    def indptr(self) -> Tensor:
        return self.int32(range(0, self.batch * self.pages + 1, self.pages))

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        return self.int32(range(self.batch + 1))

    @cached_property
    def seq_lens(self) -> Tensor:
        return self.int32([self.length] * self.batch)

    @cached_property
    def q(self) -> tuple[Tensor, Tensor]:
        """``[B, H, 512]`` and ``[B, H, 64]``."""
        return tuple(self.draw(self.batch, self.heads, n, seed=n) for n in (self.latent, self.rotary))  # type: ignore[return-value]

    @cached_property
    def cache(self) -> tuple[Tensor, Tensor]:
        """``[P, page, 512]`` and ``[P, page, 64]``."""
        count = self.batch * self.pages
        return tuple(self.draw(count, self.page, n, seed=n + 1) for n in (self.latent, self.rotary))  # type: ignore[return-value]

    def parts(self) -> Iterator[Part]:
        everything = sampled.Selected(None, causal=False)
        for b in sampled.sample(self.batch, min(self.batch, 4), torch.device("cpu")).tolist():
            pages = self.indices[b * self.pages : (b + 1) * self.pages].long()
            k = torch.cat([t[pages].flatten(0, 1)[: self.length] for t in self.cache], -1)[None, :, None]
            q = torch.cat([t[b] for t in self.q], -1)[None, None]
            yield Part((q, k, k[..., : self.latent]), everything, torch.zeros(1, dtype=torch.long, device=q.device), b)

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.length * self.heads * (2 * self.latent + self.rotary)

    @property
    def moved(self) -> float:
        cached = self.batch * self.length * (self.latent + self.rotary)
        return float(self.torch_dtype.itemsize * (cached + self.batch * self.heads * (2 * self.latent + self.rotary)))
