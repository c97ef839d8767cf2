"""Attention by the book for FlashInfer's forms, independent of this library, and batches to try it on.

Pages are gathered in a Python loop, every request has its own dense softmax, LSE is base 2. In float64 this is right by
definition; in a low dtype (products in it, softmax in float32) it says how exact plain PyTorch is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseattn.testing import assert_close_to_oracle


def rotated(x: Tensor, first: int, scale: float, theta: float) -> Tensor:
    """Half-split pairs of ``x [n, H, D]``, token i at position ``first + i``, turned as complex numbers."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-2 * i / x.shape[-1]) / scale for i in range(half)], dtype=torch.float64)
    angle = torch.arange(first, first + x.shape[0], dtype=torch.float64)[:, None, None] * frequency
    angle = angle.to(x.device)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def slopes(heads: int) -> list[float]:
    """ALiBi's, as its paper's code makes them."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start ** (i + 1) for i in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return slopes(lower) + slopes(2 * lower)[0::2][: heads - lower]


def visible(q_len: int, k_len: int, causal: bool = False, window_left: int = -1) -> Tensor:
    """bool [q_len, k_len]: what may be seen, aligned bottom-right."""
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    for i in range(q_len):
        at = i + k_len - q_len
        if causal:
            seen[i, max(0, at + 1) :] = False
        if window_left >= 0:
            seen[i, : max(0, at - window_left)] = False
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    softcap: float = 0.0,
    positions: str = "NONE",
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """One request: ``q [n, Hq, D]`` over ``k``, ``v`` ``[L, Hkv, D]``.

    ``mask`` bool [n, L] (or [Hq, n, L]) takes the place of ``causal`` and joins a window. Returns ``o [n, Hq, Dv]``
    and ``lse [n, Hq]``, base 2, without the sinks.
    """
    device = q.device if q.device == k.device == v.device else torch.device("cpu")  # on a GPU if all of it is there
    q, k, v = q.to(device), k.to(device), v.to(device)
    rows, length = q.shape[0], k.shape[0]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if positions == "ROPE_LLAMA":
        q, k = rotated(q, length - rows, rope_scale, rope_theta), rotated(k, 0, rope_scale, rope_theta)
    heads, heads_k = q.shape[1], k.shape[1]
    q, k, v = (t.to(dtype).transpose(0, 1) for t in (q, k, v))
    grouped = (heads_k, heads // heads_k * rows)
    s = (q.reshape(*grouped, q.shape[-1]) @ k.transpose(1, 2)).view(heads, rows, length) * scale
    if positions == "ALIBI":
        slope = torch.tensor(slopes(heads), dtype=work, device=device)[:, None, None]
        i = torch.arange(length - rows, length, device=device)
        s = s + (slope * (torch.arange(length, device=device) - i[:, None])).to(dtype)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    seen = visible(rows, length, causal and mask is None, window_left).to(device)
    if mask is not None:
        seen = seen & mask.to(device)
    s = s.to(work).masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1) if length else torch.full(s.shape[:2], -math.inf, dtype=work, device=device)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(device, work)[:, None])
    p = (s - total.masked_fill(lse == -math.inf, 0)[..., None]).exp().to(dtype)
    o = (p.reshape(*grouped, length) @ v).view(heads, rows, v.shape[-1])
    return o.transpose(0, 1).cpu(), lse.t().cpu() / math.log(2)


def gathered(pages: Tensor, numbers: list[int], length: int, layout: str) -> Tensor:
    """``[length, Hkv, D]`` from ``[P, page, Hkv, D]`` ("HND": ``[P, Hkv, page, D]``), token by token of each page."""
    size = pages.shape[1 if layout == "NHD" else 2]
    rows = []
    for j in range(length):
        page = pages[numbers[j // size]]
        rows.append(page[j % size] if layout == "NHD" else page[:, j % size])
    heads = pages.shape[2 if layout == "NHD" else 1]
    return torch.stack(rows) if rows else pages.new_empty((0, heads, pages.shape[-1]))


@dataclass
class Batch:
    """Queries and a cache whose pages lie in random order; pages and rows that nobody owns are NaN.

    Attributes:
        q: ``[sum(qo_lens), Hq, D]``.
        k: Pages of keys, in the layout.
        v: Pages of values.
        qo_lens: Queries of every request.
        kv_lens: Tokens of every request.
        numbers: Pages of every request.
        layout: "NHD" or "HND".
        page_size: Tokens of a page.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    qo_lens: list[int]
    kv_lens: list[int]
    numbers: list[list[int]]
    layout: str
    page_size: int

    @property
    def combined(self) -> Tensor:
        """The cache as one tensor ``[P, 2, ...]``."""
        return torch.stack([self.k, self.v], 1)

    def _indices(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=self.q.device)

    @property
    def qo_indptr(self) -> Tensor:
        return self._indices([sum(self.qo_lens[:b]) for b in range(len(self.qo_lens) + 1)])

    @property
    def indptr(self) -> Tensor:
        return self._indices([sum(len(n) for n in self.numbers[:b]) for b in range(len(self.numbers) + 1)])

    @property
    def indices(self) -> Tensor:
        return self._indices([page for n in self.numbers for page in n])

    @property
    def last_page_len(self) -> Tensor:
        return self._indices([(n - 1) % self.page_size + 1 if n else 0 for n in self.kv_lens])

    @property
    def seq_lens(self) -> Tensor:
        return self._indices(self.kv_lens)

    @property
    def block_tables(self) -> Tensor:
        width = max(1, max(len(n) for n in self.numbers))
        return torch.stack([self._indices([*n, *[0] * (width - len(n))]) for n in self.numbers])

    @property
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """indptr, indices, last_page_len."""
        return self.indptr, self.indices, self.last_page_len

    def keys(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of request ``b``."""
        return tuple(gathered(t.cpu(), self.numbers[b], self.kv_lens[b], self.layout) for t in (self.k, self.v))

    def attention(self, dtype: torch.dtype = torch.float64, *, masks: list[Tensor] | None = None, **options: Any):
        """Outputs and LSE of all requests, options as of ``attention``; ``masks``: one a request."""
        outputs, sums = [], []
        for b, q in enumerate(self.q.cpu().split(self.qo_lens)):
            mask = None if masks is None else masks[b]
            o, lse = attention(q, *self.keys(b), mask=mask, dtype=dtype, **options)
            outputs.append(o)
            sums.append(lse)
        return torch.cat(outputs), torch.cat(sums)

    def check(self, got: Any, masks: list[Tensor] | None = None, eps: float | None = None, **options: Any) -> None:
        """Assert that ``got``, outputs or outputs and LSE, is as exact as this batch's dtype allows."""
        low = self.q.dtype if self.q.element_size() > 1 else torch.bfloat16
        check(
            got, self.attention(masks=masks, **options), self.attention(low, masks=masks, **options), eps
        )  # fmt: skip


def check(got: Any, oracle: tuple[Tensor, Tensor], eager: tuple[Tensor, Tensor], eps: float | None = None) -> None:
    """Assert that ``got``, outputs or outputs and LSE, is close to the oracle by the tolerance rule."""
    if isinstance(got, Tensor):
        assert_close_to_oracle(got, oracle[0], eager[0], "o", eps=eps)
        return
    o, lse = got
    assert lse.dtype == torch.float32
    assert_close_to_oracle(o, oracle[0], eager[0], "o", eps=eps)
    assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=torch.finfo(eager[0].dtype).eps)
    assert (o.cpu()[oracle[1] == -math.inf] == 0).all(), "rows without keys are 0"


