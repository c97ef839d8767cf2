"""Portable Triton implementation (Ampere and newer): chooses tiles and shares from shapes, and launches.

One kernel serves decode, append and prefill, every page size, layout and option; what a call does not use is compiled
out. Nothing that grows with a batch or a prompt is a constexpr. Which sequence and which keys a program works on is
decided on the device (``triton_schedule.py``), so that a captured launch follows new lengths.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.clear import clear_rows, clear_rows_kernel
from sparseattn.kernels.launches import launch, scratch
from sparseattn.kernels.mask_starts import mask_starts, mask_starts_kernel
from sparseattn.ops.dispatch import triton_device_reason
from sparseattn.ops.paged.pages_triton import copies_kernel, lengths_kernel
from sparseattn.ops.paged.problem import PagedProblem
from sparseattn.ops.paged.triton_forward import paged_combine_kernel, paged_kernel

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_NO_LIMIT = 2**31 - 1
# Programs a multiprocessor should get when keys are cut into shares, and the fewest key tiles of a share.
_PROGRAMS = 4
_LEAST_TILES = 4
# Queries of a sequence that count as few, and keys from which on few queries get shares of their own in a mixed batch.
_FEW = 16
_LONG = 1024
_MOST_ITEMS = 65_535  # of the second axis of a CUDA grid


class Tiles(NamedTuple):
    """Most rows of a tile, its keys, warps, stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """How a call is cut: into rows of tiles, and keys of shares.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys of a tile.
        pack: Heads of a tile; ``block_m / pack`` queries.
        tiles: Tiles of the longest sequence; 1 without shares, where slots count them.
        columns: Head chunks times tiles.
        items: Slots, or work items.
        target: Shares that a batch should make; 0: keys are not cut.
        limit: Keys of a sequence that can count, at most.
        rows_from: Fewest queries of a sequence that this launch takes.
        rows_to: Most queries.
        longest: Queries of a sequence for which there are tiles.
        num_warps: Of a program.
        num_stages: Of the pipeline.
    """

    block_m: int
    block_n: int
    pack: int
    tiles: int
    columns: int
    items: int
    target: int
    limit: int
    rows_from: int
    rows_to: int
    longest: int
    num_warps: int
    num_stages: int


def config_for(head_dim: int, itemsize: int, rows: int, major: int, rope: bool = False) -> Tiles:
    """Tiles by padded head dimension, bytes an element of q, rows that a sequence has, GPU generation and RoPE."""
    if itemsize == 4:  # full-precision products are unrolled multiply-adds: larger tiles take minutes to compile
        return Tiles(32 if head_dim <= 256 else 16, 32 if head_dim <= 256 else 16, 8, 1)
    if rope:  # keys and their partners are rotated in float32 registers
        return Tiles(16 if rows <= 16 else 64, 32, 4 if rows <= 16 else 8, 3 if head_dim <= 128 else 2)
    # The load of page numbers takes stages of its own: 5 keep two tiles of keys under way, 2 to 4 only one.
    if head_dim > 256:  # latent caches: the accumulator alone takes half of the registers
        return Tiles(64, 32, 8, 2) if major >= 9 else Tiles(32, 32, 8, 2)
    if rows <= 16:
        return Tiles(16, 64, 4, 5 if head_dim <= 128 else 2)
    if rows <= 64 or head_dim > 128:
        return Tiles(64, 64 if major >= 9 or head_dim <= 128 else 32, 4 if head_dim <= 128 else 8, 2)
    return Tiles(128, 64, 8, 5 if major >= 9 else 2)


