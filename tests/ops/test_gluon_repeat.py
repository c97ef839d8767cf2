"""Hopper kernels over a schedule that an earlier call has made: its counter must be as it was."""

from __future__ import annotations

import pytest
import torch
from paged_cases import Case, build, by_the_book

from sparseattn.testing import assert_close_to_oracle

gluon = pytest.importorskip("sparseattn.ops.paged.gluon", reason="needs Triton")
from test_gluon_paged import DEVICE, ON_HOPPER, attend, emulate  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
CASES = [
    Case("decode-shares", ((1, 50), (1, 0), (1, 1), (1, 700)), dims=(64, 64), form="csr"),
    Case("mixed", ((3, 50), (0, 9), (40, 237), (1, 330)), (4, 1), (128, 128), page=8),
    Case("latent", ((3, 50), (0, 9), (9, 200)), (16, 1), (512, 512), 64, rope_dim=64, scale=0.05, form="latent"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's calls are recorded, see the next test")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_schedule_serves_again(case: Case, monkeypatch: pytest.MonkeyPatch):
    """What ``of_fixed`` promises of schedules, without launches that could be recorded."""
    monkeypatch.setattr(gluon.gluon_plans, "LEAST_TILES", 1)
    emulate(monkeypatch, 0)
    monkeypatch.setattr(gluon, "unsupported_reason", gluon.refusal)
    make, made = gluon.gluon_plans.schedule, []

    def once(*args: object, **kwargs: object) -> object:
        if not made:
            made.append(make(*args, **kwargs))
        return made[0]

    problem = build(case, torch.float16, DEVICE)
    monkeypatch.setattr(gluon.gluon_plans, "schedule", once)
    oracle, eager = (by_the_book(problem, d) for d in (torch.float64, torch.float16))
    for _ in range(2):
        o, lse = attend(problem)
        assert_close_to_oracle(o, oracle[0], eager[0], "o")
        assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=2**-10)
        assert made[0][1][0] == 0


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_planned_calls_keep_their_schedule(case: Case):
    """Fixed tables, other tensors, streams, and a captured call between: bits of a call that keeps nothing."""
    from test_paged_repeat import parts, repeated

    problem = build(case, torch.float16, DEVICE)
    kept, fresh = repeated(problem, "gluon", fixed=True), repeated(problem, "gluon")
    options = {n: problem.kwargs.get(n) for n in ("scale", "sinks")}
    (q, k, v), rest = parts(problem)
    other = torch.cuda.Stream()
    for i in range(8):
        scaled = q * (1 + i % 3)
        expected = fresh(scaled, k, v, **rest, **options)
        torch.cuda.synchronize()
        with torch.cuda.stream(other if i % 4 == 3 else torch.cuda.current_stream()):
            got = kept(scaled, k, v, **rest, **options)
        torch.cuda.synchronize()
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        if i == 5:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = kept(scaled, k, v, **rest, **options)
            graph.replay()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured[0], expected[0])
