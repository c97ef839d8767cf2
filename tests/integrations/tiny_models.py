"""Tiny random models of every supported architecture, and the comparison with Transformers' eager attention."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import sparseattn.hf as hf
from sparseattn.testing import assert_close_to_oracle

SEQ = 200
VOCAB = 256
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    # Large enough for attention to be far from uniform, so that a wrong mask shows.
    initializer_range=0.15,
)
_LATENT: dict[str, Any] = dict(
    moe_intermediate_size=32,
    n_shared_experts=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    num_mtp_layers=0,
)
_SLIDING = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", dict(head_dim=32)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=32)),
    "qwen3-sliding": (
        "Qwen3Config",
        dict(head_dim=32, use_sliding_window=True, sliding_window=70, max_window_layers=1),
    ),
    "mistral-sliding": ("MistralConfig", dict(head_dim=32, sliding_window=70)),
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", dict(head_dim=32, sliding_window=70, query_pre_attn_scalar=64)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=32, sliding_window=70, layer_types=_SLIDING)),
    "gpt-oss": ("GptOssConfig", dict(head_dim=32, sliding_window=70, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek-v3": ("DeepseekV3Config", {"num_key_value_heads": 4, **_LATENT}),
}
SLIDING = ("qwen3-sliding", "mistral-sliding", "gemma2", "gemma3", "gpt-oss")


def make_config(name: str, **overrides: Any) -> Any:
    kind, own = CONFIGS[name]
    return getattr(transformers, kind)(**{**_COMMON, **own, **overrides})


def make_model(name: str, device: str = "cpu", impl: str = "sparseattn", **overrides: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        make_config(name, **overrides),
        attn_implementation=impl,
        experts_implementation="eager",  # the others take no float64
    ).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):  # zeros by default
            nn.init.normal_(parameter)
    return model.to(device)


@contextlib.contextmanager
def everything_selected(**more: Any) -> Iterator[None]:
    """Go through selection and the block-sparse operator, and select every block."""
    with hf.options(method="xattention", threshold=1.0, block_size=64, min_seq_len=16, **more):
        yield


def attention(model: Any, impl: str) -> Any:
    model.set_attn_implementation(impl)
    return model


def tokens(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, shape, generator=generator).to(device)


def padding(lengths: list[int], side: str, width: int = SEQ, device: str = "cpu") -> Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.long, device=device)
    for row, length in enumerate(lengths):
        mask[row, slice(width - length, None) if side == "left" else slice(None, length)] = 1
    return mask


def alone(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits (or hidden states) of the valid tokens of a padded batch, every sequence run by itself."""
    return torch.cat([model(row[keep][None])[0][0] for row, keep in zip(ids, mask.bool(), strict=True)])


def assert_like_eager(
    model: nn.Module,
    call: Callable[[nn.Module], Tensor],
    name: str,
    oracle: Callable[[nn.Module], Tensor] | None = None,
) -> None:
    """``call`` under the model's attention matches eager's by the tolerance rule.

    The oracle is eager in float64, by ``oracle`` where eager in float64 cannot make the call itself: its softmax is in
    float32, where the float64 mask value overflows, so rows without keys (left padding) become NaN.
    """
    got = call(model)
    eager = attention(copy.deepcopy(model), "eager")
    low = call(eager)
    assert_close_to_oracle(got, (oracle or call)(eager.double()).double(), low, name)
