"""Portable Triton implementation (Ampere and newer): forward, and a deterministic two-kernel backward.

This file chooses tiles and launches; the kernels are in ``triton_forward.py`` and ``triton_backward.py``. Every kernel
walks block lists when the call has a mask and a closed-form key range when it has none, so dense attention is the same
code. Nothing that grows with a prompt is a constexpr or specialised on: a new length, batch or density reuses the
compiled kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.clear import clear_rows
from sparseattn.kernels.combine import combine_kernel
from sparseattn.kernels.launches import launch
from sparseattn.ops.block_sparse.extra import (
    call_facts,
    extra_facts,
    extra_tile,
    listed_kernel,
    mean_kernel,
    prepare_extra,
)
from sparseattn.ops.block_sparse.extra_backward import (
    COLUMN_KEYS,
    add_extra_gradients,
    column_dkdv_kernel,
    mean_dkdv_kernel,
    spread_kernel,
)
from sparseattn.ops.block_sparse.geometry import Geometry, list_arguments
from sparseattn.ops.block_sparse.triton_backward import dkdv_kernel, dq_kernel, preprocess_kernel
from sparseattn.ops.block_sparse.triton_forward import forward_kernel


class Tiles(NamedTuple):
    """Tile shape and pipeline of one kernel: rows, keys, warps, stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def config_for(kernel: str, head_dim: int, itemsize: int, major: int) -> Tiles:
    """Tiles of a kernel ("forward", "dkdv", "dq") by padded head dimension, bytes an element and GPU generation."""
    if itemsize == 4:  # full-precision products are unrolled multiply-adds: larger tiles take minutes to compile
        return Tiles(32, 32, 8, 1)
    # The largest tiles whose accumulators stay in registers; Hopper's were timed on an H200.
    hopper = major >= 9
    if kernel == "forward":
        if head_dim <= 64:
            return Tiles(128, 64, 4, 3) if hopper else Tiles(128, 64, 4, 2)
        if head_dim <= 128:
            return Tiles(128, 128, 8, 2) if hopper else Tiles(128, 64, 8, 2)
        return Tiles(128, 64, 8, 2) if hopper else Tiles(64, 32, 4, 2)
    if kernel == "dkdv":
        if head_dim <= 128:
            return Tiles(64, 128, 8, 3) if hopper else Tiles(64, 64, 8, 1)
        return Tiles(64, 32, 8, 1)
    if head_dim <= 128:
        return Tiles(128, 64, 8, 3) if hopper else Tiles(128, 32, 8, 1)
    return Tiles(64, 32, 8, 2) if hopper else Tiles(64, 32, 8, 1)


