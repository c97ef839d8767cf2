"""``BlockSparseAttentionWrapper`` and ``convert_bsr_mask_layout`` by the book, over FlashInfer's grid and past it."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import attention, check
from torch import Tensor

from sparseattn.flashinfer.quantization import segment_packbits
from sparseattn.flashinfer.sparse import BlockSparseAttentionWrapper, convert_bsr_mask_layout

LOW = torch.float16


def wrapper(device: str = "cpu", **kwargs: Any) -> BlockSparseAttentionWrapper:
    return BlockSparseAttentionWrapper(torch.zeros(1024, dtype=torch.uint8, device=device), **kwargs)


@dataclass
class Pattern:
    """One sequence and its blocks; what no row lists is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    indptr: Tensor
    indices: Tensor
    mask: Tensor
    blocks: Tensor
    kept: Tensor  # bool [M, N], listed and kept inside the blocks
    block: tuple[int, int]

    @property
    def listed(self) -> Tensor:
        """bool [M, N]."""
        (rows, columns), (m, n) = self.block, self.kept.shape
        return self.blocks.repeat_interleave(rows, 0)[:m].repeat_interleave(columns, 1)[:, :n]

    @property
    def geometry(self) -> tuple[Tensor | int, ...]:
        """Positional arguments of ``plan``."""
        (m, heads, dim), (n, heads_k, _) = self.q.shape, self.k.shape
        return (self.indptr, self.indices, m, n, *self.block, heads, heads_k, dim)

    @property
    def diagonal(self) -> Tensor:
        """bool [M, N], what causality leaves."""
        m, n = self.kept.shape
        return torch.arange(n) <= torch.arange(m)[:, None] + n - m

    def check(self, got: Any, seen: Tensor, **options: Any) -> None:
        """Hold results against attention where ``seen`` bool [M, N] or [Hq, M, N] is visible."""
        q, k, v = (t.cpu().nan_to_num(0) for t in (self.q, self.k, self.v))
        check(got, *(attention(q, k, v, mask=seen, dtype=dtype, **options) for dtype in (torch.float64, q.dtype)))


