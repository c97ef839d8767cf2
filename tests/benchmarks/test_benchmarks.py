"""The benchmarks run, gate what they time, and documents show their rows: tiny shapes, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import block_sparse, harness, oracle, report, xattention
from benchmarks.inputs import random_blocks, random_qkv, structured_qkv

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = ["--quick", "--device", "cpu", "--dtype", "fp32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]


def rows_in(path: Path) -> list[harness.Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_oracle_is_dense_attention_with_a_mask() -> None:
    n, block = 96, 16
    q, k, v = random_qkv(n, 4, 2, 16, torch.float64, CPU)
    do = random_qkv(n, 4, 1, 16, torch.float64, CPU, seed=1)[0]
    blocks = random_blocks(4, n // block, 0.4, CPU)
    selected, rows, cols = oracle.Selected(blocks, (block, block)), oracle.sample(n, 20, CPU), oracle.sample(n, 20, CPU)
    dense = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3) & torch.ones(n, n).tril().bool()
    for t in (q, k, v):
        t.requires_grad_()
    o = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=dense, enable_gqa=True
    ).transpose(1, 2)
    expected = torch.autograd.grad(o, (q, k, v), do)
    with torch.no_grad():
        got, _ = oracle.attend(q, k, v, selected, rows, torch.float64)
        dq, dk, dv = oracle.gradients(q, k, v, do, selected, rows, cols, torch.float64)
    torch.testing.assert_close(got, o[0, rows])
    torch.testing.assert_close((dq, dk, dv), (expected[0][0, rows], expected[1][0, cols], expected[2][0, cols]))


def test_structured_inputs_leave_something_to_skip() -> None:
    q, k, v = structured_qkv(4096, 4, 2, 64, torch.float32, CPU)
    assert q.shape == (1, 4096, 4, 64)
    assert k.shape == v.shape == (1, 4096, 2, 64)
    assert xattention.xattention(q, k).density < 0.5


def test_block_sparse_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    rows = block_sparse.main([*SMALL, "--n", "128", "--block", "32", "--density", "1", ".25", "--out", str(out)])
    assert rows == rows_in(out)
    ours = [row for row in rows if row["impl"] == "sparseattn"]
    assert len(ours) == 4
    for row in ours:
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["gate"]
        assert row["env"]["torch"] == torch.__version__
    forward = next(row for row in ours if row["op"] == "forward" and row["density"] == 1)
    assert forward["flops"] == 4 * (4 * 5 / 2) * 4 * 16 * 32 * 32  # heads * blocks * 4 D block_q block_kv
    rivals = [row for row in rows if row["impl"] != "sparseattn"]
    assert rivals
    assert all("skipped" in row and "ms" not in row for row in rivals)


def test_a_failed_gate_leaves_an_error_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: block_sparse.Problem) -> block_sparse.Prepared:
        return lambda: torch.zeros_like(problem.qkv[0]), {}

    monkeypatch.setitem(block_sparse.IMPLEMENTATIONS, "sparseattn", wrong)
    small = [*SMALL, "--n", "64", "--block", "32", "--density", "1", "--impl", "sparseattn", "--op", "forward"]
    (row,) = block_sparse.main([*small, "--out", str(tmp_path / "rows.jsonl")])
    assert "ms" not in row
    assert row["error"].startswith("AssertionError: o:")
    with pytest.raises(SystemExit, match="1 of 1 rows hold an error"):
        harness.finish([row])


def test_xattention_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    rows = xattention.main([*SMALL, "--n", "512", "--block", "64", "--stride", "8", "--out", str(out)])
    assert not [row for row in rows if "error" in row]
    phases = {row["phase"]: row for row in rows if row["impl"] == "sparseattn"}
    assert set(phases) == {"selection", "attention", "both"}
    assert phases["selection"]["gate"]["mass"][0] >= 0.89
    assert 0 < phases["both"]["recall"] <= 1


@pytest.mark.slow
def test_ttft_rows(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from benchmarks import ttft

    small = ["--quick", "--device", "cpu", "--dtype", "fp32", "--shape", "tiny", "--n", "256", "--gate-n", "128"]
    rows = ttft.main([*small, "--threshold", "0.5", "--out", str(tmp_path / "rows.jsonl")])
    assert not [row for row in rows if "error" in row]
    sparse = next(row for row in rows if row["impl"] == "sparseattn_xattention")
    assert sparse["gate"]["logits"]
    assert 0 < sparse["density"] <= 1


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "rows.jsonl"
    small = [*SMALL, "--n", "128", "--block", "32", "--density", "1", ".25", "--impl", "sparseattn", "--op", "forward"]
    rows = block_sparse.main([*small, "--out", str(out)])
    text = report.tables(report.read([out]))
    assert f"({report.milliseconds(rows[0]['ms'])} ms)" in text
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.inject(document, text)
    assert once == report.inject(once, text)
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    with pytest.raises(ValueError, match="markers"):
        report.inject("no markers", text)
    picture = tmp_path / "plot.png"
    report.plot(report.read([out]), picture)
    assert picture.stat().st_size > 1000


def test_readme_shows_the_committed_rows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = report.read(harness.RESULTS.glob("*.jsonl"))
    assert readme == report.inject(readme, report.tables(rows)), "run: python -m benchmarks.report --readme README.md"
