"""What is particular to the Triton implementation: what it refuses, its tiles and launches, how often it compiles."""

from __future__ import annotations

import math

import pytest
import torch

from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention, unsupported_reason
from sparseattn.ops.block_sparse.checks import make_geometry
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.testing import make_qkv, random_block_mask

triton_impl = pytest.importorskip("sparseattn.ops.block_sparse.triton", reason="needs Triton")


def _geometry(**changes):
    from sparseattn.ops.block_sparse.geometry import Geometry

    plain = Geometry(
        None, None, None, None, 128, 128, None, None, None, None, 1, 64, 64, False, True, -1, -1, 0.25, 0.0
    )
    return plain._replace(**changes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 272}, "head dimensions up to 256, not 272"),
        ({"scale": -0.5}, "positive scale"),
    ],
)
def test_refuses_with_a_reason(options: dict, reason: str, device: str) -> None:
    q, k, v = make_qkv(
        1, 32, 32, 2, 1, options.get("head_dim", 16), dtype=options.get("dtype", torch.float16), device=device
    )
    scale = options.get("scale")
    assert reason in unsupported_reason(q, k, v, scale=scale, impl="triton")
    with pytest.raises(ValueError, match="impl"):
        block_sparse_attention(q, k, v, scale=scale, impl="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
def test_interpreter_refuses_bfloat16() -> None:
    q, k, v = make_qkv(1, 32, 32, 1, 1, 16, dtype=torch.bfloat16)
    assert "bfloat16" in unsupported_reason(q, k, v, impl="triton")


@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
@pytest.mark.parametrize("block", [(16, 16), (48, 80), (96, 64), (128, 128), (256, 16), (240, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_divide_the_blocks(kernel: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    q = torch.empty(1, 1, 1, 80, dtype=dtype)
    lists = torch.empty(1, 1, 1, dtype=torch.int32)
    tiles = triton_impl._tiles(kernel, q, q, _geometry(kv_num_blocks=lists, block_q=block[0], block_kv=block[1]), None)
    assert block[0] % tiles.block_m == 0
    assert block[1] % tiles.block_n == 0
    assert min(tiles.block_m, tiles.block_n) >= 16
    assert tiles.num_warps in (1, 2, 4, 8)


def test_few_rows_share_the_keys() -> None:
    q, k = torch.empty(1, 1, 8, 16), torch.empty(1, 5000, 2, 16)
    pack, splits = triton_impl._split_plan(q, k, _geometry(max_q=1, max_k=5000))
    assert pack == 4
    assert splits > 1
    assert triton_impl._split_plan(q, k, _geometry(max_q=128, max_k=5000)) == (1, 1)


@pytest.mark.parametrize("seq_q", [1, 5])
@pytest.mark.parametrize("window", [None, (300, 0)])
def test_shared_keys_merge_exactly(seq_q: int, window: tuple[int, int] | None, device: str) -> None:
    q, k, v = make_qkv(2, seq_q, 700, 4, 2, 16, device=device)
    sinks = torch.randn(4, device=device)
    ranges = torch.tensor([[13, 700], [650, 650]], dtype=torch.int32, device=device)
    results = [
        block_sparse_attention(q, k, v, window=window, sinks=sinks, ranges_k=ranges, return_lse=True, impl=impl)
        for impl in ("triton", "reference")
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(results[0][0][1], torch.zeros_like(q[1]))  # an empty sequence
    assert torch.all(results[0][1][1] == -torch.inf)


def test_softcap_is_exact_from_tiny_to_saturated(device: str) -> None:
    q = torch.zeros(1, 16, 1, 16, device=device)
    q[..., 0] = 1.0
    scores = torch.tensor([1e-6, -1e-4, 0.02, -0.34, 0.36, 1.5, -9.0, 80.0], device=device).repeat(4)
    k = torch.zeros(1, 32, 1, 16, device=device)
    k[0, :, 0, 0] = scores
    v = torch.eye(32, device=device)[None, :, None, :]
    results = [
        block_sparse_attention(q, k, v, causal=False, scale=1.0, softcap=1.0, impl=impl)
        for impl in ("triton", "reference")
    ]
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-6)


def test_a_mask_without_a_single_block(device: str) -> None:
    q, k, v = make_qkv(1, 32, 48, 2, 1, 16, device=device)
    q.requires_grad_()
    mask = BlockMask(
        kv_num_blocks=torch.zeros(1, 1, 2, dtype=torch.int32, device=device),
        kv_indices=torch.full((1, 1, 2, 1), -7, dtype=torch.int32, device=device),
        block_size=(16, 16),
        seq_lens=(32, 48),
    )
    o, lse = block_sparse_attention(q, k, v, mask, return_lse=True, impl="triton")
    o.sum().backward()
    assert not o.any()
    assert torch.all(lse == -torch.inf)
    assert not q.grad.any()


@pytest.mark.gpu
def test_a_new_prompt_compiles_nothing() -> None:
    """Lengths, densities and batch sizes reuse the kernels of the first call, forward and backward."""
    from sparseattn.ops.block_sparse import triton_backward, triton_forward

    kernels = [triton_forward.forward_kernel, triton_backward.preprocess_kernel]
    kernels += [triton_backward.dkdv_kernel, triton_backward.dq_kernel]

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def call(batch: int, seq: int, density: float | None) -> None:
        q, k, v = make_qkv(batch, seq, seq, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
        q.requires_grad_()
        mask = None
        if density is not None:
            mask = random_block_mask((seq, seq), (64, 64), 4, density=density, device="cuda")
        block_sparse_attention(q, k, v, mask, impl="triton").sum().backward()

    call(1, 256, 0.5)
    call(1, 256, None)
    before = compiled()
    assert before > 0
    for batch, seq, density in [(1, 257, 0.5), (2, 1000, 0.1), (3, 4096, 1.0), (1, 511, None), (2, 1024, None)]:
        call(batch, seq, density)
    assert compiled() == before


@pytest.mark.gpu
def test_ten_runs_give_the_same_bits() -> None:
    q, k, v = make_qkv(1, 2000, 2000, 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    mask = random_block_mask((2000, 2000), (128, 128), 8, density=0.4, diagonal=True, device="cuda")

    def run() -> list[torch.Tensor]:
        o, lse = block_sparse_attention(q, k, v, mask, return_lse=True, impl="triton")
        return [o, lse, *torch.autograd.grad(o.float().square().sum(), (q, k, v))]

    first = run()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize(("block", "seq"), [((48, 80), (80, 144)), ((128, 128), (192, 320))], ids=["48x80", "128x128"])
def test_tiles_past_the_end_of_the_last_block_read_nothing(
    block: tuple[int, int], seq: tuple[int, int], device: str
) -> None:
    """Lengths that are a multiple of a tile and not of a block: the last block ends in tiles with no row at all."""
    q, k, v = make_qkv(1, *seq, 2, 1, 16, dtype=torch.float16, device=device)
    mask = random_block_mask(seq, block, 2, density=0.6, diagonal=True, device=device)

    def run(impl: str, poisoned: bool) -> list[torch.Tensor]:
        leaves = []
        for t in (q, k, v):
            storage = torch.full((1, t.shape[1] + 256, *t.shape[2:]), torch.nan, dtype=t.dtype, device=device)
            storage[:, : t.shape[1]] = t
            leaves.append((storage[:, : t.shape[1]] if poisoned else t.clone()).detach().requires_grad_())
        o = block_sparse_attention(*leaves, mask, impl=impl)
        do = torch.full((1, seq[0] + 256, 2, 16), torch.nan, dtype=o.dtype, device=device)
        do[:, : seq[0]] = o.detach() + 1
        return [o, *torch.autograd.grad(o, leaves, do[:, : seq[0]])]

    for got, expected in zip(run("triton", True), run("reference", False), strict=True):
        torch.testing.assert_close(got, expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
def test_tiles_that_fit_the_blocks_have_the_warps_they_were_given(kernel: str, dim: int) -> None:
    """What is compiled in tests is what runs: with two warps in place of eight, wide heads spilled all they had."""
    q, k, v = make_qkv(1, 256, 256, 1, 1, dim, dtype=torch.float16)
    for size in (128, 16):
        mask = BlockMask.causal((256, 256), block_size=size)
        g = make_geometry(q, k, v, mask, True, None, None, None, None, "triton", resolve_sequences(q, k))
        configured = triton_impl.config_for(kernel, dim, 2, 8)
        tiles = triton_impl._tiles(kernel, q, v, g, None)
        assert tiles.num_warps >= 1
        if size == 128:
            assert tiles == configured
        else:
            assert tiles.num_warps < configured.num_warps


def test_packed_launches_are_as_large_as_the_rows_need(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """However long the longest sequence is said to be: a length that nobody gave would launch batch times as much."""
    programs = {}

    class Spy:
        def __init__(self, name: str) -> None:
            self.kernel, self.name = getattr(triton_impl, name), name

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            programs[self.name] = math.prod(grid)
            return self.kernel[grid]

        def warmup(self, *args: object, **kwargs: object) -> object:
            return self.kernel.warmup(*args, **kwargs)

    names = ("forward_kernel", "preprocess_kernel", "dq_kernel", "dkdv_kernel")
    for name in names:
        monkeypatch.setattr(triton_impl, name, Spy(name))
    q, k, v = (t[0].requires_grad_() for t in make_qkv(1, 640, 640, 1, 1, 16, device=device))
    cu = torch.arange(0, 641, 64, dtype=torch.int32, device=device)
    results = []
    for longest in (None, 64):
        o = block_sparse_attention(q, k, v, cu_seqlens_q=cu, max_seqlen_q=longest, impl="triton")
        results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
        rows = [triton_impl.config_for(kernel, 16, 4, 8) for kernel in ("forward", "dq", "dkdv")]
        tiles = (rows[0].block_m, 64, rows[1].block_m, rows[2].block_n)
        assert programs == {name: 640 // tile + 10 for name, tile in zip(names, tiles, strict=True)}
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
