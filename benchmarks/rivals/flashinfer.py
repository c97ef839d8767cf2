"""FlashInfer's Hopper kernels ("fa3"): dense prefill, blocks of one size, and blocks of any sizes.

Its sparse kernels walk lists of keys without knowing where those stood, so causality inside a block is lost: they are
compared on problems that are not causal. ``plan()`` builds the lists, on the host in part, whenever a pattern changes;
its time is in the row as ``plan_ms`` and not in ``ms``. Kernels are compiled on first use, or come with the package.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.registry import Prepared, implementation, needs
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.timing import wall_ms
from sparseattn.testing.workloads import DTYPES, Problem

_missing = needs("flashinfer-python")
_WORKSPACE_BYTES = 256 * 2**20


def _check(problem: Problem, *, sparse: bool) -> None:
    if problem.device.type != "cuda" or torch.cuda.get_device_capability(problem.device)[0] != 9:
        raise Unsupported("FlashInfer's fa3 kernels need a Hopper GPU")
    if problem.dtype == "fp32":
        raise Unsupported("FlashInfer's fa3 kernels take float16 and bfloat16")
    if sparse and problem.causal:
        raise Unsupported("FlashInfer's sparse wrappers mask nothing inside a block, so nothing causal")
    if sparse and problem.head_dim != problem.value_dim:
        raise Unsupported("FlashInfer's sparse wrappers want one head dim for keys and values")


def _workspace(problem: Problem) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=problem.device)


@implementation("flashinfer_dense", missing=_missing, dense=True, ops=("forward",))
def _dense(problem: Problem) -> Prepared:
    _check(problem, sparse=False)
    import flashinfer

    q, k, v = (t[0] for t in problem.qkv)  # [S, H, D]

    def run() -> Tensor:
        return flashinfer.single_prefill_with_kv_cache(q, k, v, causal=problem.causal, backend="fa3")[None]

    return Prepared(run, {})


@implementation("flashinfer_variable", missing=_missing, ops=("forward",))
def _variable(problem: Problem) -> Prepared:
    _check(problem, sparse=True)
    if problem.lists not in (1, problem.kv_heads):
        raise Unsupported("FlashInfer's variable blocks are chosen by KV head")
    import flashinfer

    heads = problem.kv_heads
    # Its own blocks, whatever size they have: [Hkv, MB, NB] and their sizes, [Hkv, MB] and [Hkv, NB].
    chosen, rows, cols = (t.expand(heads, *t.shape[1:]) for t in (problem.blocks[0], *problem.drawn_sizes))
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in problem.qkv)  # [H, S, D]
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(_workspace(problem), backend="fa3")
    shape = (problem.heads, heads, problem.head_dim)
    plan = partial(
        wrapper.plan, chosen.contiguous(), rows.contiguous(), cols.contiguous(), *shape,
        q_data_type=DTYPES[problem.dtype],
    )  # fmt: skip
    plan()  # compiles
    said: dict[str, Any] = {"plan_ms": wall_ms(plan, problem.device, runs=3)}
    return Prepared(lambda: wrapper.run(q, k, v).transpose(0, 1)[None], said)


@implementation("flashinfer_bsr", missing=_missing, ops=("forward",))
def _bsr(problem: Problem) -> Prepared:
    _check(problem, sparse=True)
    if problem.lists != 1:
        raise Unsupported("FlashInfer's blocks of one size are chosen once for all heads")
    block_q, block_kv = problem.block_size
    if problem.n % block_kv or problem.queries % block_q:
        raise Unsupported("FlashInfer's blocks of one size must fill the sequence")
    import flashinfer

    indptr, indices = problem.mask.to_bsr()
    q, k, v = (t[0] for t in problem.qkv)  # [S, H, D]
    dtype = DTYPES[problem.dtype]
    wrapper = flashinfer.BlockSparseAttentionWrapper(_workspace(problem), backend="fa3")
    plan = partial(
        wrapper.plan, indptr[0, 0].contiguous(), indices, problem.queries, problem.n, block_q, block_kv,
        problem.heads, problem.kv_heads, problem.head_dim, q_data_type=dtype, kv_data_type=dtype, o_data_type=dtype,
    )  # fmt: skip
    plan()  # compiles
    said: dict[str, Any] = {"plan_ms": wall_ms(plan, problem.device, runs=3)}
    return Prepared(lambda: wrapper.run(q, k, v)[None], said)
