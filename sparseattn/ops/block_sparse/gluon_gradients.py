"""Launches of the Hopper backward pass: what it takes, how the work is cut, and which kernels run in which order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.gradients import dq_from_sums_kernel, sum_parts_kernel, tile_numbers_kernel
from sparseattn.kernels.hopper import row_tiles, tile_layout
from sparseattn.kernels.launches import launch
from sparseattn.kernels.unions import SHIFT, box_rows
from sparseattn.kernels.walks import UNBOUNDED, walk_kernel, walks
from sparseattn.ops.block_sparse.extra import prepare_extra
from sparseattn.ops.block_sparse.extra_backward import add_extra_gradients
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.block_sparse.gluon_backward import gradients_kernel
from sparseattn.ops.block_sparse.gluon_backward_dq import dq_kernel
from sparseattn.ops.block_sparse.gluon_extra import start_dq
from sparseattn.ops.block_sparse.gluon_gradient_steps import numbers_box, sums_map, walk_maps, walk_steps

LOG2E = 1.4426950408889634


def unsupported_backward_reason(q: Tensor, k: Tensor, v: Tensor, g: Geometry) -> str | None:
    """Why these kernels cannot run the call, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper backward takes bfloat16 and float16, not {q.dtype}"
    if g.scale <= 0:
        return f"the Hopper backward needs a positive scale, not {g.scale}"
    dim = max(q.shape[-1], v.shape[-1])
    if dim > 128 or q.shape[-1] % 8 or v.shape[-1] % 8:
        return f"the Hopper backward takes head dimensions up to 128, multiples of 8, not {q.shape[-1]}/{v.shape[-1]}"
    if g.extra_keys and g.block_q % 64:
        return f"the Hopper backward takes columns and means beside query blocks of multiples of 64, not {g.block_q}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not _copyable(t, g.packed):
            return (
                f"the Hopper backward takes last strides of 1, others of whole 16 bytes, and batch strides of whole "
                f"rows, not the strides {tuple(t.stride())} of {name}"
            )
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "the Hopper backward needs a GPU of compute capability 9.0"
    return None


