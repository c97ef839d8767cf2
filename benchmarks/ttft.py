"""Time to first token of a Llama-shaped model with random weights: dense attention against sparse.

    python -m benchmarks.ttft --layers 8 --out results.jsonl

One prefill with a cache, the logits of the last token alone. Random weights attend nearly evenly, so a threshold would
keep what it never keeps of a trained model: methods are given the density instead, and answers are judged elsewhere.
The gate holds a two-layer model of the same shape, on a short prompt and at density 1 (everything selected), against
the same model in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sparseattn
from benchmarks.harness import Row, Writer, arguments, finish, quietly
from sparseattn.testing import sampled
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.timing import time_ms
from sparseattn.testing.workloads import DTYPES

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
# How a method is told the share of the blocks to keep, besides ``density``.
METHODS: dict[str, dict[str, Any]] = {
    "landmark": {},
    "flashprefill": {"rule": "topk"},
    "flexprefill": {},
    "xattention": {"rule": "topk", "stride": 16},
}


def build(shape: str, layers: int, dtype: torch.dtype, device: torch.device, **changes: int) -> Any:
    """A Llama of that shape with random weights, seeded, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {**SHAPES[shape], **changes, "num_hidden_layers": layers}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(**settings, max_position_embeddings=131072, rope_parameters=rope)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that a large model is never held in float32
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def prefill(model: Any, ids: Tensor) -> Tensor:
    """Logits of the last token, [1, vocab]."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1]


def gate(shape: str, dtype: torch.dtype, device: torch.device, n: int) -> Row:
    """Sparse attention with everything selected must be as close to float64 as eager attention is."""
    model = build(shape, 2, dtype, device, vocab_size=512)
    ids = torch.randint(0, 512, (1, n), generator=torch.Generator().manual_seed(0)).to(device)
    model.set_attn_implementation("eager")
    eager = prefill(model, ids)
    exact = prefill(copy.deepcopy(model).double(), ids)
    model.set_attn_implementation("sparseattn_landmark")
    with sparseattn.options(density=1.0, min_seq_len=1):
        got = prefill(model, ids)
    return sampled.gate(("logits",), (got,), (exact,), (eager,))


@contextmanager
def cudnn() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield


def measure(model: Any, ids: Tensor, impl: str, options: dict[str, Any], gated: Row, budget_ms: float) -> Row:
    """Time the prefill under one implementation, then run it once more to read its density."""
    if impl == "sdpa_cudnn" and ids.device.type != "cuda":
        raise Unsupported("cuDNN attention needs a CUDA GPU")
    model.set_attn_implementation("sdpa" if impl == "sdpa_cudnn" else impl)
    with cudnn() if impl == "sdpa_cudnn" else nullcontext(), sparseattn.options(**options):
        run = partial(prefill, model, ids)
        try:
            run()
        except RuntimeError as error:
            if impl == "sdpa_cudnn" and "No available kernel" in str(error):
                raise Unsupported("this torch's cuDNN attention does not run what the model asks for") from error
            raise
        row = time_ms(run, ids.device, budget_ms=budget_ms, runs=(2, 10))
        if not impl.startswith("sparseattn"):
            return row
        with sparseattn.record() as calls:
            run()
    densities = [call.density for call in calls]
    return {"density": round(sum(densities) / len(densities), 4), **gated, **row}


def main(argv: list[str] | None = None) -> list[Row]:
    parser = arguments("Time to first token, dense and sparse.", "ttft")
    parser.add_argument("--n", type=int, nargs="+", default=[131072])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=8, help="8 of 32 by default, to fit a short run")
    parser.add_argument("--method", choices=list(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--density", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--gate-n", type=int, default=2048, help="prompt length of the gate")
    arguments_ = parser.parse_args(argv)
    sparseattn.register()
    device, dtype = torch.device(arguments_.device), DTYPES[arguments_.dtype]
    budget = 500.0 if arguments_.quick else 6000.0
    settings: list[tuple[str, dict[str, Any]]] = [("sdpa", {}), ("sdpa_cudnn", {}), ("sparseattn_dense", {})]
    for method in arguments_.method:
        for density in arguments_.density:
            settings.append(("sparseattn", {"method": method, **METHODS[method], "density": density}))
    with Writer(arguments_.out, "ttft", arguments_.commit) as writer, ExitStack() as stack:
        quietly(stack)
        gated = gate(arguments_.shape, dtype, device, arguments_.gate_n)
        layers = 2 if arguments_.quick else arguments_.layers
        model = build(arguments_.shape, layers, dtype, device)
        for n in arguments_.n:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, model.config.vocab_size, (1, n), generator=generator).to(device)
            for impl, options in settings:
                row = {"shape": arguments_.shape, "layers": layers, "n": n, "dtype": arguments_.dtype, "impl": impl}
                row |= {"device": arguments_.device}
                if options:
                    row |= {"method": options["method"], "target": options["density"]}
                    options = {**options, "min_seq_len": min(n, 1024)}
                writer.measure(row, partial(measure, model, ids, impl, options, gated, budget))
    return writer.rows


if __name__ == "__main__":
    finish(main())
