"""The retrieval data, and what the shipped models make of it."""

from __future__ import annotations

import re

import pytest
import torch

import sparseattn
from sparseattn import models
from sparseattn.testing import filler, retrieval
from sparseattn.testing.retrieval import (
    ANSWER,
    BOS,
    LONG_FORM,
    SHORT_FORMS,
    TASKS,
    UNPREDICTABLE,
    RetrievalTask,
    decode,
    encode,
    exact_match,
    make_batch,
    questions_right,
)

ITEM = re.compile(r"The magic number for ([a-z]{6}) is (\d{7}|@[a-z]{6})\.")


@pytest.fixture(autouse=True)
def _few_threads():
    """Small work gains nothing from threads and loses much where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=models.names())
def shipped(request: pytest.FixtureRequest):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        models.path(request.param), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


class TestGenerator:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("length", [512, 1000, 4096])
    def test_every_question_repeats_an_earlier_item(self, task: str, length: int) -> None:
        batch = make_batch(task, length, 4, seed=7)
        assert batch.tokens.shape == batch.roles.shape == (4, length)
        assert (batch.tokens[:, 0] == BOS).all()
        for row in range(4):
            text = "\0" + decode(batch.tokens[row])  # the null stands for BOS, so that places agree
            assert len(text) == length
            known = dict(reversed([(m[1], m[2]) for m in ITEM.finditer(text)]))
            for start in batch.question_starts[row].tolist():
                asked = ITEM.match(text, start + 1)
                assert asked is not None
                first = ITEM.search(text)
                assert first is not None
                assert first.start() < start
                assert f"for {asked[1]} is {asked[2]}." in text[:start]
                assert known[asked[1]] == asked[2]

    def test_answers_are_the_values_of_questions_only(self) -> None:
        batch = make_batch("stream", 2048, 2, seed=1)
        for row in range(2):
            marked = set(torch.where(batch.roles[row] == ANSWER)[0].tolist())
            places = [s + LONG_FORM.value_offset for s in batch.question_starts[row].tolist()]
            assert marked == {p + i for p in places for i in range(7)}

    def test_a_pointer_question_is_two_items(self) -> None:
        batch = make_batch("vt", 1024, seed=2)
        start = int(batch.question_starts[0, 0])
        text = decode(batch.tokens[0, start : start + batch.question_length])
        pointer, target = ITEM.findall(text)
        assert pointer[1] == "@" + target[0]
        assert target[1].isdigit()

    def test_stream_questions_are_spread_through_the_text(self) -> None:
        places = make_batch("stream", 4096, 8, seed=3).question_starts.flatten().float() / 4096
        assert places.min() < 0.1
        assert 0.4 < places.mean() < 0.7
        assert places.max() > 0.9

    def test_rows_depend_on_seed_and_number_alone(self) -> None:
        few, many = make_batch("stream", 1024, 2, seed=5), make_batch("stream", 1024, 4, seed=5)
        assert torch.equal(few.tokens, many.tokens[:2])
        assert not torch.equal(many.tokens[0], many.tokens[1])
        assert not torch.equal(few.tokens, make_batch("stream", 1024, 2, seed=6).tokens)

    def test_prompts_do_not_change_between_releases(self) -> None:
        # Published accuracies belong to these prompts.
        first = ITEM.findall(decode(make_batch("stream", 1024, seed=0).tokens[0]))[0]
        assert first == ("luziru", "4199908")

    def test_keys_values_and_text_are_held_out(self) -> None:
        found = {}
        for split in ("train", "eval"):
            generator = torch.Generator().manual_seed(0)
            task = RetrievalTask("many", 200, 1)
            batch = make_batch(task, 9000, 128, split=split, generator=generator)
            pairs = [pair for row in batch.tokens for pair in ITEM.findall(decode(row))]
            found[split] = [set(column) for column in zip(*pairs, strict=True)]
        for train, held_out in zip(found["train"], found["eval"], strict=True):
            assert len(held_out) > 10_000
            assert not train & held_out
        train, held_out = filler.training_text(), filler.held_out_text()
        starts = range(0, len(held_out) - 100, 100)
        assert sum(held_out[i : i + 100] in train for i in starts) < 0.1 * len(starts)  # topics quote each other

    @pytest.mark.parametrize("form", [LONG_FORM, *SHORT_FORMS], ids=["long", "colon", "is"])
    def test_training_forms(self, form: retrieval.ItemForm) -> None:
        generator = torch.Generator().manual_seed(1)
        batch = make_batch(RetrievalTask("t", 3, 2), 300, split="train", form=form, generator=generator)
        last = int(batch.question_starts[0, -1])
        item = decode(batch.tokens[0, last : last + form.length])
        assert re.fullmatch(f"{form.before}[a-z]{{6}}{form.between}[0-9]{{7}}[.]", item)
        assert (batch.roles[0, last + len(form.before) : last + len(form.before) + 6] == UNPREDICTABLE).all()

    def test_encode_and_decode(self) -> None:
        assert encode("aé").tolist() == [[BOS, 97, 195, 169]]
        assert decode(encode("aé")[0]) == "aé"

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: make_batch("nope", 512), "task: expected one of single"),
            (lambda: make_batch("stream", 100), "length: expected at least"),
            (lambda: make_batch("single", 512, split="test"), "split: expected 'train' or 'eval'"),  # type: ignore[arg-type]
            (lambda: RetrievalTask("x", 0, 1), "at least 1 each"),
            (lambda: RetrievalTask("x", 3, 2, "vt"), "even numbers"),
            (lambda: RetrievalTask("x", 3, 2, "middle"), "placement: expected"),  # type: ignore[arg-type]
            (lambda: models.path("retrieval-d32"), "name: expected one of retrieval-d128, retrieval-d64"),
        ],
    )
    def test_bad_arguments(self, call, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()


class TestScore:
    def test_one_wrong_byte_makes_an_answer_wrong(self) -> None:
        batch = make_batch("stream", 1024, 2, seed=4)
        perfect = batch.tokens.roll(-1, 1)
        assert questions_right(perfect, batch).all()
        spoilt = perfect.clone()
        start = int(batch.question_starts[1, 3])
        spoilt[1, start + LONG_FORM.value_offset - 1 + 4] += 1  # the fifth digit, predicted one place before it
        right = questions_right(spoilt, batch)
        assert right[0].all()
        assert right[1].tolist() == [i != 3 for i in range(right.shape[1])]

    def test_other_tokens_do_not_matter(self) -> None:
        batch = make_batch("multiquery", 1024, seed=4)
        guesses = torch.where(batch.roles.roll(-1, 1) == ANSWER, batch.tokens.roll(-1, 1), 0)
        assert questions_right(guesses, batch).all()

    def test_takes_logits_or_an_object_that_has_them(self) -> None:
        def oracle(tokens: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(tokens.roll(-1, 1), retrieval.VOCAB_SIZE).float()

        assert exact_match(oracle, "multiquery", 600, num_samples=3, batch_tokens=700) == (3, 3)
        score = exact_match(lambda tokens: oracle(tokens) * 0, "single", 600, num_samples=2)
        assert (score.accuracy, str(score)) == (0.0, "0/2")


class TestShippedModels:
    def test_fit_into_the_wheel(self) -> None:
        for name in models.names():
            assert (models.path(name) / "model.safetensors").stat().st_size <= 8_000_000
            assert {"config.json", "result.json", "README.md"} <= {f.name for f in models.path(name).iterdir()}

    @pytest.mark.parametrize("task", TASKS)
    def test_answer_held_out_questions(self, shipped, task: str) -> None:
        score = exact_match(shipped, task, 1024, num_samples=4, batch_tokens=2048)
        assert score.accuracy >= 0.98, score

    @pytest.mark.parametrize("task", ["multiquery", "stream"])
    def test_answer_at_four_thousand_tokens(self, shipped, task: str) -> None:
        assert exact_match(shipped, task, 4096, num_samples=1).accuracy >= 0.98

    @pytest.mark.parametrize("task", TASKS)
    def test_fail_with_local_and_sink_attention(self, shipped, task: str) -> None:
        sparseattn.register()
        shipped.set_attn_implementation("sparseattn_streaming")
        try:
            with sparseattn.options(num_sink_tokens=64, num_local_tokens=128, block_size=64):
                score = exact_match(shipped, task, 2048, num_samples=2, batch_tokens=2048)
        finally:
            shipped.set_attn_implementation("sdpa")
        # Stream questions about something near, or asked before nearby, remain answerable.
        assert score.accuracy <= (0.6 if task == "stream" else 0.25), score

    @pytest.mark.gpu
    @pytest.mark.parametrize("length", [1024, 8192, 16384])
    @pytest.mark.parametrize("task", TASKS)
    def test_answer_on_a_gpu(self, task: str, length: int) -> None:
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            models.path("retrieval-d64"), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        score = exact_match(model.cuda().eval(), task, length, num_samples=32)
        assert score.accuracy >= (0.98 if length <= 8192 else 0.9), score
