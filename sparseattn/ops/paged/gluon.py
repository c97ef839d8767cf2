"""Hopper implementation (sm_90a) in Gluon: the forward kernel of ``kernels/hopper_forward.py`` over a paged cache.

Pages come by tensor map, in boxes of as many tokens as a page, a mask block and a key tile have in common. Decode,
append and prefill are one launch: tiles, and shares of the keys of long sequences, are made on the device from the
lengths there (``gluon_schedule.py``), so that a captured launch follows new ones.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.hopper import row_tiles
from sparseattn.kernels.hopper_forward import Facts, forward_kernel
from sparseattn.kernels.hopper_tiles import (
    MAX_PACK,
    Tiles,
    batch_rows,
    config_for,
    consumer_registers,
    offline,
    padded,
    processors_of,
    unmappable,
)
from sparseattn.ops.paged.gluon_schedule import merge_shares_kernel, page_gaps_kernel, paged_schedule_kernel
from sparseattn.ops.paged.problem import PagedProblem

_NO_LIMIT = 2**30
# The fewest key tiles of a share, and records that a program of the schedule makes.
_LEAST_TILES = 4
_RECORDS = 32
# Rows of a tile up to which a call waits for memory whatever its kernel does with the tiles that arrive.
_FEW_ROWS = 16


class Plan(NamedTuple):
    """How a call is cut, by shapes alone.

    Attributes:
        tiles: Configuration of the kernel.
        pack: Query heads in a row tile.
        tokens: Query tokens of a row tile.
        rows: Rows of a row tile that can be in use.
        target: Shares of keys that all row tiles together should make; 0: keys are not cut.
        least: Keys of a share at least.
        limit: Keys of a sequence that a row tile can see, at most.
        merged: Every row tile leaves sums, even one of one share.
        records: Row tiles and shares, at most.
        places: Shares that leave sums, at most.
        merges: Row tiles of several shares, at most.
        programs: Size of the grid.
    """

    tiles: Tiles
    pack: int
    tokens: int
    rows: int
    target: int
    least: int
    limit: int
    merged: bool
    records: int
    places: int
    merges: int
    programs: int


def unsupported_reason(q: Tensor, q_rope: Tensor | None, p: PagedProblem) -> str | None:
    """Why these kernels cannot run the call, or None."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"the Gluon kernels need a Hopper GPU (compute capability 9.0), not {q.device}"
    return refusal(q, q_rope, p)


