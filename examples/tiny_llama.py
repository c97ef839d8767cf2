"""A small Llama in plain PyTorch, and the Muon optimizer: what examples/train_retrieval.py trains with.

The arithmetic is that of Transformers' ``LlamaForCausalLM``; ``TinyLlama.save`` writes a folder that it loads. Weights
are float32 and stacked over layers, so that Muon treats all layers of a kind in one batched call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

#: (q [B, L, HQ, D], k [B, L, HK, D], v [B, L, HK, D]) -> [B, L, HQ, D], causal.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 512
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e7
    norm_eps: float = 1e-5
    max_positions: int = 32768

    def to_hf(self, bos: int, eos: int) -> dict[str, object]:
        """The contents of a Transformers config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "dtype": "bfloat16",
            "use_cache": True,
        }


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * h.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def project_qkv(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projections and rotary embedding of a layer; x [B * L, C] -> q [B * L, HQ, D], k and v [B * L, HK, D]."""
    h = rms_norm(x, norm, config.norm_eps)
    q = F.linear(h, wq.to(h.dtype)).view(-1, config.heads, config.head_dim)
    k = F.linear(h, wk.to(h.dtype)).view(-1, config.kv_heads, config.head_dim)
    v = F.linear(h, wv.to(h.dtype)).view(-1, config.kv_heads, config.head_dim)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def project_out(
    x: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """Output projection and SwiGLU of a layer, both added to the residual stream x [B * L, C]."""
    x = x + F.linear(attended, wo.to(attended.dtype))
    h = rms_norm(x, norm, eps)
    return x + F.linear(F.silu(F.linear(h, gate.to(h.dtype))) * F.linear(h, up.to(h.dtype)), down.to(h.dtype))


def weighted_loss(
    x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, weights: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross entropies, and where the most likely token is the target; x [N, C], the rest [N]."""
    logits = F.linear(rms_norm(x, norm, eps), head.to(x.dtype)).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    return (loss * weights).sum(), logits.argmax(-1) == targets


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own causal attention, whichever kernel it prefers."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def cudnn_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


class LocalSinkAttention:
    """Causal attention to the first `sink` and the `local` most recent tokens only (StreamingLLM), in row chunks."""

    def __init__(self, sink: int, local: int, chunk: int = 512):
        self.sink, self.local, self.chunk = sink, local, chunk

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        position = torch.arange(length, device=q.device)
        out = torch.empty_like(q)
        for first in range(0, length, self.chunk):
            end = min(first + self.chunk, length)
            near = max(self.sink, first - self.local + 1)
            cols = torch.cat([position[: min(self.sink, end)], position[near:end]])
            i, j = position[first:end, None], cols[None]
            visible = (j <= i) & ((j < self.sink) | (i - j < self.local))
            rows, keys, values = (t.transpose(1, 2) for t in (q[:, first:end], k[:, cols], v[:, cols]))
            attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=visible, enable_gqa=True)
            out[:, first:end] = attended.transpose(1, 2)
        return out


#: Transformers' names of the weights of a layer.
LAYER_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
}


