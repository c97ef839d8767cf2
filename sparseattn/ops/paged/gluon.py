"""Hopper implementation (sm_90a) in Gluon: the forward kernel of ``kernels/hopper_forward.py`` over a paged cache.

Pages come by tensor map, in boxes of as many tokens as a page, a mask block and a key tile have in common. Decode,
append and prefill are one launch: tiles, and shares of the keys of long sequences, are made on the device from the
lengths there (``gluon_schedule.py``), so that a captured launch follows new ones. Latent caches have a kernel of their
own (``gluon_latent.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.clear import clear_rows
from sparseattn.kernels.hopper import row_tiles
from sparseattn.kernels.hopper_forward import Facts, forward_kernel
from sparseattn.kernels.hopper_tiles import (
    MAX_PACK,
    batch_rows,
    config_for,
    consumer_registers,
    depth,
    offline,
    padded,
    processors_of,
    unmappable,
)
from sparseattn.kernels.launches import launch
from sparseattn.ops.paged import gluon_latent, gluon_plans, gluon_turned
from sparseattn.ops.paged.gluon_plans import NO_LIMIT, Plan, mask_group, windowed
from sparseattn.ops.paged.gluon_schedule import merge_shares_kernel, page_gaps_kernel, paged_schedule_kernel
from sparseattn.ops.paged.problem import PagedProblem


def unsupported_reason(q: Tensor, q_rope: Tensor | None, p: PagedProblem) -> str | None:
    """Why these kernels cannot run the call, or None."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"the Gluon kernels need a Hopper GPU (compute capability 9.0), not {q.device}"
    return refusal(q, q_rope, p)


def refusal(q: Tensor, q_rope: Tensor | None, p: PagedProblem) -> str | None:
    """Why these kernels could not run a call on any GPU, or None."""
    if q_rope is not None:
        return gluon_latent.refusal(q, q_rope, p)
    if gluon_turned.wanted(p):
        return gluon_turned.refusal(q, p)
    reason = gluon_plans.refusal(q, p, 1)
    if reason is not None:
        return reason
    for name, dim in (("q and k", q.shape[-1]), ("v", p.v.shape[-1])):
        if dim > 256 or dim % 8:
            return f"the Gluon kernels take head dimensions up to 256 in multiples of 8, not {dim} of {name}"
    if p.page_size % 8 and (padded(q.shape[-1]), padded(p.v.shape[-1])) != (q.shape[-1], p.v.shape[-1]):
        return f"the Gluon kernels take head dimensions of 64, 128 and 256 in pages of {p.page_size} tokens"
    for name, t in (("q", q), ("k", p.k), ("v", p.v)):
        reason = unmappable(name, t)
        if reason is not None:
            return reason
    return gluon_plans.refused_blocks(p, plan(q, p, 1).tiles.tile_n, 8 if p.page_size % 8 == 0 else 1)


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
    # Padded: 192 columns in panels, with key tiles of 128, have not run over pages on a GPU.
    tiles = config_for(padded(q.shape[-1]), padded(p.v.shape[-1]), consumers)
    if p.custom_mask is not None:  # whose bytes take registers
        tiles = tiles._replace(tile_n=64)
    return gluon_plans.make_plan(q, p, tiles, pack, tokens, processors)


def attend(q: Tensor, q_rope: Tensor | None, out: Tensor, lse: Tensor, p: PagedProblem) -> None:
    """Attention into ``out`` and ``lse``; see ``reference.attend``, which this matches."""
    fits = unmappable("out", out) is None and (q_rope is None or gluon_latent.is_flat(out))
    o = out if fits else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    cu = p.cu_seqlens_q
    if cu is not None and q_rope is None:  # rows past the last sequence, such as the padding of a captured batch
        clear_rows(o, lse, cu[:-1], cu[1:], p.max_q, packed=True)
    if q_rope is not None:
        gluon_latent.attend(q, q_rope, o, lse, p, processors_of(q.device))
    elif gluon_turned.wanted(p):
        gluon_turned.attend(q, o, lse, p, processors_of(q.device))
    else:
        cut = plan(q, p, processors_of(q.device))
        records, counter, merges, _spans = gluon_plans.schedule(q, p, cut)
        _launch(q, o, lse, p, cut, records, counter, merges)
    if o is not out:
        out.copy_(o)


