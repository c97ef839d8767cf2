"""What every attention kernel does to one tile, written once.

Scores, their running maxima and the LSE are natural-log quantities; exponentials are taken in base 2, the hardware's.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence_span(start_ptr, end_ptr, b, length, RAGGED: tl.constexpr):
    """First row and length of sequence ``b``; ``(0, length)`` when no sequence of the batch is cut short."""
    start = tl.full((), 0, tl.int32)
    if RAGGED:
        start = tl.load(start_ptr + b)
        length = tl.load(end_ptr + b) - start
    return start, length


@triton.jit
def schedule(CHUNK: tl.constexpr):
    """(tile, head) of a program in a grid (tiles * CHUNK, heads / CHUNK, ...).

    ``CHUNK`` heads run side by side, tile by tile: the heads of a group then find each other's keys in the L2 cache.
    """
    pid = tl.program_id(0)
    return pid // CHUNK, tl.program_id(1) * CHUNK + pid % CHUNK


@triton.jit
def visible(rows, cols, offset, k_len, window_left, window_right, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether query ``rows`` may see key ``cols``; any shapes that broadcast.

    ``offset`` is ``Sk - Sq``: the diagonal is bottom-right aligned. A negative window side is unbounded. The limits are
    one number a row, so that an element costs one comparison.
    """
    last = rows * 0 + (k_len - 1)
    if CAUSAL:
        last = tl.minimum(last, rows + offset)
    if WINDOW:
        last = tl.where(window_right < 0, last, tl.minimum(last, rows + offset + window_right))
    seen = cols <= last
    if WINDOW:
        seen = seen & (cols >= tl.where(window_left < 0, 0, rows + offset - window_left))
    return seen


@triton.jit
def full_range(first, last, offset, k_len, window_left, window_right, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys ``[lo, hi)`` that every query row in ``first..last`` sees: tiles inside need no element mask."""
    lo = 0
    hi = k_len
    if CAUSAL:
        hi = tl.minimum(hi, first + offset + 1)
    if WINDOW:
        lo = tl.where(window_left < 0, 0, last + offset - window_left)
        hi = tl.where(window_right < 0, hi, tl.minimum(hi, first + offset + window_right + 1))
    return lo, hi


@triton.jit
def key_range(first, last, offset, k_len, window_left, window_right, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys ``[lo, hi)`` that some query row in ``first..last`` sees."""
    lo = 0
    hi = k_len
    if CAUSAL:
        hi = tl.minimum(hi, last + offset + 1)
    if WINDOW:
        lo = tl.where(window_left < 0, 0, tl.maximum(first + offset - window_left, 0))
        hi = tl.where(window_right < 0, hi, tl.minimum(hi, last + offset + window_right + 1))
    return lo, tl.maximum(hi, 0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32: the odd series near zero, where the exponential form cancels."""
    x2 = x * x
    series = 62.0 / 2835 - x2 * (1382.0 / 155925)
    series = 17.0 / 315 - x2 * series
    series = 2.0 / 15 - x2 * series
    series = 1.0 / 3 - x2 * series
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.35, x * (1.0 - x2 * series), tl.where(x < 0, -far, far))


@triton.jit
def cap_scores(s, scale, softcap):
    """``softcap * tanh(s * scale / softcap)``, unscaled again so that callers multiply by ``scale`` as usual."""
    return tanh(s * (scale / softcap)) * (softcap / scale)


@triton.jit
def exp_scores(s, scale, reference, PRECISION: tl.constexpr):
    """``exp(s * scale - reference)`` elementwise, from raw scores.

    The base-2 form is one multiply-add before the exponential; its product rounds at the size of the score, not of the
    difference, which half precision never sees and float32 ("ieee") does.
    """
    if PRECISION == "ieee":
        p = tl.exp2((s * scale - reference) * LOG2E)
    else:
        p = tl.exp2(s * (scale * LOG2E) - reference * LOG2E)
    return p


@triton.jit
def online_softmax(s, m_i, l_i, scale, PRECISION: tl.constexpr):
    """One step of the running softmax over key tiles.

    Args:
        s: [M, N] raw scores, -inf where hidden.
        m_i: [M] running maximum of the scaled scores, -inf before the first visible key.
        l_i: [M] running sum of ``exp(scaled - m_i)``.
        scale: Positive factor on the scores.
        PRECISION: That of the products; see ``exp_scores``.

    Returns:
        ``p`` [M, N], the factor [M] by which older sums shrink, and the new ``m_i`` and ``l_i``.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet: exp(-inf) = 0, not NaN
    p = exp_scores(s, scale, m_safe[:, None], PRECISION)
    alpha = tl.exp2((m_i - m_safe) * LOG2E)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def join_softmax(m_i, l_i, m_part, l_part):
    """Running maximum and sum of two shares of a row's keys together, and the factors on the sums of either."""
    m_new = tl.maximum(m_i, m_part)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m_i - m_safe) * LOG2E)
    weight = tl.exp2((m_part - m_safe) * LOG2E)
    return m_new, l_i * alpha + weight * l_part, alpha, weight


@triton.jit
def natural_lse(m_i, l_i):
    """LSE from the running maximum and sum; -inf for a row that saw no key."""
    return tl.where(l_i > 0, m_i + tl.log(tl.where(l_i > 0, l_i, 1.0)), float("-inf"))


@triton.jit
def with_sink(m_i, l_i, sink):
    """The softmax sum of a row with its head's sink logit in the denominator; still 0 for a row that saw no key."""
    return l_i + tl.where(l_i > 0, tl.exp2((sink.to(tl.float32) - m_i) * LOG2E), 0.0)


@triton.jit
def normalise(acc, l_i, PRECISION: tl.constexpr):
    """``acc / l_i`` row by row, 0 for a row that saw no key; a multiplication where half precision follows."""
    l_i = tl.where(l_i > 0, l_i, 1.0)[:, None]
    if PRECISION == "ieee":
        o = acc / l_i
    else:
        o = acc * (1.0 / l_i)
    return o
