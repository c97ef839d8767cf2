"""What paged attention accepts, and its arguments brought to one form. Nothing here waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.arguments import check_number, check_sinks, check_softcap, check_window, narrower
from sparseattn.ops.dispatch import check_impl
from sparseattn.ops.paged.cache import FLOAT8, PagedCache, check_int32
from sparseattn.ops.paged.options import ALiBi, CustomMask, PageLists, RoPE
from sparseattn.ops.paged.problem import PagedProblem

IMPLEMENTATIONS = ("gluon", "triton", "reference")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def make_problem(
    q: Tensor | tuple[Tensor, Tensor],
    cache: PagedCache,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    sinks: Tensor | None,
    positions: RoPE | ALiBi | None,
    custom_mask: Tensor | CustomMask | None,
    k_scale: float | Tensor | None,
    v_scale: float | Tensor | None,
    mask: BlockMask | PageLists | None,
    impl: str,
) -> tuple[PagedProblem, Tensor, Tensor | None]:
    """Check a call; returns its problem, and q in the parts that meet ``cache.k`` and ``cache.k_rope``."""
    check_impl(impl, IMPLEMENTATIONS)
    if not isinstance(cache, PagedCache):
        raise argument_error("cache", "a PagedCache", type(cache).__name__, kind=TypeError)
    if not isinstance(causal, bool):
        raise argument_error("causal", "True or False", repr(causal), kind=TypeError)
    main, rest = _parts(q, cache)
    _check_tensors(main, rest, cache)
    heads = main.shape[1]
    max_q = _check_rows(main, cache, cu_seqlens_q, max_seqlen_q)
    left, right = check_window(window)
    if isinstance(mask, BlockMask):
        causal = causal or mask.causal
        sides = check_window(mask.window, "mask.window")
        left, right = narrower(left, sides[0]), narrower(right, sides[1])
    if sinks is not None:
        check_sinks(sinks, heads, main)
    k_factor, k_tensor = check_scale("k_scale", k_scale, cache.num_kv_heads, main)
    v_factor, v_tensor = check_scale("v_scale", v_scale, cache.num_kv_heads, main)
    rope = check_rope(positions, main, rest)
    counts, indices, block_q, block_kv = _lists(mask, cache, heads, max_q, main)
    problem = PagedProblem(
        *cache.views(),
        cache.seq_lens.contiguous(),
        *cache.table(),
        None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        None if sinks is None else sinks.contiguous(),
        check_slopes(positions, heads, main),
        *_custom_mask(custom_mask, cache, main),
        k_tensor,
        v_tensor,
        counts,
        indices,
        max_q,
        block_q,
        block_kv,
        causal,
        left,
        -1 if causal else right,  # causal attention sees nothing to the right anyway
        _factor(scale, main, rest) * k_factor,
        check_softcap(softcap),
        0.0 if rope is None else float(rope.theta),
        1.0 if rope is None else float(rope.scale),
        isinstance(custom_mask, CustomMask) and custom_mask.bitorder == "big",
        v_factor,
    )
    return problem, main, rest


def _parts(q: Tensor | tuple[Tensor, Tensor], cache: PagedCache) -> tuple[Tensor, Tensor | None]:
    if isinstance(q, tuple | list):
        if cache.k_rope is None or len(q) != 2:
            raise argument_error("q", "one tensor", f"{len(q)}", "Pairs meet a cache with k_rope.", kind=TypeError)
        return q[0], q[1]
    if not isinstance(q, Tensor):
        raise argument_error("q", "a tensor", type(q).__name__, kind=TypeError)
    if cache.k_rope is None:
        return q, None
    dims = cache.k.shape[-1], cache.k_rope.shape[-1]
    if q.shape[-1] != sum(dims):
        raise argument_error("q", f"head_dim {dims[0]} + {dims[1]} like the cache", q.shape[-1])
    return q[..., : dims[0]], q[..., dims[0] :]


def _check_tensors(q: Tensor, q_rope: Tensor | None, cache: PagedCache) -> None:
    if q.dtype not in _DTYPES:
        raise argument_error("q", "bfloat16, float16, float32 or float64", q.dtype, kind=TypeError)
    if q.dim() != 3:
        hint = "Several queries a sequence are packed, with cu_seqlens_q." if q.dim() == 4 else ""
        raise argument_error("q", "[B, Hq, D], or packed [total_q, Hq, D]", f"shape {tuple(q.shape)}", hint)
    if cache.k.dtype != q.dtype and cache.k.dtype not in FLOAT8:
        raise argument_error("cache", f"{q.dtype} like q, or float8", cache.k.dtype, kind=TypeError)
    if cache.device != q.device:
        raise argument_error("cache", f"device {q.device} like q", cache.device)
    if q.shape[-1] != cache.k.shape[-1]:
        raise argument_error("q", f"head_dim {cache.k.shape[-1]} like the cache", q.shape[-1])
    if q.shape[1] == 0 or q.shape[1] % cache.num_kv_heads:
        raise argument_error("q", f"heads that are a multiple of the cache's {cache.num_kv_heads}", q.shape[1])
    if q_rope is not None and cache.k_rope is not None:
        expected = (*q.shape[:2], cache.k_rope.shape[-1])
        if tuple(q_rope.shape) != expected or q_rope.dtype != q.dtype or q_rope.device != q.device:
            got = f"shape {tuple(q_rope.shape)}, {q_rope.dtype} on {q_rope.device}"
            raise argument_error("q", f"a rotary part of shape {expected}, {q.dtype} on {q.device}", got)


def _check_rows(q: Tensor, cache: PagedCache, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None) -> int:
    """The longest query length, or a bound of it."""
    if cu_seqlens_q is None:
        if q.shape[0] != cache.batch:
            hint = "Several queries a sequence need cu_seqlens_q."
            raise argument_error("q", f"{cache.batch} rows, one a sequence", q.shape[0], hint)
        if max_seqlen_q not in (None, 1):
            raise argument_error("max_seqlen_q", "None or 1 without cu_seqlens_q", max_seqlen_q)
        return 1
    check_int32("cu_seqlens_q", cu_seqlens_q, 1, q.device)
    if cu_seqlens_q.shape[0] != cache.batch + 1:
        expected = f"shape ({cache.batch + 1},), one more than sequences in the cache"
        raise argument_error("cu_seqlens_q", expected, f"shape {tuple(cu_seqlens_q.shape)}")
    if max_seqlen_q is None:
        return q.shape[0]
    if isinstance(max_seqlen_q, bool) or not isinstance(max_seqlen_q, int | torch.SymInt) or max_seqlen_q < 0:
        raise argument_error("max_seqlen_q", "a length of at least 0", repr(max_seqlen_q))
    return max_seqlen_q


def _factor(scale: float | None, q: Tensor, q_rope: Tensor | None) -> float:
    """The factor on scores."""
    if scale is not None:
        return check_number("scale", scale)
    if q_rope is not None:
        raise argument_error("scale", "a number, for a cache with k_rope", None, "DeepSeek's is 1 / sqrt(128 + 64).")
    return q.shape[-1] ** -0.5


def check_rope(positions: RoPE | ALiBi | None, q: Tensor, q_rope: Tensor | None = None) -> RoPE | None:
    """``positions``, if they are a RoPE that fits q."""
    if positions is not None and not isinstance(positions, RoPE | ALiBi):
        raise argument_error("positions", "RoPE(...), ALiBi(...) or None", repr(positions), kind=TypeError)
    if not isinstance(positions, RoPE):
        return None
    if q_rope is not None or q.shape[-1] % 2:
        got = "a cache with k_rope" if q_rope is not None else f"head_dim {q.shape[-1]}"
        raise argument_error("positions", "an even head_dim without k_rope for RoPE", got)
    return positions


def check_scale(name: str, value: float | Tensor | None, heads_k: int, like: Tensor) -> tuple[float, Tensor | None]:
    """A scale as a number and a tensor, one of them neutral."""
    if value is None:
        return 1.0, None
    if not isinstance(value, Tensor):
        number = check_number(name, value)
        if number <= 0:
            raise argument_error(name, "a positive number", value)
        return number, None
    if value.dtype != torch.float32:
        raise argument_error(name, "float32", value.dtype, kind=TypeError)
    if value.numel() not in (1, heads_k) or value.dim() > 1 or value.device != like.device:
        expected = f"shape (1,) or ({heads_k},) on {like.device}"
        raise argument_error(name, expected, f"shape {tuple(value.shape)} on {value.device}")
    return 1.0, value.reshape(-1)


def check_slopes(positions: RoPE | ALiBi | None, heads: int, q: Tensor) -> Tensor | None:
    """ALiBi's slopes, if ``positions`` are such."""
    if not isinstance(positions, ALiBi):
        return None
    slopes = positions.slopes
    if slopes.shape[0] != heads or slopes.device != q.device:
        expected = f"slopes of shape ({heads},) on {q.device}"
        raise argument_error("positions", expected, f"shape {tuple(slopes.shape)} on {slopes.device}")
    return slopes.contiguous()


