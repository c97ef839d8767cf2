"""Hopper implementation (sm_90a) in Gluon: tensor-map copies, warp specialisation, asynchronous wgmma.

This file chooses tiles and launches the forward kernel of ``kernels/hopper_forward.py``; ``gluon_gradients.py``
launches the backward ones. Nothing that grows with a prompt is a constexpr or specialised on: a new length, batch or
density reuses the compiled kernel.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.clear import clear_rows
from sparseattn.kernels.combine import combine_kernel
from sparseattn.kernels.hopper import row_tiles
from sparseattn.kernels.hopper_facts import END
from sparseattn.kernels.hopper_forward import Facts, forward_kernel
from sparseattn.kernels.hopper_tiles import (
    MAX_PACK,
    Tiles,
    batch_rows,
    config_for,
    consumer_registers,
    depth,
    offline,
    padded,
    processors_of,
    unmappable,
)
from sparseattn.kernels.launches import launch, scratch
from sparseattn.kernels.offline import Offline, offline_case
from sparseattn.kernels.schedule import (
    cut_ends,
    cut_ends_kernel,
    piece_walks,
    piece_walks_kernel,
    schedule_kernel,
    tile_schedule,
)
from sparseattn.ops.block_sparse.extra import prepare_extra
from sparseattn.ops.block_sparse.geometry import Geometry, list_arguments
from sparseattn.ops.block_sparse.gluon_extra import finish
from sparseattn.ops.block_sparse.gluon_gradients import backward as backward
from sparseattn.ops.block_sparse.gluon_gradients import unsupported_backward_reason


class Plan(NamedTuple):
    """How a call is cut into tiles.

    Attributes:
        tiles: Their configuration.
        pack: Query heads in a row tile.
        tokens: Query tokens of a row tile.
        splits: Shares of the keys, where row tiles are fewer than programs.
        programs: Size of the grid.
    """

    tiles: Tiles
    pack: int
    tokens: int
    splits: int
    programs: int


def plan(q: Tensor, k: Tensor, v: Tensor, g: Geometry, processors: int) -> Plan:
    """Choose tiles: the heads of a group share one where they share their lists, and rows fill 64 or 128."""
    heads, heads_k = q.shape[-2], k.shape[-2]
    group = heads // heads_k
    shared = g.kv_num_blocks is None or g.kv_num_blocks.shape[1] <= heads_k
    pack = min(group & -group, MAX_PACK) if shared else 1
    block_q = g.block_q
    if g.kv_num_blocks is None:
        block_q = 128 // pack if g.max_q * pack > 64 else 64 // pack
    slots = 64 // pack
    consumers = 2 if block_q % (2 * slots) == 0 else 1
    tokens = math.gcd(block_q, consumers * slots)
    tiles = config_for(depth(q.shape[-1]), padded(v.shape[-1]), consumers)
    programs = processors * tiles.programs
    rows = triton.cdiv(g.max_q, tokens) if g.row_pieces is None else g.row_pieces.shape[1] * (g.block_q // tokens)
    row_tiles_ = g.batch * (heads // pack) * rows
    keys = g.max_k if g.kv_indices is None else min(g.max_k, g.kv_indices.shape[3] * g.block_kv)
    splits = 1
    if 2 * row_tiles_ <= programs:
        splits = max(1, min(programs // row_tiles_, triton.cdiv(keys, 4 * tiles.tile_n)))
    return Plan(tiles, pack, tokens, splits, min(programs, row_tiles_ * splits))


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, g: Geometry, gradients: str | None = None) -> str | None:
    """Why these kernels cannot run the call (and, if asked, its "fast" or "deterministic" gradients), or None."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"the Gluon kernels need a Hopper GPU (compute capability 9.0), not {q.device}"
    reason = refusal(q, k, v, g)
    if reason is None and gradients is not None:
        if g.row_pieces is not None:
            return "the Hopper backward takes blocks of one size, not variable ones"
        reason = unsupported_backward_reason(q, k, v, g)
    return reason


