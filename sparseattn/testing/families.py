"""Head families that separate selectors, besides those of ``structured``: rare keys, rare queries, and traps.

What every method finds, pooled or not, cannot rank methods. These heads want what estimates lose, each in another way;
planted logits and geometry are as in ``structured``.

==================  ==================================================================  ===========================
kind                which keys a query wants                                            what it is hard for
==================  ==================================================================  ===========================
``lone_columns``    24 single keys (columns), the same for all queries                  means over pages of keys
``row_spans``       each 128 queries their own run of 16 keys                           estimates from the last rows
``row_keys``        each 128 queries their own single key                               both
``rare_spans``      one query in 128 its own run of 16 keys, the others look around     means over rows of queries
``rare_keys``       one query in 128 its own single key                                 both means
``outliers``        columns in noise whose four loudest channels are ten times          low precision; distances
                    as loud, in keys and queries that do not meet there
``alternating``     columns of 16 keys that alternate in sign against all queries       sums before the exponential
                    but with one sign more often: wanted and shunned by turns           (antidiagonals, means)
``straddling``      runs of 16 keys across the border of two 128-blocks                 rounding runs to blocks
``middle``          queries of the middle half of the prompt their own columns,         estimates from the last
                    the last quarter none                                               rows
``multi_turn``      the last 64 queries of each of 4 turns a run of an earlier turn     estimates from the last
                                                                                        rows alone
==================  ==================================================================  ===========================

``vertical_slash_C_D`` (say, ``vertical_slash_1000_6096``) are heads as MInference describes them by budgets: C columns
and D diagonals, scaled to the prompt. ``MIXES`` says how often published statistics find which.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.testing.plots import SPAN, Planted, Plot

KINDS = (
    "lone_columns", "row_spans", "row_keys", "rare_spans", "rare_keys", "outliers", "alternating", "straddling",
    "middle", "multi_turn",
)  # fmt: skip

#: Heads in hundredths. ``minference_llama``: the budgets that MInference's search chose for Llama-3.1-8B's 1024 heads
#: (its configuration files; the prompt they were found with has about 30K tokens). ``duo_gqa``: DuoAttention's half of
#: streaming heads for models with grouped queries. ``adversarial``: every trap alike.
MIXES: dict[str, dict[str, int]] = {
    "minference_llama": {
        "vertical_slash_100_800": 29,
        "vertical_slash_1000_6096": 27,
        "vertical_slash_30_800": 17,
        "vertical_slash_3500_100": 15,
        "vertical_slash_500_700": 12,
    },
    "duo_gqa": {"streaming": 50, "vertical": 15, "needle": 15, "rare_keys": 10, "block_topic": 10},
    "adversarial": {kind: 10 for kind in KINDS},
}

TILE, LONE, TURNS, ASKING, REFERENCE = 128, 24, 4, 64, 32768


def mixed_kinds(heads: int, mix: str = "minference_llama", seed: int = 0) -> tuple[str, ...]:
    """Kinds for so many (KV) heads in the proportions of a mix, in random order.

    Args:
        heads: How many.
        mix: One of ``MIXES``.
        seed: Of the order, and of which kinds get the heads that do not divide.

    Raises:
        ValueError: No such mix.
    """
    if mix not in MIXES:
        raise argument_error("mix", f"one of {', '.join(MIXES)}", repr(mix))
    generator = torch.Generator().manual_seed(seed)
    shares = MIXES[mix]
    exact = torch.tensor([heads * share / sum(shares.values()) for share in shares.values()], dtype=torch.float64)
    counts = exact.floor().long()
    # The largest remainders get one more each; equal ones by lot.
    order = (exact - counts + 1e-6 * torch.rand(len(exact), generator=generator)).argsort(descending=True)
    counts[order[: heads - int(counts.sum())]] += 1
    drawn = [kind for kind, count in zip(shares, counts.tolist(), strict=True) for _ in range(count)]
    return tuple(drawn[i] for i in torch.randperm(heads, generator=generator).tolist())


def turn_ends(n: int, turns: int = TURNS) -> list[int]:
    """One past the last token of every turn of a conversation of n tokens: where answers are asked for.

    Selectors that estimate from the last queries see the last turn alone; measure recall on the rows before these ends.
    """
    return [(i + 1) * n // turns for i in range(turns)]


def plant(plot: Plot, kind: str, *, known: tuple[str, ...] = ()) -> Planted:
    """The pattern of one KV head.

    Args:
        plot: What the heads of one call share.
        kind: One of ``KINDS``, ``streaming`` or ``vertical_slash_C_D``.
        known: Kinds of the caller's own, for the message.

    Raises:
        ValueError: An unknown kind.
    """
    budget = re.fullmatch(r"vertical_slash_(\d+)_(\d+)", kind)
    if budget:
        return _vertical_slash(plot, int(budget[1]), int(budget[2]))
    if kind not in _PLANT:
        raise argument_error("kind", f"one of {(*known, *_PLANT, 'vertical_slash_C_D')}", repr(kind))
    return _PLANT[kind](plot)


def _randint(plot: Plot, high: int, *shape: int) -> Tensor:
    return torch.randint(0, max(1, high), shape, device=plot.device, generator=plot.generator)


def _columns(plot: Plot, columns: Tensor, queries: Tensor, logit: float) -> Planted:
    """All of ``queries`` (bool [N]) want the keys of ``columns`` (bool [N])."""
    call = plot.gain(logit) * plot.direction(1)
    first = int(columns.int().argmax())
    rows = plot.position[queries & (plot.position > first)]
    return Planted(
        call * queries[:, None], call * columns[:, None], lambda at: queries[at][:, None] & columns[None, :], rows
    )


def _lone_columns(plot: Plot) -> Planted:
    columns = torch.zeros(plot.n, dtype=torch.bool, device=plot.device)
    columns[_randint(plot, plot.n, LONE)] = True
    return _columns(plot, columns, torch.ones_like(columns), plot.floor + 1)


def _own(plot: Plot, askers: Tensor, width: int, logit: float, *, local: bool) -> Planted:
    """Each asker (a group number by query, -1 for none) wants its group's own run of keys, far before it."""
    groups = int(askers.max()) + 1 if plot.n else 0
    if groups <= 0:
        nothing = torch.zeros(plot.n, plot.head_dim, device=plot.device)
        return Planted(nothing, nothing, lambda at: torch.zeros(len(at), plot.n, dtype=torch.bool), plot.position[:0])
    call = plot.gain(logit) * plot.direction(groups)
    member = askers.clamp(min=0)
    asks = askers >= 0
    first_row = torch.full((groups,), plot.n, device=plot.device).scatter_reduce(
        0, member[asks], plot.position[asks], "amin"
    )
    # Anywhere before the half of what lies before the first asker, so that nearness never finds it.
    room = (first_row // 2 - width + 1).clamp(min=1)
    start = (torch.rand(groups, device=plot.device, generator=plot.generator) * room).long()
    band = plot.gain(plot.floor + 2) * plot.band if local else torch.zeros_like(plot.band)
    queries = torch.where(asks[:, None], call[member], band)
    keys = band.clone()
    for offset in range(width):  # a few rounds over all groups at once
        keys.index_add_(0, (start + offset).clamp(max=plot.n - 1), call)

    def wanted(at: Tensor) -> Tensor:
        begin = start[member[at]][:, None]
        inside = (plot.position[None, :] >= begin) & (plot.position[None, :] < begin + width)
        return inside & asks[at][:, None]

    return Planted(queries, keys, wanted, plot.position[asks & (plot.position >= 2 * width)])


def _tiles(plot: Plot) -> Tensor:
    """A group for every tile of 128 queries past the first eighth, where there is room before it."""
    tile = plot.position // TILE
    first = max(1, int(tile[-1]) // 8) if plot.n else 1
    return torch.where(tile >= first, tile - first, -1)


def _rare(plot: Plot) -> Tensor:
    """The group of its tile for one query of each, -1 for the others."""
    groups = _tiles(plot)
    chosen = _randint(plot, TILE, int(plot.n // TILE) + 1)
    return torch.where(plot.position % TILE == chosen[plot.position // TILE], groups, -1)


def _row_spans(plot: Plot) -> Planted:
    return _own(plot, _tiles(plot), SPAN, plot.floor + 2, local=False)


def _row_keys(plot: Plot) -> Planted:
    return _own(plot, _tiles(plot), 1, plot.floor + 4, local=False)


def _rare_spans(plot: Plot) -> Planted:
    return _own(plot, _rare(plot), SPAN, plot.floor + 3, local=True)


def _rare_keys(plot: Plot) -> Planted:
    return _own(plot, _rare(plot), 1, plot.floor + 6, local=True)


def _outliers(plot: Plot) -> Planted:
    wanted = plot.in_span()
    planted = _columns(plot, wanted, torch.ones_like(wanted), plot.floor + 1)
    loud = min(4, plot.head_dim // 2)
    noise = 10 * plot.normal(plot.n, loud)
    # Keys are loud in some channels and queries in others: norms grow tenfold, scores do not.
    queries, keys = planted.queries.clone(), planted.keys.clone()
    keys[:, :loud] = noise
    queries[:, :loud] = 0
    queries[:, loud : 2 * loud] = noise.flip(0)
    keys[:, loud : 2 * loud] = 0
    return planted._replace(queries=queries, keys=keys)


def _alternating(plot: Plot) -> Planted:
    columns = plot.in_span()
    planted = _columns(plot, columns, torch.ones_like(columns), plot.floor + 2)
    sign = torch.where(plot.position % 2 == 0, 1.0, -1.0)
    attracting = columns & (plot.position % 2 == 0)
    return planted._replace(
        keys=planted.keys * sign[:, None], wanted=lambda at: attracting.expand(len(at), -1)
    )  # fmt: skip


def _straddling(plot: Plot) -> Planted:
    borders = (1 + _randint(plot, plot.n // TILE - 1, 12)) * TILE
    distance = plot.position[:, None] - borders[None, :]
    columns = ((distance >= -SPAN // 2) & (distance < SPAN // 2)).any(1)
    return _columns(plot, columns, torch.ones_like(columns), plot.floor + 1)


def _middle(plot: Plot) -> Planted:
    columns = torch.zeros(plot.n, dtype=torch.bool, device=plot.device)
    columns[_randint(plot, max(1, plot.n // 4), LONE)] = True
    asking = (plot.position >= plot.n // 4) & (plot.position < plot.n - plot.n // 4)
    return _columns(plot, columns, asking, plot.floor + 2)


def _multi_turn(plot: Plot) -> Planted:
    asks = torch.full((plot.n,), -1, device=plot.device)
    for turn, end in enumerate(turn_ends(plot.n)):
        asks[max(end - ASKING, end - plot.n // (2 * TURNS)) : end] = turn
    return _own(plot, asks, SPAN, plot.floor + 3, local=True)


def _streaming(plot: Plot) -> Planted:
    """A sink and a narrow band, nothing else: what DuoAttention calls a streaming head."""
    sink = plot.gain(plot.floor + 3) * plot.sink
    band = plot.gain(plot.floor + 3) * plot.band
    keys = band.clone()
    keys[:4] += sink
    near = 256

    def wanted(at: Tensor) -> Tensor:
        return ((plot.position[None, :] - at[:, None]).abs() <= near) | (plot.position < 4)

    return Planted(band + sink, keys, wanted, plot.position)


def _vertical_slash(plot: Plot, columns: int, diagonals: int) -> Planted:
    """C columns and D diagonals of a prompt of 32K, fewer of a shorter one: lone keys, and bumps at a few offsets."""
    share = min(1.0, plot.n / REFERENCE)
    number = max(4, round(columns * share))
    is_column = torch.zeros(plot.n, dtype=torch.bool, device=plot.device)
    is_column[_randint(plot, plot.n, number)] = True
    # The bump around a diagonal is some 500 tokens wide; the nearest diagonals are among those counted.
    offsets = [0, *(_randint(plot, plot.n // 2, max(0, round(diagonals * share / 512) - 1))).tolist()]
    call = plot.gain(plot.floor + 3 - 0.5 * min(4.0, number / 256)) * plot.direction(1)
    strength = plot.gain(plot.floor + 3) / len(offsets) ** 0.25
    keys = strength * plot.band + call * is_column[:, None]
    shifted = [plot.band.roll(o, 0) * (plot.position >= o)[:, None] for o in offsets]
    queries = strength * torch.stack(shifted).sum(0) + call

    def wanted(at: Tensor) -> Tensor:
        near = torch.zeros(len(at), plot.n, dtype=torch.bool, device=plot.device)
        for offset in offsets:
            near |= (plot.position[None, :] - (at[:, None] - offset)).abs() <= 256
        return near | is_column[None, :]

    return Planted(queries, keys, wanted, plot.position)


_PLANT: dict[str, Callable[[Plot], Planted]] = {
    "lone_columns": _lone_columns,
    "row_spans": _row_spans,
    "row_keys": _row_keys,
    "rare_spans": _rare_spans,
    "rare_keys": _rare_keys,
    "outliers": _outliers,
    "alternating": _alternating,
    "straddling": _straddling,
    "middle": _middle,
    "multi_turn": _multi_turn,
    "streaming": _streaming,
}
