"""MInference as a selector: its definition, its invariants, its configs, and attention over what it keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import vertical_slash_oracle as oracle
from torch import Tensor

from sparseattn import block_sparse_attention
from sparseattn.masks import BlockMask
from sparseattn.ops.scores import unsupported_reason
from sparseattn.selectors import MInferenceConfig, configure, minference, minference_patterns

PATTERNS = (
    ("vertical_slash", 25, 12),
    ("a_shape", 40, 50),
    ("tri_shape", 8, 20, 50),
    ("block_sparse", 2),
    ("dense",),
    ("vertical_slash", 3, 40),
)
CONFIG = MInferenceConfig(PATTERNS, num_sink_tokens=4, num_local_tokens=9, block_size=32)
TWO = MInferenceConfig(("vertical_slash", 25, 12), num_sink_tokens=4, num_local_tokens=9, block_size=32)


def make(sq: int, sk: int, heads: int = 6, kv_heads: int = 2, batch: int = 1, dim: int = 16) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, heads, dim, dtype=torch.float64) * 2
    return q, torch.randn(batch, sk, kv_heads, dim, dtype=torch.float64)


def changed(config: MInferenceConfig, **options: Any) -> MInferenceConfig:
    return MInferenceConfig(**{**config.to_dict(), **options})


def parts(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Listed blocks and lone columns, bool ``[B, H, MB, NB]`` and ``[B, H, MB, Sk]``."""
    mask.validate()
    rows = mask.to_blocks()
    columns = torch.zeros(*rows.shape[:3], mask.seq_lens[1] + 1, dtype=torch.bool)
    if mask.column_indices is not None:
        index = mask.column_indices.long()
        columns.scatter_(-1, torch.where(index < 0, mask.seq_lens[1], index), True)
    return rows, columns[..., :-1]


def same(a: BlockMask, b: BlockMask) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


SHAPES = [(320, 320, True), (301, 301, True), (100, 333, True), (70, 40, True), (3, 7, True), (130, 170, False)]


