"""What Gluon attention kernels do to one tile of scores: element masks, the running softmax, a row's last numbers.

Raw scores are kept as the tensor cores give them; ``qk_scale`` is the factor that turns them into base-2 logits. The
layouts are wgmma's: a warpgroup holds 64 rows, a thread two rows and pairs of neighbouring columns.
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
# A column that no row sees.
HIDDEN: gl.constexpr = gl.constexpr(0x7FFFFFFF)


@gluon.jit
def hide(s, tokens, cols, offset, k_len, window_left, window_right, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Scores with -inf where query ``tokens`` [M] may not see key ``cols`` [N]; ``offset`` is ``Sk - Sq``."""
    last = tokens * 0 + (k_len - 1)
    if CAUSAL:
        last = gl.minimum(last, tokens + offset)
    if WINDOW:
        last = gl.where(window_right < 0, last, gl.minimum(last, tokens + offset + window_right))
    s = gl.where(cols[None, :] <= last[:, None], s, float("-inf"))
    if WINDOW:
        first = gl.where(window_left < 0, tokens * 0, tokens + offset - window_left)
        s = gl.where(cols[None, :] >= first[:, None], s, float("-inf"))
    return s


@gluon.jit
def custom_rows(mask, tokens, q_len, k_len, FORM: gl.constexpr):
    """Where a custom mask has the rows of queries ``tokens``: element, bit in it, and how many keys it may keep.

    ``mask`` is (pointer, where the entries of a sequence begin, elements). What lies past its end is not kept.
    """
    _mask_ptr, first, size = mask
    entry = tokens.to(gl.int64) * k_len
    bit = tokens * 0
    left = size - first - entry
    if FORM != "bool":
        bit = (entry % 8).to(gl.int32)
        entry = entry // 8
        left = (size - first - entry) * 8 - bit
    left = gl.where((tokens < q_len) & (first + entry >= 0), left, 0)
    return first + entry, bit, gl.minimum(gl.maximum(left, 0), k_len.to(gl.int64)).to(gl.int32)


@gluon.jit
def custom_kept(mask_ptr, first, bit, left, cols, FORM: gl.constexpr):
    """Whether a custom mask, "bool" or packed "little" or "big", keeps keys ``cols`` of the rows of ``custom_rows``."""
    at = bit + cols
    if FORM != "bool":
        at = at // 8
    byte = gl.load(mask_ptr + first + at, mask=cols < left, other=0).to(gl.int32)
    if FORM == "little":
        byte = (byte >> (bit + cols) % 8) & 1
    elif FORM == "big":
        byte = (byte >> (7 - (bit + cols) % 8)) & 1
    return byte != 0


