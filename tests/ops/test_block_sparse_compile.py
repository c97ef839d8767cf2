"""Block-sparse attention as an operator that torch knows: opcheck, torch.compile, CUDA graphs, tensors past 2^31."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from block_sparse_cases import CASES, build
from torch.testing import assert_close

from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.ops.block_sparse.checks import make_geometry
from sparseattn.ops.block_sparse.library import with_transposed
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.testing import make_qkv, random_block_mask

# torch's own, while it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
OPS = torch.ops.sparseattn


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _inputs(device: str, length: int, heads_mask: int = 2, dtype=torch.float32):
    q, k, v = make_qkv(2, length, length, 4, 2, 16, dtype=dtype, device=device).requires_grad_()
    sinks = torch.linspace(-1, 1, 4, device=device, requires_grad=True)
    mask = random_block_mask((length, length), (16, 32), heads_mask, device=device)
    return q, k, v, mask, sinks


def _loss(q, k, v, mask, sinks):
    o, lse = block_sparse_attention(q, k, v, mask, sinks=sinks, softcap=5.0, return_lse=True)
    return o.float().square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.id in {"sinks-softcap-window", "packed-chunked", "dense-causal", "means-and-columns"}],
    ids=str,
)
def test_opcheck(case, device: str):
    problem = build(case, device)
    layout = {n: x for n, x in problem.kwargs.items() if "seqlen" in n or "ranges" in n}
    g = make_geometry(
        problem.q, problem.k, problem.v, problem.mask, problem.kwargs["causal"], case.scale, case.window, case.softcap,
        problem.sinks, "auto", resolve_sequences(problem.q, problem.k, **layout), case.means,
    )  # fmt: skip
    inputs = (problem.q, problem.k, problem.v)
    torch.library.opcheck(OPS.block_sparse_fwd.default, (*inputs, problem.sinks, "auto", *g))
    o, lse = OPS.block_sparse_fwd(*inputs, problem.sinks, "auto", *g)
    if problem.mask is not None:
        g = with_transposed(g, problem.mask)
    for dlse in (None, torch.randn_like(lse)):
        upstream = (torch.randn_like(o), dlse)
        arguments = (*upstream, *inputs, o, lse, problem.sinks, "auto", False, *g)
        torch.library.opcheck(OPS.block_sparse_bwd.default, arguments)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_results_have_the_strides_that_tracing_was_told(impl: str, device: str):
    """Also for views of [B, H, S, D] tensors, which is how models call: a compiled graph relies on it."""
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    q, k, v = (t.detach() for t in make_qkv(2, 64, 80, 4, 2, 16, dtype=torch.float16, device=device, layout="bhsd"))
    assert not q.is_contiguous()
    mask = random_block_mask((64, 80), (16, 16), 4, density=0.6, device=device)
    g = with_transposed(make_geometry(q, k, v, mask, True, None, None, None, None, impl, resolve_sequences(q, k)), mask)
    o, lse = OPS.block_sparse_fwd(q, k, v, None, impl, *g)
    gradients = OPS.block_sparse_bwd(torch.randn_like(o), None, q, k, v, o, lse, None, impl, False, *g)
    assert all(t.is_contiguous() for t in (o, lse, *gradients))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiles_whole_and_matches_eager(backend: str, dynamic: bool | None, device: str):
    compiled = torch.compile(_loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (64, 96):
        for masked in (True, False):
            q, k, v, mask, sinks = _inputs(device, length)
            leaves = (q, k, v, sinks)
            got = compiled(q, k, v, mask if masked else None, sinks)
            expected = _loss(q, k, v, mask if masked else None, sinks)
            assert_close(got, expected)
            assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


def test_a_new_length_does_not_recompile_a_dynamic_graph():
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(block_sparse_attention, fullgraph=True, dynamic=True, backend=backend)
    for length in (64, 96, 160, 416):
        q, k, v = (t.detach() for t in make_qkv(1, length, length, 4, 2, 16))
        assert_close(compiled(q, k, v), block_sparse_attention(q, k, v))
    assert graphs == 1


def test_mask_made_inside_the_graph():
    def run(q, k, v):
        mask = BlockMask.sliding_window((q.shape[1], k.shape[1]), (24, 0), block_size=16, device=q.device)
        return block_sparse_attention(q, k, v, mask)

    q, k, v = make_qkv(1, 80, 80, 4, 2, 16)
    assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v))


def test_first_call_of_a_process_may_be_compiled():
    program = """
import torch
from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention

q, k, v = (torch.randn(1, 64, 2, 16, requires_grad=True) for _ in range(3))
mask = BlockMask.causal((64, 64), block_size=16)
compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
out = compiled(q, k, v, mask)
out.sum().backward()
torch.testing.assert_close(out, block_sparse_attention(q, k, v, mask))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [True, False])
def test_cuda_graph_replays_on_new_contents(masked: bool):
    q, k, v, mask, _ = _inputs("cuda", 512, dtype=torch.bfloat16)
    leaves = (q, k, v)
    do = torch.randn(2, 512, 4, 16, device="cuda", dtype=torch.bfloat16)

    def step():
        o = block_sparse_attention(q, k, v, mask if masked else None, deterministic=True)
        return o, *torch.autograd.grad(o, leaves, do)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # the stream on which the leaves first met autograd
        captured = step()
    other = random_block_mask((512, 512), (16, 32), 2, density=0.3, device="cuda", seed=5)
    with torch.no_grad():
        for t in leaves:
            t.normal_()
        # The graph reads the lists where they lie, so a selection of the same width may be copied over them.
        width = min(mask.kv_indices.shape[-1], other.kv_indices.shape[-1])
        mask.kv_num_blocks.copy_(other.kv_num_blocks.clamp(max=width))
        mask.kv_indices[..., :width] = other.kv_indices[..., :width]
    graph.replay()
    fresh = BlockMask(mask.kv_num_blocks.clone(), mask.kv_indices.clone(), mask.block_size, mask.seq_lens, causal=True)
    mask = fresh
    with torch.cuda.stream(side):
        again = step()
    torch.cuda.synchronize()
    for got, expected in zip(captured, again, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_tensors_past_two_to_the_31_elements():
    """17 x 1 Mi x 128 = 2.3e9 elements of q; offsets that do not fit an int32 must not wrap."""
    length, heads, dim = 1 << 20, 17, 128
    q = torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.randn(1, length, 1, dim, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    assert q.numel() > 2**31
    mask = BlockMask.sliding_window((length, length), (255, 0), block_size=128, device="cuda")
    o, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    tail = 1024
    do = torch.zeros_like(o)
    do[:, -tail // 2 :] = torch.randn_like(do[:, -tail // 2 :])
    gradients = torch.autograd.grad(o, (q, k, v), do)
    small = [t[:, -tail:].detach().clone().requires_grad_() for t in (q, k, v)]
    window = BlockMask.sliding_window((tail, tail), (255, 0), block_size=128, device="cuda")
    o2, lse2 = block_sparse_attention(*small, window, return_lse=True)
    assert torch.equal(o[:, -tail // 2 :], o2[:, -tail // 2 :])
    assert torch.equal(lse[..., -tail // 2 :], lse2[..., -tail // 2 :])
    for whole, part in zip(gradients, torch.autograd.grad(o2, small, do[:, -tail:]), strict=True):
        # The order of their sums is anybody's, and another one for another length.
        near = 2**-6 * float(part.abs().max())
        torch.testing.assert_close(whole[:, -tail // 2 :], part[:, -tail // 2 :], rtol=2**-6, atol=near)
