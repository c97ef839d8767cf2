"""Models with sparse prefill, loaded by SparseAttn's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import sparseattn  # noqa: E402
from sparseattn import models, threshold  # noqa: E402
from sparseattn.src.load_llama import FastPrefillConfig, load_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

COMMON = dict(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.15,
)  # fmt: skip
KINDS = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "phi3": "Phi3Config"}
METRICS = {"xattn": "xattention", "flex": "flexprefill", "minfer": "minference", "full": "dense"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models with a tokenizer of single letters, as ``from_pretrained`` takes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(ord("a") + i): 3 + i for i in range(26)}}
    words = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>")
    found = {}
    for kind, name in KINDS.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind)
        config = getattr(transformers, name)(**COMMON, head_dim=16)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[kind] = folder
    return found


def prompt(tokenizer: Any, length: int = 300) -> Any:
    letters = " ".join(chr(ord("a") + i * i % 26) for i in range(length))
    return tokenizer(letters, return_tensors="pt").input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_loads_and_generates(kind: str, folders: dict[str, Path]) -> None:
    config = FastPrefillConfig(threshold=1.0, min_seq_len=64)
    model, tokenizer = load_model(config, folders[kind])
    ids = prompt(tokenizer)
    with torch.no_grad(), sparseattn.record() as calls:
        logits = model(ids).logits
    assert {(call.method, call.density) for call in calls} == {("xattention", 1.0)}
    assert len(calls) == 2
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(metric: str, folders: dict[str, Path]) -> None:
    config = FastPrefillConfig(0.5, metric=metric, block_size=64, sparsity_ratio=0.5, min_seq_len=64)
    model, tokenizer = load_model(config, str(folders["llama"]))
    with torch.no_grad(), sparseattn.record() as calls:
        model(prompt(tokenizer))
    assert {call.method for call in calls} == {METRICS[metric]}
    if metric == "flex":
        assert all(call.density < 0.75 for call in calls)


def test_options_are_the_models_and_are_saved_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    table = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    model, _ = load_model(FastPrefillConfig(table), folders["llama"])
    options = model.config.sparseattn
    assert options["threshold"] == [pytest.approx(row) for row in table.tolist()]
    assert options["stride"] == 16
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sparseattn"] == options


def test_models_take_their_own_table(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    name = str(folders["llama"])
    values = ((0.1, 0.2, 0.3, 0.4),) * 2
    own = threshold.ThresholdTable(name, "xattention", "threshold", values, {"stride": 16, "block_size": 128})
    monkeypatch.setattr("sparseattn.threshold.tables._shipped", lambda: (own,))
    assert load_model(None, name)[0].config.sparseattn["threshold"] == [list(row) for row in values]
    for config in (FastPrefillConfig(stride=8), FastPrefillConfig(block_size=64)):
        assert load_model(config, name)[0].config.sparseattn["threshold"] == 0.95
    assert load_model(FastPrefillConfig(0.5), name)[0].config.sparseattn["threshold"] == 0.5


def test_shipped_models_by_name() -> None:
    name = models.names()[0]
    model, tokenizer = load_model(FastPrefillConfig(), name)
    assert tokenizer is None
    assert not model.training
    table = threshold.find(name, options={"stride": 16})
    assert table is not None
    assert model.config.sparseattn["threshold"] == [list(row) for row in table.values]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.5] * 8, r"threshold: expected \(4,\) values, for the model's query heads, got \(8,\)"),
        ([[0.5] * 4] * 32, r"threshold: expected \(2, 4\) values, for the model's layers and query heads, got \(32, 4"),
    ],
)
def test_tables_of_other_models_are_refused(table: Any, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(FastPrefillConfig(table), folders["llama"])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="name_or_path"):
        load_model(FastPrefillConfig())
    with pytest.raises(TypeError, match="fastprefillconfig"):
        load_model({"threshold": 0.9}, "x")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no/such"):
        load_model(FastPrefillConfig(), "./no/such/folder")
