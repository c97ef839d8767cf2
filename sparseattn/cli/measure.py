"""What the demo measures about one attention setting."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.cli.common import sparse
from sparseattn.masks import BlockMask
from sparseattn.testing.retrieval import ExactMatch, RetrievalBatch, make_batch, questions_right

if TYPE_CHECKING:
    from sparseattn.integrations.options import AttentionOptions


@dataclass(frozen=True)
class Setting:
    """A line of the table: dense attention (no options) or a method with its options.

    Attributes:
        method: Its name.
        label: What distinguishes the line.
        curve: Settings with the same one are joined in the picture.
        options: None for dense.
    """

    method: str
    label: str
    curve: str = ""
    options: AttentionOptions | None = None


class Prompts(NamedTuple):
    """What every setting is asked: prompts with questions throughout, and one with questions at the end."""

    stream: tuple[RetrievalBatch, ...]
    end: RetrievalBatch

    @classmethod
    def draw(cls, length: int, seed: int, device: torch.device, num_stream: int = 2) -> Prompts:
        stream = tuple(make_batch("stream", length, seed=seed + i).to(device) for i in range(num_stream))
        return cls(stream, make_batch("multiquery", length, seed=seed).to(device))


@dataclass
class Row:
    """One setting's results.

    Attributes:
        stream: Questions throughout the text.
        end: Questions at its end.
        density: Share of the causally visible blocks that was computed, mean over layers and heads.
        recall: Share of the attention mass on those blocks, mean over layers, heads and query rows.
        output_error: Relative L2 distance of attention outputs from dense ones on the same inputs, mean over layers.
        seconds: Prefill of the whole model, the fastest run.
        speedup: Dense seconds divided by these; None for dense.
        masks: By layer, kept when asked for.
    """

    setting: Setting
    stream: ExactMatch
    end: ExactMatch
    density: float
    recall: float
    output_error: float
    seconds: float
    speedup: float | None = None
    masks: dict[int, BlockMask] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.setting.method,
            "setting": self.setting.label,
            "options": None if self.setting.options is None else self.setting.options.to_dict(),
            "stream_correct": self.stream.correct,
            "stream_total": self.stream.total,
            "end_correct": self.end.correct,
            "end_total": self.end.total,
            "density": self.density,
            "recall": self.recall,
            "output_error": self.output_error,
            "prefill_seconds": self.seconds,
            "speedup": self.speedup,
        }


def measure(model: Any, setting: Setting, prompts: Prompts, keep_masks: bool = False) -> Row:
    """Run one setting: timed prefills first, then, apart from them, what they lost."""
    if setting.options is None:
        seconds, stream = time_prefill(model, prompts)
        return Row(setting, stream, _score(model, prompts.end), 1.0, 1.0, 0.0, seconds)
    from sparseattn.integrations.records import record

    with sparse(model, setting.options):
        seconds, stream = time_prefill(model, prompts)
        end = _score(model, prompts.end)
        with record(fidelity=True, masks=keep_masks) as calls:
            prefill(model, prompts.stream[0].tokens)
    row = Row(
        setting,
        stream,
        end,
        _mean(call.density for call in calls),
        _mean(call.recall for call in calls),
        _mean(call.output_error for call in calls),
        seconds,
    )
    if keep_masks:
        row.masks = {call.layer: call.mask for call in calls if call.mask is not None and call.layer is not None}
    return row


@torch.no_grad()
def prefill(model: Any, tokens: Tensor) -> Tensor:
    """One forward over the prompt; the most likely next tokens [B, L]."""
    return model(tokens, use_cache=False).logits.argmax(-1)


def time_prefill(model: Any, prompts: Prompts) -> tuple[float, ExactMatch]:
    """The fastest prefill over the stream prompts, and their answers."""
    on_gpu = prompts.end.tokens.is_cuda
    if on_gpu:  # kernels compile on the first call of a shape
        prefill(model, prompts.end.tokens)
    seconds, right = [], ExactMatch(0, 0)
    for batch in prompts.stream:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        predictions = prefill(model, batch.tokens)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        answers = questions_right(predictions, batch)
        right = ExactMatch(right.correct + int(answers.sum()), right.total + answers.numel())
    return min(seconds), right


def _score(model: Any, batch: RetrievalBatch) -> ExactMatch:
    answers = questions_right(prefill(model, batch.tokens), batch)
    return ExactMatch(int(answers.sum()), answers.numel())


def _mean(values: Any) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found)
