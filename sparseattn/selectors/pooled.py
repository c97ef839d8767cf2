"""What the selectors that compare all queries with pages of keys share: their options and the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.scores.api import check_threshold
from sparseattn.ops.scores.pooled import pooled_blocks
from sparseattn.ops.scores.pooled_problem import AGGREGATES, BLOCK_SIZES, check_pages
from sparseattn.ops.scores.rules_problem import Forced, Rule, check_rule
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.selectors.base import SelectorConfig, build_mask
from sparseattn.selectors.tables import freeze, of_layer

Threshold = float | tuple[float, ...] | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PooledConfig(SelectorConfig):
    """Options shared by ``flashprefill``, ``bound``, ``topk`` and ``oracle``; each documents its own defaults.

    Attributes:
        threshold: What ``rule`` compares with, in [0, 1]: one number, one per list of a query block (query heads; key
            heads with ``group_shared``), or one per layer and list (``[layers][lists]``; the call then needs
            ``layer``).
        rule: "relative", "relative_free", "cumulative", "topk" or "global"; see
            :func:`sparseattn.ops.scores.choose_blocks`.
        aggregate: How the queries of a block agree: "mean" or "max".
        row_softmax: Whether each query's logits become probabilities first. Rule "global" with a threshold needs it.
        density: Share of visible blocks to keep: of each row (rule "topk") or of a whole sequence ("global").
        num_blocks: Blocks of every row, forced ones included (rule "topk").
        max_blocks: No list is longer, but for its forced blocks: the best stay. None: 2048, or what a budget asks for.
        block_size: Tokens of a block, 64 or 128.
        num_sink_tokens: Every query block keeps the blocks of so many first keys. Causal calls only.
        num_local_tokens: And of so many keys before its diagonal. Causal calls only; needs ``keep_recent``.
        keep_recent: And the blocks its own diagonal touches. Causal calls only.
        group_shared: One list for the query heads of each key head; scores are aggregated over them, too.
    """

    threshold: Threshold = 0.1
    rule: str = "relative"
    aggregate: str = "mean"
    row_softmax: bool = False
    density: float | None = None
    num_blocks: int | None = None
    max_blocks: int | None = None
    block_size: int = 128
    num_sink_tokens: int = 1
    num_local_tokens: int = 0
    keep_recent: bool = True
    group_shared: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", freeze("threshold", self.threshold, check_threshold))
        self._check_choice("block_size", BLOCK_SIZES)
        check_rule(self._rule((0.0,)), 1)
        if self.aggregate not in AGGREGATES:
            raise argument_error("aggregate", f"one of {AGGREGATES}", repr(self.aggregate))
        self._check_bool("row_softmax", "keep_recent", "group_shared")
        self._check_count("num_sink_tokens", "num_local_tokens")
        if self.num_local_tokens and not self.keep_recent:
            raise argument_error("num_local_tokens", "0 without keep_recent", self.num_local_tokens)
        if self.rule == "global" and self.density is None and not self.row_softmax:
            raise argument_error(
                "row_softmax", "True with rule 'global' and a threshold", False, "A threshold speaks of probabilities."
            )

    def rule_for(self, lists: int, layer: int | None) -> Rule:
        """The rule, with the thresholds of a layer whose query blocks have so many lists.

        Raises:
            ValueError: No ``layer``, or one out of range, where thresholds are per layer; another number of lists.
        """
        value = of_layer("threshold", self.threshold, lists, layer)
        return self._rule(value if isinstance(value, tuple) else (value,))

    def forced(self, num_last_tokens: int = 0) -> Forced:
        """The blocks kept whatever the scores say."""
        return Forced(self.num_sink_tokens, self.num_local_tokens if self.keep_recent else None, num_last_tokens)

    def _rule(self, thresholds: tuple[float, ...]) -> Rule:
        return Rule(self.rule, thresholds, self.density, self.num_blocks, self.max_blocks)

    def _check_pages(self, feature: str, page_size: int) -> None:
        check_pages(feature, page_size, self.block_size)


def select_pooled(
    q: Tensor,
    k: Tensor,
    config: PooledConfig,
    *,
    feature: str,
    page_size: int,
    causal: bool,
    scale: float | None,
    layer: int | None,
    impl: str,
    num_last_tokens: int = 0,
    **layout: Any,
) -> BlockMask:
    """A selector's call: resolve the layout, score, choose, and wrap the lists."""
    sequences = resolve_sequences(q, k, **layout)
    counts, indices = pooled_blocks(
        q,
        k,
        config.rule_for((k if config.group_shared else q).shape[-2], layer),
        feature=feature,
        page_size=page_size,
        block_size=config.block_size,
        causal=causal,
        row_softmax=config.row_softmax,
        aggregate=config.aggregate,
        forced=config.forced(num_last_tokens),
        group_shared=config.group_shared,
        scale=scale,
        sequences=sequences,
        impl=impl,
    )
    return build_mask(counts, indices, sequences, config.block_size, causal)
