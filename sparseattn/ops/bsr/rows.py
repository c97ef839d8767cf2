"""Block-sparse rows: which blocks of keys every block of queries attends, checked and prepared once for many calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.dispatch import launchable, launcher, triton_missing
from sparseattn.ops.paged.options import CustomMask

if TYPE_CHECKING:
    from sparseattn.ops.bsr.gluon_bits import RowBits

# Blocks from which on the tiles of block-sparse attention, which are no larger than a block, are worth having; those of
# Hopper's kernels, which gather several blocks; and the largest lists that it is given (they are as wide as the longest
# row may be), in entries.
_LEAST_BLOCK = 64
_LEAST_HOPPER_BLOCK = 16
_MOST_BLOCK = 256
_MOST_ENTRIES = 1 << 26
# Bits of Hopper's kernels: the share of the blocks that must be listed, for each query of a block and at most, because
# more queries make better use of a gathered key; the fewest queries; the most words.
_BITS_DENSITY = 0.033
_BITS_MOST_DENSITY = 0.45
_BITS_QUERIES = 1024
_BITS_WORDS = 1 << 31


@dataclass(frozen=True, eq=False, repr=False)
class BlockRows:
    """A pattern of blocks, as ``make_rows`` prepares it. Tensors must not be modified once in here.

    Attributes:
        bounds: int32 [B|1, H, MB + 1] into ``indices``; or counts int32 [B|1, H, MB] of padded lists.
        indices: int32 [nnz]; or padded lists int32 [B|1, H, MB, K].
        block_size: (R, C).
        seq_lens: (M, N).
        mask: Tokens kept inside the listed blocks, or None.
        mask_offsets: int64 [MB + 1], bytes at which a row's packed bits begin, or None.
        layout: Of ``mask``, as in ``BSRProblem``.
        lists: The same pattern for block-sparse attention, whose kernels are the faster ones, where it takes it.
        bits: The same pattern as bits, where there are kernels for them and it is dense enough.
    """

    bounds: Tensor
    indices: Tensor
    block_size: tuple[int, int]
    seq_lens: tuple[int, int]
    mask: Tensor | None
    mask_offsets: Tensor | None
    layout: str
    lists: BlockMask | None
    bits: RowBits | None = None

    @property
    def small(self) -> bool:
        """Whether blocks are smaller than block-sparse attention has kernels for on any GPU."""
        return any(size % _LEAST_BLOCK or size > _MOST_BLOCK for size in self.block_size)

    @property
    def batch(self) -> int:
        return self.bounds.shape[0]

    @property
    def heads(self) -> int:
        return self.bounds.shape[1]

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def validate(self) -> BlockRows:
        """Check the contents and return the rows. Waits for the device.

        Raises:
            ValueError: Offsets that do not ascend from at least 0 to at most nnz, a count past the width of its list, a
                block number out of range, or one that a row lists twice; the message names the argument.
        """
        nb = -(-self.seq_lens[1] // self.block_size[1])
        bounds = self.bounds.cpu().long()
        flat = self.indices.cpu().long().reshape(-1)
        if self.indices.dim() == 1:
            nnz = flat.shape[0]
            if bool((bounds < 0).any() | (bounds > nnz).any() | (bounds.diff() < 0).any()):
                raise argument_error("indptr", f"numbers ascending from 0 to at most {nnz}", bounds.tolist())
            first, end = bounds[..., :-1].reshape(-1), bounds[..., 1:].reshape(-1)
        else:
            width = self.indices.shape[-1]
            if bool((bounds < 0).any() | (bounds > width).any()):
                raise argument_error("indptr", f"counts of 0..{width}, the width of the lists", bounds.tolist())
            first = torch.arange(bounds.numel()) * width
            end = first + bounds.reshape(-1)
        counts = end - first
        row = torch.arange(counts.shape[0]).repeat_interleave(counts)
        at = torch.arange(row.shape[0]) - (counts.cumsum(0) - counts)[row] + first[row]
        listed = flat[at]
        wrong = (listed < 0) | (listed >= nb)
        if bool(wrong.any()):
            raise argument_error("indices", f"column blocks in 0..{nb - 1}", int(listed[wrong][0]))
        if (row * nb + listed).unique().shape[0] != listed.shape[0]:
            raise argument_error("indices", "no block twice in a row", "duplicates")
        return self


def make_rows(
    indptr: Tensor,
    indices: Tensor,
    block_size: tuple[int, int],
    seq_lens: tuple[int, int],
    block_mask: Tensor | CustomMask | None = None,
    *,
    validate: bool = False,
    lists: bool = True,
    ascending: bool = False,
) -> BlockRows:
    """Check a pattern and prepare it. Never waits for the device, unless to ``validate``.

    Args:
        indptr: As in ``bsr_attention``.
        indices: Likewise.
        block_size: (R, C), each at least 1.
        seq_lens: (M, N), tokens of queries and keys; the last blocks may be cut short.
        block_mask: As in ``bsr_attention``.
        validate: Check the contents, too.
        lists: Prepare the pattern for block-sparse attention as well, where that takes it.
        ascending: ``indices`` are padded lists, each ascending up to its count and within 0..NB - 1, as ``compact``
            makes them: they need no sorting.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or contents that do not fit.
    """
    block_size = _pair("block_size", block_size, 1)
    m, n = _pair("seq_lens", seq_lens, 0)
    for name, t in (("indptr", indptr), ("indices", indices)):
        if not isinstance(t, Tensor) or t.dtype != torch.int32:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise argument_error(name, "an int32 tensor", got, "Convert with .int().", kind=TypeError)
    bounds, indices = _check_shapes(indptr, indices, -(-m // block_size[0]))
    mask, offsets, layout = _check_mask(block_mask, bounds, indices, block_size)
    rows = BlockRows(bounds, indices, block_size, (m, n), mask, offsets, layout, None)
    if validate:
        rows.validate()
    blocks = _block_mask(rows, ascending) if lists and mask is None else None
    bits = _bits(rows) if lists and mask is None and blocks is None else None
    return BlockRows(bounds, indices, block_size, (m, n), mask, offsets, layout, blocks, bits)


def follow_rows(rows: BlockRows, indptr: Tensor, indices: Tensor) -> BlockRows | None:
    """``make_rows`` of a pattern that differs from that of ``rows`` in contents and nnz alone, without its checks.

    None where it differs in more, and where block-sparse attention does not take such patterns.
    """
    before = rows.lists
    if before is None or rows.mask is not None or indices.dim() != 1 or rows.indices.dim() != 1:
        return None
    nb, width = before.num_kv_blocks, before.kv_indices.shape[-1]
    if not (
        launchable(indptr, indices)
        and indptr.shape == rows.bounds.shape[2:]
        and rows.bounds.shape[:2] == (1, 1)
        and min(nb, indices.shape[0]) == width
        and indptr.dtype == indices.dtype == torch.int32
        and indptr.device == indices.device == rows.device
        and indptr.is_contiguous()
        and indices.is_contiguous()
    ):
        return None
    bounds = indptr.view(1, 1, -1)
    counts, made = launcher("sparseattn.ops.bsr.lists_triton", "lists")(bounds, indices, nb, width)
    lists = object.__new__(BlockMask)  # of the shapes of one that was checked
    lists.__dict__.update(before.__getstate__(), kv_num_blocks=counts, kv_indices=made)
    return BlockRows(bounds, indices, rows.block_size, rows.seq_lens, None, None, "", lists)


def _pair(name: str, value: object, least: int) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise argument_error(name, "a pair of ints", repr(value), kind=TypeError)
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | torch.SymInt):
            raise argument_error(name, "a pair of ints", repr(value), kind=TypeError)
        if number < least:
            raise argument_error(name, f"numbers of at least {least}", value)
    return value[0], value[1]


def _check_shapes(indptr: Tensor, indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """``[B|1, H, MB + 1]`` and ``[nnz]``, or counts ``[B|1, H, MB]`` and lists ``[B|1, H, MB, K]``."""
    if indices.device != indptr.device:
        raise argument_error("indices", f"device {indptr.device} like indptr", indices.device)
    csr = indices.dim() == 1
    form = "[MB + 1], [H, MB + 1] or [B, H, MB + 1]" if csr else "[B, H, MB], counts of the lists in indices,"
    if indptr.dim() not in ((1, 2, 3) if csr else (3,)) or indptr.shape[-1] != rows + (1 if csr else 0):
        raise argument_error("indptr", f"{form} with MB = {rows}", f"shape {tuple(indptr.shape)}")
    if not csr and (indices.dim() != 4 or indices.shape[:3] != indptr.shape):
        expected = f"[nnz], or lists {[*indptr.shape]} + [K]"
        raise argument_error("indices", expected, f"shape {tuple(indices.shape)}")
    bounds = indptr.contiguous()
    if bounds.dim() < 3:
        bounds = bounds.view((1,) * (3 - bounds.dim()) + tuple(bounds.shape))
    return bounds, indices.contiguous()


def _check_mask(
    mask: Tensor | CustomMask | None, bounds: Tensor, indices: Tensor, block_size: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None, str]:
    """The mask's entries, where rows begin in packed ones, and the layout."""
    if mask is None:
        return None, None, ""
    if indices.dim() != 1:
        raise argument_error("block_mask", "None with padded lists", "a mask", "It needs indices [nnz].")
    if isinstance(mask, Tensor) and mask.dim() != 1:
        shape = (indices.shape[0], *block_size)
        if mask.dtype != torch.bool:
            raise argument_error("block_mask", "bool", mask.dtype, kind=TypeError)
        if tuple(mask.shape) != shape or mask.device != indices.device:
            got = f"shape {tuple(mask.shape)} on {mask.device}"
            raise argument_error("block_mask", f"shape {shape} on {indices.device}", got)
        return mask.contiguous(), None, "blocks"
    if not isinstance(mask, Tensor | CustomMask):
        raise argument_error("block_mask", "a tensor or a CustomMask", type(mask).__name__, kind=TypeError)
    custom = CustomMask(mask) if isinstance(mask, Tensor) else mask
    bits, (rows, columns) = custom.mask, block_size
    if bits.device != indices.device:
        raise argument_error("block_mask", f"device {indices.device} like indices", bits.device)
    if custom.offsets is not None:
        raise argument_error("block_mask", "no offsets (they follow from indptr)", "some")
    entries = indices.shape[0] * rows * columns
    packed = bits.dtype == torch.uint8
    if bits.shape[0] < (-(-entries // 8) if packed else entries):
        expected = f"{entries} entries, nnz * R * C" + (", 8 a byte" if packed else "")
        raise argument_error("block_mask", expected, f"{bits.shape[0]} {'bytes' if packed else 'entries'}")
    if not packed:
        return bits.contiguous(), None, "bool"
    if bounds.shape[:2] != (1, 1):
        hint = "Packed bits are laid out for one pattern that all heads share."
        raise argument_error("block_mask", "bool, or indptr [MB + 1]", f"indptr {tuple(bounds.shape)}", hint)
    sizes = (bounds[0, 0].diff().clamp(min=0).long() * (rows * columns) + 7) // 8
    return bits.contiguous(), torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), custom.bitorder


def _block_mask(rows: BlockRows, ascending: bool) -> BlockMask | None:
    """The rows as ascending lists, if block-sparse attention takes such blocks; numbers of no block are dropped."""
    if rows.small:
        least, most = min(rows.block_size), max(rows.block_size)
        if any(size % _LEAST_HOPPER_BLOCK for size in (least, most)) or most > _MOST_BLOCK or not _hopper(rows.device):
            return None
    nb, bounds, nnz = -(-rows.seq_lens[1] // rows.block_size[1]), rows.bounds, rows.indices.shape[-1]
    width = min(nb, nnz)
    if width == 0 or bounds.numel() * width > _MOST_ENTRIES:
        return None
    if ascending:
        return BlockMask(bounds, rows.indices[..., :width], rows.block_size, rows.seq_lens)
    kernel = launchable(bounds, rows.indices)
    make = launcher("sparseattn.ops.bsr.lists_triton", "lists") if kernel else ascending_lists
    counts, indices = make(bounds, rows.indices, nb, width)
    return BlockMask(counts, indices, rows.block_size, rows.seq_lens)


def ascending_lists(bounds: Tensor, indices: Tensor, num_blocks: int, width: int) -> tuple[Tensor, Tensor]:
    """Counts int32 [B|1, H, MB] and lists of ``width`` entries, ascending, of what ``make_rows`` takes."""
    nnz, csr = indices.shape[-1], indices.dim() == 1
    at = torch.arange(width if csr else nnz, dtype=torch.int32, device=indices.device)
    if csr:
        at = at + bounds[..., :-1, None]
        inside = at.clamp(0, nnz - 1)
        indices = indices[inside]
        listed = (at < bounds[..., 1:, None]) & (at == inside)
    else:
        listed = at < bounds[..., None]
    listed &= indices == indices.clamp(0, num_blocks - 1)
    indices = torch.where(listed, indices, num_blocks).sort(-1).values[..., :width]
    return listed.sum(-1, dtype=torch.int32).clamp(max=width), indices


def _bits(rows: BlockRows) -> RowBits | None:
    """The rows as bits, if that is worth it; by shapes alone."""
    (r, columns), (m, n) = rows.block_size, rows.seq_lens
    if rows.indices.dim() != 1 or m < _BITS_QUERIES or n == 0 or not _hopper(rows.device):
        return None
    lists = rows.bounds.shape[0] * rows.bounds.shape[1] * -(-m // r)
    dense = rows.indices.shape[0] >= min(_BITS_DENSITY * r, _BITS_MOST_DENSITY) * lists * -(-n // columns)
    if not dense or lists * (n + 127) // 32 >= _BITS_WORDS:
        return None
    from sparseattn.ops.bsr.gluon_bits import row_bits

    return row_bits(rows.bounds, rows.indices, rows.block_size, rows.seq_lens)


def _hopper(device: torch.device) -> bool:
    """Whether Hopper's kernels may run calls on a device. Traced calls do without: they launch no kernel here."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.get_device_capability(device) == (9, 0) and triton_missing() is None
