"""FlexPrefill by SparseAttn's name; the method is :func:`sparseattn.flexprefill`."""

from __future__ import annotations

from torch import Tensor

from sparseattn.src.utils import FLEX_BLOCK_SIZE, TAU, attend, flex_options


def Flexprefill_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    block_size: int = FLEX_BLOCK_SIZE,
    sparsity_ratio: float | None = 0.2,
    *,
    gamma: float | None = None,
    tau: float = TAU,
) -> Tensor:
    """Causal attention over the best blocks of every row, found query-aware or by verticals and slashes, as heads need.

    Args:
        query_states: ``[B, Hq, Sq, D]`` in float16, bfloat16 or float32.
        key_states: ``[B, Hkv, Sk, D]``; Hq heads, or fewer that divide it (never repeated).
        value_states: ``[B, Hkv, Sk, Dv]``.
        block_size: Tokens of a block, 32, 64 or 128.
        sparsity_ratio: Share of blocks to *keep*, in (0, 1]: 0.2 keeps a fifth of the blocks that each row sees,
            rounded up, its own and the first one always. None: by ``gamma``.
        gamma: Instead of it: the share of attention mass to cover, so that heads and prompts keep what they need.
            ``Flexprefill_prefill(q, k, v, sparsity_ratio=None, gamma=0.9)`` is the authors' method.
        tau: How close (in square-root Jensen-Shannon divergence) the pooled estimate of a head must be to the truth for
            the head to be query-aware; 0: none is.

    Returns:
        ``[B, Hq, Sq, Dv]`` in query_states' dtype.

    Raises:
        TypeError: No tensors, or dtypes that differ.
        ValueError: A shape or value that does not fit; both ``sparsity_ratio`` and ``gamma``.
    """
    options = flex_options(block_size, sparsity_ratio, gamma, tau)
    return attend(options, query_states, key_states, value_states)