def _copyable(t: Tensor, packed: bool) -> bool:
    """Whether a tensor map with ``row_tiles``'s strides describes the tensor."""
    strides = [s for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    whole = all(s > 0 and s * t.element_size() % 16 == 0 for s in strides)
    whole = whole and t.stride(-3) * t.element_size() % 16 == 0 and t.stride(-2) * t.element_size() % 16 == 0
    rows = packed or t.shape[0] == 1 or (t.stride(1) > 0 and t.stride(0) % t.stride(1) == 0)
    return t.stride(-1) == 1 and whole and rows and t.stride(-3) > 0 and t.data_ptr() % 16 == 0


def _batch_rows(t: Tensor, packed: bool) -> int:
    """Rows between the sequences of a batch."""
    return 0 if packed or t.shape[0] == 1 else t.stride(0) // t.stride(1)


def heads_per_program(group: int, tiles: int, processors: int) -> int:
    """Query heads of a group that one program walks; the others' partial dK and dV are summed afterwards.

    Longer walks amortise a tile's keys and need no sums, shorter ones balance better and keep programs on the same
    heads: as many heads as leave each processor some tiles. (On an H200 with four heads a group and 128-blocks two
    cost 5 % more than four at 16K with a tenth of the blocks, mostly for sums, and 1 % at 32K with every block.)

    Args:
        group: Query heads of a KV head.
        tiles: Tiles of 128 keys, over all KV heads and sequences.
        processors: Programs that share them.
    """
    for heads in range(group, 1, -1):
        enough = 4 if heads <= 2 else 6
        if group % heads == 0 and tiles * (group // heads) >= enough * processors:
            return heads
    return 1


def _score_factors(g: Geometry) -> tuple[float, float]:
    """Factors on raw scores and of the cap, as ``probabilities`` takes them."""
    if g.softcap > 0:
        return 2 * LOG2E * g.scale / g.softcap, g.softcap * LOG2E
    return g.scale * LOG2E, 0.0


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
    deterministic: bool = False,
    heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the sinks; see ``reference.backward``, which this matches.

    Args:
        deterministic: Give the same bits every time, at the price of two more products.
        heads: Query heads of a group that one program walks, instead of ``heads_per_program``'s choice.
    """
    ragged_q, ragged_k = g.q_start is not None, g.k_start is not None
    # Contiguous whatever the inputs' strides: that is what a traced graph was told. Rows outside a sequence stay zero.
    dq = (torch.zeros if ragged_q else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    # Extra keys add to what listed blocks gave: in float32, so that sums are rounded once.
    dk, dv = (
        (torch.zeros if ragged_k else torch.empty)(
            t.shape, dtype=torch.float32 if g.extra_keys else t.dtype, device=t.device
        )
        for t in (k, v)
    )
    if q.numel() == 0 or k.numel() == 0 or g.max_q == 0 or g.max_k == 0:
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        return dq, dk, dv, None if sinks is None else torch.zeros_like(sinks)
    if not _copyable(do, g.packed):
        do = do.contiguous()
    rows = _row_numbers(do, dlse, q, v, o, lse, sinks, g, not deterministic)
    extra = None
    if g.extra_keys:
        assert rows.sums is not None
        extra = prepare_extra(k, v, g, lse)
        start_dq(do, q, k, v, rows.norm, rows.delta, rows.sums, _row_tiles(q, g), _padded(q, v), extra, g)
    _keys_pass(do, q, k, v, dk, dv, rows.numbers, None if deterministic else rows.sums, g, heads)
    if deterministic:
        _queries_pass(do, q, k, v, dq, rows.numbers, rows.sums, g)
    else:
        launch(
            dq_from_sums_kernel, (q.shape[-2], triton.cdiv(g.max_q, 64), g.batch),
            rows.sums, dq, *g.spans(lse)[:2], g.strides(dq), g.max_q, _row_tiles(q, g), g.scale,
            D=q.shape[-1], BLOCK_D=_padded(q, v), RAGGED_Q=ragged_q, PACKED=g.packed, num_warps=8, **LAUNCH,
        )  # fmt: skip
    if extra is not None:
        add_extra_gradients(do, q, k, v, rows.norm, rows.delta, dk, dv, extra, g)
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
    if sinks is None:
        return dq, dk, dv, None
    over = (1,) if g.packed else (0, 2)
    return dq, dk, dv, rows.dsink.sum(over).to(sinks.dtype)


def _padded(q: Tensor, v: Tensor) -> int:
    return 64 if max(q.shape[-1], v.shape[-1]) <= 64 else 128


def _processors(q: Tensor) -> int:
    return torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 3


def _row_tiles(q: Tensor, g: Geometry) -> int:
    """Tiles of 64 query rows of one head, whole ones for every sequence; ``first_query_tile`` numbers them."""
    return q.shape[0] // 64 + g.batch if g.packed else g.batch * triton.cdiv(g.max_q, 64)


class RowNumbers(NamedTuple):
    """What the gradient kernels need of each query row.

    Attributes:
        numbers: float32 [heads * row tiles, 2, 64], flat: see ``tile_numbers_kernel``.
        norm: float32, shaped like the LSE: log of the full denominator. Only extra keys need it; else any tensor.
        delta: Likewise, ``sum(o * do)`` less the gradient of the LSE.
        sums: float32 [heads * row tiles * 64 * block_d] for dQ, or None where it is not added up in memory.
        dsink: float32, shaped like the LSE: each row's share of the sink's gradient; any tensor without sinks.
    """

    numbers: Tensor
    norm: Tensor
    delta: Tensor
    sums: Tensor | None
    dsink: Tensor


def _row_numbers(
    do: Tensor, dlse: Tensor | None, q: Tensor, v: Tensor, o: Tensor, lse: Tensor, sinks: Tensor | None, g: Geometry,
    added: bool,
) -> RowNumbers:  # fmt: skip
    """Row numbers; the sums are zero where ``added`` says that blocks add to them, unless extra keys come first."""
    heads = q.shape[-2]
    tiles = _row_tiles(q, g)
    block_d = _padded(q, v)
    plain = g.extra_keys
    numbers = torch.empty(heads * tiles * 128, dtype=torch.float32, device=q.device)
    sums = torch.empty(heads * tiles * 64 * block_d, dtype=torch.float32, device=q.device) if added or plain else None
    norm, delta = (torch.empty_like(lse), torch.empty_like(lse)) if plain else (lse, lse)
    dsink = lse if sinks is None else torch.zeros_like(lse)
    launch(
        tile_numbers_kernel, (heads, triton.cdiv(g.max_q, 64), g.batch),
        o, do, lse, lse if dlse is None else dlse.contiguous(), lse if sinks is None else sinks,
        numbers, norm, delta, numbers if sums is None else sums, dsink, *g.spans(lse)[:2],
        g.strides(o), g.strides(do), *g.lse_strides(q), g.max_q, tiles,
        DV=v.shape[-1], BLOCK_DV=max(16, triton.next_power_of_2(v.shape[-1])), BLOCK_D=block_d,
        SINKS=sinks is not None, DLSE=dlse is not None, ZERO=added and not plain, PLAIN=plain,
        RAGGED_Q=g.q_start is not None, PACKED=g.packed, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return RowNumbers(numbers, norm, delta, sums, dsink)


def _reach(g: Geometry) -> tuple[int, int]:
    """Keys that a row sees before and after its diagonal."""
    ahead = 0 if g.causal else g.window_right
    return UNBOUNDED if g.window_left < 0 else g.window_left, UNBOUNDED if ahead < 0 else ahead


def _keys_pass(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, numbers: Tensor, sums: Tensor | None,
    g: Geometry, heads: int | None,
) -> None:  # fmt: skip
    """dK and dV, in the keys' dtype or in float32, and dQ's float32 sums where they are asked for."""
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    group = heads_q // heads_k
    block_d = _padded(q, v)
    processors = _processors(q)
    if heads is None:
        tiles = g.batch * heads_k * triton.cdiv(g.max_k, 128)
        heads = heads_per_program(group, tiles, processors) if sums is not None else group
    parts = group // heads
    dk_part, dv_part = dk, dv
    if parts > 1:  # in float32, so that sums are rounded once
        make = torch.empty if g.k_start is None else torch.zeros
        dk_part, dv_part = (
            make((*t.shape[:-2], heads_k * parts, t.shape[-1]), dtype=torch.float32, device=t.device) for t in (k, v)
        )
    with_dq = sums is not None
    steps = walk_steps(g.q_num_blocks, g.q_indices, g, q, keys=True, wide=with_dq and block_d == 64)
    mask_group = heads_q // g.kv_num_blocks.shape[1] if g.kv_num_blocks is not None else 1
    records, ranges, counter, total = walks(
        steps.lists, g.spans(numbers), keys=True, batch=g.batch, lengths=(g.max_q, g.max_k), window=_reach(g),
        heads=heads_k * parts, per_head=heads, section_heads=parts, mask_group=mask_group,
        blocks=steps.blocks, step=steps.rows, gather=steps.gather,
        out_rows=0 if g.packed else k.shape[1], packed=g.packed,
        ragged=(g.q_start is not None, g.k_start is not None), processors=processors, device=q.device,
    )  # fmt: skip
    box = steps.box if steps.box < 64 else 0
    maps = (
        *walk_maps((q, do), steps.step, block_d, box),
        *walk_maps((k, v), 64, block_d, box_rows(g.block_kv, 64) if steps.box else 0),
    )
    at_once = numbers_box(steps.step)
    numbers_map = TensorDescriptor(numbers, [numbers.numel()], [1], [at_once], NVMMASharedLayout(0, 32, 1))
    sums = numbers if sums is None else sums  # a tensor map wants memory, even of a pass that adds nothing
    _, indices, *strides = steps.lists or (records, records, 0, 0, 0)
    factor, cap = _score_factors(g)
    launch(
        gradients_kernel, (min(total, processors),),
        *maps[:2], numbers_map, *maps[2:], row_tiles(dk_part, 1, 64, block_d), row_tiles(dv_part, 1, 64, block_d),
        sums_map(sums, box), numbers, records, ranges, counter, indices, total, *strides, _row_tiles(q, g),
        *(_batch_rows(t, g.packed) for t in (q, k, v, do)), heads, group, mask_group, *steps.blocks[::-1], *_reach(g),
        factor, cap, g.scale, BLOCK_D=block_d, MASKED=steps.lists is not None, SOFTCAP=g.softcap > 0, WITH_DQ=with_dq,
        FLOAT32=dk_part.dtype == torch.float32, STEP=steps.step, BOX=steps.box, num_warps=4, **LAUNCH,
    )  # fmt: skip
    if parts > 1:
        rows = dk.numel() // dk.shape[-1]
        launch(
            sum_parts_kernel, (triton.cdiv(rows, 32), 2),
            dk_part, dv_part, dk, dv, rows, D=dk.shape[-1], DV=dv.shape[-1], BLOCK_D=block_d, PARTS=parts, ROWS=32,
            num_warps=4, **LAUNCH,
        )  # fmt: skip


def _queries_pass(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, numbers: Tensor, sums: Tensor | None, g: Geometry
) -> None:  # fmt: skip
    """dQ by query rows, added up in one program each, from zero or from what float32 sums already hold."""
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    group = heads_q // heads_k
    block_d = _padded(q, v)
    processors = _processors(q)
    steps = walk_steps(g.kv_num_blocks, g.kv_indices, g, q, keys=False, wide=True)
    mask_group = heads_q // g.kv_num_blocks.shape[1] if g.kv_num_blocks is not None else 1
    records, ranges, counter, total = walks(
        steps.lists, g.spans(numbers), keys=False, batch=g.batch, lengths=(g.max_q, g.max_k), window=_reach(g),
        heads=heads_q, per_head=1, section_heads=group, mask_group=mask_group,
        blocks=steps.blocks, step=steps.rows, gather=steps.gather,
        out_rows=0 if g.packed else q.shape[1], packed=g.packed,
        ragged=(g.q_start is not None, g.k_start is not None), processors=processors, device=q.device,
    )  # fmt: skip
    maps = (*walk_maps((q, do), 64, block_d), *walk_maps((k, v), 128, block_d, steps.box))
    _, indices, *strides = steps.lists or (records, records, 0, 0, 0)
    factor, cap = _score_factors(g)
    launch(
        dq_kernel, (min(total, processors),),
        *maps, row_tiles(dq, 1, 64, block_d), numbers, numbers if sums is None else sums,
        records, ranges, counter, indices, total, *strides, _row_tiles(q, g),
        *(_batch_rows(t, g.packed) for t in (q, k, v, do)), group, mask_group, *steps.blocks, *_reach(g),
        factor, cap, g.scale, BLOCK_D=block_d, MASKED=steps.lists is not None, SOFTCAP=g.softcap > 0,
        STARTED=sums is not None, BOX=steps.box, num_warps=4, **LAUNCH,
    )  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = []
    for dim in (64, 128):
        for variant, flags in (
            ("fused", {"WITH_DQ": True}),
            ("fused-dense", {"WITH_DQ": True, "MASKED": False}),
            ("fused-softcap", {"WITH_DQ": True, "SOFTCAP": True}),
            ("fused-parts", {"WITH_DQ": True, "FLOAT32": True}),
            ("keys", {}),
            ("keys-softcap", {"SOFTCAP": True}),
            ("fused-boxes-64", {"WITH_DQ": True, "BOX": 64}),
            ("fused-boxes-16", {"WITH_DQ": True, "BOX": 16}),
            ("keys-boxes-16", {"BOX": 16}),
        ):
            cases.append((f"gradients-{variant}-{dim}-sm90", *_offline(gradients_kernel, dim, 64, flags), 4, 1))
            if dim == 64 and "WITH_DQ" in flags and "BOX" not in flags:
                wide = _offline(gradients_kernel, dim, 64, {**flags, "STEP": 128})
                cases.append((f"gradients-{variant}-wide-sm90", *wide, 4, 1))
        for variant, flags in (
            ("plain", {}),
            ("softcap", {"SOFTCAP": True}),
            ("started", {"STARTED": True}),
            ("boxes-16", {"BOX": 16}),
        ):
            cases.append((f"gradients-queries-{variant}-{dim}-sm90", *_offline(dq_kernel, dim, 128, flags), 4, 1))
        cases.append((f"gradients-numbers-{dim}-sm90", *_offline(tile_numbers_kernel, dim, 64, _ALL), 4, 1))
        cases.append((f"gradients-from-sums-{dim}-sm90", *_offline(dq_from_sums_kernel, dim, 64, _ALL), 8, 1))
    cases.append(("gradients-parts-sm90", *_offline(sum_parts_kernel, 128, 64, {"ROWS": 32}), 4, 1))
    boxes = {"BLOCK_Y": 16, "STEP": 16, "GATHER": 4, "SHIFT": SHIFT.value}
    cases.append(("walk-boxes-sm90", *_offline(walk_kernel, 128, 64, {**_ALL, "KEYS": True, **boxes}), 8, 1))
    cases.append(("walk-keys-sm90", *_offline(walk_kernel, 128, 64, {**_ALL, "KEYS": True}), 8, 1))
    cases.append(("walk-queries-sm90", *_offline(walk_kernel, 128, 64, {**_ALL, "STEP": 128}), 8, 1))
    return cases


_ALL = dict.fromkeys(("SINKS", "DLSE", "ZERO", "PLAIN", "RAGGED_Q", "RAGGED_K", "PACKED"), True)


def _offline(
    function: Any, dim: int, key_rows: int, flags: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Kernel, signature, constexprs and attributes of a bfloat16 call with contiguous tensors and 128-blocks."""
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim, "HEADS": 2, "HEADS_P2": 2, "GROUP": 4, "MASK_GROUP": 1,
        "BLOCK_Q": 128, "BLOCK_KV": 128, "BLOCK_X": 128, "BLOCK_Y": 128, "STEP": 64, "ROWS": 128, "TILES": 8,
        "OTHERS": 512, "PROBES": 16, "PARTS": 2, "GATHER": 0, "SHIFT": 0, "BOX": 0, "MASKED": True, **flags,
    }  # fmt: skip
    tile = f"tensordesc<bf16[1, 1, 1, {{}}, {dim}],{tile_layout()!r}>"
    maps = {
        "numbers_desc": f"tensordesc<fp32[{numbers_box(constants['STEP'])}],{NVMMASharedLayout(0, 32, 1)!r}>",
        "dq_desc": f"tensordesc<fp32[32, 128],{NVMMASharedLayout(0, 32, 2)!r}>",
        "k_desc": tile.format(key_rows),
        "v_desc": tile.format(key_rows),
    }
    if function is dq_kernel:
        maps["dq_desc"] = tile.format(64)
    else:
        maps |= dict.fromkeys(("q_desc", "do_desc"), tile.format(constants["STEP"]))
    box = constants["BOX"]
    if box:
        maps |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16[1, 1, 1, {box}, 64],{tile_layout()!r}>")
    if function is gradients_kernel and 0 < box < 64:
        maps |= dict.fromkeys(("q_desc", "do_desc"), f"tensordesc<bf16[1, 1, 1, {box}, 64],{tile_layout()!r}>")
        maps["dq_desc"] = f"tensordesc<fp32[8, {box // 16}, 128],{NVMMASharedLayout(0, 32, 3)!r}>"
    if constants.get("FLOAT32"):
        whole = f"tensordesc<fp32[1, 1, 1, 64, {dim}],{tile_layout(bits=32)!r}>"
        maps |= {"dk_desc": whole, "dv_desc": whole}
    floats = {"lse_ptr", "dlse_ptr", "numbers_ptr", "sums_ptr", "sinks_ptr", "dsink_ptr", "norm_ptr", "delta_ptr"}
    floats |= {"dk_part_ptr", "dv_part_ptr"}
    integers = {"record_ptr", "ranges_ptr", "counter_ptr", "index_ptr", "count_ptr"}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(function.params):
        name = param.name
        if param.is_constexpr:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name, False)
        elif name.endswith("_desc"):
            signature[name] = maps.get(name, tile.format(64))
        elif name in ("stride_o", "stride_do", "stride_dq"):
            signature[name] = ("i32", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif name.endswith("_ptr"):
            integer = name in integers or name[2:] in ("start_ptr", "end_ptr")
            signature[name] = "*fp32" if name in floats else "*i32" if integer else "*bf16"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("scale", "softcap", "qk_scale") else "i32"
    return function, signature, constexprs, attributes
