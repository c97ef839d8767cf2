"""What the documented functions share: their layout, their options, and the config file that sets them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from sparseattn import selectors
from sparseattn.errors import argument_error
from sparseattn.ops.block_sparse import block_sparse_attention

#: Methods by the names that SparseAttn gives them.
METRICS = {"xattn": "xattention", "flex": "flexprefill", "minfer": "minference", "full": "dense"}
#: Where the documentation puts the config file.
CONFIG_FILE = "config/xattn_config.json"
THRESHOLD, STRIDE, FLEX_BLOCK_SIZE, TAU = 0.95, 16, 64, 0.1


def attend(
    options: Mapping[str, Any], query_states: Tensor, key_states: Tensor, value_states: Tensor, causal: bool = True
) -> Tensor:
    """Attention over what a method selects, in the documented layout.

    Args:
        options: ``{"method": name, ...}`` with the options of its config; "dense" selects nothing.
        query_states: ``[B, Hq, Sq, D]`` in float16, bfloat16 or float32.
        key_states: ``[B, Hkv, Sk, D]``, Hq a multiple of Hkv.
        value_states: ``[B, Hkv, Sk, Dv]``.
        causal: Bottom-right aligned causality.

    Returns:
        ``[B, Hq, Sq, Dv]``.

    Raises:
        TypeError: No tensors, or dtypes that differ.
        ValueError: Shapes or options that do not fit; the message names the argument.
    """
    q, k, v = token_major(query_states, key_states, value_states)
    method, own = options["method"], {name: value for name, value in options.items() if name != "method"}
    mask = None
    if method != "dense":
        with torch.no_grad():
            selector = selectors.get(method)
            mask = selector.select(q, k, selector.config(**own), causal=causal)
    out = block_sparse_attention(q, k, v, mask, causal=causal)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def token_major(query_states: Tensor, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``[B, S, H, D]`` of documented tensors ``[B, H, S, D]``, once their shapes are seen to agree.

    Raises:
        TypeError: No tensors, or dtypes that differ.
        ValueError: Shapes that do not fit; the message names the argument.
    """
    tensors = {"query_states": query_states, "key_states": key_states, "value_states": value_states}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise argument_error(name, "a tensor", type(x).__name__, kind=TypeError)
        if x.dim() != 4:
            raise argument_error(name, "shape [batch, heads, tokens, head_dim]", f"shape {tuple(x.shape)}")
        if x.dtype != query_states.dtype:
            raise argument_error(name, f"dtype {query_states.dtype} like query_states", x.dtype, kind=TypeError)
    (batch, heads, _, dim), (kv_batch, kv_heads, keys, kv_dim) = query_states.shape, key_states.shape
    hint = "The layout is [batch, heads, tokens, head_dim]."
    if kv_heads == 0 or heads % kv_heads:
        raise argument_error("key_states", f"a number of heads that divides query_states' {heads}", kv_heads, hint)
    if (kv_batch, kv_dim) != (batch, dim):
        expected = f"[{batch}, {kv_heads}, tokens, {dim}]"
        raise argument_error("key_states", expected, list(key_states.shape), hint)
    if value_states.shape[:3] != key_states.shape[:3]:
        expected = f"[{batch}, {kv_heads}, {keys}, head_dim] like key_states"
        raise argument_error("value_states", expected, list(value_states.shape), hint)
    q, k, v = (x.transpose(1, 2) for x in tensors.values())
    return q, k, v


def flex_options(
    block_size: int, sparsity_ratio: float | None, gamma: float | None = None, tau: float = TAU
) -> dict[str, Any]:
    """Options of FlexPrefill: a share of blocks, or a share of attention mass.

    Raises:
        ValueError: Both, or a share outside (0, 1].
    """
    options = {"method": "flexprefill", "block_size": block_size, "tau": tau}
    if sparsity_ratio is not None:
        number = isinstance(sparsity_ratio, (int, float)) and not isinstance(sparsity_ratio, bool)
        if not number or not 0 < sparsity_ratio <= 1:
            hint = "It is the share of blocks to keep: 0.2 keeps a fifth."
            raise argument_error("sparsity_ratio", "a share in (0, 1], or None", repr(sparsity_ratio), hint)
        if gamma is not None:
            raise argument_error("gamma", "None with sparsity_ratio", gamma, "Pass sparsity_ratio=None with gamma.")
        options["density"] = sparsity_ratio
    elif gamma is not None:
        options["gamma"] = gamma
    return options


