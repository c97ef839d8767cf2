"""Triton kernels for the largest entries of the mass of verticals and slashes, and what follows from them.

The largest entries of a long row are found without a sort: nonnegative floats order like their bit patterns, and eight
passes fix four bits of the cut-off each. All programs of a pass read the histograms of the pass before and agree on its
digit, so that the passes need neither atomics nor a host. A row that one program can hold takes one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.attention import sequence_span
from sparseattn.kernels.digits import SHIFTS, digit_sums, next_digit
from sparseattn.ops.scores.vertical_slash_triton_mass import compile_cases as mass_cases
from sparseattn.ops.scores.vertical_slash_triton_mass import last_query_mass as last_query_mass
from sparseattn.ops.scores.vertical_slash_triton_mass import offline
from sparseattn.ops.sequences import Sequences

# Arguments that change with the prompt: specialising on them would compile a kernel per length.
_LENGTHS = ["max_q", "max_k", "length", "step", "shift", "chunks", "chunk", "rows", "entries", "columns"]
# Views into larger tensors, and rows that begin where a length has them.
_VIEWS = ["q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr", "values_ptr", "need_ptr", "mass_ptr", "selected_ptr"]
_SHORT = (256, 2048, 16384)  # sizes of rows that a program holds
_CHUNK = 4096  # values of a longer row that a program goes over


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _descend_kernel(
    values_ptr, need_ptr, state_ptr, histogram_ptr, found_ptr, length, step, shift, chunks, chunk, rows,
    COUNT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass ``step`` over one chunk of one row: fix the digit of the pass before, add up by the digit at ``shift``.

    Grid (chunks, rows). ``state`` int32 ``[passes + 1, 2, rows]``: prefix and (as bits) the sum above it, before each
    pass; ``histogram`` float32 ``[passes, rows, chunks, 16]``. LAST fixes the last digit and counts: ``found`` int32
    ``[rows, chunks, 2]``, the chunk's values above and at the cut-off.
    """
    c = tl.program_id(0)
    row = tl.program_id(1)
    histogram_ptr += (step * rows + row).to(tl.int64) * chunks * 16
    state_ptr += step * 2 * rows + row
    prefix = tl.full((), 0, tl.int32)
    if not FIRST:
        prefix = tl.load(state_ptr - 2 * rows)
        above = tl.load(state_ptr - rows).to(tl.float32, bitcast=True)
        before = histogram_ptr - rows.to(tl.int64) * chunks * 16
        prefix, above = next_digit(before, chunks, prefix, above, tl.load(need_ptr + row).to(tl.float32), 32)
        if c == 0:
            tl.store(state_ptr, prefix)
            tl.store(state_ptr + rows, above.to(tl.int32, bitcast=True))
    row_ptr = values_ptr + row.to(tl.int64) * length
    if LAST:
        more = tl.zeros([BLOCK], tl.int32)
        ties = tl.zeros([BLOCK], tl.int32)
        for n in range(c * chunk, tl.minimum((c + 1) * chunk, length), BLOCK):
            offs = n + tl.arange(0, BLOCK)
            bits = tl.load(row_ptr + offs, mask=offs < length, other=0.0).to(tl.int32, bitcast=True)
            more += ((bits > prefix) & (offs < length)).to(tl.int32)
            ties += ((bits == prefix) & (offs < length)).to(tl.int32)
        tl.store(found_ptr + (row * chunks + c) * 2, tl.sum(more))
        tl.store(found_ptr + (row * chunks + c) * 2 + 1, tl.sum(ties))
    else:
        sums = tl.zeros([BLOCK, 16], tl.float32)
        for n in range(c * chunk, tl.minimum((c + 1) * chunk, length), BLOCK):
            offs = n + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + offs, mask=offs < length, other=0.0)
            weights = tl.where(offs < length, 1.0, 0.0) if COUNT else x
            sums += digit_sums(x.to(tl.int32, bitcast=True), weights, prefix, shift, FIRST)
        tl.store(histogram_ptr + c * 16 + tl.arange(0, 16), tl.sum(sums, 0))


