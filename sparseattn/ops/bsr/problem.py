"""What an implementation of attention over block-sparse rows must know, as plain tensors and numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BSRProblem(NamedTuple):
    """A call in one form (it crosses the operator boundary flattened).

    Attributes:
        k: ``[B, N, Hkv, D]``, any strides.
        v: ``[B, N, Hkv, Dv]``.
        bounds: int32 [B|1, H, MB + 1], where each row's block numbers begin in ``indices``; or int32 [B|1, H, MB],
            how many there are, when ``indices`` are padded lists.
        indices: int32 [nnz], or padded lists int32 [B|1, H, MB, K]. Numbers outside 0..NB - 1 name no block.
        mask: bool or uint8, which tokens of the listed blocks are kept, or None.
        mask_offsets: int64 [MB + 1], bytes at which a row's packed bits begin, or None.
        sinks: float [Hq] or None.
        slopes: float32 [Hq] or None.
        k_scale: float32 [1 or Hkv] on the device, or None.
        v_scale: Likewise.
        rows: R, queries of a block.
        columns: C, keys of a block.
        layout: Of ``mask``: "" (none), "blocks" (bool [nnz, R, C]), "bool" (flat, for each row of blocks [R, keys]),
            "little" or "big" (that, packed, each row of blocks from a byte of its own).
        gathered: Positions are those in the row's list of keys instead of the sequence's own.
        causal: Key j is visible to query i iff ``j <= i + N - M``.
        window_left: As in block-sparse attention; -1 is unbounded.
        window_right: Likewise.
        scale: Factor on q . k, k_scale as a number included.
        softcap: 0 means none.
        rope_theta: 0 means no RoPE.
        rope_scale: Positions are divided by it.
        v_factor: v_scale as a number.
        words: int32 [B|1, H, groups of rows, W, 16, 4], the same pattern as bits (see ``RowBits``), where it is worth
            it, or None.
        counts: int32 [B|1, H, T], likewise.
        tiles: int32 [B|1, H, T, W], likewise.
        keys: bool [B|1, H, N], likewise.
    """

    k: Tensor
    v: Tensor
    bounds: Tensor
    indices: Tensor
    mask: Tensor | None
    mask_offsets: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    rows: int
    columns: int
    layout: str
    gathered: bool
    causal: bool
    window_left: int
    window_right: int
    scale: float
    softcap: float
    rope_theta: float
    rope_scale: float
    v_factor: float
    words: Tensor | None = None
    counts: Tensor | None = None
    tiles: Tensor | None = None
    keys: Tensor | None = None

    @property
    def csr(self) -> bool:
        """Whether rows are ranges of one list."""
        return self.indices.dim() == 1

    @property
    def row_blocks(self) -> int:
        """MB."""
        return self.bounds.shape[2] - (1 if self.csr else 0)

    @property
    def longest(self) -> int:
        """Blocks of a row at most, by shapes alone (as long as a row lists none twice)."""
        return min(self.indices.shape[-1], -(-self.k.shape[1] // self.columns))


#: Of the operator, in the order of the fields.
SCHEMA = (
    "Tensor k, Tensor v, Tensor bounds, Tensor indices, Tensor? mask, Tensor? mask_offsets, Tensor? sinks, "
    "Tensor? slopes, Tensor? k_scale, Tensor? v_scale, SymInt rows, SymInt columns, str layout, bool gathered, "
    "bool causal, SymInt window_left, SymInt window_right, float scale, float softcap, float rope_theta, "
    "float rope_scale, float v_factor, Tensor? words, Tensor? counts, Tensor? tiles, Tensor? keys"
)
