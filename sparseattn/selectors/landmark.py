"""Landmark: content clusters of key blocks, the largest probability of any row, one threshold. This library's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.scores import LandmarkFeatures, landmark_blocks
from sparseattn.ops.scores.landmark import BLOCK_SIZES, CLUSTERS, ROWS, check_density, check_tau
from sparseattn.ops.scores.problem import check_max_blocks
from sparseattn.ops.sequences import Layout, resolve_sequences
from sparseattn.selectors.base import SelectorConfig, build_mask, check_call
from sparseattn.selectors.tables import freeze, of_layer


@dataclass(frozen=True)
class LandmarkConfig(SelectorConfig):
    """Options of :func:`landmark`.

    Attributes:
        tau: Keep the blocks that some scored row gives at least this probability, in [0, 1]: one number, one per query
            head, or one per layer and query head (``[layers][heads]``; the call then needs ``layer``).
        density: Instead of ``tau``: the share in (0, 1] of the visible blocks of a sequence to keep, forced ones and
            all heads together. Exact, but it lets later queries move the threshold of earlier ones.
        block_size: Tokens of a block, 64 or 128.
        clusters: Landmarks of a block, 2, 4, 8 or 16. None: ``block_size // 16``.
        rows: Scored queries of a block, a power of two from 16 to ``block_size``, or "all". None: half of them. Scoring
            all costs ``clusters / (2 * block_size)`` of dense attention (1/32 by default).
        keep_sink: Every query block keeps the first key block. None: in causal calls.
        floor: Query blocks that see at most this many key blocks keep them all.
        fp8: Score in float8_e4m3fn. On a GPU that needs compute capability 8.9.
        group_shared: One list for the query heads of a KV head, the union of theirs.
        max_blocks: No list is longer, but for its forced blocks: the most probable stay. None: 2048, or ``density`` of
            all blocks if that is more.
    """

    tau: float | tuple[float, ...] | tuple[tuple[float, ...], ...] = 0.3
    density: float | None = None
    block_size: int = 128
    clusters: int | None = None
    rows: int | str | None = None
    keep_sink: bool | None = None
    floor: int = 4
    fp8: bool = False
    group_shared: bool = False
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        check_max_blocks(self.max_blocks)
        object.__setattr__(self, "tau", freeze("tau", self.tau, check_tau))
        check_density(self.density)
        self._check_choice("block_size", BLOCK_SIZES)
        if self.clusters is not None:
            self._check_choice("clusters", CLUSTERS)
        if self.rows is not None and self.rows != "all":
            choices = tuple(r for r in ROWS if r <= self.block_size)
            if isinstance(self.rows, bool) or self.rows not in choices:
                raise argument_error("rows", f"None, 'all' or one of {choices}", repr(self.rows))
        if self.keep_sink is not None:
            self._check_bool("keep_sink")
        self._check_bool("fp8", "group_shared")
        self._check_count("floor")

    def taus(self, heads: int, layer: int | None = None) -> float | tuple[float, ...]:
        """The threshold, or the thresholds of the query heads of a layer.

        Raises:
            ValueError: No ``layer``, or one out of range, where thresholds are per layer; another number of heads.
        """
        return of_layer("tau", self.tau, heads, layer)


def landmark(
    q: Tensor,
    k: Tensor,
    config: LandmarkConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    features: LandmarkFeatures | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep the key blocks that hold something some query of the block wants, as the block's landmarks tell.

    The keys of each block are clustered by content, so that a lone key that matters is a landmark of its own. A block's
    score is the largest probability that any scored query row gives it, and one threshold serves all rows and heads:
    rows that need many blocks get many. :func:`sparseattn.ops.scores.landmark_scores` defines the numbers. Causal calls
    always keep the blocks that the diagonal of a row touches.

    With a threshold, the lists of a query block depend on nothing after it. A chunk of queries that begins a multiple
    of ``block_size`` into the sequence and ends likewise, or at its end, selects what it would inside the whole prompt,
    to the bit. With ``density`` it does not: the threshold is that of the queries of the call.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``LandmarkConfig()``.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq``, at any alignment of Sq and Sk.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        layer: Index of the calling layer, for thresholds per layer.
        features: The landmarks of ``k`` where they are known already (``LandmarkCache``); causal calls need those of
            complete blocks alone. Default: computed from ``k``.
        impl: "auto" (on CUDA Gluon where it can, else Triton; reference elsewhere), "gluon" (Hopper), "triton" or
            "reference".
        **layout: Of packed and padded batches; see :class:`sparseattn.ops.sequences.Layout`.

    Returns:
        A BlockMask with Hq heads (Hkv with ``group_shared``) and ``causal`` as given; ragged batches carry their
        lengths. Blocks wholly above the diagonal and rows past the end of a sequence are never listed. Carries no
        gradient.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: A config of another method; dtypes that do not fit.
    """
    config = LandmarkConfig() if config is None else config
    check_call(config, LandmarkConfig, causal)
    sequences = resolve_sequences(q, k, **layout)
    rows: Any = config.block_size if config.rows == "all" else config.rows
    counts, indices = landmark_blocks(
        q,
        k,
        config.taus(q.shape[-2], layer),
        density=config.density,
        block_size=config.block_size,
        clusters=config.clusters,
        rows=rows,
        causal=causal,
        keep_sink=config.keep_sink,
        floor=config.floor,
        fp8=config.fp8,
        group_shared=config.group_shared,
        max_blocks=config.max_blocks,
        scale=scale,
        sequences=sequences,
        features=features,
        impl=impl,
    )
    return build_mask(counts, indices, sequences, config.block_size, causal)