def refusal(q: Tensor, q_rope: Tensor | None, p: PagedProblem) -> str | None:
    """Why these kernels could not run a call on any GPU, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16) or p.k.dtype != q.dtype:
        return f"the Gluon kernels take bfloat16 and float16 queries and caches, not {q.dtype} and {p.k.dtype}"
    for given, what in (
        (q_rope is not None, "latent (MLA) caches"),
        (p.rope_theta > 0, "RoPE"),
        (p.slopes is not None, "ALiBi"),
        (p.custom_mask is not None, "custom masks"),
    ):
        if given:
            return f"the Gluon kernels take no {what}"
    if p.scale <= 0:
        return f"the Gluon kernels need a positive scale, not {p.scale}"
    for name, dim in (("q and k", q.shape[-1]), ("v", p.v.shape[-1])):
        if dim > 256 or dim % 8:
            return f"the Gluon kernels take head dimensions up to 256 in multiples of 8, not {dim} of {name}"
    if p.page_size % 8:
        return f"the Gluon kernels take pages of multiples of 8 tokens, not {p.page_size}"
    for name, t in (("q", q), ("k", p.k), ("v", p.v)):
        reason = unmappable(name, t)
        if reason is not None:
            return reason
    if _table(p).numel() * p.page_size >= 2**31:
        return "the Gluon kernels count positions of all pages of a table in 31 bits"
    tile_n = plan(q, p, 1).tiles.tile_n
    if p.list_indices is not None and p.block_kv % tile_n and (p.block_kv % 8 or tile_n % p.block_kv):
        return f"the Gluon kernels take KV blocks of 8, 16, 32, 64 or multiples of {tile_n} here, not {p.block_kv}"
    return None


def _table(p: PagedProblem) -> Tensor:
    table = p.page_table if p.page_table is not None else p.indices
    assert table is not None
    return table


def plan(q: Tensor, p: PagedProblem, processors: int) -> Plan:
    """Cut a call: the heads of a group share a row tile where they share their lists."""
    heads, heads_k = q.shape[1], p.k.shape[2]
    group = heads // heads_k
    shared = p.list_indices is None or p.list_indices.shape[1] <= heads_k
    pack = min(group & -group, MAX_PACK) if shared else 1
    whole = min(triton.next_power_of_2(group), MAX_PACK)
    if shared and p.max_q * whole <= 64:  # rows are not scarce: a group of 7 reads its keys once
        pack = whole
    slots = 64 // pack
    consumers = 2 if p.max_q > slots and p.block_q % (2 * slots) == 0 else 1
    tokens = math.gcd(p.block_q, consumers * slots)  # those of a tile share a list; gcd(0, n) is n
    tiles = config_for(padded(q.shape[-1]), padded(p.v.shape[-1]), consumers)
    rows = min(tokens, max(1, p.max_q)) * pack

    limit = _NO_LIMIT
    if p.window_left >= 0 and (p.causal or p.window_right >= 0):
        limit = p.window_left + p.max_q + max(p.window_right, 0) + 1
    if p.list_indices is not None:
        limit = min(limit, max(1, p.list_indices.shape[-1] * p.block_kv))
    row_tiles_ = p.batch if p.cu_seqlens_q is None else q.shape[0] // tokens + p.batch
    row_tiles_ *= heads_k * triton.cdiv(group, pack)
    programs = processors * tiles.programs
    target = (4 if rows <= _FEW_ROWS else 2) * programs
    least = _LEAST_TILES * tiles.tile_n
    if min(limit, _table(p).shape[-1] * p.page_size) <= least or (p.batch == 1 and row_tiles_ >= target):
        target = 0
    # A share more than the first begins only where one of `target` ends; a sequence that is cut has twice them at most.
    records = row_tiles_ + target
    merged = group % pack > 0  # a tensor map would store the heads of the next group, too
    places = records if merged else min(2 * target, records)
    merges = row_tiles_ if merged else min(target, row_tiles_)
    programs = min(programs, records)
    return Plan(tiles, pack, tokens, rows, target, least, limit, merged, records, places, merges, programs)


def attend(q: Tensor, q_rope: Tensor | None, out: Tensor, lse: Tensor, p: PagedProblem) -> None:
    """Attention into ``out`` and ``lse``; see ``reference.attend``, which this matches."""
    o = out if unmappable("out", out) is None else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if p.cu_seqlens_q is not None:  # rows past the last sequence, such as the padding of a captured batch
        o.zero_()
        lse.fill_(-math.inf)
    cut = plan(q, p, processors_of(q.device))
    schedule = _schedule(q, p, cut)
    _launch(q, o, lse, p, cut, *schedule)
    if o is not out:
        out.copy_(o)


def _lists(p: PagedProblem, stand_in: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Lists as kernel arguments: counts, indices, and (list rows per batch entry, per head, list width)."""
    if p.list_counts is None or p.list_indices is None:
        return stand_in, stand_in, (0, 0, 0)
    batch, heads, rows = p.list_counts.shape
    width = p.list_indices.shape[-1]
    indices = p.list_indices if width else p.list_counts  # counts are limited by the width, so none of it is read
    return p.list_counts, indices, (0 if batch == 1 else heads * rows, rows, width)


