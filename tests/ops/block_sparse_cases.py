"""The cases every implementation of block-sparse attention must get right, and the oracle that says what right is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.masks import BlockMask
from sparseattn.testing import dense_attention, make_qkv, random_block_mask

# Four gradients of sinks are too few to tell eager's float32 error from luck; half precision dominates it.
F16 = torch.float16
Span = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """One call. ``lengths`` makes it packed, ``ranges`` gives each padded row its valid ``((q0, q1), (k0, k1))``."""

    id: str
    batch: int = 1
    seq: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (2, 2)
    dim: tuple[int, int] = (16, 16)
    block: tuple[int, int] | None = (16, 16)
    mask_heads: int = 1
    mask_batch: int = 1
    density: float = 0.5
    empty_rows: float = 0.0
    causal: bool = True
    mask_causal: bool = True
    window: tuple[int | None, int | None] | None = None
    mask_window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "bshd"
    lengths: tuple[tuple[int, int], ...] = ()
    ranges: tuple[Span, ...] = ()
    columns: int = 0  # drawn for each row of blocks; what lies in its blocks is dropped
    means: bool = False
    interpret: bool = True  # also under Triton's interpreter, which takes seconds for what it compiles in none

    def __str__(self) -> str:
        return self.id


CASES = [
    Case("gqa-mask-per-head", heads=(4, 2), mask_heads=4),
    Case("gqa-mask-per-kv-head", heads=(4, 2), mask_heads=2),
    Case("gqa-mask-shared", heads=(4, 2), mask_heads=1),
    Case("mqa-three-heads", interpret=False, heads=(3, 1), mask_heads=3, seq=(48, 48)),
    Case("mask-per-batch", batch=2, mask_batch=2, mask_heads=2),
    Case("mask-shared-by-batch", interpret=False, batch=2, mask_heads=2),
    Case("dense-causal", block=None, heads=(4, 2), seq=(70, 70)),
    Case("dense-full", block=None, causal=False, seq=(37, 70)),
    Case("dense-window", block=None, window=(20, 0), seq=(100, 100)),
    Case("dense-two-sided-window", interpret=False, block=None, causal=False, window=(9, 17), seq=(80, 80)),
    Case("dense-decode", block=None, heads=(4, 2), seq=(1, 77)),
    Case("odd-lengths", interpret=False, seq=(53, 53), mask_heads=2),
    Case("chunked-prefill-unaligned", seq=(37, 101), mask_heads=2),
    Case("more-queries-than-keys", seq=(90, 41), mask_heads=2),
    Case("not-causal", causal=False, mask_causal=False, seq=(40, 72), mask_heads=2),
    Case("causal-over-plain-mask", interpret=False, mask_causal=False, mask_heads=2),
    Case("window-call", interpret=False, window=(19, None), seq=(96, 96), density=0.8),
    Case("window-mask-and-call", window=(40, 5), mask_window=(25, None), mask_causal=False, causal=False, density=0.8),
    Case("softcap", interpret=False, softcap=2.0, mask_heads=2),
    Case("sinks", interpret=False, sinks=True, dtype=F16, heads=(4, 2), mask_heads=4),
    Case(
        "sinks-softcap-window", sinks=True, dtype=F16, softcap=3.0, window=(24, 0), heads=(4, 2), mask_heads=2,
        density=0.9,
    ),
    Case("scale", interpret=False, scale=0.7, seq=(48, 48)),
    Case("block-32x64", interpret=False, block=(32, 64), seq=(80, 130), mask_heads=2),
    Case("block-128x64", block=(128, 64), seq=(140, 140), mask_heads=2),
    Case("block-48x80", interpret=False, block=(48, 80), seq=(100, 170), mask_heads=2),
    Case("block-64x256", block=(64, 256), seq=(70, 300), mask_heads=1),
    Case("dim-80", interpret=False, dim=(80, 80), seq=(32, 48)),
    Case("dim-96", interpret=False, dim=(96, 96), seq=(32, 48)),
    Case("dim-48-32", dim=(48, 32), heads=(4, 2), mask_heads=2, sinks=True, dtype=F16),
    Case("bf16", interpret=False, dtype=torch.bfloat16, heads=(4, 2), mask_heads=4, seq=(70, 70)),
    Case("fp16", dtype=torch.float16, heads=(4, 2), mask_heads=2, seq=(70, 70)),
    Case("bf16-sinks-softcap", interpret=False, dtype=torch.bfloat16, sinks=True, softcap=5.0, heads=(4, 2)),
    Case("bhsd-view", layout="bhsd", heads=(4, 2), mask_heads=2, seq=(50, 66)),
    Case("slices-of-wide-rows", interpret=False, layout="wide", heads=(4, 2), mask_heads=4, seq=(50, 66)),
    Case("empty-rows", empty_rows=0.6, seq=(96, 96), mask_heads=2, sinks=True, dtype=F16),
    Case("all-rows-empty", density=0.0, seq=(40, 40)),
    Case("all-blocks", interpret=False, density=1.0, seq=(60, 60), heads=(4, 2), mask_heads=2),
    Case("packed", lengths=((30, 30), (0, 0), (41, 41), (16, 16)), heads=(4, 2), mask_heads=4, mask_batch=4),
    Case("packed-chunked", lengths=((17, 50), (5, 0), (0, 33), (40, 23)), heads=(4, 2), sinks=True, dtype=F16),
    Case("packed-dense", lengths=((30, 45), (0, 7), (21, 21)), block=None, heads=(4, 2)),
    Case("packed-window", interpret=False, lengths=((60, 60), (35, 70)), window=(20, None), density=0.8, softcap=4.0),
    Case("left-padding", batch=2, seq=(50, 50), ranges=(((0, 50), (0, 50)), ((13, 50), (13, 50))), mask_heads=2),
    Case("right-padding", batch=2, seq=(50, 50), ranges=(((0, 37), (0, 37)), ((0, 50), (0, 50)))),
    Case("static-cache", batch=2, seq=(20, 90), ranges=(((0, 20), (0, 61)), ((4, 20), (7, 61))), block=None),
    Case(
        "padding-and-empty", interpret=False, batch=3, seq=(40, 60), mask_batch=3,
        ranges=(((0, 40), (3, 50)), ((9, 9), (0, 60)), ((5, 40), (20, 20))),
    ),
    Case("columns-per-head", interpret=False, columns=20, density=0.3, heads=(4, 2), mask_heads=4, seq=(75, 75)),
    Case("columns-per-kv-head", interpret=False, columns=90, density=0.2, heads=(4, 2), mask_heads=2, seq=(60, 120)),
    Case("columns-shared-fp16", columns=70, density=0.1, heads=(4, 2), seq=(70, 101), dtype=F16, block=(32, 16)),
    Case("columns-alone", interpret=False, columns=9, density=0.0, heads=(4, 2), mask_heads=4, sinks=True, dtype=F16),
    Case(
        "columns-window-softcap", columns=40, density=0.2, window=(30, 5), mask_window=(25, None), softcap=3.0,
        causal=False, mask_causal=False, seq=(64, 90), mask_heads=2,
    ),
    Case("columns-packed", columns=25, density=0.3, lengths=((17, 50), (5, 0), (40, 23)), mask_batch=3, mask_heads=2),
    Case(
        "columns-left-padding", interpret=False, columns=25, density=0.3, batch=2, seq=(50, 50),
        ranges=(((0, 50), (0, 50)), ((13, 50), (13, 50))),
    ),
    Case("columns-bf16", interpret=False, columns=30, density=0.2, dtype=torch.bfloat16, heads=(4, 2), mask_heads=4),
    Case("means-per-head", interpret=False, means=True, density=0.2, heads=(4, 2), mask_heads=4, seq=(90, 90)),
    Case("means-shared-fp16", means=True, density=0.1, heads=(4, 2), seq=(50, 107), dtype=F16, block=(32, 16)),
    Case("means-alone", interpret=False, means=True, density=0.0, sinks=True, dtype=F16, seq=(64, 100)),
    Case(
        "means-window-softcap", means=True, density=0.2, window=(60, 9), softcap=3.0, causal=False, mask_causal=False,
        seq=(70, 130), mask_heads=2,
    ),
    Case(
        "means-packed", means=True, columns=20, density=0.3, lengths=((17, 50), (5, 0), (40, 33)), mask_heads=2,
        dtype=F16,
    ),
    Case(
        "means-left-padding", interpret=False, means=True, density=0.3, batch=2, seq=(80, 80),
        ranges=(((0, 80), (0, 80)), ((13, 80), (13, 80))),
    ),
    Case("means-and-columns", means=True, columns=30, density=0.2, heads=(4, 2), mask_heads=2, seq=(60, 91)),
    Case("means-bf16", interpret=False, means=True, density=0.2, dtype=torch.bfloat16, heads=(4, 2), mask_heads=4),
]  # fmt: skip

# Shapes that are slow under the interpreter and meant for real tensor cores.
GPU_CASES = [
    Case(
        f"gpu-{str(dtype).removeprefix('torch.')}-d{dim[0]}-{dim[1]}-{block[0]}x{block[1]}-m{mask_heads}",
        batch=2, seq=seq, heads=(8, 2), dim=dim, block=block, mask_heads=mask_heads, mask_batch=2, density=0.3,
        dtype=dtype, sinks=sinks,
    )
    for dim, block, seq, mask_heads, dtype, sinks in [
        ((64, 64), (128, 128), (1000, 1000), 8, torch.bfloat16, False),
        ((64, 64), (64, 64), (777, 1500), 2, torch.float16, True),
        ((128, 128), (128, 128), (1024, 1024), 8, torch.bfloat16, False),
        ((128, 128), (128, 64), (513, 2049), 1, torch.bfloat16, True),
        ((128, 128), (256, 256), (1111, 1111), 2, torch.float32, False),
        ((192, 128), (64, 128), (700, 900), 8, torch.bfloat16, False),
        ((256, 256), (128, 128), (600, 600), 2, torch.bfloat16, False),
        ((256, 256), (16, 16), (200, 300), 8, torch.float32, False),
        ((96, 96), (48, 80), (500, 777), 8, torch.bfloat16, False),
        ((80, 80), (32, 64), (500, 500), 2, torch.float16, False),
        ((16, 16), (16, 240), (333, 999), 8, torch.bfloat16, True),
    ]
]  # fmt: skip


class Problem(NamedTuple):
    """Tensors of a case and the arguments of the call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask | None
    sinks: Tensor | None
    kwargs: dict[str, Any]
    spans: list[Span]


