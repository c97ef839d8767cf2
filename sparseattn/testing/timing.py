"""Honest times: a cold L2, the median of many runs, and a record of the machine they were taken on."""

from __future__ import annotations

import functools
import math
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import sparseattn

# Larger than any L2 there is.
_FLUSH_BYTES = 256 * 2**20
# Clock cycles for which the GPU waits while the host queues a run: half a millisecond to fifteen.
_QUEUEING_CYCLES = (1_000_000, 30_000_000)


def time_ms(
    run: Callable[[], object], device: torch.device, *, budget_ms: float = 1000.0, runs: tuple[int, int] = (5, 50)
) -> dict[str, Any]:
    """Time ``run`` with a cold L2.

    On a GPU a buffer larger than any L2 is written before each run, events bracket the run, and all of it is queued
    behind a sleep as long as the host needs for that, so that the time Python takes to launch, which a model hides
    behind earlier kernels, is in nobody's time. On a CPU it is wall-clock time.

    Args:
        run: What to time; it has been called once already, so that nothing compiles inside.
        device: Where it runs.
        budget_ms: Run for about this long.
        runs: At least and at most this many runs, whatever the budget.

    Returns:
        ``ms`` (median), ``ms_p20`` and ``ms_p80`` (20th and 80th percentile) and ``runs`` (how many).
    """
    cuda = device.type == "cuda"
    flush = torch.empty(_FLUSH_BYTES if cuda else 0, dtype=torch.int8, device=device)
    cycles = _QUEUEING_CYCLES[0]

    def once() -> float:
        if not cuda:
            return _seconds(run) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    if cuda:
        # At 2 GHz, half as long again as launching took.
        cycles = min(max(cycles, int(3e9 * _seconds(run))), _QUEUEING_CYCLES[1])
        torch.cuda.synchronize(device)
    warm = once()
    count = max(runs[0], min(runs[1], int(budget_ms / max(warm, 1e-3))))
    times = sorted(once() for _ in range(count))
    return {
        "ms": round(statistics.median(times), 4),
        "ms_p20": round(times[int(0.2 * (count - 1))], 4),
        "ms_p80": round(times[int(0.8 * (count - 1) + 0.5)], 4),
        "runs": count,
    }


def _seconds(run: Callable[[], object]) -> float:
    """How long a call keeps the host."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def wall_ms(run: Callable[[], object], device: torch.device, *, runs: int = 5) -> float:
    """Median wall-clock milliseconds from a quiet device to a quiet device: what work on the host costs, too."""

    def settled() -> None:
        run()
        _synchronize(device)

    times = []
    for _ in range(runs):
        _synchronize(device)
        times.append(_seconds(settled) * 1e3)
    return round(statistics.median(times), 4)


def host_us(run: Callable[[], object], device: torch.device, *, runs: int = 50) -> float:
    """Median microseconds for which a call keeps the host, the device idle before each: what launching costs.

    Where the device is the host, this is the whole call.
    """
    run()
    times = []
    for _ in range(runs):
        _synchronize(device)
        times.append(_seconds(run) * 1e6)
    _synchronize(device)
    return round(statistics.median(times), 2)


def waits(run: Callable[[], object], device: torch.device) -> int | None:
    """How often a call makes the host wait for the device, as far as torch sees it; None without a GPU.

    Copies to the host, ``.item()`` and shapes that depend on data are seen; ``torch.cuda.synchronize`` and what other
    libraries wait for by themselves are not.
    """
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(one.message) for one in seen)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def break_even(densities: Sequence[float], ms: Sequence[float], dense_ms: float) -> float | None:
    """The density up to which sparse attention is at least as fast as dense attention.

    Time grows about linearly with density, so between two measured densities the crossing is interpolated. Nothing is
    extrapolated: the answer lies within the measured densities.

    Args:
        densities: Measured densities, in any order.
        ms: Their times.
        dense_ms: The time of dense attention.

    Returns:
        The highest density at which sparse attention is no slower; None where dense is faster at every measured one.
    """
    points = sorted(zip(densities, ms, strict=True))
    best = None
    for i, (density, taken) in enumerate(points):
        if taken <= dense_ms:
            best = density
        elif i and points[i - 1][1] <= dense_ms:
            before, faster = points[i - 1]
            best = before + (density - before) * (dense_ms - faster) / (taken - faster)
    return best


def environment() -> dict[str, Any]:
    """The machine and the versions that a measurement belongs to; what cannot be known is None."""
    row: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "sparseattn": sparseattn.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if not torch.cuda.is_available():
        return {**row, "device": f"CPU, {torch.get_num_threads()} threads", "gpu": None}
    return {
        **row,
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": gpu_state(),
    }


def package_version(package: str) -> str | None:
    """The version of an installed distribution, without importing it; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# What nvidia-smi calls what a row keeps: what changes from one moment to the next, and what does not.
_MOVING = {"clocks.sm": "sm_mhz", "power.draw": "power_w"}
_FIXED = {
    "clocks.max.sm": "sm_max_mhz",
    "clocks.max.mem": "memory_max_mhz",
    "power.limit": "power_limit_w",
    "driver_version": "driver",
}


def gpu_state() -> dict[str, Any] | None:
    """Clock and power of the current GPU at this moment, their limits and the driver; None without a GPU.

    A GPU that has just been busy still shows the clock it worked at: ask right after a measurement. Fields that nobody
    answers for are None.
    """
    if not torch.cuda.is_available():
        return None
    return {**_moving(), **_fixed(torch.cuda.current_device())}


def _moving() -> dict[str, Any]:
    try:
        return {"sm_mhz": float(torch.cuda.clock_rate()), "power_w": torch.cuda.power_draw() / 1e3}
    except Exception:  # they need NVML's Python package; starting a program instead is slower, and as good
        return _nvidia_smi(_MOVING)


@functools.cache
def _fixed(device: int) -> dict[str, Any]:
    return _nvidia_smi(_FIXED)


def _nvidia_smi(fields: dict[str, str]) -> dict[str, Any]:
    """What nvidia-smi answers for ``fields`` of the current GPU, under our names; None for each without an answer."""
    # The driver counts the machine's GPUs, torch those it may see; the UUID is the same in both.
    index = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    which = f"GPU-{uuid}" if uuid is not None and os.environ.get("CUDA_VISIBLE_DEVICES") else str(index)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", which]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(fields.values())
    answer = done.stdout.strip().split(",")
    if len(answer) != len(fields):
        return dict.fromkeys(fields.values())
    return dict(zip(fields.values(), (_number(field.strip()) for field in answer), strict=True))


def _number(text: str) -> float | str | None:
    """A field of nvidia-smi: a number, a version as it stands, or None for "[N/A]"."""
    try:
        value = float(text)
    except ValueError:
        return None if text.startswith("[") else text
    return value if math.isfinite(value) else None
