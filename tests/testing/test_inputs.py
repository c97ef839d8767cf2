"""Random inputs and masks."""

from __future__ import annotations

import pytest
import torch

from sparseattn.testing import make_qkv, random_block_mask, random_blocks


@pytest.mark.parametrize("seq_lens", [(256, 256), (64, 256), (200, 130)])
@pytest.mark.parametrize("block_size", [(16, 16), (32, 16), (16, 64)])
def test_hidden_blocks_can_be_left_out(seq_lens: tuple[int, int], block_size: tuple[int, int]) -> None:
    def draw(**options: bool) -> torch.Tensor:
        return random_blocks(seq_lens, block_size, 3, density=0.6, **options)

    (sq, sk), (bq, bk) = seq_lens, block_size
    last = torch.arange(1, 1 + -(-sq // bq))[:, None] * bq + sk - sq  # one past the last key that a row sees
    hidden = (torch.arange(-(-sk // bk)) * bk)[None, :] >= last.clamp(max=sk)
    assert torch.equal(draw(hidden=False), draw() & ~hidden)
    assert bool(hidden.any()) is (draw() & hidden).any().item()


def test_the_diagonal_leaves_no_row_empty() -> None:
    blocks = random_blocks((256, 256), (16, 16), 2, density=0.01, diagonal=True, hidden=False)
    assert blocks.diagonal(dim1=2, dim2=3).all()
    assert 0.05 < blocks.float().mean() < 0.1
    mask = random_block_mask((256, 256), (16, 16), 2, density=0.01, diagonal=True, hidden=False)
    assert torch.equal(mask.to_blocks(), blocks)


def test_density_one_keeps_everything_visible() -> None:
    assert random_block_mask((512, 512), (64, 32), 2, density=1.0, hidden=False).density == 1


def test_numbers_are_the_same_on_every_device_unless_drawn_there(device: str) -> None:
    shape = (1, 8, 16, 4, 2, 16, 32)
    here, there = make_qkv(*shape), make_qkv(*shape, device=device)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    drawn = make_qkv(*shape, device=device, dtype=torch.bfloat16, on_device=True)
    assert [t.shape for t in drawn] == [t.shape for t in here]
    assert all(t.device.type == device and t.dtype == torch.bfloat16 for t in drawn)
    again = make_qkv(*shape, device=device, dtype=torch.bfloat16, on_device=True)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
