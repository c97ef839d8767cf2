"""Searches for the value of a knob."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from sparseattn.calibrate import KNOBS, Curve, Knob, knob_of
from sparseattn.selectors import SELECTORS


def test_knobs_are_options_of_their_methods() -> None:
    for method, knob in KNOBS.items():
        assert knob.option in {f.name for f in fields(SELECTORS[method].config)}
        assert knob.low <= knob.high
    assert set(SELECTORS) - set(KNOBS) <= {"heads"}, "a method without a knob cannot be compared at equal density"


def test_positions_run_from_little_to_much() -> None:
    assert Knob("t", 0, 10).value(0.3) == pytest.approx(3)
    assert Knob("t", 0, 10, rising=False).value(0.3) == pytest.approx(7)
    tau = Knob("tau", 1e-4, 1.0, rising=False, log=True)
    assert [tau.value(p) for p in (0, 0.5, 1)] == pytest.approx([1, 1e-2, 1e-4])
    assert knob_of("streaming", 4096).value(0.25) == 1024
    assert isinstance(knob_of("streaming", 4096).value(0.25), int)
    assert knob_of("heads", 4096) is None
    assert knob_of("landmark", 4096, "density").exact
    assert knob_of("landmark", 4096, "tau") == KNOBS["landmark"]
    with pytest.raises(ValueError, match=r"option: expected one of \['density', 'tau'\] for method 'landmark'"):
        knob_of("landmark", 4096, "rows")


@pytest.mark.parametrize("target", [0.05, 0.1, 0.4])
@pytest.mark.parametrize(
    ("knob", "measure"),
    [
        (Knob("threshold", 0.0, 1.0), lambda t: t**6),
        (Knob("tau", 1e-4, 1.0, rising=False, log=True), lambda t: 1 / (1 + 40 * t)),
        (Knob("tokens", 0, 4096, step=1), lambda t: 0.02 + t / 4096),
    ],
    ids=["power", "reciprocal", "counts"],
)
def test_a_target_is_met(knob: Knob, measure, target: float) -> None:
    found = Curve(measure, knob).find(target, steps=20)
    assert found.achieved == pytest.approx(measure(found.value))
    assert found.achieved == pytest.approx(target, rel=0.051)


def test_measurements_are_shared_between_targets() -> None:
    asked = []

    def measure(value: float) -> float:
        asked.append(value)
        return value

    curve = Curve(measure, Knob("x", 0.0, 1.0))
    for target in (0.1, 0.2, 0.4, 0.2):
        assert curve.find(target).achieved == pytest.approx(target, rel=0.05)
    assert len(asked) == len(set(asked))
    assert len(asked) < 16
    assert curve.find(0.4).tried == len(asked)


def test_what_cannot_be_reached_ends_at_an_end() -> None:
    floor = Curve(lambda v: 0.15 + 0.85 * v, Knob("x", 0.0, 1.0)).find(0.1)
    assert floor.value == pytest.approx(0, abs=2e-3)
    assert floor.achieved == pytest.approx(0.15, abs=2e-3)
    stuck = Curve(lambda v: 0.3, Knob("x", 0, 8, step=1)).find(0.9)
    assert stuck.achieved == 0.3
    flat = Curve(lambda v: 0.3, Knob("x", 0, 0, step=1)).find(0.1)
    assert (flat.value, flat.achieved, flat.tried) == (0, 0.3, 1)
    exact = Curve(lambda v: math.nan, Knob("density", 0, 1, exact=True)).find(0.1)
    assert exact == (0.1, 0.1, 0)
