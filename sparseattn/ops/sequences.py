"""Ragged batches in one form: where each sequence's rows begin and end.

Padded batches (``ranges_q``/``ranges_k``: left padding, right padding, caches longer than their content) and packed
ones (``cu_seqlens_q``/``cu_seqlens_k``) differ only in how a sequence's first row is addressed, so operators and
selectors resolve both to the same four int32 vectors and never move data for either.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from sparseattn.errors import argument_error


class Layout(TypedDict, total=False):
    """The layout arguments of operators and selectors, all optional; ``resolve_sequences`` checks them.

    Attributes:
        cu_seqlens_q: int32 [B + 1], cumulative query lengths of packed ``[total, H, D]`` tensors, starting at 0.
        cu_seqlens_k: int32 [B + 1], likewise for keys; defaults to ``cu_seqlens_q``.
        max_seqlen_q: Longest query length of a packed batch; defaults to ``total_q``, which is right but launches more.
        max_seqlen_k: Longest key length of a packed batch; defaults to ``total_k``.
        ranges_q: int32 [B, 2], the valid rows ``[start, end)`` of every row of a padded ``[B, S, H, D]`` batch.
        ranges_k: int32 [B, 2], likewise for keys and values.
    """

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    ranges_q: Tensor | None
    ranges_k: Tensor | None


class Sequences(NamedTuple):
    """Where the sequences of a batch lie.

    Attributes:
        batch: Number of sequences.
        max_q: Longest query length (an upper bound is allowed; it sizes launches and block lists).
        max_k: Longest key length, likewise.
        q_start: int32 [batch], first query row of each sequence; counted in the packed tensor when ``packed``, in the
            sequence's own batch row otherwise. None when every row of a padded batch is valid.
        q_end: int32 [batch], one past the last query row. None with ``q_start``.
        k_start: As ``q_start``, for keys and values.
        k_end: As ``q_end``, for keys and values.
        packed: Tensors are ``[total, heads, head_dim]`` instead of ``[batch, seq, heads, head_dim]``.
    """

    batch: int
    max_q: int
    max_k: int
    q_start: Tensor | None
    q_end: Tensor | None
    k_start: Tensor | None
    k_end: Tensor | None
    packed: bool

    @property
    def ragged(self) -> bool:
        return self.q_start is not None or self.k_start is not None

    def lengths_q(self) -> Tensor | None:
        """int32 [batch] query lengths, or None when all equal ``max_q``."""
        return None if self.q_start is None or self.q_end is None else self.q_end - self.q_start

    def lengths_k(self) -> Tensor | None:
        """int32 [batch] key lengths, or None when all equal ``max_k``."""
        return None if self.k_start is None or self.k_end is None else self.k_end - self.k_start

    def bounds(self) -> list[tuple[int, int, int, int]]:
        """Host-side ``(q_start, q_end, k_start, k_end)`` of every sequence. Reads the device: for references only."""

        def column(t: Tensor | None, default: int) -> list[int]:
            return [default] * self.batch if t is None else t.tolist()

        return list(
            zip(
                column(self.q_start, 0),
                column(self.q_end, self.max_q),
                column(self.k_start, 0),
                column(self.k_end, self.max_k),
                strict=True,
            )
        )


# A layout as a registered operator takes it: every field but ``packed``, which the rank of q tells.
LAYOUT_SCHEMA = (
    "Tensor? q_start, Tensor? q_end, Tensor? k_start, Tensor? k_end, SymInt batch, SymInt max_q, SymInt max_k"
)


def flatten(s: Sequences) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, int]:
    """A layout in the order of ``LAYOUT_SCHEMA``."""
    return s.q_start, s.q_end, s.k_start, s.k_end, s.batch, s.max_q, s.max_k


def unflatten(q: Tensor, c: Any) -> Sequences:
    """The layout of a registered operator's arguments ``c``, which has them by their names."""
    return Sequences(c.batch, c.max_q, c.max_k, c.q_start, c.q_end, c.k_start, c.k_end, q.dim() == 3)


def resolve_sequences(
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    ranges_q: Tensor | None = None,
    ranges_k: Tensor | None = None,
) -> Sequences:
    """Validate the layout arguments of an operator or selector and bring them to one form, without a host sync.

    Args:
        q: ``[B, Sq, Hq, D]``, or ``[total_q, Hq, D]`` with ``cu_seqlens_*``.
        k: ``[B, Sk, Hkv, D]``, or ``[total_k, Hkv, D]``.
        cu_seqlens_q: This and the other five: see ``Layout``.

    Raises:
        ValueError: Ranks, batch sizes or combinations that do not fit.
        TypeError: Index tensors that are not int32.
    """
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise argument_error("cu_seqlens_q", "given together with cu_seqlens_k", None)
    packed = cu_seqlens_q is not None
    rank = 3 if packed else 4
    layout = "[total, heads, head_dim]" if packed else "[batch, seq, heads, head_dim]"
    hint = "" if packed else "Packed [total, heads, head_dim] tensors need cu_seqlens_q."
    for name, t in (("q", q), ("k", k)):
        if t.dim() != rank:
            raise argument_error(name, f"a {rank}-D tensor {layout}", f"shape {tuple(t.shape)}", hint)

    if packed:
        if ranges_q is not None or ranges_k is not None:
            raise argument_error("ranges_q/ranges_k", "None for packed tensors", "a tensor", "Use cu_seqlens_*.")
        assert cu_seqlens_q is not None
        if cu_seqlens_k is None:
            if q.shape[0] != k.shape[0]:
                raise argument_error("cu_seqlens_k", "given when q and k have different totals", None)
            cu_seqlens_k = cu_seqlens_q
        batch = cu_seqlens_q.numel() - 1
        for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            _check_index(name, t, (batch + 1,), q.device)
        if batch < 1:
            raise argument_error("cu_seqlens_q", "at least 2 entries", f"shape {tuple(cu_seqlens_q.shape)}")
        max_q = q.shape[0] if max_seqlen_q is None else int(max_seqlen_q)
        if max_seqlen_k is None:
            max_k = max_q if cu_seqlens_k is cu_seqlens_q else k.shape[0]
        else:
            max_k = int(max_seqlen_k)
        starts_q, starts_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        return Sequences(batch, max_q, max_k, starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], True)

    batch = q.shape[0]
    if k.shape[0] != batch:
        raise argument_error("k", f"batch size {batch} like q", k.shape[0])
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value is not None:
            raise argument_error(name, "None without cu_seqlens_q", value, "Padded tensors carry their length.")
    for name, ranges in (("ranges_q", ranges_q), ("ranges_k", ranges_k)):
        if ranges is not None:
            _check_index(name, ranges, (batch, 2), q.device)
    return Sequences(batch, q.shape[1], k.shape[1], *_columns(ranges_q), *_columns(ranges_k), False)


def _columns(ranges: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The starts and ends of ``ranges``, each contiguous."""
    if ranges is None:
        return None, None
    start, end = ranges.t().contiguous().unbind(0)
    return start, end


def _check_index(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if t.dtype != torch.int32:
        raise argument_error(name, "int32", t.dtype, "Convert with .int().", kind=TypeError)
    if tuple(t.shape) != shape:
        raise argument_error(name, f"shape {shape}", f"shape {tuple(t.shape)}")
    if t.device != device:
        raise argument_error(name, f"device {device} like q", t.device)
