"""What a model still answers when attention is sparse: task x length x method x density, as rows of data.

A *workload* holds prompts of one task and length and knows how to score a model on them; ``evaluate`` runs it with
dense attention and with every method at every density, and measures speed and fidelity beside it. Methods are brought
to a density by their own knob (``sparseattn.calibrate``) on a prompt that is not scored.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sparseattn.calibrate import Curve, Knob, knob_of
from sparseattn.errors import argument_error
from sparseattn.integrations import transformers as hf
from sparseattn.integrations.eval_rows import DEPTHS, EvalRow, Score
from sparseattn.integrations.options import DENSE, AttentionOptions, options
from sparseattn.integrations.records import CallRecord, record
from sparseattn.selectors import get

# Prompts are selected for at any length, single tokens of an answer never.
_MIN_QUERIES = 16

#: Blocks that methods keep without looking differ by their authors' defaults, and at lengths that a CPU can do they
#: would decide the comparison. Here every method keeps the first key block and the diagonal's, and finds the rest.
EVEN: dict[str, dict[str, Any]] = {
    "flashprefill": {"num_sink_tokens": 1, "num_local_tokens": 0, "num_last_tokens": 0},
    "flexprefill": {"min_budget": 1},
    "minference": {"num_sink_tokens": 1, "num_local_tokens": 1},
    "streaming": {"num_sink_tokens": 1},
}


class Workload(Protocol):
    """Prompts of one task and length."""

    @property
    def task(self) -> str:
        """Its name."""

    @property
    def length(self) -> int:
        """Tokens of a prompt, answers included."""

    @property
    def prompts(self) -> int:
        """How many are scored."""

    def prefill(self, model: Any, index: int) -> None:
        """Run the model once over a prompt; index -1 is one that is never scored."""

    def score(self, model: Any, index: int) -> Score:
        """Answer the questions of a prompt."""


@dataclass(frozen=True)
class Contender:
    """A method with what it may keep.

    Attributes:
        method: A selector's name.
        options: Options of the method and the call, flat.
        knob: The option to turn; None for the method's usual one.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    knob: str | None = None

    @classmethod
    def parse(cls, spec: str, block_size: int | None = None, even: bool = True) -> Contender:
        """From ``method`` or ``method:option``, with forced blocks made even (``EVEN``) and a block size.

        Raises:
            ValueError: An unknown method, or an option that is no knob of it.
        """
        method, _, knob = spec.partition(":")
        config = get(method).config
        own = dict(EVEN.get(method, {})) if even else {}
        if block_size is not None:
            own["block_size"] = block_size
        if method == "flexprefill" and even and block_size is not None:
            own["min_budget"] = block_size
        if knob:
            knob_of(method, 1, knob)
        if knob == "density" and method in ("xattention", "flashprefill", "bound"):
            own["rule"] = "topk"
        config.from_dict({**own, **({"density": 0.5} if knob == "density" else {})})
        return cls(method, own, knob or None)

    def turned(self, knob: Knob, value: float) -> AttentionOptions:
        """The options with the knob at a value.

        Raises:
            ValueError: As ``AttentionOptions``.
        """
        flat = {"method": self.method, "min_seq_len": _MIN_QUERIES, **self.options, knob.option: value}
        return AttentionOptions.from_dict(flat)


