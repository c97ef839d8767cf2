"""The kernels that make block lists, against the operators whose place they take."""

from __future__ import annotations

import pytest
import torch

from sparseattn.masks.lists import compact_by_operators, transpose_by_operators

lists = pytest.importorskip("sparseattn.kernels.lists", reason="needs Triton")

# Shape of the booleans, rows and columns of blocks, width of the lists, what a boolean stands for.
COMPACTED = {
    "matrix": ((5, 9), (5, 9), 9, (1, 1)),
    "several-steps": ((2, 2, 11, 37), (11, 37), 37, (1, 1)),
    "narrow": ((3, 4, 30), (4, 30), 5, (1, 1)),
    "repeated": ((2, 2, 3, 7), (14, 20), 20, (5, 3)),
    "no-width": ((1, 1, 3, 4), (3, 4), 0, (1, 1)),
    "no-columns": ((1, 2, 3, 0), (3, 0), 0, (1, 1)),
    "no-rows": ((1, 2, 0, 3), (0, 3), 3, (1, 1)),
}


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "turned"])
@pytest.mark.parametrize("name", COMPACTED)
def test_compact_is_what_operators_do(name: str, turned: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "_COLUMNS", 8)
    monkeypatch.setattr(lists, "_ROWS", 4)
    shape, size, width, repeat = COMPACTED[name]
    blocks = torch.rand(shape, device=device) < 0.5
    if turned:
        blocks = blocks.mT.contiguous().mT
    got = lists.compact(blocks, *size, width, *repeat)
    for x, y in zip(got, compact_by_operators(blocks, *size, width, *repeat), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(1, 2, 9, 70), (2, 1, 41, 33), (1, 1, 1, 1), (1, 1, 0, 5)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_transpose_is_what_operators_do(
    shape: tuple[int, ...], density: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries past the count are nobody's, and so are those that name no column."""
    monkeypatch.setattr(lists, "_LISTS", 16)
    blocks = torch.rand(shape, device=device) < density
    counts, indices = compact_by_operators(blocks, *shape[-2:], shape[-1], 1, 1)
    past = torch.arange(shape[-1], device=device) >= counts[..., None]
    garbage = torch.randint(-3, shape[-1] + 3, indices.shape, dtype=torch.int32, device=device)
    indices = torch.where(past, garbage, indices)
    for cols in {shape[-1], max(1, shape[-1] - 2)}:
        got = lists.transpose(counts, indices, cols)
        for x, y in zip(got, transpose_by_operators(counts, indices, cols), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_masks_are_built_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseattn.masks import BlockMask

    launched = []
    launch = lists.launch
    monkeypatch.setattr(lists, "launch", lambda kernel, *a, **k: launched.append(kernel) or launch(kernel, *a, **k))
    blocks = torch.rand(1, 2, 5, 9, device="cuda") < 0.5
    mask = BlockMask.from_blocks(blocks, seq_lens=(1200, 2300), repeat=(2, 2))
    assert torch.equal(mask.to_blocks(), blocks.repeat_interleave(2, 2).repeat_interleave(2, 3))
    expected = transpose_by_operators(mask.kv_num_blocks, mask.kv_indices, 18)
    assert all(torch.equal(x, y) for x, y in zip(mask.transposed(), expected, strict=True))
    assert len(launched) == 2
