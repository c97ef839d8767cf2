"""Block-sparse attention: every implementation against the dense oracle, and what must hold whatever the numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from block_sparse_cases import CASES, GPU_CASES, Case, build, dense_result, with_gradients, worst_eager
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import IMPLEMENTATIONS, block_sparse_attention, unsupported_reason
from sparseattn.testing import assert_close_to_oracle, make_qkv, poison_unselected, random_block_mask

implementations = pytest.mark.parametrize("impl", sorted(IMPLEMENTATIONS))


def _skip_unless_it_runs(impl: str, device: str, *args, **kwargs) -> None:
    """A kernel that cannot run on this machine's CPU is no failure; one for every GPU that refuses this one is."""
    reason = unsupported_reason(*args, impl=impl, **kwargs)
    if reason is not None and (device == "cpu" or impl == "gluon"):
        pytest.skip(reason)
    assert reason is None


@implementations
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle_forward_and_backward(case: Case, impl: str, device: str):
    _check_against_oracle(case, impl, device)


@pytest.mark.gpu
@implementations
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_matches_oracle_at_gpu_shapes(case: Case, impl: str):
    _check_against_oracle(case, impl, "cuda")


def _check_against_oracle(case: Case, impl: str, device: str) -> None:
    if impl == "triton" and device == "cpu" and not case.interpret:
        pytest.skip("not worth its time under the interpreter")
    problem = build(case, device)
    _skip_unless_it_runs(
        impl, device, problem.q, problem.k, problem.v, problem.mask, sinks=problem.sinks, gradients=True,
        **problem.kwargs,
    )  # fmt: skip

    def run(q, k, v, sinks):
        return block_sparse_attention(q, k, v, problem.mask, sinks=sinks, return_lse=True, impl=impl, **problem.kwargs)

    def dense(q, k, v, sinks):
        return dense_result(case, problem, q, k, v, sinks)

    if case.layout != "bshd":  # leaves made by with_gradients keep these strides
        assert not problem.q.is_contiguous()
    got = with_gradients(run, problem, case.dtype)
    oracle = with_gradients(dense, problem, torch.float64)
    eager = worst_eager(case, problem, oracle)
    assert got["o"].is_contiguous()
    assert got["lse"].is_contiguous()
    assert got["lse"].dtype == torch.float32
    for name, tensor in got.items():
        assert_close_to_oracle(tensor, oracle[name], eager[name], f"{case}: {name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_exact_in_float64(case: Case):
    problem = build(case, dtype=torch.float64)

    def run(q, k, v, sinks):
        return block_sparse_attention(q, k, v, problem.mask, sinks=sinks, return_lse=True, **problem.kwargs)

    got = with_gradients(run, problem, torch.float64)
    oracle = with_gradients(lambda *t: dense_result(case, problem, *t), problem, torch.float64)
    assert_close(got, oracle)


# ------------------------------------------------------------------------------------------------------ invariants


def _qkv(device: str, seq_q: int = 80, seq_k: int = 80, heads=(4, 2), dtype=torch.float32, batch: int = 1, **kwargs):
    return make_qkv(batch, seq_q, seq_k, *heads, 16, dtype=dtype, device=device, **kwargs)


@implementations
def test_all_blocks_selected_is_dense(impl: str, device: str):
    q, k, v = _qkv(device, 50, 70)
    full = random_block_mask((50, 70), (16, 32), 2, density=1.1, device=device)
    _skip_unless_it_runs(impl, device, q, k, v, full)
    o, lse = block_sparse_attention(q, k, v, full, return_lse=True, impl=impl)
    dense, dense_lse = block_sparse_attention(q, k, v, return_lse=True, impl=impl)
    assert_close(o, dense)
    assert_close(lse, dense_lse)


@implementations
@pytest.mark.parametrize("masked", [True, False])
def test_future_keys_cannot_change_a_bit(impl: str, device: str, masked: bool):
    q, k, v = _qkv(device)
    mask = random_block_mask((80, 80), (16, 16), 4, density=0.7, device=device) if masked else None
    _skip_unless_it_runs(impl, device, q, k, v, mask)
    before = block_sparse_attention(q, k, v, mask, return_lse=True, impl=impl)
    k2, v2 = k.clone(), v.clone()
    k2[:, 45:], v2[:, 45:] = 100.0, -1e4
    after = block_sparse_attention(q, k2, v2, mask, return_lse=True, impl=impl)
    assert torch.equal(before[0][:, :45], after[0][:, :45])
    assert torch.equal(before[1][..., :45], after[1][..., :45])
    assert not torch.equal(before[0], after[0])


@implementations
@pytest.mark.parametrize("masked", [True, False])
def test_chunk_of_queries_is_those_rows_of_the_whole(impl: str, device: str, masked: bool):
    q, k, v = _qkv(device)
    whole = chunk = None
    if masked:
        whole = random_block_mask((80, 80), (16, 16), 2, device=device)
        chunk = BlockMask.from_blocks(whole.to_blocks()[:, :, 3:], block_size=(16, 16), seq_lens=(32, 80), causal=True)
    _skip_unless_it_runs(impl, device, q, k, v, whole)
    o, lse = block_sparse_attention(q, k, v, whole, return_lse=True, impl=impl)
    part, part_lse = block_sparse_attention(q[:, 48:], k, v, chunk, return_lse=True, impl=impl)
    assert_close(part, o[:, 48:])
    assert_close(part_lse, lse[..., 48:])


@implementations
def test_grouped_heads_are_repeated_keys(impl: str, device: str):
    q, k, v = _qkv(device)
    mask = random_block_mask((80, 80), (16, 16), 2, device=device)
    _skip_unless_it_runs(impl, device, q, k, v, mask)
    grouped = block_sparse_attention(q, k, v, mask, impl=impl)
    repeated = block_sparse_attention(
        q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), mask.expand_heads(4), impl=impl
    )
    assert_close(grouped, repeated)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_strided_offsets_and_sinks(impl: str, device: str):
    q, k, v = (torch.randn(50, heads, 16, dtype=torch.float16, device=device) for heads in (4, 2, 2))
    cu = torch.tensor([[0, 9], [20, 9], [50, 9]], dtype=torch.int32, device=device)[:, 0]
    sinks = torch.randn(4, 3, device=device)[:, 1].requires_grad_()
    results = []
    for offsets, sink in ((cu, sinks), (cu.contiguous(), sinks.detach().contiguous().requires_grad_())):
        o = block_sparse_attention(
            q.requires_grad_(), k, v, sinks=sink, cu_seqlens_q=offsets, max_seqlen_q=30, impl=impl
        )
        results.append((o, *torch.autograd.grad(o.float().square().sum(), (q, sink))))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@implementations
