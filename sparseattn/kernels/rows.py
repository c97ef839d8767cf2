"""Rows of keys and values that a table or a list names: gathered, decoded, rotated, and masked token by token."""

import triton
import triton.language as tl


@triton.jit
def decode_float8(x, FORMAT: tl.constexpr):
    """float16 of float8 bytes: "e4m3" (fn) or "e5m2". Any GPU, no conversion instruction; exact."""
    bits = x.to(tl.uint16)
    if FORMAT == "e5m2":
        y = (bits << 8).to(tl.float16, bitcast=True)
    else:
        # Exponents are biased by 7 instead of 15; the byte 0x7f is NaN there and a number here.
        y = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        y = tl.where((bits & 0x7F) == 0x7F, float("nan"), y).to(tl.float16)
    return y


@triton.jit
def sin_cos(turns):
    """Sine and cosine of an angle in turns, in float32: a quarter turn's series, and no slow path for large angles."""
    r = turns - tl.floor(turns + 0.5)
    quarter = tl.floor(r * 4.0 + 0.5)
    x = (r - quarter * 0.25) * 6.283185307179586
    x2 = x * x
    s = x * (1.0 + x2 * (-1.0 / 6 + x2 * (1.0 / 120 + x2 * (-1.0 / 5040 + x2 * (1.0 / 362880)))))
    c = 1.0 + x2 * (-1.0 / 2 + x2 * (1.0 / 24 + x2 * (-1.0 / 720 + x2 * (1.0 / 40320))))
    k = quarter.to(tl.int32) & 3
    odd = (k & 1) == 1
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    return tl.where(k >= 2, -sin, sin), tl.where((k == 1) | (k == 2), -cos, cos)


@triton.jit
def rotation(positions, columns, theta_log2, rope_scale, D: tl.constexpr):
    """Cosines and signed sines ``[N, D]`` by which columns and their partners are multiplied."""
    half: tl.constexpr = D // 2
    frequency = tl.exp2((columns % half).to(tl.float32) * (-2.0 / D) * theta_log2) / (rope_scale * 6.283185307179586)
    sin, cos = sin_cos(positions.to(tl.float32)[:, None] * frequency[None, :])
    return cos, tl.where(columns < half, -1.0, 1.0)[None, :] * sin


@triton.jit
def load_page_rows(
    base, row, held, stride_d, positions, theta_log2, rope_scale, dtype: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Rows of a cache, as ``dtype``, rotated if asked; 0 where ``held`` is False and past column ``D``.

    Args:
        base: Pointer to a head's first row.
        row: int64 [N], offsets of the rows.
        held: [N], rows that may be read.
    """
    columns = tl.arange(0, BLOCK_D)
    inside = held[:, None]
    if D != BLOCK_D:
        inside = inside & (columns < D)[None, :]
    ptrs = base + row[:, None] + columns[None, :] * stride_d
    x = tl.load(ptrs, mask=inside, other=0.0)
    if FLOAT8 == "e4m3" or FLOAT8 == "e5m2":
        x = decode_float8(x, FLOAT8)
    if ROPE:
        half: tl.constexpr = D // 2
        partner = tl.where(columns < half, columns + half, columns - half)
        y = tl.load(base + row[:, None] + partner[None, :] * stride_d, mask=inside, other=0.0)
        if FLOAT8 == "e4m3" or FLOAT8 == "e5m2":
            y = decode_float8(y, FLOAT8)
        cos, sin = rotation(positions, columns, theta_log2, rope_scale, D)
        x = x.to(tl.float32) * cos + y.to(tl.float32) * sin
    return x.to(dtype)


@triton.jit
def custom_seen(mask_ptr, offset, entry, size, wanted, BITS: tl.constexpr):
    """Entries of a custom mask, "bool" or packed "little" or "big"; False past its end and where not ``wanted``."""
    at = offset + entry
    if BITS != "bool":
        at = offset + entry // 8
    byte = tl.load(mask_ptr + at, mask=wanted & (at >= 0) & (at < size), other=0).to(tl.int32)
    if BITS == "little":
        byte = (byte >> (entry % 8).to(tl.int32)) & 1
    elif BITS == "big":
        byte = (byte >> (7 - entry % 8).to(tl.int32)) & 1
    return byte != 0
