"""The streaming selector against token positions, and the registry of selectors."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from sparseattn.selectors import SELECTORS, StreamingConfig, configure, get, streaming, xattention


def expected(sq: int, sk: int, config: StreamingConfig, causal: bool) -> torch.Tensor:
    """Bool [MB, NB]: blocks that hold a key some row of the query block keeps, one token pair at a time."""
    size = config.block_size
    out = torch.zeros(-(-sq // size), -(-sk // size), dtype=torch.bool)
    for i in range(sq):
        diagonal = i + sk - sq
        for j in range(sk):
            near = diagonal - config.num_local_tokens <= j
            near &= j <= (diagonal if causal else diagonal + config.num_local_tokens)
            sink = j < config.num_sink_tokens and (not causal or j // size <= last_diagonal(i, sq, sk, size) // size)
            out[i // size, j // size] |= near or sink
    return out


def last_diagonal(i: int, sq: int, sk: int, size: int) -> int:
    """Diagonal of the last row of the query block of row i: blocks past it are never listed."""
    return min((i // size + 1) * size, sq) - 1 + sk - sq


@pytest.mark.parametrize(("sq", "sk"), [(96, 96), (70, 101), (1, 75), (90, 40)])
@pytest.mark.parametrize("tokens", [(0, 0), (16, 20), (20, 5), (64, 200)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_lists_hold_the_kept_tokens(sq: int, sk: int, tokens: tuple[int, int], causal: bool, device: str) -> None:
    config = StreamingConfig(*tokens, block_size=16)
    q, k = torch.zeros(2, sq, 4, 16, device=device), torch.zeros(2, sk, 2, 16, device=device)
    mask = streaming(q, k, config, causal=causal)
    mask.validate()
    assert (mask.batch, mask.heads) == (1, 1)
    assert torch.equal(mask.to_blocks()[0, 0].cpu(), expected(sq, sk, config, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_ragged_batches_are_a_loop(causal: bool) -> None:
    config = StreamingConfig(16, 20, block_size=16)
    lengths = [(96, 96), (70, 101), (0, 5), (1, 75)]
    cu_q, cu_k = (
        torch.tensor([0, *[n[i] for n in lengths]], dtype=torch.int32).cumsum(0, dtype=torch.int32) for i in (0, 1)
    )
    q, k = torch.zeros(sum(n[0] for n in lengths), 4, 16), torch.zeros(sum(n[1] for n in lengths), 2, 16)
    mask = streaming(
        q, k, config, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=96, max_seqlen_k=101
    )
    mask.validate()
    for b, (sq, sk) in enumerate(lengths):
        alone = expected(sq, sk, config, causal)
        kept = mask.to_blocks()[b, 0]
        assert torch.equal(kept[: alone.shape[0], : alone.shape[1]], alone)
        assert kept.sum() == alone.sum()


def test_lists_are_as_wide_as_a_row_not_as_the_keys() -> None:
    q = torch.zeros(1, 16384, 1, 16)
    mask = streaming(q, q)
    assert mask.kv_indices.shape[-1] == 1 + 8 + 1 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sink_tokens": -1}, "num_sink_tokens: expected an int >= 0, got -1"),
        ({"num_local_tokens": 1.5}, "num_local_tokens: expected an int >= 0, got 1.5"),
        ({"block_size": 100}, "block_size: expected one of"),
        ({"window": 4}, "window: expected an option of StreamingConfig .num_sink_tokens, num_local_tokens, block_size"),
    ],
)
def test_bad_config(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure("streaming", options)


def test_bad_calls() -> None:
    q = torch.zeros(1, 64, 1, 16)
    with pytest.raises(ValueError, match="impl: expected"):
        streaming(q, q, impl="cuda")
    with pytest.raises(TypeError, match="config: expected a StreamingConfig"):
        streaming(q, q, object())  # type: ignore[arg-type]


def test_registry() -> None:
    assert get("xattention").select is xattention
    with pytest.raises(ValueError, match=r"method: expected one of landmark, xattention, streaming, .*got 'flash'"):
        get("flash")
    assert configure("xattention") == SELECTORS["xattention"].config()
    names = list(inspect.signature(xattention).parameters)
    for name, selector in SELECTORS.items():
        parameters = inspect.signature(selector.select).parameters
        assert [n for n in parameters if n in names] == names  # a method may take more, which has defaults
        assert all(p.default is not p.empty for n, p in parameters.items() if n not in names)
        config = selector.config()
        assert configure(name, json.loads(json.dumps(config.to_dict()))) == config
