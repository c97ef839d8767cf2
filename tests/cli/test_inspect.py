"""``sparseattn inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.mark.parametrize("method", ["landmark", "xattention", "streaming"])
def test_pictures_and_statistics(invoke, prompt: tuple[Path, str], tmp_path: Path, method: str) -> None:
    arguments = (
        "--method",
        method,
        "--option",
        "min_seq_len=128",
        "--option",
        "block_size=64",
        "--out",
        tmp_path / "o",
    )
    if method == "streaming":
        arguments += ("--option", "num_local_tokens=64", "--layers", "0,3", "--heads", "1")
    result = invoke("inspect", "retrieval-d64", "--prompt-file", prompt[0], "--device", "cpu", *arguments)
    assert result.exit_code == 0
    for name in ("masks.png", "statistics.png"):
        assert (tmp_path / "o" / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "o" / "statistics.json").read_text())
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 3]
    for layer in report["layers"]:
        recall = layer["recall"]
        assert len(layer["density"]) == 8
        assert all(0 < d <= 1 for d in layer["density"])
        for mean, p05, worst in zip(recall["mean"], recall["p05"], recall["worst"], strict=True):
            assert 0 <= worst <= p05 <= 1.001
            assert worst <= mean <= 1.001
    assert 0 < report["density"] < 1
    assert "5th percentile" in result.stdout


def test_masks_are_drawn_as_they_are() -> None:
    from sparseattn import BlockMask
    from sparseattn.cli.figures import levels

    mask = BlockMask.streaming((250, 320), num_sink_tokens=64, num_local_tokens=64, block_size=64)
    drawn = levels(mask, 0)
    assert drawn.shape == (4, 5)
    for level, expected in ((2, mask), (1, BlockMask.causal((250, 320), block_size=64))):
        tokens = torch.nn.functional.pad(expected.to_dense()[0, 0], (0, 0, 0, 6))
        assert torch.equal(drawn >= level, tokens.view(4, 64, 5, 64).any(1).any(-1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "dense"), "expected a method that selects blocks, got 'dense'"),
        ((), "nothing to inspect: every layer ran dense (fewer than min_seq_len=1024 queries)"),
        (("--option", "min_seq_len=1", "--layers", "9"), "--layers: expected some of 0..3, got 9"),
        (("--option", "min_seq_len=1", "--heads", "a"), "--heads: expected numbers such as 0,1, got 'a'"),
        (("--option", "min_seq_len=1", "--out", "/dev/null/x"), "--out: cannot create"),
    ],
)
def test_bad_input(invoke, prompt, tmp_path: Path, monkeypatch, arguments: tuple, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("inspect", "retrieval-d64", "--prompt-file", prompt[0], "--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
