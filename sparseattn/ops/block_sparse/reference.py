"""Block-sparse attention in plain PyTorch: the definition of what is correct, on any device and in any float dtype.

Unselected blocks are really skipped: a tile of query rows gathers its listed KV blocks, does one small softmax over
them and is done, so work is proportional to the density and memory to the sequence length. Every tile is one row of
blocks of one mask head; the query heads that share its list are packed into the same matrix product and KV is never
repeated. The backward pass is written out (recomputed tile by tile), not derived by autograd through the loop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.block_sparse.reference_tiles import Sequence, Tile, lists_of, sequences_of

# Scores that a tile may hold before KV heads are taken one at a time. On a CPU a tile should stay in the cache; on a
# GPU larger ones hide the launches.
_TILE_SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, g: Geometry, gradients: str | None = None) -> str | None:
    """The reference takes everything that passes validation."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, g: Geometry) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks.

    Returns:
        ``o`` like q with v's head dim, and the natural-log LSE ``[B, Hq, Sq]`` (packed ``[Hq, total]``) of the scaled,
        soft-capped scores without the sink; float32, or float64 for float64 inputs.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = _full_lse(q, work)
    lists = lists_of(g, work, q.device)
    sink = None if sinks is None else sinks.to(work)[:, None]
    for seq in sequences_of(q, k, g):
        keys = _Keys(k[seq.k_rows], v[seq.k_rows], seq, work, lists is None)
        qs = _heads_first(q[seq.q_rows], work)
        os = qs.new_zeros((*qs.shape[:-1], v.shape[-1]))
        ms = qs.new_full(qs.shape[:-1], -math.inf)
        ls = qs.new_zeros(qs.shape[:-1])
        for tile in seq.tiles(lists, _TILE_SCORES.get(q.device.type, 1 << 26)):
            kt, vt = keys.gather(tile)
            at, rows = (tile.q_heads, tile.rows), tile.rows.stop - tile.rows.start
            s = _scores(qs, kt, keys, tile, g)  # [n, rows of the tile's heads, keys]
            # A row without keys has maximum -inf; the finite floor turns its weights into exact zeros.
            m_i = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(work).min)
            p = s.sub_(m_i).exp_()
            os[at] = torch.bmm(p, vt).view(-1, rows, os.shape[-1])
            ms[at] = m_i.view(-1, rows)
            ls[at] = p.sum(-1).view(-1, rows)
        # A row with keys has l >= 1, one without 0.
        os /= ls.clamp(min=1e-30)[..., None]
        ls = ls.log_().add_(ms)
        if sink is not None:
            os *= _kept_by_sink(ls, sink)[..., None]
        o[seq.q_rows] = os.transpose(0, 1).to(o.dtype)
        lse[seq.lse_rows] = ls
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    g: Geometry,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``forward``, including through the LSE.

    With p = exp(s - lse) and w = exp(lse - logaddexp(lse, sink)), the share of a row's mass that the sink leaves, the
    output is o = w p v. So ds = p (w dp - w delta + dlse), where dp = do v^T and delta = sum(o do), and a sink receives
    -(1 - w) delta from every row. w stays within [0, 1] whatever the sink, unlike the textbook form exp(s - lse_full)
    exp(lse_full - lse).

    Returns:
        ``dq, dk, dv`` in the inputs' dtype and ``dsinks`` in the sinks' (None without sinks).
    """
    work = lse.dtype
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    lists = lists_of(g, work, q.device)
    sink = None if sinks is None else sinks.to(work)[:, None]
    dsink = None if sinks is None else torch.zeros_like(sinks, dtype=work)
    for seq in sequences_of(q, k, g):
        keys = _Keys(k[seq.k_rows], v[seq.k_rows], seq, work, lists is None)
        qs = _heads_first(q[seq.q_rows], work)
        dos = _heads_first(do[seq.q_rows], work)
        ls = lse[seq.lse_rows]
        delta = (_heads_first(o[seq.q_rows], work) * dos).sum(-1)
        if sink is not None and dsink is not None:
            kept = _kept_by_sink(ls, sink)
            dsink -= ((1 - kept) * delta).sum(-1)
            dos, delta = dos * kept[..., None], delta * kept
        if dlse is not None:
            delta = delta - dlse[seq.lse_rows]
        ls = ls.clamp(min=torch.finfo(work).min)
        dqs, dks, dvs = torch.zeros_like(qs), torch.zeros_like(keys.k), torch.zeros_like(keys.v)
        for tile in seq.tiles(lists, _TILE_SCORES.get(q.device.type, 1 << 26)):
            kt, vt = keys.gather(tile)
            n = kt.shape[0]
            at = (tile.q_heads, tile.rows)
            s = _scores(qs, kt, keys, tile, g)
            cap = _cap_slope(s, tile, g.softcap) if g.softcap else None
            p = s.sub_(ls[at].reshape(n, -1, 1)).exp_()
            do_t = dos[at].reshape(n, -1, dos.shape[-1])
            keys.add(1, dvs, tile, torch.bmm(p.transpose(1, 2), do_t))
            ds = torch.bmm(do_t, vt.transpose(1, 2)).sub_(delta[at].reshape(n, -1, 1)).mul_(p)
            if cap is not None:
                # Hidden scores are -inf, where the factor is too; their weight is exactly 0.
                ds = ds.mul_(cap.masked_fill_(cap == -math.inf, 0))
            dqs[at] = torch.bmm(ds, kt).view(-1, tile.rows.stop - tile.rows.start, kt.shape[-1])
            keys.add(0, dks, tile, torch.bmm(ds.transpose(1, 2), qs[at].reshape(n, -1, qs.shape[-1])))
        keys.spread_means(dks, dvs)
        dq[seq.q_rows] = (dqs * g.scale).transpose(0, 1).to(dq.dtype)
        # Padded rows of different sequences never overlap, so each is written once.
        dk[seq.k_rows] = (dks[:, : seq.len_k] * g.scale).transpose(0, 1).to(dk.dtype)
        dv[seq.k_rows] = dvs[:, : seq.len_k].transpose(0, 1).to(dv.dtype)
    return dq, dk, dv, None if sinks is None or dsink is None else dsink.to(sinks.dtype)


class _Keys:
    """Keys and values of one sequence, heads first, padded with zeros to whole blocks and gathered by tile."""

    def __init__(self, k: Tensor, v: Tensor, seq: Sequence, work: torch.dtype, dense: bool) -> None:
        # Dense attention reads every key once a tile, and variable blocks are runs of single ones: a strided view is as
        # good as a copy there.
        dense = dense or seq.g.row_pieces is not None
        self.size = 1 if dense else seq.g.block_kv
        self.k = _heads_first(k, work) if dense else _whole_blocks(_heads_first(k, work), self.size)
        self.v = _heads_first(v, work) if dense else _whole_blocks(_heads_first(v, work), self.size)
        length = self.k.shape[1]
        self.positions = torch.arange(length, device=k.device)
        # Row i sees keys lo[i] .. hi[i].
        rows = torch.arange(seq.len_q, device=k.device)[:, None]
        self.hi = rows * 0 + (seq.len_k - 1) if seq.shift_hi is None else (rows + seq.shift_hi).clamp(max=seq.len_k - 1)
        self.lo = None if seq.shift_lo is None else rows + seq.shift_lo
        self.means: tuple[Tensor, Tensor] | None = None
        if seq.g.mean_correction and not dense:
            first = torch.arange(0, length, self.size, device=k.device)
            self.block_lengths = (seq.len_k - first).clamp(max=self.size)[:, None]
            self.means = (self._mean(self.k), self._mean(self.v))
            self.mean_grads = (torch.zeros_like(self.means[0]), torch.zeros_like(self.means[1]))

    def _mean(self, t: Tensor) -> Tensor:
        """``[H, NB, head dim]``, the mean of every block's tokens (padding is zero)."""
        return t.unflatten(1, (-1, self.size)).sum(2) / self.block_lengths

    def gather(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """``[KV heads of the tile, its keys, head dim]`` of K and V; extra keys last."""
        return self._gather(0, self.k, tile), self._gather(1, self.v, tile)

    def _gather(self, which: int, t: Tensor, tile: Tile) -> Tensor:
        t = t[tile.kv_heads]
        n, _, dim = t.shape
        if isinstance(tile.keys, tuple):
            listed = t[:, tile.keys[0] : tile.keys[1]]
        else:
            listed = t.view(n, -1, self.size * dim).index_select(1, tile.keys).view(n, -1, dim)
        if tile.extra is None:
            return listed
        parts = [listed, t.index_select(1, tile.extra.columns)]
        if self.means is not None:
            parts.append(self.means[which][tile.kv_heads].index_select(1, tile.extra.blocks))
        return torch.cat(parts, 1)

    def add(self, which: int, grad: Tensor, tile: Tile, value: Tensor) -> None:
        """Add the gradient of what ``gather`` returned. Entries of a list are unique, so this is deterministic."""
        grad = grad[tile.kv_heads]
        if tile.extra is not None:
            listed = value.shape[1] - len(tile.extra)
            value, columns, means = value.split(
                [listed, tile.extra.columns.shape[0], tile.extra.blocks.shape[0]], dim=1
            )
            grad.index_add_(1, tile.extra.columns, columns)
            if self.means is not None:
                self.mean_grads[which][tile.kv_heads].index_add_(1, tile.extra.blocks, means)
        if isinstance(tile.keys, tuple):
            grad[:, tile.keys[0] : tile.keys[1]] += value
        else:
            n, _, dim = grad.shape
            flat = self.size * dim
            grad.view(n, -1, flat).index_add_(1, tile.keys, value.view(n, -1, flat))

    def spread_means(self, dk: Tensor, dv: Tensor) -> None:
        """Give every token its share of the gradient of its block's mean."""
        if self.means is not None:
            for grad, mean_grad in zip((dk, dv), self.mean_grads, strict=True):
                grad += (mean_grad / self.block_lengths).repeat_interleave(self.size, 1)

    def columns(self, tile: Tile, part: slice) -> Tensor:
        """Token positions of some of the tile's columns; ``part`` starts and ends between blocks."""
        if isinstance(tile.keys, tuple):
            return self.positions[tile.keys[0] : tile.keys[1]][part]
        blocks = tile.keys[slice(*(None if x is None else x // self.size for x in (part.start, part.stop)))]
        return self.positions.view(-1, self.size).index_select(0, blocks).view(-1)


def _scores(qs: Tensor, kt: Tensor, keys: _Keys, tile: Tile, g: Geometry) -> Tensor:
    """Scaled, soft-capped scores ``[KV heads, rows of their query heads, keys]``; -inf where hidden."""
    n, columns, dim = kt.shape
    qt = qs[tile.q_heads, tile.rows].reshape(n, -1, dim)
    # beta=0 ignores what is in the buffer; alpha scales the product without a pass of its own.
    s = qt.new_empty((n, qt.shape[1], columns)).baddbmm_(qt, kt.transpose(1, 2), beta=0, alpha=g.scale)
    if g.softcap:
        s.div_(g.softcap).tanh_().mul_(g.softcap)
    by_row = s.view(-1, tile.rows.stop - tile.rows.start, columns)
    if tile.extra is not None:
        extra = by_row[..., columns - len(tile.extra) :].add_(tile.extra.bias)
        hidden = tile.extra.last > keys.hi[tile.rows]
        if keys.lo is not None:
            hidden = hidden | (tile.extra.first < keys.lo[tile.rows])
        extra.masked_fill_(hidden, -math.inf)
        by_row = by_row[..., : columns - len(tile.extra)]
    if tile.right is not None or tile.left is not None:
        if tile.right is not None:
            hidden = keys.columns(tile, slice(tile.right, None)) > keys.hi[tile.rows]
            by_row[..., tile.right :].masked_fill_(hidden, -math.inf)
        if tile.left is not None and keys.lo is not None:
            hidden = keys.columns(tile, slice(None, tile.left)) < keys.lo[tile.rows]
            by_row[..., : tile.left].masked_fill_(hidden, -math.inf)
    return s


def _cap_slope(s: Tensor, tile: Tile, softcap: float) -> Tensor:
    """Derivative of the soft cap, from the scores that ``_scores`` returned; -inf where those are hidden."""
    slope = s / softcap
    if tile.extra is not None:
        slope[..., s.shape[-1] - len(tile.extra) :] -= tile.extra.bias / softcap
    return slope.square_().neg_().add_(1)


def _kept_by_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """exp(lse - logaddexp(lse, sink)); 0 for a row without keys, even when the sink is -inf."""
    return torch.sigmoid(lse - sink).masked_fill_(lse == -math.inf, 0)


def _full_lse(q: Tensor, work: torch.dtype) -> Tensor:
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return torch.full(shape, -math.inf, dtype=work, device=q.device)


def _heads_first(t: Tensor, work: torch.dtype) -> Tensor:
    """``[S, H, D]`` to ``[H, S, D]`` in the working dtype; a view where it can be."""
    return t.transpose(0, 1).to(work)


def _whole_blocks(t: Tensor, size: int) -> Tensor:
    """``[H, S, D]`` contiguous, padded with zeros to a multiple of ``size`` rows."""
    heads, length, dim = t.shape
    padded = -(-length // size) * size
    if padded == length:
        return t.contiguous()
    out = t.new_zeros((heads, padded, dim))
    out[:, :length] = t
    return out
