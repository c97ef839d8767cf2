"""What a BlockMask must satisfy: shapes, dtypes and devices at construction, contents on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks.columns import in_blocks
from sparseattn.masks.lists import listed_entries

if TYPE_CHECKING:
    from sparseattn.masks.block_mask import BlockMask

_Int = (int, torch.SymInt)  # lengths may be symbolic under torch.compile


def pair(name: str, value: object) -> tuple[int, int]:
    """An int or a pair of ints, as a pair."""
    if isinstance(value, _Int) and not isinstance(value, bool):
        return value, value  # type: ignore[return-value]
    if isinstance(value, (tuple, list, torch.Size)) and len(value) == 2:
        a, b = value
        if all(isinstance(x, _Int) and not isinstance(x, bool) for x in (a, b)):
            return a, b
    raise argument_error(name, "an int or a pair of ints", repr(value), kind=TypeError)


def check_tensor(name: str, t: object, rank: int) -> Tensor:
    if not isinstance(t, Tensor):
        raise argument_error(name, "a torch.Tensor", type(t).__name__, kind=TypeError)
    if t.dtype != torch.int32:
        raise argument_error(name, "int32", t.dtype, "Convert with .int().", kind=TypeError)
    if t.dim() != rank:
        raise argument_error(name, f"a {rank}-D tensor", f"shape {tuple(t.shape)}")
    return t


def check_frame(
    block_size: object, seq_lens: object, causal: object, window: object, seqused_q: object, seqused_k: object
) -> None:
    """Check everything of a mask but its lists, without reading a device.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A value or shape that does not fit.
    """
    for size in pair("block_size", block_size):
        if size % 16 or not 16 <= size <= 256:
            raise argument_error("block_size", "multiples of 16 in 16..256", block_size)
    if min(pair("seq_lens", seq_lens)) < 0:
        raise argument_error("seq_lens", "lengths of at least 0", seq_lens)
    if not isinstance(causal, bool):
        raise argument_error("causal", "True or False", repr(causal), kind=TypeError)
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise argument_error("window", "None or a pair (left, right)", repr(window), kind=TypeError)
        for bound in window:
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, _Int)):
                raise argument_error("window", "ints or None", repr(window), kind=TypeError)
            if bound is not None and bound < 0:
                raise argument_error("window", "counts of at least 0", window, "Use None for an unbounded side.")
    used = [
        check_tensor(name, t, 1) for name, t in (("seqused_q", seqused_q), ("seqused_k", seqused_k)) if t is not None
    ]
    if len(used) == 2 and (used[0].shape != used[1].shape or used[0].device != used[1].device):
        raise argument_error(
            "seqused_k",
            f"shape {tuple(used[0].shape)} on {used[0].device} like seqused_q",
            f"shape {tuple(used[1].shape)} on {used[1].device}",
        )


def check_fields(mask: BlockMask) -> None:
    """Check types, dtypes, shapes and devices of a mask, without reading a device."""
    check_frame(mask.block_size, mask.seq_lens, mask.causal, mask.window, mask.seqused_q, mask.seqused_k)
    counts = check_tensor("kv_num_blocks", mask.kv_num_blocks, 3)
    indices = check_tensor("kv_indices", mask.kv_indices, 4)
    mb, nb = mask.num_q_blocks, mask.num_kv_blocks
    if counts.shape[2] != mb:
        raise argument_error(
            "kv_num_blocks",
            f"shape [B|1, H, {mb}] for {mask.seq_lens[0]} queries in blocks of {mask.block_size[0]}",
            f"shape {tuple(counts.shape)}",
        )
    if indices.shape[:3] != counts.shape or indices.shape[3] > nb:
        raise argument_error(
            "kv_indices",
            f"shape {[*counts.shape]} + [K] with K at most {nb} "
            f"({mask.seq_lens[1]} keys in blocks of {mask.block_size[1]})",
            f"shape {tuple(indices.shape)}",
        )
    if min(counts.shape[:2]) < 1:
        raise argument_error("kv_num_blocks", "at least one batch row and one head", f"shape {tuple(counts.shape)}")
    if indices.device != counts.device:
        raise argument_error("kv_indices", f"device {counts.device} like kv_num_blocks", indices.device)
    if mask.column_indices is not None:
        columns = check_tensor("column_indices", mask.column_indices, 4)
        if columns.shape[:3] != counts.shape:
            raise argument_error(
                "column_indices", f"shape {[*counts.shape]} + [C] like kv_num_blocks", f"shape {tuple(columns.shape)}"
            )
        if columns.device != counts.device:
            raise argument_error("column_indices", f"device {counts.device} like kv_num_blocks", columns.device)
    for name, used in (("seqused_q", mask.seqused_q), ("seqused_k", mask.seqused_k)):
        if used is None:
            continue
        if used.shape[0] < 1 or (counts.shape[0] != 1 and used.shape[0] != counts.shape[0]):
            raise argument_error(name, f"shape [B] with B = {counts.shape[0]}", f"shape {tuple(used.shape)}")
        if used.device != counts.device:
            raise argument_error(name, f"device {counts.device} like kv_num_blocks", used.device)


def check_contents(mask: BlockMask) -> None:
    """Check the values of the lists. Reads the device once."""
    nb, width = mask.num_kv_blocks, mask.kv_indices.shape[-1]
    counts, indices = mask.kv_num_blocks, mask.kv_indices
    listed = listed_entries(counts, indices)
    step = indices[..., 1:] - indices[..., :-1]
    inner = listed[..., 1:]
    problems = [
        ((counts < 0) | (counts > width)).any(),
        (listed & ((indices < 0) | (indices >= nb))).any(),
        (inner & (step == 0)).any(),
        (inner & (step < 0)).any(),
    ]
    for used, limit in zip((mask.seqused_q, mask.seqused_k), mask.seq_lens, strict=True):
        problems.append(counts.new_zeros(()).bool() if used is None else ((used < 0) | (used > limit)).any())
    bad = torch.stack(problems).tolist()
    if bad[0]:
        shown = f"values in {counts.min().item()}..{counts.max().item()}"
        raise argument_error("kv_num_blocks", f"counts in 0..{width} (the width of kv_indices)", shown)
    if bad[1]:
        wrong = indices[listed & ((indices < 0) | (indices >= nb))]
        raise argument_error("kv_indices", f"block indices in [0, {nb})", f"{wrong[0].item()}", "Counts say how many.")
    if bad[3]:
        raise argument_error(
            "kv_indices", "ascending lists", "an unsorted one", "BlockMask.from_indices(..., sort=True) sorts."
        )
    if bad[2]:
        raise argument_error(
            "kv_indices", "unique entries", "a duplicate", "BlockMask.from_indices(..., sort=True) removes them."
        )
    for name, wrong_length, limit in zip(("seqused_q", "seqused_k"), bad[4:], mask.seq_lens, strict=True):
        if wrong_length:
            raise argument_error(name, f"lengths in 0..{limit}", "a value outside", "seq_lens holds the longest.")
    if mask.column_indices is not None:
        _check_column_contents(mask, mask.column_indices)


def _check_column_contents(mask: BlockMask, columns: Tensor) -> None:
    sk, hint = mask.seq_lens[1], "with_columns(..., sort=True) brings any lists to this form."
    before, after = columns[..., :-1], columns[..., 1:]
    both = (before >= 0) & (after >= 0)
    repeats = in_blocks(columns, mask.kv_num_blocks, mask.kv_indices, mask.block_size[1])
    outside = (columns < -1) | (columns >= sk)
    problems = [
        outside.any(),
        ((before < 0) & (after >= 0)).any(),
        (both & (after < before)).any(),
        (both & (after == before)).any(),
        repeats.any(),
    ]
    bad = torch.stack(problems).tolist()
    if bad[0]:
        expected = f"tokens in [0, {sk}), or -1 for padding"
        raise argument_error("column_indices", expected, columns[outside][0].item(), hint)
    if bad[1]:
        raise argument_error(
            "column_indices", "padding (-1) at the end of a list only", "padding before an entry", hint
        )
    if bad[2]:
        raise argument_error("column_indices", "ascending lists", "an unsorted one", hint)
    if bad[3]:
        raise argument_error("column_indices", "unique entries", "a duplicate", hint)
    if bad[4]:
        shown = f"{columns[repeats][0].item()}, which would be attended twice"
        raise argument_error("column_indices", "keys outside the row's listed blocks", shown, hint)


def check_columns(columns: object, mask: BlockMask) -> tuple[Tensor, tuple[int, ...]]:
    """The argument of ``with_columns`` as a 4-D tensor, and the ``(batch, heads, MB)`` that it and the lists give."""
    if not isinstance(columns, Tensor):
        raise argument_error("columns", "a torch.Tensor", type(columns).__name__, kind=TypeError)
    if columns.dtype != torch.int32:
        raise argument_error("columns", "int32", columns.dtype, "Convert with .int().", kind=TypeError)
    counts = mask.kv_num_blocks
    if columns.device != counts.device:
        raise argument_error("columns", f"device {counts.device} like the mask", columns.device)
    if 1 <= columns.dim() <= 4:
        columns = columns[(None,) * (4 - columns.dim())]
        pairs = list(zip(columns.shape[:3], counts.shape, strict=True))
        if pairs[2][0] in (1, counts.shape[2]) and all(a == b or 1 in (a, b) for a, b in pairs[:2]):
            return columns, (*(b if a == 1 else a for a, b in pairs[:2]), counts.shape[2])
    expected = f"[B|1, H|1, MB|1, C] that broadcasts with the mask's lists {tuple(counts.shape)}"
    raise argument_error("columns", expected, f"shape {tuple(columns.shape)}")


def no_columns(mask: BlockMask, what: str) -> None:
    """Raise for a mask with columns, on behalf of what knows blocks only."""
    if mask.column_indices is not None:
        hint = "mask.whole_blocks() lists the blocks of the columns whole, which shows more."
        raise argument_error("column_indices", f"None, since {what} knows blocks only", "columns", hint)
