"""The kernel that cuts masks of variable blocks, against the operators whose place it takes."""

from __future__ import annotations

import pytest
import torch

from sparseattn.masks.tilings import make_tiling

tilings = pytest.importorskip("sparseattn.kernels.tilings", reason="needs Triton")

# (batch, heads, rows, columns), most tokens of a block, share of chosen blocks, tile size, and how lengths differ from
# what sizes add up to.
CASES = {
    "short": ((1, 2, 5, 9), 40, 0.5, (16, 16), (0, 0)),
    "many-columns": ((2, 1, 2, 21), 30, 0.9, (64, 16), (7, 9)),
    "many-rows": ((1, 1, 19, 3), 20, 0.6, (16, 32), (-5, -30)),
    "sparse": ((1, 3, 2, 17), 3, 0.1, (16, 16), (0, 4)),
    "one": ((1, 1, 1, 1), 9, 1.0, (128, 128), (0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_as_operators(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of columns, and of tiles; sizes of 0 and less; heads that share blocks; transposed blocks."""
    monkeypatch.setattr(tilings, "_COLUMNS", 8)
    monkeypatch.setattr(tilings, "_TILES", 4)
    (batch, heads, rows, cols), most, share, size, more = CASES[name]
    r, c = (torch.randint(-1, most, (heads, n), dtype=torch.int32) for n in (rows, cols))
    if name == "sparse":
        c[0, 3] = 2**31 - 1
    lens = tuple(max(1, min(400, int(t[0].clamp(min=0).sum())) + d) for t, d in zip((r, c), more, strict=True))
    blocks = torch.rand(batch, 1, rows, cols).expand(-1, heads, -1, -1) < share
    blocks, r, c = (t.to(device) for t in (blocks, r, c))
    for given in ((blocks, r, c, lens, size), (blocks.mT, c, r, lens[::-1], size[::-1])):
        got, expected = tilings.cut_tiles(*given), make_tiling(*given)
        for field, x, y in zip(expected._fields, got, expected, strict=True):
            assert x.dtype == y.dtype, field
            assert torch.equal(x, y), field
