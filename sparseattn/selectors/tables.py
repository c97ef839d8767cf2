"""Options that are one number, one per head, or one per layer and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparseattn.errors import argument_error


def freeze(name: str, value: Any, check: Callable[[object], None]) -> Any:
    """Validate a number, or numbers of depth one or two (lists, tuples, tensors), and make it hashable.

    Args:
        name: The option, for messages.
        value: What the user gave.
        check: Raises unless its argument is a valid number.

    Returns:
        A float, a tuple of floats, or a tuple of equally long tuples of floats.

    Raises:
        ValueError: Rows of different lengths, nothing at all, or a number that ``check`` refuses.
    """
    if hasattr(value, "tolist"):  # a tensor or array; read once here, never in a call
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        check(value)
        return float(value)
    rows = [tuple(row) if isinstance(row, (list, tuple)) else row for row in value]
    nested = [row for row in rows if isinstance(row, tuple)]
    if not rows or (nested and (len(nested) < len(rows) or len({len(row) for row in nested}) > 1 or not nested[0])):
        raise argument_error(name, "a number, numbers per head, or equally long rows per layer", value)
    for entry in (entry for row in rows for entry in (row if isinstance(row, tuple) else (row,))):
        check(entry)
    return tuple(tuple(map(float, row)) if isinstance(row, tuple) else float(row) for row in rows)


def of_layer(name: str, value: Any, heads: int, layer: int | None) -> float | tuple[float, ...]:
    """The number, or the numbers of the heads of a layer, from what :func:`freeze` made.

    Raises:
        ValueError: No ``layer``, or one out of range, where numbers are per layer; another number of heads.
    """
    if not isinstance(value, tuple):
        return value
    if isinstance(value[0], tuple):
        if layer is None or not 0 <= layer < len(value):
            raise argument_error("layer", f"an int in [0, {len(value)})", layer, f"The {name} is per layer and head.")
        value = value[layer]
    if len(value) != heads:
        raise argument_error(name, f"{heads} values, one per query head", f"{len(value)} values")
    return value
