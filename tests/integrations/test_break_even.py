"""Short prompts run dense where nothing else was measured, chunks of long ones by their work, and it is said once."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_models import make_model, tokens

import sparseattn.hf as hf
from benchmarks import harness, report, selector_report
from sparseattn import selectors
from sparseattn.integrations import break_even, transformers
from sparseattn.src.load_llama import FastPrefillConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"block_size": 64, "tau": 0.2}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, int]]:
    """A table to fill, and a GPU that a name stands for."""
    found: dict[str, dict[str, int]] = {}
    monkeypatch.setattr(break_even, "measured", lambda: found)
    monkeypatch.setattr(break_even, "_gpu_name", lambda index: "NVIDIA Test")
    return found


def test_measured_lengths_and_assumed_ones(table: dict[str, dict[str, int]]) -> None:
    assert [break_even.tokens("landmark", device) for device in (CPU, GPU, torch.device("meta"))] == [1024, 8192, 1024]
    table["NVIDIA Test"] = {"landmark": 4096}
    assert break_even.tokens("landmark", GPU) == 4096
    assert break_even.tokens("xattention", GPU) == 8192
    said = "below the break-even of {} on NVIDIA Test, {} tokens ({})"
    assert break_even.reason("landmark", GPU) == said.format("landmark", 4096, "measured")
    assert break_even.reason("xattention", GPU) == said.format("xattention", 8192, "assumed")


def test_the_shipped_table_is_that_of_the_committed_rows() -> None:
    shipped = json.loads(break_even.DATA.read_text(encoding="utf-8"))
    rows = report.read(harness.RESULTS.glob("*.jsonl"))
    assert shipped == selector_report.break_even(rows), "run: python -m benchmarks.report --break-even"
    for methods in shipped.values():
        assert set(methods) <= set(selectors.SELECTORS)


def test_the_report_writes_the_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector_report, "break_even", lambda rows: {"NVIDIA Test": {"bound": 2048}})
    report.main([str(harness.RESULTS / "ttft.jsonl"), "--break-even", str(tmp_path / "table.json")])
    assert json.loads((tmp_path / "table.json").read_text()) == {"NVIDIA Test": {"bound": 2048}}


@pytest.mark.parametrize(
    ("q_len", "k_len", "causal", "expected"),
    [
        (8192, 8192, True, True),
        (8191, 8191, True, False),
        (2048, 4096, True, False),  # an early chunk of a long prompt
        (2048, 65536, True, True),  # a late one
        (1023, 1 << 20, True, False),  # too few rows of blocks, whatever the keys
        (1, 1 << 30, True, False),
        (8192, 100, True, False),  # few keys
        (8192, 100, False, False),
        (4097, 8192, False, True),
    ],
)
def test_calls_are_judged_by_queries_and_keys(q_len: int, k_len: int, causal: bool, expected: bool) -> None:
    assert break_even.pays(8192, q_len, k_len, causal) == expected


def test_prompts_shorter_than_few_queries_may_pay() -> None:
    assert break_even.pays(512, 512, 512, causal=True)
    assert not break_even.pays(512, 511, 4096, causal=True)


def reasons(model: Any, ids: torch.Tensor, **call: Any) -> list[str | None]:
    with torch.no_grad(), hf.record() as calls:
        model(ids, **call)
    return [call.reason for call in calls]


def test_models_follow_it_and_say_so_once(
    table: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    monkeypatch.setattr(transformers.logger, "warning_once", said.append)
    table["cpu"] = {"landmark": 200}
    model = make_model("llama")
    dense = "below the break-even of landmark on cpu, 200 tokens (measured)"
    with hf.options(**SMALL):
        assert reasons(model, tokens(1, 200)) == [None, None]
        assert said == []
        assert reasons(model, tokens(1, 199)) == [dense, dense]
        assert set(said) == {f"sparseattn runs short prompts dense: {dense}. min_seq_len=N selects from N tokens on."}
        said.clear()
        assert reasons(model, tokens(1, 1)) == [dense, dense]
        assert said == []  # that single tokens are dense is no news
        with hf.options(min_seq_len=100):
            assert reasons(model, tokens(1, 199)) == [None, None]
        with hf.options(method="dense"):
            assert reasons(model, tokens(1, 199)) == ["dense", "dense"]


def test_chunks_and_caches(table: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "LEAST_QUERIES", 64)
    table["cpu"] = {"landmark": 200}
    model = make_model("llama")
    ids = tokens(1, 400)
    dense = "below the break-even of landmark on cpu, 200 tokens (measured)"
    with torch.no_grad(), hf.options(**SMALL):
        cache = model(ids[:, :100]).past_key_values
        found = []
        for start in (100, 200, 300):
            found.append(reasons(model, ids[:, start : start + 100], past_key_values=cache)[0])
        assert found == [dense, None, None]  # 15,050, 25,050 and 35,050 pairs, where 200 tokens have 20,100
        # What a static cache has room for are no keys.
        static = transformers_static_cache(model, 4000)
        assert reasons(model, ids[:, :100], past_key_values=static)[0] == dense


def transformers_static_cache(model: Any, room: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=room)


def test_packed_sequences_count_one_by_one(table: dict[str, dict[str, int]]) -> None:
    table["cpu"] = {"landmark": 200}
    model = make_model("llama")
    positions = torch.cat([torch.arange(150), torch.arange(150)])[None]
    with hf.options(**SMALL):
        assert None not in reasons(model, tokens(1, 300), position_ids=positions)
        longer = torch.cat([torch.arange(50), torch.arange(250)])[None]
        assert reasons(model, tokens(1, 300), position_ids=longer) == [None, None]


def test_compiled_models_follow_it(table: dict[str, dict[str, int]]) -> None:
    table["cpu"] = {"landmark": 200}
    model = make_model("llama")
    mask = torch.ones(1, 200, dtype=torch.long)
    with torch.no_grad(), hf.options(block_size=64, tau=1.0, floor=0):
        sparse = model(tokens(1, 200), attention_mask=mask).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens(1, 200), attention_mask=mask).logits, sparse)
        with hf.options(min_seq_len=201):
            assert not torch.allclose(model(tokens(1, 200)).logits, sparse)


def test_documented_loaders_follow_it() -> None:
    assert FastPrefillConfig().min_seq_len == "auto"
