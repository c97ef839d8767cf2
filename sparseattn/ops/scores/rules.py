"""From block scores to block lists by a choice of rules: validation, dispatch and the registered operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.dispatch import check_impl, implementations, on_its_device, require, resolve
from sparseattn.ops.scores.api import check_threshold
from sparseattn.ops.scores.rules_problem import ListBounds, Rule, check_rule, log_threshold

# Its implementations' modules.
RULES = "sparseattn.ops.scores.rules_{}"


@on_its_device
def choose_blocks(
    scores: Tensor,
    rule: str = "relative",
    threshold: float | Sequence[float] = 0.1,
    *,
    density: float | None = None,
    num_blocks: int | None = None,
    max_blocks: int | None = None,
    visible: Tensor | None = None,
    recent: Tensor | None = None,
    num_sink_blocks: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose blocks from natural-log scores, row by row, by one of five rules.

    Let p be the exponential of a score.

    - "relative": blocks with ``p >= threshold * p_best`` of the row (FlashPrefill, arXiv:2603.06199).
    - "relative_free": likewise, the best of the blocks that are not forced.
    - "cumulative": by descending score until forced and chosen blocks hold ``threshold`` of the row's sum of p.
    - "topk": by descending score until the row lists ``num_blocks``, or ``density`` of its visible blocks (rounded).
    - "global": blocks with ``p >= threshold``, the same number for all rows; with ``density`` the score is used that
      keeps this share of the visible blocks of each batch row, over all heads and rows (equal scores all stay).

    Equal scores go to the lower index. A score of -inf is chosen only by thresholds that keep everything (1 for
    "cumulative", 0 for the others) or to fill a budget. A row that sees a block keeps at least one.

    Args:
        scores: float32 (reference: any float) ``[B, H, MB, NB]``, not NaN, not +inf; read where visible only.
        rule: The rule's name.
        threshold: A number in [0, 1], or one per head.
        density: A share in (0, 1].
        num_blocks: Blocks of a list, forced ones included.
        max_blocks: The best stay where a list would be longer; forced blocks always stay.
        visible: int32 ``[B, MB]`` or ``[1, MB]``; row m may list blocks ``[0, visible[m])``. Default: all.
        recent: int32, likewise; row m must list blocks ``[recent[m], visible[m])``. Default: none.
        num_sink_blocks: Every row must list so many of its first blocks.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".

    Returns:
        counts int32 ``[B, H, MB]`` and indices int32 ``[B, H, MB, NB]``: ascending, undefined past the count.

    Raises:
        ValueError: A shape, value or implementation that does not fit; NaN thresholds.
        TypeError: Scores that are not floating point, bounds that are not int32.

    Example:
        >>> scores = torch.tensor([[[[5.0, 1.0, 3.0, 1.0]]]]).log()
        >>> choose_blocks(scores, "relative", 0.5)
        (counts [[[2]]], indices [[[[0, 2, ...]]]])
    """
    if scores.dim() != 4:
        raise argument_error("scores", "a 4-D tensor [B, H, MB, NB]", f"shape {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise argument_error("scores", "a floating-point tensor", scores.dtype, kind=TypeError)
    batch, heads, rows, columns = scores.shape
    chosen = Rule(rule, thresholds(threshold), density, num_blocks, max_blocks)
    check_rule(chosen, heads)
    if isinstance(num_sink_blocks, bool) or not isinstance(num_sink_blocks, int) or num_sink_blocks < 0:
        raise argument_error("num_sink_blocks", "an int >= 0", repr(num_sink_blocks))
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
    check_impl(impl)
    module = require(RULES, impl, implementations(impl, scores), scores)
    values = torch.tensor(log_threshold(chosen), dtype=torch.float32, device=scores.device)
    bounds = ListBounds(visible, recent, num_sink_blocks)
    return module.choose(scores.detach(), chosen, values, bounds, columns)


def thresholds(threshold: float | Sequence[float]) -> tuple[float, ...]:
    """A threshold or several as a tuple.

    Raises:
        ValueError: A value that is not in [0, 1].
    """
    values = tuple(threshold) if isinstance(threshold, Sequence) else (threshold,)
    for value in values:
        check_threshold(value)
    return tuple(float(value) for value in values)


def unsupported_reason(scores: Tensor, impl: str) -> str | None:
    """Why ``impl`` cannot take these scores, or None."""
    check_impl(impl)
    return resolve(RULES, implementations(impl, scores), scores)[1]
