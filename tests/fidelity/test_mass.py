"""Recall and its relatives against softmax written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.fidelity import lse_deficit, mass_statistics, output_error, recall
from sparseattn.testing import dense_attention, make_qkv, random_block_mask


def brute_force(q: Tensor, k: Tensor, selected: Tensor, visible: Tensor, **options: Any) -> Tensor:
    """Share of the softmax over ``visible`` that lies on ``selected``; both bool [B|1, H, Sq, Sk]."""
    scores = q.double().transpose(1, 2) @ k.double().transpose(1, 2).repeat_interleave(
        q.shape[2] // k.shape[2], 1
    ).transpose(-1, -2)
    scores = scores * options.get("scale", q.shape[-1] ** -0.5)
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    p = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (p * (selected & visible)).sum(-1).float()


def causal(sq: int, sk: int) -> Tensor:
    return torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)


@pytest.mark.parametrize(("sq", "sk"), [(200, 200), (70, 200)], ids=["square", "chunk"])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 2.0}], ids=["plain", "scale", "softcap"])
def test_recall_is_the_selected_share(sq: int, sk: int, heads: int, options: dict, device: str) -> None:
    q, k, v = make_qkv(2, sq, sk, 4, 2, 32, device=device)
    mask = random_block_mask((sq, sk), (32, 48), heads, batch=2, density=0.4, diagonal=True, device=device)
    got = recall(q, k, v, mask, **options)
    selected = mask.to_dense().cpu().repeat_interleave(4 // heads, 1)
    expected = brute_force(q.cpu(), k.cpu(), selected, causal(sq, sk), **options)
    assert got.dtype == torch.float32
    assert got.shape == (2, 4, sq)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse_deficit(q, k, mask, **options).cpu(), -expected.log(), atol=1e-5, rtol=1e-5)


def test_what_the_mask_hides_inside_its_blocks_is_not_a_loss() -> None:
    q, k, _ = make_qkv(1, 150, 150, 2, 2, 16)
    everything = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    mask = BlockMask.from_blocks(everything, block_size=(16, 16), seq_lens=(150, 150), causal=True, window=(40, None))
    for result in (recall(q, k, None, mask), recall(q, k, None, mask, window=(20, 0))):
        torch.testing.assert_close(result, torch.ones(1, 2, 150), atol=1e-5, rtol=0)


def test_rows_that_lose_everything_and_rows_that_have_nothing() -> None:
    q, k, _ = make_qkv(1, 64, 64, 2, 2, 16)
    blocks = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    blocks[..., :2, :] = True
    mask = BlockMask.from_blocks(blocks, block_size=(16, 16), seq_lens=(64, 64), causal=True)
    ranges = torch.tensor([[10, 64]], dtype=torch.int32)
    got = recall(q, k, None, mask)
    assert (got[..., 32:] == 0).all()
    assert lse_deficit(q, k, mask)[..., 32:].eq(math.inf).all()
    assert mass_statistics(got).worst == 0
    assert mass_statistics(got).deficit == math.inf
    everything = BlockMask.causal((64, 64), block_size=16)
    padded = recall(q, k, None, everything, ranges_q=ranges, ranges_k=ranges)
    assert padded[..., :10].isnan().all()
    torch.testing.assert_close(padded[..., 10:], torch.ones(1, 2, 54), atol=1e-5, rtol=0)
    assert mass_statistics(padded).mean == pytest.approx(1, abs=1e-5)


def test_packed_recall_is_that_of_the_sequences() -> None:
    q, k, v = make_qkv(1, 96, 96, 4, 2, 16)
    cu = torch.tensor([0, 40, 96], dtype=torch.int32)
    from sparseattn import XAttentionConfig, xattention

    config = XAttentionConfig(threshold=0.5, stride=4, block_size=64)
    layout = dict(cu_seqlens_q=cu, max_seqlen_q=56)
    packed = recall(q[0], k[0], v[0], xattention(q[0], k[0], config, **layout), **layout)
    assert packed.shape == (4, 96)
    for start, end in ((0, 40), (40, 96)):
        one = slice(start, end)
        mask = xattention(q[:, one], k[:, one], config)
        torch.testing.assert_close(packed[:, one], recall(q[:, one], k[:, one], None, mask)[0], atol=1e-5, rtol=1e-5)


def test_statistics() -> None:
    values = torch.arange(1, 101) / 100
    stats = mass_statistics(torch.cat([values, torch.tensor([math.nan])]).view(1, 1, -1))
    assert stats.mean == pytest.approx(0.505)
    assert stats.p05 == pytest.approx(0.05)
    assert stats.worst == pytest.approx(0.01)
    assert stats.deficit == pytest.approx(-values.log().mean().item())
    with pytest.raises(ValueError, match=r"recall: expected at least one row"):
        mass_statistics(torch.full((3,), math.nan))


def test_output_error() -> None:
    q, k, v = make_qkv(1, 100, 100, 2, 2, 16)
    mask = random_block_mask((100, 100), (16, 16), 2, density=0.3, diagonal=True)
    sparse = block_sparse_attention(q, k, v, mask)
    dense, _ = dense_attention(q, k, v, causal(100, 100)[None, None])
    expected = ((sparse - dense).norm() / dense.norm()).item()
    assert output_error(sparse, dense) == pytest.approx(expected, rel=1e-5)
    assert output_error(dense, dense) == 0
    assert output_error(torch.zeros(3), torch.zeros(3)) == 0
    assert output_error(torch.ones(3), torch.zeros(3)) == math.inf
    with pytest.raises(ValueError, match=r"o: expected shape \(3,\) like o_ref, got shape \(2,\)"):
        output_error(torch.ones(2), torch.ones(3))


def test_a_mask_is_asked_for() -> None:
    q, k, v = make_qkv(1, 64, 64, 2, 2, 16)
    with pytest.raises(TypeError, match="mask: expected a BlockMask, got Tensor"):
        recall(q, k, v, torch.ones(1, 1, 4, 4))
