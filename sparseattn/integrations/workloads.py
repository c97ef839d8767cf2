"""Workloads for ``evaluation``: the shipped retrieval models' own questions, and RULER's for any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparseattn.integrations.eval_rows import Score, depth_counts
from sparseattn.testing import retrieval, ruler

#: Prompts that only calibrate are drawn with seeds far from any that is scored.
CALIBRATION = 900_001


@dataclass(frozen=True)
class Retrieval:
    """Questions of ``testing.retrieval``, for models that read bytes; one teacher-forced pass scores a prompt.

    Attributes:
        task: One of ``retrieval.TASKS``.
        length: Tokens of a prompt.
        prompts: How many.
        seed: The prompt ``index`` is that of the seed ``seed + index``.
        device: Of the model.
    """

    task: str
    length: int
    prompts: int
    seed: int = 0
    device: str = "cpu"

    def batch(self, index: int) -> retrieval.RetrievalBatch:
        seed = self.seed + (CALIBRATION if index < 0 else index)
        return retrieval.make_batch(self.task, self.length, seed=seed)

    @torch.no_grad()
    def prefill(self, model: Any, index: int) -> None:
        model(self.batch(index).tokens.to(self.device), use_cache=False)

    @torch.no_grad()
    def score(self, model: Any, index: int) -> Score:
        batch = self.batch(index)
        logits = model(batch.tokens.to(self.device), use_cache=False).logits
        right = retrieval.questions_right(logits.argmax(-1).cpu(), batch)[0]
        return Score(int(right.sum()), right.numel(), depth_counts(right, needle_depths(batch)))


def needle_depths(batch: retrieval.RetrievalBatch) -> Tensor:
    """Where the needle of every question of a prompt begins, as a share of the prompt: float64 [Q]."""
    form, row = retrieval.LONG_FORM, bytes(min(t, 255) for t in batch.tokens[0].tolist())
    end = len(form.before) + retrieval.KEY_LENGTH
    # The first item with a key is its needle; for a pair of questions, that of the first.
    starts = [row.find(row[start : start + end]) for start in batch.question_starts[0].tolist()]
    return torch.tensor(starts, dtype=torch.float64) / len(row)


@dataclass(frozen=True)
class Ruler:
    """A task of ``testing.ruler``, for any model with a tokenizer; answers are generated greedily.

    Attributes:
        task: One of ``ruler.TASKS``.
        length: Tokens of a prompt with its answer, at most.
        prompts: How many.
        encode: From a text to token ids int64 [1, L].
        decode: From token ids [L] to a text.
        seed: Of the prompts.
        device: Of the model.
        max_new_tokens: Tokens of an answer; None: as RULER has them.
    """

    task: str
    length: int
    prompts: int
    encode: Callable[[str], Tensor]
    decode: Callable[[Tensor], str]
    seed: int = 0
    device: str = "cpu"
    max_new_tokens: int | None = None

    @cached_property
    def samples(self) -> list[ruler.Sample]:
        """The scored prompts, and last the one that calibrates."""

        def count(text: str) -> int:
            return self.encode(text).shape[1]

        scored = ruler.make_samples(self.task, self.length, count, num_samples=self.prompts, seed=self.seed)
        return [*scored, *ruler.make_samples(self.task, self.length, count, seed=self.seed + CALIBRATION)]

    def tokens(self, index: int) -> Tensor:
        return self.encode(self.samples[index].prompt).to(self.device)

    @torch.no_grad()
    def prefill(self, model: Any, index: int) -> None:
        model(self.tokens(index), use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def score(self, model: Any, index: int) -> Score:
        sample, tokens = self.samples[index], self.tokens(index)
        end = model.generation_config.eos_token_id
        pad = model.generation_config.pad_token_id
        answer = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=self.max_new_tokens or ruler.answer_tokens(self.task),
            do_sample=False,
            pad_token_id=pad if pad is not None else end[0] if isinstance(end, list) else end or 0,
        )
        found = ruler.string_match_all(self.decode(answer[0, tokens.shape[1] :]), sample.outputs)
        depths = None
        if sample.depth is not None:
            depths = depth_counts(torch.tensor([found]), torch.tensor([sample.depth]))
        return Score(found, 1, depths)
