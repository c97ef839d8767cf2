"""Masks of variable blocks: what they show, their statistics, and the tiles they are cut into."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import bounds, quick, visible_tokens
from torch import Tensor

from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.masks.tilings import make_tiling


@st.composite
def partitions(draw: st.DrawFn, length: int, heads: int) -> Tensor:
    """int32 ``[heads, N]``: each head's own cut of ``length`` tokens, sizes of 0 and 1 among them."""
    count = draw(st.integers(1, 9))
    cuts = [
        sorted(draw(st.lists(st.integers(0, length), min_size=count - 1, max_size=count - 1))) for _ in range(heads)
    ]
    return torch.tensor([[b - a for a, b in zip([0, *c], [*c, length], strict=True)] for c in cuts], dtype=torch.int32)


@st.composite
def fields(draw: st.DrawFn) -> dict:
    """Arguments of ``from_variable_blocks``."""
    sq, sk = draw(st.integers(0, 90)), draw(st.integers(0, 90))
    heads = draw(st.integers(1, 3))
    rows, cols = draw(partitions(sq, heads)), draw(partitions(sk, heads))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch = draw(st.sampled_from([1, 2]))
    chance = torch.rand(batch, heads, rows.shape[1], 1, generator=generator) * 1.6 - 0.3
    blocks = torch.rand(batch, heads, rows.shape[1], cols.shape[1], generator=generator) < chance
    return {
        "blocks": blocks, "row_sizes": rows, "col_sizes": cols, "seq_lens": (sq, sk), "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(bounds, bounds))),
    }  # fmt: skip


def dense(given: dict) -> Tensor:
    """bool ``[B, H, Sq, Sk]``: every block as tokens, by a loop, then the frame."""
    blocks, (sq, sk) = given["blocks"], given["seq_lens"]
    out = torch.zeros(*blocks.shape[:2], sq, sk, dtype=torch.bool)
    for h in range(blocks.shape[1]):
        rows = given["row_sizes"][h].long()
        cols = given["col_sizes"][h].long()
        out[:, h] = blocks[:, h].repeat_interleave(rows, 1).repeat_interleave(cols, 2)
    return out & visible_tokens(given)


@quick
@given(fields())
def test_shows_its_blocks_inside_the_frame(given: dict) -> None:
    mask = BlockMask.from_variable_blocks(**given).validate()
    assert torch.equal(mask.to_dense(), dense(given))


@quick
@given(fields())
def test_densities_count_pairs_of_tokens(given: dict) -> None:
    mask = BlockMask.from_variable_blocks(**given)
    shown = dense(given).double().sum((-1, -2))
    visible = visible_tokens(given).double().sum().clamp(min=1)
    torch.testing.assert_close(mask.densities(), (shown / visible).float())
    assert mask.density == pytest.approx((shown.mean() / visible).item())


tile_sizes = st.sampled_from([1, 3, 16, 32])


def listed(tiling, head: int, batch: int, row: int, slots: int) -> tuple[list, list]:
    """The (whole, short) tiles of a row of blocks, as pairs."""
    whole, short = tiling.counts[batch, head, row].tolist()
    tiles = tiling.tiles[batch, head, row].tolist()
    assert not any(end for _, end in tiles[whole:slots] + tiles[slots + short :]), "unused entries are zero"
    return tiles[:whole], tiles[slots : slots + short]


