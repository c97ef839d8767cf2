"""Attention of Hugging Face Transformers models by this library's selectors and operators.

``register()`` adds names to both of Transformers' registries; after that a model is switched by one string:
``attn_implementation="sparseattn_xattention"``. Long calls (prefill) select blocks and attend those; short ones
(decoding) are dense, by the same operator. Nothing here knows a model.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from sparseattn import fidelity, selectors
from sparseattn.errors import argument_error
from sparseattn.integrations import break_even, landmarks, layout, records
from sparseattn.integrations.options import DENSE, AttentionOptions, implementation_name, method_names, resolve
from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention

PREFIX = "sparseattn"

logger = logging.get_logger(__name__)


def register() -> list[str]:
    """Register the attention and mask functions with Transformers, and return their names.

    ``sparseattn`` takes its method from the options (``config.sparseattn``, ``sparseattn.options``; default
    ``landmark``); ``sparseattn_<method>`` and ``sparseattn_dense`` say it (``options.implementation_name``). May be
    called again, for instance after adding a selector.
    """
    methods: list[str | None] = [None, *method_names()]
    names = []
    for method in methods:
        name = implementation_name(method)
        AttentionInterface.register(name, functools.partial(attention_forward, sparseattn_method=method))
        AttentionMaskInterface.register(name, layout.row_mask)
        names.append(name)
    return names


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    sparseattn: dict[str, Any] | None = None,
    sparseattn_method: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer, as Transformers calls it.

    Args:
        module: The attention module; read for ``layer_idx``, ``is_causal`` and ``config.sparseattn``.
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Sk, D]``, cache included, not repeated for GQA.
        value: ``[B, Hkv, Sk, Dv]``.
        attention_mask: Result of the registered mask function (``layout``), a 2-D padding mask, or None.
        dropout: Must be 0.
        scaling: Factor on q . k; default 1 / sqrt(D).
        sliding_window: Tokens a query sees, itself included (Transformers' convention), to both sides when not causal.
        softcap: ``cap * tanh(score / cap)``.
        is_causal: Default ``module.is_causal``, else True.
        s_aux: [Hq], attention sinks.
        sparseattn: Options of this call, flat; ``model(..., sparseattn={"threshold": 0.95})``.
        sparseattn_method: The method that the registered name stands for.
        **kwargs: ``position_ids`` and ``cu_seq_lens_*`` / ``max_length_*`` describe packing; arguments that would
            change the result and cannot be honoured raise; others are ignored.

    Returns:
        ``[B, Sq, Hq, Dv]`` and None for the attention weights.

    Raises:
        ValueError: What cannot be honoured, with what to change.
        TypeError: Options or masks of the wrong type, q, k, v of different dtypes.
    """
    _refuse_unsupported(dropout, kwargs)
    own_key = key
    query, key, value = _same_dtype(module, query, key, value)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q_len, k_len = query.shape[2], key.shape[2]
    window = None
    if sliding_window is not None and sliding_window < k_len:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    where = layout.resolve(
        attention_mask, query, key, causal, window is not None, **{name: kwargs.get(name) for name in _PACKING}
    )
    layer = getattr(module, "layer_idx", None)
    chosen, recorder = _in_force(module, sparseattn_method, layer, sparseattn)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if where.packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    reason = _dense_reason(chosen, q, *_lengths(where, q_len, k_len), causal, window)

    found = _landmarks(module, own_key, k, q_len, causal, where, chosen, reason is None)
    known = {} if found is None or found.features is None else {"features": found.features}

    def select() -> BlockMask:
        with torch.no_grad():
            return selectors.get(chosen.method).select(
                q, k, chosen.config, causal=causal, scale=scaling, layer=layer, impl=chosen.selector_impl, **known,
                **where.arguments,
            )  # fmt: skip

    def attend(mask: BlockMask | None, mean_correction: bool = chosen.mean_correction, **more: Any) -> Any:
        return block_sparse_attention(
            q, k, v, mask, causal=causal, scale=scaling, window=window, softcap=softcap, sinks=s_aux,
            mean_correction=mean_correction, impl=chosen.impl, **where.arguments, **more,
        )  # fmt: skip

    def bounds(mask: BlockMask) -> fidelity.RecallBounds:
        return fidelity.recall_bounds(
            q, k, mask, causal=causal, scale=scaling, window=window, softcap=softcap, **where.arguments
        )

    if recorder is None:
        out = attend(select() if reason is None else None)
    else:
        how = None if found is None else found.how
        call = records.CallRecord(layer, chosen.method if reason is None else DENSE, q_len, k_len, reason, how)
        corrected = chosen.mean_correction
        out = call.run(recorder, q.device, select if reason is None else None, attend, bounds, corrected)
    return out.view(query.shape[0], q_len, *out.shape[-2:]), None


def _landmarks(
    module: nn.Module, key: Tensor, k: Tensor, q_len: int, causal: bool, where: layout.Layout, chosen: AttentionOptions,
    selects: bool,
) -> landmarks.Found | None:  # fmt: skip
    """The landmarks kept with the cache, for a call that selects by them; other calls are noted."""
    if torch.compiler.is_compiling():
        return None
    if not selects or chosen.method != "landmark":
        landmarks.note(module, key, q_len, where)
        return None
    with torch.no_grad():
        return landmarks.find(module, key, k, q_len, causal, where, chosen.config, chosen.selector_impl)


