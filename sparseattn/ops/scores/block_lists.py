"""Block lists from verticals, slashes and ranked blocks, and lists of single columns beside them.

A vertical is a key block that every query block keeps, a slash a distance that every query block looks back. A head may
also rank the blocks of its rows, by pooled queries and keys or by the mass of verticals and slashes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseattn.masks.lists import compact, scatter_blocks
from sparseattn.ops.scores.vertical_slash import sequence_lengths
from sparseattn.ops.sequences import Sequences

_LIST_BYTES = 256 << 20  # lists of query heads, and what it takes to unite them, at a time

#: How a head ranks blocks: not at all; by the softmax of mean queries against mean keys; by vertical and slash mass.
NONE, POOLED, MASS = 0, 1, 2


class ListCap(NamedTuple):
    """The longest list of a head, and what stays of a longer one: the blocks of the plan, most mass first, before those
    that are ranked, most probable first; equal ones by lower index. Blocks of infinite mass all stay.

    Heads that rank by number (``Ranking.top``) must be without a cap.

    Attributes:
        most: int32 ``[B|1, H]``; heads without a cap have one that their lists do not reach.
        vertical: float32 ``[B, H, NB]``; a block has the mass ``max(vertical[n], band[m - n + NB - 1])``.
        band: float32 ``[B, H, MB + NB - 1]``.
    """

    most: Tensor
    vertical: Tensor
    band: Tensor


class ListPlan(NamedTuple):
    """What is listed without ranking. Blocks are listed where they are visible.

    Attributes:
        vertical: bool ``[B, H, NB]``, blocks of every row.
        band: bool ``[B, H, MB + NB - 1]``; entry ``m - n + NB - 1`` lists key block n in row m.
        visible: int32 ``[B|1, MB]``; row m may list blocks ``[0, visible[m])``.
        dense_from: int32 ``[B, H]``, first row of blocks that lists all visible ones; None: there is none.
        cap: What lists are cut to where they would be longer; None: nothing.
    """

    vertical: Tensor
    band: Tensor
    visible: Tensor
    dense_from: Tensor | None = None
    cap: ListCap | None = None


class Ranking(NamedTuple):
    """Blocks that heads list besides, by score.

    With ``share`` a head keeps, of the probabilities ``softmax_n(q_means[m] . k_means[n] * scale)`` of all its rows
    together, the fewest that sum to ``share`` times the number of rows that see a key (equal ones all). With ``top``
    row m keeps its ``top[m]`` best blocks, those of the plan counting as best (equal ones: lower index first).

    Attributes:
        mode: int32 ``[B, H]``: NONE, POOLED or (with ``top`` only) MASS, by which a block scores
            ``max(vertical[n], band[m - n + NB - 1])``.
        q_means: float32 ``[B, H, MB, D]``, or None when no head is POOLED.
        k_means: float32 ``[B, Hkv, NB, D]``, likewise.
        scale: Factor on their products.
        vertical: float32 ``[B, H, NB]``, or None when no head is MASS.
        band: float32 ``[B, H, MB + NB - 1]``, likewise.
        share: Number in (0, 1], or None.
        top: int32 ``[B, H, MB]`` (or broadcasting to that), or None.
        half: q and k came in 16 bits: kernels may round products of their means to TF32.
    """

    mode: Tensor
    q_means: Tensor | None = None
    k_means: Tensor | None = None
    scale: float = 1.0
    vertical: Tensor | None = None
    band: Tensor | None = None
    share: float | None = None
    top: Tensor | None = None
    half: bool = False


def difference_index(rows: Tensor, columns: Tensor, num_kv_blocks: int) -> Tensor:
    """Where a band holds ``rows - columns``; both int ``[...]`` that broadcast."""
    return rows - columns + (num_kv_blocks - 1)


def block_sums(values: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """``[..., N]`` token by token -> ``[..., num_blocks]`` sums over blocks."""
    return _blocks(values, block_size, num_blocks).sum(-1)


def block_any(selected: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """bool ``[..., N]`` -> ``[..., num_blocks]``: blocks that hold a selected token."""
    return _blocks(selected, block_size, num_blocks).any(-1)


def _blocks(values: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """``[..., N]`` -> ``[..., num_blocks, block_size]``; padding copies, so only where there is something to pad."""
    short = num_blocks * block_size - values.shape[-1]
    return (F.pad(values, (0, short)) if short else values).unflatten(-1, (num_blocks, block_size))


def crossing_mass(block_mass: Tensor, s: Sequences, block_size: int, num_q_blocks: int) -> Tensor:
    """Mass of each difference of blocks: the largest of the slash blocks that cross it.

    Args:
        block_mass: ``[B, H, NB]``; entry x is the mass of the distances ``[x * block_size, (x + 1) * block_size)``.
        s: The batch; its lengths align the diagonals.
        block_size: Tokens of a block.
        num_q_blocks: MB.

    Returns:
        ``[B, H, MB + NB - 1]``, the dtype of ``block_mass``.
    """
    q_len, k_len = sequence_lengths(s, block_mass.device)
    columns = block_mass.shape[-1]
    difference = torch.arange(1 - columns, max(num_q_blocks, 1), device=block_mass.device)
    first = difference * block_size + (k_len - q_len)[:, None]
    low, high = first - block_size + 1, first + block_size - 1
    best = torch.zeros((), dtype=block_mass.dtype, device=block_mass.device)
    for step in range(3):  # 2B - 1 distances meet at most three runs of B
        entry = torch.div(low, block_size, rounding_mode="floor") + step
        inside = (entry >= 0) & (entry < columns) & (entry * block_size <= high)
        index = torch.where(inside, entry, 0)[:, None].expand(*block_mass.shape[:2], -1)
        best = torch.maximum(best, torch.where(inside[:, None], block_mass.gather(-1, index), 0.0))
    return best


def grouped_lists(
    list_blocks: Callable[[ListPlan, Ranking | None, int], tuple[Tensor, Tensor]],
    plan: ListPlan,
    ranking: Ranking | None,
    width: int,
    kept: int,
) -> tuple[Tensor, Tensor]:
    """Lists of ``kept`` heads: what any of the query heads lists that share one, some heads at a time.

    Args:
        list_blocks: Of the implementation.
        plan: For all query heads, like ``ranking``.
        ranking: What is listed besides.
        width: Length of a query head's lists.
        kept: Heads of the result.

    Returns:
        int32 counts ``[B, kept, MB]`` and indices ``[B, kept, MB, min(NB, width * group)]``.
    """
    heads, columns = plan.vertical.shape[1:]
    group = heads // kept
    if group == 1:
        return list_blocks(plan, ranking, width)
    shape = (plan.vertical.shape[0], kept, plan.visible.shape[-1])
    counts = torch.empty(shape, dtype=torch.int32, device=plan.visible.device)
    indices = torch.empty((*shape, min(columns, width * group)), dtype=torch.int32, device=counts.device)
    step = max(1, _LIST_BYTES // max(1, 4 * shape[0] * group * shape[2] * width))
    for first in range(0, kept, step):
        part = slice(first * group, (first + step) * group)
        own = None if ranking is None else _heads_of_ranking(ranking, part, slice(first, first + step))
        lists = list_blocks(_heads_of_plan(plan, part), own, width)
        _unite(*lists, columns, counts[:, first : first + step], indices[:, first : first + step])
    return counts, indices


def _heads_of_plan(plan: ListPlan, part: slice) -> ListPlan:
    dense = None if plan.dense_from is None else plan.dense_from[:, part]
    cap = None if plan.cap is None else ListCap(*(x[:, part] for x in plan.cap))
    return ListPlan(plan.vertical[:, part], plan.band[:, part], plan.visible, dense, cap)


def _heads_of_ranking(r: Ranking, part: slice, key_heads: slice) -> Ranking:
    q_means, vertical, band = (None if x is None else x[:, part] for x in (r.q_means, r.vertical, r.band))
    k_means = None if r.k_means is None else r.k_means[:, key_heads]
    top = r.top if r.top is None or r.top.shape[1] == 1 else r.top[:, part]
    return r._replace(mode=r.mode[:, part], q_means=q_means, k_means=k_means, vertical=vertical, band=band, top=top)


def _unite(counts: Tensor, indices: Tensor, columns: int, out_counts: Tensor, out_indices: Tensor) -> None:
    """Write the lists ``[B, kept, MB(, K')]`` of what any of a group of heads ``[B, H, MB(, K)]`` lists."""
    batch, heads, rows, width = indices.shape
    kept = out_counts.shape[1]
    row_bytes = batch * (heads * (9 * width + columns) + kept * (9 * columns + 8 * out_indices.shape[-1]))
    step = max(1, _LIST_BYTES // max(1, row_bytes))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        blocks = scatter_blocks(counts[:, :, part], indices[:, :, part], columns)
        blocks = blocks.unflatten(1, (kept, -1)).any(2)
        out_counts[:, :, part], out_indices[:, :, part] = compact(blocks, out_indices.shape[-1])


def last_keys(s: Sequences, block_size: int, causal: bool, num_q_blocks: int, device: torch.device) -> Tensor:
    """int32 ``[B, MB]``: the last key that some query of each block sees; -1 where there is none."""
    q_len, k_len = (x[:, None] for x in sequence_lengths(s, device))
    rows = torch.arange(num_q_blocks, device=device) * block_size
    last = (k_len - 1).expand(-1, rows.numel())
    if causal:
        last = torch.minimum(rows + block_size, q_len) - 1 + k_len - q_len
    return torch.where(rows < q_len, last.clamp(min=-1), -1).int()
