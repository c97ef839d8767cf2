"""Hopper building blocks for the Gluon kernels: tensor-map row tiles, barriers with stages, and one spelling of Gluon.

A tile is some consecutive rows (tokens) of one head, or of a few neighbouring heads, of a ``[rows, heads, dim]`` view.
Its tensor map bounds every access to the rows of one sequence: what lies past them loads as zeros and is never stored,
so ragged batches, odd lengths and head dimensions that are no power of two need no code of their own.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "async_load",
    "async_reduce_add",
    "async_store",
    "begin_early",
    "box_coordinates",
    "load_boxes",
    "load_rows",
    "next_stage",
    "opaque_zero",
    "post",
    "read_record",
    "receive",
    "ring",
    "row_tiles",
    "sequence_span",
    "store_rows",
    "tile_layout",
    "view",
]

# Gluon renamed its tensor-map copies between Triton 3.7 and 3.8; before, the reduction had no name at all.
if hasattr(tma, "async_load"):
    async_load = tma.async_load
    async_store = tma.async_store
    async_reduce_add = tma.async_atomic_add
else:
    async_load = tma.async_copy_global_to_shared
    async_store = tma.async_copy_shared_to_global

    @_core.builtin
    def async_reduce_add(tensor_desc, coord, src, _semantic=None):
        """Add a shared-memory tile to global memory, element by element."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@_core.builtin
def view(tile, dtype, shape, layout, _semantic=None):
    """A shared-memory tile's bytes under another dtype, shape and layout (a method that Triton 3.7 renamed)."""
    unwrap = _core._unwrap_if_constexpr
    return _semantic.memdesc_reinterpret(tile, unwrap(dtype), [unwrap(n) for n in unwrap(shape)], unwrap(layout))


# Tensor-map addresses wrap at 2^64: a coordinate of 2^30 along a stride of 2^34 elements (less one row) contributes
# nothing but the -2^30 rows that the row coordinate then starts from, so that the row extent of 2^30 ends where the
# caller's sequence ends. (The trick of Triton's ragged descriptors.)
_ROWS = gl.constexpr(1 << 30)
_EXTENT = 0x7FFF0000


