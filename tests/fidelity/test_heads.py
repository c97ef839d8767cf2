"""Fidelity by head, and its bounds, against softmax written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseattn import BlockMask, block_sparse_attention
from sparseattn.fidelity import head_fidelity, head_statistics, mass_statistics, recall, recall_bounds
from sparseattn.testing import dense_attention, make_qkv, random_block_mask


def weights(q: Tensor, k: Tensor, visible: Tensor, scale: float | None = None) -> Tensor:
    """Softmax weights float64 [B, Hq, Sq, Sk]; rows that see nothing are 0."""
    group = q.shape[2] // k.shape[2]
    scores = q.double().transpose(1, 2) @ k.double().transpose(1, 2).repeat_interleave(group, 1).transpose(-1, -2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)


def by_blocks(p: Tensor, block: tuple[int, int]) -> Tensor:
    """Sums over blocks, by loops."""
    sq, sk = p.shape[-2:]
    return torch.stack(
        [
            torch.stack([p[..., i : i + block[0], j : j + block[1]].sum((-1, -2)) for j in range(0, sk, block[1])], -1)
            for i in range(0, sq, block[0])
        ],
        -2,
    )


@pytest.mark.parametrize(("sq", "sk"), [(200, 200), (70, 200)], ids=["square", "chunk"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_say_what_rows_say(sq: int, sk: int, heads: int, device: str) -> None:
    q, k, v = make_qkv(2, sq, sk, 4, 2, 32, device=device)
    mask = random_block_mask((sq, sk), (32, 48), heads, batch=2, density=0.4, diagonal=True, device=device)
    found = head_fidelity(q, k, v, mask)
    rows = recall(q, k, v, mask)
    sparse, dense = block_sparse_attention(q, k, v, mask), block_sparse_attention(q, k, v, None)
    for h in range(4):
        expected = mass_statistics(rows[:, h])
        assert found.recall[h].item() == pytest.approx(expected.mean, abs=1e-6)
        assert found.p05[h].item() == pytest.approx(expected.p05, abs=1e-6)
        assert found.worst[h].item() == pytest.approx(expected.worst, abs=1e-6)
        assert found.deficit[h].item() == pytest.approx(expected.deficit, abs=1e-5)
        error = (sparse - dense)[:, :, h].norm() / dense[:, :, h].norm()
        assert found.output_error[h].item() == pytest.approx(error.item(), rel=1e-5)
        assert found.density[h].item() == pytest.approx(mask.densities()[:, h * heads // 4].mean().item())
    assert found.random is None
    assert found.normalised is None
    assert head_fidelity(q, k, None, mask).output_error is None


def brute_bounds(p: Tensor, mask: BlockMask, visible: Tensor) -> tuple[list[float], list[float]]:
    """Random and best recall by head: blocks listed one by one, the best found by sorting all of them."""
    block, (sq, sk) = mask.block_size, mask.seq_lens
    mass, seen = by_blocks(p, block), by_blocks(visible.double().expand_as(p), block) > 0
    rows = visible.any(-1).expand(p.shape[:3]).double().sum((0, 2))
    kept = [[0.0, 0.0] for _ in range(p.shape[1])]
    for b in range(p.shape[0]):
        listed = mask.to_blocks()[min(b, mask.to_blocks().shape[0] - 1)]
        for h in range(p.shape[1]):
            given, free, budget = 0.0, [], 0
            for i in range(mass.shape[2]):
                first, last = i * block[0] + sk - sq, min(sq, (i + 1) * block[0]) - 1 + sk - sq
                for j in range(mass.shape[3]):
                    if not seen[b, h, i, j]:
                        continue
                    is_listed = bool(listed[h * mask.heads // p.shape[1], i, j])
                    touches = j * block[1] <= last and (j + 1) * block[1] > first
                    if is_listed and (j == 0 or touches):
                        given += mass[b, h, i, j].item()
                    else:
                        free.append(mass[b, h, i, j].item())
                        budget += is_listed
            kept[h][0] += given + sum(free) * budget / max(1, len(free))
            kept[h][1] += given + sum(sorted(free, reverse=True)[:budget])
    return ([kept[h][i] / rows[h].item() for h in range(p.shape[1])] for i in (0, 1))


@pytest.mark.parametrize(("sq", "sk"), [(150, 150), (70, 150)], ids=["square", "chunk"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_bounds_are_those_of_all_choices(sq: int, sk: int, causal: bool, device: str) -> None:
    q, k, v = make_qkv(2, sq, sk, 4, 2, 16, device=device)
    mask = random_block_mask((sq, sk), (32, 48), 2, batch=2, density=0.4, causal=causal, device=device)
    visible = torch.ones(sq, sk, dtype=torch.bool)
    visible = visible.tril(sk - sq) if causal else visible
    p = weights(3 * q.cpu(), k.cpu(), visible)
    random, oracle = brute_bounds(p, mask.to("cpu"), visible[None, None])
    found = recall_bounds(3 * q, k, mask)
    torch.testing.assert_close(found.random.cpu(), torch.tensor(random), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.oracle.cpu(), torch.tensor(oracle), atol=1e-5, rtol=1e-5)
    measured = head_fidelity(3 * q, k, v, mask, bounds=True)
    assert (measured.oracle >= measured.recall - 1e-5).all()
    assert (measured.normalised <= 1 + 1e-4).all()


def test_random_blocks_score_nothing_and_the_best_all() -> None:
    q, k, _ = make_qkv(1, 512, 512, 1, 1, 16)
    q = 2 * q
    everything = BlockMask.causal((512, 512), block_size=32)
    assert recall_bounds(q, k, everything).random == pytest.approx(1, abs=1e-6)
    assert head_fidelity(q, k, None, everything, bounds=True).normalised == pytest.approx(1)
    visible = torch.ones(512, 512, dtype=torch.bool).tril()
    mass = by_blocks(weights(q, k, visible), (32, 32))[0, 0]
    best = torch.zeros(256, dtype=torch.bool)
    best[mass.flatten().topk(40).indices] = True
    best = best.view(1, 1, 16, 16) | torch.eye(16, dtype=torch.bool)
    best[..., 0] = True
    # Those with the most mass among what is not given: the choice of the bound itself.
    mask = BlockMask.from_blocks(best, block_size=(32, 32), seq_lens=(512, 512), causal=True)
    free = mass.masked_fill(torch.eye(16, dtype=torch.bool), -1)
    free[:, 0] = -1
    chosen = best[0, 0] & (free >= 0)
    assert chosen.sum() > 0
    assert set(free.flatten().topk(int(chosen.sum())).indices.tolist()) == set(
        chosen.flatten().nonzero()[:, 0].tolist()
    )
    assert head_fidelity(q, k, None, mask, bounds=True).normalised.item() == pytest.approx(1, abs=1e-3)
    drawn = [random_block_mask((512, 512), (32, 32), 1, density=0.3, diagonal=True, seed=s) for s in range(8)]
    scores = [head_fidelity(q, k, None, m, bounds=True).normalised.item() for m in drawn]
    assert abs(sum(scores) / len(scores)) < 0.1


def test_packed_and_padded_batches_are_their_sequences() -> None:
    q, k, v = make_qkv(1, 96, 96, 2, 1, 16)
    cu = torch.tensor([0, 40, 40, 96], dtype=torch.int32)
    mask = random_block_mask((56, 56), (16, 16), 2, batch=3, density=0.5, diagonal=True)
    packed = recall_bounds(q[0], k[0], mask, cu_seqlens_q=cu, max_seqlen_q=56)
    kept = torch.zeros(2, 2)
    for b, (start, end) in enumerate(((0, 40), (40, 40), (40, 96))):
        if start == end:
            continue
        blocks = mask.to_blocks()[b : b + 1, :, : -(-(end - start) // 16), : -(-(end - start) // 16)]
        own = BlockMask.from_blocks(blocks, block_size=(16, 16), seq_lens=(end - start,) * 2, causal=True)
        bounds = recall_bounds(q[:, start:end], k[:, start:end], own)
        kept += (end - start) * torch.stack(bounds)
    torch.testing.assert_close(torch.stack(packed), kept / 96, atol=1e-5, rtol=1e-5)
    whole = head_fidelity(q[0], k[0], v[0], mask, cu_seqlens_q=cu, max_seqlen_q=56, bounds=True)
    assert whole.recall.shape == (2,)
    ranges = torch.tensor([[10, 64]], dtype=torch.int32)
    q, k, v = make_qkv(1, 64, 64, 2, 2, 16)
    padded = head_fidelity(q, k, v, BlockMask.causal((64, 64), block_size=16), ranges_q=ranges, ranges_k=ranges)
    torch.testing.assert_close(padded.recall, torch.ones(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.worst, torch.ones(2), atol=1e-5, rtol=0)


def test_columns_count_as_what_they_cost() -> None:
    q, k, _ = make_qkv(1, 128, 128, 1, 1, 16)
    plain = random_block_mask((128, 128), (32, 32), 1, density=0.0, diagonal=True)
    columns = torch.full((1, 1, 4, 32), -1, dtype=torch.int32)
    columns[..., 3, :] = torch.arange(32)
    mask = plain.with_columns(columns)
    listed = plain.to_blocks()
    listed[..., 3, 0] = True
    same = BlockMask.from_blocks(listed, block_size=(32, 32), seq_lens=(128, 128), causal=True)
    # The column's block is the sink's: among the blocks only it is given, so compare densities and budgets.
    assert mask.density == pytest.approx(same.density)
    with_columns, without = recall_bounds(q, k, mask), recall_bounds(q, k, plain)
    assert with_columns.oracle > without.oracle
    assert with_columns.random > without.random


def test_heads_without_rows_are_nan_and_left_out_of_summaries() -> None:
    lse = torch.full((1, 2, 5), -math.inf)
    lse[:, 1] = 0.0
    found = head_statistics(BlockMask.causal((5, 5), block_size=16), lse, lse)
    assert found.recall[0].isnan()
    assert found.p05[0].isnan()
    assert found.recall[1] == 1
    summary = found.summary()
    assert summary["recall"] == 1
    assert summary["worst"] == 1
    assert "output_error" not in summary
    with pytest.raises(TypeError, match="mask: expected a BlockMask, got int"):
        head_fidelity(torch.zeros(1, 4, 1, 4), torch.zeros(1, 4, 1, 4), None, 3)
    with pytest.raises(TypeError, match="mask: expected a BlockMask, got int"):
        recall_bounds(torch.zeros(1, 4, 1, 4), torch.zeros(1, 4, 1, 4), 3)


def test_against_dense_outputs() -> None:
    q, k, v = make_qkv(1, 64, 64, 2, 2, 16)
    mask = random_block_mask((64, 64), (16, 16), 2, density=0.3, diagonal=True)
    allowed = torch.ones(64, 64, dtype=torch.bool).tril()
    dense, _ = dense_attention(q, k, v, allowed[None, None])
    sparse, _ = dense_attention(q, k, v, mask.to_dense())
    expected = [((sparse - dense)[:, :, h].norm() / dense[:, :, h].norm()).item() for h in range(2)]
    assert head_fidelity(q, k, v, mask).output_error.tolist() == pytest.approx(expected, rel=1e-4)


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in found)])
        return out


def test_no_tensor_grows_with_the_square_of_the_sequence() -> None:
    """But for one number a block, with which bounds are counted."""
    seq = 4096
    q, k, v = make_qkv(1, seq, seq, 1, 1, 16)
    mask = BlockMask.streaming(seq, num_sink_tokens=128, num_local_tokens=256, block_size=128)
    with Largest() as largest:
        head_fidelity(q, k, v, mask, bounds=True)
    assert seq * 16 <= largest.numel < seq * seq // 8
