"""Landmarks kept beside a model's KV cache: what is reused, what is not, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tiny_models import make_model, padding, tokens
from transformers import DynamicCache, StaticCache

import sparseattn.hf as hf
from sparseattn.integrations import landmarks

OPTIONS = dict(tau=0.02, min_seq_len=16, block_size=64, floor=1)
CHUNK, LENGTH = 128, 512


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def prompt(rows: int = 1, length: int = LENGTH) -> Tensor:
    return tokens(rows, length)


def feed(model: Any, ids: Tensor, cache: Any, start: int, stop: int, mask: Tensor | None = None) -> list[Any]:
    """One chunk; the records of its layers."""
    mask = None if mask is None else mask[:, :stop]
    with hf.options(**OPTIONS), hf.record(masks=True) as calls:
        model(ids[:, start:stop], past_key_values=cache, attention_mask=mask)
    return calls


def warm(model: Any) -> Any:
    """The first call of a module only shows it; later ones, of any cache, keep."""
    feed(model, prompt(), DynamicCache(config=model.config), 0, CHUNK)
    return model


def lists(calls: list[Any], rows: slice | int = slice(None)) -> list[Any]:
    return [call.mask.to_blocks()[:, :, rows] for call in calls]


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.no_grad():
        return warm(make_model("llama"))


@pytest.fixture(scope="module")
def whole(model: Any) -> list[Tensor]:
    """Lists of the prompt in one piece."""
    with torch.no_grad():
        return lists(feed(model, prompt(), DynamicCache(config=model.config), 0, LENGTH))


def in_chunks(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[list[list[str]], list[Tensor]]:
    """What the layers say of every chunk, and their lists, put together."""
    said, parts = [], []
    for start in range(0, ids.shape[1], CHUNK):
        calls = feed(model, ids, cache, start, start + CHUNK, mask)
        said.append([call.landmarks for call in calls])
        parts.append([call.mask for call in calls])
    joined = []
    for layer in range(len(parts[0])):
        width = parts[-1][layer].num_kv_blocks
        blocks = [
            torch.nn.functional.pad(m.to_blocks(), (0, width - m.num_kv_blocks)) for m in (p[layer] for p in parts)
        ]
        joined.append(torch.cat(blocks, 2))
    return said, joined


def test_chunks_keep_landmarks_and_select_what_the_prompt_does(model: Any, whole: list[Tensor]) -> None:
    said, got = in_chunks(model, prompt(), DynamicCache(config=model.config))
    assert said == [[f"{2 * n} of {2 * n + 2} blocks kept"] * 2 for n in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    assert not all(x.all() for x in whole), "a mask that keeps everything shows nothing"


def test_the_first_call_of_a_module_keeps_nothing() -> None:
    said, _ = in_chunks(make_model("llama"), prompt(), DynamicCache())
    assert said[0] == ["first call of this module"] * 2
    assert said[1] == ["0 of 4 blocks kept"] * 2
    assert said[2] == ["4 of 6 blocks kept"] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(model: Any, side: str) -> None:
    ids, mask = prompt(3), padding([LENGTH, 470, 200], side, LENGTH)
    whole = lists(feed(model, ids, DynamicCache(config=model.config), 0, LENGTH, mask))
    said, got = in_chunks(model, ids, DynamicCache(config=model.config), mask)
    lengths = {"left": [(128, 86, 0), (256, 214, 0), (384, 342, 72), (512, 470, 200)],
               "right": [(128, 128, 128), (256, 256, 200), (384, 384, 200), (512, 470, 200)]}[side]  # fmt: skip
    complete = [sum(n // 64 for n in row) for row in lengths]
    assert said[1:] == [[f"{a} of {b} blocks kept"] * 2 for a, b in pairwise(complete)]
    if side == "right":  # with left padding chunks begin inside a sequence's blocks
        assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    else:
        assert all(torch.equal(a[:1], b[:1]) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_landmarks_are_those_of_the_keys(model: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = prompt(3), padding([LENGTH, 470, 200], side, LENGTH)
    kept = in_chunks(model, ids, DynamicCache(config=model.config), mask)[1]
    monkeypatch.setattr(landmarks, "find", lambda *args: landmarks.Found(None, "turned off"))
    said, computed = in_chunks(model, ids, DynamicCache(config=model.config), mask)
    assert said[-1] == ["turned off"] * 2
    assert all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))


def test_static_caches(model: Any, whole: list[Tensor]) -> None:
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 100)
    said, got = in_chunks(model, prompt(), cache, torch.ones(1, LENGTH, dtype=torch.long))
    assert said == [[f"{2 * n} of {2 * n + 2} blocks kept"] * 2 for n in range(4)]
    assert all(torch.equal(a[..., :8], b) for a, b in zip(got, whole, strict=True))
    cache.reset()
    again = feed(model, prompt(), cache, 0, CHUNK, torch.ones(1, LENGTH, dtype=torch.long))
    assert [call.landmarks for call in again] == ["0 of 2 blocks kept"] * 2
    without_mask = feed(model, prompt(), cache, CHUNK, 2 * CHUNK)
    assert [call.landmarks for call in without_mask] == ["lengths that the device alone knows"] * 2


def test_decoding_in_between_is_noted(model: Any) -> None:
    ids, cache = prompt(), DynamicCache(config=model.config)
    feed(model, ids, cache, 0, CHUNK)
    for n in range(CHUNK, CHUNK + 3):
        assert [call.landmarks for call in feed(model, ids, cache, n, n + 1)] == [None, None]
    calls = feed(model, ids, cache, CHUNK + 3, 2 * CHUNK)
    assert [call.landmarks for call in calls] == ["2 of 4 blocks kept"] * 2


def changed(cache: DynamicCache, how: str) -> int:
    """Change what a cache of 256 tokens holds; how many are left."""
    if how == "crop":
        cache.crop(-100)
        return 156
    if how == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif how == "select":
        cache.batch_select_indices(torch.tensor([1, 1]))
    elif how == "written":
        cache.layers[0].keys[:, :, 3] += 1
        cache.layers[1].keys.zero_()
    elif how == "replaced":
        for layer in cache.layers:
            layer.keys = layer.keys.flip(2)
    elif how == "reset":
        cache.reset()
        return 0
    return 256


@pytest.mark.parametrize("how", ["crop", "reorder", "select", "written", "replaced", "reset"])
def test_a_cache_that_was_changed(model: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, caches = prompt(2), [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        feed(model, ids, cache, 0, 256)
        left = changed(cache, how)
    got = feed(model, ids, caches[0], left, LENGTH)
    expected = 4 if how == "crop" else 0  # two blocks of two sequences lie before the cut
    total = 2 * (got[0].k_len // 64)  # releases differ in what a reset leaves
    assert [call.landmarks for call in got] == [f"{expected} of {total} blocks kept"] * 2
    monkeypatch.setattr(landmarks, "find", lambda *args: landmarks.Found(None, "turned off"))
    assert all(map(torch.equal, lists(got), lists(feed(model, ids, caches[1], left, LENGTH))))


def test_other_options_other_landmarks(model: Any) -> None:
    ids, cache = prompt(), DynamicCache(config=model.config)
    feed(model, ids, cache, 0, 256)
    with hf.options(**{**OPTIONS, "block_size": 128}), hf.record() as calls:
        model(ids[:, 256:], past_key_values=cache)
    assert [call.landmarks for call in calls] == ["0 of 4 blocks kept"] * 2


def test_two_conversations_on_one_model(model: Any) -> None:
    ids, caches = prompt(2), [DynamicCache(config=model.config) for _ in range(2)]
    for start in range(0, LENGTH, CHUNK):
        for row, cache in enumerate(caches):
            calls = feed(model, ids[row : row + 1], cache, start, start + CHUNK)
            assert calls[0].landmarks == f"{start // 64} of {(start + CHUNK) // 64} blocks kept"


def test_what_cannot_be_sure(model: Any) -> None:
    ids = prompt()
    assert feed(model, ids, None, 0, LENGTH)[0].landmarks.endswith("kept")  # a cache of the model's own
    with hf.options(**OPTIONS), hf.record() as calls:
        model(ids, use_cache=False)
    assert calls[0].landmarks == "no cache"
    with hf.options(**OPTIONS), hf.record() as calls:
        model(ids, position_ids=torch.cat([torch.arange(256)] * 2)[None], use_cache=False)
    assert calls[0].landmarks == "packed rows"
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    feed(model, ids, cache, 0, 256, mask)
    with torch.inference_mode():  # where writing into what was made outside leaves no trace
        assert feed(model, ids, cache, 256, LENGTH, mask)[0].landmarks.startswith("inference mode")
        assert feed(model, ids, DynamicCache(), 0, LENGTH)[0].landmarks.startswith("inference mode")


def test_memory_goes_with_the_cache(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    feed(model, prompt(), cache, 0, LENGTH)
    kept = weakref.ref(landmarks._kept[cache.layers[0]])
    assert kept().features.centroids.shape[2] == LENGTH // 64
    del cache
    gc.collect()
    assert kept() is None


def test_generation_in_chunks(model: Any) -> None:
    ids = prompt(1, 400)
    mask = torch.ones_like(ids)
    with hf.options(**OPTIONS), hf.record() as calls:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, prefill_chunk_size=CHUNK)
    said = [call.landmarks for call in calls if call.layer == 0]
    assert said == [f"{2 * n} of {min(2 * n + 2, 6)} blocks kept" for n in range(4)] + [None] * 2


def test_compiled_decoding_passes_the_hook(model: Any) -> None:
    ids, mask = prompt(1, 256), torch.ones(1, 257, dtype=torch.long)

    def decode(forward: Any) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=300)
        feed(model, ids, cache, 0, 256, mask)
        with hf.options(**OPTIONS):
            return forward(ids[:, :1], attention_mask=mask, past_key_values=cache).logits

    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(decode(compiled), decode(model))


def test_copies_and_pickles_of_a_model_work(model: Any) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        said, _ = in_chunks(other, prompt(), DynamicCache(config=model.config))
        assert said[1] == ["2 of 4 blocks kept"] * 2
