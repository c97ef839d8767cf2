"""What the last queries attend: the attention mass of columns (verticals) and diagonals (slashes), and the largest of
them. Validation and dispatch; the parts FlexPrefill (arXiv:2502.20766) and MInference (arXiv:2407.02490) are made of.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops import dispatch
from sparseattn.ops.scores.api import PACKAGE, choose
from sparseattn.ops.sequences import Sequences, resolve_sequences

NUM_QUERIES = (16, 32, 64, 128)


class LastQueries(NamedTuple):
    """The last rows of every sequence against all of its keys.

    Attributes:
        sequences: Where the sequences of the batch lie.
        num_queries: Rows looked at, at most; a sequence shorter than that (in queries or, causally, in keys) gives all
            the rows it has that see a key.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq`` (lengths of the sequence itself).
        scale: Factor on q . k.
    """

    sequences: Sequences
    num_queries: int
    causal: bool
    scale: float

    def rows(self, device: torch.device) -> Tensor:
        """int64 ``[B]``: how many rows of each sequence count."""
        q_len, k_len = sequence_lengths(self.sequences, device)
        rows = q_len.clamp(max=self.num_queries)
        return torch.minimum(rows, k_len) if self.causal else torch.where(k_len > 0, rows, 0)


@dispatch.on_its_device
def last_query_mass(
    q: Tensor,
    k: Tensor,
    *,
    num_queries: int = 64,
    causal: bool = True,
    scale: float | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean attention probability of every key and of every distance, over the last queries.

    With P the softmax of the last L rows of a head, ``vertical[j] = sum_i P[i, j] / L`` and
    ``slash[d] = sum_i P[i, p_i - d] / L`` with ``p_i = i + Sk - Sq`` the position of row i: a slash is a diagonal,
    named by the distance it looks back. Both sum to 1 over a causal sequence. Without causality the mass after the
    diagonal is part of ``vertical`` only.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``sequences``; any float dtype.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        num_queries: L; 16, 32, 64 or 128. Fewer where a sequence has fewer.
        causal: Bottom-right aligned causality.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        sequences: The layout of a ragged batch, from ``resolve_sequences``; default: every row is valid.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".

    Returns:
        ``vertical`` and ``slash``, float32 ``[B, Hq, Sk]`` (the reference keeps float64 for float64 inputs); 0 past the
        end of a sequence.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    p = last_queries(q, k, num_queries, causal, scale, sequences)
    vertical, slash = implementation("vertical_slash", impl, q, k).last_query_mass(q.detach(), k.detach(), p)
    return vertical, slash


@dispatch.on_its_device
def largest(values: Tensor, counts: Tensor, *, impl: str = "auto") -> Tensor:
    """The ``counts`` largest of every row; equal values go to the lower index.

    Args:
        values: float32 (reference: any float) ``[..., N]``, nonnegative; infinities come first.
        counts: int ``[...]``, in [0, N].
        impl: As in :func:`last_query_mass`.

    Returns:
        bool ``[..., N]``.

    Raises:
        ValueError: A shape or implementation that does not fit.
    """
    _check_rows(values, counts.shape)
    return implementation("vertical_slash", impl, values).largest(values, counts)


@dispatch.on_its_device
def coverage_counts(values: Tensor, share: float, *, impl: str = "auto") -> Tensor:
    """How many of a row's largest values it takes to hold ``share`` (an absolute sum), at least one.

    Args:
        values: float32 (reference: any float) ``[..., N]``, nonnegative and finite.
        share: The sum to reach. A row that does not reach it gives the number of its positive values.
        impl: As in :func:`last_query_mass`.

    Returns:
        int64 ``[...]``.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
    """
    _check_rows(values, values.shape[:-1])
    if not math.isfinite(share):
        raise argument_error("share", "a finite number", share)
    return implementation("vertical_slash", impl, values).coverage_counts(values, share)


def slash_bands(
    selected: Tensor, unit: int, sequences: Sequences, block_size: int, num_q_blocks: int, num_kv_blocks: int
) -> Tensor:
    """Which blocks the selected slashes cross, by distance in blocks.

    Row p of a query block attends key ``p - d`` of a slash d, so over a block of B rows a slash is a run of B keys that
    starts anywhere: it crosses two key blocks unless it happens to be aligned. Whether it crosses block n from query
    block m depends on ``m - n`` alone.

    Args:
        selected: bool ``[B, H, X]``; entry x stands for the distances ``[x * unit, (x + 1) * unit)``.
        unit: Distances of an entry, 1 or ``block_size``.
        sequences: The batch; its lengths align the diagonals.
        block_size: B.
        num_q_blocks: MB.
        num_kv_blocks: NB.

    Returns:
        bool ``[B, H, MB + NB - 1]``; entry ``m - n + NB - 1`` speaks of query block m and key block n.
    """
    q_len, k_len = sequence_lengths(sequences, selected.device)
    columns = selected.shape[-1]
    difference = torch.arange(1 - num_kv_blocks, max(num_q_blocks, 1), device=selected.device)
    first = difference * block_size + (k_len - q_len)[:, None]  # [B, E] distance of the two blocks' first tokens
    low = (first - block_size + 1).clamp(min=0)
    high = (first + block_size - 1).clamp(max=columns * unit - 1)
    running = torch.nn.functional.pad(selected.cumsum(-1, dtype=torch.int32), (1, 0))

    def before(entry: Tensor) -> Tensor:
        index = entry.clamp(0, columns)[:, None].expand(*selected.shape[:2], -1)
        return running.gather(-1, index)

    crossed = before(high // unit + 1) > before(low // unit)
    return crossed & (high >= low)[:, None]


def sequence_lengths(s: Sequences, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 ``[B]`` query and key lengths, on the device and without a host sync."""

    def full(lengths: Tensor | None, length: int) -> Tensor:
        if lengths is None:
            return torch.full((s.batch,), length, dtype=torch.int64, device=device)
        return lengths.long()

    return full(s.lengths_q(), s.max_q), full(s.lengths_k(), s.max_k)