@pytest.mark.parametrize(("sq", "sk", "causal"), SHAPES)
@pytest.mark.parametrize("block", [16, 64])
def test_follows_the_definition(sq: int, sk: int, causal: bool, block: int) -> None:
    q, k = make(sq, sk)
    rows, columns = parts(minference(q, k, changed(CONFIG, block_size=block), causal=causal))
    for h, pattern in enumerate(PATTERNS):
        lists, lone = oracle.minference(q[0, :, h], k[0, :, h // 3], pattern, (4, 9), block, causal)
        assert [set(row.nonzero().flatten().tolist()) for row in rows[0, h]] == lists, pattern
        assert [set(row.nonzero().flatten().tolist()) for row in columns[0, h]] == lone, pattern
    assert columns.any() or sk < 100 or block > 16


def test_without_columns_their_blocks_are_kept_whole() -> None:
    q, k = make(301, 333)
    mask = minference(q, k, CONFIG)
    whole = minference(q, k, changed(CONFIG, columns=False))
    assert whole.column_indices is None
    assert torch.equal(parts(whole)[0], parts(mask.whole_blocks())[0])


def test_adaptive_budget_is_a_share_of_the_keys() -> None:
    q, k = make(301, 333)
    adaptive = minference(q, k, changed(TWO, adaptive_budget=0.3))
    assert same(adaptive, minference(q, k, changed(TWO, patterns=("vertical_slash", 99 // 5, 99 * 4 // 5))))
    # Other patterns have no budget of that kind.
    some = minference(q, k, changed(CONFIG, adaptive_budget=0.3))
    assert torch.equal(parts(some)[0][:, 1:5], parts(minference(q, k, CONFIG))[0][:, 1:5])


def test_group_shared_is_the_union() -> None:
    q, k = make(301, 333)
    mask = minference(q, k, CONFIG)
    shared = minference(q, k, changed(CONFIG, group_shared=True))
    assert shared.heads == 2
    # Tokens that any head of a group keeps, whether as blocks or columns, are kept by the group, and no others.
    union = mask.to_dense().unflatten(1, (2, 3)).any(2)
    assert torch.equal(shared.validate().to_dense(), union)


def test_batch_is_a_loop_and_groups_are_repeated_keys() -> None:
    q, k = make(200, 300, batch=3)
    whole = parts(minference(q, k, CONFIG))
    for b in range(3):
        alone = parts(minference(q[b : b + 1], k[b : b + 1], CONFIG))
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(whole, alone, strict=True))
    assert same(minference(q, k, CONFIG), minference(q, k.repeat_interleave(3, 2), CONFIG))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("adaptive", [None, 0.25])
def test_packed_is_a_loop(causal: bool, adaptive: float | None) -> None:
    lengths = [(130, 130), (64, 200), (0, 10), (7, 65), (50, 20)]
    config = changed(CONFIG, adaptive_budget=adaptive)
    each = [make(sq, sk) for sq, sk in lengths]
    q, k = (torch.cat([p[i][0] for p in each]) for i in (0, 1))
    cu_q, cu_k = (
        torch.tensor([0, *[n[i] for n in lengths]], dtype=torch.int32).cumsum(0, dtype=torch.int32) for i in (0, 1)
    )
    kept = parts(minference(q, k, config, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=130))
    for b, (sq, _) in enumerate(lengths):
        for ours, alone in zip(kept, parts(minference(*each[b], config, causal=causal)), strict=True):
            assert torch.equal(ours[b, :, : alone.shape[2], : alone.shape[3]], alone[0]), b
            assert not ours[b, :, -(-sq // 32) :].any()


def test_ranges_are_a_loop_and_padding_is_never_read() -> None:
    q, k = make(150, 220, batch=3)
    ranges_q = torch.tensor([[0, 150], [30, 150], [0, 65]], dtype=torch.int32)
    ranges_k = torch.tensor([[0, 220], [100, 220], [0, 65]], dtype=torch.int32)
    q[1, :30] = math.nan
    k[2, 65:] = math.nan
    kept = parts(minference(q, k, CONFIG, ranges_q=ranges_q, ranges_k=ranges_k))
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(ranges_q.tolist(), ranges_k.tolist(), strict=True)):
        for ours, alone in zip(kept, parts(minference(q[b : b + 1, q0:q1], k[b : b + 1, k0:k1], CONFIG)), strict=True):
            assert torch.equal(ours[b, :, : alone.shape[2], : alone.shape[3]], alone[0])
            assert not ours[b, :, alone.shape[2] :].any()


def test_static_and_ranked_patterns_are_the_same_in_chunks() -> None:
    q, k = make(320, 320, 2)
    config = changed(CONFIG, patterns=(("a_shape", 40, 50), ("block_sparse", 2)))
    whole = minference(q, k, config).to_dense()
    chunk = minference(q[:, 64:192], k[:, :192], config).to_dense()
    assert torch.equal(chunk, whole[:, :, 64:192, :192])


def test_empty_calls() -> None:
    for sq, sk in ((0, 5), (5, 0), (0, 0)):
        mask = minference(torch.zeros(2, sq, 6, 16), torch.zeros(2, sk, 2, 16), CONFIG)
        assert not parts(mask)[0].any()


def test_attention_over_blocks_and_columns() -> None:
    q, k = (x.float() for x in make(200, 200))
    v = torch.randn(1, 200, 2, 16)
    mask = minference(q, k, CONFIG)
    assert mask.column_indices is not None
    seen = mask.to_dense()
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(3, 2)) / 4
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(3, 2))
    torch.testing.assert_close(block_sparse_attention(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sq", "sk", "shared"), [(70, 333, False), (40, 150, True)])
def test_triton_matches_the_reference(sq: int, sk: int, shared: bool, device: str) -> None:
    q, k = (x.float().to(device) for x in make(sq, sk))
    if unsupported_reason(q, k, impl="triton") is not None:
        pytest.skip("no interpreter here")
    config = changed(CONFIG, group_shared=shared)
    expected = minference(q.double(), k.double(), config, impl="reference").to_dense()
    assert (minference(q, k, config, impl="triton").to_dense() != expected).float().mean() <= 0.005


def test_operator_passes_opcheck_and_compiles_whole() -> None:
    q, k = (x.float() for x in make(100, 130, 2))
    arguments = (
        q,
        k,
        None,
        None,
        None,
        None,
        1,
        100,
        130,
        [25, 12, 0, 0, 0, 0, 0, 0, 8, 20, 50, 2],
        -1.0,
        64,
        4,
        9,
        32,
    )
    arguments = (*arguments, 0.25, True, True, False, 2, "auto")
    torch.library.opcheck(torch.ops.sparseattn.minference_blocks.default, arguments)

    def select(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = minference(q, k, TWO)
        return mask.kv_num_blocks, mask.column_indices

    compiled = torch.compile(select, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(q, k), select(q, k), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


# ---- configs ----


def test_config_round_trips_through_json(tmp_path: Path) -> None:
    layers = [list(PATTERNS), [("dense",)] * 6]
    for config in (MInferenceConfig(), CONFIG, changed(CONFIG, patterns=layers, adaptive_budget=0.1)):
        assert configure("minference", json.loads(json.dumps(config.to_dict()))) == config
        assert hash(config) == hash(configure("minference", config.to_dict()))
    for patterns in (PATTERNS[0], PATTERNS, layers):
        minference_patterns.save(patterns, tmp_path / "patterns.json")
        assert MInferenceConfig.from_json(tmp_path / "patterns.json").patterns == minference_patterns.freeze(patterns)


def test_published_files_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "published.json"
    layer = {"1": ["stream_llm", 100, 800, 0.9], "0": ["vertical_and_slash", 1000, 6096, 336382]}
    path.write_text(json.dumps([layer, layer]))
    config = MInferenceConfig.from_json(path, block_size=64)
    assert config.patterns == ((("vertical_slash", 1000, 6096), ("a_shape", 100, 800)),) * 2
    assert config.block_size == 64


def test_patterns_per_layer() -> None:
    q, k = make(64, 64, 2, 1)
    config = changed(CONFIG, patterns=[[("dense",), ("a_shape", 0, 1)], [("a_shape", 0, 1), ("dense",)]])
    first, second = (minference(q, k, config, layer=layer).kv_num_blocks[0] for layer in (0, 1))
    assert first.tolist() == second.flip(0).tolist()
    for layer in (None, 2, -1):
        with pytest.raises(ValueError, match=r"layer: expected an int in \[0, 2\)"):
            minference(q, k, config, layer=layer)
    with pytest.raises(ValueError, match="patterns: expected 3 entries, one per query head, got 2 entries"):
        minference(*make(64, 64, 3, 1), config, layer=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ("diagonal", 3)}, "patterns: expected a kind among vertical_slash, a_shape"),
        ({"patterns": ("vertical_slash", 3)}, "patterns: expected 2 ints >= 1 after 'vertical_slash'"),
        ({"patterns": ("vertical_slash", 0, 3)}, "patterns: expected 2 ints >= 1 after 'vertical_slash'"),
        ({"patterns": ("a_shape", 0, 0)}, "patterns: expected 2 ints >= 0 after 'a_shape', not all 0"),
        ({"patterns": ("a_shape", 100, 800, 64)}, "patterns: expected 2 ints >= 0 after 'a_shape'"),
        ({"patterns": ("block_sparse", True)}, "patterns: expected 1 ints >= 1 after 'block_sparse'"),
        ({"patterns": []}, "patterns: expected a pattern, patterns per head"),
        ({"patterns": [[("dense",)], [("dense",), ("dense",)]]}, "patterns: expected as many heads in every layer"),
        ({"patterns": [{"0": ["dense"], "2": ["dense"]}]}, r"patterns: expected heads numbered 0\.\.1, got 0, 2"),
        ({"vertical_size": 0}, "vertical_size: expected an int >= 1, got 0"),
        ({"adaptive_budget": 0}, r"adaptive_budget: expected a share in \(0, 1\], or None, got 0"),
        ({"adaptive_budget": math.nan}, r"adaptive_budget: expected a share in \(0, 1\], or None, got nan"),
        ({"num_queries": 50}, r"num_queries: expected one of \(16, 32, 64, 128\), got 50"),
        ({"block_size": 96}, r"block_size: expected one of \(16, 32, 64, 128, 256\), got 96"),
        ({"num_sink_tokens": -1}, "num_sink_tokens: expected an int >= 0, got -1"),
        ({"columns": 1}, "columns: expected a bool, got 1"),
        ({"slashes": 5}, "slashes: expected an option of MInferenceConfig"),
    ],
)
def test_bad_config(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure("minference", options)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("[")
    with pytest.raises(ValueError, match="path: expected a JSON file"):
        MInferenceConfig.from_json(tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError):
        MInferenceConfig.from_json(tmp_path / "absent.json")


def test_config_of_another_method() -> None:
    q, k = make(64, 64)
    with pytest.raises(TypeError, match="config: expected a MInferenceConfig, got dict"):
        minference(q, k, {"vertical_size": 5})  # type: ignore[arg-type]
