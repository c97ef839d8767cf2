"""FlashPrefill: all queries against mean-pooled keys, threshold relative to the best block (arXiv:2603.06199)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from sparseattn.masks import BlockMask
from sparseattn.ops.sequences import Layout
from sparseattn.selectors.base import check_call
from sparseattn.selectors.pooled import PooledConfig, Threshold, select_pooled


@dataclass(frozen=True)
class FlashPrefillConfig(PooledConfig):
    """Options of :func:`flashprefill`: those of :class:`~sparseattn.selectors.pooled.PooledConfig`, and these.

    Attributes:
        threshold: Keep blocks of at least this share of the best block's energy. The authors calibrated 0.18 for
            Llama-3.1-8B, 0.08 for Qwen2.5-7B and 0.12 for Qwen3-30B-A3B.
        num_sink_tokens: Two blocks of 128 by default.
        num_local_tokens: The diagonal's block and three of 128 before it by default.
        num_last_tokens: Query blocks that hold one of the last so many queries keep everything they see, up to
            ``max_blocks``. Causal calls only.
        page_size: Keys that are pooled into one, at most ``block_size``. None: whole blocks.
    """

    threshold: Threshold = 0.1
    num_sink_tokens: int = 256
    num_local_tokens: int = 384
    num_last_tokens: int = 256
    page_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("num_last_tokens")
        self._check_pages("mean", self.pooled_keys)

    @property
    def pooled_keys(self) -> int:
        """Keys of a page."""
        return self.block_size if self.page_size is None else self.page_size


def flashprefill(
    q: Tensor,
    k: Tensor,
    config: FlashPrefillConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep the blocks whose mean key is wanted nearly as much as that of the row's best block.

    A block's energy is the mean over the query block of ``exp(q . mean_key * scale)``, all queries on one scale, so the
    loudest has the say; blocks with ``threshold`` of the best one's energy stay. There is no sort, and one vector a
    block of keys: 1 / 256 of dense attention's arithmetic. Scores: :func:`sparseattn.ops.scores.pooled_scores`. The
    mean dilutes what few keys of a block say: short spans and lone keys are missed.

    A chunk of queries that begins a multiple of ``block_size`` into the sequence selects what it would inside the whole
    prompt, except for its own last ``num_last_tokens`` (set that to 0 for chunked prefill).

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``FlashPrefillConfig()``.
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
    config = FlashPrefillConfig() if config is None else config
    check_call(config, FlashPrefillConfig, causal)
    return select_pooled(
        q,
        k,
        config,
        feature="mean",
        page_size=config.pooled_keys,
        causal=causal,
        scale=scale,
        layer=layer,
        impl=impl,
        num_last_tokens=config.num_last_tokens,
        **layout,
    )
