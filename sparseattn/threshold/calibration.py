"""Fit thresholds per layer and head so that every head keeps a share of its attention mass, and no more than needed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn import fidelity, selectors
from sparseattn.calibrate import KNOBS, Knob
from sparseattn.errors import argument_error
from sparseattn.integrations.observe import LayerCall, observed
from sparseattn.threshold.tables import ThresholdTable

#: Methods whose knob may differ from head to head.
METHODS = ("xattention", "landmark", "flashprefill")
STATISTICS = ("mean", "p05")
# Options under which the knob says nothing, or heads depend on each other.
_OTHER_BUDGETS = ("density", "num_blocks", "max_blocks", "group_shared")

# Of each layer, from 0 (keeps least) to 1 (keeps everything) for every query head; the first one tried.
Generosity = dict[int, list[float]]
_FIRST = 0.5


class _Head(NamedTuple):
    """What a setting did to one head, over all prompts."""

    recall: float
    density: float


def calibrate(
    model: Any,
    prompts: Sequence[Tensor],
    method: str = "xattention",
    *,
    target: float = 0.95,
    statistic: str = "mean",
    options: Mapping[str, Any] | None = None,
    steps: int = 8,
    name: str | None = None,
) -> ThresholdTable:
    """Find, for every query head, the leanest threshold with which every prompt keeps its recall.

    The model runs densely over the prompts, ``steps + 1`` times, while each attention layer's queries and keys are put
    to the selector; all heads are bisected at once. Memory beside the model's own grows with the length of a prompt,
    not with its square, and nothing is kept between layers. Layers whose sliding window hides keys are not fitted:
    they keep the most generous value. Deterministic.

    Args:
        model: A causal language model of Transformers, on any device. Its attention implementation is put back.
        prompts: Token ids, int64 ``[B, L]`` each, without padding. They should be as long as what the model will read:
            a head's mass spreads as the context grows.
        method: ``"xattention"`` (its ``threshold``), ``"landmark"`` (``tau``) or ``"flashprefill"`` (``threshold``).
        target: Recall of attention mass in (0, 1] that every head reaches on every prompt.
        statistic: Which recall: ``"mean"`` over a prompt's rows, or ``"p05"``, which nineteen of twenty rows reach.
        options: Other options of the method.
        steps: Bisections; thresholds are found to ``2 ** -steps`` of their range.
        name: The model's name in the table; default ``model.config._name_or_path``.

    Returns:
        The table, with the recall and the density it was measured to give.

    Raises:
        TypeError: Prompts that are no token ids.
        ValueError: A method without such an option, a target or statistic that does not exist, no prompts, or a model
            whose layers differ in their number of heads.
    """
    own = dict(options or {})
    _check_arguments(method, target, statistic, steps, own)
    _check_prompts(prompts)
    knob = KNOBS[method]
    # How generous a head must be lies between these. Heads are known once their layers have been seen.
    low: Generosity = {}
    high: Generosity = {}
    for _ in range(steps):
        middle = {layer: [(a + b) / 2 for a, b in zip(low[layer], high[layer], strict=True)] for layer in low}
        for layer, heads in _measure(model, prompts, method, own, middle, statistic).items():
            tried = middle.get(layer, [_FIRST] * len(heads))
            low.setdefault(layer, [0.0] * len(heads))
            high.setdefault(layer, [1.0] * len(heads))
            for h, head in enumerate(heads):
                (high if head.recall >= target else low)[layer][h] = tried[h]
    found = [head for layer in _measure(model, prompts, method, own, high, statistic).values() for head in layer]
    measured = {
        "prompts": [list(prompt.shape) for prompt in prompts],
        "recall": round(sum(head.recall for head in found) / len(found), 4),
        "lowest_recall": round(min(head.recall for head in found), 4),
        "density": round(sum(head.density for head in found) / len(found), 4),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    values = _values(high, knob, model.config.get_text_config())
    title = name if name is not None else str(getattr(model.config, "_name_or_path", ""))
    return ThresholdTable(title, method, knob.option, values, own, float(target), statistic, measured)


def _check_arguments(method: str, target: float, statistic: str, steps: int, own: Mapping[str, Any]) -> None:
    if method not in METHODS:
        raise argument_error("method", f"one of {', '.join(METHODS)}", repr(method), "Others have no value per head.")
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise argument_error("target", "a recall in (0, 1]", repr(target))
    if statistic not in STATISTICS:
        raise argument_error("statistic", f"one of {STATISTICS}", repr(statistic))
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 20:
        raise argument_error("steps", "an int in [1, 20]", repr(steps))
    option = KNOBS[method].option
    for name in (option, *_OTHER_BUDGETS):
        if own.get(name) is not None and own[name] is not False:
            hint = f"What is fitted is {option}, for every query head by itself."
            raise argument_error(f"options[{name!r}]", "no value", own[name], hint)
    selectors.configure(method, own)


def _check_prompts(prompts: Sequence[Tensor]) -> None:
    if isinstance(prompts, Tensor) or len(prompts) == 0:
        raise argument_error("prompts", "a list of token tensors [B, L], at least one", repr(prompts)[:60])
    for prompt in prompts:
        if not isinstance(prompt, Tensor) or prompt.is_floating_point() or prompt.dim() != 2 or not prompt.numel():
            shown = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
            raise argument_error("prompts", "int64 token ids [B, L]", shown, kind=TypeError)


def _measure(
    model: Any,
    prompts: Sequence[Tensor],
    method: str,
    own: Mapping[str, Any],
    generosity: Generosity,
    statistic: str,
) -> dict[int, list[_Head]]:
    """Run all prompts densely and ask what each head would have kept: its worst prompt's recall, its mean density."""
    knob, select = KNOBS[method], selectors.get(method).select
    recalls: dict[int, list[Tensor]] = {}
    densities: dict[int, list[Tensor]] = {}

    def observe(call: LayerCall) -> None:
        if call.layer is None or call.windowed:
            return
        heads = call.q.shape[2]
        bounds: dict[str, Any] = {"causal": call.causal, "scale": call.scale}
        values = tuple(_value(knob, x) for x in generosity.get(call.layer, [_FIRST] * heads))
        config = selectors.configure(method, {**own, knob.option: values})
        mask = select(call.q, call.k, config, **bounds)
        rows = fidelity.recall(call.q, call.k, None, mask, **bounds, softcap=call.softcap)
        recalls.setdefault(call.layer, []).append(_of_heads(rows, statistic))
        densities.setdefault(call.layer, []).append(mask.expand_heads(heads).densities().mean(0))

    training = model.training
    # Logits of all tokens are the largest thing in a long run, and nobody reads them.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model.eval()
    try:
        with observed(model, observe), torch.no_grad():
            for prompt in prompts:
                model(prompt.to(model.device), use_cache=False, **last)
    finally:
        model.train(training)
    if not recalls:
        hint = "Every layer may have a sliding window, or the model its own attention."
        raise argument_error("model", "attention layers that see their whole context", "none", hint)
    found = {}
    for layer in sorted(recalls):
        worst = torch.stack(recalls[layer]).amin(0).tolist()
        kept = torch.stack(densities[layer]).mean(0).tolist()
        found[layer] = [_Head(*pair) for pair in zip(worst, kept, strict=True)]
    return found


def _value(knob: Knob, generosity: float) -> float:
    """The option's value, in the few digits that a table has; at 1 the one that keeps everything."""
    if generosity >= 1:
        return knob.high if knob.rising else 0.0
    return float(f"{knob.value(generosity):.6g}")


def _of_heads(recall: Tensor, statistic: str) -> Tensor:
    """The worst sequence's statistic of every head, [Hq], from recalls [B, Hq, Sq]."""
    if statistic == "mean":
        return recall.mean(-1).amin(0)
    return recall.kthvalue(-(-recall.shape[-1] // 20), dim=-1).values.amin(0)


def _values(high: Generosity, knob: Knob, config: Any) -> tuple[tuple[float, ...], ...]:
    """Values of all layers; the most generous one where a layer was not fitted."""
    heads = len(next(iter(high.values())))
    if any(len(row) != heads for row in high.values()):
        sizes = sorted({len(row) for row in high.values()})
        raise argument_error("model", "as many query heads in every layer", sizes, "A table has one number of them.")
    layers = max(getattr(config, "num_hidden_layers", 0), max(high) + 1)
    return tuple(tuple(_value(knob, x) for x in high.get(layer, [1.0] * heads)) for layer in range(layers))
