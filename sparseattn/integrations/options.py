"""What a model's attention layers should do, and where they are told: call, context, config or defaults.

Options are one flat, JSON-able dict: ``{"method": "landmark", "tau": 0.3, "min_seq_len": 2048}``. Keys that are
not fields of ``AttentionOptions`` belong to the method (the fields of its config dataclass).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sparseattn import selectors
from sparseattn.errors import argument_error
from sparseattn.ops.block_sparse import IMPLEMENTATIONS

DENSE = "dense"
AUTO = "auto"
DEFAULT_METHOD = "landmark"
IMPLS = (AUTO, *IMPLEMENTATIONS)

Flat = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionOptions:
    """Validated options of one attention call, or of a whole model.

    Attributes:
        method: A name in ``selectors.SELECTORS``, or ``"dense"``: plain attention by this library's operator.
        method_options: Fields of the method's config dataclass, e.g. ``{"tau": 0.3, "block_size": 128}``; in the
            flat form they stand beside the other keys.
        min_seq_len: Select blocks for calls of at least this many queries; shorter ones, decoding above all, are dense.
            ``"auto"``: the shortest prompt for which the method was measured to be no slower than dense attention on
            this kind of device, 8192 tokens on GPUs and 1024 elsewhere that nobody measured. Chunks of prompts are then
            judged by queries and keys: see ``integrations.break_even``.
        dense_layers: Layer indices that always run dense.
        layers: Options of single layers, flat: ``{3: {"method": "streaming"}, 4: {"tau": 0.1}}``.
        sliding_layers: What layers do whose sliding window hides keys: ``"dense"`` runs them by the windowed dense
            operator (already cheap: its cost is the window, not the prompt), ``"sparse"`` selects blocks as well.
        mean_correction: Attend the blocks that the method skips by the means of their keys and values, as
            ``block_sparse_attention`` defines it.
        impl: ``"auto"``, or the implementation that selector and operator must use (``"gluon"`` is the operator's
            alone: selectors then choose as under ``"auto"``).
    """

    method: str = DEFAULT_METHOD
    method_options: Flat = field(default_factory=dict)
    min_seq_len: int | str = AUTO
    dense_layers: tuple[int, ...] = ()
    layers: Mapping[int, Flat] = field(default_factory=dict)
    sliding_layers: str = DENSE
    mean_correction: bool = False
    impl: str = AUTO

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in method_names():
            raise argument_error("method", f"one of {', '.join(method_names())}", repr(self.method))
        length = self.min_seq_len
        if length != AUTO and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
            raise argument_error("min_seq_len", "'auto' or an int of at least 1", repr(length))
        if self.sliding_layers not in (DENSE, "sparse"):
            raise argument_error("sliding_layers", "'dense' or 'sparse'", repr(self.sliding_layers))
        if not isinstance(self.mean_correction, bool):
            raise argument_error("mean_correction", "True or False", repr(self.mean_correction))
        if self.impl not in IMPLS:
            raise argument_error("impl", f"one of {', '.join(IMPLS)}", repr(self.impl))
        object.__setattr__(self, "dense_layers", _layer_indices(self.dense_layers))
        object.__setattr__(self, "layers", _layer_table(self.layers))
        # An unknown or bad option of the method or of a layer is an error here, not at the first long prompt.
        _ = self.config
        for layer in self.layers:
            self.for_layer(layer)

    @classmethod
    def from_dict(cls, flat: Flat) -> AttentionOptions:
        """Build from the flat form.

        Raises:
            ValueError: An unknown key or method (the message lists the valid ones) or a bad value.
        """
        general = {key: value for key, value in flat.items() if key in _GENERAL}
        own = {key: value for key, value in flat.items() if key not in _GENERAL}
        return cls(**general, method_options=own)

    def to_dict(self) -> dict[str, Any]:
        """The flat form with every option stated; JSON-able, and ``from_dict`` brings it back."""
        general = {key: getattr(self, key) for key in _GENERAL}
        general["dense_layers"] = list(self.dense_layers)
        general["layers"] = {str(layer): dict(own) for layer, own in self.layers.items()}
        return {**general, **self.method_options}

    @cached_property
    def config(self) -> Any:
        """The method's config object; None for ``"dense"``."""
        if self.method == DENSE:
            if self.method_options:
                raise _unknown_options(self.method_options, (), DENSE)
            return None
        known = _config_fields(self.method)
        if not set(self.method_options) <= set(known):
            raise _unknown_options(self.method_options, known, self.method)
        return selectors.configure(self.method, self.method_options)

    @property
    def selector_impl(self) -> str:
        """The implementation for the selector."""
        return "auto" if self.impl == "gluon" else self.impl  # most selectors have no kernels for Hopper alone

    def for_layer(self, layer: int | None) -> AttentionOptions:
        """The options of one layer: ``layers`` applied, then ``dense_layers``."""
        found = self._by_layer.get(layer)
        if found is None:
            found = self
            if layer is not None and layer in self.layers:
                found = AttentionOptions.from_dict(merge(self._own(), self.layers[layer]))
            if layer is not None and layer in self.dense_layers:
                found = dataclasses.replace(found, method=DENSE, method_options={}, layers={}, dense_layers=())
            self._by_layer[layer] = found
        return found

    def _own(self) -> dict[str, Any]:
        """The flat form without what speaks of layers."""
        return {key: value for key, value in self.to_dict().items() if key not in ("layers", "dense_layers")}

    @cached_property
    def _by_layer(self) -> dict[int | None, AttentionOptions]:
        return {}


