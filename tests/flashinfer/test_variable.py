"""VariableBlockSparseAttentionWrapper, in FlashInfer's own form and in the documents', by the book."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import attention, check
from torch import Tensor

from sparseattn.flashinfer.variable import VariableBlockSparseAttentionWrapper
from sparseattn.testing import make_qkv

F16 = torch.float16
ROWS = torch.tensor([[10, 0, 21, 9], [1, 30, 1, 8]], dtype=torch.int32)
COLS = torch.tensor([[20, 1, 0, 27], [12, 12, 12, 12]], dtype=torch.int32)
LQ, LK = 40, 48


def blocks() -> Tensor:
    b = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    b[0, 2] = False  # rows that see nothing
    return b


def seen(b: Tensor, rows: Tensor = ROWS, cols: Tensor = COLS) -> Tensor:
    """bool ``[Hkv, Lq, Lk]`` of the blocks."""
    each = zip(b, rows.long(), cols.long(), strict=True)
    return torch.stack([one.repeat_interleave(r, 0).repeat_interleave(c, 1) for one, r, c in each])


def tensors(device: str = "cpu", heads: tuple[int, int] = (4, 2), dtype: torch.dtype = F16) -> list[Tensor]:
    """q, k, v as ``run`` takes them: ``[H, L, D]``."""
    return [t[0].transpose(0, 1).contiguous() for t in make_qkv(1, LQ, LK, *heads, 16, dtype=dtype, device=device)]


def wrapper(device: str = "cpu", **options: Any) -> VariableBlockSparseAttentionWrapper:
    return VariableBlockSparseAttentionWrapper(torch.empty(8, dtype=torch.uint8, device=device), **options)


def planned(device: str = "cpu", **options: Any) -> VariableBlockSparseAttentionWrapper:
    w = wrapper(device)
    w.plan(blocks().to(device), ROWS.to(device), COLS.to(device), 4, 2, 16, **options)
    return w


def check_heads_first(got: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> None:
    """Hold ``got`` ``[Hq, Lq, D]`` and LSE ``[Hq, Lq]`` against the oracle; ``mask`` ``[Hkv, Lq, Lk]``."""
    tokens_first = [t.transpose(0, 1) for t in (q, k, v)]
    mask = mask.repeat_interleave(q.shape[0] // mask.shape[0], 0)
    right = [attention(*tokens_first, mask=mask, dtype=d, **options) for d in (torch.float64, q.dtype)]
    turned = got.transpose(0, 1) if isinstance(got, Tensor) else (got[0].transpose(0, 1), got[1].t())
    check(turned, *right)


def causal(mask: Tensor) -> Tensor:
    return mask & (torch.arange(LK) <= torch.arange(LQ)[:, None] + LK - LQ)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"sm_scale": 0.4, "logits_soft_cap": 2.0}], ids=["plain", "causal", "scaled"]
)
def test_own_form(options: dict, device: str) -> None:
    q, k, v = tensors(device)
    w = planned(device, **options)
    got = w.run(q, k, v, return_lse=True)
    mask = causal(seen(blocks())) if options.get("causal") else seen(blocks())
    book = {"scale": options.get("sm_scale"), "softcap": options.get("logits_soft_cap", 0.0)}
    check_heads_first(got, q, k, v, mask, **book)
    assert got[0].shape == q.shape
    assert got[0].is_contiguous()
    empty = ~mask.any(-1).repeat_interleave(2, 0)
    assert empty.any()
    assert torch.all(got[1].cpu()[empty] == -torch.inf)
    assert torch.equal(w.run(q, k, v), got[0])
    for again in (w.run_return_lse(q, k, v), w.forward_return_lse(q, k, v)):
        assert torch.equal(again[0], got[0])
        assert torch.equal(again[1], got[1])


def test_results_go_where_they_should(device: str) -> None:
    q, k, v = tensors(device)
    w = planned(device)
    o, lse = w.run(q, k, v, return_lse=True)
    out, out_lse = torch.empty_like(q), torch.empty(4, LQ, device=device)
    assert w.run(q, k, v, out=out, lse=out_lse) is out
    assert torch.equal(out, o)
    assert torch.equal(out_lse, lse)
    strided = torch.empty(LQ, 4, 16, dtype=F16, device=device).transpose(0, 1)
    assert w.run(q, k, v, out=strided) is strided
    assert torch.equal(strided, o)


def test_one_pattern_for_all_heads_or_one_for_each_query_head(device: str) -> None:
    q, k, v = tensors(device)
    b = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    rows, cols = (t.repeat_interleave(2, 0) for t in (ROWS, COLS))
    for heads in (1, 4):
        w = wrapper(device)
        w.plan(*(t[:heads].to(device) for t in (b, rows, cols)), 4, 2, 16)
        mask = seen(b[:heads], rows[:heads], cols[:heads])
        check_heads_first(w.run(q, k, v), q, k, v, mask)


def test_forward_keeps_the_plan() -> None:
    q, k, v = tensors()
    w = planned(causal=True, logits_soft_cap=2.0)
    once = w.run(q, k, v)
    assert torch.equal(w.forward(q, k, v), once)
    scaled = w.forward(q, k, v, sm_scale=0.5)
    check_heads_first(scaled, q, k, v, causal(seen(blocks())), scale=0.5, softcap=2.0)
    assert torch.equal(w.run(q, k, v), once)
    w.begin_forward(blocks(), ROWS, COLS, 4, 2, 16)
    w.end_forward()
    check_heads_first(w.forward(q, k, v), q, k, v, seen(blocks()))


def test_a_plan_does_not_follow_its_tensors(device: str) -> None:
    q, k, v = tensors(device)
    b, rows, cols = (t.to(device).clone() for t in (blocks(), ROWS, COLS))
    w = wrapper(device)
    w.plan(b, rows, cols, 4, 2, 16)
    b.fill_(False), rows.zero_(), cols.zero_()
    check_heads_first(w.run(q, k, v), q, k, v, seen(blocks()))


@pytest.mark.gpu
def test_patterns_may_come_from_the_cpu() -> None:
    q, k, v = tensors("cuda")
    w = wrapper("cuda")
    w.plan(blocks(), ROWS, COLS, 4, 2, 16)
    check_heads_first(w.run(q, k, v), q, k, v, seen(blocks()))


@pytest.mark.gpu
def test_neither_planning_nor_running_waits() -> None:
    q, k, v = tensors("cuda")
    b, rows, cols = (t.cuda() for t in (blocks(), ROWS, COLS))
    w = wrapper("cuda")
    w.plan(b, rows, cols, 4, 2, 16, causal=True)
    w.run(q, k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        w.plan(b, rows, cols, 4, 2, 16, causal=True)
        w.run(q, k, v, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_sizes_on_a_gpu_are_checked_on_request() -> None:
    wrong = (blocks().cuda(), ROWS.cuda(), (COLS + 1).cuda())
    q, k, v = tensors("cuda")
    w = wrapper("cuda")
    w.plan(*wrong, 4, 2, 16, validate=True)
    with pytest.raises(ValueError, match=r"q and k: expected \(Lq, Lk\) = \(40, 52\)"):
        w.run(q, k, v)
    w.plan(*wrong, 4, 2, 16)
    cut = seen(blocks(), cols=COLS + 1)[:, :, :LK]  # what lies past the end is cut off
    check_heads_first(w.run(q, k, v), q, k, v, cut)


# ---- positions among the selected keys, as FlashInfer counts ----


def gathered_oracle(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    """Each row of blocks of each KV head as a request of its own over the keys that it selects."""
    o, lse = torch.zeros(4, LQ, 16, dtype=dtype), torch.full((4, LQ), -math.inf, dtype=torch.float64)
    mask = seen(blocks())
    for h in range(2):
        edges = [0, *ROWS[h].cumsum(0).tolist()]
        for m in range(4):
            rows = slice(edges[m], edges[m + 1])
            if edges[m + 1] == edges[m]:
                continue
            keys = mask[h, edges[m]]
            parts = q[2 * h : 2 * h + 2, rows].transpose(0, 1), *(t[h, keys][:, None] for t in (k, v))
            part_o, part_lse = attention(*parts, causal=True, dtype=dtype, **options)
            o[2 * h : 2 * h + 2, rows] = part_o.transpose(0, 1)
            lse[2 * h : 2 * h + 2, rows] = part_lse.t().double()
    return o.transpose(0, 1), lse.t()


@pytest.mark.parametrize("positions", ["NONE", "ROPE_LLAMA"])
def test_gathered_positions_are_flashinfers(positions: str, device: str) -> None:
    q, k, v = tensors(device)
    w = planned(device, causal=True, gathered_causal=True, pos_encoding_mode=positions)
    o, lse = w.run(q, k, v, return_lse=True)
    right = [gathered_oracle(*(t.cpu() for t in (q, k, v)), d, positions=positions) for d in (torch.float64, F16)]
    check((o.transpose(0, 1), lse.t()), *right)
    original = planned(device, causal=True).run(q, k, v)
    assert not torch.allclose(o, original, atol=1e-2), "or the flag would say nothing"


# ---- the documents' form ----


def test_documented_form_is_dense_without_a_pattern(device: str) -> None:
    q, k, v = make_qkv(2, LQ, LK, 4, 2, 16, dtype=F16, device=device)
    w = wrapper(device, kv_layout="NHD")
    w.plan(q, k, v, num_qo_heads=4, num_kv_heads=2, head_dim=16)
    o, lse = w.forward_return_lse(q, k, v)
    assert o.shape == (2, LQ, 4, 16)
    for b in range(2):
        check((o[b], lse[b]), *(attention(q[b], k[b], v[b], dtype=d) for d in (torch.float64, F16)))
    assert torch.equal(w.run(q, k, v), o)


def test_documented_form_with_a_pattern(device: str) -> None:
    q, k, v = make_qkv(2, LQ, LK, 4, 2, 16, dtype=F16, device=device)
    w = wrapper(device)
    pattern = {"block_mask_map": blocks(), "block_row_sz": ROWS, "block_col_sz": COLS}
    w.plan(q, k, v, 4, 2, 16, **{n: t.to(device) for n, t in pattern.items()}, causal=True)
    o = w.forward(q, k, v)
    mask = causal(seen(blocks())).repeat_interleave(2, 0)
    for b in range(2):
        check(o[b], *(attention(q[b], k[b], v[b], mask=mask, dtype=d) for d in (torch.float64, F16)))


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"block_mask_map": blocks().float()}, TypeError, "block_mask_map: expected a tensor of torch.bool"),
        ({"block_mask_map": blocks()[0]}, ValueError, "block_mask_map: expected 3 or 4 dimensions"),
        ({"block_mask_map": blocks()[None]}, ValueError, r"block_mask_map: expected \[Hkv, MB, NB\]"),
        ({"block_row_sz": ROWS.long()}, TypeError, "block_row_sz: expected a tensor of torch.int32"),
        ({"block_row_sz": torch.full((2, 3), 10).int()}, ValueError, r"block_row_sz: expected shape \(2, 4\)"),
        ({"block_col_sz": COLS - 1}, ValueError, "block_col_sz: expected sizes of at least 0, got -1"),
        ({"block_col_sz": COLS + torch.tensor([[0], [1]]).int()}, ValueError, "block_col_sz: expected sizes that add"),
        ({"num_kv_heads": 3}, ValueError, "num_qo_heads|block_mask_map"),
        ({"num_qo_heads": 5}, ValueError, "num_qo_heads: expected a multiple of num_kv_heads = 2"),
        ({"pos_encoding_mode": "ROPE_LLAMA"}, ValueError, "pos_encoding_mode: expected 'NONE' .* Rotate q and k"),
        ({"pos_encoding_mode": "ALIBI", "gathered_causal": True}, ValueError, "pos_encoding_mode: expected 'NONE'"),
        ({"pos_encoding_mode": "ROPE"}, ValueError, "pos_encoding_mode"),
        ({"kv_data_type": torch.float8_e4m3fn}, TypeError, "kv_data_type: expected torch.float16 like q_data_type"),
        ({"q_data_type": "int8"}, TypeError, "q_data_type"),
    ],
)
def test_bad_plans_name_the_argument(changes: dict, kind: type[Exception], message: str) -> None:
    arguments = {
        "block_mask_map": blocks(), "block_row_sz": ROWS, "block_col_sz": COLS, "num_qo_heads": 4, "num_kv_heads": 2,
        "head_dim": 16,
    }  # fmt: skip
    with pytest.raises(kind, match=message):
        wrapper().plan(**{**arguments, **changes})


def test_bad_runs_name_the_argument() -> None:
    q, k, v = tensors()
    w = wrapper()
    with pytest.raises(RuntimeError, match="plan"):
        w.run(q, k, v)
    w = planned()
    with pytest.raises(TypeError, match=r"q: expected torch\.float16, as planned, got torch\.float32"):
        w.run(q.float(), k, v)
    with pytest.raises(ValueError, match=r"k: expected .* of 2 heads and head_dim 16, as planned"):
        w.run(q, q, v)
    with pytest.raises(ValueError, match=r"q and k: expected \(Lq, Lk\) = \(40, 48\)"):
        w.run(q[:, :39], k, v)
    with pytest.raises(ValueError, match="v: expected 48 tokens like k"):
        w.run(q, k, v[:, :40])
    with pytest.raises(ValueError, match="out: expected shape"):
        w.run(q, k, v, out=torch.empty(2 * LQ, 2, 16, dtype=F16))
    with pytest.raises(TypeError, match=r"lse: expected torch\.float32"):
        w.run(q, k, v, lse=torch.empty(4, LQ, dtype=F16))
    batch = make_qkv(2, LQ, LK, 4, 2, 16, dtype=F16)
    w.plan(*batch)
    with pytest.raises(ValueError, match=r"q: expected \[B, S, Hq, D\]"):
        w.run(q, k, v)
    with pytest.raises(ValueError, match="head_dim: expected 16, as the tensors have it, got 32"):
        w.plan(*batch, head_dim=32)


def test_bad_wrappers_name_the_argument() -> None:
    with pytest.raises(ValueError, match="kv_layout: expected None or 'NHD', got 'HND'"):
        wrapper(kv_layout="HND")
    with pytest.raises(ValueError, match="backend"):
        wrapper(backend="fa9")


def test_tiles_of_a_graph_serve_no_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have contents when the graph is replayed; a call that is made before cuts its own."""
    from sparseattn.flashinfer import _variable

    w = wrapper()
    w.plan(blocks(), ROWS, COLS, 4, 2, 16, q_data_type=F16)
    learnt: list[Any] = []
    monkeypatch.setattr(w._planned.again, "learn", lambda given, make: learnt.append(given))
    with monkeypatch.context() as captured:
        captured.setattr(_variable, "capturing", lambda device: True)
        first = w.run(*tensors())
    assert w._planned._blocks == {}
    assert learnt == []
    second = w.run(*tensors())
    assert len(w._planned._blocks) == len(learnt) == 1
    assert torch.equal(first, second)