@gluon.constexpr_function
def tile_layout(rank: int = 5, bits: int = 16) -> gl.NVMMASharedLayout:
    """Shared-memory layout of tiles: rows of 128 bytes, swizzled, as wgmma reads them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=rank)


def row_tiles(t: Tensor, heads: int, rows: int, cols: int) -> TensorDescriptor:
    """Tensor map of ``t`` for tiles of ``heads`` heads by ``rows`` rows by ``cols`` columns.

    Args:
        t: ``[B, S, H, D]`` or packed ``[total, H, D]``, last stride 1, other strides multiples of 16 bytes; a batch
            stride must be a multiple of the row stride (``load_rows`` counts rows from the first of the tensor).
        heads: Heads of a tile, whose rows are ordered [heads, rows].
        rows: Rows of a tile.
        cols: Columns, a power of two of at least D; those past D load as zeros.
    """
    stride_s, stride_h = t.stride(-3), t.stride(-2)
    return TensorDescriptor(
        t,
        [_EXTENT, _EXTENT, t.shape[-2], _ROWS.value, t.shape[-1]],
        [(1 << 34) - stride_s, stride_s, stride_h, stride_s, 1],
        [1, 1, heads, rows, cols],
        tile_layout(bits=8 * t.element_size()),
    )


@gluon.jit
def opaque_zero():
    """A 0 that no pass sees through.

    Descriptors of tiles that stay in place are loop invariants; hoisted, they cost registers that the loop does not
    have. Indexed by this, they are computed where they are used.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def begin_early():
    """Let the next kernel be launched, to wait in its turn; then wait until the kernel before this one has ended.

    Before this a kernel launched with ``launch_pdl`` must touch no memory; launched without, it waits for nothing.
    """
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and the parity of its barriers: it flips each time the ring starts anew."""
    following = stage + 1
    parity = phase
    if following == STAGES:
        following = 0
        parity = phase ^ 1
    return following, parity


@gluon.jit
def ring(
    dtype: gl.constexpr, STAGES: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr, FILLS: gl.constexpr,
    READERS: gl.constexpr, PANELS: gl.constexpr = 1,
):  # fmt: skip
    """A ring of shared-memory tiles: (tiles, full, empty), one barrier of each kind a stage of ``PANELS`` tiles.

    A stage is full after ``FILLS`` arrivals (and the bytes they announced) and empty again after ``READERS``. Fresh
    "empty" barriers let a wait for parity 1 pass: producers start at parity 1, consumers at 0.
    """
    tiles = gl.allocate_shared_memory(dtype, [STAGES * PANELS] + shape, layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FILLS)
        mbarrier.init(empty.index(i), count=READERS)
    return tiles, full, empty


@gluon.jit
def sequence_span(start_ptr, end_ptr, b, length, RAGGED: gl.constexpr):
    """First row and length of sequence ``b``; ``(0, length)`` when no sequence of the batch is cut short."""
    start = b * 0
    if RAGGED:
        start = gl.load(start_ptr + b)
        length = gl.load(end_ptr + b) - start
    return start, length


@gluon.jit
def box_coordinates(start, length, row, head, col):
    """Where a tile begins in a map of ``row_tiles``: at ``row`` of the rows ``start .. start + length`` of a head."""
    return (_ROWS, start + length, head, _ROWS - length + row, col)


@gluon.jit
def load_boxes(desc, start, length, list_ptr, first, last, head, col, full, tile, BLOCK: gl.constexpr):
    """Fill a tile with the blocks of ``BLOCK`` rows that list entries ``first ..`` name, repeating entry ``last``.

    The tensor map's boxes are ``BLOCK`` rows by 64 columns: a tile's memory is one panel of all its rows after another.
    """
    ROWS: gl.constexpr = tile.shape[0]
    PANELS: gl.constexpr = tile.shape[1] // 64
    COUNT: gl.constexpr = ROWS // BLOCK
    boxes = view(tile, desc.dtype, [PANELS * COUNT, BLOCK, 64], tile_layout(2))
    for i in gl.static_range(COUNT):
        row = gl.load(list_ptr + gl.minimum(first + i, last)) * BLOCK
        for panel in gl.static_range(PANELS):
            box = view(boxes.index(panel * COUNT + i), desc.dtype, desc.block_type.shape, desc.layout)
            async_load(desc, box_coordinates(start, length, row, head, col + panel * 64), full, box)


@gluon.jit
def load_rows(desc, start, length, row, head, full, tile, col=0):
    """Ask for the tile at ``row`` of a sequence whose rows are ``start .. start + length``; it arrives at ``full``."""
    buffer = view(tile, desc.dtype, desc.block_type.shape, desc.layout)
    async_load(desc, box_coordinates(start, length, row, head, col), full, buffer)


@gluon.jit
def store_rows(desc, start, length, row, head, tile):
    """Write a shared-memory tile to ``row`` of a sequence, but for what lies past its end."""
    buffer = view(tile, desc.dtype, desc.block_type.shape, desc.layout)
    async_store(desc, box_coordinates(start, length, row, head, 0), buffer)


@gluon.jit
def read_record(record_ptr, position):
    """A tile's record as the schedule wrote it: (row tile, head, sequence, share, key tiles, first, late, early)."""
    at = record_ptr + position.to(gl.int64) * 8
    return (
        gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3),
        gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7),
    )  # fmt: skip


@gluon.jit
def post(info, turn, position, WARPS: gl.constexpr = 1):
    """Tell the consumers which tile comes next, from a partition of ``WARPS`` warps; -1 ends their work."""
    tiles, full, empty = info
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    tiles.index(turn & 1).store(gl.full([1], position, gl.int32, lane))
    mbarrier.arrive(full.index(turn & 1), count=1)


@gluon.jit
def receive(info, turn):
    """The tile that ``post`` announced."""
    tiles, full, empty = info
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)
    position = gl.max(tiles.index(turn & 1).load(lane), 0)
    mbarrier.arrive(empty.index(turn & 1), count=1)
    return position
