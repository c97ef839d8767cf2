"""The tiles of the reference: which query rows meet which keys, planned on the host."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.block_sparse.reference_extra import Extra, ExtraKeys

# Rows of a tile when there is no mask to say.
_DENSE_ROWS = 64


class Tile(NamedTuple):
    """One matrix product: the rows of some heads against the keys they share.

    Attributes:
        kv_heads: ``[first, last)`` KV heads, each with its own keys.
        q_heads: The query heads that read them.
        rows: ``[first, last)`` query rows, counted in the sequence.
        keys: Token range ``(first, last)`` when the listed blocks are adjacent, else int32 block numbers (of variable
            blocks int64 tokens).
        right: Column from which some row must not see a key, or None.
        left: Column up to which some row must not see a key, or None.
        extra: Columns and means of skipped blocks, behind the keys of the listed blocks; or None.
    """

    kv_heads: slice
    q_heads: slice
    rows: slice
    keys: tuple[int, int] | Tensor
    right: int | None
    left: int | None
    extra: Extra | None


class Sequence:
    """One sequence of the batch: where its rows are and which tiles it consists of."""

    def __init__(
        self, g: Geometry, index: int, bounds: tuple[int, int, int, int], heads: tuple[int, int], device: torch.device
    ) -> None:
        q0, q1, k0, k1 = bounds
        self.g = g
        self.index = index
        self.q_rows = (slice(q0, q1),) if g.packed else (index, slice(q0, q1))
        self.k_rows = (slice(k0, k1),) if g.packed else (index, slice(k0, k1))
        self.lse_rows = (slice(None), slice(q0, q1)) if g.packed else (index, slice(None), slice(q0, q1))
        self.len_q, self.len_k = q1 - q0, k1 - k0
        self.device = device
        self.heads_q, self.heads_k = heads
        offset = self.len_k - self.len_q
        # Row i sees keys lo(i) .. hi(i), both rising with i.
        right = 0 if g.causal else g.window_right
        self.shift_hi = None if right < 0 and not g.causal else offset + right
        self.shift_lo = None if g.window_left < 0 else offset - g.window_left

    def hi(self, row: int) -> int:
        return self.len_k - 1 if self.shift_hi is None else min(self.len_k - 1, row + self.shift_hi)

    def lo(self, row: int) -> int:
        return 0 if self.shift_lo is None else max(0, row + self.shift_lo)

    def tiles(self, lists: Lists | Pieces | None, budget: int) -> Iterator[Tile]:
        """All tiles that see at least one key, in a fixed order."""
        group = self.heads_q // self.heads_k
        mask_heads = 1 if lists is None else lists.heads
        step = _DENSE_ROWS if lists is None else self.g.block_q
        for head in range(mask_heads):
            table = None if lists is None else lists.rows(self.index, head)
            extra_rows = None if lists is None or lists.extra is None else lists.extra.rows(self.index, head)
            if isinstance(table, PieceRows):
                rows = table.pieces
            else:
                rows = [(r0, min(r0 + step, self.len_q), m) for m, r0 in enumerate(range(0, self.len_q, step))]
            if mask_heads == 1:
                kv_heads, per_kv = range(self.heads_k), group
            else:
                per_kv = self.heads_q // mask_heads if mask_heads == self.heads_k else 1
                kv_heads = range(head * per_kv // group, head * per_kv // group + 1)
            for r0, r1, m in rows:
                low, high = self.lo(r0), self.hi(r1 - 1)
                if low > high:
                    continue
                keys: tuple[int, int] | Tensor
                if table is None:
                    keys, columns, right, left = self._span(r0, r1)
                elif isinstance(table, PieceRows):
                    keys, columns, right, left = self._runs(r0, r1, table.runs[m])
                else:
                    keys, columns, right, left = self._listed(r0, r1, table, m)
                extra = None
                if lists is not None and lists.extra is not None and isinstance(table, Rows):
                    extra = lists.extra.of_tile(
                        extra_rows, m, table.blocks[m][: table.counts[m]], low, high, self.len_k
                    )
                    columns += len(extra)
                if columns == 0:
                    continue
                shared = len(kv_heads) * per_kv * (r1 - r0) * columns <= budget
                for first in kv_heads[:1] if shared else kv_heads:
                    count = len(kv_heads) if shared else 1
                    h0 = first * group if mask_heads == 1 else head * per_kv
                    yield Tile(
                        slice(first, first + count),
                        slice(h0, h0 + count * per_kv),
                        slice(r0, r1),
                        keys,
                        right,
                        left,
                        extra,
                    )

    def _span(self, r0: int, r1: int) -> tuple[tuple[int, int], int, int | None, int | None]:
        """Keys of rows ``r0..r1`` of dense attention: one token range."""
        first, last = self.lo(r0), self.hi(r1 - 1) + 1
        right = max(0, self.hi(r0) + 1 - first)
        left = min(self.lo(r1 - 1), last) - first
        columns = last - first
        return (first, last), columns, right if right < columns else None, left if left > 0 else None

    def _listed(
        self, r0: int, r1: int, table: Rows, m: int
    ) -> tuple[tuple[int, int] | Tensor, int, int | None, int | None]:
        """Keys of a row of blocks: its list, less the blocks that no row of it can see."""
        size = self.g.block_kv
        blocks = table.blocks[m][: table.counts[m]]
        a = bisect_left(blocks, self.lo(r0) // size)
        c = bisect_right(blocks, self.hi(r1 - 1) // size)
        if a >= c:
            return (0, 0), 0, None, None
        # Blocks up to `full` lie below every row's last visible key; those from `seen` on above every row's first.
        full = bisect_left(blocks, (self.hi(r0) + 1) // size, a, c)
        seen = bisect_left(blocks, -(-self.lo(r1 - 1) // size), a, c)
        keys: tuple[int, int] | Tensor
        if blocks[c - 1] - blocks[a] == c - 1 - a:
            keys = (blocks[a] * size, (blocks[c - 1] + 1) * size)
        else:
            keys = table.numbers[m, a:c]
        columns = (c - a) * size
        return keys, columns, (full - a) * size if full < c else None, (seen - a) * size if seen > a else None

    def _runs(
        self, r0: int, r1: int, runs: list[tuple[int, int]]
    ) -> tuple[tuple[int, int] | Tensor, int, int | None, int | None]:
        """Keys of a piece of rows whose blocks cover ``runs``, less those that no row of it can see."""
        low, high = self.lo(r0), self.hi(r1 - 1)
        runs = [(max(a, low), min(b, high + 1)) for a, b in runs if a <= high and b > low]
        if not runs:
            return (0, 0), 0, None, None

        def before(end: int) -> int:
            return sum(max(0, min(b, end) - a) for a, b in runs)

        keys = runs[0] if len(runs) == 1 else torch.cat([torch.arange(a, b, device=self.device) for a, b in runs])
        columns, full, seen = before(high + 1), before(self.hi(r0) + 1), before(self.lo(r1 - 1))
        return keys, columns, full if full < columns else None, seen if seen > 0 else None


class Rows(NamedTuple):
    """Block lists of one mask head: on the host to plan with, on the device to gather with."""

    counts: list[int]
    blocks: list[list[int]]
    numbers: Tensor


class Lists:
    """The mask's lists, brought to the host one head at a time."""

    def __init__(self, counts: Tensor, indices: Tensor, extra: ExtraKeys | None) -> None:
        self.extra = extra
        self.shared = counts.shape[0] == 1
        self.heads = counts.shape[1]
        self.counts = counts.cpu()
        width = int(self.counts.max()) if self.counts.numel() else 0
        self.indices = indices[..., :width]

    def rows(self, index: int, head: int) -> Rows:
        b = 0 if self.shared else index
        indices = self.indices[b, head]
        return Rows(self.counts[b, head].tolist(), indices.tolist(), indices)


