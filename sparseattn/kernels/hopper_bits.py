"""Bits inside listed blocks, for the Hopper forward kernel: which of a key tile's keys every row of a row tile sees.

Bits are words int32 [row groups, key groups, 16, 4]: bit j % 32 of word j % 128 // 32 of row r % 16 says whether the
queries of row r, as many for each, see key j; it stands in row group r // 16 and key group j // 128. What a warp wants
of a tile thus lies together. ``bits`` in the kernels is (pointer to the words, offsets of each row's first [64, 1],
list of key blocks).
"""

# Layouts are parameters of kernels here, so annotations must stay objects: no ``from __future__ import annotations``.
import triton.experimental.gluon.language as gl
from triton.experimental import gluon


@gluon.constexpr_function
def words_layout(words):
    """Layout of words [64, words] in which a thread has those of the two rows that it holds, each row's together."""
    columns = [[0, 1 << i] for i in range(words.bit_length() - 1)]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*columns, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, words])


@gluon.jit
def bits_of(bits_ptr, groups, list_ptr, row, F: gl.constexpr):
    """The bits of queries whose rows of bits are ``row`` [64], of ``groups`` key groups each."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, words_layout(F.TILE_N // 32))
    row = gl.convert_layout(row, LAYOUT)
    return bits_ptr, (row // 16 * (groups * 16) + row % 16)[:, None] * 4, list_ptr


@gluon.jit
def load_bits(bits, tile, F: gl.constexpr):
    """Words [64, TILE_N / 32] of key tile ``tile`` of the list."""
    bits_ptr, offsets, list_ptr = bits
    WORDS: gl.constexpr = F.TILE_N // 32
    PARTS: gl.constexpr = F.BLOCK_KV // F.TILE_N
    LAYOUT: gl.constexpr = gl.SliceLayout(0, words_layout(WORDS))
    block = gl.load(list_ptr + tile // PARTS)
    tile = block * PARTS + tile % PARTS
    word = offsets + (tile // (4 // WORDS) * 64 + tile % (4 // WORDS) * WORDS)
    return gl.load(bits_ptr + (word + gl.arange(0, WORDS, LAYOUT)[None, :]))  # 16 bytes at once


@gluon.jit
def keep_bits(s, words, F: gl.constexpr):
    """Scores [64, TILE_N] with -inf where ``words`` have a 0."""
    parts = gl.reshape(s, [64, F.TILE_N // 32, 32])
    LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, parts.type.layout))
    words = gl.convert_layout(words, gl.SliceLayout(2, parts.type.layout), assert_trivial=True)
    # Two instructions an element, where a comparison comes to many: the compiler collects the outcomes of a row in
    # words again. Every byte of a word has its bit of interest as its sign, which one instruction makes a whole word.
    bit = gl.arange(0, 32, LAYOUT)[None, None, :]
    signs = words[:, :, None] << (7 - bit % 8)
    kept = gl.inline_asm_elementwise(
        "{ .reg .b32 t; prmt.b32 t, $2, 0, $3; lop3.b32 $0, $1, 0xff800000, t, 0xe4; }", "=f,f,r,r",
        [parts, signs, 0x8888 + 0x1111 * (bit // 8)], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return gl.convert_layout(gl.reshape(kept, [64, F.TILE_N]), s.type.layout, assert_trivial=True)
