"""The Hopper forward: on that chip the kernels themselves, without a GPU their logic, run by the emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from block_sparse_cases import CASES, Case, Problem, build, dense_result, with_gradients, worst_eager
from torch import Tensor

from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention, library, reference
from sparseattn.ops.block_sparse.checks import make_geometry
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.testing import assert_close_to_oracle, make_qkv, poison_unselected, random_block_mask

pytest.importorskip("triton", reason="needs Triton")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
DEVICE = "cuda" if ON_HOPPER else "cpu"

F16 = torch.float16
# What the shared cases are too small for: several key tiles a row, several row tiles a program, every tile shape.
HOPPER_CASES = [
    Case("d64-per-head", seq=(300, 300), heads=(4, 2), dim=(64, 64), block=(128, 128), mask_heads=4, dtype=F16),
    Case("d128-shared", seq=(200, 520), heads=(8, 2), dim=(128, 128), block=(128, 128), mask_heads=2, dtype=F16),
    Case("d128-64-blocks", seq=(260, 260), heads=(2, 1), dim=(128, 128), block=(64, 64), mask_heads=2, dtype=F16),
    Case("d128-gathered", seq=(200, 300), heads=(4, 1), dim=(128, 128), block=(64, 32), mask_heads=1, dtype=F16),
    Case("d192-128", seq=(140, 270), heads=(2, 2), dim=(192, 128), block=(128, 128), mask_heads=2, dtype=F16),
    Case("d192-gathered", seq=(140, 200), heads=(2, 1), dim=(168, 72), block=(128, 32), mask_heads=1, dtype=F16),
    Case("rows-64", seq=(300, 500), heads=(4, 2), dim=(64, 64), block=(64, 64), mask_heads=4, density=0.1, dtype=F16),
    Case("d256", seq=(140, 270), heads=(2, 1), dim=(256, 256), block=(128, 64), mask_heads=2, dtype=F16, sinks=True),
    Case("dense-split", seq=(9, 700), heads=(4, 1), dim=(64, 64), block=None, dtype=F16, sinks=True, softcap=4.0),
    Case("long-window", seq=(400, 400), dim=(64, 64), block=None, window=(150, 0), dtype=F16),
    Case("bf16-blocks-256", seq=(300, 300), dim=(64, 64), block=(256, 256), dtype=torch.bfloat16, density=0.7),
]


def _geometry(case: Case, problem: Problem) -> Geometry:
    layout = {n: x for n, x in problem.kwargs.items() if "seqlen" in n or "ranges" in n}
    return make_geometry(
        problem.q, problem.k, problem.v, problem.mask, problem.kwargs["causal"], case.scale, case.window, case.softcap,
        problem.sinks, "auto", resolve_sequences(problem.q, problem.k, **layout), case.means,
    )  # fmt: skip


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch):
    """The Gluon implementation, emulated without a GPU; the argument is the seed of the copies' order."""
    from gluon_emulator import Emulated

    from sparseattn.ops.block_sparse import gluon

    kernel = gluon.forward_kernel

    def prepare(order: int = 0):
        if not ON_HOPPER:
            monkeypatch.setattr(gluon, "forward_kernel", Emulated(kernel, order=order))
        return gluon

    return prepare


@pytest.mark.parametrize("case", CASES + HOPPER_CASES, ids=str)
def test_forward_matches_oracle(case: Case, emulated) -> None:
    case = case if case.dtype == torch.bfloat16 else replace(case, dtype=F16)
    if not ON_HOPPER and case.dtype == torch.bfloat16 and (case.columns or case.means):
        pytest.skip("the interpreter, which runs the kernels of extra keys, multiplies bfloat16 wrongly")
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    gluon = emulated()
    reason = gluon.refusal(*problem[:3], g)
    if reason is not None:
        assert case.id in {known.id for known in CASES}
        pytest.skip(reason)
    o, lse = gluon.forward(*problem[:3], problem.sinks, g)
    sinks = problem.sinks
    exact = dense_result(
        case, problem, *(t.double() for t in problem[:3]), None if sinks is None else sinks.double()
    )  # fmt: skip
    eager = dense_result(case, problem, *problem[:3], sinks)
    for name, actual, oracle, low in zip(("o", "lse"), (o, lse), exact, eager, strict=True):
        assert_close_to_oracle(actual, oracle, low, name=name)


@pytest.mark.parametrize("case", HOPPER_CASES[:5], ids=str)
def test_unselected_keys_may_hold_nan(case: Case, emulated) -> None:
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    assert problem.mask is not None
    clean = emulated().forward(*problem[:3], None, g)
    k, v = poison_unselected(problem.k, problem.v, problem.mask)
    poisoned = emulated().forward(problem.q, k, v, None, g)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


def test_padding_may_hold_nan(emulated) -> None:
    case = Case("static", batch=2, seq=(40, 300), dim=(64, 64), block=None, dtype=F16, heads=(4, 2),
                ranges=(((0, 40), (0, 170)), ((3, 35), (20, 290))))  # fmt: skip
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    clean = emulated().forward(*problem[:3], None, g)
    for b, ((q0, q1), (k0, k1)) in enumerate(problem.spans):
        for t, (first, last) in ((problem.q, (q0, q1)), (problem.k, (k0, k1)), (problem.v, (k0, k1))):
            t[b, :first] = torch.nan
            t[b, last:] = torch.nan
    poisoned = emulated().forward(*problem[:3], None, g)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("side", ["q", "k"])
