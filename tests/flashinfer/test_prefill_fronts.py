"""Prefill without a plan: the TensorRT-LLM and cuDNN fronts."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import attention, check, make_batch

from sparseattn.flashinfer.prefill import cudnn_batch_prefill_with_kv_cache, trtllm_batch_context_with_kv_cache

E4M3 = torch.float8_e4m3fn


# ---- TensorRT-LLM ----


def context(batch, **said):
    scale = batch.q.shape[2] ** -0.5
    said = {"bmm1_scale": scale, "bmm2_scale": 1.0, "kv_layout": batch.layout, **said}
    kv_indptr = torch.nn.functional.pad(batch.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    cache = said.pop("kv_cache", batch.combined)
    return trtllm_batch_context_with_kv_cache(
        said.pop("query", batch.q), cache, None, batch.block_tables, batch.seq_lens, max(batch.qo_lens),
        max(batch.kv_lens), said.pop("bmm1_scale"), said.pop("bmm2_scale"), len(batch.kv_lens), batch.qo_indptr,
        kv_indptr, **said,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_context_is_causal(layout: str, device: str):
    batch = make_batch([54, 0, 97], [20, 3, 97], layout=layout, device=device)
    batch.check(context(batch, return_lse=True), causal=True)
    batch.check(context(batch, causal=False), causal=False)
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2], device=device)
    assert context(batch, out=out, lse=lse, kv_cache=(batch.k, batch.v)) is out
    batch.check((out, lse), causal=True)


def test_context_is_hnd_unless_said_otherwise(device: str):
    batch = make_batch([54, 20], [20, 3], layout="HND", device=device)
    got = trtllm_batch_context_with_kv_cache(
        batch.q, (batch.k, batch.v), None, batch.block_tables, batch.seq_lens.to(torch.uint32), 20, 54, 32**-0.5, 1.0,
        2, batch.qo_indptr, None,
    )  # fmt: skip
    batch.check(got, causal=True)


def test_context_options(device: str):
    batch = make_batch([54, 97], [20, 30], device=device)
    sinks = torch.linspace(-1, 2, 4, device=device)
    got = context(batch, window_left=15, sinks=[sinks], bmm1_scale=torch.tensor([0.3], device=device), return_lse=True)
    batch.check(got, causal=True, window_left=15, sinks=sinks, scale=0.3)
    wide = context(batch, out_dtype="float32")
    assert wide.dtype == torch.float32
    batch.check(wide, causal=True)
    batch.v = batch.k
    batch.check(context(batch, kv_cache=batch.combined[:, :1]), causal=True)


def test_context_of_float8(device: str):
    batch = make_batch([54, 97], [20, 30], dtype=E4M3, device=device)
    o, lse = context(batch, bmm2_scale=torch.tensor([1.0], device=device), return_lse=True)
    assert o.dtype == torch.bfloat16
    batch.check((o, lse), causal=True)
    assert context(batch, out_dtype=E4M3, bmm2_scale=0.5).dtype == E4M3


def test_bad_context_input():
    batch = make_batch([54, 97], [20, 30])
    for match, said in (
        ("o_sf_scale: expected None", {"o_sf_scale": 1.0}),
        ("kv_cache_sf: expected None", {"kv_cache_sf": batch.k}),
        ("uses_shared_paged_kv_idx", {"uses_shared_paged_kv_idx": False}),
        ("query: expected 50 rows", {"query": batch.q[:-1]}),
        ("kv_layout", {"kv_layout": "DHN"}),
        ("out: expected shape", {"out": batch.q[1:]}),
    ):
        with pytest.raises(ValueError, match=match):
            context(batch, **said)
    arguments = [batch.q, batch.combined, None, batch.block_tables, batch.seq_lens, 30, 97, 1.0, 1.0, 2]
    for match, place, value in (("batch_size: expected 2", 9, 3), ("max_q_len: expected at least 30", 5, 29)):
        wrong = [value if i == place else a for i, a in enumerate(arguments)]
        with pytest.raises(ValueError, match=match):
            trtllm_batch_context_with_kv_cache(*wrong, batch.qo_indptr, None, kv_layout="NHD")


# ---- cuDNN ----


def padded(lse: torch.Tensor, lengths: list[int], longest: int) -> torch.Tensor:
    """``[T, H]`` as ``[B, longest, H]``."""
    out = torch.full((len(lengths), longest, lse.shape[1]), -math.inf, dtype=lse.dtype)
    for b, part in enumerate(lse.split(lengths)):
        out[b, : len(part)] = part
    return out


def check_padded(got, batch, longest: int, rows: torch.Tensor | None = None, **options) -> None:
    """Hold outputs (in ``rows``, if not all) and a padded LSE against the oracle."""
    o, lse = got
    right = []
    for dtype in (torch.float64, torch.float16):
        exact, sums = batch.attention(dtype, **options)
        right.append((exact, padded(sums, batch.qo_lens, longest)))
    check(o if rows is None else o[rows], *right)
    assert lse.dtype == torch.float32
    finite = right[0][1].isfinite()
    assert torch.equal(lse.cpu().isfinite(), finite)
    assert (lse.cpu()[~finite] == -math.inf).all()
    eps = torch.finfo(torch.float16).eps * right[0][1][finite].abs().max()
    assert (lse.cpu() - right[0][1])[finite].abs().max() <= 2 * (right[1][1] - right[0][1])[finite].abs().max() + eps


def four(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device).view(-1, 1, 1, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("units", ["elements", "tokens"])
def test_cudnn_over_pages(causal: bool, units: str, device: str):
    batch = make_batch([54, 12, 97], [20, 1, 30], layout="HND", device=device)
    per = 4 * 32 if units == "elements" else 1
    offsets = batch.qo_indptr * per
    said = {"max_token_per_sequence": 31, "max_sequence_kv": 97, "causal": causal, "block_tables": batch.block_tables}
    got = cudnn_batch_prefill_with_kv_cache(
        batch.q, batch.k, batch.v, 32**-0.5, None, **said, actual_seq_lens_q=four(batch.qo_lens, device),
        actual_seq_lens_kv=four(batch.kv_lens, device), batch_offsets_q=offsets, batch_offsets_o=offsets.clone(),
        batch_offsets_units=units, return_lse=True,
    )  # fmt: skip
    check_padded(got, batch, 31, causal=causal)
    short = {"actual_seq_lens_kv": batch.seq_lens.cpu(), "batch_offsets_q": offsets, "batch_offsets_units": units}
    o, lse = cudnn_batch_prefill_with_kv_cache(
        batch.q, batch.k, batch.v, 32**-0.5, None, **said, **short, return_lse=False
    )
    assert lse is None
    assert torch.equal(o, got[0])


def test_cudnn_over_packed_keys(device: str):
    """Dqk 192 and Dvo 128, as DeepSeek's prefill has them."""
    batch = make_batch([54, 12], [20, 12], heads=(2, 2), dim=192, dim_v=128, device=device)
    k, v = (torch.cat(t).to(device) for t in zip(batch.keys(0), batch.keys(1), strict=True))
    lengths = {"actual_seq_lens_q": four([20, 12], device), "actual_seq_lens_kv": four([54, 12], device)}
    kv = torch.tensor([0, 54, 66], dtype=torch.int32, device=device)
    out, lse = torch.empty(32, 2, 128, device=device).half(), torch.empty(2, 20, 2, device=device)
    for said in (
        {**lengths, "batch_offsets_k": kv * 2 * 192, "batch_offsets_v": kv * 2 * 128},
        {**lengths, "out": out, "lse": lse},
        {"batch_offsets_q": batch.qo_indptr, "batch_offsets_k": kv, "batch_offsets_units": "tokens"},
    ):
        got = cudnn_batch_prefill_with_kv_cache(
            batch.q, k, v, 192**-0.5, None, max_token_per_sequence=20, max_sequence_kv=54, causal=True,
            return_lse=True, **said,
        )  # fmt: skip
        check_padded(got, batch, 20, causal=True)
        assert (got[0] is out, got[1] is lse) == ("out" in said, "out" in said)


