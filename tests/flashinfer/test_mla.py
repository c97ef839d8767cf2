"""Latent attention by FlashInfer's names, in all of its forms."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from oracle import attention, check, gathered, make_batch

from sparseattn.flashinfer.mla import BatchMLAPagedAttentionWrapper, trtllm_batch_decode_with_kv_cache_mla

E4M3 = torch.float8_e4m3fn
SCALE = (128 + 64) ** -0.5


class Latent:
    """A batch over a joined latent cache, ``dims`` columns of which are latent and rotary; others are NaN."""

    def __init__(self, kv, qo=None, heads=16, dims=(512, 64), page=16, dtype=torch.float16, cached=None, device="cpu"):
        self.batch = make_batch(
            kv,
            qo,
            heads=(heads, 1),
            dim=sum(dims),
            dim_v=1,
            page_size=page,
            dtype=dtype,
            kv_dtype=cached,
            device=device,
        )
        self.heads, self.dims, self.device = heads, dims, device
        self.joined = self.batch.k[:, :, 0]

    @property
    def q(self):
        return self.batch.q.split(self.dims, -1)

    @property
    def cache(self):
        return tuple(t.contiguous() for t in self.joined.split(self.dims, -1))

    def attention(self, dtype, factors=(1.0, 1.0), **options):
        """Outputs and LSE; factors on latent and rotary columns of the cache, numbers or [P, page, columns]."""
        parts = []
        both = [torch.as_tensor(f).cpu().double() * t.cpu().double() for f, t in zip(factors, self.cache, strict=True)]
        joined = torch.cat(both, -1)[:, :, None]
        for b, q in enumerate(self.batch.q.split(self.batch.qo_lens)):
            k = gathered(joined, self.batch.numbers[b], self.batch.kv_lens[b], "NHD")
            parts.append(attention(q, k, k[..., : self.dims[0]], dtype=dtype, **options))
        return tuple(torch.cat(t) for t in zip(*parts, strict=True))

    def check(self, got, low=None, **options):
        check(got, *(self.attention(dtype, **options) for dtype in (torch.float64, low or self.batch.q.dtype)))

    def plan(self, wrapper=None, causal=False, scale=SCALE, **said):
        wrapper = wrapper or BatchMLAPagedAttentionWrapper(torch.empty(16, device=self.device))
        b = self.batch
        said = {"q_data_type": b.q.dtype, "kv_data_type": b.k.dtype, **said}
        wrapper.plan(
            b.qo_indptr, b.indptr, b.indices, b.seq_lens, self.heads, *self.dims, b.page_size, causal, scale,
            said["q_data_type"], said["kv_data_type"],
        )  # fmt: skip
        return wrapper


def test_arguments_are_in_their_places():
    words = {
        "__init__": "self float_workspace_buffer use_cuda_graph qo_indptr kv_indptr kv_indices kv_len_arr backend",
        "plan": "self qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size causal "
        "sm_scale q_data_type kv_data_type use_profiler",
        "run": "self q_nope q_pe ckv_cache kpe_cache out lse return_lse profiler_buffer kv_len page_table "
        "return_lse_base_on_e o_scale ckv_scale ckv_scale_arr kpe_scale",
    }
    for name, expected in words.items():
        names = list(inspect.signature(getattr(BatchMLAPagedAttentionWrapper, name)).parameters)
        assert names[: len(expected.split())] == expected.split()
    words = "query kv_cache workspace_buffer qk_nope_head_dim kv_lora_rank qk_rope_head_dim block_tables seq_lens "
    words += "max_seq_len sparse_mla_top_k out bmm1_scale bmm2_scale sinks"
    names = list(inspect.signature(trtllm_batch_decode_with_kv_cache_mla).parameters)
    assert names[: len(words.split())] == words.split()


SAMPLES = [
    # lengths, query lengths, heads, dims, page, dtype, causal
    ([20, 1, 0, 40], None, 16, (512, 64), 1, torch.float16, False),
    ([30, 20, 25], [3, 17, 1], 8, (512, 64), 16, torch.bfloat16, True),
    ([37, 5], [5, 9], 3, (64, 16), 32, torch.float16, True),
    ([64, 90], None, 128, (64, 16), 64, torch.float16, True),
    ([64, 90], [2, 1], 4, (64, 0), 16, torch.float16, True),
]


@pytest.mark.parametrize(("kv", "qo", "heads", "dims", "page", "dtype", "causal"), SAMPLES)
def test_planned(kv, qo, heads, dims, page, dtype, causal, device):
    case = Latent(kv, qo, heads, dims, page, dtype, device=device)
    wrapper = case.plan(causal=causal)
    o, lse = wrapper.run(*case.q, *case.cache, return_lse=True)
    assert o.shape == (*case.batch.q.shape[:2], dims[0])
    case.check((o, lse), causal=causal, scale=SCALE)
    out, sums = torch.full_like(o, math.nan), torch.full_like(lse, math.nan)
    assert wrapper.run(*case.q, *case.cache, out, sums) is out
    assert torch.equal(out, o)
    assert torch.equal(sums, lse)
    natural = wrapper.run(*case.q, *case.cache, return_lse=True, return_lse_base_on_e=True)[1]
    torch.testing.assert_close(natural, lse * math.log(2))
    wrapper.run(*case.q, *case.cache, out, sums, True, return_lse_base_on_e=True)
    assert torch.equal(sums, natural)


def test_without_a_plan(device: str):
    """The form with ``kv_len`` and ``page_table``, and that of the documents: DeepSeek's scale, or a plan's."""
    case = Latent([37, 1, 90], device=device)
    tables = case.batch.block_tables, case.batch.seq_lens
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16, device=device), backend="cutlass", kv_layout="NHD")
    right = [case.attention(dtype, scale=SCALE) for dtype in (torch.float64, torch.float16)]
    got = wrapper.run(*case.q, *case.cache, page_table=tables[0], kv_len=tables[1], return_lse=True)
    check(got, *right)
    check(wrapper.forward(case.batch.q, case.joined, *tables), *right)
    check(wrapper.forward_return_lse(case.batch.q, case.joined[:, :, None], *tables), *right)
    check(wrapper.forward(case.batch.q, case.joined, tables[0], tables[1].to(torch.uint32)), *right)
    by_head = BatchMLAPagedAttentionWrapper(torch.empty(16, device=device), kv_layout="HND")
    out, lse = torch.empty_like(got[0]), torch.empty_like(got[1])
    assert by_head.forward(case.batch.q, case.joined[:, None], *tables, out=out, lse=lse) is out
    check((out, lse), *right)
    case.check(wrapper.forward(case.batch.q, case.joined, *tables, sm_scale=0.1), scale=0.1)
    case.plan(wrapper, scale=0.2)
    case.check(wrapper.forward(case.batch.q, case.joined, *tables), scale=0.2)
    case.check(wrapper.run(*case.q, *case.cache, kv_len=tables[1], page_table=tables[0]), scale=0.2)
    case.check(wrapper.run(*case.q, *case.cache), scale=0.2)


@pytest.mark.parametrize("planned", [True, False])
def test_float8_caches(planned: bool, device: str):
    case = Latent([20, 5, 40], heads=4, dims=(256, 64), dtype=torch.bfloat16, cached=E4M3, device=device)
    said = {} if planned else {"kv_len": case.batch.seq_lens, "page_table": case.batch.block_tables}
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16, device=device))
    if planned:
        case.plan(wrapper)
    for ckv, kpe in ((0.5, 0.5), (0.5, 2.0), (0.5, 0.35)):
        got = wrapper.run(*case.q, *case.cache, **said, ckv_scale=ckv, kpe_scale=kpe, return_lse=True)
        case.check(got, factors=(ckv, kpe), scale=SCALE)
    by_part = torch.rand(*case.joined.shape[:2], 2, device=device) + 0.5
    unowned = case.cache[0].float().isnan().any(-1)
    by_part[unowned] = math.nan
    got = wrapper.run(*case.q, *case.cache, **said, ckv_scale_arr=by_part, kpe_scale=0.35, return_lse=True)
    case.check(got, factors=(by_part.repeat_interleave(128, -1), 0.35), scale=SCALE)


def test_scales_that_do_not_fit():
    case = Latent([37, 5], heads=4, dims=(256, 64), dtype=torch.bfloat16, cached=E4M3)
    wrapper = case.plan()
    arr = torch.ones(*case.joined.shape[:2], 2)
    for match, kind, said in (
        ("ckv_scale, ckv_scale_arr: expected one .* got neither", ValueError, {"kpe_scale": 1.0}),
        ("got both", ValueError, {"kpe_scale": 1.0, "ckv_scale": 1.0, "ckv_scale_arr": arr}),
        ("kpe_scale: expected a number", ValueError, {"ckv_scale": 1.0}),
        ("ckv_scale: expected a positive", ValueError, {"ckv_scale": 0.0, "kpe_scale": 1.0}),
        ("kpe_scale: expected a positive", ValueError, {"ckv_scale": 1.0, "kpe_scale": math.inf}),
        ("ckv_scale: expected a positive", TypeError, {"ckv_scale": arr, "kpe_scale": 1.0}),
        ("ckv_scale_arr: expected shape", ValueError, {"ckv_scale_arr": arr[1:], "kpe_scale": 1.0}),
        ("ckv_scale_arr: expected float32", TypeError, {"ckv_scale_arr": arr.half(), "kpe_scale": 1.0}),
    ):
        with pytest.raises(kind, match=match):
            wrapper.run(*case.q, *case.cache, **said)
    plain = Latent([37, 5], heads=4, dims=(256, 64))
    with pytest.raises(ValueError, match="ckv_scale: expected None"):
        plain.plan().run(*plain.q, *plain.cache, ckv_scale=1.0)


def test_bad_input():
    case = Latent([37, 5], heads=4, dims=(64, 16))
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16))
    q, cache = case.q, case.cache
    with pytest.raises(RuntimeError, match=r"plan\(\) to be called first"):
        wrapper.run(*q, *cache)
    case.plan(wrapper)
    for match, kind, call in (
        (r"q_nope: expected torch\.float16", TypeError, lambda: wrapper.run(q[0].bfloat16(), q[1], *cache)),
        (r"q_pe: expected torch\.float16", TypeError, lambda: wrapper.run(q[0], q[1].float(), *cache)),
        (r"kpe_cache: expected torch\.float16", TypeError, lambda: wrapper.run(*q, cache[0], cache[1].float())),
        ("q_nope: expected shape", ValueError, lambda: wrapper.run(q[0][:1], q[1][:1], *cache)),
        ("ckv_cache: expected shape", ValueError, lambda: wrapper.run(*q, cache[0][:, :8], cache[1][:, :8])),
        ("ckv_cache: expected a tensor of 3", ValueError, lambda: wrapper.run(*q, cache[0][:, :, None], cache[1])),
        ("o_scale: expected None", ValueError, lambda: wrapper.run(*q, *cache, o_scale=1.0)),
        ("kv_len, page_table: expected both", ValueError, lambda: wrapper.run(*q, *cache, kv_len=case.batch.seq_lens)),
        ("out: expected shape", ValueError, lambda: wrapper.run(*q, *cache, q[1])),
        ("kv_data_type", TypeError, lambda: case.plan(wrapper, kv_data_type=torch.bfloat16)),
        ("use_cuda_graph", ValueError, lambda: BatchMLAPagedAttentionWrapper(torch.empty(16), True)),
        (
            "kv_cache: expected",
            ValueError,
            lambda: wrapper.forward(case.batch.q, cache[0][0], *[case.batch.seq_lens] * 2),
        ),
    ):
        with pytest.raises(kind, match=match):
            call()
    b = case.batch
    with pytest.raises(ValueError, match=r"kv_len_arr: expected 0\.\.48"):
        wrapper.plan(b.qo_indptr, b.indptr, b.indices, b.seq_lens + 30, 4, 64, 16, 16, True, 0.1, "half", "half")
    assert wrapper.run(*q, *cache).shape == q[0].shape, "a refused plan leaves the last one"


@pytest.mark.parametrize("dims", [(512, 64), (64, 16)])
def test_by_triton(dims, device: str):
    pytest.importorskip("triton")
    case = Latent([37, 3, 20], heads=16, dims=dims, device=device)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16, device=device), backend="triton")
    case.plan(wrapper)
    case.check(wrapper.run(*case.q, *case.cache, return_lse=True), scale=SCALE)


def test_runs_are_traced_whole():
    case = Latent([37, 5], heads=4, dims=(64, 16))
    wrapper = case.plan()
    tensors = *(t.contiguous() for t in case.q), *case.cache
    compiled = torch.compile(lambda *t: wrapper.run(*t, return_lse=True), fullgraph=True, backend="aot_eager")
    case.check(compiled(*tensors), scale=SCALE)


# ---- CUDA graphs ----

CHANGES = (([37, 20, 90], [3, 17, 1]), ([1, 200, 0], [1, 4, 0]), ([16, 16, 16], [1, 1, 1]))


def graph_wrapper(device: str) -> BatchMLAPagedAttentionWrapper:
    buffers = (torch.zeros(n, dtype=torch.int32, device=device) for n in (4, 4, 40, 3))
    return BatchMLAPagedAttentionWrapper(torch.empty(16, device=device), True, *buffers)


def test_buffers_follow_plans(device: str):
    wrapper = graph_wrapper(device)
    for kv, qo in CHANGES:
        case = Latent(kv, qo, 4, (64, 16), device=device)
        case.check(case.plan(wrapper, causal=True).run(*case.q, *case.cache, return_lse=True), causal=True, scale=SCALE)
    for match, other in (("qo_indptr: expected 4 entries", [5, 5]), ("kv_indices: expected at most 40", [700, 1, 1])):
        with pytest.raises(ValueError, match=match):
            Latent(other, None, 4, (64, 16), device=device).plan(wrapper)
    case.check(wrapper.run(*case.q, *case.cache), causal=True, scale=SCALE)


@pytest.mark.gpu
def test_replay_follows_new_plans():
    wrapper = graph_wrapper("cuda")
    cases = [Latent(kv, qo, 4, (64, 16), device="cuda") for kv, qo in CHANGES]
    q = torch.zeros(21, 4, 80, device="cuda").half()
    cache = torch.zeros(40, 16, 80, device="cuda").half()

    def load(case):
        q[: case.batch.q.shape[0]] = case.batch.q
        cache[: case.joined.shape[0]] = case.joined
        case.plan(wrapper, causal=True)

    def run():
        return wrapper.run(q[..., :64], q[..., 64:], cache[..., :64], cache[..., 64:], return_lse=True)

    load(cases[0])
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = run()
    for case in cases:
        load(case)
        graph.replay()
        rows = case.batch.q.shape[0]
        case.check((o[:rows], lse[:rows]), causal=True, scale=SCALE)


# ---- without a plan, by TensorRT-LLM's name ----


@pytest.mark.parametrize("q_len", [1, 3])
def test_trtllm(q_len: int, device: str):
    case = Latent([37, 5, 90], [q_len] * 3, heads=8, device=device)
    b = case.batch
    sinks = torch.linspace(-1, 2, 8, device=device)
    arguments = (None, 128, 512, 64, b.block_tables, b.seq_lens, 90)
    query = b.q.view(3, q_len, 8, 576)
    got = trtllm_batch_decode_with_kv_cache_mla(query, case.joined, *arguments, bmm1_scale=SCALE)
    assert got.shape == (3, q_len, 8, 512)
    case.check(got.flatten(0, 1), causal=True, scale=SCALE)
    lse = torch.empty(3, q_len, 8, device=device)
    got = trtllm_batch_decode_with_kv_cache_mla(
        query, case.joined[:, None], *arguments, bmm1_scale=torch.tensor([SCALE], device=device), bmm2_scale=2.0,
        sinks=[sinks], lse=lse, return_lse=True,
    )  # fmt: skip
    assert got[1] is lse
    case.check((got[0].flatten(0, 1) / 2, lse.flatten(0, 1)), causal=True, scale=SCALE, sinks=sinks)


def test_trtllm_ragged(device: str):
    case = Latent([37, 5, 90], [3, 1, 6], heads=8, dims=(64, 16), device=device)
    b = case.batch
    o, lse = trtllm_batch_decode_with_kv_cache_mla(
        b.q, case.joined, None, 128, 64, 16, b.block_tables, b.seq_lens, 90, bmm1_scale=SCALE, return_lse=True,
        cum_seq_lens_q=b.qo_indptr, max_q_len=6,
    )  # fmt: skip
    case.check((o, lse), causal=True, scale=SCALE)


def test_bad_trtllm_input():
    case = Latent([37, 5], heads=4, dims=(64, 16))
    b = case.batch
    query = b.q[:, None]

    def call(query=query, cache=case.joined, **said):
        return trtllm_batch_decode_with_kv_cache_mla(
            query, cache, None, 128, 64, 16, b.block_tables, b.seq_lens, 37, **said
        )

    for match, said in (
        ("sparse_mla_top_k: expected None", {"sparse_mla_top_k": 64}),
        ("uses_shared_paged_kv_idx", {"uses_shared_paged_kv_idx": False}),
        ("query: expected .*D = 80", {"query": query[..., :64]}),
        ("query: expected", {"query": b.q}),
        ("kv_cache: expected 80", {"cache": case.joined[..., :64]}),
        ("kv_cache: expected", {"cache": case.joined[0]}),
        ("out: expected shape", {"out": query}),
        ("lse: expected shape", {"lse": torch.empty(3, 4)}),
    ):
        with pytest.raises(ValueError, match=match):
            call(**said)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3, 17, 157])
@pytest.mark.parametrize("kv", [0, 17, 33, 96, 514, 2743, 8736])
@pytest.mark.parametrize(("qo", "causal"), [(1, False), (1, True), (7, True), (17, True)])
def test_planned_grid(count, kv, qo, causal):
    """FlashInfer's parameters; the oracle reads some heads of the first and the last request."""
    g = torch.Generator(device="cuda").manual_seed(0)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16, device="cuda"))
    steps = torch.arange(count + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((count,), kv, dtype=torch.int32, device="cuda")
    bf16 = torch.bfloat16
    for heads, page in itertools.product((16, 64, 128), (1, 16, 32)):
        pages = -(-kv // page)
        ckv, kpe = (torch.randn(count * pages + 1, page, d, generator=g, device="cuda").bfloat16() for d in (512, 64))
        order = torch.randperm(count * pages, generator=g, device="cuda").int()
        q = torch.randn(count * qo, heads, 576, generator=g, device="cuda").bfloat16()
        wrapper.plan(steps * qo, steps * pages, order, lengths, heads, 512, 64, page, causal, SCALE, bf16, bf16)
        o, lse = wrapper.run(q[..., :512], q[..., 512:], ckv, kpe, return_lse=True)
        some = [0, heads // 2, heads - 1]
        for b in (0, count - 1):
            owned = order[b * pages : (b + 1) * pages].long()
            keys = torch.cat([ckv[owned], kpe[owned]], -1).flatten(0, 1)[:kv, None]
            rows = slice(b * qo, (b + 1) * qo)
            right = (
                attention(q[rows][:, some], keys, keys[..., :512], causal=causal, scale=SCALE, dtype=dtype)
                for dtype in (torch.float64, bf16)
            )
            check((o[rows][:, some], lse[rows][:, some]), *right)
