"""Long-context retrieval questions over real text: does a model still find what it needs when attention is sparse?

Everything is bytes: token ids 0..255 are themselves, 256 begins a document, and no tokenizer file is needed. A text
holds *items*,

    `` The magic number for kexaru is 4839201.``

A *needle* is the first item with a key. A *question* is a later item with the same key, and its seven digits are the
answer, which nothing but the needle predicts. Because answers are given inside the text, one teacher-forced prefill
scores every question of a prompt. The kinds of task:

- ``single``: one needle, one question at the end;
- ``multikey``: many needles, one question at the end;
- ``multiquery``: many needles, several questions at the end;
- ``stream``: questions spread through the text, each about any earlier needle. The one to judge sparse prefill by:
  questions at the end sit in the last rows of blocks and flatter every method that keeps those dense;
- ``vt`` (variable tracking): `` ... for mozive is @kexaru.`` points to another key, whose number is asked next: two
  hops.

Held out from training (split ``"train"``) and used for evaluation (split ``"eval"``): a tenth of the keys, a tenth of
the values (digit sum divisible by ten), and the help topics that the filler is taken from (of which about 8 % is
repeated in other topics). Positions are drawn anew for every sample; where questions come last, needles thin out
towards the end of the filler. The evaluation filler is shipped (``text/python_reference.txt``, under the Python licence
beside it), so that one seed gives the same prompts on every machine; the training filler comes from the running
Python's own documentation.

The tasks follow needle-in-a-haystack practice (RULER, Hsieh et al. 2024), made small enough for a model of 3 M
parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.testing.filler import Split, filler

BOS, EOS, VOCAB_SIZE = 256, 257, 264
KEY_LENGTH, VALUE_LENGTH = 6, 7
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"

#: What a token is to the model: filler to predict, something unpredictable, or a byte of an answer.
FILLER, UNPREDICTABLE, ANSWER = 0, 1, 2

Placement = Literal["end", "stream", "vt"]


@dataclass(frozen=True)
class ItemForm:
    """How an item is written: ``before + key + between + value + "."``."""

    before: str
    between: str

    @property
    def value_offset(self) -> int:
        return len(self.before) + KEY_LENGTH + len(self.between)

    @property
    def length(self) -> int:
        return self.value_offset + VALUE_LENGTH + 1


LONG_FORM = ItemForm(" The magic number for ", " is ")
SHORT_FORMS = (ItemForm(" ", ":"), ItemForm(" ", " is "))


@dataclass(frozen=True)
class RetrievalTask:
    """How many needles and questions a prompt holds, and where the questions stand.

    Attributes:
        name: For tables and messages.
        num_keys: Needles in a prompt (for ``vt`` half of them are pointers, so an even number).
        num_questions: Questions in a prompt; for ``vt`` twice the number of pointers asked about (a pointer, then its
            number).
        placement: ``"end"`` (all questions last), ``"stream"`` (mixed with the needles) or ``"vt"`` (pointer chains,
            asked last).
    """

    name: str
    num_keys: int
    num_questions: int
    placement: Placement = "end"

    def __post_init__(self) -> None:
        if self.placement not in ("end", "stream", "vt"):
            raise argument_error("placement", "'end', 'stream' or 'vt'", repr(self.placement))
        if self.num_keys < 1 or self.num_questions < 1:
            raise argument_error("num_keys, num_questions", "at least 1 each", (self.num_keys, self.num_questions))
        odd = self.num_keys % 2 or self.num_questions % 2
        if self.placement == "vt" and (odd or self.num_questions > self.num_keys):
            raise argument_error(
                "num_keys, num_questions",
                "even numbers with num_questions <= num_keys for placement 'vt'",
                (self.num_keys, self.num_questions),
            )

    @classmethod
    def named(cls, name: str, length: int) -> RetrievalTask:
        """The evaluation task `name` at its usual size for `length` tokens: about one needle per 128 tokens."""
        if name not in TASKS:
            raise argument_error("task", f"one of {', '.join(TASKS)}", repr(name))
        n = max(2, length // 128)
        half = max(2, n // 2)
        return {
            "single": cls("single", 1, 1),
            "multikey": cls("multikey", n, 1),
            "multiquery": cls("multiquery", half, max(1, min(16, n // 4))),
            "stream": cls("stream", n, n, "stream"),
            "vt": cls("vt", max(2, min(16, n // 2)) // 2 * 2, 2, "vt"),
        }[name]


TASKS = ("single", "multikey", "multiquery", "stream", "vt")


class RetrievalBatch(NamedTuple):
    """Prompts with their answers in place.

    Attributes:
        tokens: int64 [B, L], beginning with ``BOS``.
        roles: int64 [B, L], ``FILLER``, ``UNPREDICTABLE`` or ``ANSWER`` for every token.
        question_starts: int64 [B, Q], where each question begins.
        question_length: Tokens from there that hold the whole question (two items for ``vt``).
    """

    tokens: Tensor
    roles: Tensor
    question_starts: Tensor
    question_length: int

    def to(self, device: torch.device | str) -> RetrievalBatch:
        """The same prompts on a device."""
        tokens, roles, starts = (t.to(device) for t in (self.tokens, self.roles, self.question_starts))
        return RetrievalBatch(tokens, roles, starts, self.question_length)

    def rows(self, first: int, end: int) -> RetrievalBatch:
        """Some of the prompts."""
        tokens, roles, starts = (t[first:end] for t in (self.tokens, self.roles, self.question_starts))
        return RetrievalBatch(tokens, roles, starts, self.question_length)


class ExactMatch(NamedTuple):
    """How many questions were answered with every byte right."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{self.correct}/{self.total}"


