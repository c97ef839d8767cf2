"""Lists of small mask blocks as kernels of large tiles walk them: unions over a tile's rows, with the bits of each.

A kernel that keeps ``ROWS`` rows of one side takes boxes of the other: the largest power of two, up to its steps, that
divides the other side's blocks. Where any row of a tile sees a box, the tile lists it, with one bit for each 16 of the
rows that says whether they do. Behind a list stand the bits of all its boxes: rows that see none must not be read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch
from sparseattn.kernels.offline import offline_case

# Rows of a tile; a bit of an entry stands for UNIT of them.
ROWS = 128
_UNIT = 16
#: An entry is a box shifted by this, or its bits.
SHIFT = tl.constexpr(8)
#: The entry of a box that is none, past any sequence's end.
MISSING = tl.constexpr(0x7FFFFF00)
_COLUMNS = 512


@triton.jit(do_not_specialize=["stride_b", "stride_h", "width", "heads", "blocks", "boxes", "block", "parts"])
def union_kernel(
    out_count_ptr, out_ptr, count_ptr, index_ptr, stride_b, stride_h, width, heads, blocks, boxes, block, parts,
    ROWS: tl.constexpr, UNIT: tl.constexpr, GATHER: tl.constexpr, COLUMNS: tl.constexpr, SHIFT: tl.constexpr,
    MISSING: tl.constexpr,
):  # fmt: skip
    """One program: the union of the lists of a tile of ``ROWS`` rows. Grid (tiles, heads, batch).

    Lists have a row for each of ``blocks`` blocks of ``block`` rows, whose entries are ``parts`` boxes each. Writes
    ``out`` int32 [batch, heads, tiles, boxes + 1], ascending, ``MISSING`` up to a multiple of ``GATHER``, the last the
    bits of all entries, and the counts.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    entry = (batch * heads + head) * tl.num_programs(0) + tile
    out_ptr += entry.to(tl.int64) * (boxes + 1)
    offs = tl.arange(0, COLUMNS)
    for first in range(0, boxes, COLUMNS):
        tl.store(out_ptr + first + offs, offs * 0, mask=first + offs < boxes)
    tl.debug_barrier()
    begin = tile * ROWS // block
    end = tl.minimum(tl.cdiv((tile + 1) * ROWS, block), blocks)
    seen = begin * 0
    for row in range(begin, end):  # one list after the other: within a list no box stands twice
        low = tl.maximum(row * block - tile * ROWS, 0) // UNIT
        high = tl.minimum((row + 1) * block - tile * ROWS, ROWS) // UNIT
        bits = (1 << high) - (1 << low)
        at = batch * stride_b + head * stride_h + row
        count = tl.load(count_ptr + at)
        seen |= tl.where(count > 0, bits, 0)
        list_ptr = index_ptr + at.to(tl.int64) * width
        for first in range(0, count, COLUMNS):
            inside = first + offs < count
            box = tl.load(list_ptr + first + offs, mask=inside, other=0) * parts
            for part in range(parts):
                word = tl.load(out_ptr + box + part, mask=inside, other=0)
                tl.store(out_ptr + box + part, word | bits, mask=inside)
        tl.debug_barrier()
    count = begin * 0
    for first in range(0, boxes, COLUMNS):
        box = first + offs
        word = tl.load(out_ptr + box, mask=box < boxes, other=0)
        listed = (word != 0).to(tl.int32)
        place = count + tl.cumsum(listed, 0) - listed
        count += tl.sum(listed, 0)
        tl.debug_barrier()  # entries move to the front, over words that must have been read
        tl.store(out_ptr + place, (box << SHIFT) | word, mask=listed != 0)
    fill = count + tl.arange(0, GATHER)
    tl.debug_barrier()
    tl.store(out_ptr + fill, fill * 0 + MISSING, mask=fill < tl.cdiv(count, GATHER) * GATHER)
    tl.store(out_ptr + boxes, seen)
    tl.store(out_count_ptr + entry, count)


def box_rows(block: int, step: int) -> int:
    """Rows of a box: the largest power of two up to ``step`` that divides a block."""
    return math.gcd(block, step)


def unions(
    lists: tuple[Tensor, Tensor, int, int, int], shape: tuple[int, int], blocks: tuple[int, int],
    lengths: tuple[int, int], step: int,
) -> tuple[Tensor, Tensor, int, int, int]:  # fmt: skip
    """The lists of tiles of ``ROWS`` rows, as ``lists`` are those of blocks: see ``union_kernel``.

    Args:
        lists: int32 counts and indices, list rows per batch entry and per head, width of a list.
        shape: Batch entries and heads of the lists.
        blocks: Rows of a block on the tiles' side and on the other.
        lengths: The longest sequence on the tiles' side and on the other.
        step: Rows that a kernel takes at once.
    """
    counts, indices, stride_b, rows, width = lists
    batch, heads = shape
    box = box_rows(blocks[1], step)
    gather, parts = step // box, blocks[1] // box
    tiles = triton.cdiv(lengths[0], ROWS)
    boxes = triton.cdiv(triton.cdiv(lengths[1], blocks[1]) * parts, gather) * gather
    out = torch.empty((batch, heads, tiles, boxes + 1), dtype=torch.int32, device=counts.device)
    out_counts = torch.empty((batch, heads, tiles), dtype=torch.int32, device=counts.device)
    launch(
        union_kernel, (tiles, heads, batch),
        out_counts, out, counts, indices, stride_b, rows, width, heads, rows, boxes, blocks[0], parts,
        ROWS=ROWS, UNIT=_UNIT, GATHER=gather, COLUMNS=_COLUMNS, SHIFT=SHIFT.value, MISSING=MISSING.value, num_warps=4,
        **LAUNCH,
    )  # fmt: skip
    return out_counts, out, 0 if batch == 1 else heads * tiles, tiles, boxes + 1


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    constants = {
        "ROWS": ROWS, "UNIT": _UNIT, "GATHER": 4, "COLUMNS": _COLUMNS, "SHIFT": SHIFT.value, "MISSING": MISSING.value,
    }  # fmt: skip
    return [("unions", *offline_case(union_kernel, constants), 4, 1)]
