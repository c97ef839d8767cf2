"""Landmark as a selector: what its masks promise, what its cache promises, and the method's known limits."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparseattn.masks import BlockMask
from sparseattn.ops.scores import landmark_scores
from sparseattn.selectors import (
    LandmarkCache,
    LandmarkConfig,
    StreamingConfig,
    calibrate_landmark,
    configure,
    landmark,
)

CONFIG = LandmarkConfig(tau=0.15, block_size=64, floor=1)
ALL_ROWS = LandmarkConfig(tau=0.15, block_size=64, floor=1, rows="all")


def make(sq: int, sk: int, heads: int = 4, kv_heads: int = 2, batch: int = 1, dim: int = 16) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, heads, dim, dtype=torch.float64) * 3
    return q, torch.randn(batch, sk, kv_heads, dim, dtype=torch.float64)


def blocks(mask: BlockMask) -> Tensor:
    mask.validate()
    return mask.to_blocks()


def probabilities(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The exact largest probability any row gives each block, causal: ``[Hq, MB, NB]`` of batch row 0."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    logits = torch.einsum("ihd,jhd->hij", q[0], k[0].repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
    p = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    n = length // block
    return p.view(-1, n, block, n, block).sum(-1).amax(2)


def test_blocks_that_hold_most_of_a_row_are_kept() -> None:
    q, k = make(1024, 1024, dim=32)
    q[:, :, 1] *= torch.rand(1, 1024, 1)  # some rows, and one head, look around more evenly than others
    kept = blocks(landmark(q, k, LandmarkConfig(tau=0.2, block_size=64, rows="all")))[0]
    mass = probabilities(q, k, 64)
    free = torch.ones(16, 16, dtype=torch.bool).tril(-1).index_fill(1, torch.tensor(0), False)
    free[:4] = False
    # Keys without any structure, of which four landmarks know the least there is to know.
    assert kept[(mass > 0.7) & free].float().mean() > 0.9
    assert kept[(mass < 0.2) & free].float().mean() < 0.3


def test_a_lone_key_that_one_query_wants_is_found() -> None:
    # The case that means over pages, strides or blocks dilute away.
    torch.manual_seed(1)
    q, k = torch.randn(1, 2048, 1, 64), torch.randn(1, 2048, 1, 64)
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    k[0, 777, 0] += 12 * direction
    q[0, 1900, 0] = 14 * direction
    config = LandmarkConfig(tau=0.3)
    kept = blocks(landmark(q, k, config))[0, 0]
    assert kept[14, 6]
    assert kept[14].sum() <= 4
    assert not kept[13, 6]


def test_forced_blocks() -> None:
    q, k = make(500, 564)
    kept = blocks(landmark(q, k, LandmarkConfig(tau=1.0, block_size=64, floor=3)))[0, 0]
    rows = [row.nonzero().flatten().tolist() for row in kept]
    assert rows == [[0, 1], [0, 1, 2], [0, 3], [0, 4], [0, 5], [0, 6], [0, 7], [0, 8]]
    kept = blocks(landmark(q, k, LandmarkConfig(tau=1.0, block_size=64, floor=0, keep_sink=False)))[0, 0]
    assert torch.equal(kept, torch.eye(9, dtype=torch.bool)[1:])
    assert not blocks(landmark(q, k, LandmarkConfig(tau=1.0, block_size=64), causal=False)).any()
    assert landmark(q, k, LandmarkConfig(tau=0.0, block_size=64, floor=0)).density == 1.0


def test_one_threshold_nests_the_masks() -> None:
    q, k = make(640, 640)
    kept = [blocks(landmark(q, k, LandmarkConfig(tau=t, block_size=64))) for t in (0.0, 0.3, 0.5, 1.0)]
    for larger, smaller in pairwise(kept):
        assert (larger | ~smaller).all()
        assert larger.sum() > smaller.sum()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.9, 1.0])
def test_density_is_met_to_the_block(density: float, shared: bool) -> None:
    q, k = make(640, 700, batch=2)
    mask = landmark(q, k, LandmarkConfig(density=density, block_size=64, floor=2, group_shared=shared))
    visible = landmark(q, k, LandmarkConfig(tau=0, block_size=64)).kv_num_blocks[0, 0].sum()
    heads = 2 if shared else 4
    assert mask.heads == heads
    forced = landmark(q, k, LandmarkConfig(tau=1, block_size=64, floor=2, group_shared=shared)).kv_num_blocks[0].sum()
    expected = max(math.floor(density * visible * heads + 0.5), forced)  # forced blocks are kept at any density
    assert mask.kv_num_blocks.sum((1, 2)).tolist() == [expected, expected]


def test_a_group_shares_the_union_of_its_lists() -> None:
    q, k = make(500, 500)
    own = blocks(landmark(q, k, LandmarkConfig((0.1, 0.2, 0.3, 0.4), block_size=64)))
    shared = blocks(landmark(q, k, LandmarkConfig((0.1, 0.2, 0.3, 0.4), block_size=64, group_shared=True)))
    assert torch.equal(shared, own.unflatten(1, (2, 2)).any(2))


def test_batch_is_a_loop() -> None:
    q, k = make(200, 300, batch=3)
    for config in (CONFIG, LandmarkConfig(density=0.8, block_size=64, floor=1)):
        whole = blocks(landmark(q, k, config))
        for b in range(3):
            assert torch.equal(whole[b : b + 1], blocks(landmark(q[b : b + 1], k[b : b + 1], config)))


def test_grouped_heads_are_repeated_keys() -> None:
    q, k = make(200, 300, heads=6, kv_heads=2)
    assert torch.equal(blocks(landmark(q, k, CONFIG)), blocks(landmark(q, k.repeat_interleave(3, 2), CONFIG)))


LENGTHS = [(130, 130), (64, 200), (0, 10), (7, 165)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("density", [None, 0.8])
def test_packed_is_a_loop(causal: bool, density: float | None) -> None:
    config = LandmarkConfig(tau=0.15, density=density, block_size=64, floor=1)
    parts = [make(sq, sk) for sq, sk in LENGTHS]
    q, k = (torch.cat([p[i][0] for p in parts]) for i in (0, 1))
    cu_q, cu_k = (
        torch.tensor([0, *[n[i] for n in LENGTHS]], dtype=torch.int32).cumsum(0, dtype=torch.int32) for i in (0, 1)
    )
    mask = landmark(
        q, k, config, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=130, max_seqlen_k=200
    )
    kept = blocks(mask)
    for b, (sq, _) in enumerate(LENGTHS):
        if sq:
            alone = blocks(landmark(*parts[b], config, causal=causal))[0]
            assert torch.equal(kept[b, :, : alone.shape[1], : alone.shape[2]], alone)
        assert not kept[b, :, -(-sq // 64) :].any()


def test_ranges_are_a_loop_and_padding_is_never_read() -> None:
    q, k = make(150, 220, batch=3)
    ranges_q = torch.tensor([[0, 150], [30, 150], [0, 65]], dtype=torch.int32)
    ranges_k = torch.tensor([[0, 220], [20, 220], [0, 65]], dtype=torch.int32)
    for x, ranges in ((q, ranges_q), (k, ranges_k)):
        for b, (start, end) in enumerate(ranges.tolist()):
            x[b, :start], x[b, end:] = math.nan, math.nan
    kept = blocks(landmark(q, k, CONFIG, ranges_q=ranges_q, ranges_k=ranges_k))
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(ranges_q.tolist(), ranges_k.tolist(), strict=True)):
        alone = blocks(landmark(q[b : b + 1, q0:q1], k[b : b + 1, k0:k1], CONFIG))[0]
        assert torch.equal(kept[b, :, : alone.shape[1], : alone.shape[2]], alone)
        assert not kept[b, :, alone.shape[1] :].any()


@pytest.mark.parametrize("rows", ["all", None])
def test_the_future_does_not_matter(rows: str | None) -> None:
    config = LandmarkConfig(tau=0.15, block_size=64, floor=1, rows=rows)
    q, k = make(320, 320)
    before = landmark(q, k, config)
    q[:, 192:] += 7
    k[:, 192:] -= 7
    after = landmark(q, k, config)
    assert torch.equal(before.kv_num_blocks[:, :, :3], after.kv_num_blocks[:, :, :3])
    assert torch.equal(before.kv_indices[:, :, :3, :3], after.kv_indices[:, :, :3, :3])


@pytest.mark.parametrize(("start", "stop"), [(64, 640), (192, 250), (512, 602), (0, 64)])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_chunk_of_queries_is_those_rows_of_the_whole(start: int, stop: int, impl: str) -> None:
    if impl == "triton" and (start, stop) != (192, 250):
        pytest.skip("one chunk is enough under the interpreter")
    pytest.importorskip("triton") if impl == "triton" else None
    q, k = (x.float() for x in make(640, 640, heads=2, kv_heads=1))
    end = stop if stop % 64 else 640
    whole = blocks(landmark(q[:, :end], k[:, :end], CONFIG, impl=impl))
    chunk = blocks(landmark(q[:, start:stop], k[:, :stop], CONFIG, impl=impl))
    assert torch.equal(chunk, whole[:, :, start // 64 : -(-stop // 64), : chunk.shape[-1]])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_cache_changes_no_bit(impl: str) -> None:
    steps = (100, 28, 1, 63, 0, 64, 1) if impl == "reference" else (100, 92)
    total = sum(steps)
    q, k = (x.float() for x in make(total, total, heads=2, kv_heads=1, dim=8))
    cache = LandmarkCache(CONFIG, impl=impl)
    seen = 0
    for step in steps:
        seen += step
        f = cache.append(k[:, seen - step : seen])
        assert cache.num_keys == seen
        assert f.centroids.shape[2] == seen // 64
        if step:
            part = q[:, seen - step : seen]
            for config in (CONFIG, ALL_ROWS) if impl == "reference" else (CONFIG,):
                cached = landmark(part, k[:, :seen], config, features=f, impl=impl)
                assert torch.equal(blocks(cached), blocks(landmark(part, k[:, :seen], config, impl=impl)))
    options = {"block_size": 64, "impl": impl}
    cached_scores = landmark_scores(q, k, features=cache.features, **options)
    assert torch.equal(cached_scores, landmark_scores(q, k, **options))


def test_a_cache_says_what_does_not_follow() -> None:
    cache = LandmarkCache(CONFIG)
    with pytest.raises(ValueError, match="features: expected keys appended before, got an empty cache"):
        _ = cache.features
    cache.append(torch.zeros(1, 10, 2, 16))
    for bad, message in (
        (torch.zeros(10, 2, 16), r"k: expected \[B, S, Hkv, D\]"),
        (torch.zeros(2, 10, 2, 16), r"k: expected batch, heads and head_dim \(1, 2, 16\)"),
        (torch.zeros(1, 10, 2, 16).half(), "k: expected dtype torch.float32 like the keys before"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.append(bad)
    assert cache.num_keys == 10
    cache.reset()
    cache.append(torch.zeros(2, 10, 2, 16))
    with pytest.raises(TypeError, match="config: expected a LandmarkConfig, got StreamingConfig"):
        LandmarkCache(StreamingConfig())  # type: ignore[arg-type]


def test_the_order_of_keys_in_a_block_does_not_matter() -> None:
    q, k = make(512, 512)
    shuffled = k.clone()
    for j in range(1, 7):
        shuffled[:, j * 64 : (j + 1) * 64] = k[:, j * 64 + torch.randperm(64)]
    a, b = (landmark_scores(q[:, 448:], x, block_size=64) for x in (k, shuffled))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_thresholds_by_head_and_layer() -> None:
    q, k = make(512, 512)
    table = ((0.0, 0.05, 0.3, 1.0), (1.0, 0.0, 0.5, 0.5))
    single = [blocks(landmark(q, k, LandmarkConfig(t, block_size=64))) for t in table[0]]
    per_head = blocks(landmark(q, k, LandmarkConfig(table[0], block_size=64), layer=17))
    assert all(torch.equal(per_head[:, h], single[h][:, h]) for h in range(4))
    per_layer = LandmarkConfig(torch.tensor(table), block_size=64)  # type: ignore[arg-type]
    assert torch.equal(blocks(landmark(q, k, per_layer, layer=0)), per_head)
    for layer in (None, 2, -1):
        with pytest.raises(ValueError, match=r"layer: expected an int in \[0, 2\)"):
            landmark(q, k, per_layer, layer=layer)
    with pytest.raises(ValueError, match="tau: expected 4 values, one per query head, got 2 values"):
        landmark(q, k, LandmarkConfig((0.5, 0.5), block_size=64))


def test_mask_describes_the_call(device: str) -> None:
    q, k = torch.randn(2, 130, 4, 16, device=device), torch.randn(2, 200, 2, 16, device=device)
    mask = landmark(q, k)
    assert (mask.batch, mask.heads, mask.seq_lens, mask.block_size) == (2, 4, (130, 200), (128, 128))
    assert mask.causal
    assert not landmark(q, k, causal=False).causal
    assert torch.equal(mask.kv_indices, landmark(q, k).kv_indices)
    mask.validate()


# ---- known limits: what the method does not do, so that nobody is surprised and a change shows ----


def test_limit_thinly_spread_mass_is_dropped() -> None:
    # Every block holds a little of every row: no single one is worth tau.
    q, k = torch.zeros(1, 1024, 1, 16), torch.randn(1, 1024, 1, 16)
    kept = blocks(landmark(q, k, LandmarkConfig(tau=0.3, block_size=64)))[0, 0]
    assert (kept[8:].sum(-1) == 2).all()
    # Even a block of 64 keys counts as its few landmarks: they stand for the largest logits, not for the mass.
    assert landmark(q, k, LandmarkConfig(tau=0.05, block_size=64)).density < 0.3
    assert landmark(q, k, LandmarkConfig(tau=0.0, block_size=64)).density == 1.0


def test_limit_a_density_looks_at_later_queries() -> None:
    q, k = make(1024, 1024)
    config = LandmarkConfig(density=0.4, block_size=64)
    before = landmark(q, k, config).kv_num_blocks[0, :, :8].clone()
    q[:, 512:] *= 4
    assert not torch.equal(landmark(q, k, config).kv_num_blocks[0, :, :8], before)


def test_limit_junk_outliers_use_up_the_landmarks() -> None:
    # With as many far-off keys in a block as it has landmarks, the rest of its keys share one.
    q, k = torch.randn(1, 256, 1, 16), 0.3 * torch.randn(1, 256, 1, 16)
    k[0, 70:77, 0] = 30 * torch.nn.functional.normalize(torch.randn(7, 16), dim=-1)
    scores = landmark_scores(q, k, block_size=64, rows=64, clusters=8)
    assert scores[0, 0, 3, 1:3].isfinite().all()


def test_limit_rows_that_are_not_scored_are_not_seen() -> None:
    # The one query that wants the key deviates least of all from its block's mean.
    k = 0.1 * torch.randn(1, 512, 1, 16)
    k[0, 100, 0, 0] = 8.0
    q = 4 * torch.randn(1, 512, 1, 16)
    q[..., 0] = 0
    q[0, 448:, 0, 1:] += 100 * torch.eye(16)[1, 1:]
    q[0, 480, 0] = torch.zeros(16)
    q[0, 480, 0, 1:] = q[0, 448:, 0, 1:].mean(0)
    q[0, 480, 0, 0] = 0.9
    half, whole = (landmark_scores(q, k, block_size=64, rows=rows, clusters=16)[0, 0, 7, 1] for rows in (16, 64))
    assert whole >= half


# ---- configuration ----


def test_config_round_trips_through_json() -> None:
    for config in (
        LandmarkConfig(),
        LandmarkConfig(0.5, 0.1, 64, 16, "all", False, 0, True, True),
        LandmarkConfig((0.5, 0.25), rows=32),
        LandmarkConfig(((0.5, 0.25), (1.0, 0.0))),
    ):
        assert configure("landmark", json.loads(json.dumps(config.to_dict()))) == config
        assert hash(config) == hash(LandmarkConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": math.nan}, r"tau: expected a number in \[0, 1\], got nan"),
        ({"tau": 1.01}, r"tau: expected a number in \[0, 1\], got 1.01"),
        ({"tau": "0.9"}, r"tau: expected a number in \[0, 1\]"),
        ({"tau": (0.5, -1.0)}, r"tau: expected a number in \[0, 1\], got -1.0"),
        ({"tau": ((0.5, 0.5), (0.5,))}, "tau: expected a number, numbers per head, or equally long rows"),
        ({"tau": ()}, "tau: expected a number, numbers per head, or equally long rows"),
        ({"density": 0}, r"density: expected None or a number in \(0, 1\], got 0"),
        ({"density": 1.5}, "density: expected None or a number"),
        ({"block_size": 96}, r"block_size: expected one of \(64, 128\), got 96"),
        ({"clusters": 3}, r"clusters: expected one of \(2, 4, 8, 16\), got 3"),
        ({"rows": "some"}, "rows: expected None, 'all' or one of .16, 32, 64, 128., got 'some'"),
        ({"rows": 128, "block_size": 64}, "rows: expected None, 'all' or one of .16, 32, 64., got 128"),
        ({"keep_sink": 1}, "keep_sink: expected a bool, got 1"),
        ({"fp8": None}, "fp8: expected a bool, got None"),
        ({"floor": 1.5}, "floor: expected an int >= 0, got 1.5"),
        ({"taus": 0.5}, "taus: expected an option of LandmarkConfig .tau, density, block_size"),
    ],
)
def test_bad_config(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure("landmark", options)


def test_config_of_another_method() -> None:
    q, k = make(64, 64)
    with pytest.raises(TypeError, match="config: expected a LandmarkConfig, got dict"):
        landmark(q, k, {"tau": 0.5})  # type: ignore[arg-type]


# ---- calibration ----


def kept_mass(q: Tensor, k: Tensor, config: LandmarkConfig, rows: slice) -> Tensor:
    """Mean share of the attention mass of some query blocks that a mask keeps, by head."""
    length = q.shape[1]
    logits = torch.einsum("ihd,jhd->hij", q[0], k[0].repeat_interleave(2, 1)) * q.shape[-1] ** -0.5
    p = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    held = (p * landmark(q, k, config, layer=0).to_dense()[0]).sum(-1)
    return held.view(held.shape[0], -1, config.block_size)[:, rows].mean((1, 2))


def test_calibration_reaches_its_recall_and_no_more() -> None:
    q, k = make(640, 640, dim=32)
    for every, rows in ((1, slice(None)), (4, slice(1, None, 4))):
        config = calibrate_landmark(q, k, 0.8, LandmarkConfig(block_size=64, floor=1), every=every)
        assert isinstance(config.tau, tuple)
        assert len(config.tau) == 4
        held = kept_mass(q, k, config, rows)
        assert (held >= 0.8 - 1e-6).all()
        assert (held < 0.83).all()
    one = calibrate_landmark(q, k, 0.8, LandmarkConfig(block_size=64, floor=1), per_head=False, every=1)
    assert kept_mass(q, k, one, slice(None)).mean() == pytest.approx(0.8, abs=0.02)
    assert calibrate_landmark(q, k, 1.0, LandmarkConfig(block_size=64)).tau != ()


def test_calibration_refuses_what_it_cannot_do() -> None:
    q, k = make(64, 64)
    for arguments, message in (
        ({"recall": 0.0}, r"recall: expected a number in \(0, 1\], got 0.0"),
        ({"recall": math.nan}, "recall: expected a number"),
        ({"every": 0}, "every: expected an int of at least 1"),
        ({"config": LandmarkConfig(density=0.5)}, "config: expected a config without density"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_landmark(q, k, **arguments)
