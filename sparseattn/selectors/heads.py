"""Heads: a method for each head, in one mask: dense, streaming and dynamic heads side by side in one launch.

Static head classes are DuoAttention's (Xiao et al. 2024, arXiv:2410.10819) and PruLong's (arXiv:2506.17121); a class
may be any other selector as well. ``head_tables`` reads the tables those projects save.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.scores import row_bounds
from sparseattn.ops.sequences import Layout, Sequences, resolve_sequences
from sparseattn.selectors.base import SelectorConfig, build_mask, check_call

DENSE = "dense"
_COPY_BYTES = 256 << 20  # lists copied at a time
Names = str | tuple[str, ...] | tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class HeadsConfig(SelectorConfig):
    """Options of :func:`heads`.

    Attributes:
        heads: The class of every head: one name for all, a name per head, or names per layer and head
            (``[layers][heads]``; the call then needs ``layer``). Heads are key heads, whose query heads then share the
            class, or query heads.
        classes: What the names mean: ``{"retrieval": {"method": "landmark", "tau": 0.3}, ...}``, a method and its
            options. ``"dense"`` and ``"streaming"`` (with its defaults) need no entry.
        block_size: Tokens of a block, of every class.
    """

    heads: Names = DENSE
    classes: Any = ()
    block_size: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", _freeze_names(self.heads))
        self._check_choice("block_size", tuple(range(16, 257, 16)))
        object.__setattr__(self, "classes", _freeze_classes(self.classes))
        # An unknown class or a bad option is an error here, not in a call.
        configs = {name: _configure(self.classes, self.block_size, name) for name in self._used()}
        object.__setattr__(self, "_configs", configs)

    def to_dict(self) -> dict[str, Any]:
        """The options as a dict that ``json.dumps`` takes and ``from_dict`` reads back."""
        classes = {name: dict(own) for name, own in self.classes}
        return {"heads": self.heads, "classes": classes, "block_size": self.block_size}

    def of_layer(self, layer: int | None) -> str | tuple[str, ...]:
        """The class of all heads, or of every head, of a layer.

        Raises:
            ValueError: No ``layer``, or one out of range, where classes are per layer.
        """
        if isinstance(self.heads, str) or isinstance(self.heads[0], str):
            return self.heads
        if layer is None or not 0 <= layer < len(self.heads):
            raise argument_error(
                "layer", f"an int in [0, {len(self.heads)})", layer, "The classes are per layer and head."
            )
        return self.heads[layer]

    def config_of(self, name: str) -> tuple[str, SelectorConfig | None]:
        """The method of a class that some head has, and its config; None for dense heads."""
        return self.__dict__["_configs"][name]

    def _used(self) -> list[str]:
        if isinstance(self.heads, str):
            return [self.heads]
        rows = self.heads if isinstance(self.heads[0], tuple) else (self.heads,)
        return list(dict.fromkeys(name for row in rows for name in row))


def _configure(classes: tuple, block_size: int, name: str) -> tuple[str, SelectorConfig | None]:
    """The method and config of a class.

    Raises:
        ValueError: No such class or method, a bad option, or another block size than the others'.
    """
    from sparseattn import selectors

    known = {own_name: dict(own) for own_name, own in classes}
    options = known.get(name, {"method": name} if name in (DENSE, "streaming") else None)
    if options is None:
        raise argument_error("heads", f"names among {', '.join([DENSE, 'streaming', *known])}", repr(name))
    method = options.pop("method", None)
    if method == DENSE:
        if options:
            raise argument_error(f"classes[{name!r}]", "no options with method 'dense'", ", ".join(options))
        return DENSE, None
    if method == "heads" or not isinstance(method, str):
        raise argument_error(f"classes[{name!r}]", "a method other than 'heads' and its options", repr(method))
    kind = selectors.get(method).config
    if "block_size" in {f.name for f in fields(kind)}:
        options.setdefault("block_size", block_size)
    config = kind.from_dict(options)
    got = getattr(config, "block_size", block_size)
    if got != block_size:
        raise argument_error(f"classes[{name!r}].block_size", f"{block_size} like the whole mask", got)
    return method, config


def _freeze_names(names: Any) -> Names:
    """Validate names of any depth up to two and make them hashable."""
    if isinstance(names, str):
        return names
    if not isinstance(names, Sequence) or not names:
        raise argument_error("heads", "a name, names per head, or equally long rows per layer", repr(names))
    rows = tuple(tuple(row) if isinstance(row, (list, tuple)) else row for row in names)
    nested = [row for row in rows if isinstance(row, tuple)]
    flat = [name for row in rows for name in (row if isinstance(row, tuple) else (row,))]
    if (nested and (len(nested) < len(rows) or len(set(map(len, nested))) > 1)) or not flat:
        raise argument_error("heads", "a name, names per head, or equally long rows per layer", repr(names))
    if not all(isinstance(name, str) for name in flat):
        raise argument_error("heads", "names of classes", repr(names))
    return rows


def _freeze_classes(classes: Any) -> tuple:
    """``{name: {option: value}}`` as nested tuples, which hash; such tuples pass through."""
    try:
        table = {str(name): dict(own) for name, own in dict(classes).items()}
    except (TypeError, ValueError):
        raise argument_error("classes", "a dict {name: {'method': ..., option: value}}", repr(classes)) from None
    return tuple((name, tuple((key, _frozen(value)) for key, value in own.items())) for name, own in table.items())


def _frozen(value: Any) -> Any:
    if hasattr(value, "tolist"):  # a tensor or array
        value = value.tolist()
    if isinstance(value, Mapping):
        return tuple((key, _frozen(entry)) for key, entry in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def heads(
    q: Tensor,
    k: Tensor,
    config: HeadsConfig | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    layer: int | None = None,
    impl: str = "auto",
    **layout: Unpack[Layout],
) -> BlockMask:
    """Select by the method of each head's class, and put the lists of all heads into one mask.

    A method sees the heads of its class alone (whole groups of them), so streaming and dense heads cost no scoring.
    With options per head (thresholds, say) it sees all heads, and the options count all. Chunks of queries, ragged
    batches, causality and the cap on lists are as the methods have them. Dense heads are not capped: with one of them
    the lists of all heads of the mask are as wide as the keys.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        config: Options; default ``HeadsConfig()``, all heads dense.
        causal: Key j is visible to query i iff ``j <= i + Sk - Sq``, at any alignment of Sq and Sk.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        layer: Index of the calling layer, for classes (and thresholds) per layer.
        impl: As the methods take it.
        **layout: Of packed and padded batches; see :class:`sparseattn.ops.sequences.Layout`.

    Returns:
        A BlockMask with one head where all share their lists, with Hkv heads where classes are given by key head and
        none has lists of single query heads, else with Hq. Carries no gradient.

    Raises:
        ValueError: Classes for another number of heads; what the methods refuse.
        TypeError: A config of another method; dtypes that do not fit.
    """
    config = HeadsConfig() if config is None else config
    check_call(config, HeadsConfig, causal)
    if impl not in ("auto", "reference", "triton"):
        raise argument_error("impl", "'auto', 'triton' or 'reference'", repr(impl))
    sequences = resolve_sequences(q, k, **layout)
    hq, hkv = q.shape[-2], k.shape[-2]
    names = config.of_layer(layer)
    if isinstance(names, str):
        names = (names,) * hkv
    elif len(names) not in (hq, hkv):
        expected = f"{hkv} names, one per key head, or {hq}, one per query head"
        raise argument_error("heads", expected, f"{len(names)} names", "Is the table another model's?")
    if hkv == 0 or hq % hkv:
        raise argument_error("q", f"heads that are a multiple of k's {hkv}", hq)
    call = {"causal": causal, "scale": scale, "layer": layer, "impl": impl, **layout}
    parts: list[_Part] = []
    for name in dict.fromkeys(names):
        method, own = config.config_of(name)
        wanted = tuple(h for h, other in enumerate(names) if other == name)
        if own is None:
            mask = _dense(sequences, config.block_size, causal, q.device)
            parts.append(_Part(mask, wanted, tuple(range(hkv)), hq))
        else:
            parts.extend(_select(q, k, method, own, wanted, len(names) // hkv, call))
    return parts[0].mask if len(parts) == 1 else _combine(parts, len(names), hq, hkv)


class _Part(NamedTuple):
    """Lists of one class.

    Attributes:
        mask: What the method selected.
        wanted: Which entries of the table it is for.
        groups: The key heads it was made of.
        per_list: How many of their query heads share a list.
    """

    mask: BlockMask
    wanted: tuple[int, ...]
    groups: tuple[int, ...]
    per_list: int

    def source(self, head: int, group: int) -> int:
        """The list of a query head."""
        return (self.groups.index(head // group) * group + head % group) // self.per_list


def _dense(s: Sequences, block_size: int, causal: bool, device: torch.device) -> BlockMask:
    """Everything visible, one head."""
    visible = row_bounds(s, block_size, causal, False, device).visible
    columns = torch.arange(-(-s.max_k // block_size), dtype=torch.int32, device=device)
    indices = columns.expand(*visible.shape, -1)[:, None]
    return build_mask(visible[:, None].contiguous(), indices.contiguous(), s, block_size, causal)


def _select(
    q: Tensor, k: Tensor, method: str, config: SelectorConfig, wanted: tuple[int, ...], per_key: int, call: dict
) -> list[_Part]:
    """Run a method on the groups of heads that hold a wanted entry, of which a key head has ``per_key``."""
    from sparseattn import selectors

    hkv = k.shape[-2]
    group = q.shape[-2] // hkv
    groups = tuple(dict.fromkeys(entry // per_key for entry in wanted))
    per_head = any(isinstance(getattr(config, f.name), tuple) for f in fields(config))
    if per_head or len(groups) == hkv or method == "streaming":  # which reads no more than shapes
        groups = tuple(range(hkv))
    runs = [groups]
    copied = len(groups) * (q[..., :group, :].numel() + k[..., :1, :].numel()) * q.element_size()
    if copied > _COPY_BYTES and getattr(config, "density", None) is None:
        # Neighbours are views of q and k. A density speaks of all heads of the class together, which takes a copy.
        runs = [tuple(run) for run in _runs(groups)]
    parts = []
    for run in runs:
        of_run = tuple(entry for entry in wanted if entry // per_key in run)
        own_q = q if len(run) == hkv else _take(q, tuple(g * group + i for g in run for i in range(group)))
        own_k = k if len(run) == hkv else _take(k, run)
        mask = selectors.get(method).select(own_q, own_k, config, **call)
        parts.append(_Part(mask, of_run, run, len(run) * group // mask.heads))
    return parts


def _runs(values: tuple[int, ...]) -> list[list[int]]:
    """Ascending integers, cut where one does not follow the other."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return runs


