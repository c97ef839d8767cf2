"""Latent caches as FlashInfer hands them over: joined or in parts, and in float8 with scales."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import Table


def joined_cache(kv_cache: Tensor, kv_layout: str = "NHD") -> Tensor:
    """A latent cache as ``[P, page, D]``, from that or with an axis of one head where the layout has it."""
    axis = 2 if kv_layout == "NHD" else 1
    if isinstance(kv_cache, Tensor) and kv_cache.dim() == 4 and kv_cache.shape[axis] == 1:
        return kv_cache.squeeze(axis)
    if not isinstance(kv_cache, Tensor) or kv_cache.dim() != 3:
        got = f"shape {tuple(kv_cache.shape)}" if isinstance(kv_cache, Tensor) else type(kv_cache).__name__
        raise argument_error("kv_cache", "[P, page, D]", got)
    return kv_cache


class Parts(NamedTuple):
    """What meets in a call: both parts of queries and of the cache, its pages, and a factor on the cache."""

    q_nope: Tensor
    q_pe: Tensor
    ckv: Tensor
    kpe: Tensor
    table: Table
    factor: float | None = None

    def scaled(self, ckv_scale: float | None, ckv_scale_arr: Tensor | None, kpe_scale: float | None) -> Parts:
        """The same for a float8 cache and its scales."""
        if (ckv_scale is None) == (ckv_scale_arr is None):
            got = "neither" if ckv_scale is None else "both"
            raise argument_error("ckv_scale, ckv_scale_arr", "one of them, since the cache is float8", got)
        if kpe_scale is None and self.kpe.shape[-1]:
            raise argument_error("kpe_scale", "a number, since the cache is float8", None)
        rotary = 1.0 if kpe_scale is None else _positive("kpe_scale", kpe_scale)
        if ckv_scale_arr is not None:
            return self._written(ckv_scale_arr, rotary)
        assert ckv_scale is not None
        factor = _positive("ckv_scale", ckv_scale)
        q_pe = self.q_pe if rotary == factor else (self.q_pe.float() * (rotary / factor)).to(self.q_pe.dtype)
        return self._replace(q_pe=q_pe, factor=factor)

    def _written(self, scales: Tensor, rotary: float) -> Parts:
        """The pages of the call, and no others, times their scales in the queries' dtype."""
        pages, size, dim = self.ckv.shape
        if dim % 128 or tuple(scales.shape) != (pages, size, dim // 128) or scales.device != self.ckv.device:
            expected = f"shape {(pages, size, dim // 128)} on {self.ckv.device}"
            raise argument_error("ckv_scale_arr", expected, f"shape {tuple(scales.shape)} on {scales.device}")
        if scales.dtype != torch.float32:
            raise argument_error("ckv_scale_arr", "float32", scales.dtype, kind=TypeError)
        numbers = self.table.indices if self.table.page_table is None else self.table.page_table
        assert numbers is not None
        held = (numbers >= 0) & (numbers < pages)
        at = numbers.clamp(0, max(0, pages - 1)).flatten().long()
        ckv = torch.empty((at.shape[0], size, dim // 128, 128), dtype=self.q_pe.dtype, device=self.ckv.device)
        kpe = torch.empty((at.shape[0], size, self.kpe.shape[-1]), dtype=ckv.dtype, device=ckv.device)
        low = self.ckv[at].to(ckv.dtype)  # exact
        torch.mul(low.unflatten(-1, (-1, 128)), scales[at][..., None], out=ckv)
        torch.mul(self.kpe[at].to(kpe.dtype), rotary, out=kpe)
        moved = torch.arange(at.shape[0], dtype=torch.int32, device=at.device).view(numbers.shape)
        moved = moved.masked_fill(~held, -1)
        by_row = self.table.page_table is not None
        table = self.table._replace(**{"page_table" if by_row else "indices": moved})
        return self._replace(ckv=ckv.flatten(-2), kpe=kpe, table=table)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise argument_error(name, "a positive number", type(value).__name__, kind=TypeError)
    if not (value > 0 and math.isfinite(value)):
        raise argument_error(name, "a positive number", value)
    return float(value)
