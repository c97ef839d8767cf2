"""Tokens written into pages by Triton: a copy of rows, whatever the dtype."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.launches import launch, repeatedly
from sparseattn.kernels.usual import empty
from sparseattn.ops.dispatch import triton_device_reason

# Bytes of one cache that a program writes of a token, and of all of its tokens: what 128 threads hold in one register
# vector each, of 16 bytes.
_BLOCK_BYTES, _TILE_BYTES, _WARPS = 2048, 2048, 4


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


@triton.jit
def _rows(ptr, stride, token, inside, block, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Elements ``block`` of tokens' ``H * D``: what they hold, where their heads and columns are, and which exist."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    head = (offs // D).to(tl.int64)
    at = inside[:, None] & (offs < H * D)[None, :]
    source = (token * stride[0])[:, None] + (head * stride[1] + (offs % D) * stride[2])[None, :]
    return tl.load(ptr + source, mask=at), head, offs % D, at


@triton.jit
def _pages(token, inside, batch_ptr, position_ptr, table_ptr, indptr_ptr, stride_table, batch, table_width, num_pages,
           PAGE: tl.constexpr, CSR: tl.constexpr):  # fmt: skip
    """The page and the row of every token, and which tokens have one."""
    b = tl.load(batch_ptr + token, mask=inside, other=-1)
    position = tl.load(position_ptr + token, mask=inside, other=-1)
    inside = inside & (b >= 0) & (b < batch) & (position >= 0)
    entry = position // PAGE
    at = b.to(tl.int64) * stride_table[0]
    owned = table_width
    if CSR:
        first = tl.maximum(tl.load(indptr_ptr + b, mask=inside, other=0), 0)
        owned = tl.minimum(tl.load(indptr_ptr + b + 1, mask=inside, other=0), table_width) - first
        at = first.to(tl.int64)
    page = tl.load(table_ptr + at + entry, mask=inside & (entry < owned), other=-1)
    return page.to(tl.int64), (position % PAGE).to(tl.int64), inside & (page >= 0) & (page < num_pages)


_INDICES = ["batch_ptr", "position_ptr", "table_ptr", "indptr_ptr"]


@triton.jit(do_not_specialize=["tokens", "batch", "table_width", "num_pages"], do_not_specialize_on_alignment=_INDICES)
def append_kernel(
    a_ptr, to_a_ptr, b_ptr, to_b_ptr, batch_ptr, position_ptr, table_ptr, indptr_ptr,
    stride_a, stride_to_a, stride_b, stride_to_b, stride_table, tokens, batch, table_width, num_pages,
    H: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, PAGE: tl.constexpr, CSR: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program: of ``TOKENS`` tokens ``BLOCK_A`` elements of what they have in one cache, ``BLOCK_B`` in another.

    Grid (ceil(tokens / TOKENS), blocks). Source strides: token, head, dim; those of caches: page, row, head, dim; no
    second cache where ``DB`` is 0. Tokens of no sequence, or that have no page, are left out. What is to be written is
    asked for before it is known where to, so that DRAM answers both questions at once.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    block = tl.program_id(1)
    a, head_a, column_a, at_a = _rows(a_ptr, stride_a, token, inside, block, H, DA, BLOCK_A)
    if DB > 0:
        b, head_b, column_b, at_b = _rows(b_ptr, stride_b, token, inside, block, H, DB, BLOCK_B)
    page, row, owned = _pages(
        token, inside, batch_ptr, position_ptr, table_ptr, indptr_ptr, stride_table, batch, table_width, num_pages,
        PAGE, CSR,
    )  # fmt: skip
    to = (page * stride_to_a[0] + row * stride_to_a[1])[:, None]
    to_a = to_a_ptr + to + (head_a * stride_to_a[2] + column_a * stride_to_a[3])[None, :]
    tl.store(to_a, a, mask=at_a & owned[:, None])
    if DB > 0:
        to = (page * stride_to_b[0] + row * stride_to_b[1])[:, None]
        to_b = to_b_ptr + to + (head_b * stride_to_b[2] + column_b * stride_to_b[3])[None, :]
        tl.store(to_b, b, mask=at_b & owned[:, None])


def unsupported_reason(t: Tensor) -> str | None:
    """Why the kernel cannot write into ``t``, or None."""
    return None if t.element_size() <= 2 and not t.is_cuda else triton_device_reason(t)


def append(
    pairs: list[tuple[Tensor, Tensor]],
    batch_indices: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor | None,
    batch: int,
) -> None:
    """See ``pages.append_kv``: one or two caches, each with what goes there, all integers of the same width."""
    table = page_table if page_table is not None else indices
    assert table is not None
    (to_a, a), (to_b, b) = pairs[0], pairs[-1]
    tokens, heads, dim_a = a.shape
    dim_b = b.shape[2] if len(pairs) > 1 else 0
    blocks = triton.cdiv(heads * max(dim_a, dim_b) * a.element_size(), _BLOCK_BYTES)
    block_a, block_b = (triton.next_power_of_2(triton.cdiv(heads * dim, blocks)) for dim in (dim_a, max(dim_b, 1)))
    step = max(1, _TILE_BYTES // (block_a * a.element_size()))
    launch(
        append_kernel, (triton.cdiv(tokens, step), blocks),
        a, to_a, b, to_b, batch_indices, positions, table, table if indptr is None else indptr,
        a.stride(), to_a.stride(), b.stride(), to_b.stride(), table.stride() if page_table is not None else (0, 1),
        tokens, batch, table.shape[-1], to_a.shape[0],
        H=heads, DA=dim_a, DB=dim_b, PAGE=to_a.shape[1], CSR=indptr is not None,
        TOKENS=step, BLOCK_A=block_a, BLOCK_B=block_b, num_warps=_WARPS, **LAUNCH,
    )  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, Any], dict[Any, Any], dict[Any, Any], int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    constants = {"H": 8, "DA": 128, "DB": 128, "PAGE": 16, "CSR": True, "TOKENS": 1, "BLOCK_A": 1024, "BLOCK_B": 1024}
    sizes = {"stride_a": 3, "stride_b": 3, "stride_table": 2}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(append_kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants[param.name]
        elif param.name.startswith("stride_"):
            size = sizes.get(param.name, 4)
            signature[param.name] = (*["i32"] * (size - 1), "constexpr")
            constexprs[(i, size - 1)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(size - 1)}
        elif param.name.endswith("_ptr"):
            signature[param.name] = "*i32" if param.name in _INDICES else "*i16"
            if param.name not in _INDICES:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32"
    return [("paged-append", append_kernel, signature, constexprs, attributes, _WARPS, 1)]
