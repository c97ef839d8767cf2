"""Bad arguments of block-sparse attention: each names itself, what was expected, what came. Empty ones are defined."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention, unsupported_reason
from sparseattn.testing import make_qkv, random_block_mask

S = 32


def _call(**changes):
    """A good call (two sequences, 4 query and 2 KV heads) with some of its arguments replaced."""
    q, k, v = make_qkv(2, S, S, 4, 2, 16)
    arguments = {"q": q, "k": k, "v": v, "mask": random_block_mask((S, S), (16, 16), 4)} | changes
    return block_sparse_attention(**arguments)


def _mask(seq=(S, S), heads=4, batch=1, **kwargs):
    return random_block_mask(seq, (16, 16), heads, batch, **kwargs)


LENGTHS = torch.tensor([20, S], dtype=torch.int32)
CU = torch.tensor([0, 10, S], dtype=torch.int32)

BAD = {
    "q-rank": (ValueError, r"q: expected a 4-D tensor", {"q": torch.zeros(S, 4, 16)}),
    "v-rank": (ValueError, r"v: expected 4 dimensions", {"v": torch.zeros(S, 2, 16)}),
    "q-dtype": (TypeError, r"q: expected bfloat16.*got torch.int64", {"q": torch.zeros(2, S, 4, 16, dtype=torch.long)}),
    "k-dtype": (TypeError, r"k: expected torch.float32 like q", {"k": torch.zeros(2, S, 2, 16).half()}),
    "v-dtype": (TypeError, r"v: expected torch.float32 like q", {"v": torch.zeros(2, S, 2, 16).double()}),
    "k-device": (ValueError, r"k: expected device cpu", {"k": torch.zeros(2, S, 2, 16, device="meta")}),
    "k-head-dim": (ValueError, r"k: expected head_dim 16", {"k": torch.zeros(2, S, 2, 8)}),
    "k-batch": (ValueError, r"k: expected batch size 2", {"k": torch.zeros(3, S, 2, 16)}),
    "v-length": (ValueError, r"v: expected shape .* like k", {"v": torch.zeros(2, S - 1, 2, 16)}),
    "heads-do-not-divide": (
        ValueError,
        r"q: expected a number of heads that is a multiple of k's 3, got 4",
        {"k": torch.zeros(2, S, 3, 16), "v": torch.zeros(2, S, 3, 16)},
    ),
    "no-heads": (ValueError, r"v: expected at least one head", {n: torch.zeros(2, S, 0, 16) for n in "kv"}),
    "no-head-dim": (ValueError, r"v: expected at least one head", {"v": torch.zeros(2, S, 2, 0)}),
    "mask-type": (TypeError, r"mask: expected a BlockMask.*from_dense", {"mask": torch.ones(S, S, dtype=torch.bool)}),
    "mask-length": (ValueError, r"mask: expected lengths .* \(32, 32\), got \(32, 48\)", {"mask": _mask((S, 48))}),
    "mask-heads": (ValueError, r"mask: expected 1, Hkv = 2 or Hq = 4 heads, got 3", {"mask": _mask(heads=3)}),
    "mask-batch": (ValueError, r"mask: expected batch size 1 or 2, got 3", {"mask": _mask(batch=3)}),
    "mask-device": (ValueError, r"mask: expected device cpu", {"mask": _mask().to("meta")}),
    "causal-type": (TypeError, r"causal: expected True, False or None", {"causal": 1}),
    "causal-contradicts": (ValueError, r"causal: .* with a causal mask, got False", {"causal": False}),
    "scale-nan": (ValueError, r"scale: expected a finite number, got nan", {"scale": math.nan}),
    "scale-inf": (ValueError, r"scale: expected a finite number, got inf", {"scale": math.inf}),
    "scale-type": (TypeError, r"scale: expected a finite number, got Tensor", {"scale": torch.tensor(1.0)}),
    "softcap-negative": (ValueError, r"softcap: expected a positive number.*got -1", {"softcap": -1.0}),
    "softcap-nan": (ValueError, r"softcap: expected a finite number", {"softcap": math.nan}),
    "window-negative": (ValueError, r"window: expected \(left, right\).*got \(-1, 0\)", {"window": (-1, 0)}),
    "window-length": (ValueError, r"window: expected \(left, right\)", {"window": (1, 2, 3)}),
    "window-number": (TypeError, r"window: expected \(left, right\).*got 128", {"window": 128}),
    "window-float": (TypeError, r"window: expected \(left, right\)", {"window": (1.5, 0)}),
    "sinks-shape": (ValueError, r"sinks: expected shape \(4,\)", {"sinks": torch.zeros(2)}),
    "sinks-dtype": (TypeError, r"sinks: expected a floating-point tensor", {"sinks": torch.zeros(4).int()}),
    "sinks-device": (ValueError, r"sinks: expected device cpu", {"sinks": torch.zeros(4, device="meta")}),
    "impl": (ValueError, r"impl: expected one of .*'reference'.*got 'cuda'", {"impl": "cuda"}),
    "packed-rank": (ValueError, r"q: expected a 3-D tensor", {"cu_seqlens_q": CU}),
    "ranges-shape": (ValueError, r"ranges_q: expected shape", {"ranges_q": torch.zeros(3, 2, dtype=torch.int32)}),
    "ranges-dtype": (TypeError, r"ranges_k: expected int32", {"ranges_k": torch.zeros(2, 2)}),
    "ranges-outside": (
        ValueError,
        r"ranges_k: expected rows within 0..32",
        {"ranges_k": torch.tensor([[0, S], [0, S + 1]], dtype=torch.int32)},
    ),
    "ragged-mask-of-a-whole-call": (
        ValueError,
        r"mask: expected a mask for whole rows.*Pass the same ranges",
        {
            "mask": BlockMask.causal((S, S), block_size=16, seqused_q=LENGTHS, seqused_k=LENGTHS)
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "changes"), BAD.values(), ids=BAD)
def test_bad_argument_says_what_is_wrong(kind, message, changes):
    with pytest.raises(kind, match=message):
        _call(**changes)


def test_packed_sequence_longer_than_announced():
    q, k, v = (t[0] for t in make_qkv(1, S, S, 2, 2, 16))
    with pytest.raises(ValueError, match=r"max_seqlen_q: expected at least 22, the longest sequence, got 16"):
        block_sparse_attention(q, k, v, cu_seqlens_q=CU, max_seqlen_q=16)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_anything_valid_runs_on_a_cpu(impl: str):
    q, k, v = make_qkv(1, S, S, 4, 2, 300)
    assert unsupported_reason(q, k, v, impl=impl) is None


def test_an_implementation_that_cannot_says_why():
    q, k, v = make_qkv(1, S, S, 4, 2, 16, dtype=torch.float64)
    reason = unsupported_reason(q, k, v, impl="triton")
    assert reason is not None
    with pytest.raises(ValueError, match=r"impl: expected an implementation that can run this call, got 'triton'"):
        block_sparse_attention(q, k, v, impl="triton")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, S, S), (2, 0, S), (2, S, 0), (2, 0, 0)], ids=["batch", "queries", "keys", "both"]
)
def test_empty_tensors_have_defined_results(shape, masked: bool, device: str):
    batch, sq, sk = shape
    q, k, v = (t.requires_grad_() for t in make_qkv(batch, sq, sk, 4, 2, 16, 8, device=device))
    sinks = torch.zeros(4, device=device, requires_grad=True)
    mask = random_block_mask((sq, sk), (16, 16), 4, device=device) if masked else None
    o, lse = block_sparse_attention(q, k, v, mask, sinks=sinks, return_lse=True)
    assert o.shape == (batch, sq, 4, 8)
    assert lse.shape == (batch, 4, sq)
    assert (o == 0).all()
    assert (lse == -math.inf).all()
    for t, gradient in zip((q, k, v, sinks), torch.autograd.grad(o.sum(), (q, k, v, sinks)), strict=True):
        assert gradient.shape == t.shape
        assert (gradient == 0).all()


def test_queries_before_the_first_key_see_nothing(device: str):
    q, k, v = make_qkv(1, 20, 5, 2, 2, 16, device=device)
    o, lse = block_sparse_attention(q, k, v, return_lse=True)
    assert (o[:, :15] == 0).all()
    assert (lse[..., :15] == -math.inf).all()
    assert lse[..., 15:].isfinite().all()
    assert torch.allclose(o[:, 15], v[:, 0])


def test_without_triton_the_reference_runs_and_the_kernels_say_why_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    q, k, v = make_qkv(1, S, S, 4, 2, 16)
    assert block_sparse_attention(q, k, v).isfinite().all()
    with pytest.raises(ValueError, match=r"impl: .* triton cannot: Triton cannot be imported.*impl=\"reference\""):
        block_sparse_attention(q, k, v, impl="triton")


def test_an_old_triton_is_refused(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    q, k, v = make_qkv(1, S, S, 4, 2, 16)
    assert unsupported_reason(q, k, v, impl="triton") == "Triton 3.5.1 is older than 3.6"


def test_reasons_may_be_asked_with_gradients():
    q, k, v = make_qkv(1, S, S, 4, 2, 16)
    assert unsupported_reason(q, k, v, impl="reference", gradients=True, deterministic=True) is None
    assert unsupported_reason(q, k, v, impl="gluon", gradients=True) == unsupported_reason(q, k, v, impl="gluon")
