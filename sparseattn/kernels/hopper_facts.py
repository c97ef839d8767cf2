"""What the Hopper forward kernel is compiled for."""

# Attributes are compile-time values of the Gluon front end: no ``from __future__ import annotations``.
from dataclasses import dataclass, field
from typing import Any

import triton.experimental.gluon.language as gl

# Keys of the boxes into which the ends of variable blocks are cut.
END = 16


@dataclass(frozen=True, eq=False)
class Facts:
    """What the kernel is compiled for.

    Attributes:
        HEADS: Query heads.
        GROUP: Query heads of a KV head.
        PACK: Query heads in a row tile; where GROUP is no multiple of them (``PAGE`` only), a group's last tile has
            fewer, and every share a place.
        MASK_GROUP: Query heads that share a list.
        TOKENS: Query tokens of a row tile.
        BLOCK_Q: Rows of a mask block.
        BLOCK_KV: Columns of a mask block.
        BLOCK_D: Head dimension of q and k, padded to a power of two.
        DV: Head dimension of v.
        BLOCK_DV: The same, padded.
        CONSUMERS: Warpgroups that compute, 64 rows each.
        TILE_N: Keys of a key tile.
        K_STAGES: Key tiles in flight.
        V_STAGES: Value tiles in flight.
        Q_REGISTERS: Consumers hold their queries in registers, which frees the memory for the next tile's.
        O_IN_Q: Outputs leave through the queries' memory.
        MASKED: Key tiles come from block lists.
        CAUSAL: Bottom-right aligned.
        WINDOW: Either side is bounded.
        SOFTCAP: Scores are capped.
        SINKS: Heads have a sink logit.
        SPLIT: Each tile is a share of a row's keys and leaves unnormalised sums.
        RAGGED_Q: Sequences have query spans of their own.
        RAGGED_K: Likewise, key spans.
        PAGE: Tokens of a page; 0: keys lie in rows of their own. Spans of keys then are where a
            sequence's page numbers begin and, from there, its length; the schedule counts the tiles.
        SCALED: Scores and outputs have a factor for each KV head.
        VARIABLE: Row tiles and key tiles begin and end anywhere, as ``piece_walks_kernel`` says.
        DEPTH: Columns of queries and keys that are multiplied: BLOCK_D, or 192 of 256 where the others are zeros.
        PANELS: Queries and keys lie in this many panels of 64 columns, a tensor map's box each, as no tile has as many
            columns; 0: in tiles of BLOCK_D.
        O_BARE: Outputs go to memory from registers, not through a tile of shared memory.
        MERGE: Rows of a row tile, a power of two, whose shares the program that ends last merges (``PAGE`` with one
            consumer; over a latent cache, rows that programs merge at a time); 0: shares are left as they are.
        BITS: Bits say what queries see of listed blocks (see ``hopper_bits``), which are no smaller than a key tile.
        ALIBI: Scores have a bias of their head's slope times the distance of query and key.
        CUSTOM: A custom mask's form, "bool", "little" or "big"; "": there is none. All key tiles must count as cut.
        ROWS: Rows of a consumer.
        FLOAT8: Format of a float8 cache, "e4m3" or "e5m2" (``hopper_turned`` only); "": keys are of the queries' type.
        ROPE: Queries and keys are rotated (``hopper_turned`` only).
        PAGED: Keys lie in pages.
        BOXED: The rows of a key tile come from ``key_boxes``.
        SCATTERED: Boxes would be less than a swizzle's 8 rows, so that threads gather the rows of key tiles.
        WARPS: Of the producer.
        GATHER: A key tile holds several mask blocks.
        ENDS: Key tiles lie in one piece, or are of boxes: what is left of variable blocks behind the former.
        BOX: Keys that are loaded together; with ``ENDS``, in the latter tiles.
        LOADER: Registers of the producer's threads.
        CHUNKS: Tiles into which a group's heads are cut.
        SLOTS: Tokens of a row tile in one consumer.
        KEY_BYTES: Of an element of the cache.
        FETCHED: The producer brings no queries.
    """

    HEADS: int
    GROUP: int
    PACK: int
    MASK_GROUP: int
    TOKENS: int
    BLOCK_Q: int
    BLOCK_KV: int
    BLOCK_D: int
    DV: int
    BLOCK_DV: int
    CONSUMERS: int
    TILE_N: int
    K_STAGES: int
    V_STAGES: int
    Q_REGISTERS: bool
    O_IN_Q: bool
    MASKED: bool = False
    CAUSAL: bool = False
    WINDOW: bool = False
    SOFTCAP: bool = False
    SINKS: bool = False
    SPLIT: bool = False
    RAGGED_Q: bool = False
    RAGGED_K: bool = False
    PAGE: int = 0
    SCALED: bool = False
    VARIABLE: bool = False
    BITS: bool = False
    DEPTH: int = 0
    MERGE: int = 0
    PANELS: int = 0
    O_BARE: bool = False
    ALIBI: bool = False
    CUSTOM: str = ""
    ROWS: int = 64
    FLOAT8: str = ""
    ROPE: bool = False

    PAGED: Any = field(init=False, default=False)
    BOXED: Any = field(init=False, default=False)
    SCATTERED: Any = field(init=False, default=False)
    WARPS: Any = field(init=False, default=1)
    GATHER: Any = field(init=False, default=False)
    ENDS: Any = field(init=False, default=False)
    BOX: Any = field(init=False, default=0)
    LOADER: Any = field(init=False, default=24)
    CHUNKS: Any = field(init=False, default=0)
    SLOTS: Any = field(init=False, default=0)
    KEY_BYTES: Any = field(init=False, default=2)
    FETCHED: Any = field(init=False, default=False)

    def __post_init__(self) -> None:
        gather = self.MASKED and self.BLOCK_KV < self.TILE_N
        ends = self.VARIABLE and not gather
        box = self.BLOCK_KV if gather else END if ends else self.TILE_N
        if self.PAGE:
            parts = (self.PAGE, self.BLOCK_KV) if self.MASKED else (self.PAGE,)
            box = min(self.TILE_N, *(n & -n for n in parts))
        facts = vars(self) | {
            "PAGED": self.PAGE > 0,
            "GATHER": gather,
            "ENDS": ends,
            "BOX": box,
            "SLOTS": self.ROWS // self.PACK,
        }
        boxed = self.PAGE > 0 or self.VARIABLE
        scattered = self.PAGE > 0 and box < 8
        facts |= {"SCATTERED": scattered, "WARPS": 4 if scattered else 1}
        facts |= {"BOXED": boxed, "LOADER": 56 if scattered else 40 if boxed else 24}
        facts |= {"CHUNKS": -(-self.GROUP // self.PACK)}
        facts |= {"DEPTH": self.DEPTH or self.BLOCK_D}
        facts |= {"KEY_BYTES": 1 if self.FLOAT8 else 2, "FETCHED": self.ROPE or self.FLOAT8 != ""}
        # Attributes of a compile-time argument must be compile-time values themselves.
        for name, value in facts.items():
            object.__setattr__(self, name, gl.constexpr(value))

    def boxes(self) -> tuple[tuple[int, int, int], ...]:
        """(heads, rows, columns) of the tensor-map tiles of q, k, v and o."""
        slots, pack, tile_n, box, d, dv, panels = (
            getattr(self, n).value for n in ("SLOTS", "PACK", "TILE_N", "BOX", "BLOCK_D", "BLOCK_DV", "PANELS")
        )
        d = 64 if panels else d
        boxed = box < tile_n and not self.ENDS.value
        panel = 128 // self.KEY_BYTES.value
        keys = ((1, max(box, 8), panel),) * 2 if boxed else ((1, tile_n, d), (1, tile_n, dv))
        return (pack, slots, d), *keys, (pack, slots, dv)

    def end_boxes(self) -> tuple[tuple[int, int, int], ...]:
        """As ``boxes``, of k and v in tiles of boxes beside tiles in one piece."""
        return ((1, self.BOX.value, 64),) * 2 if self.ENDS.value else ()

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))
