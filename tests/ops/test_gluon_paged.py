"""Paged attention on Hopper: on that chip the kernels themselves, without a GPU their logic, run by the emulator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from paged_cases import CASES, Case, Problem, build, by_the_book, visible

from sparseattn import BlockMask
from sparseattn.ops.paged import PagedCache, PageLists, paged_attention, unsupported_reason
from sparseattn.ops.paged.checks import make_problem
from sparseattn.testing import assert_close_to_oracle, random_block_mask

gluon = pytest.importorskip("sparseattn.ops.paged.gluon", reason="needs Triton")
KERNELS = [
    (module, name, getattr(module, name))
    for module, name in (
        (gluon, "forward_kernel"), (gluon.gluon_latent, "latent_kernel"), (gluon.gluon_turned, "turned_kernel"),
    )
]  # fmt: skip
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
DEVICE = "cuda" if ON_HOPPER else "cpu"

LONG = ((1, 50), (1, 0), (1, 1), (1, 700))
MIXED = ((3, 50), (0, 9), (1, 0), (40, 237), (1, 330))
HOPPER_CASES = [
    Case("decode-shares", LONG, dims=(64, 64), form="csr"),
    Case("decode-group7-sinks", LONG, (14, 2), (64, 64), page=32, layout="HND", form="combined", sinks=True),
    Case("mixed-group4-page8", MIXED, (4, 1), (128, 128), page=8),
    Case("group8-page64-hnd", ((9, 140), (2, 3)), (8, 1), (64, 64), page=64, layout="HND", scales="heads"),
    Case("lost-pages-page128", ((70, 400),), (2, 1), (64, 64), page=128, lost=True),
    Case("page256-dim256-window", ((40, 600), (1, 20)), (2, 1), (256, 256), page=256, window=(200, 0), softcap=4.0),
    Case("lost-pages-window", ((70, 420),), (2, 2), (64, 64), page=64, lost=True, window=(200, 0), form="csr"),
    Case("mixed-page1", MIXED, (4, 1), (128, 128), page=1),
    Case("decode-page1-csr64", LONG, (4, 1), (64, 64), page=1, form="csr"),
    Case("page4-hnd", ((70, 400), (1, 33)), (2, 1), (64, 64), page=4, layout="HND"),
    Case("lost-pages-page12", ((200, 300),), (2, 2), (128, 128), page=12, lost=True),
    Case("page1-window", ((200, 420),), (2, 2), (64, 64), page=1, window=(100, 0), form="combined"),
    Case("page24-dim192-value128", ((5, 90), (1, 70)), (2, 2), (192, 128), page=24, causal=False, scales="numbers"),
]


LATENT_CASES = [
    Case("latent-shares-page16", ((1, 50), (1, 0), (1, 1), (1, 300)), (128, 1), (512, 512), rope_dim=64, scale=0.05,
         form="latent-joined", sinks=True),
    Case("latent-mixed", ((3, 50), (0, 9), (9, 200)), (16, 1), (512, 512), 64, rope_dim=64, scale=0.05, form="latent"),
    Case("latent-lost-pages-window", ((2, 30), (2, 200)), (32, 1), (512, 512), 32, rope_dim=64, scale=0.05,
         form="latent", lost=True, window=(60, 0), softcap=3.0),
    Case("latent-page1", ((1, 50), (1, 0), (1, 300)), (128, 1), (512, 512), 1, rope_dim=64, scale=0.05,
         form="latent-joined", sinks=True),
    Case("latent-page4-lost", ((2, 30), (2, 200)), (32, 1), (512, 512), 4, rope_dim=64, scale=0.05, form="latent",
         lost=True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch):
    """The kernel under the emulator where there is no GPU, and shares of one tile: short sequences are cut, too."""
    monkeypatch.setattr(gluon.gluon_plans, "LEAST_TILES", 1)
    if not ON_HOPPER:
        emulate(monkeypatch, 0)
        monkeypatch.setattr(gluon, "unsupported_reason", gluon.refusal)


def emulate(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    """Copies finish in another order for every ``order``."""
    from gluon_emulator import Emulated

    for module, name, kernel in KERNELS:
        monkeypatch.setattr(module, name, Emulated(kernel, order=order))


def attend(problem: Problem, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(problem.q, problem.cache, **problem.kwargs, **more, return_lse=True, impl="gluon")


def check(problem: Problem, seen: list[torch.Tensor] | None = None, **more: object) -> None:
    o, lse = attend(problem, **more)
    dtype = problem.q.dtype
    oracle, eager = (by_the_book(problem, d, seen) for d in (torch.float64, dtype))
    assert_close_to_oracle(o, oracle[0], eager[0], "o")
    assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=torch.finfo(dtype).eps)
    assert (o[(oracle[1] == -math.inf).T.to(o.device)] == 0).all()


@pytest.mark.parametrize("case", CASES + HOPPER_CASES + LATENT_CASES, ids=str)
def test_matches_the_book(case: Case) -> None:
    problem = build(case, torch.float16, DEVICE)
    reason = unsupported_reason(problem.q, problem.cache, **problem.kwargs, impl="gluon")
    if reason is not None:
        assert case in CASES
        pytest.skip(reason)
    check(problem)


def test_bfloat16() -> None:
    check(build(Case("bf16", ((5, 40), (1, 200)), (4, 2), (64, 64)), torch.bfloat16, DEVICE))


PAGES = (1, 3, 8, 16, 32, 64, 128, 256)
GROUPS = ((4, 4), (8, 2), (7, 1), (16, 2))
DIMS = ((64, 64), (128, 128), (256, 256), (192, 128), (80, 96))
PROMPTS = ((128, 128), (700, 1500))
DEEP = ((1, 20000), (2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(PAGES) * len(GROUPS)))
def test_grid(index: int) -> None:
    """Every page size with every group; head dimensions and forms of caches in turn, since each is another kernel."""
    page, heads = PAGES[index % len(PAGES)], GROUPS[index // len(PAGES)]
    dims = DIMS[index % (3 if page % 8 else len(DIMS))]
    form, layout = ("dense", "csr")[index % 2], ("HND", "NHD")[index // 2 % 2]
    for lengths in (LONG, MIXED, PROMPTS, DEEP):
        case = Case("grid", lengths, heads, dims, page, layout, form)
        check(build(case, (torch.float16, torch.bfloat16)[index % 2], DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [1, 2, 8, 16, 64, 128])
@pytest.mark.parametrize("heads", [8, 16, 64, 128])
def test_latent_grid(page: int, heads: int) -> None:
    low = heads < 64
    form, dtype = ("latent", torch.float16) if low else ("latent-joined", torch.bfloat16)
    for lengths in (LONG, MIXED, PROMPTS, DEEP):
        case = Case("grid", lengths, (heads, 1), (512, 512), page, form=form, rope_dim=64, scale=0.1)
        check(build(case, dtype, DEVICE))


# ---- lists: block masks and pages ----


def listed(tokens: torch.Tensor, case: Case) -> list[torch.Tensor]:
    """What each sequence may see, bool [Hq, q_len, k_len], from bool [B, H, max_q, max_k]."""
    tokens = tokens.expand(len(case.lengths), -1, -1, -1)
    tokens = tokens.repeat_interleave(case.heads[0] // tokens.shape[1], 1)
    return [tokens[b, :, :a, :c] & visible(a, c, case.causal, case.window) for b, (a, c) in enumerate(case.lengths)]


def poison_unlisted(problem: Problem, seen: list[torch.Tensor]) -> None:
    """NaN in the rows of every KV head that no query of its group may see."""
    page, group = problem.cache.page_size, problem.case.heads[0] // problem.case.heads[1]
    k, v, _ = problem.cache.views()
    for b, allowed in enumerate(seen):
        unused = ~allowed.unflatten(0, (-1, group)).any(2).any(1)  # [Hkv, k_len]
        for head, token in unused.nonzero().tolist():
            at = problem.tables[b][token // page], token % page, head
            k[at] = v[at] = math.nan


@pytest.mark.parametrize(
    ("mask_heads", "blocks", "page", "heads", "lengths"),
    [
        (1, (128, 128), 16, (8, 2), ((130, 400), (7, 9), (0, 3), (1, 300))),
        (2, (64, 32), 64, (4, 2), ((70, 300), (60, 60))),
        (4, (32, 64), 128, (4, 2), ((40, 200), (1, 100))),
        (2, (16, 16), 8, (6, 2), ((1, 90), (1, 200))),
    ],
)
def test_block_masks(
    mask_heads: int, blocks: tuple[int, int], page: int, heads: tuple[int, int], lengths: tuple[tuple[int, int], ...]
) -> None:
    case = Case("blocks", lengths, heads, (64, 64), page=page)
    problem = build(case, torch.float16, DEVICE)
    size = (max(a for a, _ in lengths), -(-max(c for _, c in lengths) // 8) * 8)
    batch = len(lengths) if mask_heads > 1 else 1
    mask = random_block_mask(size, blocks, mask_heads, batch=batch, density=0.5, causal=False, device=DEVICE)
    poison_unlisted(problem, listed(mask.to_dense().cpu(), replace(case, causal=False)))
    check(problem, listed(mask.to_dense().cpu(), case), mask=mask)


@pytest.mark.parametrize("list_heads", [2, 4])
def test_page_lists(list_heads: int) -> None:
    """Decode over chosen pages of each head, in any order, the others poisoned."""
    case = Case("pages", LONG, dims=(64, 64), page=16, form="csr")
    problem = build(case, torch.float16, DEVICE)
    pages = torch.tensor([[2, 0, -1, 43], [5, -1, 2, 2**30], [40, 6, 1, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    lists = pages[:list_heads].expand(len(case.lengths), -1, -1).contiguous()
    for read in (4, 2):
        seen = torch.zeros(1, list_heads, 1, 704, dtype=torch.bool)
        for h in range(list_heads):
            for page in pages[h, :read].tolist():
                if 0 <= page < 44:
                    seen[0, h, 0, page * 16 : page * 16 + 16] = True
        allowed = listed(seen, case)
        if read == 4:
            poison_unlisted(problem, allowed)
        counts = torch.full(lists.shape[:2], read, dtype=torch.int32, device=DEVICE) if read < 4 else None
        check(problem, allowed, mask=PageLists(lists.to(DEVICE), counts))


@pytest.mark.parametrize("page", [16, 128])
def test_latent_page_lists(page: int) -> None:
    case = Case("latent-lists", ((1, 40), (1, 300)), (16, 1), (512, 512), page, rope_dim=64, scale=0.1, form="latent")
    problem = build(case, torch.float16, DEVICE)
    pages = torch.tensor([[[2, -1, 0]]], dtype=torch.int32)
    seen = torch.zeros(1, 1, 1, 3 * page, dtype=torch.bool)
    seen[..., :page] = seen[..., 2 * page :] = True
    seen = torch.nn.functional.pad(seen, (0, max(0, 304 - 3 * page)))
    check(problem, listed(seen, case), mask=PageLists(pages.to(DEVICE)))


def test_counts_past_a_list_read_no_other() -> None:
    """Counts that are too large, and negative ones."""
    case = Case("counts", ((1, 100), (1, 100)), (2, 2), (64, 64), page=8)
    problem = build(case, torch.float16, DEVICE)
    lists = torch.tensor([[[0, 2, 5], [1, 3, 7]], [[4, 9, 1], [6, 7, 8]]], dtype=torch.int32)
    counts = torch.tensor([[3, 11], [-2, 100]], dtype=torch.int32)
    seen = torch.zeros(2, 2, 1, 104, dtype=torch.bool)
    for b, h in ((0, 0), (0, 1), (1, 1)):
        for page in lists[b, h].tolist():
            seen[b, h, :, page * 8 : page * 8 + 8] = True
    check(problem, listed(seen, case), mask=PageLists(lists.to(DEVICE), counts.to(DEVICE)))


# ---- invariants ----


def test_the_order_of_copies_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(Case("order", ((3, 50), (70, 200)), (2, 1), (64, 64)), torch.float16, DEVICE)
    first = attend(problem)
    for order in (1, 2):
        if not ON_HOPPER:
            emulate(monkeypatch, order)
        assert all(torch.equal(a, b) for a, b in zip(first, attend(problem), strict=True))


def test_where_pages_lie_changes_no_bit() -> None:
    problem = build(Case("lie", ((2, 30), (5, 100)), dims=(64, 64)), torch.float16, DEVICE)
    c = problem.cache
    first = attend(problem)
    order = torch.randperm(c.num_pages, device=DEVICE)
    table = torch.where(c.page_table >= 0, order.argsort().int()[c.page_table.clamp(min=0).long()], -1)
    problem.cache = replace(c, k=c.k[order], v=c.v[order], page_table=table)
    assert all(torch.equal(a, b) for a, b in zip(first, attend(problem), strict=True))


def test_padding_bounds_and_out() -> None:
    """Rows past the last sequence, a missing bound, and an ``out`` that no tensor map describes."""
    problem = build(Case("padding", ((3, 50), (0, 9), (20, 37)), dims=(64, 64)), torch.float16, DEVICE)
    plain, plain_lse = attend(problem)
    rows = problem.q.shape[0]
    problem.q = torch.cat([problem.q, torch.full_like(problem.q[:5], math.nan)])
    problem.kwargs["max_seqlen_q"] = None
    outs = torch.full((rows + 5, 4, 72), 7.0, dtype=problem.q.dtype, device=DEVICE)
    for first in (4, 0):  # rows 8 bytes, and 16 bytes aligned
        out = outs[..., first : first + 64]
        o, lse = attend(problem, out=out)
        assert o is out
        assert torch.equal(o[:rows], plain)
        assert torch.equal(lse[:, :rows], plain_lse)
        assert (o[rows:] == 0).all()
        assert (lse[:, rows:] == -math.inf).all()
    assert (outs[..., 68:] == 7).all()


LATENT = {"heads": (16, 1), "dims": (512, 512), "form": "latent", "rope_dim": 64, "scale": 0.1}


def test_latent_rows_of_no_sequence() -> None:
    """Rows around the sequences are cleared; bounds out of order leave nothing unwritten, and all else alone."""
    problem = build(Case("free", ((3, 50), (0, 9), (6, 90)), **LATENT), torch.float16, DEVICE)
    plain, plain_lse = attend(problem)
    problem.q = torch.cat([torch.full_like(problem.q[:2], 7.0), problem.q, torch.full_like(problem.q[:5], 7.0)])
    cu = problem.kwargs["cu_seqlens_q"]
    problem.kwargs["cu_seqlens_q"], problem.kwargs["max_seqlen_q"] = cu + 2, 6
    guard = torch.full((3, *problem.q.shape[:2], 512), math.nan, dtype=torch.float16, device=DEVICE)
    o, lse = attend(problem, out=guard[1])
    assert torch.equal(o[2:-5], plain)
    assert torch.equal(lse[:, 2:-5], plain_lse)
    free = [0, 1, *range(11, 16)]
    assert (o[free] == 0).all()
    assert (lse[:, free] == -math.inf).all()
    for bounds in ((9, 3, 0, 4), (-4, 2, 100, 200), (0, 9, 9, 12)):
        problem.kwargs["cu_seqlens_q"] = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        guard.fill_(math.nan)
        assert attend(problem, out=guard[1])[0].isfinite().all()
        assert guard[::2].isnan().all()


@pytest.mark.parametrize("fused", [0, 8])
def test_latent_shares_are_merged(monkeypatch: pytest.MonkeyPatch, fused: int) -> None:
    """By a kernel of its own or by theirs; twice over one schedule, which the first run must leave as it was."""
    case = Case("merge", ((1, 700), (1, 30), (1, 0)), **(LATENT | {"heads": (128, 1)}), sinks=True)
    problem = build(case, torch.float16, DEVICE)
    latent, kept = gluon.gluon_latent, {}
    plan, schedule = latent.plan, gluon.gluon_plans.schedule
    monkeypatch.setattr(latent, "plan", lambda *a: plan(*a)._replace(fused=fused))
    monkeypatch.setattr(gluon.gluon_plans, "schedule", lambda *a, **k: kept.setdefault(0, schedule(*a, **k)))
    check(problem)
    before = kept[0][1].clone()
    assert before[0] == before[3] == 0
    assert before[2] > 0
    check(problem)
    assert torch.equal(before, kept[0][1])


@pytest.mark.parametrize("bounds", [(9, 3, 0), (5, 0, 3), (-4, 2, 100), (0, 9, 9)])
def test_bounds_out_of_order_stay_inside(bounds: tuple[int, ...]) -> None:
    """Results mean nothing then, but nothing outside of the tensors is read or written."""
    problem = build(Case("bounds", ((4, 200), (5, 9)), dims=(64, 64)), torch.float16, DEVICE)
    problem.kwargs |= {"cu_seqlens_q": torch.tensor(bounds, dtype=torch.int32, device=DEVICE), "max_seqlen_q": 5}
    guard = torch.full((3, *problem.q.shape), 7.0, dtype=torch.float16, device=DEVICE)
    o = attend(problem, out=guard[1])[0]
    assert o.isfinite().all()
    assert (guard[0] == 7).all()
    assert (guard[2] == 7).all()


def test_what_has_no_page_is_hidden() -> None:
    """Tables that end before their sequence, and page numbers that do not exist."""
    problem = build(Case("short", ((1, 50), (1, 40)), dims=(64, 64)), torch.float16, DEVICE)
    table = problem.cache.page_table.clone()[:, :3]
    table[1, 1] = 10_000
    problem.cache = replace(problem.cache, page_table=table)
    seen = [s.clone() for s in problem.seen]
    seen[0][:, 48:] = False
    seen[1][:, 16:32] = False
    check(problem, seen)


@pytest.mark.gpu
def test_a_captured_launch_follows_new_lengths() -> None:
    case = Case("graph", ((1, 3000), (1, 17), (1, 800)), (8, 2), (128, 128))
    problem = build(case, torch.float16, DEVICE)
    attend(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = attend(problem)
    for lengths in ((3000, 17, 800), (5, 16, 0), (2999, 1, 300)):
        problem.cache.seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        expected = attend(problem)
        assert all(torch.equal(a, b) for a, b in zip((o, lse), expected, strict=True))


# ---- the schedule, and what is refused ----


@pytest.mark.parametrize(("lengths", "heads", "window"), [
    (LONG, (8, 2), None), (MIXED, (14, 2), None), (((70, 300), (1, 900), (9, 9)), (4, 2), (40, 0)),
])  # fmt: skip
def test_every_key_tile_has_one_share(
    lengths: tuple[tuple[int, int], ...], heads: tuple[int, int], window: tuple[int, int] | None
) -> None:
    problem = build(Case("schedule", lengths, heads, (64, 64), window=window), torch.float16, DEVICE)
    kwargs = {"cu_seqlens_q": None, "max_seqlen_q": None, "sinks": None} | problem.kwargs
    names = ("cu_seqlens_q", "max_seqlen_q", "causal", "scale", "window", "softcap", "sinks")
    p, q, _ = make_problem(
        problem.q, problem.cache, *(kwargs[n] for n in names), None, None, None, None, None, "auto"
    )  # fmt: skip
    cut = gluon.plan(q, p, 4)
    records, counter, merges, spans = (t.cpu() for t in gluon.gluon_plans.schedule(q, p, cut))
    claimed, count, merged, done = counter.tolist()
    assert claimed == done == 0
    tile_n = cut.tiles.tile_n
    walks: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    places = []
    for m, head, b, place, tiles, first, late, early in records[0, :count].tolist():
        assert 0 <= late + early <= tiles
        walks.setdefault((b, head, m), []).append((first, first + tiles))
        places += [place] if place >= 0 else []
    assert sorted(places) == list(range(len(places)))
    assert len(places) <= cut.places
    chunks = heads[1] * -(-heads[0] // heads[1] // cut.pack)
    row_tiles = [(b, m) for b, (a, _) in enumerate(lengths) for m in range(-(-a // cut.tokens))]
    assert walks.keys() == {(b, head, m) for b, m in row_tiles for head in range(chunks)}
    for (b, _, m), parts in walks.items():
        a, c = lengths[b]
        rows = torch.arange(m * cut.tokens, min(a, (m + 1) * cut.tokens))
        keys = visible(a, c, True, window)[rows].any(0).nonzero()[:, 0]
        walked = [tile for first, last in sorted(parts) for tile in range(first, last)]
        tiles = sorted({key // tile_n for key in keys.tolist()})
        assert walked == (list(range(tiles[0], tiles[-1] + 1)) if tiles else [])
        assert spans[4, b] == c
    shared = {key for key, parts in walks.items() if len(parts) > 1 or cut.merged}
    if cut.fused:
        assert cut.merges == 0
        for (m, head, b, place, *_), (*_, origin, shares, arrivals) in records[:, :count].transpose(0, 1).tolist():
            assert arrivals == 0
            if place >= 0:
                assert shares == len(walks[b, head, m])
                assert place in range(origin, origin + shares)
    else:
        assert merged == len(shared)
        assert sorted(merges[:merged, 4].tolist()) == sorted(len(walks[key]) for key in shared)


@pytest.mark.parametrize(("lengths", "whole"), [((900, 900), True), ((2560, 64, 64, 640), False)])
def test_latent_shares_end_together(lengths: tuple[int, ...], whole: bool) -> None:
    """Row tiles that fill the GPU stay whole; programs that take shares of unequal ones in turn end together."""
    case = Case(
        "shares", tuple((1, n) for n in lengths), (128, 1), (512, 512), 64, rope_dim=64, scale=0.1, form="latent"
    )
    problem = build(case, torch.float16, DEVICE)
    p, q, _ = make_problem(problem.q, problem.cache, None, None, True, 0.1, *[None] * 8, "gluon")
    cut = gluon.gluon_latent.plan(q, p, 4)
    records, counter, *_ = gluon.gluon_plans.schedule(q, p, cut, careful=True)
    tiles = records[0, : int(counter[1]), 4].tolist()
    assert sum(tiles) == 2 * sum(-(-n // 64) for n in lengths)
    assert (int(counter[2]) == 0) == whole
    busy = [0] * 4
    for n in tiles:
        busy[busy.index(min(busy))] += n
    assert max(busy) <= 1.25 * sum(tiles) / 4


def test_reasons() -> None:
    for name, words in {
        "decode-page1-csr": "head dimensions of 64, 128 and 256 in pages of 1", "rope": "RoPE", "mla": "latent",
        "mla-joined-e4m3": "float8",
    }.items():  # fmt: skip
        problem = build(next(case for case in CASES if case.id == name), torch.float16, DEVICE)
        assert words in unsupported_reason(problem.q, problem.cache, **problem.kwargs, impl="gluon")
    problem = build(Case("reasons", ((40, 300),), dims=(64, 64)), torch.float16, DEVICE)
    q, c = problem.q, problem.cache
    assert "multiples of 8, not 20" in unsupported_reason(q[..., :20], replace(c, k=c.k[..., :20]), impl="gluon",
                                                          **problem.kwargs)  # fmt: skip
    mask = BlockMask.streaming((40, 300), num_sink_tokens=48, num_local_tokens=48, block_size=48, device=DEVICE)
    assert "KV blocks of 8, 16" in unsupported_reason(q, c, mask=mask, impl="gluon", **problem.kwargs)
    strided = PagedCache(c.k.repeat_interleave(2, 3)[..., ::2], c.v, c.seq_lens, c.page_table)
    assert "rows of stride 1" in unsupported_reason(q, strided, impl="gluon", **problem.kwargs)
