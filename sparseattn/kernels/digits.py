"""Cut-offs among many values without a sort: digit by digit, four bits a pass, each pass a launch.

Keys are nonnegative int32 numbers; a pass adds up the weights of the keys that share the digits fixed so far, by their
next digit, in as many histograms as there are programs. Every program of the next pass reads all of them and so fixes
the same digit: no atomics, no host, and the same bits whichever program comes first.
"""

import triton
import triton.language as tl

#: Of the digit that each pass fixes; the sign bit is 0.
SHIFTS = (28, 24, 20, 16, 12, 8, 4, 0)


@triton.jit
def next_digit(histogram_ptr, chunks, prefix, above, need, BLOCK: tl.constexpr):
    """Fix one digit of a cut-off: the largest for which what lies at or above it reaches ``need``.

    Args:
        histogram_ptr: float32 ``[chunks, 16]``, sums of the values that share ``prefix``, by their next digit.
        chunks: How many histograms add up.
        prefix: int32, the digits fixed so far.
        above: float32, the sum of the values above all that share ``prefix``.
        need: float32.
        BLOCK: Histograms added at once.

    Returns:
        The new ``prefix`` and ``above``. Where even everything does not reach the need the digit is 0.
    """
    digit = tl.arange(0, 16)
    sums = tl.zeros([16], tl.float32)
    for c in range(0, chunks, BLOCK):
        offs = c + tl.arange(0, BLOCK)
        entries = histogram_ptr + offs[:, None] * 16 + digit[None, :]
        sums += tl.sum(tl.load(entries, mask=(offs < chunks)[:, None], other=0.0), 0)
    at_least = tl.sum(tl.where(digit[None, :] >= digit[:, None], sums[None, :], 0.0), 1)  # [16], sum of digits >= own
    best = tl.max(tl.where(above + at_least >= need, digit, 0), 0)
    above += tl.sum(tl.where(digit > best, sums, 0.0), 0)
    return prefix * 16 + best, above


@triton.jit
def digit_sums(keys, weights, prefix, shift, FIRST: tl.constexpr):
    """float32 ``[K, 16]``: ``weights [K]`` spread over the digit at ``shift`` of the ``keys [K]`` under ``prefix``."""
    digit = tl.arange(0, 16)
    own = keys >> shift
    if not FIRST:
        weights = tl.where((own >> 4) == prefix, weights, 0.0)
    return tl.where((own & 15)[:, None] == digit[None, :], weights[:, None], 0.0)
