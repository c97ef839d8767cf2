"""Host side of the Hopper forward kernel: its tiles, what it can read and write, and how it compiles offline."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparseattn.kernels.hopper import tile_layout
from sparseattn.kernels.hopper_forward import Facts, forward_kernel

# Heads of a group that one row tile may hold: more would make a head's share of a tile less than a swizzle's 8 rows.
MAX_PACK = 8


class Tiles(NamedTuple):
    """Shape of a row tile's work and of the pipeline that feeds it.

    Attributes:
        consumers: Warpgroups of 64 rows.
        tile_n: Keys of a key tile.
        k_stages: Key tiles in flight.
        v_stages: Value tiles in flight.
        q_registers: Queries are read from registers, which frees their memory for the next tile's.
        o_in_q: Outputs leave through the queries' memory.
        programs: Programs on one multiprocessor.
        panels: Queries and keys lie in this many panels of 64 columns; 0: in tiles of a power of two.
        o_bare: Outputs go to memory from registers.
    """

    consumers: int
    tile_n: int
    k_stages: int
    v_stages: int
    q_registers: bool
    o_in_q: bool
    programs: int
    panels: int = 0
    o_bare: bool = False


def config_for(block_d: int, block_dv: int, consumers: int) -> Tiles:
    """Tiles by padded head dimensions, ``block_d`` also 192. At 128 those of an experiment on an H200."""
    if block_d == 192 and block_dv <= 128 and consumers == 2:
        return Tiles(2, 128, 2, 2, False, False, 1, panels=3, o_bare=True)  # 209 KB of operands leave no room for O
    wide = max(block_d, block_dv)
    if wide > 128:  # accumulators take half of the registers, so queries stay in shared memory
        return Tiles(consumers, 64, 2, 2, False, block_d > 128 and block_dv == 256, 1)
    if consumers == 1:  # two programs a multiprocessor: one would leave the tensor cores idle under its softmax
        return Tiles(1, 64, 2, 2, True, False, 2)
    if wide == 64:
        return Tiles(2, 128, 3, 3, True, False, 1)
    return Tiles(2, 128, 2, 2, True, False, 1)


def consumer_registers(facts: Facts) -> int:
    """Registers of the threads of two warpgroups that compute, by what the loading one leaves of a multiprocessor's."""
    return 224 if facts.SCATTERED else 232 if facts.BOXED else 240


def padded(head_dim: int) -> int:
    """The head dimension of a tile."""
    return max(64, triton.next_power_of_2(head_dim))


def depth(head_dim: int) -> int:
    """How many columns of a tile products need: a padded head dimension, or three quarters of it."""
    return 192 if 128 < head_dim <= 192 else padded(head_dim)


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a device."""
    # The few of a CPU are for the tests, which emulate these kernels there.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def unmappable(name: str, t: Tensor) -> str | None:
    """Why no tensor map can describe a tensor, or None."""
    *batch, seq, head, last = t.stride()
    unit = 16 // t.element_size()
    if last != 1 or t.data_ptr() % 16 or seq % unit or (t.shape[-2] > 1 and head % unit):
        return (
            f"the Gluon kernels need {name} aligned to 16 bytes with rows of stride 1 and other strides in multiples "
            f"of {unit} elements, not strides {tuple(t.stride())}"
        )
    if (t.shape[-3] > 1 and seq == 0) or (t.shape[-2] > 1 and head == 0):
        return f"the Gluon kernels take no expanded {name} (strides {tuple(t.stride())})"
    if batch and t.shape[0] > 1 and (seq == 0 or batch[0] % seq):
        return (
            f"the Gluon kernels need {name}'s batch stride to be a multiple of its row stride, not {batch[0]} and {seq}"
        )
    if batch_rows(t) * t.shape[0] >= 2**30:
        return f"the Gluon kernels count fewer than 2^30 rows, which {name} exceeds"
    return None


def batch_rows(t: Tensor) -> int:
    """Rows from one batch entry's first to the next one's; 0 for a packed tensor."""
    return 0 if t.dim() == 3 or t.shape[0] == 1 else t.stride(0) // t.stride(1)


def offline(dims: tuple[int, int], facts: dict[str, Any]) -> tuple[Any, ...]:
    """Kernel, signature, constexprs, attributes, warps, stages and options of a bfloat16 call."""
    facts = dict(facts)
    wide = padded if facts.get("PAGE") else depth
    tiles = config_for(wide(dims[0]), padded(dims[1]), facts.pop("consumers", 2))
    tiles = tiles._replace(tile_n=facts.pop("TILE_N", tiles.tile_n))
    pack = facts.pop("PACK", 1)
    block = (facts.pop("BLOCK_Q", 128), facts.pop("BLOCK_KV", 128))
    f = Facts(
        32, 4, pack, pack, 64 * tiles.consumers // pack, *block, padded(dims[0]), dims[1], padded(dims[1]),
        tiles.consumers, tiles.tile_n, tiles.k_stages, tiles.v_stages, tiles.q_registers, tiles.o_in_q,
        DEPTH=depth(dims[0]), PANELS=tiles.panels, O_BARE=tiles.o_bare, **facts,
    )  # fmt: skip
    boxes = dict(zip(("q_desc", "k_desc", "v_desc", "o_desc"), f.boxes(), strict=True))
    boxes |= dict(zip(("k_box_desc", "v_box_desc"), f.end_boxes(), strict=False))
    floats = {"lse_ptr", "sinks_ptr", "sums_ptr", "scales_ptr", "slopes_ptr"}
    given = {"table_ptr", "details_ptr", "num_pages", "sums_ptr"} if f.PAGED else set()
    given |= {"scales_ptr"} if f.SCALED else set()
    given |= {"k_ptr", "v_ptr", "k_stride", "v_stride", "k_head", "v_head"} if f.SCATTERED else set()
    given |= {"out_ptr", "out_stride", "out_head"} if f.MERGE or f.O_BARE else set()
    given |= {"slopes_ptr"} if f.ALIBI else set()
    given |= {"custom_ptr", "custom_starts_ptr", "custom_size"} if facts.get("CUSTOM") else set()
    given |= {"bits_ptr", "bit_rows", "bit_groups", "bit_queries"} if f.BITS else set()
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(forward_kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = f if param.name == "F" else consumer_registers(f)
        elif param.has_default and param.name not in given and param.name not in boxes:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = None
        elif param.name in boxes:
            shape = ", ".join(str(n) for n in (1, 1, *boxes[param.name]))
            signature[param.name] = f"tensordesc<bf16[{shape}],{tile_layout()!r}>"
        elif param.name.endswith("_ptr"):
            part = param.name == "o_ptr" and (f.SPLIT or f.PAGED)
            kind = "bf16" if param.name in ("o_ptr", "k_ptr", "v_ptr", "out_ptr") else "i32"
            kind = "fp32" if part or param.name in floats else kind
            kind = {"custom_ptr": "u8", "custom_starts_ptr": "i64"}.get(param.name, kind)
            signature[param.name] = f"*{kind}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if param.name in ("qk_scale", "softcap") else "i32"
    options = {"maxnreg": 128} if tiles.programs == 2 else {}
    return forward_kernel, signature, constexprs, attributes, 4, 1, options
