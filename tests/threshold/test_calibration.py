"""Thresholds per head: what the calibrator finds, and tables of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import sparseattn  # noqa: E402
from sparseattn import models, threshold  # noqa: E402
from sparseattn.calibrate import KNOBS, Knob  # noqa: E402
from sparseattn.threshold import ThresholdTable, calibrate  # noqa: E402

LENGTH, STEPS = 500, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "xattention": {"stride": 8, "block_size": 64},
    "landmark": {"block_size": 64, "floor": 1},
    "flashprefill": {"block_size": 64, "num_sink_tokens": 1, "num_local_tokens": 0, "num_last_tokens": 0},
}


def tiny(kind: str = "LlamaConfig", **more: Any) -> Any:
    """A model whose heads differ in how peaked they are."""
    torch.manual_seed(1)
    common = dict(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    config = getattr(transformers, kind)(**{**common, **more})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def prompts(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 64, (1, LENGTH), generator=generator) for _ in range(count)]


def first_layer_recall(model: Any, prompt: Tensor, options: dict[str, Any]) -> Tensor:
    """Recall of every row of the first layer, [Hq, S], from eager attention weights and dense masks, in float64.

    The first layer sees the same queries and keys whether or not attention is sparse.
    """
    model.set_attn_implementation("eager")
    weights = model(prompt, output_attentions=True).attentions[0][0].double()
    sparseattn.register()
    model.set_attn_implementation("sparseattn")
    with sparseattn.options(**options, min_seq_len=1), sparseattn.record(masks=True) as calls:
        model(prompt)
    model.set_attn_implementation("eager")
    mask = calls[0].mask
    assert mask is not None
    return (weights * mask.to_dense()[0]).sum(-1)


def statistics(recall: Tensor, statistic: str) -> Tensor:
    return recall.mean(-1) if statistic == "mean" else recall.sort(-1).values[:, LENGTH // 20 - 1]


def position(knob: Knob, value: float) -> float:
    """Where a value lies, from 0 (keeps least) to 1 (keeps everything)."""
    if not knob.log:
        return value
    return 1.0 if value == 0 else math.log(value) / math.log(knob.low)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("statistic", ["mean", "p05"])
def test_every_head_reaches_the_target_and_keeps_no_more(method: str, statistic: str) -> None:
    model, texts, target = tiny(), prompts(), 0.9
    table = calibrate(
        model, texts, method, target=target, statistic=statistic, options=OPTIONS[method], steps=STEPS, name="tiny"
    )
    assert (table.model, table.method, table.target, table.statistic) == ("tiny", method, target, statistic)
    assert len(table.values) == 2
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        got = [first_layer_recall(model, text, table.attention_options()) for text in texts]
        assert (torch.stack([statistics(r, statistic) for r in got]) >= target - 1e-5).all()
        # One step leaner, and each head misses the target on some prompt.
        knob, step = KNOBS[method], 2**-STEPS
        leaner = [knob.value(max(0.0, position(knob, value) - step)) for value in table.values[0]]
        options = {**table.attention_options(), table.option: [leaner, *table.values[1:]]}
        less = torch.stack([statistics(first_layer_recall(model, t, options), statistic) for t in texts]).amin(0)
    least = torch.tensor([position(knob, value) <= step for value in table.values[0]])
    assert ((less < target) | least).all()
    assert not least.all()
    assert target <= table.measured["lowest_recall"] <= table.measured["recall"] <= 1
    assert 0 < table.measured["density"] < 1


def test_a_higher_target_keeps_more() -> None:
    model, texts = tiny(), prompts(1)
    tables = [calibrate(model, texts, target=t, steps=4, options={"block_size": 64}) for t in (0.7, 0.95)]
    for low, high in zip(*(table.values for table in tables), strict=True):
        assert all(a <= b for a, b in zip(low, high, strict=True))
    assert tables[0].measured["density"] < tables[1].measured["density"]
    assert calibrate(model, texts, target=0.7, steps=4, options={"block_size": 64}) == tables[0]


def test_sliding_layers_are_left_generous_and_the_model_as_it_was() -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = tiny("Gemma2Config", sliding_window=64, layer_types=kinds, query_pre_attn_scalar=16).train()
    table = calibrate(model, prompts(1), steps=3, options={"block_size": 64})
    assert table.values[0] == (1.0,) * 4
    assert min(table.values[1]) < 1
    assert model.training
    assert model.config._attn_implementation == "eager"


def test_tables_are_saved_and_fit_their_model(tmp_path: Path) -> None:
    table = ThresholdTable("m", "xattention", "threshold", [[0.5, 0.25]], {"stride": 8}, 0.9, "p05", {"recall": 0.93})  # type: ignore[arg-type]
    file = tmp_path / "table.json"
    table.save(file)
    assert ThresholdTable.load(file) == table
    assert table.attention_options() == {"method": "xattention", "stride": 8, "threshold": [[0.5, 0.25]]}
    assert sparseattn.XAttentionConfig(stride=8, threshold=((0.5, 0.25),)) == table.config()
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2)
    threshold.check_shape(table.values, config)
    for values in ((0.5,), ((0.5, 0.5), (0.5, 0.5))):
        with pytest.raises(ValueError, match=r"threshold: expected .* another model's"):
            threshold.check_shape(values, config)


def test_shipped_tables_are_those_of_shipped_models() -> None:
    tables = threshold.available()
    assert {table.model for table in tables} == set(models.names())
    for table in tables:
        config = transformers.AutoConfig.from_pretrained(models.path(table.model))
        threshold.check_shape(table.values, config)
        assert table.measured["lowest_recall"] >= table.target
        assert threshold.find(table.model, table.method, table.options) is table
    assert threshold.find("no such model") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "streaming"}, "method: expected one of xattention"),
        ({"target": 0}, "target"),
        ({"target": 1.5}, "target"),
        ({"statistic": "max"}, "statistic"),
        ({"steps": 0}, "steps"),
        ({"prompts": []}, "prompts"),
        ({"options": {"threshold": 0.5}}, r"options\['threshold'\].*fitted"),
        ({"method": "landmark", "options": {"density": 0.5}}, r"options\['density'\].*fitted"),
        ({"method": "landmark", "options": {"group_shared": True}}, r"options\['group_shared'\].*fitted"),
        ({"options": {"strides": 8}}, "strides.*unknown option"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(None, **{"prompts": prompts(1), **arguments})


def test_prompts_are_token_ids() -> None:
    for bad in (torch.rand(1, 8), torch.ones(8, dtype=torch.long), "text"):
        with pytest.raises(TypeError, match="prompts: expected int64 token ids"):
            calibrate(None, [bad])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "keys"),
        ({"more": 1}, "keys"),
        ({"values": [0.5]}, "values"),
        ({"values": [[0.5], [0.5, 0.5]]}, "threshold"),
        ({"method": "best"}, "method"),
    ],
)
def test_bad_files_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"model": "m", "method": "xattention", "option": "threshold", "values": [[0.5]]}
    merged = {name: value for name, value in {**good, **change}.items() if value is not None}
    file = tmp_path / "table.json"
    file.write_text(json.dumps(merged))
    with pytest.raises(ValueError, match=message):
        ThresholdTable.load(file)
