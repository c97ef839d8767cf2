"""Attention over block-sparse rows: what a user calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.arguments import check_number, check_sinks, check_softcap, check_window
from sparseattn.ops.block_sparse import library as block_sparse_library
from sparseattn.ops.block_sparse.checks import make_geometry
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.bsr.library import PACKAGE, attend
from sparseattn.ops.bsr.problem import BSRProblem
from sparseattn.ops.bsr.rows import BlockRows, make_rows
from sparseattn.ops.dispatch import implementations, resolve
from sparseattn.ops.paged.checks import check_rope, check_scale, check_slopes
from sparseattn.ops.paged.options import ALiBi, CustomMask, RoPE
from sparseattn.ops.results import empty_lse
from sparseattn.ops.sequences import resolve_sequences

_IMPLEMENTATIONS = ("auto", "gluon", "triton", "reference")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCKS = "blocks of multiples of 64 up to 256, without block_mask, positions, scales or gathered"


def bsr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indptr: Tensor,
    indices: Tensor,
    block_size: tuple[int, int],
    *,
    block_mask: Tensor | CustomMask | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    positions: RoPE | ALiBi | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    gathered: bool = False,
    validate: bool = False,
    out: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over blocks of any size, listed as rows of a block-sparse matrix (SciPy's ``bsr_matrix``).

    Queries stand in blocks of R, keys in blocks of C; the last ones may be short. Block row m attends the column blocks
    ``indices[indptr[m]:indptr[m + 1]]``, in any order. Nothing waits for the device and no shape depends on data, so
    that calls can be captured in a CUDA graph and replayed with other patterns of the same nnz. A query that sees no
    key gives output 0 and LSE -inf.

    Blocks of multiples of 64 up to 256 run on the kernels of ``block_sparse_attention``, unless they need
    ``block_mask``, ``positions``, scales or ``gathered``: such calls are differentiable, and patterns become lists as
    wide as the longest row may be, min(NB, nnz). Every other call refuses tensors that require a gradient. It gathers
    its blocks, R and C from 1 up, and needs no memory besides; but Hopper's kernels take multiples of 16 like those of
    64, and dense patterns of smaller blocks as bits, one for each row of blocks and key, which is less than
    ``indices`` hold. Values of listed keys must be finite there: one that is not may reach queries beside those that
    list its key.

    Args:
        q: Queries ``[M, Hq, D]``, or ``[B, M, Hq, D]``; bfloat16, float16, float32 or (reference) float64, any
            strides.
        k: Keys ``[N, Hkv, D]``, or ``[B, N, Hkv, D]``, of q's dtype or float8; Hq is a multiple of Hkv.
        v: Values, likewise, with a head dimension of their own.
        indptr: int32 ``[MB + 1]``, MB = ceil(M / R), ascending from 0: one pattern for all heads. Or ``[H, MB + 1]``
            or ``[B|1, H, MB + 1]`` with 1, Hkv or Hq heads, absolute offsets into one ``indices``. Or counts ``[B|1, H,
            MB]`` of padded lists, as a ``BlockMask`` has them.
        indices: int32 ``[nnz]``, column blocks; or padded lists ``[B|1, H, MB, K]``. Numbers outside 0..NB - 1, NB =
            ceil(N / C), name no block. A row must not list a block twice, nor more than NB; only ``validate`` checks.
        block_size: ``(R, C)``.
        block_mask: Which tokens of the listed blocks are kept, all rows of a block even where the last is short: bool
            ``[nnz, R, C]``; flat, every block row as ``[R, blocks * C]``, one after the other; or that flat form packed
            in a ``CustomMask``, each block row from a byte of its own (``segment_packbits``).
        causal: Query i sees key j only if ``j <= i + N - M``.
        window: ``(left, right)``, how many keys before and after that diagonal stay visible; None is unbounded.
        scale: Factor on the scores ``q . k``; default ``1 / sqrt(D)``.
        softcap: Scores, scaled and biased, become ``softcap * tanh(score / softcap)``; None or 0: not at all.
        sinks: Logits [Hq], any float dtype, that join the softmax denominator only.
        positions: ``RoPE(theta, scale)`` rotates q and k in the kernel, ``ALiBi(slopes)`` adds a linear bias; query i
            stands at position ``i + N - M``.
        k_scale: What keys are multiplied by: a positive number, or float32 ``[1]`` or ``[Hkv]`` on the device.
        v_scale: Likewise for values.
        gathered: Positions are not those of the sequence but count along what a block row lists: its keys in the order
            of its list, its queries at the end of these. ``causal``, ``window`` and ``positions`` act there, as in
            FlashInfer. N must be a multiple of C.
        validate: Check the contents of ``indptr`` and ``indices``. Waits for the device.
        out: Where to write: q's shape with the values' head dimension, q's dtype, any strides; not where q,
            k or v lie.
        return_lse: Also return the LSE.
        impl: "auto" (Gluon on Hopper where it takes the call, else Triton on CUDA, reference elsewhere), "gluon",
            "triton" or "reference".

    Returns:
        ``o`` like q with v's head dimension, in q's dtype (``out``, if given); with ``return_lse`` also the natural-log
        LSE of the scores, without the sink: float32 (float64 for float64 queries) ``[Hq, M]``, or ``[B, Hq, M]``.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or numbers that do not fit; tensors that require a gradient in a call that has none;
            or ``impl`` cannot run this call, with the reason.
    """
    _check_tensors(q, k, v)
    own = block_mask is not None or positions is not None or k_scale is not None or v_scale is not None or gathered
    rows = make_rows(
        indptr, indices, block_size, (q.shape[-3], k.shape[-3]), block_mask, validate=validate,
        lists=not own and k.dtype == q.dtype,
    )  # fmt: skip
    return attend_rows(
        q, k, v, rows, causal=causal, window=window, scale=scale, softcap=softcap, sinks=sinks, positions=positions,
        k_scale=k_scale, v_scale=v_scale, gathered=gathered, out=out, return_lse=return_lse, impl=impl,
    )  # fmt: skip


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: BlockRows,
    *,
    out: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``bsr_attention`` over rows that ``make_rows`` has prepared, once for many calls.

    Args:
        q: As in ``bsr_attention``.
        k: Likewise.
        v: Likewise.
        rows: The pattern.
        out: As in ``bsr_attention``.
        return_lse: Likewise.
        impl: Likewise.
        options: ``causal``, ``window``, ``scale``, ``softcap``, ``sinks``, ``positions``, ``k_scale``, ``v_scale`` and
            ``gathered`` of ``bsr_attention``.
    """
    call = make_call(q, k, v, rows, impl, Options(**options))
    out = check_output(out, q, v.shape[-1])
    if call.geometry is not None:
        if rows.small:
            _refuse_gradients(q, k, v, options.get("sinks"))
        both = attend_lists(q, k, v, call.geometry, rows, options.get("sinks"), out, impl)
        return both if return_lse else both[0]
    assert call.problem is not None
    _refuse_gradients(q, k, v, call.problem.sinks)
    if out is None:
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = empty_lse(q)
    if q.dim() == 3:
        attend(q[None], out[None], lse[None], impl, call.problem)
    else:
        attend(q, out, lse, impl, call.problem)
    return (out, lse) if return_lse else out


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Geometry,
    rows: BlockRows,
    sinks: Tensor | None,
    out: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Outputs and LSE by block-sparse attention."""
    if q.dim() == 4:
        o, lse = block_sparse_library.attend(q, k, v, sinks, rows.lists, g, impl, False)
    else:
        both = block_sparse_library.attend(q[None], k[None], v[None], sinks, rows.lists, g, impl, False)
        o, lse = both[0][0], both[1][0]
    return o if out is None else out.copy_(o), lse


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, rows: BlockRows, *, impl: str = "auto", **options: Any
) -> str | None:
    """Why ``attend_rows`` with these arguments and this ``impl`` would not run, or None if it would.

    Arguments are those of ``attend_rows``. Ones that no implementation accepts raise, as they do there.
    """
    call = make_call(q, k, v, rows, impl, Options(**options))
    if q.dim() == 3:
        q, k, v = q[None], k[None], v[None]
    if call.geometry is not None:
        return block_sparse_library.resolve_call(q, k, v, call.geometry, impl)[1]
    return resolve(PACKAGE, implementations(impl, q), q, call.problem)[1]


