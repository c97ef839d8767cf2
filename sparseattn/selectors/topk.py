"""Top-k: as many blocks for every row, by any estimate; by default mean-pooled keys, as MInference's sparse heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.scores.antidiagonal_rules import antidiagonal_blocks
from sparseattn.ops.scores.api import STRIDES
from sparseattn.ops.scores.pooled import pooled_blocks
from sparseattn.ops.scores.pooled_problem import AGGREGATES, BLOCK_SIZES, check_pages
from sparseattn.ops.scores.rules_problem import Forced, Rule, check_rule
from sparseattn.ops.sequences import Layout, resolve_sequences
from sparseattn.selectors.base import SelectorConfig, build_mask, check_call

ESTIMATORS = ("mean", "bound", "antidiagonal", "exact")


@dataclass(frozen=True)
class TopKConfig(SelectorConfig):
    """Options of :func:`topk`.

    Attributes:
        num_blocks: Blocks of every row, forced ones included.
        density: Or their share of the blocks the row sees, in (0, 1]. With neither: 0.2.
        estimator: "mean" (mean-pooled keys), "bound" (Quest's bounds), "antidiagonal" (XAttention's scores) or "exact".
        page_size: Keys of a page for "mean" (None: ``block_size``) and "bound" (None: 16), or the stride of
            "antidiagonal" (None: 8).
        aggregate: How the queries of a block agree: "mean" or "max".
        row_softmax: Whether each query's logits become probabilities first; "antidiagonal" and "exact" always do.
        block_size: Tokens of a block, 64 or 128.
        num_sink_tokens: Every query block keeps the blocks of so many first keys. Causal calls only.
        keep_recent: And the blocks its own diagonal touches. Causal calls only.
        group_shared: One list for the query heads of each key head. Not with "antidiagonal".
    """

    num_blocks: int | None = None
    density: float | None = None
    estimator: str = "mean"
    page_size: int | None = None
    aggregate: str = "mean"
    row_softmax: bool = True
    block_size: int = 128
    num_sink_tokens: int = 1
    keep_recent: bool = True
    group_shared: bool = False

    def __post_init__(self) -> None:
        check_rule(self.rule, 1)
        self._check_choice("block_size", BLOCK_SIZES)
        if self.estimator not in ESTIMATORS:
            raise argument_error("estimator", f"one of {ESTIMATORS}", repr(self.estimator))
        if self.aggregate not in AGGREGATES:
            raise argument_error("aggregate", f"one of {AGGREGATES}", repr(self.aggregate))
        self._check_bool("row_softmax", "keep_recent", "group_shared")
        self._check_count("num_sink_tokens")
        exact = self.estimator == "exact"
        if exact and self.page_size not in (None, 1):
            raise argument_error("page_size", "None with estimator 'exact'", repr(self.page_size))
        if self.estimator == "antidiagonal":
            if self.page_size is not None:
                self._check_choice("page_size", STRIDES)
            if self.group_shared:
                raise argument_error("group_shared", "False with estimator 'antidiagonal'", True)
        else:
            check_pages("mean", self.pooled_keys, self.block_size)

    @property
    def rule(self) -> Rule:
        """The budget as a selection rule."""
        default = 0.2 if self.num_blocks is None and self.density is None else self.density
        return Rule("topk", density=default, num_blocks=self.num_blocks)

    @property
    def pooled_keys(self) -> int:
        """Keys of a page, or of a strided cell."""
        if self.page_size is not None:
            return self.page_size
        return {"mean": self.block_size, "bound": 16, "antidiagonal": 8, "exact": 1}[self.estimator]


def topk(
    q: Tensor,
    k: Tensor,
    config: TopKConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep as many blocks in every row: the best by an estimate of their attention mass.

    The budget is exact (a row that sees fewer blocks keeps those), and equal scores go to the lower index. Scores:
    :func:`sparseattn.ops.scores.pooled_scores` and :func:`sparseattn.ops.scores.antidiagonal_scores`. Rows that need
    much and rows that need nothing get the same, which costs answers whatever the estimate.

    A chunk of queries that begins a multiple of ``block_size`` into the sequence selects what it would inside the whole
    prompt.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``TopKConfig()``.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq``, at any alignment of Sq and Sk.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        layer: Ignored.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".
        **layout: Of packed and padded batches; see :class:`sparseattn.ops.sequences.Layout`.

    Returns:
        A BlockMask with Hq heads (Hkv with ``group_shared``) and ``causal`` as given; ragged batches carry their
        lengths. With ``num_blocks`` its lists are no wider than that and the forced blocks need. Carries no gradient.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: A config of another method; dtypes that do not fit.
    """
    config = TopKConfig() if config is None else config
    check_call(config, TopKConfig, causal)
    sequences = resolve_sequences(q, k, **layout)
    forced = Forced(config.num_sink_tokens, 0 if config.keep_recent else None)
    if config.estimator == "antidiagonal":
        counts, indices = antidiagonal_blocks(
            q, k, config.rule, stride=config.pooled_keys, block_size=config.block_size, causal=causal, scale=scale,
            aggregate=config.aggregate, forced=forced, sequences=sequences, impl=impl,
        )  # fmt: skip
    else:
        counts, indices = pooled_blocks(
            q, k, config.rule, feature="bound" if config.estimator == "bound" else "mean", causal=causal, scale=scale,
            page_size=config.pooled_keys, block_size=config.block_size, aggregate=config.aggregate, forced=forced,
            row_softmax=config.row_softmax or config.estimator == "exact", group_shared=config.group_shared,
            sequences=sequences, impl=impl,
        )  # fmt: skip
    return build_mask(counts, indices, sequences, config.block_size, causal)
