"""Small calls of every kernel family, for NVIDIA's compute-sanitizer; ``test_sanitizer.py`` runs it.

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/ops/sanitized.py [family ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from sparseattn import (
    BlockMask,
    PagedCache,
    block_sparse_attention,
    bsr_attention,
    landmark,
    paged_attention,
    selectors,
)
from sparseattn.testing import make_qkv, random_block_mask

DEVICE, DTYPE = "cuda", torch.bfloat16


def masked(impl: str) -> None:
    """Forward and both backward passes over a mask of every head, of an odd length."""
    _differentiated(impl, 300, 128, random_block_mask((300, 300), (128, 128), 4, device=DEVICE))


def dense(impl: str) -> None:
    """The same without a mask."""
    _differentiated(impl, 260, 64, None)


def _differentiated(impl: str, length: int, dim: int, mask: BlockMask | None) -> None:
    leaves = [t.requires_grad_() for t in make_qkv(1, length, length, 4, 2, dim, dtype=DTYPE, device=DEVICE)]
    for deterministic in (False, True):
        o = block_sparse_attention(*leaves, mask, impl=impl, deterministic=deterministic)
        torch.autograd.grad(o, leaves, torch.ones_like(o))


def small_and_variable_blocks(impl: str) -> None:
    """Forward passes that gather small blocks, and that cut variable ones; columns and means besides."""
    q, k, v = make_qkv(1, 300, 420, 4, 2, 128, dtype=DTYPE, device=DEVICE)
    small = random_block_mask((300, 420), (64, 32), 2, density=0.3, device=DEVICE)
    columns = torch.arange(5, 400, 41, dtype=torch.int32, device=DEVICE)
    block_sparse_attention(q, k, v, small.with_columns(columns), mean_correction=True, impl=impl)
    sizes = [torch.tensor(s, dtype=torch.int32, device=DEVICE) for s in ((100, 200), (17, 83, 320))]
    pattern = torch.tensor([[True, False, True], [False, True, True]], device=DEVICE)
    block_sparse_attention(q, k, v, BlockMask.from_variable_blocks(pattern, *sizes, seq_lens=(300, 420)), impl=impl)


def paged(impl: str) -> None:
    """Decode and prefill in one batch, with pages of one and of 16 tokens, and a latent cache."""
    lengths = torch.tensor([37, 0, 150], dtype=torch.int32, device=DEVICE)
    cu = torch.tensor([0, 1, 1, 40], dtype=torch.int32, device=DEVICE)
    for page in (1, 16):
        k, v = (torch.randn(192 // page + 8, page, 2, 128, dtype=DTYPE, device=DEVICE) for _ in range(2))
        table = torch.arange(3, device=DEVICE, dtype=torch.int32)[:, None] + torch.arange(
            160 // page, device=DEVICE, dtype=torch.int32
        )
        cache = PagedCache(k, v, lengths, table)
        q = torch.randn(40, 8, 128, dtype=DTYPE, device=DEVICE)
        paged_attention(q, cache, cu_seqlens_q=cu, max_seqlen_q=39, impl=impl)
        paged_attention(q[:3], cache, impl=impl)
    ckv, kpe = (torch.randn(16, 16, d, dtype=DTYPE, device=DEVICE) for d in (512, 64))
    latent = PagedCache.latent(ckv, kpe, lengths, table)
    queries = tuple(torch.randn(3, 16, d, dtype=DTYPE, device=DEVICE) for d in (512, 64))
    paged_attention(queries, latent, scale=192**-0.5, impl=impl)


def bsr(impl: str) -> None:
    """Blocks of 8 x 4, which are gathered."""
    q, k, v = (t[0] for t in make_qkv(1, 50, 70, 8, 2, 64, dtype=DTYPE, device=DEVICE))
    indptr = torch.arange(0, 15, 2, dtype=torch.int32, device=DEVICE)
    indices = torch.tensor([0, 17], dtype=torch.int32, device=DEVICE).repeat(7)
    bsr_attention(q, k, v, indptr, indices, (8, 4), impl=impl)


def landmarks(impl: str) -> None:
    """Selection by landmarks, by threshold and by density."""
    q, k, _ = make_qkv(1, 700, 700, 4, 2, 128, dtype=DTYPE, device=DEVICE)
    for options in ({"tau": 0.1}, {"density": 0.3}):
        landmark(q, k, selectors.configure("landmark", options), impl=impl)


def methods(impl: str) -> None:
    """Every other selector."""
    q, k, _ = make_qkv(1, 700, 700, 4, 2, 128, dtype=DTYPE, device=DEVICE)
    for method in selectors.SELECTORS:
        selectors.get(method).select(q, k, impl=impl)


FAMILIES: dict[str, Callable[[str], None]] = {
    f"{family.__name__}-{impl}": lambda family=family, impl=impl: family(impl)  # type: ignore[misc]
    for family in (masked, dense, small_and_variable_blocks, paged, landmarks, bsr, methods)
    for impl in ("gluon", "triton")
    if impl == "triton" or family not in (bsr, methods)
}

if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        FAMILIES[name]()
        torch.cuda.synchronize()
        print(name, flush=True)
