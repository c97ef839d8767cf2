"""Selectors: from queries and keys to the blocks worth attending. One file a method, all with one signature.

    mask = select(q, k, config, causal=True, ...)   # -> BlockMask

``SELECTORS`` names them; ``get`` finds one and ``configure`` builds its config from loose options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseattn.errors import argument_error
from sparseattn.selectors.base import Selector, SelectorConfig
from sparseattn.selectors.bound import BoundConfig, bound
from sparseattn.selectors.flashprefill import FlashPrefillConfig, flashprefill
from sparseattn.selectors.flexprefill import FlexPrefillConfig, flexprefill
from sparseattn.selectors.head_tables import load_head_config, load_head_table, retrieval_heads, save_head_table
from sparseattn.selectors.heads import HeadsConfig, heads
from sparseattn.selectors.landmark import LandmarkConfig, landmark
from sparseattn.selectors.landmark_cache import LandmarkCache
from sparseattn.selectors.landmark_calibration import calibrate_landmark
from sparseattn.selectors.minference import MInferenceConfig, minference
from sparseattn.selectors.oracle import OracleConfig, oracle
from sparseattn.selectors.streaming import StreamingConfig, streaming
from sparseattn.selectors.topk import TopKConfig, topk
from sparseattn.selectors.xattention import XAttentionConfig, xattention

SELECTORS: dict[str, Selector] = {
    "landmark": Selector(LandmarkConfig, landmark),
    "xattention": Selector(XAttentionConfig, xattention),
    "streaming": Selector(StreamingConfig, streaming),
    "flashprefill": Selector(FlashPrefillConfig, flashprefill),
    "bound": Selector(BoundConfig, bound),
    "topk": Selector(TopKConfig, topk),
    "heads": Selector(HeadsConfig, heads),
    "oracle": Selector(OracleConfig, oracle),
    "flexprefill": Selector(FlexPrefillConfig, flexprefill),
    "minference": Selector(MInferenceConfig, minference),
}


def get(name: str) -> Selector:
    """The selector of that name.

    Raises:
        ValueError: No such method; the message lists the names.
    """
    if name not in SELECTORS:
        raise argument_error("method", f"one of {', '.join(SELECTORS)}", repr(name))
    return SELECTORS[name]


def configure(name: str, options: Mapping[str, Any] | None = None) -> SelectorConfig:
    """The config of a method from loose options (a JSON object, command-line arguments).

    Raises:
        ValueError: No such method, an option the method does not have (the message lists those it has), or a bad value.
    """
    return get(name).config.from_dict(options or {})


__all__ = [
    "SELECTORS",
    "BoundConfig",
    "FlashPrefillConfig",
    "FlexPrefillConfig",
    "HeadsConfig",
    "LandmarkCache",
    "LandmarkConfig",
    "MInferenceConfig",
    "OracleConfig",
    "Selector",
    "SelectorConfig",
    "StreamingConfig",
    "TopKConfig",
    "XAttentionConfig",
    "bound",
    "calibrate_landmark",
    "configure",
    "flashprefill",
    "flexprefill",
    "get",
    "heads",
    "landmark",
    "load_head_config",
    "load_head_table",
    "minference",
    "oracle",
    "retrieval_heads",
    "save_head_table",
    "streaming",
    "topk",
    "xattention",
]