def _launch(
    q: Tensor, o: Tensor, lse: Tensor, p: PagedProblem, cut: Plan, records: Tensor, counter: Tensor, merges: Tensor
) -> None:
    """The kernel over the tiles of a schedule, and the merge of its shares if it leaves any."""
    heads, heads_k, dim_v = q.shape[1], p.k.shape[2], o.shape[-1]
    tiles = cut.tiles
    part, sums = gluon_plans.places(cut, dim_v, q.device)
    counts, indices, strides = gluon_plans.lists_of(p, counter)
    sinks = lse if p.sinks is None else p.sinks
    scales = _scales(p)
    more, arguments = gluon_plans.extras(p)
    facts = Facts(
        heads, heads // heads_k, cut.pack, mask_group(q, p), cut.tokens, p.block_q or NO_LIMIT, p.block_kv,
        padded(q.shape[-1]), dim_v, padded(dim_v), tiles.consumers, tiles.tile_n, tiles.k_stages, tiles.v_stages,
        tiles.q_registers, tiles.o_in_q, p.list_indices is not None, p.causal, windowed(p), p.softcap > 0,
        p.sinks is not None, False, True, True, p.page_size, scales is not None, DEPTH=depth(q.shape[-1]),
        MERGE=cut.fused, **more,
    )  # fmt: skip
    rows: dict[str, Any] = {}
    if facts.SCATTERED:  # strides count 8 elements, by which they are divisible
        rows = {"k_ptr": p.k, "v_ptr": p.v, "k_stride": p.k.stride(1) // 8, "v_stride": p.v.stride(1) // 8}
        rows |= {"k_head": p.k.stride(2) // 8, "v_head": p.v.stride(2) // 8}
    if cut.fused:
        rows |= {"out_ptr": o, "out_stride": o.stride(0) // 8, "out_head": o.stride(1) // 8}
    descriptors = (row_tiles(t, *box) for t, box in zip((q, p.k, p.v, o), facts.boxes(), strict=True))
    launch(
        forward_kernel, (cut.programs,),
        *descriptors, part, lse, sinks, records, counter, counts, indices, *[counter] * 4, *strides, 0, 0, 0,
        0, batch_rows(p.k), batch_rows(p.v), 0, 0, q.shape[0], cut.rows, cut.rows * dim_v,
        p.window_left, p.window_right, p.scale * math.log2(math.e), p.softcap,
        facts, consumer_registers(facts), gluon_plans.table_of(p), records[1], p.k.shape[0], sums, scales,
        **rows, **arguments, num_warps=4, maxnreg=128 if tiles.programs == 2 else None,
        launch_pdl=gluon_plans.begins_early(q), **LAUNCH,
    )  # fmt: skip
    gluon_plans.merge(part, sums, merges, counter, o, lse, p, cut)


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
    decode, listed = {"consumers": 1, "MERGE": 4}, {"MASKED": True, "BLOCK_KV": 64}
    options = dict.fromkeys(("WINDOW", "SOFTCAP", "SINKS", "SCALED"), True)
    shapes: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
        ("prefill16-128x128", (128, 128), {"PAGE": 16}),
        ("decode16-128x128", (128, 128), {"PAGE": 16, **decode}),
        ("decode1-128x128", (128, 128), {"PAGE": 1, **decode}),
        ("prefill1-128x128", (128, 128), {"PAGE": 1}),
        ("decode128-128x128", (128, 128), {"PAGE": 128, **decode}),
        ("listed8-128x128", (128, 128), {"PAGE": 8, **listed}),
        ("all-64x64", (64, 64), {"PAGE": 32, **listed, **options}),
        ("decode16-256x256", (256, 256), {"PAGE": 16, **decode}),
        ("alibi-128x128", (128, 128), {"PAGE": 16, "ALIBI": True}),
        ("custom-128x128", (128, 128), {"PAGE": 16, "CUSTOM": "little", "TILE_N": 64}),
    ]
    cases = [(f"gluon-paged-{name}-sm90", *offline(dims, {**ragged, **facts})) for name, dims, facts in shapes]
    flags = ("MASKED", "CSR", "CAUSAL", "WINDOW", "RAGGED", "SPLIT", "MERGED", "GAPS", "SINKS")
    everything: dict[str, Any] = dict.fromkeys((*flags, "SPREAD", "EARLY", "EVEN"), True)
    everything |= {"TOKENS": 32, "BLOCK_Q": 128, "BLOCK_KV": 128, "TILE_N": 128, "PAGE": 16, "HEADS": 1}
    everything |= {"MASK_GROUP": 1, "TILES": gluon_plans.RECORDS, "WIDTH": 1024, "DV": 128, "BLOCK_DV": 128}
    everything |= {"PACK": 4, "GROUP": 4, "ROWS": 4, "SHARES": 4, "COLUMNS": 128}
    for name, kernel in (("schedule", paged_schedule_kernel), ("gaps", page_gaps_kernel)):
        cases.append((f"gluon-paged-{name}-sm90", *_offline(kernel, everything), 4, 1, {}))
    cases.append(("gluon-paged-merge-sm90", *_offline(merge_shares_kernel, everything), 4, 1, {}))
    return [*cases, *gluon_turned.compile_cases(), *gluon_latent.compile_cases()]


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
