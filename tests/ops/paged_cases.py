"""Paged problems built from plain keys and values, and the attention over these by the book.

The oracle never sees a page: it works on each sequence's own ``[length, Hkv, D]`` keys and a boolean matrix. Pages that
no sequence owns, and the rows of a last page past its sequence, hold NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseattn.ops.paged import ALiBi, CustomMask, PagedCache, RoPE, segment_packbits

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Case:
    """A batch of (query length, length) and options of the call."""

    id: str
    lengths: tuple[tuple[int, int], ...] = ((3, 50), (0, 9), (1, 0), (20, 37))
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    page: int = 16
    layout: str = "NHD"
    form: str = "dense"  # or "csr", "combined", "latent", "latent-joined"
    rope_dim: int = 0
    cached: torch.dtype | None = None
    causal: bool = True
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    sinks: bool = False
    positions: str = ""
    custom: str = ""
    scales: str = ""
    lost: bool = False  # pages of the table are -1 within a sequence

    def __str__(self) -> str:
        return self.id

    @property
    def decode(self) -> bool:
        return all(q == 1 for q, _ in self.lengths)


@dataclass
class Problem:
    q: Tensor
    cache: PagedCache
    kwargs: dict[str, Any]
    keys: list[Tensor]
    values: list[Tensor]
    seen: list[Tensor]
    case: Case
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    tables: list[list[int]] = field(default_factory=list)


def build(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Problem:
    """A problem with its pages in random order."""
    g = torch.Generator().manual_seed(seed)
    heads, heads_k = case.heads
    dim, dim_v = case.dims
    cached = case.cached or dtype
    low = cached in FLOAT8
    batch = len(case.lengths)
    q_lens, k_lens = ([pair[i] for pair in case.lengths] for i in (0, 1))
    owned = [-(-n // case.page) for n in k_lens]
    total = sum(owned) + 3
    order = torch.randperm(total, generator=g).tolist()
    width = dim + case.rope_dim
    latent = case.form.startswith("latent")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(cached if not low else torch.float32).to(cached)

    keys = [draw(n, heads_k, width) for n in k_lens]
    values = [k[..., :dim_v] if latent else draw(n, heads_k, dim_v) for n, k in zip(k_lens, keys, strict=True)]
    pages_k = torch.full((total, case.page, heads_k, width), math.nan).to(cached)
    pages_v = torch.full((total, case.page, heads_k, dim_v), math.nan).to(cached)
    tables, used = [], 0
    for b in range(batch):
        table = order[used : used + owned[b]]
        used += owned[b]
        for j in range(k_lens[b]):
            pages_k[table[j // case.page], j % case.page] = keys[b][j]
            pages_v[table[j // case.page], j % case.page] = values[b][j]
        tables.append(table)
    lost = [set(range(1, n, 3)) if case.lost else set() for n in owned]
    entries = [[-1 if i in lost[b] else page for i, page in enumerate(tables[b])] for b in range(batch)]

    lens = torch.tensor(k_lens, dtype=torch.int32, device=device)
    table = torch.full((batch, max(owned, default=0) + 2), -1, dtype=torch.int32)
    for b in range(batch):
        table[b, : owned[b]] = torch.tensor(entries[b], dtype=torch.int32)
    tabled: dict[str, Any] = {"page_table": table.to(device)}
    if case.form == "csr":
        tabled = {
            "indptr": torch.tensor([0, *torch.tensor(owned).cumsum(0)], dtype=torch.int32, device=device),
            "indices": torch.tensor([p for e in entries for p in e], dtype=torch.int32, device=device),
        }
    k, v = pages_k.to(device), pages_v.to(device)
    if latent:
        joined = k[:, :, 0]
        parts = (joined[..., :dim_v].clone(), joined[..., dim_v:].clone()) if case.form == "latent" else (joined, None)
        cache = PagedCache.latent(*parts, lens, **tabled, value_dim=dim_v)
    elif case.form == "combined":
        stacked = torch.stack([k, v], 1)
        if case.layout == "HND":
            stacked = stacked.transpose(2, 3).contiguous()
        cache = PagedCache.combined(stacked, lens, **tabled, layout=case.layout)
    elif case.layout == "HND":
        cache = PagedCache(*(t.transpose(1, 2).contiguous() for t in (k, v)), lens, **tabled, layout="HND")
    else:
        cache = PagedCache(k, v, lens, **tabled)

    q = torch.randn(sum(q_lens), heads, width, generator=g).to(dtype).to(device)
    kwargs: dict[str, Any] = {
        "causal": case.causal, "scale": case.scale, "window": case.window, "softcap": case.softcap,
    }  # fmt: skip
    if not case.decode:
        kwargs["cu_seqlens_q"] = torch.tensor([0, *torch.tensor(q_lens).cumsum(0)], dtype=torch.int32, device=device)
        kwargs["max_seqlen_q"] = max(q_lens)
    problem = Problem(q, cache, kwargs, keys, values, [], case, tables=tables)
    if case.sinks:
        problem.sinks = kwargs["sinks"] = torch.linspace(-1, 1, heads, device=device)
    if case.positions == "alibi":
        problem.slopes = torch.linspace(0.05, 0.3, heads, device=device)
        kwargs["positions"] = ALiBi(problem.slopes)
    elif case.positions == "rope":
        kwargs["positions"] = RoPE(theta=1e4, scale=2.0)
    if case.scales == "numbers":
        kwargs |= {"k_scale": 0.5, "v_scale": 3.0}
    elif case.scales == "heads":
        kwargs |= {
            "k_scale": torch.linspace(0.5, 1.5, heads_k, device=device),
            "v_scale": torch.tensor([2.0], device=device),
        }
    kept = [torch.rand(a, c, generator=g) < 0.6 for a, c in zip(q_lens, k_lens, strict=True)]
    if case.custom:
        flat = torch.cat([m.flatten() for m in kept]).to(device)
        indptr = torch.tensor([0, *torch.tensor([m.numel() for m in kept]).cumsum(0)], device=device)
        if case.custom == "bool":
            kwargs["custom_mask"] = flat
        else:
            kwargs["custom_mask"] = CustomMask(segment_packbits(flat, indptr, case.custom)[0], bitorder=case.custom)
    for b, (a, c) in enumerate(case.lengths):
        seen = visible(a, c, case.causal, case.window)
        if case.custom:
            seen &= kept[b]
        for i in lost[b]:
            seen[:, i * case.page : (i + 1) * case.page] = False
        problem.seen.append(seen)
    return problem


def visible(q_len: int, k_len: int, causal: bool, window: tuple[int | None, int | None] | None) -> Tensor:
    i = torch.arange(q_len)[:, None] + k_len - q_len
    j = torch.arange(k_len)
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    if causal:
        seen &= j <= i
    left, right = window or (None, None)
    if left is not None:
        seen &= j >= i - left
    if right is not None:
        seen &= j <= i + right
    return seen


def rotate(x: Tensor, first: int, theta: float, scale: float) -> Tensor:
    """Pairs (i, i + D / 2) as complex numbers times e^(i angle), in float64."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-2 * i / x.shape[-1]) / scale for i in range(half)], dtype=torch.float64)
    angle = torch.arange(first, first + x.shape[0], dtype=torch.float64)[:, None, None] * frequency
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
    return torch.cat([turned[..., 0], turned[..., 1]], -1)