def encode(text: str) -> Tensor:
    """The token ids of a text, int64 [1, 1 + bytes], ``BOS`` first."""
    return torch.tensor([[BOS, *text.encode("utf-8")]])


def decode(tokens: Tensor) -> str:
    """The text of one row of token ids [L]; ids past 255 are left out."""
    return bytes(t for t in tokens.tolist() if t < 256).decode("utf-8", errors="replace")


def make_batch(
    task: RetrievalTask | str,
    length: int,
    batch_size: int = 1,
    *,
    seed: int = 0,
    split: Split = "eval",
    form: ItemForm = LONG_FORM,
    generator: torch.Generator | None = None,
) -> RetrievalBatch:
    """Draw prompts of a task.

    Args:
        task: A task, or the name of one (then sized by ``RetrievalTask.named``).
        length: Tokens in every prompt.
        batch_size: Prompts.
        seed: Row b depends on (seed, b) alone, not on `batch_size` or the device: drawn on the CPU.
        split: ``"eval"`` for held-out keys, values and text; ``"train"`` for the rest.
        form: How items are written. Evaluation uses the long form.
        generator: Draw the whole batch from it, on its device, instead of from `seed` (fast, for training).

    Returns:
        The batch, on the generator's device (the CPU when `seed` is used).

    Raises:
        ValueError: When the items do not fit into `length`, or a name is unknown.
    """
    if split not in ("train", "eval"):
        raise argument_error("split", "'train' or 'eval'", repr(split))
    if isinstance(task, str):
        task = RetrievalTask.named(task, length)
    needed = 1 + form.length * (task.num_keys + task.num_questions)
    if length < needed:
        raise argument_error("length", f"at least {needed} for task {task.name!r}", length, "Ask for fewer items.")
    if generator is not None:
        return _draw(task, length, batch_size, split, form, generator)
    rows = [
        _draw(task, length, 1, split, form, torch.Generator().manual_seed(seed * 1_000_003 + row))
        for row in range(batch_size)
    ]
    return RetrievalBatch(
        torch.cat([row.tokens for row in rows]),
        torch.cat([row.roles for row in rows]),
        torch.cat([row.question_starts for row in rows]),
        rows[0].question_length,
    )


def questions_right(predictions: Tensor, batch: RetrievalBatch) -> Tensor:
    """Which questions were answered with every byte right.

    Args:
        predictions: int64 [B, L], at t the model's most likely token to follow token t.
        batch: The prompts, on the same device.

    Returns:
        bool [B, Q].
    """
    wrong = (predictions[:, :-1] != batch.tokens[:, 1:]) & (batch.roles[:, 1:] == ANSWER)
    wrong_before = torch.nn.functional.pad(wrong.long().cumsum(1), (2, 0))  # [B, L + 1], misses among tokens < t
    ends = (batch.question_starts + batch.question_length).clamp(max=batch.tokens.shape[1])
    return wrong_before.gather(1, ends) == wrong_before.gather(1, batch.question_starts)


