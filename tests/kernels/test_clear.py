"""Which rows of a ragged batch belong to no sequence."""

from __future__ import annotations

import math

import pytest
import torch

clear = pytest.importorskip("sparseattn.kernels.clear", reason="needs Triton")


@pytest.mark.parametrize(
    ("start", "end", "max_q"),
    [
        ([0, 40], [40, 90], 50),
        ([0, 40], [40, 90], 30),
        ([7, 20, 20], [20, 20, 33], 13),
        ([3, 10, 64], [5, 40, 64], 99),
        ([i for i in range(80)], [i + 1 for i in range(80)], 1),
        ([0] * 200 + [31], [0] * 200 + [70], 60),
    ],
    ids=["whole", "longer-than-said", "both-ends", "used", "single", "many"],
)
def test_packed(start: list[int], end: list[int], max_q: int, device: str) -> None:
    total = 90
    o = torch.full((total, 3, 48), 7.0, dtype=torch.float16, device=device)[..., :40]
    lse = torch.full((3, total), 7.0, device=device)
    clear.clear_rows(
        o, lse, *(torch.tensor(t, dtype=torch.int32, device=device) for t in (start, end)), max_q, packed=True
    )
    owned = torch.zeros(total, dtype=torch.bool, device=device)
    for first, last in zip(start, end, strict=True):
        owned[first : min(last, first + max_q)] = True
    assert (o[owned] == 7).all()
    assert (o[~owned] == 0).all()
    assert (lse[:, owned] == 7).all()
    assert (lse[:, ~owned] == -math.inf).all()


@pytest.mark.parametrize("bounds", [(0, 50, 20, 90), (0, 20, 200, 90), (-5, 20, 30, 90)], ids=str)
def test_bounds_out_of_order_clear_everything(bounds: tuple[int, ...], device: str) -> None:
    o = torch.full((90, 2, 16), 7.0, device=device)
    lse = torch.full((2, 90), 7.0, device=device)
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    clear.clear_rows(o, lse, cu[:-1], cu[1:], 90, packed=True)
    assert (o == 0).all()
    assert (lse == -math.inf).all()


def test_padded(device: str) -> None:
    o = torch.full((3, 50, 2, 16), 7.0, device=device)
    lse = torch.full((3, 2, 50), 7.0, device=device)
    start, end = (torch.tensor(t, dtype=torch.int32, device=device) for t in ((0, 0, 10), (50, 0, 33)))
    clear.clear_rows(o, lse, start, end, 50, packed=False)
    owned = torch.zeros(3, 50, dtype=torch.bool, device=device)
    owned[0] = True
    owned[2, 10:33] = True
    assert (o[owned] == 7).all()
    assert (o[~owned] == 0).all()
    assert (lse.transpose(1, 2)[owned] == 7).all()
    assert (lse.transpose(1, 2)[~owned] == -math.inf).all()
