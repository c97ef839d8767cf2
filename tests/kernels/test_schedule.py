"""The tile schedule: every tile once, longest first, and how many of its key tiles may hide a key from a row."""

from __future__ import annotations

import pytest
import torch

from sparseattn.masks import BlockMask
from sparseattn.masks.tilings import make_tiling
from sparseattn.testing import random_block_mask

pytest.importorskip("triton", reason="needs Triton")

from sparseattn.kernels import schedule
from sparseattn.kernels.schedule import cut_ends, tile_schedule


def _records(mask: BlockMask | None, lengths: tuple[int, int], device: str, **options) -> torch.Tensor:
    counts = indices = None
    lists = (0, 0, 0)
    if mask is not None:
        counts, indices = mask.kv_num_blocks, mask.kv_indices
        batch, heads, rows = counts.shape
        lists = (0 if batch == 1 else heads * rows, rows, indices.shape[-1])
    stand_in = torch.zeros(1, dtype=torch.int32, device=device)
    spans = options.pop("spans", (None,) * 4)
    ragged = (spans[0] is not None, spans[2] is not None)
    options = {"batch": 1, "sections": 2, "heads": 2, "tokens": 32, "block": (32, 32), "tile_n": 32, "mask_group": 1,
               "splits": 1, "causal": True, **options}  # fmt: skip
    window = options.pop("window", (-1, -1))
    records, counter = tile_schedule(
        counts, indices, lists, tuple(stand_in if s is None else s for s in spans), lengths, window, ragged=ragged,
        device=torch.device(device), **options,
    )  # fmt: skip
    assert counter.item() == 0
    return records.cpu()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_every_tile_once_and_the_longest_first(masked: bool, splits: int, device: str) -> None:
    mask = random_block_mask((300, 400), (32, 32), 4, density=0.4, causal=True, device=device) if masked else None
    records = _records(mask, (300, 400), device, splits=splits)
    assert sorted(map(tuple, records[:, :4].tolist())) == sorted(
        (m, h, 0, s) for m in range(10) for h in range(4) for s in range(splits)
    )
    for section in range(2):
        part = records[section * 20 * splits : (section + 1) * 20 * splits]
        assert set(part[:, 1].tolist()) == {2 * section, 2 * section + 1}
        assert (part[:, 4].diff() <= 0).all()
    for m in range(10):
        for h in range(4):
            shares = records[(records[:, 0] == m) & (records[:, 1] == h)]
            shares = shares[shares[:, 3].argsort()]
            if mask is not None:
                assert shares[:, 4].sum() == mask.kv_num_blocks[0, h, m]
            else:
                assert shares[:, 4].sum() == -(-min(400, 32 * (m + 1) + 100) // 32)
            taken = shares[shares[:, 4] > 0]
            assert (taken[1:, 5] == taken[:-1, 5] + taken[:-1, 4]).all()


@pytest.mark.parametrize(("block_kv", "tile_n"), [(32, 32), (64, 32), (16, 64)])
@pytest.mark.parametrize("window", [(-1, -1), (70, -1)])
@pytest.mark.parametrize("masked", [True, False])
def test_tiles_that_hide_nothing_are_known(masked: bool, window, block_kv: int, tile_n: int, device: str) -> None:
    sq, sk = 203, 333
    block = (32, block_kv) if masked else (32, tile_n)
    mask = random_block_mask((sq, sk), block, 4, density=0.7, causal=True, device=device) if masked else None
    records = _records(mask, (sq, sk), device, block=block, tile_n=tile_n, window=window)
    rows, cols = torch.arange(sq)[:, None] + sk - sq, torch.arange(sk + 64)[None]
    seen = (cols <= rows) & (cols < sk)
    if window[0] >= 0:
        seen &= cols >= rows - window[0]
    for m, h, _, _, count, first, late, early in records.tolist():
        keys = torch.arange(first * tile_n, (first + count) * tile_n)
        if mask is not None:
            listed = mask.kv_indices[0, h, m, : mask.kv_num_blocks[0, h, m]].cpu()
            keys = (listed[:, None] * block_kv + torch.arange(block_kv)).reshape(-1)
            keys = torch.nn.functional.pad(keys, (0, count * tile_n - keys.numel()), value=sk + 63)
        whole = seen[m * 32 : (m + 1) * 32][:, keys.clamp(max=sk + 63)].all(0).reshape(count, tile_n).all(1)
        assert whole[early : count - late].all()
        if not masked:  # in closed form the count is exact
            assert late == int((~whole[early:]).sum())


def test_rows_past_the_end_are_no_tiles(device: str) -> None:
    ends = torch.tensor([70, 200, 0], dtype=torch.int32, device=device)
    zeros = torch.zeros_like(ends)
    records = _records(None, (200, 200), device, batch=3, spans=(zeros, ends, zeros, ends))
    for b, end in enumerate(ends.tolist()):
        own = records[records[:, 2] == b]
        assert len(own) == 28
        assert ((own[:, 4] < 0) == (own[:, 0] * 32 >= end)).all()


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("end", [16, 32])
def test_ends_are_the_keys_of_short_tiles(
    end: int, ordered: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In more steps than one; whole tiles stay as they are, and zeros fill the last tile of ends."""
    monkeypatch.setattr(schedule, "_TILES", 4)
    keys, size = 3000, 128
    sizes = torch.randint(0, 200, (2, 40), dtype=torch.int32)
    blocks = torch.rand(1, 2, 3, 40, device=device) < torch.tensor([0.2, 0.5, 1.0], device=device)[:, None]
    rows = torch.full((2, 3), 10, dtype=torch.int32)
    tiling = make_tiling(blocks, rows.to(device), sizes.to(device), (30, keys), (16, size))
    counts, lists = (t.cpu() for t in cut_ends(tiling.counts, tiling.tiles, keys, size, end, ordered=ordered))
    whole_slots, parts = keys // size, size // end
    for head in range(2):
        for row in range(4):
            (whole, short), (same, ends, full) = (t[0, head, row].tolist() for t in (tiling.counts, counts))
            before, after = (t[0, head, row].cpu() for t in (tiling.tiles, lists))
            assert same == whole
            assert torch.equal(before[:whole], after[:whole])
            expected = [
                (first, min(first + end, stop))
                for start, stop in before[whole_slots : whole_slots + short].tolist()
                for first in range(start, stop, end)
            ]
            if not ordered:
                expected.sort(key=lambda x: x[1] - x[0] < end)
            assert full == (0 if ordered else sum(stop - first == end for first, stop in expected))
            assert [tuple(x) for x in after[whole_slots : whole_slots + ends].tolist()] == expected
            filled = -(-ends // parts) * parts
            assert after.shape[0] >= whole_slots + filled
            assert not after[whole_slots + ends : whole_slots + filled].any()
