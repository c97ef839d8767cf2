"""Round trips to the lists of other kernels, and what those lists mean."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import blocks_for, frames, masks, masks_with_columns, quick

from sparseattn.masks import BlockMask
from sparseattn.masks.lists import scatter_blocks


class BlockSparseTensorsTorch(NamedTuple):
    """As FlashAttention-4 declares it, with fields that masks know nothing of."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None


def frame_of(mask):
    names = ("seq_lens", "causal", "window", "seqused_q", "seqused_k")
    return {name: getattr(mask, name) for name in names}


@quick
@given(masks())
def test_block_sparse_tensors_round_trip(mask):
    fields = mask.to_block_sparse_tensors()
    tensors = BlockSparseTensorsTorch(**fields)
    for source in (tensors, fields):
        again = BlockMask.from_block_sparse_tensors(source, **frame_of(mask)).validate()
        assert torch.equal(again.to_dense(), mask.to_dense())
    assert fields["mask_block_idx"].shape[-1] <= mask.kv_indices.shape[-1], "compact"


@quick
@given(masks())
def test_block_sparse_tensors_are_those_of_flex(mask):
    """FlexAttention splits partial and full blocks the same way, and transposes them."""
    flex = mask.to_flex()
    for transposed, names in ((False, "kv"), (True, "q")):
        fields = mask.to_block_sparse_tensors(transposed=transposed)
        width = mask.num_q_blocks if transposed else mask.num_kv_blocks
        for kind, prefix in (("mask", ""), ("full", "full_")):
            ours = scatter_blocks(fields[f"{kind}_block_cnt"], fields[f"{kind}_block_idx"], width)
            theirs = scatter_blocks(
                getattr(flex, f"{prefix}{names}_num_blocks"), getattr(flex, f"{prefix}{names}_indices"), width
            )
            assert torch.equal(ours, theirs.expand_as(ours))


def test_heads_and_batches_of_block_sparse_tensors_broadcast():
    mask = BlockMask.from_blocks(torch.rand(2, 2, 4, 4) < 0.5, seq_lens=64, block_size=16, causal=True)
    assert mask.to_block_sparse_tensors(6)["mask_block_cnt"].shape == (2, 6, 4)
    assert BlockMask.causal(64, block_size=16).to_block_sparse_tensors(6)["mask_block_cnt"].shape == (1, 1, 4)
    fields = mask.to_block_sparse_tensors()
    fields["full_block_cnt"], fields["full_block_idx"] = (
        torch.zeros(1, 1, 4, dtype=torch.int32),
        torch.zeros(1, 1, 4, 1, dtype=torch.int32),
    )
    again = BlockMask.from_block_sparse_tensors(fields, seq_lens=64, causal=True)
    assert again.to_blocks().shape == (2, 2, 4, 4)


@st.composite
def minference_lists(draw):
    """Lists as MInference's index kernel writes them: runs anywhere, columns anywhere, garbage past the counts."""
    length = draw(st.integers(0, 300))
    tiles, generator = -(-length // 64), torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def random(high, *shape):
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    heads, runs, columns = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 20))
    aligned = draw(st.booleans())
    offsets = random(max(length, 1), 1, heads, tiles, runs)
    offsets = offsets // 64 * 64 if aligned else offsets
    lists = (random(runs + 1, 1, heads, tiles), offsets, random(columns + 1, 1, heads, tiles))
    return length, (*lists, random(max(length, 1), 1, heads, tiles, columns))


def shown(length, lists):
    """bool ``[1, H, N, N]``: what the kernel shows, by a loop; its columns cut causally too."""
    count, offset, column_count, column = lists
    heads = count.shape[1]
    out = torch.zeros(1, heads, length, length, dtype=torch.bool)
    for h in range(heads):
        for tile in range(count.shape[2]):
            rows = slice(tile * 64, (tile + 1) * 64)
            for start in offset[0, h, tile, : count[0, h, tile]].tolist():
                out[0, h, rows, start : start + 64] = True
            out[0, h, rows, column[0, h, tile, : column_count[0, h, tile]].long()] = True
    return out.tril()


@quick
@given(minference_lists())
def test_minference_lists_become_exactly_what_they_show(case):
    length, lists = case
    expected = shown(length, lists)
    mask = BlockMask.from_minference(*lists, seq_lens=length).validate()
    assert torch.equal(mask.to_dense(), expected)
    more = BlockMask.from_minference(*lists, seq_lens=length, superset=True).validate()
    assert (expected <= more.to_dense()).all()


