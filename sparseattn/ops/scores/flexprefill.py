"""FlexPrefill's choice of blocks (Lai et al. 2025, arXiv:2502.20766) as one registered operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.dispatch import check_impl, on_its_device
from sparseattn.ops.scores.block_lists import (
    MASS,
    POOLED,
    ListCap,
    ListPlan,
    Ranking,
    block_sums,
    crossing_mass,
    grouped_lists,
)
from sparseattn.ops.scores.problem import check_max_blocks, list_cap, row_bounds, share_of
from sparseattn.ops.scores.vertical_slash import (
    LastQueries,
    check_inputs,
    constants_on,
    implementation,
    sequence_lengths,
)
from sparseattn.ops.sequences import LAYOUT_SCHEMA, Sequences, flatten, resolve_sequences, unflatten

BLOCK_SIZES = (32, 64, 128)


def flexprefill_blocks(
    q: Tensor,
    k: Tensor,
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
    density: float | None = None,
    block_size: int = 128,
    causal: bool = True,
    keep_sink: bool = True,
    keep_recent: bool = True,
    group_shared: bool = False,
    max_blocks: int | None = None,
    scale: float | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Block lists by FlexPrefill, and which heads were query-aware.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``sequences``; any float dtype.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        gamma: Share of the mass to cover, in [0, 1].
        tau: Heads whose distance is below it are query-aware; 0: none.
        min_budget: Verticals and slashes kept at least, in tokens of each.
        max_budget: Verticals and slashes kept at most, likewise.
        density: Share of every row's visible blocks to keep, instead of covering gamma within the budgets.
        block_size: 32, 64 or 128; also the number of last queries looked at.
        causal: Bottom-right aligned causality.
        keep_sink: Every row lists block 0.
        keep_recent: Every row lists the blocks its own diagonal touches.
        group_shared: One list per key head: what any query head of the group lists.
        max_blocks: No list of a query head is longer, but for block 0 and the diagonal's: verticals and slashes stay
            before blocks of query-aware heads, and the best of either. None: ``MAX_BLOCKS``, but all that a density
            asks for.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        sequences: The layout of a ragged batch.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".

    Returns:
        counts int32 ``[B, H, MB]``, indices int32 ``[B, H, MB, K]`` (ascending, undefined past the count; H is Hkv with
        ``group_shared``, else Hq; K is NB or what the options bound) and query_aware bool ``[B, Hq]``.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    s = resolve_sequences(q, k) if sequences is None else sequences
    scale = check_inputs(q, k, scale)
    check_impl(impl)
    check_max_blocks(max_blocks)
    if block_size not in BLOCK_SIZES:
        raise argument_error("block_size", f"one of {BLOCK_SIZES}", block_size)
    return torch.ops.sparseattn.flexprefill_blocks(
        q.detach(), k.detach(), *flatten(s), gamma, tau,
        min_budget, -1 if max_budget is None else max_budget, -1.0 if density is None else density, block_size, scale,
        causal, keep_sink, keep_recent, group_shared, max_blocks, impl,
    )  # fmt: skip


class _Options(NamedTuple):
    """What the operator is told besides tensors and lengths; budgets are tokens, negative ones unset."""

    gamma: float
    tau: float
    min_budget: int
    max_budget: int
    density: float
    block_size: int
    keep_sink: bool
    keep_recent: bool
    max_blocks: int | None

    def needed(self, max_k: int) -> int:
        """The longest list that a head can have without a cap, as far as the options tell."""
        columns = (max_k + self.block_size - 1) // self.block_size
        if self.density >= 0:
            # Block 0 and two of a diagonal, or the share and what its rounding may add.
            return min(columns, 3 + share_of(columns, self.density))
        if self.tau == 0 and self.max_budget >= 0:
            # A run of slashes, 2B - 1 keys with the rows it is seen from, crosses three blocks at most.
            return min(columns, 4 * max(1, -(-self.max_budget // self.block_size)))
        return columns

    def width(self, max_k: int) -> int:
        """Entries of a head's list: a cap gives way to block 0 and the three that the diagonal may cross."""
        if self.density >= 0 and self.max_blocks is None:
            return self.needed(max_k)
        return min(self.needed(max_k), max(list_cap(self.max_blocks), 4))


