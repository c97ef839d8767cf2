"""Columns and means on Hopper: its kernels (without a GPU the emulator runs them) and the portable ones around them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from block_sparse_cases import Case, Problem, build, dense_result, with_gradients, worst_eager
from torch import Tensor

from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.ops.block_sparse.checks import make_geometry
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.selectors import FlashPrefillConfig, MInferenceConfig, flashprefill, minference
from sparseattn.testing import assert_close_to_oracle, poison_unselected, structured_qkv

pytest.importorskip("triton", reason="needs Triton")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
DEVICE = "cuda" if ON_HOPPER else "cpu"

# The interpreter, which runs the portable kernels without a GPU, multiplies bfloat16 wrongly.
F16 = torch.float16


def _case(id: str, **fields: Any) -> Case:
    shape = {"seq": (140, 270), "heads": (2, 1), "dim": (64, 64), "block": (128, 128), "mask_heads": 2, "density": 0.3}
    return Case(id, **{"dtype": F16, **shape, **fields})


CASES = [
    _case("columns-d128", columns=40, dim=(128, 128)),
    _case("both-shared-by-group", columns=12, means=True, heads=(4, 2), mask_heads=2),
    _case("means-softcap-sinks", means=True, mask_heads=1, softcap=3.0, sinks=True, dim=(96, 80)),
    _case(
        "two-sided-window", columns=12, means=True, window=(190, 130), causal=False, mask_causal=False, mask_heads=1,
        seq=(260, 300),
    ),
    _case("nothing-listed", columns=20, means=True, density=0.0, sinks=True, heads=(1, 1), mask_heads=1),
    _case("empty-rows", columns=3, empty_rows=0.6, density=0.2, seq=(270, 270), block=(64, 128)),
    _case("block-64x32", columns=12, means=True, block=(64, 32)),
    _case("few-queries", columns=12, means=True, density=0.6, mask_heads=1, seq=(20, 1100), heads=(4, 1)),
    _case(
        "packed", columns=12, means=True, lengths=((140, 160), (0, 70), (29, 129), (5, 0)), mask_heads=1, sinks=True,
    ),
    _case(
        "ranges", columns=12, means=True, batch=2, seq=(130, 200), mask_heads=1, mask_batch=2,
        ranges=(((0, 130), (3, 190)), ((50, 120), (20, 200))),
    ),
    _case("bhsd-view", columns=12, means=True, layout="bhsd", heads=(2, 2), mask_heads=1),
]  # fmt: skip


def _geometry(case: Case, problem: Problem) -> Geometry:
    layout = {n: x for n, x in problem.kwargs.items() if "seqlen" in n or "ranges" in n}
    g = make_geometry(
        problem.q, problem.k, problem.v, problem.mask, problem.kwargs["causal"], case.scale, case.window, case.softcap,
        problem.sinks, "auto", resolve_sequences(problem.q, problem.k, **layout), case.means,
    )  # fmt: skip
    assert problem.mask is not None
    q_num_blocks, q_indices = problem.mask.transposed()
    return g._replace(q_num_blocks=q_num_blocks, q_indices=q_indices)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch):
    """The Gluon implementation, its kernels emulated without a GPU; the argument is the seed of the copies' order."""
    from gluon_emulator import Emulated

    from sparseattn.ops.block_sparse import gluon, gluon_gradients

    named = ((gluon, "forward_kernel"), (gluon_gradients, "gradients_kernel"), (gluon_gradients, "dq_kernel"))
    kernels = [(module, name, getattr(module, name)) for module, name in named]

    def prepare(order: int = 0):
        if not ON_HOPPER:
            for module, name, kernel in kernels:
                monkeypatch.setattr(module, name, Emulated(kernel, order=order))
        return gluon

    return prepare


