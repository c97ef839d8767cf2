"""Block scores from pooled pages of keys, and blocks chosen from them: validation, dispatch, the registered operator.

Every query is compared with one or two vectors a page of keys: FlashPrefill's mean-pooled keys, Quest's bounds, or the
keys themselves, which makes the exact block masses that oracles are made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.dispatch import check_impl, implementation, implementations, on_its_device, require, resolve
from sparseattn.ops.scores.api import thresholds_on
from sparseattn.ops.scores.pooled_problem import PooledProblem, check_pages, check_problem
from sparseattn.ops.scores.rules import thresholds as as_thresholds
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

_MODULES = "sparseattn.ops.scores.pooled_{}"


@on_its_device
def pooled_scores(
    q: Tensor,
    k: Tensor,
    *,
    feature: str = "mean",
    page_size: int = 128,
    block_size: int = 128,
    causal: bool = True,
    row_softmax: bool = False,
    aggregate: str = "mean",
    scale: float | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> Tensor:
    """Score every block by comparing all queries with pooled pages of keys.

    The logit of query i and page j is ``scale * q_i . mean(k over the page)`` ("mean"), or the least upper bound that
    the page's elementwise extremes give of ``scale * q_i . k``: ``relu(q_i) . kmax + min(q_i, 0) . kmin`` ("bound";
    Quest, arXiv:2406.10774). Features are rounded to k's dtype. Causal rows see a page once they see all ``page_size``
    of its keys, so no score depends on keys after a row's diagonal, nor on how long the prompt goes on; otherwise every
    page counts once, a short last one too. Then

    - with ``row_softmax`` logits become log-probabilities of their row over the pages it sees; without, rows keep their
      logits and the loudest has the say (FlashPrefill, arXiv:2603.06199);
    - a block's value in a row is the log-sum-exp over its pages;
    - a block's score is the log of the mean, over the rows of the query block, of the value's exponential ("mean"), or
      the largest value ("max").

    With ``page_size=1, row_softmax=True`` the values are exact: the score is the log of the block's share of the query
    block's attention mass, or of the largest probability any row gives it.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``sequences``; any float dtype.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        feature: "mean" or "bound".
        page_size: 1, 8, 16, 32, 64 or 128, at most ``block_size``. Scoring costs 1 / page_size of q @ k^T ("bound"
            twice that), twice with ``row_softmax``.
        block_size: 64 or 128.
        causal: Bottom-right aligned causality.
        row_softmax: Whether rows are normalised first.
        aggregate: "mean" or "max".
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        sequences: The layout of a ragged batch, from ``resolve_sequences``; default: every row is valid.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".

    Returns:
        float32 ``[B, Hq, MB, NB]``, natural log (the reference keeps float64 for float64 inputs); -inf where no row of
        the query block sees a page of the block.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    s = resolve_sequences(q, k) if sequences is None else sequences
    p = PooledProblem(s, feature, page_size, block_size, causal, _scale(q, scale), row_softmax, aggregate)
    check_problem(q, k, p)
    return _implementation(impl, q, k).block_scores(q.detach(), k.detach(), p)


def pool_pages(k: Tensor, feature: str = "mean", page_size: int = 128) -> tuple[Tensor, ...]:
    """Features of every page of whole sequences: what ``pooled_scores`` compares queries with.

    Args:
        k: ``[B, Sk, Hkv, D]``, any float dtype and device.
        feature: "mean", or "bound".
        page_size: 1, 8, 16, 32, 64 or 128.

    Returns:
        ``[B, ceil(Sk / page_size), Hkv, D]`` in k's dtype: the means; or the greatest and the least elements.

    Raises:
        ValueError: A shape or value that does not fit.
    """
    if k.dim() != 4:
        raise argument_error("k", "a 4-D tensor [batch, seq, heads, head_dim]", f"shape {tuple(k.shape)}")
    check_pages(feature, page_size, 128)
    reference = implementation(_MODULES, "reference")
    flat = k.detach().transpose(0, 1).flatten(1, 2)  # one sequence of B * Hkv heads
    pooled = reference.pool(flat, feature, page_size)
    return tuple(x.unflatten(1, (k.shape[0], k.shape[2])).transpose(0, 1) for x in pooled)