def build(case: Case, device: str = "cpu", dtype: torch.dtype | None = None, seed: int = 0) -> Problem:
    """Draw a case's tensors in its dtype, then convert to ``dtype`` if given."""
    batch, (sq, sk) = case.batch, case.seq
    kwargs: dict[str, Any] = {"window": case.window, "softcap": case.softcap, "scale": case.scale}
    if case.lengths:
        ends = torch.tensor(case.lengths).cumsum(0)
        starts = ends - torch.tensor(case.lengths)
        spans = [
            ((s[0], e[0]), (s[1], e[1])) for s, e in zip(starts.tolist(), ends.tolist(), strict=True)
        ]  # fmt: skip
        batch, (sq, sk) = 1, ends[-1].tolist()
        lengths = (max(a for a, _ in case.lengths), max(b for _, b in case.lengths))
        for i, name in enumerate("qk"):
            cu = torch.tensor([0, *ends[:, i].tolist()], dtype=torch.int32, device=device)
            kwargs |= {f"cu_seqlens_{name}": cu, f"max_seqlen_{name}": lengths[i]}
    else:
        spans = list(case.ranges) or [((0, sq), (0, sk))] * batch
        lengths = (sq, sk)
        if case.ranges:
            for i, name in enumerate("qk"):
                kwargs[f"ranges_{name}"] = torch.tensor([s[i] for s in spans], dtype=torch.int32, device=device)
    q, k, v = make_qkv(
        batch, sq, sk, *case.heads, *case.dim, dtype=case.dtype, device=device, layout=case.layout, seed=seed
    ).to(dtype or case.dtype)
    if case.lengths:
        q, k, v = q[0], k[0], v[0]
    mask = None
    if case.block is None:
        kwargs["causal"] = case.causal
    else:
        mask = random_block_mask(
            lengths, case.block, case.mask_heads, case.mask_batch, density=case.density, causal=case.mask_causal,
            window=case.mask_window, empty_rows=case.empty_rows, device=device, seed=seed,
        )  # fmt: skip
        kwargs["causal"] = case.causal or None
        if case.columns:
            shape = (case.mask_batch, case.mask_heads, mask.num_q_blocks, case.columns)
            columns = torch.randint(lengths[1], shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
            mask = mask.with_columns(columns.to(device), sort=True)
        if case.means:
            kwargs["mean_correction"] = True
    sinks = None
    if case.sinks:
        generator = torch.Generator().manual_seed(seed + 1)
        sinks = torch.randn(case.heads[0], generator=generator).to(device, case.dtype).to(dtype or case.dtype)
    return Problem(q, k, v, mask, sinks, kwargs, spans)


def visible_tokens(case: Case, problem: Problem, sequence: int) -> Tensor:
    """bool ``[1, H, sq, sk]`` of one sequence, from the definitions: listed block or column, diagonal, windows."""
    return _framed(case, problem, sequence) & _listed(case, problem, sequence)


def _framed(case: Case, problem: Problem, sequence: int) -> Tensor:
    """bool ``[1, 1, sq, sk]``: what diagonal and windows leave visible."""
    (q0, q1), (k0, k1) = problem.spans[sequence]
    i = torch.arange(q1 - q0, device=problem.q.device)[:, None] + (k1 - k0) - (q1 - q0)
    j = torch.arange(k1 - k0, device=problem.q.device)[None, :]
    seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=problem.q.device)
    if case.causal or (case.mask_causal and case.block is not None):
        seen &= j <= i
    for left, right in filter(None, (case.window, case.mask_window)):
        if left is not None:
            seen &= j >= i - left
        if right is not None:
            seen &= j <= i + right
    return seen[None, None]


