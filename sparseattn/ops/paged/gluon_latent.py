"""Latent (MLA) caches on Hopper: the kernel of ``kernels/hopper_latent.py`` over the tiles of ``gluon_plans.py``."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.hopper import row_tiles, tile_layout
from sparseattn.kernels.hopper_forward import Facts
from sparseattn.kernels.hopper_latent import latent_kernel
from sparseattn.kernels.hopper_tiles import Tiles, batch_rows, unmappable
from sparseattn.kernels.launches import launch
from sparseattn.ops.paged import gluon_plans
from sparseattn.ops.paged.problem import PagedProblem

# Columns of the latent part, and of the rotary one, whose place in memory a tile of probabilities takes.
_LATENT = 512
_ROTARY = 64
_ROWS = 64
_TILE_N = 64


def refusal(q: Tensor, q_rope: Tensor, p: PagedProblem) -> str | None:
    """Why the kernel could not run a call on any GPU, or None."""
    reason = gluon_plans.refusal(q, p, 1) or gluon_plans.refused_blocks(p, _TILE_N, 1)
    if reason is not None:
        return reason
    assert p.k_rope is not None
    if p.k.shape[2] != 1 or p.k.data_ptr() != p.v.data_ptr() or (q.shape[-1], q_rope.shape[-1]) != (_LATENT, _ROTARY):
        return f"the Gluon kernels take latent caches of {_LATENT} and {_ROTARY} columns whose values are their keys"
    for given, what in (
        (p.rope_theta > 0, "RoPE"), (p.slopes is not None, "ALiBi"), (p.custom_mask is not None, "custom masks"),
    ):  # fmt: skip
        if given:
            return f"the Gluon kernels take no {what} over a latent cache"
    heads = q.shape[1]
    if heads % _ROWS and _ROWS % heads:
        return f"the Gluon kernels take a divisor or a multiple of {_ROWS} heads over a latent cache, not {heads}"
    if p.list_indices is not None and p.list_indices.shape[1] > 1:
        return "the Gluon kernels take lists that all heads share over a latent cache"
    if p.k_scale is not None or p.v_scale is not None or p.v_factor != 1.0:
        return "the Gluon kernels take no tensors of scales, and none of values, over a latent cache"
    for name, t in (("q", q), ("q's rotary part", q_rope), ("k", p.k), ("k_rope", p.k_rope)):
        reason = unmappable(name, t)
        if reason is None and t.dim() == 3 and not is_flat(t):
            reason = f"the Gluon kernels need {name} in rows of one stride over a latent cache, not {t.stride()}"
        if reason is not None:
            return reason
    return None


def is_flat(t: Tensor) -> bool:
    """Whether tokens and heads ``[T, H, D]`` are rows of one stride."""
    return t.shape[0] <= 1 or t.stride(0) == t.shape[1] * t.stride(1)


def plan(q: Tensor, p: PagedProblem, processors: int) -> gluon_plans.Plan:
    """Cut a call: 64 rows a tile, of a token's heads and, where these are fewer, of the next tokens'."""
    pack = min(_ROWS, q.shape[1])
    tokens = math.gcd(p.block_q, _ROWS // pack)
    return gluon_plans.make_plan(q, p, Tiles(2, _TILE_N, 1, 1, False, True, 1), pack, tokens, processors, even=True)


def attend(q: Tensor, q_rope: Tensor, o: Tensor, lse: Tensor, p: PagedProblem, processors: int) -> None:
    """Attention into ``o``, which must be flat, and ``lse``."""
    assert p.k_rope is not None
    heads = q.shape[1]
    cut = plan(q, p, processors)
    records, counter, merges, spans = gluon_plans.schedule(q, p, cut, careful=True)
    part, sums = gluon_plans.places(cut, _LATENT, q.device)
    counts, indices, strides = gluon_plans.lists_of(p, counter)
    facts = Facts(
        heads, heads, cut.pack, heads, cut.tokens, p.block_q or gluon_plans.NO_LIMIT, p.block_kv, _LATENT, _LATENT,
        _LATENT // 2, *cut.tiles[:6], p.list_indices is not None, p.causal, gluon_plans.windowed(p), p.softcap > 0,
        p.sinks is not None, PAGE=p.page_size, MERGE=cut.fused,
    )  # fmt: skip
    # Measured with a row tile a program, where it gives 5 %.
    fetched = cut.records - cut.target <= cut.programs
    flat = (t.as_strided((t.shape[0] * heads, 1, t.shape[2]), (t.stride(1), t.shape[2], 1)) for t in (q, q_rope, o))
    q_rows, q_rope_rows, o_rows = flat
    tensors = (q_rows, q_rope_rows, p.k, p.k_rope, o_rows)
    launch(
        latent_kernel, (cut.programs,),
        *(row_tiles(t, *box) for t, box in zip(tensors, _boxes(facts), strict=True)),
        part, sums, lse, lse if p.sinks is None else p.sinks, records, counter, counts, indices, *spans[:4],
        gluon_plans.table_of(p), p.k, p.k_rope, merges, o, *strides, batch_rows(p.k), batch_rows(p.k_rope),
        p.k.stride(1) // 8, p.k_rope.stride(1) // 8, o.stride(1) // 8, q.shape[0], cut.rows, cut.rows * _LATENT,
        p.window_left, p.window_right, p.k.shape[0], int(fetched), p.scale * math.log2(math.e), p.softcap, facts,
        num_warps=4, launch_pdl=gluon_plans.begins_early(q), **LAUNCH,
    )  # fmt: skip
    gluon_plans.merge(part, sums, merges, counter, o, lse, p, cut)


def _boxes(facts: Facts) -> tuple[tuple[int, int, int], ...]:
    """(heads, rows, columns) of the tensor-map tiles of q, its rotary part, k, k_rope and o."""
    half, box = (getattr(facts, name).value for name in ("BLOCK_DV", "BOX"))
    return (1, _ROWS, half), (1, _ROWS, _ROTARY), *((1, max(box, 8), 64),) * 2, (1, _ROWS, half)


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int, dict[str, Any]]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages, options), to compile offline."""
    everything = dict.fromkeys(("MASKED", "CAUSAL", "WINDOW", "SOFTCAP", "SINKS"), True)
    shapes = (
        ("64", 128, {"CAUSAL": True, "PAGE": 64, "MERGE": 8}),
        ("1", 128, {"CAUSAL": True, "PAGE": 1, "MERGE": 8}),
        ("all-16", 16, {**everything, "PAGE": 16, "MERGE": 8}),
    )
    return [(f"gluon-paged-latent-{name}-sm90", *_offline(heads, facts), 4, 1, {}) for name, heads, facts in shapes]


def _offline(heads: int, facts: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Kernel, signature, constexprs and attributes of a bfloat16 call."""
    pack = min(_ROWS, heads)
    tiles = Tiles(2, _TILE_N, 1, 1, False, True, 1)
    f = Facts(heads, heads, pack, heads, _ROWS // pack, 128, 64, _LATENT, _LATENT, _LATENT // 2, *tiles[:6], **facts)
    boxes = dict(zip((p.name for p in latent_kernel.params), _boxes(f), strict=False))
    kinds = dict.fromkeys(("part_ptr", "sums_ptr", "lse_ptr", "sinks_ptr"), "fp32")
    kinds |= dict.fromkeys(("k_ptr", "k_rope_ptr", "out_ptr"), "bf16")
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(latent_kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = f
        elif param.name in boxes:
            shape = ", ".join(str(n) for n in (1, 1, *boxes[param.name]))
            signature[param.name] = f"tensordesc<bf16[{shape}],{tile_layout()!r}>"
        elif param.name.endswith("_ptr"):
            signature[param.name] = f"*{kinds.get(param.name, 'i32')}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name in ("qk_scale", "softcap") else "i32"
    return latent_kernel, signature, constexprs, attributes
