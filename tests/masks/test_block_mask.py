"""BlockMask itself: what it shows, set algebra, transposition, density, copies."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import any_block, blocks_for, frames, masks, quick, repeat_blocks, visible_tokens

from sparseattn.masks import BlockMask


@st.composite
def framed_blocks(draw, count=1, ragged=True):
    frame = draw(frames(ragged))
    return (frame, *(draw(blocks_for(frame)) for _ in range(count)))


@quick
@given(framed_blocks())
def test_dense_is_listed_blocks_cut_by_the_frame(case):
    frame, blocks = case
    mask = BlockMask.from_blocks(blocks, **frame).validate()
    assert torch.equal(mask.to_dense(), repeat_blocks(blocks, frame) & visible_tokens(frame))
    assert torch.equal(mask.to_blocks(), blocks)


@quick
@given(framed_blocks())
def test_density_by_brute_force(case):
    frame, blocks = case
    mask = BlockMask.from_blocks(blocks, **frame)
    visible = any_block(visible_tokens(frame), frame)
    kept = (blocks & visible).sum((-1, -2))
    total = visible.sum((-1, -2)).expand_as(kept)
    torch.testing.assert_close(mask.densities(), (kept / total.clamp(min=1)).float())
    assert mask.densities().shape == (mask.batch, mask.heads)
    assert mask.density == pytest.approx(int(kept.sum()) / max(int(total.sum()), 1))


def test_density_counts_blocks_above_the_diagonal_on_neither_side():
    every = BlockMask.from_blocks(torch.ones(4, 4, dtype=torch.bool), seq_lens=64, block_size=16, causal=True)
    assert every.density == 1.0
    assert BlockMask.causal(64, block_size=16).density == 1.0


@quick
@given(masks())
def test_transposed_is_the_dense_transpose(mask):
    counts, indices = mask.transposed()
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == (*mask.kv_num_blocks.shape[:2], mask.num_kv_blocks)
    assert indices.shape == (*counts.shape, mask.num_q_blocks)
    blocks = mask.to_blocks()
    for b in range(blocks.shape[0]):
        for h in range(blocks.shape[1]):
            for n in range(mask.num_kv_blocks):
                rows = blocks[b, h, :, n].nonzero().flatten().tolist()
                assert indices[b, h, n, : counts[b, h, n]].tolist() == rows
    assert mask.transposed()[1] is indices, "built once"


def test_transposed_ignores_what_lies_past_the_count():
    mask = BlockMask.causal(128, block_size=16)
    past = torch.arange(8) >= mask.kv_num_blocks[..., None]
    poisoned = dataclasses.replace(mask, kv_indices=torch.where(past, -(2**31), mask.kv_indices).int())
    for ours, theirs in zip(mask.transposed(), poisoned.transposed(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(mask.to_dense(), poisoned.validate().to_dense())
    assert mask.density == poisoned.density
    assert torch.equal((mask | poisoned).to_dense(), mask.to_dense())


@quick
@given(framed_blocks(2))
def test_sets_are_boolean_algebra(case):
    frame, a, b = case
    heads = max(a.shape[1], b.shape[1])
    a, b = (x if x.shape[1] in (1, heads) else x[:, :1] for x in (a, b))
    left, right = BlockMask.from_blocks(a, **frame), BlockMask.from_blocks(b, **frame)
    for mask, blocks in ((left | right, a | b), (left & right, a & b)):
        mask.validate()
        assert torch.equal(mask.to_blocks(), blocks)
        assert mask.kv_indices.shape[-1] <= mask.num_kv_blocks
    assert torch.equal((left | right).to_dense(), left.to_dense() | right.to_dense())
    assert torch.equal((left & right).to_dense(), left.to_dense() & right.to_dense())


@quick
@given(frames(), frames(), st.data())
def test_intersection_takes_the_stricter_frame(one, other, data):
    other = {**one, "causal": other["causal"], "window": other["window"]}
    a, b = (BlockMask.from_blocks(data.draw(blocks_for(frame, heads=2)), **frame) for frame in (one, other))
    assert torch.equal((a & b).to_dense(), a.to_dense() & b.to_dense())


def test_unions_stay_compact():
    sink = BlockMask.streaming(1024, num_sink_tokens=16, num_local_tokens=0, block_size=16)
    local = BlockMask.streaming(1024, num_sink_tokens=0, num_local_tokens=32, block_size=16)
    assert (sink | local).kv_indices.shape[-1] == sink.kv_indices.shape[-1] + local.kv_indices.shape[-1] < 8
    both = BlockMask.streaming(1024, num_sink_tokens=16, num_local_tokens=32, block_size=16)
    assert torch.equal((sink | local).to_blocks(), both.to_blocks())


def test_equal_lengths_in_different_tensors_combine():
    used = torch.tensor([20, 64], dtype=torch.int32)
    a = BlockMask.causal(64, block_size=16, seqused_q=used, seqused_k=used)
    b = BlockMask.causal(64, block_size=16, seqused_q=used.clone(), seqused_k=used.clone())
    assert torch.equal((a | b).to_dense(), a.to_dense())


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_expand_heads_repeats_like_gqa_groups(heads):
    mask = BlockMask.from_blocks(torch.rand(2, 2, 4, 4) < 0.5, seq_lens=64, block_size=16)
    wide = mask.expand_heads(heads)
    assert wide.heads == heads
    for h in range(heads):
        assert torch.equal(wide.to_blocks()[:, h], mask.to_blocks()[:, h // (heads // 2)])


@quick
@given(masks())
def test_copies_keep_everything(mask):
    mask.transposed()
    for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), mask.trimmed(), mask.expand_heads(mask.heads)):
        assert torch.equal(twin.to_dense(), mask.to_dense())
        assert (twin.causal, twin.window, twin.shape) == (mask.causal, mask.window, mask.shape)
    assert b"_transposed" not in pickle.dumps(mask)
    assert mask.to("cpu") is mask
    width = mask.trimmed().kv_indices.shape[-1]
    assert width == (int(mask.kv_num_blocks.max()) if mask.kv_num_blocks.numel() else 0)


def test_to_moves_every_tensor():
    used = torch.tensor([20, 64], dtype=torch.int32)
    mask = BlockMask.causal(64, block_size=16, seqused_q=used, seqused_k=used).to("meta")
    assert {t.device.type for t in (mask.kv_num_blocks, mask.kv_indices, mask.seqused_q, mask.seqused_k)} == {"meta"}


def test_the_flag_and_the_constructor_share_a_name():
    assert BlockMask.causal(32, block_size=16).causal is True
    assert BlockMask.from_blocks(torch.ones(2, 2, dtype=torch.bool), seq_lens=32, block_size=16).causal is False
    plain = BlockMask(
        torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1, dtype=torch.int32), (16, 16), (32, 32)
    )
    assert plain.causal is False
    assert dataclasses.replace(plain, causal=True).causal is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.causal = True


def test_repr_says_what_it_is():
    mask = BlockMask.sliding_window((100, 200), (31, 0), block_size=(16, 32))
    assert repr(mask) == (
        "BlockMask(batch=1, heads=1, seq_lens=(100, 200), block_size=(16, 32), blocks=7x7, width=3, causal, "
        "window=(31, 0), device=cpu)"
    )


def test_no_queries_and_no_keys():
    for lens in ((0, 64), (64, 0), (0, 0)):
        mask = BlockMask.causal(lens, block_size=16).validate()
        assert mask.to_dense().shape == (1, 1, *lens)
        assert mask.density == 0.0
        assert (mask | mask).transposed()[0].sum() == 0
        assert mask.trimmed().kv_indices.shape[-1] == 0
