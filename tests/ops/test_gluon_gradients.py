"""The Hopper backward, on a Hopper GPU or else on the emulator beside this file, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_sparse_cases import Case, Problem, build, dense_result, with_gradients, worst_eager
from torch import Tensor

from sparseattn.ops.block_sparse import reference
from sparseattn.ops.block_sparse.checks import make_geometry
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.testing import assert_close_to_oracle, make_qkv, poison_unselected

pytest.importorskip("triton", reason="needs Triton")

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
DEVICE = "cuda" if ON_HOPPER else "cpu"

# The interpreter, which runs the small kernels, truncates where bfloat16 should be rounded: float16 is the better test.
F16 = torch.float16


def _case(id: str, **fields: Any) -> Case:
    shape = {"seq": (300, 300), "heads": (4, 2), "dim": (128, 128), "block": (128, 128), "mask_heads": 4}
    return Case(id, **{"dtype": F16, **shape, **fields})


CASES = [
    _case("d128-per-head"),
    _case("d64-per-kv-head-batch", dim=(64, 64), mask_heads=2, batch=2, mask_batch=2, seq=(200, 300)),
    _case("bf16-mask-shared", dtype=torch.bfloat16, mask_heads=1, batch=2, seq=(129, 257)),
    _case("not-causal-dim-80-40", causal=False, mask_causal=False, dim=(80, 40), seq=(270, 390)),
    _case("dense-chunk", block=None, seq=(150, 401)),
    _case("dense-full-d64", block=None, causal=False, dim=(64, 64), seq=(250, 130)),
    _case("dense-window-more-queries", block=None, window=(100, 0), seq=(420, 300)),
    _case("two-sided-window", window=(90, 70), causal=False, mask_causal=False, density=0.9, seq=(390, 400)),
    _case("softcap-sinks", softcap=3.0, sinks=True, dim=(96, 96)),
    _case("block-64x128", block=(64, 128), dim=(64, 64)),
    _case("block-128x256", block=(128, 256), seq=(200, 600), mask_heads=2),
    _case("block-256x128-three-heads", block=(256, 128), heads=(3, 1), mask_heads=3, dim=(64, 48), softcap=3.0),
    _case("block-64x64", block=(64, 64)),
    _case("block-64x64-packed", block=(64, 64), dim=(64, 64), lengths=((140, 140), (0, 0), (65, 210), (70, 30)),
          mask_batch=4, sinks=True),
    _case("block-16x16", block=(16, 16), density=0.1, heads=(2, 1), mask_heads=1),
    _case("block-32x16-window-softcap", block=(32, 16), window=(90, 70), causal=False, mask_causal=False, softcap=3.0,
          dim=(64, 64), heads=(2, 1), mask_heads=2),
    _case("block-48x80-ranges", block=(48, 80), batch=2, mask_batch=2, heads=(2, 2), mask_heads=2, seq=(200, 300),
          dim=(64, 64), ranges=(((0, 200), (3, 250)), ((9, 150), (0, 300)))),
    _case("block-32x256", block=(32, 256), seq=(200, 600), heads=(2, 1), mask_heads=2),
    _case("empty-rows", empty_rows=0.6, density=0.2, sinks=True),
    _case("all-rows-empty", density=0.0),
    _case(
        "packed", lengths=((140, 140), (0, 0), (65, 210), (16, 16), (70, 30)), mask_batch=5, sinks=True, dim=(64, 64)
    ),
    _case("packed-dense", lengths=((140, 260), (0, 70), (129, 129), (5, 0)), block=None),
    _case(
        "ranges", batch=3, seq=(200, 300), mask_batch=3,
        ranges=(((0, 200), (3, 250)), ((9, 9), (0, 300)), ((50, 200), (20, 20))),
    ),
    _case("bhsd-view", layout="bhsd", batch=2),
    _case("one-tile", seq=(40, 40), heads=(1, 1), mask_heads=1, dim=(64, 64), block=None),
    _case("wide-rows-one-head", layout="wide", heads=(1, 1), mask_heads=1, batch=2),
]  # fmt: skip


def _geometry(case: Case, problem: Problem) -> Geometry:
    layout = {n: x for n, x in problem.kwargs.items() if "seqlen" in n or "ranges" in n}
    g = make_geometry(
        problem.q, problem.k, problem.v, problem.mask, problem.kwargs["causal"], case.scale, case.window, case.softcap,
        problem.sinks, "auto", resolve_sequences(problem.q, problem.k, **layout),
    )  # fmt: skip
    if problem.mask is None:
        return g
    q_num_blocks, q_indices = problem.mask.transposed()
    return g._replace(q_num_blocks=q_num_blocks, q_indices=q_indices)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The launches, without a GPU with their kernels on the emulator; the argument seeds the order of its copies."""
    from gluon_emulator import Emulated

    from sparseattn.ops.block_sparse import gluon_gradients

    kernels = {name: getattr(gluon_gradients, name) for name in ("gradients_kernel", "dq_kernel")}

    def prepare(order: int = 0):
        if ON_HOPPER:
            return gluon_gradients
        for name, kernel in kernels.items():
            monkeypatch.setattr(gluon_gradients, name, Emulated(kernel, order=order))
        return gluon_gradients

    return prepare


