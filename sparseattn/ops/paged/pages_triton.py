"""Tokens written into pages by Triton: a copy of rows, whatever the dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch, repeatedly
from sparseattn.kernels.usual import empty
from sparseattn.ops.dispatch import triton_device_reason


@triton.jit(do_not_specialize=["batch", "page_size"])
def lengths_kernel(indptr_ptr, count_ptr, lens_ptr, batch, page_size, BLOCK: tl.constexpr):
    """One program: tokens of ``BLOCK`` sequences, from where their pages begin and ``count``, those in the last."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < batch
    pages = tl.load(indptr_ptr + b + 1, mask=inside, other=0) - tl.load(indptr_ptr + b, mask=inside, other=0)
    last = tl.load(count_ptr + b, mask=inside, other=0)
    tl.store(lens_ptr + b, tl.where(pages > 0, (pages - 1) * page_size + last, 0), mask=inside)


def lengths(indptr: Tensor, last_page_len: Tensor, page_size: int) -> Tensor:
    """See ``lengths_from_last_pages``; contiguous tensors of one device, of at least one sequence."""
    out = empty(tuple(last_page_len.shape), torch.int32, indptr.device)

    def call(indptr: Tensor, last: Tensor, out: Tensor) -> None:
        batch = out.shape[0]
        launch(lengths_kernel, (triton.cdiv(batch, 256),), indptr, last, out, batch, page_size, BLOCK=256, **LAUNCH)

    repeatedly(call, ("lengths", page_size), indptr=indptr, last=last_page_len, out=out)
    return out


@triton.jit
def _copy(source_ptr, target_ptr, at, count):
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < count, other=0), mask=at < count)


@triton.jit(do_not_specialize=["count_a", "count_b", "count_c", "count_d"])
def copies_kernel(
    a_ptr, to_a, b_ptr, to_b, c_ptr, to_c, d_ptr, to_d, count_a, count_b, count_c, count_d, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: ``BLOCK`` numbers of one of four vectors, copied. Grid (longest / BLOCK, vectors)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        _copy(a_ptr, to_a, at, count_a)
    elif tl.program_id(1) == 1:
        _copy(b_ptr, to_b, at, count_b)
    elif tl.program_id(1) == 2:
        _copy(c_ptr, to_c, at, count_c)
    else:
        _copy(d_ptr, to_d, at, count_d)


def copies(*pairs: Tensor) -> None:
    """Copy up to four vectors: every even tensor into the beginning of the next, all int32 and contiguous."""

    def call(**given: Tensor) -> None:
        tensors = list(given.values())
        counts = [t.shape[0] for t in tensors[::2]]
        tensors += tensors[:2] * (4 - len(counts))
        launch(
            copies_kernel, (triton.cdiv(max(counts), 1024), len(counts)), *tensors, *counts, *(0,) * (4 - len(counts)),
            BLOCK=1024, **LAUNCH,
        )  # fmt: skip

    repeatedly(call, ("copies",), **{f"t{i}": t for i, t in enumerate(pairs)})


@triton.jit(do_not_specialize=["batch", "table_width", "num_pages"])
def append_kernel(
    source_ptr, target_ptr, batch_ptr, position_ptr, table_ptr, indptr_ptr, stride_source, stride_target, stride_table,
    batch, table_width, num_pages,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, CSR: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK`` of the ``H * D`` elements of a token. Grid (tokens, ceil(H * D / BLOCK)).

    ``source`` strides: token, head, dim; ``target``: page, row, head, dim. Tokens of no sequence, or that have no page,
    are left out.
    """
    token = tl.program_id(0).to(tl.int64)
    b = tl.load(batch_ptr + token)
    position = tl.load(position_ptr + token)
    if (b < 0) | (b >= batch) | (position < 0):
        return
    entry = position // PAGE
    at = b.to(tl.int64) * stride_table[0]
    owned = table_width
    if CSR:
        first = tl.maximum(tl.load(indptr_ptr + b), 0)
        owned = tl.minimum(tl.load(indptr_ptr + b + 1), table_width) - first
        at = first.to(tl.int64)
    page = tl.load(table_ptr + at + entry, mask=entry < owned, other=-1)
    if (page < 0) | (page >= num_pages):
        return
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head = (offs // D).to(tl.int64)
    column = offs % D
    inside = offs < H * D
    source = token * stride_source[0] + head * stride_source[1] + column * stride_source[2]
    x = tl.load(source_ptr + source, mask=inside)
    target = page.to(tl.int64) * stride_target[0] + (position % PAGE).to(tl.int64) * stride_target[1]
    tl.store(target_ptr + target + head * stride_target[2] + column * stride_target[3], x, mask=inside)


def unsupported_reason(t: Tensor) -> str | None:
    """Why the kernel cannot write into ``t``, or None."""
    return None if t.element_size() <= 2 and not t.is_cuda else triton_device_reason(t)


def append(
    source: Tensor,
    target: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor | None,
    batch: int,
) -> None:
    """See ``pages.append_kv``: one of its tensors, already in the dtype of the cache."""
    table = page_table if page_table is not None else indices
    assert table is not None
    tokens, heads, dim = source.shape
    block = min(1024, triton.next_power_of_2(heads * dim))
    append_kernel[(tokens, triton.cdiv(heads * dim, block))](
        source, target, batch_indices, positions, table, table if indptr is None else indptr,
        source.stride(), target.stride(), table.stride() if page_table is not None else (0, 1),
        batch, table.shape[-1], target.shape[0],
        H=heads, D=dim, PAGE=target.shape[1], BLOCK=block, CSR=indptr is not None, num_warps=4, **LAUNCH,
    )  # fmt: skip
