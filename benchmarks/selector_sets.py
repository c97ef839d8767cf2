"""The named sets of ``benchmarks.selectors``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.selector_problems import Setting

PHASES = ("selection", "attention", "both")
#: The shares of the blocks at which methods are compared with one another.
DENSITIES = (0.07, 0.1, 0.2)

DEFAULTS = tuple(
    Setting(method)
    for method in ("landmark", "flashprefill", "flexprefill", "minference", "xattention", "bound", "streaming")
)


def table(n: int) -> tuple[Setting, ...]:
    """Every method as it is published, and the settings of which a time is asked."""
    return (
        Setting("flashprefill"),
        Setting("flexprefill"),
        Setting("minference"),
        *(xattention(stride) for stride in (16, 8)),
        Setting("landmark", "half the rows"),
        Setting("landmark", "all rows", {"rows": "all"}),
        Setting("landmark", "half the rows, float8", {"fp8": True}),
        Setting("landmark", "all rows, float8", {"rows": "all", "fp8": True}),
        Setting("bound"),
        Setting("streaming"),
    )


def xattention(stride: int, threshold: float = 0.9) -> Setting:
    label = f"stride {stride}, threshold {threshold:g}"
    return Setting("xattention", label, {"stride": stride, "threshold": threshold})


def prefill(n: int) -> tuple[Setting, ...]:
    """The methods at equal densities, where they take one, and as they are by default.

    Streaming has a window of the length that gives the density; minference has none of either.
    """
    found = [setting for setting in DEFAULTS if setting.method != "xattention"] + [xattention(s) for s in (16, 8)]
    for density in DENSITIES:
        label = f"density {density:g}"
        found += [Setting(method, label, {"density": density}) for method in ("landmark", "flexprefill")]
        for method in ("xattention", "flashprefill", "bound"):
            found.append(Setting(method, label, {"rule": "topk", "density": density}))
        # A window of w of n keys holds 1 - (1 - w / n) ** 2 of the pairs below the diagonal. Two blocks are kept beside
        # it: the first one, and half a block on either end.
        window = max(0, round(n * (1 - math.sqrt(1 - density))) - 256)
        found.append(Setting("streaming", label, {"num_local_tokens": window}))
    return tuple(found)


def defaults(n: int) -> tuple[Setting, ...]:
    """The methods as a model runs them that is told nothing else."""
    return DEFAULTS


class Plan(NamedTuple):
    """A set.

    Attributes:
        lengths: Tokens.
        settings: Methods and options, for a number of tokens.
        phases: What is timed, each in a row of its own.
        dense: Whether dense attention is timed as well.
        clock: Whether times are also taken by the clock, from a quiet device to a quiet device.
    """

    lengths: tuple[int, ...]
    settings: Callable[[int], tuple[Setting, ...]]
    phases: tuple[str, ...] = PHASES
    dense: bool = True
    clock: bool = False


SETS = {
    "table": Plan((8192, 32768, 131072), table),
    "prefill": Plan((131072,), prefill, ("selection", "both")),
    "short": Plan((1024, 2048, 4096, 8192, 16384, 32768), defaults, ("both",), clock=True),
    "memory": Plan((1 << 20,), table, ("selection",), dense=False),
}
