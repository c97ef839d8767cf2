"""Triton kernels for what surrounds block lists: block means, and lists of single tokens and columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.ops.scores.vertical_slash_triton_mass import offline

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["length", "num_blocks", "num_rows", "width", "steps", "last_stride", "tokens_width", "chunk"]
# Views into larger tensors: aligned or not as the batch size has it.
_VIEWS = ["start_ptr", "end_ptr"]


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _means_kernel(
    x_ptr, means_ptr, start_ptr, end_ptr, wanted_ptr, stride_x, length, num_blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Mean of one block of rows -> float32 ``means [B, H, num_blocks, D]``. Grid (num_blocks, H, B)."""
    n = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    if SOME:  # noqa: SIM102
        if tl.load(wanted_ptr + b * tl.num_programs(1) + h) == 0:
            return
    first = n * BLOCK
    end = length
    if start_ptr is not None:
        first += tl.load(start_ptr + b)
        end = tl.load(end_ptr + b)
    count = tl.minimum(end - first, BLOCK)
    offs = tl.arange(0, STEP)
    offs_d = tl.arange(0, BLOCK_D)
    base = x_ptr + b.to(tl.int64) * stride_x[0] + h.to(tl.int64) * stride_x[2]
    ptrs = base + (first + offs).to(tl.int64)[:, None] * stride_x[1] + offs_d[None, :] * stride_x[3]
    sums = tl.zeros([STEP, BLOCK_D], tl.float32)
    for r in range(0, BLOCK, STEP):
        inside = (r + offs < count)[:, None] & (offs_d < D)[None, :]
        sums += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        ptrs += STEP * stride_x[1]
    mean = tl.sum(sums, 0) / tl.maximum(count, 1).to(tl.float32)
    block = (b.to(tl.int64) * tl.num_programs(1) + h) * num_blocks + n
    tl.store(means_ptr + block * D + offs_d, mean, mask=offs_d < D)


@triton.jit(do_not_specialize=_LENGTHS)
def _tokens_kernel(
    selected_ptr, counts_ptr, tokens_ptr, length, chunk, width, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Tokens that any of GROUP heads selects, ascending, the first ``width`` of them. Grid (chunks, B * kept heads).

    Each chunk counts what lies ahead of it: bytes, few enough to read again.
    """
    c = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    count = 0
    for n in range(0, tl.minimum((c + 1) * chunk, length), BLOCK):
        offs = n + tl.arange(0, BLOCK)
        keep = tl.zeros([BLOCK], tl.int32)
        for g in tl.static_range(0, GROUP):
            at = selected_ptr + (head * GROUP + g) * length + offs
            keep |= tl.load(at, mask=offs < length, other=0).to(tl.int32)
        if n >= c * chunk:
            slot = count + tl.cumsum(keep, 0) - keep
            tl.store(tokens_ptr + head * width + slot, offs, mask=(keep > 0) & (slot < width))
        count += tl.sum(keep)
    if c == tl.num_programs(0) - 1:
        tl.store(counts_ptr + head, tl.minimum(count, width))


@triton.jit(do_not_specialize=_LENGTHS)
def _columns_kernel(
    tokens_ptr, token_counts_ptr, counts_ptr, indices_ptr, last_ptr, out_ptr, num_rows, width, steps, last_stride,
    tokens_width, BLOCK_KV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens of one row outside its listed blocks -> ``out [B, H, MB, C]``, ascending. Grid (MB, H, B).

    Membership is a binary search of the row's list, ``steps`` halvings long.
    """
    m = tl.program_id(0)
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    row = head.to(tl.int64) * num_rows + m
    listed = tl.load(counts_ptr + row)
    last = tl.load(last_ptr + tl.program_id(2) * last_stride + m)
    tokens = tl.load(token_counts_ptr + head)
    list_ptr = indices_ptr + row * width
    tokens_ptr += head.to(tl.int64) * tokens_width
    out_ptr += row * tokens_width
    count = 0
    for c in range(0, tokens, BLOCK):
        offs = c + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + offs, mask=offs < tokens, other=0)
        block = token // BLOCK_KV
        low = tl.full([BLOCK], 0, tl.int32)  # first entry at or above the block
        high = tl.full([BLOCK], 0, tl.int32) + listed
        for _ in range(0, steps):
            middle = (low + high) // 2
            less = tl.load(list_ptr + middle, mask=middle < high, other=0) < block
            low = tl.where((low < high) & less, middle + 1, low)
            high = tl.where((low < high) & (less == 0), middle, high)
        found = tl.load(list_ptr + low, mask=low < listed, other=-1) == block
        keep = ((offs < tokens) & (token <= last) & (found == 0)).to(tl.int32)
        slot = count + tl.cumsum(keep, 0) - keep
        tl.store(out_ptr + slot, token, mask=keep > 0)
        count += tl.sum(keep)


