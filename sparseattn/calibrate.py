"""Find the value of a method's option that gives a wanted density, recall or anything else that moves with it.

``Knob`` says which option of a method trades density for recall, between which ends and in which direction; ``Curve``
finds a value of it, remembering what it measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from sparseattn.errors import argument_error


class Knob(NamedTuple):
    """The option of a method that says how much it keeps.

    Attributes:
        option: Field of the method's config.
        low: The least value tried.
        high: The greatest.
        rising: Whether larger values keep more.
        log: Search the logarithm of the value: for thresholds that span orders of magnitude.
        step: Values are multiples of it, as ints; 0 for real numbers.
        exact: The option is the density itself: there is nothing to search.
    """

    option: str
    low: float
    high: float
    rising: bool = True
    log: bool = False
    step: int = 0
    exact: bool = False

    def value(self, position: float) -> float:
        """The value at a position from 0 (keeps least) to 1 (keeps most)."""
        share = position if self.rising else 1 - position
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        value = self.low + share * (self.high - self.low)
        return round(value / self.step) * self.step if self.step else value


#: How each method is brought to a density; ``streaming`` reaches ``high`` times its block size, set by ``knob_of``.
KNOBS: dict[str, Knob] = {
    "landmark": Knob("tau", 1e-4, 1.0, rising=False, log=True),
    "xattention": Knob("threshold", 0.0, 1.0),
    "streaming": Knob("num_local_tokens", 0, 0, step=1),
    "flashprefill": Knob("threshold", 1e-8, 1.0, rising=False, log=True),
    "bound": Knob("threshold", 1e-8, 1.0, rising=False, log=True),
    "topk": Knob("density", 0.0, 1.0, exact=True),
    "oracle": Knob("threshold", 1e-6, 1.0, rising=False, log=True),
    "flexprefill": Knob("gamma", 0.0, 1.0),
    "minference": Knob("adaptive_budget", 1e-4, 1.0, log=True),
}


def knob_of(method: str, length: int, option: str | None = None) -> Knob | None:
    """The knob of a method for prompts of a length, or None where it has none.

    Args:
        method: Name of a selector.
        length: Tokens of a prompt.
        option: Another option than the method's usual one; only ``"density"``, for methods that keep an exact share.

    Raises:
        ValueError: An ``option`` that is not ``"density"``.
    """
    if option == "density":
        return Knob("density", 0.0, 1.0, exact=True)
    if option is not None and (method not in KNOBS or option != KNOBS[method].option):
        known = ["density", *([KNOBS[method].option] if method in KNOBS else [])]
        raise argument_error("option", f"one of {known} for method {method!r}", repr(option))
    knob = KNOBS.get(method)
    return knob._replace(high=length) if knob is not None and knob.step else knob


class Found(NamedTuple):
    """What a search ended with.

    Attributes:
        value: Of the option.
        achieved: What was measured there; the closest to the target of all that was tried.
        tried: Measurements so far, those for earlier targets included.
    """

    value: float
    achieved: float
    tried: int


class Curve:
    """What a measurement gives at the values of a knob: monotone, dear to measure, and so measured once a value.

    Example:
        >>> curve = Curve(lambda tau: density_with(tau), KNOBS["landmark"])
        >>> curve.find(0.1).value

    Args:
        measure: From a value of the knob to what it gives, a number that does not fall from position 0 to 1.
        knob: Which values there are.
    """

    def __init__(self, measure: Callable[[float], float], knob: Knob):
        self._measure, self._knob = measure, knob
        self._points: dict[float, tuple[float, float]] = {}  # value: (position, measured)

    def find(self, target: float, tolerance: float = 0.05, steps: int = 10) -> Found:
        """The value that comes closest to a target.

        Where even an end of the knob misses the target (blocks a method always keeps, say), the end is what is found:
        compare ``achieved`` with the target.

        Args:
            target: What ``measure`` should give.
            tolerance: Stop within this share of the target.
            steps: Measure at most so many times.
        """
        if self._knob.exact:
            return Found(target, target, 0)
        low, high = 0.0, 1.0
        for step in range(steps):
            points = sorted(self._points.values())
            below = max((p for p in points if p[1] <= target), default=None)
            above = min((p for p in points if p[1] > target), default=None)
            best = self._best(target)
            if best is not None and abs(best.achieved - target) <= tolerance * target:
                break
            low = 0.0 if below is None else below[0]
            high = 1.0 if above is None else above[0]
            at = self._between(below, above, target, step)
            value = self._knob.value(at)
            if value in self._points or high - low < 1e-4:
                # An end that was never measured may still come closer.
                edge = 0.0 if below is None else 1.0 if above is None else None
                value = value if edge is None else self._knob.value(edge)
                if edge is None or value in self._points:
                    break
                at = edge
            self._points[value] = (at, float(self._measure(value)))
        best = self._best(target)
        assert best is not None
        return best

    @staticmethod
    def _between(
        below: tuple[float, float] | None, above: tuple[float, float] | None, target: float, step: int
    ) -> float:
        """The next position to measure: by proportion inside a bracket, every other time by halves."""
        low = (0.0, None) if below is None else below
        high = (1.0, None) if above is None else above
        share = 0.5
        if low[1] is not None and high[1] is not None and step % 2:
            share = min(0.9, max(0.1, (target - low[1]) / max(high[1] - low[1], 1e-9)))
        return low[0] + share * (high[0] - low[0])

    def _best(self, target: float) -> Found | None:
        if not self._points:
            return None
        value = min(self._points, key=lambda v: abs(self._points[v][1] - target))
        return Found(value, self._points[value][1], len(self._points))