def refusal(q: Tensor, k: Tensor, v: Tensor, g: Geometry) -> str | None:
    """Why these kernels could not run the forward pass of a call on any GPU, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the Gluon kernels take bfloat16 and float16, not {q.dtype}"
    if g.scale <= 0:
        return f"the Gluon kernels need a positive scale, not {g.scale}"
    for name, dim in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if dim > 256 or dim % 8:
            return f"the Gluon kernels take head dimensions up to 256 in multiples of 8, not {dim} of {name}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        reason = unmappable(name, t)
        if reason is not None:
            return reason
    if g.kv_num_blocks is not None:
        tile_n = plan(q, k, v, g, 1).tiles.tile_n
        if g.block_kv % tile_n and g.block_kv not in (16, 32, 64):
            return f"the Gluon kernels take KV blocks of 16, 32, 64 or multiples of {tile_n} here, not {g.block_kv}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, g: Geometry, bits: tuple[Tensor, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs and LSE; see ``reference.forward``, which this matches.

    ``bits`` are words int32 [B|1, H, row groups, key groups, 16, 4] of as many lists as ``g`` has, and how many queries
    share a row of bits: those keys of the listed blocks are seen whose bits are set (see ``hopper_bits``).
    """
    o = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32, device=q.device)
    forward_into(q, k, v, o, lse, sinks, g, bits)
    return o, lse


def writable(o: Tensor) -> bool:
    """Whether ``forward_into`` can write there."""
    return unmappable("out", o) is None


