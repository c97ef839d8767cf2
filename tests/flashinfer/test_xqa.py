"""XQA in its real form, which writes in place, and in the documents', which allocates."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import attention, check, make_batch

import sparseattn.flashinfer as flashinfer
from sparseattn.flashinfer.xqa import xqa, xqa_mla


def test_names():
    assert flashinfer.xqa is xqa
    assert flashinfer.xqa.xqa_mla is flashinfer.xqa_mla is xqa_mla
    assert flashinfer.xqa.xqa is xqa


def test_documented_form(device: str):
    """3-D queries, one cache for both, whose first half are keys and second half values."""
    batch = make_batch([54, 1, 97], device=device)
    cache = batch.combined
    other = cache.clone()
    other[:, 0], cache[:, 1] = math.nan, math.nan
    got = flashinfer.xqa(batch.q, cache, other, batch.block_tables, batch.seq_lens, head_dim=32, page_size=16)
    assert got.shape == batch.q.shape
    batch.check(got)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("window", [0, 1, 40])
def test_real_form(layout: str, page: int, window: int, device: str):
    batch = make_batch([54, 0, 97], page_size=page, layout=layout, device=device)
    output = torch.full((3, 1, 4, 32), math.nan, dtype=torch.float16, device=device)
    sinks = torch.linspace(-1, 1, 4, device=device).view(2, 2)
    scratch = torch.zeros(64, dtype=torch.uint8, device=device)
    lens = batch.seq_lens.to(torch.uint32).view(3, 1)
    got = xqa(
        batch.q[:, None], batch.k, batch.v, batch.block_tables, lens, output, scratch,
        scratch.view(torch.uint32), 2, page, sinks, 0.5, 2.0, window, layout, rcp_out_scale=0.5,
    )  # fmt: skip
    assert got is output
    # scores: 0.5 * 2 / sqrt(D); values: 2 * 0.5
    batch.check(output[:, 0], window_left=window - 1, sinks=sinks.flatten())


def test_float8_cache(device: str):
    batch = make_batch([54, 97], kv_dtype=torch.float8_e4m3fn, device=device)
    scale = torch.tensor([0.25], device=device)
    got = xqa(batch.q, batch.k, batch.v, batch.block_tables, batch.seq_lens, q_scale=2.0, kv_scale=scale)
    scaled = []
    for dtype in (torch.float64, torch.float16):
        rows = []
        for b in range(2):
            k, v = (t.double() / 4 for t in batch.keys(b))
            rows.append(attention(batch.q[b : b + 1] * 2, k, v, dtype=dtype))
        scaled.append(tuple(torch.cat(t) for t in zip(*rows, strict=True)))
    check(got, *scaled)
    output = torch.empty_like(batch.q).to(torch.float8_e4m3fn)
    xqa(batch.q, batch.k, batch.v, batch.block_tables, batch.seq_lens, output, q_scale=2.0, kv_scale=scale)
    assert torch.equal(output, got.to(torch.float8_e4m3fn))


def test_drafts(device: str):
    batch = make_batch([54, 3, 97], [3] * 3, device=device)
    q = batch.q.view(3, 1, 3, 4, 32)
    got = xqa(q, batch.k, batch.v, batch.block_tables, batch.seq_lens, q_seq_len=3)
    assert got.shape == q.shape
    batch.check(got.view(9, 4, 32), causal=True)
    everything = torch.full((3, 3, 2), 7, dtype=torch.uint16, device=device)
    got = xqa(q, batch.k, batch.v, batch.block_tables, batch.seq_lens, q_seq_len=3, mask=everything)
    batch.check(got.view(9, 4, 32))
    uneven = make_batch([54, 3, 97], [1, 0, 4], device=device)
    cu = uneven.qo_indptr.to(torch.uint32)
    got = xqa(uneven.q, uneven.k, uneven.v, uneven.block_tables, uneven.seq_lens, q_seq_len=4, q_cu_seq_lens=cu)
    uneven.check(got, causal=True)


@pytest.mark.parametrize("form", ["shared", "apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_latent(form: str, dtype: torch.dtype, device: str):
    if device == "cuda" and form == "apart":
        pytest.skip("values of 512 columns of their own are for the reference")
    batch = make_batch([54, 3], heads=(16, 1), dim=576, page_size=32, dtype=dtype, device=device)
    if form == "shared":
        batch.v = batch.k
    output = torch.full((2, 1, 16, 512), math.nan, dtype=torch.bfloat16, device=device)
    lens = batch.seq_lens.to(torch.uint32).view(2, 1)
    xqa_mla(
        batch.q[:, None], batch.k, batch.v, batch.block_tables, lens, output, None, None, 32, q_scale=0.05, kv_scale=2.0
    )
    both = []
    for low in (torch.float64, torch.bfloat16):
        rows = []
        for b in range(2):
            k, v = (t.float() for t in batch.keys(b))
            rows.append(attention(batch.q[b : b + 1], k, 2 * v[..., :512], scale=0.1, dtype=low))
        both.append(tuple(torch.cat(t) for t in zip(*rows, strict=True)))
    check(output[:, 0], *both)
    flat = (t.flatten(0, 2) for t in (batch.k, batch.v))
    new = xqa_mla(batch.q, *flat, batch.block_tables, batch.seq_lens, page_size=32, q_scale=0.05, kv_scale=2.0)
    assert torch.equal(new, output[:, 0])


def test_bad_xqa_input():
    batch = make_batch([54, 97])
    call = (batch.q, batch.k, batch.v, batch.block_tables, batch.seq_lens)
    for name, kwargs in (
        ("page_size", {"page_size": 32}),
        ("head_dim", {"head_dim": 64}),
        ("num_kv_heads", {"num_kv_heads": 4}),
        ("k_sf_cache", {"k_sf_cache": batch.q}),
        ("kv_layout", {"kv_layout": "BSHD"}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            xqa(*call, **kwargs)
    with pytest.raises(ValueError, match=r"q: expected .* beam width is 1"):
        xqa(batch.q[None], *call[1:])
    with pytest.raises(TypeError, match="mask: expected uint16"):
        xqa(torch.cat([batch.q, batch.q]), *call[1:], q_seq_len=2, mask=torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="block_tables: expected pages for 900 tokens"):
        xqa(*call[:4], torch.tensor([900, 1]).int())


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("length", [2, 15, 256, 514, 2048])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (32, 4)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_xqa_grid(batch_size: int, length: int, page: int, heads: tuple[int, int], dim: int, layout: str):
    lengths = [max(1, length - 3 * b) for b in range(batch_size)]
    batch = make_batch(
        lengths, heads=heads, dim=dim, page_size=page, layout=layout, dtype=torch.bfloat16, device="cuda"
    )
    output = torch.full_like(batch.q, math.nan)[:, None]
    xqa(batch.q[:, None], batch.k, batch.v, batch.block_tables, batch.seq_lens, output, kv_layout=layout)
    batch.check(output[:, 0])
