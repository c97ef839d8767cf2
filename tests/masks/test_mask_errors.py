"""Every bad input says which argument is wrong."""

from __future__ import annotations

import builtins
import dataclasses

import pytest
import torch
import torch.nn.attention.flex_attention as flex

from sparseattn.masks import BlockMask

B = BlockMask  # keeps a case on one line


def fields(**changes):
    """Fields of a good 2-head mask over 4 x 5 blocks."""
    good = {
        "kv_num_blocks": torch.full((1, 2, 4), 2, dtype=torch.int32),
        "kv_indices": torch.tensor([1, 4, 0], dtype=torch.int32).expand(1, 2, 4, 3),
        "block_size": (16, 32),
        "seq_lens": (60, 150),
    }
    return good | changes


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


good = fields()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"kv_num_blocks": [1]}, TypeError, r"kv_num_blocks: expected a torch\.Tensor, got list"),
        ({"kv_num_blocks": good["kv_num_blocks"].long()}, TypeError, "kv_num_blocks: expected int32, got torch.int64"),
        ({"kv_indices": good["kv_indices"].float()}, TypeError, r"kv_indices: expected int32, got torch\.float32"),
        ({"kv_num_blocks": ints(2, 2)}, ValueError, "kv_num_blocks: expected a 3-D tensor"),
        ({"kv_indices": good["kv_indices"][0]}, ValueError, "kv_indices: expected a 4-D tensor"),
        ({"kv_num_blocks": good["kv_num_blocks"][..., :3]}, ValueError, r"kv_num_blocks: .*H, 4\] for 60 queries"),
        ({"seq_lens": (70, 150)}, ValueError, r"kv_num_blocks: .*\[B\|1, H, 5\] for 70 queries"),
        ({"seq_lens": (60, 40)}, ValueError, r"kv_indices: .*K at most 2 \(40 keys"),
        ({"kv_indices": good["kv_indices"][:, :1]}, ValueError, r"kv_indices: expected shape \[1, 2, 4\]"),
        ({"kv_indices": torch.zeros(1, 2, 4, 6, dtype=torch.int32)}, ValueError, "kv_indices: .*K at most 5"),
        ({"kv_num_blocks": good["kv_num_blocks"][:, :0], "kv_indices": good["kv_indices"][:, :0]}, ValueError,
         "kv_num_blocks: expected at least one batch row and one head"),
        ({"kv_indices": good["kv_indices"].to("meta")}, ValueError, "kv_indices: expected device cpu .*got meta"),
        ({"block_size": (16, 24)}, ValueError, r"block_size: expected multiples of 16 in 16\.\.256, got \(16, 24\)"),
        ({"block_size": (512, 16)}, ValueError, "block_size: "),
        ({"block_size": (0, 16)}, ValueError, "block_size: "),
        ({"block_size": 16.0}, TypeError, "block_size: expected an int or a pair of ints"),
        ({"seq_lens": (60, -1)}, ValueError, "seq_lens: expected lengths of at least 0"),
        ({"seq_lens": (60, 150, 1)}, TypeError, "seq_lens: expected an int or a pair of ints"),
        ({"causal": 1}, TypeError, "causal: expected True or False, got 1"),
        ({"window": 5}, TypeError, r"window: expected None or a pair \(left, right\), got 5"),
        ({"window": (1.5, 0)}, TypeError, "window: expected ints or None"),
        ({"window": (-1, 0)}, ValueError, "window: expected counts of at least 0.* None for an unbounded side"),
        ({"seqused_q": [3]}, TypeError, r"seqused_q: expected a torch\.Tensor"),
        ({"seqused_q": ints(3).long()}, TypeError, "seqused_q: expected int32"),
        ({"seqused_k": ints(3)[None]}, ValueError, "seqused_k: expected a 1-D tensor"),
        ({"seqused_q": ints(3, 4), "seqused_k": ints(3)}, ValueError, r"seqused_k: .*\(2,\) .*like seqused_q"),
        ({"seqused_q": ints(3).to("meta")}, ValueError, "seqused_q: expected device cpu"),
        ({"seqused_k": ints()}, ValueError, r"seqused_k: expected shape \[B\]"),
    ],
)  # fmt: skip
def test_fields_are_checked_without_a_look_at_the_contents(change, kind, message):
    with pytest.raises(kind, match=message):
        BlockMask(**fields(**change))


