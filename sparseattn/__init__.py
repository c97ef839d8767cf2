"""Sparse attention for long contexts: ``mask = xattention(q, k)``, then ``block_sparse_attention(q, k, v, mask)``.

Importing the package needs torch alone, touches no device and changes nothing outside it. What adapts it to other
libraries loads when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.ops.bsr import bsr_attention
from sparseattn.ops.merge import merge_state, merge_states
from sparseattn.ops.paged import PagedCache, paged_attention
from sparseattn.selectors import (
    SELECTORS,
    BoundConfig,
    FlashPrefillConfig,
    FlexPrefillConfig,
    HeadsConfig,
    LandmarkCache,
    LandmarkConfig,
    MInferenceConfig,
    OracleConfig,
    StreamingConfig,
    TopKConfig,
    XAttentionConfig,
    bound,
    flashprefill,
    flexprefill,
    heads,
    landmark,
    minference,
    oracle,
    streaming,
    topk,
    xattention,
)

if TYPE_CHECKING:
    from sparseattn.integrations.options import options
    from sparseattn.integrations.records import record

__version__ = "0.1.0"

__all__ = [
    "SELECTORS",
    "BlockMask",
    "BoundConfig",
    "FlashPrefillConfig",
    "FlexPrefillConfig",
    "HeadsConfig",
    "LandmarkCache",
    "LandmarkConfig",
    "MInferenceConfig",
    "OracleConfig",
    "PagedCache",
    "StreamingConfig",
    "TopKConfig",
    "VariableBlockMask",
    "XAttentionConfig",
    "__version__",
    "block_sparse_attention",
    "bound",
    "bsr_attention",
    "flashprefill",
    "flexprefill",
    "heads",
    "landmark",
    "merge_state",
    "merge_states",
    "minference",
    "options",
    "oracle",
    "paged_attention",
    "record",
    "register",
    "streaming",
    "topk",
    "xattention",
]

_LAZY = {"options": "sparseattn.integrations.options", "record": "sparseattn.integrations.records"}


def register() -> list[str]:
    """Register ``sparseattn`` and ``sparseattn_<method>`` with Transformers as attention implementations.

    Importing ``sparseattn.hf`` does the same.

    Returns:
        The names registered.

    Raises:
        ModuleNotFoundError: Transformers is not installed: ``pip install sparseattn[hf]``.
    """
    from sparseattn.integrations import transformers

    return transformers.register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
