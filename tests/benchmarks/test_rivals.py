"""Rivals: the registry is cheap, and masks reach each of them in its own format. Fakes stand in for the packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import block_sparse, rivals
from benchmarks.rivals import fa4, flashinfer, flashprefill
from sparseattn import BlockMask, block_sparse_attention
from sparseattn.testing import dense_attention, random_block_mask
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.workloads import Problem

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "heads": 4, "kv_heads": 2, "head_dim": 16, "block": 128, "dtype": "fp32", "device": torch.device("cpu"),
}  # fmt: skip


def problem(op: str = "forward", n: int = 512, density: float = 0.4, **shape: Any) -> Problem:
    return Problem(op, n, density, **{**SMALL, **shape})


# ---- the registry ----


def test_importing_the_benchmarks_imports_no_rival() -> None:
    code = (
        "import sys, pkgutil, importlib, benchmarks\n"
        "for m in pkgutil.walk_packages(benchmarks.__path__, 'benchmarks.'):\n"
        "    importlib.import_module(m.name)\n"
        "from benchmarks.rivals import installed\n"
        "assert len(installed()) > 10\n"
        "heavy = {'flash_attn', 'flashinfer', 'flashprefill', 'cutlass', 'triton', 'transformers', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_everyone_says_whether_it_is_there() -> None:
    found = rivals.installed()
    assert set(found) == set(rivals.IMPLEMENTATIONS)
    for name, reason in found.items():
        assert reason is None or "not installed" in reason, name
    assert found["cudnn_dense"] is found["sparseattn_triton"] is None


def test_what_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = rivals.Implementation("fa4", lambda problem: pytest.fail("prepared"), lambda: "it is not here")
    monkeypatch.setitem(rivals.IMPLEMENTATIONS, "fa4", absent)
    with pytest.raises(Unsupported, match="it is not here"):
        block_sparse.measure(problem(), "fa4", 1.0)


def test_dense_rivals_and_passes() -> None:
    def takers(p: Problem) -> set[str]:
        return {name for name, one in rivals.IMPLEMENTATIONS.items() if one.takes(p)}

    assert "cudnn_dense" not in takers(problem())
    assert {"cudnn_dense", "fa4_dense", "fa4", "sparseattn_gluon_dense"} <= takers(problem(density=1.0))
    assert not {"flashinfer_dense", "flashinfer_variable", "flashprefill"} & takers(problem("backward", density=1.0))
    assert "sparseattn_gluon_deterministic" not in takers(problem(density=1.0))
    assert "sparseattn_gluon_deterministic" in takers(problem("backward"))


def test_ours_say_why_not() -> None:
    for name in ("sparseattn_gluon", "sparseattn_triton"):
        with pytest.raises(Unsupported):
            rivals.IMPLEMENTATIONS[name].prepare(problem(head_dim=1000))
    reference = rivals.IMPLEMENTATIONS["sparseattn_reference"]
    with pytest.raises(Unsupported, match="timed on a CPU only"):
        reference.prepare(problem(device=torch.device("cuda")))


def test_building_a_mask_is_timed_where_patterns_change() -> None:
    grid = problem(n=256, block=32, grid=(2, 4), causal=False)
    row = block_sparse.measure(grid, "sparseattn_reference", 1.0)
    assert row["build_ms"] > 0
    assert row["build_wall_ms"] > 0
    assert "build_ms" not in block_sparse.measure(problem(), "sparseattn_reference", 1.0)


# ---- FlashAttention-4 ----


class BlockSparseTensorsTorch(NamedTuple):
    """Field for field the package's."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None