def evaluate(
    model: Any,
    workloads: Sequence[Workload],
    contenders: Sequence[Contender],
    densities: Sequence[float],
    *,
    name: str,
    seed: int = 0,
    fidelity: bool | str = "bounds",
    skip: Callable[[str, int, str, float | None], bool] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[EvalRow]:
    """Score a model on every workload, first with dense attention, then with every method at every density.

    Args:
        model: A Transformers model; its attention implementation is put back after every row.
        workloads: What to ask; of one length, the first calibrates the knobs.
        contenders: Methods.
        densities: Shares of the visible blocks to reach, each in (0, 1]. Where a method cannot (blocks that it always
            keeps, a knob that ends), it comes as close as it can, and its row says what it came to.
        name: Of the model, for the rows.
        seed: Of the prompts, for the rows.
        fidelity: As ``record`` takes it: False, True, or ``"bounds"``.
        skip: ``skip(task, length, label, target)`` is true for rows that exist already.
        progress: Told what is about to run.

    Yields:
        Rows, as they are measured.

    Raises:
        ValueError: A density out of range, a method that has no knob, options that do not fit.
    """
    for density in densities:
        if not 0 < density <= 1:
            raise argument_error("density", "more than 0 and at most 1", density)
    knobs = [knob_of(c.method, 1, c.knob) for c in contenders]
    for contender, knob in zip(contenders, knobs, strict=True):
        if knob is None:
            raise argument_error("method", "one that a knob brings to a density", repr(contender.method))
    tell = progress or (lambda text: None)
    done = skip or (lambda *key: False)
    environment = _environment(model)
    for length in dict.fromkeys(w.length for w in workloads):
        own = [w for w in workloads if w.length == length]
        common: dict[str, Any] = {"name": name, "seed": seed, "environment": environment}
        for workload in own:
            if not done(workload.task, length, DENSE, None):
                tell(f"{workload.task} {length}: dense")
                yield _measure(model, workload, DENSE, None, **common)
        for contender in contenders:
            knob = knob_of(contender.method, length, contender.knob)
            assert knob is not None
            curve = Curve(_density_of(model, own[0], contender, knob), knob)
            for target in sorted(densities):
                wanted = [w for w in own if not done(w.task, length, _label(contender), target)]
                if not wanted:
                    continue
                tell(f"{length}: {_label(contender)} to density {target:g}")
                value = curve.find(target).value
                chosen = contender.turned(knob, value)
                found = _fidelity(model, own[0], chosen, fidelity)
                turned: dict[str, Any] = {"target": target, "knob": knob.option, "value": value, "fidelity": found}
                for workload in wanted:
                    tell(f"{workload.task} {length}: {_label(contender)} at {target:g}")
                    yield _measure(model, workload, contender.method, chosen, **turned, **common)


def _label(contender: Contender) -> str:
    return contender.method if contender.knob is None else f"{contender.method} ({contender.knob})"


def _density_of(model: Any, workload: Workload, contender: Contender, knob: Knob) -> Callable[[float], float]:
    """Density of the calibration prompt at a value of the knob."""

    def measure(value: float) -> float:
        with _sparse(model, contender.turned(knob, value)), record() as calls:
            workload.prefill(model, -1)
        return _mean_density(calls)

    return measure


def _measure(
    model: Any, workload: Workload, method: str, chosen: AttentionOptions | None, *, name: str, seed: int,
    environment: dict[str, Any], fidelity: dict[str, float] | None = None, target: float | None = None,
    knob: str | None = None, value: float | None = None,
) -> EvalRow:  # fmt: skip
    """Score all prompts of a workload with one setting."""
    device = next(model.parameters()).device
    with _sparse(model, chosen):
        if device.type == "cuda":  # kernels compile on the first call of a shape
            workload.prefill(model, -1)
        scores: list[Score] = []
        runs: list[tuple[float, float, float, float]] = []
        for index in range(workload.prompts):
            with record(timing=True) as calls:
                started = _now(device)
                scores.append(workload.score(model, index))
                seconds = _now(device) - started
            prefills = _prefills(calls)
            taken = [sum(getattr(c, part) or 0.0 for c in prefills) for part in _PARTS]
            runs.append((seconds, *taken, 1.0 if chosen is None else _mean_density(calls)))  # type: ignore[arg-type]
    middle = sorted(runs)[(len(runs) - 1) // 2]
    depths = [s.by_depth for s in scores if s.by_depth is not None]
    return EvalRow(
        model=name,
        task=workload.task,
        length=workload.length,
        method=method,
        target=target,
        density=statistics.fmean(run[3] for run in runs),
        knob=knob,
        value=value,
        options={} if chosen is None else chosen.to_dict(),
        correct=sum(s.correct for s in scores),
        total=sum(s.total for s in scores),
        prompts=workload.prompts,
        seed=seed,
        seconds=statistics.median(run[0] for run in runs),
        selection_seconds=middle[1],
        attention_seconds=middle[2],
        fidelity=fidelity or {},
        by_depth=[[sum(d[i][j] for d in depths) for j in (0, 1)] for i in range(DEPTHS)] if depths else None,
        environment=environment,
    )


_PARTS = ("selection_seconds", "attention_seconds")


def _prefills(calls: Sequence[CallRecord]) -> list[CallRecord]:
    """Calls over a whole prompt, not the steps of generating an answer."""
    longest = max((call.q_len for call in calls), default=0)
    return [call for call in calls if call.q_len == longest]


def _mean_density(calls: Sequence[CallRecord]) -> float:
    found = _prefills(calls)
    if not found:
        raise argument_error(
            "model", "one that calls this library's attention", "a model that did not", "Is it a Transformers model?"
        )
    return statistics.fmean(call.density for call in found)


def _fidelity(model: Any, workload: Workload, chosen: AttentionOptions, wanted: bool | str) -> dict[str, float]:
    """Means over layers, and the worst row of all, of a workload's first prompt."""
    if not wanted:
        return {}
    with _sparse(model, chosen), record(fidelity=wanted) as calls:
        workload.prefill(model, 0)
    layers = [call.heads.summary() for call in _prefills(calls) if call.heads is not None]
    names = dict.fromkeys(name for layer in layers for name in layer)
    found = {name: [layer[name] for layer in layers if name in layer] for name in names}
    return {name: min(values) if name == "worst" else statistics.fmean(values) for name, values in found.items()}


@contextmanager
def _sparse(model: Any, chosen: AttentionOptions | None) -> Iterator[None]:
    """The model with these options inside the block; None leaves it as it is (dense)."""
    if chosen is None:
        yield
        return
    hf.register()
    before = model.config._attn_implementation
    model.set_attn_implementation(hf.PREFIX)
    context: AbstractContextManager[None] = options(**chosen.to_dict())
    try:
        with context:
            yield
    finally:
        model.set_attn_implementation(before)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _environment(model: Any) -> dict[str, Any]:
    import transformers

    import sparseattn

    device = next(model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return {
        "device": where,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "sparseattn": sparseattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
