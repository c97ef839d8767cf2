"""What retrieval prompts are filled with: English of the Python documentation, a part of it held out from training."""

from __future__ import annotations

import ast
import functools
import glob
import os
from importlib import import_module, resources
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "eval"]

#: Help topics kept out of the training filler because the evaluation filler is made of them.
HELD_OUT_TOPICS = frozenset(
    [
        "typesfunctions",
        "typesmapping",
        "typesmethods",
        "typesmodules",
        "typesseq",
        "typesseq-mutable",
        "unary",
        "while",
        "with",
        "yield",
    ]
)


#: Shorter texts are repeated up to this length, so that prompts of any usual length find room.
_MIN_TEXT = 300_000


@functools.cache
def filler(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """The filler text int64 [n] and, for every position, that of the next space at or after it."""
    text = held_out_text() if split == "eval" else training_text()
    while len(text) < _MIN_TEXT:
        text = text + b" " + text
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    last = len(tokens) - 1
    spaces = torch.where(tokens == ord(" "), torch.arange(len(tokens)), last)
    next_space = spaces.flip(0).cummin(0).values.flip(0)
    return tokens.to(device), next_space.to(device)


def _normalised(text: str) -> bytes:
    return " ".join(text.split()).encode("ascii", "ignore")


def held_out_text() -> bytes:
    """The shipped evaluation filler, ASCII."""
    path = resources.files("sparseattn.testing") / "text" / "python_reference.txt"
    return _normalised(path.read_text(encoding="ascii"))


def training_text() -> bytes:
    """Help topics that are not held out, and the longer docstrings of the standard library, of the running Python."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        topics = {}
    parts = [topics[name] for name in sorted(topics) if name not in HELD_OUT_TOPICS]
    for file in sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py"))):
        with open(file, encoding="utf-8", errors="ignore") as source:
            parts += _docstrings(source.read())
    text = _normalised("\n".join(parts))
    if len(text) < 100_000:
        raise RuntimeError(
            f"the training text is Python's own documentation, and this Python holds {len(text)} bytes of it; "
            "use one that has pydoc_data and docstrings (not python -OO)"
        )
    return text


def _docstrings(source: str, longer_than: int = 120) -> list[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    return [doc for n in nodes if (doc := ast.get_docstring(n)) and len(doc) > longer_than]
