"""FlexPrefill as a selector: its definition, its invariants, and every defect of published code as a test."""

from __future__ import annotations

import importlib
import json
import math
from typing import Any

import pytest
import torch
import vertical_slash_oracle as oracle
from torch import Tensor

from sparseattn.masks import BlockMask
from sparseattn.ops.scores import flexprefill as flexprefill_operator
from sparseattn.ops.scores import unsupported_reason
from sparseattn.ops.scores.flexprefill import flexprefill_blocks
from sparseattn.selectors import FlexPrefillConfig, configure, flexprefill

CONFIG = FlexPrefillConfig(gamma=0.71, tau=0.11, min_budget=32, block_size=32)


def make(sq: int, sk: int, heads: int = 4, kv_heads: int = 2, batch: int = 1, dim: int = 16) -> tuple[Tensor, Tensor]:
    """The first and third head are quiet, so that pooling tells their mass: query-aware at CONFIG's tau."""
    q = torch.randn(batch, sq, heads, dim, dtype=torch.float64) * 3
    q[:, :, ::2] *= 0.1
    return q, torch.randn(batch, sk, kv_heads, dim, dtype=torch.float64)


def blocks(mask: BlockMask) -> Tensor:
    mask.validate()
    return mask.to_blocks()


SHAPES = [(320, 320, True), (301, 301, True), (100, 333, True), (70, 40, True), (5, 9, True), (130, 170, False)]


@pytest.mark.parametrize(("sq", "sk", "causal"), SHAPES)
@pytest.mark.parametrize("block", [32, 64])
def test_follows_the_definition(sq: int, sk: int, causal: bool, block: int) -> None:
    q, k = make(sq, sk)
    for gamma, tau, budgets in ((0.71, 0.11, (32, None)), (0.95, 0.11, (70, 130)), (0.83, 10.0, (1, None))):
        options = {"gamma": gamma, "tau": tau, "min_budget": budgets[0], "max_budget": budgets[1], "block_size": block}
        kept = blocks(flexprefill(q, k, FlexPrefillConfig.from_dict(options), causal=causal))
        query_aware = flexprefill_blocks(q, k, **options, causal=causal)[2]
        for h in range(4):
            expected, aware = oracle.flexprefill(q[0, :, h], k[0, :, h // 2], gamma, tau, budgets, block, causal)
            assert query_aware[0, h] == aware
            assert [set(row.nonzero().flatten().tolist()) for row in kept[0, h]] == expected, h


def test_tau_decides_and_zero_turns_it_off() -> None:
    q, k = make(320, 320)
    assert not flexprefill_blocks(q, k, tau=0.0, block_size=32)[2].any()
    assert flexprefill_blocks(q, k, tau=10.0, block_size=32)[
        2
    ].all()  # published code gets NaN where a block has no mass
    k[:, 64:96] -= 1e4 * q[:, -32:].mean(1, keepdim=True)[:, :, ::2]
    assert flexprefill_blocks(q, k, tau=10.0, block_size=32)[2].all()
    assert flexprefill_blocks(q.float(), k.float(), tau=10.0, block_size=32)[2].all()


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-40])
def test_the_divergence_is_finite_at_any_mass(tiny: float) -> None:
    means, sizes = torch.tensor([[[[0.0], [-400.0]]]]), torch.tensor([[32, 32]])
    distance = flexprefill_operator._distance(torch.ones(1, 1, 1, 1), means, torch.tensor([[[1.0, tiny]]]), sizes, 1.0)
    torch.testing.assert_close(distance, torch.zeros(1, 1), rtol=0, atol=1e-6)
    swapped = flexprefill_operator._distance(torch.ones(1, 1, 1, 1), means, torch.tensor([[[tiny, 1.0]]]), sizes, 1.0)
    torch.testing.assert_close(swapped, torch.full((1, 1), math.log(2) ** 0.5))