@quick
@given(st.integers(0, 300), st.sampled_from([64, 128]), st.sampled_from([64, 128, 192]), st.data())
def test_minference_round_trip(length, block_q, block_kv, data):
    frame = {"seq_lens": (length, length), "block_size": (block_q, block_kv), "causal": True, "window": None}
    blocks = data.draw(blocks_for(frame))[:1]
    mask = BlockMask.from_blocks(blocks, **frame)
    rows = torch.arange(mask.num_q_blocks, dtype=torch.int32)[:, None] * block_q
    columns = torch.arange(0, max(length, 1), 7, dtype=torch.int32)
    mask = mask.with_columns(torch.where(columns <= rows, columns, -1))
    lists = mask.to_minference(2 * mask.heads)
    assert all(t.dtype == torch.int32 and t.shape[2] == -(-length // 64) for t in lists)
    again = BlockMask.from_minference(*lists, seq_lens=length).validate()
    assert torch.equal(again.to_dense(), mask.to_dense().repeat_interleave(2, 1))
    assert torch.equal(shown(length, lists), again.to_dense())


@quick
@given(masks_with_columns(), frames())
def test_only_what_a_kernel_can_do_converts(mask, frame):
    with pytest.raises(ValueError, match=r"column_indices: expected None.*whole_blocks\(\)"):
        mask.to_block_sparse_tensors()
    if not mask.causal or mask.window is not None or mask.ragged or mask.seq_lens[0] != mask.seq_lens[1]:
        with pytest.raises(ValueError, match="mask: expected a causal mask"):
            mask.to_minference()
    elif mask.block_size[0] % 64 or mask.block_size[1] % 64:
        with pytest.raises(ValueError, match="block_size: expected multiples of 64"):
            mask.to_minference()


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


tensors = {"mask_block_cnt": ints(1, 1, 4), "mask_block_idx": ints(1, 1, 4, 2), "block_size": (16, 16)}
lists = (ints(1, 1, 2), ints(1, 1, 2, 3), ints(1, 1, 2), ints(1, 1, 2, 5))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"mask_block_cnt": None}, TypeError, "mask_block_cnt: expected an int32 tensor, got NoneType"),
        ({"mask_block_idx": ints(1, 1, 4, 2).long()}, TypeError, r"mask_block_idx: .*got torch\.int64"),
        ({"mask_block_cnt": ints(1, 1, 5)}, ValueError, "mask_block_cnt: expected 3 dimensions, the third 4"),
        ({"full_block_cnt": ints(1, 1, 4)}, TypeError, "full_block_idx: expected an int32 tensor"),
        ({"mask_block_cnt": ints(1, 1, 4) + 3}, ValueError, "mask_block_idx: expected counts up to 2"),
        ({"mask_block_cnt": ints(1, 1, 4) + 1, "mask_block_idx": ints(1, 1, 4, 2) + 4}, ValueError, "mask_block_idx"),
        ({"full_block_cnt": ints(1, 1, 4) + 1, "full_block_idx": ints(1, 1, 4, 2)}, ValueError, "full_block_idx: .*cu"),
        ({"block_size": None}, ValueError, "block_size: expected given"),
    ],
)  # fmt: skip
def test_wrong_block_sparse_tensors_are_named(change, kind, message):
    with pytest.raises(kind, match=message):
        BlockMask.from_block_sparse_tensors(tensors | change, seq_lens=64, causal=True)
    assert BlockMask.from_block_sparse_tensors(tensors, seq_lens=64, causal=True).density == 0


@pytest.mark.parametrize(
    ("at", "value", "kind", "message"),
    [
        (0, [1], TypeError, "block_count: expected an int32 tensor, got list"),
        (1, ints(1, 1, 2, 3).long(), TypeError, "block_offset: expected an int32 tensor"),
        (2, ints(1, 1, 3), ValueError, r"column_count: expected 3 dimensions \[B, H, 2"),
        (3, ints(1, 2, 2, 5), ValueError, "column_index: expected 4 dimensions"),
    ],
)
def test_wrong_minference_lists_are_named(at, value, kind, message):
    with pytest.raises(kind, match=message):
        BlockMask.from_minference(*lists[:at], value, *lists[at + 1 :], seq_lens=100)


def test_columns_a_tile_cannot_hide_are_refused():
    mask = BlockMask.from_blocks(torch.zeros(2, 2, dtype=torch.bool), seq_lens=128, block_size=64, causal=True)
    assert mask.with_columns(torch.tensor([0], dtype=torch.int32)).to_minference()[2].tolist() == [[[1, 1]]]
    with pytest.raises(ValueError, match="mask: expected columns at or before the first row"):
        mask.with_columns(torch.tensor([70], dtype=torch.int32)).to_minference()
    with pytest.raises(ValueError, match="num_heads: expected a multiple"):
        mask.to_minference(0)
    with pytest.raises(ValueError, match="num_heads: expected a multiple"):
        mask.expand_heads(2).to_block_sparse_tensors(3)
