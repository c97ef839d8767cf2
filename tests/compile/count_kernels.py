"""How many kernels calls of one kind need, whatever their lengths, batch, density and strides; without a GPU.

    python tests/compile/count_kernels.py

One JSON line a kind of call: ``kind``, ``calls`` (how many), ``kernels``, compiled variants by name, and ``missed``,
kernels of the first call that its rehearsal does not compile. Calls run through Triton's launch machinery for a Hopper
GPU, up to where a kernel would be compiled. A script of its own, because the test process imports Triton for its
interpreter.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparseattn import BlockMask, PagedCache, block_sparse_attention, paged_attention
from sparseattn.kernels.launches import recording
from sparseattn.kernels.offline import HopperDriver
from sparseattn.kernels.rehearsal import Rehearsal
from sparseattn.ops.block_sparse import gluon, gluon_gradients, library
from sparseattn.ops.block_sparse import repeat as blocks_repeat
from sparseattn.ops.paged import gluon as paged
from sparseattn.ops.paged import repeat as paged_repeat
from sparseattn.ops.scores import landmark as landmarks
from sparseattn.ops.scores import landmark_gluon, landmark_triton
from sparseattn.selectors.landmark import LandmarkConfig, landmark
from sparseattn.testing.inputs import random_blocks

HEADS, KV_HEADS, DIM = 8, 2, 128

# Batch, queries, keys, density, and whether heads come before rows in memory.
PROMPTS = (
    (1, 4096, 4096, 0.1, False), (1, 16384, 16384, 0.1, False), (1, 16384, 16384, 0.6, True),
    (3, 5001, 5001, 0.2, False), (2, 1000, 7777, 0.3, True), (1, 1, 65536, 0.1, False),
    (1, 65536, 65536, 0.02, False), (1, 131072, 131072, 0.02, False), (1, 100, 16384, 0.5, False),
    (16, 129, 129, 1.0, False),
)  # fmt: skip
# Sequences, queries a sequence, keys a sequence.
BATCHES = (
    (1, 1, 100), (1, 1, 100_000), (7, 1, 5000), (64, 1, 8192), (256, 1, 33), (3, 100, 5000), (8, 2048, 8192),
    (64, 17, 1000), (1, 16384, 131_072), (16, 1, 8192), (32, 1, 32_768), (128, 1, 1000), (3, 1, 65_536),
)  # fmt: skip


def pretend() -> set[tuple[str, str]]:
    """Have launches note their kernels in the result instead of compiling them; and the Hopper kernels be chosen."""
    noted: set[tuple[str, str]] = set()

    def note(self: Any, key: Any, *_: Any) -> None:
        noted.add((self.__name__, str(key)))

    driver.set_active(HopperDriver())
    replaced: list[tuple[Any, str, Any]] = [
        (JITFunction, "_do_compile", note),
        (gluon, "unsupported_reason", lambda q, k, v, g, _gradients=None: gluon.refusal(q, k, v, g)),
        (paged, "unsupported_reason", paged.refusal),
        (landmark_gluon, "unsupported_reason", landmark_gluon.refusal),
        (landmark_triton, "unsupported_reason", lambda *_: None),
        (torch.cuda, "get_device_capability", lambda _device=None: (9, 0)),
        *((module, "processors_of", lambda _device: 132) for module in (gluon, paged, landmark_gluon)),
        (gluon_gradients, "_processors", lambda _q: 132),
        (landmark_triton, "_programs", lambda _device, per_processor: 132 * per_processor),
        *(
            (module, "rehearse", partial(rehearse, noted))
            for module in (library, blocks_repeat, paged_repeat, landmarks)
        ),
    ]
    for where, name, stand_in in replaced:
        setattr(where, name, stand_in)
    return noted


# What rehearsals of the call at hand would have compiled.
rehearsed: set[tuple[str, str]] = set()


def rehearse(noted: set[tuple[str, str]], _module: Any, _kind: Any, _device: Any, *calls: Callable[[], Any]) -> None:
    """In the place of ``rehearsal.rehearse``: note in ``rehearsed`` what it would compile."""
    before = set(noted)
    with torch.no_grad(), recording(Rehearsal()):
        for call in calls:
            call()
    rehearsed.update(noted)
    noted.intersection_update(before)


def tensors(batch: int, queries: int, keys: int, heads_first: bool, gradients: bool) -> list[Tensor]:
    """Uninitialised q, k and v, whose memory nobody touches."""
    made = []
    for rows, heads in ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS)):
        shape = (batch, heads, rows, DIM) if heads_first else (batch, rows, heads, DIM)
        t = torch.empty(shape, dtype=torch.bfloat16)
        made.append((t.transpose(1, 2) if heads_first else t).requires_grad_(gradients))
    return made


def attention(prompt: tuple[int, int, int, float, bool], gradients: str | None, masked: bool) -> None:
    batch, queries, keys, density, heads_first = prompt
    q, k, v = tensors(batch, queries, keys, heads_first, gradients is not None)
    mask = None
    if masked:
        blocks = random_blocks((queries, keys), (128, 128), HEADS, density=density, diagonal=True)
        mask = BlockMask.from_blocks(blocks, block_size=(128, 128), seq_lens=(queries, keys), causal=True)
    o = block_sparse_attention(
        q, k, v, mask, causal=None if masked else True, impl="gluon", deterministic=gradients == "deterministic"
    )
    if gradients:
        assert isinstance(o, Tensor)
        torch.autograd.grad(o, (q, k, v), torch.empty_like(o))


def ragged(prompt: tuple[int, int, int, float, bool], gradients: str | None) -> None:
    """Sequences behind one another, without a mask."""
    batch, queries, keys, _, _ = prompt
    q, k, v = (t[0] for t in tensors(1, batch * queries, batch * keys, False, gradients is not None))
    starts = torch.arange(batch + 1, dtype=torch.int32)
    spans: dict[str, Any] = {"cu_seqlens_q": starts * queries, "cu_seqlens_k": starts * keys}
    o = block_sparse_attention(
        q, k, v, causal=True, impl="gluon", deterministic=gradients == "deterministic", **spans, max_seqlen_q=queries,
        max_seqlen_k=keys,
    )  # fmt: skip
    if gradients:
        assert isinstance(o, Tensor)
        torch.autograd.grad(o, (q, k, v), torch.empty_like(o))


def pages(batch: tuple[int, int, int], page: int = 64) -> None:
    count, queries, keys = batch
    width = -(-keys // page)
    k, v = (torch.empty((count * width, page, KV_HEADS, DIM), dtype=torch.bfloat16) for _ in range(2))
    table = torch.zeros((count, width), dtype=torch.int32)
    cache = PagedCache(k, v, torch.full((count,), keys, dtype=torch.int32), table)
    starts = torch.arange(count + 1, dtype=torch.int32) * queries
    rows: dict[str, Any] = {} if queries == 1 else {"cu_seqlens_q": starts}
    q = torch.empty((count * queries, HEADS, DIM), dtype=torch.bfloat16)
    paged_attention(q, cache, impl="gluon", **rows, max_seqlen_q=queries)


def selection(prompt: tuple[int, int, int, float, bool], config: LandmarkConfig, impl: str) -> None:
    batch, queries, keys, _, heads_first = prompt
    q, k, _ = tensors(batch, queries, keys, heads_first, False)
    landmark(q, k, config, impl=impl)


def kinds() -> Iterator[tuple[str, list[partial[None]]]]:
    """Kinds of calls, and calls of each that differ in nothing that may need a kernel of its own."""
    for gradients in (None, "fast", "deterministic"):
        name = gradients or "forward"
        yield f"{name}, blocks", [partial(attention, prompt, gradients, True) for prompt in PROMPTS]
        yield f"{name}, dense", [partial(attention, prompt, gradients, False) for prompt in PROMPTS]
        yield f"{name}, ragged", [partial(ragged, prompt, gradients) for prompt in PROMPTS]
    yield "paged decode", [partial(pages, batch) for batch in BATCHES if batch[1] == 1]
    yield "paged prefill", [partial(pages, batch) for batch in BATCHES if batch[1] > 1]
    for impl in ("gluon", "triton"):
        for name, config in (("threshold", LandmarkConfig()), ("density", LandmarkConfig(density=0.1))):
            calls = [partial(selection, prompt, config, impl) for prompt in PROMPTS]
            yield f"landmark {name}, {impl}", calls


def main() -> None:
    noted = pretend()
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: unset it"
    for kind, calls in kinds():
        noted.clear()
        rehearsed.clear()
        calls[0]()
        missed = sorted({name for name, _ in noted - rehearsed})
        for call in calls[1:]:
            call()
        kernels = Counter(name for name, _ in noted)
        row = {"kind": kind, "calls": len(calls), "kernels": dict(sorted(kernels.items())), "missed": missed}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
