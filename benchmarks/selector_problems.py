"""Workloads of ``benchmarks.selectors``: structured inputs, a method with its options, and what is counted and checked.

Everything that several rows need is computed once: inputs and dense oracle by a :class:`Problem`, the mask, its gate
and the float64 oracle over its blocks by a :class:`Case`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import selector_gates
from benchmarks.harness import Row
from benchmarks.rivals.ours import attend_blocks
from sparseattn import BlockMask, selectors
from sparseattn.ops.block_sparse import unsupported_reason
from sparseattn.ops.dispatch import implementations
from sparseattn.ops.scores.landmark import unsupported_landmark_reason
from sparseattn.testing import baselines, sampled, structured
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.timing import time_ms, wall_ms
from sparseattn.testing.workloads import DTYPES

#: Tokens of a row or column of blocks by which dense attention is counted.
_DENSE_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Problem:
    """One length and shape; inputs are shared by all methods."""

    n: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: torch.device
    kinds: tuple[str, ...] = ("blend",)

    def row(self) -> Row:
        return {**dataclasses.asdict(self), "kinds": list(self.kinds), "device": str(self.device)}

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.n, self.heads, self.kv_heads, self.head_dim)
        return structured.structured_qkv(*shape, DTYPES[self.dtype], self.device, kinds=self.kinds)

    @cached_property
    def rows(self) -> Tensor:
        return sampled.sample(self.n, min(self.n, 64), self.device)

    @cached_property
    def dense(self) -> selector_gates.Oracle:
        """The sampled rows over all visible keys: what dense attention is held to, and what recall is a share of."""
        return selector_gates.Oracle.of(self.qkv, sampled.Selected(None), self.rows)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method with some options.

    Attributes:
        method: Name of a selector.
        label: What tells it from the method's other settings, as tables show it.
        options: Of the method; others have their defaults.
    """

    method: str
    label: str = "default"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def row(self) -> Row:
        return {"method": self.method, "setting": self.label, "options": self.options}


