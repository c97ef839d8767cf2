"""Selection rules as one Triton kernel: a cut-off per row without a sort, then an ascending list.

A rule yields a lowest key and a number of ties (``lists_triton``); thresholds give them at once, budgets by bisection
over the 32 bits of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import LOG2E
from sparseattn.kernels.offline import offline_case
from sparseattn.ops.scores.chunks import ScoreChunks
from sparseattn.ops.scores.cut_triton import batch_stride, find_cut
from sparseattn.ops.scores.lists_triton import best_keys, count_from, ordered_keys, within_cap, write_list
from sparseattn.ops.scores.rules_problem import ListBounds, Rule, free_budget, row_budget

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = [
    "bounds_stride_b", "recent_stride_b", "whole_stride_b", "budget_stride_b", "first_block", "scores_stride_b",
    "scores_stride_h", "scores_pitch", "lists_rows", "lists_pitch", "sinks", "max_blocks", "threshold_stride_b",
    "threshold_stride_h",
]  # fmt: skip
_VIEWS = ["scores_ptr", "threshold_ptr"]


@triton.jit
def _mass(row_ptr, first, stop, least, best, BLOCK: tl.constexpr):
    """Sum of ``exp(score - best)`` over the blocks in ``[first, stop)`` whose key is at least ``least``."""
    mass = 0.0
    for n in range(first, stop, BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        x, key = ordered_keys(row_ptr, offs_n, offs_n < stop)
        mass += tl.sum(tl.where(key >= least, tl.exp2((x - best) * LOG2E), 0.0))
    return mass


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _choose_kernel(
    scores_ptr, threshold_ptr, visible_ptr, recent_ptr, whole_ptr, budget_ptr, counts_ptr, indices_ptr,
    bounds_stride_b, recent_stride_b, whole_stride_b, budget_stride_b, threshold_stride_b, threshold_stride_h,
    first_block, scores_stride_b, scores_stride_h, scores_pitch, lists_rows, lists_pitch, sinks, max_blocks,
    RULE: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The block list of one row. Grid (rows, H, B).

    Forced blocks are ``[0, sinks)`` and ``[recent, visible)``; the free ones between them are chosen by the rule, in
    whole rows all of them.
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
    whole = False
    if whole_ptr is not None:
        whole = tl.load(whole_ptr + b * whole_stride_b + row) != 0
    if whole:
        least = tl.full((), -2147483648, tl.int32)
    elif num_free > 0:
        if RULE == "topk":
            need = tl.minimum(tl.load(budget_ptr + b * budget_stride_b + row) - num_forced, num_free)
            if need > 0:
                least, ties = best_keys(row_ptr, first, recent, need, BLOCK)
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
                x, _ = ordered_keys(row_ptr, offs_n, offs_n < stop)
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
            if count_from(row_ptr, first, recent, least, BLOCK) == 0:
                least, ties = best_keys(row_ptr, first, recent, 1, BLOCK)
    if CAPPED:  # noqa: SIM102 (operands of a tensor's `and` are always computed)
        if num_free > max_blocks - num_forced:
            allowed = tl.maximum(max_blocks - num_forced, 0)
            least, ties = within_cap(row_ptr, first, recent, least, ties, allowed, BLOCK)

    list_row = (b.to(tl.int64) * tl.num_programs(1) + h) * lists_rows + row
    list_ptr = indices_ptr + list_row * lists_pitch
    tl.store(counts_ptr + list_row, write_list(row_ptr, list_ptr, first, recent, visible, least, ties, BLOCK))


def unsupported_reason(scores: Tensor) -> str | None:
    """Why the kernel cannot take these scores, or None."""
    if scores.dtype != torch.float32:
        return f"the selection kernel takes float32 scores, not {scores.dtype}"
    if scores.is_cuda or triton.knobs.runtime.interpret:
        return None
    return f"Triton runs on {scores.device.type} only under TRITON_INTERPRET=1"


def choose(scores: Tensor, rule: Rule, thresholds: Tensor, bounds: ListBounds, width: int) -> tuple[Tensor, Tensor]:
    """int32 counts ``[B, H, MB]`` and indices ``[B, H, MB, width]``. See ``rules.choose_blocks``."""
    chunks = ScoreChunks(lambda first, rows: scores, scores.shape[2], scores.shape[2])
    return choose_chunks(chunks, scores.shape, rule, thresholds, bounds, width)


def choose_chunks(
    chunks: ScoreChunks, shape: tuple[int, ...], rule: Rule, thresholds: Tensor, bounds: ListBounds, width: int
) -> tuple[Tensor, Tensor]:
    """As :func:`choose`, of scores ``[B, H, MB, NB]`` (``shape``) that exist a chunk at a time.

    A share of a whole sequence (rule "global" with a density) goes through them five times.
    """
    counts, indices = empty_lists(shape, width, thresholds.device)
    if 0 not in shape:
        if rule.name == "global" and rule.density is not None:
            thresholds = density_cut(chunks, bounds, free_budget(bounds, rule.density, shape[1]).expand(shape[0]))
        for first, scores in chunks:
            choose_rows(scores, rule, thresholds, bounds, first, counts, indices)
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
    whole = None if bounds.whole is None else bounds.whole.byte().contiguous()
    budget = row_budget(rule, visible) if rule.name == "topk" else visible
    per_batch = thresholds.dim() == 2
    _choose_kernel[(rows, heads, batch)](
        scores, thresholds, visible, recent, whole, budget, counts, indices, batch_stride(visible),
        batch_stride(recent), 0 if whole is None else batch_stride(whole), batch_stride(budget), int(per_batch),
        int(not per_batch and thresholds.numel() > 1), first,
        *scores.stride()[:3], counts.shape[2], indices.shape[3], bounds.sinks, rule.max_blocks or 0,
        RULE=rule.name, CAPPED=rule.max_blocks is not None, BLOCK=1024, num_warps=4, **LAUNCH,
    )  # fmt: skip


def density_cut(chunks: ScoreChunks, bounds: ListBounds, budget: Tensor) -> Tensor:
    """The score float32 ``[B, 1]`` at and above which free blocks make up the ``budget [B]`` of a sequence."""
    key, _, _ = find_cut(chunks, bounds.visible, bounds.chosen_from, bounds.sinks, budget.clamp(min=1))
    bits = torch.where(key >= 1 << 31, key - (1 << 31), (1 << 32) - 1 - key)
    value = (bits - ((bits >> 31) << 32)).int().view(torch.float32)  # two's complement of what is above 2^31
    # A budget above what has a score leaves a key below every number.
    value = torch.where(value.isnan(), -torch.inf, value)
    return torch.where(budget > 0, value, torch.inf)[:, None]


def compile_cases() -> list[
    tuple[str, object, dict[str, object], dict[object, object], dict[object, object], int, int]
]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    types = dict.fromkeys(("visible_ptr", "recent_ptr", "budget_ptr", "counts_ptr", "indices_ptr"), "*i32")
    types["whole_ptr"] = "*u8"
    cases = []
    for name, capped in (("relative", False), ("topk", False), ("cumulative", True)):
        constants: dict[str, object] = {"RULE": name, "CAPPED": capped, "BLOCK": 1024}
        cases.append((f"choose-{name}", *offline_case(_choose_kernel, constants, types, "*fp32"), 4, 1))
    return cases