class PieceRows(NamedTuple):
    """Variable blocks of one mask head: pieces of rows (first, end, row of blocks), and each row's runs of keys."""

    pieces: list[tuple[int, int, int]]
    runs: list[list[tuple[int, int]]]


class Pieces:
    """The tiling of a mask of variable blocks, brought to the host."""

    extra = None

    def __init__(self, pieces: Tensor, counts: Tensor, tiles: Tensor, whole_slots: int) -> None:
        self.shared = counts.shape[0] == 1
        self.heads = counts.shape[1]
        self.pieces, self.counts, self.tiles = pieces.tolist(), counts.tolist(), tiles
        self.whole_slots = whole_slots

    def rows(self, index: int, head: int) -> PieceRows:
        b = 0 if self.shared else index
        pieces = [(first, end, row) for first, end, row in self.pieces[head] if end > first]
        tiles = self.tiles[b, head].tolist()
        runs = []
        for (whole, short), row in zip(self.counts[b][head], tiles, strict=True):
            merged: list[tuple[int, int]] = []
            for first, end in sorted(row[:whole] + row[self.whole_slots : self.whole_slots + short]):
                if merged and merged[-1][1] == first:
                    merged[-1] = (merged[-1][0], end)
                else:
                    merged.append((first, end))
            runs.append(merged)
        return PieceRows(pieces, runs)


def lists_of(g: Geometry, work: torch.dtype, device: torch.device) -> Lists | Pieces | None:
    """The mask of a call, or None for dense attention."""
    if g.kv_num_blocks is None or g.kv_indices is None:
        return None
    if g.row_pieces is not None:
        return Pieces(g.row_pieces, g.kv_num_blocks, g.kv_indices, g.max_k // g.block_kv)
    extra = None
    if g.column_indices is not None or g.mean_correction:
        extra = ExtraKeys(g.column_indices, g.mean_correction, g.block_kv, work, device)
    return Lists(g.kv_num_blocks, g.kv_indices, extra)


def sequences_of(q: Tensor, k: Tensor, g: Geometry) -> Iterator[Sequence]:
    """The non-empty sequences of a call; checks the ranges, which only the host can."""
    axis = 0 if g.packed else 1
    columns = [
        [whole] * g.batch if t is None else t.tolist()
        for t, whole in ((g.q_start, 0), (g.q_end, g.max_q), (g.k_start, 0), (g.k_end, g.max_k))
    ]
    for index, (q0, q1, k0, k1) in enumerate(zip(*columns, strict=True)):
        for name, t, start, end, longest in (("q", q, q0, q1, g.max_q), ("k", k, k0, k1, g.max_k)):
            what = f"cu_seqlens_{name}" if g.packed else f"ranges_{name}"
            if not 0 <= start <= end <= t.shape[axis]:
                raise argument_error(what, f"rows within 0..{t.shape[axis]}, ascending", f"[{start}, {end})")
            if end - start > longest:
                raise argument_error(f"max_seqlen_{name}", f"at least {end - start}, the longest sequence", longest)
        if q1 > q0 and k1 > k0:
            yield Sequence(g, index, (q0, q1, k0, k1), (q.shape[-2], k.shape[-2]), q.device)
