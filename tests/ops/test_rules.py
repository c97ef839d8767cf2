"""Selection rules: both implementations against a greedy loop over Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from scores_oracle import lists
from torch import Tensor

from sparseattn.ops.scores import choose_blocks
from sparseattn.ops.scores.rules import unsupported_reason
from sparseattn.ops.scores.rules_problem import Forced, Rule, list_bounds, list_width
from sparseattn.ops.sequences import resolve_sequences

both = pytest.mark.parametrize("impl", ["reference", "triton"])
RULES = {
    "relative": {"rule": "relative", "threshold": 0.3},
    "relative_all": {"rule": "relative", "threshold": 0.0},
    "relative_best": {"rule": "relative", "threshold": 1.0},
    "relative_free": {"rule": "relative_free", "threshold": 0.3},
    "relative_capped": {"rule": "relative", "threshold": 0.05, "max_blocks": 4},
    "cumulative": {"rule": "cumulative", "threshold": 0.6},
    "cumulative_none": {"rule": "cumulative", "threshold": 0.0},
    "cumulative_all": {"rule": "cumulative", "threshold": 1.0},
    "cumulative_capped": {"rule": "cumulative", "threshold": 0.9, "max_blocks": 3},
    "topk": {"rule": "topk", "num_blocks": 5},
    "topk_capped": {"rule": "topk", "num_blocks": 5, "max_blocks": 2},
    "topk_share": {"rule": "topk", "density": 0.3},
    "global": {"rule": "global", "threshold": 0.7},
    "global_all": {"rule": "global", "threshold": 0.0},
    "global_share": {"rule": "global", "density": 0.25},
    "global_everything": {"rule": "global", "density": 1.0},
}
rules = pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())


def run(impl: str, device: str, scores: Tensor, **options: object) -> list:
    scores = scores.to(device)
    reason = unsupported_reason(scores, impl)
    if reason is not None and device == "cpu":
        pytest.skip(reason)  # a machine with a GPU has no interpreter
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return lists(*choose_blocks(scores, impl=impl, **options))  # type: ignore[arg-type]


def greedy(
    row: list[float], visible: int, recent: int, sinks: int, rule: str, threshold: float = 0.1,
    density: float | None = None, num_blocks: int | None = None, max_blocks: int | None = None,
) -> list[int]:  # fmt: skip
    """One row by the rule's words; rule "global" with its density turned into a (log) threshold in ``cut``."""
    forced = [n for n in range(visible) if n < sinks or n >= recent]
    order = sorted(set(range(visible)) - set(forced), key=lambda n: (-row[n], n))
    p = [math.exp(x) for x in row]
    chosen: list[int] = []
    if rule == "topk":
        budget = num_blocks or max(1, min(visible, math.floor(density * visible + 0.5)))
        chosen = order[: max(0, budget - len(forced))]
    elif rule == "cumulative":
        mass, need = math.fsum(p[n] for n in forced), threshold * math.fsum(p[:visible])
        for n in order:
            if threshold < 1 and (mass >= need or p[n] == 0):
                break
            chosen.append(n)
            mass += p[n]
    else:
        rivals = {"relative": row[:visible], "relative_free": [row[n] for n in order], "global": [0.0]}[rule]
        best = max(rivals, default=-math.inf)
        cut = -math.inf if threshold == 0 else math.log(threshold) + best
        chosen = [n for n in order if row[n] >= cut and (row[n] > -math.inf or threshold == 0)]
    if not forced and not chosen:
        chosen = order[:1]
    if max_blocks is not None:
        chosen = chosen[: max(0, max_blocks - len(forced))]
    return sorted(forced + chosen)


