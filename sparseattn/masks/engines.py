"""To and from the lists of other attention kernels: FlashAttention-4's block-sparse tensors and MInference's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.checks import no_columns
from sparseattn.masks.lists import compact, listed_entries, scatter_blocks
from sparseattn.masks.visibility import Frame, full_range, in_range, uncut_blocks, visible_range, visible_span

if TYPE_CHECKING:
    from sparseattn.masks.block_mask import BlockMask

# Rows of a tile and keys of a run in MInference's lists.
RUN = 64

_FIELDS = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")


def _repeated(mask: BlockMask, num_heads: int | None) -> BlockMask:
    heads = mask.heads if num_heads is None else num_heads
    if heads < 1 or heads % mask.heads:
        raise argument_error("num_heads", f"a multiple of the mask's {mask.heads} heads", num_heads)
    # Lists that all heads share stay shared: engines broadcast them.
    return mask if mask.heads == 1 else mask.expand_heads(heads)


def to_block_sparse_tensors(mask: BlockMask, num_heads: int | None, *, transposed: bool) -> dict[str, Any]:
    """See ``BlockMask.to_block_sparse_tensors``."""
    no_columns(mask, "to_block_sparse_tensors")
    mask = _repeated(mask, num_heads)
    nb, width = mask.num_kv_blocks, mask.kv_indices.shape[-1]
    blocks = mask.to_blocks()
    full = blocks & in_range(full_range(mask.frame), nb)
    partial = blocks & in_range(visible_range(mask.frame), nb) & ~full
    if transposed:
        partial, full, width = partial.transpose(-1, -2), full.transpose(-1, -2), mask.num_q_blocks
    tensors = (*compact(partial, width), *compact(full, width))
    return {**dict(zip(_FIELDS, tensors, strict=True)), "block_size": mask.block_size}


def _int32(name: str, t: object) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype != torch.int32:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise argument_error(name, "an int32 tensor", got, kind=TypeError)
    return t


def block_sparse_lists(tensors: Any, frame: Frame, validate: bool) -> tuple[Tensor, Tensor]:
    """Counts ``[B|1, H, MB]`` and lists ``[B|1, H, MB, NB]`` of FlashAttention-4's tensors, partial and full united."""

    def get(name: str) -> Any:
        return tensors.get(name) if isinstance(tensors, dict) else getattr(tensors, name, None)

    mb, nb = frame.blocks
    kinds: list[Tensor] = []
    for kind in ("mask", "full"):
        counts, indices = get(f"{kind}_block_cnt"), get(f"{kind}_block_idx")
        if counts is None and indices is None and kind == "full":
            kinds.append(torch.zeros_like(kinds[0]))
            continue
        counts, indices = _int32(f"{kind}_block_cnt", counts), _int32(f"{kind}_block_idx", indices)
        for name, t, rank in ((f"{kind}_block_cnt", counts, 3), (f"{kind}_block_idx", indices, 4)):
            if t.dim() != rank or t.shape[2] != mb:
                raise argument_error(name, f"{rank} dimensions, the third {mb} query blocks", f"shape {tuple(t.shape)}")
        lead = torch.broadcast_shapes(counts.shape, indices.shape[:3])
        counts, indices = counts.expand(lead), indices.expand(*lead, -1)
        if validate:
            wrong = listed_entries(counts, indices) & ((indices < 0) | (indices >= nb))
            if (counts > indices.shape[-1]).any() or wrong.any():
                expected = f"counts up to {indices.shape[-1]} and block indices in [0, {nb})"
                raise argument_error(f"{kind}_block_idx", expected, "values outside")
        kinds.append(scatter_blocks(counts, indices, nb))
    partial, full = kinds
    if validate and (full & ~uncut_blocks(frame)).any():
        hint = "full blocks are attended whole, whatever causal and window say."
        raise argument_error("full_block_idx", "blocks that causal and window leave whole", "one that they cut", hint)
    return compact(partial | full)


