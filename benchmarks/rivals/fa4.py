"""FlashAttention-4 (the package flash-attn-4, CuTe DSL), dense and over block lists.

Block lists come as counts int32 [B, H, MB] and indices int32 [B, H, MB, <= NB], apart for blocks that are masked inside
(the causal diagonal) and full ones; H is 1 or the query heads, and only lists that all heads share let it pack the rows
of a GQA group into one tile. For the backward pass the same, transposed.

On Hopper a block of keys must be exactly one tile: at most 128 keys forward (64 for head dims past 192), and backward
128 up to a head dim of 128, 64 past 192, and 96 between. Larger blocks are cut into such tiles here, which selects the
same tokens; smaller ones cannot be merged.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.rivals.registry import Prepared, implementation, needs
from sparseattn import BlockMask
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.workloads import Problem

_missing = needs("flash-attn-4")


def _check(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise Unsupported("FlashAttention-4 needs a CUDA GPU")
    if problem.dtype == "fp32":
        raise Unsupported("FlashAttention-4 takes float16 and bfloat16")
    if problem.op == "backward" and problem.heads != problem.kv_heads and problem.head_dim != problem.value_dim:
        raise Unsupported("FlashAttention-4's backward of grouped heads wants one head dim for keys and values")


def cut_blocks(mask: BlockMask, keys: int) -> BlockMask:
    """The same selection in blocks of ``keys`` keys, which must divide the mask's."""
    factor = mask.block_size[1] // keys
    if factor == 1:
        return mask
    block_size = (mask.block_size[0], keys)
    blocks = mask.to_blocks().repeat_interleave(factor, -1)[..., : -(-mask.seq_lens[1] // keys)]
    return BlockMask.from_blocks(blocks, block_size=block_size, seq_lens=mask.seq_lens, causal=bool(mask.causal))


def tile_keys(problem: Problem) -> int:
    """How many keys one listed block must have.

    Raises:
        Unsupported: No such cut of the problem's blocks.
    """
    block_q, block_kv = problem.block_size
    dim = problem.head_dim
    if problem.op == "forward":
        largest = 128 if dim <= 192 else 64
        keys = min(block_kv, largest)
        rows = 64
    else:
        if 128 < dim <= 192:
            raise Unsupported("FlashAttention-4's block-sparse backward lists 96 keys a block at this head dim")
        keys = 128 if dim <= 128 else 64
        rows = 128 if dim <= 64 else 64
    if block_kv % keys or block_q % rows:
        raise Unsupported(f"FlashAttention-4 lists multiples of {rows} queries and {keys} keys a block in this case")
    return keys


def block_lists(mask: BlockMask, heads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of ``BlockSparseTensorsTorch``, forward and backward, for a mask of 1, Hkv or Hq heads."""
    flex = mask.to_flex(heads, self_contained=False)
    assert flex.full_kv_num_blocks is not None
    assert flex.full_q_num_blocks is not None
    forward = (flex.kv_num_blocks, flex.kv_indices, flex.full_kv_num_blocks, flex.full_kv_indices)
    backward = (flex.q_num_blocks, flex.q_indices, flex.full_q_num_blocks, flex.full_q_indices)
    names = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    both = []
    for tensors in (forward, backward):
        fields: dict[str, Any] = dict(zip(names, (t.contiguous() for t in tensors if t is not None), strict=True))
        both.append({**fields, "block_size": mask.block_size})
    return both[0], both[1]


def _call(problem: Problem, **options: Any) -> Tensor:
    from flash_attn.cute import flash_attn_func

    o = flash_attn_func(*problem.qkv, causal=problem.causal, **options)
    return o[0] if isinstance(o, tuple) else o


@implementation("fa4_dense", missing=_missing, dense=True)
def _dense(problem: Problem) -> Prepared:
    _check(problem)
    return Prepared(partial(_call, problem), {})


@implementation("fa4_dense_deterministic", missing=_missing, dense=True, ops=("backward",))
def _dense_deterministic(problem: Problem) -> Prepared:
    _check(problem)
    return Prepared(partial(_call, problem, deterministic=True), {})


@implementation("fa4", missing=_missing)
def _block_sparse(problem: Problem) -> Prepared:
    _check(problem)
    keys = tile_keys(problem)
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    forward, backward = block_lists(cut_blocks(problem.mask, keys), problem.heads)
    options = {"block_sparse_tensors": BlockSparseTensorsTorch(**forward)}
    if problem.op == "backward":
        options["block_sparse_tensors_bwd"] = BlockSparseTensorsTorch(**backward)
    return Prepared(partial(_call, problem, **options), {"listed_block": [problem.block_size[0], keys]})