def pooled_blocks(
    q: Tensor,
    k: Tensor,
    rule: Rule,
    *,
    feature: str = "mean",
    page_size: int = 128,
    block_size: int = 128,
    causal: bool = True,
    row_softmax: bool = False,
    aggregate: str = "mean",
    forced: Forced | None = None,
    group_shared: bool = False,
    scale: float | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scores and selection in one registered operator (``torch.ops.sparseattn.pooled_blocks``).

    Args:
        q: As in :func:`pooled_scores`, like the options not listed here.
        k: Keys.
        rule: How scores become lists; see :func:`sparseattn.ops.scores.choose_blocks`.
        feature: "mean" or "bound".
        page_size: Keys of a page.
        block_size: Tokens of a block.
        causal: Bottom-right aligned causality.
        row_softmax: Whether rows are normalised first.
        aggregate: "mean" or "max"; also over the heads of a group with ``group_shared``.
        forced: Blocks listed in any case; default: those of each row's own diagonal.
        group_shared: One list for the query heads of each key head.
        scale: Factor on q . k.
        sequences: The layout of a ragged batch.
        impl: The implementation.

    Returns:
        counts int32 ``[B, H, MB]`` and indices int32 ``[B, H, MB, K]``: ascending, undefined past the count; H is Hkv
        with ``group_shared``, else Hq. K is NB or what the rule limits it to, ``MAX_BLOCKS`` if it does not. Rows past
        the end of a sequence, and rows that see no key, have count 0.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    s = resolve_sequences(q, k) if sequences is None else sequences
    p = PooledProblem(s, feature, page_size, block_size, causal, _scale(q, scale), row_softmax, aggregate)
    check_problem(q, k, p)
    rule = rule._replace(threshold=as_thresholds(rule.threshold))
    check_rule(rule, k.shape[-2] if group_shared else q.shape[-2])
    forced = Forced() if forced is None else forced
    check_impl(impl)
    return torch.ops.sparseattn.pooled_blocks(
        q.detach(), k.detach(), *flatten(s), feature, page_size, block_size, p.scale, causal, row_softmax, aggregate,
        group_shared, *flatten_rule(rule, forced), impl,
    )  # fmt: skip


def pooled_unsupported_reason(q: Tensor, k: Tensor, impl: str) -> str | None:
    """Why ``impl`` cannot score ``q`` and ``k`` by pages, or None."""
    check_impl(impl)
    return resolve(_MODULES, implementations(impl, q), q, k)[1]


def _scale(q: Tensor, scale: float | None) -> float:
    # A head dimension of 0 is refused by the check that follows.
    return 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)


def _implementation(impl: str, q: Tensor, k: Tensor) -> ModuleType:
    check_impl(impl)
    return require(_MODULES, impl, implementations(impl, q), q, k)


class _Call(NamedTuple):
    """Arguments of the registered operator after q and k."""

    q_start: Tensor | None
    q_end: Tensor | None
    k_start: Tensor | None
    k_end: Tensor | None
    batch: int
    max_q: int
    max_k: int
    feature: str
    page_size: int
    block_size: int
    scale: float
    causal: bool
    row_softmax: bool
    aggregate: str
    group_shared: bool
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
    "sparseattn::pooled_blocks",
    f"(Tensor q, Tensor k, {LAYOUT_SCHEMA}, str feature, int page_size, int block_size, float scale, bool causal, "
    f"bool row_softmax, str aggregate, bool group_shared, {RULE_SCHEMA}, str impl) -> (Tensor, Tensor)",
)


@torch.library.impl("sparseattn::pooled_blocks", "CompositeExplicitAutograd")
@on_its_device
def _pooled_blocks(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    c = _Call(*arguments)
    s = unflatten(q, c)
    p = PooledProblem(s, c.feature, c.page_size, c.block_size, c.causal, c.scale, c.row_softmax, c.aggregate)
    rule, forced = unflatten_rule(c)
    rule = capped(rule, p.num_kv_blocks)
    bounds = list_bounds(s, c.block_size, c.causal, forced, q.device)
    values = thresholds_on(q.device, log_threshold(rule))
    group = q.shape[-2] // k.shape[-2] if c.group_shared else 1
    width = list_width(p.num_kv_blocks, rule, c.causal, forced, c.block_size)
    return _implementation(c.impl, q, k).pooled_blocks(q, k, p, rule, values, bounds, group, width)


@torch.library.register_fake("sparseattn::pooled_blocks")
def _pooled_blocks_fake(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    c = _Call(*arguments)
    return empty_lists(q, (k if c.group_shared else q).shape[-2], c)
