"""How the Hopper kernels cut paged attention into tiles and shares: sizes from shapes, the rest on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.hopper_tiles import Tiles
from sparseattn.kernels.launches import launch, of_fixed, scratch
from sparseattn.kernels.mask_starts import mask_starts
from sparseattn.ops.paged.gluon_schedule import merge_shares_kernel, page_gaps_kernel, paged_schedule_kernel
from sparseattn.ops.paged.problem import PagedProblem

NO_LIMIT = 2**30
# The fewest key tiles of a share, and records that a program of the schedule makes.
LEAST_TILES = 4
RECORDS = 32
# Rows of a tile up to which a call waits for memory whatever its kernel does with the tiles that arrive.
FEW_ROWS = 16
# Rows that a program of a long computation merges at a time.
MERGED_ROWS = 8


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
        merges: Row tiles of several shares, at most, that are noted.
        fused: Rows, a power of two, whose shares the kernel itself merges together; 0: ``merge`` does.
        programs: Size of the grid.
        even: Shares are cut to end together, however few that makes.
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
    fused: int
    programs: int
    even: bool


def refusal(q: Tensor, p: PagedProblem, box: int = 8, cached: torch.dtype | None = None) -> str | None:
    """What none of the kernels take, or None; ``box`` divides the pages that they do, ``cached`` is another type."""
    if q.dtype not in (torch.bfloat16, torch.float16) or p.k.dtype not in (q.dtype, cached):
        return f"the Gluon kernels take bfloat16 and float16 queries and caches, not {q.dtype} and {p.k.dtype}"
    # What a problem grows behind these fields means nothing to the kernels until somebody teaches them.
    for name in p._fields[p._fields.index("v_factor") + 1 :]:
        if getattr(p, name) is not None:
            return f"the Gluon kernels take no {name}"
    if p.scale <= 0:
        return f"the Gluon kernels need a positive scale, not {p.scale}"
    if p.page_size % box:
        return f"the Gluon kernels take pages of multiples of {box} tokens, not {p.page_size}"
    if table_of(p).numel() * p.page_size >= 2**31:
        return "the Gluon kernels count positions of all pages of a table in 31 bits"
    return None


def refused_blocks(p: PagedProblem, tile_n: int, box: int = 8) -> str | None:
    """Why key tiles of ``tile_n`` keys cannot be made of the lists' blocks, or None."""
    if p.list_indices is not None and p.block_kv % tile_n and (p.block_kv % box or tile_n % p.block_kv):
        return f"the Gluon kernels take KV blocks of 8, 16, 32, 64 or multiples of {tile_n} here, not {p.block_kv}"
    return None


def table_of(p: PagedProblem) -> Tensor:
    """The page numbers, in rows that kernels can walk."""
    table = p.page_table if p.page_table is not None else p.indices
    assert table is not None
    return table if table.stride(-1) == 1 else table.contiguous()


