"""The comparison in docs/evaluation.md is made of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import evaluation
from sparseattn.integrations.eval_rows import EvalRow

ROOT = Path(__file__).resolve().parents[2]


def row(method: str, target: float | None, density: float, correct: int, task: str = "stream") -> EvalRow:
    kept = {"recall": 0.715, "normalised": 0.8} if target is not None and task == "stream" else {}
    return EvalRow(
        model="m", task=task, length=4096, method=method, target=target, density=density,
        knob="tau" if method == "landmark" else "threshold", value=0.5, options={"block_size": 64}, correct=correct,
        total=100, prompts=2, seed=0, seconds=1.0, selection_seconds=0.1, attention_seconds=0.2, fidelity=kept,
        environment={"device": "CPU, 1 thread(s)", "dtype": "float32", "torch": "2"},
    )  # fmt: skip


def test_tables() -> None:
    rows = [
        row("dense", None, 1.0, 100), row("landmark", 0.1, 0.101, 90), row("landmark", 0.1, 0.1, 80, "vt"),
        row("xattention", 0.1, 0.2, 50),
    ]  # fmt: skip
    text = evaluation.answers_table(rows)
    assert "**m**, 4,096 tokens, 2 prompts a task, blocks of 64, float32, CPU. Dense: stream 100/100." in text
    assert "| landmark | 90 ± 3 | 80 ± 4 | 0.71 (0.80) |" in text
    assert "| xattention | 50 ± 5 at 20 % |  | 0.71 (0.80) |" in text
    kinds = [
        {"kind": "slash", "method": m, "target": 0.1, "density": d, "planted": 0.9, "length": 4096, "head_dim": 128,
         "block_size": 64, "seeds": 2, "dtype": "float32", "device": "CPU"}
        for m, d in (("landmark", 0.1), ("oracle:density", 0.2))
    ]  # fmt: skip
    text = evaluation.families_table(kinds)
    assert "| head | landmark | oracle |" in text
    assert "| `slash` | 0.90 | 0.90 (20) |" in text
    with pytest.raises(ValueError, match="document: expected the markers"):
        evaluation.inject("no markers", text)


def test_families_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "KINDS", ("rare_keys",))
    out = tmp_path / "rows.jsonl"
    size = ("--length", "1024", "--head-dim", "32", "--seeds", "1", "--density", "0.3")
    evaluation.main(["families", "--out", str(out), *size, "--method", "landmark", "--method", "topk"])
    landmark, topk = (json.loads(line) for line in out.read_text().splitlines())
    assert (landmark["method"], topk["method"]) == ("landmark", "topk")
    assert landmark["density"] == pytest.approx(0.3, abs=0.05)
    # One query of a tile wants a lone key: means over either lose it.
    assert landmark["planted"] > topk["planted"] + 0.3


def test_documents_show_the_committed_rows() -> None:
    text = evaluation.tables(evaluation.rows_of(evaluation.ANSWERS), evaluation.read_json(evaluation.FAMILIES))
    document = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert evaluation.inject(document, text) == document, "run python -m benchmarks.evaluation tables --docs"
