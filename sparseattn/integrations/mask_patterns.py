"""Which of Transformers' attention patterns row ranges can express, read from the functions that make its masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error

USE_SDPA = "Use attn_implementation='sdpa' (or 'eager') for it: model.set_attn_implementation('sdpa')."

# Patterns row ranges express, by the name of the Transformers function that builds them. The window itself comes to the
# layer as sliding_window.
_EXPRESSIBLE = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
}
_REASONS = {
    "chunked_overlay": "chunked attention (config.attention_chunk_size)",
    "blockwise_overlay": "blocks of bidirectional tokens (images), from block_sequence_ids or token_type_ids",
}


def read_pattern(
    function: Callable[..., Any] | None, local_size: int | None, config: Any
) -> tuple[bool, Tensor | None]:
    """Whether the pattern is causal, and the sequence of each token if it is packed. Refuses everything else."""
    if function is None:
        return True, None
    if torch.compiler.is_compiling():
        # Closures cannot be opened while tracing: go by what can be seen. Packing is left to the attention function.
        name = function.__name__
        chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
        if name == "or_mask" or chunked:
            raise argument_error("attention mask", "causal or sliding attention", "another pattern", USE_SDPA)
        return name != "bidirectional_mask_function" and getattr(config, "is_causal", True), None
    causal, packed = True, None
    for name, leaf in _leaves(function):
        if name not in _EXPRESSIBLE:
            got = _REASONS.get(name, f"a mask function {name!r}")
            raise argument_error("attention mask", "causal, sliding, padded or packed attention", got, USE_SDPA)
        causal = causal and "bidirectional" not in name
        if name == "packed_sequence_mask_function":
            packed = _captured(leaf)["packed_sequence_mask"]
    return causal, packed


def _leaves(function: Callable[..., Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The patterns that Transformers' ``and_masks`` joined, each with the name of the function that built it."""
    name = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
    joined = ("and_masks", "or_masks", "remap_positions_for_packed_sequence", "add_offsets_to_mask_function")
    if name in joined:
        inner = _captured(function)
        for part in inner.get("mask_functions", (inner.get("mask_function"),)):
            yield from _leaves(part)
    if name not in joined or name == "or_masks":  # a union is a pattern of its own; its parts tell what for
        yield name, function


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def refuse_own_sparsity(config: Any) -> None:
    """Raise where a model selects tokens itself."""
    kinds = {"indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention", "minimax_m3_sparse"}
    kinds |= {"compressed_sparse_attention", "heavily_compressed_attention"}
    found = kinds.intersection(getattr(config, "layer_types", None) or ())
    if found:
        raise argument_error(
            "config.layer_types",
            "full and sliding attention",
            ", ".join(sorted(found)),
            f"The model selects tokens itself. {USE_SDPA}",
        )