def check_tiling(tiling, shown: Tensor, size: tuple[int, int]) -> None:
    """A tiling covers each query once, and of keys exactly what is ``shown``, as few tiles as its runs need."""
    sq, sk = shown.shape[2:]
    for head in range(shown.shape[1]):
        pieces = [p for p in tiling.pieces[head].tolist() if p[1] > p[0]]
        assert [t for a, b, _ in pieces for t in range(a, b)] == list(range(sq))
        assert all(b - a <= size[0] for a, b, _ in pieces)
        assert (tiling.pieces[head, len(pieces) :] == torch.tensor([0, 0, tiling.counts.shape[2] - 1])).all()
        for batch in range(shown.shape[0]):
            for a, b, row in pieces:
                whole, short = listed(tiling, head, batch, row, sk // size[1])
                assert whole == sorted(whole)
                assert short == sorted(short)
                assert all(y - x == size[1] for x, y in whole)
                assert all(0 < y - x < size[1] for x, y in short)
                keys = sorted(t for x, y in whole + short for t in range(x, y))
                expected = shown[batch, head, a].nonzero().flatten().tolist()
                assert keys == expected
                assert (shown[batch, head, a:b] == shown[batch, head, a]).all()
                gaps = [0, *(i for i in range(1, len(keys)) if keys[i] != keys[i - 1] + 1), len(keys)]
                runs = [y - x for x, y in itertools.pairwise(gaps)]
                assert len(whole) + len(short) == sum(-(-n // size[1]) for n in runs)


@quick
@given(fields(), tile_sizes, tile_sizes)
def test_tilings_cover_what_is_shown(given: dict, size_q: int, size_kv: int) -> None:
    given = {**given, "causal": False, "window": None}
    mask = BlockMask.from_variable_blocks(**given)
    size = (size_q, size_kv)
    check_tiling(mask.tiling(size), dense(given), size)
    check_tiling(mask.tiling(size, transposed=True), dense(given).transpose(-1, -2), size[::-1])


@quick
@given(fields(), st.integers(-20, 20), st.integers(-20, 20))
def test_sizes_that_do_not_add_up_stay_within_bounds(given: dict, more_q: int, more_k: int) -> None:
    """Tokens past the last block see nothing and are seen by nobody; what lies past the end is cut off."""
    given = {**given, "causal": False, "window": None}
    shown = dense(given)
    sq, sk = (max(0, n + more) for n, more in zip(given["seq_lens"], (more_q, more_k), strict=True))
    expected = torch.zeros(*shown.shape[:2], sq, sk, dtype=torch.bool)
    part = shown[:, :, :sq, :sk]
    expected[:, :, : part.shape[2], : part.shape[3]] = part
    mask = BlockMask.from_variable_blocks(**{**given, "seq_lens": (sq, sk)})
    assert torch.equal(mask.to_dense(), expected)
    check_tiling(mask.tiling((16, 16)), expected, (16, 16))
    if (more_q, more_k) != (0, 0) and (sq, sk) != given["seq_lens"]:
        with pytest.raises(ValueError, match=r"(row|col)_sizes: expected sizes that add up to"):
            mask.validate()


def example(**changes) -> VariableBlockMask:
    arguments = {
        "blocks": torch.tensor([[[True, False], [True, True], [False, True]]]),
        "row_sizes": torch.tensor([[3, 0, 7]], dtype=torch.int32),
        "col_sizes": torch.tensor([[4, 8]], dtype=torch.int32),
        "seq_lens": (10, 12),
        **changes,
    }
    return BlockMask.from_variable_blocks(**arguments)


def test_one_partition_serves_many_heads() -> None:
    blocks = torch.rand(4, 3, 2) < 0.5
    flat = example(blocks=blocks, row_sizes=torch.tensor([3, 0, 7], dtype=torch.int32))
    assert flat.shape == (1, 4, 10, 12)
    assert flat.row_sizes.shape == (4, 3)
    many = example(row_sizes=torch.tensor([[3, 0, 7], [1, 8, 1]], dtype=torch.int32))
    assert many.blocks.shape == (1, 2, 3, 2)


def test_says_what_it_is() -> None:
    mask = example(causal=True, window=(5, None))
    assert repr(mask) == (
        "VariableBlockMask(batch=1, heads=1, seq_lens=(10, 12), blocks=3x2, causal, window=(5, None), device=cpu)"
    )
    assert (mask.batch, mask.heads, mask.num_q_blocks, mask.num_kv_blocks) == (1, 1, 3, 2)
    assert mask.to("cpu") is mask


def test_tilings_are_kept_and_not_copied() -> None:
    mask = example()
    tiling = mask.tiling((16, 32))
    assert mask.tiling((16, 32)) is tiling
    assert mask.tiling((16, 16)) is not tiling
    assert mask.tiling((16, 32), transposed=True) is not tiling
    for again in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert "_tilings" not in again.__dict__
        assert torch.equal(again.to_dense(), mask.to_dense())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"blocks": torch.ones(1, 3, 2)}, TypeError, "blocks: expected bool, got torch.float32"),
        ({"blocks": None}, TypeError, "blocks: expected a torch.Tensor, got NoneType"),
        ({"blocks": torch.ones(2, dtype=torch.bool)}, ValueError, "blocks: expected .* got shape"),
        ({"blocks": torch.ones(1, 0, 2, dtype=torch.bool)}, ValueError, "each at least 1"),
        ({"row_sizes": torch.tensor([[3, 0, 7]])}, TypeError, "row_sizes: expected int32, got torch.int64"),
        ({"row_sizes": torch.tensor([[3, 7]], dtype=torch.int32)}, ValueError, r"row_sizes: expected shape \(1, 3\)"),
        ({"col_sizes": torch.ones(3, 2).int(), "blocks": torch.ones(2, 3, 2).bool()}, ValueError, "expected shape"),
        ({"seq_lens": (10, -1)}, ValueError, "seq_lens: expected lengths of at least 0"),
        ({"window": (-1, 0)}, ValueError, "window: expected counts of at least 0"),
        ({"causal": 1}, TypeError, "causal: expected True or False"),
    ],
)  # fmt: skip
def test_names_what_does_not_fit(changes: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        example(**changes)


def test_validate_finds_negative_sizes() -> None:
    mask = example(row_sizes=torch.tensor([[-3, 6, 7]], dtype=torch.int32))
    with pytest.raises(ValueError, match="row_sizes: expected sizes of at least 0, got -3"):
        mask.validate()
    assert mask.tiling((16, 16)).pieces.min() >= 0


def test_shapes_of_a_tiling_follow_from_shapes() -> None:
    """Under torch.compile, whatever the contents; and what FlashInfer's benchmark has stays small."""

    def cut(blocks: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        tiling = make_tiling(blocks, rows, cols, (100, 120), (16, 32))
        return tiling.tiles.sum() + tiling.counts.sum() + tiling.pieces.sum()

    mask = example()
    given = (mask.blocks, mask.row_sizes, mask.col_sizes)
    assert torch.compile(cut, fullgraph=True, backend="eager")(*given) == cut(*given)
    blocks = torch.ones(1, 1, 20, 50, dtype=torch.bool)
    sizes = [torch.full((1, n), 16384 // n, dtype=torch.int32) for n in (20, 50)]
    tiling = make_tiling(blocks, *sizes, (16384, 16384), (128, 128))
    assert tiling.pieces.shape == (1, 148, 3)
    assert tiling.tiles.shape == (1, 1, 21, 153, 2)
    assert tiling.counts[0, 0, 0].tolist() == [127, 1], "a row that selects everything is cut as dense attention is"