def by_the_book(problem: Problem, dtype: torch.dtype, seen: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Outputs and LSE with products in ``dtype`` and the softmax in float32 (float64 for that)."""
    case = problem.case
    group = case.heads[0] // case.heads[1]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scale = problem.q.shape[-1] ** -0.5 if case.scale is None else case.scale
    outputs, sums, at = [], [], 0
    factors = [torch.as_tensor(problem.kwargs.get(n, 1.0)).cpu().double().view(-1, 1) for n in ("k_scale", "v_scale")]
    for b, (a, c) in enumerate(case.lengths):
        q = problem.q[at : at + a].cpu()
        at += a
        k = (problem.keys[b].double() * factors[0]).to(dtype)
        v = (problem.values[b].double() * factors[1]).to(dtype)
        if case.positions == "rope":
            q, k = rotate(q, c - a, 1e4, 2.0), rotate(k, 0, 1e4, 2.0)
        q, k = q.to(dtype).transpose(0, 1), k.to(dtype).transpose(0, 1).repeat_interleave(group, 0)
        s = (q @ k.transpose(1, 2)) * scale
        if problem.slopes is not None:
            distance = torch.arange(c)[None, :] - torch.arange(c - a, c)[:, None]
            s = s + (problem.slopes.cpu().to(work)[:, None, None] * distance).to(dtype)
        if case.softcap:
            s = case.softcap * torch.tanh(s / case.softcap)
        allowed = (problem.seen if seen is None else seen)[b]
        s = s.to(work).masked_fill(~allowed, -math.inf)
        lse = s.logsumexp(-1) if c else torch.full(s.shape[:2], -math.inf, dtype=work)
        joined = lse if problem.sinks is None else torch.logaddexp(lse, problem.sinks.cpu().to(work)[:, None])
        p = (s - joined.masked_fill(lse == -math.inf, 0)[..., None]).exp().to(dtype)
        outputs.append((p @ v.transpose(0, 1).repeat_interleave(group, 0)).transpose(0, 1))
        sums.append(lse)
    return torch.cat(outputs), torch.cat(sums, 1)


DECODE = ((1, 50), (1, 0), (1, 1), (1, 130))
CASES = [
    Case("mixed"),
    Case("decode", DECODE),
    Case("decode-page1-csr", DECODE, page=1, form="csr"),
    Case("page5-hnd-combined", page=5, layout="HND", form="combined"),
    Case("page256", ((2, 300), (1, 7)), page=256),
    Case("csr-hnd-group3", heads=(6, 2), form="csr", layout="HND", page=8),
    Case("more-queries-than-keys", ((34, 1), (9, 4)), heads=(2, 2)),
    Case("not-causal-window-both", causal=False, window=(7, 3)),
    Case("window-softcap-sinks", window=(12, None), softcap=2.0, sinks=True),
    Case("decode-window-sinks", DECODE, window=(20, 0), sinks=True, heads=(7, 1)),
    Case("softcap-extreme-scale", softcap=30.0, scale=40.0),
    Case("alibi", positions="alibi"),
    Case("alibi-softcap-decode", DECODE, positions="alibi", softcap=3.0),
    Case("rope", positions="rope"),
    Case("rope-dim80-decode", DECODE, positions="rope", dims=(80, 16)),
    Case("custom-bool", custom="bool", causal=False),
    Case("custom-little-causal", custom="little"),
    Case("custom-big", custom="big", causal=False),
    Case("dim80-value96", dims=(80, 96)),
    Case("dim192-value128", ((2, 40), (5, 5)), dims=(192, 128), heads=(2, 1)),
    Case("dim256", ((1, 20), (1, 40)), dims=(256, 256), heads=(2, 2)),
    Case("e4m3-scales", cached=torch.float8_e4m3fn, scales="heads"),
    Case("e5m2-decode", DECODE, cached=torch.float8_e5m2, scales="numbers"),
    Case("e4m3-rope-hnd", cached=torch.float8_e4m3fn, positions="rope", layout="HND"),
    Case("mla", ((2, 40), (1, 70)), heads=(16, 1), dims=(64, 64), rope_dim=16, form="latent", scale=0.1),
    Case("mla-joined-e4m3", DECODE, (16, 1), (64, 64), form="latent-joined", rope_dim=16, scale=0.1,
         cached=torch.float8_e4m3fn, page=1),
    Case("lost-pages", lost=True),
    Case("lost-pages-decode", DECODE, lost=True, form="csr", page=8),
]  # fmt: skip
