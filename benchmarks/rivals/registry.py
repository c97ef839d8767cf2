"""The registry of implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sparseattn.testing.timing import package_version
from sparseattn.testing.workloads import Problem


class Prepared(NamedTuple):
    """A call, ready to be timed.

    Attributes:
        run: Computes the output ``[1, Sq, Hq, Dv]`` (any strides); differentiable if the problem is a backward one.
        said: What the row should say of the preparation: times of a plan, forms of arguments.
    """

    run: Callable[[], Tensor]
    said: dict[str, Any]


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        name: As rows spell it.
        prepare: Brings the problem to the implementation's own form. Raises ``Unsupported`` with a reason.
        missing: Why it is not installed here, or None; cheap, and imports nothing.
        dense: It attends everything, whatever the mask says, and is compared at density 1.
        ops: What it computes.
    """

    name: str
    prepare: Callable[[Problem], Prepared]
    missing: Callable[[], str | None]
    dense: bool = False
    ops: tuple[str, ...] = ("forward", "backward")

    def takes(self, problem: Problem) -> bool:
        """Whether a row for this problem makes sense at all."""
        return problem.op in self.ops and (not self.dense or problem.density == 1)


IMPLEMENTATIONS: dict[str, Implementation] = {}


def nothing_missing() -> str | None:
    return None


def needs(package: str) -> Callable[[], str | None]:
    """``missing`` of an implementation that a distribution brings."""
    return lambda: None if package_version(package) else f"{package} is not installed"


def implementation(
    name: str,
    *,
    missing: Callable[[], str | None] = nothing_missing,
    dense: bool = False,
    ops: tuple[str, ...] = ("forward", "backward"),
) -> Callable[[Callable[[Problem], Prepared]], Callable[[Problem], Prepared]]:
    """Register a function that prepares the call of a problem."""

    def add(prepare: Callable[[Problem], Prepared]) -> Callable[[Problem], Prepared]:
        IMPLEMENTATIONS[name] = Implementation(name, prepare, missing, dense, ops)
        return prepare

    return add


def installed() -> dict[str, str | None]:
    """Every implementation, and why it is not installed (None where it is)."""
    return {name: one.missing() for name, one in IMPLEMENTATIONS.items()}
