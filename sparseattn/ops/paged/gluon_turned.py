"""float8 caches and RoPE on Hopper: the kernel of ``kernels/hopper_turned.py`` over the tiles of ``gluon_plans.py``."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.hopper import row_tiles, tile_layout
from sparseattn.kernels.hopper_forward import Facts
from sparseattn.kernels.hopper_tiles import Tiles, unmappable
from sparseattn.kernels.hopper_turned import turned_kernel
from sparseattn.kernels.launches import launch
from sparseattn.ops.paged import gluon_plans
from sparseattn.ops.paged.gluon_plans import NO_LIMIT
from sparseattn.ops.paged.problem import PagedProblem

FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
# Rows of a tile: the fewest that are worth a product, and the most of 128 columns.
_FEWEST, _MOST = 16, 64
# Registers a thread by programs of a multiprocessor.
_REGISTERS = {1: None, 2: 128, 3: 80, 4: 64}


def wanted(p: PagedProblem) -> bool:
    """Whether a call is for this kernel: keys must change on their way."""
    return p.k.dtype in FORMATS or p.rope_theta > 0


def refusal(q: Tensor, p: PagedProblem) -> str | None:
    """Why the kernel could not run a call on any GPU, or None."""
    low = p.k.dtype in FORMATS
    reason = gluon_plans.refusal(q, p, 1, p.k.dtype if low else None)
    if reason is not None:
        return reason
    unit = 16 if low else 8
    for name, dim in (("q and k", q.shape[-1]), ("v", p.v.shape[-1])):
        if dim > 256 or dim % unit:
            return f"the Gluon kernels take head dimensions up to 256 in multiples of {unit}, not {dim} of {name}"
        if not low and p.page_size % 8 and dim != padded(dim):
            return f"the Gluon kernels take head dimensions of 128 and 256 with RoPE in pages of {p.page_size} tokens"
    if p.rope_theta > 0 and q.shape[-1] not in (64, 128, 256):
        return f"the Gluon kernels take RoPE of head dimensions of 64, 128 and 256, not {q.shape[-1]}"
    for name, t in (("q", q), ("k", p.k), ("v", p.v)):
        reason = unmappable(name, t)
        if reason is not None:
            return reason
    return gluon_plans.refused_blocks(p, plan(q, p, 1)[1].tiles.tile_n, 8 if p.page_size % 8 == 0 else 1)


def padded(head_dim: int) -> int:
    """The head dimension of a tile: 64 pairs of columns are the least that a product has."""
    return max(128, triton.next_power_of_2(head_dim))


def config_for(wide: int, rows: int, size: int) -> Tiles:
    """Tiles by the wider padded head dimension, rows of a tile, and bytes of an element of the cache.

    On an H200 a decode takes the same time with key tiles of 64 and of 128, which need more registers, and more with
    three or four programs a multiprocessor.
    """
    if size == 2:
        return Tiles(1, 64, 2, 2, True, False, 2 if wide == 128 else 1)
    if wide == 256:
        return Tiles(1, 64, 2, 2, True, False, 2 if rows == _FEWEST else 1)
    if rows == _FEWEST:
        return Tiles(1, 64, 6, 6, True, False, 2)
    return Tiles(1, 64, 3, 3, True, False, 2)


def plan(q: Tensor, p: PagedProblem, processors: int) -> tuple[int, gluon_plans.Plan]:
    """Rows of a tile, and the cut of a call."""
    group = q.shape[1] // p.k.shape[2]
    shared = p.list_indices is None or p.list_indices.shape[1] <= p.k.shape[2]
    whole = min(triton.next_power_of_2(group), _FEWEST)
    wide = max(padded(q.shape[-1]), padded(p.v.shape[-1]))
    most = _MOST * 128 // wide  # for which there are registers
    pack = 1
    if shared:  # few rows are not scarce: a group of 7 reads its keys once
        pack = whole if p.max_q * whole <= most else min(group & -group, _FEWEST)
    rows = min(max(triton.next_power_of_2(max(1, p.max_q) * pack), _FEWEST), most)
    tokens = math.gcd(p.block_q, rows // pack)  # those of a tile share a list; gcd(0, n) is n
    tiles = config_for(wide, rows, p.k.element_size())
    return rows, gluon_plans.make_plan(q, p, tiles, pack, tokens, processors)


def attend(q: Tensor, o: Tensor, lse: Tensor, p: PagedProblem, processors: int) -> None:
    """Attention into ``o`` and ``lse``."""
    heads = q.shape[1]
    rows, cut = plan(q, p, processors)
    records, counter, merges, _spans = gluon_plans.schedule(q, p, cut)
    dim, dim_v = q.shape[-1], o.shape[-1]
    part, sums = gluon_plans.places(cut, dim_v, q.device)
    counts, indices, strides = gluon_plans.lists_of(p, counter)
    more, arguments = gluon_plans.extras(p)
    facts = Facts(
        heads, heads // p.k.shape[2], cut.pack, gluon_plans.mask_group(q, p), cut.tokens, p.block_q or NO_LIMIT,
        p.block_kv, padded(dim), dim_v, padded(dim_v), *cut.tiles[:6], p.list_indices is not None, p.causal,
        gluon_plans.windowed(p), p.softcap > 0, p.sinks is not None, PAGE=p.page_size, DEPTH=dim, MERGE=cut.fused,
        ROWS=rows, FLOAT8=FORMATS.get(p.k.dtype, ""), ROPE=p.rope_theta > 0, **more,
    )  # fmt: skip
    k, v = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (p.k, p.v))
    boxes = facts.boxes()
    if facts.SCATTERED:  # strides count 16 bytes, by which they are divisible
        unit = 16 // k.element_size()
        arguments |= {"k_ptr": k, "k_stride": k.stride(1) // unit, "k_head": k.stride(2) // unit}
        arguments |= {"v_ptr": v, "v_stride": v.stride(1) // unit, "v_head": v.stride(2) // unit}
    if p.k_scale is not None:
        arguments |= {"k_scale_ptr": p.k_scale, "k_step": int(p.k_scale.numel() > 1)}
    if p.v_scale is not None:
        arguments |= {"v_scale_ptr": p.v_scale, "v_step": int(p.v_scale.numel() > 1)}
    launch(
        turned_kernel, (cut.programs,),
        row_tiles(k, *boxes[1]), row_tiles(v, *boxes[2]), q, o, part, sums, lse, lse if p.sinks is None else p.sinks,
        records, records[1], counter, counts, indices, gluon_plans.table_of(p), *strides,
        0 if k.shape[0] == 1 else k.stride(0) // k.stride(1), 0 if v.shape[0] == 1 else v.stride(0) // v.stride(1),
        k.shape[0], q.shape[0], cut.rows, cut.rows * dim_v, q.stride(0) // 8, q.stride(1) // 8, o.stride(0) // 8,
        o.stride(1) // 8, p.window_left, p.window_right, p.scale * math.log2(math.e), p.softcap, p.v_factor,
        math.log2(p.rope_theta) if p.rope_theta else 0.0, p.rope_scale, facts,
        **arguments, num_warps=4, maxnreg=_REGISTERS[cut.tiles.programs],
        launch_pdl=gluon_plans.begins_early(q), **LAUNCH,
    )  # fmt: skip
    gluon_plans.merge(part, sums, merges, counter, o, lse, p, cut)


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int, dict[str, Any]]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages, options), to compile offline."""
    options = dict.fromkeys(("WINDOW", "SOFTCAP", "SINKS"), True)
    shapes: list[tuple[str, int, int, dict[str, Any]]] = [
        ("decode16-e4m3-128", 128, 16, {"PAGE": 16, "MERGE": 4, "FLOAT8": "e4m3"}),
        ("prefill16-e4m3-128", 128, 64, {"PAGE": 16, "FLOAT8": "e4m3"}),
        ("all-e5m2-64", 64, 32, {"PAGE": 32, "FLOAT8": "e5m2", "MASKED": True, "BLOCK_KV": 32, **options}),
        ("decode128-e5m2-256", 256, 16, {"PAGE": 128, "MERGE": 16, "FLOAT8": "e5m2"}),
        ("rope-128", 128, 16, {"PAGE": 16, "MERGE": 4, "ROPE": True}),
        ("rope-e4m3-128", 128, 16, {"PAGE": 16, "MERGE": 4, "ROPE": True, "FLOAT8": "e4m3"}),
        ("prefill16-rope-64", 64, 64, {"PAGE": 16, "ROPE": True}),
        ("decode1-e4m3-128", 128, 16, {"PAGE": 1, "MERGE": 4, "FLOAT8": "e4m3"}),
        ("prefill64-e4m3-256", 256, 32, {"PAGE": 64, "FLOAT8": "e4m3"}),
    ]
    return [(f"gluon-paged-{name}-sm90", *_offline(dim, rows, more)) for name, dim, rows, more in shapes]


