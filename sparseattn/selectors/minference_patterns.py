"""Which pattern each head follows: MInference's per-head configs, checked and as JSON.

A pattern is a tuple of its kind and its sizes in tokens (block_sparse: in blocks):

    ("vertical_slash", 1000, 6096)    the columns and the distances with the most mass
    ("a_shape", 128, 3968)            keys at the start, nearest keys
    ("tri_shape", 128, 3968, 128)     the same, and last queries that see everything
    ("block_sparse", 100)             best blocks of every row by mean query and mean key
    ("dense",)                        everything

A file holds a list of layers, each a list of patterns or an object ``{"0": [kind, size, ..., score], ...}`` with a
number an entry, as MInference's files do; its names ``vertical_and_slash`` and ``stream_llm`` are understood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseattn.errors import argument_error
from sparseattn.ops.scores.minference import ALL, HeadBudget

Pattern = tuple[Any, ...]
Patterns = Pattern | tuple[Pattern, ...] | tuple[tuple[Pattern, ...], ...]

#: How many sizes a kind has.
SIZES = {"vertical_slash": 2, "a_shape": 2, "tri_shape": 3, "block_sparse": 1, "dense": 0}
_ALIASES = {"vertical_and_slash": "vertical_slash", "stream_llm": "a_shape"}


def freeze(patterns: Any) -> Patterns:
    """Check patterns (one, one per head, or one per layer and head) and make them hashable.

    Raises:
        ValueError: An unknown kind, sizes that do not fit, or layers of different numbers of heads.
    """
    if _is_pattern(patterns):
        return _pattern(patterns)
    rows = _entries(patterns, "patterns")
    if all(_is_pattern(row) for row in rows):
        return tuple(_pattern(row) for row in rows)
    layers = tuple(tuple(_pattern(entry) for entry in _entries(row, "patterns")) for row in rows)
    if len({len(layer) for layer in layers}) != 1:
        raise argument_error("patterns", "as many heads in every layer", [len(layer) for layer in layers])
    return layers


def of_layer(patterns: Patterns, heads: int, layer: int | None) -> tuple[Pattern, ...]:
    """The patterns of the query heads of a layer, from what :func:`freeze` made.

    Raises:
        ValueError: No ``layer``, or one out of range, where patterns are per layer; another number of heads.
    """
    if isinstance(patterns[0], str):
        return (patterns,) * heads
    found: Any = patterns
    if not isinstance(patterns[0][0], str):
        if layer is None or not 0 <= layer < len(patterns):
            raise argument_error(
                "layer", f"an int in [0, {len(patterns)})", layer, "The patterns are per layer and head."
            )
        found = patterns[layer]
    if len(found) != heads:
        hint = "The patterns may be another model's."
        raise argument_error("patterns", f"{heads} entries, one per query head", f"{len(found)} entries", hint)
    return found


def budget(pattern: Pattern) -> HeadBudget:
    """What a head of that pattern keeps."""
    kind, *sizes = pattern
    if kind == "vertical_slash":
        return HeadBudget(vertical=sizes[0], slash=sizes[1])
    if kind == "block_sparse":
        return HeadBudget(blocks=sizes[0])
    if kind == "dense":
        return HeadBudget(last=ALL)
    return HeadBudget(init=sizes[0], local=sizes[1], last=sizes[2] if kind == "tri_shape" else 0)


def load(path: str | Path) -> Patterns:
    """Read patterns from a JSON file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No JSON, or no patterns.
    """
    try:
        return freeze(json.loads(Path(path).read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise argument_error("path", "a JSON file", f"{path}: {error}") from error


def save(patterns: Any, path: str | Path) -> None:
    """Write patterns as JSON that :func:`load` reads, a layer a line."""
    frozen = freeze(patterns)
    rows = [frozen] if isinstance(frozen[0], str) else frozen
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = lines if isinstance(frozen[0], str) else f"[\n  {lines}\n]"
    Path(path).write_text(text + "\n", encoding="utf-8")


def _is_pattern(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0 and isinstance(value[0], str)


def _entries(value: Any, name: str) -> list[Any]:
    """The entries of a list, or of an object whose keys number them."""
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        if sorted(keys) != sorted(str(i) for i in range(len(keys))):
            raise argument_error(name, f"heads numbered 0..{len(keys) - 1}", ", ".join(keys))
        by_key = {str(key): entry for key, entry in value.items()}
        value = [by_key[str(i)] for i in range(len(keys))]
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) == 0:
        raise argument_error(name, "a pattern, patterns per head, or per layer and head", repr(value))
    return list(value)


def _pattern(value: Any) -> Pattern:
    if not _is_pattern(value):
        raise argument_error("patterns", "a kind and its sizes", repr(value))
    kind = _ALIASES.get(value[0], value[0])
    if kind not in SIZES:
        raise argument_error("patterns", f"a kind among {', '.join(SIZES)}", repr(value[0]))
    count, sizes = SIZES[kind], list(value[1:])
    # Files of a search end every entry with its score.
    if len(sizes) == count + 1 and (value[0] in _ALIASES or isinstance(sizes[-1], float)):
        sizes.pop()
    least = 0 if kind in ("a_shape", "tri_shape") else 1
    whole = all(isinstance(n, int) and not isinstance(n, bool) and least <= n < ALL for n in sizes)
    if len(sizes) != count or not whole or (count and kind != "vertical_slash" and not any(sizes)):
        raise argument_error("patterns", f"{count} ints >= {least} after {kind!r}, not all 0", repr(tuple(value[1:])))
    return (kind, *sizes)
