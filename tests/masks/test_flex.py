"""To and from FlexAttention, checked against torch's own mask code and its kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import all_block, any_block, blocks_for, frames, masks, quick, settings, visible_tokens

from sparseattn.masks import BlockMask
from sparseattn.masks.lists import scatter_blocks


def dense_attention(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v over visible tokens, 0 where a row sees none; BHSD."""
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


@st.composite
def framed_blocks(draw):
    frame = draw(frames())
    return frame, draw(blocks_for(frame))


@quick
@given(framed_blocks())
def test_lists_split_into_full_and_partial(case):
    frame, blocks = case
    made = BlockMask.from_blocks(blocks, **frame).to_flex()
    visible = visible_tokens(frame)
    full = blocks & all_block(visible, frame)
    partial = blocks & any_block(visible, frame) & ~full
    mb, nb = blocks.shape[2:]
    for name, expected in (("", partial), ("full_", full)):
        for side, rows in (("kv", expected), ("q", expected.transpose(-1, -2))):
            counts, indices = (getattr(made, f"{name}{side}_{kind}") for kind in ("num_blocks", "indices"))
            assert counts.dtype == indices.dtype == torch.int32
            assert counts.is_contiguous()
            assert indices.is_contiguous()
            assert indices.shape == (*rows.shape[:3], nb if side == "kv" else mb), "torch wants full width"
            assert torch.equal(counts, rows.sum(-1).int())
            assert torch.equal(scatter_blocks(counts, indices, rows.shape[-1]), rows)
            assert ((indices >= 0) & (indices < max(rows.shape[-1], 1))).all(), "torch's kernels read ahead"


@quick
@given(masks())
def test_mask_mod_alone_is_the_mask(mask):
    sq, sk = mask.seq_lens
    if not sq or not sk:
        return
    made = mask.to_flex()
    dense = flex.create_mask(made.mask_mod, mask.batch, mask.heads, sq, sk, device="cpu")
    assert torch.equal(dense, mask.to_dense().expand_as(dense))


@quick
@given(masks())
def test_round_trip(mask):
    back = BlockMask.from_flex(mask.to_flex(), seqused_q=mask.seqused_q, seqused_k=mask.seqused_k).validate()
    assert torch.equal(back.to_dense(), mask.to_dense())
    lean = mask.to_flex(self_contained=False)
    back = BlockMask.from_flex(lean, seqused_q=mask.seqused_q, seqused_k=mask.seqused_k)
    assert torch.equal(back.to_dense(), mask.to_dense())


@settings(quick, max_examples=15)
@given(masks(ragged=False))
def test_agrees_with_create_block_mask(mask):
    sq, sk = mask.seq_lens
    if not sq or not sk:
        return
    made = mask.to_flex()
    batch, heads = mask.kv_num_blocks.shape[:2]
    theirs = flex.create_block_mask(made.mask_mod, batch, heads, sq, sk, device="cpu", BLOCK_SIZE=mask.block_size)
    assert made.shape == theirs.shape
    assert made.sparsity() == pytest.approx(theirs.sparsity())
    assert torch.equal(made.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(made, name), getattr(theirs, name)), name
    assert torch.equal(BlockMask.from_flex(theirs).to_dense(), mask.to_dense())


def test_heads_repeat_unless_shared():
    shared = BlockMask.causal(64, block_size=16)
    assert shared.to_flex(8).kv_indices.shape == (1, 1, 4, 4)
    group = BlockMask.from_blocks(torch.rand(1, 2, 4, 4) < 0.5, seq_lens=64, block_size=16, causal=True)
    made = group.to_flex(6)
    assert made.kv_indices.shape == (1, 6, 4, 4)
    assert torch.equal(BlockMask.from_flex(made).to_dense(), group.expand_heads(6).to_dense())
    with pytest.raises(ValueError, match=r"num_heads: expected a multiple of the mask's 2 heads, got 3"):
        group.to_flex(3)