def _offline(dim: int, rows: int, more: dict[str, Any]) -> tuple[Any, ...]:
    """Kernel, signature, constexprs, attributes, warps, stages and options of a bfloat16 call."""
    more = {"BLOCK_KV": 128, **more}
    tiles, block = config_for(padded(dim), rows, 1 if "FLOAT8" in more else 2), more.pop("BLOCK_KV")
    f = Facts(32, 4, 4, 4, rows // 4, 128, block, padded(dim), dim, padded(dim), *tiles[:6], CAUSAL=True, DEPTH=dim,
              ROWS=rows, **more)  # fmt: skip
    boxes = dict(zip(("k_desc", "v_desc"), f.boxes()[1:3], strict=True))
    kinds = dict.fromkeys(("part_ptr", "sums_ptr", "lse_ptr", "sinks_ptr", "k_scale_ptr", "v_scale_ptr"), "fp32")
    kinds |= {"q_ptr": "bf16", "out_ptr": "bf16", "k_ptr": "u8", "v_ptr": "u8"}
    numbers = ("qk_scale", "softcap", "v_factor", "theta_log2", "rope_scale")
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(turned_kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = f
        elif param.name in boxes:
            shape = ", ".join(str(n) for n in (1, 1, *boxes[param.name]))
            kind = "u8" if "FLOAT8" in more else "bf16"
            signature[param.name] = f"tensordesc<{kind}[{shape}],{tile_layout(bits=8 if kind == 'u8' else 16)!r}>"
        elif param.name.endswith("_ptr"):
            signature[param.name] = f"*{kinds.get(param.name, 'i32')}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name in numbers else "i32"
    return turned_kernel, signature, constexprs, attributes, 4, 1, {"maxnreg": _REGISTERS[tiles.programs]}
