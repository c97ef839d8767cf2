"""What the Hopper backward kernels' steps share: numbers from records, probabilities, and dQ on its way out."""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from sparseattn.kernels.hopper import async_reduce_add, view

# A tile of dQ beyond any sum's end, where additions go that are none: the map bounds them. (Additions at negative
# coordinates stop the kernel with an illegal instruction.)
NOWHERE: gl.constexpr = gl.constexpr(1 << 24)


@gluon.jit
def field(record, at: gl.constexpr):
    """A number of a record in shared memory, for every thread of a warpgroup."""
    return gl.max(record.slice(at, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def probabilities(s, norm, qk_scale, softcap, SOFTCAP: gl.constexpr):
    """``exp2(scaled scores - norm)`` of raw scores, and the soft cap's derivative.

    With a soft cap ``qk_scale`` gives twice the base-2 logits over the cap, and ``softcap`` is in base 2.
    """
    slope = 1.0
    if SOFTCAP:
        capped = 1.0 - 2.0 / (1.0 + gl.exp2(s * qk_scale))  # tanh
        slope = 1.0 - capped * capped
        p = gl.exp2(capped * softcap - norm)
    else:
        p = gl.exp2(s * qk_scale - norm)
    return p, slope


@gluon.jit
def emit_dq(dq, dq_desc, out_s, tile, CID: gl.constexpr, SHARED: gl.constexpr):
    """Add a [64, 64] piece of dQ to its float32 tile, in the order in which the accumulator's threads hold it.

    A thread's four neighbours in that order are 16 bytes and a warp's 512, so neither the stores to shared memory nor
    the addition meet a conflict; ``from_wgmma_order`` puts rows and columns back. Tile ``NOWHERE`` is out of the map's
    bounds: nothing is added.
    """
    flat = gl.reshape(gl.permute(gl.reshape(dq, [4, 2, 8, 8, 4, 2]), (3, 0, 2, 4, 1, 5)), [4096])
    flat = gl.convert_layout(flat, gl.BlockedLayout([4], [32], [4], [0]), assert_trivial=True)
    if SHARED:
        piece = 2 * tile + CID
    else:
        piece = tile
    tma.store_wait(0)
    view(out_s, gl.float32, [4096], gl.SwizzledSharedLayout(1, 1, 1, [0])).store(flat)
    fence_async_shared()
    async_reduce_add(dq_desc, [piece * 32, 0], view(out_s, gl.float32, [32, 128], dq_desc.layout))
