"""Paged attention in plain PyTorch: the definition of what is correct, on any device and in any float dtype.

Sequence by sequence: the pages are gathered in token order, visible keys are written out as a boolean matrix, and one
softmax follows. Rows are taken in chunks, so that memory stays bounded; scores are float32, or float64 for float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.paged.problem import PagedProblem

_CHUNK_SCORES = 1 << 24  # scores of a chunk of rows, over all heads


def unsupported_reason(q: Tensor, q_rope: Tensor | None, p: PagedProblem) -> str | None:
    """The reference takes everything that passes validation."""
    return None


def attend(q: Tensor, q_rope: Tensor | None, out: Tensor, lse: Tensor, p: PagedProblem) -> None:
    """Attention of every sequence, written into ``out`` ``[total_q, Hq, Dv]`` and ``lse`` ``[Hq, total_q]``."""
    work = lse.dtype
    out.zero_()
    lse.fill_(-math.inf)
    bounds = list(range(p.batch + 1)) if p.cu_seqlens_q is None else p.cu_seqlens_q.tolist()
    for b, length in enumerate(p.seq_lens.tolist()):
        start, stop = bounds[b], min(bounds[b + 1], q.shape[0])
        if stop - start > p.max_q:
            raise argument_error("max_seqlen_q", f"at least {stop - start}, the longest sequence", p.max_q)
        if stop <= start or length <= 0:
            continue
        pages = _pages(p, b)
        held = (length + p.page_size - 1) // p.page_size
        pages = torch.nn.functional.pad(pages[:held], (0, max(0, held - pages.shape[0])), value=-1)
        present = (pages >= 0) & (pages < p.k.shape[0])
        present = present.repeat_interleave(p.page_size)[:length]
        tokens = present.nonzero()[:, 0]  # keys that have a page: the others are not even read
        if tokens.numel() == 0:
            continue
        at = (pages[tokens // p.page_size].long(), tokens % p.page_size)
        keys = _keys(p, at, tokens, work)
        values = p.v[at].to(work) * p.v_factor
        if p.v_scale is not None:
            values = values * p.v_scale.to(work)[:, None]
        queries = _queries(q[start:stop], None if q_rope is None else q_rope[start:stop], length, p, work)
        step = max(1, _CHUNK_SCORES // (q.shape[1] * tokens.numel()))
        for first in range(0, stop - start, step):
            rows = torch.arange(first, min(first + step, stop - start), device=q.device)
            s = _scores(queries[rows], keys, rows, tokens, length, stop - start, p)
            seen = _visible(rows, tokens, length, stop - start, b, q.shape[1], p)
            s.masked_fill_(~seen, -math.inf)
            o, row_lse = _softmax(s, _seen_values(values, s), p.sinks)
            out[start + rows] = o.to(out.dtype)
            lse[:, start + rows] = row_lse


def _pages(p: PagedProblem, b: int) -> Tensor:
    """Page numbers of sequence ``b``, in order."""
    if p.page_table is not None:
        return p.page_table[b]
    assert p.indptr is not None
    assert p.indices is not None
    first, last = p.indptr[b : b + 2].clamp(min=0).tolist()
    return p.indices[first:last]


def _keys(p: PagedProblem, at: tuple[Tensor, Tensor], tokens: Tensor, work: torch.dtype) -> Tensor:
    """``[n, Hkv, D + R]``, scaled and rotated."""
    keys = p.k[at].to(work)
    if p.k_rope is not None:
        keys = torch.cat([keys, p.k_rope[at].to(work)], -1)
    if p.k_scale is not None:
        keys = keys * p.k_scale.to(work)[:, None]
    return _rotated(keys, tokens, p) if p.rope_theta else keys


def _queries(q: Tensor, q_rope: Tensor | None, length: int, p: PagedProblem, work: torch.dtype) -> Tensor:
    """``[rows, Hq, D + R]``, rotated."""
    queries = q.to(work) if q_rope is None else torch.cat([q, q_rope], -1).to(work)
    if not p.rope_theta:
        return queries
    return _rotated(queries, torch.arange(q.shape[0], device=q.device) + (length - q.shape[0]), p)


def _rotated(x: Tensor, positions: Tensor, p: PagedProblem) -> Tensor:
    """``x [n, H, D]`` with columns i and i + D / 2 rotated by ``position * theta^(-2i / D) / scale``."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=x.dtype) * (-2.0 / x.shape[-1])
    frequencies = torch.exp2(exponents * math.log2(p.rope_theta)) / p.rope_scale
    angles = (positions.to(x.dtype)[:, None] * frequencies)[:, None]
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _scores(
    queries: Tensor, keys: Tensor, rows: Tensor, tokens: Tensor, length: int, length_q: int, p: PagedProblem
) -> Tensor:
    """``[Hq, rows, n]``, scaled, biased and capped."""
    heads, heads_k = queries.shape[1], keys.shape[1]
    grouped = queries.transpose(0, 1).reshape(heads_k, -1, queries.shape[-1])  # [Hkv, group * rows, D]
    s = torch.bmm(grouped, keys.permute(1, 2, 0)).view(heads, rows.shape[0], -1) * p.scale
    if p.slopes is not None:
        distance = tokens[None, :] - rows[:, None] - (length - length_q)
        s = s + p.slopes.to(s.dtype)[:, None, None] * distance
    return p.softcap * torch.tanh(s / p.softcap) if p.softcap else s


