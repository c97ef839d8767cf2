"""What stays of a list that would be longer than its cap."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn import selectors
from sparseattn.masks import BlockMask
from sparseattn.ops.scores import (
    antidiagonal_scores,
    chunks,
    flexprefill_blocks,
    landmark_scores,
    last_query_mass,
    pooled_scores,
    problem,
)
from sparseattn.ops.scores.block_lists import block_sums, crossing_mass, difference_index
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.selectors import HeadsConfig

SIZE, LENGTH, CAP = 64, 640, 4

# Options under which a method keeps much.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "landmark": ("landmark", {"tau": 0.001, "floor": 1}),
    "landmark, all": ("landmark", {"tau": 0.0, "floor": 1}),
    "landmark, shared": ("landmark", {"tau": 0.01, "floor": 1, "group_shared": True}),
    "landmark, density": ("landmark", {"density": 0.8, "floor": 1}),
    "xattention": ("xattention", {"threshold": 0.95}),
    "xattention, all": ("xattention", {"threshold": 1.0}),
    "xattention, relative": ("xattention", {"rule": "relative", "threshold": 0.01, "aggregate": "max"}),
    "flashprefill": ("flashprefill", {"threshold": 0.001, "num_sink_tokens": 1, "num_local_tokens": 0}),
    "flashprefill, global": ("flashprefill", {
        "rule": "global", "density": 0.9, "num_last_tokens": 0, "num_sink_tokens": 1, "num_local_tokens": 0,
    }),
    "oracle": ("oracle", {"threshold": 0.0001}),
    "flexprefill": ("flexprefill", {"gamma": 0.97, "tau": 0.0, "min_budget": 256}),
    "flexprefill, aware": ("flexprefill", {"gamma": 0.97, "tau": 10.0, "min_budget": 64}),
    "minference": ("minference", {"vertical_size": 20, "slash_size": 300, "num_sink_tokens": 1, "num_local_tokens": 1}),
}  # fmt: skip


def make(length: int = LENGTH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    q = torch.randn(1, length, 2, 16, dtype=dtype)
    return q * (1 + q.abs()), torch.randn(1, length, 1, 16, dtype=dtype) * 1.5


def select(case: str, impl: str = "reference", inputs: tuple[Tensor, Tensor] | None = None, **more: Any) -> BlockMask:
    method, options = METHODS[case]
    config = selectors.configure(method, {**options, "block_size": SIZE, **more})
    return selectors.get(method).select(*(inputs or make()), config, impl=impl).validate()


def free_blocks() -> Tensor:
    """bool [MB, NB]: below the diagonal, but for the first column."""
    n = LENGTH // SIZE
    return torch.ones(n, n, dtype=torch.bool).tril(-1).index_fill(1, torch.tensor(0), False)


@pytest.mark.parametrize("case", METHODS)
def test_a_cap_cuts_lists_and_nothing_else(case: str) -> None:
    full, capped = select(case), select(case, max_blocks=CAP)
    assert capped.kv_indices.shape[-1] in (CAP, 2 * CAP)  # the latter where query heads are united
    kept, all_kept = capped.to_blocks(), full.to_blocks()
    assert not (kept & ~all_kept).any(), "what is not chosen without a cap is not with one"
    most = 2 * CAP if capped.kv_indices.shape[-1] > CAP else CAP
    assert torch.equal(capped.kv_num_blocks, full.kv_num_blocks.clamp(max=most)) or most > CAP
    assert (full.kv_num_blocks > CAP).any(), "the case must be one that a cap changes"
    forced = ~free_blocks() & torch.ones_like(free_blocks()).tril()
    if not case.startswith("minference"):
        assert kept[..., forced].all(), "the first block and the diagonal stay"
    assert torch.equal(select(case, max_blocks=CAP).to_blocks(), kept)


@pytest.mark.parametrize("case", [c for c in METHODS if c not in ("landmark", "xattention, all", "oracle")])
def test_both_implementations_cut_alike(case: str, device: str) -> None:
    pytest.importorskip("triton")
    inputs = tuple(x.to(device) for x in make(5 * SIZE))  # the interpreter takes its time
    got, expected = (select(case, impl, inputs, max_blocks=3) for impl in ("triton", "reference"))
    assert torch.equal(got.to_blocks(), expected.to_blocks())
    assert (select(case, "reference", inputs).kv_num_blocks > 3).any()


def scores_of(case: str) -> Tensor:
    """``[Hq, MB, NB]``: by what a method orders blocks."""
    q, k = make()
    options: dict[str, Any] = {"block_size": SIZE}
    if case.startswith("landmark"):
        return landmark_scores(q, k, **options)[0]
    if case.startswith("xattention"):
        return antidiagonal_scores(q, k, aggregate="max" if "relative" in case else "sum", **options)[0]
    if case.startswith("oracle"):
        return pooled_scores(q, k, page_size=1, row_softmax=True, aggregate="max", **options)[0]
    if case.startswith("flashprefill"):
        return pooled_scores(q, k, page_size=SIZE, **options)[0]
    mass = torch.stack(last_query_mass(q, k, num_queries=SIZE))
    mass[..., 0] = math.inf  # the first keys and the nearest ones are forced
    sums = block_sums(mass, SIZE, LENGTH // SIZE)
    n = torch.arange(LENGTH // SIZE)
    band = crossing_mass(sums[1], resolve_sequences(q, k), SIZE, len(n))
    return torch.maximum(sums[0, 0, :, None, :], band[0][:, difference_index(n[:, None], n, len(n))])


@pytest.mark.parametrize("case", [c for c in METHODS if "shared" not in c and "aware" not in c])
def test_the_best_stay(case: str) -> None:
    score = scores_of(case)
    full, kept = (select(case, **more).to_blocks()[0] for more in ({}, {"max_blocks": CAP}))
    free = free_blocks()
    for h in range(kept.shape[0]):
        for m in range(kept.shape[1]):
            stay, dropped = score[h, m][kept[h, m] & free[m]], score[h, m][full[h, m] & ~kept[h, m] & free[m]]
            if len(stay) and len(dropped):
                assert stay.min() >= dropped.max(), (h, m)


def test_slashes_and_verticals_stay_before_blocks_of_query_aware_heads() -> None:
    q, k = make()
    options: dict[str, Any] = {"tau": 10.0, "min_budget": 128, "block_size": SIZE}
    assert flexprefill_blocks(q, k, gamma=0.99, **options)[2].all()
    plan = select("flexprefill", gamma=0.0, min_budget=128).to_blocks()
    kept = select("flexprefill, aware", gamma=0.99, min_budget=128, max_blocks=6).to_blocks()
    assert ((plan & ~kept).sum(-1) == (plan.sum(-1) - 6).clamp(min=0)).all()
    assert (kept & ~plan).any(), "where the plan leaves room others are kept"


@pytest.mark.parametrize("case", ["landmark", "landmark, all", "xattention", "oracle"])
def test_a_chunk_selects_what_it_does_inside_the_prompt(case: str) -> None:
    q, k = make()
    whole = select(case, max_blocks=CAP)
    start, stop = 4 * SIZE, 7 * SIZE
    part = select(case, inputs=(q[:, start:stop], k[:, :stop]), max_blocks=CAP)
    assert torch.equal(part.kv_num_blocks, whole.kv_num_blocks[..., 4:7])
    for n in range(CAP):
        listed = part.kv_num_blocks > n
        assert torch.equal(part.kv_indices[..., n][listed], whole.kv_indices[..., 4:7, n][listed])


@pytest.mark.parametrize("case", METHODS)
def test_there_is_a_cap_without_asking(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, free = select(case, max_blocks=CAP), select(case, max_blocks=1000)
    monkeypatch.setattr(problem, "MAX_BLOCKS", CAP)
    mask = select(case)
    if "density" in METHODS[case][1]:  # what is asked for is not cut into
        share = math.ceil(METHODS[case][1]["density"] * LENGTH / SIZE)
        assert share <= mask.kv_indices.shape[-1] <= share + 1
    else:
        assert torch.equal(mask.to_blocks(), asked.to_blocks())
    assert torch.equal(select(case, max_blocks=1000).to_blocks(), free.to_blocks())


def test_rows_of_the_last_queries_keep_their_best() -> None:
    q, k = make()
    options = {"threshold": 1.0, "num_last_tokens": 100, "max_blocks": 6}
    kept = select("flashprefill", **options).to_blocks()
    score = pooled_scores(q, k, page_size=SIZE, block_size=SIZE)[0, :, -1, 1:-1]
    best = score.argsort(-1, descending=True)[:, :4] + 1
    expected = torch.zeros_like(kept[0, :, -1]).scatter(-1, best, True)
    expected[:, [0, -1]] = True
    assert torch.equal(kept[0, :, -1], expected)
    assert kept[0, :, 3].sum() < 2 * 4, "other rows go by the rule"


@pytest.mark.parametrize("case", ["landmark, density", "flashprefill, global", "xattention, global"])
def test_a_share_of_all_scores_is_found_without_holding_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "xattention, global", ("xattention", {"rule": "global", "density": 0.5}))
    inputs = make(5 * SIZE)
    whole = select(case, "triton", inputs)
    pooled = pytest.importorskip("sparseattn.ops.scores.pooled_triton")
    antidiagonal = pytest.importorskip("sparseattn.ops.scores.triton")
    for module in (chunks, antidiagonal):
        monkeypatch.setattr(module, "WHOLE_BYTES", 1)
        monkeypatch.setattr(module, "WORKSPACE_BYTES", 3 * 4 * 2 * 5)  # three rows of blocks
    assert pooled.chunk_rows(5, 4 * 2 * 5, True) == 3
    got = select(case, "triton", inputs)
    assert torch.equal(got.to_blocks(), whole.to_blocks())
    assert torch.equal(got.to_blocks(), select(case, "reference", inputs).to_blocks())


@pytest.mark.parametrize("method", ["landmark", "xattention", "flexprefill", "minference", "bound"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_caps(method: str, value: Any) -> None:
    with pytest.raises(ValueError, match="max_blocks: expected an int of at least 1"):
        selectors.configure(method, {"max_blocks": value})


def test_heads_side_by_side_need_no_copy_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    select_heads = selectors.get("heads").select

    q, k = torch.randn(1, 320, 8, 16), torch.randn(1, 320, 4, 16)
    classes = {"a": {"method": "landmark", "tau": 0.05}, "b": {"method": "xattention", "threshold": 0.8}}
    config = HeadsConfig(heads=("a", "b", "b", "a"), classes=classes, block_size=64)
    whole = select_heads(q, k, config)

    monkeypatch.setattr(sys.modules["sparseattn.selectors.heads"], "_COPY_BYTES", 1)
    assert torch.equal(select_heads(q, k, config).to_blocks(), whole.to_blocks())
