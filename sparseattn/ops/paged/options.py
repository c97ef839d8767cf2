"""What paged attention can be told besides tensors: positions, masks of single tokens, lists of pages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseattn.errors import argument_error


@dataclass(frozen=True)
class RoPE:
    """Rotary positions applied to queries and keys inside the kernel, for a cache that holds un-rotated keys.

    Column i and i + D / 2 are a pair (half-split, as in GPT-NeoX and Llama), rotated by ``position * theta^(-2i / D) /
    scale``. Key j has position j, query i of a sequence ``seq_len - q_len + i``.

    Attributes:
        theta: Base of the frequencies.
        scale: Positions are divided by it (linear interpolation).
    """

    theta: float = 1e4
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("theta", self.theta), ("scale", self.scale)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise argument_error(name, "a positive number", repr(value), kind=TypeError)
            if not (value > 0 and math.isfinite(value)):
                raise argument_error(name, "a positive number", value)


@dataclass(frozen=True, eq=False)
class ALiBi:
    """Linear biases: ``slopes[h] * (j - i - seq_len + q_len)`` joins the scaled score of query i and key j.

    The bias is 0 on the aligned diagonal, so an LSE does not depend on how a prompt was cut into chunks.

    Attributes:
        slopes: float32 ``[Hq]``.
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.slopes, Tensor) or self.slopes.dtype != torch.float32:
            got = self.slopes.dtype if isinstance(self.slopes, Tensor) else type(self.slopes).__name__
            raise argument_error("slopes", "a float32 tensor", got, kind=TypeError)
        if self.slopes.dim() != 1:
            raise argument_error("slopes", "shape [Hq]", f"shape {tuple(self.slopes.shape)}")


@dataclass(frozen=True, eq=False)
class CustomMask:
    """Which keys each query may see, token by token; True (1) keeps.

    For every sequence ``q_len * seq_len`` entries, row by row, sequences one after the other. What lies past the end of
    ``mask`` counts as False: a mask that is too short hides keys and is never read out of bounds.

    Attributes:
        mask: bool ``[n]``; or packed, uint8, 8 entries a byte, every sequence starting a byte of its own
            (``segment_packbits`` makes them).
        offsets: int32 or int64 ``[B + 1]``, where each sequence's entries start in ``mask``, in elements of ``mask``
            (bytes when packed). None: right behind the sequence before, computed on the device.
        bitorder: Of packed masks: "little" (entry i is bit ``i % 8``, counted from the least significant) or "big".
    """

    mask: Tensor
    offsets: Tensor | None = None
    bitorder: str = "little"

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor) or self.mask.dtype not in (torch.bool, torch.uint8):
            got = self.mask.dtype if isinstance(self.mask, Tensor) else type(self.mask).__name__
            raise argument_error("custom_mask", "a bool tensor, or uint8 of packed bits", got, kind=TypeError)
        if self.mask.dim() != 1:
            hint = "Flatten each sequence's [q_len, seq_len] and concatenate."
            raise argument_error("custom_mask", "a flat tensor", f"shape {tuple(self.mask.shape)}", hint)
        if self.offsets is not None and self.offsets.dtype not in (torch.int32, torch.int64):
            raise argument_error("custom_mask.offsets", "int32 or int64", self.offsets.dtype, kind=TypeError)
        check_bitorder(self.bitorder)


@dataclass(frozen=True, eq=False)
class PageLists:
    """Which pages of its sequence all queries of a call attend, head by head: the sparse decode pattern.

    Attributes:
        pages: int32 ``[B|1, H, n]`` with 1, Hkv or Hq heads: *logical* page numbers, token position over page size,
            without duplicates. Negative entries are padding and may stand anywhere. Causality and windows act in
            original positions, whatever is listed.
        counts: int32 ``[B|1, H]``, how many entries of each list to read; None: all.
    """

    pages: Tensor
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        for name, t, rank in (("pages", self.pages, 3), ("counts", self.counts, 2)):
            if t is None and name == "counts":
                continue
            if not isinstance(t, Tensor) or t.dtype != torch.int32:
                got = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise argument_error(name, "an int32 tensor", got, kind=TypeError)
            if t.dim() != rank or t.shape[:2] != self.pages.shape[:2] or t.device != self.pages.device:
                expected = "shape [B|1, H, n]" if rank == 3 else f"shape {tuple(self.pages.shape[:2])} like pages"
                raise argument_error(name, expected, f"shape {tuple(t.shape)} on {t.device}")


def check_bitorder(bitorder: str) -> None:
    if bitorder not in ("little", "big"):
        raise argument_error("bitorder", "'little' or 'big'", repr(bitorder))
