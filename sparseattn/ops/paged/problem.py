"""What an implementation of paged attention must know, as plain tensors and numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PagedProblem(NamedTuple):
    """A call in one form (it crosses the operator boundary flattened).

    Attributes:
        k: ``[P, page, Hkv, D]``, any strides.
        v: ``[P, page, Hkv, Dv]``.
        k_rope: ``[P, page, Hkv, R]`` or None.
        seq_lens: int32 [B].
        page_table: int32 [B, max_pages], or None with ``indptr``.
        indptr: int32 [B + 1] or None.
        indices: int32 [nnz] or None.
        cu_seqlens_q: int32 [B + 1], or None for one query a sequence.
        sinks: float [Hq] or None.
        slopes: float32 [Hq] or None.
        custom_mask: bool or uint8 [n] or None.
        mask_offsets: int64 [B + 1], where sequences begin in it; None: right behind the one before, packed ones in a
            byte of their own.
        k_scale: float32 [1 or Hkv] on the device, or None.
        v_scale: Likewise.
        list_counts: int32 [B|1, H, M], entries of every row's list of blocks, or None.
        list_indices: int32 [B|1, H, M, K], or None.
        max_q: Longest query length, or a bound of it.
        block_q: Query rows that share a list; 0 when all do.
        block_kv: Keys of a listed block.
        causal: Key j is visible to query i iff ``j <= i + seq_len - q_len``.
        window_left: As in block-sparse attention; -1 is unbounded.
        window_right: Likewise.
        scale: Factor on q . k, k_scale as a number included.
        softcap: 0 means none.
        rope_theta: 0 means no RoPE.
        rope_scale: Positions are divided by it.
        big_endian: Packed masks start at the most significant bit.
        v_factor: v_scale as a number.
    """

    k: Tensor
    v: Tensor
    k_rope: Tensor | None
    seq_lens: Tensor
    page_table: Tensor | None
    indptr: Tensor | None
    indices: Tensor | None
    cu_seqlens_q: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None
    custom_mask: Tensor | None
    mask_offsets: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    list_counts: Tensor | None
    list_indices: Tensor | None
    max_q: int
    block_q: int
    block_kv: int
    causal: bool
    window_left: int
    window_right: int
    scale: float
    softcap: float
    rope_theta: float
    rope_scale: float
    big_endian: bool
    v_factor: float

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def batch(self) -> int:
        return self.seq_lens.shape[0]


#: Of the operator, in the order of the fields.
SCHEMA = (
    "Tensor k, Tensor v, Tensor? k_rope, Tensor seq_lens, Tensor? page_table, Tensor? indptr, Tensor? indices, "
    "Tensor? cu_seqlens_q, Tensor? sinks, Tensor? slopes, Tensor? custom_mask, Tensor? mask_offsets, Tensor? k_scale, "
    "Tensor? v_scale, Tensor? list_counts, Tensor? list_indices, SymInt max_q, SymInt block_q, SymInt block_kv, "
    "bool causal, SymInt window_left, SymInt window_right, float scale, float softcap, float rope_theta, "
    "float rope_scale, bool big_endian, float v_factor"
)
