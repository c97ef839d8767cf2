"""What torch offers, against the oracle, and what it does not do."""

from __future__ import annotations

import pytest
import torch

from sparseattn.testing import assert_close_to_oracle, dense_attention, make_qkv, random_block_mask
from sparseattn.testing.baselines import Unsupported, flex_attention, sdpa


@pytest.mark.parametrize("causal", [True, False])
def test_sdpa_is_dense_attention(causal: bool, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = make_qkv(1, 320, 320, 4, 2, 64, dtype=dtype, device=device)
    attend, said = sdpa(q, k, v, causal=causal, cudnn=device == "cuda")
    assert said["kv_heads_are"] in ("native", "repeated")
    allowed = torch.ones(1, 1, 320, 320, dtype=torch.bool, device=device)
    allowed = allowed.tril() if causal else allowed
    exact = dense_attention(q.double(), k.double(), v.double(), allowed)[0]
    assert_close_to_oracle(attend(), exact, dense_attention(q, k, v, allowed)[0], "o")


def test_what_sdpa_does_not_do() -> None:
    q, k, v = make_qkv(1, 32, 64, 4, 2, 16)
    with pytest.raises(Unsupported, match="top-left"):
        sdpa(q, k, v, causal=True)
    assert sdpa(q, k, v, causal=False)[0]().shape == (1, 32, 4, 16)
    with pytest.raises(Unsupported, match="cuDNN attention needs a CUDA GPU"):
        sdpa(q, k, v, causal=False, cudnn=True)


def test_flex_attention_wants_a_gpu() -> None:
    q, k, v = make_qkv(1, 64, 64, 4, 2, 16)
    with pytest.raises(Unsupported, match="FlexAttention is compared on a GPU"):
        flex_attention(q, k, v, random_block_mask((64, 64), (16, 16), 4))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_attends_the_blocks() -> None:
    q, k, v = make_qkv(1, 512, 512, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    mask = random_block_mask((512, 512), (128, 128), 4, diagonal=True, device="cuda")
    attend, _ = flex_attention(q, k, v, mask)
    exact = dense_attention(q.double(), k.double(), v.double(), mask.to_dense())[0]
    assert_close_to_oracle(attend(), exact, dense_attention(q, k, v, mask.to_dense())[0], "o")
