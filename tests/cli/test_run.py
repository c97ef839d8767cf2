"""``sparseattn run``, and the errors all commands share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")

SPARSE = ("--option", "min_seq_len=128", "--option", "block_size=64", "--option", "tau=0.01")


def test_answers_with_sparse_prefill(invoke, prompt: tuple[Path, str]) -> None:
    file, answer = prompt
    result = invoke("run", "retrieval-d64", "--prompt-file", file, "--max-new-tokens", 8, "--device", "cpu", *SPARSE)
    assert result.exit_code == 0
    assert answer in result.stdout
    assert "density" in result.stdout
    assert "MiB" in result.stdout
    assert "Some layers ran dense" not in result.stdout


def test_json(invoke, prompt: tuple[Path, str]) -> None:
    file, answer = prompt
    arguments = ("--method", "streaming", "--option", "num_local_tokens=64", "--option", "min_seq_len=1", "--json")
    result = invoke(
        "run", "retrieval-d128", "--prompt-file", file, "--max-new-tokens", 8, "--device", "cpu", *arguments
    )
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["dense"]["answer"] == answer
    assert 0 < report["density"] < 1
    assert report["options"]["num_local_tokens"] == 64
    assert report["prompt_tokens"] == len(file.read_text().removesuffix("\n")) + 1
    for part in ("dense", "sparse"):
        assert report[part]["ttft_seconds"] > 0
        assert report[part]["peak_memory_bytes"] > 0


def test_says_when_a_prompt_is_too_short_to_be_sparse(invoke, prompt: tuple[Path, str]) -> None:
    result = invoke("run", "retrieval-d64", "--prompt-file", prompt[0], "--max-new-tokens", 1, "--device", "cpu")
    assert result.exit_code == 0
    assert "Some layers ran dense: below the break-even of landmark on cpu, 1024 tokens (assumed)." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "quest"), "method: expected one of landmark, xattention, streaming,"),
        (("--option", "treshold=0.9"), "got treshold"),
        (("--option", "tau=2"), "tau: expected"),
        (("--option", "tau=NaN"), "tau: expected"),
        (("--option", "threshold"), "--option: expected name=value, got 'threshold'"),
        (("--max-new-tokens", 0), "--max-new-tokens: expected at least 1, got 0"),
        (("--dtype", "int7"), "--dtype: expected auto, float32, bfloat16, float16, got 'int7'"),
        (("--device", "cuda:99"), "--device: 'cuda:99' is not to be had here"),
    ],
)
def test_bad_options(invoke, prompt: tuple[Path, str], arguments: tuple, message: str) -> None:
    result = invoke("run", "retrieval-d64", "--prompt-file", prompt[0], *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_bad_model_and_files(invoke, prompt: tuple[Path, str], tmp_path: Path) -> None:
    result = invoke("run", tmp_path / "nothing", "--prompt-file", prompt[0])
    assert result.exit_code == 2
    assert "MODEL: expected a folder, a hub id or one of retrieval-d128, retrieval-d64" in result.stderr

    result = invoke("run", "retrieval-d64", "--prompt-file", tmp_path / "nothing.txt")
    assert result.exit_code == 2
    assert "--prompt-file: expected a UTF-8 text file" in result.stderr

    (tmp_path / "empty.txt").write_text("\n")
    result = invoke("run", "retrieval-d64", "--prompt-file", tmp_path / "empty.txt")
    assert result.exit_code == 2
    assert "got an empty file" in result.stderr

    assert invoke("run", "retrieval-d64").exit_code == 2  # no prompt


def test_a_missing_package_is_named_with_its_extra(invoke, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke("run", "retrieval-d64", "--prompt-file", prompt[0])
    assert result.exit_code == 1
    assert "pip install 'sparseattn[hf]'" in result.stderr
