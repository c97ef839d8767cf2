"""Columns and the mean correction: what must hold whatever the numbers, in every implementation that has them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import IMPLEMENTATIONS, block_sparse_attention, unsupported_reason
from sparseattn.testing import make_qkv, poison_unselected, random_block_mask

implementations = pytest.mark.parametrize("impl", sorted(IMPLEMENTATIONS))
kinds = pytest.mark.parametrize("kind", ["columns", "means", "both"])


def _skip_unless_it_runs(impl: str, device: str, *args, **kwargs) -> None:
    reason = unsupported_reason(*args, impl=impl, **kwargs)
    if reason is not None and (device == "cpu" or impl == "gluon"):
        pytest.skip(reason)
    assert reason is None


def _interpreted(impl: str, device: str) -> bool:
    """Whether a call takes seconds: then one of several alike is enough."""
    return impl == "triton" and device == "cpu"


def _mask(kind: str, seq: tuple[int, int], heads: int, device: str, batch: int = 1, count: int = 12, seed: int = 0):
    mask = random_block_mask(seq, (16, 16), heads, batch, density=0.2, hidden=False, device=device, seed=seed)
    if kind == "means":
        return mask
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(seq[1], (batch, heads, -(-seq[0] // 16), count), generator=generator, dtype=torch.int32)
    return mask.with_columns(columns.to(device), sort=True)


def _problem(impl: str, kind: str, device: str, seq: tuple[int, int] = (80, 80), mask_heads: int = 2):
    if _interpreted(impl, device) and kind == "columns":
        pytest.skip("'both' is enough under the interpreter")
    q, k, v = make_qkv(1, *seq, 4, 2, 16, device=device)
    mask = _mask(kind, seq, mask_heads, device)
    options = {"mean_correction": kind != "columns"}
    _skip_unless_it_runs(impl, device, q, k, v, mask, **options)
    return q, k, v, mask, {"impl": impl, "return_lse": True, **options}


@implementations
@kinds
def test_future_keys_cannot_change_a_bit(impl: str, kind: str, device: str):
    q, k, v, mask, options = _problem(impl, kind, device)
    before = block_sparse_attention(q, k, v, mask, **options)
    k2, v2 = k.clone(), v.clone()
    k2[:, 45:], v2[:, 45:] = 100.0, -1e4
    after = block_sparse_attention(q, k2, v2, mask, **options)
    assert torch.equal(before[0][:, :45], after[0][:, :45])
    assert torch.equal(before[1][..., :45], after[1][..., :45])
    assert not torch.equal(before[0], after[0])


@implementations
@kinds
def test_chunk_of_queries_is_those_rows_of_the_whole(impl: str, kind: str, device: str):
    q, k, v, mask, options = _problem(impl, kind, device)
    o, lse = block_sparse_attention(q, k, v, mask, **options)
    chunk = BlockMask(
        mask.kv_num_blocks[:, :, 3:], mask.kv_indices[:, :, 3:], (16, 16), (32, 80), True,
        column_indices=None if mask.column_indices is None else mask.column_indices[:, :, 3:],
    ).validate()  # fmt: skip
    part, part_lse = block_sparse_attention(q[:, 48:], k, v, chunk, **options)
    assert_close(part, o[:, 48:])
    assert_close(part_lse, lse[..., 48:])


@implementations
@pytest.mark.parametrize("kind", ["columns", "both"])
def test_grouped_heads_are_repeated_keys(impl: str, kind: str, device: str):
    q, k, v, mask, options = _problem(impl, kind, device)
    grouped = block_sparse_attention(q, k, v, mask, **options)
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    assert_close(grouped, block_sparse_attention(q, k, v, mask.expand_heads(4), **options))


@implementations
@pytest.mark.parametrize("kind", ["columns", "both"])
def test_packed_is_a_loop_over_sequences(impl: str, kind: str, device: str):
    lengths = [33, 0, 48]
    q, k, v = (t[0] for t in make_qkv(1, 81, 81, 4, 2, 16, device=device))
    cu = torch.tensor([0, 33, 33, 81], dtype=torch.int32, device=device)
    if _interpreted(impl, device) and kind == "columns":
        pytest.skip("'both' is enough under the interpreter")
    # One mask a sequence, and one for all: columns then lie past the end of some.
    _check_packed(impl, kind, device, lengths, q, k, v, cu, _mask(kind, (48, 48), 2, device, batch=3))
    _check_packed(impl, kind, device, lengths, q, k, v, cu, _mask(kind, (48, 48), 2, device))


def _check_packed(impl, kind, device, lengths, q, k, v, cu, mask):
    options = {"impl": impl, "return_lse": True, "mean_correction": kind != "columns"}
    layout = {"cu_seqlens_q": cu, "max_seqlen_q": 48}
    _skip_unless_it_runs(impl, device, q, k, v, mask, mean_correction=kind != "columns", **layout)
    o, lse = block_sparse_attention(q, k, v, mask, **options, **layout)
    start = 0
    for b, n in enumerate(lengths):
        rows, blocks, row = slice(start, start + n), -(-n // 16), min(b, mask.batch - 1)
        start += n
        if n:
            one = BlockMask.from_blocks(
                mask.to_blocks()[row, :, :blocks, :blocks], block_size=16, seq_lens=(n, n), causal=True
            )
            if mask.column_indices is not None:
                one = one.with_columns(mask.column_indices[row, :, :blocks])
            alone = block_sparse_attention(q[None, rows], k[None, rows], v[None, rows], one, **options)
            assert_close(o[rows], alone[0][0])
            assert_close(lse[:, rows], alone[1][0])


def _gradients(q, k, v, mask, options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o, lse = block_sparse_attention(*leaves, mask, **options)
    gradients = torch.autograd.grad(o.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum(), leaves)
    return o.detach(), lse.detach(), *gradients


@implementations
@pytest.mark.parametrize("mask_heads", [1, 4])
def test_unselected_keys_are_never_touched(impl: str, device: str, mask_heads: int):
    if _interpreted(impl, device) and mask_heads == 1:
        pytest.skip("one mask is enough under the interpreter")
    q, k, v = make_qkv(1, 80, 80, 4, 2, 16, device=device)
    mask = _mask("columns", (80, 80), mask_heads, device)
    options = {"impl": impl, "return_lse": True}
    _skip_unless_it_runs(impl, device, q, k, v, mask)
    poisoned = poison_unselected(k, v, mask)
    assert poisoned[0].isnan().any()
    for clean, dirty in zip(_gradients(q, k, v, mask, options), _gradients(q, *poisoned, mask, options), strict=True):
        assert torch.equal(clean, dirty)


@implementations
def test_same_inputs_give_same_bits(impl: str, device: str):
    q, k, v, mask, options = _problem(impl, "both", device)
    for first, second in zip(*(_gradients(q, k, v, mask, options) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@implementations
def test_columns_of_a_block_are_the_block(impl: str, device: str):
    q, k, v, mask, options = _problem(impl, "means", device, seq=(80, 91))
    for correction in (
        (True,) if _interpreted(impl, device) else (True, False)
    ):  # nothing is left of a block whose keys are all columns
        options["mean_correction"] = correction
        some = mask.to_blocks()
        some[..., 1::2] = False
        columns = torch.arange(91, dtype=torch.int32, device=device).expand(1, 2, 6, 91)[:, :, :5]
        listed = mask.to_blocks().repeat_interleave(16, 3)[..., :91]
        fewer = BlockMask.from_blocks(some, seq_lens=(80, 91), block_size=16, causal=True)
        fewer = fewer.with_columns(torch.where(listed, columns, -1))
        assert fewer.column_counts().sum() > 0
        for ours, theirs in zip(
            _gradients(q, k, v, fewer, options), _gradients(q, k, v, mask, options), strict=True
        ):  # fmt: skip
            assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@implementations
def test_equal_keys_make_the_mean_correction_exact(impl: str, device: str):
    """Where the keys and the values of a block are all the same, its mean is the block."""
    q, k, v = make_qkv(1, 64, 128, 4, 2, 16, device=device)
    k, v = (t[:, ::16].repeat_interleave(16, 1) for t in (k, v))
    mask = _mask("means", (64, 128), 4, device)
    # The diagonal's blocks are cut, so no mean stands for them.
    mask = mask | BlockMask.streaming((64, 128), num_sink_tokens=0, num_local_tokens=16, block_size=16, device=device)
    _skip_unless_it_runs(impl, device, q, k, v, mask, mean_correction=True)
    corrected = block_sparse_attention(q, k, v, mask, mean_correction=True, return_lse=True, impl=impl)
    assert_close(corrected, block_sparse_attention(q, k, v, return_lse=True, impl=impl), atol=1e-5, rtol=1e-5)


@implementations
def test_only_skipped_blocks_are_corrected(impl: str, device: str):
    q, k, v = make_qkv(1, 70, 70, 2, 1, 16, device=device)
    every = BlockMask.causal(70, block_size=16, device=device)
    _skip_unless_it_runs(impl, device, q, k, v, every, mean_correction=True)
    for mask in (every, None):
        plain, corrected = (
            block_sparse_attention(q, k, v, mask, mean_correction=on, return_lse=True, impl=impl)
            for on in (False, True)
        )
        assert_close(plain, corrected, atol=0.0, rtol=0.0)


@implementations
def test_more_columns_than_a_tile_holds(impl: str, device: str):
    """Columns in several tiles, rows of blocks without any, and keys that are a column in one row only."""
    q, k, v = make_qkv(1, 64, 300, 2, 1, 16, dtype=torch.float16, device=device)
    columns = torch.full((1, 2, 4, 200), -1, dtype=torch.int32, device=device)
    columns[0, 0, 1] = torch.arange(0, 200, device=device)
    columns[0, 1, 3] = torch.arange(100, 300, device=device)
    columns[0, 1, 0, :1] = 299
    mask = BlockMask.from_blocks(torch.zeros(1, 2, 4, 19, device=device).bool(), seq_lens=(64, 300), block_size=16)
    mask = mask.with_columns(columns)
    options = {"impl": impl, "return_lse": True}
    _skip_unless_it_runs(impl, device, q, k, v, mask, gradients=True)
    exact = _gradients(q.double(), k.double(), v.double(), mask, options | {"impl": "reference"})
    for got, expected in zip(_gradients(q, k, v, mask, options), exact, strict=True):
        assert_close(got.double(), expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_mean_correction_is_a_flag(value):
    q, k, v = make_qkv(1, 16, 16, 1, 1, 16)
    with pytest.raises(TypeError, match="mean_correction: expected True or False"):
        block_sparse_attention(q, k, v, mean_correction=value)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_and_matches_eager(device: str):
    torch._dynamo.reset()

    def loss(q, k, v, mask):
        o, lse = block_sparse_attention(q, k, v, mask, mean_correction=True, return_lse=True)
        return o.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    q, k, v = make_qkv(1, 80, 80, 4, 2, 16, device=device).requires_grad_()
    mask = _mask("both", (80, 80), 2, device)
    got, expected = compiled(q, k, v, mask), loss(q, k, v, mask)
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, (q, k, v)), torch.autograd.grad(expected, (q, k, v)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["columns", "means", "both"])
def test_larger_shapes_on_a_gpu(kind: str, dtype: torch.dtype):
    seq, heads = (1000, 1500), (8, 2)
    q, k, v = make_qkv(2, *seq, *heads, 128, dtype=dtype, device="cuda")
    mask = random_block_mask(seq, (128, 64), 8, 2, density=0.2, device="cuda")
    if kind != "means":
        columns = torch.randint(seq[1], (2, 8, 8, 150), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
        mask = mask.with_columns(columns.cuda(), sort=True)
    options = {"return_lse": True, "mean_correction": kind != "columns"}
    got = _gradients(q, k, v, mask, options | {"impl": "triton"})
    expected = _gradients(q.double(), k.double(), v.double(), mask, options | {"impl": "reference"})
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(got, expected, strict=True):
        error = (ours.double() - theirs)[theirs.isfinite()].norm() / theirs[theirs.isfinite()].norm()
        assert error < tolerance
    for first, second in zip(got, _gradients(q, k, v, mask, options | {"impl": "triton"}), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_columns():
    q, k, v = make_qkv(1, 512, 512, 4, 2, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
    masks = [_mask("both", (512, 512), 4, "cuda", count=40, seed=seed) for seed in (0, 5)]
    width = max(mask.kv_indices.shape[-1] for mask in masks)
    masks = [
        BlockMask(
            mask.kv_num_blocks, torch.nn.functional.pad(mask.kv_indices, (0, width - mask.kv_indices.shape[-1])),
            mask.block_size, mask.seq_lens, True, column_indices=mask.column_indices,
        )
        for mask in masks
    ]  # fmt: skip
    do = torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16)
    static = masks[0]

    def step(mask):
        o = block_sparse_attention(q, k, v, mask, mean_correction=True)
        return o, *torch.autograd.grad(o, (q, k, v), do)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(static)
        expected = step(masks[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step(static)
    for name in ("kv_num_blocks", "kv_indices", "column_indices"):
        getattr(static, name).copy_(getattr(masks[1], name))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)
