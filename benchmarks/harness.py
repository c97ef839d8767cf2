"""What every benchmark does alike: gate, time with a cold L2, write one JSON line a row."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

import sparseattn

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


class Unsupported(Exception):
    """An implementation's reason for not running here or not in this shape; its row says so instead of a time."""


def environment(commit: str | None = None) -> Row:
    """The machine, the versions and the commit that a row belongs to."""
    row: Row = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "sparseattn": sparseattn.__version__,
        "commit": commit or os.environ.get("SPARSEATTN_COMMIT") or _run("git", "rev-parse", "--short", "HEAD"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if not torch.cuda.is_available():
        return {**row, "device": f"CPU, {torch.get_num_threads()} threads"}
    query = "clocks.max.sm,clocks.max.mem,clocks.sm,power.limit,driver_version"
    answer = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")
    values = [field.strip() for field in answer.split(",")] if answer else []
    return {
        **row,
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(query.split(","), values, strict=False)),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def time_ms(
    run: Callable[[], object], device: torch.device, *, budget_ms: float = 1000.0, runs: tuple[int, int] = (5, 50)
) -> Row:
    """Time ``run`` with a cold L2 and summarise: median, 20th and 80th percentile, number of runs.

    Args:
        run: What to time; it has been called once already, so that nothing compiles inside.
        device: Where it runs. On a GPU, a buffer larger than any L2 is written before each run, events bracket it, and
            all of it is queued behind a short sleep, so that Python's launching time, which a model hides behind
            earlier kernels, is in nobody's time.
        budget_ms: Run for about this long.
        runs: At least and at most this many runs, whatever the budget.
    """
    cuda = device.type == "cuda"
    flush = torch.empty(256 * 2**20 if cuda else 0, dtype=torch.int8, device=device)

    def once() -> float:
        if not cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # clock cycles: about half a millisecond
        flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    warm = once()
    count = max(runs[0], min(runs[1], int(budget_ms / max(warm, 1e-3))))
    times = sorted(once() for _ in range(count))
    return {
        "ms": round(statistics.median(times), 4),
        "ms_p20": round(times[int(0.2 * (count - 1))], 4),
        "ms_p80": round(times[int(0.8 * (count - 1) + 0.5)], 4),
        "runs": count,
    }


class Writer:
    """Writes rows as JSON lines, as they come, and says each on the terminal in one line."""

    def __init__(self, path: Path | None, bench: str, commit: str | None = None):
        self.rows: list[Row] = []
        self._common = {"bench": bench}
        self._environment = environment(commit)
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
            row = {**row, **body()}
        except Unsupported as reason:
            row = {**row, "skipped": str(reason)}
        except Exception as error:  # the other rows are still wanted, and this one says what happened
            row = {**row, "error": f"{type(error).__name__}: {error}"[:600]}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        row = {**self._common, **row, "env": self._environment}
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        shown = {k: v for k, v in row.items() if k not in ("env", "bench")}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
        return row


def cudnn_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Tensor], Row]:
    """Prepare dense causal attention by cuDNN on ``[B, S, H, D]`` tensors.

    Returns:
        What runs it, and whether it takes KV heads as they are ("native") or, where this torch's cuDNN attention has
        no grouped queries, "repeated", which happens here and not inside what is timed.

    Raises:
        Unsupported: There is no CUDA GPU.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if q.device.type != "cuda":
        raise Unsupported("cuDNN attention needs a CUDA GPU")

    def attend(q: Tensor, k: Tensor, v: Tensor, native: bool) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            o = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=native
            )
        return o.transpose(1, 2)

    native = True
    try:
        attend(q[:, :256], k[:, :256], v[:, :256], True)
    except RuntimeError:
        native = False
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    return lambda: attend(q, k, v, native), {"kv_heads_are": "native" if native else "repeated"}


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