def _visible(rows: Tensor, tokens: Tensor, length: int, length_q: int, b: int, heads: int, p: PagedProblem) -> Tensor:
    """bool, broadcastable to ``[Hq, rows, n]``."""
    diagonal = rows[:, None] + (length - length_q)
    seen = torch.ones((rows.shape[0], tokens.shape[0]), dtype=torch.bool, device=rows.device)
    if p.causal:
        seen &= tokens <= diagonal
    if p.window_left >= 0:
        seen &= tokens >= diagonal - p.window_left
    if p.window_right >= 0:
        seen &= tokens <= diagonal + p.window_right
    if p.custom_mask is not None:
        seen &= _custom(p.custom_mask, _mask_start(b, p), rows[:, None] * length + tokens, p.big_endian)
    if p.list_indices is None:
        return seen
    return seen & _listed(p, b, rows, tokens).repeat_interleave(heads // p.list_indices.shape[1], 0)


def _mask_start(b: int, p: PagedProblem) -> Tensor:
    """Where the entries of sequence ``b`` begin in a custom mask."""
    if p.mask_offsets is not None:
        return p.mask_offsets[b]
    assert p.custom_mask is not None
    sizes = p.seq_lens[:b].long() * (1 if p.cu_seqlens_q is None else p.cu_seqlens_q.diff()[:b])
    return (sizes if p.custom_mask.dtype == torch.bool else (sizes + 7) // 8).sum()


def _custom(bits: Tensor, offset: Tensor, entry: Tensor, big: bool) -> Tensor:
    """Entries of a flat or packed mask; False past its end."""
    packed = bits.dtype == torch.uint8
    at = offset + (entry // 8 if packed else entry)
    inside = (at >= 0) & (at < bits.shape[0])
    value = bits[at.clamp(0, max(0, bits.shape[0] - 1))] if bits.shape[0] else torch.zeros_like(inside)
    if packed:
        shift = 7 - entry % 8 if big else entry % 8
        value = (value >> shift.to(torch.uint8)) & 1
    return inside & (value != 0)


def _listed(p: PagedProblem, b: int, rows: Tensor, tokens: Tensor) -> Tensor:
    """bool ``[H, rows, n]``, of the lists' own heads."""
    assert p.list_counts is not None
    assert p.list_indices is not None
    batch = b if p.list_counts.shape[0] > 1 else 0
    counts, indices = p.list_counts[batch], p.list_indices[batch].long()  # [H, M], [H, M, K]
    blocks = max(1, int(tokens.max()) // p.block_kv + 1)
    entries = torch.arange(indices.shape[-1], device=rows.device)
    valid = (entries < counts[..., None]) & (indices >= 0) & (indices < blocks)
    table = torch.zeros((*counts.shape, blocks + 1), dtype=torch.bool, device=rows.device)
    table.scatter_(-1, indices.masked_fill(~valid, blocks), True)
    lists = rows // p.block_q if p.block_q else rows * 0
    return table[:, lists][..., tokens // p.block_kv]


def _seen_values(values: Tensor, s: Tensor) -> Tensor:
    """Values with zeros where no row of the KV head's group sees the key, since 0 * NaN is not 0."""
    unseen = (s == -math.inf).view(values.shape[1], -1, s.shape[-1]).all(1)
    return values.masked_fill(unseen.T[..., None], 0)


def _softmax(s: Tensor, values: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs ``[rows, Hq, Dv]`` and LSE ``[Hq, rows]`` of scores ``[Hq, rows, n]``."""
    heads, rows, _ = s.shape
    top = s.amax(-1)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (s - top[..., None]).exp()
    total = weights.sum(-1)  # by which outputs are divided: an LSE of huge scores is too coarse for that
    lse = total.log() + top
    o = torch.bmm(weights.reshape(values.shape[1], -1, s.shape[-1]), values.transpose(0, 1)).view(heads, rows, -1)
    o = o / total.clamp(min=torch.finfo(s.dtype).tiny)[..., None]
    if sinks is not None:
        o = o * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]
    return o.transpose(0, 1), lse
