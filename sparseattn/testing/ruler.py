"""RULER's tasks that need no download, for any tokenizer: prompts in its formats, scored by its rule.

After RULER (Hsieh et al. 2024, arXiv:2404.06654) and the formats of its public repository, so that numbers can be put
beside published ones; the words that needles and lists are made of are our own, since RULER's come with a package.

================  ====================================================================================
task              what it asks
================  ====================================================================================
niah_single_1     one key and number in repeated noise
niah_multikey_2   one of the keys of a text that is nothing but keys and numbers
niah_multikey_3   the same with UUIDs for both
vt                all variables of a chain of assignments in noise (one worked example before it)
cwe               the ten words that a numbered list repeats most (one worked example before it)
fwe               the three most frequent coded words, drawn by a power law, dots aside
================  ====================================================================================

Lengths are counted by a function from text to tokens, the answer's tokens included, and are reached from below.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sparseattn.errors import argument_error
from sparseattn.testing.filler import held_out_text

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."

_ANSWER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}
_NIAH = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)
_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {query}, they are: "
)
_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)

Count = Callable[[str], int]


class Sample(NamedTuple):
    """A prompt and what its answer must contain.

    Attributes:
        prompt: Text, the beginning of the answer included.
        outputs: Strings; the score is the share of them that an answer holds.
        depth: Where the needle begins, as a share of the prompt's characters; None for tasks without one.
    """

    prompt: str
    outputs: tuple[str, ...]
    depth: float | None = None


def answer_tokens(task: str) -> int:
    """Tokens that RULER lets an answer have.

    Raises:
        ValueError: No such task.
    """
    _check(task)
    return _ANSWER_TOKENS[task.split("_")[0]]


def string_match_all(answer: str, outputs: Sequence[str]) -> float:
    """Share of the expected strings that an answer contains, whatever their case."""
    return sum(expected.lower() in answer.lower() for expected in outputs) / len(outputs)


def make_samples(task: str, length: int, count: Count, *, num_samples: int = 1, seed: int = 0) -> list[Sample]:
    """Draw prompts of a task, as long as ``length`` allows.

    Args:
        task: One of ``TASKS``.
        length: Tokens of a prompt and its answer, at most.
        count: From a text to its number of tokens.
        num_samples: Prompts.
        seed: Sample i depends on (seed, i) alone.

    Raises:
        ValueError: An unknown task, or a length that not even the smallest prompt fits.
    """
    _check(task)
    room = length - answer_tokens(task)
    family = task.split("_")[0]

    def sample(index: int, size: int) -> Sample:
        return _DRAW[family](task, random.Random(f"{task} {seed} {index}"), size, length < 4096)

    def tokens(index: int, size: int) -> int:
        return count(sample(index, size).prompt)

    def size_of(index: int) -> int:
        least = _LEAST[family]
        base = tokens(index, least)
        if base > room:
            needed = base + answer_tokens(task)
            raise argument_error("length", f"at least {needed} for task {task!r} with this tokenizer", length)
        slope = max((tokens(index, least + 64) - base) / 64, 0.1)
        guess = least + int((room - base) / slope)
        return _largest(lambda size: tokens(index, size) <= room, least, guess)

    return [sample(index, size_of(index)) for index in range(num_samples)]


def _largest(fits: Callable[[int], bool], least: int, guess: int) -> int:
    """The largest size from ``least``, which fits, on that fits too; a good guess takes few questions."""
    low, step = guess, 1
    while low > least and not fits(low):
        low, step = max(least, low - step), 2 * step
    if step > 1:
        high = low + step
    else:
        while fits(low + step):
            low, step = low + step, 2 * step
        high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check(task: str) -> None:
    if task not in TASKS:
        raise argument_error("task", f"one of {', '.join(TASKS)}", repr(task))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """English words of the shipped text, of four to ten letters, in alphabetical order."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,10}\b", held_out_text().decode("ascii")))))