def make_batch(
    kv_lens: list[int],
    qo_lens: list[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    dim_v: int | None = None,
    page_size: int = 16,
    layout: str = "NHD",
    dtype: torch.dtype = torch.float16,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    """A batch of requests; without ``qo_lens`` one query each."""
    g = torch.Generator().manual_seed(seed)
    qo_lens = [1] * len(kv_lens) if qo_lens is None else qo_lens
    kv_dtype = kv_dtype or dtype
    owned = [-(-n // page_size) for n in kv_lens]
    total = sum(owned) + 3
    order = torch.randperm(total, generator=g).tolist()
    numbers = [order[sum(owned[:b]) : sum(owned[: b + 1])] for b in range(len(kv_lens))]
    pages = []
    for width in (dim, dim_v or dim):
        t = torch.full((total, page_size, heads[1], width), math.nan)
        for b, length in enumerate(kv_lens):
            for i, page in enumerate(numbers[b]):
                rows = min(page_size, length - i * page_size)
                t[page, :rows] = torch.randn(rows, heads[1], width, generator=g)
        t = t.to(kv_dtype)
        pages.append((t if layout == "NHD" else t.transpose(1, 2).contiguous()).to(device))
    q = torch.randn(sum(qo_lens), heads[0], dim, generator=g).to(dtype).to(device)
    return Batch(q, *pages, qo_lens, kv_lens, numbers, layout, page_size)
