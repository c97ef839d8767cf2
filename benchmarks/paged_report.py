"""Tables of the rows of ``benchmarks.paged``, for ``benchmarks.report``: a line a workload, a column a server.

Times of ours have the speed relative to the fastest kernel of FlashInfer in the same run behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.harness import Row

NAMES = {
    "sparseattn_flashinfer": "**sparseattn.flashinfer**",
    "sparseattn_gluon": "**sparseattn** (Gluon)",
    "sparseattn_triton": "**sparseattn** (Triton)",
    "flashinfer_fa3": "FlashInfer, fa3",
    "flashinfer_fa2": "FlashInfer, fa2",
    "flashinfer_cuda_cores": "FlashInfer, CUDA cores",
}


def thousand(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def batch_of(row: Row) -> str:
    return f"{row['batch']} x {thousand(row['length'])}"


def pages_of(row: Row) -> str:
    told = ", lengths on the device" if row.get("lengths_on") == "device" else ""
    return ("ragged" if row.get("ragged") else f"pages of {row['page']}") + told


Rivals = list[Row]


def taken(row: Row, rivals: Rivals, field: str = "ms") -> str:
    """Milliseconds, and how much longer the fastest rival of the same run takes."""
    others = [rival[field] for rival in rivals if rival.get(field)]
    ratio = f", {min(others) / row[field]:.2f}x" if others and row[field] else ""
    return f"{milliseconds(row[field])} ms{ratio}"


def rate(row: Row, rivals: Rivals) -> str:
    """TFLOP/s and milliseconds."""
    return f"{row['tflops']:.0f} ({taken(row, rivals)})"


def bandwidth(row: Row, rivals: Rivals) -> str:
    return f"{row['tbps']:.2f} ({taken(row, rivals)})"


def planned(row: Row, rivals: Rivals) -> str:
    """TFLOP/s of ``run()``, its milliseconds and those of ``plan()`` and ``run()`` together."""
    return f"{row['tflops']:.0f} ({taken(row, rivals)}; {taken(row, rivals, 'plan_run_ms')})"


def host(row: Row, rivals: Rivals) -> str:
    plan = f" / {row['plan_host_us']:.0f}" if "plan_host_us" in row else ""
    waits = f", {row['plan_waits']} waits" if row.get("plan_waits") else ""
    return f"{row['run_host_us']:.0f}{plan}{waits}"


class Table(NamedTuple):
    """How the rows of a set are shown.

    Attributes:
        title: Says what a cell holds.
        header: Of the columns that say the workload.
        workload: Their cells.
        cell: What a server's cell says, beside the rows of FlashInfer that it is compared with.
    """

    title: str
    header: tuple[str, ...]
    workload: Callable[[Row], tuple[str, ...]]
    cell: Callable[[Row, Rivals], str]


_SHAPE = "bf16, 32 query and 8 KV heads of 128"
TABLES = {
    "decode": Table(
        f"Batch decode: TB/s of what has to be read, and time; {_SHAPE}.",
        ("batch", "pages"), lambda row: (batch_of(row), str(row["page"])), bandwidth,
    ),
    "prefill": Table(
        f"Prefill, causal: TFLOP/s of the visible pairs, and time; {_SHAPE}.",
        ("batch", "cache"), lambda row: (batch_of(row), pages_of(row)), rate,
    ),
    "chunked": Table(
        f"Chunks of prompts behind what is cached: TFLOP/s, and time; {_SHAPE}.",
        ("batch", "chunk"), lambda row: (batch_of(row), str(row["chunk"])), rate,
    ),
    "bsr": Table(
        f"Blocks of one size, one pattern for all heads, 16K tokens, not causal: TFLOP/s of `run()` and its time; time "
        f"of `plan()` and `run()`; {_SHAPE}.",
        ("blocks", "density"), lambda row: (f"{row['R']} x {row['C']}", f"{row['density']:g}"), planned,
    ),
    "variable": Table(
        "Blocks of any sizes (20 x 50, by KV head), not causal: TFLOP/s of `run()` and its time; time of `plan()` and "
        "`run()`; fp16, 32 heads of 128.",
        ("tokens", "density"), lambda row: (thousand(row["n"]), f"{row['density']:g}"), planned,
    ),
    "mla": Table(
        "MLA decode: TFLOP/s, and time; bf16, 128 heads, 512 + 64 columns.",
        ("batch", "pages"), lambda row: (batch_of(row), str(row["page"])), rate,
    ),
    "append": Table(
        "Appending to a paged cache: TB/s read and written, and time; bf16, 8 KV heads of 128.",
        ("new tokens", "pages"), lambda row: (f"{row['batch']} x {row['tokens']}", str(row["page"])), bandwidth,
    ),
    "merge": Table(
        "Merging states: TB/s read and written, and time; bf16, 32 heads of 128.",
        ("rows", "states"), lambda row: (str(row["rows"]), str(row["states"])), bandwidth,
    ),
    "host": Table(
        "Microseconds for which a call keeps the host: `run()` / `plan()`, all inputs on the device.",
        ("call",), lambda row: ("ragged prefill" if row.get("ragged") else row["kind"],), host,
    ),
}  # fmt: skip


def of_set(rows: list[Row], name: str) -> list[Row]:
    """Timed rows of a set of serving workloads."""
    return [row for row in rows if row["bench"] == "paged" and "ms" in row and row["set"] == name]


def lines(rows: list[Row], name: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a set's table."""
    how = TABLES[name]
    servers = [impl for impl in NAMES if any(row["impl"] == impl for row in rows)]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        # Rows of one run share an environment, down to the second it was looked at.
        same = (how.workload(row), row["env"].get("time"))
        rivals = [other for other in rows if (how.workload(other), other["env"].get("time")) == same and _rival(other)]
        cell = how.cell(row, [] if _rival(row) else rivals)
        found.setdefault(how.workload(row), {})[row["impl"]] = cell
    body = [[*workload, *(cells.get(impl, "") for impl in servers)] for workload, cells in found.items()]
    return [*how.header, *(NAMES[impl] for impl in servers)], body


def _rival(row: Row) -> bool:
    return row["impl"].startswith("flashinfer")
