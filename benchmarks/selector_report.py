"""Tables of the rows of ``benchmarks.selectors``, and from which length on a method is as fast as dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.harness import Row

#: Who attends, or selects and attends; the fastest stands for the library in short tables.
OURS = {
    "sparseattn_gluon": "Gluon",
    "sparseattn_triton": "Triton",
    "sparseattn": "Triton",
    "sparseattn_reference": "reference",
}
#: The authors' own code, by the names of ``benchmarks.rivals.selection``, and what a row of it times.
RIVALS = {
    "flashprefill_selection": "FlashPrefill's code",
    "flashprefill_prefill": "FlashPrefill's code",
    "flashprefill_v1": "FlashPrefill's code, first version",
    "xattn_selection_16": "XAttention's code",
    "xattn_prefill_16": "XAttention's code",
    "xattn_selection_8": "XAttention's code",
    "xattn_prefill_8": "XAttention's code",
    "flex_prefill": "FlexPrefill's code",
    "minference": "MInference's code",
}
DENSE = {
    "cudnn_dense": "cuDNN",
    "sparseattn_gluon_dense": "ours, Gluon",
    "sparseattn_triton_dense": "ours, Triton",
    "sparseattn_dense": "ours, Triton",
    "sparseattn_reference_dense": "ours, reference",
}
#: What documents say of each set, above its table.
TITLES = {
    "table": (
        "Selectors on structured queries and keys (sinks, local bands, columns, topics), forward: the share of the "
        "blocks they keep, the attention mass these hold (in the sampled row that loses most), and time. Recall is no "
        "measure of answers: for those see docs/evaluation.md."
    ),
    "prefill": "Whole sparse prefill, methods at equal densities and as they are by default; the same inputs.",
    "short": (
        "Short prompts: selection and attention, over dense cuDNN's time in the same run; above 1 dense is faster. "
        "Methods as they are by default."
    ),
    "memory": "Selection at a million tokens.",
}
NAMES = {**OURS, **RIVALS, **DENSE}
HEADER = (
    "tokens", "method", "", "kernels", "density", "recall (least)", "selection ms", "attention ms", "both ms",
    "x dense", "selection's memory",
)  # fmt: skip


def tokens(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def of_set(rows: list[Row], name: str) -> list[Row]:
    """Timed rows of one set, of heads of blended patterns."""
    found = [row for row in rows if row["bench"] == "selectors" and row["set"] == name and "ms" in row]
    return [row for row in found if row.get("kinds", ["blend"]) == ["blend"]]


def run_of(row: Row) -> tuple[Any, ...]:
    """What rows that may be compared have in common: the length, and the run, which shares an environment."""
    return row["n"], row["env"].get("time")


def dense(rows: list[Row], name: str = "cudnn_dense") -> dict[tuple[Any, ...], Row]:
    """The rows of one dense implementation by length and run."""
    return {run_of(row): row for row in rows if row["impl"] == name}


def lines(
    rows: list[Row], shown: Callable[[float], str], *, shortest: int = 0, best: bool = False
) -> Iterator[list[Any]]:
    """A line for every length, setting and implementation of the attention.

    Args:
        rows: Of one set.
        shown: Milliseconds as tables have them.
        shortest: Leave shorter prompts out.
        best: Of our implementations, the fastest alone.
    """
    rivals = dense(rows)
    found: dict[Any, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if "method" in row and row["n"] >= shortest:
            key = (*run_of(row), row["method"], row["setting"])
            found.setdefault(key, {}).setdefault(row["phase"], {})[row["impl"]] = row
    for key, phases in sorted(found.items(), key=lambda one: (one[0][0], list(found).index(one[0]))):
        selections = phases.get("selection", {})
        ours = next((row for impl, row in selections.items() if impl in OURS), None)
        whole = phases.get("both", {})
        attending = [impl for impl in whole or phases.get("attention", {}) if impl in OURS]
        if best and len(attending) > 1:
            attending = [min(attending, key=lambda impl: (whole or phases["attention"])[impl]["ms"])]
        for impl in attending or ([""] if ours else []):
            parts = ours, phases.get("attention", {}).get(impl), whole.get(impl)
            yield _line(key, OURS.get(impl, ""), parts, rivals.get(key[:2]), shown)
        names = dict.fromkeys(RIVALS[impl] for impl in (*selections, *whole) if impl in RIVALS)
        for name in names:
            select, both = (
                next((row for impl, row in part.items() if RIVALS.get(impl) == name), None)
                for part in (selections, whole)
            )
            yield _line(key, name, (select, None, both), rivals.get(key[:2]), shown)


def table_of(
    rows: list[Row], shown: Callable[[float], str], *, shortest: int = 0, best: bool = False
) -> tuple[Sequence[str], list[list[Any]]]:
    """Header and lines, without the columns that no line fills; arguments as :func:`lines` has them."""
    body = list(lines(rows, shown, shortest=shortest, best=best))
    filled = [i for i in range(len(HEADER)) if any(line[i] for line in body)]
    return [HEADER[i] for i in filled], [[line[i] for i in filled] for line in body]


def _line(
    key: Any,
    who: str,
    phases: tuple[Row | None, Row | None, Row | None],
    rival: Row | None,
    shown: Callable[[float], str],
) -> list[Any]:
    n, _, method, setting = key
    select, _, both = phases
    known = [row for row in phases if row is not None]
    said: Row = {name: value for row in known for name, value in row.items()}
    recall = f"{said['recall']:.3f}" if "recall" in said else ""
    if "recall_min" in said:
        recall += f" ({said['recall_min']:.2f})"
    ratio = f"{rival['ms'] / both['ms']:.1f}x" if rival and both else ""
    peak = (select or {}).get("peak_bytes")
    density = f"{said['selected']:.1%}" if "selected" in said else ""
    times = [shown(row["ms"]) if row else "" for row in phases]
    memory = f"{peak / 2**20:.0f} MiB" if peak is not None else ""
    label = "" if setting == "default" else setting
    return [tokens(n), method, label, who, density, recall, *times, ratio, memory]


def dense_line(rows: list[Row], shown: Callable[[float], str], shortest: int = 0) -> str:
    """What dense attention takes, in words."""
    found: dict[int, list[str]] = {}
    for row in rows:
        if row["impl"] in DENSE and row["n"] >= shortest:
            found.setdefault(row["n"], []).append(f"{shown(row['ms'])} ms ({DENSE[row['impl']]})")
    said = [f"{tokens(n)} in {', '.join(taken)}" for n, taken in sorted(found.items())]
    return f"Dense: {'; '.join(said)}." if said else ""


def break_even(rows: list[Row]) -> dict[str, dict[str, int]]:
    """From which length on each method is no slower than the dense attention that a model would run instead.

    Rows of set ``short``: a method with its defaults and dense attention, both by the implementation that "auto" takes
    there, in the same run. Neither on the device nor by the clock may a longer prompt that was measured be slower
    either. A method that is slower at the longest one gets a length one token past it.

    Returns:
        ``{device: {method: tokens}}``, both sorted.
    """
    rows = of_set(rows, "short")
    dense_rows = {run_of(row): row for row in rows if "method" not in row and row.get("auto")}
    slower: dict[tuple[str, str], dict[int, bool]] = {}
    for row in rows:
        other = dense_rows.get(run_of(row))
        if row.get("method") and row["phase"] == "both" and row["setting"] == "default" and row.get("auto") and other:
            lost = any(row[clock] > other[clock] for clock in ("ms", "wall_ms"))
            slower.setdefault((row["env"]["device"], row["method"]), {})[row["n"]] = lost
    found: dict[str, dict[str, int]] = {}
    for (device, method), by_length in sorted(slower.items()):
        lengths = sorted(by_length)
        after = max((i + 1 for i, n in enumerate(lengths) if by_length[n]), default=0)
        shortest = lengths[after] if after < len(lengths) else lengths[-1] + 1
        found.setdefault(device, {})[method] = shortest
    return found


def short_lines(rows: list[Row], shown: Callable[[float], str]) -> tuple[Sequence[str], list[list[Any]]]:
    """Header and lines of the set ``short``: time over dense cuDNN's by method and length."""
    rivals = dense(rows)
    lengths = sorted({row["n"] for row in rows})
    found: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        rival = rivals.get(run_of(row))
        if row.get("method") and row["phase"] == "both" and row["impl"] in OURS and rival:
            ratio = f"{row['ms'] / rival['ms']:.2f} ({shown(row['ms'])} ms)"
            found.setdefault((row["method"], OURS[row["impl"]]), {})[row["n"]] = ratio
    body = [[*key, *(cells.get(n, "") for n in lengths)] for key, cells in found.items()]
    return ["method", "kernels", *map(tokens, lengths)], body