def test_a_slash_keeps_both_blocks_it_crosses() -> None:
    # Every query looks back 40 keys, that is 8 into a block of 32: published code keeps one of the two blocks crossed.
    q = torch.randn(1, 320, 1, 32, dtype=torch.float64)
    q = 40 * torch.nn.functional.normalize(q, dim=-1)
    k = torch.cat([q[:, 40:], torch.zeros_like(q[:, :40])], 1) / 10
    kept = blocks(flexprefill(q, k, FlexPrefillConfig(gamma=0.5, tau=0.0, min_budget=64, block_size=32)))[0, 0]
    for m in range(3, 10):
        assert kept[m, m - 1]
        assert kept[m, m - 2]


def test_extreme_gammas() -> None:
    q, k = make(320, 400)
    assert flexprefill(q, k, FlexPrefillConfig(gamma=1.0, min_budget=1, block_size=32)).density == 1.0
    least = blocks(flexprefill(q, k, FlexPrefillConfig(gamma=0.0, min_budget=1, block_size=32)))[0]
    assert least[..., 0].all()
    assert least.sum(-1).max() <= 1 + 3  # block 0 and one run of distances


def test_forced_blocks() -> None:
    q, k = make(320, 347)
    for sink, recent in ((True, True), (False, False), (True, False), (False, True)):
        config = FlexPrefillConfig(gamma=0.3, min_budget=1, block_size=32, keep_sink=sink, keep_recent=recent)
        kept = blocks(flexprefill(q, k, config))[0, 1]
        rows = torch.arange(10)
        assert kept[:, 0].all() or not sink
        assert kept[rows, (rows * 32 + 27) // 32].all() or not recent


@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
def test_density_is_exact_in_every_row(density: float) -> None:
    q, k = make(320, 350)
    config = FlexPrefillConfig(density=density, tau=0.11, block_size=32)
    mask = flexprefill(q, k, config)
    visible = torch.tensor([oracle.visible_blocks(m, 32, 320, 350, True) for m in range(10)])
    # Block 0 and the two blocks of the diagonal are kept whatever the density; two rows of keys are before the first.
    diagonal = torch.tensor([len({(m * 32 + 30) // 32, min(m * 32 + 61, 349) // 32}) + (m > 0) for m in range(10)])
    expected = torch.maximum((visible * density).ceil(), diagonal.clamp(max=visible)).int()
    blocks(mask)
    assert (mask.kv_num_blocks - expected >= 0).all()
    assert (mask.kv_num_blocks - expected <= 1).all()  # keep_recent keeps the block before an unaligned diagonal, too


@pytest.mark.parametrize("shared", [False, True])
def test_lists_are_as_wide_as_the_options_allow(shared: bool) -> None:
    q, k = make(640, 667)
    base = {**CONFIG.to_dict(), "group_shared": shared}
    for density in (0.05, 0.5):
        mask = flexprefill(q, k, FlexPrefillConfig(**{**base, "density": density}))
        assert mask.kv_indices.shape[-1] < mask.num_kv_blocks or shared
        assert (mask.kv_num_blocks < mask.kv_indices.shape[-1]).all()  # nothing was cut off
    bounded = flexprefill(q, k, FlexPrefillConfig(**{**base, "max_budget": 64, "tau": 0.0}))
    full = flexprefill(q, k, FlexPrefillConfig(**{**base, "max_budget": 64, "tau": 1e-9}))  # no head is as close
    assert bounded.kv_indices.shape[-1] < full.kv_indices.shape[-1]
    assert torch.equal(blocks(bounded), blocks(full))


def test_density_takes_the_best_blocks() -> None:
    q, k = torch.randn(1, 640, 1, 32), torch.randn(1, 640, 1, 32)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    q += 8 * direction
    k[:, 320:336] += 8 * direction
    for tau in (0.0, 10.0):  # by verticals, by pooling
        kept = blocks(flexprefill(q, k, FlexPrefillConfig(density=0.25, tau=tau, block_size=32)))[0, 0]
        assert kept[11:, 10].all()
        assert kept.sum(-1).max() <= 5


def test_group_shared_is_the_union() -> None:
    q, k = make(301, 333)
    own = blocks(flexprefill(q, k, CONFIG))
    shared = flexprefill(q, k, FlexPrefillConfig(**{**CONFIG.to_dict(), "group_shared": True}))
    assert shared.heads == 2
    assert torch.equal(blocks(shared), own.unflatten(1, (2, 2)).any(2))


def test_batch_is_a_loop_and_groups_are_repeated_keys() -> None:
    q, k = make(200, 300, batch=3)
    whole = blocks(flexprefill(q, k, CONFIG))
    for b in range(3):
        assert torch.equal(whole[b : b + 1], blocks(flexprefill(q[b : b + 1], k[b : b + 1], CONFIG)))
    assert torch.equal(whole, blocks(flexprefill(q, k.repeat_interleave(2, 2), CONFIG)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("density", [None, 0.3])
def test_packed_is_a_loop(causal: bool, density: float | None) -> None:
    lengths = [(130, 130), (64, 200), (0, 10), (7, 65), (50, 20)]
    config = FlexPrefillConfig(**{**CONFIG.to_dict(), "density": density})
    parts = [make(sq, sk) for sq, sk in lengths]
    q, k = (torch.cat([p[i][0] for p in parts]) for i in (0, 1))
    cu_q, cu_k = (
        torch.tensor([0, *[n[i] for n in lengths]], dtype=torch.int32).cumsum(0, dtype=torch.int32) for i in (0, 1)
    )
    mask = flexprefill(q, k, config, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=130)
    kept = blocks(mask)
    for b, (sq, _) in enumerate(lengths):
        if sq:
            alone = blocks(flexprefill(*parts[b], config, causal=causal))[0]
            assert torch.equal(kept[b, :, : alone.shape[1], : alone.shape[2]], alone), b
        assert not kept[b, :, -(-sq // 32) :].any()


def test_ranges_are_a_loop_and_padding_is_never_read() -> None:
    q, k = make(150, 220, batch=3)
    ranges_q = torch.tensor([[0, 150], [30, 150], [0, 65]], dtype=torch.int32)
    ranges_k = torch.tensor([[0, 220], [100, 220], [0, 65]], dtype=torch.int32)
    q[1, :30] = math.nan
    k[2, 65:] = math.nan
    kept = blocks(flexprefill(q, k, CONFIG, ranges_q=ranges_q, ranges_k=ranges_k))
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(ranges_q.tolist(), ranges_k.tolist(), strict=True)):
        alone = blocks(flexprefill(q[b : b + 1, q0:q1], k[b : b + 1, k0:k1], CONFIG))[0]
        assert torch.equal(kept[b, :, : alone.shape[1], : alone.shape[2]], alone)
        assert not kept[b, :, alone.shape[1] :].any()


def test_empty_calls() -> None:
    for sq, sk in ((0, 5), (5, 0), (0, 0)):
        mask = flexprefill(torch.zeros(2, sq, 4, 16), torch.zeros(2, sk, 2, 16), CONFIG)
        assert not blocks(mask).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in make(301, 333))
    assert torch.equal(blocks(flexprefill(q, k, CONFIG)), blocks(flexprefill(q.float(), k.float(), CONFIG)))


# ---- kernels, operator ----


@pytest.mark.parametrize(
    ("sq", "sk", "options", "causal"),
    [(150, 333, {}, True), (130, 170, {"gamma": 0.9, "tau": 10.0}, False), (200, 200, {"density": 0.3}, True)],
    ids=["causal", "pooled", "density"],
)
def test_triton_matches_the_reference(sq: int, sk: int, options: dict[str, Any], causal: bool, device: str) -> None:
    q, k = (x.float().to(device) for x in make(sq, sk, 2, 1))
    if unsupported_reason(q, k, impl="triton") is not None:
        pytest.skip("no interpreter here")
    config = FlexPrefillConfig(**{**CONFIG.to_dict(), **options})
    expected = blocks(flexprefill(q.double(), k.double(), config, causal=causal, impl="reference"))
    got = blocks(flexprefill(q, k, config, causal=causal, impl="triton"))
    assert (expected != got).float().mean() <= 0.01  # rounding may move a block across a cut-off


def test_operator_passes_opcheck_and_compiles_whole() -> None:
    q, k = (x.float() for x in make(100, 130))
    arguments = (q, k, None, None, None, None, 1, 100, 130, 0.7, 0.2, 32, -1, -1.0, 32, 0.25, True, True, True, False)
    torch.library.opcheck(torch.ops.sparseattn.flexprefill_blocks.default, (*arguments, 2, "reference"))
    compiled = torch.compile(lambda q, k: flexprefill(q, k, CONFIG).kv_num_blocks, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k), flexprefill(q, k, CONFIG).kv_num_blocks)


@pytest.mark.gpu
def test_selection_in_a_cuda_graph_and_at_new_lengths() -> None:
    kernels = [importlib.import_module(f"sparseattn.ops.scores.{n}_triton") for n in ("vertical_slash", "block_lists")]

    def compiled() -> int:
        functions = [f for module in kernels for name, f in vars(module).items() if name.endswith("_kernel")]
        return sum(len(caches[0]) for f in functions for caches in f.device_caches.values())

    q, k = (x.to("cuda", torch.bfloat16) for x in make(3000, 3000, dim=64))
    config = FlexPrefillConfig(tau=0.2, min_budget=128)
    expected = flexprefill(q, k, config).to_blocks()
    flexprefill(*(x.to("cuda", torch.bfloat16) for x in make(100, 100, dim=64)), config)  # short rows have a kernel
    before = compiled()
    for sq, sk in ((2049, 4000), (77, 4099), (16, 16)):
        flexprefill(*(x.to("cuda", torch.bfloat16) for x in make(sq, sk, dim=64)), config)
    assert compiled() == before
    static = torch.zeros_like(q)
    graph = torch.cuda.CUDAGraph()
    flexprefill(static, k, config)
    with torch.cuda.graph(graph):
        mask = flexprefill(static, k, config)
    static.copy_(q)
    graph.replay()
    assert torch.equal(mask.to_blocks(), expected)


# ---- bad input ----


def test_config_round_trips_through_json() -> None:
    for config in (FlexPrefillConfig(), CONFIG, FlexPrefillConfig(density=0.2, max_budget=4096, group_shared=True)):
        assert configure("flexprefill", json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.1}, r"gamma: expected a number in \[0, 1\], got 1.1"),
        ({"gamma": math.nan}, r"gamma: expected a number in \[0, 1\], got nan"),
        ({"tau": -0.1}, "tau: expected a finite number >= 0, got -0.1"),
        ({"tau": math.inf}, "tau: expected a finite number >= 0, got inf"),
        ({"min_budget": 0}, "min_budget: expected an int >= 1, got 0"),
        ({"min_budget": 0.5}, "min_budget: expected an int >= 1, got 0.5"),
        ({"min_budget": 512, "max_budget": 256}, "max_budget: expected an int >= 512, got 256"),
        ({"density": 0.0}, r"density: expected a share in \(0, 1\]"),
        ({"density": 2}, r"density: expected a number in \[0, 1\], got 2"),
        ({"block_size": 16}, r"block_size: expected one of \(32, 64, 128\), got 16"),
        ({"keep_sink": None}, "keep_sink: expected a bool, got None"),
        ({"sparsity": 0.5}, "sparsity: expected an option of FlexPrefillConfig"),
    ],
)
def test_bad_config(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure("flexprefill", options)


def test_bad_calls() -> None:
    q, k = make(64, 64)
    with pytest.raises(TypeError, match="config: expected a FlexPrefillConfig, got dict"):
        flexprefill(q, k, {"gamma": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"impl: .*float64"):
        flexprefill(q, k, impl="triton")
    with pytest.raises(ValueError, match="q: expected heads that are a multiple of k's 3"):
        flexprefill(q, torch.zeros(1, 64, 3, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        flexprefill(q, k, scale=math.inf)
