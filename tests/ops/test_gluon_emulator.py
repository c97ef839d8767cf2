"""The emulator itself: it must stop kernels that the chip would get wrong."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="emulated where there is no GPU")

import triton.experimental.gluon.language as gl  # noqa: E402
from gluon_emulator import Emulated, EmulationError  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparseattn.kernels.hopper import load_rows, ring, row_tiles, store_rows, tile_layout  # noqa: E402


@gluon.jit
def copy_rows(in_desc, out_desc, start, length, row, WAIT: gl.constexpr, FENCE: gl.constexpr, PARITY: gl.constexpr):
    tiles, full, _empty = ring(in_desc.dtype, 2, [32, 64], tile_layout(2), 1, 1)
    mbarrier.expect(full.index(0), in_desc.block_type.nbytes)
    load_rows(in_desc, start, length, row, 0, full.index(0), tiles.index(0))
    if WAIT:
        mbarrier.wait(full.index(0), PARITY)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tiles.index(1).store(tiles.index(0).load(layout))
    if FENCE:
        fence_async_shared()
    store_rows(out_desc, start, length, row, 0, tiles.index(1))
    tma.store_wait(0)


def _copy(start: int, length: int, row: int, *, wait: bool = True, fence: bool = True, parity: int = 0):
    source = torch.arange(100 * 2 * 48, dtype=torch.float32).reshape(100, 2, 48).half()
    target = torch.full_like(source, -1)
    maps = [row_tiles(t, 1, 32, 64) for t in (source, target)]
    Emulated(copy_rows)[(1,)](*maps, start, length, row, WAIT=wait, FENCE=fence, PARITY=parity)
    return source, target


@pytest.mark.parametrize(("start", "length", "row"), [(0, 100, 0), (10, 50, 32), (60, 40, 32), (5, 3, 0), (7, 0, 0)])
def test_row_tiles_end_where_their_sequence_does(start: int, length: int, row: int) -> None:
    source, target = _copy(start, length, row)
    first, last = start + row, max(start + row, min(start + row + 32, start + length))
    assert torch.equal(target[first:last, 0], source[first:last, 0])
    target[first:last, 0] = -1
    assert (target == -1).all()


def test_reading_before_the_copy_arrived_gives_nan() -> None:
    assert _copy(0, 100, 0, wait=False)[1][:32, 0].isnan().all()


def test_a_write_without_a_fence_is_an_error() -> None:
    with pytest.raises(EmulationError, match="without a fence"):
        _copy(0, 100, 0, fence=False)


def test_a_wait_for_the_wrong_parity_is_seen() -> None:
    assert _copy(0, 100, 0, parity=1)[1][:32, 0].isnan().all()


def test_a_row_outside_of_the_tensor_is_an_error() -> None:
    with pytest.raises(EmulationError, match="outside of its tensor"):
        _copy(90, 50, 0)


def test_a_write_at_a_negative_coordinate_is_an_error() -> None:
    """Of a load it gives zeros; a store there is an illegal instruction on the chip."""
    with pytest.raises(EmulationError, match="negative coordinate"):
        _copy(-8, 4, 0)


@gluon.jit
def two_partitions(AWAITED: gl.constexpr):
    _tiles, full, _empty = ring(gl.int32, 2, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]), 1, 1)
    gl.warp_specialize([(waits, (full, AWAITED)), (arrives, (full,))], [1], [24])


@gluon.jit
def waits(full, AWAITED: gl.constexpr):
    mbarrier.wait(full.index(AWAITED), 0)


@gluon.jit
def arrives(full):
    mbarrier.arrive(full.index(0), count=1)


def test_a_deadlock_is_an_error() -> None:
    Emulated(two_partitions)[(2,)](AWAITED=0)
    with pytest.raises(EmulationError, match="deadlock"):
        Emulated(two_partitions)[(2,)](AWAITED=1)


@gluon.jit
def product(out_ptr, WAITED: gl.constexpr, FREED: gl.constexpr, FENCED: gl.constexpr):
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    tile = gl.allocate_shared_memory(gl.float16, [64, 64], tile_layout(2))
    ones = gl.full([64, 64], 1.0, gl.float16, accumulator)
    tile.store(ones)
    if FENCED:
        fence_async_shared()
    zeros = gl.zeros([64, 64], gl.float32, accumulator)
    acc = warpgroup_mma(tile, tile, zeros, use_acc=False, is_async=True)
    if FREED:
        tile.store(ones * 2.0)
        fence_async_shared()
    if WAITED:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.store(out_ptr, gl.max(gl.max(acc, 1), 0))


def test_products_are_read_when_waited_for() -> None:
    out = torch.zeros(1)
    Emulated(product)[(1,)](out, WAITED=True, FREED=False, FENCED=True)
    assert out.item() == 64
    Emulated(product)[(1,)](
        out, WAITED=True, FREED=True, FENCED=True
    )  # memory handed on too early: the product sees the new data
    assert out.item() == 256
    with pytest.raises(EmulationError, match="before it was waited for"):
        Emulated(product)[(1,)](out, WAITED=False, FREED=False, FENCED=True)


def test_products_of_unfenced_writes_are_nan() -> None:
    out = torch.zeros(1)
    Emulated(product)[(1,)](out, WAITED=True, FREED=False, FENCED=False)
    assert out.isnan().all()