def test_batches_of_lists_and_lengths_must_agree():
    two = {name: good[name].expand(2, *good[name].shape[1:]) for name in ("kv_num_blocks", "kv_indices")}
    with pytest.raises(ValueError, match=r"seqused_q: expected shape \[B\] with B = 2, got shape \(3,\)"):
        BlockMask(**fields(**two, seqused_q=ints(1, 2, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_num_blocks": torch.full((1, 2, 4), 4, dtype=torch.int32)}, r"kv_num_blocks: expected counts in 0\.\.3"),
        ({"kv_num_blocks": torch.full((1, 2, 4), -1, dtype=torch.int32)}, "kv_num_blocks: .*got values in -1..-1"),
        ({"kv_indices": ints(1, 5, 0).expand(1, 2, 4, 3)}, r"kv_indices: expected block indices in \[0, 5\), got 5"),
        ({"kv_indices": ints(-1, 3, 0).expand(1, 2, 4, 3)}, r"kv_indices: .*got -1"),
        ({"kv_indices": ints(3, 1, 0).expand(1, 2, 4, 3)}, "kv_indices: expected ascending lists.*sort=True"),
        ({"kv_indices": ints(3, 3, 0).expand(1, 2, 4, 3)}, "kv_indices: expected unique entries, got a duplicate"),
        ({"seqused_q": ints(61)}, r"seqused_q: expected lengths in 0\.\.60"),
        ({"seqused_k": ints(-1)}, r"seqused_k: expected lengths in 0\.\.150"),
    ],
)
def test_validate_checks_the_contents(change, message):
    mask = BlockMask(**fields(**change))
    with pytest.raises(ValueError, match=message):
        mask.validate()
    assert BlockMask(**fields()).validate().heads == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": (16, 48), "seq_lens": (60, 240)}, r"block_size: expected the same .*\(16, 32\)"),
        ({"seq_lens": (61, 150)}, "seq_lens: expected the same"),
        ({"causal": True}, "causal: expected the same"),
        ({"window": (3, None)}, "window: expected the same"),
        ({"seqused_q": ints(3)}, "seqused_q: expected the same lengths"),
        ({name: good[name].repeat_interleave(2, 1)[:, :3] for name in ("kv_num_blocks", "kv_indices")},
         r"heads: expected 1 or the same in both masks \(2\), got 3\. Use expand_heads"),
    ],
)  # fmt: skip
def test_union_needs_the_same_frame(change, message):
    with pytest.raises(ValueError, match=message):
        BlockMask(**fields()) | BlockMask(**fields(**change))


def test_sets_need_equal_batches_and_masks():
    masks = [B.from_blocks(torch.ones(b, 1, 2, 2, dtype=torch.bool), seq_lens=32, block_size=16) for b in (2, 3)]
    with pytest.raises(ValueError, match="batch: expected 1 or the same in both masks"):
        masks[0] & masks[1]
    with pytest.raises(TypeError, match="unsupported operand"):
        masks[0] | torch.ones(2)
    with pytest.raises(TypeError, match="unsupported operand"):
        masks[0] & None


@pytest.mark.parametrize("heads", [0, 3, -2])
def test_expand_heads_needs_a_multiple(heads):
    with pytest.raises(ValueError, match="heads: expected a multiple of the mask's 2 heads"):
        BlockMask(**fields()).expand_heads(heads)


def flex_mask(block_size):
    diagonal = lambda b, h, q, kv: q >= kv  # noqa: E731
    return flex.create_block_mask(diagonal, None, None, 64, 64, device="cpu", BLOCK_SIZE=block_size)


def flat_flex_mask():
    """FlexAttention lets lists go without batch and head."""
    counts, indices = torch.ones(4, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.int32)
    return flex.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, compute_q_blocks=False)