def table(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """bool [B, H, rows, columns] of lists."""
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.is_contiguous()
    assert indices.is_contiguous()
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    out = torch.zeros((*counts.shape, columns + 1), dtype=torch.bool)
    out.scatter_(-1, indices.long().where(listed, columns), listed)
    return out[..., :columns]


def fake_flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, deterministic: bool = False,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    block_sparse_tensors_bwd: BlockSparseTensorsTorch | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """What the package documents: full blocks unmasked, others causally; backward, the same lists transposed."""
    (sq, heads), sk = q.shape[1:3], k.shape[1]
    allowed = torch.ones(1, 1, sq, sk, dtype=torch.bool)
    allowed = allowed.tril(sk - sq) if causal else allowed
    if block_sparse_tensors is not None:
        lists = block_sparse_tensors
        assert lists.block_size is not None
        assert lists.full_block_cnt is not None
        assert lists.full_block_idx is not None
        assert lists.mask_block_cnt.shape[1] in (1, heads), "lists of 1 or the query heads"
        bq, bk = lists.block_size
        cols = -(-sk // bk)
        masked = table(lists.mask_block_cnt, lists.mask_block_idx, cols)
        full = table(lists.full_block_cnt, lists.full_block_idx, cols)
        assert not (masked & full).any()
        if block_sparse_tensors_bwd is not None:
            back = block_sparse_tensors_bwd
            rows = masked.shape[2]
            assert torch.equal(table(back.mask_block_cnt, back.mask_block_idx, rows), masked.transpose(2, 3))
            assert back.full_block_cnt is not None
            assert back.full_block_idx is not None
            assert torch.equal(table(back.full_block_cnt, back.full_block_idx, rows), full.transpose(2, 3))

        def tokens(blocks: Tensor) -> Tensor:
            return blocks.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :sq, :sk]

        allowed = (tokens(masked) & allowed) | tokens(full)
    return dense_attention(q, k, v, allowed)[0], None


@pytest.fixture
def fake_fa4(monkeypatch: pytest.MonkeyPatch) -> None:
    cute, sparsity = ModuleType("flash_attn.cute"), ModuleType("flash_attn.cute.block_sparsity")
    cute.flash_attn_func = fake_flash_attn_func  # type: ignore[attr-defined]
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch  # type: ignore[attr-defined]
    for module in (ModuleType("flash_attn"), cute, sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fa4, "_check", lambda problem: None)
    for name in ("fa4", "fa4_dense", "fa4_dense_deterministic"):
        one = rivals.IMPLEMENTATIONS[name]
        here = rivals.Implementation(name, one.prepare, lambda: None, one.dense, one.ops)
        monkeypatch.setitem(rivals.IMPLEMENTATIONS, name, here)


@pytest.mark.usefixtures("fake_fa4")
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"op": "backward"},
        {"mask_heads": 1},
        {"mask_heads": 2, "op": "backward"},
        {"nq": 128},
        {"causal": False},
        {"block": 64, "block_q": 128},
        {"head_dim": 256, "op": "backward", "n": 256},  # listed in blocks of 64 keys
    ],
    ids=str,
)
def test_fa4_gets_the_same_mask(shape: dict) -> None:
    row = block_sparse.measure(problem(**shape), "fa4", 1.0)
    assert row["gate"]
    assert row["listed_block"][1] == (64 if shape.get("head_dim") == 256 else shape.get("block", 128))


@pytest.mark.usefixtures("fake_fa4")
def test_fa4_dense() -> None:
    assert block_sparse.measure(problem(density=1.0, nq=128), "fa4_dense", 1.0)["selected"] == 1.0
    row = block_sparse.measure(problem("backward", 256, 1.0), "fa4_dense_deterministic", 1.0)
    assert set(row["gate"]) == {"dq", "dk", "dv"}


@pytest.mark.parametrize(
    ("op", "head_dim", "block_q", "block", "expected"),
    [
        ("forward", 64, 128, 128, 128), ("forward", 128, 64, 64, 64), ("forward", 192, 128, 128, 128),
        ("forward", 256, 128, 128, 64), ("forward", 128, 128, 16, 16), ("forward", 128, 32, 32, None),
        ("backward", 128, 128, 128, 128), ("backward", 128, 64, 128, 128), ("backward", 64, 64, 128, None),
        ("backward", 128, 128, 64, None), ("backward", 192, 128, 128, None), ("backward", 256, 64, 64, 64),
        ("backward", 256, 128, 128, 64),
    ],
)  # fmt: skip
def test_fa4_tiles(op: str, head_dim: int, block_q: int, block: int, expected: int | None) -> None:
    p = problem(op, head_dim=head_dim, block_q=block_q, block=block)
    if expected is None:
        with pytest.raises(Unsupported, match="FlashAttention-4"):
            fa4.tile_keys(p)
    else:
        assert fa4.tile_keys(p) == expected


def test_fa4_says_what_it_does_not_do() -> None:
    for shape, reason in (
        ({}, "needs a CUDA GPU"),
        ({"device": torch.device("cuda")}, "float16 and bfloat16"),
        ({"device": torch.device("cuda"), "dtype": "bf16", "op": "backward", "head_dim_v": 8}, "one head dim"),
    ):
        with pytest.raises(Unsupported, match=reason):
            fa4._check(problem(**shape))


@pytest.mark.parametrize("seq_lens", [(256, 256), (200, 300)])
def test_cutting_blocks_selects_the_same_tokens(seq_lens: tuple[int, int]) -> None:
    mask = random_block_mask(seq_lens, (64, 64), 2, density=0.4, diagonal=True)
    cut = fa4.cut_blocks(mask, 16)
    assert cut.block_size == (64, 16)
    assert torch.equal(cut.to_dense(), mask.to_dense())
    assert fa4.cut_blocks(mask, 64) is mask


# ---- FlashInfer ----


class FakeVariable:
    """Plans and runs as documented: ``[H, L, D]``, one pattern a KV head."""

    def __init__(self, workspace: Tensor, backend: str):
        assert (workspace.dtype, backend) == (torch.uint8, "fa3")
        self.plans = 0

    def plan(
        self, block_mask_map: Tensor, block_row_sz: Tensor, block_col_sz: Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, q_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert block_mask_map.shape[0] == num_kv_heads
        assert block_row_sz.dtype == block_col_sz.dtype == torch.int32
        heads = []
        for blocks, rows, cols in zip(block_mask_map, block_row_sz.long(), block_col_sz.long(), strict=True):
            heads.append(blocks.repeat_interleave(rows, 0).repeat_interleave(cols, 1))
        self.allowed, self.plans = torch.stack(heads)[None], self.plans + 1

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert all(t.is_contiguous() for t in (q, k, v))
        o = dense_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), self.allowed)[0]
        return o[0].transpose(0, 1)


