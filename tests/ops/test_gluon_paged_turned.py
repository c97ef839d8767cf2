"""float8 caches and RoPE on Hopper: on that chip the kernel itself, without a GPU its logic, run by the emulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_cases import Case, build, visible

from sparseattn.ops.paged import PageLists, unsupported_reason
from sparseattn.testing import random_block_mask

pytest.importorskip("sparseattn.ops.paged.gluon", reason="needs Triton")
from test_gluon_paged import (
    DEVICE,
    LONG,
    MIXED,
    ON_HOPPER,
    _emulated,  # noqa: F401 (a fixture)
    attend,
    check,
    emulate,
    pytestmark,  # noqa: F401 (marks this file, too)
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

CASES = [
    Case("decode-shares", LONG, (8, 2), (128, 128), form="csr", cached=E4M3, scales="numbers"),
    Case("decode-group7-sinks", LONG, (14, 2), (64, 64), 32, "HND", sinks=True, cached=E5M2, scales="heads"),
    Case("mixed-group4-page8", MIXED, (4, 1), (128, 128), 8, cached=E4M3, scales="heads"),
    Case("group16-dim96-lost", ((9, 140), (2, 300)), (16, 1), (96, 80), 64, cached=E5M2, lost=True),
    Case("page256-dim256-window", ((40, 600), (1, 20)), (2, 1), (256, 256), 256, window=(200, 0), softcap=4.0,
         cached=E4M3),
    Case("not-causal-page24", ((70, 200),), (2, 2), (128, 128), 24, causal=False, cached=E4M3, form="combined"),
    Case("page1-csr", LONG, (4, 1), (128, 128), 1, form="csr", cached=E4M3),
    Case("page4-dim80-lost", ((40, 300), (1, 33)), (2, 1), (80, 64), 4, "HND", lost=True, cached=E5M2),
    Case("rope-decode", LONG, (8, 2), (128, 128), positions="rope"),
    Case("rope-dim64-window", MIXED, (4, 2), (64, 64), positions="rope", window=(100, 0)),
    Case("rope-dim256-page1", ((1, 50), (5, 90)), (2, 2), (256, 256), 1, positions="rope"),
    Case("rope-e4m3", MIXED, (4, 1), (128, 128), 8, positions="rope", cached=E4M3),
    Case("rope-e5m2-dim64", ((1, 50), (20, 300)), (4, 2), (64, 64), positions="rope", cached=E5M2),
    Case("alibi-softcap", ((1, 50), (20, 300)), (4, 2), (64, 64), 8, positions="alibi", softcap=3.0, cached=E5M2),
    Case("custom-bool", ((1, 50), (20, 200)), (4, 2), (64, 64), custom="bool", causal=False, cached=E4M3),
    Case("custom-big-sinks", ((3, 50), (1, 9), (1, 200)), (4, 2), (64, 64), custom="big", sinks=True, cached=E4M3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_book(case: Case, dtype: torch.dtype) -> None:
    problem = build(case, dtype, DEVICE)
    assert unsupported_reason(problem.q, problem.cache, **problem.kwargs, impl="gluon") is None
    check(problem)


def test_lists() -> None:
    """Blocks of keys that are smaller than a key tile, and pages in any order, of which one does not exist."""
    case = Case("blocks", ((40, 200), (1, 100)), (4, 2), (64, 64), 8, cached=E4M3)
    problem = build(case, torch.float16, DEVICE)
    mask = random_block_mask((40, 200), (32, 16), 2, density=0.5, causal=False, device=DEVICE)
    tokens = mask.to_dense().cpu()[0].repeat_interleave(2, 0)  # [Hq, 40, 200]
    check(problem, [tokens[:, :a, :c] & visible(a, c, True, None) for a, c in case.lengths], mask=mask)

    case = Case("pages", ((1, 50), (1, 300)), (4, 2), (128, 128), form="csr", cached=E5M2, positions="rope")
    problem = build(case, torch.float16, DEVICE)
    pages = torch.tensor([[[2, 0, -1, 7]]], dtype=torch.int32, device=DEVICE)
    seen = torch.zeros(1, 304, dtype=torch.bool)
    for page in (0, 2, 7):
        seen[:, page * 16 : page * 16 + 16] = True
    check(problem, [seen[:, :c] for _, c in case.lengths], mask=PageLists(pages))


def test_the_order_of_copies_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(Case("order", ((3, 50), (70, 200)), (2, 1), (128, 128), cached=E4M3), torch.float16, DEVICE)
    first = attend(problem)
    for order in (1, 2):
        if not ON_HOPPER:
            emulate(monkeypatch, order)
        assert all(torch.equal(a, b) for a, b in zip(first, attend(problem), strict=True))


PAGES = (1, 4, 8, 16, 64, 256)
HEADS = ((4, 4), (8, 2), (7, 1), (16, 1))
PROMPTS = ((128, 128), (700, 1500))
DEEP = ((1, 20000), (2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(PAGES) * len(HEADS)))
@pytest.mark.parametrize("cached", [E4M3, E5M2, None], ids=["e4m3", "e5m2", "rope"])
def test_grid(index: int, cached: torch.dtype | None) -> None:
    page, heads = PAGES[index % len(PAGES)], HEADS[index // len(PAGES)]
    dims = ((64, 64), (128, 128), (256, 256))[index % 3]
    positions = "rope" if cached is None else ("", "alibi", "rope")[index // 3 % 3]
    for lengths in (LONG, MIXED, PROMPTS, DEEP):
        case = Case(
            "grid", lengths, heads, dims, page, ("HND", "NHD")[index // 2 % 2], cached=cached, positions=positions
        )
        if cached is None and page % 8 and dims[0] == 64:
            continue
        check(build(case, (torch.float16, torch.bfloat16)[index % 2], DEVICE))


def test_reasons() -> None:
    case = Case("reasons", ((3, 40),), dims=(80, 80), positions="rope")
    problem = build(case, torch.float16, DEVICE)
    for cached, words in ((None, "RoPE of head dimensions of 64, 128 and 256"), (E4M3, "multiples of 16, not 24")):
        if cached is not None:
            problem = build(replace(case, dims=(24, 24), positions="", cached=cached), torch.float16, DEVICE)
        assert words in unsupported_reason(problem.q, problem.cache, **problem.kwargs, impl="gluon")
