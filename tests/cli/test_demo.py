"""``sparseattn demo``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

SMALL = ("demo", "--device", "cpu", "--length", 1024, "--block-size", 64, "--quick")


def test_table_and_picture(invoke, tmp_path: Path) -> None:
    result = invoke(*SMALL, "--out", tmp_path / "new")
    assert result.exit_code == 0
    for word in (
        "landmark",
        "tau 0.3",
        "xattention",
        "streaming",
        "stride 8, 0.9",
        "speed-up",
        "recall",
        "16/16",
        "Dense attention answers",
    ):
        assert word in result.stdout
    assert "CPU" in result.stderr
    picture = tmp_path / "new" / "demo.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in result.stdout


def test_json_rows(invoke, tmp_path: Path) -> None:
    result = invoke(*SMALL, "--json", "--out", tmp_path, "--model", "retrieval-d128", "--seed", 1)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    dense, *sparse = report["rows"]
    assert (dense["method"], dense["density"], dense["recall"], dense["speedup"]) == ("dense", 1.0, 1.0, None)
    assert dense["stream_correct"] >= 0.98 * dense["stream_total"]
    assert [row["method"] for row in sparse] == ["landmark", "xattention", "streaming"]
    for row in sparse:
        assert 0 < row["density"] < 1
        assert 0 < row["recall"] < 1
        assert 0 < row["output_error"] < 1
        assert row["prefill_seconds"] > 0
        assert row["speedup"] == pytest.approx(dense["prefill_seconds"] / row["prefill_seconds"])
        assert row["options"]["block_size"] == 64
    streaming = sparse[2]
    assert streaming["stream_correct"] < dense["stream_correct"]


def test_a_model_that_cannot_retrieve_nothing_is_hidden() -> None:
    from sparseattn.cli.demo import _verdict
    from sparseattn.cli.measure import Row, Setting
    from sparseattn.testing.retrieval import ExactMatch

    dense = Row(Setting("dense", "sdpa"), ExactMatch(10, 10), ExactMatch(2, 2), 1, 1, 0, 1.0)
    lossy = Row(Setting("x", "a"), ExactMatch(7, 10), ExactMatch(2, 2), 0.2, 0.9, 0.1, 2.0, speedup=0.5)
    same = Row(Setting("x", "b"), ExactMatch(10, 10), ExactMatch(2, 2), 0.6, 0.9, 0.1, 0.5, speedup=2.0)
    text = _verdict([dense, lossy])
    assert "Closest comes x (a) with 9" in text
    assert "slower than dense here" in text
    assert "1 of 1 sparse settings took longer than dense" in text
    text = _verdict([dense, lossy, same])
    assert "So does x (b), at 60 % of the blocks, 2.00 times as fast as dense." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", 3), "--length: expected 512 to 32768, got 3"),
        (("--device", "tpu"), "--device: expected auto, cpu or cuda, got 'tpu'"),
        (("--block-size", 65), "block_size: expected"),
        (("--model", "/no/such/model"), "MODEL: expected a folder"),
    ],
)
def test_bad_input(invoke, tmp_path: Path, arguments: tuple, message: str) -> None:
    result = invoke("demo", "--out", tmp_path, "--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
