"""Packed bits are NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparseattn.flashinfer.quantization import packbits, segment_packbits


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 65_537])
@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_packbits(n: int, bitorder: str, dtype: torch.dtype, device: str):
    bits = np.random.default_rng(n).random(n) < 0.5
    x = torch.from_numpy(bits).to(dtype).to(device)
    got = packbits(x, bitorder)
    assert got.dtype == torch.uint8
    assert got.tolist() == np.packbits(bits, bitorder=bitorder).tolist()
    if bitorder == "big":
        assert torch.equal(got, packbits(x)), "the default is FlashInfer's"


@pytest.mark.parametrize("lengths", [[4, 3, 4], [8, 0, 16], [0], [], [1, 999, 7]])
@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segment_packbits(lengths: list[int], bitorder: str, dtype: torch.dtype, device: str):
    bits = np.random.default_rng(0).random(sum(lengths)) < 0.5
    indptr = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype, device=device)
    packed, ends = segment_packbits(torch.from_numpy(bits).to(device), indptr, bitorder)
    parts = np.split(bits, np.cumsum(lengths)[:-1]) if lengths else []
    expected = [np.packbits(part, bitorder=bitorder) for part in parts]
    assert packed.tolist() == [int(b) for part in expected for b in part]
    assert ends.dtype == torch.int32
    assert ends.tolist() == [0, *np.cumsum([len(part) for part in expected])]


def test_bad_input():
    with pytest.raises(ValueError, match="bitorder"):
        packbits(torch.ones(3).bool(), "middle")
    with pytest.raises(ValueError, match="x: expected a flat tensor"):
        packbits(torch.ones(3, 3).bool())
    x = torch.ones(9).bool()
    for bad, message in (([0, 4, 20], "at most 9, got 20"), ([0, 5, 4], "ascend from 0"), ([1, 4], "ascend from 0")):
        with pytest.raises(ValueError, match=f"indptr: expected numbers .*{message}"):
            segment_packbits(x, torch.tensor(bad, dtype=torch.int32))
    with pytest.raises(TypeError, match="indptr: expected an int32 tensor"):
        segment_packbits(x, torch.tensor([0.0, 9.0]))
