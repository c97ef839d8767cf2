"""Attention over block-sparse rows in plain PyTorch: the definition of what is correct, in any float dtype.

Rows of blocks are taken several at a time: their keys are gathered in the order of the lists, visible ones are written
out as booleans, and one softmax follows. Scores are float32, or float64 for float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseattn.ops.bsr.problem import BSRProblem

_CHUNK = 1 << 22  # elements of the largest tensor of a chunk of rows


def unsupported_reason(q: Tensor, p: BSRProblem) -> str | None:
    """The reference takes everything that passes validation."""
    return None


def attend(q: Tensor, out: Tensor, lse: Tensor, p: BSRProblem) -> None:
    """Attention into ``out`` ``[B, M, Hq, Dv]`` and ``lse`` ``[B, Hq, M]``."""
    lists, heads, heads_k = p.bounds.shape[1], q.shape[2], p.k.shape[2]
    for b in range(q.shape[0]):
        for h in range(lists):
            # Query heads that share the list, and the KV heads that serve them.
            own = slice(h * heads // lists, (h + 1) * heads // lists)
            first_k, end_k = h * heads_k // lists, -(-(h + 1) * heads_k // lists)
            _attend_heads(q[b, :, own], out[b, :, own], lse[b, own], b, h, own, slice(first_k, end_k), p)


def _attend_heads(q: Tensor, out: Tensor, lse: Tensor, b: int, h: int, own: slice, own_k: slice, p: BSRProblem) -> None:
    """One sequence's heads that share a list: ``q`` and ``out`` ``[M, heads, D]``, ``lse`` ``[heads, M]``."""
    work = lse.dtype
    first, owned, indices = _lists(p, b, h)
    k, v = p.k[b, :, own_k], p.v[b, :, own_k]
    (m, heads, dim), heads_k, blocks = q.shape, k.shape[1], p.row_blocks
    width = max(1, int(owned.max()))
    padded = torch.nn.functional.pad(q.to(work), (0, 0, 0, 0, 0, blocks * p.rows - m))
    padded = padded.view(blocks, p.rows, heads_k, heads // heads_k, dim)
    size = width * p.columns * max(heads * p.rows, heads_k * (dim + v.shape[-1]))
    step = max(1, _CHUNK // size)
    for start in range(0, blocks, step):
        rows = torch.arange(start, min(start + step, blocks), device=q.device)
        entry = torch.arange(width * p.columns, device=q.device)  # of the gathered keys
        cols, held = _columns(first[rows], owned[rows], indices, entry, k.shape[0], p)
        # Positions of keys [n, keys], and of a block row's first query [n, 1].
        places = entry.expand_as(cols) if p.gathered else cols
        origin = (rows * p.rows + k.shape[0] - m)[:, None]
        if p.gathered:
            origin = (owned[rows] * p.columns - (m - rows * p.rows).clamp(max=p.rows))[:, None]
        keys, values = _gathered(k, v, cols, places, own_k, work, p)
        queries = padded[rows]
        token = torch.arange(p.rows, device=q.device)
        if p.rope_theta:
            queries = _rotated(queries, (origin + token)[..., None, None], p)
        s = torch.einsum("nrhgd,nkhd->nhgrk", queries, keys) * p.scale
        diagonal = origin[..., None] + token[:, None]  # [n, R, 1]
        if p.slopes is not None:
            slopes = p.slopes[own].to(work).view(1, heads_k, -1, 1, 1)
            s = s + slopes * (places[:, None] - diagonal)[:, None, None]
        if p.softcap:
            s = p.softcap * torch.tanh(s / p.softcap)
        seen = _visible(places[:, None], diagonal, p) & held[:, None]
        if p.mask is not None:
            seen = seen & _kept(p, first[rows], owned[rows], rows, token[:, None], entry)
        s = s.masked_fill(~seen[:, None, None], -math.inf)
        # A key that no query sees may hold anything, and 0 * NaN is not 0.
        values = values.masked_fill(~seen.any(1)[..., None, None], 0)
        o, sums = _softmax(s, values, None if p.sinks is None else p.sinks[own].to(work).view(heads_k, -1, 1))
        at = slice(start * p.rows, min((start + step) * p.rows, m))
        out[at] = o.reshape(-1, heads, v.shape[-1])[: at.stop - at.start].to(out.dtype)
        lse[:, at] = sums.permute(1, 2, 0, 3).reshape(heads, -1)[:, : at.stop - at.start]


def _lists(p: BSRProblem, b: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's list begins, its length, and the flat indices."""
    bounds = p.bounds[b if p.bounds.shape[0] > 1 else 0, h].long()
    if p.csr:
        first, end = bounds[:-1].clamp(min=0), bounds[1:].clamp(max=p.indices.shape[0])
        return first, (end - first).clamp(min=0), p.indices
    width = p.indices.shape[-1]
    lists = p.indices[b if p.indices.shape[0] > 1 else 0, h]
    return torch.arange(bounds.shape[0], device=bounds.device) * width, bounds.clamp(0, width), lists.reshape(-1)


def _columns(
    first: Tensor, owned: Tensor, indices: Tensor, entry: Tensor, length: int, p: BSRProblem
) -> tuple[Tensor, Tensor]:
    """Tokens ``[n, keys]`` that rows of blocks list, 0 where there is none, and which are some."""
    place = entry // p.columns
    at = (first[:, None] + place).clamp(max=indices.shape[0] - 1)
    block = indices[at].long()
    held = (place < owned[:, None]) & (block >= 0) & (block < -(-length // p.columns))
    cols = block * p.columns + entry % p.columns
    held &= cols < length
    return cols.masked_fill(~held, 0), held


def _gathered(
    k: Tensor, v: Tensor, cols: Tensor, places: Tensor, own_k: slice, work: torch.dtype, p: BSRProblem
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, keys, Hkv, D]``, scaled, keys rotated."""
    keys, values = k[cols].to(work), v[cols].to(work) * p.v_factor
    if p.k_scale is not None:
        keys = keys * (p.k_scale[own_k] if p.k_scale.numel() > 1 else p.k_scale).to(work)[:, None]
    if p.v_scale is not None:
        values = values * (p.v_scale[own_k] if p.v_scale.numel() > 1 else p.v_scale).to(work)[:, None]
    return _rotated(keys, places[..., None], p) if p.rope_theta else keys, values


def _rotated(x: Tensor, positions: Tensor, p: BSRProblem) -> Tensor:
    """``x [..., D]`` with columns i and i + D / 2 rotated by ``position * theta^(-2i / D) / scale``."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=x.dtype) * (-2.0 / x.shape[-1])
    angles = positions.to(x.dtype)[..., None] * (torch.exp2(exponents * math.log2(p.rope_theta)) / p.rope_scale)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _visible(places: Tensor, diagonal: Tensor, p: BSRProblem) -> Tensor:
    """bool ``[n, R, keys]``, by positions alone."""
    seen = torch.ones(torch.broadcast_shapes(places.shape, diagonal.shape), dtype=torch.bool, device=places.device)
    if p.causal:
        seen &= places <= diagonal
    if p.window_left >= 0:
        seen &= places >= diagonal - p.window_left
    if p.window_right >= 0:
        seen &= places <= diagonal + p.window_right
    return seen


def _kept(p: BSRProblem, first: Tensor, owned: Tensor, rows: Tensor, token: Tensor, entry: Tensor) -> Tensor:
    """bool ``[n, R, keys]`` of the mask; False past its end."""
    assert p.mask is not None
    block, first = p.rows * p.columns, first[:, None, None]
    packed = p.mask.dtype == torch.uint8
    if p.layout == "blocks":
        at = (first + entry // p.columns) * block + token * p.columns + entry % p.columns
    else:
        at = token * owned[:, None, None] * p.columns + entry
        if packed:
            assert p.mask_offsets is not None
            bit, at = at % 8, p.mask_offsets[rows][:, None, None] + at // 8
        else:
            at = at + first * block
    flat = p.mask.reshape(-1)
    inside = (at >= 0) & (at < flat.shape[0])
    value = flat[at.clamp(0, max(0, flat.shape[0] - 1))] if flat.shape[0] else torch.zeros_like(inside)
    if packed:
        value = (value >> (7 - bit if p.layout == "big" else bit).to(torch.uint8)) & 1
    return inside & (value != 0)


def _softmax(s: Tensor, values: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, R, Hkv, group, Dv]`` and LSE ``[n, Hkv, group, R]`` of scores ``[n, Hkv, group, R, keys]``."""
    top = s.amax(-1)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (s - top[..., None]).exp()
    total = weights.sum(-1)  # by which outputs are divided: an LSE of huge scores is too coarse for that
    lse = total.log() + top
    scale = 1 / total.clamp(min=torch.finfo(s.dtype).tiny)
    if sinks is not None:
        scale = scale * torch.sigmoid(lse - sinks)
    return torch.einsum("nhgrk,nkhd->nrhgd", weights * scale[..., None], values), lse
