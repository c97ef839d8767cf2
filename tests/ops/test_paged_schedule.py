"""Which program works on what: the device's counting against loops, with more sequences than one look takes."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language", reason="needs Triton")
schedule = pytest.importorskip("sparseattn.ops.paged.triton_schedule", reason="needs Triton")
tiles = pytest.importorskip("sparseattn.kernels.tiles", reason="needs Triton")

first_item, item_share, share_length = (
    getattr(schedule, name) for name in ("first_item", "item_share", "share_length")
)
slot_tile = tiles.slot_tile


@triton.jit
def probe_items(lens_ptr, out_ptr, batch, limit, target, least):
    share = share_length(lens_ptr, batch, limit, target, least)
    b, index, count = item_share(lens_ptr, tl.program_id(0), batch, limit, share)
    tl.store(out_ptr + tl.program_id(0) * 4, b)
    tl.store(out_ptr + tl.program_id(0) * 4 + 1, index)
    tl.store(out_ptr + tl.program_id(0) * 4 + 2, count)
    tl.store(out_ptr + tl.program_id(0) * 4 + 3, first_item(lens_ptr, tl.minimum(b, batch), limit, share))


@triton.jit
def probe_slots(cu_ptr, out_ptr, batch, PACK: tl.constexpr, TILE: tl.constexpr):
    b, tile = slot_tile(cu_ptr, tl.program_id(0), batch, PACK, TILE)
    tl.store(out_ptr + tl.program_id(0) * 2, b)
    tl.store(out_ptr + tl.program_id(0) * 2 + 1, tile)


@pytest.mark.parametrize(("batch", "limit", "target"), [(1, 2**31 - 1, 16), (5, 300, 7), (130, 2**31 - 1, 8)])
def test_items_share_out_the_keys(batch: int, limit: int, target: int, device: str):
    lengths = torch.randint(0, 900, (batch,), generator=torch.Generator().manual_seed(batch)).tolist()
    lengths[0] = 5000
    items = target + batch
    out = torch.full((items, 4), -1, dtype=torch.int32, device=device)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    probe_items[(items,)](lens, out, batch, limit, target, 64)
    counted = [min(n, limit) for n in lengths]
    share = max(-(-sum(counted) // target), 64)
    expected, first = [], 0
    for b, n in enumerate(counted):
        count = max(1, -(-n // share))
        expected += [[b, i, count, first] for i in range(count)]
        first += count
    assert first <= items, "more shares than programs"
    assert out[:first].tolist() == expected
    assert (out[first:, 0] == batch).all()


@pytest.mark.parametrize(("pack", "tile"), [(1, 1), (1, 32), (7, 32)])
def test_slots_cover_every_row_once(pack: int, tile: int, device: str):
    lengths = torch.randint(0, 70, (130,), generator=torch.Generator().manual_seed(tile)).tolist()
    lengths = [n * (n % 3 > 0) // (1 if tile == 32 else 8) for n in lengths]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    slots = sum(lengths) * pack // tile + len(lengths)
    out = torch.full((slots, 2), -1, dtype=torch.int32, device=device)
    probe_slots[(slots,)](cu, out, len(lengths), pack, tile)
    found = [pair for pair in out.tolist() if pair[1] * tile < lengths[pair[0]] * pack]
    assert sorted(found) == [[b, t] for b, n in enumerate(lengths) for t in range(-(-n * pack // tile))]
    assert (out[:, 1] >= 0).all()