def make_plan(
    q: Tensor, p: PagedProblem, tiles: Tiles, pack: int, tokens: int, processors: int, even: bool = False
) -> Plan:
    """Count tiles and shares of row tiles of ``tokens`` queries of ``pack`` heads; ``even``: see ``balanced_keys``."""
    heads_k = p.k.shape[2]
    group = q.shape[1] // heads_k
    rows = min(tokens, max(1, p.max_q)) * pack

    limit = NO_LIMIT
    if p.window_left >= 0 and (p.causal or p.window_right >= 0):
        limit = p.window_left + p.max_q + max(p.window_right, 0) + 1
    if p.list_indices is not None:
        limit = min(limit, max(1, p.list_indices.shape[-1] * p.block_kv))
    row_tiles_ = p.batch if p.cu_seqlens_q is None else (q.shape[0] + stretches(p, even) * (tokens - 1)) // tokens
    row_tiles_ *= heads_k * triton.cdiv(group, pack)
    programs = processors * tiles.programs
    # Many shares a program even out sequences of unequal lengths; few row tiles come to equal shares by themselves.
    target = (min(4, triton.cdiv(8 * row_tiles_, programs)) if rows <= FEW_ROWS else 2) * programs
    if even:
        target = 3 * programs
    least = LEAST_TILES * tiles.tile_n
    if min(limit, table_of(p).shape[-1] * p.page_size) <= least or (p.batch == 1 and row_tiles_ >= target):
        target = 0
    # A share more than the first begins only where one of `target` ends; a sequence that is cut has twice them at most.
    records = row_tiles_ + target
    merged = group % pack > 0  # a tensor map would store the heads of the next group, too
    places = records if merged else min(2 * target, records)
    merges = row_tiles_ if merged else min(target, row_tiles_)
    fused = 0
    if merges and even:  # of many row tiles few are cut; more of them are merged sooner by small programs
        fused = MERGED_ROWS if row_tiles_ >= 6 * programs else 0
    elif merges and rows <= FEW_ROWS:  # the sums of a few rows are read in less time than a launch takes
        merges, fused = 0, triton.next_power_of_2(rows)
    programs = min(programs, records)
    return Plan(
        tiles, pack, tokens, rows, target, least, limit, merged, records, places, merges, fused, programs, even
    )  # fmt: skip


def stretches(p: PagedProblem, even: bool) -> int:
    """Sequences, together with the stretches of rows around them where the schedule makes row tiles of these."""
    return 2 * p.batch + 1 if even and p.cu_seqlens_q is not None else p.batch


