"""The merge of a row's partial softmax sums, where its keys were cut into shares."""

import triton
import triton.language as tl

from sparseattn.kernels.attention import join_softmax, natural_lse, with_sink


@triton.jit(do_not_specialize=["rows", "heads", "num_splits", "tokens"])
def combine_kernel(
    o_part_ptr, sums_ptr, o_ptr, lse_ptr, sinks_ptr, rows, heads, tokens, num_splits, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program: merges the partial sums of one (batch, token, head) row.

    Grid (rows,), rows ordered [batch, token, head] like ``o``. ``o_part`` float32 [splits, rows, DV], ``sums`` float32
    [splits, 2, batch, heads, tokens]: running maximum and sum.
    """
    row = tl.program_id(0).to(tl.int64)
    head = row % heads
    token = (row // heads) % tokens
    lse_at = ((row // heads // tokens) * heads + head) * tokens + token
    offs = tl.arange(0, BLOCK_DV)
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(num_splits):
        part = split * rows.to(tl.int64)
        m_part = tl.load(sums_ptr + 2 * part + lse_at)
        l_part = tl.load(sums_ptr + 2 * part + rows + lse_at)
        m_i, l_i, alpha, weight = join_softmax(m_i, l_i, m_part, l_part)
        acc = acc * alpha + weight * tl.load(o_part_ptr + (part + row) * DV + offs, mask=offs < DV, other=0.0)
    tl.store(lse_ptr + lse_at, natural_lse(m_i, l_i))
    if SINKS:
        l_i = with_sink(m_i, l_i, tl.load(sinks_ptr + head))
    acc = acc / tl.where(l_i > 0, l_i, 1.0)
    tl.store(o_ptr + row * DV + offs, acc.to(o_ptr.dtype.element_ty), mask=offs < DV)
