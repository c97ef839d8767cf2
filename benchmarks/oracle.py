"""The correctness gate: attention over selected blocks on sampled rows and columns, in float64 and as eager would.

A benchmark may run at lengths where no whole oracle fits, but any one row of the output, and any one column of dK and
dV, depends on little: both are computed here for a sample, exactly (float64) and as plain eager code would in the
benchmark's dtype, whose error sets the tolerance (DESIGN section 4: at most twice eager's).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Row
from sparseattn.testing.tolerance import assert_close_to_oracle


class Selected(NamedTuple):
    """Which blocks a call attends, causally masked inside.

    Attributes:
        blocks: bool [1, H or 1, MB, NB], or None for dense causal attention.
        block_size: Tokens of a block, (queries, keys).
    """

    blocks: Tensor | None
    block_size: tuple[int, int]

    def visible(self, rows: Tensor, cols: Tensor, heads: int) -> Tensor:
        """Whether query ``rows`` [R] see keys ``cols`` [C]: bool [Hq or 1, R, C]."""
        seen = (cols[None, :] <= rows[:, None])[None]
        if self.blocks is None:
            return seen
        blocks = self.blocks[0][:, rows // self.block_size[0]][:, :, cols // self.block_size[1]]
        return blocks.repeat_interleave(heads // blocks.shape[0], 0) & seen


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
    """Output [R, Hq, D] and natural-log LSE [Hq, R] of the given rows of a batch of one.

    Args:
        q: ``[1, N, Hq, D]``.
        k: ``[1, N, Hkv, D]``.
        v: Like ``k``.
        selected: Which blocks are attended.
        rows: int64 [R], ascending.
        dtype: float64 for the exact result, the inputs' dtype for what eager code would give.
    """
    end = int(rows[-1]) + 1
    cols = torch.arange(end, device=q.device)
    s = _scores(q[0, rows], k[0, :end], dtype)
    s.masked_fill_(~selected.visible(rows, cols, q.shape[2]), -math.inf)
    lse = s.logsumexp(-1)
    p = s.sub_(lse[:, :, None]).exp_()
    return _times(p, v[0, :end], dtype), lse


def gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, selected: Selected, rows: Tensor, cols: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq`` [R, Hq, D] of the given rows, and ``dk``, ``dv`` [C, Hkv, D] of the given key columns."""
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

    last = int(rows[-1]) + 1
    dq = _times(probabilities(rows, everything[:last])[1], k[0, :last], dtype)

    def transposed(p: Tensor, x: Tensor) -> Tensor:  # [Hq, N, C] and [N, Hq, D] -> [C, Hkv, D], summed over the group
        p = p.to(dtype).reshape(kv_heads, -1, p.shape[2])
        x = x.to(dtype).transpose(0, 1).reshape(kv_heads, -1, x.shape[2])
        return (p.transpose(1, 2) @ x).transpose(0, 1)

    p, ds = probabilities(everything, cols)
    return dq, transposed(ds, q[0]), transposed(p, do[0])


def gate(names: tuple[str, ...], got: tuple[Tensor, ...], exact: tuple[Tensor, ...], eager: tuple[Tensor, ...]) -> Row:
    """Apply the tolerance rule to each tensor.

    Returns:
        ``{"gate": {name: [error, eager's error]}}``, the largest absolute ones, for the row.

    Raises:
        AssertionError: The rule is broken.
    """
    table = {}
    for name, g, x, e in zip(names, got, exact, eager, strict=True):
        assert_close_to_oracle(g, x, e.to(g.dtype), name)
        table[name] = [float(f"{(t.double() - x).abs().max().item():.3g}") for t in (g, e)]
    return {"gate": table}
