"""What block scoring and selection must know besides q and k, and the bounds that every list of blocks respects."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.dispatch import implementation, triton_missing
from sparseattn.ops.sequences import Sequences

#: No list is longer unless the caller says so: a quarter of a million keys of blocks of 128. At a million tokens, 32
#: heads' lists then take 2 GiB instead of 8. It is a constant: were it to follow from the length of the prompt, a chunk
#: of queries would not select what it does inside the whole.
MAX_BLOCKS = 2048
_EVERYTHING = 1 << 30  # keys; a row's number and it fit int32 together


def list_cap(max_blocks: int | None) -> int:
    """How many blocks a list holds at most, besides forced ones."""
    return MAX_BLOCKS if max_blocks is None else max_blocks


def check_max_blocks(value: object) -> None:
    """Raise unless ``value`` is None or a positive int."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        expected = f"an int of at least 1, or None for {MAX_BLOCKS}"
        raise argument_error("max_blocks", expected, repr(value), "Budgets must select something.")


def share_of(columns: int, density: float) -> int:
    """At least ``density * columns``, rounded either way; in whole numbers, since lengths may be symbols."""
    return columns * math.ceil(density * 2**20) // 2**20 + 1


class ScoreProblem(NamedTuple):
    """One antidiagonal scoring problem.

    Attributes:
        sequences: Where the sequences of the batch lie.
        stride: Tokens of a strided cell, S.
        block_size: Tokens of a block, a multiple of ``stride``, for queries and keys alike.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq`` (lengths of the sequence itself).
        scale: Factor on q . k.
        aggregate: How the cells of a query block agree on a block: "sum" or "max" of their mass.
    """

    sequences: Sequences
    stride: int
    block_size: int
    causal: bool
    scale: float
    aggregate: str = "sum"

    @property
    def num_q_blocks(self) -> int:
        return -(-self.sequences.max_q // self.block_size)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.sequences.max_k // self.block_size)


class RowBounds(NamedTuple):
    """Which blocks each query block may and must list. Visible blocks are a prefix, forced recent ones its tail.

    Attributes:
        visible: int32 [B|1, MB]; blocks ``[0, visible)`` may be listed. 0 for rows past the end of a sequence and for
            rows whose queries see no key.
        recent: int32 [B|1, MB]; blocks ``[recent, visible)`` must be listed.
    """

    visible: Tensor
    recent: Tensor


def row_bounds(
    sequences: Sequences, block_size: int, causal: bool, keep_recent: bool, device: torch.device
) -> RowBounds:
    """Bounds of every query block, on the device and without a host sync.

    Args:
        sequences: The batch.
        block_size: Tokens of a block.
        causal: Bottom-right aligned causality; otherwise every block of the sequence's keys is visible.
        keep_recent: Force the blocks that hold the diagonal of any row of the query block (causal problems only).
        device: Where q and k live.

    Example:
        300 queries on 430 keys (offset 130), blocks of 128: the diagonals of query block 0 are keys 130..257, so blocks
        [0, 3) are visible and [1, 3) recent.
    """
    # Without causality everything counts as near.
    first, visible = diagonal_blocks(sequences, block_size, 0, 0 if causal else _EVERYTHING, device)
    return RowBounds(visible, first if causal and keep_recent else visible)


def diagonal_blocks(
    sequences: Sequences, block_size: int, before: int, after: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Runs ``[first, stop)`` of blocks that hold a key near the diagonal of a row of each query block.

    Args:
        sequences: The batch.
        block_size: Tokens of a block.
        before: Keys before the (bottom-right aligned) diagonal that count as near.
        after: Keys after it.
        device: Where q and k live.

    Returns:
        int32 [B|1, MB] each; ``stop`` is 0 past the end of a sequence.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling() and triton_missing() is None:
        kernels = implementation("sparseattn.ops.scores.bounds_{}", "triton")
        with torch.cuda.device(device):
            return kernels.diagonal_blocks(sequences, block_size, before, after, device)
    rows, q_len, k_len = _lengths(sequences, block_size, device)
    offset = k_len - q_len
    last = torch.minimum(rows + block_size, q_len) - 1 + offset + after
    # Floor division, so that a last key at -1 or below leaves nothing.
    stop = (last.div(block_size, rounding_mode="floor") + 1).clamp(min=0)
    stop = torch.minimum(stop, (k_len + block_size - 1) // block_size)
    stop = torch.where(rows < q_len, stop, 0)
    first = (rows + offset - before).clamp(min=0) // block_size
    return torch.minimum(first, stop).int(), stop.int()


def _lengths(s: Sequences, block_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First rows of the query blocks [MB] and the lengths [B|1, 1], int64."""

    def column(lengths: Tensor | None, default: int) -> Tensor:
        if lengths is None:
            return torch.full((1, 1), default, dtype=torch.int64, device=device)
        return lengths.long()[:, None]

    rows = torch.arange((s.max_q + block_size - 1) // block_size, device=device) * block_size
    return rows, column(s.lengths_q(), s.max_q), column(s.lengths_k(), s.max_k)