def test_cudnn_with_rows_between_requests(device: str):
    """Offsets and lengths say where requests lie and end; the rows between them are nobody's, here NaN."""
    batch = make_batch([54, 12, 30], [20, 7, 9], layout="HND", device=device)
    starts = [3, 40, 47, 60]
    rows = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, batch.qo_lens, strict=False)])
    q = torch.full((60, 4, 32), math.nan, device=device).half()
    q[rows.to(device)] = batch.q
    moved = [1, 21, 28, 60]
    offsets = torch.tensor([starts, moved], dtype=torch.int32, device=device) * 4 * 32
    said = {
        "max_token_per_sequence": 20, "max_sequence_kv": 54, "causal": True, "return_lse": True,
        "actual_seq_lens_q": four(batch.qo_lens, device), "actual_seq_lens_kv": four(batch.kv_lens, device),
        "block_tables": batch.block_tables, "batch_offsets_q": offsets[0],
    }  # fmt: skip
    got = cudnn_batch_prefill_with_kv_cache(q, batch.k, batch.v, 32**-0.5, None, **said)
    check_padded(got, batch, 20, rows, causal=True)
    others = torch.ones(60, dtype=torch.bool)
    others[rows] = False
    assert (got[0].cpu()[others] == 0).all()
    got = cudnn_batch_prefill_with_kv_cache(q, batch.k, batch.v, 32**-0.5, None, **said, batch_offsets_o=offsets[1])
    rows = torch.cat([torch.arange(a, a + n) for a, n in zip(moved, batch.qo_lens, strict=False)])
    check_padded(got, batch, 20, rows, causal=True)


