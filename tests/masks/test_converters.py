"""Round trips between forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import blocks_for, frames, masks, quick, repeat_blocks, visible_tokens

from sparseattn.masks import BlockMask
from sparseattn.masks.lists import compact, scatter_blocks


def frame_of(mask):
    names = ("seq_lens", "block_size", "causal", "window", "seqused_q", "seqused_k")
    return {name: getattr(mask, name) for name in names}


def same(a, b):
    assert torch.equal(a.to_blocks(), b.to_blocks())
    assert torch.equal(a.to_dense(), b.to_dense())


@quick
@given(st.integers(0, 9), st.integers(0, 40), st.integers(0, 2**20), st.data())
def test_compact_and_scatter_are_inverse(rows, cols, seed, data):
    blocks = torch.rand(2, rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.4
    counts, indices = compact(blocks)
    assert counts.dtype == indices.dtype == torch.int32
    assert torch.equal(scatter_blocks(counts, indices, cols), blocks)
    for b in range(2):
        for r in range(rows):
            assert indices[b, r, : counts[b, r]].tolist() == blocks[b, r].nonzero().flatten().tolist()
            assert not indices[b, r, counts[b, r] :].any()
    width = data.draw(st.integers(0, cols))
    counts, cut = compact(blocks, width)
    assert torch.equal(counts, blocks.sum(-1).clamp(max=width).int())
    assert torch.equal(scatter_blocks(counts, cut, cols), blocks & (blocks.cumsum(-1) <= width))


@quick
@given(masks())
def test_bsr_round_trip(mask):
    indptr, indices = mask.to_bsr()
    assert indptr.dtype == indices.dtype == torch.int32
    assert indptr.shape == (*mask.kv_num_blocks.shape[:2], mask.num_q_blocks + 1)
    same(BlockMask.from_bsr(indptr, indices, **frame_of(mask)), mask)
    same(BlockMask.from_bsr(indptr, indices, **frame_of(mask), max_blocks=mask.trimmed().kv_indices.shape[-1]), mask)


def test_bsr_as_scipy_and_flashinfer_hold_it():
    indptr, indices = np.array([0, 2, 2, 3]), np.array([0, 3, 1], dtype=np.int32)
    mask = BlockMask.from_bsr(indptr, indices, seq_lens=(48, 64), block_size=16)
    assert mask.to_blocks()[0, 0].int().tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    back = mask.to_bsr()
    assert back[0].flatten().tolist() == indptr.tolist()
    assert back[1].tolist() == indices.tolist()
    unsorted = BlockMask.from_bsr(
        torch.tensor([0, 3, 3, 4]), torch.tensor([3, 0, 3, 1]), seq_lens=(48, 64), block_size=16, sort=True
    )
    same(unsorted, mask)


@quick
@given(masks(), st.integers(0, 2**20))
def test_shuffled_padded_indices_sort_back(mask, seed):
    width = mask.kv_indices.shape[-1]
    past = torch.arange(width) >= mask.kv_num_blocks[..., None]
    padded = torch.where(past, -1, mask.kv_indices)
    same(BlockMask.from_indices(padded, **frame_of(mask)), mask)
    same(BlockMask.from_indices(mask.kv_indices.long(), mask.kv_num_blocks.long(), **frame_of(mask)), mask)
    twice = torch.cat([padded, padded], dim=-1)
    shuffled = twice[..., torch.randperm(2 * width, generator=torch.Generator().manual_seed(seed))]
    same(BlockMask.from_indices(shuffled, **frame_of(mask), sort=True), mask)
    same(BlockMask.from_indices(shuffled, **frame_of(mask), sort=True, validate=False), mask)


@quick
@given(frames(), st.data())
def test_dense_round_trip(frame, data):
    blocks = data.draw(blocks_for(frame))
    dense = repeat_blocks(blocks, frame) & visible_tokens(frame)
    rest = {name: value for name, value in frame.items() if name != "seq_lens"}
    mask = BlockMask.from_dense(dense, **rest).validate()
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(BlockMask.from_dense(dense, **rest, superset=True).to_dense(), dense)


@quick
@given(frames(), st.integers(0, 2**20), st.sampled_from([0.003, 0.1, 0.7]))
def test_superset_shows_no_less(frame, seed, chance):
    sq, sk = frame["seq_lens"]
    dense = torch.rand(1, 2, sq, sk, generator=torch.Generator().manual_seed(seed)) < chance
    dense = dense & visible_tokens(frame)
    rest = {name: value for name, value in frame.items() if name != "seq_lens"}
    mask = BlockMask.from_dense(dense, **rest, superset=True)
    assert (dense <= mask.to_dense()).all()
    if not torch.equal(mask.to_dense(), dense):
        with pytest.raises(ValueError, match=r"dense: .*superset=True"):
            BlockMask.from_dense(dense, **rest)


def test_dense_accepts_fewer_dimensions():
    dense = torch.ones(40, 50).tril(10).bool()
    for d in (dense, dense[None], dense[None, None]):
        mask = BlockMask.from_dense(d, block_size=16, causal=True)
        assert mask.shape == (1, 1, 40, 50)
        assert torch.equal(mask.to_dense()[0, 0], dense)
    assert mask.kv_indices.shape[-1] == 4, "as wide as the longest row"


def test_max_blocks_makes_lists_narrow():
    blocks = torch.eye(8, dtype=torch.bool)
    mask = BlockMask.from_blocks(blocks, seq_lens=128, block_size=16, max_blocks=1)
    assert mask.kv_indices.shape == (1, 1, 8, 1)
    assert torch.equal(mask.to_blocks()[0, 0], blocks)


def test_booleans_may_stand_for_several_blocks():
    """The last ones for as many as there are."""
    coarse = torch.tensor([[True, False, True], [False, True, False]])
    mask = BlockMask.from_blocks(coarse, seq_lens=(80, 112), block_size=16, repeat=(3, 3))
    assert mask.kv_indices.shape == (1, 1, 5, 7)
    assert torch.equal(mask.to_blocks()[0, 0], coarse.repeat_interleave(3, 0)[:5].repeat_interleave(3, 1)[:, :7])
    assert torch.equal(mask.to_dense()[0, 0], coarse.repeat_interleave(48, 0)[:80].repeat_interleave(48, 1)[:, :112])
