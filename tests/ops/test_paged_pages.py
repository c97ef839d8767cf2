"""Tokens into pages and the helpers around them, against loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sparseattn.ops.paged import (
    PagedCache,
    append_kv,
    appended_positions,
    lengths_from_last_pages,
    packbits,
    segment_packbits,
)


def small_cache(
    device: str, dtype: torch.dtype = torch.float16, layout: str = "NHD", form: str = "dense"
) -> PagedCache:
    """Three sequences of 5, 0 and 7 tokens in pages of 4."""
    shape = (6, 4, 2, 8) if layout == "NHD" else (6, 2, 4, 8)
    k, v = (torch.zeros(shape, device=device).to(dtype) for _ in range(2))
    lens = torch.tensor([5, 0, 7], dtype=torch.int32, device=device)
    if form == "csr":
        indptr = torch.tensor([0, 2, 2, 4], dtype=torch.int32, device=device)
        indices = torch.tensor([5, 0, 3, 1], dtype=torch.int32, device=device)
        return PagedCache(k, v, lens, None, indptr, indices, layout=layout)
    table = torch.tensor([[5, 0, -1], [-1, -1, -1], [3, 1, -1]], dtype=torch.int32, device=device)
    return PagedCache(k, v, lens, table, layout=layout)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("form", ["dense", "csr"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append(impl: str, form: str, layout: str, device: str):
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    cache = small_cache(device, layout=layout, form=form)
    k, v = (torch.randn(10, 2, 8, device=device, dtype=torch.float16) for _ in range(2))
    b = torch.tensor([0, 0, 2, 2, -1, 1, 0, 7, 2, 2], dtype=torch.int32, device=device)
    at = torch.tensor([4, 0, 6, 3, 0, 0, -1, 0, 8, 99], dtype=torch.int32, device=device)
    append_kv(cache, k, v, batch_indices=b, positions=at, impl=impl)
    pages = {0: [5, 0], 2: [3, 1]}
    for got, source in zip(cache.views(), (k, v), strict=False):
        expected = torch.zeros_like(got)
        for i in range(4):  # the others have no sequence, no position or no page
            expected[pages[int(b[i])][int(at[i]) // 4], int(at[i]) % 4] = source[i]
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("form", ["dense", "csr"])
def test_append_by_tables_with_strides(impl: str, form: str, device: str):
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    k, v = (torch.randn(3, 2, 8, device=device, dtype=torch.float16) for _ in range(2))
    cache, other = (small_cache(device, form=form) for _ in range(2))
    append_kv(cache, k, v, impl=impl)
    names = ("page_table",) if form == "dense" else ("indptr", "indices")
    spread = {
        n: torch.stack([getattr(other, n)] * 2 + [torch.zeros_like(getattr(other, n))], -1)[..., 1] for n in names
    }
    append_kv(replace(other, **spread), k, v, impl=impl)
    assert torch.equal(other.k, cache.k)
    assert torch.equal(other.v, cache.v)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_append_last_tokens_and_decode(impl: str, device: str):
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    cache = small_cache(device, torch.float32)
    k, v = (torch.randn(6, 2, 8, device=device) for _ in range(2))
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)
    append_kv(cache, k, v, cu_seqlens=cu, impl=impl)  # the sixth row is padding
    assert torch.equal(cache.k[5, 3], k[0])
    assert torch.equal(cache.k[0, 0], k[1])
    assert torch.equal(cache.v[1, :3], v[2:5])
    assert int((cache.k != 0).any(-1).any(-1).sum()) == 5
    append_kv(cache, k[:3], v[:3], impl=impl)
    assert torch.equal(cache.k[0, 0], k[0])
    assert torch.equal(cache.k[1, 2], k[2])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_append_float8(impl: str, dtype: torch.dtype, device: str):
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    cache = small_cache(device, dtype)
    k = torch.randn(3, 2, 8, device=device)
    k[0, 0, 0] = 1e6
    scale = torch.tensor([0.5, 2.0], device=device)
    append_kv(cache, k, k, k_scale=scale, v_scale=0.25, impl=impl)
    largest = torch.finfo(dtype).max
    expected = (k[2] / scale[:, None]).clamp(-largest, largest).to(dtype)
    assert torch.equal(cache.k[1, 2].float(), expected.float())
    assert cache.k[0, 0, 0, 0].float() == largest
    assert torch.equal(cache.v[1, 2].float(), (k[2] / 0.25).clamp(-largest, largest).to(dtype).float())


def test_append_latent(device: str):
    lens = torch.tensor([2], dtype=torch.int32, device=device)
    table = torch.tensor([[1]], dtype=torch.int32, device=device)
    for joined in (True, False):
        ckv, kpe = torch.zeros(2, 4, 24 if joined else 16, device=device), torch.zeros(2, 4, 8, device=device)
        cache = PagedCache.latent(ckv, None if joined else kpe, lens, table, value_dim=16)
        k, rope = torch.randn(1, 1, 16, device=device), torch.randn(1, 1, 8, device=device)
        append_kv(cache, k, k_rope=rope)
        assert torch.equal(ckv[1, 1, :16], k[0, 0])
        assert torch.equal(ckv[1, 1, 16:] if joined else kpe[1, 1], rope[0, 0])


def test_positions(device: str):
    cu = torch.tensor([0, 2, 2, 3, 7], dtype=torch.int32, device=device)
    lens = torch.tensor([5, 3, 1, 4], dtype=torch.int32, device=device)
    b, at = appended_positions(cu, lens, 9)
    assert b.tolist() == [0, 0, 2, 3, 3, 3, 3, -1, -1]
    assert at.tolist() == [3, 4, 0, 0, 1, 2, 3, -1, -1]
    assert b.dtype == at.dtype == torch.int32
    assert appended_positions(cu[:1], lens[:0], 2)[0].tolist() == [-1, -1]


def test_lengths(device: str):
    indptr = torch.tensor([0, 3, 3, 4], dtype=torch.int32, device=device)
    last = torch.tensor([2, 9, 16], dtype=torch.int32, device=device)
    assert lengths_from_last_pages(indptr, last, 16).tolist() == [34, 0, 16]


def test_lengths_by_a_kernel(device: str):
    """The kernel that takes the place of several, over more sequences than a program has; twice, to repeat it."""
    pytest.importorskip("triton", reason="needs Triton")
    from sparseattn.ops.paged import pages_triton

    pages = torch.randint(0, 3, (300,), dtype=torch.int32)
    last = torch.randint(1, 17, (300,), dtype=torch.int32)
    indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    expected = torch.where(pages > 0, (pages - 1) * 16 + last, 0)
    for _ in range(2):
        got = pages_triton.lengths(indptr.to(device), last.to(device), 16)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("bitorder", ["little", "big"])
def test_bits(bitorder: str, device: str):
    for n in (0, 1, 8, 19, 999):
        x = torch.rand(n, device=device) < 0.5
        packed = packbits(x, bitorder).tolist()
        for i, value in enumerate(x.tolist()):
            shift = i % 8 if bitorder == "little" else 7 - i % 8
            assert (packed[i // 8] >> shift) & 1 == value
        assert len(packed) == -(-n // 8)


@pytest.mark.parametrize("bitorder", ["little", "big"])
def test_segments_start_their_own_bytes(bitorder: str, device: str):
    sizes = [3, 0, 17, 8, 1]
    x = torch.rand(sum(sizes), device=device) < 0.5
    indptr = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32, device=device)
    packed, ends = segment_packbits(x, indptr, bitorder)
    assert ends.dtype == torch.int32
    assert ends.tolist() == [0, 1, 1, 4, 5, 6]
    assert packed.shape == (sum(sizes) // 8 + len(sizes),)
    for segment, (a, b) in zip(x.split(sizes), zip(ends.tolist(), ends.tolist()[1:], strict=False), strict=True):
        assert torch.equal(packed[a:b], packbits(segment, bitorder))
    assert (packed[6:] == 0).all()


def test_bits_that_nobody_gave_are_zeros(device: str):
    """And hide, where they belong to a mask."""
    ends = torch.tensor([0, 4, 20], dtype=torch.int32, device=device)
    packed, starts = segment_packbits(torch.ones(9, dtype=torch.bool, device=device), ends, "little")
    assert starts.tolist() == [0, 1, 3]
    assert packed.tolist() == [0b1111, 0b11111, 0]


def test_operator(device: str):
    cache = small_cache(device)
    new = [torch.randn(3, 2, 8, device=device, dtype=torch.float16).view(torch.int16) for _ in range(2)]
    pages = [t.view(torch.int16) for t in (cache.k, cache.v)]
    b, at = appended_positions(torch.arange(4, dtype=torch.int32, device=device), cache.seq_lens, 3)
    arguments = (pages, new, b, at, cache.page_table, None, None, 3, "auto")
    torch.library.opcheck(torch.ops.sparseattn.paged_append.default, arguments)


def test_appending_compiles_as_one_graph(device: str):
    """Keys and values that are halves of one tensor, both written to by one operator."""
    kv = torch.zeros(6, 2, 4, 2, 8, device=device, dtype=torch.float16)
    lens = torch.tensor([5, 0, 7], dtype=torch.int32, device=device)
    table = torch.tensor([[5, 0], [-1, -1], [3, 1]], dtype=torch.int32, device=device)
    k, v = torch.randn(2, 3, 2, 8, device=device).half()

    def step(kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        append_kv(PagedCache.combined(kv, lens, table), k, v)
        return kv.sum()

    expected = kv.clone()
    step(expected, k, v)
    assert (expected != 0).sum() > 30
    torch.compile(step, fullgraph=True, backend="aot_eager")(kv, k, v)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_wide_tokens_of_unlike_halves(impl: str, device: str):
    """Keys and values of several blocks of a program each, of dimensions that are no powers of two."""
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    k, v = (torch.zeros(3, 4, 33, d, device=device) for d in (72, 20))
    lens = torch.tensor([5, 6], dtype=torch.int32, device=device)
    cache = PagedCache(k, v, lens, torch.tensor([[2, 0], [1, -1]], dtype=torch.int32, device=device))
    new = [torch.randn(7, 33, d, device=device) for d in (72, 20)]
    append_kv(cache, *new, cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32, device=device), impl=impl)
    for pages, source in zip((k, v), new, strict=True):
        expected = torch.zeros_like(pages)
        expected[2, 2:], expected[0, 0] = source[:2], source[2]
        expected[1, 2:] = source[3:5]  # the table ends before the sequence does
        assert torch.equal(pages, expected)


def test_bad_input():
    cache, k = small_cache("cpu"), torch.zeros(3, 2, 8, dtype=torch.float16)
    b = torch.zeros(3, dtype=torch.int32)
    bad = {
        "v: expected None for a latent cache": lambda: append_kv(cache, k),
        "k_rope: expected given exactly": lambda: append_kv(cache, k, k, k_rope=k),
        "positions: expected batch_indices and": lambda: append_kv(cache, k, k, batch_indices=b),
        "positions: expected an int32": lambda: append_kv(cache, k, k, batch_indices=b, positions=b.long()),
        r"positions: expected shape \(3,\)": lambda: append_kv(cache, k, k, batch_indices=b, positions=b[:2]),
        "k: expected 3 tokens": lambda: append_kv(cache, k[:2], k[:2]),
        r"cu_seqlens: expected shape \(4,\)": lambda: append_kv(cache, k, k, cu_seqlens=b),
        "v: expected shape": lambda: append_kv(cache, k, k[:, :1]),
        "k: expected torch.float16 like the cache": lambda: append_kv(cache, k.float(), k),
        "k_scale: expected None for": lambda: append_kv(cache, k, k, k_scale=2.0),
        "impl: expected one of": lambda: append_kv(cache, k, k, impl="x"),
        "bitorder: expected": lambda: packbits(torch.ones(3, dtype=torch.bool), "middle"),
        "x: expected bool": lambda: packbits(torch.ones(3)),
        "indptr: expected int32": lambda: segment_packbits(torch.ones(3, dtype=torch.bool), torch.ones(3)),
    }
    for message, call in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    assert math.isfinite(cache.k.float().sum())