def _take(x: Tensor, which: tuple[int, ...]) -> Tensor:
    """Heads of ``x [..., H, D]``: a view where they follow one another."""
    if len(_runs(which)) == 1:
        return x[..., which[0] : which[0] + len(which), :]
    return x.index_select(-2, _on_device(which, x.device))


def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 ``[len]``; copied from the host once: later calls and CUDA graphs find it there."""
    make = _tensor if torch.compiler.is_compiling() else _tensor_once
    return make(values, device)


def _tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


_tensor_once = functools.lru_cache(maxsize=1024)(_tensor)


def _put(target: Tensor, where: Tensor, lists: Tensor, which: Tensor) -> None:
    """Heads ``where`` of ``target [B, H, MB, ...]`` become the heads ``which`` of ``lists [B|1, ...]``."""
    batch, rows = target.shape[0], target.shape[2]
    step = max(1, _COPY_BYTES // max(1, 4 * batch * len(which) * lists[0, 0, :1].numel()))
    for first in range(0, rows, step):
        part = lists[:, :, first : first + step].index_select(1, which)
        target[:, :, first : first + step].index_copy_(1, where, part.expand(batch, *[-1] * (lists.dim() - 1)))


def _combine(parts: list[_Part], entries: int, hq: int, hkv: int) -> BlockMask:
    """One mask of the lists of all classes."""
    masks, group = [part.mask for part in parts], hq // hkv
    grouped = entries == hkv and all(part.per_list % group == 0 for part in parts)
    batch = max([mask.kv_num_blocks.shape[0] for mask in masks])
    lead = (batch, hkv if grouped else hq, masks[0].num_q_blocks)
    device = masks[0].device
    counts = torch.empty(lead, dtype=torch.int32, device=device)
    indices = torch.empty((*lead, max([m.kv_indices.shape[-1] for m in masks])), dtype=torch.int32, device=device)
    extra = max([0 if m.column_indices is None else m.column_indices.shape[-1] for m in masks])
    columns = torch.full((*lead, extra), -1, dtype=torch.int32, device=device) if extra else None
    for part in parts:
        if grouped:
            to, of = part.wanted, tuple(part.source(entry * group, group) for entry in part.wanted)
        else:
            spread = hq // entries  # query heads of an entry
            to = tuple(entry * spread + i for entry in part.wanted for i in range(spread))
            of = tuple(part.source(head, group) for head in to)
        where, which = _on_device(to, device), _on_device(of, device)
        for target, lists in ((counts, part.mask.kv_num_blocks), (indices, part.mask.kv_indices),
                              (columns, part.mask.column_indices)):  # fmt: skip
            if target is not None and lists is not None:
                _put(target if lists.dim() == 3 else target[..., : lists.shape[-1]], where, lists, which)
    return replace(masks[0], kv_num_blocks=counts, kv_indices=indices, column_indices=columns)
