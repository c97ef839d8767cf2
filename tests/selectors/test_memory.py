"""What a selection call allocates at a million tokens, without a GPU and without the million tokens."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparseattn import selectors
from sparseattn.masks import BlockMask

GIB = 2**30
TOKENS = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, while they live: what a caching allocator must hold.

    Scratch memory inside one operator (a sort's, a reduction's) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparseattn":
            # The implementation, not the fake; but they must agree.
            shapes = [(t.shape, t.dtype) for t in func(*args)]
            with self:
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
            assert [(t.shape, t.dtype) for t in out] == shapes
            return out
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in known:
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


def cached_functions() -> list[Any]:
    modules = [m for name, m in sys.modules.items() if name.startswith("sparseattn")]
    return [f for m in modules for f in vars(m).values() if isinstance(f, functools._lru_cache_wrapper)]


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H200 of fake tensors: host code runs as it is, kernels are not launched."""
    runtime = pytest.importorskip("triton.runtime")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    for kind in (runtime.JITFunction, interpreter.InterpretedFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *args, **kwargs: None)
    properties = type("Properties", (), {"multi_processor_count": 132})
    # Of the CPU in truth: a build without CUDA cannot index tensors that say they are elsewhere.
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    for f in cached_functions():  # they hold tensors of the devices they were made for
        f.cache_clear()
    yield
    for f in cached_functions():
        f.cache_clear()


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in selectors.SELECTORS},
    "landmark, all rows": ("landmark", {"rows": "all"}),
    "landmark, float8": ("landmark", {"fp8": True}),
    "landmark, density": ("landmark", {"density": 0.1}),
    "landmark, shared": ("landmark", {"group_shared": True}),
    "xattention, stride 4": ("xattention", {"stride": 4}),
    "xattention, relative": ("xattention", {"rule": "relative", "threshold": 0.01}),
    "xattention, global": ("xattention", {"rule": "global", "density": 0.1}),
    "flashprefill, cumulative": ("flashprefill", {"rule": "cumulative", "threshold": 0.9}),
    "flashprefill, global": ("flashprefill", {"rule": "global", "density": 0.1, "row_softmax": True}),
    "flashprefill, shared": ("flashprefill", {"group_shared": True}),
    "oracle, global": ("oracle", {"density": 0.1}),
    "topk, antidiagonal": ("topk", {"estimator": "antidiagonal"}),
    "flexprefill, density": ("flexprefill", {"density": 0.2}),
    "flexprefill, shared": ("flexprefill", {"group_shared": True}),
    "minference, blocks": ("minference", {"columns": False}),
    "minference, shared": ("minference", {"group_shared": True}),
    "heads, dense and streaming": ("heads", {"heads": ("dense", "streaming") * 4}),
    "heads, landmark and streaming": (
        "heads",
        {"heads": ("a", "streaming") * 4, "classes": {"a": {"method": "landmark"}}},
    ),
}


def peak_of(call: str, tokens: int = TOKENS) -> tuple[LiveBytes, BlockMask]:
    method, options = CALLS[call]
    selector = selectors.get(method)
    with FakeTensorMode():
        q = torch.empty(1, tokens, 32, 128, dtype=torch.bfloat16)
        k = torch.empty(1, tokens, 8, 128, dtype=torch.bfloat16)
        with LiveBytes() as live:
            mask = selector.select(q, k, selectors.configure(method, options), impl="triton")
    return live, mask


@pytest.mark.parametrize("call", CALLS)
def test_a_million_tokens_need_less_than_four_gibibytes(call, fake_gpu) -> None:
    live, mask = peak_of(call)
    lists = 4 * mask.kv_indices.numel()
    assert lists <= live.now <= live.peak < 4 * GIB, f"{live.peak / GIB:.2f} GiB, lists {lists / GIB:.2f}"


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["landmark", "flashprefill", "bound", "xattention", "flexprefill", "minference"])
def test_a_million_tokens_on_a_gpu(method: str) -> None:
    options = {"flashprefill": {"num_last_tokens": 0}, "xattention": {"stride": 16}}.get(method, {})
    config, select = selectors.configure(method, options), selectors.get(method).select
    q = torch.randn(1, TOKENS, 32, 128, dtype=torch.bfloat16, device="cuda")
    k = torch.randn(1, TOKENS, 8, 128, dtype=torch.bfloat16, device="cuda")
    select(q[:, :4096], k[:, :4096], config)  # what is made once and stays
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mask = select(q, k, config)
    assert torch.cuda.max_memory_allocated() - before < 4 * GIB
    if method in ("landmark", "flashprefill", "bound"):
        # Offsets beyond 2^31 elements: the last rows are those of a chunk, whose queries lie at the start.
        chunk = select(q[:, -4096:].clone(), k, config)
        assert torch.equal(chunk.kv_num_blocks, mask.kv_num_blocks[:, :, -32:])
        listed = torch.arange(mask.kv_indices.shape[-1], device="cuda") < chunk.kv_num_blocks[..., None]
        assert torch.equal(chunk.kv_indices[listed], mask.kv_indices[:, :, -32:][listed])
