"""Patterns of blocks of any size, and dense attention over the tokens that they keep.

The oracle never sees a list: it works on one boolean matrix of tokens a head, or, for positions along the lists, on
each row of blocks by itself. Keys and values that no head of a group lists hold NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from paged_cases import rotate
from torch import Tensor

from sparseattn.ops.paged import ALiBi, CustomMask, RoPE, segment_packbits


@dataclass(frozen=True)
class Case:
    """Lengths, blocks and options of a call."""

    id: str
    block: tuple[int, int] = (3, 7)
    lengths: tuple[int, int] = (20, 45)
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    batch: int = 0  # 0: tensors without a batch dimension
    pattern: str = "one"  # or "kv", "q": as many heads; "batch": for every sequence its own
    density: float = 0.4
    form: str = "csr"  # or "lists"
    mask: str = ""  # "blocks", "bool", "little", "big"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    positions: str = ""
    scales: bool = False
    cached: torch.dtype | None = None
    gathered: bool = False

    def __str__(self) -> str:
        return self.id


@dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    arguments: tuple[Tensor, Tensor, tuple[int, int]]
    kwargs: dict[str, Any]
    tokens: Tensor  # bool [B, Hq, M, N], listed and kept inside the blocks
    lists: list[list[int]]  # block numbers of every row, as listed, of the first pattern
    case: Case


def build(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    (rows, columns), (m, n), (heads, heads_k) = case.block, case.lengths, case.heads
    batch, dim, dim_v = case.batch or 1, *case.dims
    mb, nb = -(-m // rows), -(-n // columns)
    own = {"one": 1, "kv": heads_k, "q": heads, "batch": heads_k}[case.pattern]
    lead = (batch if case.pattern == "batch" else 1, own)
    blocks = torch.rand(*lead, mb, nb, generator=g) < case.density
    if mb > 2:
        blocks[:, :, mb // 2] = False  # a row that sees nothing
    blocks[..., 0, 0] = case.density > 0
    # Blocks of a row in any order.
    order = [[torch.randperm(nb, generator=g) for _ in range(mb)] for _ in range(lead[0] * own)]
    flat = blocks.view(-1, mb, nb)
    listed = [[o[flat[h, i][o]].tolist() for i, o in enumerate(row)] for h, row in enumerate(order)]
    lists = [row for head in listed for row in head]
    counts = torch.tensor([len(row) for row in lists])
    if case.form == "csr":
        ends = counts.cumsum(0).view(*lead, mb)
        starts = torch.cat([ends.view(-1).new_zeros(1), ends.view(-1)[:-1]]).view(*lead, mb)
        indptr = torch.cat([starts[..., :1], ends], -1).int()
        indptr = indptr[0, 0] if lead == (1, 1) else indptr[0] if lead[0] == 1 else indptr
        indices = torch.tensor([j for row in lists for j in row], dtype=torch.int32)
    else:
        indptr = counts.view(*lead, mb).int()
        indices = torch.full((len(lists), nb + 1), 10**9, dtype=torch.int32)
        for i, row in enumerate(lists):
            indices[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        indices = indices.view(*lead, mb, nb + 1)

    tokens = blocks.repeat_interleave(rows, 2)[:, :, :m].repeat_interleave(columns, 3)[..., :n]
    kwargs: dict[str, Any] = {
        "causal": case.causal, "window": case.window, "scale": case.scale, "softcap": case.softcap,
        "gathered": case.gathered,
    }  # fmt: skip
    if case.mask:
        kept = torch.rand(len(indices), rows, columns, generator=g) < 0.6
        kwargs["block_mask"] = _converted(case.mask, kept, lists, device)
        tokens = tokens.clone()
        at = 0
        for i, row in enumerate(lists):
            top = i % mb * rows
            for j in row:
                inside = tokens[0, i // mb, top : top + rows, j * columns : (j + 1) * columns]
                inside &= kept[at, : inside.shape[0], : inside.shape[1]]
                at += 1
    tokens = tokens.expand(batch, -1, -1, -1).repeat_interleave(heads // own, 1)

    cached = case.cached or dtype

    def draw(length: int, heads: int, dim: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(batch, length, heads, dim, generator=g).to(dtype)

    q, k, v = draw(m, heads, dim), draw(n, heads_k, dim, cached), draw(n, heads_k, dim_v, cached)
    chosen = tokens.view(batch, heads_k, -1, m, n).any(2).any(2).transpose(1, 2)  # [B, N, Hkv]
    if not case.mask and case.cached is None:
        k[~chosen] = v[~chosen] = math.nan
    if case.sinks:
        kwargs["sinks"] = torch.linspace(-1, 1, heads, device=device)
    if case.positions == "alibi":
        kwargs["positions"] = ALiBi(torch.linspace(0.05, 0.3, heads, device=device))
    elif case.positions == "rope":
        kwargs["positions"] = RoPE(theta=1e4, scale=2.0)
    if case.scales:
        kwargs |= {"k_scale": torch.linspace(0.5, 1.5, heads_k, device=device), "v_scale": 2.0}
    tensors = [(t if case.batch else t[0]).to(device) for t in (q, k, v)]
    arguments = (indptr.to(device), indices.to(device), case.block)
    return Problem(*tensors, arguments, kwargs, tokens, lists, case)


def _converted(kind: str, kept: Tensor, lists: list[list[int]], device: str) -> Tensor | CustomMask:
    if kind == "blocks":
        return kept.to(device)
    at, parts = 0, []
    for row in lists:
        parts.append(kept[at : at + len(row)].transpose(0, 1).reshape(-1))
        at += len(row)
    flat = torch.cat(parts).to(device)
    if kind == "bool":
        return flat
    indptr = torch.tensor([0, *torch.tensor([p.numel() for p in parts]).cumsum(0)], device=device)
    return CustomMask(segment_packbits(flat, indptr, kind)[0], bitorder=kind)


def by_the_book(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, M, Hq, Dv]`` and LSE ``[B, Hq, M]``, products in ``dtype``, the softmax in float32 (or float64)."""
    case = problem.case
    if not case.gathered:
        return _dense(problem, dtype, slice(None), None)
    # By rows of blocks: keys in the order of the list, queries at their end.
    outputs, sums = [], []
    rows, columns = case.block
    for i, row in enumerate(problem.lists):
        cols = [j * columns + c for j in row for c in range(columns)]
        o, lse = _dense(problem, dtype, slice(i * rows, (i + 1) * rows), cols)
        outputs.append(o)
        sums.append(lse)
    return torch.cat(outputs, 1), torch.cat(sums, 2)


