"""What FlashInfer's arguments mean to this library's operators: checks and conversions that all modules share.

Nothing here waits for a device. Contents of index tensors are checked where they lie on the CPU already; on a GPU what
they name out of range is never read (a key without a page is hidden, see ``PagedCache``).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._checks import check_count as check_count
from sparseattn.flashinfer._checks import check_dtype as check_dtype
from sparseattn.flashinfer._checks import check_heads as check_heads
from sparseattn.flashinfer._checks import check_indptr as check_indptr
from sparseattn.flashinfer._checks import check_last_pages as check_last_pages
from sparseattn.flashinfer._checks import check_output as check_output
from sparseattn.flashinfer._checks import described as described
from sparseattn.flashinfer._checks import number_of as number_of
from sparseattn.flashinfer._checks import readable as readable
from sparseattn.flashinfer._checks import unsupported as unsupported
from sparseattn.ops.paged import ALiBi, PagedCache, RoPE, lengths_from_last_pages

LAYOUTS = ("NHD", "HND")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POSITIONS = ("NONE", "ROPE_LLAMA", "ALIBI")
LOG2_E = math.log2(math.e)
#: FlashInfer's kernels, all served by this library's choice; and this library's implementations, run or refused.
BACKENDS = (
    "auto", "fa2", "fa3", "cudnn", "cutlass", "cute-dsl", "trtllm-gen", "xqa", "fmha_v2",
    "vsa_sm100_blk128", "vsa_sm100_blk64", "vsa_sm120_blk64", "vsa_blackwell", "vsa_blackwell_blk64",
)  # fmt: skip
IMPLEMENTATIONS = ("reference", "triton", "gluon")


def check_layout(kv_layout: str) -> str:
    """``kv_layout``, if it is "NHD" or "HND"."""
    if kv_layout not in LAYOUTS:
        raise argument_error("kv_layout", f"one of {LAYOUTS}", repr(kv_layout))
    return kv_layout


def implementation(backend: str) -> str:
    """The ``impl`` that a ``backend`` stands for: FlashInfer's names leave the choice to this library."""
    if backend in IMPLEMENTATIONS:
        return backend
    if backend not in BACKENDS:
        raise argument_error("backend", f"one of {(*BACKENDS, *IMPLEMENTATIONS)}", repr(backend))
    return "auto"


def dtype_of(name: str, value: torch.dtype | str) -> torch.dtype:
    """A dtype from itself or its name: ``torch.float16``, "float16", "half"."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise argument_error(name, "a torch.dtype or its name", repr(value), kind=TypeError)
    if dtype not in (*FLOATS, *FLOAT8):
        hint = "NVFP4 caches are not supported." if dtype == torch.uint8 else ""
        raise argument_error(name, "a float dtype, float8_e4m3fn or float8_e5m2", dtype, hint, kind=TypeError)
    return dtype


class Dtypes(NamedTuple):
    """Dtypes that a plan declares: of queries, keys and values, outputs."""

    q: torch.dtype
    kv: torch.dtype
    o: torch.dtype


def resolve_dtypes(
    q_data_type: torch.dtype | str | None = None,
    kv_data_type: torch.dtype | str | None = None,
    o_data_type: torch.dtype | str | None = None,
    data_type: torch.dtype | str | None = None,
    default: torch.dtype = torch.float16,
) -> Dtypes:
    """Dtypes from what a plan says of them, None being unsaid.

    ``data_type`` alone means queries and cache both, unless it is float8: then the cache alone. Outputs are as the
    queries; bfloat16 for float8 queries, which are computed in it.
    """
    both = None if data_type is None else dtype_of("data_type", data_type)
    if q_data_type is not None:
        q = dtype_of("q_data_type", q_data_type)
    else:
        q = default if both is None or both in FLOAT8 else both
    kv = dtype_of("kv_data_type", kv_data_type) if kv_data_type is not None else both or q
    if kv not in (q, *FLOAT8) and q not in FLOAT8:
        raise argument_error("kv_data_type", f"{q} like q_data_type, or float8", kv, kind=TypeError)
    if o_data_type is not None:
        o = dtype_of("o_data_type", o_data_type)
    else:
        o = torch.bfloat16 if q in FLOAT8 else q
    return Dtypes(q, kv, o)


# ---- masks and positions ----


def window_of(window_left: int) -> tuple[int | None, None] | None:
    """A window from FlashInfer's ``window_left``, negative for none; the right side stays open."""
    if isinstance(window_left, bool) or not isinstance(window_left, int):
        raise argument_error("window_left", "a number of tokens, or -1", repr(window_left), kind=TypeError)
    return None if window_left < 0 else (window_left, None)


