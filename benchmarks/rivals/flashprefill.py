"""FlashPrefill's block-sparse attention (its second version, built from source for Hopper).

It packs the rows of a GQA group into tiles of 128, so a tile holds 128 / G tokens, and lists tiles of 64 keys for every
KV head and query tile, as compressed rows.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.rivals.registry import Prepared, implementation
from sparseattn import BlockMask
from sparseattn.masks.lists import listed_entries
from sparseattn.testing.baselines import Unsupported
from sparseattn.testing.workloads import Problem

_ROWS, _KEYS = 128, 64


def _missing() -> str | None:
    return None if find_spec("flashprefill") else "flashprefill is not installed"


def compressed_rows(mask: BlockMask, kv_heads: int, group: int) -> tuple[Tensor, Tensor, int]:
    """The lists of a mask of 1 or Hkv heads as it takes them.

    Returns:
        Offsets int32 [Hkv * tiles + 1], indices of 64-key tiles int32 [nnz], and query tiles of one KV head.
    """
    tokens = _ROWS // group
    keys = mask.block_size[1] // _KEYS
    blocks = mask.to_blocks().repeat_interleave(mask.block_size[0] // tokens, 2).repeat_interleave(keys, 3)
    tiles, columns = -(-mask.seq_lens[0] // tokens), -(-mask.seq_lens[1] // _KEYS)
    blocks = blocks[:, :, :tiles, :columns].expand(1, kv_heads, -1, -1)
    fine = BlockMask.from_blocks(blocks, block_size=(max(16, tokens), _KEYS), seq_lens=mask.seq_lens)
    counts = fine.kv_num_blocks.flatten()
    offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return offsets, fine.kv_indices[listed_entries(fine.kv_num_blocks, fine.kv_indices)], tiles


@implementation("flashprefill", missing=_missing, ops=("forward",))
def _flashprefill(problem: Problem) -> Prepared:
    group = problem.heads // problem.kv_heads
    if problem.device.type != "cuda" or torch.cuda.get_device_capability(problem.device)[0] != 9:
        raise Unsupported("FlashPrefill needs a Hopper GPU")
    if problem.lists not in (1, problem.kv_heads):
        raise Unsupported("FlashPrefill chooses blocks by KV head")
    if problem.block_size[0] % _ROWS or problem.block_size[1] % _KEYS or _ROWS % group or _ROWS // group < 16:
        raise Unsupported("FlashPrefill lists tiles of 128 packed rows and 64 keys, in groups of 1 to 8 heads")
    from flashprefill.flash_attn_interface import flash_attn_with_kvcache

    offsets, indices, tiles = compressed_rows(problem.mask, problem.kv_heads, group)
    q, k, v = problem.qkv

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=problem.device)

    options = {
        "page_table": None,
        "cache_seqlens": int32(problem.n),
        "cu_seqlens_q": int32(0, problem.queries),
        "max_seqlen_q": problem.queries,
        "causal": problem.causal,
        "num_splits": 1,
        "block_sparse_cu": offsets,
        "block_sparse_idx": indices,
        "total_q_tiles": tiles,
        "cu_q_tiles": int32(0, tiles),
    }
    return Prepared(lambda: flash_attn_with_kvcache(q=q[0], k_cache=k, v_cache=v, **options)[None], {})
