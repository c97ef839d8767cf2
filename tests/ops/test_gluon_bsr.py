"""Patterns of small blocks on Hopper: as bits (without a GPU the emulator runs the kernel) and as lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bsr_cases import Case, build, by_the_book

from sparseattn.ops.bsr import attend_rows, bsr_attention, make_rows, unsupported_reason
from sparseattn.ops.bsr import rows as bsr_rows
from sparseattn.ops.bsr.api import Options, make_call
from sparseattn.testing import assert_close_to_oracle

pytest.importorskip("triton", reason="needs Triton")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
DEVICE = "cuda" if ON_HOPPER else "cpu"

CASES = [
    Case("r1-c1", (1, 1), (70, 300), heads=(8, 2), dims=(64, 64)),
    Case("r1-c1-sparse", (1, 1), (140, 600), heads=(4, 1), dims=(64, 64), density=0.005),
    Case("r3-c5-batch", (3, 5), (150, 333), (4, 1), (128, 128), causal=True, batch=2, pattern="batch", sinks=True),
    Case("r2-c7-q-heads", (2, 7), (130, 200), (4, 2), (64, 64), window=(60, 30), pattern="q", softcap=3.0),
    Case("r1-c1-d256", (1, 1), (70, 200), heads=(2, 2), dims=(256, 256)),
]


@pytest.fixture(autouse=True)
def _any_shape_as_bits(monkeypatch: pytest.MonkeyPatch):
    """Bits of short and sparse patterns, too, and without a Hopper GPU."""
    monkeypatch.setattr(bsr_rows, "_BITS_QUERIES", 1)
    monkeypatch.setattr(bsr_rows, "_BITS_DENSITY", 0.0)
    monkeypatch.setattr(bsr_rows, "_hopper", lambda device: True)


@pytest.fixture
def attend(monkeypatch: pytest.MonkeyPatch):
    """Outputs and LSE of a problem by the kernel of bits."""
    from sparseattn.ops.block_sparse import gluon as kernels
    from sparseattn.ops.bsr import gluon

    if not ON_HOPPER:
        from gluon_emulator import Emulated

        monkeypatch.setattr(kernels, "forward_kernel", Emulated(kernels.forward_kernel))

    def run(problem):
        rows = make_rows(*problem.arguments, problem.case.lengths)
        assert rows.bits is not None
        call = make_call(problem.q, problem.k, problem.v, rows, "auto", Options(**problem.kwargs))
        q = problem.q if problem.case.batch else problem.q[None]
        assert gluon.refusal(q, call.problem) is None
        o = torch.empty(*q.shape[:-1], problem.case.dims[1], dtype=q.dtype, device=DEVICE)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=DEVICE)
        gluon.attend(q, o, lse, call.problem)
        return o, lse

    return run


def compare(problem, o: torch.Tensor, lse: torch.Tensor) -> None:
    dtype = problem.q.dtype
    oracle, eager = by_the_book(problem, torch.float64), by_the_book(problem, dtype)
    assert_close_to_oracle(o, oracle[0], eager[0], "o")
    assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=torch.finfo(dtype).eps)
    assert (o[(oracle[1] == -torch.inf).transpose(1, 2).to(o.device)] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits(case: Case, attend):
    """Against the book; keys and values that nobody lists are NaN."""
    problem = build(case, torch.float16, DEVICE)
    compare(problem, *attend(problem))


def test_bits_of_any_pattern():
    """Also with offsets and numbers that name no block."""
    from sparseattn.ops.bsr.gluon_bits import row_bits

    indptr = torch.tensor([0, 3, 3, 7, 2**30], dtype=torch.int32, device=DEVICE)
    indices = torch.tensor([60, 0, 3, -1, 2**31 - 1, 66, 1, 40, 2], dtype=torch.int32, device=DEVICE)
    bits = row_bits(indptr[None, None], indices, (50, 3), (180, 199))
    kept = torch.zeros(4, 67, dtype=torch.bool)
    kept[0, [60, 0, 3]] = kept[2, [66, 1]] = kept[3, [40, 2]] = True
    kept = kept.repeat_interleave(3, 1)[:, :199]
    words = bits.words.cpu()[0, 0].transpose(1, 2).reshape(16, 8, 1)  # one group of rows
    seen = ((words >> torch.arange(32)) & 1).view(16, -1).bool()
    assert torch.equal(seen[:4, :199], kept)
    assert not seen[4:].any()
    assert not seen[:, 199:].any()
    assert torch.equal(bits.keys.cpu()[0, 0], kept.any(0))
    assert bits.counts.tolist() == [[[2, 2]]]
    assert bits.tiles.tolist() == [[[[0, 1], [0, 1]]]]


def test_which_patterns_become_bits_or_lists(monkeypatch: pytest.MonkeyPatch):
    """By shapes alone: dense patterns of few queries a block, and blocks of multiples of 16."""
    monkeypatch.setattr(bsr_rows, "_BITS_QUERIES", 1024)
    monkeypatch.setattr(bsr_rows, "_BITS_DENSITY", 0.033)
    monkeypatch.setattr("sparseattn.ops.bsr.gluon_bits.row_bits", lambda *_: "bits")

    def rows(block: tuple[int, int], n: int, share: float):
        mb, nb = n // block[0], n // block[1]
        indptr = (torch.arange(mb + 1) * int(share * nb)).int().to(DEVICE)
        return make_rows(indptr, torch.arange(int(share * nb)).repeat(mb).int().to(DEVICE), block, (n, n))

    assert rows((1, 1), 1024, 0.05).bits is not None
    assert rows((1, 1), 1024, 0.02).bits is None
    assert rows((1, 1), 512, 0.5).bits is None
    assert rows((8, 1), 1024, 0.25).bits is None
    assert rows((8, 1), 1024, 0.5).bits is not None
    sixteen = rows((16, 16), 1024, 0.9)
    assert sixteen.small
    assert sixteen.bits is None
    assert sixteen.lists is not None
    if not ON_HOPPER:
        q, k = torch.randn(1024, 4, 64).half(), torch.randn(1024, 1, 64).half()
        assert make_call(q, k, k, sixteen, "triton", Options()).geometry is None
        assert "Hopper" in unsupported_reason(q, k, k, sixteen, impl="gluon")


def test_refusals():
    from sparseattn.ops.bsr import gluon

    problem = build(CASES[0], torch.float16, DEVICE)
    rows = make_rows(*problem.arguments, CASES[0].lengths)
    call = make_call(problem.q, problem.k, problem.v, rows, "auto", Options())
    q = problem.q[None]
    assert call.problem is not None
    for changes, reason in (
        ({"words": None}, "dense patterns"), ({"rope_theta": 1e4}, "no positions"), ({"v_factor": 2.0}, "scales"),
        ({"k": call.problem.k.float()}, "q's dtype"), ({"scale": -1.0}, "positive scale"),
    ):  # fmt: skip
        assert reason in gluon.refusal(q, call.problem._replace(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(1, 1), (2, 1), (7, 3), (16, 16), (32, 16), (128, 16), (16, 128), (48, 32)])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)])
def test_sizes(block: tuple[int, int], heads: tuple[int, int]):
    for causal in (False, True):
        case = Case("sizes", block, (1100, 1300), heads, (128, 128), causal=causal)
        problem = build(case, torch.bfloat16, "cuda")
        rows = make_rows(*problem.arguments, case.lengths)
        o, lse = attend_rows(problem.q, problem.k, problem.v, rows, causal=causal, impl="gluon", return_lse=True)
        compare(problem, o[None], lse[None])
        assert torch.equal(o, attend_rows(problem.q, problem.k, problem.v, rows, causal=causal, impl="gluon"))


@pytest.mark.gpu
def test_bits_in_a_captured_graph():
    """A captured call reads another pattern of the same nnz."""
    case = replace(CASES[0], lengths=(256, 300))
    problems = [build(case, torch.bfloat16, "cuda", seed) for seed in (0, 1)]
    nnz = min(len(p.arguments[1]) for p in problems)
    patterns = [(p.arguments[0].clamp(max=nnz), p.arguments[1][:nnz].contiguous()) for p in problems]
    q, k, v = (t.nan_to_num(0) for t in (problems[0].q, problems[0].k, problems[0].v))
    held = [t.clone() for t in patterns[0]]
    bsr_attention(q, k, v, *held, (1, 1), impl="gluon")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = bsr_attention(q, k, v, *held, (1, 1), impl="gluon")
    for mine, other in zip(held, patterns[1], strict=True):
        mine.copy_(other)
    graph.replay()
    assert torch.equal(o, bsr_attention(q, k, v, *patterns[1], (1, 1), impl="gluon"))
