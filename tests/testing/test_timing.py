"""Times, break-even densities and what is recorded of the machine."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import sparseattn
from sparseattn.testing import timing

CPU = torch.device("cpu")


def test_median_and_spread(device: str) -> None:
    waits = iter([0.02, 0.001, 0.03, 0.002, 0.001, 0.002, 0.04])
    calls = []

    def run() -> None:
        calls.append(None)
        time.sleep(next(waits, 0.001))

    if device == "cpu":
        row = timing.time_ms(run, CPU, budget_ms=0.1, runs=(6, 50))  # one to warm up, six counted
        assert len(calls) == 7
        assert row["runs"] == 6
        assert 1 <= row["ms_p20"] <= row["ms"] < 5
        assert row["ms"] <= row["ms_p80"] < 35
        return
    x = torch.randn(1024, 1024, device=device)
    row = timing.time_ms(lambda: x @ x, torch.device(device), budget_ms=50)
    assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] < 10


def test_runs_follow_the_budget() -> None:
    assert timing.time_ms(lambda: time.sleep(0.01), CPU, budget_ms=1, runs=(2, 50))["runs"] == 2
    assert timing.time_ms(lambda: None, CPU, budget_ms=1000, runs=(2, 7))["runs"] == 7


def test_wall_time_has_the_host_in_it(device: str) -> None:
    assert 5 <= timing.wall_ms(lambda: time.sleep(0.005), torch.device(device), runs=3) < 50


def test_what_keeps_the_host(device: str) -> None:
    assert 5e3 <= timing.host_us(lambda: time.sleep(0.005), torch.device(device), runs=3) < 5e4
    if device == "cuda":
        torch.cuda._sleep(1_000_000)
        assert timing.host_us(lambda: torch.cuda._sleep(100_000_000), torch.device(device), runs=3) < 5e3


def test_waiting_for_the_device_is_counted(device: str) -> None:
    x = torch.ones(4, device=device)
    found = timing.waits(lambda: (x.sum().item(), x.max().item(), x + 1), torch.device(device))
    assert found == (None if device == "cpu" else 2)


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        ([1.0, 2.0, 4.0], 1.0),  # never slower
        ([5.0, 6.0, 7.0], None),  # always slower
        ([1.0, 3.0, 9.0], 0.5 + 0.5 * (4 - 3) / (9 - 3)),
        ([1.0, 5.0, 9.0], 0.25 + 0.25 * (4 - 1) / (5 - 1)),
        ([5.0, 3.0, 3.5], 1.0),  # what is slow at low densities does not hide what is fast at high ones
        ([4.0, 4.0, 4.0], 1.0),  # as fast is fast enough
    ],
)
def test_break_even(ms: list[float], expected: float | None) -> None:
    densities = [0.25, 0.5, 1.0]
    assert timing.break_even(densities, ms, 4.0) == (None if expected is None else pytest.approx(expected))
    shuffled = [2, 0, 1]
    again = timing.break_even([densities[i] for i in shuffled], [ms[i] for i in shuffled], 4.0)
    assert again == timing.break_even(densities, ms, 4.0)


def test_break_even_needs_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        timing.break_even([1.0, 0.5], [1.0], 1.0)


def test_environment_is_data() -> None:
    row = timing.environment()
    assert row["torch"] == torch.__version__
    assert row["sparseattn"] == sparseattn.__version__
    assert json.loads(json.dumps(row)) == row
    if not torch.cuda.is_available():
        assert row["gpu"] is None
        assert row["device"].startswith("CPU")
    assert timing.package_version("no-such-package") is None


def no_nvml() -> int:
    raise ModuleNotFoundError("pynvml does not seem to be installed")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """A machine with a GPU and nvidia-smi but without NVML's Python package; what nvidia-smi was asked."""
    answers = {
        "--query-gpu=clocks.sm,power.draw": "1755, [N/A]\n",
        "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit,driver_version": "1980, 3201, 700.00, 580.159.04\n",
    }
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout=answers[command[1]])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "clock_rate", no_nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    timing._fixed.cache_clear()
    yield asked
    timing._fixed.cache_clear()


FIXED = {"sm_max_mhz": 1980.0, "memory_max_mhz": 3201.0, "power_limit_w": 700.0, "driver": "580.159.04"}


def test_gpu_state_reads_nvidia_smi(a_gpu: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.gpu_state() == {"sm_mhz": 1755.0, "power_w": None, **FIXED}
    assert a_gpu[-1][-2:] == ["-i", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # the driver's numbering is another one then
    timing.gpu_state()
    assert a_gpu[-1][-2:] == ["-i", "GPU-abc"]
    assert len(a_gpu) == 3, "what does not change is asked once"


@pytest.mark.usefixtures("a_gpu")
def test_gpu_state_prefers_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1830)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 512_500)
    assert timing.gpu_state() == {"sm_mhz": 1830.0, "power_w": 512.5, **FIXED}


@pytest.mark.usefixtures("a_gpu")
def test_gpu_state_when_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    state = timing.gpu_state()
    assert state is not None
    assert set(state.values()) == {None}


@pytest.mark.gpu
def test_gpu_state_of_this_machine() -> None:
    state = timing.gpu_state()
    assert state is not None
    assert json.loads(json.dumps(state)) == state
