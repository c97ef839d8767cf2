"""Which queries and which keys a program of paged attention works on, decided on the device from lengths alone.

Two grids, one of which may leave to the other the sequences that it is no good for. Many queries: slots of ``TOKENS``
query rows, as many as ``total_q`` and the batch can need; a program finds its sequence by counting. Few queries a
sequence: work items, shares of a sequence's keys; all sequences are cut by the same share length, so that a batch of
unequal sequences is balanced, and the number of items depends on shapes alone.
"""

import triton
import triton.language as tl

from sparseattn.kernels.tiles import SEQUENCES as CHUNK


@triton.jit
def query_span(cu_ptr, b, total_q, RAGGED: tl.constexpr):
    """First row in the packed queries and number of rows of sequence ``b``."""
    start = b
    length = b * 0 + 1
    if RAGGED:
        start = tl.maximum(tl.load(cu_ptr + b), 0)
        length = tl.minimum(tl.load(cu_ptr + b + 1), total_q) - start
    return start, length


@triton.jit
def share_length(lens_ptr, batch, limit, target, least):
    """Keys of a share, so that the batch makes about ``target`` shares; none shorter than ``least``."""
    total = tl.full((), 0, tl.int64)
    for c in range(0, batch, CHUNK):
        offs = c + tl.arange(0, CHUNK)
        length = tl.load(lens_ptr + offs, mask=offs < batch, other=0)
        total += tl.sum(tl.minimum(tl.maximum(length, 0), limit).to(tl.int64), 0)
    return tl.maximum(((total + target - 1) // target).to(tl.int32), least)


@triton.jit
def shares_of(length, limit, share):
    """Shares of a sequence: at least one, so that rows without keys are written, too."""
    return tl.maximum(tl.cdiv(tl.minimum(length, limit), share), 1)


@triton.jit
def item_share(lens_ptr, item, batch, limit, share):
    """Sequence of a work item, which of its shares it is, and how many it has; ``batch`` past the last."""
    b = item * 0
    before = item * 0  # items of all sequences ahead of b
    done = item * 0
    for c in range(0, batch, CHUNK):
        offs = c + tl.arange(0, CHUNK)
        length = tl.load(lens_ptr + offs, mask=offs < batch, other=0)
        shares = tl.where(offs < batch, shares_of(length, limit, share), 0)
        ends = done + tl.cumsum(shares, 0)
        past = (ends <= item) & (offs < batch)
        b += tl.sum(past.to(tl.int32), 0)
        before += tl.sum(tl.where(past, shares, 0), 0)
        done += tl.sum(shares, 0)
    count = b * 0
    if b < batch:
        count = shares_of(tl.load(lens_ptr + b), limit, share)
    return b, item - before, count


@triton.jit
def first_item(lens_ptr, b, limit, share):
    """First work item of sequence ``b``."""
    first = b * 0
    for c in range(0, b, CHUNK):
        offs = c + tl.arange(0, CHUNK)
        length = tl.load(lens_ptr + offs, mask=offs < b, other=0)
        first += tl.sum(tl.where(offs < b, shares_of(length, limit, share), 0), 0)
    return first
