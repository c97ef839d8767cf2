"""Scoring blocks by pooled pages of keys: the problem."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.sequences import Sequences

FEATURES = ("mean", "bound")
AGGREGATES = ("mean", "max")
PAGE_SIZES = (1, 8, 16, 32, 64, 128)
BLOCK_SIZES = (64, 128)


class PooledProblem(NamedTuple):
    """One problem of scoring blocks by pages.

    Attributes:
        sequences: Where the sequences of the batch lie.
        feature: What a page's keys become: "mean", or "bound" (elementwise least and greatest).
        page_size: Keys of a page, P; a divisor of ``block_size``. 1: the keys themselves.
        block_size: Tokens of a block, for queries and keys alike.
        causal: A row sees a page once it sees all P of its keys; bottom-right aligned. Otherwise every page.
        scale: Factor on q . k.
        row_softmax: Logits become probabilities of their row, over the pages it sees, before rows are aggregated.
        aggregate: How the rows of a query block agree on a block: "mean" or "max".
    """

    sequences: Sequences
    feature: str
    page_size: int
    block_size: int
    causal: bool
    scale: float
    row_softmax: bool
    aggregate: str

    @property
    def num_q_blocks(self) -> int:
        return -(-self.sequences.max_q // self.block_size)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.sequences.max_k // self.block_size)

    @property
    def num_pages(self) -> int:
        return -(-self.sequences.max_k // self.page_size)


def check_pages(feature: str, page_size: int, block_size: int) -> None:
    """Raise unless pages of that kind and size fill the blocks."""
    if feature not in FEATURES:
        raise argument_error("feature", f"one of {FEATURES}", repr(feature))
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise argument_error("block_size", f"one of {BLOCK_SIZES}", repr(block_size))
    if isinstance(page_size, bool) or page_size not in PAGE_SIZES or page_size > block_size:
        allowed = tuple(size for size in PAGE_SIZES if size <= block_size)
        raise argument_error("page_size", f"one of {allowed}", repr(page_size), "Pages fill blocks.")


def check_problem(q: Tensor, k: Tensor, p: PooledProblem) -> None:
    """Raise unless q and k, whose layout ``resolve_sequences`` checked, fit the problem.

    Raises:
        ValueError: A shape or value that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    if not q.is_floating_point():
        raise argument_error("q", "a floating-point tensor", q.dtype, kind=TypeError)
    if k.dtype != q.dtype:
        raise argument_error("k", f"dtype {q.dtype} like q", k.dtype, "Cast one of them.", kind=TypeError)
    if k.device != q.device:
        raise argument_error("k", f"device {q.device} like q", k.device)
    if k.shape[-1] != q.shape[-1] or q.shape[-1] == 0:
        raise argument_error("k", f"a positive head_dim equal to q's {q.shape[-1]}", k.shape[-1])
    if k.shape[-2] == 0 or q.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise argument_error("q", f"heads that are a multiple of k's {k.shape[-2]}", q.shape[-2])
    check_pages(p.feature, p.page_size, p.block_size)
    if p.aggregate not in AGGREGATES:
        raise argument_error("aggregate", f"one of {AGGREGATES}", repr(p.aggregate))
    if not math.isfinite(p.scale):
        raise argument_error("scale", "a finite number", p.scale)