def test_cudnn_scales(device: str):
    batch = make_batch([54], [20], layout="HND", dtype=E4M3, device=device)
    scales = {f"{n}_scale": torch.full((1, 1, 1, 1), x, device=device) for n, x in (("q", 0.5), ("k", 2.0), ("v", 3.0))}
    o, _ = cudnn_batch_prefill_with_kv_cache(
        batch.q, batch.k, batch.v, 0.2, None, max_token_per_sequence=20, max_sequence_kv=54, causal=True,
        return_lse=False, actual_seq_lens_q=four([20], device), actual_seq_lens_kv=four([54], device),
        block_tables=batch.block_tables, **scales, o_data_type=torch.float16,
    )  # fmt: skip
    k, v = batch.keys(0)
    right = (
        attention(batch.q, k, v.double() * 3, causal=True, scale=0.2, dtype=d) for d in (torch.float64, torch.bfloat16)
    )
    check(o, *right)


def test_bad_cudnn_input():
    batch = make_batch([54, 12], [20, 7], layout="HND")
    good = {
        "max_token_per_sequence": 20, "max_sequence_kv": 54, "causal": True, "return_lse": True,
        "actual_seq_lens_q": four([20, 7], "cpu"), "actual_seq_lens_kv": four([54, 12], "cpu"),
        "block_tables": batch.block_tables,
    }  # fmt: skip
    for match, kind, said in (
        ("batch_offsets_units", ValueError, {"batch_offsets_units": "bytes"}),
        ("batch_offsets_stats: expected None", ValueError, {"batch_offsets_stats": torch.zeros(3)}),
        ("actual_seq_lens_q: expected lengths, or batch_offsets_q", ValueError, {"actual_seq_lens_q": None}),
        ("actual_seq_lens_kv: expected lengths", ValueError, {"actual_seq_lens_kv": None}),
        ("max_token_per_sequence: expected at least 20", ValueError, {"max_token_per_sequence": 19}),
        ("batch_offsets_q: expected 3 entries", ValueError, {"batch_offsets_q": torch.zeros(5, dtype=torch.int32)}),
        ("lse: expected shape", ValueError, {"lse": torch.empty(27, 4)}),
        ("out: expected", TypeError, {"out": torch.empty(27, 4, 32), "o_data_type": torch.float16}),
        ("actual_seq_lens_q: expected an int32", TypeError, {"actual_seq_lens_q": torch.ones(2)}),
    ):
        with pytest.raises(kind, match=match):
            cudnn_batch_prefill_with_kv_cache(batch.q, batch.k, batch.v, 0.2, None, **{**good, **said})