def _upstream(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that ``with_gradients`` sends back."""
    generator = torch.Generator().manual_seed(7)
    do = torch.randn(o.shape, generator=generator).to(o)
    dlse = torch.randn(lse.shape, generator=generator).to(lse)
    return do, torch.where(lse.isfinite(), dlse, 0.0)


def _poisoned(case: Case, problem: Problem) -> list[Tensor]:
    """q, k and v with NaN where no sequence is: in padding, or behind each row of a larger tensor."""
    tensors = []
    for t, axis in ((problem.q, 0), (problem.k, 1), (problem.v, 1)):
        if case.layout != "bshd" or case.lengths:
            tensors.append(t)
            continue
        wide = t.new_full((t.shape[0], t.shape[1] + 130, *t.shape[2:]), torch.nan)
        for b, span in enumerate(problem.spans):
            first, last = span[axis]
            wide[b, first:last] = t[b, first:last]
        tensors.append(wide[:, : t.shape[1]])
    return tensors


@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for case in CASES for form in ("fused", "deterministic")]
    + [(case, "fused-one-head") for case in CASES if case.id in ("d128-per-head", "d64-per-kv-head-batch", "packed")],
    ids=str,
)
def test_gradients_match_oracle(case: Case, form: str, kernels) -> None:
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    oracle = with_gradients(lambda *t: dense_result(case, problem, *t), problem, torch.float64)
    eager = worst_eager(case, problem, oracle)
    o, lse = reference.forward(problem.q, problem.k, problem.v, problem.sinks, g)
    do, dlse = _upstream(o, lse)
    gradients = kernels().backward(
        do, dlse, *_poisoned(case, problem), o, lse, problem.sinks, g,
        deterministic=form == "deterministic", heads=1 if form == "fused-one-head" else None,
    )  # fmt: skip
    for name, actual in zip(("dq", "dk", "dv", "dsinks"), gradients, strict=True):
        if actual is not None:
            assert_close_to_oracle(actual, oracle[name], eager[name], name=name)


@pytest.mark.parametrize("form", ["fused", "deterministic"])
@pytest.mark.parametrize("block", [(64, 64), (32, 16), (16, 192)], ids=str)
def test_keys_that_nobody_selects_are_not_read(block: tuple[int, int], form: str, kernels) -> None:
    case = _case("any", block=block, density=0.04, mask_heads=2, seq=(260, 400), dim=(64, 64), dtype=F16)
    problem = build(case, DEVICE)
    assert problem.mask is not None
    g = _geometry(case, problem)
    o, lse = reference.forward(problem.q, problem.k, problem.v, None, g)
    do, _ = _upstream(o, lse)
    poisoned = poison_unselected(problem.k, problem.v, problem.mask)
    assert poisoned[0].isnan().any()
    assert not poisoned[0].isnan().all()
    clean, dirty = (
        kernels().backward(do, None, problem.q, k, v, o, lse, None, g, deterministic=form == "deterministic")
        for k, v in ((problem.k, problem.v), poisoned)
    )
    for name, a, b in zip(("dq", "dk", "dv"), clean, dirty, strict=False):
        assert not b.isnan().any(), name
        assert torch.allclose(a, b, atol=0, rtol=1e-3), name


def test_deterministic_gradients_are_the_same_bits_in_any_order_of_copies(kernels) -> None:
    case = CASES[0]
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    o, lse = reference.forward(problem.q, problem.k, problem.v, None, g)
    do, _ = _upstream(o, lse)
    first, *others = (
        kernels(order).backward(do, None, *problem[:3], o, lse, None, g, deterministic=True) for order in range(4)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first[:3], other[:3], strict=True))


def test_fused_keys_and_values_are_the_same_bits_in_any_order_of_copies(kernels) -> None:
    """Only dQ is added up across programs."""
    case = CASES[0]
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    o, lse = reference.forward(problem.q, problem.k, problem.v, None, g)
    do, _ = _upstream(o, lse)
    first, second = (kernels(order).backward(do, None, *problem[:3], o, lse, None, g) for order in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1:3], second[1:3], strict=True))


@pytest.mark.parametrize("side", ["q", "k"])
def test_one_side_alone_may_be_ragged(side: str, kernels) -> None:
    q, k, v = make_qkv(2, 200, 300, 4, 2, 64, dtype=F16, device=DEVICE)
    rows = {"q": [(3, 190), (0, 70)], "k": [(20, 290), (0, 130)]}[side]
    ranges = {f"ranges_{side}": torch.tensor(rows, dtype=torch.int32, device=DEVICE)}
    sequences = resolve_sequences(q, k, **ranges)
    g = make_geometry(q, k, v, None, None, None, None, None, None, "auto", sequences)
    results = []
    for tensors in ((q, k, v), tuple(t.double() for t in (q, k, v))):
        o, lse = reference.forward(*tensors, None, g)
        do, dlse = (t.to(o) for t in _upstream(o.to(F16), lse.float()))
        if not results:
            results.append(kernels().backward(do, dlse, *tensors, o, lse, None, g))
        results.append(reference.backward(do, dlse, *tensors, o, lse, None, g))
    for name, actual, eager, oracle in zip(("dq", "dk", "dv"), *results, strict=False):
        assert_close_to_oracle(actual, oracle, eager, name=name)


def test_expanded_upstream_gradients_are_copied(kernels) -> None:
    case = CASES[0]
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    o, lse = reference.forward(problem.q, problem.k, problem.v, None, g)
    do = o.new_ones(()).expand(o.shape)
    expanded = kernels().backward(do, None, *problem[:3], o, lse, None, g, deterministic=True)
    plain = kernels().backward(do.contiguous(), None, *problem[:3], o, lse, None, g, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(expanded[:3], plain[:3], strict=True))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (_case("float32", dtype=torch.float32), "float32"),
        (_case("dim-256", dim=(256, 256)), "256/256"),
        (_case("dim-20", dim=(20, 20)), "multiples of 8"),
        (_case("columns", columns=3, block=(32, 128)), "multiples of 64"),
        (_case("scale", scale=-1.0), "scale"),
        (_case("here"), None if ON_HOPPER else "compute capability"),
    ],
    ids=lambda x: str(x),
)
def test_reasons_name_what_does_not_fit(case: Case, words: str | None) -> None:
    from sparseattn.ops.block_sparse.gluon_gradients import unsupported_backward_reason

    problem = build(case, DEVICE)
    reason = unsupported_backward_reason(*problem[:3], _geometry(case, problem))
    assert words in reason if words else reason is None


def test_reasons_for_strides() -> None:
    from sparseattn.ops.block_sparse.gluon_gradients import unsupported_backward_reason

    case = _case("block-64", block=(64, 128))
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    odd = torch.empty((1, 300, 4, 132), dtype=F16, device=DEVICE)[..., :128]
    assert "strides" in str(unsupported_backward_reason(odd, problem.k, problem.v, g))
    by_element = torch.empty((1, 300, 128, 4), dtype=F16, device=DEVICE).transpose(2, 3)
    assert "strides" in str(unsupported_backward_reason(by_element, problem.k, problem.v, g))


@pytest.mark.parametrize(
    ("group", "tiles", "heads"),
    [(1, 10, 1), (4, 512, 2), (4, 1024, 4), (4, 128, 1), (8, 100000, 8), (3, 10, 1), (3, 2048, 3)],
)
def test_heads_per_program(group: int, tiles: int, heads: int) -> None:
    from sparseattn.ops.block_sparse.gluon_gradients import heads_per_program

    assert heads_per_program(group, tiles, 132) == heads


def test_auto_tries_triton_first_for_small_blocks_of_narrow_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseattn.ops import dispatch
    from sparseattn.ops.block_sparse import library

    monkeypatch.setitem(dispatch.AUTO, DEVICE, ("gluon", "triton"))
    for dim, block, gradients, first in (
        (64, (64, 64), "fast", "triton"), (64, (64, 64), None, "gluon"), (64, (64, 128), "fast", "gluon"),
        (128, (64, 64), "fast", "gluon"), (48, (128, 128), "fast", "gluon"),
    ):  # fmt: skip
        problem = build(_case("any", dim=(dim, dim), block=block), DEVICE)
        g = _geometry(_case("any"), problem)
        assert library._tried("auto", problem.q, problem.v, g, gradients)[0] == first
        assert library._tried("gluon", problem.q, problem.v, g, gradients) == ("gluon",)
