"""What an implementation of block-sparse attention must know besides q, k and v."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Geometry(NamedTuple):
    """Which keys each query may see, as plain tensors and numbers (it crosses the operator boundary flattened).

    Attributes:
        kv_num_blocks: int32 [B|1, H, MB] of the BlockMask, or None for dense attention.
        kv_indices: int32 [B|1, H, MB, K], or None.
        q_num_blocks: int32 [B|1, H, NB], the transposed lists; only the backward pass of a masked call has them.
        q_indices: int32 [B|1, H, NB, MB], likewise.
        block_q: Rows of a mask block (for dense attention any value the implementation likes).
        block_kv: Columns of a mask block.
        q_start: int32 [batch] first query row of each sequence, or None: see ``Sequences``.
        q_end: int32 [batch] one past the last.
        k_start: int32 [batch], keys.
        k_end: int32 [batch], keys.
        batch: Number of sequences.
        max_q: Longest query length.
        max_k: Longest key length.
        packed: q, k, v are ``[total, H, D]`` instead of ``[B, S, H, D]``.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq`` (lengths of the sequence itself).
        window_left: Keys below ``i + Sk - Sq - window_left`` are hidden; -1 means unbounded.
        window_right: Keys above ``i + Sk - Sq + window_right`` are hidden; -1 means unbounded.
        scale: Factor on q . k.
        softcap: ``cap * tanh(score / cap)`` on scaled scores; 0 means none.
        column_counts: int32 [B|1, H, MB], how many columns each row of blocks lists; None without columns.
        column_indices: int32 [B|1, H, MB, C], the columns of the BlockMask, or None.
        mean_correction: Blocks that a row sees whole and that are not listed are attended by their means.
        row_pieces: int32 [H, P, 3] of a VariableBlockMask: the pieces of its ``Tiling``. Then ``kv_num_blocks`` and
            ``kv_indices`` are its counts and tiles, of rows of blocks that the pieces name, and ``block_q`` and
            ``block_kv`` its sizes. None for blocks of one size.
        key_pieces: int32 [H, P', 3], the pieces of the transposed tiling, whose counts and tiles are ``q_num_blocks``
            and ``q_indices``; only the backward pass of such a call has them.
    """

    kv_num_blocks: Tensor | None
    kv_indices: Tensor | None
    q_num_blocks: Tensor | None
    q_indices: Tensor | None
    block_q: int
    block_kv: int
    q_start: Tensor | None
    q_end: Tensor | None
    k_start: Tensor | None
    k_end: Tensor | None
    batch: int
    max_q: int
    max_k: int
    packed: bool
    causal: bool
    window_left: int
    window_right: int
    scale: float
    softcap: float
    column_counts: Tensor | None = None
    column_indices: Tensor | None = None
    mean_correction: bool = False
    row_pieces: Tensor | None = None
    key_pieces: Tensor | None = None

    @property
    def extra_keys(self) -> bool:
        """Whether rows attend more than listed blocks: columns, or means of skipped blocks."""
        return self.column_indices is not None or self.mean_correction

    def strides(self, t: Tensor) -> tuple[int, int, int, int]:
        """(batch, seq, head, dim) strides of a tensor like q; packed sequences differ only by their start row."""
        return (0, *t.stride()) if self.packed else t.stride()  # type: ignore[return-value]

    def lse_strides(self, q: Tensor) -> tuple[int, int]:
        """(batch, head) strides of the LSE."""
        rows = q.shape[-3]
        return 0 if self.packed else q.shape[-2] * rows, rows

    def spans(self, stand_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_start, q_end, k_start and k_end as kernel arguments: ``stand_in`` for what is None."""
        starts_ends = (self.q_start, self.q_end, self.k_start, self.k_end)
        return tuple(stand_in if t is None else t for t in starts_ends)  # type: ignore[return-value]


def list_arguments(
    counts: Tensor | None, indices: Tensor | None, stand_in: Tensor
) -> tuple[Tensor, Tensor, int, int, int]:
    """Block lists as kernel arguments: pointers, list rows per batch entry and per head, width of a list."""
    if counts is None or indices is None:
        return stand_in, stand_in, 0, 0, 0
    batch, heads, rows = counts.shape[:3]
    if indices.shape[3] == 0:  # no list has an entry; kernels still look at the first
        indices = counts[..., None]
    return counts.contiguous(), indices.contiguous(), 0 if batch == 1 else heads * rows, rows, indices.shape[3]
