"""A plan that differs from the one before it in contents alone: what its calls come to is known."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

import sparseattn.flashinfer as fi
from sparseattn.kernels.usual import Usual, UsualCalls

WORKSPACE = torch.empty(8, dtype=torch.uint8)


class Known:
    """In the place of a call that a plan has made: notes where the next plan's tensors lie."""

    places: dict[str, int] | None = None

    def fits(self, *tensors: Tensor) -> bool:
        return False

    def moved(self, places: dict[str, int]) -> Known:
        other = Known()
        other.places = places
        return other


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def teach(calls: UsualCalls | dict[Any, UsualCalls]) -> None:
    if isinstance(calls, dict):
        calls = calls.setdefault(None, UsualCalls())
    calls.learn((torch.zeros(1),), lambda: cast("Usual", Known()))


def places(calls: UsualCalls | dict[Any, UsualCalls]) -> dict[str, int] | None:
    if isinstance(calls, dict):
        calls = calls.get(None, UsualCalls())
    return next((cast("Known", known).places for found in calls._calls.values() for known in found), None)


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in tensors.items() if t is not None}


CHANGES: list[dict[str, Any]] = [
    {"num_qo_heads": 4}, {"window_left": 3}, {"sm_scale": 0.5}, {"logits_soft_cap": 5.0}, {"page_size": 8},
    {"q_data_type": torch.float32}, {"pos_encoding_mode": "ALIBI"}, {"q_len_per_req": 2},
    {"indices": numbers(2, 0, 1, 4)},
]  # fmt: skip


@pytest.mark.parametrize("changes", [{}, *CHANGES], ids=lambda changes: next(iter(changes), "same"))
def test_decode(changes: dict[str, Any]) -> None:
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    given: dict[str, Any] = {
        "indptr": numbers(0, 2, 3), "indices": numbers(2, 0, 1), "last_page_len": numbers(1, 3), "num_qo_heads": 2,
        "num_kv_heads": 2, "head_dim": 64, "page_size": 4,
    }  # fmt: skip
    wrapper.plan(**given)
    teach(wrapper._planned._usual)
    wrapper.plan(**given | {"indptr": numbers(0, 1, 3)} | changes)
    plan = wrapper._planned
    expected = addresses(**plan.table._asdict(), cu_seqlens_q=plan.cu_seqlens_q)
    assert places(plan._usual) == (None if changes else expected)


def test_buffers_of_graphs_do_not_stay_as_they_were() -> None:
    buffers = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    wrapper = fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(WORKSPACE, *buffers)
    for _ in range(2):
        wrapper.plan(numbers(0, 2, 3), numbers(2, 0, 1), numbers(1, 3), 2, 2, 64, 4)
        assert places(wrapper._planned._usual) is None
        teach(wrapper._planned._usual)


@pytest.mark.parametrize("causal", [True, False])
def test_prefill_and_masks(causal: bool) -> None:
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    tables = numbers(0, 2, 3), numbers(0, 2, 3), numbers(2, 0, 1), numbers(1, 3)
    wrapper.plan(*tables, 2, 2, 64, 4, causal=True)
    teach(wrapper._planned._usual)
    wrapper.plan(*tables, 2, 2, 64, 4, causal=causal)
    assert (places(wrapper._planned._usual) is None) != causal
    wrapper.plan(*tables, 2, 2, 64, 4, custom_mask=torch.ones(2 * 5 + 3, dtype=torch.bool))
    assert places(wrapper._planned._usual) is None


@pytest.mark.parametrize("longer", [False, True])
def test_latent(longer: bool) -> None:
    wrapper = fi.mla.BatchMLAPagedAttentionWrapper(WORKSPACE)
    rest = 16, 512, 64, 4, False, 0.07, torch.bfloat16, torch.bfloat16
    wrapper.plan(numbers(0, 1, 2), numbers(0, 2, 3), numbers(2, 0, 1), numbers(5, 3), *rest)
    teach(wrapper._again)
    pages = numbers(1, 0, 2, 3) if longer else numbers(1, 0, 2)
    wrapper.plan(numbers(0, 1, 2), numbers(0, 1, 3), pages, numbers(2, 7), *rest)
    plan = wrapper._planned
    assert places(wrapper._again) == (None if longer else addresses(**plan.table._asdict(), cu_seqlens_q=plan.rows))


