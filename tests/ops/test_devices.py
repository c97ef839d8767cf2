"""Operators launch on the GPU where their tensors lie, whichever is the current one."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparseattn import PagedCache, block_sparse_attention, landmark, merge_state, paged_attention
from sparseattn.ops import dispatch
from sparseattn.ops.paged import append_kv

OPS = Path(dispatch.__file__).parent


def guarded(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).endswith("on_its_device") for d in function.decorator_list)


def test_every_registered_implementation_is_guarded():
    """All that torch.library calls launches kernels, so one that was forgotten would break models on several GPUs."""
    registered = 0
    for path in OPS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        names = [n for n, f in functions.items() if any("library.impl" in ast.unparse(d) for d in f.decorator_list)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "_LIBRARY.impl":
                names.append(ast.unparse(node.args[1]))
        for name in names:
            assert guarded(functions[name]), f"{path.name}: {name}"
        registered += len(names)
    assert registered >= 13


def test_the_current_device_is_that_of_the_first_tensor(monkeypatch: pytest.MonkeyPatch):
    class Elsewhere(torch.Tensor):
        """A tensor that says it lies on the second GPU."""

        is_cuda = property(lambda _: True)  # type: ignore[assignment]
        device = property(lambda _: torch.device("cuda", 1))  # type: ignore[assignment]

        def get_device(self) -> int:
            return 1

    current = [0]

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)

    @dispatch.on_its_device
    def where(*_: object, **__: object) -> int:
        return current[0]

    there = torch.zeros(1).as_subclass(Elsewhere)
    assert where("a method's self", there) == 1
    assert where(t=there) == 1
    assert where(torch.zeros(1)) == where() == 0
    assert current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu():
    """By turns, so that what a call left for the next of its kind is met on the other GPU."""
    import sparseattn.flashinfer as flashinfer

    q, k, v = (torch.randn(2, 256, heads, 64, dtype=torch.bfloat16, device="cuda:0") for heads in (4, 2, 2))
    table = torch.arange(2, dtype=torch.int32, device="cuda:0")[:, None]
    wrappers = {}
    for device in ("cuda:0", "cuda:1"):
        workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
        wrappers[device] = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
        indptr, indices, last = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [0, 1], [9, 256])
        )
        wrappers[device].plan(indptr, indices, last, 4, 2, 64, 256, q_data_type=torch.bfloat16)

    def results(device: str) -> list[torch.Tensor]:
        a, b, c = (t.to(device).requires_grad_() for t in (q, k, v))
        o, lse = block_sparse_attention(a, b, c, landmark(a, b), return_lse=True, deterministic=True)
        found = [o, lse, *torch.autograd.grad(o.float().square().sum(), (a, b, c))]
        found += merge_state(o[0].detach(), lse[0].detach(), o[1].detach(), lse[1].detach())
        lengths = torch.tensor([256, 256], dtype=torch.int32, device=device)
        cache = PagedCache(torch.zeros_like(b), torch.zeros_like(c), lengths, table.to(device))
        starts = torch.tensor([0, 256, 512], dtype=torch.int32, device=device)
        append_kv(cache, b.detach().flatten(0, 1), c.detach().flatten(0, 1), cu_seqlens=starts)
        found += [cache.k, cache.v, paged_attention(a.detach()[:, -1], cache)]
        return [*found, wrappers[device].run(a.detach()[:, -1], (cache.k, cache.v))]

    for _ in range(3):
        for first, second in zip(results("cuda:0"), results("cuda:1"), strict=True):
            assert torch.equal(first, second.to("cuda:0"))
