"""The small trained models that ship with the package; examples/train_retrieval.py made them."""

from __future__ import annotations

from pathlib import Path

from sparseattn.errors import argument_error

_HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The models there are."""
    return tuple(sorted(config.parent.name for config in _HERE.glob("*/config.json")))


def path(name: str) -> Path:
    """The folder of a shipped model, as ``transformers.AutoModelForCausalLM.from_pretrained`` takes it.

    Raises:
        ValueError: When there is no such model.
    """
    if name not in names():
        raise argument_error("name", f"one of {', '.join(names())}", repr(name))
    return _HERE / name
