"""Bound: all queries against the least and greatest keys of a page (Quest, Tang et al. 2024, arXiv:2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from sparseattn.masks import BlockMask
from sparseattn.ops.sequences import Layout
from sparseattn.selectors.base import check_call
from sparseattn.selectors.pooled import PooledConfig, Threshold, select_pooled


@dataclass(frozen=True)
class BoundConfig(PooledConfig):
    """Options of :func:`bound`: those of :class:`~sparseattn.selectors.pooled.PooledConfig`, and these.

    Attributes:
        threshold: Keep blocks of at least this share of the best block's bound (rule "relative").
        page_size: Keys of a page, at most ``block_size``. Scoring costs 1 / ``page_size`` of dense attention.
    """

    threshold: Threshold = 0.1
    page_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_pages("bound", self.page_size)


def bound(
    q: Tensor,
    k: Tensor,
    config: BoundConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep the blocks that might hold a wanted key, as the extremes of their pages bound it.

    Of each page the elementwise least and greatest key are kept; ``relu(q) . kmax + min(q, 0) . kmin`` is at least
    ``q . k`` for each of its keys. Quest loads pages by it in decoding; here it is a matrix product for all queries of
    a prompt. A block's score is the mean over its pages and the query block of the bounds' exponentials, on one scale;
    ``row_softmax``, ``aggregate`` and ``rule`` choose otherwise. Scores:
    :func:`sparseattn.ops.scores.pooled_scores`.

    With a threshold or a budget by row, a chunk of queries that begins a multiple of ``block_size`` into the sequence
    selects what it would inside the whole prompt. With rule "global" and ``density`` it does not.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``BoundConfig()``.
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
    config = BoundConfig() if config is None else config
    check_call(config, BoundConfig, causal)
    return select_pooled(
        q,
        k,
        config,
        feature="bound",
        page_size=config.page_size,
        causal=causal,
        scale=scale,
        layer=layer,
        impl=impl,
        **layout,
    )
