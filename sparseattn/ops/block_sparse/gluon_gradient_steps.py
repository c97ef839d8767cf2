"""What the passes of the Hopper backward walk, and the tensor maps by which steps come and dQ leaves."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparseattn.kernels.hopper import row_tiles
from sparseattn.kernels.unions import box_rows, unions
from sparseattn.ops.block_sparse.geometry import Geometry, list_arguments


def walk_maps(tensors: tuple[Tensor, Tensor], rows: int, cols: int, box: int = 0) -> list[TensorDescriptor]:
    """Tensor maps of two tensors for tiles of ``rows`` rows, or for boxes of 64 columns that such tiles are made of."""
    return [row_tiles(t, 1, box, 64) if box else row_tiles(t, 1, rows, cols) for t in tensors]


class Steps(NamedTuple):
    """What a pass walks.

    Attributes:
        lists: As ``list_arguments`` gives them, of the mask's blocks or of ``unions``; None without a mask.
        blocks: Stationary and walking rows of an entry.
        rows: Walking rows of a step, or of an entry of which several make one.
        gather: How many; 0 where an entry makes one or more.
        box: Walking rows of an entry of ``unions``; 0 if ``lists`` are no such.
    """

    lists: tuple[Tensor, Tensor, int, int, int] | None
    blocks: tuple[int, int]
    rows: int
    gather: int = 0
    box: int = 0

    @property
    def step(self) -> int:
        """Walking rows of a step."""
        return self.rows * max(1, self.gather)


def walk_steps(
    counts: Tensor | None, indices: Tensor | None, g: Geometry, stand_in: Tensor, *, keys: bool, wide: bool
) -> Steps:
    """The lists of a pass with stationary keys, or queries, of which tiles have 128.

    Steps are 128 keys, or 64 queries; ``wide``: 128, where blocks are no smaller.
    """
    sizes, lengths = (g.block_q, g.block_kv), (g.max_q, g.max_k)
    if keys:
        sizes, lengths = sizes[::-1], lengths[::-1]
    step = 128 if not keys or (wide and (counts is None or not (sizes[0] % 128 or sizes[1] % 128))) else 64
    if counts is None:
        return Steps(None, (128, step), step)
    lists = list_arguments(counts, indices, stand_in)
    if sizes[0] % 128 == 0 and sizes[1] % step == 0:
        return Steps(lists, sizes, step)
    box = box_rows(sizes[1], step)
    lists = unions(lists, (counts.shape[0], counts.shape[1]), sizes, lengths, step)
    return Steps(lists, (128, box), box, step // box, box)


def numbers_box(step: int) -> int:
    """Row numbers that are loaded together: a tile's norms and deltas, or either, for steps of two tiles."""
    return 128 if step == 64 else 64


def sums_map(sums: Tensor, box: int) -> TensorDescriptor:
    """Tensor map of dQ's float32 sums, for 64 rows by 64 columns or for boxes of them: see ``to_wgmma_order``."""
    if box:
        box = box // 16
        return TensorDescriptor(
            sums, [max(1, sums.numel() // 512), 4, 128], [512, 128, 1], [8, box, 128], NVMMASharedLayout(0, 32, 3)
        )
    return TensorDescriptor(sums, [sums.numel() // 128, 128], [128, 1], [32, 128], NVMMASharedLayout(0, 32, 2))
