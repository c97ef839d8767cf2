"""Merging states: against one softmax over all keys, at the edges, and through autograd."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from sparseattn.ops.merge import merge_state, merge_state_, merge_states, unsupported_reason
from sparseattn.testing import assert_close_to_oracle


def needs(impl: str, device: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU of this machine: it interprets nothing")


def attention(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """o [S, H, D] and lse [H, S] from scores [H, S, n] and values [n, D]."""
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ values).transpose(0, 1), lse


def parts(n: int, sizes: tuple[int, ...], dtype: torch.dtype, device: str, spread: float = 3.0):
    """States over shares of the keys, and float64 attention over all."""
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(3, n, sum(sizes), generator=g, dtype=torch.float64) * spread
    values = torch.randn(sum(sizes), 24, generator=g, dtype=torch.float64)
    states = [attention(s, v) for s, v in zip(scores.split(sizes, -1), values.split(sizes), strict=True) if s.shape[-1]]
    o = torch.stack([s[0] for s in states]).to(dtype).to(device)
    lse = torch.stack([s[1] for s in states]).to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)
    return o, lse, attention(scores, values)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("base", [math.e, 2])
def test_shares_merge_to_the_whole(impl: str, base: float, device: str):
    needs(impl, device)
    o, lse, (oracle, oracle_lse) = parts(40, (5, 1, 30, 4), torch.float32, device)
    unit = math.log(base)
    merged, merged_lse = merge_states(o, lse / unit, base=base, impl=impl)
    assert_close(merged.cpu().double(), oracle, atol=2e-6, rtol=2e-6)
    assert_close(merged_lse.cpu().double() * unit, oracle_lse, atol=2e-6, rtol=2e-6)
    pair = merge_state(o[0], lse[0] / unit, o[1], lse[1] / unit, base=base, impl=impl)
    for i in (2, 3):
        pair = merge_state(*pair, o[i], lse[i] / unit, base=base, impl=impl)
    assert_close(pair[0], merged, atol=2e-6, rtol=2e-6)
    assert_close(pair[1], merged_lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_low_and_double_precision(dtype: torch.dtype, device: str):
    o, lse, (oracle, _) = parts(9, (7, 8), dtype, device)
    merged, merged_lse = merge_states(o, lse, impl="reference")
    assert merged.dtype == dtype
    assert merged_lse.dtype == lse.dtype
    if dtype == torch.float64:
        assert_close(merged.cpu(), oracle)
        return
    needs("triton", device)
    got = merge_states(o, lse, impl="triton")[0]
    weights = (lse - lse.logsumexp(0)).exp().transpose(-1, -2)[..., None]
    eager = (weights.half() * o).sum(0)
    assert_close_to_oracle(got, (weights.double() * o.double()).sum(0).cpu(), eager.cpu(), "o")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_states_over_no_keys(impl: str, device: str):
    """They leave the other state as it is, whatever they hold; of two of them nothing remains."""
    needs(impl, device)
    o, lse, _ = parts(6, (5, 5), torch.float32, device)
    o, lse = o.clone(), lse.clone()
    lse[0, :, 1] = lse[1, :, 2] = -math.inf
    lse[:, :, 3] = -math.inf
    o[0, 1], o[1, 2], o[:, 3] = math.nan, math.nan, math.inf
    for merged, merged_lse in (
        merge_states(o, lse, impl=impl),
        merge_state(o[0], lse[0], o[1], lse[1], impl=impl),
    ):
        assert torch.equal(merged[1], o[1, 1])
        assert torch.equal(merged[2], o[0, 2])
        assert torch.equal(merged[3], torch.zeros_like(merged[3]))
        assert (merged_lse[:, 3] == -math.inf).all()
        assert_close(merged_lse[:, 1], lse[1, :, 1], atol=1e-6, rtol=1e-6)
    lone, lone_lse = merge_states(o[:1, 4:], lse[:1, :, 4:], impl=impl)
    assert torch.equal(lone, o[0, 4:])
    assert_close(lone_lse, lse[0, :, 4:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_extreme_lse(impl: str, device: str):
    needs(impl, device)
    o = torch.tensor([1.0, 3.0], device=device).view(2, 1, 1, 1).expand(2, 1, 1, 16)
    for a, b, value in ((3e4, 3e4, 2.0), (-1e30, 5.0, 3.0), (9e4, -9e4, 1.0)):
        lse = torch.tensor([a, b], device=device).view(2, 1, 1)
        merged, merged_lse = merge_states(o, lse, impl=impl)
        assert_close(merged, torch.full_like(merged, value))
        assert_close(merged_lse.item(), max(a, b) + (math.log(2) if a == b else 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_layouts(impl: str, device: str):
    """Batches, any strides, states along another dimension."""
    needs(impl, device)
    o, lse, _ = parts(12, (3, 4, 5), torch.float32, device)
    expected = merge_states(o, lse, impl=impl)
    batched = merge_states(o.unflatten(1, (2, 6)), lse.unflatten(-1, (2, 6)).transpose(1, 2), impl=impl)
    # On a GPU torch's sums may go another way for other strides.
    same = assert_close if impl == "reference" else partial(assert_close, rtol=0.0, atol=0.0)
    same(batched[0].flatten(0, 1), expected[0])
    same(batched[1].transpose(0, 1).flatten(1), expected[1])
    inner = o.movedim(0, 1).contiguous()  # [total, n, H, D], as FlashInfer stacks
    inner_lse = lse.permute(2, 0, 1).contiguous()  # [total, n, H]
    got = merge_states(inner.movedim(1, 0), inner_lse.permute(1, 2, 0), impl=impl)
    same(got, expected)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_many_states_and_tokens_first(impl: str, device: str):
    """More states than are asked for at once, of three heads of 24 columns, with the LSE of a token in one place."""
    needs(impl, device)
    sizes = (5, 0, 3, *[1] * 8, 30, 2)
    o, lse, (oracle, oracle_lse) = parts(7, sizes, torch.float32, device)
    assert o.shape[0] == 12
    for count in (12, 3):
        plain = merge_states(o[:count], lse[:count], impl=impl)
        merged, merged_lse = merge_states(o[:count], lse[:count], tokens_first=True, impl=impl)
        assert merged_lse.shape == (3, 7)
        assert merged_lse.mT.is_contiguous()
        assert torch.equal(merged, plain[0])
        assert torch.equal(merged_lse, plain[1])
        if count == 12:
            assert_close(merged.cpu().double(), oracle, atol=2e-6, rtol=2e-6)
            assert_close(merged_lse.cpu().double(), oracle_lse, atol=2e-6, rtol=2e-6)
    pair = [t.unflatten(0, (2, 6)) for t in (o, lse)]
    batched = merge_state(pair[0][0], pair[1][0], pair[0][1], pair[1][1], tokens_first=True, impl=impl)
    assert batched[1].shape == (6, 3, 7)
    assert batched[1].mT.is_contiguous()
    expected = merge_state(pair[0][0, 4], pair[1][0, 4], pair[0][1, 4], pair[1][1, 4], impl=impl)
    assert torch.equal(batched[0][4], expected[0])
    assert torch.equal(batched[1][4], expected[1])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_in_place(impl: str, device: str):
    needs(impl, device)
    o, lse, _ = parts(10, (3, 4), torch.float32, device)
    expected = merge_state(o[0], lse[0], o[1], lse[1], impl=impl)
    mask = torch.rand(10, device=device) < 0.5
    for chosen in (None, mask):
        mine, mine_lse = o[0].clone(), lse[0].T.contiguous().T
        assert merge_state_(mine, mine_lse, o[1], lse[1], mask=chosen, impl=impl) is None
        rows = torch.ones_like(mask) if chosen is None else chosen
        assert torch.equal(mine[rows], expected[0][rows])
        assert torch.equal(mine[~rows], o[0][~rows])
        assert torch.equal(mine_lse[:, rows], expected[1][:, rows])
        assert torch.equal(mine_lse[:, ~rows], lse[0][:, ~rows])


def test_gradients():
    o = torch.randn(2, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: merge_states(a, b), (o, lse))
    for first in (False, True):
        pair = partial(merge_state, base=2, tokens_first=first)
        assert torch.autograd.gradcheck(pair, (o[0], lse[0], o[1], lse[1]))
    empty = lse.detach().clone()
    empty[0, :, 0] = empty[:, :, 1] = -math.inf
    empty.requires_grad_()
    merged, merged_lse = merge_states(o, empty)
    (merged.sum() + merged_lse.masked_fill(merged_lse == -math.inf, 0).sum()).backward()
    assert o.grad.isfinite().all()
    assert empty.grad.isfinite().all()
    assert (o.grad[:, 1] == 0).all()
    assert (o.grad[0, 0] == 0).all()


def test_operators(device: str):
    o, lse, _ = parts(4, (3, 4), torch.float32, device)
    ops = torch.ops.sparseattn
    impl = "auto"
    torch.library.opcheck(ops.merge.default, (o[:, None], lse[:, None], None, None, math.e, impl))
    torch.library.opcheck(ops.merge.default, (o[:1, None], lse[:1, None], o[1:], lse[1:], 2.0, impl, True))
    torch.library.opcheck(ops.merge_.default, (o[:1].clone(), lse[:1].clone(), o[1:], lse[1:], None, math.e, impl))
    compiled = torch.compile(merge_state, fullgraph=True, backend="aot_eager")
    got = compiled(o[0], lse[0], o[1], lse[1])
    assert all(torch.equal(a, b) for a, b in zip(got, merge_states(o, lse), strict=True))


def test_nothing_to_merge(device: str):
    o, lse = torch.zeros(2, 0, 3, 8, device=device), torch.zeros(2, 3, 0, device=device)
    merged, merged_lse = merge_states(o, lse)
    assert merged.shape == (0, 3, 8)
    assert merged_lse.shape == (3, 0)
    for batch, length in ((0, 4), (2, 0)):
        o, lse = torch.zeros(batch, length, 3, 8, device=device), torch.zeros(batch, 3, length, device=device)
        assert merge_state(o, lse, o, lse)[0].shape == o.shape
        merge_state_(o, lse, o, lse, mask=torch.ones(batch, length, dtype=torch.bool, device=device))


BAD = {
    "o_b: expected shape": lambda o, s: merge_state(o, s, o[:1], s),
    "o_b: expected torch.float32 like o_a": lambda o, s: merge_state(o, s, o.half(), s),
    "lse_a: expected torch.float32": lambda o, s: merge_state(o, s.half(), o, s),
    r"lse_b: expected shape \(3, 4\)": lambda o, s: merge_state(o, s, o, s.T),
    "o: expected a tensor": lambda o, s: merge_states(o, s),
    "o: expected tensors without gradients": lambda o, s: merge_state_(o.clone().requires_grad_(), s, o, s),
    "mask: expected bool": lambda o, s: merge_state_(o, s, o, s, mask=torch.ones(4)),
    r"mask: expected shape \(4,\)": lambda o, s: merge_state_(o, s, o, s, mask=torch.ones(3, dtype=torch.bool)),
    "base: expected a number above 1": lambda o, s: merge_state(o, s, o, s, base=1),
    "impl: expected one of": lambda o, s: merge_state(o, s, o, s, impl="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message](torch.randn(4, 3, 8), torch.randn(3, 4))


def test_views_that_cannot_be_flattened_are_refused():
    o, lse = torch.randn(3, 2, 4, 3, 8).transpose(0, 1), torch.randn(2, 3, 3, 4)
    with pytest.raises(ValueError, match="o: expected leading dimensions that a view can flatten"):
        merge_state_(o, lse, o.clone(), lse.clone())


def test_reasons():
    pytest.importorskip("triton", reason="needs Triton")
    assert "float64" in unsupported_reason(torch.zeros(2, 2, 2, dtype=torch.float64), "triton")
    assert unsupported_reason(torch.zeros(2, 2, 2), "reference") is None
