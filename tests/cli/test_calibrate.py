"""``sparseattn calibrate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseattn.threshold import ThresholdTable

pytest.importorskip("transformers")

MODEL = "retrieval-d64"


def test_a_table_is_fitted_and_written(invoke: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    result = invoke(
        "calibrate", MODEL, "--out", file, "--length", 512, "--prompts", 1, "--steps", 2, "--target", 0.9,
        "--option", "block_size=64", "--option", "stride=16", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    table = ThresholdTable.load(file)
    assert (table.model, table.target, table.measured["prompts"]) == (MODEL, 0.9, [[1, 512]])
    assert dict(table.options) == {"block_size": 64, "stride": 16}
    assert (len(table.values), len(table.values[0])) == (4, 8)
    assert f"density {table.measured['density']:.1%}" in result.stdout


def test_prompts_from_files(invoke: Callable[..., Any], prompt: tuple[Path, str], tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    result = invoke(
        "calibrate", MODEL, "--out", file, "--prompt-file", prompt[0], "--prompt-file", prompt[0], "--steps", 1,
        "--method", "landmark", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert len(ThresholdTable.load(file).measured["prompts"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "streaming"), "method: expected one of xattention"),
        (("--target", "2"), "target"),
        (("--option", "strides=8"), "strides"),
        (("--option", "threshold=0.5"), "threshold"),
        (("--length", "10"), "--length"),
        (("--prompts", "0"), "--prompts"),
        (("--prompt-file", "no-such-file"), "--prompt-file"),
        (("--out", "/no/such/folder/table.json"), "--out: cannot write '/no/such/folder/table.json'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    invoke: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("calibrate", MODEL, "--out", "table.json", "--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"