class FakeEqual:
    """Likewise for blocks of one size: ``[L, H, D]``, one pattern for all heads, as compressed rows."""

    def __init__(self, workspace: Tensor, backend: str):
        pass

    def plan(
        self, indptr: Tensor, indices: Tensor, M: int, N: int, R: int, C: int, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype, o_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == torch.int32
        mask = BlockMask.from_bsr(indptr, indices, seq_lens=(M, N), block_size=(R, C))
        self.allowed = mask.to_dense()

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q[None], k[None], v[None], self.allowed)[0][0]


@pytest.fixture
def fake_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    def single(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, backend: str) -> Tensor:
        allowed = torch.ones(1, 1, q.shape[0], k.shape[0], dtype=torch.bool)
        allowed = allowed.tril(k.shape[0] - q.shape[0]) if causal else allowed
        return dense_attention(q[None], k[None], v[None], allowed)[0][0]

    fake = SimpleNamespace(
        VariableBlockSparseAttentionWrapper=FakeVariable,
        BlockSparseAttentionWrapper=FakeEqual,
        single_prefill_with_kv_cache=single,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(flashinfer, "_WORKSPACE_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in ("flashinfer_dense", "flashinfer_variable", "flashinfer_bsr"):
        one = rivals.IMPLEMENTATIONS[name]
        here = rivals.Implementation(name, one.prepare, lambda: None, one.dense, one.ops)
        monkeypatch.setitem(rivals.IMPLEMENTATIONS, name, here)
    monkeypatch.setattr(flashinfer, "_check", lambda problem, sparse: None)


@pytest.mark.usefixtures("fake_flashinfer")
@pytest.mark.parametrize(
    "shape",
    [{"grid": (3, 7), "n": 100}, {"grid": (2, 4)}, {"mask_heads": 1}, {"block": 64}],
    ids=str,
)
def test_flashinfer_variable_blocks(shape: dict) -> None:
    p = problem(**{"causal": False, "mask_heads": 2, **shape})
    row = block_sparse.measure(p, "flashinfer_variable", 1.0)
    assert row["gate"]
    assert row["plan_ms"] >= 0


@pytest.mark.usefixtures("fake_flashinfer")
def test_flashinfer_equal_blocks_and_dense() -> None:
    row = block_sparse.measure(problem(causal=False, mask_heads=1), "flashinfer_bsr", 1.0)
    assert row["plan_ms"] >= 0
    for causal in (True, False):
        assert block_sparse.measure(problem(density=1.0, causal=causal, nq=256), "flashinfer_dense", 1.0)["gate"]


def test_flashinfer_says_what_it_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gpu = {"device": torch.device("cuda"), "dtype": "bf16"}
    for shape, sparse, reason in (
        ({}, False, "need a Hopper GPU"),
        ({**gpu, "dtype": "fp32"}, False, "float16 and bfloat16"),
        (gpu, True, "nothing causal"),
        ({**gpu, "causal": False, "head_dim_v": 8}, True, "one head dim"),
    ):
        with pytest.raises(Unsupported, match=reason):
            flashinfer._check(problem(**shape), sparse=sparse)
    flashinfer._check(problem(**gpu, causal=False), sparse=True)
    monkeypatch.setattr(flashinfer, "_check", lambda problem, sparse: None)
    with pytest.raises(Unsupported, match="by KV head"):
        flashinfer._variable(problem(causal=False))
    with pytest.raises(Unsupported, match="once for all heads"):
        flashinfer._bsr(problem(causal=False))


# ---- FlashPrefill ----


@pytest.mark.parametrize("heads", [1, 2])
def test_flashprefill_lists_tiles_of_packed_rows(heads: int) -> None:
    mask = random_block_mask((256, 384), (128, 128), heads, density=0.5, causal=False)
    offsets, indices, tiles = flashprefill.compressed_rows(mask, kv_heads=2, group=4)
    assert tiles == 256 // 32  # 128 packed rows are 32 tokens of 4 heads
    assert offsets.dtype == indices.dtype == torch.int32
    assert offsets.shape == (2 * tiles + 1,)
    dense = mask.to_dense().expand(1, 2, -1, -1)
    for head in range(2):
        for tile in range(tiles):
            start, end = offsets[head * tiles + tile : head * tiles + tile + 2].tolist()
            seen = dense[0, head, tile * 32, ::64].nonzero().flatten()
            assert torch.equal(indices[start:end].long(), seen)


def test_our_rows_are_right_about_our_own_operator() -> None:
    p = problem(density=0.3)
    o = block_sparse_attention(*p.qkv, p.mask)
    assert isinstance(o, Tensor)
    exact = dense_attention(*(t.double() for t in p.qkv), p.mask.to_dense())[0]
    torch.testing.assert_close(p.expected[0][0], exact[0, p.sampled[0]])
