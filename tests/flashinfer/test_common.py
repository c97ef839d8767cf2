"""What FlashInfer's arguments mean, argument by argument; and what all wrappers have in common."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from oracle import make_batch, slopes

from sparseattn.flashinfer import _common as common
from sparseattn.flashinfer._buffers import TableBuffers
from sparseattn.flashinfer._wrapper import PagedPlan, Wrapper, attend, query_rows
from sparseattn.ops.paged import ALiBi, RoPE

CPU = torch.device("cpu")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_dtypes():
    half, bf16, e4m3 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
    assert common.resolve_dtypes() == (half, half, half)
    assert common.resolve_dtypes(data_type=torch.bfloat16) == (bf16, bf16, bf16)
    assert common.resolve_dtypes(data_type="bfloat16") == (bf16, bf16, bf16)
    assert common.resolve_dtypes("half", data_type=e4m3) == (half, e4m3, half)
    assert common.resolve_dtypes(data_type=e4m3) == (half, e4m3, half)
    assert common.resolve_dtypes(bf16, "torch.float8_e5m2") == (bf16, torch.float8_e5m2, bf16)
    assert common.resolve_dtypes(e4m3, e4m3) == (e4m3, e4m3, bf16)
    assert common.resolve_dtypes(bf16, o_data_type=torch.float32).o == torch.float32
    with pytest.raises(TypeError, match=r"kv_data_type: expected torch\.float16 .* got torch\.bfloat16"):
        common.resolve_dtypes("float16", data_type=torch.bfloat16)
    with pytest.raises(TypeError, match=r"q_data_type: .* 'no_dtype'"):
        common.resolve_dtypes("no_dtype")
    with pytest.raises(TypeError, match="NVFP4"):
        common.resolve_dtypes(kv_data_type=torch.uint8)


@pytest.mark.parametrize("heads", [1, 4, 7, 12, 32, 40])
def test_alibi_slopes(heads: int):
    assert common.alibi_slopes(heads) == pytest.approx(slopes(heads))


def test_options():
    plain = common.Options().arguments(4, 64, CPU)
    assert plain == {"causal": False, "scale": 0.125, "window": None, "softcap": None, "positions": None}
    full = common.Options(True, "ROPE_LLAMA", 7, 30.0, 0.5, 2.0, 5e5).arguments(4, 64, CPU)
    assert full["positions"] == RoPE(5e5, 2.0)
    assert (full["scale"], full["window"], full["softcap"]) == (0.5, (7, None), 30.0)
    assert common.Options(pos_encoding_mode="ROPE_LLAMA").arguments(4, 64, CPU)["positions"] == RoPE(1e4, 1.0)
    biased = common.Options(pos_encoding_mode="ALIBI", logits_soft_cap=0.0).arguments(4, 64, CPU)
    assert isinstance(biased["positions"], ALiBi)
    assert biased["softcap"] is None
    with pytest.raises(ValueError, match="pos_encoding_mode"):
        common.Options(pos_encoding_mode="ROPE").arguments(4, 64, CPU)
    with pytest.raises(TypeError, match="window_left"):
        common.Options(window_left=None).arguments(4, 64, CPU)


def test_scales_fold_into_one_number():
    assert common.fold_scales(0.5) == (0.5, None, None, None)
    assert common.fold_scales(0.5, 2.0, 3.0, 4.0) == (3.0, None, 4.0, None)
    assert common.fold_scales(0.5, torch.tensor(2.0), torch.tensor([3.0]), 1.0) == (3.0, None, None, None)
    heads = torch.tensor([1.0, 2.0])
    folded = common.fold_scales(1.0, 2.0, heads, heads.half())
    assert folded.scale == 2.0
    assert torch.equal(folded.k, heads)
    assert torch.equal(folded.v, heads)
    assert torch.equal(common.fold_scales(1.0, torch.arange(4.0)).q, torch.arange(4.0))


def test_float8_queries_go_up():
    q = torch.randn(3, 4, 8).to(torch.float8_e4m3fn)
    up = common.as_queries(q)
    assert up.dtype == torch.bfloat16
    assert torch.equal(up.float(), q.float())
    factor = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert torch.equal(common.as_queries(q, factor).float(), q.float() * factor[:, None])


def test_base2():
    lse = torch.randn(4, 6)
    lse[0, 3] = -math.inf
    got = common.base2(lse)
    assert got.is_contiguous()
    torch.testing.assert_close(got, lse.t() / math.log(2))
    out = torch.empty(4, 6).t()
    assert common.base2(lse, out) is out
    torch.testing.assert_close(out, got)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_forms_of_caches(layout: str):
    k, v = torch.randn(2, 5, 3, 2, 8)
    for cache in (torch.stack([k, v], 1), (k, v), [k, v]):
        got = common.split_cache(cache, layout)
        assert torch.equal(got[0], k)
        assert torch.equal(got[1], v)
    flat_k, flat_v = torch.randn(2, 5, 2, 8)
    for cache in (torch.stack([flat_k, flat_v], 1), (flat_k, flat_v)):
        got = common.split_cache(cache, layout)
        assert got[0].shape == ((5, 1, 2, 8) if layout == "NHD" else (5, 2, 1, 8))
        assert torch.equal(got[1].flatten(), flat_v.flatten())
    with pytest.raises(ValueError, match="paged_kv_cache"):
        common.split_cache(torch.randn(5, 3, 3, 2, 8), layout)
    with pytest.raises(TypeError, match="paged_kv_cache"):
        common.split_cache({"k": k}, layout)
    with pytest.raises(ValueError, match="kv_layout"):
        common.check_layout("NDH")


@pytest.mark.parametrize("length", [0, 1, 7, 96, 512])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_sequence_as_a_cache(length: int, layout: str):
    k, v = torch.randn(length, 2, 8), torch.randn(length, 2, 4)
    pair = (k, v) if layout == "NHD" else (k.transpose(0, 1), v.transpose(0, 1))
    cache = common.dense_cache(*pair, layout).validate()
    assert torch.equal(cache.k.flatten(0, 1), k)
    assert torch.equal(cache.v.flatten(0, 1), v)
    assert cache.seq_lens.tolist() == [length]


def test_tables():
    table = common.csr_table(int32(0, 2, 2, 5), torch.arange(5).int(), int32(3, 0, 4), 4, CPU)
    assert table.seq_lens.tolist() == [7, 0, 12]
    dense = common.dense_table(torch.zeros(2, 3).int(), torch.tensor([[5], [12]], dtype=torch.uint32), 4, CPU)
    assert dense.seq_lens.tolist() == [5, 12]


@pytest.mark.parametrize(
    ("indptr", "indices", "last", "kind", "name"),
    [
        (int32(0, 3, 2), torch.arange(5).int(), int32(1, 1), ValueError, "indptr"),
        (int32(1, 3, 4), torch.arange(5).int(), int32(1, 1), ValueError, "indptr"),
        (int32(0, 3, 9), torch.arange(5).int(), int32(1, 1), ValueError, "indptr"),
        (int32(0, 3, 5).long(), torch.arange(5).int(), int32(1, 1), TypeError, "indptr"),
        (int32(0, 3, 5), torch.arange(5), int32(1, 1), TypeError, "indices"),
        (int32(0, 3, 5), torch.arange(5).int(), int32(1, 0), ValueError, "last_page_len"),
        (int32(0, 3, 5), torch.arange(5).int(), int32(5, 1), ValueError, "last_page_len"),
        (int32(0, 3, 5), torch.arange(5).int(), int32(1), ValueError, "last_page_len"),
    ],
    ids=["descends", "offset", "past-the-end", "int64-indptr", "int64-indices", "empty-page", "overfull", "batch"],
)
def test_bad_tables(indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, kind: type, name: str):
    with pytest.raises(kind, match=f"^{name}: "):
        common.csr_table(indptr, indices, last, 4, CPU)


def test_a_table_that_ends_before_its_request():
    with pytest.raises(ValueError, match="block_tables: expected pages for 9 tokens"):
        common.dense_table(torch.zeros(2, 2).int(), int32(9, 1), 4, CPU)


def test_backends():
    assert common.implementation("fa3") == common.implementation("auto") == "auto"
    assert common.implementation("triton") == "triton"
    with pytest.raises(ValueError, match="backend"):
        common.implementation("fa4")


def test_query_rows():
    rows, longest, total = query_rows(int32(0, 3, 3, 7), CPU)
    assert (rows.tolist(), longest, total) == ([0, 3, 3, 7], 4, 7)
    with pytest.raises(ValueError, match="qo_indptr"):
        query_rows(int32(0, 3, 2), CPU)


# ---- wrappers ----


class Plain(Wrapper):
    _forward = ("sm_scale", "window_left")

    def plan(self, batch, **options) -> None:
        table = common.csr_table(*batch.table, batch.page_size, self.device)
        self._planned = PagedPlan(
            table, 4, 2, 32, batch.page_size, self._kv_layout, common.Options(**options), self.device,
            common.resolve_dtypes(data_type="float16"),
        )  # fmt: skip

    def run(self, q, paged_kv_cache, **kwargs):
        return self._plan().run(q, paged_kv_cache, **kwargs)


@pytest.fixture
def wrapper() -> Plain:
    return Plain(torch.empty(16))


def test_run_needs_a_plan(wrapper: Plain):
    for method in (wrapper.run, wrapper.forward, wrapper.run_return_lse):
        with pytest.raises(RuntimeError, match=r"Plain\.run: expected plan\(\) to be called first"):
            method(torch.randn(1, 4, 32), None)


def test_old_names(wrapper: Plain):
    batch = make_batch([50, 0, 17])
    wrapper.begin_forward(batch, sm_scale=0.5, window_left=9)
    o, lse = wrapper.run_return_lse(batch.q, batch.combined)
    batch.check((o, lse), scale=0.5, window_left=9)
    assert torch.equal(wrapper.forward(batch.q, batch.combined), o), "forward keeps what was planned"
    assert torch.equal(wrapper.forward_return_lse(batch.q, (batch.k, batch.v))[1], lse)
    batch.check(wrapper.forward(batch.q, batch.combined, None, 3), scale=0.5, window_left=3)
    batch.check(wrapper.forward(batch.q, batch.combined, window_left=-1), scale=0.5)
    assert torch.equal(wrapper.run(batch.q, batch.combined), o)
    assert wrapper.workspace_size(batch) == (0, 0)
    wrapper.end_forward()
    wrapper.reset_workspace_buffer(torch.empty(1), torch.empty(1))


def test_what_was_planned_is_checked(wrapper: Plain):
    batch = make_batch([50, 0, 17])
    wrapper.plan(batch)
    cache = batch.combined
    with pytest.raises(TypeError, match=r"q: expected torch\.float16, as planned, got torch\.bfloat16"):
        wrapper.run(batch.q.bfloat16(), cache)
    with pytest.raises(TypeError, match=r"paged_kv_cache: expected torch\.float16, as planned, got torch\.float32"):
        wrapper.run(batch.q, cache.float())
    with pytest.raises(TypeError, match="q: expected a tensor"):
        wrapper.run(None, cache)
    with pytest.raises(ValueError, match="q: expected shape"):
        wrapper.run(batch.q[:, :2], cache)
    with pytest.raises(ValueError, match="paged_kv_cache: expected pages of 16 tokens"):
        wrapper.run(batch.q, cache[:, :, :8])
    with pytest.raises(ValueError, match="paged_kv_cache"):
        wrapper.run(batch.q, cache.transpose(2, 3))
    with pytest.raises(ValueError, match="out: expected shape"):
        wrapper.run(batch.q, cache, out=batch.q[:2])
    with pytest.raises(TypeError, match="lse: expected"):
        wrapper.run(batch.q, cache, lse=batch.q[..., 0], return_lse=True)
    with pytest.raises(TypeError, match="float_workspace_buffer"):
        wrapper.reset_workspace_buffer(None)


def test_results_into_given_tensors(wrapper: Plain):
    batch = make_batch([50, 0, 17])
    wrapper.plan(batch)
    out, lse = torch.full_like(batch.q, math.nan), torch.full((3, 4), math.nan)
    got = wrapper.run(batch.q, batch.combined, out=out, lse=lse, return_lse=True)
    assert got[0] is out
    assert got[1] is lse
    batch.check(got)
    cache = common.csr_table(*batch.table, 16, CPU).cache(batch.k, batch.v, "NHD")
    wide = attend(batch.q, cache, o_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, out.float())


def test_buffers_are_filled_in_place():
    buffers = TableBuffers(torch.zeros(4).int(), torch.zeros(20).int(), torch.zeros(3).int())
    first, second = make_batch([50, 0, 17]), make_batch([3, 90, 70], seed=1)
    tables = [buffers.fill(*batch.table, 16) for batch in (first, second)]
    for a, b in zip(*tables, strict=True):
        assert a is b
    assert tables[0].seq_lens.tolist() == [3, 90, 70]
    assert buffers.indptr.tolist() == second.indptr.tolist()
    kept = [t.clone() for t in (buffers.indptr, buffers.indices, buffers.last_page_len, buffers.seq_lens)]
    with pytest.raises(ValueError, match=r"indptr: .* batch size"):
        buffers.fill(*make_batch([3, 90]).table, 16)
    with pytest.raises(ValueError, match="indices: expected at most 20"):
        buffers.fill(*make_batch([160, 160, 160]).table, 16)
    with pytest.raises(ValueError, match="last_page_len"):
        buffers.fill(first.indptr, first.indices, int32(1, 1, 17), 16)
    for before, after in zip(
        kept, (buffers.indptr, buffers.indices, buffers.last_page_len, buffers.seq_lens), strict=True
    ):
        assert torch.equal(before, after), "a refused plan leaves the buffers as they were"
    with pytest.raises(ValueError, match="paged_kv_indices_buffer"):
        TableBuffers(buffers.indptr, None, buffers.last_page_len)
    with pytest.raises(ValueError, match="paged_kv_indptr_buffer: expected 4 entries"):
        TableBuffers(torch.zeros(9).int(), buffers.indices, buffers.last_page_len)


def test_import_needs_neither_triton_nor_a_device():
    code = """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Blocker())
        import torch

        def refuse(*args, **kwargs):
            raise AssertionError("import initialised CUDA")

        torch.cuda._lazy_init = torch._C._cuda_init = refuse
        import sparseattn.flashinfer as flashinfer

        q, k = torch.randn(4, 16), torch.randn(9, 2, 16)
        assert flashinfer.single_decode_with_kv_cache(q, k, k).shape == (4, 16)
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
