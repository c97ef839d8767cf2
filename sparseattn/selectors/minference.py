"""MInference: a pattern for each head, chosen offline, filled in online (Jiang et al. 2024, arXiv:2407.02490)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Self, Unpack

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.scores.minference import BLOCK_SIZES, HeadBudget, minference_blocks
from sparseattn.ops.scores.problem import check_max_blocks
from sparseattn.ops.scores.vertical_slash import NUM_QUERIES
from sparseattn.ops.sequences import Layout, resolve_sequences
from sparseattn.selectors import minference_patterns
from sparseattn.selectors.base import SelectorConfig, build_mask, check_call


@dataclass(frozen=True)
class MInferenceConfig(SelectorConfig):
    """Options of :func:`minference`.

    Attributes:
        patterns: One pattern for all heads, one per query head, or one per layer and query head (the call then needs
            ``layer``); see ``minference_patterns``. None: ``("vertical_slash", vertical_size, slash_size)``.
        vertical_size: Columns that a head keeps where ``patterns`` is None.
        slash_size: Distances, likewise.
        adaptive_budget: Vertical-slash heads keep, instead of their sizes, a fifth of this share of the keys as columns
            and four fifths as distances. In (0, 1], or None.
        num_queries: Last queries that verticals and slashes are found with, 16, 32, 64 or 128.
        num_sink_tokens: Columns at the start that vertical-slash heads keep whatever their mass.
        num_local_tokens: Nearest distances that they keep, likewise.
        block_size: Tokens of a block, 16, 32, 64, 128 or 256. MInference's is 64; a slash is a run of ``block_size``
            keys in every row, which crosses two blocks.
        columns: Keep verticals as single columns (``BlockMask.column_indices``); otherwise every block that holds one
            is kept whole.
        group_shared: One list for the query heads of a KV head, the union of theirs.
        max_blocks: No list of a vertical-slash head is longer, but for its first and nearest keys': the blocks with the
            most mass stay. None: 2048. Other patterns keep what they say.
    """

    patterns: Any = None
    vertical_size: int = 1000
    slash_size: int = 6096
    adaptive_budget: float | None = None
    num_queries: int = 64
    num_sink_tokens: int = 30
    num_local_tokens: int = 100
    block_size: int = 128
    columns: bool = True
    group_shared: bool = False
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        check_max_blocks(self.max_blocks)
        for name in ("vertical_size", "slash_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise argument_error(name, "an int >= 1", repr(value))
        if self.patterns is not None:
            object.__setattr__(self, "patterns", minference_patterns.freeze(self.patterns))
        share = self.adaptive_budget
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
            raise argument_error("adaptive_budget", "a share in (0, 1], or None", repr(share))
        self._check_choice("num_queries", NUM_QUERIES)
        self._check_choice("block_size", BLOCK_SIZES)
        self._check_count("num_sink_tokens", "num_local_tokens")
        self._check_bool("columns", "group_shared")

    @classmethod
    def from_json(cls, path: str | Path, **options: Any) -> Self:
        """A config with the patterns of a file, ours or MInference's.

        Args:
            path: A JSON file as ``minference_patterns`` describes it.
            **options: The other options.

        Raises:
            FileNotFoundError: No such file.
            ValueError: No patterns in it, or a bad option.
        """
        return cls(patterns=minference_patterns.load(path), **options)

    def budgets(self, heads: int, layer: int | None = None) -> tuple[HeadBudget, ...]:
        """What the query heads of a layer keep.

        Raises:
            ValueError: No ``layer``, or one out of range, where patterns are per layer; another number of heads.
        """
        patterns = self.patterns
        if patterns is None:
            patterns = ("vertical_slash", self.vertical_size, self.slash_size)
        return tuple(map(minference_patterns.budget, minference_patterns.of_layer(patterns, heads, layer)))


def minference(
    q: Tensor,
    k: Tensor,
    config: MInferenceConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep what the pattern of each head says.

    *vertical_slash* heads find, with the attention of the last ``num_queries`` queries, the columns and the distances
    that hold the most mass, and keep them in every row: a distance as the blocks it crosses, a column by itself where
    no listed block holds it. *a_shape* keeps the first and the nearest keys, *tri_shape* also everything for the last
    queries, *block_sparse* the best blocks of each row by the product of mean query and mean key. Heads of all kinds
    are handled in one call. Sizes round up to whole blocks.

    Verticals and slashes are those of the last queries of the call (and tri_shape's dense rows the last of the call),
    so a chunk of queries does not select what it would inside a longer prompt; what only early queries look for is
    lost. a_shape and block_sparse heads do select the same, chunk by chunk.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``MInferenceConfig()``.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq``. Without it distances still look back only.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        layer: Index of the calling layer, for patterns per layer.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".
        **layout: Of packed and padded batches; see :class:`sparseattn.ops.sequences.Layout`.

    Returns:
        A BlockMask with Hq heads (Hkv with ``group_shared``), ``causal`` as given and, with ``columns``, the columns of
        vertical-slash heads; ragged batches carry their lengths. Carries no gradient.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: A config of another method; dtypes that do not fit.
    """
    config = MInferenceConfig() if config is None else config
    check_call(config, MInferenceConfig, causal)
    sequences = resolve_sequences(q, k, **layout)
    counts, indices, columns = minference_blocks(
        q,
        k,
        config.budgets(q.shape[-2], layer),
        adaptive_budget=config.adaptive_budget,
        num_queries=config.num_queries,
        num_sink_tokens=config.num_sink_tokens,
        num_local_tokens=config.num_local_tokens,
        block_size=config.block_size,
        causal=causal,
        columns=config.columns,
        group_shared=config.group_shared,
        max_blocks=config.max_blocks,
        scale=scale,
        sequences=sequences,
        impl=impl,
    )
    return build_mask(counts, indices, sequences, config.block_size, causal, columns if columns.shape[-1] else None)
