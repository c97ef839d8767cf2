"""MInference's choice of blocks and columns (Jiang et al. 2024, arXiv:2407.02490) as one registered operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.dispatch import check_impl, on_its_device
from sparseattn.ops.scores.block_lists import (
    POOLED,
    ListCap,
    ListPlan,
    Ranking,
    block_any,
    block_sums,
    crossing_mass,
    grouped_lists,
    last_keys,
)
from sparseattn.ops.scores.problem import check_max_blocks, list_cap, row_bounds
from sparseattn.ops.scores.vertical_slash import (
    NUM_QUERIES,
    LastQueries,
    check_inputs,
    constants_on,
    implementation,
    sequence_lengths,
)
from sparseattn.ops.sequences import LAYOUT_SCHEMA, Sequences, flatten, resolve_sequences, unflatten

BLOCK_SIZES = (16, 32, 64, 128, 256)
#: Every row, in the units of ``HeadBudget.last``.
ALL = 2**31 - 1


class HeadBudget(NamedTuple):
    """What one query head keeps; all of it in tokens but ``blocks``.

    Attributes:
        vertical: Columns with the most mass under the last queries. Vertical-slash heads have at least one.
        slash: Distances with the most mass, likewise.
        init: Keys at the start.
        local: Nearest keys.
        last: Queries at the end that see everything.
        blocks: Best blocks of every row by mean query and mean key.
    """

    vertical: int = 0
    slash: int = 0
    init: int = 0
    local: int = 0
    last: int = 0
    blocks: int = 0


def minference_blocks(
    q: Tensor,
    k: Tensor,
    budgets: Sequence[HeadBudget],
    *,
    adaptive_budget: float | None = None,
    num_queries: int = 64,
    num_sink_tokens: int = 30,
    num_local_tokens: int = 100,
    block_size: int = 128,
    causal: bool = True,
    columns: bool = True,
    group_shared: bool = False,
    max_blocks: int | None = None,
    scale: float | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Block lists by MInference, and the lone columns beside them.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``sequences``; any float dtype.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        budgets: What each of the Hq query heads keeps.
        adaptive_budget: Vertical-slash heads keep, instead of their numbers, a fifth of this share of the keys as
            verticals and four fifths as slashes.
        num_queries: Last queries looked at; 16, 32, 64 or 128.
        num_sink_tokens: Keys at the start that vertical-slash heads keep whatever their mass.
        num_local_tokens: Nearest distances that vertical-slash heads keep, likewise.
        block_size: 16, 32, 64, 128 or 256.
        causal: Bottom-right aligned causality.
        columns: Return verticals as single columns; otherwise the blocks that hold one are listed.
        group_shared: One list per key head: what any query head of the group keeps.
        max_blocks: No list of a head with verticals is longer, but for its first and nearest keys': the blocks with the
            most mass stay. None: ``MAX_BLOCKS``. Heads that ask for anything else besides
            are not capped.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        sequences: The layout of a ragged batch.
        impl: "auto" (CUDA: "triton", elsewhere: "reference"), "triton" or "reference".

    Returns:
        counts int32 ``[B, H, MB]``, indices int32 ``[B, H, MB, K]`` (ascending, undefined past the count; H is Hkv with
        ``group_shared``, else Hq) and columns int32 ``[B, H, MB, C]`` (ascending, -1 past the end; none of them in a
        listed block). K and C follow from the budgets and lengths; C is 0 where no head has lone columns.

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
    if num_queries not in NUM_QUERIES:
        raise argument_error("num_queries", f"one of {NUM_QUERIES}", num_queries)
    if len(budgets) != q.shape[-2]:
        raise argument_error("budgets", f"{q.shape[-2]} entries, one per query head", f"{len(budgets)} entries")
    return torch.ops.sparseattn.minference_blocks(
        q.detach(), k.detach(), *flatten(s),
        [number for budget in budgets for number in budget], -1.0 if adaptive_budget is None else adaptive_budget,
        num_queries, num_sink_tokens, num_local_tokens, block_size, scale, causal, columns, group_shared,
        max_blocks, impl,
    )  # fmt: skip


class _Options(NamedTuple):
    """What the operator is told besides tensors and lengths."""

    budgets: tuple[HeadBudget, ...]
    adaptive: float
    num_sink: int
    num_local: int
    block_size: int
    columns: bool
    group_shared: bool
    max_blocks: int | None

    @property
    def slashed(self) -> bool:
        """Whether some head is of the vertical-slash kind."""
        return any(b.vertical > 0 for b in self.budgets)

    def most(self, b: HeadBudget, max_k: int) -> tuple[int, int]:
        """The most verticals and slashes a head can keep with ``max_k`` keys."""
        if b.vertical == 0:
            return 0, 0
        vertical, slash = b.vertical, b.slash
        if self.adaptive >= 0:
            # In whole numbers, since lengths may be symbols, and one more for what rounding may add.
            budget = max_k * math.ceil(self.adaptive * 2**20) // 2**20 + 1
            vertical, slash = budget // 5, budget * 4 // 5
        return min(max_k, max(vertical, self.num_sink, 1)), min(max_k, max(slash, self.num_local, 1))

    def needed(self, b: HeadBudget, max_k: int) -> int:
        """The longest list that a head can have without a cap."""
        size = self.block_size
        if b.last:
            return (max_k + size - 1) // size
        vertical, slash = self.most(b, max_k)
        held = b.init if self.columns else b.init + vertical * size
        sink = self.num_sink if b.vertical else 0
        local = (b.local + 2 * size - 2) // size + 1 if b.local else 0
        # A slash is a run of as many keys as a block holds, anywhere: it crosses two blocks.
        return -(-held // size) + -(-sink // size) + local + 2 * slash + b.blocks

    def cap(self, b: HeadBudget, max_k: int) -> int:
        """The longest list of a head."""
        needed = self.needed(b, max_k)
        if b.vertical == 0 or b.last or b.blocks or b.init or b.local:
            return needed
        return min(needed, list_cap(self.max_blocks))

    def width(self, b: HeadBudget, max_k: int) -> int:
        """Entries that a head's lists need: what has infinite mass stays above a cap."""
        near = (self.num_local + 2 * self.block_size - 2) // self.block_size + 1
        return min(self.needed(b, max_k), max(self.cap(b, max_k), -(-self.num_sink // self.block_size) + near))

    def widths(self, heads: int, max_k: int) -> tuple[int, int]:
        """K and C: the longest block list and the most lone columns that a row can have."""
        blocks = -(-max_k // self.block_size)
        group = len(self.budgets) // heads if self.group_shared else 1
        widest = max([self.width(b, max_k) for b in self.budgets])
        lone = max([self.most(b, max_k)[0] if self.columns else 0 for b in self.budgets])
        return min(blocks, widest * group), min(max_k, lone * group)


def _selected(
    q: Tensor, k: Tensor, p: LastQueries, o: _Options, table: Tensor, impl: str
) -> tuple[Tensor, Tensor, ListCap | None]:
    """bool ``[B, H, Sk]`` twice, the verticals and the slashes of vertical-slash heads, and the cap on their lists."""
    module = implementation("vertical_slash", impl, q, k)
    mass = module.last_query_mass(q, k, p)  # [2, B, H, Sk]
    mass[0, ..., : o.num_sink] = torch.inf
    mass[1, ..., : o.num_local] = torch.inf
    counts = _kept_numbers(p.sequences, o, table).expand(mass.shape[:-1])
    vertical, slash = module.largest(mass, counts)
    max_k, size, cap = p.sequences.max_k, o.block_size, None
    rows, columns = -(-p.sequences.max_q // size), -(-max_k // size)
    if any(o.cap(b, max_k) < min(o.needed(b, max_k), columns) for b in o.budgets):
        block_mass = block_sums(mass, size, columns)
        most = constants_on(q.device, (tuple(o.cap(b, max_k) for b in o.budgets),))
        cap = ListCap(most, block_mass[0], crossing_mass(block_mass[1], p.sequences, size, rows))
    return vertical, slash, cap


def _kept_numbers(s: Sequences, o: _Options, table: Tensor) -> Tensor:
    """int ``[2, B|1, H]``: how many verticals and slashes each head keeps."""
    floors = (max(o.num_sink, 1), max(o.num_local, 1))
    if o.adaptive < 0 and not s.ragged:
        kept = (
            tuple(min(max(b[kind], floor), s.max_k) if b.vertical else 0 for b in o.budgets)
            for kind, floor in enumerate(floors)
        )
        return constants_on(table.device, tuple(kept))[:, None]
    _, k_len = sequence_lengths(s, table.device)
    wanted = table[:, :2].t()[:, None].long()  # [2, 1, H]
    if o.adaptive >= 0:
        budget = (k_len * o.adaptive).floor().long()
        wanted = torch.stack([budget // 5, budget * 4 // 5])[..., None]  # [2, B, 1]
    floor = constants_on(table.device, (floors,)).view(2, 1, 1)
    counts = torch.minimum(torch.maximum(wanted, floor), k_len[:, None])
    return torch.where(table[:, 0] > 0, counts, 0)


def _ranking(q: Tensor, k: Tensor, p: LastQueries, o: _Options, table: Tensor, impl: str) -> Ranking | None:
    """How block-sparse heads rank; None where there is none."""
    if not any(b.blocks for b in o.budgets):
        return None
    s, size = p.sequences, o.block_size
    module = implementation("block_lists", impl, q, k)
    return Ranking(
        ((table[:, 5] > 0).int() * POOLED).expand(s.batch, -1),
        module.block_means(q, s.q_start, s.q_end, s.packed, size, -(-s.max_q // size), table[None, :, 5] > 0),
        module.block_means(k, s.k_start, s.k_end, s.packed, size, -(-s.max_k // size)),
        p.scale,
        top=table[:, 5, None].expand(s.batch, -1, -(-s.max_q // size)),
        half=q.dtype in (torch.float16, torch.bfloat16),
    )


def _lists(q: Tensor, k: Tensor, p: LastQueries, o: _Options, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """counts, indices and columns of every head of the result."""
    s, size, heads = p.sequences, o.block_size, q.shape[-2]
    rows, columns = -(-s.max_q // size), -(-s.max_k // size)
    kept = k.shape[-2] if o.group_shared else heads
    _, lone = o.widths(kept, s.max_k)
    table = constants_on(q.device, tuple(tuple(b) for b in o.budgets))  # [H, 6]
    local, last = table[:, 3, None], table[:, 4]
    shape = (s.batch, heads, s.max_k)
    if o.slashed:
        vertical, slash, cap = _selected(q, k, p, o, table, impl)
    else:
        vertical = slash = torch.zeros(shape, dtype=torch.bool, device=q.device)
        cap = None
    if any(b.local for b in o.budgets):
        slash = slash | (torch.arange(s.max_k, device=q.device) < local)
    # Verticals' first keys are kept as a block where columns are apart: a tile less to gather than as columns.
    firsts = (max(b.init, o.num_sink if o.columns and b.vertical else 0) for b in o.budgets)
    init = constants_on(q.device, (tuple(firsts),)).view(-1, 1)
    blocks = torch.arange(columns, device=q.device) * size < init
    blocks = blocks.expand(s.batch, -1, -1) if o.columns else blocks | block_any(vertical, size, columns)
    dense_from = None
    if any(b.last for b in o.budgets):
        q_len, _ = sequence_lengths(s, q.device)
        dense_from = torch.where(last > 0, (q_len[:, None] - last).clamp(min=0) // size, rows).int()
    bounds = row_bounds(s, size, p.causal, False, q.device)
    module, masses = (implementation(name, impl, q, k) for name in ("block_lists", "vertical_slash"))
    plan = ListPlan(blocks, masses.slash_bands(slash, 1, s, size, rows, columns), bounds.visible, dense_from, cap)
    per_head, _ = o._replace(group_shared=False).widths(heads, s.max_k)
    counts, indices = grouped_lists(module.list_blocks, plan, _ranking(q, k, p, o, table, impl), per_head, kept)
    if lone == 0:
        return counts, indices, indices.new_empty((*counts.shape, 0))
    token_counts, tokens = module.list_tokens(vertical, kept, lone)
    end = last_keys(s, size, p.causal, rows, q.device)
    return counts, indices, module.list_columns(tokens, token_counts, counts, indices, end, size, columns)


class _Call(NamedTuple):
    """Arguments of the registered operator after q and k."""

    q_start: Tensor | None
    q_end: Tensor | None
    k_start: Tensor | None
    k_end: Tensor | None
    batch: int
    max_q: int
    max_k: int
    budgets: list[int]
    adaptive_budget: float
    num_queries: int
    num_sink_tokens: int
    num_local_tokens: int
    block_size: int
    scale: float
    causal: bool
    columns: bool
    group_shared: bool
    max_blocks: int | None
    impl: str

    @property
    def options(self) -> _Options:
        heads = tuple(HeadBudget(*self.budgets[i : i + 6]) for i in range(0, len(self.budgets), 6))
        return _Options(
            heads, self.adaptive_budget, self.num_sink_tokens, self.num_local_tokens, self.block_size, self.columns,
            self.group_shared, self.max_blocks,
        )  # fmt: skip


torch.library.define(
    "sparseattn::minference_blocks",
    f"(Tensor q, Tensor k, {LAYOUT_SCHEMA}, int[] budgets, float adaptive_budget, int num_queries, "
    "int num_sink_tokens, int num_local_tokens, int block_size, float scale, bool causal, bool columns, "
    "bool group_shared, int? max_blocks, str impl) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("sparseattn::minference_blocks", "CompositeExplicitAutograd")
@on_its_device
def _minference_blocks(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    c = _Call(*arguments)
    if 0 in (c.batch, c.max_q, c.max_k):
        counts, indices, columns = _minference_blocks_fake(q, k, *arguments)
        return counts.zero_(), indices.zero_(), columns.fill_(-1)
    return _lists(q, k, LastQueries(unflatten(q, c), c.num_queries, c.causal, c.scale), c.options, c.impl)


@torch.library.register_fake("sparseattn::minference_blocks")
def _minference_blocks_fake(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    c = _Call(*arguments)
    kept = (k if c.group_shared else q).shape[-2]
    counts = q.new_empty((c.batch, kept, (c.max_q + c.block_size - 1) // c.block_size), dtype=torch.int32)
    width, lone = c.options.widths(kept, c.max_k)
    return counts, counts.new_empty((*counts.shape, width)), counts.new_empty((*counts.shape, lone))
