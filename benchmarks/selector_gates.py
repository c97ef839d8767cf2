"""What selections and the attention over them are held to before they are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Row
from sparseattn import BlockMask, XAttentionConfig, selectors, xattention
from sparseattn.masks.columns import scatter_columns
from sparseattn.ops.scores import antidiagonal_scores
from sparseattn.testing import sampled

#: Selections are compared on so many first tokens of the inputs.
PREFIX = 4096
#: Options that count tokens and are meant for whole prompts: on a prefix they would keep everything.
BUDGETS = ("vertical_size", "slash_size", "min_budget", "max_budget")
_NOISES = 2


class Oracle(NamedTuple):
    """Sampled rows of attention over some keys.

    Attributes:
        exact: float64 [R, Hq, D].
        eager: The same as plain code gives it in the inputs' dtype.
        lse: float64 [Hq, R].
        rows: int64 [R].
    """

    exact: Tensor
    eager: Tensor
    lse: Tensor
    rows: Tensor

    @classmethod
    def of(cls, qkv: tuple[Tensor, Tensor, Tensor], selected: sampled.Selected, rows: Tensor) -> Oracle:
        exact, lse = sampled.attend(*qkv, selected, rows, torch.float64)
        return cls(exact, sampled.attend(*qkv, selected, rows, qkv[0].dtype)[0], lse, rows)

    def gate(self, o: Tensor) -> Row:
        """Hold an output ``[1, Sq, Hq, D]`` to the tolerance rule.

        Raises:
            AssertionError: It is wrong.
        """
        found: Row = sampled.gate(("o",), (o[0, self.rows],), (self.exact,), (self.eager,))["gate"]
        return found


def gate_selection(q: Tensor, k: Tensor, method: str, config: Any, impl: str, prefix: int = PREFIX) -> Row:
    """Hold a selection to the float64 reference, on the first tokens.

    XAttention with its own rule has a gate of its own, :func:`gate_mass`; others :func:`gate_keys`.

    Args:
        q: ``[1, S, Hq, D]``.
        k: ``[1, S, Hkv, D]``.
        method: Name of a selector.
        config: Its options for the whole length. Budgets in tokens (``BUDGETS``) shrink with the prefix.
        impl: Of the selector under test.
        prefix: How many tokens.

    Raises:
        ArithmeticError: The selection is wrong.
    """
    tokens = min(prefix, q.shape[1])
    config = shrunk(config, tokens / q.shape[1])
    q, k = q[:, :tokens], k[:, :tokens]
    own = method == "xattention" and (config.rule, config.aggregate) == ("cumulative", "mean")
    found = gate_mass(q, k, config, impl) if own else gate_keys(q, k, method, config, impl)
    return {**found, "n": tokens}


def shrunk(config: Any, share: float) -> Any:
    """A config whose budgets in tokens are this share of what they were."""
    given = {name: getattr(config, name, None) for name in BUDGETS}
    return dataclasses.replace(config, **{name: max(1, round(x * share)) for name, x in given.items() if x is not None})


def kept_keys(mask: BlockMask) -> Tensor:
    """Which keys every row of blocks lists: bool ``[H, MB, Sk]`` of a batch of one."""
    keys = mask.to_blocks()[0].repeat_interleave(mask.block_size[1], -1)[..., : mask.seq_lens[1]]
    return keys if mask.column_indices is None else keys | scatter_columns(mask.column_indices, mask.seq_lens[1])[0]


def gate_keys(q: Tensor, k: Tensor, method: str, config: Any, impl: str) -> Row:
    """Compare the keys that a selection lists with what the float64 reference lists.

    Rounding moves blocks that are nearly worth their place across the cut-off, so the same reference says how many
    those are: in the inputs' dtype, and in float64 on inputs rounded once more (by random halves of their last bit).
    As everywhere (``sparseattn.testing.tolerance``), a kernel may differ in twice as much, plus one unit of rounding
    of what is listed.

    Returns:
        ``differing``, ``allowed`` and ``near_ties`` (which share of the differing keys rounding moved in the reference,
        too) as shares of the listed keys; ``listed``, as a share of all visible ones.

    Raises:
        ArithmeticError: More differ.
    """
    select = selectors.get(method).select
    exact = kept_keys(select(q.double(), k.double(), config, impl="reference"))
    moved = [kept_keys(select(*x, config, impl="reference")) != exact for x in rounded(q, k)]
    wrong = kept_keys(select(q, k, config, impl=impl)) != exact
    listed = exact.sum().item()
    differing = wrong.sum().item()
    allowed = 2 * max(other.sum().item() for other in moved) + torch.finfo(q.dtype).eps * listed
    near = (wrong & torch.stack(moved).any(0)).sum().item()
    if differing > allowed:
        raise ArithmeticError(
            f"gate failed: {differing} listed keys differ from the float64 reference's {listed}, {near} of them by "
            f"near-ties; {allowed:.0f} may"
        )
    visible = exact.shape[0] * sum(min((m + 1) * config.block_size, k.shape[1]) for m in range(exact.shape[1]))
    return {
        "differing": round(differing / max(listed, 1), 5),
        "near_ties": round(near / max(differing, 1), 3),
        "allowed": round(allowed / max(listed, 1), 5),
        "listed": round(listed / visible, 4),
    }


def rounded(q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs that a right selection may mistake for these: of their own dtype, and float64 with the last bit random."""
    yield q, k
    generator = torch.Generator(device=q.device).manual_seed(0)
    half = torch.finfo(q.dtype).eps / 2
    for _ in range(_NOISES):
        both = []
        for x in (q, k):
            noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
            both.append(x.double() * (1 + half * (2 * noise - 1)))
        yield both[0], both[1]


def gate_mass(q: Tensor, k: Tensor, config: XAttentionConfig, impl: str, slack: float = 0.01) -> Row:
    """Hold XAttention to the float64 reference with a threshold ``slack`` lower and higher.

    Every row must keep at least ``threshold - slack`` of the exact score mass, in a number of blocks between those that
    the exact selection needs at the threshold minus and plus ``slack``.

    Raises:
        ArithmeticError: A row keeps too little or too much.
    """
    mask = xattention(q, k, config, impl=impl)
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
    return {"mass": [round(least, 4), target - slack]}
