"""Pictures say what the mask holds."""

from __future__ import annotations

import pytest
import torch

from sparseattn.masks import BlockMask

pytest.importorskip("matplotlib")


def test_draws_heads_with_their_density(tmp_path):
    blocks = torch.zeros(1, 6, 4, 4, dtype=torch.bool)
    blocks[:, 0, :, 0] = True
    mask = BlockMask.from_blocks(blocks, seq_lens=64, block_size=16, causal=True)
    path = tmp_path / "mask.png"
    figure = mask.plot(path=str(path))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["head 0: density 40.0 %", *(f"head {h}: density 0.0 %" for h in (1, 3, 4))]
    # 0 hidden, 1 skipped, 2 selected.
    assert figure.axes[0].images[0].get_array().tolist() == [[2, 0, 0, 0], [2, 1, 0, 0], [2, 1, 1, 0], [2, 1, 1, 1]]
    assert path.stat().st_size > 1000
    # 3 skipped but for columns.
    figure = mask.with_columns(torch.tensor([3, 20], dtype=torch.int32)).plot([0, 1])
    assert figure.axes[0].images[0].get_array().tolist() == [[2, 0, 0, 0], [2, 3, 0, 0], [2, 3, 1, 0], [2, 3, 1, 1]]
    assert figure.axes[1].images[0].get_array().tolist() == [[3, 0, 0, 0], [3, 3, 0, 0], [3, 3, 1, 0], [3, 3, 1, 1]]


def test_wraps_many_heads_and_shares_one():
    mask = BlockMask.causal(64, block_size=16).expand_heads(6)
    figure = mask.plot(heads=range(6))
    assert len(figure.axes) == 8
    assert [axis.axison for axis in figure.axes] == [True] * 6 + [False] * 2
    used = torch.tensor([64, 20], dtype=torch.int32)
    ragged = BlockMask.causal(64, block_size=16, seqused_q=used, seqused_k=used)
    assert len(ragged.plot(batch=1).axes) == 1
