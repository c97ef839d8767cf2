"""What holds for every method by name: bad and empty calls, and the mean correction of the blocks that it skips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseattn import BlockMask, block_sparse_attention, selectors
from sparseattn.testing import assert_close_to_oracle, structured_qkv

# Options under which a prompt of a few blocks has some to skip.
OPTIONS = {
    "landmark": {"density": 0.5, "floor": 0},
    "xattention": {"threshold": 0.6},
    "streaming": {"num_sink_tokens": 16, "num_local_tokens": 16},
    "flashprefill": {"threshold": 0.9, "num_sink_tokens": 1, "num_local_tokens": 0, "num_last_tokens": 0},
    "bound": {"threshold": 0.9},
    "topk": {"density": 0.4},
    "heads": {"heads": ("near", "near"), "classes": {"near": {"method": "streaming", "num_local_tokens": 16}}},
    "oracle": {"density": 0.5},
    "flexprefill": {"density": 0.4},
    "minference": {"vertical_size": 12, "slash_size": 1, "num_sink_tokens": 1, "num_local_tokens": 16},
}
methods = pytest.mark.parametrize("method", selectors.SELECTORS)


def _select(method: str, q: Tensor, k: Tensor, **call: object) -> BlockMask:
    config = selectors.configure(method, {"block_size": 64, **OPTIONS[method]})
    return selectors.get(method).select(q, k, config, **call)


@methods
def test_causality_is_a_bool(method: str) -> None:
    q, k = torch.randn(1, 128, 4, 16), torch.randn(1, 128, 2, 16)
    with pytest.raises(TypeError, match=r"causal: expected True or False, got 'no'"):
        _select(method, q, k, causal="no")


@methods
def test_no_queries_select_nothing(method: str, device: str) -> None:
    q, k = torch.randn(1, 0, 4, 16, device=device), torch.randn(1, 128, 2, 16, device=device)
    assert _select(method, q, k).kv_num_blocks.shape[2] == 0
    assert selectors.get(method).select(q, k).kv_num_blocks.shape[2] == 0  # with the defaults, too


@methods
@pytest.mark.parametrize("side", ["q", "k"])
def test_the_ranges_that_selected_attend(method: str, side: str, device: str) -> None:
    """Of one side alone, too: a cache that is longer than its content, or padded queries."""
    q, k, v = structured_qkv(300, 4, 2, 32, torch.float32, device)
    rows, (start, stop) = q[:, -40:], (3, 38) if side == "q" else (20, 290)
    ranges = torch.tensor([[start, stop]], dtype=torch.int32, device=device)
    mask = _select(method, rows, k, **{f"ranges_{side}": ranges})
    assert mask.seqused_q is not None
    assert mask.seqused_k is not None
    o = block_sparse_attention(rows, k, v, mask, **{f"ranges_{side}": ranges})
    inside = slice(start, stop)
    alone = (rows[:, inside], k, v) if side == "q" else (rows, k[:, inside], v[:, inside])
    expected = block_sparse_attention(*alone, _select(method, *alone[:2]))
    if side == "q":
        assert (o[:, :start] == 0).all()
        o = o[:, inside]
    torch.testing.assert_close(o, expected)


def _corrected(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Dense attention over the visible keys and, for each block that a row skips and sees whole, over its mean.

    Keys that the row attends as columns are taken off the count of their block.
    """
    length, group, size = q.shape[1], q.shape[2] // k.shape[2], mask.block_size[1]
    mask = mask.expand_heads(q.shape[2])
    tokens, blocks = mask.to_dense()[0], mask.to_blocks()[0]  # [H, S, S] with columns, [H, MB, NB] without
    k, v = (t[0].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))  # [H, S, D]
    rows = torch.arange(length, device=q.device)
    keys, values, counts = [k], [v], [tokens.to(k.dtype)]
    for block in range(blocks.shape[-1]):
        inside = slice(block * size, min((block + 1) * size, length))
        skipped = ~blocks[:, rows // mask.block_size[0], block] & (rows >= inside.stop - 1)
        left = inside.stop - inside.start - tokens[:, :, inside].sum(-1, keepdim=True)
        keys.append(k[:, inside].mean(1, keepdim=True))
        values.append(v[:, inside].mean(1, keepdim=True))
        counts.append(torch.where(skipped[..., None], left, 0).to(k.dtype))
    scores = q[0].transpose(0, 1) @ torch.cat(keys, 1).transpose(1, 2) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores + torch.cat(counts, -1).log(), -1)
    return (weights @ torch.cat(values, 1)).transpose(0, 1)[None]


@methods
def test_skipped_blocks_may_take_part_by_their_means(method: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = structured_qkv(450, 4, 2, 32, dtype, device)
    mask = _select(method, q, k)
    assert 0 < mask.density < 1

    def run(attend, *tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        o = attend(*leaves)
        return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]

    exact = run(lambda *t: _corrected(*t, mask), *(t.double() for t in (q, k, v)))
    eager = run(lambda *t: _corrected(*t, mask), q, k, v)
    actual = run(lambda *t: block_sparse_attention(*t, mask, mean_correction=True), q, k, v)
    for name, *tensors in zip(("o", "dq", "dk", "dv"), actual, exact, eager, strict=True):
        assert_close_to_oracle(*tensors, name)
    plain = block_sparse_attention(q, k, v, mask)
    assert not torch.equal(plain, actual[0])