def _upstream(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that ``with_gradients`` sends back."""
    generator = torch.Generator().manual_seed(7)
    do = torch.randn(o.shape, generator=generator).to(o)
    dlse = torch.randn(lse.shape, generator=generator).to(lse)
    return do, torch.where(lse.isfinite(), dlse, 0.0)


def _run(gluon: Any, case: Case, problem: Problem, deterministic: bool) -> dict[str, Tensor]:
    """Outputs and gradients, which the backward pass takes from those very outputs."""
    g = _geometry(case, problem)
    assert gluon.refusal(*problem[:3], g) is None
    o, lse = gluon.forward(*problem[:3], problem.sinks, g)
    gradients = gluon.backward(
        *_upstream(o, lse), *problem[:3], o, lse, problem.sinks, g, deterministic=deterministic
    )  # fmt: skip
    names = ("o", "lse", "dq", "dk", "dv", "dsinks")
    return {name: t for name, t in zip(names, (o, lse, *gradients), strict=True) if t is not None}


def _check(case: Case, problem: Problem, results: list[dict[str, Tensor]]) -> None:
    oracle = with_gradients(lambda *t: dense_result(case, problem, *t), problem, torch.float64)
    eager = worst_eager(case, problem, oracle)
    for result in results:
        assert result.keys() == oracle.keys()
        for name, actual in result.items():
            assert_close_to_oracle(actual, oracle[name], eager[name], name=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case: Case, emulated) -> None:
    problem = build(case, DEVICE)
    _check(case, problem, [_run(emulated(), case, problem, deterministic=False)])


@pytest.mark.parametrize("case", [CASES[2], CASES[7]], ids=str)
def test_deterministic_form_matches_oracle(case: Case, emulated) -> None:
    problem = build(case, DEVICE)
    _check(case, problem, [_run(emulated(), case, problem, deterministic=True)])


def _selected(method: str, seq: int = 400) -> tuple[Case, Problem]:
    """A problem on structured queries and keys whose mask a selector drew."""
    q, k, v = structured_qkv(seq, 2, 1, 64, F16, DEVICE)
    if method == "minference":
        pattern = ("vertical_slash", 60, 20)
        config = MInferenceConfig(pattern, num_sink_tokens=4, num_local_tokens=20, block_size=128)
        mask = minference(q, k, config)
        assert mask.column_indices is not None
        assert mask.column_counts().sum() > 0
    else:
        budget = {"threshold": 0.9, "num_sink_tokens": 1, "num_local_tokens": 0, "num_last_tokens": 0}
        mask = flashprefill(q, k, FlashPrefillConfig(**budget, block_size=128, group_shared=True))
    case = _case(method, seq=(seq, seq), means=method == "flashprefill", mask_heads=mask.heads)
    assert 0 < mask.density < 1
    return case, Problem(q, k, v, mask, None, {"causal": None}, [((0, seq), (0, seq))])


@pytest.mark.parametrize("method", ["minference", "flashprefill"])
def test_masks_of_selectors(method: str, emulated) -> None:
    case, problem = _selected(method)
    _check(case, problem, [_run(emulated(), case, problem, True)])


def test_unselected_keys_may_hold_nan(emulated) -> None:
    case = _case("poison", columns=5, density=0.2, seq=(100, 400))
    problem = build(case, DEVICE)
    assert problem.mask is not None
    k, v = poison_unselected(problem.k, problem.v, problem.mask)
    assert k.isnan().any()
    clean, dirty = (_run(emulated(), case, p, True) for p in (problem, problem._replace(k=k, v=v)))
    assert all(torch.equal(t, dirty[name]) for name, t in clean.items())


def test_same_bits_in_any_order_of_copies(emulated) -> None:
    case = _case("repeated", columns=12, means=True, mask_heads=1)
    problem = build(case, DEVICE)
    first, second = (_run(emulated(order), case, problem, True) for order in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "dim", "kind", "mask_heads"),
    [*itertools.product((torch.bfloat16, F16), (64, 96, 128), ("columns", "means", "both"), (1, 2, 8))],
)
def test_larger_shapes_on_a_gpu(dtype: torch.dtype, dim: int, kind: str, mask_heads: int, emulated) -> None:
    case = _case(
        "gpu", batch=2, seq=(1000, 1500), heads=(8, 2), dim=(dim, dim), mask_heads=mask_heads, mask_batch=2,
        dtype=dtype, columns=0 if kind == "means" else 150, means=kind != "columns", density=0.2,
    )  # fmt: skip
    problem = build(case, DEVICE)
    _check(case, problem, [_run(emulated(), case, problem, deterministic) for deterministic in (False, True)])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["minference", "flashprefill"])
def test_the_operator_repeats_its_bits_on_a_gpu(method: str) -> None:
    case, problem = _selected(method, 8192)
    leaves = [t.requires_grad_() for t in problem[:3]]

    def run() -> tuple[Tensor, ...]:
        o = block_sparse_attention(
            *leaves, problem.mask, mean_correction=case.means, impl="gluon", deterministic=True
        )  # fmt: skip
        return o.detach(), *torch.autograd.grad(o.square().sum(), leaves)

    first = run()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