class TinyLlama(nn.Module):
    """Llama with float32 weights that computes in `dtype`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.config, self.dtype = config, dtype
        n, c, d = config.layers, config.hidden_size, config.head_dim

        def normal(*shape: int, std: float | None = None) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * (shape[-1] ** -0.5 if std is None else std))

        # Projections back into the residual stream start at zero, so that every layer starts as the identity.
        self.embedding = normal(config.vocab_size, c, std=0.7)
        self.q = normal(n, config.heads * d, c)
        self.k, self.v = normal(n, config.kv_heads * d, c), normal(n, config.kv_heads * d, c)
        self.o = normal(n, c, config.heads * d, std=0.0)
        self.gate, self.up = normal(n, config.intermediate_size, c), normal(n, config.intermediate_size, c)
        self.down = normal(n, c, config.intermediate_size, std=0.0)
        self.norm_attention, self.norm_mlp = nn.Parameter(torch.ones(n, c)), nn.Parameter(torch.ones(n, c))
        self.norm = nn.Parameter(torch.ones(c))
        self.head = normal(config.vocab_size, c, std=0.02)
        self.attention: Attention = sdpa
        self._cos_sin: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.compile_pieces(False)

    def compile_pieces(self, enabled: bool) -> None:
        """Compile what lies between attention calls. Inputs are flat, so that one compilation serves all lengths."""
        pieces = (project_qkv, project_out, weighted_loss)
        self._qkv, self._out, self._loss = (torch.compile(f, dynamic=False) if enabled else f for f in pieces)

    def matrices(self) -> list[nn.Parameter]:
        """The stacked matrices inside layers: what Muon is for."""
        return [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]

    def others(self) -> list[nn.Parameter]:
        return [self.embedding, self.head, self.norm_attention, self.norm_mlp, self.norm]

    def _rotary(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B * L, D]."""
        if (batch, length) not in self._cos_sin:
            if len(self._cos_sin) > 12:
                self._cos_sin.clear()
            d, device = self.config.head_dim, self.embedding.device
            inverse = self.config.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float, device=device) / d)
            angle = torch.arange(length, device=device).float()[:, None] * inverse
            angle = torch.cat((angle, angle), -1)
            self._cos_sin[batch, length] = (
                angle.cos().to(self.dtype).repeat(batch, 1),
                angle.sin().to(self.dtype).repeat(batch, 1),
            )
        return self._cos_sin[batch, length]

    def _trunk(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> residual stream [B * L, C]."""
        c = self.config
        batch, length = tokens.shape
        cos, sin = self._rotary(batch, length)
        x = F.embedding(tokens.reshape(-1), self.embedding.to(self.dtype))
        for layer in zip(*(getattr(self, name).unbind(0) for name in LAYER_NAMES), strict=True):
            w = dict(zip(LAYER_NAMES, layer, strict=True))
            q, k, v = self._qkv(x, w["norm_attention"], w["q"], w["k"], w["v"], cos, sin, c)
            attended = self.attention(
                q.view(batch, length, c.heads, c.head_dim),
                k.view(batch, length, c.kv_heads, c.head_dim),
                v.view(batch, length, c.kv_heads, c.head_dim),
            ).reshape(batch * length, c.heads * c.head_dim)
            x = self._out(x, attended, w["o"], w["norm_mlp"], w["gate"], w["up"], w["down"], c.norm_eps)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, float32 [B, L, V]."""
        h = rms_norm(self._trunk(tokens), self.norm, self.config.norm_eps)
        return F.linear(h, self.head.to(h.dtype)).float().view(*tokens.shape, -1)

    def loss(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Training loss.

        Args:
            tokens: int64 [B, L].
            weights: [B, L], at t the weight of predicting token t (that of token 0 is ignored).

        Returns:
            The weighted sum of cross entropies, and bool [B, L]: token t was the most likely one.
        """
        targets = tokens.roll(-1, 1).reshape(-1)
        weights = weights.roll(-1, 1)
        weights[:, -1] = 0
        x = self._trunk(tokens)
        loss, hit = self._loss(x, self.norm, self.head, targets, weights.reshape(-1), self.config.norm_eps)
        return loss, hit.view(tokens.shape).roll(1, 1)

    @torch.no_grad()
    def round_to_bfloat16(self) -> None:
        """Make the weights what ``save`` stores, to evaluate what is shipped."""
        for p in self.parameters():
            p.copy_(p.bfloat16().float())

    def save(self, folder: Path, bos: int, eos: int) -> None:
        """Write config.json and model.safetensors (bfloat16) as Transformers reads them."""
        from safetensors.torch import save_file

        weights = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm,
            "lm_head.weight": self.head,
        }
        for i in range(self.config.layers):
            weights |= {f"model.layers.{i}.{hf}.weight": getattr(self, name)[i] for name, hf in LAYER_NAMES.items()}
        folder.mkdir(parents=True, exist_ok=True)
        stored = {name: torch.clone(w.detach().bfloat16().cpu()).contiguous() for name, w in weights.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config.to_hf(bos, eos), indent=1) + "\n")


def orthogonalize(g: Tensor) -> Tensor:
    """Nearly the closest orthogonal matrices to g [..., M, N], by five Newton-Schulz steps (Jordan et al. 2024)."""
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024), for stacks of matrices [layers, M, N]."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95):
        self.parameters, self.lr, self.momentum = parameters, lr, momentum
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        for p, buffer in zip(self.parameters, self.buffers, strict=True):
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = orthogonalize(p.grad.lerp(buffer, self.momentum))
            shape_factor = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
            p.add_(update, alpha=-self.lr * lr_scale * shape_factor)

    def reset(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()
