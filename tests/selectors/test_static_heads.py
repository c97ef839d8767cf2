"""A method for each head in one mask, and the tables that say which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn import selectors
from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.selectors import (
    HeadsConfig,
    configure,
    heads,
    load_head_config,
    load_head_table,
    retrieval_heads,
    save_head_table,
)

CLASSES: dict[str, dict[str, Any]] = {
    "local": {"method": "streaming", "num_sink_tokens": 64, "num_local_tokens": 64},
    "found": {"method": "topk", "num_blocks": 3},
    "shared": {"method": "flashprefill", "threshold": 0.9, "group_shared": True, "num_last_tokens": 0},
}


def make(sq: int, sk: int, heads: int = 8, kv_heads: int = 4, batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, sq, heads, 16) * 2, torch.randn(batch, sk, kv_heads, 16)


def alone(name: str, q: Tensor, k: Tensor, **call: Any) -> Tensor:
    """The blocks of every query head by one class."""
    if name == "dense":
        config = HeadsConfig("dense", block_size=64)
        return heads(q, k, config, **call).expand_heads(q.shape[-2]).to_blocks()
    options = {"block_size": 64, **CLASSES[name]}
    mask = selectors.get(options.pop("method")).select(q, k, configure_class(name), **call)
    return mask.expand_heads(q.shape[-2]).to_blocks()


def configure_class(name: str) -> Any:
    options = {"block_size": 64, **CLASSES[name]}
    return configure(options.pop("method"), options)


def check(mask: BlockMask, names: tuple[str, ...], q: Tensor, k: Tensor, **call: Any) -> None:
    """Every query head has the lists its class gives it alone."""
    got = mask.validate().expand_heads(q.shape[-2]).to_blocks()
    spread = q.shape[-2] // len(names)
    for h in range(q.shape[-2]):
        want = alone(names[h // spread], q, k, **call)[:, h]
        assert torch.equal(got[:, h].expand_as(want) if got.shape[0] == 1 else got[:, h], want.expand_as(got[:, h])), h


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("names", "lists"),
    [
        (("dense", "local", "local", "dense"), 4),
        (("local", "shared", "dense", "shared"), 4),
        (("found", "local", "dense", "found"), 8),
        (("found", "shared", "local", "shared"), 8),
        (("dense", "found", "local", "local", "found", "found", "dense", "local"), 8),
        (("shared",) * 4, 4),
        (("found",) * 4, 8),
        (("local",) * 8, 1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_head_gets_its_class(names: tuple[str, ...], lists: int, causal: bool) -> None:
    q, k = make(200, 333, batch=2)
    mask = heads(q, k, HeadsConfig(names, CLASSES, block_size=64), causal=causal)
    assert mask.heads == lists
    check(mask, names, q, k, causal=causal)


def test_ragged_batches_and_odd_groups() -> None:
    names = ("local", "found", "dense")
    q, k = torch.randn(2, 150, 6, 16), torch.randn(2, 200, 3, 16)
    ranges = {
        "ranges_q": torch.tensor([[0, 150], [20, 90]], dtype=torch.int32),
        "ranges_k": torch.tensor([[0, 200], [5, 105]], dtype=torch.int32),
    }
    mask = heads(q, k, HeadsConfig(names, CLASSES, block_size=64), **ranges)
    assert mask.seqused_q is not None
    assert mask.seqused_q.tolist() == [150, 70]
    check(mask, names, q, k, **ranges)


def test_thresholds_per_head_count_all_heads() -> None:
    q, k = make(300, 300)
    classes = {"tuned": {"method": "xattention", "threshold": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}}
    config = HeadsConfig(("streaming", "tuned", "streaming", "tuned"), classes, block_size=64)
    got = heads(q, k, config).to_blocks()
    whole = configure("xattention", {"threshold": classes["tuned"]["threshold"], "block_size": 64})
    expected = selectors.get("xattention").select(q, k, whole).to_blocks()
    for h in (2, 3, 6, 7):
        assert torch.equal(got[:, h], expected[:, h])


def test_columns_come_along() -> None:
    if "minference" not in selectors.SELECTORS:
        pytest.skip("no selector lists columns")
    q, k = make(300, 300)
    config = HeadsConfig(("local", "v", "dense", "v"), {**CLASSES, "v": {"method": "minference"}}, block_size=64)
    mask = heads(q, k, config).validate()
    whole = selectors.get("minference").select(q, k, configure("minference", {"block_size": 64}))
    assert torch.equal(mask.to_dense()[:, 2:4], whole.to_dense()[:, 2:4])
    assert torch.equal(mask.to_dense()[:, 6:8], whole.to_dense()[:, 6:8])


def test_one_launch_attends_all_classes() -> None:
    q, k = make(200, 200)
    v = torch.randn_like(k)
    names = ("dense", "local", "shared", "dense")
    o = block_sparse_attention(q, k, v, heads(q, k, HeadsConfig(names, CLASSES, block_size=64)))
    for g, name in enumerate(names):
        blocks = BlockMask.from_blocks(alone(name, q, k), block_size=64, seq_lens=(200, 200), causal=True)
        rows = slice(2 * g, 2 * g + 2)
        torch.testing.assert_close(o[:, :, rows], block_sparse_attention(q, k, v, blocks)[:, :, rows])


def test_classes_per_layer() -> None:
    q, k = make(200, 200)
    config = HeadsConfig((("dense",) * 4, ("local",) * 4), CLASSES, block_size=64)
    assert heads(q, k, config, layer=0).density == 1.0
    assert torch.equal(heads(q, k, config, layer=1).to_blocks()[0, 0], alone("local", q, k)[0, 0])
    for layer in (None, 2):
        with pytest.raises(ValueError, match=r"layer: expected an int in \[0, 2\)"):
            heads(q, k, config, layer=layer)


def test_it_compiles_whole() -> None:
    q, k = make(200, 200)
    config = HeadsConfig(("dense", "local", "shared", "dense"), CLASSES, block_size=64)
    compiled = torch.compile(lambda q, k: heads(q, k, config).to_blocks(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k), heads(q, k, config).to_blocks())


def test_config_round_trips_through_json() -> None:
    config = HeadsConfig((("dense", "found"), ("local", "local")), CLASSES, block_size=64)
    again = configure("heads", json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"heads": ["dense", "lokal"], "classes": CLASSES},
            "heads: expected names among dense, streaming, local, found",
        ),
        ({"heads": []}, "heads: expected a name, names per head"),
        ({"heads": [["dense"], ["dense", "dense"]]}, "heads: expected a name, names per head, or equally long rows"),
        ({"heads": [0, 1]}, "heads: expected names of classes"),
        ({"heads": "a", "classes": {"a": {"method": "quest"}}}, "method: expected one of"),
        ({"heads": "a", "classes": {"a": {"method": "heads"}}}, "a method other than 'heads'"),
        ({"heads": "a", "classes": {"a": {}}}, r"classes\['a'\]: expected a method"),
        ({"heads": "a", "classes": {"a": {"method": "dense", "x": 1}}}, "no options with method 'dense'"),
        ({"heads": "a", "classes": {"a": {"method": "streaming", "tau": 1}}}, "tau: expected an option of Streaming"),
        ({"heads": "a", "classes": {"a": {"method": "streaming", "block_size": 64}}}, "block_size: expected 128 like"),
        ({"heads": "dense", "classes": 3}, "classes: expected a dict"),
        ({"block_size": 100}, "block_size: expected one of"),
    ],
)
def test_bad_configs(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure("heads", options)


def test_tables_of_another_model() -> None:
    q, k = make(64, 64)
    with pytest.raises(ValueError, match=r"heads: expected 4 names, one per key head, or 8, .*another model"):
        heads(q, k, HeadsConfig(("dense",) * 5))
    with pytest.raises(TypeError, match="config: expected a HeadsConfig"):
        heads(q, k, object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impl: expected"):
        heads(q, k, impl="cuda")


class TestTables:
    TABLE = ((0.9, 0.2, 0.51), (0.05, 0.7, 0.2))

    def test_round_trip(self, tmp_path: Path) -> None:
        save_head_table(tmp_path / "masks.tsv", self.TABLE)
        assert load_head_table(tmp_path / "masks.tsv") == load_head_table(tmp_path) == self.TABLE

    def test_published_files(self, tmp_path: Path) -> None:
        # Learned numbers overshoot [0, 1] a little; the sizes lie beside them.
        (tmp_path / "full_attention_heads.tsv").write_text("1.02\t0.1\t0.6\n-0.01\t0.7\t0.2\n\n")
        (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 256, "lr": 0.02}')
        assert load_head_table(tmp_path) == ((1.0, 0.1, 0.6), (0.0, 0.7, 0.2))
        config = load_head_config(tmp_path)
        assert config.heads == (("dense", "local", "dense"), ("local", "dense", "local"))
        _, local = config.config_of("local")
        assert local is not None
        assert local.to_dict() == {"num_sink_tokens": 64, "num_local_tokens": 255, "block_size": 128}
        other = load_head_config(
            tmp_path, sparsity=0.5, retrieval={"method": "landmark"}, num_sink_tokens=0, num_local_tokens=100,
            block_size=64,
        )  # fmt: skip
        assert other.heads == (("retrieval", "local", "retrieval"), ("local", "retrieval", "local"))
        assert other.config_of("local")[1].to_dict()["num_local_tokens"] == 100  # type: ignore[union-attr]
        q, k = torch.randn(1, 200, 6, 16), torch.randn(1, 200, 3, 16)
        assert heads(q, k, other, layer=1).heads == 6

    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
    def test_sparsity_is_exact(self, sparsity: float) -> None:
        kept = retrieval_heads(self.TABLE, sparsity=sparsity)
        assert sum(not full for row in kept for full in row) == round(6 * sparsity)
        lowest = [
            v for row, full in zip(self.TABLE, kept, strict=True) for v, f in zip(row, full, strict=True) if not f
        ]
        rest = [v for row, full in zip(self.TABLE, kept, strict=True) for v, f in zip(row, full, strict=True) if f]
        assert max(lowest, default=0) <= min(rest, default=1)

    def test_ties_and_thresholds(self) -> None:
        assert retrieval_heads(self.TABLE, sparsity=1 / 3) == ((True, True, True), (False, True, False))
        assert retrieval_heads(self.TABLE, threshold=0.2) == ((True, True, True), (False, True, True))
        assert retrieval_heads(self.TABLE) == ((True, False, True), (False, True, False))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1\t0\n1\n", ":2: expected 2 numbers like the rows above, got 1"),
            ("1\tx\n", ":1: expected numbers separated by tabs"),
            ("1\tnan\n", ":1: expected numbers, got NaN"),
            ("", "expected one row of numbers a layer, got an empty file"),
        ],
    )
    def test_bad_files(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "masks.tsv").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_head_table(tmp_path)

    def test_bad_calls(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="which does not exist"):
            load_head_table(tmp_path / "none.tsv")
        with pytest.raises(FileNotFoundError, match=r"expected one \.tsv file"):
            load_head_table(tmp_path)
        with pytest.raises(ValueError, match="threshold: expected None with sparsity"):
            retrieval_heads(self.TABLE, sparsity=0.5, threshold=0.5)
        with pytest.raises(ValueError, match=r"sparsity: expected a number in \[0, 1\]"):
            retrieval_heads(self.TABLE, sparsity=1.5)
        save_head_table(tmp_path / "masks.tsv", self.TABLE)
        (tmp_path / "config.json").write_text('{"sink_size": -4}')
        with pytest.raises(ValueError, match="sink_size: expected an int of at least 0, got -4"):
            load_head_config(tmp_path)
