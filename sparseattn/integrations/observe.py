"""See the queries and keys of a running model's attention layers, while it attends densely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sparseattn.integrations import layout
from sparseattn.integrations.transformers import PREFIX, attention_forward

_NAME = f"{PREFIX}_observed"


class LayerCall(NamedTuple):
    """One attention layer at work.

    Attributes:
        module: The attention module.
        layer: Its ``layer_idx``, or None.
        q: ``[B, Sq, Hq, D]``, rotated as it is scored.
        k: ``[B, Sk, Hkv, D]``.
        causal: Whether it is causal.
        scale: Factor on q . k; None: ``1 / sqrt(D)``.
        softcap: Of the scores, or None.
        windowed: A sliding window hides keys.
    """

    module: nn.Module
    layer: int | None
    q: Tensor
    k: Tensor
    causal: bool
    scale: float | None
    softcap: float | None
    windowed: bool


Observer = Callable[[LayerCall], None]
_observer: ContextVar[Observer | None] = ContextVar("sparseattn_observer", default=None)


@contextmanager
def observed(model: Any, observer: Observer) -> Iterator[None]:
    """Inside the block, call ``observer`` in every attention layer of the model, which attends densely.

    The model's attention implementation is put back at the end. Padded and packed prompts are attended as they should
    be, but the observer is not told of them: give it prompts without either.

    Args:
        model: Any model that takes its attention from Transformers' registry.
        observer: Called before the layer attends.
    """
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, layout.row_mask)
    before = model.config._attn_implementation
    token = _observer.set(observer)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _observer.reset(token)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """A layer as Transformers calls it: to the observer, then dense."""
    observer = _observer.get()
    if observer is not None:
        window, causal = kwargs.get("sliding_window"), kwargs.get("is_causal")
        call = LayerCall(
            module,
            getattr(module, "layer_idx", None),
            query.transpose(1, 2),
            key.transpose(1, 2),
            bool(getattr(module, "is_causal", True) if causal is None else causal),
            kwargs.get("scaling"),
            kwargs.get("softcap"),
            window is not None and window < key.shape[2],
        )
        observer(call)
    return attention_forward(module, query, key, value, attention_mask, sparseattn_method="dense", **kwargs)
