"""XAttention on structured inputs: selection apart, attention apart, both together, against dense cuDNN.

    python -m benchmarks.xattention --out results.jsonl

A row of phase ``selection`` is gated against the float64 reference on a prefix of the inputs, a row of phase
``attention`` or ``both`` against the float64 oracle on sampled rows of the full length, which also gives ``recall``,
the share of the true attention mass that the selected blocks hold there. TFLOP/s count the selected blocks (4 * D *
block_q * block_kv, diagonal blocks whole) and, for dense, all blocks up to the diagonal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.harness import Row, Writer, arguments, finish, quietly
from benchmarks.rivals.ours import attend_blocks
from sparseattn import XAttentionConfig, xattention
from sparseattn.ops.scores import antidiagonal_scores
from sparseattn.testing import baselines, sampled, structured
from sparseattn.testing.timing import time_ms
from sparseattn.testing.workloads import DTYPES


@dataclasses.dataclass(frozen=True)
class Problem:
    """One length and shape; inputs are shared by all settings."""

    n: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: torch.device
    kinds: tuple[str, ...] = ("blend",)

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.n, self.heads, self.kv_heads, self.head_dim)
        return structured.structured_qkv(*shape, DTYPES[self.dtype], self.device, kinds=self.kinds)

    @cached_property
    def rows(self) -> Tensor:
        return sampled.sample(self.n, min(self.n, 64), self.device)

    @cached_property
    def dense_lse(self) -> Tensor:
        """float64 LSE of the sampled rows over all visible keys: what recall is measured against."""
        return sampled.attend(*self.qkv, sampled.Selected(None), self.rows, torch.float64)[1]

    def gate(self, o: Tensor, selected: sampled.Selected) -> tuple[Row, Tensor]:
        """Gate the output; also the float64 LSE of the sampled rows over the selected blocks."""
        exact, lse = sampled.attend(*self.qkv, selected, self.rows, torch.float64)
        eager = sampled.attend(*self.qkv, selected, self.rows, DTYPES[self.dtype])[0]
        return sampled.gate(("o",), (o[0, self.rows],), (exact,), (eager,)), lse


def gate_selection(q: Tensor, k: Tensor, config: XAttentionConfig, slack: float = 0.01) -> Row:
    """Hold a selection against the float64 reference with a threshold ``slack`` lower and higher.

    Rounding scores to low precision may change which of two nearly equal blocks is kept, so blocks are not compared
    one by one: every row must keep at least ``threshold - slack`` of the exact score mass, in a number of blocks
    between those that the exact selection needs at the threshold minus and plus ``slack``.

    Raises:
        ArithmeticError: A row keeps too little or too much.
    """
    mask = xattention(q, k, config)
    exact = antidiagonal_scores(
        q.double(), k.double(), stride=config.stride, block_size=config.block_size, causal=True, impl="reference"
    )
    kept = (exact * mask.to_blocks()).sum(-1) / exact.sum(-1)
    target = config.threshold
    assert isinstance(target, float)
    counts = []
    for threshold in (max(0.0, target - slack), min(1.0, target + slack)):
        nearby = dataclasses.replace(config, threshold=threshold)
        counts.append(xattention(q.double(), k.double(), nearby, impl="reference").kv_num_blocks)
    least = kept.min().item()
    outside = ((mask.kv_num_blocks < counts[0]) | (mask.kv_num_blocks > counts[1])).sum().item()
    if not least >= target - slack or outside:
        raise ArithmeticError(f"gate failed: a row keeps {least:.4f} of {target}; {outside} rows differ in size")
    return {"gate": {"mass": [round(least, 4), target - slack], "n": q.shape[1]}}


def measure(problem: Problem, phase: str, config: XAttentionConfig, budget_ms: float) -> Row:
    """Gate and time one phase of one setting."""
    q, k, v = problem.qkv
    mask = xattention(q, k, config)
    blocks = mask.to_blocks()
    row: Row = {"selected": round(mask.density, 4)}
    flops = blocks.sum().item() * 4.0 * problem.head_dim * config.block_size**2
    if phase == "selection":
        prefix = min(problem.n, 4096)
        row |= gate_selection(q[:, :prefix], k[:, :prefix], config)
        return row | time_ms(partial(xattention, q, k, config), problem.device, budget_ms=budget_ms)

    def both() -> Tensor:
        return attend_blocks(q, k, v, xattention(q, k, config))

    run = both if phase == "both" else partial(attend_blocks, q, k, v, mask)
    gate, lse = problem.gate(run(), sampled.Selected.of(mask))
    recall = (lse - problem.dense_lse).exp()
    row |= gate | {"recall": round(recall.mean().item(), 4), "recall_min": round(recall.min().item(), 4)}
    row |= time_ms(run, problem.device, budget_ms=budget_ms)
    return row | {"tflops": round(flops / row["ms"] * 1e-9, 1), "flops": flops}


def measure_dense(problem: Problem, impl: str, block: int, budget_ms: float) -> Row:
    """Gate and time dense causal attention: the rival's, or ours without a mask."""
    said: Row = {}
    run: Callable[[], Tensor] = partial(attend_blocks, *problem.qkv)
    if impl == "cudnn_dense":
        run, said = baselines.sdpa(*problem.qkv, cudnn=True)
    gate, _ = problem.gate(run(), sampled.Selected(None))
    timing = time_ms(run, problem.device, budget_ms=budget_ms)
    num_blocks = -(-problem.n // block)
    flops = problem.heads * num_blocks * (num_blocks + 1) / 2 * 4.0 * problem.head_dim * block**2
    return {"selected": 1.0, **said, **gate, **timing, "tflops": round(flops / timing["ms"] * 1e-9, 1), "flops": flops}


def main(argv: list[str] | None = None) -> list[Row]:
    parser = arguments("XAttention selection and attention against dense cuDNN.", "xattention")
    parser.add_argument("--n", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--stride", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.9])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--kinds", nargs="+", choices=[*structured.KINDS, "blend"], default=["blend"], help="of heads")
    options = parser.parse_args(argv)
    budget = 100.0 if options.quick else 600.0
    shape = (options.heads, options.kv_heads, options.head_dim, options.dtype, torch.device(options.device))
    kinds = tuple(options.kinds)
    with Writer(options.out, "xattention", options.commit) as writer, ExitStack() as stack:
        quietly(stack)
        for n in options.n[:1] if options.quick else options.n:
            problem = Problem(n, *shape, kinds)
            common = dataclasses.asdict(problem) | {"device": options.device, "block": options.block}
            for impl in ("cudnn_dense", "sparseattn_dense"):
                row = common | {"phase": "attention", "impl": impl}
                writer.measure(row, partial(measure_dense, problem, impl, options.block, budget))
            for stride in options.stride:
                for threshold in options.threshold:
                    config = XAttentionConfig(threshold=threshold, stride=stride, block_size=options.block)
                    for phase in ("selection", "attention", "both"):
                        row = common | {"phase": phase, "impl": "sparseattn", "stride": stride, "threshold": threshold}
                        writer.measure(row, partial(measure, problem, phase, config, budget))
    return writer.rows


if __name__ == "__main__":
    finish(main())
