"""Mass of verticals and slashes, largest entries, block and column lists: definitions first, then the kernels."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from sparseattn.masks.lists import listed_entries, scatter_blocks
from sparseattn.ops.scores import unsupported_reason
from sparseattn.ops.scores.block_lists import MASS, NONE, POOLED, ListPlan, Ranking
from sparseattn.ops.scores.vertical_slash import coverage_counts, largest, last_query_mass, slash_bands
from sparseattn.ops.sequences import resolve_sequences

# Sq, Sk, last queries, causal, head_dim: fewer queries or keys than are looked at, more keys than a tile, odd offsets.
SHAPES = {
    "aligned": (128, 128, 64, True, 16),
    "offset": (40, 333, 64, True, 24),
    "more_queries": (100, 30, 64, True, 16),
    "two_sided": (90, 140, 32, False, 16),
    "two_sided_short": (70, 20, 64, False, 16),
    "tiny": (3, 5, 16, True, 16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(sq: int, sk: int, dim: int, dtype: torch.dtype, device: str = "cpu", batch: int = 1) -> tuple[Tensor, Tensor]:
    q = torch.randn(batch, sq, 2, dim, dtype=torch.float64) * 3
    k = torch.randn(batch, sk, 1, dim, dtype=torch.float64)
    return q.to(device, dtype), k.to(device, dtype)


def dense_mass(q: Tensor, k: Tensor, count: int, causal: bool) -> tuple[Tensor, Tensor]:
    """``q [Sq, Hq, D]``, ``k [Sk, 1, D]`` -> float64 means over the last rows, by column and by distance."""
    (sq, heads, d), sk = q.shape, k.shape[0]
    vertical, slash = torch.zeros(heads, sk, dtype=torch.float64), torch.zeros(heads, sk, dtype=torch.float64)
    rows = [i for i in range(max(0, sq - count), sq) if not causal or i + sk - sq >= 0]
    for h in range(heads):
        for i in rows:
            position = i + sk - sq
            seen = range(position + 1) if causal else range(sk)
            p = torch.stack([q[i, h] @ k[j, 0] / math.sqrt(d) for j in seen]).softmax(0) / len(rows)
            for j in seen:
                vertical[h, j] += p[j]
                if j <= position:
                    slash[h, position - j] += p[j]
    return vertical, slash


@shapes
def test_mass_follows_the_definition(shape: tuple) -> None:
    sq, sk, count, causal, dim = shape
    q, k = make(min(sq, 100), sk, dim, torch.float64)
    got = last_query_mass(q, k, num_queries=count, causal=causal)
    for ours, expected in zip(got, dense_mass(q[0], k[0], count, causal), strict=True):
        torch.testing.assert_close(ours[0], expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(got[0].sum(-1), torch.ones(1, 2, dtype=torch.float64))


def test_largest_and_coverage_by_hand() -> None:
    values = torch.tensor([[3.0, 1.0, 3.0, math.inf, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert largest(values, torch.tensor([2, 2])).int().tolist() == [[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]]
    assert largest(values, torch.tensor([0, 5])).int().tolist() == [[0] * 5, [1] * 5]
    row = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0]])
    assert [coverage_counts(row, s).item() for s in (0.0, 0.5, 0.51, 0.75, 0.8, 0.99, 1.0, 2.0)] == [
        *[1, 1, 2, 2, 3, 4, 4, 4],
    ]


def crossed(distances: set[int], m: int, n: int, sq: int, sk: int, block: int) -> bool:
    rows = range(m * block, (m + 1) * block)  # whole blocks: a band knows no ends
    return any((i + sk - sq - d) // block == n for i in rows for d in distances)


@pytest.mark.parametrize(("sq", "sk"), [(64, 64), (40, 75), (75, 40), (33, 64)])
def test_bands_hold_both_blocks_that_a_slash_crosses(sq: int, sk: int) -> None:
    block, rows, columns = 16, -(-sq // 16), -(-sk // 16)
    q, k = torch.zeros(1, sq, 1, 8), torch.zeros(1, sk, 1, 8)
    s = resolve_sequences(q, k)
    for unit, entries in ((1, {0, 5, 37}), (1, {1}), (block, {0}), (block, {1, 3})):
        selected = torch.zeros(1, 1, sk if unit == 1 else columns, dtype=torch.bool)
        entries = {e for e in entries if e < selected.shape[-1]}
        selected[..., list(entries)] = True
        band = slash_bands(selected, unit, s, block, rows, columns)[0, 0]
        distances = {e * unit + i for e in entries for i in range(unit)} & set(range(selected.shape[-1] * unit))
        for m in range(rows):
            for n in range(columns):
                assert band[m - n + columns - 1] == crossed(distances, m, n, sq, sk, block), (unit, m, n)


# ---- kernels ----


@pytest.fixture
def triton_device(device: str) -> str:
    """A device the kernels run on here: the CPU under the interpreter, or the GPU."""
    probe = torch.zeros(1, 1, 1, 16, device=device)
    reason = unsupported_reason(probe, probe, impl="triton")
    if reason is not None and device == "cpu":
        pytest.skip(reason)
    assert reason is None
    return device


@shapes
def test_triton_mass_matches_the_reference(shape: tuple, triton_device: str) -> None:
    sq, sk, count, causal, dim = shape
    q, k = make(sq, sk, dim, torch.float32, triton_device)
    expected = last_query_mass(q.double(), k.double(), num_queries=count, causal=causal, impl="reference")
    got = last_query_mass(q, k, num_queries=count, causal=causal, impl="triton")
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_triton_mass_of_ragged_half_precision(triton_device: str) -> None:
    q, k = make(150, 200, 80, torch.float16, triton_device, batch=4)
    ranges_q = torch.tensor([[0, 150], [20, 40], [5, 5], [0, 9]], dtype=torch.int32, device=triton_device)
    ranges_k = torch.tensor([[3, 200], [0, 150], [0, 200], [7, 7]], dtype=torch.int32, device=triton_device)
    s = resolve_sequences(q, k, ranges_q=ranges_q, ranges_k=ranges_k)
    bhsd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    expected = last_query_mass(q.double(), k.double(), sequences=s, impl="reference")
    got = last_query_mass(*bhsd, sequences=s, impl="triton")
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
        assert (ours[1, :, 150:] == 0).all()
        assert (ours[2:] == 0).all()


@pytest.mark.parametrize("length", [5, 4200, 20000])
def test_triton_finds_the_largest(length: int, triton_device: str) -> None:
    # Dyadic values add up exactly in any order, so both implementations must agree to the entry, ties included.
    values = (torch.randint(0, 1 << 10, (2, length)) / 1024.0).to(triton_device)
    values[0, : length // 2] = math.inf
    counts = torch.tensor([length - 1, length // 3], device=triton_device)
    assert torch.equal(largest(values, counts, impl="triton"), largest(values, counts, impl="reference"))
    values = values.nan_to_num(posinf=2.0)
    for share in (0.0, 300.0) if length > 5 else (0.75, 1e9):
        expected = coverage_counts(values, share, impl="reference")
        assert torch.equal(coverage_counts(values, share, impl="triton"), expected)


def random_plan(rows: int, columns: int, device: str) -> ListPlan:
    """Two sequences of four heads."""
    vertical = torch.rand(2, 4, columns) < 0.02
    band = torch.rand(2, 4, rows + columns - 1) < 0.02
    visible = (torch.arange(rows) + columns - rows + 1).clamp(0, columns).int()
    visible = torch.stack([visible, visible.flip(0)])  # bounds need not grow
    dense = torch.full((2, 4), rows, dtype=torch.int32)
    dense[0, 3] = rows - 3
    return ListPlan(*(x.to(device) for x in (vertical, band, visible, dense)))


def random_ranking(rows: int, columns: int, device: str, rule: str) -> Ranking:
    mode = torch.tensor([[NONE, POOLED, MASS, NONE]])
    means = torch.randn(1, 4, rows, 16), torch.randn(1, 2, columns, 16)
    mass = torch.rand(1, 4, columns).pow(8), torch.rand(1, 4, rows + columns - 1).pow(8)
    if rule == "share":
        mode[mode == MASS] = NONE
        return Ranking(mode.int().to(device), *(x.to(device) for x in means), 0.5, share=0.3)
    mass[0][:, :, ::3] = 0.25  # ties
    top = torch.randint(0, columns // 2, (1, 4, rows)).int()
    mean = (x.to(device) for x in means)
    return Ranking(mode.int().to(device), *mean, 0.5, *(x.to(device) for x in mass), top=top.to(device))


@pytest.mark.parametrize("rule", ["none", "share", "top"])
def test_triton_lists_match_the_reference(rule: str, triton_device: str) -> None:
    rows, columns = (17 if rule == "top" else 33), 66  # tiles are 16 or 32 rows of 64 columns
    plan = random_plan(rows, columns, triton_device)
    if rule != "none":  # one sequence will do
        plan = ListPlan(*(x[:1] for x in plan if x is not None))
    ranking = None if rule == "none" else random_ranking(rows, columns, triton_device, rule)
    reference, kernels = (
        importlib.import_module(f"sparseattn.ops.scores.block_lists_{n}") for n in ("reference", "triton")
    )
    counts, indices = reference.list_blocks(plan, ranking, columns)
    got_counts, got_indices = kernels.list_blocks(plan, ranking, columns)
    expected, got = scatter_blocks(counts, indices, columns), scatter_blocks(got_counts, got_indices, columns)
    wrong = (expected != got).sum().item()
    assert wrong <= (0 if triton_device == "cpu" else 8)  # a GPU's products round differently at a cut-off
    listed = listed_entries(got_counts, got_indices)[..., 1:]
    assert (got_indices.diff(dim=-1)[listed] > 0).all()
    if rule == "top":
        assert ranking is not None
        assert ranking.top is not None
        pooled = ranking.mode == POOLED
        planned = scatter_blocks(*reference.list_blocks(plan, None, columns), columns).sum(-1)
        visible = plan.visible[:, None].expand_as(counts)
        expected_counts = torch.minimum(torch.maximum(ranking.top, planned), visible)
        assert torch.equal(counts[pooled].long(), expected_counts[pooled].long())


def test_triton_columns_match_the_reference(triton_device: str) -> None:
    rows, columns, block = 6, 20, 16
    plan = random_plan(rows, columns, triton_device)
    reference, kernels = (
        importlib.import_module(f"sparseattn.ops.scores.block_lists_{n}") for n in ("reference", "triton")
    )
    counts, indices = reference.list_blocks(plan, None, columns)
    tokens = torch.rand(2, 4, columns * block).argsort(-1)[..., :150].sort(-1).values.int().to(triton_device)
    token_counts = torch.tensor([[150, 0, 130, 3]], dtype=torch.int32).expand(2, -1).to(triton_device)
    last = torch.tensor([[-1, 10, 100, 200, 319, 319]] * 2, dtype=torch.int32, device=triton_device)
    arguments = (tokens, token_counts, counts, indices, last, block, columns)
    expected = reference.list_columns(*arguments)
    assert torch.equal(kernels.list_columns(*arguments), expected)
    listed = scatter_blocks(counts, indices, columns)
    for m in range(rows):
        wanted = [t for t in tokens[0, 2, :130].tolist() if t <= last[0, m] and not listed[0, 2, m, t // block]]
        assert expected[0, 2, m].tolist() == wanted + [-1] * (150 - len(wanted))


def test_triton_block_means(triton_device: str) -> None:
    reference, kernels = (
        importlib.import_module(f"sparseattn.ops.scores.block_lists_{n}") for n in ("reference", "triton")
    )
    x = torch.randn(2, 100, 3, 24, device=triton_device)
    start, end = (torch.tensor(n, device=triton_device) for n in ([0, 30], [100, 75]))
    expected = reference.block_means(x.double(), start, end, False, 64, 2)
    torch.testing.assert_close(expected[0, 2, 1], x[0, 64:, 2].double().mean(0))
    torch.testing.assert_close(expected[1, 1, 0], x[1, 30:75, 1].double().mean(0))
    assert (expected[1, :, 1] == 0).all()
    got = kernels.block_means(x, start, end, False, 64, 2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    wanted = torch.tensor([[True, False, True]], device=triton_device)
    some = kernels.block_means(x, start, end, False, 64, 2, wanted)
    assert torch.equal(some[:, ::2], got[:, ::2])


def test_bad_arguments() -> None:
    q, k = make(20, 20, 16, torch.float32)
    with pytest.raises(ValueError, match=r"num_queries: expected one of \(16, 32, 64, 128\), got 7"):
        last_query_mass(q, k, num_queries=7)
    with pytest.raises(TypeError, match=r"k: expected dtype torch\.float32 like q"):
        last_query_mass(q, k.double())
    with pytest.raises(ValueError, match="impl: expected one of"):
        last_query_mass(q, k, impl="cuda")
    with pytest.raises(ValueError, match="counts: expected shape"):
        largest(torch.rand(2, 3), torch.tensor([1]))
    with pytest.raises(ValueError, match="share: expected a finite number, got nan"):
        coverage_counts(torch.rand(2, 3), math.nan)