def to_minference(mask: BlockMask, num_heads: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``BlockMask.to_minference``."""
    (sq, sk), (block_q, block_kv) = mask.seq_lens, mask.block_size
    if not mask.causal or mask.window is not None or mask.ragged or sq != sk:
        hint = "MInference's kernel masks by one causal diagonal and no window, aligned at the top."
        raise argument_error("mask", "a causal mask with as many queries as keys", repr(mask), hint)
    if block_q % RUN or block_kv % RUN:
        raise argument_error("block_size", f"multiples of {RUN}, the kernel's tile", mask.block_size)
    heads = mask.heads if num_heads is None else num_heads
    if heads < 1 or heads % mask.heads:
        raise argument_error("num_heads", f"a multiple of the mask's {mask.heads} heads", num_heads)
    mask = mask.expand_heads(heads)
    rows = -(-sq // RUN)

    def by_run(t: Tensor) -> Tensor:
        return t.repeat_interleave(block_q // RUN, dim=2)[:, :, :rows]

    last = visible_span(mask.frame._replace(block_size=(RUN, RUN)))[1][:, None, :, None]
    inside = torch.arange(0, block_kv, RUN, dtype=torch.int32, device=mask.device)
    runs = (mask.kv_indices[..., None] * block_kv + inside).flatten(3)
    listed = listed_entries(mask.kv_num_blocks, mask.kv_indices).repeat_interleave(block_kv // RUN, -1)
    runs, listed = by_run(runs), by_run(listed)
    counts, at = compact(listed & (runs <= last))
    offsets = torch.where(listed_entries(counts, at), runs.gather(-1, at.long()), 0)
    if mask.column_indices is None:
        none = torch.zeros_like(counts)
        return counts, offsets, none, none[..., None][..., :0]
    columns = by_run(mask.column_indices)
    first = torch.arange(0, sq, RUN, dtype=torch.int32, device=mask.device)[None, None, :, None]
    columns = torch.where(columns <= last, columns, -1)
    if (columns > first).any():
        hint = "The kernel shows a column to all 64 rows of a tile. List the diagonal's blocks whole."
        raise argument_error("mask", "columns at or before the first row of their tile", "one behind it", hint)
    counts_c = (columns >= 0).sum(-1, dtype=torch.int32)
    return counts, offsets, counts_c, columns.clamp(min=0)


def minference_lists(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], frame: Frame, superset: bool
) -> tuple[Tensor, Tensor]:
    """Blocks bool ``[B, H, MB, NB]`` and columns int32 ``[B, H, MB, C]`` (unsorted, repeated) of MInference's lists."""
    names = ("block_count", "block_offset", "column_count", "column_index")
    mb, nb = frame.blocks
    for name, given, rank in zip(names, tensors, (3, 4, 3, 4), strict=True):
        t = _int32(name, given)
        if t.dim() != rank or t.shape[2] != mb or t.shape[:2] != tensors[0].shape[:2]:
            expected = f"{rank} dimensions [B, H, {mb}, ...], alike in all four"
            raise argument_error(name, expected, f"shape {tuple(t.shape)}")
    count, offset, column_count, column = tensors
    run = torch.arange(RUN, dtype=torch.int32, device=offset.device)
    tokens = torch.where(listed_entries(count, offset)[..., None], offset[..., None] + run, -1)
    tokens = torch.where((tokens >= 0) & (tokens < frame.seq_lens[1]), tokens, -1).flatten(3)
    columns = torch.where(listed_entries(column_count, column), column, -1)
    if superset:
        block = torch.where(tokens >= 0, tokens // RUN, nb)
        blocks = torch.zeros(*block.shape[:3], nb + 1, dtype=torch.bool, device=block.device)
        return blocks.scatter_(-1, block.long(), True)[..., :nb], columns
    # A block is listed when the runs and columns together hold all of it; what is left over is columns.
    columns = torch.cat([tokens, columns], -1).sort(-1).values
    new = columns >= 0
    new[..., 1:] &= columns[..., 1:] != columns[..., :-1]
    held = torch.zeros(*columns.shape[:3], nb + 1, dtype=torch.int32, device=columns.device)
    held.scatter_add_(-1, torch.where(new, columns // RUN, nb).long(), torch.ones_like(columns))
    lengths = (frame.seq_lens[1] - torch.arange(nb, device=columns.device) * RUN).clamp(max=RUN)
    return held[..., :nb] == lengths, columns
