"""RULER's tasks: formats, lengths, answers that are there, scores."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sparseattn.testing import ruler
from sparseattn.testing.ruler import TASKS, answer_tokens, make_samples, string_match_all


def by_words(text: str) -> int:
    return len(text.split())


def by_bytes(text: str) -> int:
    return len(text.encode())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("count", "length"), [(by_words, 2500), (by_bytes, 9000)], ids=["words", "bytes"])
def test_prompts_are_as_long_as_allowed(task: str, count, length: int) -> None:
    room = length - answer_tokens(task)
    samples = make_samples(task, length, count, num_samples=3, seed=1)
    for sample in samples:
        assert 0.85 * room < count(sample.prompt) <= room
    assert len({sample.prompt for sample in samples}) == 3
    assert make_samples(task, length, count, num_samples=2, seed=1) == samples[:2]
    assert make_samples(task, length, count, seed=2)[0] != samples[0]


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_a_needle_answers_its_question_alone(task: str) -> None:
    depths = []
    for sample in make_samples(task, 3000, by_words, num_samples=8):
        (value,) = sample.outputs
        kind = "uuid" if task.endswith("3") else "number"
        query = re.search(rf"What is the special magic {kind} for (\S+) mentioned", sample.prompt)[1]
        assert sample.prompt.startswith(f"A special magic {kind} is hidden within the following text.")
        assert sample.prompt.endswith(f" The special magic {kind} for {query} mentioned in the provided text is")
        needles = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", sample.prompt)
        assert [(f"{kind}s", query, value)] == [needle for needle in needles if needle[1] == query]
        assert (len(needles) == 1) == (task == "niah_single_1")
        assert re.fullmatch(r"\d{7}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", value)
        text = sample.prompt[int(sample.depth * len(sample.prompt) + 0.5) :]
        assert text.startswith(f"One of the special magic {kind}s for {query}")
        depths.append(sample.depth)
    assert max(depths) - min(depths) > 0.3


def test_a_chain_of_variables() -> None:
    for sample in make_samples("vt", 3000, by_words, num_samples=3):
        example, _, task = sample.prompt.partition("\nMemorize")
        assert example.count("VAR") == 9
        value = re.search(r"assigned the value (\d{5}) in the text", task)[1]
        assigned = {value}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", task):  # in the order of the text
            if source in assigned:
                assigned.add(name)
        assert assigned - {value} == set(sample.outputs)
        assert len(sample.outputs) == 5
        assert task.endswith(f"5 variables are assigned the value {value}, they are: ")


@pytest.mark.parametrize(("length", "common", "uncommon"), [(2000, 6, 1), (9000, 30, 3)])
def test_common_words(length: int, common: int, uncommon: int) -> None:
    (sample,) = make_samples("cwe", length, by_words)
    task = sample.prompt.split("Below is a numbered list of words.")[2].split("Question:")[0]
    listed = re.findall(r"\d+\. (\w+)", task)
    counts = Counter(listed)
    assert {word for word, times in counts.items() if times == common} == set(sample.outputs)
    assert set(counts.values()) == {common, uncommon}
    assert len(sample.outputs) == 10
    assert sample.prompt.count("The top 10 words that appear most often in the list are:") == 2
    answer = re.search(r"list are: (1\..*)\n", sample.prompt)[1]
    assert len(re.findall(r"\d+\. \w+", answer)) == 10


def test_frequent_words() -> None:
    (sample,) = make_samples("fwe", 4000, by_words)
    coded = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
    ranked = [word for word, _ in Counter(coded).most_common(5)]
    assert ranked[0] == "..."
    assert tuple(ranked[1:4]) == sample.outputs
    assert Counter(coded)[ranked[3]] > Counter(coded)[ranked[4]]


def test_lists_outgrow_the_vocabulary() -> None:
    import random

    number = len(ruler.vocabulary()) + 500
    words = ruler._words(random.Random(0), number)
    assert len(set(words)) == number


def test_scores() -> None:
    assert string_match_all("It is 123 and ABC.", ("123", "abc")) == 1
    assert string_match_all("It is 123.", ("123", "abc")) == 0.5
    assert string_match_all("", ("123",)) == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"task: expected one of niah_single_1, .*, got 'qa_1'"):
        make_samples("qa_1", 4096, by_words)
    for task in TASKS:
        with pytest.raises(ValueError, match=rf"length: expected at least \d+ for task '{task}'"):
            make_samples(task, answer_tokens(task) + 5, by_words)