def _power_of_two_divisor(n: int) -> int:
    return n & -n


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _tiles(kernel: str, q: Tensor, v: Tensor, g: Geometry, override: Tiles | None) -> Tiles:
    """The configured tiles, shrunk until they divide the mask's blocks."""
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8
    tiles = override or config_for(kernel, max(_padded(q.shape[-1]), _padded(v.shape[-1])), q.element_size(), major)
    if g.kv_num_blocks is None:
        return tiles
    block_m = min(tiles.block_m, _power_of_two_divisor(g.block_q))
    block_n = min(tiles.block_n, _power_of_two_divisor(g.block_kv))
    # A warp of a smaller tile holds 1024 scores of half precision; float32's unrolled products want them spread wider.
    # Wide heads keep their share of warps, which hold columns of accumulators rather than scores.
    scores = block_m * block_n
    warps = max(1, scores // (128 if q.element_size() == 4 else 1024))
    warps = max(warps, tiles.num_warps * scores // (tiles.block_m * tiles.block_n))
    if kernel != "forward" and scores >= 1024:  # 32 x 32: one warp spills its accumulators, five times as slow
        warps = max(warps, 2)
    return Tiles(block_m, block_n, min(tiles.num_warps, warps), tiles.num_stages)


def _common(q: Tensor, k: Tensor, v: Tensor, g: Geometry, tiles: Tiles, *others: Tensor) -> dict[str, object]:
    """Compile-time facts and launch options shared by the kernels that walk tiles."""
    masked = g.kv_num_blocks is not None
    return call_facts(q, k, v, g, *others) | {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_Q": g.block_q if masked else tiles.block_m,
        "BLOCK_KV": g.block_kv if masked else tiles.block_n,
        "MASKED": masked,
        "PACKED": g.packed,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **LAUNCH,
    }


def _pieces(pieces: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """The pieces of rows of variable blocks as kernel arguments: pointer, and how many a head has."""
    return (stand_in, 0) if pieces is None else (pieces, pieces.shape[1])


def _grid(
    t: Tensor, longest: int, pieces: Tensor | None, block: int, g: Geometry, tile: int, pack: int = 1
) -> tuple[int, int]:
    """Tiles of ``tile`` rows, ``pack`` a token of ``t``, that a launch has, and sequences beside each other.

    Sequences that are packed lie one after the other: as many tiles as all need, however long the ``longest`` is.
    Variable blocks have ``pieces`` of up to ``block`` rows.
    """
    if pieces is not None:
        return pieces.shape[1] * (block // tile), g.batch
    if g.packed:
        return t.shape[0] * pack // tile + g.batch, min(g.batch, 1)
    return triton.cdiv(longest * pack, tile), g.batch


def _variable_facts(g: Geometry, walked: int) -> dict[str, object]:
    """Compile-time facts about variable blocks; short tiles are read at most 64 of the ``walked`` rows at a time."""
    return {"VARIABLE": g.row_pieces is not None, "BLOCK_S": min(walked, 64)}


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, g: Geometry, gradients: str | None = None) -> str | None:
    """Why these kernels cannot run the call, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels take bfloat16, float16 and float32, not {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"the Triton kernels take head dimensions up to 256, not {max(q.shape[-1], v.shape[-1])}"
    if g.scale <= 0:
        return f"the Triton kernels need a positive scale, not {g.scale}"
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        return f"the Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1), not one on {q.device}"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 with TRITON_INTERPRET=1"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return None


def _split_plan(q: Tensor, k: Tensor, g: Geometry) -> tuple[int, int]:
    """(heads packed into a tile, shares of the keys) for a call; (1, 1) unless a dense call has very few rows."""
    if g.kv_num_blocks is not None or g.max_q > 16:
        return 1, 1
    group = q.shape[-2] // k.shape[-2]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    programs = g.batch * k.shape[-2] * triton.cdiv(g.max_q * group, 16)
    return group, max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(g.max_k, 256), 64))


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, g: Geometry, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs and LSE; see ``reference.forward``, which this matches."""
    heads, dim_v = q.shape[-2], v.shape[-1]
    rows = q.shape[0] if g.packed else q.shape[1]
    o = torch.empty((*q.shape[:-1], dim_v), dtype=q.dtype, device=q.device)
    lse_shape = (heads, rows) if g.packed else (g.batch, heads, rows)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if g.q_start is not None and g.q_end is not None:
        clear_rows(o, lse, g.q_start, g.q_end, g.max_q, packed=g.packed)
    if q.numel() == 0 or g.max_q == 0:
        return o, lse
    pack, splits = _split_plan(q, k, g)
    config = _tiles("forward", q, v, g, tiles)
    if pack > 1 or splits > 1:
        config = config._replace(block_m=max(16, min(64, triton.next_power_of_2(g.max_q * pack))), num_warps=4)
    o_out, lse_out = o, lse
    if splits > 1:  # zero sums are what a row outside every sequence contributes
        o_out = torch.zeros((splits, *o.shape), dtype=torch.float32, device=q.device)
        lse_out = torch.zeros((splits, 2, *lse.shape), dtype=torch.float32, device=q.device)
    counts, indices, mask_b, mask_h, width = list_arguments(g.kv_num_blocks, g.kv_indices, lse)
    extra = prepare_extra(k, v, g, lse)
    chunk = 1 if pack > 1 else heads // k.shape[-2]
    row_tiles, beside = _grid(q, g.max_q, g.row_pieces, g.block_q, g, config.block_m, pack)
    launch(
        forward_kernel, (row_tiles * chunk, heads // pack // chunk, beside * splits),
        q, k, v, o_out, lse_out, lse if sinks is None else sinks, counts, indices, *_pieces(g.row_pieces, lse),
        *g.spans(lse), *extra, *(g.strides(t) for t in (q, k, v, o)), *g.lse_strides(q),
        mask_b, mask_h, width, g.max_q, g.max_k, g.batch, splits, o.numel(), lse.numel(),
        g.scale, g.softcap, g.window_left, g.window_right,
        **_common(q, k, v, g, config), **extra_facts("forward", q, v, g), **_variable_facts(g, config.block_n),
        PACK=pack, CHUNK=chunk, SINKS=sinks is not None and splits == 1, SPLIT=splits > 1,
    )  # fmt: skip
    if splits > 1:
        count = lse.numel()
        launch(
            combine_kernel, (count,),
            o_out, lse_out, o, lse, lse if sinks is None else sinks, count, heads, rows, splits,
            DV=dim_v, BLOCK_DV=_padded(dim_v), SINKS=sinks is not None, num_warps=1, **LAUNCH,
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    g: Geometry,
    deterministic: bool = True,
    tiles: tuple[Tiles | None, Tiles | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the sinks; see ``reference.backward``, which this matches. Always deterministic."""
    heads, heads_k = q.shape[-2], k.shape[-2]
    ragged_q, ragged_k = g.q_start is not None, g.k_start is not None
    # Contiguous whatever the inputs' strides: that is what a traced graph was told. Rows outside a sequence stay zero.
    dq = (torch.zeros if ragged_q else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    # Extra keys add to what listed blocks gave: in float32, so that nothing is rounded twice.
    dk, dv = (
        (torch.zeros if ragged_k else torch.empty)(
            t.shape, dtype=torch.float32 if g.extra_keys else t.dtype, device=t.device
        )
        for t in (k, v)
    )
    if q.numel() == 0 or k.numel() == 0 or g.max_q == 0 or g.max_k == 0:
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        return dq, dk, dv, None if sinks is None else torch.zeros_like(sinks)
    norm, delta = torch.empty_like(lse), torch.empty_like(lse)
    dsink = torch.zeros_like(lse) if sinks is not None else lse
    lse_b, lse_h = g.lse_strides(q)
    spans = g.spans(lse)
    tiles_64, beside = _grid(q, g.max_q, None, 0, g, 64)
    launch(
        preprocess_kernel, (tiles_64, heads, beside),
        o, do, lse, lse if dlse is None else dlse.contiguous(), lse if sinks is None else sinks,
        norm, delta, dsink, *spans[:2],
        g.strides(o), g.strides(do), lse_b, lse_h, g.max_q, g.batch,
        DV=v.shape[-1], BLOCK_DV=_padded(v.shape[-1]), BLOCK_M=64, SINKS=sinks is not None, DLSE=dlse is not None,
        RAGGED_Q=ragged_q, PACKED=g.packed, num_warps=4, **LAUNCH,
    )  # fmt: skip

    numbers = (g.max_q, g.max_k, g.batch, g.scale, g.softcap, g.window_left, g.window_right)
    inputs = tuple(g.strides(t) for t in (q, k, v, do))
    group = heads // heads_k
    if g.key_pieces is not None and g.key_pieces.shape[0] > heads_k:
        _sum_key_gradients(do, q, k, v, norm, delta, dk, dv, g, spans, tiles[0])
    else:
        _key_gradients(do, q, k, v, norm, delta, dk, dv, g, spans, tiles[0])
    config = _tiles("dq", q, v, g, tiles[1])
    extra = prepare_extra(k, v, g, lse)
    counts, indices, mask_b, mask_h, width = list_arguments(g.kv_num_blocks, g.kv_indices, lse)
    row_tiles, beside = _grid(q, g.max_q, g.row_pieces, g.block_q, g, config.block_m)
    launch(
        dq_kernel, (row_tiles * group, heads_k, beside),
        q, k, v, do, norm, delta, dq, counts, indices, *_pieces(g.row_pieces, lse), *spans, *extra,
        *inputs, g.strides(dq), lse_b, lse_h, mask_b, mask_h, width, *numbers,
        **_common(q, k, v, g, config, do), **extra_facts("dq", q, v, g),
        **_variable_facts(g, config.block_n), CHUNK=group,
    )  # fmt: skip
    if g.extra_keys:
        add_extra_gradients(do, q, k, v, norm, delta, dk, dv, extra, g)
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
    if sinks is None:
        return dq, dk, dv, None
    over = (1,) if g.packed else (0, 2)
    return dq, dk, dv, dsink.sum(over).to(sinks.dtype)


def _key_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, norm: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, g: Geometry,
    spans: tuple[Tensor, Tensor, Tensor, Tensor], tiles: Tiles | None,
) -> None:  # fmt: skip
    """Write dK and dV, from rows' ``norm`` and ``delta``."""
    heads_k = k.shape[-2]
    config = _tiles("dkdv", q, v, g, tiles)
    counts, indices, mask_b, mask_h, width = list_arguments(g.q_num_blocks, g.q_indices, norm)
    chunk = math.gcd(heads_k, 2)
    lse_b, lse_h = (0, norm.stride(0)) if g.packed else norm.stride()[:2]
    key_tiles, beside = _grid(k, g.max_k, g.key_pieces, g.block_kv, g, config.block_n)
    launch(
        dkdv_kernel, (key_tiles * chunk, heads_k // chunk, beside),
        q, k, v, do, norm, delta, dk, dv, counts, indices, *_pieces(g.key_pieces, norm), *spans,
        *(g.strides(t) for t in (q, k, v, do, dk, dv)), lse_b, lse_h, mask_b, mask_h, width,
        g.max_q, g.max_k, g.batch, g.scale, g.softcap, g.window_left, g.window_right,
        **_common(q, k, v, g, config, do), **_variable_facts(g, config.block_m), CHUNK=chunk,
    )  # fmt: skip


def _sum_key_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, norm: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, g: Geometry,
    spans: tuple[Tensor, Tensor, Tensor, Tensor], tiles: Tiles | None,
) -> None:  # fmt: skip
    """As ``_key_gradients`` where the query heads of a group cut the keys each in its own way: one by one, then added.

    A program owns keys for all query heads that it passes, which they must cut alike.
    """
    assert g.kv_num_blocks is not None and g.q_num_blocks is not None  # noqa: PT018
    assert g.q_indices is not None and g.key_pieces is not None  # noqa: PT018
    group = q.shape[-2] // k.shape[-2]
    sums = [torch.empty((group, *t.shape), dtype=torch.float32, device=t.device) for t in (dk, dv)]
    for i in range(group):
        own = slice(i, None, group)
        lists = g._replace(
            kv_num_blocks=g.kv_num_blocks[:, own], q_num_blocks=g.q_num_blocks[:, own], q_indices=g.q_indices[:, own],
            key_pieces=g.key_pieces[own].contiguous(),
        )  # fmt: skip
        _key_gradients(
            do[:, :, own], q[:, :, own], k, v, norm[:, own], delta[:, own], sums[0][i], sums[1][i], lists, spans, tiles
        )
    for t, total in zip((dk, dv), sums, strict=True):
        t.copy_(total.sum(0))


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    everything = dict.fromkeys(("MASKED", "CAUSAL", "WINDOW", "SOFTCAP", "SINKS", "RAGGED_Q", "RAGGED_K"), True)
    everything["PACKED"] = True
    variants: dict[str, dict[str, Any]] = {
        "plain": {"MASKED": True, "CAUSAL": True},
        "dense": {"CAUSAL": True},
        "all": everything,
    }
    kernels = {"forward": forward_kernel, "dkdv": dkdv_kernel, "dq": dq_kernel}
    cases = []
    for major, dims, (variant, flags), kernel in itertools.product(
        (8, 9), ((64, 64), (128, 128), (192, 128), (256, 256)), variants.items(), kernels
    ):
        tiles = config_for(kernel, _padded(max(dims)), 2, major)
        name = f"{kernel}-{variant}-{dims[0]}x{dims[1]}-sm{major}0"
        cases.append((name, *_offline(kernels[kernel], dims, tiles, flags), tiles.num_warps, tiles.num_stages))
    decode = config_for("forward", 128, 2, 9)._replace(block_m=16, num_warps=4)
    flags = {"CAUSAL": True, "SPLIT": True, "PACK": 4, "CHUNK": 1}
    cases.append(("forward-decode-128x128", *_offline(forward_kernel, (128, 128), decode, flags), 4, 2))
    cases.append(("combine-128", *_offline(combine_kernel, (128, 128), decode, {"SINKS": True}), 1, 1))
    cases.append(("preprocess-128", *_offline(preprocess_kernel, (128, 128), decode, everything), 4, 1))
    return cases + _variable_cases() + _extra_cases()


def _variable_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """The kernels over variable blocks."""
    cases = []
    kernels = {"forward": forward_kernel, "dkdv": dkdv_kernel, "dq": dq_kernel}
    for major, (kernel, function) in itertools.product((8, 9), kernels.items()):
        tiles = config_for(kernel, 128, 2, major)
        walked = tiles.block_m if kernel == "dkdv" else tiles.block_n
        flags = {"MASKED": True, "VARIABLE": True, "CAUSAL": True, "BLOCK_S": min(walked, 64)}
        offline = _offline(function, (128, 128), tiles, flags)
        cases.append((f"{kernel}-variable-128x128-sm{major}0", *offline, tiles.num_warps, tiles.num_stages))
    return cases


def _extra_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """What extra keys add to the kernels of listed blocks, and their own kernels."""
    cases = []
    for major, (kernel, function) in itertools.product((8, 9), (("forward", forward_kernel), ("dq", dq_kernel))):
        tiles = config_for(kernel, 128, 2, major)
        flags: dict[str, Any] = dict.fromkeys(("MASKED", "CAUSAL", "COLUMNS", "MEANS"), True)
        flags["BLOCK_E"] = extra_tile(kernel, 128, 2, major)
        offline = _offline(function, (128, 128), tiles, flags)
        cases.append((f"{kernel}-means-128x128-sm{major}0", *offline, tiles.num_warps, tiles.num_stages))
    flags = {"CAUSAL": True, "COLUMNS": True, "ROWS": 64}
    for name, function, keys in (
        ("column_dkdv-128", column_dkdv_kernel, COLUMN_KEYS),
        ("mean_dkdv-128", mean_dkdv_kernel, 16),
    ):
        cases.append((name, *_offline(function, (128, 128), Tiles(64, keys, 8, 1), flags, {"dk_ptr", "dv_ptr"}), 8, 1))
    small = {"COLUMNS": True, "ROWS": 32, "TILE": 64}
    tiles = Tiles(64, 64, 4, 1)
    cases.append(("spread-128", *_offline(spread_kernel, (128, 128), tiles, small), 4, 1))
    cases.append(("mean-128", *_offline(mean_kernel, (128, 128), tiles, small), 4, 1))
    cases.append(("listed", *_offline(listed_kernel, (128, 128), tiles, small), 1, 1))
    return cases


# Pointers to int32 in every kernel; and to float32, besides those that a case names.
_INTEGERS = {"count_ptr", "index_ptr", "piece_ptr", "column_count_ptr", "column_ptr", "key_count_ptr", "key_ptr"}
_INTEGERS |= {"bits_ptr", "taken_ptr"}
_FLOATS = {"lse_ptr", "dlse_ptr", "norm_ptr", "delta_ptr", "sinks_ptr", "dsink_ptr", "sums_ptr", "o_part_ptr"}
_FLOATS |= {"sum_ptr", "mean_grad_ptr"}


def _offline(
    function: Any, dims: tuple[int, int], tiles: Tiles, flags: dict[str, Any], floats: Collection[str] = ()
) -> tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Kernel, signature, constexprs and attributes of a bfloat16 call with contiguous tensors and 128-blocks."""
    constants: dict[str, Any] = {
        "D": dims[0], "DV": dims[1], "BLOCK_D": _padded(dims[0]), "BLOCK_DV": _padded(dims[1]),
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_Q": 128, "BLOCK_KV": 128,
        "GROUP": 4, "PACK": 1, "MASK_GROUP": 1, "CHUNK": 4, "PRECISION": "tf32", "DLSE": True, **flags,
    }  # fmt: skip
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(function.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants.get(param.name, False)
        elif param.name.startswith("stride_"):
            signature[param.name] = ("i32", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif param.name.endswith("_ptr"):
            integer = param.name in _INTEGERS or param.name[2:] in ("start_ptr", "end_ptr")
            signature[param.name] = "*fp32" if param.name in {*_FLOATS, *floats} else "*i32" if integer else "*bf16"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name in ("scale", "softcap") else "i32"
    return function, signature, constexprs, attributes
