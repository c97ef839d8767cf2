"""Block lists of GPU tensors by kernels: what ``masks.lists`` asks of a GPU once this module is imported."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.masks.lists import compact_by_operators, transpose_by_operators
from sparseattn.ops.dispatch import launchable, launcher, on_its_device

_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
_MODULE = "sparseattn.kernels.lists"


@on_its_device
def _compact(blocks: Tensor, *numbers: int) -> tuple[Tensor, Tensor]:
    make = launcher(_MODULE, "compact") if launchable(blocks) else compact_by_operators
    made: tuple[Tensor, Tensor] = make(blocks, *numbers)
    return made


@on_its_device
def _transpose(counts: Tensor, indices: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    if not launchable(counts, indices):
        return transpose_by_operators(counts, indices, cols)
    made: tuple[Tensor, Tensor] = launcher(_MODULE, "transpose")(counts.contiguous(), indices.contiguous(), cols)
    return made


_LIBRARY.impl("compact", _compact, "CUDA")
_LIBRARY.impl("transpose_lists", _transpose, "CUDA")
