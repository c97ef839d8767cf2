"""Streaming: the first keys and the nearest ones (StreamingLLM, Xiao et al. 2023, arXiv:2309.17453), by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.scores import diagonal_blocks, row_bounds
from sparseattn.ops.sequences import Layout, Sequences, resolve_sequences
from sparseattn.selectors.base import SelectorConfig, build_mask, check_call


@dataclass(frozen=True)
class StreamingConfig(SelectorConfig):
    """Options of :func:`streaming`.

    Attributes:
        num_sink_tokens: Keys kept at the start of the sequence.
        num_local_tokens: Keys kept before the diagonal (both ways round it in calls that are not causal), besides the
            diagonal itself.
        block_size: Tokens of a block, a multiple of 16 from 16 to 256. Every block that holds a kept key is kept whole.
    """

    num_sink_tokens: int = 128
    num_local_tokens: int = 1024
    block_size: int = 128

    def __post_init__(self) -> None:
        self._check_count("num_sink_tokens", "num_local_tokens")
        self._check_choice("block_size", tuple(range(16, 257, 16)))


def streaming(
    q: Tensor,
    k: Tensor,
    config: StreamingConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Keep the blocks of the first and of the nearest keys, whatever q and k hold.

    Query block m of a sequence keeps blocks that hold one of the keys ``[0, num_sink_tokens)`` or a key within
    ``num_local_tokens`` before the diagonal of one of its rows, up to the diagonal itself.

    Args:
        q: As in :func:`sparseattn.selectors.xattention`, like the layout arguments; read for shapes alone.
        k: Keys, likewise.
        config: Options; default ``StreamingConfig()``.
        causal: Bottom-right aligned causality. Otherwise the local keys lie on both sides of the diagonal.
        scale: Ignored: the method scores nothing.
        layer: Ignored.
        impl: Accepted for the common signature; the lists are a formula.
        **layout: Of packed and padded batches; see :class:`sparseattn.ops.sequences.Layout`.

    Returns:
        A BlockMask with one head (all share it), batch 1 unless the batch is ragged.

    Raises:
        ValueError: Layout arguments that do not fit.
        TypeError: A config of another method.
    """
    config = StreamingConfig() if config is None else config
    check_call(config, StreamingConfig, causal)
    if impl not in ("auto", "reference", "triton"):
        raise argument_error("impl", "'auto', 'triton' or 'reference'", repr(impl))
    sequences = resolve_sequences(q, k, **layout)
    counts, indices = _lists(sequences, config, causal, q.device)
    return build_mask(counts, indices, sequences, config.block_size, causal)


def _lists(s: Sequences, config: StreamingConfig, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """counts [B|1, 1, MB] and indices [B|1, 1, MB, K], K the most blocks a row can keep."""
    size, local = config.block_size, config.num_local_tokens
    start, stop = diagonal_blocks(s, size, local, 0 if causal else local, device)
    visible = row_bounds(s, size, causal, False, device).visible
    sink_blocks = -(-config.num_sink_tokens // size)
    sink_end = visible.clamp(max=sink_blocks)
    # The union of [0, sink_end) and [start, stop): where the run is empty it starts at sink_end, and where they touch
    # it ends with the later of the two.
    start = torch.where(stop > start, start, sink_end)
    stop = torch.where(start <= sink_end, torch.maximum(stop, sink_end), stop)
    sinks = torch.minimum(start, sink_end)
    counts = sinks + stop - start
    columns = -(-s.max_k // size)
    span = local * (1 if causal else 2) + size  # keys from the first near one to the last
    width = max(1, min(columns, sink_blocks + (span + size - 2) // size + 1))
    slot = torch.arange(width, dtype=torch.int32, device=device)
    indices = torch.where(slot < sinks[..., None], slot, slot - sinks[..., None] + start[..., None])
    return counts[:, None], indices.clamp(max=max(columns - 1, 0))[:, None]