@dataclass(frozen=True)
class FastPrefillConfig:
    """How a model or a call prefills; the keys of ``config/xattn_config.json`` are fields of it.

    Attributes:
        threshold: Share of the estimated mass that "xattn" keeps: one number, one per query head, or one per layer and
            query head. None: the table for the model that is loaded, where ``sparseattn.threshold`` has one, else 0.95.
        metric: "xattn", "flex", "minfer" or "full" (dense).
        stride: Tokens of a scored cell of "xattn", 4, 8 or 16.
        block_size: Tokens of a block of "xattn" (64 or 128), "flex" (32, 64 or 128) or "minfer" (16 to 256). None:
            128, of "flex" 64.
        sparsity_ratio: Share of every row's visible blocks that "flex" keeps. None: by ``gamma``.
        gamma: Share of attention mass that "flex" covers where ``sparsity_ratio`` is None. None: 0.9.
        tau: Heads of "flex" whose pooled estimate is closer than this to the truth are query-aware; 0: none.
        vertical_size: Columns that "minfer" keeps.
        slash_size: Diagonals that "minfer" keeps.
        adaptive_budget: Share of the keys that "minfer" keeps instead of these two, a fifth as columns.
        min_seq_len: In a model, prompts of fewer tokens run dense. "auto": where dense attention is the faster one, as
            ``sparseattn.options`` knows it.

    Raises:
        ValueError: A value that the method does not take; the message names it.
    """

    threshold: Any = None
    _: KW_ONLY
    metric: str = "xattn"
    stride: int = STRIDE
    block_size: int | None = None
    sparsity_ratio: float | None = None
    gamma: float | None = None
    tau: float = TAU
    vertical_size: int = 1000
    slash_size: int = 6096
    adaptive_budget: float | None = None
    min_seq_len: int | str = "auto"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            hint = "Every other method has a name of its own in sparseattn.SELECTORS."
            raise argument_error("metric", f"one of {', '.join(METRICS)}", repr(self.metric), hint)
        options = self.options()
        method = options.pop("method")
        if method != "dense":
            found = selectors.configure(method, options)
            if method == "xattention" and self.threshold is not None:
                object.__setattr__(self, "threshold", found.to_dict()["threshold"])

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Build from a mapping.

        Raises:
            ValueError: An unknown key (the message lists the valid ones) or a bad value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise argument_error(str(name), f"a key among {', '.join(known)}", "an unknown key")
        return cls(**options)

    @classmethod
    def from_json(cls, path: str | Path = CONFIG_FILE) -> Self:
        """Read a config file.

        Raises:
            FileNotFoundError: No such file.
            ValueError: No JSON object, an unknown key or a bad value.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise argument_error("path", "a JSON file", f"{path}: {error}") from error
        if not isinstance(found, dict):
            raise argument_error("path", "a JSON object of options", f"{path}: {type(found).__name__}")
        return cls.from_dict(found)

    def options(self) -> dict[str, Any]:
        """``{"method": name, ...}`` with what concerns the method of ``metric``."""
        size = {} if self.block_size is None else {"block_size": self.block_size}
        if self.metric == "xattn":
            threshold = THRESHOLD if self.threshold is None else self.threshold
            return {"method": "xattention", "threshold": threshold, "stride": self.stride, **size}
        if self.metric == "flex":
            return flex_options(self.block_size or FLEX_BLOCK_SIZE, self.sparsity_ratio, self.gamma, self.tau)
        if self.metric == "minfer":
            own = {name: getattr(self, name) for name in ("vertical_size", "slash_size", "adaptive_budget")}
            return {"method": "minference", **own, **size}
        return {"method": "dense"}

    def prefill(self, query_states: Tensor, key_states: Tensor, value_states: Tensor, causal: bool = True) -> Tensor:
        """One call with these options; tensors as ``attend`` takes them."""
        return attend(self.options(), query_states, key_states, value_states, causal)
