"""Block-sparse attention in plain PyTorch: the definition of what is correct, on any device and in any float dtype.

Unselected blocks are really skipped: a tile of query rows gathers its listed KV blocks, does one small softmax over
them and is done, so work is proportional to the density and memory to the sequence length. Every tile is one row of
blocks of one mask head; the query heads that share its list are packed into the same matrix product and KV is never
repeated. The backward pass is written out (recomputed tile by tile), not derived by autograd through the loop.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.block_sparse.extra_keys import Extra, ExtraKeys
from sparseattn.ops.block_sparse.geometry import Geometry

# Rows of a tile when there is no mask to say, and scores a tile may hold before KV heads are taken one at a time. On a
# CPU a tile should stay in the cache; on a GPU larger ones hide the launches.
_DENSE_ROWS = 64
_TILE_SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, g: Geometry, gradients: str | None = None) -> str | None:
    """The reference takes everything that passes validation."""
    return None


class _Tile(NamedTuple):
    """One matrix product: the rows of some heads against the keys they share.

    Attributes:
        kv_heads: ``[first, last)`` KV heads, each with its own keys.
        q_heads: The query heads that read them.
        rows: ``[first, last)`` query rows, counted in the sequence.
        keys: Token range ``(first, last)`` when the listed blocks are adjacent, else int32 block numbers.
        right: Column from which some row must not see a key, or None.
        left: Column up to which some row must not see a key, or None.
        extra: Columns and means of skipped blocks, behind the keys of the listed blocks; or None.
    """

    kv_heads: slice
    q_heads: slice
    rows: slice
    keys: tuple[int, int] | Tensor
    right: int | None
    left: int | None
    extra: Extra | None


class _Sequence:
    """One sequence of the batch: where its rows are and which tiles it consists of."""

    def __init__(self, g: Geometry, index: int, bounds: tuple[int, int, int, int], heads: tuple[int, int]) -> None:
        q0, q1, k0, k1 = bounds
        self.g = g
        self.index = index
        self.q_rows = (slice(q0, q1),) if g.packed else (index, slice(q0, q1))
        self.k_rows = (slice(k0, k1),) if g.packed else (index, slice(k0, k1))
        self.lse_rows = (slice(None), slice(q0, q1)) if g.packed else (index, slice(None), slice(q0, q1))
        self.len_q, self.len_k = q1 - q0, k1 - k0
        self.heads_q, self.heads_k = heads
        offset = self.len_k - self.len_q
        # Row i sees keys lo(i) .. hi(i), both rising with i.
        right = 0 if g.causal else g.window_right
        self.shift_hi = None if right < 0 and not g.causal else offset + right
        self.shift_lo = None if g.window_left < 0 else offset - g.window_left

    def hi(self, row: int) -> int:
        return self.len_k - 1 if self.shift_hi is None else min(self.len_k - 1, row + self.shift_hi)

    def lo(self, row: int) -> int:
        return 0 if self.shift_lo is None else max(0, row + self.shift_lo)

    def tiles(self, lists: _Lists | None, budget: int) -> Iterator[_Tile]:
        """All tiles that see at least one key, in a fixed order."""
        group = self.heads_q // self.heads_k
        mask_heads = 1 if lists is None else lists.heads
        step = _DENSE_ROWS if lists is None else self.g.block_q
        for head in range(mask_heads):
            table = None if lists is None else lists.rows(self.index, head)
            extra_rows = None if lists is None or lists.extra is None else lists.extra.rows(self.index, head)
            if mask_heads == 1:
                kv_heads, per_kv = range(self.heads_k), group
            else:
                per_kv = self.heads_q // mask_heads if mask_heads == self.heads_k else 1
                kv_heads = range(head * per_kv // group, head * per_kv // group + 1)
            for m, r0 in enumerate(range(0, self.len_q, step)):
                r1 = min(r0 + step, self.len_q)
                low, high = self.lo(r0), self.hi(r1 - 1)
                if low > high:
                    continue
                keys, columns, right, left = self._span(r0, r1) if table is None else self._listed(r0, r1, table, m)
                extra = None
                if lists is not None and lists.extra is not None and table is not None:
                    extra = lists.extra.of_tile(
                        extra_rows, m, table.blocks[m][: table.counts[m]], low, high, self.len_k
                    )
                    columns += len(extra)
                if columns == 0:
                    continue
                shared = len(kv_heads) * per_kv * (r1 - r0) * columns <= budget
                for first in kv_heads[:1] if shared else kv_heads:
                    count = len(kv_heads) if shared else 1
                    h0 = first * group if mask_heads == 1 else head * per_kv
                    yield _Tile(
                        slice(first, first + count),
                        slice(h0, h0 + count * per_kv),
                        slice(r0, r1),
                        keys,
                        right,
                        left,
                        extra,
                    )

    def _span(self, r0: int, r1: int) -> tuple[tuple[int, int], int, int | None, int | None]:
        """Keys of rows ``r0..r1`` of dense attention: one token range."""
        first, last = self.lo(r0), self.hi(r1 - 1) + 1
        right = max(0, self.hi(r0) + 1 - first)
        left = min(self.lo(r1 - 1), last) - first
        columns = last - first
        return (first, last), columns, right if right < columns else None, left if left > 0 else None

    def _listed(
        self, r0: int, r1: int, table: _Rows, m: int
    ) -> tuple[tuple[int, int] | Tensor, int, int | None, int | None]:
        """Keys of a row of blocks: its list, less the blocks that no row of it can see."""
        size = self.g.block_kv
        blocks = table.blocks[m][: table.counts[m]]
        a = bisect_left(blocks, self.lo(r0) // size)
        c = bisect_right(blocks, self.hi(r1 - 1) // size)
        if a >= c:
            return (0, 0), 0, None, None
        # Blocks up to `full` lie below every row's last visible key; those from `seen` on above every row's first.
        full = bisect_left(blocks, (self.hi(r0) + 1) // size, a, c)
        seen = bisect_left(blocks, -(-self.lo(r1 - 1) // size), a, c)
        keys: tuple[int, int] | Tensor
        if blocks[c - 1] - blocks[a] == c - 1 - a:
            keys = (blocks[a] * size, (blocks[c - 1] + 1) * size)
        else:
            keys = table.numbers[m, a:c]
        columns = (c - a) * size
        return keys, columns, (full - a) * size if full < c else None, (seen - a) * size if seen > a else None


class _Rows(NamedTuple):
    """Block lists of one mask head: on the host to plan with, on the device to gather with."""

    counts: list[int]
    blocks: list[list[int]]
    numbers: Tensor


class _Lists:
    """The mask's lists, brought to the host one head at a time."""

    def __init__(self, counts: Tensor, indices: Tensor, extra: ExtraKeys | None) -> None:
        self.extra = extra
        self.shared = counts.shape[0] == 1
        self.heads = counts.shape[1]
        self.counts = counts.cpu()
        width = int(self.counts.max()) if self.counts.numel() else 0
        self.indices = indices[..., :width]

    def rows(self, index: int, head: int) -> _Rows:
        b = 0 if self.shared else index
        indices = self.indices[b, head]
        return _Rows(self.counts[b, head].tolist(), indices.tolist(), indices)


