"""Shares of keys of a decode on Hopper: the program that ends last merges them, in one order, and leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from paged_cases import Case, Problem, build

from sparseattn.ops.paged import RepeatedAttention, paged_attention
from sparseattn.ops.paged.checks import make_problem

gluon = pytest.importorskip("sparseattn.ops.paged.gluon", reason="needs Triton")
KERNEL = gluon.forward_kernel
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
DEVICE = "cuda" if ON_HOPPER else "cpu"


def test_a_schedule_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that follow one another count arrivals from zero, though the schedule is made once."""
    monkeypatch.setattr(gluon.gluon_plans, "LEAST_TILES", 1)
    problem = build(Case("again", ((1, 700), (1, 0), (3, 200)), (6, 2), (64, 64)), torch.float16, DEVICE)
    p, q, _ = make_problem(
        problem.q, problem.cache, *(problem.kwargs[n] for n in ("cu_seqlens_q", "max_seqlen_q")), True, None,
        *[None] * 8, "auto",
    )  # fmt: skip
    cut = gluon.plan(q, p, 4)
    records, counter, merges, _spans = gluon.gluon_plans.schedule(q, p, cut)
    details = records[1, : int(counter[1])]
    assert cut.fused >= cut.rows
    assert int(details[:, 6].max()) > 1
    found = []
    for order in range(3):
        if not ON_HOPPER:
            from gluon_emulator import Emulated

            monkeypatch.setattr(gluon, "forward_kernel", Emulated(KERNEL, order=order))
        o, lse = torch.full_like(q, math.nan), torch.full((q.shape[1], q.shape[0]), math.nan, device=DEVICE)
        gluon._launch(q, o, lse, p, cut, records, counter, merges)
        found.append((o, lse))
        assert not details[:, 7].any()
    assert not found[0][0].isnan().any()
    assert all(torch.equal(a, b) for more in found[1:] for a, b in zip(found[0], more, strict=True))


def decode(lengths: tuple[int, ...]) -> Problem:
    return build(Case("runs", tuple((1, n) for n in lengths), (32, 8), (128, 128)), torch.bfloat16, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(20_000,), (9000, 17, 0, 3000, *range(300, 900, 37)), (1024,) * 24])
def test_runs_at_once_give_the_same_bits(lengths: tuple[int, ...]) -> None:
    """By recorded launches on two streams and by a graph, all at the same time, each with counters of its own."""
    problem = decode(lengths)
    c = problem.cache
    first = paged_attention(problem.q, c, return_lse=True, impl="gluon")
    again = RepeatedAttention(c.seq_lens, c.page_table, c.indptr, c.indices, impl="gluon", fixed=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = paged_attention(problem.q, c, return_lse=True, impl="gluon")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    differing = []
    for _ in range(200):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                differing += [(a != b).any() for a, b in zip(first, again(problem.q, c.k, c.v), strict=True)]
    torch.cuda.synchronize()
    assert not torch.stack(differing).any()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