@gluon.jit
def tanh(x):
    """Hyperbolic tangent in float32: the odd series near zero, where the exponential form cancels."""
    x2 = x * x
    series = 62.0 / 2835 - x2 * (1382.0 / 155925)
    series = 17.0 / 315 - x2 * series
    series = 2.0 / 15 - x2 * series
    series = 1.0 / 3 - x2 * series
    e = gl.exp2(gl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return gl.where(gl.abs(x) < 0.35, x * (1.0 - x2 * series), gl.where(x < 0, -far, far))


@gluon.jit
def alibi_slopes(slopes_ptr, heads, qk_scale, F: gl.constexpr):
    """What raw scores of ``heads`` gain a position."""
    return gl.load(slopes_ptr + gl.minimum(heads, F.HEADS - 1)) * (LOG2E / qk_scale)


@gluon.jit
def extra_of(extras, heads, b, qk_scale, F: gl.constexpr):
    """What biases and hides the scores of a row tile of sequence ``b``: the slopes of ``heads``, a custom mask."""
    slopes_ptr, custom_ptr, custom_starts_ptr, custom_size = extras
    slope = 0
    if F.ALIBI:
        slope = alibi_slopes(slopes_ptr, heads, qk_scale, F)
    custom = (0, 0, 0)
    if F.CUSTOM != "":
        custom = (custom_ptr, gl.load(custom_starts_ptr + b), custom_size)
    return slope, custom


@gluon.jit
def cap_scores(s, qk_scale, softcap):
    """``softcap * tanh(score / softcap)`` of scaled scores, unscaled again: callers apply ``qk_scale`` as usual."""
    scale = qk_scale * LN2
    return tanh(s * (scale / softcap)) * (softcap / scale)


@gluon.jit
def thread_sums(p):
    """Row sums over each thread's own columns, [M, 4]: the four threads of a row add theirs once, at the end."""
    return gl.sum(gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def next_softmax(s, m_i, l_i, qk_scale, MASKED: gl.constexpr):
    """One step of the running softmax.

    Args:
        s: [M, N] raw scores, -inf where hidden (only if ``MASKED``).
        m_i: [M] running maximum of raw scores.
        l_i: [M, 4] thread sums of ``exp2((s - m_i) * qk_scale)``.
        qk_scale: Positive factor from raw scores to base-2 logits.
        MASKED: Rows may have seen nothing so far and see nothing now.

    Returns:
        ``p`` [M, N], the factor [M] by which older sums shrink, and the new ``m_i`` and ``l_i``.
    """
    m_new = gl.maximum(m_i, gl.max(s, 1))
    if MASKED:
        top = gl.where(m_new == float("-inf"), 0.0, m_new) * qk_scale
    else:
        top = m_new * qk_scale
    alpha = gl.exp2(m_i * qk_scale - top)
    p = gl.exp2(s * qk_scale - top[:, None])
    sums = thread_sums(p)
    shrink = gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout), assert_trivial=True)
    return p, alpha, m_new, l_i * shrink[:, None] + sums


@gluon.jit
def row_sums(l_i, layout: gl.constexpr):
    """Whole row sums [M] from thread sums [M, 4]."""
    return gl.convert_layout(gl.sum(l_i, 1), layout)


@gluon.jit
def natural_lse(m_i, l_i, qk_scale):
    """Natural-log LSE [M] of scaled scores; -inf for a row that saw no key."""
    return gl.where(l_i > 0, (m_i * qk_scale + gl.log2(gl.where(l_i > 0, l_i, 1.0))) * LN2, float("-inf"))


@gluon.jit
def with_sink(m_i, l_i, sink, qk_scale):
    """Row sums with their heads' sink logits in the denominator; still 0 for a row that saw no key."""
    return l_i + gl.where(l_i > 0, gl.exp2(sink * LOG2E - m_i * qk_scale), 0.0)


@gluon.jit
def leave_sums(sums_ptr, at, share, split_stride, m_i, l_i, inside, qk_scale):
    """Leave a share's maxima, natural-log, and sums of the rows at ``at``."""
    part = sums_ptr + share.to(gl.int64) * 2 * split_stride + at
    gl.store(part, m_i * (qk_scale * LN2), mask=inside)
    gl.store(part + split_stride, l_i, mask=inside)


@gluon.jit
def leave_part(part_ptr, o_row, share, split_stride, acc, inside, F: gl.constexpr):
    """Leave a share's unnormalised outputs, float32; ``o_row`` counts elements."""
    offs = gl.arange(0, F.BLOCK_DV, gl.SliceLayout(0, acc.type.layout))
    o_in = gl.convert_layout(inside, o_row.type.layout)[:, None] & (offs < F.DV)[None, :]
    o_part = part_ptr + share.to(gl.int64) * split_stride
    gl.store(o_part + o_row[:, None] + offs[None, :], acc, mask=o_in)


@gluon.jit
def finish_sums(lse_ptr, lse_at, sinks_ptr, heads, m_i, l_i, inside, qk_scale, F: gl.constexpr):
    """Write the LSE of finished rows; returns the factor that normalises their outputs."""
    gl.store(lse_ptr + lse_at, natural_lse(m_i, l_i, qk_scale), mask=inside)
    if F.SINKS:
        l_i = with_sink(m_i, l_i, gl.load(sinks_ptr + heads).to(gl.float32), qk_scale)
    return 1.0 / gl.where(l_i > 0, l_i, 1.0)
