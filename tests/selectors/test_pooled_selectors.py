"""flashprefill, bound, topk and oracle: what their masks promise, and that they find what they should."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn import selectors
from sparseattn.masks import BlockMask
from sparseattn.ops.scores import pooled_scores
from sparseattn.selectors import (
    BoundConfig,
    FlashPrefillConfig,
    OracleConfig,
    TopKConfig,
    XAttentionConfig,
    configure,
    flashprefill,
    oracle,
    topk,
    xattention,
)

# Settings that choose some blocks and leave others at a few hundred tokens; lists of a row depend on that row alone.
LONE = {"num_sink_tokens": 64, "num_local_tokens": 0, "num_last_tokens": 0}
ROWS = {"rule": "cumulative", "threshold": 0.4, "row_softmax": True, "page_size": 16}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flashprefill": ("flashprefill", {"threshold": 0.98, **LONE}),
    "flashprefill_rows": ("flashprefill", {**ROWS, **LONE}),
    "bound": ("bound", {"threshold": 0.3}),
    "bound_topk": ("bound", {"rule": "topk", "num_blocks": 3, "aggregate": "max"}),
    "topk": ("topk", {"density": 0.4}),
    "topk_antidiagonal": ("topk", {"density": 0.4, "estimator": "antidiagonal"}),
    "oracle": ("oracle", {"threshold": 0.8}),
    "oracle_mass": ("oracle", {"rule": "cumulative", "threshold": 0.6, "aggregate": "mean"}),
    "xattention_peak": ("xattention", {"rule": "global", "aggregate": "max", "threshold": 0.5}),
}  # fmt: skip
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def make(sq: int, sk: int, heads: int = 4, kv_heads: int = 2, batch: int = 1, dim: int = 16) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, heads, dim, dtype=torch.float64) * 2
    return q, torch.randn(batch, sk, kv_heads, dim, dtype=torch.float64)


def run(setting: tuple[str, dict[str, Any]], q: Tensor, k: Tensor, **call: Any) -> Tensor:
    """The blocks a setting lists, blocks of 64."""
    name, options = setting
    mask = selectors.get(name).select(q, k, configure(name, {"block_size": 64, **options}), **call)
    return mask.validate().to_blocks()


def blocks(mask: BlockMask) -> Tensor:
    return mask.validate().to_blocks()


@settings
def test_a_chunk_of_queries_is_those_rows_of_the_whole(setting: tuple) -> None:
    q, k = make(384, 384)
    whole = run(setting, q, k)
    assert 0.2 < whole.sum() / (4 * 21) < 0.95  # the setting chooses
    for start, stop in ((64, 384), (192, 256), (0, 64)):
        chunk = run(setting, q[:, start:stop], k[:, :stop])
        assert torch.equal(chunk, whole[:, :, start // 64 : stop // 64, : chunk.shape[-1]])
    ragged = run(setting, q[:, 128:301], k[:, :301])
    assert torch.equal(ragged[:, :, :2], whole[:, :, 2:4, :5])  # all but the last row of blocks, which is short


@settings
def test_the_future_does_not_matter(setting: tuple) -> None:
    q, k = make(320, 320)
    before = run(setting, q, k)
    q[:, 192:] += 7
    k[:, 192:] -= 7
    after = run(setting, q, k)
    assert torch.equal(before[:, :, :3], after[:, :, :3])


@settings
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_batches_are_a_loop(setting: tuple, causal: bool) -> None:
    lengths = [(130, 130), (64, 200), (0, 10), (7, 65)]
    parts = [make(sq, sk) for sq, sk in lengths]
    q, k = (torch.cat([p[i][0] for p in parts]) for i in (0, 1))
    cu_q, cu_k = (
        torch.tensor([0, *[n[i] for n in lengths]], dtype=torch.int32).cumsum(0, dtype=torch.int32) for i in (0, 1)
    )
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 130, "max_seqlen_k": 200}
    kept = run(setting, q, k, causal=causal, **packed)
    for b, (sq, sk) in enumerate(lengths):
        if sq:
            alone = run(setting, *parts[b], causal=causal)[0]
            assert torch.equal(kept[b, :, : alone.shape[1], : alone.shape[2]], alone)
        assert not kept[b, :, -(-sq // 64) :].any()
        assert not kept[b, :, :, -(-sk // 64) :].any()
    # The same sequences in padded rows.
    q, k = torch.full((4, 140, 4, 16), math.nan).double(), torch.full((4, 210, 2, 16), math.nan).double()
    for b, (sq, sk) in enumerate(lengths):
        q[b, 5 : 5 + sq], k[b, 3 : 3 + sk] = parts[b][0][0], parts[b][1][0]
    ranges_q, ranges_k = (
        torch.tensor([[at, at + n[i]] for n in lengths], dtype=torch.int32) for i, at in ((0, 5), (1, 3))
    )
    padded = run(setting, q, k, causal=causal, ranges_q=ranges_q, ranges_k=ranges_k)
    assert torch.equal(padded[:, :, :3, :4], kept)


@settings
def test_grouped_heads_are_repeated_keys_and_batches_a_loop(setting: tuple) -> None:
    q, k = make(200, 300, batch=2)
    whole = run(setting, q, k)
    assert torch.equal(whole, run(setting, q, k.repeat_interleave(2, 2)))
    assert torch.equal(whole[1:], run(setting, q[1:], k[1:]))
    assert torch.equal(whole, run(setting, q, k))


def test_a_group_lists_what_its_energy_wants() -> None:
    q, k = make(300, 300)
    config = FlashPrefillConfig(0.5, block_size=64, num_sink_tokens=0, num_local_tokens=0, num_last_tokens=0)
    shared = blocks(flashprefill(q, k, FlashPrefillConfig.from_dict({**config.to_dict(), "group_shared": True})))
    energy = pooled_scores(q, k, page_size=64, block_size=64).exp().unflatten(1, (2, 2)).mean(2)
    want = energy >= 0.5 * energy.amax(-1, keepdim=True)
    m, n = torch.arange(5)[:, None], torch.arange(5)
    assert torch.equal(shared, ((want & (energy > 0)) | (n == m)) & (n <= m))


def test_flashprefill_keeps_what_its_authors_force() -> None:
    # Two sink blocks, the diagonal and three before it, and everything in the last two rows of blocks.
    q, k = torch.zeros(1, 128 * 10, 1, 16), torch.zeros(1, 128 * 10, 1, 16)
    q[..., 0] = 30
    k[:, 128 * 3 : 128 * 4, :, 0] = 30  # one loud block
    kept = blocks(flashprefill(q, k))[0, 0]
    m, n = torch.arange(10)[:, None], torch.arange(10)
    expected = (n < 2) | (m - n < 4) | (n == 3) | (m >= 8)
    assert torch.equal(kept, expected & (n <= m))
    assert flashprefill(q, k, FlashPrefillConfig(page_size=16)).kv_num_blocks.shape == (1, 1, 10)


def test_the_oracle_keeps_what_it_says() -> None:
    q, k = make(256, 256, heads=1, kv_heads=1)
    logits = (q[0, :, 0] @ k[0, :, 0].T / 4).masked_fill(torch.ones(256, 256).triu(1).bool(), -math.inf)
    p = logits.softmax(-1).view(4, 64, 4, 64).sum(-1)
    free = {"num_sink_tokens": 0, "keep_recent": False, "block_size": 64}
    peak = blocks(oracle(q, k, OracleConfig(0.3, **free)))[0, 0]
    assert torch.equal(peak, p.amax(1) >= 0.3)
    mass = blocks(oracle(q, k, OracleConfig(0.6, "cumulative", "mean", **free)))[0, 0]
    share = p.mean(1)
    assert ((share * mass).sum(-1) >= 0.6).all()
    least = share.masked_fill(~mass, math.inf).amin(-1)
    assert (((share * mass).sum(-1) - least < 0.6) | (mass.sum(-1) == 1)).all()
    best = blocks(oracle(q, k, OracleConfig(rule="topk", num_blocks=2, aggregate="mean", **free)))[0, 0]
    assert torch.equal(best.sum(-1), torch.tensor([1, 2, 2, 2]))
    assert (share.masked_fill(best, -1).amax(-1) <= share.masked_fill(~best, 2).amin(-1)).all()


@pytest.mark.parametrize("density", [0.15, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("method", ["oracle", "xattention", "flashprefill"])
def test_one_threshold_hits_a_density(method: str, density: float) -> None:
    q, k = make(1280, 1280, dim=8)
    options = {"rule": "global", "density": density, "block_size": 64}
    if method == "flashprefill":
        options.update(LONE)
    mask = selectors.get(method).select(q, k, configure(method, options))
    visible = 4 * 20 * 21 // 2
    assert mask.kv_num_blocks.sum().item() == max(round(density * visible), 4 * 39)  # sink and diagonal: 39 a head


def test_one_query_that_wants_one_key_is_heard() -> None:
    # One query in 64 wants one key: it fills the largest row, not the mean, and the mean of the keys drowns it.
    q, k = torch.randn(1, 512, 1, 64), torch.randn(1, 512, 1, 64)
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    q[:, 420] += 12 * direction
    k[:, 70] += 12 * direction
    rest = {"num_blocks": 3, "block_size": 64}
    row, block = 420 // 64, 70 // 64
    assert blocks(topk(q, k, TopKConfig(estimator="exact", aggregate="max", **rest)))[0, 0, row, block]
    bound = BoundConfig(rule="topk", page_size=16, **rest)
    assert blocks(selectors.bound(q, k, bound))[0, 0, row, block]
    assert not blocks(topk(q, k, TopKConfig(**rest)))[0, 0, row, block]


def test_topk_is_exact_and_narrow() -> None:
    q, k = make(640, 640)
    for estimator in ("mean", "bound", "antidiagonal", "exact"):
        mask = topk(q, k, TopKConfig(4, estimator=estimator, block_size=64)).validate()
        assert mask.kv_indices.shape[-1] == 4
        assert mask.kv_num_blocks[0, 1].tolist() == [1, 2, 3, *[4] * 7]
    share = topk(q, k, TopKConfig(density=0.5, block_size=64))
    assert share.kv_num_blocks[0, 0].tolist() == [1, 2, *[math.floor(n / 2 + 0.5) for n in range(3, 11)]]


def test_xattention_rules_agree_with_its_own() -> None:
    q, k = make(512, 512)
    own = blocks(xattention(q, k, XAttentionConfig(0.7, block_size=64)))
    capped = blocks(xattention(q, k, XAttentionConfig(0.7, block_size=64, max_blocks=100)))
    assert torch.equal(own, capped)  # the general operator, a cap that never binds
    narrow = xattention(q, k, XAttentionConfig(0.7, block_size=64, max_blocks=3))
    assert narrow.kv_indices.shape[-1] == 3
    assert not (blocks(narrow) & ~own).any()


def test_thresholds_per_list_and_layer() -> None:
    q, k = make(320, 320)
    base = {"block_size": 64, "num_last_tokens": 0, "num_local_tokens": 0}
    single = {t: blocks(flashprefill(q, k, FlashPrefillConfig(t, **base))) for t in (0.9, 0.1, 0.5, 0.0)}
    table = ((0.9, 0.1, 0.5, 0.0), (0.1, 0.1, 0.1, 0.1))
    got = blocks(flashprefill(q, k, FlashPrefillConfig(table, **base), layer=0))
    assert all(torch.equal(got[:, h], single[t][:, h]) for h, t in enumerate(table[0]))
    assert torch.equal(blocks(flashprefill(q, k, FlashPrefillConfig(table, **base), layer=1)), single[0.1])
    with pytest.raises(ValueError, match=r"layer: expected an int in \[0, 2\)"):
        flashprefill(q, k, FlashPrefillConfig(table, **base))
    with pytest.raises(ValueError, match="threshold: expected 2 values"):
        flashprefill(q, k, FlashPrefillConfig(table, **base, group_shared=True), layer=0)


def test_configs_round_trip_through_json() -> None:
    for name, config in (
        ("flashprefill", FlashPrefillConfig((0.5, 0.25), num_last_tokens=0)),
        ("bound", BoundConfig(rule="global", density=0.1, page_size=32)),
        ("oracle", OracleConfig(((0.5, 0.25), (1.0, 0.0)))),
        ("topk", TopKConfig(7, estimator="bound")),
        ("xattention", XAttentionConfig(rule="topk", num_blocks=3)),
    ):
        assert configure(name, json.loads(json.dumps(config.to_dict()))) == config
        assert hash(config) == hash(type(config).from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("flashprefill", {"threshold": 1.5}, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ("flashprefill", {"threshold": ((0.5,), (0.5, 0.5))}, "threshold: expected a number, numbers per head"),
        ("flashprefill", {"rule": "global"}, "row_softmax: expected True with rule 'global' and a threshold"),
        ("flashprefill", {"density": 0.1}, "density: expected None with rule 'relative'"),
        ("flashprefill", {"page_size": 100}, "page_size: expected one of"),
        ("flashprefill", {"page_size": 128, "block_size": 64}, "page_size: expected one of"),
        ("flashprefill", {"num_last_tokens": -1}, "num_last_tokens: expected an int >= 0"),
        ("flashprefill", {"keep_recent": False}, "num_local_tokens: expected 0 without keep_recent, got 384"),
        ("bound", {"page_size": None}, "page_size: expected one of"),
        ("bound", {"block_size": 96}, "block_size: expected one of"),
        ("bound", {"rule": "topk"}, "num_blocks: expected one of num_blocks and density with rule 'topk', got neither"),
        ("oracle", {"aggregate": "sum"}, "aggregate: expected one of"),
        ("oracle", {"group_shared": 1}, "group_shared: expected a bool"),
        ("oracle", {"page_size": 16}, "page_size: expected an option of OracleConfig"),
        ("topk", {"num_blocks": 0}, "num_blocks: expected an int of at least 1, .*must select something"),
        ("topk", {"num_blocks": 3, "density": 0.5}, "got both"),
        ("topk", {"estimator": "quest"}, "estimator: expected one of"),
        ("topk", {"estimator": "exact", "page_size": 16}, "page_size: expected None with estimator 'exact'"),
        ("topk", {"estimator": "antidiagonal", "page_size": 32}, r"page_size: expected one of \(4, 8, 16\)"),
        ("topk", {"estimator": "antidiagonal", "group_shared": True}, "group_shared: expected False"),
        ("xattention", {"rule": "best"}, "rule: expected one of"),
        ("xattention", {"aggregate": "sum"}, "aggregate: expected one of"),
    ],
)
def test_bad_configs(method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(method, options)


@pytest.mark.parametrize("method", ["flashprefill", "bound", "topk", "oracle"])
def test_bad_calls(method: str) -> None:
    q, k = make(64, 64)
    select = selectors.get(method).select
    with pytest.raises(TypeError, match="config: expected a"):
        select(q, k, {"threshold": 0.5})
    with pytest.raises(ValueError, match="impl: expected"):
        select(q, k, impl="cuda")
    with pytest.raises(ValueError, match="q: expected heads that are a multiple"):
        select(q[:, :, :3], k)
