"""Workloads beside attention: appending to a paged cache, held bit by bit; merging states, by the tolerance rule."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.paged_problems import Workload
from sparseattn.testing import sampled


class Appended(NamedTuple):
    """Where tokens go: int32 ``[nnz]`` each, and the page table and page fill after appending."""

    batch_indices: Tensor
    positions: Tensor
    indices: Tensor
    indptr: Tensor
    last_page_len: Tensor


@dataclasses.dataclass(frozen=True)
class Append(Workload):
    """New tokens into a paged cache: ``tokens`` behind the ``before`` that each of ``batch`` sequences has."""

    kind = "append"
    toy_shape: ClassVar = {"batch": 3, "tokens": 20, "before": 7, "kv_heads": 2, "head_dim": 16}

    batch: int = 128
    tokens: int = 1
    before: int = 1024
    page: int = 16
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def pages(self) -> int:
        return -(-(self.before + self.tokens) // self.page)

    @cached_property
    def places(self) -> Appended:
        generator = torch.Generator(self.device).manual_seed(3)
        indices = torch.randperm(self.batch * self.pages, generator=generator, device=self.device).int()
        b = torch.arange(self.batch, device=self.device, dtype=torch.int32).repeat_interleave(self.tokens)
        positions = torch.arange(self.tokens, device=self.device, dtype=torch.int32).repeat(self.batch) + self.before
        last = self.before + self.tokens - (self.pages - 1) * self.page
        indptr = self.int32(range(0, self.batch * self.pages + 1, self.pages))
        return Appended(b, positions, indices, indptr, self.int32([last] * self.batch))

    @cached_property
    def kv(self) -> tuple[Tensor, Tensor]:
        shape = (self.batch * self.tokens, self.kv_heads, self.head_dim)
        return self.draw(*shape, seed=1), self.draw(*shape, seed=2)

    @cached_property
    def cache(self) -> Tensor:
        shape = (self.batch * self.pages, 2, self.page, self.kv_heads, self.head_dim)
        return torch.zeros(shape, dtype=self.torch_dtype, device=self.device)

    def reset(self) -> None:
        self.cache.zero_()

    def gate(self, result: Any) -> dict[str, Any]:
        want = torch.zeros_like(self.cache)
        places = self.places
        page = places.indices[(places.batch_indices * self.pages + places.positions // self.page).long()].long()
        for i, t in enumerate(self.kv):
            want[page, i, (places.positions % self.page).long()] = t
        assert torch.equal(self.cache, want), "cache: tokens are missing, or were written where they do not belong"
        return {"gate": {"cache": [0.0, 0.0]}}

    @property
    def moved(self) -> float:
        return 2.0 * sum(t.numel() * t.element_size() for t in self.kv)


@dataclasses.dataclass(frozen=True)
class Merge(Workload):
    """``states`` partial results of ``rows`` queries into one; their LSE in base 2.

    Attributes:
        rows: Queries.
        states: How many; 2 is ``merge_state``, more ``merge_states``.
    """

    kind = "merge"
    toy_shape: ClassVar = {"rows": 9, "heads": 4, "head_dim": 16}

    rows: int = 8192
    states: int = 2
    heads: int = 32
    head_dim: int = 128

    @cached_property
    def v(self) -> Tensor:
        """``[T, n, H, D]``."""
        return self.draw(self.rows, self.states, self.heads, self.head_dim, seed=1)

    @cached_property
    def s(self) -> Tensor:
        """``[T, n, H]``, float32."""
        return 4 * self.draw(self.rows, self.states, self.heads, seed=2, dtype=torch.float32)

    def _merged(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The definition, sums of values in ``dtype``."""
        s = self.s.double() if dtype == torch.float64 else self.s
        total = (s * math.log(2)).logsumexp(1) / math.log(2)
        weights = (s - total[:, None]).exp2().to(dtype)
        return (weights[..., None] * self.v.to(dtype)).sum(1), total

    def gate(self, result: Any) -> dict[str, Any]:
        return sampled.gate(("v", "s"), result, self._merged(torch.float64), self._merged(self.torch_dtype))

    @property
    def moved(self) -> float:
        one = self.rows * self.heads * (self.head_dim * self.torch_dtype.itemsize + 4)
        return float(one * (self.states + 1))