dense = torch.ones(32, 32, dtype=torch.bool)
bands = {"seq_lens": 64, "block_size": 16}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: B.causal("64"), TypeError, "seq_lens: expected an int"),
        (lambda: B.causal(True), TypeError, "seq_lens: expected an int"),
        (lambda: B.sliding_window(64, None), TypeError, "window: expected a pair"),
        (lambda: B.streaming(64, num_sink_tokens=-1, num_local_tokens=4), ValueError, "num_sink_tokens: .*least 0"),
        (lambda: B.streaming(64, num_sink_tokens=1, num_local_tokens=4.0), TypeError, "num_local_tokens: .*an int"),
        (lambda: B.strided(64, stride=0), ValueError, "stride: expected at least 1"),
        (lambda: B.from_blocks([[True]], **bands), TypeError, r"blocks: expected a torch\.Tensor"),
        (lambda: B.from_blocks(torch.ones(4, 4), **bands), TypeError, "blocks: expected bool, got torch.float32"),
        (lambda: B.from_blocks(dense[0], **bands), ValueError, "blocks: expected .*MB, NB"),
        (lambda: B.from_blocks(dense, **bands), ValueError, "blocks: expected 4 x 4 blocks for seq_lens"),
        (lambda: B.from_blocks(dense[:4, :4], **bands, max_blocks=-1), ValueError, "max_blocks: .*at least 0"),
        (lambda: B.from_blocks(dense[:4, :4], **bands, repeat=(1, 0)), ValueError, "repeat: .*at least 1"),
        (lambda: B.from_blocks(dense[:4, :4], **bands, repeat=3), ValueError, r"2 x 2 blocks for .*repeat=\(3, 3\)"),
        (lambda: B.from_dense(dense.int()), TypeError, "dense: expected bool"),
        (lambda: B.from_dense(dense[0]), ValueError, "dense: expected .*Sq, Sk"),
        (lambda: B.from_dense(dense.tril(), block_size=16), ValueError, "dense: .*pass causal=True"),
        (lambda: B.from_dense(dense, block_size=16, causal=True, superset=True), ValueError, "dense: .*496 such"),
        (lambda: B.from_indices(torch.ones(4, 2), **bands), TypeError, "indices: expected integers"),
        (lambda: B.from_indices(torch.tensor([1]), **bands), ValueError, "indices: expected .*MB, K"),
        (lambda: B.from_indices(torch.zeros(3, 1).int(), **bands), ValueError, "indices/counts: .*got .*1, 1, 3, 1"),
        (lambda: B.from_indices(torch.zeros(4, 1).int(), torch.ones(3).int(), **bands), ValueError, "indices/counts"),
        (lambda: B.from_indices(torch.zeros(4, 1).int(), torch.ones(4), **bands), TypeError, "counts: .*integers"),
        (lambda: B.from_indices(torch.zeros(4, 1).int(), torch.full((4,), 2), **bands), ValueError, "counts: .*got 2"),
        (lambda: B.from_indices(torch.tensor([[-1, 2]] * 4), **bands), ValueError, "indices: .*got -1.*sort=True"),
        (lambda: B.from_indices(torch.tensor([[2, 1]] * 4), **bands), ValueError, "kv_indices: expected ascending"),
        (lambda: B.from_indices(torch.tensor([[2, 4]] * 4), **bands, sort=True), ValueError, "indices: .*got 4"),
        (lambda: B.from_indices(torch.tensor([[2, -2]] * 4), **bands, sort=True), ValueError, "indices: .*got -2"),
        (lambda: B.from_indices(torch.tensor([[2**33]] * 4), **bands), ValueError, "indices: .*got 8589934592"),
        (lambda: B.from_bsr(ints(0, 1), ints(0), **bands), ValueError, r"indptr: .*with MB = 4"),
        (lambda: B.from_bsr(torch.ones(5), ints(0), **bands), TypeError, "indptr: expected integers"),
        (lambda: B.from_bsr(ints(0, 1, 1, 1, 1), ints(0)[None], **bands), ValueError, r"indices: expected \[nnz\]"),
        (lambda: B.from_bsr(ints(0, 1, 1, 1, 2), ints(0), **bands), ValueError, r"indptr: expected offsets in 0\.\.1"),
        (lambda: B.from_bsr(ints(0, 1, 0, 1, 1), ints(0), **bands), ValueError, "indptr: .*never decrease"),
        (lambda: B.from_bsr(ints(0, 2, 2, 2, 2), ints(0, 1), **bands, max_blocks=1), ValueError, "indptr: .*at most 1"),
        (lambda: B.from_bsr(ints(0, 2, 2, 2, 2), ints(0, 4), **bands), ValueError, "indices: .*got 4"),
        (lambda: B.from_bsr(ints(0, 2, 2, 2, 2), ints(1, 0), **bands), ValueError, "kv_indices: .*ascending"),
        (lambda: B.from_flex(torch.ones(2)), TypeError, "block_mask: expected a torch.nn.attention"),
        (lambda: B.from_flex(flex_mask(512)), ValueError, "block_mask: expected BLOCK_SIZE of multiples of 16"),
        (lambda: B.from_flex(flex_mask(16)[:1]), ValueError, "block_mask: expected a mask_mod that can be call"),
        (lambda: B.from_flex(flat_flex_mask()), ValueError, r"block_mask: expected kv_num_blocks \[B, H, 4\]"),
    ],
)  # fmt: skip
def test_constructors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_plot_needs_matplotlib(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "sparseattn\[viz\]"'):
        B.causal(64, block_size=16).plot()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": [2]}, r"heads: expected heads in \[0, 2\), got 2"),
        ({"heads": []}, "heads: expected at least one head"),
        ({"batch": 1}, r"batch: expected a batch row in \[0, 1\), got 1"),
    ],
)
def test_plot_checks_what_it_draws(arguments, message):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        BlockMask(**fields()).plot(**arguments)


def test_errors_leave_the_mask_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlockMask(**fields()).window = (1, 1)