def _words(rng: random.Random, number: int) -> list[str]:
    """Different words: English ones, then, for lists longer than the vocabulary, ones made of syllables."""
    known = vocabulary()
    drawn = rng.sample(known, min(number, len(known)))
    seen = set(known)
    while len(drawn) < number:
        word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(3, 4)))
        if word not in seen:
            seen.add(word)
            drawn.append(word)
    return drawn


def _draw_one(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return "-".join(rng.sample(vocabulary(), 2))


def _draw_niah(task: str, rng: random.Random, size: int, short: bool) -> Sample:
    keys, values = ("uuids", "uuids") if task == "niah_multikey_3" else ("words", "numbers")
    key, value = _draw_one(keys, rng), _draw_one(values, rng)

    def sentence(k: str, v: str) -> str:
        return NEEDLE.format(kind=values, key=k, value=v)

    if task == "niah_single_1":
        sentences = [NOISE] * size
    else:
        sentences = [sentence(_draw_one(keys, rng), _draw_one(values, rng)) for _ in range(size)]
    needle = sentence(key, value)
    sentences.insert(rng.randint(0, size), needle)
    prompt = _NIAH.format(kind=values[:-1], context="\n".join(sentences), query=key)
    return Sample(prompt, (value,), prompt.index(needle) / len(prompt))


def _chain(rng: random.Random, size: int, letters: int, hops: int = 4) -> tuple[str, tuple[str, ...]]:
    """A prompt whose noise hides one chain of assignments, and the names in it."""
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
    sentences = [NOISE] * size
    # Ascending places keep the assignments in order.
    for shift, place in enumerate(sorted(rng.sample(range(size), len(chain)))):
        sentences.insert(place + shift, chain[shift])
    context = "\n".join(sentences).replace(". \n", ".\n")
    return _VT.format(context=context, query=value, count=len(names)), tuple(names)


def _draw_vt(task: str, rng: random.Random, size: int, short: bool) -> Sample:
    example, names = _chain(rng, 5, letters=3)
    prompt, outputs = _chain(rng, max(size, _LEAST["vt"]), letters=5)
    return Sample(f"{example}{' '.join(names)}\n{prompt}", outputs)


def _word_list(rng: random.Random, words: int, common: int, uncommon: int, num_common: int = 10) -> tuple[str, list]:
    drawn = _words(rng, words)
    listed = drawn[:num_common] * common + drawn[num_common:] * uncommon
    rng.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return _CWE.format(context=numbered), drawn[:num_common]


def _draw_cwe(task: str, rng: random.Random, size: int, short: bool) -> Sample:
    example, words = _word_list(rng, *((20, 3, 1) if short else (40, 10, 3)))
    prompt, outputs = _word_list(rng, max(size, _LEAST["cwe"]), *((6, 1) if short else (30, 3)))
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    return Sample(f"{example} {answer}\n{prompt}", tuple(outputs))


def _draw_fwe(task: str, rng: random.Random, size: int, short: bool) -> Sample:
    alpha = 2.0
    names: set[str] = set()
    # So many coded words at least, that the rarest of them come to less than one appearance.
    number = max(8, int(size**0.5) + 1)
    while len(names) < number:
        names.add("".join(rng.choices(string.ascii_lowercase, k=6)))
    words = ["...", *rng.sample(sorted(names), number)]
    zeta = 1.6449340668482264  # of 2
    counts = [int(max(size, _LEAST["fwe"]) * rank**-alpha / zeta) for rank in range(1, len(words) + 1)]
    coded = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
    rng.shuffle(coded)
    return Sample(_FWE.format(context=" ".join(coded)), tuple(words[1:4]))


_DRAW = {"niah": _draw_niah, "vt": _draw_vt, "cwe": _draw_cwe, "fwe": _draw_fwe}
# The fewest sentences, words or appearances that a task can be made of.
_LEAST = {"niah": 0, "vt": 5, "cwe": 11, "fwe": 60}