def unsupported_reason(q: Tensor, q_rope: Tensor | None, p: PagedProblem) -> str | None:
    """Why these kernels cannot run the call, or None."""
    if q.dtype not in _DTYPES:
        return f"the Triton kernels take bfloat16, float16 and float32, not {q.dtype}"
    widest = max(q.shape[-1], p.v.shape[-1])
    if widest > 512 or (widest > 256 and not _shared(p.k, p.v)):
        return (
            f"the Triton kernels take head dimensions up to 256, and up to 512 where values are columns of the keys, "
            f"not {widest}"
        )
    if p.scale <= 0:
        return f"the Triton kernels need a positive scale, not {p.scale}"
    for t in (p.k, p.v, p.k_rope):  # offsets within a page have 32 bits
        if t is not None and (t.shape[1] - 1) * t.stride(1) + (t.shape[3] - 1) * t.stride(3) >= 2**31:
            return f"the Triton kernels take pages that span less than 2^31 elements a head, not strides {t.stride()}"
    return triton_device_reason(q)


def attend(q: Tensor, q_rope: Tensor | None, out: Tensor, lse: Tensor, p: PagedProblem) -> None:
    """Attention into ``out`` and ``lse``; see ``reference.attend``, which this matches."""
    clear(out, lse, p)
    q, k, q_rope, k_rope = _split_columns(q, q_rope, p)
    for plan in make_plans(q, p):
        _launch(q, k, q_rope, k_rope, out, lse, p, plan)


def clear(out: Tensor, lse: Tensor, p: PagedProblem) -> None:
    """What comes before the launches: rows past the last sequence, such as the padding of a captured batch."""
    cu = p.cu_seqlens_q
    if cu is not None:
        clear_rows(out, lse, cu[:-1], cu[1:], p.max_q, packed=True)


def _launch(
    q: Tensor,
    k: Tensor,
    q_rope: Tensor | None,
    k_rope: Tensor | None,
    out: Tensor,
    lse: Tensor,
    p: PagedProblem,
    plan: Plan,
) -> None:
    """One kernel, and the merge of its shares. What a call does not have is stood in for by any tensor."""
    split = plan.target > 0
    shape = (plan.items, plan.columns)
    part = scratch((*shape, plan.block_m, p.v.shape[-1]), torch.float32, q.device) if split else lse
    sums = scratch((*shape, 2, plan.block_m), torch.float32, q.device) if split else lse
    table, counts, lists = (lse if t is None else t for t in (p.page_table, p.list_counts, p.list_indices))
    if p.indices is not None:
        table = p.indices
    facts = _facts(q, q_rope, out, p, plan)
    k, v = as_bytes(k), as_bytes(p.v)
    k_rope = k if k_rope is None else as_bytes(k_rope)
    q_rope = q if q_rope is None else q_rope
    custom = lse if p.custom_mask is None else p.custom_mask.view(torch.uint8)
    starts = lse if p.mask_offsets is None else p.mask_offsets
    if p.custom_mask is not None and p.mask_offsets is None:
        starts = mask_starts(p.seq_lens, p.cu_seqlens_q, p.custom_mask.dtype == torch.uint8)
    sinks = lse if p.sinks is None else p.sinks
    cu = lse if p.cu_seqlens_q is None else p.cu_seqlens_q
    least = _LEAST_TILES * plan.block_n
    list_rows = counts.shape[-1] if p.list_counts is not None else 0
    launch(
        paged_kernel, shape[::-1] if split else shape,
        q, q_rope, k, v, k_rope, out, lse, part, sums,
        cu, p.seq_lens, table, lse if p.indptr is None else p.indptr, counts, lists, custom,
        starts,
        sinks, lse if p.slopes is None else p.slopes,
        lse if p.k_scale is None else p.k_scale, lse if p.v_scale is None else p.v_scale,
        q.stride(), q_rope.stride(), k.stride(), v.stride(), k_rope.stride(), out.stride(),
        table.stride() if p.page_table is not None else (0, 1), _step(p.k_scale), _step(p.v_scale),
        q.shape[0], p.batch, table.shape[-1], p.k.shape[0], list_rows, lists.shape[-1],
        counts.shape[1] * list_rows if p.list_counts is not None and counts.shape[0] > 1 else 0,
        custom.numel(), plan.limit, max(1, plan.target), least, plan.rows_from, plan.rows_to,
        p.scale, p.v_factor, p.softcap, p.window_left, p.window_right,
        math.log2(p.rope_theta) if p.rope_theta else 0.0, p.rope_scale,
        **facts, SINKS=p.sinks is not None, ALIBI=p.slopes is not None, ROPE=p.rope_theta > 0, BITS=_bits(p),
        FLOAT8=float8_format(k, p.k.dtype), SHARED_V=_shared(k, v), K_SCALE=p.k_scale is not None,
        V_SCALE=p.v_scale is not None, SPLIT=split, num_warps=plan.num_warps, num_stages=plan.num_stages, **LAUNCH,
    )  # fmt: skip
    if split:
        launch(
            paged_combine_kernel, (p.batch * plan.longest, q.shape[1]),
            part, sums, out, lse, sinks, cu, p.seq_lens, out.stride(),
            q.shape[0], p.batch, plan.limit, plan.target, least, plan.rows_to, plan.longest, plan.columns,
            DV=p.v.shape[-1], BLOCK_DV=padded(p.v.shape[-1]), BLOCK_M=plan.block_m, GROUP=q.shape[1] // k.shape[2],
            PACK=plan.pack, TILES=plan.tiles, SINKS=p.sinks is not None, RAGGED_Q=p.cu_seqlens_q is not None,
            num_warps=1, **LAUNCH,
        )  # fmt: skip


