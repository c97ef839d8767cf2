"""Scoring a model over tasks, methods and densities."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from sparseattn import models, record
from sparseattn.integrations.eval_rows import DEPTHS, EvalRow, depth_counts
from sparseattn.integrations.evaluation import EVEN, Contender, evaluate
from sparseattn.integrations.workloads import Retrieval, Ruler, needle_depths
from sparseattn.selectors import SELECTORS
from sparseattn.testing import retrieval, ruler


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(models.path("retrieval-d64"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(model) -> list[EvalRow]:
    workloads = [Retrieval("stream", 640, 1), Retrieval("single", 640, 1)]
    contenders = [
        Contender.parse("landmark", 64),
        Contender.parse("topk", 64),
        Contender.parse("xattention:density", 64),
    ]
    told: list[str] = []
    found = list(evaluate(model, workloads, contenders, [0.5], name="d64", seed=3, progress=told.append))
    assert any("landmark to density 0.5" in line for line in told)
    assert model.config._attn_implementation == "sdpa"
    return found


def test_a_row_for_everything(rows: list[EvalRow]) -> None:
    labels = ["dense", "dense", *(m for m in ("landmark", "topk", "xattention (density)") for _ in range(2))]
    assert [row.label for row in rows] == labels
    assert [row.task for row in rows] == ["stream", "single"] * 4
    for row in rows:
        assert row.total == (5 if row.task == "stream" else 1)
        assert row.prompts == 1
        assert 0 <= row.accuracy <= 1
        assert row.seconds > 0
        assert sum(total for _, total in row.by_depth) == row.total
        assert sum(right for right, _ in row.by_depth) == row.correct
        assert row.environment["device"].startswith("CPU")
        assert EvalRow.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    for row in rows[:2]:
        assert (row.target, row.density, row.knob, row.fidelity, row.options) == (None, 1.0, None, {}, {})
        assert row.correct == row.total
        assert 0.1 < row.standard_error < 0.3  # of five questions, and of one
    for row in rows[2:]:
        assert row.target == 0.5
        assert row.density == pytest.approx(0.5, abs=0.12)  # ten blocks a side: a coarse thing
        assert row.options[row.knob] == pytest.approx(row.value)
        assert 0 < row.selection_seconds < row.seconds
        assert 0 < row.attention_seconds < row.seconds
        kept = row.fidelity
        assert kept["random"] < kept["recall"] <= kept["oracle"] + 1e-5
        assert kept["worst"] <= kept["p05"] <= kept["recall"] < 1


def test_rows_that_exist_are_skipped(model) -> None:
    workload = [Retrieval("single", 640, 1)]
    done = {("single", 640, "dense", None), ("single", 640, "streaming", 0.9)}
    again = evaluate(
        model, workload, [Contender.parse("streaming", 64)], [0.5, 0.9], name="d64", fidelity=False,
        skip=lambda *key: key in done,
    )  # fmt: skip
    (row,) = again
    assert (row.label, row.target, row.fidelity) == ("streaming", 0.5, {})


def test_records_have_heads(model) -> None:
    import sparseattn

    sparseattn.register()
    tokens = retrieval.make_batch("single", 640).tokens
    model.set_attn_implementation("sparseattn_streaming")
    try:
        options = {"num_local_tokens": 128, "block_size": 64, "min_seq_len": 16}
        with torch.no_grad(), sparseattn.options(**options), record(fidelity="bounds") as calls:
            model(tokens, use_cache=False)
        with torch.no_grad(), sparseattn.options(**options), record(fidelity=True) as plain:
            model(tokens, use_cache=False)
        with pytest.raises(ValueError, match="fidelity: expected one of"), record(fidelity="all"):
            pass
    finally:
        model.set_attn_implementation("sdpa")
    assert len(calls) == 4
    for call, same in zip(calls, plain, strict=True):
        assert call.heads.recall.shape == (8,)
        assert call.heads.recall.mean().item() == pytest.approx(call.recall, abs=1e-6)
        assert call.heads.density.mean().item() == pytest.approx(call.density)
        assert (call.heads.normalised <= 1 + 1e-4).all()
        assert same.heads.random is None
        assert torch.equal(same.heads.worst, call.heads.worst)


def test_ruler_on_a_model_that_reads_bytes(model) -> None:
    def decode(tokens: torch.Tensor) -> str:
        return retrieval.decode(tokens)

    workload = Ruler("niah_single_1", 900, 1, retrieval.encode, decode, max_new_tokens=3)
    assert len(workload.samples) == 2
    assert workload.samples[0].prompt == ruler.make_samples("niah_single_1", 900, lambda t: len(t) + 1)[0].prompt
    dense, sparse = evaluate(
        model, [workload], [Contender.parse("streaming", 64)], [0.6], name="d64", fidelity=True
    )  # fmt: skip
    for row in (dense, sparse):
        assert row.total == 1
        assert 0 <= row.correct <= 1
        assert sum(total for _, total in row.by_depth) == 1
    # Steps that generate the answer are dense and count for nothing.
    assert sparse.density == pytest.approx(0.6, abs=0.15)


def test_depths() -> None:
    batch = retrieval.make_batch("multiquery", 2048, seed=5)
    depths = needle_depths(batch)
    assert len(depths) == batch.question_starts.shape[1]
    text = retrieval.decode(batch.tokens[0])
    for start, depth in zip(batch.question_starts[0].tolist(), depths.tolist(), strict=True):
        key = text[start - 1 + len(retrieval.LONG_FORM.before) :][: retrieval.KEY_LENGTH]
        first = text.index(f"{retrieval.LONG_FORM.before}{key}")
        assert depth == pytest.approx((first + 1) / 2048)
        assert first + 1 < start
    counts = depth_counts(torch.tensor([True, False, True]), torch.tensor([0.0, 0.05, 0.999]))
    assert counts[0] == [1, 2]
    assert counts[DEPTHS - 1] == [1, 1]


def test_contenders() -> None:
    for method in SELECTORS:
        if method != "heads":
            contender = Contender.parse(method, 64)
            assert contender.options["block_size"] == 64
            assert set(EVEN.get(method, {})) <= set(contender.options)
    assert Contender.parse("flashprefill", even=False).options == {}
    with pytest.raises(ValueError, match="method: expected one of"):
        Contender.parse("guess")
    with pytest.raises(ValueError, match=r"option: expected one of \['density', 'tau'\] for method 'landmark'"):
        Contender.parse("landmark:rows")


def test_bad_arguments(model) -> None:
    workload = Retrieval("single", 640, 1)
    with pytest.raises(ValueError, match="density: expected more than 0 and at most 1, got 0"):
        next(evaluate(model, [workload], [], [0], name="m"))
    with pytest.raises(ValueError, match="method: expected one that a knob brings to a density, got 'heads'"):
        next(evaluate(model, [workload], [Contender("heads")], [0.5], name="m"))