def bounds(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows that see nothing, one block, some and all; with and without forced recent ones."""
    visible = torch.tensor([[0, 1, columns // 2, columns, columns][:rows]], dtype=torch.int32)
    return visible, torch.minimum(torch.tensor([[0, 1, columns // 2 - 1, columns, columns - 2][:rows]]), visible).int()


@both
@rules
@pytest.mark.parametrize("sinks", [0, 2])
def test_rules_follow_their_words(impl: str, options: dict, sinks: int, device: str) -> None:
    heads = 2 if impl == "reference" else 1  # the interpreter takes its time
    scores = torch.randn(2, heads, 5, 23).mul(2)
    scores[0, 0, 3, 4:9] = -math.inf
    scores[1, 0, 2] = -math.inf
    visible, recent = bounds(5, 23)
    got = run(impl, device, scores, visible=visible, recent=recent, num_sink_blocks=sinks, **options)
    for b in range(2):
        own = dict(options)
        if "density" in options and options["rule"] == "global":
            own = {"rule": "global", "threshold": share_threshold(scores[b], visible, recent, sinks, own["density"])}
        for h in range(heads):
            for m in range(5):
                row = scores[b, h, m].tolist()
                n, r = visible[0, m].item(), recent[0, m].item()
                assert got[b][h][m] == greedy(row, n, r, sinks, **own), (b, h, m)


def share_threshold(scores: Tensor, visible: Tensor, recent: Tensor, sinks: int, density: float) -> float:
    """The probability at which a sequence keeps its share, by sorting all free scores."""
    heads, rows, _ = scores.shape
    free, forced, total = [], 0, 0
    for h in range(heads):
        for m in range(rows):
            for n in range(visible[0, m].item()):
                total += 1
                if n < sinks or n >= recent[0, m]:
                    forced += 1
                else:
                    free.append(scores[h, m, n].item())
    count = math.floor(density * total + 0.5) - forced
    if count <= 0:
        return math.inf
    cut = sorted(free, reverse=True)[min(count, len(free)) - 1]
    return 0.0 if cut == -math.inf else math.exp(cut - 1e-9)


@both
def test_ties_go_to_the_lower_index(impl: str, device: str) -> None:
    scores = torch.zeros(1, 1, 1, 8)
    assert run(impl, device, scores, rule="topk", num_blocks=3) == [[[[0, 1, 2]]]]
    assert run(impl, device, scores, rule="cumulative", threshold=0.5) == [[[[0, 1, 2, 3]]]]
    assert run(impl, device, scores, rule="relative", threshold=1.0) == [[[list(range(8))]]]
    assert run(impl, device, scores, rule="relative", threshold=1.0, max_blocks=2) == [[[[0, 1]]]]
    scores[..., 3] = -0.0  # orders like 0.0
    assert run(impl, device, scores, rule="topk", num_blocks=5) == [[[[0, 1, 2, 3, 4]]]]


@both
def test_rows_without_a_score(impl: str, device: str) -> None:
    scores = torch.full((1, 1, 2, 4), -math.inf)
    visible = torch.tensor([[3, 0]], dtype=torch.int32)
    for options in ({"rule": "relative"}, {"rule": "cumulative", "threshold": 0.9}, {"rule": "global"}):
        assert run(impl, device, scores, visible=visible, **options) == [[[[0], []]]]
    assert run(impl, device, scores, visible=visible, rule="topk", num_blocks=2) == [[[[0, 1], []]]]
    assert run(impl, device, scores, visible=visible, rule="relative", num_sink_blocks=2) == [[[[0, 1], []]]]


@both
def test_thresholds_per_head(impl: str, device: str) -> None:
    scores = torch.tensor([4.0, 2.0, 1.0]).log().expand(1, 2, 1, 3)
    assert run(impl, device, scores, rule="relative", threshold=(0.2, 0.4)) == [[[[0, 1, 2]], [[0, 1]]]]


@both
@pytest.mark.parametrize("columns", [1, 1024, 1025, 2100])
def test_rows_longer_than_a_tile(impl: str, columns: int, device: str) -> None:
    scores = torch.randn(1, 1, 2, columns)
    for options in ({"rule": "topk", "density": 0.1}, {"rule": "relative", "threshold": 0.05}):
        got = run(impl, device, scores, **options)[0][0]
        for m in range(2):
            assert got[m] == greedy(scores[0, 0, m].tolist(), columns, columns, 0, **options)


def test_float64_scores_stay_with_the_reference() -> None:
    with pytest.raises(ValueError, match=r"impl: .*float32 scores"):
        choose_blocks(torch.ones(1, 1, 1, 2, dtype=torch.float64), impl="triton")


@pytest.mark.parametrize("forced", [Forced(), Forced(100, 200), Forced(1, None), Forced(0, 70, 65)], ids=str)
@pytest.mark.parametrize(("sq", "sk"), [(300, 300), (130, 301), (1, 200), (200, 70)])
def test_forced_blocks_hold_the_forced_tokens(forced: Forced, sq: int, sk: int) -> None:
    q, k = torch.zeros(1, sq, 1, 16), torch.zeros(1, sk, 1, 16)
    visible, recent, sinks, whole = list_bounds(resolve_sequences(q, k), 64, True, forced, q.device)
    widest = 0
    for m in range(-(-sq // 64)):
        diagonals = [i + sk - sq for i in range(m * 64, min(m * 64 + 64, sq))]
        seen = diagonals[-1] // 64 + 1 if diagonals[-1] >= 0 else 0
        must = {n for n in range(seen) if n * 64 < forced.sink_tokens}
        if forced.local_tokens is not None:
            must |= {j // 64 for d in diagonals for j in range(max(0, d - forced.local_tokens), d + 1)}
        if m * 64 + 64 > sq - forced.last_tokens and forced.last_tokens:
            must = set(range(seen))
        assert visible[0, m] == seen
        if whole is not None and whole[0, m]:
            recent[0, m] = 0
        assert {n for n in range(seen) if n < sinks or n >= recent[0, m]} == must
        widest = max(widest, len(must))
    assert widest <= list_width(-(-sk // 64), Rule("topk", num_blocks=1), True, forced, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule: expected one of"),
        ({"threshold": 1.5}, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ({"threshold": math.nan}, r"threshold: expected a number in \[0, 1\], got nan"),
        ({"threshold": (0.5, 0.5, 0.5)}, "threshold: expected a number or 2 numbers"),
        ({"density": 0.5}, "density: expected None with rule 'relative', got 0.5. Use rule='topk' or 'global'"),
        ({"rule": "topk"}, "num_blocks: expected one of num_blocks and density with rule 'topk', got neither"),
        ({"rule": "topk", "density": 0.1, "num_blocks": 3}, "with rule 'topk', got both"),
        ({"rule": "topk", "num_blocks": 0}, "num_blocks: expected an int of at least 1, .*must select something"),
        ({"rule": "topk", "density": 0.0}, r"density: expected a number in \(0, 1\]"),
        ({"rule": "global", "density": math.nan}, r"density: expected a number in \(0, 1\]"),
        ({"rule": "global", "num_blocks": 3}, "num_blocks: expected None with rule 'global'"),
        ({"max_blocks": -1}, "max_blocks: expected an int of at least 1"),
        ({"num_sink_blocks": -1}, "num_sink_blocks: expected an int >= 0"),
        ({"recent": torch.zeros(1, 2, dtype=torch.int32)}, r"recent: expected shape \(1, 3\)"),
        ({"impl": "cuda"}, "impl: expected one of"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_blocks(torch.zeros(1, 2, 3, 4), **options)


def test_bad_tensors() -> None:
    with pytest.raises(ValueError, match="scores: expected a 4-D tensor"):
        choose_blocks(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="scores: expected a floating-point tensor"):
        choose_blocks(torch.zeros(1, 2, 3, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="visible: expected int32"):
        choose_blocks(torch.zeros(1, 2, 3, 4), visible=torch.zeros(1, 3))
