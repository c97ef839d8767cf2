"""``sparseattn bench``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from sparseattn.cli import bench
from sparseattn.testing import baselines
from sparseattn.testing.workloads import Problem

SMALL = (
    "bench", "--device", "cpu", "--seq", 256, "--heads", 4, "--head-dim", 16, "--block", 32, "--budget", 0.001,
)  # fmt: skip


def test_table_and_verdict(invoke) -> None:
    result = invoke(*SMALL, "--density", 1, "--density", 0.2)
    assert result.exit_code == 0
    for word in ("SDPA", "sparseattn, dense", "TFLOP/s", "speed-up", "1.00x", "Forward: "):
        assert word in result.stdout
    assert "Backward" not in result.stdout
    stderr = " ".join(result.stderr.split())
    assert "256 tokens, 4 query and 1 KV heads of 16, fp32, blocks of 32" in stderr
    assert "is no kernel" in stderr, "a CPU's times are no kernel's"


def test_json_rows(invoke, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = invoke(*SMALL, "--kv-heads", 2, "--density", 0.5, "--density", 0.1, "--backward", "--json", path)
    assert result.exit_code == 0
    assert "Backward: " in result.stdout
    report = json.loads(path.read_text())
    assert (report["seq"], report["kv_heads"], report["dtype"]) == (256, 2, "fp32")
    assert report["environment"]["torch"] == torch.__version__
    names = [(row["op"], row["name"]) for row in report["rows"]]
    one_pass = [bench.SDPA, bench.OURS_DENSE, bench.OURS, bench.OURS]
    assert names == [(op, name) for op in ("forward", "backward") for name in one_pass]
    for row in report["rows"]:
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert set(row["gate"]) == ({"o"} if row["op"] == "forward" else {"dq", "dk", "dv"})
    sparse = [row for row in report["rows"] if row["name"] == bench.OURS]
    assert sparse[0]["density"] > sparse[1]["density"]
    assert sparse[0]["flops"] > sparse[1]["flops"]


def entries(dense: float, ours: dict[float, float]) -> list[bench.Entry]:
    found = [bench.Entry("forward", bench.OURS, density, {"ms": ms}) for density, ms in ours.items()]
    slow = bench.Entry("forward", bench.CUDNN, 1.0, {"ms": dense + 1})
    return [bench.Entry("forward", bench.SDPA, 1.0, {"ms": dense}), slow, *found]


def test_the_verdict_is_plain() -> None:
    assert bench.verdict(entries(4.0, {1.0: 5.0, 0.5: 3.0, 0.1: 1.0})) == (
        "dense attention is faster at density 1; break-even density: 0.75 (interpolated between measured ones)."
    )
    assert bench.verdict(entries(4.0, {1.0: 8.0, 0.5: 5.0})) == (
        "break-even density: none, dense is faster at every measured density."
    )
    assert bench.verdict(entries(4.0, {1.0: 4.0, 0.5: 2.0})) == (
        "block-sparse attention is at least as fast as dense at every measured density."
    )
    assert bench.verdict([bench.Entry("forward", bench.SDPA, 1.0, {"reason": "it broke"})]) == "nothing to compare."


def test_a_baseline_that_breaks_is_said_and_left_out(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> baselines.Prepared:
        raise RuntimeError("No available kernel.\nmore")

    monkeypatch.setattr(baselines, "sdpa", broken)
    result = invoke(*SMALL, "--density", 0.5)
    assert result.exit_code == 0
    assert "SDPA, forward, density 1: RuntimeError: No available kernel." in " ".join(result.stderr.split())
    assert "nothing to compare" in result.stdout


def test_a_wrong_result_is_not_timed_and_fails(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: Problem, impl: str, masked: bool = True) -> baselines.Prepared:
        return lambda: torch.zeros_like(problem.qkv[0]), {}

    monkeypatch.setattr(bench, "_ours", wrong)
    result = invoke(*SMALL, "--density", 0.5)
    assert result.exit_code == 1
    assert "wrong result: o: largest error" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seq", 0), "--seq: expected at least 1, got 0."),
        (("--head-dim", -1), "--head-dim: expected at least 1, got -1."),
        (("--kv-heads", 3), "--kv-heads: expected a divisor of the 4 query heads, got 3."),
        (("--block", 100), "--block: expected a multiple of 16 from 16 to 256, got 100."),
        (("--density", 1.5), "--density: expected more than 0 and at most 1, got 1.5."),
        (("--density", 0), "--density: expected more than 0 and at most 1, got 0."),
        (("--dtype", "int8"), "--dtype: expected bf16, fp16, fp32, got 'int8'."),
        (("--impl", "cuda"), "got 'cuda'."),
        (("--budget", 0), "--budget: expected more than 0 seconds, got 0."),
        (("--device", "tpu"), "--device: expected auto, cpu or cuda, got 'tpu'"),
        (("--json", "/no/such/folder/rows.json"), "--json: cannot write '/no/such/folder/rows.json'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input(invoke, arguments: tuple, message: str) -> None:
    result = invoke(*SMALL, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_an_implementation_that_cannot_says_why(invoke) -> None:
    result = invoke(*SMALL, "--impl", "triton", "--head-dim", 1000)
    assert result.exit_code == 2
    assert "--impl: 'triton' cannot run the forward pass: " in " ".join(result.stderr.split())


@pytest.mark.parametrize("arguments", [("--json", "/no/such/folder/rows.json"), ("--impl", "gluon", "--backward")])
def test_what_must_fail_fails_before_anything_is_timed(
    invoke, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("timed")

    def no_gradients(*_: object, gradients: bool = False, impl: str) -> str | None:
        return "has no such gradients" if gradients and impl == "gluon" else None

    monkeypatch.setattr(bench, "_measure", refuse)
    monkeypatch.setattr(bench, "unsupported_reason", no_gradients)
    assert invoke(*SMALL, *arguments).exit_code == 2


def test_a_line_names_who_runs_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head dimensions and blocks exist whose forward pass is Gluon's and whose backward pass is Triton's."""

    def no_gradients(*_: object, gradients: bool = False, impl: str) -> str | None:
        return "has no such gradients" if gradients and impl == "gluon" else None

    monkeypatch.setattr(bench, "implementations", lambda impl, t: ("gluon", "triton"))
    monkeypatch.setattr(bench, "unsupported_reason", no_gradients)
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 16, "block": 32, "dtype": "fp32", "device": torch.device("cpu")}
    ran = [bench._ours(Problem(op, 64, 1.0, **shape), "auto")[1]["impl"] for op in ("forward", "backward")]
    assert ran == ["gluon", "triton"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_a_gpu_every_baseline_of_torch_runs(invoke, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = invoke("bench", "--seq", 2048, "--density", 0.25, "--budget", 0.01, "--json", path)
    assert result.exit_code == 0
    names = {row["name"] for row in json.loads(path.read_text())["rows"] if "ms" in row}
    assert {bench.SDPA, bench.CUDNN, bench.OURS, bench.FLEX} <= names