def test_packed_is_a_loop_over_sequences(impl: str, device: str):
    lengths = [33, 0, 48, 1]
    q, k, v = (t[0] for t in _qkv(device, sum(lengths), sum(lengths)))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    mask = random_block_mask((48, 48), (16, 16), 4, len(lengths), device=device)
    kwargs = {"cu_seqlens_q": cu, "max_seqlen_q": 48}
    _skip_unless_it_runs(impl, device, q, k, v, mask, **kwargs)
    o, lse = block_sparse_attention(q, k, v, mask, return_lse=True, impl=impl, **kwargs)
    start = 0
    for b, n in enumerate(lengths):
        blocks = mask.to_blocks()[b : b + 1, :, : -(-n // 16), : -(-n // 16)]
        rows = slice(start, start + n)
        start += n
        if n:
            one = BlockMask.from_blocks(blocks, block_size=(16, 16), seq_lens=(n, n), causal=True)
            alone = block_sparse_attention(q[None, rows], k[None, rows], v[None, rows], one, return_lse=True, impl=impl)
            assert_close(o[rows], alone[0][0])
            assert_close(lse[:, rows], alone[1][0])


@implementations
@pytest.mark.parametrize("mask_heads", [1, 2, 4])
def test_unselected_keys_are_never_touched(impl: str, device: str, mask_heads: int):
    q, k, v = _qkv(device, batch=2)
    mask = random_block_mask((80, 80), (16, 16), mask_heads, 2, density=0.12, device=device)
    _skip_unless_it_runs(impl, device, q, k, v, mask, gradients=True)
    poisoned = poison_unselected(k, v, mask)
    assert poisoned[0].isnan().any()

    def run(k, v):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        o, lse = block_sparse_attention(*leaves, mask, return_lse=True, impl=impl)
        return o.detach(), lse.detach(), *torch.autograd.grad(o.square().sum() + lse.sum(), leaves)

    for clean, dirty in zip(run(k, v), run(*poisoned), strict=True):
        assert torch.equal(clean, dirty)


@implementations
def test_rows_outside_every_range_are_zero_and_their_keys_unread(impl: str, device: str):
    q, k, v = _qkv(device, batch=2)
    ranges = torch.tensor([[7, 80], [0, 61]], dtype=torch.int32, device=device)
    outside = torch.ones(2, 80, dtype=torch.bool, device=device)
    outside[0, 7:], outside[1, :61] = False, False
    leaves = [t.masked_fill(outside[..., None, None], math.nan).requires_grad_() for t in (q, k, v)]
    kwargs = {"ranges_q": ranges, "ranges_k": ranges}
    _skip_unless_it_runs(impl, device, q, k, v, **kwargs, gradients=True)
    o, lse = block_sparse_attention(*leaves, return_lse=True, impl=impl, **kwargs)
    assert not o.isnan().any()
    assert (o[outside] == 0).all()
    assert (lse.transpose(1, 2)[outside] == -math.inf).all()
    assert lse.transpose(1, 2)[~outside].isfinite().all()
    for gradient in torch.autograd.grad(o.sum(), leaves):
        assert gradient[~outside].isfinite().all()
        assert (gradient[outside] == 0).all()


@implementations
def test_same_inputs_give_same_bits(impl: str, device: str):
    q, k, v = (t.requires_grad_() for t in _qkv(device))
    mask = random_block_mask((80, 80), (16, 16), 2, device=device)
    _skip_unless_it_runs(impl, device, q, k, v, mask, gradients=True)

    def run():
        o = block_sparse_attention(q, k, v, mask, impl=impl)
        return (o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v)))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_a_huge_or_absent_sink_is_harmless():
    q, k, v = (t.requires_grad_() for t in _qkv("cpu"))
    sinks = torch.tensor([1e4, -math.inf, -1e4, 0.0], requires_grad=True)
    mask = random_block_mask((80, 80), (16, 16), 4, empty_rows=0.3)
    o = block_sparse_attention(q, k, v, mask, sinks=sinks)
    assert (o[:, :, 0] == 0).all()
    assert torch.equal(o[:, :, 1], block_sparse_attention(q, k, v, mask)[:, :, 1])
    for gradient in torch.autograd.grad(o.square().sum(), (q, k, v, sinks)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.id in {"sinks-softcap-window", "packed-chunked", "dim-48-32", "means-and-columns"}],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(case: Case):
    problem = build(replace(case, dim=(3, 2)), dtype=torch.float64)

    def run(q, k, v, sinks):
        o, lse = block_sparse_attention(q, k, v, problem.mask, sinks=sinks, return_lse=True, **problem.kwargs)
        return o, torch.where(lse.isfinite(), lse, 0.0)

    tensors = (problem.q, problem.k, problem.v, problem.sinks)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_gradient_checkpointing_gives_the_same_gradients():
    q, k, v = (t.requires_grad_() for t in _qkv("cpu"))
    mask = random_block_mask((80, 80), (16, 16), 2)

    def layer(q, k, v):
        return block_sparse_attention(q, k, v, mask)

    plain = torch.autograd.grad(layer(q, k, v).square().sum(), (q, k, v))
    again = checkpoint(layer, q, k, v, use_reentrant=False).square().sum()
    for first, second in zip(plain, torch.autograd.grad(again, (q, k, v)), strict=True):
        assert torch.equal(first, second)


def test_reference_memory_grows_with_the_length_not_its_square():
    """A tile holds a bounded number of scores; nothing is as large as [Sq, Sk]."""
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 4096, 4096, 1, 1, 8))
    mask = random_block_mask((4096, 4096), (64, 64), 1, density=0.05, diagonal=True)
    with Largest() as seen:
        block_sparse_attention(q, k, v, mask).sum().backward()
    assert 0 < seen.numel < 4096 * 4096 // 16


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out