def lists_of(p: PagedProblem, stand_in: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Lists as kernel arguments: counts, indices, and (list rows per batch entry, per head, list width)."""
    if p.list_counts is None or p.list_indices is None:
        return stand_in, stand_in, (0, 0, 0)
    batch, heads, rows = p.list_counts.shape
    width = p.list_indices.shape[-1]
    indices = p.list_indices if width else p.list_counts  # counts are limited by the width, so none of it is read
    return p.list_counts, indices, (0 if batch == 1 else heads * rows, rows, width)


@of_fixed()
def schedule(q: Tensor, p: PagedProblem, cut: Plan, careful: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Records, counter, merges and spans of ``paged_schedule_kernel``; ``careful`` kernels hide keys in every tile."""
    heads, heads_k = q.shape[1], p.k.shape[2]
    # Rows of whole 16 bytes: pointers of another alignment would be another kernel.
    sizes = ((2, cut.records, 8), (4,), (max(1, cut.merges), 8), (5, triton.cdiv(stretches(p, cut.even), 4) * 4))
    records, counter, merges, spans = (scratch(s, torch.int32, q.device) for s in sizes)
    cu, indptr = (counter if t is None else t for t in (p.cu_seqlens_q, p.indptr))
    table = table_of(p)
    batch = (q.shape[0], p.max_q, table.stride(0) if p.indptr is None else 0, table.shape[-1])
    csr, ragged = p.indptr is not None, p.cu_seqlens_q is not None
    counts, indices, strides = lists_of(p, counter)
    chunks = triton.cdiv(heads // heads_k, cut.pack)
    list_heads = 1 if p.list_indices is None else p.list_indices.shape[1]
    # Page lists come in any order, and few rows wait for memory anyway: all of their tiles take the careful path.
    careful = careful or p.custom_mask is not None or (p.list_indices is not None and p.block_q == 0)
    gaps = not careful and cut.rows > FEW_ROWS
    gap = scratch((2, p.batch), torch.int32, q.device) if gaps else counter
    if gaps:
        launch(
            page_gaps_kernel, (p.batch,),
            gap, cu, p.seq_lens, indptr, table, p.batch, *batch, p.k.shape[0],
            PAGE=p.page_size, CSR=csr, RAGGED=ragged, WIDTH=1024, num_warps=4, **LAUNCH,
        )  # fmt: skip
    launch(
        paged_schedule_kernel, (triton.cdiv(cut.records, RECORDS),),
        records, counter, merges, spans, cu, p.seq_lens, indptr, gap, counts, indices,
        p.batch, *batch, cut.records, cut.places, cut.merges, *strides, heads_k, cut.limit, max(1, cut.target),
        cut.least, p.window_left, p.window_right, spans.stride(0), cut.programs,
        TOKENS=cut.tokens, BLOCK_Q=p.block_q or NO_LIMIT, BLOCK_KV=p.block_kv, TILE_N=cut.tiles.tile_n,
        PAGE=p.page_size, HEADS=chunks, MASK_GROUP=heads_k * chunks // list_heads, TILES=RECORDS,
        MASKED=p.list_indices is not None, CSR=csr, CAUSAL=p.causal, WINDOW=windowed(p), RAGGED=ragged,
        SPLIT=cut.target > 0, MERGED=cut.merged, GAPS=gaps, SPREAD=cut.even or cut.rows <= FEW_ROWS,
        EARLY=begins_early(q), EVEN=cut.even, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return records, counter, merges, spans


def places(cut: Plan, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the sums of shares: outputs float32 [places, rows, dim], and their maxima and sums."""
    part = scratch((max(1, cut.places), cut.rows, dim), torch.float32, device)
    return part, scratch((max(1, cut.places), 2, cut.rows), torch.float32, device)


def merge(
    part: Tensor, sums: Tensor, merges: Tensor, counter: Tensor, o: Tensor, lse: Tensor, p: PagedProblem, cut: Plan
) -> None:
    """Outputs and LSE of row tiles whose keys were cut, unless the kernel has merged them."""
    if not cut.merges or cut.fused:
        return
    dim = o.shape[-1]
    rows, shares, columns = merge_tile(cut, dim)
    early = begins_early(o)
    launch(
        merge_shares_kernel, (cut.merges, triton.cdiv(cut.rows, rows), triton.cdiv(dim, columns)),
        part, sums, merges, counter, o, lse, lse if p.sinks is None else p.sinks, o.stride(), o.shape[0], cut.rows,
        DV=dim, GROUP=o.shape[1] // p.k.shape[2], PACK=cut.pack, ROWS=rows, SHARES=shares, COLUMNS=columns,
        SINKS=p.sinks is not None, EARLY=early, num_warps=4, launch_pdl=early, **LAUNCH,
    )  # fmt: skip


def begins_early(t: Tensor) -> bool:
    """Whether kernels are launched before those that they wait for have ended; not by the interpreter."""
    return t.is_cuda


def merge_tile(cut: Plan, dim: int) -> tuple[int, int, int]:
    """Rows, shares and columns that a program of ``merge_shares_kernel`` holds at once: long rows of shares are few."""
    few = cut.rows <= FEW_ROWS
    expected = cut.target // max(1, cut.merges) // (2 if cut.even else 1)
    shares = min(max(triton.next_power_of_2(expected), 4), 64)
    columns = min(triton.next_power_of_2(dim), 128 if shares < 64 else 32)
    return min(triton.next_power_of_2(cut.rows), max(1, (2048 if few else 8192) // (shares * columns))), shares, columns


def extras(p: PagedProblem) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and arguments of kernels for slopes and custom masks."""
    facts: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if p.slopes is not None:
        facts["ALIBI"], arguments["slopes_ptr"] = True, p.slopes
    if p.custom_mask is not None:
        bits = p.custom_mask.view(torch.uint8)
        starts = p.mask_offsets
        if starts is None:
            starts = mask_starts(p.seq_lens, p.cu_seqlens_q, p.custom_mask.dtype == torch.uint8)
        facts["CUSTOM"] = "bool" if p.custom_mask.dtype == torch.bool else "big" if p.big_endian else "little"
        arguments |= {"custom_ptr": bits, "custom_starts_ptr": starts, "custom_size": bits.numel()}
    return facts, arguments


def windowed(p: PagedProblem) -> bool:
    return p.window_left >= 0 or p.window_right >= 0


def mask_group(q: Tensor, p: PagedProblem) -> int:
    """Query heads that share a list."""
    return q.shape[1] if p.list_indices is None else q.shape[1] // p.list_indices.shape[1]
