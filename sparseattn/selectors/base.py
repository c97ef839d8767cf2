"""What every selector shares: the config base class and the registry entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.sequences import Sequences


@dataclass(frozen=True)
class SelectorConfig:
    """Base of the frozen, JSON-able configs of the selectors."""

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Build a config from a mapping, as ``to_dict`` or JSON gives it.

        Raises:
            ValueError: An unknown option, or a value ``__post_init__`` refuses.
        """
        valid = [f.name for f in fields(cls)]
        for name in options:
            if name not in valid:
                raise argument_error(name, f"an option of {cls.__name__} ({', '.join(valid)})", "an unknown option")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The options as a dict that ``json.dumps`` takes and ``from_dict`` reads back."""
        return asdict(self)

    def _check_bool(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise argument_error(name, "a bool", repr(getattr(self, name)))

    def _check_choice(self, name: str, choices: tuple[int, ...]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or value not in choices:
            raise argument_error(name, f"one of {choices}", repr(value))

    def _check_count(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise argument_error(name, "an int >= 0", repr(value))


class Selector(NamedTuple):
    """A method: its config class and its function ``select(q, k, config, *, causal, scale, ...) -> BlockMask``."""

    config: type[SelectorConfig]
    select: Callable[..., BlockMask]


def check_config(config: object, expected: type) -> None:
    """Raise unless ``config`` is of the method's own class."""
    if not isinstance(config, expected):
        raise argument_error("config", f"a {expected.__name__}", type(config).__name__, kind=TypeError)


def check_call(config: object, expected: type, causal: object) -> None:
    """Raise unless ``config`` is of the method's own class and ``causal`` a bool."""
    check_config(config, expected)
    if not isinstance(causal, bool):
        raise argument_error("causal", "True or False", repr(causal), kind=TypeError)


def build_mask(
    counts: Tensor,
    indices: Tensor,
    sequences: Sequences,
    block_size: int,
    causal: bool,
    columns: Tensor | None = None,
) -> BlockMask:
    """Wrap block lists (and lists of single columns) into a BlockMask that knows the lengths of a ragged batch."""
    seqused_q, seqused_k = sequences.lengths_q(), sequences.lengths_k()
    if sequences.ragged:
        # One side may be whole while the other is not; a mask that is ragged states both.
        def full(length: int) -> Tensor:
            return torch.full((sequences.batch,), length, dtype=torch.int32, device=counts.device)

        seqused_q = full(sequences.max_q) if seqused_q is None else seqused_q
        seqused_k = full(sequences.max_k) if seqused_k is None else seqused_k
    return BlockMask(
        kv_num_blocks=counts,
        kv_indices=indices,
        block_size=(block_size, block_size),
        seq_lens=(sequences.max_q, sequences.max_k),
        causal=causal,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        column_indices=columns,
    )
