"""Patterns against their definition, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import any_block, frames, grid, quick, visible_tokens

from sparseattn.masks import BlockMask


def shared(frame):
    return {name: frame[name] for name in ("block_size", "seqused_q", "seqused_k") if name in frame}


@quick
@given(frames())
def test_causal_is_exact_and_minimal(frame):
    frame |= {"causal": True, "window": None}
    mask = BlockMask.causal(frame["seq_lens"], **shared(frame)).validate()
    assert mask.causal
    assert torch.equal(mask.to_dense(), visible_tokens(frame))
    assert torch.equal(mask.to_blocks(), any_block(visible_tokens(frame), frame))


@quick
@given(frames(), st.booleans())
def test_sliding_window_is_exact_and_minimal(frame, causal):
    window = frame["window"] or (17, 3)
    frame |= {"causal": causal, "window": window}
    mask = BlockMask.sliding_window(frame["seq_lens"], window, causal=causal, **shared(frame)).validate()
    assert torch.equal(mask.to_dense(), visible_tokens(frame))
    assert torch.equal(mask.to_blocks(), any_block(visible_tokens(frame), frame))


@quick
@given(frames(), st.integers(0, 70), st.integers(0, 90), st.booleans())
def test_streaming_lists_the_blocks_of_its_tokens(frame, sink, local, causal):
    frame |= {"causal": causal, "window": None}
    mask = BlockMask.streaming(
        frame["seq_lens"], num_sink_tokens=sink, num_local_tokens=local, causal=causal, **shared(frame)
    ).validate()
    visible = visible_tokens(frame)
    columns = torch.arange(-(-sink // frame["block_size"][1]) * frame["block_size"][1])
    sinks = torch.zeros_like(visible)
    sinks[..., columns[columns < frame["seq_lens"][1]]] = True
    near = torch.zeros_like(visible)
    if local:
        near = visible_tokens(frame | {"window": (local - 1, local - 1)})
    assert torch.equal(mask.to_blocks(), any_block(visible & (sinks | near), frame))
    assert ((visible & (sinks | near)) <= mask.to_dense()).all()


@quick
@given(frames(ragged=False), st.integers(1, 5), st.integers(0, 60), st.booleans())
def test_strided_lists_every_nth_block_from_the_diagonal(frame, stride, local, causal):
    frame |= {"causal": causal, "window": None}
    sq, sk = frame["seq_lens"]
    bq, bk = frame["block_size"]
    mask = BlockMask.strided(
        (sq, sk), stride=stride, num_local_tokens=local, causal=causal, block_size=(bq, bk)
    ).validate()
    visible = any_block(visible_tokens(frame), frame)
    near = torch.zeros_like(visible)
    if local:
        near = any_block(visible_tokens(frame | {"window": (local - 1, 0 if causal else local - 1)}), frame)
    for m in range(grid(frame)[0]):
        last_key = min((m + 1) * bq, sq) - 1 + sk - sq
        diagonal = last_key // bk if last_key >= 0 and sk else -1
        for n in range(grid(frame)[1]):
            listed = visible[0, 0, m, n] & (near[0, 0, m, n] | ((diagonal - n) % stride == 0))
            assert mask.to_blocks()[0, 0, m, n] == listed, (m, n)


def test_streaming_by_example():
    mask = BlockMask.streaming(160, num_sink_tokens=4, num_local_tokens=32, block_size=16)
    rows = [mask.kv_indices[0, 0, m, : mask.kv_num_blocks[0, 0, m]].tolist() for m in range(10)]
    # Query 128 opens block 8: its 32 latest keys are 97..128, in blocks 6, 7 and 8.
    assert rows[8] == [0, 6, 7, 8]
    assert rows[1] == [0, 1]


def test_patterns_never_hold_a_full_row_when_they_need_not():
    n = 1 << 20
    assert BlockMask.sliding_window(n, (1023, 0)).kv_indices.shape == (1, 1, 8192, 10)
    assert BlockMask.streaming(n, num_sink_tokens=128, num_local_tokens=1024).kv_indices.shape == (1, 1, 8192, 11)


def test_chunk_is_the_last_rows_of_the_whole():
    whole = BlockMask.sliding_window(256, (40, 0), block_size=16).to_dense()
    chunk = BlockMask.sliding_window((64, 256), (40, 0), block_size=16).to_dense()
    assert torch.equal(chunk, whole[:, :, -64:])


def test_early_rows_see_nothing_when_queries_outnumber_keys():
    mask = BlockMask.causal((96, 32), block_size=16)
    assert mask.kv_num_blocks.flatten().tolist() == [0, 0, 0, 0, 1, 2]
    assert not mask.to_dense()[0, 0, :64].any()


def test_lengths_decide_the_device(device):
    used = torch.tensor([5, 40], dtype=torch.int32, device=device)
    mask = BlockMask.causal(64, block_size=16, seqused_q=used, seqused_k=used)
    assert mask.device == used.device
    assert mask.kv_num_blocks[:, 0].tolist() == [[1, 0, 0, 0], [1, 2, 3, 0]]
    assert BlockMask.causal(64, block_size=16, device=device).device.type == device


@pytest.mark.parametrize("make", [BlockMask.causal, lambda n, **kw: BlockMask.strided(n, stride=2, **kw)])
def test_one_size_serves_both_sides(make):
    assert make(64, block_size=32).block_size == (32, 32)
    assert make(64).seq_lens == (64, 64)