def _selected(mass: Tensor, block_mass: Tensor, query_aware: Tensor, o: _Options, impl: str) -> Tensor:
    """bool ``[2, B, H, NB]``: the blocks of verticals and of slashes each head keeps.

    Args:
        mass: ``[2, B, H, Sk]``, of every vertical and every slash.
        block_mass: ``[2, B, H, NB]``, of every block of them.
        query_aware: bool ``[B, H]``; such heads keep the least budget.
        o: The options.
        impl: As given.
    """
    module = implementation("vertical_slash", impl, mass)
    columns = block_mass.shape[-1]
    least = min(max(1, -(-o.min_budget // o.block_size)), columns)
    most = columns if o.max_budget < 0 else min(max(1, -(-o.max_budget // o.block_size)), columns)
    if o.gamma < 1:
        counts = (module.coverage_counts(mass, o.gamma) // o.block_size + 1).clamp(least, most)
    else:
        counts = torch.full(mass.shape[:-1], most, dtype=torch.int64, device=mass.device)
    for kind, forced in enumerate((o.keep_sink, o.keep_recent)):
        if forced:
            block_mass[kind, ..., 0] = torch.inf
    return module.largest(block_mass, torch.where(query_aware, least, counts))


def _distance(q_mean: Tensor, k_means: Tensor, mass: Tensor, sizes: Tensor, scale: float) -> Tensor:
    """sqrt of the Jensen-Shannon divergence (natural log) of estimated and true block mass, ``[B, H]``.

    A mean key stands for as many keys as its block has: else a short last block would seem to attract too much.

    Args:
        q_mean: ``[B, Hq, 1, D]``, mean of the last queries.
        k_means: ``[B, Hkv, NB, D]``.
        mass: ``[B, Hq, NB]``, the last queries' true block mass.
        sizes: int ``[B, NB]``, keys of each block.
        scale: Factor on q . k.
    """
    group = q_mean.shape[1] // k_means.shape[1]
    logits = (q_mean.unflatten(1, (-1, group)).squeeze(3) @ k_means.transpose(-1, -2)).flatten(1, 2) * scale
    logits = logits + sizes[:, None].to(logits.dtype).log()
    inside = (sizes > 0)[:, None]
    estimate = logits.softmax(-1).masked_fill(~inside, 0.0)
    middle = (estimate + mass) / 2

    def divergence(p: Tensor) -> Tensor:
        # A ratio is at most 2; the smallest numbers have no half, and would be divided by 0.
        ratio = torch.where(p > 0, p / middle.clamp(min=torch.finfo(p.dtype).tiny), 1.0).clamp(max=2.0)
        return torch.special.xlogy(p, ratio).sum(-1)

    return ((divergence(estimate) + divergence(mass)) / 2).clamp(min=0).sqrt()


class _Call(NamedTuple):
    """Arguments of the registered operator after q and k."""

    q_start: Tensor | None
    q_end: Tensor | None
    k_start: Tensor | None
    k_end: Tensor | None
    batch: int
    max_q: int
    max_k: int
    gamma: float
    tau: float
    min_budget: int
    max_budget: int
    density: float
    block_size: int
    scale: float
    causal: bool
    keep_sink: bool
    keep_recent: bool
    group_shared: bool
    max_blocks: int | None
    impl: str

    @property
    def options(self) -> _Options:
        return _Options(*(getattr(self, name) for name in _Options._fields))


torch.library.define(
    "sparseattn::flexprefill_blocks",
    f"(Tensor q, Tensor k, {LAYOUT_SCHEMA}, float gamma, float tau, int min_budget, int max_budget, float density, "
    "int block_size, float scale, bool causal, bool keep_sink, bool keep_recent, bool group_shared, int? max_blocks, "
    "str impl) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("sparseattn::flexprefill_blocks", "CompositeExplicitAutograd")
@on_its_device
def _flexprefill_blocks(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    c = _Call(*arguments)
    kept = (k if c.group_shared else q).shape[-2]
    if 0 in (c.batch, c.max_q, c.max_k):
        counts, indices, query_aware = (x.zero_() for x in _flexprefill_blocks_fake(q, k, *arguments))
        return counts, indices, query_aware
    last = LastQueries(unflatten(q, c), c.block_size, c.causal, c.scale)
    return _lists(q, k, last, c.options, kept, c.impl)


def _last_rows(q: Tensor, p: LastQueries) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The queries looked at, as ``block_means`` takes them: rows, their starts and ends."""
    s = p.sequences
    if not s.ragged:
        rows = min(p.num_queries, s.max_q, s.max_k if p.causal else s.max_q)
        return q[:, s.max_q - rows :], None, None
    q_len, _ = sequence_lengths(s, q.device)
    end = q_len if s.q_end is None else s.q_end
    return q, end - p.rows(q.device), end


def _lists(q: Tensor, k: Tensor, p: LastQueries, o: _Options, kept: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """counts and indices of ``kept`` heads, and query_aware of every query head."""
    s, size = p.sequences, o.block_size
    shape, rows, columns = (s.batch, q.shape[-2]), -(-s.max_q // size), -(-s.max_k // size)
    module, masses = (implementation(name, impl, q, k) for name in ("block_lists", "vertical_slash"))
    mass = masses.last_query_mass(q, k, p)
    block_mass = block_sums(mass, size, columns)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if o.tau > 0:
        _, k_len = sequence_lengths(s, q.device)
        k_means = module.block_means(k, s.k_start, s.k_end, s.packed, size, columns)
        q_mean = module.block_means(*_last_rows(q, p), s.packed, size, 1)
        sizes = (k_len[:, None] - torch.arange(columns, device=q.device) * size).clamp(0, size)
        # Without kernels of its own an implementation takes what defines the distance.
        distance = getattr(masses, "distance", _distance)
        query_aware = distance(q_mean, k_means, block_mass[0], sizes, p.scale) < o.tau
        q_means = module.block_means(q, s.q_start, s.q_end, s.packed, size, rows, query_aware)
        ranking = Ranking(query_aware.int() * POOLED, q_means, k_means, p.scale, half=half)
    else:
        query_aware = torch.zeros(shape, dtype=torch.bool, device=q.device)
        ranking = Ranking(query_aware.int(), scale=p.scale, half=half)

    bounds = row_bounds(s, size, p.causal, False, q.device)
    if o.density < 0:
        first, second = _selected(mass, block_mass, query_aware, o, impl)
        cap = None
        if list_cap(o.max_blocks) < o.needed(s.max_k):
            most = constants_on(q.device, ((list_cap(o.max_blocks),) * shape[1],))
            cap = ListCap(most, block_mass[0], crossing_mass(block_mass[1], s, size, rows))
        plan = ListPlan(first, masses.slash_bands(second, size, s, size, rows, columns), bounds.visible, cap=cap)
        ranked = ranking._replace(share=o.gamma) if o.tau > 0 and o.gamma > 0 else None
    else:
        first = torch.zeros((*shape, columns), dtype=torch.bool, device=q.device)
        first[..., 0] = o.keep_sink
        second = torch.full((*shape, 1), o.keep_recent, device=q.device)  # the diagonal alone
        plan = ListPlan(first, masses.slash_bands(second, 1, s, size, rows, columns), bounds.visible)
        ranked = ranking._replace(
            mode=torch.where(query_aware, POOLED, MASS).int(),
            vertical=block_mass[0],
            band=crossing_mass(block_mass[1], s, size, rows),
            top=(bounds.visible * o.density).ceil().int().clamp(1, o.max_blocks)[:, None],
        )
    return *grouped_lists(module.list_blocks, plan, ranked, o.width(s.max_k), kept), query_aware


@torch.library.register_fake("sparseattn::flexprefill_blocks")
def _flexprefill_blocks_fake(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    c = _Call(*arguments)
    kept = (k if c.group_shared else q).shape[-2]
    rows, columns = ((n + c.block_size - 1) // c.block_size for n in (c.max_q, c.max_k))
    counts = q.new_empty((c.batch, kept, rows), dtype=torch.int32)
    width = min(columns, c.options.width(c.max_k) * (q.shape[-2] // kept))
    indices = counts.new_empty((*counts.shape, width))
    return counts, indices, q.new_empty((c.batch, q.shape[-2]), dtype=torch.bool)
