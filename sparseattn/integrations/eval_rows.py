"""Rows of an evaluation, and the answers they count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.calibrate import knob_of
from sparseattn.integrations.options import DENSE

#: Tenths of a prompt by which answers are counted for the map of needle depths.
DEPTHS = 10


class Score(NamedTuple):
    """Answers to one prompt.

    Attributes:
        correct: Right ones; fractions where a task scores partly.
        total: Questions.
        by_depth: ``[correct, total]`` of the questions whose needle lies in each tenth of the prompt; None where the
            task has no needles.
    """

    correct: float
    total: int
    by_depth: list[list[float]] | None = None


@dataclass(frozen=True)
class EvalRow:
    """One task, length, method and density on one model; JSON-able.

    Attributes:
        model: Its name.
        task: The workload's.
        length: Tokens of a prompt.
        method: A selector's name, or "dense".
        target: The density asked for; None for dense and for fixed options.
        density: The density of the scored prompts, mean over layers, heads and prompts.
        knob: Option that was turned; None where none was.
        value: What it was turned to.
        options: All options, flat.
        correct: Right answers.
        total: Questions.
        prompts: Scored prompts.
        seed: Of the prompts.
        seconds: Time of a prefill, median over prompts (for tasks that generate: of the whole answer).
        selection_seconds: Of the median prompt, what choosing blocks took in all layers.
        attention_seconds: Likewise, the operator.
        fidelity: Of the first prompt of the first task at this length, means over layers and heads: density, recall,
            p05, worst (the worst row of all), deficit, output_error, and with bounds random, oracle, normalised. Empty
            where not measured.
        by_depth: ``[correct, total]`` by tenths of the prompt, where the task has needles.
        environment: Device, dtype and versions.
    """

    model: str
    task: str
    length: int
    method: str
    target: float | None
    density: float
    knob: str | None
    value: float | None
    options: dict[str, Any]
    correct: float
    total: int
    prompts: int
    seed: int
    seconds: float
    selection_seconds: float
    attention_seconds: float
    fidelity: dict[str, float] = field(default_factory=dict)
    by_depth: list[list[float]] | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def standard_error(self) -> float:
        """Of the accuracy, were questions independent draws: what a repetition with other prompts would move by.

        One right and one wrong answer are added (Agresti and Coull), so that it is not 0 where all or none are right.
        """
        share = (self.correct + 1) / (self.total + 2)
        return (share * (1 - share) / (self.total + 2)) ** 0.5

    @property
    def label(self) -> str:
        """The method, and its knob where that is not the method's usual one."""
        usual = knob_of(self.method, self.length) if self.method != DENSE else None
        other = self.knob is not None and (usual is None or self.knob != usual.option)
        return f"{self.method} ({self.knob})" if other else self.method

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> EvalRow:
        return cls(**flat)


def depth_counts(right: Tensor, depth: Tensor) -> list[list[float]]:
    """``[correct, total]`` by tenths of a prompt.

    Args:
        right: bool or fractions [Q].
        depth: [Q] in [0, 1], where the needle of each question lies.
    """
    at = (depth * DEPTHS).long().clamp(0, DEPTHS - 1)
    total = torch.zeros(DEPTHS, dtype=torch.float64).index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
    correct = torch.zeros(DEPTHS, dtype=torch.float64).index_add_(0, at, right.double())
    return [[c, t] for c, t in zip(correct.tolist(), total.tolist(), strict=True)]