def test_one_side_alone_may_be_ragged(side: str, emulated) -> None:
    q, k, v = make_qkv(2, 200, 300, 4, 2, 64, dtype=F16, device=DEVICE)
    rows = {"q": [(3, 190), (0, 70)], "k": [(20, 290), (0, 130)]}[side]
    ranges = {f"ranges_{side}": torch.tensor(rows, dtype=torch.int32, device=DEVICE)}
    mask = random_block_mask((200, 300), (64, 128), 2, density=0.7, device=DEVICE)

    def geometry(mask: BlockMask | None, q: Tensor, k: Tensor, v: Tensor, **layout: Tensor) -> Geometry:
        sequences = resolve_sequences(q, k, **layout)
        return make_geometry(q, k, v, mask, None, None, None, None, None, "auto", sequences)

    for chosen in (mask, None):
        o, lse = emulated().forward(q, k, v, None, geometry(chosen, q, k, v, **ranges))
        expected = reference.forward(q.double(), k.double(), v.double(), None, geometry(chosen, q, k, v, **ranges))
        eager = reference.forward(q, k, v, None, geometry(chosen, q, k, v, **ranges))
        for name, actual, exact, low in zip(("o", "lse"), (o, lse), expected, eager, strict=True):
            assert_close_to_oracle(actual, exact, low, name=name)


def test_the_order_of_copies_changes_no_bit(emulated) -> None:
    case = HOPPER_CASES[0]
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    first = emulated(0).forward(*problem[:3], None, g)
    for order in range(1, 6):
        again = emulated(order).forward(*problem[:3], None, g)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_future_keys_change_no_bit(emulated) -> None:
    case = HOPPER_CASES[0]
    problem = build(case, DEVICE)
    g = _geometry(case, problem)
    before = emulated().forward(*problem[:3], None, g)[0]
    problem.k[:, 200:] += 1
    problem.v[:, 200:] -= 1
    after = emulated().forward(*problem[:3], None, g)[0]
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"scale": -1.0}, "a positive scale, not -1.0"),
        ({"dim": (264, 64)}, "up to 256 in multiples of 8, not 264 of q and k"),
        ({"dim": (64, 20)}, "up to 256 in multiples of 8, not 20 of v"),
        ({"block": (64, 48)}, "KV blocks of 16, 32, 64 or multiples of"),
        ({"block": (64, 32)}, None),
    ],
    ids=str,
)
def test_reasons_name_what_does_not_fit(fields: dict[str, Any], words: str | None) -> None:
    from sparseattn.ops.block_sparse import gluon

    case = Case("reason", **{"dim": (64, 64), "dtype": F16, **fields})
    problem = build(case, DEVICE)
    reason = gluon.refusal(*problem[:3], _geometry(case, problem))
    assert reason is None if words is None else words in reason


def test_reasons_for_strides() -> None:
    from sparseattn.ops.block_sparse import gluon

    case = Case("reason", dim=(64, 64), dtype=F16, batch=2)
    q, k, v = build(case, DEVICE)[:3]
    g = _geometry(case, build(case, DEVICE))
    wide = q.repeat_interleave(2, 3)
    assert "q aligned to 16 bytes with rows of stride 1" in gluon.refusal(wide[..., ::2], k, v, g)
    assert "k aligned to 16 bytes" in gluon.refusal(q, wide[..., 4:68], v, g)
    assert "no expanded v" in gluon.refusal(q, k, v[:, :, :1].expand(v.shape), g)
    rows = (
        torch.empty((2, 65, 2, 64), dtype=F16, device=DEVICE)
        .view(-1)[: 2 * 8296]
        .as_strided(k.shape, (8264, 128, 64, 1))
    )
    assert "batch stride to be a multiple of its row stride" in gluon.refusal(q, rows, v, g)


def test_gradients_that_hopper_lacks_are_tritons(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" runs the forward pass of such a call in Gluon all the same."""
    from sparseattn.ops.block_sparse import triton

    case = Case("small-blocks", seq=(100, 140), heads=(2, 1), dim=(64, 64), block=(64, 32), mask_heads=1, dtype=F16)
    gluon, ran = emulated(), []
    if not ON_HOPPER:
        monkeypatch.setattr(library, "implementations", lambda impl, t: ("gluon", "triton"))
        monkeypatch.setattr(library, "_attend", lambda q, k, v, sinks, impl, g: gluon.forward(q, k, v, sinks, g))

        def refusal(q, k, v, g, gradients=None) -> str | None:
            return gluon.refusal(q, k, v, g) or (gradients and gluon.unsupported_backward_reason(q, k, v, g))

        monkeypatch.setattr(gluon, "unsupported_reason", refusal)

    def noted(name: str, run: Any) -> Any:
        return lambda *args, **options: (ran.append(name), run(*args, **options))[1]

    monkeypatch.setattr(gluon, "forward", noted("forward", gluon.forward))
    monkeypatch.setattr(triton, "backward", noted("backward", triton.backward))
    problem = build(case, DEVICE)
    oracle = with_gradients(lambda *t: dense_result(case, problem, *t), problem, torch.float64)
    eager = worst_eager(case, problem, oracle)

    def attend(q, k, v, sinks):
        return block_sparse_attention(q, k, v, problem.mask, return_lse=True)

    actual = with_gradients(attend, problem, case.dtype)
    for name, got in actual.items():
        assert_close_to_oracle(got, oracle[name], eager[name], name=name)
    assert ran[-1] == "backward"
    assert ON_HOPPER or ran == ["forward", "backward"]  # a GPU repeats launches of its own