_PACKING = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

# Arguments that other implementations honour and that change the result. Ignoring one would be a silent error.
_UNSUPPORTED = {
    "position_bias": "Relative position biases are added to every score; use attn_implementation='sdpa'.",
    "block_indices": "The model selects blocks itself (config.layer_types); use its own implementation.",
    "indices": "The model selects tokens itself (config.layer_types); use attn_implementation='sdpa'.",
    "cache": "Continuous batching needs paged attention; call generate, or set attn_implementation='sdpa'.",
    "block_table": "Paged caches are not supported; use generate with a dynamic or static cache.",
    "sinks": "Pass attention sinks as s_aux.",
}


def _refuse_unsupported(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise argument_error(
            "dropout", "0", dropout, "Set config.attention_dropout = 0, or call model.eval() for inference."
        )
    for name, hint in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise argument_error(name, "None", "a value", hint)
    for name in kwargs:
        if name.startswith(PREFIX):
            raise argument_error(name, "one argument sparseattn={...}", "an unknown argument")
    if kwargs.get("output_attentions"):
        logger.warning_once(
            "sparseattn computes no attention weights: output_attentions=True returns None for them. "
            "Set attn_implementation='eager' to have them."
        )


def _same_dtype(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring q, k, v to one dtype the way Transformers' flash attention does.

    Under autocast, and with layer norms or adapters kept in float32 (PEFT), q and k may come in float32 although the
    model runs in half precision. The target is autocast's dtype, else that of the module's weights.
    """
    dtypes = (query.dtype, key.dtype, value.dtype)
    device = query.device.type
    if torch.float32 in dtypes and torch.is_autocast_enabled(device):
        target = torch.get_autocast_dtype(device)
    elif dtypes == (torch.float32,) * 3 or len(set(dtypes)) > 1:
        weights = (p.dtype for p in module.parameters() if p.dim() > 1)
        weight = next(weights, value.dtype)
        target = weight if weight in (torch.bfloat16, torch.float16, torch.float32) else value.dtype
    else:
        return query, key, value
    if dtypes != (target,) * 3 and not torch.compiler.is_compiling():
        logger.warning_once(f"sparseattn casts query, key and value from {dtypes} to {target}.")
    return query.to(target), key.to(target), value.to(target)


def _config_options(module: nn.Module) -> dict[str, Any] | None:
    return getattr(getattr(module, "config", None), PREFIX, None)


def _lengths(where: layout.Layout, q_len: int, k_len: int) -> tuple[int, int]:
    """Queries and keys of a call's longest sequence, as far as the host knows them."""
    known = where.arguments
    if where.packed:
        return known["max_seqlen_q"], known["max_seqlen_k"]
    if where.seen is not None:
        return q_len, where.seen
    # A static cache may be much longer than what it holds.
    return q_len, min(q_len, k_len) if known else k_len


def _dense_reason(
    chosen: AttentionOptions, q: Tensor, q_len: int, k_len: int, causal: bool, window: tuple[int, int] | None
) -> str | None:
    """Why this call selects no blocks, or None if it does."""
    if chosen.method == DENSE:
        return DENSE
    least = chosen.min_seq_len
    if isinstance(least, int):
        if q_len < least:
            return f"fewer than min_seq_len={least} queries"
    elif not break_even.pays(break_even.tokens(chosen.method, q.device), q_len, k_len, causal):
        reason = break_even.reason(chosen.method, q.device)
        if q_len > 1 and not torch.compiler.is_compiling():
            logger.warning_once(
                f"sparseattn runs short prompts dense: {reason}. min_seq_len=N selects from N tokens on."
            )
        return reason
    if window is not None and chosen.sliding_layers == DENSE:
        return "sliding window"
    return None


def _in_force(
    module: nn.Module, method: str | None, layer: int | None, call: dict[str, Any] | None
) -> tuple[AttentionOptions, records.Recorder | None]:
    """The options of this call, and who records it."""
    config = _config_options(module)
    if torch.compiler.is_compiling():
        return getattr(_Traced, _traced_options(method, layer, config, call)), None
    if torch._C._current_graph_task_id() != -1:
        # Gradient checkpointing computes the layer again, on autograd's own thread or after the ``with options(...)``
        # block: it must do as the forward did, or the gradient is that of another function.
        remembered = _forward_options.get(module, {})
        found = remembered.get(True, remembered.get(False))
        return found or resolve(method, config, call).for_layer(layer), None
    found = resolve(method, config, call).for_layer(layer)
    if module.training or torch.is_grad_enabled():
        # Reentrant checkpointing runs the forward without gradients; a forward with them has the say.
        _forward_options.setdefault(module, {})[torch.is_grad_enabled()] = found
    return found, records.current()


_forward_options: WeakKeyDictionary[nn.Module, dict[bool, AttentionOptions]] = WeakKeyDictionary()


class _Traced:
    """Options that compiled graphs were traced with, as attributes: where the compiler can find and call them."""


@torch._dynamo.assume_constant_result
def _traced_options(
    method: str | None, layer: int | None, config: dict[str, Any] | None, call: dict[str, Any] | None
) -> str:
    """Options while tracing: looked up once, then part of the compiled graph. Their name in ``_Traced``."""
    found = resolve(method, config, call).for_layer(layer)
    name = f"options_{id(found)}"  # which stay, and are as many as differ
    setattr(_Traced, name, found)
    return name
