"""Inputs for tests and benchmarks of attention operators, and an oracle that shares no code with them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.masks.columns import scatter_columns


class QKV(NamedTuple):
    """Queries, keys and values."""

    q: Tensor
    k: Tensor
    v: Tensor

    def to(self, dtype: torch.dtype) -> QKV:
        return QKV(*(t.to(dtype) for t in self))

    def requires_grad_(self) -> QKV:
        for t in self:
            t.requires_grad_()
        return self


def make_qkv(
    batch: int,
    seq_q: int,
    seq_k: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "bshd",
    seed: int = 0,
    on_device: bool = False,
) -> QKV:
    """Standard normal q ``[B, Sq, Hq, D]``, k ``[B, Sk, Hkv, D]`` and v ``[B, Sk, Hkv, Dv]``.

    Args:
        batch: B.
        seq_q: Sq.
        seq_k: Sk.
        heads_q: Hq.
        heads_k: Hkv.
        head_dim: D.
        head_dim_v: Dv; default D.
        dtype: What the numbers are rounded to.
        device: Where they go.
        layout: Strides: "bshd" contiguous; "bhsd" views of contiguous ``[B, H, S, D]``; "wide" views of rows twice as
            long, as slices of a fused projection are.
        seed: Of the generator.
        on_device: Draw where the numbers go, which is fast at any length. By default they are drawn on the CPU, so
            that every device gets the same ones.
    """
    generator = torch.Generator(device if on_device else "cpu").manual_seed(seed)

    def draw(seq: int, heads: int, dim: int) -> Tensor:
        shape = (batch, seq, heads, dim)
        t = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device).to(device, dtype)
        if layout == "bhsd":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "wide":
            return torch.cat([t, t], dim=-1)[..., :dim]
        if layout != "bshd":
            raise argument_error("layout", "'bshd', 'bhsd' or 'wide'", repr(layout))
        return t

    dim_v = head_dim if head_dim_v is None else head_dim_v
    return QKV(
        draw(seq_q, heads_q, head_dim),
        draw(seq_k, heads_k, head_dim),
        draw(seq_k, heads_k, dim_v),
    )


def random_blocks(
    seq_lens: tuple[int, int],
    block_size: tuple[int, int],
    heads: int,
    batch: int = 1,
    *,
    density: float = 0.5,
    diagonal: bool = False,
    hidden: bool = True,
    empty_rows: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Every block with the same probability, independently: bool [batch, heads, MB, NB].

    Args:
        seq_lens: ``(Sq, Sk)``.
        block_size: ``(block_q, block_kv)``.
        heads: Mask heads.
        batch: Mask batch.
        density: Probability of a block.
        diagonal: Also list the blocks that a row's own (bottom-right aligned) keys lie in, so no row is empty.
        hidden: List blocks wholly above the diagonal like others; False leaves them out.
        empty_rows: Share of the rows of blocks that list nothing at all.
        device: Where the result goes; it is drawn on the CPU, so that every device gets the same.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    (sq, sk), (bq, bk) = seq_lens, block_size
    mb, nb = -(-sq // bq), -(-sk // bk)
    blocks = torch.rand((batch, heads, mb, nb), generator=generator) < density
    first = torch.arange(mb)[:, None] * bq + sk - sq
    col = torch.arange(nb)[None, :] * bk
    below = col < (first + bq).clamp(max=sk)
    if diagonal:
        blocks |= below & (col + bk > first)
    if not hidden:
        blocks &= below
    blocks &= torch.rand((batch, heads, mb, 1), generator=generator) >= empty_rows
    return blocks.to(device)


def random_block_mask(
    seq_lens: tuple[int, int],
    block_size: tuple[int, int],
    heads: int,
    batch: int = 1,
    *,
    density: float = 0.5,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    diagonal: bool = False,
    hidden: bool = True,
    empty_rows: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockMask:
    """A mask over ``random_blocks``, which says what the other arguments are.

    Blocks above the diagonal of a causal mask are listed like others unless ``hidden`` is False: an operator must not
    count on their absence.

    Args:
        seq_lens: As ``random_blocks``.
        block_size: Likewise.
        heads: Likewise.
        batch: Likewise.
        density: Likewise.
        causal: Make the mask causal.
        window: Of the mask.
        diagonal: As ``random_blocks``.
        hidden: Likewise.
        empty_rows: Likewise.
        device: Likewise.
        seed: Likewise.
    """
    blocks = random_blocks(
        seq_lens, block_size, heads, batch, density=density, diagonal=diagonal, hidden=hidden, empty_rows=empty_rows,
        device=device, seed=seed,
    )  # fmt: skip
    return BlockMask.from_blocks(blocks, block_size=block_size, seq_lens=seq_lens, causal=causal, window=window)


def poison_unselected(k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Copies of k and v with NaN in every key whose block, and which itself as a column, no query of its head selects.

    An operator that so much as multiplies an unselected block by zero returns NaN.

    Args:
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, Dv]``.
        mask: A mask for whole rows (not ragged) of 1, Hkv or Hq heads.
    """
    if mask.ragged:
        raise argument_error("mask", "a mask for whole rows", "a ragged one")
    batch, sk, heads_k, _ = k.shape
    tokens = mask.to_blocks().any(dim=2).repeat_interleave(mask.block_size[1], dim=2)[..., :sk]  # [B|1, H, Sk]
    if mask.column_indices is not None:
        tokens = tokens | scatter_columns(mask.column_indices.flatten(2), sk)
    if mask.heads > heads_k:
        tokens = tokens.unflatten(1, (heads_k, -1)).any(dim=2)
    poison = ~tokens.expand(batch, heads_k, sk).transpose(1, 2)[..., None]
    return k.masked_fill(poison, math.nan), v.masked_fill(poison, math.nan)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention by the book, with an explicit boolean mask, in the dtype of its inputs.

    In float64 it is the oracle; in a low dtype it is *eager*: products in that dtype, softmax in float32, weights
    rounded back, as in models' eager attention. Memory grows with Sq * Sk. Differentiable; rows that may see nothing
    get output 0, LSE -inf and gradient 0.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k: ``[B, Sk, Hkv, D]``; repeated for the query heads it serves.
        v: ``[B, Sk, Hkv, Dv]``.
        allowed: bool, broadcastable to ``[B, H, Sq, Sk]`` with H of 1, Hkv or Hq heads: which keys a query may see.
        scale: Default ``1 / sqrt(D)``.
        softcap: ``softcap * tanh(score / softcap)``.
        sinks: ``[Hq]`` logits in the denominator only.

    Returns:
        ``o`` ``[B, Sq, Hq, Dv]`` and the natural-log LSE ``[B, Hq, Sq]`` without the sink (float32, or float64).
    """
    group = q.shape[2] // k.shape[2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    qt, kt, vt = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    if allowed.shape[1] not in (1, q.shape[2]):
        allowed = allowed.repeat_interleave(group, dim=1)
    scores = (qt @ kt.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(work).masked_fill(~allowed, -math.inf)
    # Where a row sees nothing, take the softmax of zeros and drop it: -inf alone would give NaN gradients.
    empty = ~allowed.any(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    safe = scores.masked_fill(empty, 0.0)
    lse = safe.logsumexp(-1)
    joined = lse if sinks is None else torch.logaddexp(lse, sinks.to(work)[:, None])
    p = torch.exp(safe - joined[..., None]).masked_fill(empty, 0.0)
    o = (p.to(q.dtype) @ vt).transpose(1, 2)
    return o, lse.masked_fill(empty[..., 0], -math.inf)