class Options(NamedTuple):
    """What a call says of the mathematics; see ``bsr_attention``."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    positions: RoPE | ALiBi | None = None
    k_scale: float | Tensor | None = None
    v_scale: float | Tensor | None = None
    gathered: bool = False


class Call(NamedTuple):
    """What a call comes to: a problem of this operator, or one of block-sparse attention."""

    problem: BSRProblem | None
    geometry: Geometry | None


def make_call(q: Tensor, k: Tensor, v: Tensor, rows: BlockRows, impl: str, given: Options) -> Call:
    """Check a call and say which operator runs it."""
    if impl not in _IMPLEMENTATIONS:
        raise argument_error("impl", f"one of {_IMPLEMENTATIONS}", repr(impl))
    for name in ("causal", "gathered"):
        if not isinstance(getattr(given, name), bool):
            raise argument_error(name, "True or False", repr(getattr(given, name)), kind=TypeError)
    _check_tensors(q, k, v)
    _check_rows(q, k, rows)
    if q.dim() == 3:
        q, k, v = q[None], k[None], v[None]
    heads, heads_k = q.shape[2], k.shape[2]
    placed = given.causal or given.window is not None or given.positions is not None
    gathered = given.gathered and placed
    if gathered and rows.seq_lens[1] % rows.block_size[1]:
        raise argument_error("gathered", f"N a multiple of C = {rows.block_size[1]}", rows.seq_lens[1])
    own = gathered or given.positions is not None or given.k_scale is not None or given.v_scale is not None
    if rows.lists is not None and not own and k.dtype == q.dtype and max(q.shape[-1], v.shape[-1]) <= 256:
        g = make_geometry(
            q, k, v, rows.lists, given.causal, given.scale, given.window, given.softcap, given.sinks, impl,
            resolve_sequences(q, k),
        )  # fmt: skip
        # Small blocks have lists for Hopper's kernels alone.
        if not rows.small or (
            "gluon" in implementations(impl, q) and block_sparse_library.resolve_call(q, k, v, g, "gluon")[1] is None
        ):
            return Call(None, g)
    if given.sinks is not None:
        check_sinks(given.sinks, heads, q)
    left, right = check_window(given.window)
    k_factor, k_tensor = check_scale("k_scale", given.k_scale, heads_k, q)
    v_factor, v_tensor = check_scale("v_scale", given.v_scale, heads_k, q)
    rope = check_rope(given.positions, q)
    problem = BSRProblem(
        k,
        v,
        rows.bounds,
        rows.indices,
        rows.mask,
        rows.mask_offsets,
        None if given.sinks is None else given.sinks.contiguous(),
        check_slopes(given.positions, heads, q),
        k_tensor,
        v_tensor,
        *rows.block_size,
        rows.layout,
        gathered,
        given.causal,
        left,
        -1 if given.causal else right,  # causal attention sees nothing to the right anyway
        (q.shape[-1] ** -0.5 if given.scale is None else check_number("scale", given.scale)) * k_factor,
        check_softcap(given.softcap),
        0.0 if rope is None else float(rope.theta),
        1.0 if rope is None else float(rope.scale),
        v_factor,
        *(rows.bits or (None,) * 4),
    )
    return Call(problem, None)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise argument_error(name, "a tensor", type(t).__name__, kind=TypeError)
        if t.dim() != (q.dim() if q.dim() == 4 else 3) or t.shape[-2] == 0 or t.shape[-1] == 0:
            hint = "All of q, k and v have a batch dimension, or none."
            raise argument_error(name, "[length, heads, D] or [B, length, heads, D]", f"shape {tuple(t.shape)}", hint)
        if t.device != q.device:
            raise argument_error(name, f"device {q.device} like q", t.device)
    if q.dtype not in _DTYPES:
        raise argument_error("q", "bfloat16, float16, float32 or float64", q.dtype, kind=TypeError)
    if k.dtype != q.dtype and k.dtype not in _FLOAT8:
        raise argument_error("k", f"{q.dtype} like q, or float8", k.dtype, kind=TypeError)
    if v.dtype != k.dtype:
        raise argument_error("v", f"{k.dtype} like k", v.dtype, kind=TypeError)
    if k.shape[-1] != q.shape[-1]:
        raise argument_error("k", f"head_dim {q.shape[-1]} like q", k.shape[-1])
    if v.shape[:-1] != k.shape[:-1]:
        raise argument_error("v", f"shape {[*k.shape[:-1]]} + [D] like k", f"shape {tuple(v.shape)}")
    if q.dim() == 4 and q.shape[0] != k.shape[0]:
        raise argument_error("k", f"batch size {q.shape[0]} like q", k.shape[0])
    if q.shape[-2] % k.shape[-2]:
        raise argument_error("q", f"heads that are a multiple of k's {k.shape[-2]}", q.shape[-2])


def _check_rows(q: Tensor, k: Tensor, rows: BlockRows) -> None:
    if not isinstance(rows, BlockRows):
        raise argument_error("rows", "what make_rows returns", type(rows).__name__, kind=TypeError)
    lengths, batch = (q.shape[-3], k.shape[-3]), q.shape[0] if q.dim() == 4 else 1
    if rows.seq_lens != lengths:
        raise argument_error("q, k", f"lengths {rows.seq_lens}, those of the pattern", lengths)
    if rows.device != q.device:
        raise argument_error("indices", f"device {q.device} like q", rows.device)
    if rows.batch not in (1, batch):
        raise argument_error("indptr", f"batch size 1 or {batch}", rows.batch)
    if rows.heads not in (1, k.shape[-2], q.shape[-2]):
        raise argument_error("indptr", f"1, Hkv = {k.shape[-2]} or Hq = {q.shape[-2]} heads", rows.heads)


def check_output(out: Tensor | None, q: Tensor, dim: int) -> Tensor | None:
    """``out``, if it fits."""
    if out is None:
        return None
    if out.dtype != q.dtype:
        raise argument_error("out", f"{q.dtype} like q", out.dtype, kind=TypeError)
    shape = (*q.shape[:-1], dim)
    if tuple(out.shape) != shape or out.device != q.device:
        raise argument_error("out", f"shape {shape} on {q.device}", f"shape {tuple(out.shape)} on {out.device}")
    return out


def _refuse_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sinks)):
        raise argument_error(
            "q", "tensors without gradients", "one that requires them",
            f"Only {_BLOCKS} have a backward pass: call it under torch.no_grad().",
        )  # fmt: skip
