"""Bits into bytes, by FlashInfer's names. Its bit order is "big" unless said otherwise; packed *masks* are "little"."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._checks import check_indptr
from sparseattn.ops import paged


def packbits(x: Tensor, bitorder: str = "big") -> Tensor:
    """``numpy.packbits``: eight entries a byte, the last one filled up with zeros.

    A ``packed_custom_mask`` wants ``bitorder="little"``.

    Args:
        x: ``[n]``, bool or numbers, of which those that are not 0 count as 1.
        bitorder: "big": entry i is bit ``i % 8`` counted from the most significant; "little": from the least.

    Returns:
        uint8 ``[ceil(n / 8)]``.
    """
    if not isinstance(x, Tensor):
        raise argument_error("x", "a tensor", type(x).__name__, kind=TypeError)
    return paged.packbits(x.to(torch.bool), bitorder)


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """``packbits`` of segments, each of which starts a byte of its own.

    The size of the result depends on ``indptr``, so this waits for the device, as FlashInfer does;
    ``sparseattn.ops.paged.segment_packbits`` does not, and leaves zeros at the end.

    Args:
        x: ``[n]``, as in ``packbits``.
        indptr: int32 or int64 ``[B + 1]``, ascending from 0 to n.
        bitorder: As in ``packbits``.

    Returns:
        uint8 ``[new_indptr[-1]]``; and int32 ``[B + 1]``, where each segment's bytes begin.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes that do not fit; or, where ``indptr`` is on the CPU, numbers that do not ascend from 0, or
            pass n.
    """
    for name, t in (("x", x), ("indptr", indptr)):
        if not isinstance(t, Tensor):
            raise argument_error(name, "a tensor", type(t).__name__, kind=TypeError)
    check_indptr("indptr", indptr, x.numel())
    packed, ends = paged.segment_packbits(x.to(torch.bool), indptr.to(x.device), bitorder)
    return packed[: int(ends[-1])], ends.int()
