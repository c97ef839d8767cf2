"""FlexPrefill: query-aware or vertical-slash blocks, head by head (Lai et al. 2025, arXiv:2502.20766)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.scores.flexprefill import BLOCK_SIZES, flexprefill_blocks
from sparseattn.ops.scores.problem import check_max_blocks
from sparseattn.ops.sequences import Layout, resolve_sequences
from sparseattn.selectors.base import SelectorConfig, build_mask, check_call


@dataclass(frozen=True)
class FlexPrefillConfig(SelectorConfig):
    """Options of :func:`flexprefill`.

    Attributes:
        gamma: Share of the estimated attention mass to cover, in [0, 1].
        tau: A head is query-aware where sqrt of the Jensen-Shannon divergence (natural log, so at most 0.83) between
            pooled and true block mass of its last queries is below it; 0: no head is.
        min_budget: Tokens of verticals, and as many of slashes, that a head keeps at least. All that query-aware heads
            keep of either.
        max_budget: Tokens of verticals, and as many of slashes, that a head keeps at most. None: no limit.
        density: Instead of gamma and the budgets: the share in (0, 1] of every row's visible blocks to keep, the best
            ones by the head's own estimate.
        block_size: Tokens of a block, 32, 64 or 128; as many last queries are looked at.
        keep_sink: Every query block keeps the first key block.
        keep_recent: Every query block keeps the blocks its own diagonal touches.
        group_shared: One list for the query heads of a KV head, the union of theirs.
        max_blocks: No list of a query head is longer, but for the first block and the diagonal's: the best verticals
            and slashes stay before the best others. None: 2048, but all that a density asks for.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    density: float | None = None
    block_size: int = 128
    keep_sink: bool = True
    keep_recent: bool = True
    group_shared: bool = False
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        check_max_blocks(self.max_blocks)
        self._check_number("gamma", 0.0, 1.0)
        self._check_number("tau", 0.0, float("inf"))
        self._check_choice("block_size", BLOCK_SIZES)
        self._check_bool("keep_sink", "keep_recent", "group_shared")
        self._check_budget("min_budget", 1)
        if self.max_budget is not None:
            self._check_budget("max_budget", self.min_budget)
        if self.density is not None:
            self._check_number("density", 0.0, 1.0)
            if self.density == 0:
                raise argument_error("density", "a share in (0, 1], or None", self.density, "0 would keep nothing.")

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or value == float("inf"):
            expected = f"a number in [{low:g}, {high:g}]" if high < float("inf") else f"a finite number >= {low:g}"
            raise argument_error(name, expected, repr(value))

    def _check_budget(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise argument_error(name, f"an int >= {least}", repr(value), "Budgets are counted in tokens.")


def flexprefill(
    q: Tensor,
    k: Tensor,
    config: FlexPrefillConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep what covers ``gamma`` of the attention mass, by the pattern that fits each head.

    The last ``block_size`` queries of a head give the true mass of every key block (a *vertical*) and of every distance
    (a *slash*). Where mean queries against mean keys reproduce the mass of the verticals (``tau``), the head is trusted
    to be *query-aware*: over all its rows together the fewest (query block, key block) pairs are kept whose pooled
    probabilities sum to ``gamma`` per row, besides ``min_budget`` of verticals and slashes. Other heads keep, in every
    row, the best verticals and slashes: as many blocks of each as the tokens that cover ``gamma`` would fill. A slash
    keeps both blocks that it crosses in a row.

    All of it looks back from the last queries of the call, so a chunk of queries does not select what it would inside
    a longer prompt, and what early queries alone look for is found by query-aware heads only.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``FlexPrefillConfig()``.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq``. Without it slashes still look back only; what lies
            after the diagonal is kept by verticals and query-aware heads.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        layer: Ignored.
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
    config = FlexPrefillConfig() if config is None else config
    check_call(config, FlexPrefillConfig, causal)
    sequences = resolve_sequences(q, k, **layout)
    counts, indices, _ = flexprefill_blocks(
        q, k, **config.to_dict(), causal=causal, scale=scale, sequences=sequences, impl=impl
    )
    return build_mask(counts, indices, sequences, config.block_size, causal)
