"""The authors' own code of published selectors, where it is installed, for ``benchmarks.selectors``.

What they select cannot be held to our references, whose rules differ in details. A selection must list every row's own
diagonal; an output must equal dense attention in the first rows, whose keys every method keeps. Recall (of selections)
and the distance from dense attention (of outputs) say the rest.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row
from benchmarks.rivals.registry import Prepared
from benchmarks.selector_gates import Oracle
from benchmarks.selector_problems import Problem, Setting
from benchmarks.selector_sets import xattention
from sparseattn.testing import sampled
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.timing import time_ms

_FIRST_ROWS = 32


@dataclass(frozen=True)
class Rival:
    """One call of somebody else's.

    Attributes:
        name: As rows spell the implementation.
        package: What is imported.
        setting: The method and options, under the names that ours have.
        phase: "selection", whose call returns what ``listed`` reads, or "both", whose call returns the output
            ``[1, S, Hq, D]``.
        prepare: Brings a problem to its form. Raises ``Unsupported``.
        listed: From a selection's result to what it lists.
    """

    name: str
    package: str
    setting: Setting
    phase: str
    prepare: Callable[[Problem], Prepared]
    listed: Callable[[Problem, Any], sampled.Selected] | None = None

    def missing(self, device: torch.device) -> str | None:
        """Why it does not run here, or None; imports no more than what the package lies in."""
        try:
            found = find_spec(self.package)
        except ModuleNotFoundError:
            found = None
        if not found:
            return f"{self.package} is not installed"
        return None if device.type == "cuda" else f"{self.package} needs a CUDA GPU"


def measure_rival(problem: Problem, rival: Rival, budget_ms: float, *, oracle: bool = True) -> Row:
    """Gate and time one.

    Args:
        problem: The inputs.
        rival: Who.
        budget_ms: Time for about this long.
        oracle: Whether to say recall of selections, for which dense attention of the sampled rows is needed.

    Raises:
        Unsupported: It is not installed, or does not do this.
        ArithmeticError: A selection lacks a diagonal.
        AssertionError: An output is wrong in the first rows.
    """
    reason = rival.missing(problem.device)
    if reason is not None:
        raise Unsupported(reason)
    prepared = rival.prepare(problem)
    result = prepared.run()
    if rival.listed is None:
        said = _gate_output(problem, result)
    else:
        said = _gate_selection(problem, rival.listed(problem, result), oracle)
    del result
    return {**prepared.said, **said, **time_ms(prepared.run, problem.device, budget_ms=budget_ms)}


def _gate_output(problem: Problem, o: Tensor) -> Row:
    first = Oracle.of(problem.qkv, sampled.Selected(None), torch.arange(_FIRST_ROWS, device=problem.device))
    gate = {"gate": first.gate(o)}
    exact = problem.dense.exact
    error = (o[0, problem.rows].double() - exact).norm() / exact.norm()
    return {**gate, "output_error": round(error.item(), 4)}


def _gate_selection(problem: Problem, selected: sampled.Selected, oracle: bool) -> Row:
    assert selected.blocks is not None
    rows = torch.arange(problem.n, device=problem.device)
    (block_q, block_kv), (mb, nb) = selected.block_size, selected.blocks.shape[2:]
    own = selected.blocks[0][:, (rows // block_q).clamp(max=mb - 1), (rows // block_kv).clamp(max=nb - 1)]
    if not own.all():
        raise ArithmeticError(f"gate failed: {int((~own).sum())} rows of tokens do not see themselves")
    last = torch.arange(1, mb + 1, device=problem.device).mul(block_q).clamp(max=problem.n)
    visible = torch.arange(nb, device=problem.device) * block_kv < last[:, None]
    density = ((selected.blocks[0] & visible).sum() / (visible.sum() * selected.blocks.shape[1])).item()
    said: Row = {"gate": {"diagonal": 1.0}, "selected": round(density, 4)}
    if oracle:
        lse = sampled.attend(*problem.qkv, selected, problem.rows, torch.float64)[1]
        kept = (lse - problem.dense.lse).exp()
        said |= {"recall": round(kept.mean().item(), 4), "recall_min": round(kept.min().item(), 4)}
    return said


# ---- XAttention: all heads must have keys of their own, which are repeated outside of what is timed ----


def _repeated(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = problem.qkv
    k, v = (x.repeat_interleave(problem.heads // problem.kv_heads, 2) for x in (k, v))
    return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def _quietly(run: Callable[[], Any]) -> Any:
    """A call that prints its density every time."""
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def _xattn(problem: Problem, phase: str, stride: int, threshold: float = 0.9) -> Prepared:
    from xattn.src.Xattention import Xattention_prefill, xattn_estimate

    q, k, v = _repeated(problem)
    options = {"stride": stride, "threshold": threshold, "block_size": 128, "keep_sink": True, "keep_recent": True}
    said = {"kv_heads_are": "repeated"}
    if phase == "selection":
        chunk = max(2048, min(problem.n, 128 * 1024 * 2048 // problem.n))
        return Prepared(partial(xattn_estimate, q, k, chunk_size=chunk, **options), said)
    run = partial(Xattention_prefill, q, k, v, **options)
    return Prepared(lambda: _quietly(run).transpose(1, 2), said)


def _xattn_blocks(problem: Problem, result: Any) -> sampled.Selected:
    size = -(-problem.n // 128)
    return sampled.Selected(result[1][:, :, :size, :size], (128, 128))


# ---- FlashPrefill: lists by KV head and tile of 128 packed rows, of tiles of 64 keys ----


def _flashprefill(problem: Problem, phase: str) -> Prepared:
    from flashprefill import FlashPrefill

    q, k, v = problem.qkv
    n, device = problem.n, problem.device

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    lengths, offsets = int32(n), int32(0, n)
    pages = torch.arange(n, dtype=torch.int32, device=device)[None]  # its search takes pages, here of one token
    paged = k[0][:, None]
    ours = {"k_block_n": 128, "abs_threshold": 0.1, "attention_sink": 2, "window_size": 4, "last_n_blocks": 2}
    pipeline = FlashPrefill(k_block_m=128, causal=True, **ours)

    def select() -> Any:
        return pipeline.index_select(q[0], paged, pages, lengths, offsets, q_lens=(n,), max_cache_seqlen=n)

    def both() -> Tensor:
        return pipeline.block_sparse_attention(q[0], k, v, None, lengths, offsets, select(), max_seqlen_q=n)[None]

    return Prepared(select if phase == "selection" else both, {})


def _flashprefill_blocks(problem: Problem, index: Any) -> sampled.Selected:
    rows, keys = 128 * problem.kv_heads // problem.heads, 64
    tiles, columns = index.total_q_tiles, -(-problem.n // keys)
    offsets = index.block_sparse_cu[: problem.kv_heads * tiles + 1].long()
    of_tile = torch.arange(problem.kv_heads * tiles, device=problem.device).repeat_interleave(offsets.diff())
    blocks = torch.zeros(problem.kv_heads * tiles, columns, dtype=torch.bool, device=problem.device)
    blocks[of_tile, index.block_sparse_idx[: int(offsets[-1])].long()] = True
    return sampled.Selected(blocks.view(1, problem.kv_heads, tiles, columns), (rows, keys))


def _first_flashprefill(problem: Problem) -> Prepared:
    """Its first version, in Triton: a repository without a package, found where its root is on the path."""
    from ops.flashprefill_native_forward import flash_prefill

    q, k, v = problem.qkv
    o = torch.empty_like(q)

    def both() -> Tensor:
        flash_prefill(
            q, k, v, o, block_size=128, attention_sink=2, window_size=4, alpha=0.1, last_n_block_full=2, min_budget=0
        )
        return o

    return Prepared(both, {})


# ---- FlexPrefill and MInference: selection and attention in one call ----


def _flex_prefill(problem: Problem) -> Prepared:
    from flex_prefill import flex_prefill_attention

    return Prepared(partial(flex_prefill_attention, *problem.qkv, gamma=0.9, tau=0.1, min_budget=1024), {})


def _minference(problem: Problem) -> Prepared:
    from minference.modules.minference_forward import minference_prefill_forward

    q, k, v = _repeated(problem)
    # No pattern is stored, so every head has its default, 1000 verticals and 6096 slashes.
    config = {"layer_idx": 0, "attn_forward_config": {"best_pattern": [{}]}}
    return Prepared(lambda: minference_prefill_forward(q, k, v, config).transpose(1, 2), {"kv_heads_are": "repeated"})


def _all() -> dict[str, Rival]:
    found = [
        Rival("flex_prefill", "flex_prefill", Setting("flexprefill"), "both", _flex_prefill),
        Rival("minference", "minference", Setting("minference"), "both", _minference),
        Rival(
            "flashprefill_v1", "ops.flashprefill_native_forward", Setting("flashprefill"), "both", _first_flashprefill
        ),
    ]
    for phase, ending in (("selection", "selection"), ("both", "prefill")):
        own = partial(_flashprefill, phase=phase)
        reads = _flashprefill_blocks if phase == "selection" else None
        found.append(Rival(f"flashprefill_{ending}", "flashprefill", Setting("flashprefill"), phase, own, reads))
        for stride in (16, 8):
            strided = partial(_xattn, phase=phase, stride=stride)
            listed = _xattn_blocks if phase == "selection" else None
            found.append(Rival(f"xattn_{ending}_{stride}", "xattn", xattention(stride), phase, strided, listed))
    return {rival.name: rival for rival in found}


RIVALS = _all()