def softcap_of(logits_soft_cap: float | None) -> float | None:
    """None unless scores are capped."""
    return None if logits_soft_cap is None or logits_soft_cap <= 0 else float(logits_soft_cap)


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slopes (Press et al., 2021): 2^(-8k / n) for the largest power of two n, then odd steps half as wide."""
    n = 1 << (heads.bit_length() - 1)
    return [2 ** (-8 * (k + 1) / n) for k in range(n)] + [2 ** (-4 * (2 * k + 1) / n) for k in range(heads - n)]


@functools.cache  # a captured graph may hold the tensor's address
def _alibi(heads: int, device: torch.device) -> ALiBi:
    return ALiBi(torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=device))


def positions_of(
    mode: str, rope_scale: float | None, rope_theta: float | None, heads: int, device: torch.device
) -> RoPE | ALiBi | None:
    """What the kernel does about positions.

    ALiBi's bias is 0 on the aligned diagonal. FlashInfer's is ``slope * (j - i)`` with i counted from the first query:
    outputs are the same, its LSE is ``slope * (kv_len - qo_len)`` (times log2 e) more and changes with how a prompt is
    cut into chunks, which would make states of the same query unfit to merge.
    """
    if mode not in POSITIONS:
        raise argument_error("pos_encoding_mode", f"one of {POSITIONS}", repr(mode))
    if mode == "ALIBI":
        return _alibi(heads, device)
    if mode == "ROPE_LLAMA":
        return RoPE(1e4 if rope_theta is None else rope_theta, 1.0 if rope_scale is None else rope_scale)
    return None


class Options(NamedTuple):
    """What a plan says of the mathematics, in FlashInfer's words."""

    causal: bool = False
    pos_encoding_mode: str = "NONE"
    window_left: int = -1
    logits_soft_cap: float | None = None
    sm_scale: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None

    def arguments(self, heads: int, head_dim: int, device: torch.device) -> dict[str, Any]:
        """The same as ``causal``, ``scale``, ``window``, ``softcap`` and ``positions`` of ``paged_attention``."""
        check_count("head_dim", head_dim, 1)
        return {
            "causal": bool(self.causal),
            "scale": head_dim**-0.5 if self.sm_scale is None else number_of("sm_scale", self.sm_scale),
            "window": window_of(self.window_left),
            "softcap": softcap_of(self.logits_soft_cap),
            "positions": positions_of(self.pos_encoding_mode, self.rope_scale, self.rope_theta, heads, device),
        }


# ---- scales, float8 queries, LSE ----


def _parts(value: float | Tensor | None) -> tuple[float, Tensor | None]:
    """A scale as a number and a flat float32 tensor, one of them neutral; a single element on the CPU is read."""
    if not isinstance(value, Tensor):
        return 1.0 if value is None else number_of("scale", value), None
    if value.numel() == 1 and value.device.type == "cpu":
        return float(value), None
    return 1.0, value.float().reshape(-1)


class Scales(NamedTuple):
    """Factors as the operators take them.

    Attributes:
        scale: On q . k, numbers folded in.
        k: float32 [1] or [Hkv] on the device, or None.
        v: A number, such a tensor, or None.
        q: float32 [Hq] on the device, a factor that queries must be multiplied by, or None.
    """

    scale: float
    k: Tensor | None
    v: float | Tensor | None
    q: Tensor | None


