"""Appending to paged caches by FlashInfer's names, token by token against a loop."""

from __future__ import annotations

import pytest
import torch

from sparseattn.flashinfer.page import (
    append_paged_kv_cache,
    append_paged_mla_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)


def int32(*values: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_lengths(device: str):
    got = get_seq_lens(int32(0, 3, 3, 4, device=device), int32(5, 9, 16, device=device), 16)
    assert got.tolist() == [37, 0, 16]
    assert got.dtype == torch.int32


def test_places_of_the_documented_example(device: str):
    indptr, lens = int32(0, 1, 3, 6, 10, device=device), torch.tensor([5, 5, 5, 5])
    for nnz in (10, 13):
        b, p = get_batch_indices_positions(indptr, lens, nnz)
        assert b.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3] + [-1] * (nnz - 10)
        assert p.tolist() == [4, 3, 4, 2, 3, 4, 1, 2, 3, 4] + [-1] * (nnz - 10)
    out = [torch.zeros(10, dtype=torch.int32, device=device) for _ in range(2)]
    got = get_batch_indices_positions(indptr, lens, 10, *out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    assert out[0].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="positions: expected shape"):
        get_batch_indices_positions(indptr, lens, 10, None, out[1][:4])


def problem(page: int, device: str):
    """Requests of 45, 0, 25 and 9 tokens, the last 40, 0, 1 and 9 of which are appended."""
    lengths, new = [45, 0, 25, 9], [40, 0, 1, 9]
    pages = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(pages) + 2)[: sum(pages)].int()
    indptr = int32(0, *torch.tensor(pages).cumsum(0).tolist(), device=device)
    last = int32(*[(n - 1) % page + 1 if n else 0 for n in lengths], device=device)
    append_indptr = int32(0, *torch.tensor(new).cumsum(0).tolist(), device=device)
    b, p = get_batch_indices_positions(append_indptr, get_seq_lens(indptr, last, page), sum(new) + 3)
    places = []
    for request, (length, count) in enumerate(zip(lengths, new, strict=True)):
        for position in range(length - count, length):
            places.append((int(order[int(indptr[request]) + position // page]), position % page))
    return sum(pages) + 2, b, p, (order.to(device), indptr, last), places


@pytest.mark.parametrize("page", [1, 5, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("form", ["combined", "tuple"])
def test_append(page: int, layout: str, dtype: torch.dtype, form: str, device: str):
    total, b, p, table, places = problem(page, device)
    shape = (total, 2, page, 2, 8) if layout == "NHD" else (total, 2, 2, page, 8)
    cache = torch.randn(shape).to(dtype).to(device)
    k, v = torch.randn(2, b.shape[0], 2, 8).half().to(device)  # the last three rows are padding
    expected = cache.clone()
    for row, (number, at) in enumerate(places):
        for i, t in enumerate((k, v)):
            target = expected[number, i, at] if layout == "NHD" else expected[number, i, :, at]
            target.copy_(t[row].to(dtype))
    append_paged_kv_cache(k, v, b, p, cache if form == "combined" else tuple(cache.unbind(1)), *table, layout)
    assert torch.equal(cache.float(), expected.float())


@pytest.mark.parametrize("dims", [(512, 64), (32, 0)])
def test_append_latent(dims: tuple[int, int], device: str):
    total, b, p, table, places = problem(16, device)
    ckv, kpe = (torch.randn(total, 16, d).half().to(device) for d in dims)
    new = [torch.randn(b.shape[0], d).half().to(device) for d in dims]
    expected = [ckv.clone(), kpe.clone()]
    for row, (number, at) in enumerate(places):
        for target, source in zip(expected, new, strict=True):
            target[number, at] = source[row]
    append_paged_mla_kv_cache(*new, b, p, ckv, kpe, *table)
    assert torch.equal(ckv, expected[0])
    assert torch.equal(kpe, expected[1])


@pytest.mark.parametrize("form", ["combined", "tuple", "latent"])
def test_batches_of_other_sizes(form: str, device: str):
    """Steps of a model: batches, tokens and page tables of other lengths over one cache, and back."""
    dims = (64, 16) if form == "latent" else (16, 16)
    shape = (40, 4) if form == "latent" else (40, 2, 4, 1)
    cache = [torch.zeros(*shape, d, device=device).half() for d in dims]
    cache = [cache[0][:, 0], cache[0][:, 1]] if form == "combined" else [c if c.dim() == 3 else c[:, 0] for c in cache]
    whole = cache[0]._base if form == "combined" else None
    for batch, tokens in ((1, 1), (3, 2), (5, 1), (3, 2), (1, 9), (1, 1)):
        order = torch.randperm(40)[: 3 * batch].int().to(device)
        b = torch.arange(batch, dtype=torch.int32).repeat_interleave(tokens).to(device)
        p = torch.arange(1, 1 + tokens, dtype=torch.int32).repeat(batch).to(device)
        new = [torch.randn(batch * tokens, *c.shape[2:], device=device).half() for c in cache]
        expected = [c.clone() for c in cache]
        for i in range(batch * tokens):
            for c, t in zip(expected, new, strict=True):
                c[order[3 * (i // tokens) + (i % tokens + 1) // 4].long(), (i % tokens + 1) % 4] = t[i]
        table = order, int32(*range(0, 3 * batch + 1, 3), device=device), int32(*[4] * batch, device=device)
        if form == "latent":
            append_paged_mla_kv_cache(*new, b, p, *cache, *table)
        else:
            append_paged_kv_cache(*new, b, p, tuple(cache) if whole is None else whole, *table)
        assert all(torch.equal(c, e) for c, e in zip(cache, expected, strict=True))


def test_tokens_without_a_place_are_left_out(device: str):
    cache = torch.zeros(4, 2, 4, 1, 8, device=device)
    new = torch.ones(5, 1, 8, device=device)
    b, p = int32(0, 0, 7, -1, 1, device=device), int32(2, 99, 0, 0, 1, device=device)
    append_paged_kv_cache(
        new, new, b, p, cache, int32(2, 1_000_000, device=device), int32(0, 1, 2, device=device),
        int32(4, 4, device=device),
    )  # fmt: skip
    assert cache.sum() == 16
    assert (cache[2, :, 2] == 1).all()


def test_bad_append():
    cache = torch.zeros(4, 2, 4, 1, 8)
    new = torch.ones(2, 1, 8)
    places = (int32(0, 0), int32(0, 1))
    table = (int32(2), int32(0, 1), int32(2))
    for match, kind, args in (
        ("kv_layout", ValueError, (new, new, *places, cache, *table, "HDN")),
        ("k: expected shape", ValueError, (new[:, :, :4], new, *places, cache, *table)),
        (r"k: expected torch\.float32", TypeError, (new.half(), new, *places, cache, *table)),
        ("batch_indices", TypeError, (new, new, places[0].long(), places[1], cache, *table)),
        ("paged_kv_cache", TypeError, (new, new, *places, None, *table)),
    ):
        with pytest.raises(kind, match=match):
            append_paged_kv_cache(*args)