@dataclasses.dataclass(frozen=True)
class Case:
    """A setting on a problem.

    Attributes:
        problem: The inputs.
        setting: The method.
        impl: Of the selector.
    """

    problem: Problem
    setting: Setting
    impl: str = "auto"

    @cached_property
    def config(self) -> Any:
        return selectors.configure(self.setting.method, self.setting.options)

    def select(self) -> BlockMask:
        """The mask, ready to be attended: what a row of phase ``selection`` times."""
        q, k, _ = self.problem.qkv
        return selectors.get(self.setting.method).select(q, k, self.config, impl=self.impl)

    @property
    def selected_by(self) -> str:
        """The implementation that selects, as rows name it; only ``landmark`` has Hopper kernels."""
        q, k, _ = self.problem.qkv
        names = implementations(self.impl, q)
        if self.setting.method == "landmark":
            fp8 = bool(self.setting.options.get("fp8"))
            names = tuple(n for n in names if unsupported_landmark_reason(q, k, fp8=fp8, impl=n) is None)
            return f"sparseattn_{names[0]}"
        return f"sparseattn_{names[-1]}"

    @cached_property
    def mask(self) -> BlockMask:
        return self.select()

    @cached_property
    def selection_gate(self) -> Row:
        """Of the selection, on a prefix of the inputs.

        Raises:
            ArithmeticError: It is wrong.
        """
        q, k, _ = self.problem.qkv
        return selector_gates.gate_selection(q, k, self.setting.method, self.config, self.impl)

    @cached_property
    def oracle(self) -> selector_gates.Oracle:
        """The sampled rows over the selected blocks."""
        return selector_gates.Oracle.of(self.problem.qkv, sampled.Selected.of(self.mask), self.problem.rows)

    def quality(self) -> Row:
        """Density, and the share of the true attention mass that the mask holds in the sampled rows."""
        kept = (self.oracle.lse - self.problem.dense.lse).exp()
        recall = {"recall": round(kept.mean().item(), 4), "recall_min": round(kept.min().item(), 4)}
        return {"selected": round(self.mask.density, 4), **recall}

    def flops(self) -> float:
        """Of attending what is listed, blocks on the diagonal whole."""
        block_q, block_kv = self.mask.block_size
        keys = self.mask.kv_num_blocks.sum().item() * block_kv
        columns = self.mask.column_counts()
        keys += 0 if columns is None else columns.sum().item()
        return keys * block_q * 4.0 * self.problem.head_dim * (self.problem.heads // self.mask.heads)


def measure(case: Case, phase: str, impl: str, budget_ms: float, *, clock: bool = False, recall: bool = True) -> Row:
    """Gate and time one phase of a case.

    Args:
        case: The method and its inputs.
        phase: "selection", "attention" or "both".
        impl: Of the attention; ignored by phase "selection".
        budget_ms: Time for about this long.
        clock: Time it by the clock as well, from a quiet device to a quiet device.
        recall: Whether rows of phase "selection" say it; it costs as much as a gate of the attention.

    Raises:
        Unsupported: The implementation does not attend such a mask.
        ArithmeticError: The selection is wrong.
        AssertionError: The output is wrong.
    """
    problem = case.problem
    q, k, v = problem.qkv
    said: Row = {} if phase == "attention" else {"gate": case.selection_gate}
    if phase == "selection":
        quality = case.quality() if recall else {"selected": round(case.mask.density, 4)}
        said |= quality | selection_bytes(case.select, problem.device)
        return said | time_ms(case.select, problem.device, budget_ms=budget_ms)
    reason = unsupported_reason(q, k, v, case.mask, impl=impl)
    if reason is not None:
        raise Unsupported(reason)

    def both() -> Tensor:
        return attend_blocks(q, k, v, case.select(), impl=impl)

    run = both if phase == "both" else partial(attend_blocks, q, k, v, case.mask, impl=impl)
    gate = {**said.get("gate", {}), **case.oracle.gate(run())}
    return {**case.quality(), "gate": gate, **timed(run, problem, impl, case.flops(), budget_ms, clock)}


def measure_dense(problem: Problem, name: str, budget_ms: float, *, clock: bool = False) -> Row:
    """Gate and time dense causal attention: ``cudnn_dense``, or ours by an implementation, ``sparseattn_<impl>_dense``.

    Raises:
        Unsupported: It does not run here.
        AssertionError: It is wrong.
    """
    said: Row = {}
    impl = name.removeprefix("sparseattn_").removesuffix("_dense")
    if name == "cudnn_dense":
        run, said = baselines.sdpa(*problem.qkv, cudnn=True)
    else:
        reason = unsupported_reason(*problem.qkv, impl=impl, causal=True)
        if reason is not None:
            raise Unsupported(reason)
        run = partial(attend_blocks, *problem.qkv, impl=impl)
    gate = problem.dense.gate(run())
    blocks = -(-problem.n // _DENSE_BLOCK)
    flops = problem.heads * blocks * (blocks + 1) / 2 * 4.0 * problem.head_dim * _DENSE_BLOCK**2
    return {"selected": 1.0, **said, "gate": gate, **timed(run, problem, impl, flops, budget_ms, clock)}


def timed(
    run: Callable[[], Tensor], problem: Problem, impl: str, flops: float, budget_ms: float, clock: bool = False
) -> Row:
    """Times and TFLOP/s of a gated call, and whether its implementation is the one that "auto" takes here."""
    row = time_ms(run, problem.device, budget_ms=budget_ms)
    row |= {"tflops": round(flops / row["ms"] * 1e-9, 1), "flops": flops}
    names = implementations("auto", problem.qkv[0])
    row["auto"] = impl == next((name for name in names if unsupported_reason(*problem.qkv, impl=name) is None), None)
    return row | ({"wall_ms": wall_ms(run, problem.device)} if clock else {})


def selection_bytes(run: Callable[[], BlockMask], device: torch.device) -> Row:
    """The bytes of the lists that a selection returns, and the most that it held at once (None without a GPU)."""
    mask = run()  # what is compiled or kept from then on is no part of a call
    lists = sum(t.nbytes for t in (mask.kv_num_blocks, mask.kv_indices, mask.column_indices) if t is not None)
    del mask
    if device.type != "cuda":
        return {"list_bytes": lists, "peak_bytes": None}
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    mask = run()
    torch.cuda.synchronize(device)
    del mask
    return {"list_bytes": lists, "peak_bytes": torch.cuda.max_memory_allocated(device) - before}