def _schedule(q: Tensor, p: PagedProblem, cut: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Records, counter, merges and spans; see ``paged_schedule_kernel``."""
    heads, heads_k = q.shape[1], p.k.shape[2]
    # Rows of whole 16 bytes: pointers of another alignment would be another kernel.
    sizes = ((cut.records, 8), (3,), (max(1, cut.merges), 8), (5, triton.cdiv(p.batch, 4) * 4))
    records, counter, merges, spans = (torch.empty(s, dtype=torch.int32, device=q.device) for s in sizes)
    cu, indptr = (counter if t is None else t for t in (p.cu_seqlens_q, p.indptr))
    table = _rows(_table(p))
    batch = (q.shape[0], p.max_q, table.stride(0) if p.indptr is None else 0, table.shape[-1])
    csr, ragged = p.indptr is not None, p.cu_seqlens_q is not None
    counts, indices, strides = _lists(p, counter)
    chunks = triton.cdiv(heads // heads_k, cut.pack)
    list_heads = 1 if p.list_indices is None else p.list_indices.shape[1]
    # Page lists come in any order, and few rows wait for memory anyway: all of their tiles take the careful path.
    gaps = cut.rows > _FEW_ROWS and not (p.list_indices is not None and p.block_q == 0)
    gap = torch.empty((2, p.batch), dtype=torch.int32, device=q.device) if gaps else counter
    if gaps:
        page_gaps_kernel[(p.batch,)](
            gap, cu, p.seq_lens, indptr, table, p.batch, *batch, p.k.shape[0],
            PAGE=p.page_size, CSR=csr, RAGGED=ragged, WIDTH=1024, num_warps=4, **LAUNCH,
        )  # fmt: skip
    paged_schedule_kernel[(triton.cdiv(cut.records, _RECORDS),)](
        records, counter, merges, spans, cu, p.seq_lens, indptr, gap, counts, indices,
        p.batch, *batch, cut.records, cut.places, cut.merges, *strides, heads_k, cut.limit, max(1, cut.target),
        cut.least, p.window_left, p.window_right, spans.stride(0),
        TOKENS=cut.tokens, BLOCK_Q=p.block_q or _NO_LIMIT, BLOCK_KV=p.block_kv, TILE_N=cut.tiles.tile_n,
        PAGE=p.page_size, HEADS=chunks, MASK_GROUP=heads_k * chunks // list_heads, TILES=_RECORDS,
        MASKED=p.list_indices is not None, CSR=csr, CAUSAL=p.causal, WINDOW=_windowed(p), RAGGED=ragged,
        SPLIT=cut.target > 0, MERGED=cut.merged, GAPS=gaps, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return records, counter, merges, spans


def _launch(
    q: Tensor, o: Tensor, lse: Tensor, p: PagedProblem, cut: Plan, records: Tensor, counter: Tensor, merges: Tensor,
    spans: Tensor,
) -> None:  # fmt: skip
    """The kernel over the tiles of a schedule, and the merge of its shares."""
    heads, heads_k, dim_v = q.shape[1], p.k.shape[2], o.shape[-1]
    tiles = cut.tiles
    part = torch.empty((max(1, cut.places), cut.rows, dim_v), dtype=torch.float32, device=q.device)
    sums = torch.empty((max(1, cut.places), 2, cut.rows), dtype=torch.float32, device=q.device)
    counts, indices, strides = _lists(p, counter)
    sinks = lse if p.sinks is None else p.sinks
    scales = _scales(p)
    facts = Facts(
        heads, heads // heads_k, cut.pack, _mask_group(q, p), cut.tokens, p.block_q or _NO_LIMIT, p.block_kv,
        padded(q.shape[-1]), dim_v, padded(dim_v), tiles.consumers, tiles.tile_n, tiles.k_stages, tiles.v_stages,
        tiles.q_registers, tiles.o_in_q, p.list_indices is not None, p.causal, _windowed(p), p.softcap > 0,
        p.sinks is not None, False, True, True, p.page_size, scales is not None,
    )  # fmt: skip
    descriptors = (row_tiles(t, *box) for t, box in zip((q, p.k, p.v, o), facts.boxes(), strict=True))
    forward_kernel[(cut.programs,)](
        *descriptors, part, lse, sinks, records, counter, counts, indices, *spans[:4], *strides, 0, 0, 0,
        0, batch_rows(p.k), batch_rows(p.v), 0, 0, q.shape[0], cut.rows, cut.rows * dim_v,
        p.window_left, p.window_right, p.scale * math.log2(math.e), p.softcap,
        facts, consumer_registers(facts), _rows(_table(p)), spans[4], p.k.shape[0], sums, scales,
        num_warps=4, maxnreg=128 if tiles.programs == 2 else None, **LAUNCH,
    )  # fmt: skip
    if cut.merges:
        few = cut.rows <= _FEW_ROWS
        merge_shares_kernel[(cut.merges, cut.rows)](
            part, sums, merges, counter, o, lse, sinks, o.stride(), q.shape[0], cut.rows,
            DV=dim_v, BLOCK_DV=triton.next_power_of_2(dim_v), GROUP=heads // heads_k, PACK=cut.pack,
            SHARES=32 if few else 8, SINKS=p.sinks is not None, num_warps=4 if few else 1, **LAUNCH,
        )  # fmt: skip


def _rows(table: Tensor) -> Tensor:
    """A table whose rows the kernels can walk."""
    return table if table.stride(-1) == 1 else table.contiguous()


def _windowed(p: PagedProblem) -> bool:
    return p.window_left >= 0 or p.window_right >= 0


def _mask_group(q: Tensor, p: PagedProblem) -> int:
    """Query heads that share a list."""
    return q.shape[1] if p.list_indices is None else q.shape[1] // p.list_indices.shape[1]


def _scales(p: PagedProblem) -> Tensor | None:
    """float32 [2, Hkv], what the scores and the outputs of a KV head are multiplied by; None: nothing."""
    if p.k_scale is None and p.v_scale is None and p.v_factor == 1.0:
        return None
    scales = torch.ones((2, p.k.shape[2]), dtype=torch.float32, device=p.k.device)
    if p.k_scale is not None:
        scales[0] = p.k_scale
    scales[1] = p.v_factor if p.v_scale is None else p.v_scale * p.v_factor
    return scales


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int, dict[str, Any]]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages, options), to compile offline."""
    ragged = {"CAUSAL": True, "RAGGED_Q": True, "RAGGED_K": True, "PACK": 4}
    decode, listed = {"consumers": 1}, {"MASKED": True, "BLOCK_KV": 64}
    options = dict.fromkeys(("WINDOW", "SOFTCAP", "SINKS", "SCALED"), True)
    shapes: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
        ("prefill16-128x128", (128, 128), {"PAGE": 16}),
        ("decode16-128x128", (128, 128), {"PAGE": 16, **decode}),
        ("decode128-128x128", (128, 128), {"PAGE": 128, **decode}),
        ("listed8-128x128", (128, 128), {"PAGE": 8, **listed}),
        ("all-64x64", (64, 64), {"PAGE": 32, **listed, **options}),
        ("decode16-256x256", (256, 256), {"PAGE": 16, **decode}),
    ]
    cases = [(f"gluon-paged-{name}-sm90", *offline(dims, {**ragged, **facts})) for name, dims, facts in shapes]
    flags = ("MASKED", "CSR", "CAUSAL", "WINDOW", "RAGGED", "SPLIT", "MERGED", "GAPS", "SINKS")
    everything: dict[str, Any] = dict.fromkeys(flags, True)
    everything |= {"TOKENS": 32, "BLOCK_Q": 128, "BLOCK_KV": 128, "TILE_N": 128, "PAGE": 16, "HEADS": 1}
    everything |= {"MASK_GROUP": 1, "TILES": _RECORDS, "WIDTH": 1024, "DV": 128, "BLOCK_DV": 128, "PACK": 4, "GROUP": 4}
    for name, kernel in (("schedule", paged_schedule_kernel), ("gaps", page_gaps_kernel)):
        cases.append((f"gluon-paged-{name}-sm90", *_offline(kernel, everything), 4, 1, {}))
    cases.append(("gluon-paged-merge-sm90", *_offline(merge_shares_kernel, {**everything, "SHARES": 32}), 4, 1, {}))
    return cases


def _offline(function: Any, flags: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Kernel, signature, constexprs and attributes of a bfloat16 call."""
    kinds = dict.fromkeys(("part_ptr", "sums_ptr", "lse_ptr", "sinks_ptr"), "fp32") | {"o_ptr": "bf16"}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(function.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = flags[param.name]
        elif param.name == "stride_o":
            signature[param.name] = ("i32", "i32", "constexpr")
            constexprs[(i, 2)] = 1
        elif param.name.endswith("_ptr"):
            signature[param.name] = f"*{kinds.get(param.name, 'i32')}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32"
    return function, signature, constexprs, attributes