def block_means(
    x: Tensor, start: Tensor | None, end: Tensor | None, packed: bool, block_size: int, num_blocks: int,
    wanted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """float32 ``[B, H, num_blocks, D]``. See ``block_lists_reference.block_means``."""
    heads, head_dim = x.shape[-2:]
    batch = x.shape[0] if start is None else start.shape[0]
    means = torch.empty((batch, heads, num_blocks, head_dim), dtype=torch.float32, device=x.device)
    if means.numel():
        stride = (0, *x.stride()) if packed else x.stride()
        start, end = (None if t is None else t.int().contiguous() for t in (start, end))
        _means_kernel[(num_blocks, heads, batch)](
            x, means, start, end,
            None if wanted is None else wanted.expand(means.shape[:2]).contiguous().view(torch.uint8), stride,
            x.shape[0 if packed else 1], num_blocks,
            D=head_dim, BLOCK=block_size, STEP=min(block_size, 32), BLOCK_D=triton.next_power_of_2(head_dim),
            SOME=wanted is not None, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return means


def list_tokens(selected: Tensor, kept: int, width: int) -> tuple[Tensor, Tensor]:
    """int32 counts ``[B, kept]`` and tokens ``[B, kept, width]``. See ``block_lists_reference.list_tokens``."""
    batch, heads, length = selected.shape
    counts = torch.empty((batch, kept), dtype=torch.int32, device=selected.device)
    tokens = torch.empty((batch, kept, width), dtype=torch.int32, device=selected.device)
    chunks = min(32, -(-length // 2048))
    chunk = -(-length // (chunks * 2048)) * 2048
    _tokens_kernel[(-(-length // chunk), batch * kept)](
        selected.contiguous().view(torch.uint8), counts, tokens, length, chunk, width, GROUP=heads // kept, BLOCK=2048,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return counts, tokens


def list_columns(
    tokens: Tensor, token_counts: Tensor, counts: Tensor, indices: Tensor, last: Tensor, block_size: int, columns: int
) -> Tensor:
    """int32 ``[B, H, MB, C]``, -1 past the end. See ``block_lists_reference.list_columns``."""
    batch, heads, rows = counts.shape
    out = torch.full((batch, heads, rows, tokens.shape[-1]), -1, dtype=torch.int32, device=counts.device)
    if out.numel():
        last = last.contiguous()
        _columns_kernel[(rows, heads, batch)](
            tokens.contiguous(), token_counts.contiguous(), counts.contiguous(), indices.contiguous(), last, out, rows,
            indices.shape[-1], indices.shape[-1].bit_length(), 0 if last.shape[0] == 1 else last.stride(0),
            tokens.shape[-1], BLOCK_KV=block_size, BLOCK=128, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return out


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    types = {"means_ptr": "*fp32", "x_ptr": "*bf16", "wanted_ptr": "*u8", "selected_ptr": "*u8"}
    constants = {"D": 128, "BLOCK": 128, "STEP": 32, "BLOCK_D": 128, "SOME": True}
    return [
        ("block-means-128", *offline(_means_kernel, constants, types), 4, 3),
        ("tokens", *offline(_tokens_kernel, {"GROUP": 4, "BLOCK": 2048}, types), 4, 1),
        ("columns", *offline(_columns_kernel, {"BLOCK_KV": 128, "BLOCK": 128}, types), 4, 1),
    ]
