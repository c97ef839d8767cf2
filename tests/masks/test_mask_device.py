"""Masks are built and combined without reading the device, so they compile, and capture into CUDA graphs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseattn.masks import BlockMask


def everything(blocks, used, dense, indices):
    """Each way to make or use a mask that promises not to wait, as one function of tensors."""
    lens = {"seq_lens": (70, 100), "block_size": (16, 32), "causal": True}
    given = BlockMask.from_blocks(blocks, **lens, seqused_q=used, max_blocks=3)
    alike = {"block_size": (16, 32), "seqused_q": used}
    patterns = [
        BlockMask.causal((70, 100), **alike),
        BlockMask.sliding_window((70, 100), (20, None), **alike),
        BlockMask.streaming((70, 100), num_sink_tokens=4, num_local_tokens=20, **alike),
        BlockMask.strided((70, 100), stride=2, **alike),
        BlockMask.from_dense(dense, block_size=(16, 32), superset=True),
        BlockMask.from_indices(indices, **lens, sort=True, validate=False),
        given.expand_heads(4),
        given | BlockMask.causal((70, 100), **alike),
        given & BlockMask.streaming((70, 100), num_sink_tokens=4, num_local_tokens=20, **alike),
    ]
    out = []
    for mask in patterns:
        out += [mask.kv_num_blocks, mask.kv_indices, mask.densities(), *mask.transposed(), mask.to_blocks()]
        out.append(mask.to_dense())
    rows, cols = (torch.full((2, n), 20, dtype=torch.int32, device=blocks.device) for n in (5, 4))
    variable = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=(100, 80), window=(20, None))
    return [*out, variable.densities(), variable.to_dense(), *variable.tiling((16, 16))]


def inputs(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(2, 2, 5, 4, generator=generator) < 0.5
    dense = torch.rand(1, 2, 70, 100, generator=generator) < 0.01
    indices = torch.randint(-1, 4, (1, 2, 5, 6), generator=generator)
    return [x.to(device) for x in (blocks, torch.tensor([70, 33], dtype=torch.int32), dense, indices)]


def test_no_shape_depends_on_contents():
    expected = [(t.shape, t.dtype) for t in everything(*inputs())]
    with FakeTensorMode() as mode:
        fake = everything(*(mode.from_tensor(t) for t in inputs()))
    assert [(t.shape, t.dtype) for t in fake] == expected


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(*inputs()), everything(*inputs()), strict=True):
        assert torch.equal(got, expected)


def test_masks_cross_a_compiled_boundary():
    torch._dynamo.reset()
    mask = BlockMask.causal((70, 100), block_size=(16, 32))

    @torch.compile(fullgraph=True, backend="eager")
    def widen(mask):
        assert mask.causal
        return (mask | mask).expand_heads(2)

    assert torch.equal(widen(mask).to_dense(), mask.expand_heads(2).to_dense())
    assert "_transposed" not in mask.__dict__


def test_importing_masks_needs_torch_alone():
    script = (
        "import sys; before = set(sys.modules); import torch; after_torch = set(sys.modules)\n"
        "sys.modules['triton'] = None\n"
        "import sparseattn.masks.block_mask as m, sparseattn.masks as p\n"
        "wrong = [n for n in set(sys.modules) - after_torch if n.startswith(('matplotlib', 'transformers', 'scipy'))]\n"
        "assert not wrong, wrong\n"
        "assert m.BlockMask is p.BlockMask\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    arguments = inputs("cuda")
    expected = everything(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = everything(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want, cpu in zip(again, expected, everything(*inputs()), strict=True):
        assert torch.equal(got, want)
        assert torch.equal(got.cpu(), cpu)


@pytest.mark.gpu
def test_captures_into_a_cuda_graph():
    arguments = inputs("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        everything(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(*arguments)
    other = inputs("cuda")
    other[0] = ~other[0]
    other[2] = other[2].flip(-1)
    for static, new in zip(arguments, other, strict=True):
        static.copy_(new)
    graph.replay()
    for got, expected in zip(captured, everything(*other), strict=True):
        assert torch.equal(got, expected)