def _custom_mask(
    custom_mask: Tensor | CustomMask | None, cache: PagedCache, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The mask's entries and, if the caller says, int64 [B + 1], where each sequence's begin."""
    if custom_mask is None:
        return None, None
    if isinstance(custom_mask, Tensor):
        custom_mask = CustomMask(custom_mask)
    if not isinstance(custom_mask, CustomMask):
        raise argument_error("custom_mask", "a tensor or a CustomMask", type(custom_mask).__name__, kind=TypeError)
    bits, offsets = custom_mask.mask, custom_mask.offsets
    if bits.device != q.device:
        raise argument_error("custom_mask", f"device {q.device} like q", bits.device)
    if offsets is None:
        return bits.contiguous(), None
    if tuple(offsets.shape) != (cache.batch + 1,) or offsets.device != q.device:
        expected = f"offsets of shape ({cache.batch + 1},) on {q.device}"
        raise argument_error("custom_mask", expected, f"shape {tuple(offsets.shape)} on {offsets.device}")
    return bits.contiguous(), offsets.long().contiguous()


def _lists(
    mask: BlockMask | PageLists | None, cache: PagedCache, heads: int, max_q: int, q: Tensor
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Counts and indices of the lists, and rows and keys of a block."""
    if mask is None:
        return None, None, 0, 1
    if isinstance(mask, PageLists):
        pages, counts = mask.pages, mask.counts
        _check_heads("mask", pages, heads, cache, q)
        if counts is None:
            counts = pages.new_full(pages.shape[:2], pages.shape[-1])
        return counts[..., None].contiguous(), pages[:, :, None].contiguous(), 0, cache.page_size
    if not isinstance(mask, BlockMask):
        raise argument_error("mask", "a BlockMask, PageLists or None", type(mask).__name__, kind=TypeError)
    _check_heads("mask", mask.kv_num_blocks, heads, cache, q)
    if mask.seq_lens[0] != max_q:
        hint = "Pass the max_seqlen_q for which it was built."
        raise argument_error("mask", f"Sq = {max_q}, the longest query length", mask.seq_lens[0], hint)
    if cache.page_table is not None and mask.seq_lens[1] > cache.capacity:
        raise argument_error("mask", f"Sk of at most {cache.capacity} (the page table's width)", mask.seq_lens[1])
    if mask.column_indices is not None and mask.column_indices.shape[-1]:
        hint = "mask.whole_blocks() lists their blocks instead."
        raise argument_error("mask", "blocks only", "a mask with columns", hint)
    return mask.kv_num_blocks.contiguous(), mask.kv_indices.contiguous(), *mask.block_size


def _check_heads(name: str, lists: Tensor, heads: int, cache: PagedCache, q: Tensor) -> None:
    if lists.device != q.device:
        raise argument_error(name, f"device {q.device} like q", lists.device)
    if lists.shape[0] not in (1, cache.batch):
        raise argument_error(name, f"batch size 1 or {cache.batch}", lists.shape[0])
    if lists.shape[1] not in (1, cache.num_kv_heads, heads):
        raise argument_error(name, f"1, Hkv = {cache.num_kv_heads} or Hq = {heads} heads", lists.shape[1])
