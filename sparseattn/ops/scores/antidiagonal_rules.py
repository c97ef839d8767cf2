"""XAttention's scores under any selection rule: the operator behind its ``rule`` and ``aggregate`` options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.ops.dispatch import implementation, on_its_device
from sparseattn.ops.scores.api import PACKAGE, choose, thresholds_on
from sparseattn.ops.scores.chunks import ScoreChunks
from sparseattn.ops.scores.problem import ScoreProblem
from sparseattn.ops.scores.rules import RULES, thresholds
from sparseattn.ops.scores.rules_problem import (
    RULE_SCHEMA,
    Forced,
    Rule,
    capped,
    check_rule,
    empty_lists,
    flatten_rule,
    list_bounds,
    list_width,
    log_threshold,
    unflatten_rule,
)
from sparseattn.ops.sequences import LAYOUT_SCHEMA, Sequences, flatten, resolve_sequences, unflatten


def antidiagonal_blocks(
    q: Tensor,
    k: Tensor,
    rule: Rule,
    *,
    stride: int = 8,
    block_size: int = 128,
    causal: bool = True,
    aggregate: str = "mean",
    forced: Forced | None = None,
    scale: float | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Antidiagonal scores, then any rule, in one registered operator (``torch.ops.sparseattn.antidiagonal_blocks``).

    The natural-log score of a block is that of the mean, or of the largest, estimated mass that the rows of cells of
    the query block give it (:func:`sparseattn.ops.scores.antidiagonal_scores`).

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``sequences``.
        k: ``[B, Sk, Hkv, D]`` or packed.
        rule: How scores become lists; see :func:`sparseattn.ops.scores.choose_blocks`.
        stride: Tokens of a cell.
        block_size: Tokens of a block.
        causal: Bottom-right aligned causality.
        aggregate: "mean" or "max".
        forced: Blocks listed in any case; default: those of each row's own diagonal.
        scale: Factor on q . k.
        sequences: The layout of a ragged batch.
        impl: The implementation.

    Returns:
        counts int32 ``[B, Hq, MB]`` and indices int32 ``[B, Hq, MB, K]``: ascending, undefined past the count.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    s = resolve_sequences(q, k) if sequences is None else sequences
    rule = rule._replace(threshold=thresholds(rule.threshold))
    check_rule(rule, q.shape[-2])
    forced = Forced() if forced is None else forced
    scale = max(1, q.shape[-1]) ** -0.5 if scale is None else float(scale)
    return torch.ops.sparseattn.antidiagonal_blocks(
        q.detach(), k.detach(), *flatten(s), stride, block_size, scale, causal, aggregate,
        *flatten_rule(rule, forced), impl,
    )  # fmt: skip


class _Call(NamedTuple):
    """Arguments of the registered operator after q and k."""

    q_start: Tensor | None
    q_end: Tensor | None
    k_start: Tensor | None
    k_end: Tensor | None
    batch: int
    max_q: int
    max_k: int
    stride: int
    block_size: int
    scale: float
    causal: bool
    aggregate: str
    rule: str
    threshold: Sequence[float]
    density: float | None
    num_blocks: int | None
    max_blocks: int | None
    sink_tokens: int
    local_tokens: int | None
    last_tokens: int
    impl: str


torch.library.define(
    "sparseattn::antidiagonal_blocks",
    f"(Tensor q, Tensor k, {LAYOUT_SCHEMA}, int stride, int block_size, float scale, bool causal, str aggregate, "
    f"{RULE_SCHEMA}, str impl) -> (Tensor, Tensor)",
)


@torch.library.impl("sparseattn::antidiagonal_blocks", "CompositeExplicitAutograd")
@on_its_device
def _antidiagonal_blocks(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    c = _Call(*arguments)
    s = unflatten(q, c)
    rule, forced = unflatten_rule(c)
    aggregate = "sum" if c.aggregate == "mean" else c.aggregate
    p = ScoreProblem(s, c.stride, c.block_size, c.causal, c.scale, aggregate)
    rule = capped(rule, p.num_kv_blocks)
    bounds = list_bounds(s, c.block_size, c.causal, forced, q.device)
    name = choose(c.impl, q, k)
    whole = rule.name == "global" and rule.density is not None
    chunks = implementation(PACKAGE, name).score_chunks(q, k, p, bounds, whole)
    cells = _cells(s, p.num_q_blocks, c.stride, c.block_size, q.device)[:, None, :, None]

    def logs(first: int, rows: int) -> Tensor:
        scores = chunks.score(first, rows)
        if c.aggregate == "mean":
            scores /= cells[:, :, first : first + rows].to(scores.dtype)
        return scores.log_()

    values = thresholds_on(q.device, log_threshold(rule))
    width = list_width(p.num_kv_blocks, rule, c.causal, forced, c.block_size)
    shape = (s.batch, q.shape[-2], p.num_q_blocks, p.num_kv_blocks)
    choosing = implementation(RULES, name)
    return choosing.choose_chunks(ScoreChunks(logs, chunks.rows, chunks.step), shape, rule, values, bounds, width)


def _cells(s: Sequences, rows: int, stride: int, block_size: int, device: torch.device) -> Tensor:
    """Query cells of every query block, at least 1: int64 ``[B|1, MB]``."""
    used = s.lengths_q()
    length = torch.full((1,), s.max_q, device=device) if used is None else used.long()
    left = length[:, None] - torch.arange(rows, device=device) * block_size
    return (left.clamp(max=block_size) + stride - 1).div(stride, rounding_mode="floor").clamp(min=1)


@torch.library.register_fake("sparseattn::antidiagonal_blocks")
def _antidiagonal_blocks_fake(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_lists(q, q.shape[-2], _Call(*arguments))
