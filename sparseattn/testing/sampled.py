"""A correctness gate for lengths where no whole oracle fits: a sample of rows and columns, in float64 and as eager.

Any one row of the output, and any one column of dK and dV, depends on little. Both are computed here for a sample,
exactly (float64) and as plain eager code would in the dtype under test, whose error sets the tolerance (see
``sparseattn.testing.tolerance``: at most twice eager's). Batches of one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.masks import BlockMask
from sparseattn.masks.columns import scatter_columns
from sparseattn.testing.tolerance import assert_close_to_oracle


class Selected(NamedTuple):
    """Which keys a call attends.

    Attributes:
        blocks: bool [1, H, MB, NB] with 1, Hkv or Hq heads; None for dense attention.
        block_size: Tokens of a block, (queries, keys); the last one of a row or column may have fewer or more.
        causal: Whether query i sees key j only if ``j <= i + offset``.
        offset: ``Sk - Sq``.
        columns: int32 [1, H, MB, C], single keys beside the blocks of as many heads, -1 where a row has fewer; or None.
    """

    blocks: Tensor | None
    block_size: tuple[int, int] = (1, 1)
    causal: bool = True
    offset: int = 0
    columns: Tensor | None = None

    @classmethod
    def of(cls, mask: BlockMask) -> Selected:
        """What a mask of whole rows and without a window selects."""
        assert mask.window is None
        assert not mask.ragged
        sq, sk = mask.seq_lens
        return cls(mask.to_blocks(), mask.block_size, bool(mask.causal), sk - sq, mask.column_indices)

    def visible(self, rows: Tensor, cols: Tensor, heads: int) -> Tensor:
        """Whether query ``rows`` [R] see keys ``cols`` [C]: bool [Hq or 1, R, C]."""
        if self.causal:
            seen = (cols[None, :] <= rows[:, None] + self.offset)[None]
        else:
            seen = torch.ones((1, rows.shape[0], cols.shape[0]), dtype=torch.bool, device=rows.device)
        if self.blocks is None:
            return seen
        (mb, nb), (block_q, block_kv) = self.blocks.shape[2:], self.block_size
        of_rows = (rows // block_q).clamp(max=mb - 1)
        listed = self.blocks[0][:, of_rows][:, :, (cols // block_kv).clamp(max=nb - 1)]
        if self.columns is not None:
            single = self.columns[0][:, of_rows]
            keys = int(cols.max()) + 1 if len(cols) else 0
            listed |= scatter_columns(single.masked_fill(single >= keys, -1), keys)[:, :, cols]
        return listed.repeat_interleave(heads // listed.shape[0], 0) & seen

    def end(self, rows: Tensor, keys: int) -> int:
        """One past the last key that any of the ascending ``rows`` sees."""
        return max(0, min(keys, int(rows[-1]) + 1 + self.offset)) if self.causal else keys


def sample(n: int, count: int, device: torch.device, seed: int = 0) -> Tensor:
    """``count`` of ``n`` rows, ascending, the first and the last among them."""
    generator = torch.Generator(device=device).manual_seed(seed)
    picked = torch.randperm(n, device=device, generator=generator)[: max(0, count - 2)]
    return torch.unique(torch.cat((picked, torch.tensor([0, n - 1], device=device))))


def _scores(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled scores [Hq, R, C] of ``q`` [R, Hq, D] and ``k`` [C, Hkv, D], GQA by grouping, the matmul in ``dtype``."""
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q.to(dtype).transpose(0, 1).reshape(kv_heads, -1, q.shape[2])
    s = grouped @ k.to(dtype).permute(1, 2, 0)
    s = s.reshape(heads, q.shape[0], k.shape[0])
    return (s if dtype == torch.float64 else s.float()) / math.sqrt(q.shape[2])


def _times(p: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``p`` [Hq, R, C] times per-KV-head ``x`` [C, Hkv, D]: [R, Hq, D], the matmul in ``dtype``."""
    heads, kv_heads = p.shape[0], x.shape[1]
    out = p.to(dtype).reshape(kv_heads, -1, p.shape[2]) @ x.to(dtype).transpose(0, 1)
    return out.reshape(heads, p.shape[1], x.shape[2]).transpose(0, 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, selected: Selected, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output [R, Hq, Dv] and natural-log LSE [Hq, R] of the given rows of a batch of one.

    Args:
        q: ``[1, Sq, Hq, D]``.
        k: ``[1, Sk, Hkv, D]``.
        v: ``[1, Sk, Hkv, Dv]``.
        selected: Which blocks are attended.
        rows: int64 [R], ascending.
        dtype: float64 for the exact result, the inputs' dtype for what eager code would give.
    """
    end = selected.end(rows, k.shape[1])
    cols = torch.arange(end, device=q.device)
    s = _scores(q[0, rows], k[0, :end], dtype)
    s.masked_fill_(~selected.visible(rows, cols, q.shape[2]), -math.inf)
    lse = s.logsumexp(-1)
    # A row that sees nothing has probabilities 0, not the NaN of inf - inf.
    p = s.sub_(lse.masked_fill(lse == -math.inf, 0.0)[:, :, None]).exp_()
    return _times(p, v[0, :end], dtype), lse


def gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, selected: Selected, rows: Tensor, cols: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq`` [R, Hq, D] of the given rows, ``dk`` [C, Hkv, D] and ``dv`` [C, Hkv, Dv] of the given key columns."""
    n, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    everything = torch.arange(n, device=q.device)
    lse = torch.empty((heads, n), dtype=wide, device=q.device)
    delta = torch.empty_like(lse)
    for chunk in everything.split(256):
        o, lse[:, chunk] = attend(q, k, v, selected, chunk, dtype)
        delta[:, chunk] = (o.to(wide) * do[0, chunk].to(wide)).sum(-1).T

    def probabilities(r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        p = (_scores(q[0, r], k[0, c], dtype) - lse[:, r, None]).exp()
        p = p.masked_fill(~selected.visible(r, c, heads), 0)
        dp = _scores(do[0, r], v[0, c], dtype) * math.sqrt(do.shape[3])
        return p, p * (dp - delta[:, r, None]) / math.sqrt(q.shape[3])

    last = selected.end(rows, k.shape[1])
    dq = _times(probabilities(rows, torch.arange(last, device=q.device))[1], k[0, :last], dtype)

    def transposed(p: Tensor, x: Tensor) -> Tensor:  # [Hq, N, C] and [N, Hq, D] -> [C, Hkv, D], summed over the group
        p = p.to(dtype).reshape(kv_heads, -1, p.shape[2])
        x = x.to(dtype).transpose(0, 1).reshape(kv_heads, -1, x.shape[2])
        return (p.transpose(1, 2) @ x).transpose(0, 1)

    p, ds = probabilities(everything, cols)
    return dq, transposed(ds, q[0]), transposed(p, do[0])


def gate(
    names: tuple[str, ...], got: tuple[Tensor, ...], exact: tuple[Tensor, ...], eager: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Apply the tolerance rule to each tensor.

    Returns:
        ``{"gate": {name: [error, eager's error]}}``, the largest absolute ones.

    Raises:
        AssertionError: The rule is broken.
    """
    table = {}
    for name, g, x, e in zip(names, got, exact, eager, strict=True):
        assert_close_to_oracle(g, x, e.to(g.dtype), name)
        table[name] = [float(f"{(t.double() - x).abs().max().item():.3g}") for t in (g, e)]
    return {"gate": table}