@triton.jit
def _found(found_ptr, chunks, before):
    """Values above the cut-off and at it in a whole row, and those at it in the chunks ahead of chunk ``before``."""
    more = 0
    ties = 0
    ahead = 0
    for c in range(0, chunks, 32):
        chunk = c + tl.arange(0, 32)
        more += tl.sum(tl.load(found_ptr + chunk * 2, mask=chunk < chunks, other=0))
        tied = tl.load(found_ptr + chunk * 2 + 1, mask=chunk < chunks, other=0)
        ties += tl.sum(tied)
        ahead += tl.sum(tl.where(chunk < before, tied, 0))
    return more, ties, ahead


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _mark_kernel(
    values_ptr, need_ptr, cut_ptr, found_ptr, marks_ptr, length, chunks, chunk, BLOCK: tl.constexpr
):  # fmt: skip
    """Whether each value is above its row's cut-off or among the first at it that ``need`` has room for.

    Grid (chunks, rows).
    """
    c = tl.program_id(0)
    row = tl.program_id(1)
    cut = tl.load(cut_ptr + row)
    need = tl.load(need_ptr + row)
    more, _, tied = _found(found_ptr + row * chunks * 2, chunks, c)
    at = row.to(tl.int64) * length
    for n in range(c * chunk, tl.minimum((c + 1) * chunk, length), BLOCK):
        offs = n + tl.arange(0, BLOCK)
        inside = offs < length
        bits = tl.load(values_ptr + at + offs, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        tie = ((bits == cut) & inside).to(tl.int32)
        rank = tied + tl.cumsum(tie, 0)
        keep = (bits > cut) | ((tie > 0) & (rank <= need - more))
        tl.store(marks_ptr + at + offs, (keep & (need > 0)).to(tl.uint8), mask=inside)
        tied += tl.sum(tie)


@triton.jit
def _covering(cut, above, more, ties, share):
    """How many values reach the share: all above the cut-off, and of those at it what is lacking still."""
    value = tl.maximum(cut.to(tl.float32, bitcast=True), 1e-37)
    lacking = tl.minimum(tl.maximum(tl.ceil((share - above) / value), 0.0), 1.0e9).to(tl.int32)
    return tl.maximum(more + tl.minimum(tl.where(cut > 0, lacking, 0), ties), 1)


@triton.jit(do_not_specialize=_LENGTHS)
def _coverage_kernel(state_ptr, found_ptr, counts_ptr, chunks, rows, share):
    """How many of its largest values each row takes to hold ``share``. Grid (rows,)."""
    row = tl.program_id(0)
    above = tl.load(state_ptr + rows + row).to(tl.float32, bitcast=True)
    more, ties, _ = _found(found_ptr + row * chunks * 2, chunks, 0)
    tl.store(counts_ptr + row, _covering(tl.load(state_ptr + row), above, more, ties, share).to(tl.int64))


@triton.jit
def _short_row(values_ptr, length, BLOCK: tl.constexpr):
    """A row of values, 0 past its end, and their bits, -1 there."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(values_ptr + tl.program_id(0).to(tl.int64) * length + offs, mask=offs < length, other=0.0)
    return x, tl.where(offs < length, x.to(tl.int32, bitcast=True), -1)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _short_mark_kernel(values_ptr, need_ptr, marks_ptr, length, BLOCK: tl.constexpr):
    """The ``need`` largest of a row of at most BLOCK values. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    need = tl.load(need_ptr + row).to(tl.int32)
    _, bits = _short_row(values_ptr, length, BLOCK)
    cut = tl.full((), 0, tl.int32)
    for i in range(0, 31):
        candidate = cut | (1 << (30 - i))
        cut = tl.where(tl.sum((bits >= candidate).to(tl.int32)) >= need, candidate, cut)
    tie = (bits == cut).to(tl.int32)
    room = need - tl.sum((bits > cut).to(tl.int32))
    keep = ((bits > cut) | ((tie > 0) & (tl.cumsum(tie, 0) <= room))) & (need > 0)
    offs = tl.arange(0, BLOCK)
    tl.store(marks_ptr + row * length + offs, keep.to(tl.uint8), mask=offs < length)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _short_coverage_kernel(values_ptr, counts_ptr, length, share, BLOCK: tl.constexpr):
    """How many of its largest values a row of at most BLOCK takes to hold ``share``. Grid (rows,)."""
    x, bits = _short_row(values_ptr, length, BLOCK)
    cut = tl.full((), 0, tl.int32)
    for i in range(0, 31):
        candidate = cut | (1 << (30 - i))
        cut = tl.where(tl.sum(tl.where(bits >= candidate, x, 0.0)) >= share, candidate, cut)
    above = tl.sum(tl.where(bits > cut, x, 0.0))
    more = tl.sum((bits > cut).to(tl.int32))
    count = _covering(cut, above, more, tl.sum((bits == cut).to(tl.int32)), share)
    tl.store(counts_ptr + tl.program_id(0), count.to(tl.int64))


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _bands_kernel(
    selected_ptr, band_ptr, q_start_ptr, q_end_ptr, k_start_ptr, k_end_ptr, max_q, max_k, entries, length, columns,
    UNIT: tl.constexpr, BLOCK_SIZE: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``band [B, H, entries]``: whether a slash of ``selected [B, H, length]`` crosses each difference of blocks.

    Grid (tiles of entries, H, B). WINDOW: at least the entries of ``selected`` that a difference of blocks meets.
    """
    b = tl.program_id(2)
    head = (b * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    _, q_len = sequence_span(q_start_ptr, q_end_ptr, b, max_q, RAGGED_Q)
    _, k_len = sequence_span(k_start_ptr, k_end_ptr, b, max_k, RAGGED_K)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = (entry - (columns - 1)) * BLOCK_SIZE + k_len - q_len  # distance of the two blocks' first tokens
    low = tl.maximum(first - BLOCK_SIZE + 1, 0)
    high = tl.minimum(first + BLOCK_SIZE - 1, length * UNIT - 1)
    at = (low // UNIT)[:, None] + tl.arange(0, WINDOW)[None, :]
    inside = (at <= tl.where(high >= 0, high // UNIT, -1)[:, None]) & (entry < entries)[:, None]
    crossed = tl.load(selected_ptr + head * length + at, mask=inside & (high >= low)[:, None], other=0)
    tl.store(band_ptr + head * entries + entry, tl.max(crossed.to(tl.int32), 1).to(tl.uint8), mask=entry < entries)


@triton.jit(do_not_specialize=_LENGTHS)
def _logits_kernel(
    q_mean_ptr, k_means_ptr, logits_ptr, columns, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A mean query against mean keys -> ``logits [B, H, NB]``. Grid (tiles of blocks, H, B)."""
    b = tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + tl.program_id(1)
    key_head = b * (tl.num_programs(1) // GROUP) + tl.program_id(1) // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(q_mean_ptr + head * D + offs_d, mask=offs_d < D, other=0.0)
    at = (key_head * columns + block)[:, None] * D + offs_d[None, :]
    k = tl.load(k_means_ptr + at, mask=(block < columns)[:, None] & (offs_d < D)[None, :], other=0.0)
    tl.store(logits_ptr + head * columns + block, tl.sum(k * q[None, :], 1) * scale, mask=block < columns)


@triton.jit
def _relative(p, middle):
    """``p * log(p / middle)``; a ratio is at most 2, and the smallest numbers have no half to be divided by."""
    ratio = tl.where(p > 0, p / tl.maximum(middle, 1.2e-38), 1.0)
    return tl.where(p > 0, p * tl.log(tl.minimum(ratio, 2.0)), 0.0)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_VIEWS)
def _distance_kernel(
    logits_ptr, mass_ptr, sizes_ptr, distance_ptr, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """See ``flexprefill._distance``. Grid (H, B)."""
    b = tl.program_id(1)
    head = (b * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for n in range(0, columns, BLOCK):
        offs = n + tl.arange(0, BLOCK)
        size = tl.load(sizes_ptr + b * columns + offs, mask=offs < columns, other=0).to(tl.float32)
        x = tl.load(logits_ptr + head * columns + offs, mask=size > 0, other=0.0) + tl.log(size)
        best = tl.maximum(best, tl.where(size > 0, x, float("-inf")))
    most = tl.max(best, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(0, columns, BLOCK):
        offs = n + tl.arange(0, BLOCK)
        size = tl.load(sizes_ptr + b * columns + offs, mask=offs < columns, other=0).to(tl.float32)
        x = tl.load(logits_ptr + head * columns + offs, mask=size > 0, other=0.0)
        total += tl.where(size > 0, tl.exp(x + tl.log(tl.maximum(size, 1.0)) - most), 0.0)
    whole = tl.maximum(tl.sum(total, 0), 1.2e-38)
    sums = tl.zeros([BLOCK], tl.float32)
    for n in range(0, columns, BLOCK):
        offs = n + tl.arange(0, BLOCK)
        size = tl.load(sizes_ptr + b * columns + offs, mask=offs < columns, other=0).to(tl.float32)
        x = tl.load(logits_ptr + head * columns + offs, mask=size > 0, other=0.0)
        p = tl.where(size > 0, tl.exp(x + tl.log(tl.maximum(size, 1.0)) - most) / whole, 0.0)
        mass = tl.load(mass_ptr + head * columns + offs, mask=offs < columns, other=0.0)
        middle = (p + mass) / 2
        sums += _relative(p, middle) + _relative(mass, middle)
    tl.store(distance_ptr + head, tl.sqrt(tl.maximum(tl.sum(sums, 0) / 2, 0.0)))


def largest(values: Tensor, counts: Tensor) -> Tensor:
    """bool ``[..., N]``. See ``vertical_slash.largest``."""
    flat = values.contiguous().view(-1, values.shape[-1])
    rows, length = flat.shape
    counts = counts.contiguous()
    marks = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    if rows and length <= _SHORT[-1]:
        block, warps = _short_block(length)
        _short_mark_kernel[(rows,)](flat, counts, marks, length, BLOCK=block, num_warps=warps, **LAUNCH)
    elif rows:
        state, found, chunks = _cut(flat, counts, True)
        _mark_kernel[(chunks, rows)](
            flat, counts, state, found, marks, length, chunks, _CHUNK, BLOCK=1024, num_warps=4, **LAUNCH
        )
    return marks.view(torch.bool)


def coverage_counts(values: Tensor, share: float) -> Tensor:
    """int64 ``[...]``. See ``vertical_slash.coverage_counts``."""
    counts = torch.empty(values.shape[:-1], dtype=torch.int64, device=values.device)
    if share <= 0:  # reached by nothing, which has no cut-off
        return counts.fill_(1)
    flat = values.contiguous().view(-1, values.shape[-1])
    rows, length = flat.shape
    if rows and length <= _SHORT[-1]:
        block, warps = _short_block(length)
        _short_coverage_kernel[(rows,)](flat, counts, length, share, BLOCK=block, num_warps=warps, **LAUNCH)
    elif rows:
        need = torch.full((rows,), share, dtype=torch.float32, device=values.device)
        state, found, chunks = _cut(flat, need, False)
        _coverage_kernel[(rows,)](state, found, counts, chunks, rows, share, num_warps=1, **LAUNCH)
    return counts


def _short_block(length: int) -> tuple[int, int]:
    """Values that a program holds, and warps of 32 each: 16 at most."""
    block = next(size for size in _SHORT if length <= size)
    return block, max(1, min(16, block // 1024))


def _cut(flat: Tensor, need: Tensor, by_count: bool) -> tuple[Tensor, Tensor, int]:
    """Of every row of ``flat [rows, N]`` the largest bit pattern that the values at or above reach ``need`` with.

    Returns:
        int32 ``[2, rows]``, it and (as bits) the sum strictly above; int32 ``[rows, chunks, 2]``, how many values of
        each chunk are above and at it; and the chunks.
    """
    rows, length = flat.shape
    chunks = -(-length // _CHUNK)
    passes = len(SHIFTS)
    state = torch.zeros((passes + 1, 2, rows), dtype=torch.int32, device=flat.device)
    histogram = torch.empty((passes, rows, chunks, 16), dtype=torch.float32, device=flat.device)
    found = torch.empty((rows, chunks, 2), dtype=torch.int32, device=flat.device)
    for step, shift in enumerate((*SHIFTS, 0)):
        _descend_kernel[(chunks, rows)](
            flat, need, state, histogram, found, length, step, shift, chunks, _CHUNK, rows,
            COUNT=by_count, FIRST=step == 0, LAST=step == passes, BLOCK=256, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return state[-1], found, chunks


def slash_bands(
    selected: Tensor, unit: int, sequences: Sequences, block_size: int, num_q_blocks: int, num_kv_blocks: int
) -> Tensor:
    """bool ``[B, H, MB + NB - 1]``. See ``vertical_slash.slash_bands``."""
    s, (batch, heads, length) = sequences, selected.shape
    entries = max(num_q_blocks, 1) + num_kv_blocks - 1
    band = torch.empty((batch, heads, entries), dtype=torch.uint8, device=selected.device)
    if band.numel():
        _bands_kernel[(-(-entries // 16), heads, batch)](
            selected.contiguous().view(torch.uint8), band, s.q_start, s.q_end, s.k_start, s.k_end, s.max_q, s.max_k,
            entries, length, num_kv_blocks, UNIT=unit, BLOCK_SIZE=block_size, RAGGED_Q=s.q_start is not None,
            RAGGED_K=s.k_start is not None, WINDOW=triton.next_power_of_2((2 * block_size - 2) // unit + 2), BLOCK=16,
            num_warps=4, **LAUNCH,
        )  # fmt: skip
    return band.view(torch.bool)


def distance(q_mean: Tensor, k_means: Tensor, mass: Tensor, sizes: Tensor, scale: float) -> Tensor:
    """float32 ``[B, H]``. See ``flexprefill._distance``."""
    batch, heads, columns = mass.shape
    head_dim = q_mean.shape[-1]
    logits = torch.empty((batch, heads, columns), dtype=torch.float32, device=mass.device)
    out = torch.empty((batch, heads), dtype=torch.float32, device=mass.device)
    if logits.numel():
        _logits_kernel[(-(-columns // 32), heads, batch)](
            q_mean.contiguous(), k_means.contiguous(), logits, columns, scale, GROUP=heads // k_means.shape[1],
            D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=32, num_warps=4, **LAUNCH,
        )  # fmt: skip
        _distance_kernel[(heads, batch)](
            logits, mass.contiguous(), sizes.int().contiguous(), out, columns, BLOCK=512, num_warps=4, **LAUNCH
        )
    return out


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    cases = mass_cases()
    names = ("values_ptr", "need_ptr", "histogram_ptr", "q_mean_ptr", "k_means_ptr", "logits_ptr", "mass_ptr")
    types = dict.fromkeys((*names, "distance_ptr"), "*fp32") | dict.fromkeys(("counts_ptr",), "*i64")
    types |= dict.fromkeys(("marks_ptr", "selected_ptr", "band_ptr"), "*u8")
    whole = types | {"need_ptr": "*i64"}
    for last in (False, True):
        constants = {"COUNT": False, "FIRST": False, "LAST": last, "BLOCK": 256}
        cases.append((f"descend{'-last' * last}", *offline(_descend_kernel, constants, types), 4, 3))
    cases.append(("mark", *offline(_mark_kernel, {"BLOCK": 1024}, whole), 4, 3))
    cases.append(("coverage", *offline(_coverage_kernel, {}, types), 1, 3))
    cases.append(("mark-short", *offline(_short_mark_kernel, {"BLOCK": 2048}, whole), 2, 3))
    cases.append(("coverage-short", *offline(_short_coverage_kernel, {"BLOCK": 16384}, types), 16, 3))
    shape = {"BLOCK_SIZE": 128, "RAGGED_Q": True, "RAGGED_K": True, "BLOCK": 16}
    cases.append(("bands-1", *offline(_bands_kernel, {**shape, "UNIT": 1, "WINDOW": 256}, types), 4, 3))
    cases.append(("bands-128", *offline(_bands_kernel, {**shape, "UNIT": 128, "WINDOW": 4}, types), 4, 3))
    shape = {"GROUP": 4, "D": 128, "BLOCK_D": 128, "BLOCK": 32}
    cases.append(("mean-logits", *offline(_logits_kernel, shape, types), 4, 3))
    cases.append(("distance", *offline(_distance_kernel, {"BLOCK": 512}, types), 4, 3))
    return cases
