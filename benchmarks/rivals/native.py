"""What comes with torch: dense attention by cuDNN, and FlexAttention."""

from __future__ import annotations

from benchmarks.rivals.registry import Prepared, implementation
from sparseattn.testing import baselines
from sparseattn.testing.workloads import Problem


@implementation("cudnn_dense", dense=True)
def _cudnn_dense(problem: Problem) -> Prepared:
    return Prepared(*baselines.sdpa(*problem.qkv, causal=problem.causal, cudnn=True))


@implementation("flex_attention")
def _flex_attention(problem: Problem) -> Prepared:
    return Prepared(*baselines.flex_attention(*problem.qkv, problem.mask))