def _dense(problem: Problem, dtype: torch.dtype, queries: slice, cols: list[int] | None) -> tuple[Tensor, Tensor]:
    """Attention of some queries over all keys, or over these in this order."""
    case, kwargs = problem.case, problem.kwargs
    work = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (t if case.batch else t[None] for t in (problem.q.cpu(), problem.k.cpu(), problem.v.cpu()))
    seen = problem.tokens[:, :, queries]
    q = q[:, queries]
    if cols is not None:
        k, v, seen = k[:, cols], v[:, cols], seen[..., cols]
    (batch, m, heads, dim), n = q.shape, k.shape[1]
    group = heads // k.shape[2]
    i, j = torch.arange(m)[:, None] + n - m, torch.arange(n)
    if case.causal:
        seen = seen & (j <= i)
    left, right = case.window or (None, None)
    if left is not None:
        seen = seen & (j >= i - left)
    if right is not None:
        seen = seen & (j <= i + right)
    unread = ~seen.reshape(batch, heads // group, group, m, n).any(2).any(2).transpose(1, 2)  # 0 * NaN is not 0
    k, v = (t.double().masked_fill(unread[..., None], 0) for t in (k, v))
    if case.scales:
        k, v = k * kwargs["k_scale"].cpu().double()[:, None], v * kwargs["v_scale"]
    if case.positions == "rope":
        q = torch.stack([rotate(t, n - m, 1e4, 2.0) for t in q])
        k = torch.stack([rotate(t, 0, 1e4, 2.0) for t in k])
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = q @ k.transpose(2, 3) * (dim**-0.5 if case.scale is None else case.scale)
    if case.positions == "alibi":
        s = s + (kwargs["positions"].slopes.cpu().to(work)[:, None, None] * (j - i)).to(dtype)
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    s = s.to(work).masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1) if n else torch.full((batch, heads, m), -math.inf, dtype=work)
    joined = lse if not case.sinks else torch.logaddexp(lse, kwargs["sinks"].cpu().to(work)[:, None])
    p = (s - joined.masked_fill(lse == -math.inf, 0)[..., None]).exp().to(dtype)
    return (p @ v).transpose(1, 2), lse


