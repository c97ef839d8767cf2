"""Selection rules: what turns block scores into lists, and what every list must hold whatever the scores say."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.scores.problem import diagonal_blocks, list_cap, row_bounds, share_of
from sparseattn.ops.sequences import Sequences

RULES = ("relative", "relative_free", "cumulative", "topk", "global")


class Rule(NamedTuple):
    """How a row of natural-log block scores becomes a list. ``docs/selectors.md`` compares them.

    Attributes:
        name: "relative": blocks of at least ``threshold`` times the row's best (exponentials of scores);
            "relative_free": times the best that is not forced. "cumulative": the fewest blocks that hold ``threshold``
            of the row's total. "topk": the best ``num_blocks``, or the best ``density`` of the blocks a row sees.
            "global": blocks that score at least ``threshold``, the same for all rows; or, with ``density``, at least
            the score that keeps that share of all visible blocks of a sequence.
        threshold: One number in [0, 1], or one per head of the scores. Not read where ``density`` or ``num_blocks`` is.
        density: A share in (0, 1]; rules "topk" and "global".
        num_blocks: Blocks of a row's list, forced ones included; rule "topk".
        max_blocks: No list is longer, but for its forced blocks: the best stay. None: no cap here; operators put
            ``MAX_BLOCKS`` for it (``capped``).
    """

    name: str = "relative"
    threshold: tuple[float, ...] = (0.1,)
    density: float | None = None
    num_blocks: int | None = None
    max_blocks: int | None = None


class Forced(NamedTuple):
    """Blocks that causal lists hold whatever the scores say (others force none).

    Attributes:
        sink_tokens: Blocks that hold one of the first keys.
        local_tokens: Blocks that hold one of so many keys before a row's diagonal, or the diagonal itself; None: none.
        last_tokens: Query blocks that hold one of the last so many queries of a sequence list all they see, up to the
            cap on lists.
    """

    sink_tokens: int = 0
    local_tokens: int | None = 0
    last_tokens: int = 0


class ListBounds(NamedTuple):
    """Which blocks each query block may and must list, as ``RowBounds``, and how many at the start.

    Attributes:
        visible: int32 [B|1, MB]; blocks ``[0, visible)`` may be listed.
        recent: int32 [B|1, MB]; blocks ``[recent, visible)`` must be listed.
        sinks: Blocks ``[0, sinks)`` must be listed, where visible.
        whole: bool [B|1, MB]; such rows choose all they see, whatever the rule, and only a cap takes of it. None: none.
    """

    visible: Tensor
    recent: Tensor
    sinks: int = 0
    whole: Tensor | None = None

    @property
    def chosen_from(self) -> Tensor:
        """int32 [B|1, MB]; blocks ``[sinks, chosen_from)`` are what a rule chooses from."""
        return self.recent if self.whole is None else torch.where(self.whole, 0, self.recent).int()


def check_rule(rule: Rule, heads: int) -> None:
    """Raise unless the rule makes sense for scores of so many heads.

    Raises:
        ValueError: A value out of range, a missing or superfluous option, or thresholds for another number of heads.
    """
    if rule.name not in RULES:
        raise argument_error("rule", f"one of {RULES}", repr(rule.name))
    for name in ("num_blocks", "max_blocks"):
        value = getattr(rule, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise argument_error(name, "an int of at least 1, or None", repr(value), "Budgets must select something.")
    if rule.num_blocks is not None and rule.name != "topk":
        raise argument_error("num_blocks", f"None with rule {rule.name!r}", rule.num_blocks, "Use rule='topk'.")
    density = rule.density
    if density is not None:
        if rule.name not in ("topk", "global"):
            raise argument_error("density", f"None with rule {rule.name!r}", density, "Use rule='topk' or 'global'.")
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            raise argument_error("density", "a number in (0, 1], or None", repr(density))
    if rule.name == "topk":
        if (density is None) == (rule.num_blocks is None):
            got = "both" if density is not None else "neither"
            raise argument_error("num_blocks", "one of num_blocks and density with rule 'topk'", got)
    elif len(rule.threshold) not in (1, heads):
        expected = f"a number or {heads} numbers, one per list of a query block"
        raise argument_error("threshold", expected, f"{len(rule.threshold)} numbers")


def list_bounds(s: Sequences, block_size: int, causal: bool, forced: Forced, device: torch.device) -> ListBounds:
    """Bounds of every query block, on the device and without a host sync."""
    keep_recent = causal and forced.local_tokens is not None
    visible, recent = row_bounds(s, block_size, causal, keep_recent, device)
    if not causal:
        return ListBounds(visible, recent)
    if forced.local_tokens:
        recent, _ = diagonal_blocks(s, block_size, forced.local_tokens, 0, device)
    whole = None
    if forced.last_tokens:
        ends = torch.arange(1, visible.shape[-1] + 1, device=device) * block_size
        used = s.lengths_q()
        whole = torch.atleast_2d(ends > (s.max_q if used is None else used[:, None]) - forced.last_tokens)
    return ListBounds(visible, recent.int(), -(-forced.sink_tokens // block_size), whole)


def capped(rule: Rule, columns: int) -> Rule:
    """The rule with the cap that an operator puts on lists for which none is asked: ``MAX_BLOCKS``.

    It never cuts into a number of blocks or a density that is asked for, and with so few columns there is none.
    """
    if rule.max_blocks is not None:
        return rule
    most = max(list_cap(None), rule.num_blocks or 0)
    if rule.density is not None:
        most = max(most, share_of(columns, rule.density))
    return rule._replace(max_blocks=most) if most < columns else rule


def list_width(columns: int, rule: Rule, causal: bool, forced: Forced, block_size: int) -> int:
    """Entries that the longest list can need under a rule that is ``capped``; known without the device."""
    most = columns if rule.max_blocks is None else rule.max_blocks
    if rule.name == "topk" and not (causal and forced.last_tokens):
        budget = share_of(columns, rule.density) if rule.num_blocks is None else rule.num_blocks  # type: ignore[arg-type]
        most = min(most, budget)
    if causal:
        must = -(-forced.sink_tokens // block_size)
        if forced.local_tokens is not None:
            must += (forced.local_tokens + 2 * block_size - 2) // block_size + 1
        most = max(most, must)
    return min(columns, most)


def row_budget(rule: Rule, visible: Tensor) -> Tensor:
    """Blocks that rule "topk" keeps in each row, forced ones included: int32 like ``visible``, 1 at least."""
    if rule.num_blocks is not None:
        return visible.clamp(max=rule.num_blocks)
    assert rule.density is not None
    count = (visible.double() * rule.density + 0.5).floor().int().clamp(min=1)
    return torch.minimum(count, visible)


def log_threshold(rule: Rule) -> tuple[float, ...]:
    """Thresholds in the domain they are compared in: logs, except the shares of rule "cumulative"."""
    if rule.name == "cumulative":
        return rule.threshold
    return tuple(math.log(value) if value > 0 else -math.inf for value in rule.threshold)


def free_budget(bounds: ListBounds, density: float, heads: int) -> Tensor:
    """How many blocks besides the forced ones a sequence may keep at ``density``: int64 [B|1], possibly negative."""
    visible = bounds.visible.long()
    forced = visible - (torch.minimum(bounds.chosen_from, bounds.visible) - bounds.sinks).clamp(min=0)
    total = visible.sum(-1).double() * (heads * density)
    return (total + 0.5).floor().long() - forced.sum(-1) * heads


# A rule and what is forced, as registered operators take them.
RULE_SCHEMA = (
    "str rule, float[] threshold, float? density, int? num_blocks, int? max_blocks, int sink_tokens, "
    "int? local_tokens, int last_tokens"
)


def flatten_rule(rule: Rule, forced: Forced) -> tuple[Any, ...]:
    """A rule and what is forced in the order of ``RULE_SCHEMA``."""
    name, threshold, *limits = rule
    return name, list(threshold), *limits, forced.sink_tokens, forced.local_tokens, forced.last_tokens


def unflatten_rule(c: Any) -> tuple[Rule, Forced]:
    """Both from a registered operator's arguments ``c``, which has them by their names."""
    rule = Rule(c.rule, tuple(c.threshold), c.density, c.num_blocks, c.max_blocks)
    return rule, Forced(c.sink_tokens, c.local_tokens, c.last_tokens)


def empty_lists(q: Tensor, heads: int, c: Any) -> tuple[Tensor, Tensor]:
    """Lists of the right shape for tracing: int32 counts ``[B, heads, MB]`` and indices ``[B, heads, MB, K]``."""
    rows, columns = ((n + c.block_size - 1) // c.block_size for n in (c.max_q, c.max_k))
    rule, forced = unflatten_rule(c)
    rule = capped(rule, columns)
    shape = (c.batch, heads, rows)
    width = list_width(columns, rule, c.causal, forced, c.block_size)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty((*shape, width), dtype=torch.int32)