@pytest.mark.parametrize("used", [None, [70, 0]], ids=["whole", "ragged"])
@pytest.mark.parametrize(("window", "causal"), [(None, True), ((40, 20), False)], ids=["causal", "window"])
def test_uncompiled_flex_attention(monkeypatch, window, causal, used):
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    used = None if used is None else torch.tensor(used, dtype=torch.int32)
    mask = BlockMask.from_blocks(
        torch.rand(2, 2, 5, 4) < 0.6,
        seq_lens=(70, 100),
        block_size=(16, 32),
        causal=causal,
        window=window,
        seqused_q=used,
    )
    q, k, v = torch.randn(2, 4, 70, 16), torch.randn(2, 4, 100, 16), torch.randn(2, 4, 100, 16)
    out = flex.flex_attention(q, k, v, block_mask=mask.to_flex(4))
    torch.testing.assert_close(out, dense_attention(q, k, v, mask.expand_heads(4).to_dense()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own imports while it compiles
def test_compiled_flex_attention(device):
    """Compiled kernels follow the lists: without membership in mask_mod nothing else hides unlisted blocks."""
    blocks = torch.rand(1, 2, 4, 5, device=device) < 0.5
    mask = BlockMask.from_blocks(blocks, seq_lens=(250, 310), block_size=64, causal=True)
    q, k, v = (torch.randn(2, 4, n, 32, device=device) for n in (250, 310, 310))
    made = mask.to_flex(4, self_contained=False)
    out = torch.compile(flex.flex_attention)(q, k, v, block_mask=made)
    expected = dense_attention(*(x.double() for x in (q, k, v)), mask.expand_heads(4).to_dense())
    # CUDA multiplies float32 in TF32 by default, good for three digits; a wrong mask is off in the first.
    tolerance = 1e-5 if device == "cpu" else 1e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def create(mask_mod, sq=96, sk=96, block=16):
    return flex.create_block_mask(mask_mod, None, None, sq, sk, device="cpu", BLOCK_SIZE=block)


def test_from_flex_recognizes_what_it_can_express():
    causal = BlockMask.from_flex(create(lambda b, h, q, kv: q >= kv))
    assert (causal.causal, causal.window) == (True, None)
    window = BlockMask.from_flex(create(lambda b, h, q, kv: (q >= kv) & (q - kv <= 20)))
    assert (window.causal, window.window) == (True, (20, None))
    both = BlockMask.from_flex(create(lambda b, h, q, kv: (q - kv <= 20) & (kv - q <= 7)))
    assert (both.causal, both.window) == (False, (20, 7))
    aligned = BlockMask.from_flex(create(lambda b, h, q, kv: q + 32 >= kv, 64, 96))
    assert aligned.causal
    # Aligned at the top left with more queries than keys: the same as a window that reaches Sq - Sk to the right.
    top_left = create(lambda b, h, q, kv: q >= kv, 96, 64)
    assert torch.equal(BlockMask.from_flex(top_left).to_dense(), torch.ones(96, 64).tril().bool()[None, None])
    lists = BlockMask.causal(96, block_size=16)
    plain = flex.BlockMask.from_kv_blocks(lists.kv_num_blocks, lists.kv_indices, BLOCK_SIZE=16)
    assert torch.equal(BlockMask.from_flex(plain).to_blocks(), lists.to_blocks())
    assert not BlockMask.from_flex(plain).causal


@pytest.mark.parametrize(
    ("mask_mod", "lens", "reason"),
    [
        (lambda b, h, q, kv: q // 20 == kv // 20, (96, 96), "depends on more than query - key"),
        (lambda b, h, q, kv: (q >= kv) & ((q - kv <= 8) | (kv < 4)), (96, 96), "depends on more than query - key"),
        (lambda b, h, q, kv: q >= kv, (64, 96), "leaves out the diagonal"),
        (lambda b, h, q, kv: q > kv + 3, (96, 96), "leaves out the diagonal"),
    ],
    ids=["documents", "sink", "top-left", "strictly-below"],
)
def test_from_flex_refuses_the_rest(mask_mod, lens, reason):
    with pytest.raises(ValueError, match=rf"block_mask: expected a mask_mod .*{reason}.*bottom right"):
        BlockMask.from_flex(create(mask_mod, *lens))