def forward_into(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sinks: Tensor | None, g: Geometry,
    bits: tuple[Tensor, int] | None = None,
) -> None:  # fmt: skip
    """``forward`` into ``o``, which a tensor map must be able to describe, and a contiguous ``lse``."""
    heads, dim_v = q.shape[-2], v.shape[-1]
    if g.q_start is not None and g.q_end is not None:
        clear_rows(o, lse, g.q_start, g.q_end, g.max_q, packed=g.packed)
    if q.numel() == 0 or g.max_q == 0:
        return
    cut = plan(q, k, v, g, processors_of(q.device))
    if cut.splits == 1 and not g.extra_keys:
        _attend_blocks(q, k, v, o, o, lse, lse, sinks, g, cut, bits)
        return
    # Zero sums are what a row outside every sequence contributes to ``combine_kernel``; ``finish`` never asks for it.
    o_part = scratch((cut.splits, *o.shape), torch.float32, q.device, zeros=not g.extra_keys)
    lse_part = scratch((cut.splits, 2, *lse.shape), torch.float32, q.device, zeros=not g.extra_keys)
    _attend_blocks(q, k, v, o, o_part, lse, lse_part, None, g, cut, bits)
    if g.extra_keys:
        finish(q, k, v, o_part, lse_part, o, lse, sinks, prepare_extra(k, v, g, lse), g)
    else:
        count = lse.numel()
        launch(
            combine_kernel, (count,),
            o_part, lse_part, o, lse, lse if sinks is None else sinks, count, heads, q.shape[-3], cut.splits,
            DV=dim_v, BLOCK_DV=triton.next_power_of_2(dim_v), SINKS=sinks is not None, num_warps=1, **LAUNCH,
        )  # fmt: skip


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, o_out: Tensor, lse: Tensor, lse_out: Tensor, sinks: Tensor | None,
    g: Geometry, cut: Plan, bits: tuple[Tensor, int] | None,
) -> None:  # fmt: skip
    """Run the Hopper kernel; results go to ``o_out`` and ``lse_out``: ``o`` and ``lse``, or the sums of each share."""
    heads, heads_k, dim_v = q.shape[-2], k.shape[-2], v.shape[-1]
    tiles, pack, tokens, splits, programs = cut
    partial = o_out is not o
    ragged = (g.q_start is not None, g.k_start is not None)
    masked = g.kv_num_blocks is not None
    mask_group = heads // g.kv_num_blocks.shape[1] if g.kv_num_blocks is not None else heads
    block = (g.block_q, g.block_kv) if masked else (tokens, tiles.tile_n)
    counts, indices, mask_b, mask_h, width = list_arguments(g.kv_num_blocks, g.kv_indices, lse)
    strides, spans = (mask_b, mask_h, width), g.spans(lse)
    window = (g.window_left, g.window_right)
    walks = None
    if g.row_pieces is not None:
        ends = END if g.block_kv >= tiles.tile_n else 0
        if ends:
            ordered = g.causal or window != (-1, -1)
            counts, indices = cut_ends(counts, indices, g.max_k, g.block_kv, ends, ordered=ordered)
        walks = piece_walks(
            g.row_pieces, counts, indices, (g.max_q, g.max_k), window, tokens=tokens, block=block,
            tile_n=tiles.tile_n, end=ends, causal=g.causal,
        )  # fmt: skip
        counts, strides = walks, (0 if walks.shape[0] == 1 else walks.stride(0) // 8, walks.shape[2], indices.shape[3])
    records, counter = tile_schedule(
        counts if masked else None, indices, strides, spans, (g.max_q, g.max_k), window,
        batch=g.batch, sections=heads_k, heads=heads // heads_k // pack, tokens=tokens, block=block,
        tile_n=tiles.tile_n, mask_group=mask_group // pack, splits=splits, causal=g.causal, ragged=ragged,
        device=q.device, walks=walks,
    )  # fmt: skip
    block_d, block_dv = padded(q.shape[-1]), padded(dim_v)
    facts = Facts(
        heads, heads // heads_k, pack, mask_group, tokens, *block, block_d, dim_v, block_dv, tiles.consumers,
        tiles.tile_n, tiles.k_stages, tiles.v_stages, tiles.q_registers, tiles.o_in_q, masked, g.causal,
        g.window_left >= 0 or g.window_right >= 0, g.softcap > 0, sinks is not None, partial, *ragged,
        VARIABLE=walks is not None, BITS=bits is not None, DEPTH=depth(q.shape[-1]), PANELS=tiles.panels,
        O_BARE=tiles.o_bare,
    )  # fmt: skip
    given: dict[str, Any] = {}
    if tiles.o_bare:  # strides count 8 elements, by which they are divisible
        given = {"out_ptr": o, "out_stride": o.stride(-3) // 8, "out_head": o.stride(-2) // 8}
    if bits is not None:
        words, queries = bits
        rows, groups = words.shape[2:4]
        given |= {"bits_ptr": words, "bit_rows": 16 * rows, "bit_groups": groups, "bit_queries": queries}
    descriptors = (row_tiles(t, *box) for t, box in zip((q, k, v, o), facts.boxes(), strict=True))
    names = ("k_box_desc", "v_box_desc")
    given |= {name: row_tiles(t, *box) for name, t, box in zip(names, (k, v), facts.end_boxes(), strict=False)}
    launch(
        forward_kernel, (programs,),
        *descriptors, o_out, lse_out, lse if sinks is None else sinks, records, counter,
        counts, indices, *spans, *strides, g.max_q, g.max_k, records.shape[0],
        batch_rows(q), batch_rows(k), batch_rows(v), batch_rows(o), *g.lse_strides(q),
        lse.numel(), o.numel(), *window, g.scale * math.log2(math.e), g.softcap,
        facts, REGISTERS=consumer_registers(facts), **given,
        num_warps=4, maxnreg=128 if tiles.programs == 2 else None, **LAUNCH,
    )  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int, dict[str, Any]]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages, options), to compile offline."""
    everything = dict.fromkeys(("CAUSAL", "WINDOW", "SOFTCAP", "SINKS", "RAGGED_Q", "RAGGED_K"), True)
    plain, dense = {"MASKED": True, "CAUSAL": True}, {"CAUSAL": True, "PACK": 4}
    shapes: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
        ("plain-128x128", (128, 128), plain),
        ("dense-128x128", (128, 128), dense),
        ("all-128x128", (128, 128), plain | everything),
        ("packed-128x128", (128, 128), plain | {"PACK": 4}),
        ("rows-64-128x128", (128, 128), plain | {"consumers": 1, "BLOCK_Q": 64, "BLOCK_KV": 64}),
        ("gather-128x128", (128, 128), plain | {"BLOCK_KV": 32, "PACK": 4}),
        ("bits-128x128", (128, 128), {"MASKED": True, "BITS": True, "PACK": 4}),
        ("split-128x128", (128, 128), dense | {"SPLIT": True}),
        ("variable-128x128", (128, 128), plain | {"VARIABLE": True, "PACK": 4}),
        ("plain-64x64", (64, 64), plain),
        ("plain-192x128", (192, 128), plain),
        ("all-256x256", (256, 256), plain | everything),
    ]
    cases = [(f"gluon-forward-{name}-sm90", *offline(dims, facts)) for name, dims, facts in shapes]
    schedules = (("schedule", schedule_kernel), ("piece-walks", piece_walks_kernel), ("cut-ends", cut_ends_kernel))
    return [*cases, *((f"{name}-sm90", *_offline_schedule(kernel), 4, 1, {}) for name, kernel in schedules)]


def _offline_schedule(kernel: Any) -> Offline:
    """Kernel, signature, constexprs and attributes of the schedule of a masked, ragged, windowed call."""
    constants = {
        "TOKENS": 32, "BLOCK_Q": 128, "BLOCK_KV": 128, "TILE_N": 128, "HEADS": 1, "MASK_GROUP": 1, "TILES": 32,
        "OTHERS": 256, "MASKED": True, "CAUSAL": True, "WINDOW": True, "RAGGED_Q": True, "RAGGED_K": True,
        "VARIABLE": False, "END": END, "ENTRIES": 32, "ORDERED": False,
    }  # fmt: skip
    return offline_case(kernel, constants)
