"""The benchmarks run, gate what they time, and documents show their rows: tiny shapes, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import block_sparse, first_call, harness, report, sets
from benchmarks.rivals import IMPLEMENTATIONS, Implementation, Prepared
from sparseattn.testing.workloads import Problem

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ["--dtype", "fp32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
CPU = ["--device", "cpu", *SHAPE]
SMALL = ["--set", "custom", "--budget", ".01", *CPU, "--n", "128", "--block", "32"]
OURS = "sparseattn_reference"
# Under Triton's interpreter our kernels would run on a CPU, and be timed, for minutes.
QUICK_ONES = [name for name in IMPLEMENTATIONS if name == OURS or not name.startswith("sparseattn")]


def rows_in(path: Path) -> list[harness.Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_block_sparse_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    rows = block_sparse.main([*SMALL, "--density", "1", ".25", "--impl", *QUICK_ONES, "--out", str(out)])
    assert rows == rows_in(out)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    ours = [row for row in rows if row["impl"] == OURS]
    assert len(ours) == 4
    for row in ours:
        assert row["set"] == "custom"
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["gate"]
        assert row["env"]["torch"] == torch.__version__
        assert row["gpu"] is None
    forward = next(row for row in ours if row["op"] == "forward" and row["density"] == 1)
    assert forward["flops"] == 4 * (4 * 5 / 2) * 4 * 16 * 32 * 32  # heads * blocks * 4 D block_q block_kv
    rivals = {row["impl"]: row for row in rows if row["impl"] != OURS}
    assert set(rivals) == set(QUICK_ONES) - {OURS}, "everybody has a row, and it says why there is no time"
    assert all("skipped" in row and "ms" not in row for row in rivals.values())
    assert {row["density"] for row in rows if row["impl"] == "cudnn_dense"} == {1.0}


def test_only_those_asked_for(tmp_path: Path) -> None:
    arguments = [*SMALL, "--op", "forward", "--density", ".5", "--impl", OURS, "fa4", "--nq", "32", "--not-causal"]
    rows = block_sparse.main([*arguments, "--mask-heads", "1", "--out", str(tmp_path / "rows.jsonl")])
    assert [row["impl"] for row in rows] == ["fa4", OURS]
    assert (rows[1]["nq"], rows[1]["mask_heads"], rows[1]["causal"]) == (32, 1, False)


def test_shapes_belong_to_the_custom_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        block_sparse.main(["--set", "short", "--head-dim", "64"])
    assert "--head-dim goes with --set custom" in capsys.readouterr().err


def test_default_files_are_those_that_the_report_reads() -> None:
    for name, stem in (("targets", "block_sparse"), ("short", "block_sparse_short")):
        assert block_sparse.parse(["--set", name]).out == harness.RESULTS / f"{stem}.jsonl"


def replaced(monkeypatch: pytest.MonkeyPatch, prepare: object) -> None:
    one = Implementation(OURS, prepare, lambda: None)  # type: ignore[arg-type]
    monkeypatch.setitem(IMPLEMENTATIONS, OURS, one)


def test_a_failed_gate_leaves_an_error_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: Problem) -> Prepared:
        return Prepared(lambda: torch.zeros_like(problem.qkv[0]), {})

    replaced(monkeypatch, wrong)
    small = [*SMALL, "--density", "1", "--impl", OURS, "--op", "forward"]
    (row,) = block_sparse.main([*small, "--out", str(tmp_path / "rows.jsonl")])
    assert "ms" not in row
    assert row["error"].startswith("AssertionError: o:")
    assert report.read([tmp_path / "rows.jsonl"]) == []
    with pytest.raises(SystemExit, match="1 of 1 rows hold an error"):
        harness.finish([row])


def test_a_rival_that_breaks_leaves_an_error_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Problem) -> Prepared:
        if problem.density == 1:
            raise ImportError("libcuda is not what it was")
        return Prepared(lambda: problem.expected[0][0], {})

    replaced(monkeypatch, broken)
    small = [*SMALL, "--density", "1", ".5", "--impl", OURS, "fa4", "--op", "forward"]
    rows = block_sparse.main([*small, "--out", str(tmp_path / "rows.jsonl")])
    assert len(rows) == 4
    assert rows[1]["error"] == "ImportError: libcuda is not what it was"


def test_first_call_of_a_fresh_process() -> None:
    row = first_call.in_a_fresh_process("reference", "forward", "cpu", n=256)
    assert 0 < row["first_call_s"] < 60
    with pytest.raises(RuntimeError, match="first call: ValueError: impl: expected one of"):
        first_call.in_a_fresh_process("no_such", "forward", "cpu", n=256)


def test_first_calls_are_rows_of_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_call, "in_a_fresh_process", lambda impl, op, device: {"first_call_s": len(op) / 2})
    out = tmp_path / "rows.jsonl"
    with harness.Writer(out, "block_sparse") as writer:
        block_sparse.run_first_calls(writer, "targets", ["sparseattn_triton"], torch.device("cpu"))
        assert writer.rows == []
        block_sparse.run_first_calls(writer, "targets", ["sparseattn_triton"], torch.device("cuda"))
    assert [(row["op"], row["first_call_s"]) for row in report.read([out])] == [("forward", 3.5), ("backward", 4.0)]


# ---- sets ----


@pytest.mark.parametrize("name", list(sets.SETS))
def test_sets_hold_workloads_that_exist(name: str) -> None:
    cases = list(sets.cases(name, torch.device("cpu")))
    assert cases
    assert len({case.problem for case in cases}) == len(cases)
    for problem, impls in cases:
        assert set(impls) <= set(IMPLEMENTATIONS)
        assert set(sets.OURS) <= set(impls)
        assert problem.heads % problem.kv_heads == 0
        assert problem.lists in (1, problem.kv_heads, problem.heads)
        assert all(size % 16 == 0 and 16 <= size <= 256 for size in problem.block_size)
        if problem.grid is None:
            assert (problem.n % problem.block, problem.queries % problem.block_size[0]) == (0, 0)
        else:
            assert problem.n % 12800 or [t % 128 for t in problem.drawn_size] == [0, 0]
    dense = {problem.n for problem, _ in cases if problem.density == 1}
    assert dense >= {problem.n for problem, _ in cases}, "dense rivals run at density 1 only"


def test_breakeven_measures_what_the_report_compares() -> None:
    for problem, impls in sets.cases("breakeven", torch.device("cpu")):
        assert {"cudnn_dense", *sets.OURS, *(f"{name}_dense" for name in sets.OURS)} == set(impls)
        assert problem.density in sets.BREAK_EVEN


# ---- the other benchmarks ----


@pytest.mark.slow
def test_ttft_rows(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from benchmarks import ttft

    small = ["--quick", "--device", "cpu", "--dtype", "fp32", "--shape", "tiny", "--n", "256", "--gate-n", "128"]
    rows = ttft.main([*small, "--density", "0.5", "--out", str(tmp_path / "rows.jsonl")])
    assert not [row for row in rows if "error" in row]
    sparse = {row["method"]: row for row in rows if row["impl"] == "sparseattn"}
    assert set(sparse) == set(ttft.METHODS)
    for row in sparse.values():
        assert row["gate"]["logits"]
        assert 0 < row["density"] <= 1
