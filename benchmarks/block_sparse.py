"""Block-sparse attention, forward and backward, over random masks: ours, FlexAttention, and dense cuDNN.

    python -m benchmarks.block_sparse --out results.jsonl

TFLOP/s count the selected blocks: 4 * D * block_q * block_kv a block and query head, diagonal blocks whole, and 2.5
times that for a backward pass. The dense rival is counted as the mask of density 1. A backward time is the whole
gradient; transposing the block lists, done once a mask and kept on it, is not in it, nor is FlexAttention's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.harness import Row, Unsupported, Writer, arguments, cudnn_dense, finish, quietly, time_ms
from benchmarks.inputs import random_blocks, random_qkv
from sparseattn import BlockMask, block_sparse_attention

Prepared = tuple[Callable[[], Tensor], Row]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = None) -> Tensor:
    """Our operator as users call it; dense causal without a mask."""
    o = block_sparse_attention(q, k, v, mask)
    assert isinstance(o, Tensor)
    return o


@dataclasses.dataclass(frozen=True)
class Problem:
    """One workload; inputs and oracle results are made once and shared by every implementation."""

    op: str
    n: int
    density: float
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    dtype: str
    device: torch.device

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.n, self.heads, self.kv_heads, self.head_dim)
        q, k, v = random_qkv(*shape, DTYPES[self.dtype], self.device)
        if self.op == "backward":
            q, k, v = (t.requires_grad_() for t in (q, k, v))
        return q, k, v

    @cached_property
    def do(self) -> Tensor:
        return random_qkv(self.n, self.heads, 1, self.head_dim, DTYPES[self.dtype], self.device, seed=1)[0]

    @cached_property
    def blocks(self) -> Tensor:
        return random_blocks(self.heads, self.n // self.block, self.density, self.device)

    @cached_property
    def mask(self) -> BlockMask:
        size = (self.block, self.block)
        return BlockMask.from_blocks(self.blocks, block_size=size, seq_lens=(self.n, self.n), causal=True)

    @property
    def flops(self) -> float:
        forward = self.blocks.sum().item() * 4.0 * self.head_dim * self.block**2
        return forward * (2.5 if self.op == "backward" else 1.0)

    @cached_property
    def sampled(self) -> tuple[Tensor, Tensor]:
        count = min(self.n, 64)
        return oracle.sample(self.n, count, self.device), oracle.sample(self.n, count, self.device, seed=1)

    @cached_property
    def expected(self) -> list[tuple[Tensor, ...]]:
        """The sampled results, exact and as eager code gives them."""
        q, k, v = (t.detach() for t in self.qkv)
        selected = oracle.Selected(self.blocks, (self.block, self.block))
        rows, cols = self.sampled
        dtypes = (torch.float64, DTYPES[self.dtype])
        if self.op == "forward":
            return [oracle.attend(q, k, v, selected, rows, d)[:1] for d in dtypes]
        return [oracle.gradients(q, k, v, self.do, selected, rows, cols, d) for d in dtypes]


IMPLEMENTATIONS: dict[str, Callable[[Problem], Prepared]] = {}


def implementation(name: str) -> Callable[[Callable[[Problem], Prepared]], Callable[[Problem], Prepared]]:
    """Register a function that prepares the forward call of a problem, with what its row should say, if anything.

    It raises ``Unsupported`` where the implementation cannot run here or does not do this.
    """

    def add(prepare: Callable[[Problem], Prepared]) -> Callable[[Problem], Prepared]:
        IMPLEMENTATIONS[name] = prepare
        return prepare

    return add


@implementation("sparseattn")
def _sparseattn(problem: Problem) -> Prepared:
    return partial(attend_blocks, *problem.qkv, problem.mask), {}


@implementation("flex_attention")
def _flex_attention(problem: Problem) -> Prepared:
    if problem.device.type != "cuda":
        raise Unsupported("FlexAttention is compared on a GPU, where it is compiled")
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    flex_mask = problem.mask.to_flex(problem.heads)
    q, k, v = (t.transpose(1, 2) for t in problem.qkv)
    return lambda: compiled(q, k, v, block_mask=flex_mask, enable_gqa=True).transpose(1, 2), {}


@implementation("cudnn_dense")
def _cudnn_dense(problem: Problem) -> Prepared:
    if problem.density < 1:
        raise Unsupported("dense attention has no density")
    return cudnn_dense(*problem.qkv)


def measure(problem: Problem, name: str, budget_ms: float) -> Row:
    """Gate and time one implementation."""
    attend, said = IMPLEMENTATIONS[name](problem)
    q, k, v = problem.qkv
    rows, cols = problem.sampled
    o = attend()
    if problem.op == "forward":
        run: Callable[[], Any] = attend
        gate = oracle.gate(("o",), (o[0, rows],), *problem.expected)
    else:
        run = partial(torch.autograd.grad, o, (q, k, v), problem.do, retain_graph=True)
        dq, dk, dv = run()
        gate = oracle.gate(("dq", "dk", "dv"), (dq[0, rows], dk[0, cols], dv[0, cols]), *problem.expected)
        del dq, dk, dv
    timing = time_ms(run, problem.device, budget_ms=budget_ms)
    density = problem.mask.density if name != "cudnn_dense" else 1.0
    tflops = round(problem.flops / timing["ms"] * 1e-9, 1)
    return {"selected": round(density, 4), **said, **timing, "tflops": tflops, "flops": problem.flops, **gate}


def main(argv: list[str] | None = None) -> list[Row]:
    parser = arguments("Block-sparse attention against FlexAttention and dense cuDNN.", "block_sparse")
    parser.add_argument("--op", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    parser.add_argument("--n", type=int, nargs="+", help="lengths; default 16K and 64K forward, 16K and 32K backward")
    parser.add_argument("--density", type=float, nargs="+", help="default 1, .25, .1 and, forward, .02")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--impl", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    options = parser.parse_args(argv)
    lengths = {"forward": [16384, 65536], "backward": [16384, 32768]}
    densities = {"forward": [1.0, 0.25, 0.1, 0.02], "backward": [1.0, 0.25, 0.1]}
    shape = (options.heads, options.kv_heads, options.head_dim, options.block, options.dtype)
    budget = 100.0 if options.quick else 600.0
    with Writer(options.out, "block_sparse", options.commit) as writer, ExitStack() as stack:
        quietly(stack)
        for op in options.op:
            for n in options.n or (lengths[op][:1] if options.quick else lengths[op]):
                torch.compiler.reset()  # a length must not make a rival fall back to a shape-generic kernel
                for density in options.density or densities[op]:
                    problem = Problem(op, n, density, *shape, torch.device(options.device))
                    for name in options.impl:
                        if name == "cudnn_dense" and density < 1:
                            continue
                        row = dataclasses.asdict(problem) | {"device": options.device, "impl": name}
                        writer.measure(row, partial(measure, problem, name, budget))
    return writer.rows


if __name__ == "__main__":
    finish(main())
