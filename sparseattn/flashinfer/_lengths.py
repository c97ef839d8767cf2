"""Page tables of requests whose lengths are said in tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import Table, check_count, check_indptr, index_tensor, readable


def lengths_table(
    indptr: Tensor,
    indices: Tensor,
    lengths: Tensor,
    page_size: int,
    device: torch.device,
    non_blocking: bool = True,
    names: tuple[str, str, str] = ("kv_indptr", "kv_indices", "kv_len_arr"),
) -> Table:
    """A table from CSR pages and lengths in tokens, int32 (or uint32) of B elements, wherever they lie.

    ``names`` are those of the arguments.
    """
    if not isinstance(lengths, Tensor):
        raise argument_error(names[2], "an int32 tensor", type(lengths).__name__, kind=TypeError)
    check_count("page_size", page_size, 1)
    lengths = lengths.reshape(-1)
    if lengths.dtype == torch.uint32:
        lengths = lengths.view(torch.int32)
    check_indptr(names[0], indptr, indices.numel() if isinstance(indices, Tensor) else None)
    if lengths.shape[0] != indptr.shape[0] - 1:
        expected = f"{indptr.shape[0] - 1} lengths, one less than {names[0]}"
        raise argument_error(names[2], expected, f"shape {tuple(lengths.shape)}")
    if readable(indptr, lengths):
        for b, (length, pages) in enumerate(zip(lengths.tolist(), indptr.diff().tolist(), strict=True)):
            if not 0 <= length <= pages * page_size:
                expected = f"0..{pages * page_size}, what {pages} pages of {page_size} tokens hold"
                raise argument_error(names[2], expected, f"{length} (request {b})")
    return Table(
        index_tensor(names[2], lengths, device, 1, non_blocking),
        None,
        index_tensor(names[0], indptr, device, 1, non_blocking),
        index_tensor(names[1], indices, device, 1, non_blocking),
    )