def _lists(g: Geometry, work: torch.dtype, device: torch.device) -> _Lists | None:
    """The mask of a call, or None for dense attention."""
    if g.kv_num_blocks is None or g.kv_indices is None:
        return None
    extra = None
    if g.column_indices is not None or g.mean_correction:
        extra = ExtraKeys(g.column_indices, g.mean_correction, g.block_kv, work, device)
    return _Lists(g.kv_num_blocks, g.kv_indices, extra)


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, g: Geometry) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks.

    Returns:
        ``o`` like q with v's head dim, and the natural-log LSE ``[B, Hq, Sq]`` (packed ``[Hq, total]``) of the scaled,
        soft-capped scores without the sink; float32, or float64 for float64 inputs.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = _full_lse(q, work)
    lists = _lists(g, work, q.device)
    sink = None if sinks is None else sinks.to(work)[:, None]
    for seq in _sequences(q, k, g):
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
    lists = _lists(g, work, q.device)
    sink = None if sinks is None else sinks.to(work)[:, None]
    dsink = None if sinks is None else torch.zeros_like(sinks, dtype=work)
    for seq in _sequences(q, k, g):
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

    def __init__(self, k: Tensor, v: Tensor, seq: _Sequence, work: torch.dtype, dense: bool) -> None:
        self.size = 1 if dense else seq.g.block_kv
        # Dense attention reads every key once a tile: a strided view is as good as a copy there.
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

    def gather(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """``[KV heads of the tile, its keys, head dim]`` of K and V; extra keys last."""
        return self._gather(0, self.k, tile), self._gather(1, self.v, tile)

    def _gather(self, which: int, t: Tensor, tile: _Tile) -> Tensor:
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

    def add(self, which: int, grad: Tensor, tile: _Tile, value: Tensor) -> None:
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

    def columns(self, tile: _Tile, part: slice) -> Tensor:
        """Token positions of some of the tile's columns; ``part`` starts and ends between blocks."""
        if isinstance(tile.keys, tuple):
            return self.positions[tile.keys[0] : tile.keys[1]][part]
        blocks = tile.keys[slice(*(None if x is None else x // self.size for x in (part.start, part.stop)))]
        return self.positions.view(-1, self.size).index_select(0, blocks).view(-1)


def _scores(qs: Tensor, kt: Tensor, keys: _Keys, tile: _Tile, g: Geometry) -> Tensor:
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


def _cap_slope(s: Tensor, tile: _Tile, softcap: float) -> Tensor:
    """Derivative of the soft cap, from the scores that ``_scores`` returned; -inf where those are hidden."""
    slope = s / softcap
    if tile.extra is not None:
        slope[..., s.shape[-1] - len(tile.extra) :] -= tile.extra.bias / softcap
    return slope.square_().neg_().add_(1)


def _kept_by_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """exp(lse - logaddexp(lse, sink)); 0 for a row without keys, even when the sink is -inf."""
    return torch.sigmoid(lse - sink).masked_fill_(lse == -math.inf, 0)


def _sequences(q: Tensor, k: Tensor, g: Geometry) -> Iterator[_Sequence]:
    """The non-empty sequences of a call; checks the ranges, which only the host can."""
    axis = 0 if g.packed else 1
    columns = [
        [whole] * g.batch if t is None else t.tolist()
        for t, whole in ((g.q_start, 0), (g.q_end, g.max_q), (g.k_start, 0), (g.k_end, g.max_k))
    ]
    for index, (q0, q1, k0, k1) in enumerate(zip(*columns, strict=True)):
        for name, t, start, end, longest in (("q", q, q0, q1, g.max_q), ("k", k, k0, k1, g.max_k)):
            what = f"cu_seqlens_{name}" if g.packed else f"ranges_{name}"
            if not 0 <= start <= end <= t.shape[axis]:
                raise argument_error(what, f"rows within 0..{t.shape[axis]}, ascending", f"[{start}, {end})")
            if end - start > longest:
                raise argument_error(f"max_seqlen_{name}", f"at least {end - start}, the longest sequence", longest)
        if q1 > q0 and k1 > k0:
            yield _Sequence(g, index, (q0, q1, k0, k1), (q.shape[-2], k.shape[-2]))


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