@torch.no_grad()
def exact_match(
    model: Callable[[Tensor], Any],
    task: RetrievalTask | str,
    length: int,
    *,
    num_samples: int = 16,
    seed: int = 0,
    batch_tokens: int = 65536,
    device: torch.device | str | None = None,
) -> ExactMatch:
    """Score a model on held-out prompts: an answer counts when all its bytes are right.

    Args:
        model: From token ids int64 [B, L] to logits [B, L, V], or to something with ``.logits`` (Transformers models).
        task: A task, or the name of one.
        length: Tokens in every prompt.
        num_samples: Prompts; the same (seed, number) gives the same prompts everywhere.
        seed: Of the prompts.
        batch_tokens: At most this many tokens in one forward pass.
        device: Of the model; by default that of its first parameter.
    """
    if device is None:
        device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
    batch = make_batch(task, length, num_samples, seed=seed)
    correct = 0
    step = max(1, batch_tokens // length)
    for first in range(0, num_samples, step):
        part = batch.rows(first, first + step).to(device)
        output = model(part.tokens)
        logits: Tensor = getattr(output, "logits", output)
        correct += int(questions_right(logits.argmax(-1), part).sum())
    return ExactMatch(correct, batch.question_starts.numel())


def _draw(
    task: RetrievalTask, length: int, batch_size: int, split: Split, form: ItemForm, generator: torch.Generator
) -> RetrievalBatch:
    items, roles, is_question = _draw_items(task, batch_size, split, form, generator)
    starts, filler_from = _draw_places(task, length, is_question, split, form, generator)
    text, _ = filler(split, generator.device)

    # Every position either lies in the last item that starts at or before it, or in the filler between items.
    position = torch.arange(length, device=generator.device).expand(batch_size, length).contiguous()
    item = torch.searchsorted(starts, position, right=True) - 1  # [B, L], -1 before the first
    within = position - starts.gather(1, item.clamp(min=0))
    in_item = (item >= 0) & (within < form.length)
    flat = item.clamp(min=0) * form.length + within.clamp(0, form.length - 1)
    between = text[(filler_from[:, None] + position - 1 - form.length * (item + 1)).clamp(min=0)]
    tokens = torch.where(in_item, items.reshape(batch_size, -1).gather(1, flat), between)
    token_roles = torch.where(in_item, roles.reshape(batch_size, -1).gather(1, flat), FILLER)
    tokens[:, 0] = BOS
    token_roles[:, 0] = UNPREDICTABLE

    questions = starts[is_question].view(batch_size, task.num_questions)
    if task.placement == "vt":  # a pointer and the number it leads to are one question
        return RetrievalBatch(tokens, token_roles, questions[:, ::2], 2 * form.length)
    return RetrievalBatch(tokens, token_roles, questions, form.length)


def _draw_items(
    task: RetrievalTask, batch_size: int, split: Split, form: ItemForm, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The items in text order: bytes [B, M, T], roles [B, M, T], and which are questions, bool [B, M]."""
    device = generator.device
    num_keys, num_items = task.num_keys, task.num_keys + task.num_questions
    keys = _draw_keys(batch_size, num_keys, split, generator)
    values = _draw_values(batch_size, num_keys, split, generator)
    if task.placement == "stream":
        about, is_question = _stream_order(task, batch_size, generator)
    else:
        is_question = (torch.arange(num_items, device=device) >= num_keys).expand(batch_size, num_items)
        needle_order = _uniform((batch_size, num_keys), generator).argsort(1)
        if task.placement == "vt":
            values, asked = _chain(task, keys, values, generator)
        else:
            rounds = -(-task.num_questions // num_keys)
            shuffled = [_uniform((batch_size, num_keys), generator).argsort(1) for _ in range(rounds)]
            asked = torch.cat(shuffled, 1)[:, : task.num_questions]
        about = torch.cat([needle_order, asked], 1)  # [B, M], the key each item is about

    key_at, value_at = len(form.before), form.value_offset
    key_slice, value_slice = slice(key_at, key_at + KEY_LENGTH), slice(value_at, value_at + VALUE_LENGTH)
    template = f"{form.before}{'?' * KEY_LENGTH}{form.between}{'?' * VALUE_LENGTH}."
    items = torch.tensor(list(template.encode()), device=device).repeat(batch_size, num_items, 1)
    items[:, :, key_slice] = keys.gather(1, about.unsqueeze(-1).expand(-1, -1, KEY_LENGTH))
    items[:, :, value_slice] = values.gather(1, about.unsqueeze(-1).expand(-1, -1, VALUE_LENGTH))

    roles = torch.full_like(items, FILLER)
    roles[:, :, key_slice] = UNPREDICTABLE
    roles[:, :, value_slice] = torch.where(is_question, ANSWER, UNPREDICTABLE).unsqueeze(-1)
    if task.placement == "vt":  # the pointer's answer says which key is asked next
        roles[:, num_keys + 1 :: 2, key_slice] = ANSWER
    return items, roles, is_question


def _stream_order(task: RetrievalTask, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Needles and questions in random order, the first a needle, each question about any needle before it."""
    score = _uniform((batch_size, task.num_keys + task.num_questions), generator)
    score[:, 0] = -1
    is_question = score.argsort(1).argsort(1) >= task.num_keys
    needles_so_far = (~is_question).long().cumsum(1)
    asked = (_uniform(tuple(score.shape), generator) * needles_so_far).long()
    about = torch.where(is_question, torch.minimum(asked, needles_so_far - 1), needles_so_far - 1)
    return about, is_question


def _chain(task: RetrievalTask, keys: Tensor, values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make the second half of the keys pointers, "@" and a key of the first half; ask for pointer-target pairs."""
    batch_size, num_keys = keys.shape[:2]
    half = num_keys // 2
    target = _integers(half, (batch_size, half), generator)
    values = values.clone()
    values[:, half:, 0] = ord("@")
    values[:, half:, 1:] = keys.gather(1, target.unsqueeze(-1).expand(-1, -1, KEY_LENGTH))
    pointer = _uniform((batch_size, half), generator).argsort(1)[:, : task.num_questions // 2]
    asked = torch.stack([pointer + half, target.gather(1, pointer)], -1)
    return values, asked.reshape(batch_size, -1)


def _draw_places(
    task: RetrievalTask, length: int, is_question: Tensor, split: Split, form: ItemForm, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Where items start, int64 [B, M], ascending and at word ends, and where in the text the filler begins, [B]."""
    batch_size, num_items = is_question.shape
    room = length - 1 - form.length * num_items  # filler tokens
    text, next_space = filler(split, generator.device)
    filler_from = _integers(len(text) - length - 200, (batch_size,), generator)
    offset = (_uniform((batch_size, num_items), generator) * (room + 1)).long().sort(1).values
    offset = (next_space[filler_from[:, None] + offset] - filler_from[:, None]).clamp(max=room)
    if task.placement != "stream":
        offset = torch.where(is_question, room, offset)
    return (1 + offset + form.length * torch.arange(num_items, device=offset.device)).contiguous(), filler_from


def _draw_keys(batch_size: int, num_keys: int, split: Split, generator: torch.Generator) -> Tensor:
    """Keys of three syllables, bytes [B, K, 6]; a key whose syllable numbers sum to a multiple of ten is held out."""
    shape = (batch_size, num_keys)
    first, second = _integers(100, shape, generator), _integers(100, shape, generator)
    remainder = _integers(9, shape, generator) + 1 if split == "train" else torch.zeros_like(first)
    third = (remainder - first - second) % 10 + 10 * _integers(10, shape, generator)
    consonants = torch.tensor(list(CONSONANTS.encode()), device=generator.device)
    vowels = torch.tensor(list(VOWELS.encode()), device=generator.device)
    syllables = [part for s in (first, second, third) for part in (consonants[s // 5], vowels[s % 5])]
    return torch.stack(syllables, -1)


def _draw_values(batch_size: int, num_keys: int, split: Split, generator: torch.Generator) -> Tensor:
    """Values of seven digits, bytes [B, K, 7]; a value whose digit sum is a multiple of ten is held out."""
    digits = _integers(10, (batch_size, num_keys, VALUE_LENGTH), generator)
    remainder = digits.sum(-1) % 10
    shift = -remainder if split == "eval" else (remainder == 0).long()
    digits[..., -1] = (digits[..., -1] + shift) % 10
    return digits + ord("0")


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, device=generator.device, generator=generator)


def _integers(high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, high, shape, device=generator.device, generator=generator)
