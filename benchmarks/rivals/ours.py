"""Our own implementations, over the mask and dense."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.rivals.registry import Prepared, implementation
from sparseattn import BlockMask, block_sparse_attention
from sparseattn.masks import VariableBlockMask
from sparseattn.ops.block_sparse import unsupported_reason
from sparseattn.ops.block_sparse.tiles import tile_size, tiling_of
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.timing import time_ms, wall_ms
from sparseattn.testing.workloads import Problem

_KERNELS = ("triton", "gluon")


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | VariableBlockMask | None = None, **options: Any
) -> Tensor:
    """Our operator as users call it; dense causal without a mask."""
    o = block_sparse_attention(q, k, v, mask, **options)
    assert isinstance(o, Tensor)
    return o


def _build(problem: Problem) -> None:
    """The mask, and all that is kept on it: tiles of variable blocks are otherwise cut by the first call."""
    mask = problem.build_mask()
    if isinstance(mask, VariableBlockMask):
        tiling_of(mask, tile_size(mask))


def _prepare(problem: Problem, impl: str, *, dense: bool = False, **options: Any) -> Prepared:
    mask = None if dense else problem.selection
    options |= {"causal": problem.causal} if dense else {}
    reason = unsupported_reason(*problem.qkv, mask, impl=impl, causal=options.get("causal"))
    if reason is not None:
        raise Unsupported(reason)
    said: dict[str, Any] = {}
    if problem.grid is not None and not dense:
        # Where patterns change, building the mask is paid, too: on the device, and with the host's part.
        build = partial(_build, problem)
        built = time_ms(build, problem.device, budget_ms=100.0)
        said = {"build_ms": built["ms"], "build_wall_ms": wall_ms(build, problem.device)}

    def run() -> Tensor:
        try:
            return attend_blocks(*problem.qkv, mask, impl=impl, **options)
        except ValueError as error:  # some run a call but not its gradient, and say so only when one is asked for
            if str(error).startswith("impl: "):
                raise Unsupported(str(error)) from error
            raise

    return Prepared(run, said)


for _impl in _KERNELS:
    implementation(f"sparseattn_{_impl}")(partial(_prepare, impl=_impl))
    implementation(f"sparseattn_{_impl}_dense", dense=True)(partial(_prepare, impl=_impl, dense=True))
implementation("sparseattn_gluon_deterministic", ops=("backward",))(partial(_prepare, impl="gluon", deterministic=True))


@implementation("sparseattn_reference")
def _reference(problem: Problem) -> Prepared:
    if problem.device.type != "cpu":
        raise Unsupported("the reference is what kernels are held against, and is timed on a CPU only")
    return _prepare(problem, "reference")