def _listed(case: Case, problem: Problem, sequence: int) -> Tensor:
    """bool ``[1, H, sq, sk]``: tokens in listed blocks, and columns."""
    (q0, q1), (k0, k1) = problem.spans[sequence]
    device = problem.q.device
    if problem.mask is None or case.block is None:
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    blocks = problem.mask.to_blocks()
    row = sequence if blocks.shape[0] > 1 else 0
    rows = torch.arange(q1 - q0, device=device) // case.block[0]
    cols = torch.arange(k1 - k0, device=device) // case.block[1]
    listed = blocks[row][:, rows][:, :, cols]
    if problem.mask.column_indices is not None:
        tokens = torch.arange(k1 - k0, device=device)
        listed = listed | (problem.mask.column_indices[row][:, rows, :, None] == tokens).any(2)
    return listed[None]


def _means(case: Case, problem: Problem, sequence: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values ``[1, NB, Hkv, D]`` of a sequence's blocks, and for each row how many keys each stands for.

    A block counts for a row if all of its tokens are visible to it and it is not listed; columns are taken off.
    """
    assert problem.mask is not None
    assert case.block is not None
    framed, listed = _framed(case, problem, sequence), _listed(case, problem, sequence)
    listed = listed.expand(1, problem.mask.heads, *framed.shape[2:])
    blocks = problem.mask.to_blocks()[sequence if problem.mask.to_blocks().shape[0] > 1 else 0]
    rows = torch.arange(framed.shape[2], device=k.device) // case.block[0]
    keys, values, weights = [], [], []
    for j, first in enumerate(range(0, k.shape[1], case.block[1])):
        tokens = slice(first, min(first + case.block[1], k.shape[1]))
        keys.append(k[:, tokens].mean(1))
        values.append(v[:, tokens].mean(1))
        skipped = ~blocks[:, rows, j] & framed[0, :, :, tokens].all(-1)
        weights.append(skipped * (~listed[0, :, :, tokens]).sum(-1))
    return torch.stack(keys, 1), torch.stack(values, 1), torch.stack(weights, -1)[None]


def _attend_with_means(
    case: Case,
    problem: Problem,
    sequence: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    order: int | None,
) -> tuple[Tensor, Tensor]:
    """``dense_attention`` of one sequence with the mean correction, in the tensors' dtype; ``order`` shuffles keys."""
    group = q.shape[2] // k.shape[2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    allowed = visible_tokens(case, problem, sequence)
    mean_k, mean_v, weights = _means(case, problem, sequence, k, v)
    k, v = torch.cat([k, mean_k], 1), torch.cat([v, mean_v], 1)
    weights = torch.cat([allowed.expand(*weights.shape[:3], -1).to(work), weights.to(work)], -1)
    if order is not None:
        keys = torch.randperm(k.shape[1], generator=torch.Generator().manual_seed(order)).to(k.device)
        k, v, weights = k[:, keys], v[:, keys], weights[..., keys]
    qt, kt, vt = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    if weights.shape[1] not in (1, q.shape[2]):
        weights = weights.repeat_interleave(group, dim=1)
    scores = (qt @ kt.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.to(work) + weights.log()
    empty = ~(weights > 0).any(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    safe = scores.masked_fill(empty, 0.0)
    lse = safe.logsumexp(-1)
    joined = lse if sinks is None else torch.logaddexp(lse, sinks.to(work)[:, None])
    p = torch.exp(safe - joined[..., None]).masked_fill(empty, 0.0)
    return (p.to(q.dtype) @ vt).transpose(1, 2), lse.masked_fill(empty[..., 0], -torch.inf)


def dense_result(
    case: Case, problem: Problem, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, order: int | None = None
) -> list[Tensor]:
    """``[o, lse]`` of the whole call, one sequence at a time, by ``dense_attention`` in the tensors' dtype.

    ``order`` seeds a shuffle of the keys, which changes nothing but the rounding.
    """
    packed = bool(case.lengths)
    if packed:
        q, k, v = q[None], k[None], v[None]
    o = [q.new_zeros((1, q.shape[1], q.shape[2], v.shape[-1])) for _ in range(q.shape[0])]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = [torch.full((1, q.shape[2], q.shape[1]), -torch.inf, dtype=work, device=q.device) for _ in range(q.shape[0])]
    for b, ((q0, q1), (k0, k1)) in enumerate(problem.spans):
        row = 0 if packed else b
        keys = torch.arange(k0, k1)
        if order is not None:
            keys = keys[torch.randperm(k1 - k0, generator=torch.Generator().manual_seed(order))]
        keys = keys.to(q.device)
        if case.means and k1 > k0:
            spans = q[row : row + 1, q0:q1], k[row : row + 1, k0:k1], v[row : row + 1, k0:k1]
            part_o, part_lse = _attend_with_means(case, problem, b, *spans, sinks, order)
        else:
            part_o, part_lse = dense_attention(
                q[row : row + 1, q0:q1], k[row : row + 1, keys], v[row : row + 1, keys],
                visible_tokens(case, problem, b)[..., keys - k0], case.scale, case.softcap, sinks,
            )  # fmt: skip
        o[row] = torch.cat([o[row][:, :q0], part_o, o[row][:, q1:]], dim=1)
        lse[row] = torch.cat([lse[row][..., :q0], part_lse, lse[row][..., q1:]], dim=2)
    whole_o, whole_lse = torch.cat(o), torch.cat(lse)
    return [whole_o[0], whole_lse[0]] if packed else [whole_o, whole_lse]


def with_gradients(run: Any, problem: Problem, dtype: torch.dtype, seed: int = 7) -> dict[str, Tensor]:
    """Run ``run(q, k, v, sinks) -> (o, lse)`` on leaves of ``dtype`` and take every gradient, through o and LSE."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (problem.q, problem.k, problem.v)]
    sinks = None if problem.sinks is None else problem.sinks.detach().to(dtype).requires_grad_()
    o, lse = run(*leaves, sinks)
    generator = torch.Generator().manual_seed(seed)
    # Drawn in the low dtype so that the oracle sees the same upstream gradients.
    do = torch.randn(o.shape, generator=generator).to(problem.q.dtype).to(o)
    dlse = torch.randn(lse.shape, generator=generator).to(lse)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    names = ["dq", "dk", "dv"] + ([] if sinks is None else ["dsinks"])
    gradients = torch.autograd.grad(
        (o * do).sum() + (finite * dlse).sum(), [*leaves, *([] if sinks is None else [sinks])]
    )
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip(names, gradients, strict=True))}


def worst_eager(case: Case, problem: Problem, oracle: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eager results in the case's dtype: of a few runs that sum in different orders, for each tensor the least exact.

    The error of one run over a small tensor is as much luck as precision, most of all in float32.
    """
    runs = [
        with_gradients(lambda *t, order=order: dense_result(case, problem, *t, order=order), problem, case.dtype)
        for order in ((None, 1, 2, 3) if case.dtype == torch.float32 else (None,))
    ]

    def error(run: dict[str, Tensor], name: str) -> float:
        both_finite = oracle[name].isfinite()
        return (run[name].double() - oracle[name])[both_finite].norm().item()

    return {name: max(runs, key=lambda run, name=name: error(run, name))[name] for name in oracle}
