"""Selection rules as one Triton kernel: a cut-off per row without a sort, then an ascending list.

Scores become integers that order alike (``_keys``). A rule yields the lowest integer that is in whatever its index, and
how many blocks just below it are in as well (ties); thresholds give it at once, budgets by bisection over its 32 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import LOG2E
from sparseattn.ops.scores.rules_problem import ListBounds, Rule, free_budget, row_budget

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = [
    "bounds_stride_b", "budget_stride_b", "first_block", "scores_stride_b", "scores_stride_h", "scores_pitch",
    "lists_rows", "lists_pitch", "sinks", "max_blocks", "threshold_stride_b", "threshold_stride_h",
]  # fmt: skip
_VIEWS = ["scores_ptr", "threshold_ptr"]
_LOWEST = -(1 << 31)


@triton.jit
def _keys(row_ptr, offs, mask):
    """Scores, and int32 that order as they do; -inf where masked out."""
    x = tl.load(row_ptr + offs, mask=mask, other=float("-inf")) + 0.0  # turns -0.0, which orders below 0.0, into it
    bits = x.to(tl.int32, bitcast=True)
    return x, bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _count(row_ptr, first, stop, least, BLOCK: tl.constexpr):
    """Blocks in ``[first, stop)`` whose key is at least ``least``."""
    count = 0
    for n in range(first, stop, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        inside = offs_n < stop
        _, key = _keys(row_ptr, offs_n, inside)
        count += tl.sum(((key >= least) & inside).to(tl.int32))
    return count


@triton.jit
def _mass(row_ptr, first, stop, least, best, BLOCK: tl.constexpr):
    """Sum of ``exp(score - best)`` over the blocks in ``[first, stop)`` whose key is at least ``least``."""
    mass = 0.0
    for n in range(first, stop, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        x, key = _keys(row_ptr, offs_n, offs_n < stop)
        mass += tl.sum(tl.where(key >= least, tl.exp2((x - best) * LOG2E), 0.0))
    return mass


@triton.jit
def _best_keys(row_ptr, first, stop, need, BLOCK: tl.constexpr):
    """(least, ties) of the ``need`` best blocks in ``[first, stop)``, which holds at least one and as many."""
    cut = tl.full((), -2147483648, tl.int32)
    if _count(row_ptr, first, stop, 0, BLOCK) >= need:
        cut = tl.full((), 0, tl.int32)
    for i in range(0, 31):
        candidate = cut | (1 << (30 - i))
        if _count(row_ptr, first, stop, candidate, BLOCK) >= need:
            cut = candidate
    least = cut + 1
    return least, need - _count(row_ptr, first, stop, least, BLOCK)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _choose_kernel(
    scores_ptr, threshold_ptr, visible_ptr, recent_ptr, budget_ptr, counts_ptr, indices_ptr, bounds_stride_b,
    recent_stride_b, budget_stride_b, threshold_stride_b, threshold_stride_h, first_block, scores_stride_b,
    scores_stride_h, scores_pitch, lists_rows, lists_pitch, sinks, max_blocks,
    RULE: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The block list of one row. Grid (rows, H, B).

    Forced blocks are ``[0, sinks)`` and ``[recent, visible)``; the free ones between them are chosen by the rule.
    """
    m_block = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    row = first_block + m_block
    visible = tl.load(visible_ptr + b * bounds_stride_b + row)
    recent = tl.minimum(tl.load(recent_ptr + b * recent_stride_b + row), visible)
    first = tl.minimum(sinks, visible)
    recent = tl.maximum(recent, first)
    num_free = recent - first
    num_forced = visible - num_free
    threshold = tl.load(threshold_ptr + b * threshold_stride_b + h * threshold_stride_h)
    row_ptr = scores_ptr + b.to(tl.int64) * scores_stride_b + h.to(tl.int64) * scores_stride_h
    row_ptr += m_block.to(tl.int64) * scores_pitch

    least = tl.full((), 0x7FFFFFFF, tl.int32)  # the lowest key that is in whatever its index
    ties = tl.full((), 0, tl.int32)  # how many blocks one key below are in as well
    LOWEST: tl.constexpr = -2147483648
    NOTHING: tl.constexpr = -2139095041  # the key of -inf
    if num_free > 0:
        if RULE == "topk":
            need = tl.minimum(tl.load(budget_ptr + b * budget_stride_b + row) - num_forced, num_free)
            if need > 0:
                least, ties = _best_keys(row_ptr, first, recent, need, BLOCK)
        else:
            best = tl.full((), float("-inf"), tl.float32)
            if RULE == "relative_free":
                begin = first
                stop = recent
            else:
                begin = tl.full((), 0, tl.int32)
                stop = visible
            for n in range(begin, stop, BLOCK):
                offs_n = n + tl.arange(0, BLOCK)
                x, _ = _keys(row_ptr, offs_n, offs_n < stop)
                best = tl.maximum(best, tl.max(x))
            if RULE == "cumulative":
                safe = tl.where(best == float("-inf"), 0.0, best)
                free = _mass(row_ptr, first, recent, LOWEST, safe, BLOCK)
                forced = _mass(row_ptr, 0, first, LOWEST, safe, BLOCK)
                forced += _mass(row_ptr, recent, visible, LOWEST, safe, BLOCK)
                need = threshold * (free + forced) - forced
                if threshold >= 1.0:
                    least = tl.full((), -2147483648, tl.int32)
                elif (need > 0.0) & (free > 0.0):
                    need = tl.minimum(need, free)
                    cut = tl.full((), -2147483648, tl.int32)
                    if _mass(row_ptr, first, recent, 0, safe, BLOCK) >= need:
                        cut = tl.full((), 0, tl.int32)
                    for i in range(0, 31):
                        candidate = cut | (1 << (30 - i))
                        if _mass(row_ptr, first, recent, candidate, safe, BLOCK) >= need:
                            cut = candidate
                    least = cut + 1
                    bits = cut ^ ((cut >> 31) & 0x7FFFFFFF)
                    value = tl.exp2((bits.to(tl.float32, bitcast=True) - safe) * LOG2E)
                    above = _mass(row_ptr, first, recent, least, safe, BLOCK)
                    ties = tl.maximum(tl.minimum(tl.ceil((need - above) / value), 1.0e9), 1.0).to(tl.int32)
            else:
                if RULE == "global":
                    cut_at = threshold
                else:
                    cut_at = threshold + best
                bits = (cut_at + 0.0).to(tl.int32, bitcast=True)
                least = bits ^ ((bits >> 31) & 0x7FFFFFFF)
                if threshold > float("-inf"):
                    least = tl.maximum(least, NOTHING + 1)
        # No row that sees a block goes without one.
        if (num_forced == 0) & (ties == 0):  # noqa: SIM102 (operands of a tensor's `and` are always computed)
            if _count(row_ptr, first, recent, least, BLOCK) == 0:
                least, ties = _best_keys(row_ptr, first, recent, 1, BLOCK)
        if CAPPED:
            allowed = tl.maximum(max_blocks - num_forced, 0)
            chosen = _count(row_ptr, first, recent, least, BLOCK) + ties
            if (chosen > allowed) & (allowed < num_free):
                if allowed > 0:
                    least, ties = _best_keys(row_ptr, first, recent, allowed, BLOCK)
                else:
                    least = tl.full((), 0x7FFFFFFF, tl.int32)
                    ties = tl.full((), 0, tl.int32)

    list_row = (b.to(tl.int64) * tl.num_programs(1) + h) * lists_rows + row
    list_ptr = indices_ptr + list_row * lists_pitch
    count = 0
    tied = 0
    for n in range(0, visible, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        seen = offs_n < visible
        _, key = _keys(row_ptr, offs_n, seen)
        is_free = (offs_n >= first) & (offs_n < recent)
        tie = (is_free & (key == least - 1) & (ties > 0)).to(tl.int32)
        tie_rank = tied + tl.cumsum(tie, 0) - tie
        keep = (offs_n < first) | (offs_n >= recent) | (key >= least) | ((tie > 0) & (tie_rank < ties))
        keep = (keep & seen).to(tl.int32)
        slot = count + tl.cumsum(keep, 0) - keep
        tl.store(list_ptr + slot, offs_n, mask=keep > 0)
        count += tl.sum(keep)
        tied += tl.sum(tie)
    tl.store(counts_ptr + list_row, count)


def unsupported_reason(scores: Tensor) -> str | None:
    """Why the kernel cannot take these scores, or None."""
    if scores.dtype != torch.float32:
        return f"the selection kernel takes float32 scores, not {scores.dtype}"
    if scores.is_cuda or triton.knobs.runtime.interpret:
        return None
    return f"Triton runs on {scores.device.type} only under TRITON_INTERPRET=1"


def choose(scores: Tensor, rule: Rule, thresholds: Tensor, bounds: ListBounds, width: int) -> tuple[Tensor, Tensor]:
    """int32 counts ``[B, H, MB]`` and indices ``[B, H, MB, width]``. See ``rules.choose_blocks``."""
    counts, indices = empty_lists(scores.shape, width, scores.device)
    if 0 not in scores.shape:
        if rule.name == "global" and rule.density is not None:
            thresholds = density_cut(scores, bounds, rule.density)
        choose_rows(scores, rule, thresholds, bounds, 0, counts, indices)
    return counts, indices


def empty_lists(shape: tuple[int, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists to be written for scores of that shape; zero counts where the kernel has nothing to do."""
    make = torch.zeros if 0 in shape else torch.empty
    counts = make(shape[:3], dtype=torch.int32, device=device)
    return counts, torch.empty((*shape[:3], width), dtype=torch.int32, device=device)


def choose_rows(
    scores: Tensor, rule: Rule, thresholds: Tensor, bounds: ListBounds, first: int, counts: Tensor, indices: Tensor
) -> None:
    """Write the lists of the rows ``[first, first + scores.shape[2])`` from ``scores [B, H, rows, NB]``.

    Args:
        scores: float32, natural log.
        rule: The rule; its density must have become thresholds.
        thresholds: float32 ``[1]`` or ``[H]`` from ``log_threshold``, or ``[B, 1]`` from ``density_cut``.
        bounds: Bounds of all rows.
        first: The first of the rows.
        counts: int32 ``[B, H, MB]``, written.
        indices: int32 ``[B, H, MB, width]``, written.
    """
    batch, heads, rows, _ = scores.shape
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    visible, recent = bounds.visible.contiguous(), bounds.recent.contiguous()
    budget = row_budget(rule, visible) if rule.name == "topk" else visible
    per_batch = thresholds.dim() == 2
    _choose_kernel[(rows, heads, batch)](
        scores, thresholds, visible, recent, budget, counts, indices, _batch_stride(visible), _batch_stride(recent),
        _batch_stride(budget), int(per_batch), int(not per_batch and thresholds.numel() > 1), first,
        *scores.stride()[:3], counts.shape[2], indices.shape[3], bounds.sinks, rule.max_blocks or 0,
        RULE=rule.name, CAPPED=rule.max_blocks is not None, BLOCK=1024, num_warps=4, **LAUNCH,
    )  # fmt: skip


def density_cut(scores: Tensor, bounds: ListBounds, density: float) -> Tensor:
    """The score float32 ``[B, 1]`` at and above which free blocks make up ``density`` with the forced ones.

    Bisection over the bits of all scores of a sequence: 32 passes, no sort.
    """
    batch, heads, _, columns = scores.shape
    n = torch.arange(columns, device=scores.device, dtype=torch.int32)
    free = (n < torch.minimum(bounds.recent, bounds.visible)[:, None, :, None]) & (n >= bounds.sinks)
    bits = (scores + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = torch.where(free, keys, _LOWEST)
    budget = free_budget(bounds, density, heads).expand(batch)

    def enough(candidate: Tensor) -> Tensor:
        return (keys >= candidate[:, None, None, None]).sum((1, 2, 3)) >= budget

    zero = torch.zeros(batch, dtype=torch.int32, device=scores.device)
    cut = torch.where(enough(zero), zero, _LOWEST).int()
    for bit in range(30, -1, -1):
        candidate = cut | (1 << bit)
        cut = torch.where(enough(candidate), candidate, cut)
    # A budget above what has a score: the lowest keys belong to blocks that are not free.
    cut = cut.clamp(min=-2139095041)
    value = (cut ^ ((cut >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return torch.where(budget > 0, value, torch.inf)[:, None]


def _batch_stride(bound: Tensor) -> int:
    return 0 if bound.shape[0] == 1 else bound.stride(0)


def compile_cases() -> list[
    tuple[str, object, dict[str, object], dict[object, object], dict[object, object], int, int]
]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    for name, capped in (("relative", False), ("topk", False), ("cumulative", True)):
        constants: dict[str, object] = {"RULE": name, "CAPPED": capped, "BLOCK": 1024}
        integers = {"visible_ptr", "recent_ptr", "budget_ptr", "counts_ptr", "indices_ptr"}
        signature: dict[str, object] = {}
        constexprs: dict[object, object] = {}
        attributes: dict[object, object] = {}
        for i, param in enumerate(_choose_kernel.params):
            if param.is_constexpr:
                signature[param.name] = "constexpr"
                constexprs[(i,)] = constants[param.name]
            elif param.name.endswith("_ptr"):
                signature[param.name] = "*i32" if param.name in integers else "*fp32"
                if param.name not in _VIEWS:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[param.name] = "i32"
        cases.append((f"choose-{name}", _choose_kernel, signature, constexprs, attributes, 4, 1))
    return cases
