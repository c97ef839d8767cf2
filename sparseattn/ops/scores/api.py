"""Block scores and block selection: validation, dispatch and the registered operator."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.dispatch import check_impl, implementation, implementations, on_its_device, require, resolve
from sparseattn.ops.scores.problem import RowBounds, ScoreProblem, check_max_blocks, list_cap, row_bounds
from sparseattn.ops.sequences import LAYOUT_SCHEMA, Sequences, flatten, resolve_sequences, unflatten

PACKAGE = "sparseattn.ops.scores"
STRIDES = (4, 8, 16)
BLOCK_SIZES = (64, 128)


@on_its_device
def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    *,
    stride: int = 8,
    block_size: int = 128,
    causal: bool = True,
    aggregate: str = "sum",
    scale: float | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> Tensor:
    """Estimate the attention mass of every block from strided antidiagonals (XAttention, arXiv:2503.16428).

    Query cell i holds rows ``[iS, iS + S)``, key cell j keys ``[jS, jS + S)``. Their logit is the scaled mean of
    ``q[iS + S - 1 - s] . k[jS + s]`` over the s in ``[0, S)`` for which both tokens exist; a pair of cells without such
    an s carries no mass. A row of cells goes through a softmax over its visible cells (causal: those whose first key
    the cell's last row sees, bottom-right aligned), and a block's score is the sum over its cells: a row of blocks sums
    to the number of its cells, ``block_size / stride``.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``sequences``; any float dtype.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        stride: S; 4, 8 or 16. The estimate costs 1 / S of q @ k^T.
        block_size: 64 or 128.
        causal: Bottom-right aligned causality.
        aggregate: "sum", or "max": the largest mass that any row of cells of the query block gives the block.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        sequences: The layout of a ragged batch, from ``resolve_sequences``; default: every row is valid.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".

    Returns:
        float32 ``[B, Hq, MB, NB]`` (the reference keeps float64 for float64 inputs).

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    if aggregate not in ("sum", "max"):
        raise argument_error("aggregate", "'sum' or 'max'", repr(aggregate))
    p = _problem(q, k, stride, block_size, causal, scale, sequences)._replace(aggregate=aggregate)
    return implementation(PACKAGE, choose(impl, q, k)).antidiagonal_scores(q.detach(), k.detach(), p)


@on_its_device
def top_p_blocks(
    scores: Tensor,
    threshold: float | Sequence[float],
    *,
    visible: Tensor | None = None,
    recent: Tensor | None = None,
    keep_sink: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose, for every row, the smallest set of blocks that holds a share of the row's score.

    The forced blocks come first; then blocks by descending score (ties: lower index first) until forced and chosen ones
    hold at least ``threshold`` of the total over the visible blocks. A threshold of 1 keeps every visible block, 0 the
    forced ones alone. A row that sees a block keeps at least one.

    Args:
        scores: float32 (reference: any float) ``[B, H, MB, NB]``, nonnegative and finite.
        threshold: A number in [0, 1], or one per head.
        visible: int32 ``[B, MB]`` or ``[1, MB]``; row m may list blocks ``[0, visible[m])``. Default: all.
        recent: int32, likewise; row m must list blocks ``[recent[m], visible[m])``. Default: none.
        keep_sink: Block 0 must be listed wherever it is visible.
        impl: As in :func:`antidiagonal_scores`.

    Returns:
        counts int32 ``[B, H, MB]`` and indices int32 ``[B, H, MB, NB]``: ascending, undefined past the count.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: Bounds that are not int32.

    Example:
        >>> top_p_blocks(torch.tensor([[[[5.0, 1.0, 3.0, 1.0]]]]), 0.85)
        (counts [[[3]]], indices [[[[0, 1, 2, ...]]]])   # 5 + 3 = 0.8 of 10, the first 1 makes 0.9
    """
    if scores.dim() != 4:
        raise argument_error("scores", "a 4-D tensor [B, H, MB, NB]", f"shape {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise argument_error("scores", "a floating-point tensor", scores.dtype, kind=TypeError)
    batch, heads, rows, columns = scores.shape
    thresholds = check_thresholds(threshold, heads)
    for name, t in (("visible", visible), ("recent", recent)):
        if t is None:
            continue
        if t.dtype != torch.int32:
            raise argument_error(name, "int32", t.dtype, "Convert with .int().", kind=TypeError)
        if t.dim() != 2 or t.shape[0] not in (1, batch) or t.shape[1] != rows:
            raise argument_error(name, f"shape ({batch}, {rows}) or (1, {rows})", f"shape {tuple(t.shape)}")
        if t.device != scores.device:
            raise argument_error(name, f"device {scores.device} like scores", t.device)
    if visible is None:
        visible = torch.full((1, rows), columns, dtype=torch.int32, device=scores.device)
    if recent is None:
        recent = visible
    module = implementation(PACKAGE, choose(impl, scores))
    shares = torch.tensor(thresholds, dtype=torch.float32, device=scores.device)
    return module.top_p_blocks(scores.detach(), shares, RowBounds(visible, recent), keep_sink)


def xattention_blocks(
    q: Tensor,
    k: Tensor,
    threshold: float | Sequence[float],
    *,
    stride: int = 8,
    block_size: int = 128,
    causal: bool = True,
    keep_sink: bool | None = None,
    keep_recent: bool = True,
    max_blocks: int | None = None,
    scale: float | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Antidiagonal scores and top-p selection in one registered operator (``torch.ops.sparseattn.xattention_blocks``).

    Args:
        q: As in :func:`antidiagonal_scores`, like ``k``, ``stride``, ``block_size``, ``causal``, ``scale``,
            ``sequences`` and ``impl``.
        k: Keys.
        threshold: A number in [0, 1], or one per query head.
        stride: Tokens of a cell.
        block_size: Tokens of a block.
        causal: Bottom-right aligned causality.
        keep_sink: Every row lists block 0. None: causal problems do.
        keep_recent: Every row lists the blocks its own diagonal touches (causal problems only).
        max_blocks: No list is longer, but for its forced blocks: the best stay. None: ``MAX_BLOCKS``.
        scale: Factor on q . k.
        sequences: The layout of a ragged batch.
        impl: The implementation.

    Returns:
        counts int32 ``[B, Hq, MB]`` and indices int32 ``[B, Hq, MB, K]``: ascending, undefined past the count; K is the
        cap where there are more blocks. Rows past the end of a sequence, and rows that see no key, have count 0.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    p = _problem(q, k, stride, block_size, causal, scale, sequences)
    thresholds = check_thresholds(threshold, q.shape[-2])
    check_max_blocks(max_blocks)
    check_impl(impl)  # the rest of the choice happens inside the operator, where a compiler does not look
    s = p.sequences
    keep_sink = causal if keep_sink is None else keep_sink
    return torch.ops.sparseattn.xattention_blocks(
        q.detach(), k.detach(), *flatten(s), list(thresholds), stride, block_size, p.scale, causal, keep_sink,
        keep_recent, max_blocks, impl,
    )  # fmt: skip


def unsupported_reason(*tensors: Tensor, impl: str) -> str | None:
    """Why ``impl`` cannot take ``q, k`` (scoring) or ``scores`` (selection alone), or None."""
    check_impl(impl)
    return resolve(PACKAGE, implementations(impl, tensors[0]), *tensors)[1]


def check_thresholds(threshold: float | Sequence[float], heads: int) -> tuple[float, ...]:
    """Validate a threshold or one per head.

    Returns:
        A tuple of one number, or of ``heads``.

    Raises:
        ValueError: A value that is not in [0, 1], or as many values as there are not heads.
    """
    values = tuple(threshold) if isinstance(threshold, Sequence) else (threshold,)
    if isinstance(threshold, Sequence) and len(values) != heads:
        raise argument_error("threshold", f"a number or {heads} numbers, one per query head", f"{len(values)} numbers")
    for value in values:
        check_threshold(value)
    return tuple(float(value) for value in values)


def check_threshold(value: object) -> None:
    """Raise unless ``value`` is a number in [0, 1]; NaN is not."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise argument_error("threshold", "a number in [0, 1]", repr(value))


@functools.lru_cache(maxsize=1024)
def thresholds_on(device: torch.device, thresholds: tuple[float, ...]) -> Tensor:
    """float32 ``[1]`` or ``[H]``; copied from the host once: later calls and CUDA graphs find it there."""
    return torch.tensor(thresholds, dtype=torch.float32, device=device)


def _problem(
    q: Tensor,
    k: Tensor,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float | None,
    sequences: Sequences | None,
) -> ScoreProblem:
    s = resolve_sequences(q, k) if sequences is None else sequences
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
    if stride not in STRIDES:
        raise argument_error("stride", f"one of {STRIDES}", stride)
    if block_size not in BLOCK_SIZES:
        raise argument_error("block_size", f"one of {BLOCK_SIZES}", block_size)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise argument_error("scale", "a finite number", scale)
    return ScoreProblem(s, stride, block_size, causal, scale)


def choose(impl: str, *tensors: Tensor) -> str:
    """The implementation for q and k, or for scores: the one asked for, or the device's; raises if it refuses."""
    check_impl(impl)
    module = require(PACKAGE, impl, implementations(impl, tensors[0]), *tensors)
    return module.__name__.removeprefix(f"{PACKAGE}.")


class _Call(NamedTuple):
    """Arguments of the registered operator after q and k."""

    q_start: Tensor | None
    q_end: Tensor | None
    k_start: Tensor | None
    k_end: Tensor | None
    batch: int
    max_q: int
    max_k: int
    threshold: list[float]
    stride: int
    block_size: int
    scale: float
    causal: bool
    keep_sink: bool
    keep_recent: bool
    max_blocks: int | None
    impl: str

    @property
    def width(self) -> int:
        """Entries of a list."""
        columns = (self.max_k + self.block_size - 1) // self.block_size
        # Forced are block 0 and two of a diagonal.
        return min(columns, max(list_cap(self.max_blocks), 3))


torch.library.define(
    "sparseattn::xattention_blocks",
    f"(Tensor q, Tensor k, {LAYOUT_SCHEMA}, float[] threshold, int stride, int block_size, float scale, bool causal, "
    "bool keep_sink, bool keep_recent, int? max_blocks, str impl) -> (Tensor, Tensor)",
)


@torch.library.impl("sparseattn::xattention_blocks", "CompositeExplicitAutograd")
@on_its_device
def _xattention_blocks(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    c = _Call(*arguments)
    s = unflatten(q, c)
    p = ScoreProblem(s, c.stride, c.block_size, c.causal, c.scale)
    bounds = row_bounds(s, c.block_size, c.causal, c.keep_recent, q.device)
    thresholds = thresholds_on(q.device, tuple(c.threshold))
    module = implementation(PACKAGE, choose(c.impl, q, k))
    return module.xattention_blocks(q, k, p, thresholds, bounds, c.keep_sink, list_cap(c.max_blocks), c.width)


@torch.library.register_fake("sparseattn::xattention_blocks")
def _xattention_blocks_fake(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    c = _Call(*arguments)
    shape = (c.batch, q.shape[-2], (c.max_q + c.block_size - 1) // c.block_size)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty((*shape, c.width), dtype=torch.int32)