def fold_scales(
    scale: float,
    q_scale: float | Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
) -> Scales:
    """Scales of queries, keys and values, numbers or tensors of one element or one a head, folded into few."""
    if q_scale is None and k_scale is None and v_scale is None:
        return Scales(scale, None, None, None)
    (q_factor, q), (k_factor, k), (v_factor, v) = _parts(q_scale), _parts(k_scale), _parts(v_scale)
    if q is not None and q.numel() == 1:
        k, q = q if k is None else k * q, None
    return Scales(scale * q_factor * k_factor, k, (None if v_factor == 1.0 else v_factor) if v is None else v, q)


def as_queries(q: Tensor, factor: Tensor | None = None) -> Tensor:
    """Queries as the operators take them: float8 goes up to bfloat16 (exact), then times ``factor`` [Hq], if given."""
    if not isinstance(q, Tensor) or q.dim() < 2:
        raise argument_error("q", "a tensor [..., num_qo_heads, head_dim]", described(q), kind=TypeError)
    if q.dtype in FLOAT8:
        q = q.to(torch.bfloat16)
    if factor is None:
        return q
    if factor.shape[0] != q.shape[-2] or factor.device != q.device:
        expected = f"a number, or a tensor of 1 or {q.shape[-2]} elements on {q.device}"
        raise argument_error("q_scale", expected, f"shape {tuple(factor.shape)} on {factor.device}")
    return (q * factor[:, None]).to(q.dtype)


def base2(lse: Tensor, out: Tensor | None = None) -> Tensor:
    """FlashInfer's LSE from this library's.

    Args:
        lse: ``[..., Hq, tokens]``, natural logarithm.
        out: float32 ``[..., tokens, Hq]``, where to write, any strides; None: a new tensor.

    Returns:
        float32 ``[..., tokens, Hq]``, base 2; -inf where no key was seen.
    """
    turned = lse.transpose(-1, -2)
    if out is None:
        out = torch.empty(turned.shape, dtype=torch.float32, device=lse.device)
    return torch.mul(turned, LOG2_E, out=out)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured: what is made from tensors now has contents when the graph is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---- caches and page tables ----


def split_cache(
    cache: Tensor | tuple[Tensor, Tensor], kv_layout: str, name: str = "paged_kv_cache"
) -> tuple[Tensor, Tensor]:
    """Keys and values, 4-D each, from any form of paged cache that FlashInfer takes; views.

    Args:
        cache: ``[P, 2, page, Hkv, D]`` ("HND": ``[P, 2, Hkv, page, D]``), or two tensors without the axis of 2. One
            axis less means pages of one token, whose axis is left out.
        kv_layout: "NHD" or "HND".
        name: Of the argument.
    """
    if isinstance(cache, Tensor):
        if cache.dim() not in (4, 5) or cache.shape[1] != 2:
            raise argument_error(name, "[P, 2, ...] of 5 dimensions (4: pages of 1)", f"shape {tuple(cache.shape)}")
        k, v = cache.unbind(1)
    elif isinstance(cache, tuple | list) and len(cache) == 2:
        k, v = cache
    else:
        raise argument_error(name, "a tensor, or keys and values", type(cache).__name__, kind=TypeError)
    for t in (k, v):
        if not isinstance(t, Tensor):
            raise argument_error(name, "tensors of keys and values", type(t).__name__, kind=TypeError)
    if k.dim() == v.dim() == 3:
        axis = 1 if kv_layout == "NHD" else 2
        k, v = k.unsqueeze(axis), v.unsqueeze(axis)
    return k, v


def index_tensor(name: str, t: Tensor, device: torch.device, rank: int = 1, non_blocking: bool = True) -> Tensor:
    """An int32 index tensor on ``device``, where it is copied unless it is there."""
    if not isinstance(t, Tensor) or t.dtype != torch.int32:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise argument_error(name, "an int32 tensor", got, "Convert with .int().", kind=TypeError)
    if t.dim() != rank:
        raise argument_error(name, f"a {rank}-D tensor", f"shape {tuple(t.shape)}")
    return t if t.device == device else t.to(device, non_blocking=non_blocking)


