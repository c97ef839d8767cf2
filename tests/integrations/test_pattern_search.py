"""The search that gives each head its pattern finds the patterns planted for it, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, make_model
from torch import Tensor

import sparseattn
from sparseattn.integrations.pattern_search import choose_patterns, score_patterns, search_patterns
from sparseattn.selectors import MInferenceConfig, minference_patterns

CANDIDATES = [("a_shape", 96, 64), ("vertical_slash", 20, 10), ("block_sparse", 2), ("dense",)]
CONFIG = MInferenceConfig(num_sink_tokens=4, num_local_tokens=8, block_size=32)


def planted(length: int = 512, dim: int = 32) -> tuple[Tensor, Tensor]:
    """Heads that want the first and nearest keys, ten columns, and the topic of their own block, in this order."""
    q, k = torch.randn(1, length, 3, dim), torch.randn(1, length, 3, dim)
    angles = torch.arange(length)[:, None] * (torch.pi / 1.7 ** torch.arange(1, 9))  # rotary: only distances count
    rotary = torch.cat([angles.cos(), angles.sin()], -1)
    q[0, :, 0, :16], k[0, :, 0, :16] = 8 * rotary, rotary
    q[0, :, 0, 16], k[0, :96, 0, 16] = 8.0, 7.0
    direction = torch.nn.functional.normalize(torch.randn(dim), dim=0)
    q[0, :, 1] += 9 * direction
    k[0, 40 : length - 60 : 43, 1] += 9 * direction
    topics = 9 * torch.nn.functional.normalize(torch.randn(length // 64, dim), dim=-1)
    which = (torch.randperm(length // 32) // 2).repeat_interleave(32)  # two blocks each
    q[0, :, 2] += topics[which]
    k[0, :, 2] += topics[which]
    return q, k


def test_planted_patterns_win() -> None:
    q, k = planted()
    recall, density = score_patterns(q, k, CANDIDATES, config=CONFIG, first_row=256)
    assert recall.shape == density.shape == (4, 3)
    torch.testing.assert_close(recall[3], torch.ones(3))
    torch.testing.assert_close(density[3], torch.ones(3))
    won = choose_patterns(CANDIDATES[:3], recall[:3], density[:3])
    assert [head.pattern for head in won] == CANDIDATES[:3]
    assert all(head.recall > 0.8 for head in won), won


def test_choosing() -> None:
    recall = torch.tensor([[0.9, 0.5], [0.95, 0.6], [0.95, 0.7]])
    density = torch.tensor([[0.1, 0.3], [0.3, 0.2], [0.2, 0.1]])
    patterns = CANDIDATES[:3]

    def chosen(min_recall: float | None) -> list[int]:
        return [patterns.index(head.pattern) for head in choose_patterns(patterns, recall, density, min_recall)]

    assert chosen(None) == [2, 2]
    assert chosen(0.8) == [0, 2]  # the cheapest that is good enough, else the best
    assert chosen(0.55) == [0, 2]
    with pytest.raises(ValueError, match=r"min_recall: expected a share in \[0, 1\]"):
        chosen(1.5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_runs_on_what_was_found(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    sparseattn.register()
    model = make_model(name, impl="eager")
    ids = torch.randint(3, VOCAB, (1, 200))
    found = search_patterns(model, ids, CANDIDATES, config=CONFIG, min_recall=0.9)
    assert model.config._attn_implementation == "eager"
    assert [len(layer) for layer in found] == [4, 4]
    sliding = name == "gemma2"  # its first layer sees 70 tokens, and is not searched
    assert all(head.pattern == ("dense",) for head in found[0]) or not sliding
    assert all(0.0 < head.recall <= 1.0 + 1e-5 for layer in found for head in layer)

    path = tmp_path_factory.mktemp("patterns") / "patterns.json"
    minference_patterns.save([[head.pattern for head in layer] for layer in found], path)
    config = MInferenceConfig.from_json(path, **{k: v for k, v in CONFIG.to_dict().items() if k != "patterns"})
    model.set_attn_implementation("sparseattn_minference")
    with torch.no_grad(), sparseattn.record() as calls:
        logits = model(ids, sparseattn={"min_seq_len": 1, **config.to_dict()}).logits
    assert logits.isfinite().all()
    assert calls[1].method == "minference"
    assert calls[1].density < 1 or sliding


def test_bad_arguments() -> None:
    q, k = planted(64)
    with pytest.raises(ValueError, match="candidates: expected at least one pattern"):
        score_patterns(q, k, [])
    with pytest.raises(ValueError, match="patterns: expected a kind among"):
        score_patterns(q, k, [("spiral", 3)])
    with pytest.raises(ValueError, match=r"first_row: expected an int in \[0, 64\), got 64"):
        score_patterns(q, k, CANDIDATES, first_row=64)
    with pytest.raises(ValueError, match="input_ids: expected a 2-D tensor"):
        search_patterns(torch.nn.Linear(2, 2), torch.zeros(3))
