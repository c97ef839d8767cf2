"""What a tile of the reference attends besides its listed blocks: single columns, and the means of skipped blocks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

import torch
from torch import Tensor


class Extra(NamedTuple):
    """Extra keys of one tile; the columns come first.

    Attributes:
        columns: int64 [C], tokens.
        blocks: int64 [J], blocks of which one pseudo-key, their mean, is attended.
        first: int64 [C + J]; a row sees an extra key if it sees all tokens from this one ...
        last: int64 [C + J]; ... to this one.
        bias: [C + J], log of the number of keys that an extra key stands for.
    """

    columns: Tensor
    blocks: Tensor
    first: Tensor
    last: Tensor
    bias: Tensor

    def __len__(self) -> int:
        return self.first.shape[0]


class ExtraRows(NamedTuple):
    """Column lists of one mask head: on the host to plan with, on the device to gather with."""

    columns: list[list[int]]
    numbers: Tensor


class ExtraKeys:
    """Builds the extra keys of tiles.

    Args:
        column_indices: int32 [B|1, H, MB, C] or None.
        means: Whether skipped blocks are attended by their means.
        size: Tokens of a key block.
        work: Dtype of the scores.
        device: Of the tensors.
    """

    def __init__(
        self, column_indices: Tensor | None, means: bool, size: int, work: torch.dtype, device: torch.device
    ) -> None:
        self.indices, self.means, self.size, self.work, self.device = column_indices, means, size, work, device

    def rows(self, index: int, head: int) -> ExtraRows | None:
        if self.indices is None:
            return None
        numbers = self.indices[0 if self.indices.shape[0] == 1 else index, head]
        return ExtraRows([[c for c in row if c >= 0] for row in numbers.tolist()], numbers)

    def of_tile(self, rows: ExtraRows | None, m: int, blocks: list[int], low: int, high: int, len_k: int) -> Extra:
        """Extra keys of row block ``m``.

        Args:
            rows: Its head's columns.
            m: Row block.
            blocks: Its listed blocks.
            low: First key that one of its rows sees.
            high: Last one, inclusive.
            len_k: Keys of the sequence.
        """
        columns = torch.empty(0, dtype=torch.int64, device=self.device)
        everywhere = columns
        if rows is not None:
            mine = rows.columns[m]
            everywhere = rows.numbers[m, : bisect_left(mine, len_k)].long()
            columns = everywhere[bisect_left(mine, low) : bisect_right(mine, high)]
        skipped, bias = self._skipped(blocks, everywhere, low, high, len_k)
        ends = ((skipped + 1) * self.size).clamp(max=len_k) - 1
        return Extra(
            columns,
            skipped,
            torch.cat([columns, skipped * self.size]),
            torch.cat([columns, ends]),
            torch.cat([torch.zeros(columns.shape, dtype=self.work, device=self.device), bias]),
        )

    def _skipped(self, blocks: list[int], columns: Tensor, low: int, high: int, len_k: int) -> tuple[Tensor, Tensor]:
        """Blocks that some row sees whole and that are not listed, and the log of how many of their keys are left."""
        begin = -(-low // self.size)
        end = (high + 1) // self.size if high < len_k - 1 else -(-len_k // self.size)
        if not self.means or end <= begin:
            return torch.empty(0, dtype=torch.int64, device=self.device), torch.empty(
                0, dtype=self.work, device=self.device
            )
        j = torch.arange(begin, end, device=self.device)
        left = (len_k - j * self.size).clamp(max=self.size)
        left = left - torch.bincount(columns // self.size, minlength=end)[begin:end]
        left[[n - begin for n in blocks if begin <= n < end]] = 0
        return j[left > 0], left[left > 0].to(self.work).log()
