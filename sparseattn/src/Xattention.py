"""XAttention by SparseAttn's name; the method is :func:`sparseattn.xattention`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparseattn.src.utils import STRIDE, THRESHOLD, attend


def Xattention_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    threshold: float | Sequence[float] | Tensor = THRESHOLD,
    causal: bool = True,
) -> Tensor:
    """Attend, per head and block of 128 queries, the fewest key blocks that hold ``threshold`` of the estimated mass.

    Scores are antidiagonal sums at stride 16; ``FastPrefillConfig(stride=..., block_size=...).prefill`` sets others.

    Args:
        query_states: ``[B, Hq, Sq, D]`` in float16, bfloat16 or float32.
        key_states: ``[B, Hkv, Sk, D]``; Hq heads, or fewer that divide it (never repeated). ``Sq <= Sk`` is a chunk at
            the end of the keys.
        value_states: ``[B, Hkv, Sk, Dv]``.
        threshold: In [0, 1], or one for each query head.
        causal: Query i sees keys ``j <= i + Sk - Sq``, and keeps the first block and its own.

    Returns:
        ``[B, Hq, Sq, Dv]`` in query_states' dtype.

    Raises:
        TypeError: No tensors, or dtypes that differ.
        ValueError: A shape or value that does not fit.
    """
    options = {"method": "xattention", "threshold": threshold, "stride": STRIDE}
    return attend(options, query_states, key_states, value_states, causal)