def last_queries(
    q: Tensor, k: Tensor, num_queries: int, causal: bool, scale: float | None, sequences: Sequences | None
) -> LastQueries:
    """Check the arguments of :func:`last_query_mass` and bring them to one form."""
    s = resolve_sequences(q, k) if sequences is None else sequences
    scale = check_inputs(q, k, scale)
    if num_queries not in NUM_QUERIES:
        raise argument_error("num_queries", f"one of {NUM_QUERIES}", num_queries)
    return LastQueries(s, num_queries, causal, scale)


def check_inputs(q: Tensor, k: Tensor, scale: float | None) -> float:
    """Check that q and k can be multiplied, and return the scale.

    Raises:
        ValueError: Shapes, devices or a scale that do not fit.
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
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise argument_error("scale", "a finite number", scale)
    return scale


def implementation(operation: str, impl: str, *tensors: Tensor) -> ModuleType:
    """The module that runs ``operation`` on these tensors: the one asked for, or the device's.

    Raises:
        ValueError: No such implementation, or it refuses the tensors; the message says why.
    """
    return dispatch.implementation(f"{PACKAGE}.{operation}_{{}}", choose(impl, *tensors))


@functools.lru_cache(maxsize=1024)
def constants_on(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """int32 ``[len(rows), ...]``; copied from the host once: later calls and CUDA graphs find it there."""
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _check_rows(values: Tensor, shape: torch.Size) -> None:
    if values.dim() < 1 or values.shape[-1] == 0:
        raise argument_error("values", "rows of at least one value", f"shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise argument_error("values", "a floating-point tensor", values.dtype, kind=TypeError)
    if shape != values.shape[:-1]:
        raise argument_error("counts", f"shape {tuple(values.shape[:-1])} like the rows", f"shape {tuple(shape)}")
