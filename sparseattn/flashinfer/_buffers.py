"""Tensors of a caller at fixed addresses, into which plans are copied for CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import Table, csr_table
from sparseattn.ops.paged import copy_vectors


def fill(name: str, buffer: Tensor, value: Tensor, non_blocking: bool = True) -> None:
    """Copy ``value`` into the beginning of a caller's ``buffer``, which must hold it, unless it is that already."""
    check_fits(name, buffer, value)
    if value.data_ptr() != buffer.data_ptr():
        buffer[: value.shape[0]].copy_(value, non_blocking=non_blocking)


def check_fits(name: str, buffer: Tensor, value: Tensor, exact: bool = False) -> None:
    """Raise unless a caller's ``buffer`` can hold ``value`` (and no more, if ``exact``)."""
    if not isinstance(value, Tensor):
        raise argument_error(name, f"a {buffer.dtype} tensor", type(value).__name__, kind=TypeError)
    if value.dtype != buffer.dtype:
        raise argument_error(name, f"{buffer.dtype} like its buffer", value.dtype, kind=TypeError)
    if value.dim() != 1 or value.shape[0] > buffer.shape[0] or (exact and value.shape[0] != buffer.shape[0]):
        expected = f"{'' if exact else 'at most '}{buffer.shape[0]} entries, as many as its buffer has"
        hint = "With CUDA graphs the batch size is that of the buffers." if exact else "Make the buffer larger."
        raise argument_error(name, expected, f"shape {tuple(value.shape)}", hint)


class TableBuffers:
    """A page table at fixed addresses, for CUDA graphs: plans are copied into a caller's tensors, in place.

    A captured call reads them when it is replayed, so it follows any later plan of the same batch size. ``suffix`` and
    ``prefix`` are of the names that the buffers, and what is planned, have as arguments.
    """

    def __init__(
        self,
        indptr: Tensor | None,
        indices: Tensor | None,
        last_page_len: Tensor | None,
        suffix: str = "buffer",
        prefix: str = "",
    ) -> None:
        names = [f"paged_kv_{name}_{suffix}" for name in ("indptr", "indices", "last_page_len")]
        self._prefix = prefix
        for name, t in zip(names, (indptr, indices, last_page_len), strict=True):
            if not isinstance(t, Tensor) or t.dim() != 1 or t.dtype != torch.int32:
                got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
                raise argument_error(name, "a flat int32 tensor", got, "CUDA graphs need buffers that stay.")
        assert indptr is not None
        assert indices is not None
        assert last_page_len is not None
        if indptr.shape[0] != last_page_len.shape[0] + 1:
            expected = f"{last_page_len.shape[0] + 1} entries, one more than {names[2]}"
            raise argument_error(names[0], expected, indptr.shape[0])
        self.indptr, self.indices, self.last_page_len = indptr, indices, last_page_len
        self.seq_lens = torch.zeros_like(last_page_len)

    @property
    def batch(self) -> int:
        return self.last_page_len.shape[0]

    def fill(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int, non_blocking: bool = True
    ) -> Table:
        """The buffers as a table, with the plan's in them. What does not fit leaves them as they were."""
        given = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        buffers = {"indptr": self.indptr, "indices": self.indices, "last_page_len": self.last_page_len}
        for name, value in given.items():
            check_fits(f"{self._prefix}{name}", buffers[name], value, exact=name != "indices")
        planned = csr_table(indptr, indices, last_page_len, page_size, self.indptr.device, non_blocking, self._prefix)
        assert planned.indptr is not None
        assert planned.indices is not None
        pairs = ((planned.seq_lens, self.seq_lens), (planned.indptr, self.indptr), (planned.indices, self.indices))
        copy_vectors((*pairs, (last_page_len, self.last_page_len)), non_blocking)
        return Table(self.seq_lens, None, self.indptr, self.indices)
