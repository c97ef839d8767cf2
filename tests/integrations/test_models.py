"""Whole tiny models: with every block selected, this library's attention is eager attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import tiny_models as tiny
from tiny_models import CONFIGS, SEQ, SLIDING, everything_selected, make_model, padding, tokens
from transformers import DynamicCache, StaticCache

import sparseattn.hf as hf

models = pytest.mark.parametrize("name", CONFIGS)
LENGTHS = [SEQ, 131, 64]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@models
def test_prefill(name: str, device: str) -> None:
    model = make_model(name, device)
    ids = tokens(2, SEQ, device=device)
    with everything_selected(), hf.record() as calls:
        tiny.assert_like_eager(model, lambda m: m(ids).logits, name)
    sparse = [call for call in calls if call.method == "xattention"]
    assert len(calls) == 2
    assert len(sparse) == (0 if name == "mistral-sliding" else 1 if name in SLIDING else 2)
    assert all(call.density == 1.0 for call in sparse)


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_may_select_too(name: str, device: str) -> None:
    model = make_model(name, device)
    ids = tokens(2, SEQ, device=device)
    with everything_selected(sliding_layers="sparse"), hf.record() as calls:
        tiny.assert_like_eager(model, lambda m: m(ids).logits, name)
    assert [call.method for call in calls] == ["xattention", "xattention"]


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, side: str, device: str) -> None:
    model = make_model(name, device)
    ids, mask = tokens(3, SEQ, device=device), padding(LENGTHS, side, device=device)
    with everything_selected():
        tiny.assert_like_eager(
            model,
            lambda m: m(ids, attention_mask=mask).logits[mask.bool()],
            name,
            oracle=lambda m: tiny.alone(m, ids, mask),
        )


def _in_chunks(model: nn.Module, ids: Tensor, mask: Tensor | None, cache: object, sizes: list[int]) -> Tensor:
    """Logits of a prefill in several forwards; the last ones are single tokens."""
    logits, done = [], 0
    for size in sizes:
        done += size
        step = None if mask is None else mask[:, :done]
        logits.append(model(ids[:, done - size : done], attention_mask=step, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@models
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_chunked_prefill_and_decode(name: str, padded: bool, device: str) -> None:
    model = make_model(name, device)
    ids = tokens(3, SEQ, device=device)
    mask = padding(LENGTHS if padded else [SEQ] * 3, "left", device=device)

    def call(m: nn.Module, static: bool = False) -> Tensor:
        cache = StaticCache(config=m.config, max_cache_len=SEQ + 40) if static else DynamicCache(config=m.config)
        return _in_chunks(m, ids, mask if padded else None, cache, [100, 97, 1, 1, 1])[mask.bool()]

    with everything_selected():
        tiny.assert_like_eager(model, call, name, oracle=lambda m: tiny.alone(m, ids, mask))
        torch.testing.assert_close(call(model, static=True), call(model))


@models
def test_generate_with_left_padding(name: str, device: str) -> None:
    model = make_model(name, device)
    ids, mask = tokens(3, 120, device=device), padding([120, 77, 30], "left", 120, device)
    arguments = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, disable_compile=True)
    eager = tiny.attention(model, "eager").generate(ids, **arguments)
    with everything_selected():
        tiny.attention(model, "sparseattn_xattention")
        assert torch.equal(model.generate(ids, **arguments), eager)
        assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), eager)


@models
def test_packed_positions_equal_separate_sequences(name: str, device: str) -> None:
    model = make_model(name, device)
    ids = tokens(1, SEQ, device=device)
    lengths = [90, 17, 93]
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]

    def apart(m: nn.Module) -> Tensor:
        return torch.cat([m(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)

    with everything_selected():
        tiny.assert_like_eager(
            model, lambda m: m(ids, position_ids=positions, use_cache=False).logits, name, oracle=apart
        )


def test_packing_by_cu_seq_lens_and_with_a_cache(device: str) -> None:
    model = make_model("llama", device)
    ids = tokens(1, SEQ, device=device)
    positions = torch.cat([torch.arange(n, device=device) for n in (120, 80)])[None]
    cu = torch.tensor([0, 120, 200], device=device)
    with everything_selected():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        # With a cache Transformers itself does not look for packing; the attention function does.
        assert torch.equal(model(ids, position_ids=positions, use_cache=True).logits, expected)
        by_lengths = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu)
        assert torch.equal(model(ids, position_ids=positions, **by_lengths).logits, expected)
        assert torch.equal(
            model(ids, position_ids=positions, max_length_q=120, max_length_k=120, **by_lengths).logits, expected
        )


def test_packed_rows_of_a_batch(device: str) -> None:
    model = make_model("qwen3-sliding", device)
    ids = tokens(2, SEQ, device=device)
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(SEQ - n)]) for n in (150, 33)]).to(device)
    with everything_selected():
        tiny.assert_like_eager(model, lambda m: m(ids, position_ids=positions, use_cache=False).logits, "packed batch")


def _enable_checkpointing(model: nn.Module, use_reentrant: bool = False) -> None:
    # Transformers renamed it.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "deepseek-v3"])
@torch.enable_grad()
def test_gradient_checkpointing(name: str, device: str) -> None:
    ids, mask = tokens(2, SEQ, device=device), padding([SEQ, 150], "right", device=device)
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(m: nn.Module) -> Tensor:
        m.train()
        m.zero_grad()
        m(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        named = dict(m.named_parameters())
        wanted = [p.grad for n, p in named.items() if n.endswith(("q_proj.weight", "q_a_proj.weight", "sinks"))]
        return torch.cat([g.flatten() for g in [*wanted, named["model.embed_tokens.weight"].grad]])

    model = make_model(name, device)
    _enable_checkpointing(model)
    with everything_selected():
        tiny.assert_like_eager(model, gradients, name)


@torch.enable_grad()
def test_checkpointed_gradients_are_those_of_the_plain_backward(device: str) -> None:
    """Selection must be the same when a layer is computed again."""
    ids = tokens(1, SEQ, device=device)

    def gradient(checkpointing: bool | None) -> Tensor:
        model = make_model("llama", device).train()
        if checkpointing is not None:
            _enable_checkpointing(model, use_reentrant=checkpointing)
        with hf.options(density=0.8, floor=1, block_size=64, min_seq_len=16), hf.record() as calls:
            loss = model(ids, labels=ids, use_cache=False).loss
        assert [call.method for call in calls] == ["landmark"] * 2
        assert calls[0].density < 1
        loss.backward()  # outside of the block
        assert len(calls) == 2
        return model.model.embed_tokens.weight.grad

    plain = gradient(None)
    assert torch.equal(gradient(False), plain)
    assert torch.equal(gradient(True), plain)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_compiled_decoding(name: str) -> None:
    model = make_model(name)
    ids, mask = tokens(2, 90), padding([90, 40], "left", 90)
    step = torch.nn.functional.pad(mask, (0, 1), value=1)

    def decode(forward) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=128)
        model(ids, attention_mask=mask, past_key_values=cache)
        return forward(ids[:, :1], attention_mask=step, past_key_values=cache).logits

    with everything_selected():
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        torch.testing.assert_close(decode(compiled), decode(model))


@pytest.mark.parametrize("method", ["landmark", "xattention", "heads"])
def test_compiled_prefill_selects_what_eager_does(method: str) -> None:
    model = make_model("llama", num_hidden_layers=1)
    ids, mask = tokens(1, 256), torch.ones(1, 256, dtype=torch.long)
    with hf.options(method=method, block_size=64, min_seq_len=16):
        expected = model(ids, attention_mask=mask, use_cache=False).logits  # its hook must not be in the way either
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids, attention_mask=mask, use_cache=False).logits, expected)
