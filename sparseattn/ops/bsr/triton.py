"""Portable Triton implementation (Ampere and newer): chooses tiles and shares from shapes, and launches.

One kernel serves every block size and option; what a call does not use is compiled out. Nothing that grows with a
sequence or a pattern is a constexpr.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.combine import combine_kernel
from sparseattn.kernels.launches import Launches, launch
from sparseattn.ops.bsr.problem import BSRProblem
from sparseattn.ops.bsr.triton_forward import bsr_kernel
from sparseattn.ops.dispatch import triton_device_reason
from sparseattn.ops.paged.triton import Tiles, as_bytes, config_for, float8_format, padded

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Programs a multiprocessor should get when lists are cut into shares, the fewest key tiles of a share, most shares.
_PROGRAMS = 4
_LEAST_TILES = 4
_MOST_SHARES = 64


class Plan(NamedTuple):
    """How a call is cut.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys of a tile.
        pack: Heads of a tile; ``block_m / pack`` queries.
        grid: Tiles of all rows of blocks, chunks of heads, shares of the lists.
        num_warps: Of a program.
        num_stages: Of the pipeline.
    """

    block_m: int
    block_n: int
    pack: int
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int


def unsupported_reason(q: Tensor, p: BSRProblem) -> str | None:
    """Why this kernel cannot run the call, or None."""
    if q.dtype not in _DTYPES:
        return f"the Triton kernels take bfloat16, float16 and float32, not {q.dtype}"
    widest = max(q.shape[-1], p.v.shape[-1])
    if widest > 256:
        return f"the Triton kernels take head dimensions up to 256, not {widest}"
    if p.scale <= 0:
        return f"the Triton kernels need a positive scale, not {p.scale}"
    return triton_device_reason(q)


def tiles_for(head_dim: int, itemsize: int, rows: int, columns: int, major: int, rope: bool = False) -> Tiles:
    """Tiles by padded head dimension, bytes an element of q, rows that share a list, C, GPU generation and RoPE."""
    tiles = config_for(head_dim, itemsize, rows, major, rope)
    if rows <= 16 and columns < 16 and major == 9 and itemsize == 2 and head_dim <= 128 and not rope:
        # Scattered keys: an H200 is the faster the more programs wait for theirs at the same time.
        tiles = tiles._replace(block_n=32, num_warps=2)
    return tiles


def make_plan(q: Tensor, p: BSRProblem) -> Plan:
    """Cut a call by its shapes alone."""
    batch, _, heads, dim = q.shape
    heads_k = p.k.shape[2]
    group = heads // heads_k
    own_lists = p.bounds.shape[1] == heads and group > 1
    pack = 1 if own_lists else triton.next_power_of_2(group)
    major, processors = 8, 4
    if q.is_cuda:
        major = torch.cuda.get_device_capability(q.device)[0]
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    widest = max(padded(dim), padded(p.v.shape[-1]))
    config = tiles_for(widest, q.element_size(), p.rows * pack, p.columns, major, p.rope_theta > 0)
    block_m = max(16, min(config.block_m, triton.next_power_of_2(p.rows * pack)))
    pack = min(pack, block_m)
    slots = batch * p.row_blocks * triton.cdiv(p.rows, block_m // pack)
    chunks = heads_k * triton.cdiv(group, pack)
    shares = 1
    # Few rows, whose keys would otherwise keep few multiprocessors busy. Not with a mask besides: Hopper's products
    # would wait for one another.
    if slots * chunks < 2 * processors and p.mask is None:
        tiles = triton.cdiv(p.longest * p.columns, config.block_n)
        wanted = triton.cdiv(_PROGRAMS * processors, slots * chunks)
        shares = max(1, min(wanted, tiles // _LEAST_TILES, _MOST_SHARES))
    return Plan(block_m, config.block_n, pack, (slots, chunks, shares), config.num_warps, config.num_stages)


def attend(q: Tensor, out: Tensor, lse: Tensor, p: BSRProblem) -> None:
    """Attention into ``out`` and ``lse``; see ``reference.attend``, which this matches."""
    attend_recorded(q, out, lse, p, None)


def attend_recorded(q: Tensor, out: Tensor, lse: Tensor, p: BSRProblem, record: Launches | None) -> None:
    """The same, leaving its launches in ``record``."""
    start = launch if record is None else record.launch
    plan = make_plan(q, p)
    batch, len_q, heads, dim_v = out.shape
    shares = plan.grid[2]
    split = shares > 1
    # What a call does not have is stood in for by any tensor.
    part = sums = lse
    if split:
        part = torch.empty((shares, batch, len_q, heads, dim_v), dtype=torch.float32, device=q.device)
        sums = torch.empty((shares, 2, batch, heads, len_q), dtype=torch.float32, device=q.device)
        if record is not None:
            record.scratch(part)
            record.scratch(sums)
    k, v = as_bytes(p.k), as_bytes(p.v)
    mask = lse if p.mask is None else p.mask.view(torch.uint8)
    sinks = lse if p.sinks is None else p.sinks
    start(
        bsr_kernel, plan.grid,
        q, k, v, out, lse, part, sums, p.bounds, p.indices, mask, lse if p.mask_offsets is None else p.mask_offsets,
        sinks, lse if p.slopes is None else p.slopes,
        lse if p.k_scale is None else p.k_scale, lse if p.v_scale is None else p.v_scale,
        q.stride(), k.stride(), v.stride(), out.stride(), _step(p.k_scale), _step(p.v_scale),
        len_q, k.shape[1], p.rows, p.row_blocks, p.bounds.stride(0) if p.bounds.shape[0] > 1 else 0,
        p.indices.shape[-1], p.indices.numel(), mask.numel(), shares,
        p.scale, p.v_factor, p.softcap, p.window_left, p.window_right,
        math.log2(p.rope_theta) if p.rope_theta else 0.0, p.rope_scale,
        D=q.shape[-1], DV=dim_v, BLOCK_D=padded(q.shape[-1]), BLOCK_DV=padded(dim_v), BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n, COLUMNS=p.columns, GROUP=heads // k.shape[2], PACK=plan.pack,
        LIST_GROUP=heads // p.bounds.shape[1], CSR=p.csr, CAUSAL=p.causal,
        WINDOW=p.window_left >= 0 or p.window_right >= 0, SOFTCAP=p.softcap > 0, SINKS=p.sinks is not None,
        ALIBI=p.slopes is not None, ROPE=p.rope_theta > 0, BITS=p.layout, FLOAT8=float8_format(k, p.k.dtype),
        K_SCALE=p.k_scale is not None, V_SCALE=p.v_scale is not None, GATHERED=p.gathered, SPLIT=split,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=plan.num_warps, num_stages=plan.num_stages, **LAUNCH,
    )  # fmt: skip
    if split:
        _combine(start, part, sums, out, lse, sinks, p)


def _combine(start: Any, part: Tensor, sums: Tensor, out: Tensor, lse: Tensor, sinks: Tensor, p: BSRProblem) -> None:
    """Merge the shares into ``out`` and ``lse``."""
    whole = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    batch, len_q, heads, dim_v = out.shape
    rows = batch * len_q * heads
    start(
        combine_kernel, (rows,),
        part, sums, whole, lse, sinks, rows, heads, len_q, part.shape[0], DV=dim_v, BLOCK_DV=padded(dim_v),
        SINKS=p.sinks is not None, num_warps=1, **LAUNCH,
    )  # fmt: skip
    if whole is not out:
        out.copy_(whole)


def _step(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    everything: dict[str, Any] = dict.fromkeys(
        ("CAUSAL", "WINDOW", "SOFTCAP", "SINKS", "ALIBI", "ROPE", "K_SCALE", "V_SCALE", "GATHERED"), True
    )
    variants: tuple[tuple[str, int, int, dict[str, Any], str], ...] = (
        ("r1-c1", 128, 1, {"COLUMNS": 1, "CSR": True, "GROUP": 1, "PACK": 1}, "bf16"),
        ("r16-c16-mask", 128, 16, {"COLUMNS": 16, "CSR": True, "BITS": "blocks"}, "bf16"),
        ("r64-c7-packed", 64, 64, {"COLUMNS": 7, "CSR": True, "BITS": "little"}, "bf16"),
        ("r16-c20-causal", 128, 16, {"COLUMNS": 20, "CSR": True, "CAUSAL": True, "SPLIT": True}, "bf16"),
        ("everything", 64, 16, {**everything, "COLUMNS": 64, "BITS": "bool", "FLOAT8": "e4m3", "LIST_GROUP": 4}, "u8"),
    )
    for major in (8, 9):
        for name, dim, rows, flags, cached in variants:
            native = major == 9 and cached == "u8"
            flags = {"GROUP": 4, "PACK": 4, "LIST_GROUP": 1, "FLOAT8": "", "BITS": "", **flags}
            if native:
                flags["FLOAT8"] = ""
            tiles = tiles_for(dim, 2, rows * flags["PACK"], flags["COLUMNS"], major, "ROPE" in flags)
            block_m = max(16, min(tiles.block_m, rows * flags["PACK"]))
            constants = {"D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim, "PRECISION": "tf32", **flags}
            constants |= {"BLOCK_M": block_m, "BLOCK_N": tiles.block_n}
            offline = _offline(constants, "fp8e4nv" if native else cached)
            cases.append((f"bsr-{name}-sm{major}0", bsr_kernel, *offline, tiles.num_warps, tiles.num_stages))
    return cases


_POINTERS = {"bound_ptr": "i32", "index_ptr": "i32", "mask_ptr": "u8", "mask_offset_ptr": "i64"}
_FLOATS = {"lse_ptr", "part_ptr", "sums_ptr", "slopes_ptr", "k_scale_ptr", "v_scale_ptr"}
_REALS = {"scale", "v_factor", "softcap", "theta_log2", "rope_scale"}


def _offline(constants: dict[str, Any], cached: str) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constexprs and attributes of a bfloat16 call with contiguous tensors."""
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(bsr_kernel.params):
        name = param.name
        if param.is_constexpr:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name, False)
        elif name.startswith("stride_") and not name.endswith("scale"):
            signature[name] = ("i32", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif name.endswith("_ptr"):
            kind = "fp32" if name in _FLOATS else cached if name in ("k_ptr", "v_ptr") else "bf16"
            signature[name] = "*" + _POINTERS.get(name, kind)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in _REALS else "i32"
    return signature, constexprs, attributes