def make_plans(q: Tensor, p: PagedProblem) -> list[Plan]:
    """Cut a call by its shapes alone.

    A batch that may mix prefill and decode takes two launches: slots for sequences of many queries, and shares of the
    keys for those of few, which would otherwise read all of their keys in one program each.
    """
    plan = _make_plan(q, p, p.max_q)
    if plan.target or p.cu_seqlens_q is None or p.batch == 1 or min(plan.limit, _longest(p)) <= _LONG:
        return [plan]
    few = _make_plan(q, p, _FEW)
    return [plan._replace(rows_from=_FEW + 1), few._replace(rows_to=_FEW)]


def _longest(p: PagedProblem) -> int:
    """Keys of a sequence at most, by the shape of the table."""
    table = p.page_table if p.page_table is not None else p.indices
    assert table is not None
    return table.shape[-1] * p.page_size


def _make_plan(q: Tensor, p: PagedProblem, max_q: int) -> Plan:
    """The cut for sequences of up to ``max_q`` queries."""
    heads, heads_k = q.shape[1], p.k.shape[2]
    group = heads // heads_k
    own_lists = p.list_indices is not None and p.list_indices.shape[1] == heads and group > 1
    pack = 1 if own_lists else triton.next_power_of_2(group)
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8
    widest = max(padded(q.shape[-1]), padded(p.v.shape[-1]))
    config = config_for(widest, q.element_size(), max_q * pack, major, p.rope_theta > 0)
    block_m = max(16, min(config.block_m, triton.next_power_of_2(max(1, max_q * pack))))
    pack = min(pack, block_m)
    if p.block_q:  # the queries of a tile share a list
        block_m = min(block_m, pack * (p.block_q & -p.block_q))
    tokens = block_m // pack
    chunks = heads_k * triton.cdiv(group, pack)
    tiles = triton.cdiv(max(1, max_q), tokens)
    slots = p.batch if p.cu_seqlens_q is None else q.shape[0] // tokens + p.batch

    limit = _NO_LIMIT
    if p.window_left >= 0 and (p.causal or p.window_right >= 0):
        limit = p.window_left + max_q + max(p.window_right, 0) + 1
    if p.list_indices is not None:
        limit = min(limit, max(1, p.list_indices.shape[-1] * p.block_kv))
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    few = max_q <= _FEW or slots * chunks < 2 * processors
    target = triton.cdiv(_PROGRAMS * processors, chunks * tiles)
    if few and min(limit, _longest(p)) > _LEAST_TILES * config.block_n and target + p.batch <= _MOST_ITEMS:
        grid = (tiles, chunks * tiles, target + p.batch, target)
    else:
        grid = (1, chunks, slots, 0)
    spans = (limit, 0, _NO_LIMIT, max(1, max_q))
    return Plan(block_m, config.block_n, pack, *grid, *spans, config.num_warps, config.num_stages)