def pattern(
    block: tuple[int, int],
    lengths: tuple[int, int] = (64, 64),
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    density: float = 0.25,
    device: str = "cpu",
    dtype: torch.dtype = LOW,
    ordered: bool = True,
) -> Pattern:
    (rows, columns), (m, n) = block, lengths
    mb, nb = -(-m // rows), -(-n // columns)
    blocks = torch.rand(mb, nb) < density
    if mb > 1:
        blocks[mb - 1] = False
    lists = [row.nonzero()[:, 0] for row in blocks]
    if not ordered:
        lists = [row[torch.randperm(len(row))] for row in lists]
    indptr = torch.tensor([0, *torch.tensor([len(row) for row in lists]).cumsum(0)], dtype=torch.int32)
    indices = torch.cat(lists).int()
    mask = torch.rand(len(indices), rows, columns) > 0.5
    kept = torch.zeros(mb * rows, nb * columns, dtype=torch.bool)
    for at, (i, j) in enumerate((i, j) for i, row in enumerate(lists) for j in row.tolist()):
        kept[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = mask[at]
    q, k, v = (torch.randn(length, h, dim).to(dtype) for length, h in zip((m, n, n), (*heads, heads[1]), strict=True))
    unlisted = ~blocks.any(0).repeat_interleave(columns)[:n]
    k[unlisted] = v[unlisted] = torch.nan
    tensors = (t.to(device) for t in (q, k, v, indptr, indices, mask))
    return Pattern(*tensors, blocks, kept[:m, :n], block)


# ---- FlashInfer's grid, and past it ----

GRID = list(
    itertools.product(
        (1, 4, 16), (1, 4, 16), (64, 128, 256), (64, 128, 256),
        [(h, hk) for h in (1, 4, 16) for hk in (1, 4, 16) if h % hk == 0], (128, 256), (True, False),
    )
)  # fmt: skip


def run_grid(case: tuple[Any, ...], device: str) -> None:
    rows, columns, m, n, heads, dim, masked = case
    p = pattern((rows, columns), (m, n), heads, dim, device=device)
    w = wrapper(device)
    w.plan(*p.geometry, mask=p.mask if masked else None)
    o, lse = w.run(p.q, p.k, p.v, return_lse=True)
    p.check((o, lse), p.kept if masked else p.listed)
    out = torch.empty_like(o)
    assert w.run(p.q, p.k, p.v, out=out) is out
    assert torch.equal(out, o)


@pytest.mark.parametrize("case", [c for c in GRID if c[2] * c[3] == 64 * 64 and c[4] != (16, 16)][::11], ids=str)
def test_sample_of_the_grid(case: tuple[Any, ...], device: str):
    run_grid(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "block", [(1, 1), (1, 4), (1, 16), (4, 1), (4, 4), (4, 16), (16, 1), (16, 4), (16, 16)], ids=str
)
def test_whole_grid(block: tuple[int, int], masked: bool):
    for case in GRID:
        if case[:2] == block and case[-1] == masked:
            run_grid(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (3, 1), (7, 20), (20, 16), (64, 64), (128, 64)], ids=str)
def test_sizes_and_tails(block: tuple[int, int], dtype: torch.dtype, device: str):
    """Blocks that divide neither length; groups of one head, for which FlashInfer's R = 2 and 3 went wrong."""
    for heads, lengths in (((2, 2), (33, 50)), ((4, 2), (150, 200))):
        p = pattern(block, lengths, heads, density=0.5, device=device, dtype=dtype, ordered=False)
        w = wrapper(device)
        w.plan(*p.geometry, causal=True, q_data_type=dtype)
        p.check(w.run(p.q, p.k, p.v, return_lse=True), p.listed & p.diagonal)


@pytest.mark.parametrize("options", [
    {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 5e3, "causal": True},
    {"pos_encoding_mode": "ALIBI"},
    {"logits_soft_cap": 1.5, "causal": True},
    {"sm_scale": 0.4},
], ids=lambda o: "-".join(o))  # fmt: skip
@pytest.mark.parametrize("block", [(3, 5), (64, 64)], ids=str)
def test_options(block: tuple[int, int], options: dict[str, Any], device: str):
    p = pattern(block, (70, 90), density=0.4, device=device)
    w = wrapper(device)
    w.plan(*p.geometry, **options)
    seen = p.listed & p.diagonal if options.get("causal") else p.listed
    names = {"pos_encoding_mode": "positions", "logits_soft_cap": "softcap", "sm_scale": "scale"}
    book = {names.get(n, n): value for n, value in options.items() if n != "causal"}
    p.check(w.run(p.q, p.k, p.v, return_lse=True), seen, **book)


@pytest.mark.parametrize("form", ["blocks", "flat", "packed"])
def test_masks(form: str, device: str):
    p = pattern((4, 6), (30, 45), density=0.5, device=device, ordered=False)
    flat = convert_bsr_mask_layout(p.mask, p.indptr)
    packed, _ = segment_packbits(flat, p.indptr * 24, "little")
    w = wrapper(device)
    w.plan(
        *p.geometry, **({"packed_mask": packed} if form == "packed" else {"mask": p.mask if form == "blocks" else flat})
    )
    p.check(w.run(p.q, p.k, p.v, return_lse=True), p.kept)
    w.plan(*p.geometry, mask=p.mask, causal=True)  # the mask takes the place of causality
    p.check(w.run(p.q, p.k, p.v, return_lse=True), p.kept)


@pytest.mark.parametrize("block", [(4, 6), (64, 64)], ids=str)
@pytest.mark.parametrize("mode", ["NONE", "ROPE_LLAMA"])
def test_gathered_causal(block: tuple[int, int], mode: str, device: str):
    """FlashInfer's: every block row is a request of its own, whose keys are the ones that it lists."""
    p = pattern(block, (5 * block[0] - 1, 8 * block[1]), density=0.4, device=device, ordered=False)
    w = wrapper(device)
    w.plan(*p.geometry, causal=True, pos_encoding_mode=mode, gathered_causal=True)
    o, lse = w.run(p.q, p.k, p.v, return_lse=True)
    bounds, columns = p.indptr.tolist(), torch.arange(block[1])
    for i in range(5):
        numbers = p.indices[bounds[i] : bounds[i + 1]].cpu().long()
        cols = (numbers[:, None] * block[1] + columns).reshape(-1)
        rows = slice(i * block[0], (i + 1) * block[0])
        q, k, v = p.q.cpu()[rows], p.k.cpu()[cols], p.v.cpu()[cols]
        book = (attention(q, k, v, causal=True, positions=mode, dtype=t) for t in (torch.float64, LOW))
        check((o[rows], lse[rows]), *book)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("block", [(4, 6), (64, 64)], ids=str)
def test_pattern_of_each_head(block: tuple[int, int], heads: int, device: str):
    p = pattern(block, (70, 130), density=1.0, device=device)
    blocks = torch.rand(heads, *p.blocks.shape) < 0.4
    seen = blocks.repeat_interleave(block[0], 1)[:, :70].repeat_interleave(block[1], 2)[..., :130]
    seen = seen.repeat_interleave(4 // heads, 0)
    w = wrapper(device, backend="vsa_blackwell")
    w.plan(None, None, *p.geometry[2:], causal=True, block_mask=blocks.to(device))
    p.check(w.run(p.q, p.k, p.v, return_lse=True), seen & p.diagonal)


def test_nothing_listed(device: str):
    """An empty pattern; empty rows are in every other test."""
    p = pattern((2, 3), (9, 12), density=0.0, device=device)
    assert p.indices.numel() == 0
    w = wrapper(device)
    w.plan(*p.geometry)
    o, lse = w.run_return_lse(p.q, p.k, p.v)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("kind", ["kv", "all"])
def test_float8_and_scales(kind: str, device: str):
    p = pattern((4, 8), (20, 32), density=0.6, device=device, dtype=torch.bfloat16)
    q, k, v = (t.float().nan_to_num(0).to(torch.float8_e4m3fn) for t in (p.q, p.k, p.v))
    w = wrapper(device)
    if kind == "kv":
        w.plan(*p.geometry, q_data_type="bfloat16", kv_data_type=torch.float8_e4m3fn)
        got = w.run(p.q, k, v, scale_k=0.5, scale_v=torch.tensor([2.0, 3.0], device=device), return_lse=True)
        p.k, p.v = k.bfloat16() * 0.5, v.bfloat16() * torch.tensor([2.0, 3.0], device=device)[:, None].bfloat16()
    else:
        w.plan(*p.geometry, q_data_type=torch.float8_e4m3fn)
        factors = torch.tensor([0.5, 1.0, 2.0, 4.0], device=device)
        got = w.run(q, k, v, factors, 2.0, return_lse=True)
        p.q, p.k, p.v = (q.bfloat16() * factors[:, None]).bfloat16(), k.bfloat16() * 2, v.bfloat16()
    assert got[0].dtype == torch.bfloat16
    p.check(got, p.listed)


def test_outputs(device: str):
    """``out``, ``lse`` of any strides, another dtype, heads before tokens."""
    p = pattern((4, 8), (20, 32), density=0.6, device=device)
    w = wrapper(device, kv_layout="HND")
    w.plan(*p.geometry, o_data_type="float32")
    out = torch.empty(4, 20, 32, device=device).transpose(0, 1)
    lse = torch.empty(4, 20, device=device).t()
    k, v = (t.transpose(0, 1).contiguous() for t in (p.k, p.v))
    got = w.run(p.q, k, v, out=out, lse=lse, return_lse=True)
    assert got[0] is out
    assert got[1] is lse
    p.check((out.to(LOW), lse), p.listed)
    alone = torch.zeros_like(lse)
    assert isinstance(w.run(p.q, k, v, lse=alone), Tensor)
    assert torch.equal(alone, lse)


def test_forward_keeps_the_plan(device: str):
    p = pattern((4, 8), (20, 32), density=0.6, device=device)
    w = wrapper(device)
    w.begin_forward(*p.geometry, causal=True, sm_scale=0.4, logits_soft_cap=2.0)
    seen = p.listed & p.diagonal
    p.check(w.forward_return_lse(p.q, p.k, p.v), seen, scale=0.4, softcap=2.0)
    p.check(w.forward(p.q, p.k, p.v, sm_scale=0.1), seen, scale=0.1, softcap=2.0)
    p.check(w.run(p.q, p.k, p.v), seen, scale=0.4, softcap=2.0)
    w.end_forward()
    w.reset_workspace_buffer(torch.zeros(1, device=device), torch.zeros(1, device=device))
    p.check(w.run(p.q, p.k, p.v), seen, scale=0.4, softcap=2.0)


# ---- batches, as the documents have them ----


@pytest.mark.parametrize("form", ["blocks", "batch", "expanded", "heads", "kv-heads"])
@pytest.mark.parametrize(("block", "lengths"), [(16, (40, 56)), ((3, 7), (20, 30)), (64, (150, 200))], ids=str)
def test_batches(form: str, block: int | tuple[int, int], lengths: tuple[int, int], device: str):
    (m, n), size = lengths, (block, block) if isinstance(block, int) else block
    grid = tuple(-(-length // s) for length, s in zip(lengths, size, strict=True))
    q = torch.randn(2, m, 4, 32, dtype=LOW, device=device)
    k, v = torch.randn(2, 2, n, 2, 32, dtype=LOW, device=device).unbind()
    shape = {"blocks": grid, "heads": (2, 4, *grid), "kv-heads": (2, 2, *grid)}.get(form, (2, *grid))
    mask = torch.rand(shape, device=device) < 0.5
    if form == "expanded":
        mask = mask[:1].expand(2, -1, -1)
    w = wrapper(device, kv_layout="NHD")
    w.plan(q, k, v, mask, num_qo_heads=4, num_kv_heads=2, head_dim=32, block_size=block, causal=True)
    o, lse = w.forward_return_lse(q, k, v)
    assert o.shape == q.shape
    assert lse.shape == q.shape[:3]
    full = mask.cpu().reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)) if form == "blocks" else mask.cpu()
    full = full if full.dim() == 4 else full[:, None]
    full = full.expand(2, -1, -1, -1).repeat_interleave(4 // full.shape[1], 1)
    seen = full.repeat_interleave(size[0], 2)[:, :, :m].repeat_interleave(size[1], 3)[..., :n]
    seen = seen & (torch.arange(n) <= torch.arange(m)[:, None] + n - m)
    for b in range(2):
        book = (attention(q[b], k[b], v[b], mask=seen[b], dtype=t) for t in (torch.float64, LOW))
        check((o[b], lse[b]), *book)


def test_a_batch_of_one_without_its_dimension(device: str):
    q, k = torch.randn(20, 4, 32, dtype=LOW, device=device), torch.randn(2, 30, 32, dtype=LOW, device=device)
    w = wrapper(device, kv_layout="HND")
    w.plan(q=q, k=k, v=k, sparse_mask=torch.ones(2, 2, dtype=torch.bool, device=device), block_size=16)
    o = w.run(q, k, k)
    book = (attention(q, k.transpose(0, 1), k.transpose(0, 1), dtype=t) for t in (torch.float64, LOW))
    check(o, *book)


# ---- mask layout ----


def upstream_layout(mask: Tensor, bounds: list[int]) -> Tensor:
    """As FlashInfer's loop does it."""
    parts = [mask[a:b].transpose(0, 1).reshape(-1) for a, b in itertools.pairwise(bounds)]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.uint8], ids=str)
def test_mask_layout(dtype: torch.dtype, device: str):
    bounds = [0, 3, 3, 7, 8]
    mask = (torch.rand(8, 3, 5) * 4).to(dtype).to(device)
    got = convert_bsr_mask_layout(mask, torch.tensor(bounds, dtype=torch.int32, device=device))
    assert got.dtype == dtype
    assert torch.equal(got.cpu(), upstream_layout(mask.cpu(), bounds))


def test_mask_layout_of_the_document(device: str):
    """Its indptr names 64 blocks where there are 8: all of them are the first row's."""
    mask = torch.randn(8, 64, 64).half().to(device)
    got = convert_bsr_mask_layout(mask, torch.tensor([0, 32, 64], dtype=torch.int32, device=device))
    assert torch.equal(got.cpu(), upstream_layout(mask.cpu(), [0, 8, 8]))


def test_mask_layout_bad_input():
    mask, indptr = torch.ones(3, 2, 2, dtype=torch.bool), torch.tensor([0, 3], dtype=torch.int32)
    for bad, message in (
        ((mask[0], indptr), "mask: expected [nnz, R, C]"),
        ((mask, indptr[None]), "indptr: expected [MB + 1]"),
        ((mask, indptr.flip(0)), "indptr: expected numbers that ascend from 0"),
        ((mask, indptr - indptr), "indptr: expected an end of at least nnz = 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            convert_bsr_mask_layout(*bad)
    with pytest.raises(TypeError, match="indptr: expected int32"):
        convert_bsr_mask_layout(mask, indptr.float())
    assert convert_bsr_mask_layout(mask[:0], indptr[:1]).shape == (0,)


# ---- what torch.compile takes, and what must not wait for the device ----


def test_compile(device: str):
    p = pattern((4, 6), (30, 45), density=0.5, device=device)
    w = wrapper(device)
    w.plan(*p.geometry, causal=True)
    inputs = [t.nan_to_num(0) for t in (p.q, p.k, p.v)]

    def run(*tensors: Tensor) -> Any:
        return w.run(*tensors, return_lse=True)

    expected = run(*inputs)
    for x, y in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (64, 64)], ids=str)
def test_nothing_waits_for_the_device(block: tuple[int, int]):
    p = pattern(block, (256, 256), device="cuda")
    w = wrapper("cuda")
    batch = [t[None].clone() for t in (p.q, p.k, p.v)]
    blocks = p.blocks.cuda()

    def everything() -> None:
        w.plan(*p.geometry, causal=True)
        w.run(p.q, p.k, p.v, return_lse=True)
        w.plan(*p.geometry, mask=p.mask)
        w.run(p.q, p.k, p.v)
        w.plan(*batch, blocks, num_qo_heads=4, num_kv_heads=2, head_dim=32, block_size=block)
        w.run(*batch)
        convert_bsr_mask_layout(p.mask, p.indptr)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- bad input ----


def plan_with(**changes: Any) -> None:
    p = pattern((2, 3), (10, 12), density=0.7)
    names = ("indptr", "indices", "M", "N", "R", "C", "num_qo_heads", "num_kv_heads", "head_dim")
    wrapper().plan(**{**dict(zip(names, p.geometry, strict=True)), **changes})


MASKS = {"mask": torch.ones(1, 2, 3, dtype=torch.bool), "packed_mask": torch.ones(9, dtype=torch.uint8)}


@pytest.mark.parametrize(("changes", "kind", "message"), [
    ({"indptr": torch.arange(6)}, TypeError, "indptr: expected an int32 tensor"),
    ({"indptr": torch.arange(7).int()}, ValueError, "indptr: expected [MB + 1]"),
    ({"indptr": torch.arange(6).int().flip(0)}, ValueError, "indptr: expected numbers that ascend from 0"),
    ({"indptr": torch.arange(6).int() * 9}, ValueError, "indptr: expected an end of at most nnz"),
    ({"indices": torch.zeros(40)}, TypeError, "indices: expected an int32 tensor"),
    ({"indices": torch.full((40,), 4).int()}, ValueError, "indices: expected column blocks in 0..3"),
    ({"indices": torch.full((40,), -1).int()}, ValueError, "indices: expected column blocks in 0..3"),
    ({"R": 0}, ValueError, "block_size: expected numbers of at least 1"),
    ({"num_kv_heads": 3}, ValueError, "num_qo_heads: expected a multiple of num_kv_heads"),
    (MASKS, ValueError, "packed_mask: expected None beside mask"),
    ({"mask": MASKS["mask"]}, ValueError, "block_mask: expected shape"),
    ({"mask": torch.ones(1, 2, 3)}, TypeError, "mask: expected torch.bool"),
    ({"packed_mask": torch.ones(1, dtype=torch.uint8)}, ValueError, "block_mask: expected"),
    ({"block_mask": torch.ones(3, 5, 4, dtype=torch.bool)}, ValueError, "block_mask: expected [H, MB, NB]"),
    ({"block_mask": torch.ones(2, 5, 4)}, TypeError, "block_mask: expected a bool tensor"),
    ({"block_mask": torch.ones(2, 5, 4, dtype=torch.bool), "packed_mask": MASKS["packed_mask"]}, ValueError,
     "block_mask: expected None beside mask"),
    ({"pos_encoding_mode": "ROPE"}, ValueError, "pos_encoding_mode: expected one of"),
    ({"q_data_type": "int8"}, TypeError, "q_data_type: expected a float dtype"),
    ({"N": 11, "gathered_causal": True}, ValueError, "gathered_causal: expected N a multiple of C = 3"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_bad_plans(changes: dict[str, Any], kind: type[Exception], message: str):
    with pytest.raises(kind, match=re.escape(message)):
        plan_with(**changes)


def test_bad_batches():
    q, k = torch.randn(2, 32, 4, 16), torch.randn(2, 32, 2, 16)
    good = torch.ones(2, 2, dtype=torch.bool)
    for arguments, kind, message in (
        ({"sparse_mask": good.float()}, TypeError, "sparse_mask: expected a bool tensor"),
        ({"sparse_mask": good[:1]}, ValueError, "sparse_mask: expected [MB, NB]"),
        ({"sparse_mask": good.expand(3, 2, 2)}, ValueError, "sparse_mask: expected [MB, NB]"),
        ({"sparse_mask": good, "num_qo_heads": 8}, ValueError, "num_qo_heads: expected 4"),
        ({"sparse_mask": good, "head_dim": 8}, ValueError, "head_dim: expected 16"),
        ({"sparse_mask": good, "block_size": 0}, ValueError, "block_size: expected a number"),
        ({"sparse_mask": good, "k": k[0]}, ValueError, "k: expected [B, S, H, D]"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            wrapper().plan(**{"q": q, "k": k, "v": k, "block_size": 16, **arguments})


def test_bad_runs():
    p = pattern((2, 3), (10, 12), density=0.7)
    w = wrapper()
    with pytest.raises(RuntimeError, match="plan\\(\\) to be called first"):
        w.run(p.q, p.k, p.v)
    w.plan(*p.geometry)
    for tensors, kind, message in (
        ((p.q.bfloat16(), p.k, p.v), TypeError, "q: expected torch.float16, as planned"),
        ((p.q, p.k.bfloat16(), p.v), TypeError, "k: expected torch.float16, as planned"),
        ((p.q[:9], p.k, p.v), ValueError, "q: expected shape (10, 4, 32), as planned"),
        ((p.q, p.k[:9], p.v), ValueError, "k: expected shape (12, 2, 32) (NHD), as planned"),
        ((p.q, p.k, p.v[:9]), ValueError, "v: expected shape [12, 2] + [Dv]"),
        ((p.q, p.k, None), TypeError, "v: expected a tensor"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            w.run(*tensors)
    with pytest.raises(TypeError, match=re.escape("out: expected torch.float16")):
        w.run(p.q, p.k, p.v, out=torch.empty(10, 4, 32))
    with pytest.raises(ValueError, match=re.escape("lse: expected shape (10, 4)")):
        w.run(p.q, p.k, p.v, lse=torch.empty(4, 10))
    with pytest.raises(ValueError, match="backend: expected one of"):
        wrapper(backend="fa1")
    with pytest.raises(ValueError, match="kv_layout: expected one of"):
        wrapper(kv_layout="BSHD")
