"""XAttention as a selector: what its masks promise, and every defect of published code as a regression test."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from sparseattn.masks import BlockMask
from sparseattn.ops.scores import antidiagonal_scores
from sparseattn.selectors import XAttentionConfig, configure, xattention

CONFIG = XAttentionConfig(threshold=0.7, stride=8, block_size=64)


def make(sq: int, sk: int, heads: int = 4, kv_heads: int = 2, batch: int = 1, dim: int = 16) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, heads, dim, dtype=torch.float64) * 3
    return q, torch.randn(batch, sk, kv_heads, dim, dtype=torch.float64)


def blocks(mask: BlockMask) -> Tensor:
    mask.validate()
    return mask.to_blocks()


@pytest.mark.parametrize(("sq", "sk"), [(320, 320), (301, 301), (100, 333), (64, 320)])
@pytest.mark.parametrize("causal", [True, False])
def test_mass_reaches_the_threshold_with_the_fewest_blocks(sq: int, sk: int, causal: bool) -> None:
    q, k = make(sq, sk)
    kept = blocks(xattention(q, k, CONFIG, causal=causal))
    scores = antidiagonal_scores(q, k, stride=8, block_size=64, causal=causal)
    need = torch.tensor(0.7).double() * scores.sum(-1)
    mass = (scores * kept).sum(-1)
    assert (mass >= need * (1 - 1e-12)).all()
    forced = torch.zeros_like(kept)
    if causal:
        forced[..., 0] = True
        rows = torch.arange(-(-sq // 64)) * 64
        first, last = (rows + sk - sq) // 64, ((rows + 64).clamp(max=sq) - 1 + sk - sq) // 64
        n = torch.arange(kept.shape[-1])
        forced |= (n >= first[:, None]) & (n <= last[:, None])
        assert (kept | ~forced).all()
        assert not (kept & (n > last[:, None])).any()
    # Without its least free block a row would fall short: the set is minimal.
    least = torch.where(kept & ~forced, scores, math.inf).amin(-1)
    has_free = least < math.inf
    assert (mass - least < need)[has_free].all()
    assert has_free.any()


def test_one_chunk_takes_no_extra_block() -> None:
    # Published code forces one block fewer in the first chunk than it counts, and so takes one more than it needs.
    q, k = torch.zeros(1, 256, 1, 16), torch.zeros(1, 256, 1, 16)
    mask = xattention(q, k, XAttentionConfig(threshold=0.5, block_size=64))
    # Uniform mass: the last row has four equal blocks (but for the diagonal's smaller one); two forced ones hold < 0.5.
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 2, 2, 3]
    assert xattention(q, k, XAttentionConfig(threshold=0.4, block_size=64)).kv_num_blocks[0, 0, 3] == 2


def test_keep_sink_keeps_the_first_column_not_the_first_row() -> None:
    q, k = make(512, 512)
    for causal in (True, False):
        kept = blocks(xattention(q, k, XAttentionConfig(0.1, block_size=64, keep_sink=True), causal=causal))
        assert kept[..., 0].all()
        assert not kept[:, :, 0].all()


def test_block_0_is_not_free_without_causality() -> None:
    # Published code pads its lists with zeros and so keeps block 0 in every row.
    q, k = make(512, 512)
    k[:, :64] = 0
    k[:, 64:128] = q.mean(1, keepdim=True).view(1, 1, 2, 2, 16).mean(3) + 5 * torch.ones(16, dtype=torch.float64)
    q = q.abs()
    kept = blocks(xattention(q, k, XAttentionConfig(0.5, block_size=64), causal=False))
    assert not kept[..., 0].any()
    assert kept[..., 1].all()
    assert kept.any(-1).all()


def test_options_turn_the_forced_blocks_off() -> None:
    q, k = make(512, 512)
    free = xattention(q, k, XAttentionConfig(0.0, block_size=64, keep_sink=False, keep_recent=False))
    assert free.kv_num_blocks.eq(1).all()
    sink = xattention(q, k, XAttentionConfig(0.0, block_size=64, keep_recent=False))
    assert (blocks(sink).nonzero()[:, -1] == 0).all()
    recent = xattention(q, k, XAttentionConfig(0.0, block_size=64, keep_sink=False))
    assert torch.equal(blocks(recent)[0, 0], torch.eye(8, dtype=torch.bool))


def test_thresholds_0_and_1() -> None:
    q, k = make(500, 620)
    assert xattention(q, k, XAttentionConfig(1.0, block_size=64)).density == 1.0
    kept = blocks(xattention(q, k, XAttentionConfig(0.0, block_size=64)))[0, 0]
    assert [row.nonzero().flatten().tolist() for row in kept[:2]] == [[0, 1, 2], [0, 2, 3]]


def test_batch_is_a_loop() -> None:
    q, k = make(200, 300, batch=3)
    whole = blocks(xattention(q, k, CONFIG))
    for b in range(3):
        assert torch.equal(whole[b : b + 1], blocks(xattention(q[b : b + 1], k[b : b + 1], CONFIG)))


def test_grouped_heads_are_repeated_keys() -> None:
    q, k = make(200, 300, heads=6, kv_heads=2)
    repeated = xattention(q, k.repeat_interleave(3, 2), CONFIG)
    assert torch.equal(blocks(xattention(q, k, CONFIG)), blocks(repeated))


LENGTHS = [(130, 130), (64, 200), (0, 10), (7, 65)]


@pytest.mark.parametrize("causal", [True, False])
def test_packed_is_a_loop(causal: bool) -> None:
    parts = [make(sq, sk) for sq, sk in LENGTHS]
    q, k = (torch.cat([p[i][0] for p in parts]) for i in (0, 1))
    cu_q, cu_k = (
        torch.tensor([0, *[n[i] for n in LENGTHS]], dtype=torch.int32).cumsum(0, dtype=torch.int32) for i in (0, 1)
    )
    mask = xattention(
        q, k, CONFIG, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=130, max_seqlen_k=200
    )
    assert mask.seq_lens == (130, 200)
    assert mask.seqused_q is not None
    assert mask.seqused_k is not None
    assert mask.seqused_q.tolist() == [n[0] for n in LENGTHS]
    assert mask.seqused_k.tolist() == [n[1] for n in LENGTHS]
    kept = blocks(mask)
    for b, (sq, _) in enumerate(LENGTHS):
        if sq:
            alone = blocks(xattention(*parts[b], CONFIG, causal=causal))[0]
            assert torch.equal(kept[b, :, : alone.shape[1], : alone.shape[2]], alone)
        assert not kept[b, :, -(-sq // 64) :].any()


def test_ranges_are_a_loop() -> None:
    q, k = make(150, 220, batch=3)
    ranges_q = torch.tensor([[0, 150], [30, 150], [0, 65]], dtype=torch.int32)
    ranges_k = torch.tensor([[0, 220], [100, 220], [0, 65]], dtype=torch.int32)
    kept = blocks(xattention(q, k, CONFIG, ranges_q=ranges_q, ranges_k=ranges_k))
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(ranges_q.tolist(), ranges_k.tolist(), strict=True)):
        alone = blocks(xattention(q[b : b + 1, q0:q1], k[b : b + 1, k0:k1], CONFIG))[0]
        assert torch.equal(kept[b, :, : alone.shape[1], : alone.shape[2]], alone)
        assert not kept[b, :, alone.shape[1] :].any()
    only_q = xattention(q, k, CONFIG, ranges_q=ranges_q)
    assert only_q.seqused_k is not None
    assert only_q.seqused_k.tolist() == [220, 220, 220]


def test_padding_is_never_read() -> None:
    q, k = make(150, 150, batch=2)
    ranges = torch.tensor([[0, 150], [40, 150]], dtype=torch.int32)
    expected = blocks(xattention(q, k, CONFIG, ranges_q=ranges, ranges_k=ranges))
    q[1, :40] = math.nan
    k[1, :40] = math.nan
    assert torch.equal(blocks(xattention(q, k, CONFIG, ranges_q=ranges, ranges_k=ranges)), expected)


def test_the_future_does_not_matter() -> None:
    q, k = make(320, 320)
    before = xattention(q, k, CONFIG)
    q[:, 192:] += 7
    k[:, 192:] -= 7
    after = xattention(q, k, CONFIG)
    assert torch.equal(before.kv_num_blocks[:, :, :3], after.kv_num_blocks[:, :, :3])
    assert torch.equal(before.kv_indices[:, :, :3, :3], after.kv_indices[:, :, :3, :3])
    assert not torch.equal(before.kv_num_blocks[:, :, 3:], after.kv_num_blocks[:, :, 3:])


@pytest.mark.parametrize(("start", "stop"), [(64, 320), (192, 256), (256, 301), (0, 64)])
def test_a_chunk_of_queries_is_those_rows_of_the_whole(start: int, stop: int) -> None:
    # Chunked prefill: published code is right only where the history is a multiple of its own chunk.
    q, k = make(320, 320)
    whole = blocks(xattention(q, k, CONFIG))
    if stop % 8:
        whole = blocks(xattention(q[:, :stop], k[:, :stop], CONFIG))
    chunk = blocks(xattention(q[:, start:stop], k[:, :stop], CONFIG))
    rows = whole[:, :, start // 64 : -(-stop // 64), : chunk.shape[-1]]
    assert torch.equal(chunk, rows)


def test_the_head_that_looks_at_one_span_finds_it() -> None:
    q, k = torch.randn(1, 1024, 1, 32), torch.randn(1, 1024, 1, 32)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    q += 8 * direction
    k[:, 320:352] += 8 * direction
    kept = blocks(xattention(q, k, XAttentionConfig(0.8, block_size=64)))[0, 0]
    assert kept[6:, 5].all()
    assert kept.float().sum(-1).mean() < 4


def test_threshold_per_head_and_layer() -> None:
    q, k = make(512, 512)
    table = ((0.0, 0.2, 0.9, 1.0), (1.0, 0.0, 0.5, 0.5))
    single = [blocks(xattention(q, k, XAttentionConfig(t, block_size=64))) for t in table[0]]
    per_head = blocks(xattention(q, k, XAttentionConfig(table[0], block_size=64), layer=17))
    assert all(torch.equal(per_head[:, h], single[h][:, h]) for h in range(4))
    per_layer = XAttentionConfig(torch.tensor(table), block_size=64)  # type: ignore[arg-type]
    assert torch.equal(blocks(xattention(q, k, per_layer, layer=0)), per_head)
    assert not torch.equal(blocks(xattention(q, k, per_layer, layer=1)), per_head)
    for layer in (None, 2, -1):
        with pytest.raises(ValueError, match=r"layer: expected an int in \[0, 2\)"):
            xattention(q, k, per_layer, layer=layer)
    with pytest.raises(ValueError, match="threshold: expected 4 values, one per query head, got 2 values"):
        xattention(q, k, XAttentionConfig((0.5, 0.5), block_size=64))


def test_mask_describes_the_call(device: str) -> None:
    q, k = torch.randn(2, 130, 4, 16, device=device), torch.randn(2, 200, 2, 16, device=device)
    mask = xattention(q, k)
    assert (mask.batch, mask.heads, mask.seq_lens, mask.block_size) == (2, 4, (130, 200), (128, 128))
    assert mask.causal
    assert mask.seqused_q is None
    assert not xattention(q, k, causal=False).causal
    mask.validate()


def test_config_round_trips_through_json() -> None:
    for config in (
        XAttentionConfig(),
        XAttentionConfig(0.5, 16, 64, True, False),
        XAttentionConfig((0.5, 0.25)),
        XAttentionConfig(((0.5, 0.25), (1.0, 0.0))),
    ):
        assert configure("xattention", json.loads(json.dumps(config.to_dict()))) == config
        assert hash(config) == hash(XAttentionConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": math.nan}, r"threshold: expected a number in \[0, 1\], got nan"),
        ({"threshold": 1.01}, r"threshold: expected a number in \[0, 1\], got 1.01"),
        ({"threshold": "0.9"}, r"threshold: expected a number in \[0, 1\]"),
        ({"threshold": None}, r"threshold: expected a number in \[0, 1\]"),
        ({"threshold": (0.5, -1.0)}, r"threshold: expected a number in \[0, 1\], got -1.0"),
        ({"threshold": ((0.5, 0.5), (0.5,))}, "threshold: expected a number, numbers per head, or equally long rows"),
        ({"threshold": (0.5, (0.5,))}, "threshold: expected a number, numbers per head, or equally long rows"),
        ({"threshold": ()}, "threshold: expected a number, numbers per head, or equally long rows"),
        ({"stride": 7}, r"stride: expected one of \(4, 8, 16\), got 7"),
        ({"block_size": 96}, r"block_size: expected one of \(64, 128\), got 96"),
        ({"keep_sink": 1}, "keep_sink: expected a bool, got 1"),
        ({"keep_recent": None}, "keep_recent: expected a bool, got None"),
        ({"treshold": 0.5}, "treshold: expected an option of XAttentionConfig .threshold, stride, block_size"),
    ],
)
def test_bad_config(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure("xattention", options)


def test_config_of_another_method() -> None:
    q, k = make(64, 64)
    with pytest.raises(TypeError, match="config: expected a XAttentionConfig, got dict"):
        xattention(q, k, {"threshold": 0.5})  # type: ignore[arg-type]