def _facts(q: Tensor, q_rope: Tensor | None, out: Tensor, p: PagedProblem, plan: Plan) -> dict[str, object]:
    """Compile-time facts of a call's shapes."""
    rest = 0 if q_rope is None else q_rope.shape[-1]
    masked = p.list_indices is not None
    return {
        "D": q.shape[-1],
        "DR": rest,
        "DV": out.shape[-1],
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_DR": padded(rest),
        "BLOCK_DV": padded(out.shape[-1]),
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "PAGE": p.page_size,
        "GROUP": q.shape[1] // p.k.shape[2],
        "PACK": plan.pack,
        "MASK_GROUP": 1 if p.list_indices is None else q.shape[1] // p.list_indices.shape[1],
        "BLOCK_Q": p.block_q,
        "BLOCK_KV": p.block_kv,
        "TILES": plan.tiles,
        "MASKED": masked,
        "CSR": p.indptr is not None,
        "CAUSAL": p.causal,
        "WINDOW": p.window_left >= 0 or p.window_right >= 0,
        "SOFTCAP": p.softcap > 0,
        "RAGGED_Q": p.cu_seqlens_q is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _split_columns(
    q: Tensor, q_rope: Tensor | None, p: PagedProblem
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k and their further columns; a head dimension such as 192 or 80 is cut in two rather than padded."""
    dim = q.shape[-1]
    main = 1 << (dim.bit_length() - 1)
    rest = dim - main
    if q_rope is None and not p.rope_theta and rest >= 16 and rest & (rest - 1) == 0:
        return q[..., :main], p.k[..., :main], q[..., main:], p.k[..., main:]
    return q, p.k, q_rope, p.k_rope


def padded(head_dim: int) -> int:
    """Columns of a tile for a head dimension: 32 at least, since Triton 3.6 reads past tiles of 16 float8 columns."""
    return max(32, triton.next_power_of_2(head_dim))


def _shared(k: Tensor, v: Tensor) -> bool:
    """Whether values are the very columns of the keys that a kernel has loaded."""
    return k.data_ptr() == v.data_ptr() and k.shape == v.shape and k.stride() == v.stride()


def _native(t: Tensor) -> bool:
    """Whether the GPU converts float8 itself; others decode the bytes."""
    return t.is_cuda and torch.cuda.get_device_capability(t.device) >= (8, 9)


def as_bytes(t: Tensor) -> Tensor:
    """float8 as bytes where the kernels decode it."""
    return t.view(torch.uint8) if t.dtype in _FORMATS and not _native(t) else t


def float8_format(k: Tensor, dtype: torch.dtype) -> str:
    """The format that a kernel decodes byte by byte."""
    return _FORMATS[dtype] if k.dtype == torch.uint8 else ""


def _bits(p: PagedProblem) -> str:
    if p.custom_mask is None:
        return ""
    return "bool" if p.custom_mask.dtype == torch.bool else "big" if p.big_endian else "little"


def _step(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    everything: dict[str, Any] = dict.fromkeys(
        ("MASKED", "CAUSAL", "WINDOW", "SOFTCAP", "SINKS", "ALIBI", "RAGGED_Q"), True
    )
    everything |= {"BITS": "little", "ROPE": True, "MASK_GROUP": 4, "BLOCK_KV": 64, "BLOCK_Q": 64}
    everything |= {"K_SCALE": True, "V_SCALE": True}
    variants: tuple[tuple[str, tuple[int, int, int], int, dict[str, Any], str], ...] = (
        ("decode16", (128, 0, 128), 4, {"CAUSAL": True, "SPLIT": True}, "bf16"),
        ("prefill16", (128, 0, 128), 4096, {"CAUSAL": True, "RAGGED_Q": True, "CSR": True}, "bf16"),
        ("everything", (64, 0, 64), 16, {**everything, "FLOAT8": "e4m3"}, "u8"),
        ("custom", (128, 0, 128), 64, {"BITS": "bool", "RAGGED_Q": True, "CSR": True}, "bf16"),
        ("mla", (512, 64, 512), 128, {"CAUSAL": True, "SPLIT": True, "SHARED_V": True, "GROUP": 128}, "bf16"),
    )
    for major in (8, 9):
        for name, dims, rows, flags, cached in variants:
            tiles = config_for(max(dims), 2, rows, major, "ROPE" in flags)
            native = major == 9 and cached == "u8"
            flags = {**flags, "FLOAT8": ""} if native else flags
            block_m = max(16, min(tiles.block_m, rows))
            group = flags.get("GROUP", 4)
            constants = {"BLOCK_M": block_m, "BLOCK_N": tiles.block_n, "GROUP": group, "PACK": min(group, block_m)}
            offline = _offline(paged_kernel, dims, {**constants, **flags}, "fp8e4nv" if native else cached)
            cases.append((f"paged-{name}-sm{major}0", *offline, tiles.num_warps, tiles.num_stages))
    constants = {"BLOCK_M": 16, "GROUP": 4, "PACK": 4, "SINKS": True, "RAGGED_Q": True}
    cases.append(("paged-combine", *_offline(paged_combine_kernel, (128, 0, 128), constants, "bf16"), 1, 1))
    cases.append(("clear-rows", *_offline(clear_rows_kernel, (128, 0, 128), {"ROWS": 32, "CHUNK": 128}, "bf16"), 4, 1))
    cases.append(("paged-lengths", *_offline(lengths_kernel, (128, 0, 128), {"BLOCK": 256}, "bf16"), 4, 1))
    cases.append(("paged-mask-starts", *_offline(mask_starts_kernel, (128, 0, 128), {"PACKED": True}, "bf16"), 4, 1))
    copied = {p.name: "i32" if p.name.startswith("count") else "*i32" for p in copies_kernel.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(copied.values()) if kind == "*i32"}
    block = len(copied) - 1
    del aligned[(block,)]
    cases.append(("paged-copies", copies_kernel, {**copied, "BLOCK": "constexpr"}, {(block,): 1024}, aligned, 4, 1))
    return cases


_INTEGERS = {"cu_ptr", "lens_ptr", "table_ptr", "indptr_ptr", "count_ptr", "list_ptr"}
_INTEGERS |= {"start_ptr", "end_ptr"}
_FLOATS = {"lse_ptr", "part_ptr", "sums_ptr", "slopes_ptr", "k_scale_ptr", "v_scale_ptr"}
_REALS = {"scale", "v_factor", "softcap", "theta_log2", "rope_scale"}


def _offline(
    function: Any, dims: tuple[int, int, int], flags: dict[str, Any], cached: str
) -> tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Kernel, signature, constexprs and attributes of a bfloat16 call with contiguous tensors and pages of 16."""
    constants: dict[str, Any] = {
        "D": dims[0], "DR": dims[1], "DV": dims[2], "BLOCK_D": padded(dims[0]), "BLOCK_DR": padded(dims[1]),
        "BLOCK_DV": padded(dims[2]), "PAGE": 16, "MASK_GROUP": 1, "BLOCK_Q": 0, "BLOCK_KV": 16, "TILES": 1,
        "BITS": "", "FLOAT8": "", "PRECISION": "tf32", **flags,
    }  # fmt: skip
    caches = {"k_ptr", "v_ptr", "k_rope_ptr"}
    sizes = {"stride_table": 2, "stride_q": 3, "stride_q_rope": 3, "stride_o": 3}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(function.params):
        name = param.name
        if param.is_constexpr:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name, False)
        elif name.startswith("stride_") and not name.endswith("scale"):
            size = sizes.get(name, 4)
            signature[name] = (*["i32"] * (size - 1), "constexpr")
            constexprs[(i, size - 1)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(size - 1)}
        elif name.endswith("_ptr"):
            kind = "i32" if name in _INTEGERS else "fp32" if name in _FLOATS else cached if name in caches else "bf16"
            signature[name] = "*" + {"mask_ptr": "u8", "mask_offset_ptr": "i64", "starts_ptr": "i64"}.get(name, kind)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in _REALS else "i32"
    return function, signature, constexprs, attributes
