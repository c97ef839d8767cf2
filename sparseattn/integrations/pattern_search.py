"""Which pattern fits each head of a model: MInference's offline search (arXiv:2407.02490, section 3), for any model.

A prompt runs through the model once, densely. In every layer each candidate pattern is tried on the layer's own queries
and keys, scored by the attention mass that it keeps. The result is what ``MInferenceConfig(patterns=...)`` takes and
``minference_patterns.save`` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseattn import fidelity
from sparseattn.errors import argument_error
from sparseattn.integrations.observe import LayerCall, observed
from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.selectors import minference_patterns
from sparseattn.selectors.minference import MInferenceConfig, minference

#: Candidates of about equal cost at MInference's prompt lengths; its published search draws on the same.
CANDIDATES: tuple[minference_patterns.Pattern, ...] = (
    ("a_shape", 100, 800),
    ("vertical_slash", 30, 800),
    ("vertical_slash", 100, 750),
    ("vertical_slash", 500, 700),
    ("vertical_slash", 3500, 100),
    ("vertical_slash", 1000, 6096),
    ("block_sparse", 100),
)

_VALUE_DIM = 16  # the mass does not depend on the values: the narrowest the operator takes


class HeadChoice(NamedTuple):
    """The pattern of one head, and what it kept of the prompt.

    Attributes:
        pattern: The winner.
        recall: Mean share of attention mass it keeps, over the scored rows.
        density: Share of the visible blocks it lists.
    """

    pattern: minference_patterns.Pattern
    recall: float
    density: float


def score_patterns(
    q: Tensor,
    k: Tensor,
    candidates: Sequence[Any] = CANDIDATES,
    *,
    config: MInferenceConfig | None = None,
    first_row: int = 0,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What each candidate pattern keeps of each head's attention mass.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k: ``[B, Sk, Hkv, D]``.
        candidates: Patterns, as ``minference_patterns`` writes them.
        config: The other options of the method; default ``MInferenceConfig()``.
        first_row: Rows before it do not count: early ones are easy for every pattern.
        causal: Bottom-right aligned causality.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        softcap: Of the scores whose mass is kept; choosing knows none.
        impl: As the operator takes it.

    Returns:
        ``recall`` and ``density``, float32 ``[candidates, Hq]`` each, means over the batch.

    Raises:
        ValueError: No candidates, a bad one, or no row left to score.
    """
    base = MInferenceConfig() if config is None else config
    if not candidates:
        raise argument_error("candidates", "at least one pattern", "none")
    if not 0 <= first_row < q.shape[1]:
        raise argument_error("first_row", f"an int in [0, {q.shape[1]})", first_row)
    options: dict[str, Any] = {"causal": causal, "scale": scale, "impl": impl}
    v = k[..., :_VALUE_DIM]
    _, dense = block_sparse_attention(q, k, v, None, return_lse=True, softcap=softcap, **options)
    recalls, densities = [], []
    for pattern in candidates:
        mask = minference(q, k, replace(base, patterns=pattern, group_shared=False), **options)
        _, lse = block_sparse_attention(q, k, v, mask, return_lse=True, softcap=softcap, **options)
        kept = torch.exp(-fidelity.deficit_from_lse(lse, dense))[..., first_row:]
        recalls.append(kept.nanmean((0, 2)))  # rows that see no key have no mass to keep
        densities.append(mask.densities().mean(0).expand(q.shape[2]))
    return torch.stack(recalls), torch.stack(densities)


def choose_patterns(
    candidates: Sequence[Any], recall: Tensor, density: Tensor, min_recall: float | None = None
) -> tuple[HeadChoice, ...]:
    """The pattern of each head from what :func:`score_patterns` found.

    Without ``min_recall`` the one that keeps most wins, as in MInference; with it the sparsest that keeps as much, and
    where none does the one that keeps most. Equal ones: the sparser, then the earlier.

    Args:
        candidates: Patterns.
        recall: ``[candidates, Hq]``.
        density: ``[candidates, Hq]``.
        min_recall: A share in [0, 1], or None.

    Raises:
        ValueError: ``min_recall`` out of range.
    """
    if min_recall is not None and not 0 <= min_recall <= 1:
        raise argument_error("min_recall", "a share in [0, 1], or None", min_recall)
    chosen = []
    for kept, cost in zip(recall.t().tolist(), density.t().tolist(), strict=True):

        def order(i: int, kept: list[float] = kept, cost: list[float] = cost) -> tuple[float, float, float]:
            enough = min_recall is not None and kept[i] >= min_recall
            return (0.0, cost[i], -kept[i]) if enough else (1.0, -kept[i], cost[i])

        best = min(range(len(candidates)), key=order)
        pattern = minference_patterns.freeze(candidates[best])
        chosen.append(HeadChoice(pattern, kept[best], cost[best]))
    return tuple(chosen)


@torch.no_grad()
def search_patterns(
    model: nn.Module,
    input_ids: Tensor,
    candidates: Sequence[Any] = CANDIDATES,
    *,
    config: MInferenceConfig | None = None,
    first_row: int | None = None,
    min_recall: float | None = None,
    impl: str = "auto",
    **inputs: Any,
) -> tuple[tuple[HeadChoice, ...], ...]:
    """The pattern of every head of a Transformers model, from one prompt.

    Layers whose sliding window hides keys stay dense (their window is cheap already), and so do layers that call no
    attention function.

    Example:
        >>> found = search_patterns(model, tokenizer(long_text, return_tensors="pt").input_ids)
        >>> patterns = [[head.pattern for head in layer] for layer in found]
        >>> minference_patterns.save(patterns, "my_model.json")

    Args:
        model: Any model that takes its attention from Transformers' registry.
        input_ids: ``[B, S]``, prompts without padding. What is retrieved from afar in them decides: MInference uses
            key-value retrieval of about 30K tokens.
        candidates: As :func:`score_patterns`; every one is tried in every layer.
        config: Likewise.
        first_row: Likewise; default 2500, or half of a shorter prompt.
        min_recall: As :func:`choose_patterns`.
        impl: As the operator takes it.
        **inputs: More arguments of ``model.forward``.

    Returns:
        ``[layers][query heads]``.

    Raises:
        ValueError: As :func:`score_patterns`; a model whose layers never called the attention function.
    """
    if input_ids.dim() != 2:
        raise argument_error("input_ids", "a 2-D tensor [batch, seq]", f"shape {tuple(input_ids.shape)}")
    first = min(2500, input_ids.shape[1] // 2) if first_row is None else first_row
    layers: dict[int, tuple[HeadChoice, ...]] = {}

    def visit(call: LayerCall) -> None:
        options: dict[str, Any] = {"config": config, "first_row": first, "impl": impl}
        options |= {"causal": call.causal, "scale": call.scale, "softcap": call.softcap}
        tried: Sequence[Any] = [("dense",)] if call.windowed else candidates
        scores = score_patterns(call.q, call.k, tried, **options)
        index: Any = call.layer
        layers[index] = choose_patterns(tried, *scores, min_recall)

    with observed(model, visit):
        model(input_ids=input_ids, use_cache=False, **inputs)
    if not layers:
        raise argument_error("model", "one that calls Transformers' attention functions", type(model).__name__)
    heads = len(next(iter(layers.values())))
    dense = (HeadChoice(("dense",), 1.0, 1.0),) * heads
    return tuple(layers.get(i, dense) for i in range(max(layers) + 1))
