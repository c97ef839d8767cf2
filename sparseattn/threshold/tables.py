"""Tables of thresholds: what is in one, files of them, and those that ship with the package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sparseattn import selectors
from sparseattn.errors import argument_error

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class ThresholdTable:
    """A threshold for every query head of a model.

    Attributes:
        model: Hub id, folder or shipped name of the model.
        method: The selector.
        option: The option of its config that the values are for.
        values: ``[layers][query heads]``.
        options: The other options that they were fitted with (stride, block size): they hold for these alone.
        target: Recall of attention mass they were fitted to.
        statistic: Of a head's rows, "mean" or "p05" (nineteen of twenty rows reach the target).
        measured: How they were fitted and what came out: prompts, tokens, recall, density.

    Raises:
        ValueError: A method, options or values that do not fit each other.
    """

    model: str
    method: str
    option: str
    values: tuple[tuple[float, ...], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    target: float = 0.95
    statistic: str = "mean"
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.values
        if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(r, (list, tuple)) for r in rows):
            raise argument_error("values", "rows of thresholds, one a layer", repr(rows))
        object.__setattr__(self, "values", tuple(map(tuple, rows)))
        selectors.configure(self.method, {**self.options, self.option: self.values})

    def attention_options(self) -> dict[str, Any]:
        """The options of a model that uses the table, for ``config.sparseattn`` or ``sparseattn.options(**...)``."""
        return {"method": self.method, **self.options, self.option: [list(row) for row in self.values]}

    def config(self) -> selectors.SelectorConfig:
        """The options of a selector call, which then needs ``layer``."""
        return selectors.configure(self.method, {**self.options, self.option: self.values})

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, a layer a line."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "values"}
        head = json.dumps(fields, indent=1).removesuffix("\n}")
        rows = ",\n  ".join(json.dumps(row) for row in self.values)
        Path(path).write_text(f'{head},\n "values": [\n  {rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ThresholdTable:
        """Read a table.

        Raises:
            FileNotFoundError: No such file.
            ValueError: No JSON object, keys that are unknown or missing, or values that do not fit.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise argument_error("path", "a JSON file", f"{path}: {error}") from error
        known = {f.name for f in dataclasses.fields(cls)}
        needed = {"model", "method", "option", "values"}
        if not isinstance(found, dict) or not needed <= set(found) <= known:
            keys = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise argument_error("path", f"keys {sorted(needed)}, others among {sorted(known)}", f"{path}: {keys}")
        return cls(**found)


def available() -> tuple[ThresholdTable, ...]:
    """The tables that ship with the package."""
    return _shipped()


@cache
def _shipped() -> tuple[ThresholdTable, ...]:
    return tuple(ThresholdTable.load(path) for path in sorted(_DATA.glob("*.json")))


def find(model: str, method: str = "xattention", options: Mapping[str, Any] | None = None) -> ThresholdTable | None:
    """The shipped table of a model, or None.

    Args:
        model: As the table names it.
        method: A selector.
        options: What the table must have been fitted with, e.g. ``{"stride": 16}``.
    """
    for table in _shipped():
        wanted = options or {}
        if (table.model, table.method) == (model, method) and wanted.items() <= table.options.items():
            return table
    return None


def check_shape(values: Any, model_config: Any, name: str = "threshold") -> None:
    """Raise unless thresholds are as many as a model has layers and query heads.

    Args:
        values: A number, one per query head, or ``[layers][query heads]``.
        model_config: A Transformers config of a text model.
        name: For the message.

    Raises:
        ValueError: They are another model's.
    """
    if not isinstance(values, (list, tuple)):
        return
    heads = model_config.num_attention_heads
    layers = getattr(model_config, "num_hidden_layers", None)
    nested = isinstance(values[0], (list, tuple))
    shape = (len(values), len(values[0])) if nested else (len(values),)
    expected = (layers, heads) if nested else (heads,)
    if shape != expected:
        kind = "layers and query heads" if nested else "query heads"
        hint = "The table is another model's; sparseattn.threshold.calibrate fits one."
        raise argument_error(name, f"{expected} values, for the model's {kind}", f"{shape} values", hint)
