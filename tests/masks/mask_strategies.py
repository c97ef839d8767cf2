"""Random masks for hypothesis, and the definition of what a mask shows, written as plainly as possible."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseattn.masks import BlockMask

quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

sizes = st.sampled_from([16, 32, 48, 64, 128])
lengths = st.integers(0, 200)
bounds = st.one_of(st.none(), st.integers(0, 150))


@st.composite
def frames(draw: st.DrawFn, ragged: bool = True) -> dict:
    """Everything of a mask but its blocks, as keyword arguments of ``from_blocks``."""
    sq, sk = draw(lengths), draw(lengths)
    frame: dict = {
        "seq_lens": (sq, sk),
        "block_size": (draw(sizes), draw(sizes)),
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(bounds, bounds))),
    }
    if ragged and draw(st.booleans()):
        batch = draw(st.integers(1, 3))
        for name, longest in (("seqused_q", sq), ("seqused_k", sk)):
            if draw(st.booleans()):
                used = draw(st.lists(st.integers(0, longest), min_size=batch, max_size=batch))
                frame[name] = torch.tensor(used, dtype=torch.int32)
    return frame


def grid(frame: dict) -> tuple[int, int]:
    """``(MB, NB)``."""
    mb, nb = (-(-n // size) for n, size in zip(frame["seq_lens"], frame["block_size"], strict=True))
    return mb, nb


def batch_of(frame: dict) -> int:
    used = frame.get("seqused_q", frame.get("seqused_k"))
    return 1 if used is None else used.shape[0]


@st.composite
def blocks_for(draw: st.DrawFn, frame: dict, heads: int | None = None) -> Tensor:
    """Random blocks that fit ``frame``, with rows from empty to full."""
    ragged = "seqused_q" in frame or "seqused_k" in frame
    batch = draw(st.sampled_from([1, batch_of(frame) if ragged else 2]))
    heads = draw(st.integers(1, 3)) if heads is None else heads
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    chance = torch.rand(batch, heads, grid(frame)[0], 1, generator=generator) * 1.6 - 0.3
    return torch.rand(batch, heads, *grid(frame), generator=generator) < chance


@st.composite
def masks(draw: st.DrawFn, ragged: bool = True) -> BlockMask:
    frame = draw(frames(ragged))
    return BlockMask.from_blocks(draw(blocks_for(frame)), **frame)


@st.composite
def columns_for(draw: st.DrawFn, blocks: Tensor, frame: dict) -> Tensor:
    """Random int32 ``[B, H, MB, C]`` columns for masks over ``blocks``: unsorted, repeated, padded, also in blocks."""
    sk = frame["seq_lens"][1]
    width = draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return torch.randint(-3, sk + 3, (*blocks.shape[:3], width), generator=generator, dtype=torch.int32)


@st.composite
def masks_with_columns(draw: st.DrawFn, ragged: bool = True) -> BlockMask:
    frame = draw(frames(ragged))
    blocks = draw(blocks_for(frame))
    return BlockMask.from_blocks(blocks, **frame).with_columns(draw(columns_for(blocks, frame)), sort=True)


def repeat_columns(columns: Tensor, frame: dict) -> Tensor:
    """bool ``[B, H, Sq, Sk]``: the columns of every row as tokens, by a loop."""
    (sq, sk), block_q = frame["seq_lens"], frame["block_size"][0]
    out = torch.zeros(*columns.shape[:2], sq, sk, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in out.shape[:3])).tolist():
        for j in columns[b, h, i // block_q].tolist():
            if 0 <= j < sk:
                out[b, h, i, j] = True
    return out


def visible_tokens(frame: dict) -> Tensor:
    """bool ``[B|1, 1, Sq, Sk]``: the contract of causality, window and true lengths, sequence by sequence."""
    sq, sk = frame["seq_lens"]
    shown = []
    for b in range(batch_of(frame)):
        nq = sq if frame.get("seqused_q") is None else int(frame["seqused_q"][b])
        nk = sk if frame.get("seqused_k") is None else int(frame["seqused_k"][b])
        i, j = torch.arange(sq)[:, None], torch.arange(sk)[None, :]
        diagonal = i + nk - nq
        visible = (i < nq) & (j < nk)
        if frame["causal"]:
            visible &= j <= diagonal
        left, right = frame["window"] or (None, None)
        if left is not None:
            visible &= j >= diagonal - left
        if right is not None:
            visible &= j <= diagonal + right
        shown.append(visible)
    return torch.stack(shown)[:, None]


def repeat_blocks(blocks: Tensor, frame: dict) -> Tensor:
    """bool ``[B|1, H, Sq, Sk]``: every block as tokens."""
    (bq, bk), (sq, sk) = frame["block_size"], frame["seq_lens"]
    return blocks.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :sq, :sk]


def any_block(tokens: Tensor, frame: dict) -> Tensor:
    """bool ``[B, H, MB, NB]``: blocks with a True token, by a loop."""
    (bq, bk), (mb, nb) = frame["block_size"], grid(frame)
    out = torch.zeros(*tokens.shape[:2], mb, nb, dtype=torch.bool)
    for m in range(mb):
        for n in range(nb):
            out[:, :, m, n] = tokens[:, :, m * bq : (m + 1) * bq, n * bk : (n + 1) * bk].flatten(2).any(-1)
    return out


def all_block(tokens: Tensor, frame: dict) -> Tensor:
    """bool ``[B, H, MB, NB]``: whole blocks (none of it past an end) of which every token is True, by a loop."""
    (bq, bk), (mb, nb) = frame["block_size"], grid(frame)
    out = torch.zeros(*tokens.shape[:2], mb, nb, dtype=torch.bool)
    for m in range(mb):
        for n in range(nb):
            tile = tokens[:, :, m * bq : (m + 1) * bq, n * bk : (n + 1) * bk].flatten(2)
            out[:, :, m, n] = tile.all(-1) & (tile.shape[-1] == bq * bk)
    return out
