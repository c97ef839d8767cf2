"""Who serves: FlashInfer and ``sparseattn.flashinfer`` through one and the same code, and our operators as they are.

What differs between the two libraries is the module that is imported, so that is all that differs here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.paged_blocks import BSR, Variable
from benchmarks.paged_problems import Decode, Latent, Prefill, Workload
from benchmarks.paged_states import Append, Merge
from benchmarks.rivals.registry import needs, nothing_missing
from sparseattn import BlockMask, block_sparse_attention
from sparseattn.masks import VariableBlockMask
from sparseattn.ops import block_sparse as block_sparse_ops
from sparseattn.ops import bsr as bsr_ops
from sparseattn.ops import paged as paged_ops
from sparseattn.testing.baselines import Unsupported

_WORKSPACE_BYTES = 512 * 2**20


class Call(NamedTuple):
    """A call, ready to be timed.

    Attributes:
        run: Computes the result in the form that the workload's gate takes.
        plan: What has to be called anew when lengths, tables or patterns change; None where nothing has to.
    """

    run: Callable[[], Any]
    plan: Callable[[], object] | None = None


@dataclass(frozen=True)
class Server:
    """One way to serve.

    Attributes:
        name: As rows spell it.
        missing: Why it is not installed here, or None.
        check: Raises ``Unsupported`` where it does not do a workload at all.
        prepare: Brings a workload of each kind to its own form. Raises ``Unsupported`` with a reason.
    """

    name: str
    missing: Callable[[], str | None]
    check: Callable[[Workload], None]
    prepare: dict[str, Callable[[Any], Call]]

    def call(self, workload: Workload) -> Call:
        """The call of a workload.

        Raises:
            Unsupported: Not installed, or it does not do this.
        """
        reason = self.missing()
        if reason is not None:
            raise Unsupported(reason)
        if workload.kind not in self.prepare:
            raise Unsupported(f"{self.name} has no {workload.kind} of its own")
        self.check(workload)
        return self.prepare[workload.kind](workload)


SERVERS: dict[str, Server] = {}


# ---- by FlashInfer's API ----


@dataclass(frozen=True)
class Api:
    """A module that has FlashInfer's API, and how its wrappers are made.

    Attributes:
        module: Its name.
        backend: Of wrappers that have backends.
        tensor_cores: Whether decode runs on tensor cores.
    """

    module: str
    backend: str
    tensor_cores: bool = True

    @property
    def names(self) -> Any:
        return import_module(self.module)

    def workspace(self, workload: Workload) -> Tensor:
        return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=workload.device)

    def decode(self, w: Decode) -> Call:
        wrapper = self.names.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace(w), "NHD", use_tensor_cores=self.tensor_cores, backend=self.backend
        )
        plan = partial(
            wrapper.plan, w.indptr, w.indices, w.last_page_len, w.heads, w.kv_heads, w.head_dim, w.page,
            q_data_type=w.torch_dtype, kv_data_type=w.torch_dtype,
        )  # fmt: skip
        plan()
        return Call(partial(wrapper.run, w.q, w.cache), plan)

    def prefill(self, w: Prefill) -> Call:
        options = {"causal": True, "q_data_type": w.torch_dtype, "kv_data_type": w.torch_dtype}
        shape = (w.heads, w.kv_heads, w.head_dim)
        if w.ragged:
            wrapper = self.names.BatchPrefillWithRaggedKVCacheWrapper(self.workspace(w), "NHD", backend=self.backend)
            plan = partial(wrapper.plan, w.told(w.cu_seqlens_q), w.told(w.cu_seqlens_k), *shape, **options)
            run = partial(wrapper.run, w.q, *w.kv)
        else:
            wrapper = self.names.BatchPrefillWithPagedKVCacheWrapper(self.workspace(w), "NHD", backend=self.backend)
            table = (w.told(w.cu_seqlens_q), w.told(w.indptr), w.indices, w.told(w.last_page_len))
            plan = partial(wrapper.plan, *table, *shape, w.page, **options)
            run = partial(wrapper.run, w.q, w.cache)
        plan()
        return Call(run, plan)

    def mla(self, w: Latent) -> Call:
        wrapper = self.names.mla.BatchMLAPagedAttentionWrapper(self.workspace(w), backend=self.backend)
        plan = partial(
            wrapper.plan, w.cu_seqlens_q, w.indptr, w.indices, w.seq_lens, w.heads, w.latent, w.rotary, w.page,
            False, w.scale, w.torch_dtype, w.torch_dtype,
        )  # fmt: skip
        plan()
        return Call(partial(wrapper.run, *w.q, *w.cache), plan)

    def bsr(self, w: BSR) -> Call:
        wrapper = self.names.BlockSparseAttentionWrapper(self.workspace(w), backend=self.backend)
        plan = partial(
            wrapper.plan, *w.bsr, w.n, w.n, w.R, w.C, w.heads, w.kv_heads, w.head_dim,
            q_data_type=w.torch_dtype, kv_data_type=w.torch_dtype, o_data_type=w.torch_dtype,
        )  # fmt: skip
        plan()
        return Call(partial(wrapper.run, *w.qkv), plan)

    def variable(self, w: Variable) -> Call:
        wrapper = self.names.VariableBlockSparseAttentionWrapper(self.workspace(w), backend=self.backend)
        shape = (w.heads, w.kv_heads, w.head_dim)
        plan = partial(wrapper.plan, w.blocks[0], *w.sizes, *shape, q_data_type=w.torch_dtype)
        plan()
        return Call(partial(wrapper.run, *(t.transpose(0, 1).contiguous() for t in w.qkv)), plan)

    def append(self, w: Append) -> Call:
        p = w.places
        table = (w.cache, p.indices, p.indptr, p.last_page_len)
        return Call(partial(self.names.append_paged_kv_cache, *w.kv, p.batch_indices, p.positions, *table))

    def merge(self, w: Merge) -> Call:
        if w.states > 2:
            return Call(partial(self.names.merge_states, w.v, w.s))
        (v_a, v_b), (s_a, s_b) = ((t[:, 0].contiguous(), t[:, 1].contiguous()) for t in (w.v, w.s))
        return Call(partial(self.names.merge_state, v_a, s_a, v_b, s_b))

    def kinds(self) -> dict[str, Callable[[Any], Call]]:
        return {k.kind: getattr(self, k.kind) for k in (Decode, Prefill, Latent, BSR, Variable, Append, Merge)}


def anywhere(workload: Workload) -> None:
    """Nothing to say against any workload."""


def on_cuda(workload: Workload) -> None:
    if workload.device.type != "cuda":
        raise Unsupported("FlashInfer needs a CUDA GPU")


def on_hopper(workload: Workload) -> None:
    on_cuda(workload)
    if torch.cuda.get_device_capability(workload.device)[0] != 9:
        raise Unsupported("FlashInfer's fa3 kernels need a Hopper GPU")


_flashinfer_missing = needs("flashinfer-python")


def _serve_by_api(name: str, api: Api, missing: Any, check: Any, *kinds: str) -> None:
    prepare = {kind: one for kind, one in api.kinds().items() if not kinds or kind in kinds}
    SERVERS[name] = Server(name, missing, check, prepare)


_serve_by_api("sparseattn_flashinfer", Api("sparseattn.flashinfer", "auto"), nothing_missing, anywhere)
_serve_by_api("flashinfer_fa2", Api("flashinfer", "fa2"), _flashinfer_missing, on_cuda)
_attention = ("decode", "prefill", "mla", "bsr", "variable")  # appending and merging have no backends
_serve_by_api("flashinfer_fa3", Api("flashinfer", "fa3"), _flashinfer_missing, on_hopper, *_attention)
_cuda_cores = Api("flashinfer", "fa2", tensor_cores=False)
_serve_by_api("flashinfer_cuda_cores", _cuda_cores, _flashinfer_missing, on_cuda, "decode")


# ---- our operators ----


def _runs(unsupported_reason: Callable[..., str | None], *tensors: Any, **options: Any) -> None:
    """Raise ``Unsupported`` unless an operator runs a call."""
    try:
        reason = unsupported_reason(*tensors, **options)
    except ValueError as error:
        if not str(error).startswith("impl: "):
            raise
        reason = str(error)  # an implementation that this operator does not have
    if reason is not None:
        raise Unsupported(reason)


def _attend_pages(impl: str, q: Any, cache: paged_ops.PagedCache, **options: Any) -> Call:
    _runs(paged_ops.unsupported_reason, q, cache, impl=impl, **options)
    return Call(partial(paged_ops.paged_attention, q, cache, impl=impl, **options))


def _decode(w: Decode, impl: str) -> Call:
    return _attend_pages(impl, w.q, _cache(w))


def _cache(w: Decode) -> paged_ops.PagedCache:
    return paged_ops.PagedCache.combined(w.cache, w.seq_lens, indptr=w.indptr, indices=w.indices)


def _prefill(w: Prefill, impl: str) -> Call:
    if not w.ragged:
        return _attend_pages(impl, w.q, _cache(w), cu_seqlens_q=w.cu_seqlens_q, max_seqlen_q=w.queries)
    options: dict[str, Any] = {
        "causal": True, "cu_seqlens_q": w.cu_seqlens_q, "cu_seqlens_k": w.cu_seqlens_k,
        "max_seqlen_q": w.queries, "max_seqlen_k": w.length, "impl": impl,
    }  # fmt: skip
    return _attend_blocks(w.q, *w.kv, None, options)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: VariableBlockMask | None, options: dict[str, Any]) -> Call:
    _runs(block_sparse_ops.unsupported_reason, q, k, v, mask, **options)
    return Call(partial(block_sparse_attention, q, k, v, mask, **options))


def _mla(w: Latent, impl: str) -> Call:
    cache = paged_ops.PagedCache.latent(*w.cache, w.seq_lens, indptr=w.indptr, indices=w.indices)
    return _attend_pages(impl, w.q, cache, scale=w.scale, causal=False)


def _bsr(w: BSR, impl: str) -> Call:
    made: list[bsr_ops.BlockRows] = []

    def plan() -> None:
        made[:] = [bsr_ops.make_rows(*w.bsr, (w.R, w.C), (w.n, w.n))]

    plan()
    _runs(bsr_ops.unsupported_reason, *w.qkv, made[0], impl=impl)
    return Call(lambda: bsr_ops.attend_rows(*w.qkv, made[0], impl=impl), plan)


def _variable(w: Variable, impl: str) -> Call:
    made: list[VariableBlockMask] = []

    def plan() -> None:
        made[:] = [BlockMask.from_variable_blocks(w.blocks, *w.sizes, seq_lens=(w.n, w.n))]

    plan()
    q, k, v = (t[None] for t in w.qkv)
    _attend_blocks(q, k, v, made[0], {"impl": impl})

    def run() -> Tensor:
        o = block_sparse_attention(q, k, v, made[0], impl=impl)
        assert isinstance(o, Tensor)
        return o[0].transpose(0, 1)

    return Call(run, plan)


def _serve_by_operator(name: str, impl: str, check: Callable[[Workload], None]) -> None:
    kinds: dict[str, Callable[..., Call]] = {
        "decode": _decode, "prefill": _prefill, "mla": _mla, "bsr": _bsr, "variable": _variable,
    }  # fmt: skip
    prepare: dict[str, Callable[[Any], Call]] = {kind: partial(one, impl=impl) for kind, one in kinds.items()}
    SERVERS[name] = Server(name, nothing_missing, check, prepare)


def on_cpu(workload: Workload) -> None:
    if workload.device.type != "cpu":
        raise Unsupported("the reference is what kernels are held against, and is timed on a CPU only")


for _impl in ("gluon", "triton"):
    _serve_by_operator(f"sparseattn_{_impl}", _impl, anywhere)
_serve_by_operator("sparseattn_reference", "reference", on_cpu)
