"""Tables of heads as DuoAttention and PruLong save them: which need the whole context, layer by layer.

A table is a TSV file, one row a layer, one column a key head; 1 means the head retrieves over the whole context, 0 that
sinks and the nearest keys are enough for it. DuoAttention (Xiao et al. 2024, arXiv:2410.10819) saves learned numbers in
between as ``full_attention_heads.tsv``, beside a ``config.json`` with the sizes its training used; PruLong
(arXiv:2506.17121) saves zeros and ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseattn.errors import argument_error
from sparseattn.selectors.heads import HeadsConfig

Table = tuple[tuple[float, ...], ...]
_NAMES = ("full_attention_heads.tsv", "masks.tsv")


def load_head_table(path: str | Path) -> Table:
    """Read a table.

    Args:
        path: The file; or a folder with ``full_attention_heads.tsv``, ``masks.tsv`` or one other ``.tsv`` file.

    Returns:
        ``[layers][key heads]``, numbers clipped to [0, 1].

    Raises:
        FileNotFoundError: No such file, or not exactly one table in the folder.
        ValueError: Something that is no number, or rows of different lengths; the message names the line.
    """
    file = _table_file(Path(path))
    rows: list[tuple[float, ...]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = [float(entry) for entry in line.split()]
        except ValueError:
            raise argument_error(f"{file}:{number}", "numbers separated by tabs", repr(line[:80])) from None
        if any(math.isnan(value) for value in values):
            raise argument_error(f"{file}:{number}", "numbers", "NaN")
        if rows and len(values) != len(rows[0]):
            raise argument_error(f"{file}:{number}", f"{len(rows[0])} numbers like the rows above", len(values))
        rows.append(tuple(min(max(value, 0.0), 1.0) for value in values))
    if not rows:
        raise argument_error(str(file), "one row of numbers a layer", "an empty file")
    return tuple(rows)


def save_head_table(path: str | Path, table: Sequence[Sequence[float]]) -> None:
    """Write a table that :func:`load_head_table`, DuoAttention and PruLong read."""
    lines = ["\t".join(f"{float(value):.6g}" for value in row) for row in table]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def retrieval_heads(
    table: Sequence[Sequence[float]], *, sparsity: float | None = None, threshold: float | None = None
) -> tuple[tuple[bool, ...], ...]:
    """Which heads of a table get the whole context.

    Args:
        table: ``[layers][key heads]``.
        sparsity: The share of all heads that do not, in [0, 1]: exactly the ``round(share * heads)`` lowest ones; among
            equal ones the later layer, then the later head.
        threshold: Or the number from which on a head does; default 0.5.

    Returns:
        ``[layers][key heads]``.

    Raises:
        ValueError: Both, or one that is not in [0, 1].
    """
    if sparsity is not None and threshold is not None:
        raise argument_error("threshold", "None with sparsity", threshold)
    for name, value in (("sparsity", sparsity), ("threshold", threshold)):
        if value is not None and not 0 <= value <= 1:
            raise argument_error(name, "a number in [0, 1], or None", value)
    if sparsity is None:
        least = 0.5 if threshold is None else threshold
        return tuple(tuple(value >= least for value in row) for row in table)
    places = [(value, -i, -j) for i, row in enumerate(table) for j, value in enumerate(row)]
    lowest = {(-i, -j) for _, i, j in sorted(places)[: round(sparsity * len(places))]}
    return tuple(tuple((i, j) not in lowest for j in range(len(row))) for i, row in enumerate(table))


def load_head_config(
    path: str | Path,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    retrieval: Mapping[str, Any] | None = None,
    num_sink_tokens: int | None = None,
    num_local_tokens: int | None = None,
    block_size: int = 128,
) -> HeadsConfig:
    """A saved table as the config of the selector ``heads``: retrieval heads one way, the others streaming.

    Args:
        path: As :func:`load_head_table`.
        sparsity: As :func:`retrieval_heads`.
        threshold: Likewise.
        retrieval: A method and its options for the retrieval heads, e.g. ``{"method": "landmark", "tau": 0.3}``.
            Default: dense.
        num_sink_tokens: First keys that the others keep. Default: ``sink_size`` of a ``config.json`` beside the table,
            else streaming's own.
        num_local_tokens: Keys before the diagonal that they keep. Default: ``recent_size - 1`` of that file (there the
            query itself counts), else streaming's own.
        block_size: Tokens of a block.

    Raises:
        FileNotFoundError: As :func:`load_head_table`.
        ValueError: Likewise; a ``config.json`` with other things than sizes; a bad option.
    """
    table = retrieval_heads(load_head_table(path), sparsity=sparsity, threshold=threshold)
    sizes = _sizes(_table_file(Path(path)).parent / "config.json")
    local: dict[str, Any] = {"method": "streaming", **sizes}
    if num_sink_tokens is not None:
        local["num_sink_tokens"] = num_sink_tokens
    if num_local_tokens is not None:
        local["num_local_tokens"] = num_local_tokens
    classes = {"local": local} if retrieval is None else {"local": local, "retrieval": dict(retrieval)}
    far = "dense" if retrieval is None else "retrieval"
    names = tuple(tuple(far if full else "local" for full in row) for row in table)
    return HeadsConfig(heads=names, classes=classes, block_size=block_size)


def _table_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"path: expected a table of heads or its folder, got {path}, which does not exist.")
        return path
    for name in _NAMES:
        if (path / name).exists():
            return path / name
    found = sorted(path.glob("*.tsv"))
    if len(found) != 1:
        raise FileNotFoundError(f"path: expected one .tsv file in {path}, got {len(found)}. Name the file itself.")
    return found[0]


def _sizes(file: Path) -> dict[str, int]:
    """Streaming options from the sizes a table was trained with."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    sizes = {}
    for key, option, less in (("sink_size", "num_sink_tokens", 0), ("recent_size", "num_local_tokens", 1)):
        value = found.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < less:
            raise argument_error(f"{file}: {key}", f"an int of at least {less}", repr(value))
        sizes[option] = value - less
    return sizes
