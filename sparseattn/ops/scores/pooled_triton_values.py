"""What a tile of logits comes to: one number a block, or a row's sum. Device functions of the pooled scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def running_lse(s, m_i, l_i):
    """One step of a running base-2 log-sum-exp over columns."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(s - m_safe[:, None]), 1)
    return m_new, l_i


@triton.jit
def _peaks(s, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_BLOCK: tl.constexpr):
    """The largest of the rows' values of a block (base 2) ``[BLOCK_N / PER_BLOCK]``, from logits of rows and pages."""
    if PER_BLOCK == 1:
        return tl.max(s, 0)
    else:
        pages = tl.reshape(s, [BLOCK_M, BLOCK_N // PER_BLOCK, PER_BLOCK])
        m = tl.max(pages, 2)
        m_safe = tl.where(m == float("-inf"), 0.0, m)
        total = tl.sum(tl.exp2(pages - m_safe[:, :, None]), 2)
        return tl.max(tl.where(total > 0, m_safe + tl.log2(tl.where(total > 0, total, 1.0)), m), 0)


@triton.jit
def _sums(s, factor, BLOCK_N: tl.constexpr, PER_BLOCK: tl.constexpr, MAX: tl.constexpr):
    """Blocks' values (base 2) ``[BLOCK_N / PER_BLOCK]`` from products ``s [BLOCK_N, BLOCK_M]`` of pages and rows.

    ``factor`` (positive) makes logits of products. The log-sum-exp over rows and pages; MAX (one page): the largest.
    Pages are rows of the tile, so that a thread sums most of what belongs together by itself.
    """
    m = tl.max(s, 1)
    value = m * factor
    if not MAX:
        top = tl.where(m == float("-inf"), 0.0, value)
        total = tl.sum(tl.exp2(s * factor - top[:, None]), 1)
        value = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), value)
    if PER_BLOCK > 1:
        value = tl.reshape(value, [BLOCK_N // PER_BLOCK, PER_BLOCK])
        m = tl.max(value, 1)
        top = tl.where(m == float("-inf"), 0.0, m)
        total = tl.sum(tl.exp2(value - top[:, None]), 1)
        value = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), m)
    return value


@triton.jit
def _totals(s, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_BLOCK: tl.constexpr):
    """As :func:`_sums`, from logits (base 2) ``s [BLOCK_M, BLOCK_N]``."""
    if PER_BLOCK == 1:
        m = tl.max(s, 0)
        top = tl.where(m == float("-inf"), 0.0, m)
        total = tl.sum(tl.exp2(s - top[None, :]), 0)
    else:
        pages = tl.reshape(s, [BLOCK_M, BLOCK_N // PER_BLOCK, PER_BLOCK])
        m = tl.max(tl.max(pages, 2), 0)
        top = tl.where(m == float("-inf"), 0.0, m)
        total = tl.sum(tl.sum(tl.exp2(pages - top[None, :, None]), 2), 0)
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), m)


@triton.jit
def score_of(
    s, z, factor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_BLOCK: tl.constexpr, MAX: tl.constexpr,
    ROW_SOFTMAX: tl.constexpr, BY_PAGE: tl.constexpr,
):  # fmt: skip
    """Blocks' values (base 2) of a tile of logits; with BY_PAGE of products.

    ``factor`` is :func:`_sums`'; ``z`` is what ROW_SOFTMAX takes from each row's logits.
    """
    if BY_PAGE:
        return _sums(s, factor, BLOCK_N, PER_BLOCK, MAX)
    else:
        if ROW_SOFTMAX:
            s -= z[:, None]
        if MAX:
            return _peaks(s, BLOCK_M, BLOCK_N, PER_BLOCK)
        else:
            return _totals(s, BLOCK_M, BLOCK_N, PER_BLOCK)