_GENERAL = tuple(f.name for f in dataclasses.fields(AttentionOptions) if f.name != "method_options")


def method_names() -> list[str]:
    """Every value ``method`` may take."""
    return [*selectors.SELECTORS, DENSE]


def implementation_name(method: str | None) -> str:
    """The ``attn_implementation`` of a method, ``sparseattn_<method>``; of None ``sparseattn``.

    Transformers takes every name with ``flash`` in it for FlashAttention, so ``flashprefill`` is
    ``sparseattn_fprefill``.
    """
    return "sparseattn" if method is None else f"sparseattn_{method.replace('flash', 'f')}"


def merge(*levels: Flat) -> dict[str, Any]:
    """Overlay flat options, later ones winning key by key.

    A level that names another method than the levels before it drops their method options: a threshold meant for one
    method says nothing about the next.
    """
    merged: dict[str, Any] = {}
    for level in levels:
        if "method" in level and level["method"] != merged.get("method", DEFAULT_METHOD):
            merged = {key: value for key, value in merged.items() if key in _GENERAL}
        merged.update(level)
    return merged


@contextmanager
def options(**flat: Any) -> Iterator[None]:
    """Options of every attention call made inside the ``with`` block, in this thread or task.

    Layers that gradient checkpointing computes again do as their forward did, wherever ``backward`` is called. Threads
    started inside the block (``nn.DataParallel`` starts some) see the model's config only.

    They override the model's config and the method in the implementation's name, and are overridden by a
    ``sparseattn={...}`` argument of the call. Blocks nest: inner ones win key by key.

    Example:
        >>> with options(method="xattention", threshold=0.95, min_seq_len=2048):
        ...     logits = model(input_ids).logits

    Args:
        **flat: Keys of ``AttentionOptions`` and fields of the method's config.

    Raises:
        ValueError: An unknown key, method or value; raised on entering the block.
    """
    _check_level("options(...)", flat)
    token = _context.set((*_context.get(), flat))
    try:
        yield
    finally:
        _context.reset(token)


def resolve(method: str | None = None, config: Flat | None = None, call: Flat | None = None) -> AttentionOptions:
    """The options in force: call > context > method of the implementation's name > model config > defaults.

    Args:
        method: The method that the implementation's name fixes (``sparseattn_<method>``), or None.
        config: ``config.sparseattn`` of the model.
        call: The ``sparseattn=`` argument of the model call.

    Raises:
        ValueError: As ``AttentionOptions``.
        TypeError: ``config`` or ``call`` is not a mapping.
    """
    for name, level in (("config.sparseattn", config), ("sparseattn", call)):
        if level is not None and not isinstance(level, Mapping):
            raise argument_error(name, "a dict of options", repr(level), kind=TypeError)
    levels = (config or {}, {} if method is None else {"method": method}, *_context.get(), call or {})
    key = _frozen(levels)
    found = _resolved.get(key)
    if found is None:
        if len(_resolved) >= 256:
            _resolved.clear()
        found = _resolved[key] = AttentionOptions.from_dict(merge(*levels))
    return found


_context: ContextVar[tuple[Flat, ...]] = ContextVar("sparseattn_options", default=())
# Resolving runs once per layer and step; validated results are kept by value.
_resolved: dict[Any, AttentionOptions] = {}


def _check_level(name: str, flat: Flat) -> None:
    """Reject what no later merge could make valid: the method may still come from another level."""
    if "method" in flat:
        AttentionOptions.from_dict(flat)
        return
    known = {name for method in selectors.SELECTORS for name in _config_fields(method)}
    unknown = set(flat) - known - set(_GENERAL)
    if unknown:
        raise argument_error(
            name, f"options among {', '.join([*_GENERAL, *sorted(known)])}", ", ".join(sorted(unknown))
        )
    AttentionOptions.from_dict({key: value for key, value in flat.items() if key in _GENERAL})


def _config_fields(method: str) -> list[str]:
    return [f.name for f in dataclasses.fields(selectors.get(method).config)]


def _unknown_options(got: Flat, known: Sequence[str], method: str) -> Exception:
    unknown = sorted(set(got) - set(known))
    return argument_error(
        "options", f"options of method {method!r} ({', '.join([*_GENERAL, *known])})", ", ".join(map(str, unknown))
    )


def _layer_indices(value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise argument_error("dense_layers", "a list of layer indices", repr(value))
    return tuple(_layer_index("dense_layers", entry) for entry in value)


def _layer_table(value: Any) -> dict[int, Flat]:
    if not isinstance(value, Mapping) or not all(isinstance(own, Mapping) for own in value.values()):
        raise argument_error("layers", "a dict {layer index: options}", repr(value))
    table: dict[int, Flat] = {_layer_index("layers", layer): dict(own) for layer, own in value.items()}
    for layer, own in table.items():
        nested = {"layers", "dense_layers"} & set(own)
        if nested:
            raise argument_error(f"layers[{layer}]", "options of one layer", ", ".join(sorted(nested)))
        _check_level(f"layers[{layer}]", own)
    return table


def _layer_index(name: str, value: Any) -> int:
    # JSON object keys are strings.
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise argument_error(name, "layer indices of at least 0", repr(value))
    return value


def _frozen(value: Any) -> Any:
    """A hashable twin of JSON-like data. Types join in, so that True and 1 stay apart."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    try:
        hash(value)
    except TypeError:
        return (type(value), repr(value))
    return (type(value), value)