@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"sm_scale": 0.5}, {"mask": None}], ids=str)
def test_blocks(changes: dict[str, Any]) -> None:
    wrapper = fi.BlockSparseAttentionWrapper(WORKSPACE)
    sizes = 256, 256, 64, 64, 2, 2, 64
    wrapper.plan(numbers(0, 1, 2, 4, 5), numbers(0, 1, 0, 2, 3), *sizes)
    teach(wrapper._planned.again)
    if "mask" in changes:
        changes = {"mask": torch.ones(5, 64, 64, dtype=torch.bool)}
    wrapper.plan(numbers(0, 2, 3, 4, 5), numbers(3, 1, 0, 2, 3), *sizes, **changes)
    lists = wrapper._planned.rows.lists
    if changes:
        assert places(wrapper._planned.again) is None
    else:
        expected = addresses(kv_num_blocks=lists.kv_num_blocks, kv_indices=lists.kv_indices)
        assert places(wrapper._planned.again) == expected


NAMED: dict[str, Any] = {"M": 256, "N": 256, "R": 64, "C": 64, "num_qo_heads": 2, "num_kv_heads": 2, "head_dim": 64}
DIFFERENT: dict[str, dict[str, Any]] = {
    "number": {"sm_scale": 0.5},
    "type": {"causal": 0},
    "tensor": {"sm_scale": torch.tensor(0.5)},
    "heads": {"num_qo_heads": 4},
    "mask": {"mask": torch.ones(6, 64, 64, dtype=torch.bool)},
    "longer": {"M": 320, "indptr": numbers(0, 2, 3, 4, 6, 6)},
    "fewer": {"indices": numbers(0, 1, 3), "indptr": numbers(0, 1, 2, 3, 3)},
}


@pytest.mark.parametrize("which", ["same", *DIFFERENT])
def test_only_plans_that_say_the_same_are_not_checked(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of another pattern, and of more blocks, need no checks; whatever else differs does."""
    pytest.importorskip("triton", reason="needs Triton")
    from sparseattn.flashinfer import block_sparse
    from sparseattn.ops.bsr import rows

    monkeypatch.setattr(rows, "launchable", lambda *tensors: True)
    made = []
    make = block_sparse.make_rows
    monkeypatch.setattr(block_sparse, "make_rows", lambda *a, **k: made.append(1) or make(*a, **k))
    wrapper = fi.BlockSparseAttentionWrapper(WORKSPACE)
    wrapper.plan(indptr=numbers(0, 1, 2, 4, 5), indices=numbers(0, 1, 0, 2, 3), **NAMED)
    following = {"indptr": numbers(0, 2, 3, 4, 6), "indices": numbers(3, 1, 0, 2, 3, 1), **NAMED}
    wrapper.plan(**following | DIFFERENT.get(which, {}))
    assert len(made) == (1 if which == "same" else 2)
    fresh = fi.BlockSparseAttentionWrapper(WORKSPACE)
    fresh.plan(**following | DIFFERENT.get(which, {}))
    got, expected = wrapper._planned, fresh._planned
    assert got.options == expected.options
    assert got.shapes == expected.shapes
    for x, y in ((got.rows.bounds, expected.rows.bounds), (got.rows.indices, expected.rows.indices)):
        assert torch.equal(x, y)
    if expected.rows.lists is not None:
        assert torch.equal(got.rows.lists.to_blocks(), expected.rows.lists.to_blocks())
    q, k, v = (torch.randn(got.shapes[n > 0], dtype=torch.float16) for n in range(3))
    assert torch.equal(wrapper.run(q, k, v), fresh.run(q, k, v))
