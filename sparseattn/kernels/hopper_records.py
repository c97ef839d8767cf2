"""What a tile of the Hopper forward kernel's schedule stands for: its head, rows and sequence."""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from sparseattn.kernels.hopper import sequence_span


@gluon.jit
def first_head(head, F: gl.constexpr):
    """The first query head of a tile head."""
    if F.GROUP % F.PACK == 0:
        first = head * F.PACK
    else:
        first = head // F.CHUNKS * F.GROUP + head % F.CHUNKS * F.PACK
    return first


@gluon.jit
def walk_of(m, head_q, b, lists, F: gl.constexpr):
    """The walk of a row tile of variable blocks; see ``piece_walks_kernel``."""
    walk_ptr, stride_b, stride_h = lists
    return walk_ptr + (b.to(gl.int64) * stride_b + head_q // F.MASK_GROUP * stride_h + m) * 8


@gluon.jit
def tile_spans(details_ptr, position, b, spans, max_q, max_k, F: gl.constexpr):
    """First query of a row tile's sequence, queries, first key, keys, keys with a page, place of its shares, shares.

    In a paged cache the first key is where page numbers begin; no number waits for another one to be loaded.
    """
    if F.PAGED:
        at = details_ptr + position.to(gl.int64) * 8
        q_start, q_len, k_start = gl.load(at), gl.load(at + 1), gl.load(at + 2)
        k_len, held, place, shares = gl.load(at + 3), gl.load(at + 4), gl.load(at + 5), gl.load(at + 6)
    else:
        q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr = spans
        q_start, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, F.RAGGED_Q)
        k_start, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, F.RAGGED_K)
        held, place, shares = b, b, b  # nobody asks
    return q_start, q_len, k_start, k_len, held, place, shares


@gluon.jit
def row_span(m, head_q, b, q_len, lists, F: gl.constexpr):
    """First query of a row tile, one past the last, and the list row of its keys."""
    count_ptr, mask_stride_b, mask_stride_h = lists
    list_row = b.to(gl.int64)
    if F.VARIABLE:
        walk = walk_of(m, head_q, b, lists, F)
        first = gl.load(walk)
        bound = gl.load(walk + 1)
        list_row = gl.load(walk + 2).to(gl.int64)
    else:
        first = m * F.TOKENS
        bound = gl.minimum(q_len, m * F.TOKENS + F.TOKENS)
        if F.MASKED:
            list_row = list_row * mask_stride_b + head_q // F.MASK_GROUP * mask_stride_h + m * F.TOKENS // F.BLOCK_Q
    return first, bound, list_row