CASES = [
    Case("r3-c7"),
    Case("r1-c1", (1, 1), (9, 30), dims=(32, 16)),
    Case("r1-c1-mha-causal", (1, 1), (17, 17), heads=(2, 2), causal=True),
    Case("r2-c3-mha", (2, 3), (11, 20), heads=(2, 2), causal=True),
    Case("r3-c1-group4", (3, 1), (10, 33), heads=(4, 1)),
    Case("r1-c16-group3", (1, 16), (5, 70), heads=(6, 2)),
    Case("r16-c4-causal-tail", (16, 4), (37, 50), causal=True),
    Case("r7-c20-window", (7, 20), (30, 95), window=(25, 10)),
    Case("r20-c16-kv-heads", (20, 16), (30, 50), pattern="kv", causal=True),
    Case("r4-c2-q-heads-lists", (4, 2), (10, 21), pattern="q", form="lists"),
    Case("r64-c64", (64, 64), (130, 200), causal=True),
    Case("r64-c128-batch-lists", (64, 128), (100, 300), batch=2, pattern="batch", form="lists", sinks=True),
    Case("r128-c64-more-queries", (128, 64), (200, 100), heads=(2, 2), causal=True, window=(40, None)),
    Case("r64-c300", (64, 300), (70, 370), heads=(1, 1), causal=True),
    Case("r2-c320-one-row", (2, 320), (2, 640), heads=(2, 1), density=1.0),
    Case("batch-one-pattern", (3, 7), batch=2, causal=True, softcap=2.0),
    Case("batch-own", (2, 4), (9, 18), batch=2, pattern="batch", causal=True),
    Case("mask", mask="blocks"),
    Case("mask-r1-c1", (1, 1), (5, 12), mask="blocks"),
    Case("mask-flat-causal-tail", (4, 6), (18, 40), mask="bool", causal=True),
    Case("mask-little", (3, 5), (16, 24), mask="little"),
    Case("mask-big-r64-c64", (64, 64), (70, 130), heads=(1, 1), mask="big"),
    Case("mask-kv-heads", (4, 4), (10, 20), pattern="kv", mask="blocks"),
    Case("rope", (5, 4), (20, 30), positions="rope", causal=True),
    Case("rope-more-queries", (4, 5), (30, 18), (2, 1), positions="rope"),
    Case("rope-dim80", (2, 7), (6, 20), dims=(80, 16), positions="rope"),
    Case("alibi-softcap", (3, 4), (20, 30), positions="alibi", softcap=3.0),
    Case("sinks-scale", sinks=True, scale=0.7, dims=(80, 96)),
    Case("dim192-value128", (4, 4), (8, 20), (2, 1), (192, 128)),
    Case("e4m3-scales", (4, 8), (20, 30), scales=True, cached=torch.float8_e4m3fn),
    Case("e5m2-rope", (4, 8), (9, 24), cached=torch.float8_e5m2, positions="rope"),
    Case("gathered-causal", (3, 5), (20, 45), gathered=True, causal=True),
    Case("gathered-window-rope-mask", (4, 8), (18, 40), gathered=True, window=(9, 3), positions="rope", mask="blocks"),
    Case("gathered-alibi-r64", (64, 64), (100, 128), (1, 1), gathered=True, causal=True, positions="alibi"),
    Case("nothing-listed", density=0.0),
]  # fmt: skip
