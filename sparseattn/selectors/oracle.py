"""Oracle: blocks by their true attention mass or their largest true probability. For measurement."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from sparseattn.masks import BlockMask
from sparseattn.ops.sequences import Layout
from sparseattn.selectors.base import check_call
from sparseattn.selectors.pooled import PooledConfig, Threshold, select_pooled


@dataclass(frozen=True)
class OracleConfig(PooledConfig):
    """Options of :func:`oracle`: those of :class:`~sparseattn.selectors.pooled.PooledConfig`, with these defaults.

    Attributes:
        threshold: With the default rule: keep the blocks that some query gives at least this probability.
        rule: "global"; "topk" and "cumulative" are the budgets by row that published methods use.
        aggregate: "max", the largest probability any query of the block gives; "mean" is the block's share of the
            query block's attention mass.
        row_softmax: True; only then the scores are the truth.
    """

    threshold: Threshold = 0.3
    rule: str = "global"
    aggregate: str = "max"
    row_softmax: bool = True


def oracle(
    q: Tensor,
    k: Tensor,
    config: OracleConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep the blocks that are truly wanted, at the cost of dense attention's own scores: the bar for the others.

    Every query's softmax over its visible keys is computed exactly (twice; nothing larger than a chunk of it exists at
    a time), summed over the keys of each block, and aggregated over the query block. It is an oracle of what blocks
    hold, not of what a model needs: judge methods by answers as well.

    With a threshold or a budget by row, a chunk of queries that begins a multiple of ``block_size`` into the sequence
    selects what it would inside the whole prompt. With rule "global" and ``density`` it does not.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``OracleConfig()``.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq``, at any alignment of Sq and Sk.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        layer: Index of the calling layer, for thresholds per layer.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".
        **layout: Of packed and padded batches; see :class:`sparseattn.ops.sequences.Layout`.

    Returns:
        A BlockMask with Hq heads (Hkv with ``group_shared``) and ``causal`` as given; ragged batches carry their
        lengths. Blocks wholly above the diagonal and rows past the end of a sequence are never listed. Carries no
        gradient.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: A config of another method; dtypes that do not fit.
    """
    config = OracleConfig() if config is None else config
    check_call(config, OracleConfig, causal)
    return select_pooled(
        q,
        k,
        config,
        feature="mean",
        page_size=1,
        causal=causal,
        scale=scale,
        layer=layer,
        impl=impl,
        **layout,
    )
