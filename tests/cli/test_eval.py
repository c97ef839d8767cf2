"""``sparseattn eval`` and ``sparseattn lm-eval``."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from sparseattn.integrations.eval_rows import EvalRow

SMALL = ("eval", "retrieval-d64", "--device", "cpu", "--length", 640, "--prompts", 1)


def row(label: str, target: float | None, density: float, correct: int, length: int = 4096, **changes) -> EvalRow:
    method, _, knob = label.partition(":")
    depths = [[float(correct > i), 1.0] for i in range(10)]
    task = changes.pop("task", "stream")
    return EvalRow(
        model="m", task=task, length=length, method=method, target=target, density=density, knob=knob or None,
        value=0.5, options={}, correct=correct, total=10, prompts=1, seed=0, seconds=2.0 * density,
        selection_seconds=0.1, attention_seconds=0.2, by_depth=depths,
        fidelity={} if target is None else {"recall": 0.8, "p05": 0.5, "normalised": 0.4, "output_error": 0.1},
        environment={"device": "CPU, 1 thread(s)"},
    )  # fmt: skip


ROWS = [
    row("dense", None, 1.0, 10),
    row("landmark:tau", 0.1, 0.101, 9),
    row("landmark:tau", 0.4, 0.4, 10),
    row("xattention:threshold", 0.1, 0.11, 4),
    row("streaming:num_local_tokens", 0.1, 0.3, 10),
    row("oracle:density", 0.1, 0.1, 10),
    row("dense", None, 1.0, 10, length=8192),
    row("landmark:tau", 0.1, 0.1, 3, length=8192),
]


def test_measured_rows_are_kept_and_shown(invoke, tmp_path: Path) -> None:
    arguments = (
        *SMALL,
        "--task",
        "single",
        "--method",
        "streaming",
        "--density",
        0.6,
        "--no-bounds",
        "--out",
        tmp_path,
    )
    result = invoke(*arguments)
    assert result.exit_code == 0
    for word in ("single", "streaming", "1/1", "100 ± 27 %", "speed-up", "Density: computed share"):
        assert word in result.stdout
    file = tmp_path / "rows.jsonl"
    before = file.read_text()
    assert [json.loads(line)["method"] for line in before.splitlines()] == ["dense", "streaming"]
    again = invoke(*arguments, "--json")
    assert again.exit_code == 0
    assert file.read_text() == before
    assert json.loads(again.stdout) == [json.loads(line) for line in before.splitlines()]
    assert not list(tmp_path.glob("*.png"))


def test_comparison_of_rows(invoke, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r.to_dict()) + "\n" for r in ROWS))
    result = invoke("eval", "--rows", file, "--compare", "--out", tmp_path)
    assert result.exit_code == 0
    for name in ("compare_m_4096.png", "compare_m_8192.png", "needles_m.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in result.stdout
    text = " ".join(result.stdout.split())
    # Streaming did not come down to a tenth, and the oracle is no method.
    assert "at 10 % of the blocks most answers are kept by landmark: 90 % (dense: 100 %); xattention 40." in text
    assert "oracle (density)" in text
    assert "10.1 (10) %" in text


def test_a_method_looks_alike_in_every_panel() -> None:
    """Even where a task lacks the methods before it."""
    from sparseattn.cli.eval_report import comparison

    other = [row("dense", None, 1.0, 10, task="vt"), row("xattention:threshold", 0.1, 0.11, 4, task="vt")]
    figure = comparison([*ROWS[:6], *other])
    lines = [line for axis in figure.axes for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    looks = {(str(line.get_label()), line.get_color(), line.get_marker()) for line in lines}
    assert len(lines) > len(looks) == len({label for label, *_ in looks}) == 5


def test_verdicts() -> None:
    from sparseattn.cli.eval_report import needle_map, verdict

    assert verdict(ROWS[:1]) == "Dense attention alone: nothing to compare."
    assert "no method came down to 10 %" in verdict([ROWS[0], ROWS[4]])
    tie = [ROWS[0], ROWS[1], row("topk:density", 0.1, 0.1, 9)]
    assert verdict(tie).endswith("kept by landmark, topk: 90 % (dense: 100 %).")
    above = verdict([*tie, row("bound", 0.1, 0.15, 10), row("oracle", 0.1, 0.3, 10)])
    assert above.endswith(": 90 % (dense: 100 %). Not compared, since they kept more blocks: bound (15 %).")
    nothing = verdict([ROWS[0], row("topk", 0.1, 0.1, 0)])
    assert nothing.endswith("of the blocks no answer is kept by topk (dense: 100 %).")
    assert needle_map([]) is None


def test_every_method_can_be_compared() -> None:
    from sparseattn.cli.eval import _all_methods, _contenders

    assert len(_contenders(_all_methods(), 64, True)) >= 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", 100), "--length: expected at least 512, got 100"),
        (("--density", 1.5), "--density: expected more than 0 and at most 1, got 1.5"),
        (("--prompts", 0), "--prompts: expected at least 1, got 0"),
        (("--method", "guess"), "--method: method: expected one of"),
        (("--method", "heads"), "--method: 'heads' has no option that brings it to a density"),
        (("--method", "streaming:density"), "--method: density: expected an option of StreamingConfig"),
        (("--task", "niah_single_1"), "--task: expected single, multikey, multiquery, stream, vt for this model"),
        (("--task", "stream", "--length", 512, "--block-size", 65), "--method: block_size: expected"),
        (("--rows", "/no/such/file"), "--rows: cannot read"),
    ],
)
def test_bad_input(invoke, tmp_path: Path, arguments: tuple, message: str) -> None:
    result = invoke(*SMALL, "--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_rows_of_something_else(invoke, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"ms": 3}\n')
    result = invoke("eval", "--rows", file)
    assert result.exit_code == 2
    assert "expected rows of sparseattn eval" in result.stderr


def test_lm_eval_is_passed_through(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    from sparseattn.integrations.options import resolve

    seen = {}

    def cli_evaluate() -> None:
        seen["argv"] = list(sys.argv)
        seen["options"] = resolve()
        seen["known"] = "sparseattn" in AttentionInterface().valid_keys()

    harness = types.ModuleType("lm_eval")
    main = types.ModuleType("lm_eval.__main__")
    main.cli_evaluate = cli_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", main)
    own = ("--model", "hf", "--model_args", "pretrained=x", "--tasks", "niah_single_1")
    result = invoke("lm-eval", "--method", "xattention", "--option", "threshold=0.7", "--", *own)
    assert result.exit_code == 0, result.stderr
    assert seen["argv"] == ["lm_eval", *own[:3], "pretrained=x,attn_implementation=sparseattn", *own[4:]]
    assert seen["options"].method == "xattention"
    assert seen["options"].config.threshold == 0.7
    assert seen["known"]
    assert sys.argv[0] != "lm_eval"


def test_lm_eval_arguments() -> None:
    from sparseattn.integrations.lm_eval import with_attention

    given = ["--model_args=pretrained=x,attn_implementation=sparseattn_dense"]
    assert with_attention(given) == given
    assert with_attention(["-a", "pretrained=x"]) == ["-a", "pretrained=x,attn_implementation=sparseattn"]
    for bad in ([], ["--model_args"]):
        with pytest.raises(ValueError, match="arguments: expected lm-eval's --model_args"):
            with_attention(bad)


def test_lm_eval_is_asked_for_where_it_is_missing(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = invoke("lm-eval", "--", "--model_args", "pretrained=x")
    assert result.exit_code == 1
    assert "pip install lm-eval" in result.stderr
    assert invoke("lm-eval").exit_code == 2
