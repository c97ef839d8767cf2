"""What every benchmark does alike: options, one JSON line a row with its environment, and surviving a bad row."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch

from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.timing import environment, package_version

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
#: Distributions whose versions belong to a row; others' come with torch.
RIVALS = (
    "flash-attn-4", "nvidia-cutlass-dsl", "flashinfer-python", "flashprefill", "flex_prefill", "minference", "xattn",
)  # fmt: skip


def commit_here() -> str | None:
    """The commit of this checkout, or what SPARSEATTN_COMMIT says where git cannot."""
    said = os.environ.get("SPARSEATTN_COMMIT")
    if said:
        return said
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class Writer:
    """Writes rows as JSON lines, as they come, and says each on the terminal in one line."""

    def __init__(self, path: Path | None, bench: str, commit: str | None = None):
        self.rows: list[Row] = []
        self._common = {"bench": bench}
        self._last: Row = {}
        versions = {package: package_version(package) for package in RIVALS}
        self._environment = {**environment(), "commit": commit or commit_here(), "rivals": versions}
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def measure(self, row: Row, body: Callable[[], Row]) -> Row:
        """Complete ``row`` with what ``body`` returns, or with why it could not: a benchmark survives one bad row."""
        try:
            found = body()
        except Unsupported as reason:
            found = {"skipped": str(reason)}
        except Exception as error:  # the other rows are still wanted, and this one says what happened
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self._show(row, found)
        row = {**self._common, **row, **found, "env": self._environment}
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        return row

    def _show(self, row: Row, found: Row) -> None:
        """One line: what is new since the line before, whose row it is, and what was found."""
        new = {k: v for k, v in row.items() if v != self._last.get(k) or k == "impl"}
        self._last = row
        shown = {k: v for k, v in {**new, **found}.items() if k not in ("flops", "gpu") and v is not None}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)


def arguments(description: str, stem: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{stem}", description=description)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{stem}.jsonl", help="where the rows go")
    parser.add_argument("--quick", action="store_true", help="the smallest size and few runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what the rows belong to, where git cannot say")
    return parser


def finish(rows: list[Row]) -> None:
    """Exit with an error when a row holds one."""
    bad = sum("error" in row for row in rows)
    if bad:
        sys.exit(f"{bad} of {len(rows)} rows hold an error")


def quietly(stack: ExitStack) -> None:
    """Silence what rivals print about themselves while they compile."""
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
