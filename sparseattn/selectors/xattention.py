"""XAttention: block sparse attention with antidiagonal scoring (Xu et al. 2025, arXiv:2503.16428)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.scores import xattention_blocks
from sparseattn.ops.scores.antidiagonal_rules import antidiagonal_blocks
from sparseattn.ops.scores.api import BLOCK_SIZES, STRIDES, check_threshold
from sparseattn.ops.scores.pooled_problem import AGGREGATES
from sparseattn.ops.scores.rules_problem import Forced, Rule, check_rule
from sparseattn.ops.sequences import Layout, resolve_sequences
from sparseattn.selectors.base import SelectorConfig, build_mask, check_call
from sparseattn.selectors.tables import freeze, of_layer

Threshold = float | tuple[float, ...] | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class XAttentionConfig(SelectorConfig):
    """Options of :func:`xattention`.

    Attributes:
        threshold: Share of the estimated attention mass to keep, in [0, 1]: one number, one per query head, or one per
            layer and query head (``[layers][heads]``; the call then needs ``layer``). Lists and tensors become tuples.
        stride: Tokens of a scored cell, 4, 8 or 16. Scoring costs 1 / stride of q @ k^T; larger is coarser.
        block_size: Tokens of a block, 64 or 128.
        keep_sink: Every query block keeps the first key block. None: in causal calls.
        keep_recent: Every query block keeps the blocks its own diagonal touches. Causal calls only.
        rule: What the scores are chosen by; the method's own is "cumulative". The others are in
            :func:`sparseattn.ops.scores.choose_blocks`.
        aggregate: How the rows of a query block agree: "mean" (the method's own) or "max".
        density: Share of visible blocks to keep: of each row (rule "topk") or of a whole sequence ("global").
        num_blocks: Blocks of every row, forced ones included (rule "topk").
        max_blocks: No list is longer, but for its forced blocks: the best stay. None: 2048, or what a budget asks for.
    """

    threshold: Threshold = 0.9
    stride: int = 8
    block_size: int = 128
    keep_sink: bool | None = None
    keep_recent: bool = True
    rule: str = "cumulative"
    aggregate: str = "mean"
    density: float | None = None
    num_blocks: int | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", freeze("threshold", self.threshold, check_threshold))
        self._check_choice("stride", STRIDES)
        self._check_choice("block_size", BLOCK_SIZES)
        self._check_bool("keep_recent")
        if self.keep_sink is not None:
            self._check_bool("keep_sink")
        if self.aggregate not in AGGREGATES:
            raise argument_error("aggregate", f"one of {AGGREGATES}", repr(self.aggregate))
        check_rule(Rule(self.rule, (0.0,), self.density, self.num_blocks, self.max_blocks), 1)

    def thresholds(self, heads: int, layer: int | None = None) -> float | tuple[float, ...]:
        """The threshold, or the thresholds of the query heads of a layer.

        Raises:
            ValueError: No ``layer``, or one out of range, where thresholds are per layer; another number of heads.
        """
        return of_layer("threshold", self.threshold, heads, layer)


def xattention(
    q: Tensor,
    k: Tensor,
    config: XAttentionConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep, per head and query block, the fewest key blocks whose estimated attention mass reaches the threshold.

    Scores: :func:`sparseattn.ops.scores.antidiagonal_scores`; selection: :func:`sparseattn.ops.scores.top_p_blocks`,
    with the first block and the diagonal blocks forced in causal calls. The estimate replaces S pairs of a cell by
    their mean *before* the exponential, so a lone key that one query wants is diluted by S.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``XAttentionConfig()``.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq``, at any alignment of Sq and Sk.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        layer: Index of the calling layer, for thresholds per layer.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".
        **layout: Of packed and padded batches; see :class:`sparseattn.ops.sequences.Layout`.

    Returns:
        A BlockMask with Hq heads and ``causal`` as given; ragged batches carry their lengths. Blocks wholly above the
        diagonal and rows past the end of a sequence are never listed. Carries no gradient.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: A config of another method; dtypes that do not fit.
    """
    config = XAttentionConfig() if config is None else config
    check_call(config, XAttentionConfig, causal)
    sequences = resolve_sequences(q, k, **layout)
    thresholds = config.thresholds(q.shape[-2], layer)
    if config.rule != "cumulative" or config.aggregate != "mean":
        values = thresholds if isinstance(thresholds, tuple) else (thresholds,)
        counts, indices = antidiagonal_blocks(
            q,
            k,
            Rule(config.rule, values, config.density, config.num_blocks, config.max_blocks),
            stride=config.stride,
            block_size=config.block_size,
            causal=causal,
            aggregate=config.aggregate,
            forced=Forced(int(config.keep_sink is not False), 0 if config.keep_recent else None),
            scale=scale,
            sequences=sequences,
            impl=impl,
        )
        return build_mask(counts, indices, sequences, config.block_size, causal)
    counts, indices = xattention_blocks(
        q,
        k,
        thresholds,
        stride=config.stride,
        block_size=config.block_size,
        causal=causal,
        keep_sink=config.keep_sink,
        keep_recent=config.keep_recent,
        max_blocks=config.max_blocks,
        scale=scale,
        sequences=sequences,
        impl=impl,
    )
    return build_mask(counts, indices, sequences, config.block_size, causal)
