"""MInference by SparseAttn's name; the method is :func:`sparseattn.minference`."""

from __future__ import annotations

from torch import Tensor

from sparseattn.src.utils import attend


def Minference_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    vertical_size: int = 1000,
    slash_size: int = 6096,
    adaptive_budget: float | None = None,
) -> Tensor:
    """Causal attention over the columns and diagonals that the last 64 queries of each head attend most.

    Args:
        query_states: ``[B, Hq, Sq, D]`` in float16, bfloat16 or float32.
        key_states: ``[B, Hkv, Sk, D]``; Hq heads, or fewer that divide it (never repeated).
        value_states: ``[B, Hkv, Sk, Dv]``.
        vertical_size: Columns that every row keeps; the first 30 are among them.
        slash_size: Diagonals, as distances in tokens; the nearest 100 are among them.
        adaptive_budget: In (0, 1]: keep this share of the keys instead of both sizes, a fifth as columns and four
            fifths as diagonals.

    Returns:
        ``[B, Hq, Sq, Dv]`` in query_states' dtype.

    Raises:
        TypeError: No tensors, or dtypes that differ.
        ValueError: A shape or value that does not fit.
    """
    options = {
        "method": "minference",
        "vertical_size": vertical_size,
        "slash_size": slash_size,
        "adaptive_budget": adaptive_budget,
    }
    return attend(options, query_states, key_states, value_states)