class Table(NamedTuple):
    """Which pages requests own, and how many tokens are in them: ``PagedCache``'s fields of these names."""

    seq_lens: Tensor
    page_table: Tensor | None = None
    indptr: Tensor | None = None
    indices: Tensor | None = None

    def cache(self, k: Tensor, v: Tensor, kv_layout: str) -> PagedCache:
        return PagedCache(k, v, *self, layout=kv_layout)


def csr_table(
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    page_size: int,
    device: torch.device,
    non_blocking: bool = True,
    prefix: str = "",
) -> Table:
    """A table from FlashInfer's three tensors (int32 [B + 1], [nnz], [B]), wherever they lie.

    A request without pages has length 0, whatever ``last_page_len`` says of it. ``prefix`` is of the arguments' names.
    """
    check_indptr(f"{prefix}indptr", indptr, indices.numel() if isinstance(indices, Tensor) else None)
    check_last_pages(f"{prefix}last_page_len", indptr, last_page_len, page_size)
    indptr = index_tensor(f"{prefix}indptr", indptr, device, 1, non_blocking)
    indices = index_tensor(f"{prefix}indices", indices, device, 1, non_blocking)
    last_page_len = index_tensor(f"{prefix}last_page_len", last_page_len, device, 1, non_blocking)
    return Table(lengths_from_last_pages(indptr, last_page_len, page_size), None, indptr, indices)


def dense_table(block_tables: Tensor, seq_lens: Tensor, page_size: int, device: torch.device) -> Table:
    """A table from ``block_tables`` int32 [B, max_pages] and ``seq_lens`` int32 (or uint32) of B elements."""
    if not isinstance(seq_lens, Tensor):
        raise argument_error("seq_lens", "an int32 tensor", type(seq_lens).__name__, kind=TypeError)
    if seq_lens.dtype == torch.uint32:
        seq_lens = seq_lens.view(torch.int32)
    lengths = index_tensor("seq_lens", seq_lens.reshape(-1), device)
    pages = index_tensor("block_tables", block_tables, device, 2)
    if pages.shape[0] != lengths.shape[0]:
        expected = f"{lengths.shape[0]} rows like seq_lens"
        raise argument_error("block_tables", expected, f"shape {tuple(block_tables.shape)}")
    if readable(seq_lens) and lengths.numel():
        shortest, longest = (int(t) for t in seq_lens.aminmax())
        if shortest < 0:
            raise argument_error("seq_lens", "lengths of at least 0", shortest)
        if longest > pages.shape[1] * page_size:
            expected = f"pages for {longest} tokens, the longest of seq_lens"
            raise argument_error("block_tables", expected, f"{pages.shape[1]} of {page_size} tokens")
    return Table(lengths, pages)


def dense_cache(k: Tensor, v: Tensor, kv_layout: str = "NHD") -> PagedCache:
    """One sequence's ``[L, Hkv, D]`` keys and values ("HND": ``[Hkv, L, D]``) as a cache of the largest pages that fit.

    Views of ``k`` and ``v``, any strides.
    """
    for name, t in (("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.dim() != 3:
            raise argument_error(name, f"[L, Hkv, D] or [Hkv, L, D] ({kv_layout})", described(t), kind=TypeError)
    if check_layout(kv_layout) == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    if v.shape[0] != k.shape[0]:
        raise argument_error("v", f"{k.shape[0]} tokens like k", v.shape[0])
    length = k.shape[0]
    page = math.gcd(length, 256) if length else 1
    pages = torch.arange(length // page, dtype=torch.int32, device=k.device)[None]
    seq_lens = torch.full((1,), length, dtype=torch.int32, device=k.device)
    k, v = (t.unflatten(0, (-1, page)) if length else t[:, None] for t in (k, v))
    return PagedCache(k, v, seq_lens, pages)
