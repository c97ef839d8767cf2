"""Block-sparse attention: what a user calls, what is checked, and which implementation runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.sequences import resolve_sequences

IMPLEMENTATIONS = ("triton", "reference")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Rows and columns of a block where there is no mask; implementations tile dense attention as they like.
_DENSE_BLOCK = 128


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    ranges_q: Tensor | None = None,
    ranges_k: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over exactly the key blocks that a mask lists; dense attention without one.

    Differentiable in q, k, v and sinks, through the output and through the LSE. Works under
    ``torch.compile(fullgraph=True)`` and, with the Triton kernels, in a CUDA graph. A query row that sees no key gives
    output 0 and LSE -inf; empty tensors give empty (or all-zero) results.

    Args:
        q: Queries ``[B, Sq, Hq, D]`` in bfloat16, float16, float32 or float64 (the last on the reference only), any
            strides; packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: Keys ``[B, Sk, Hkv, D]`` of the same dtype; Hq must be a multiple of Hkv.
        v: Values ``[B, Sk, Hkv, Dv]``; Dv may differ from D.
        mask: Which key blocks every query block attends, with 1, Hkv or Hq heads and batch 1 or B, for exactly these
            lengths (of ragged batches, the longest). None: every key.
        causal: Query i sees key j only if ``j <= i + Sk - Sq`` (bottom-right aligned, lengths of the sequence itself).
            None: as the mask says, or True without a mask. True on a mask that is not causal applies both; False on
            one that is causal is an error.
        scale: Factor on the scores ``q . k``; default ``1 / sqrt(D)``.
        window: ``(left, right)``, how many keys before and after the aligned diagonal stay visible, None meaning
            unbounded. Intersected with the mask's own window.
        softcap: Scaled scores become ``softcap * tanh(score / softcap)``; None or 0: not at all.
        sinks: Learnable logits [Hq], any float dtype, that join the softmax denominator only.
        cu_seqlens_q: int32 [B + 1], cumulative query lengths of packed tensors.
        cu_seqlens_k: int32 [B + 1], cumulative key lengths; default ``cu_seqlens_q``.
        max_seqlen_q: Longest packed query length; default ``total_q``, which is right but launches more.
        max_seqlen_k: Longest packed key length; default ``total_k``.
        ranges_q: int32 [B, 2], valid rows ``[start, end)`` of every row of a padded batch (left or right padding).
            Rows outside give output 0, LSE -inf and gradient 0.
        ranges_k: int32 [B, 2], likewise for keys and values (padding, caches longer than their content).
        return_lse: Also return the LSE.
        impl: "auto" (Triton on CUDA, reference on CPU), "triton" or "reference".

    Returns:
        ``o`` ``[B, Sq, Hq, Dv]`` (packed ``[total_q, Hq, Dv]``) in q's dtype, contiguous; with ``return_lse`` also
        the natural-log LSE of the scaled, soft-capped scores, without the sink: float32 (float64 for float64 inputs)
        ``[B, Hq, Sq]`` (packed ``[Hq, total_q]``).

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or numbers that do not fit; or ``impl`` cannot run this call, with the reason.
    """
    g = _geometry(
        q, k, v, mask, causal, scale, window, softcap, sinks, impl,
        resolve_sequences(
            q, k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, ranges_q=ranges_q, ranges_k=ranges_k,
        ),
    )  # fmt: skip
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    ):
        if mask is not None and _wants_transposed(q, impl):
            g = _with_transposed(g, mask)
        o, lse = _BlockSparse.apply(q, k, v, sinks, impl, *g)
    else:
        o, lse = _forward_op(q, k, v, sinks, impl, *_without_transposed(g))
    return (o, lse) if return_lse else o


def unsupported_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    ranges_q: Tensor | None = None,
    ranges_k: Tensor | None = None,
    impl: str = "auto",
) -> str | None:
    """Why ``block_sparse_attention`` with these arguments and this ``impl`` would not run, or None if it would.

    Arguments are those of ``block_sparse_attention``. Ones that no implementation accepts raise, as they do there.
    """
    g = _geometry(
        q, k, v, mask, causal, scale, window, softcap, sinks, impl,
        resolve_sequences(
            q, k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, ranges_q=ranges_q, ranges_k=ranges_k,
        ),
    )  # fmt: skip
    return _load(_choose(q, impl), q, k, v, g)[1]


# ---------------------------------------------------------------------------------------------------------- checks


def _geometry(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    causal: bool | None,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    sinks: Tensor | None,
    impl: str,
    seq: Any,
) -> Geometry:
    """Check everything but the layout (``resolve_sequences`` did) and bring it to one form."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise argument_error("impl", f"one of {('auto', *IMPLEMENTATIONS)}", repr(impl))
    _check_tensors(q, k, v)
    if causal is not None and not isinstance(causal, bool):
        raise argument_error("causal", "True, False or None", repr(causal), kind=TypeError)
    left, right = _window(window, "window")
    if mask is None:
        is_causal = causal is not False
        lists: tuple[Tensor | None, Tensor | None] = (None, None)
        block_q = block_kv = _DENSE_BLOCK
    else:
        _check_mask(mask, q, k, seq)
        if causal is False and mask.causal:
            raise argument_error(
                "causal", "None or True with a causal mask", False, "Build the mask with causal=False instead."
            )
        is_causal = bool(causal) or mask.causal
        lists = (mask.kv_num_blocks, mask.kv_indices)
        block_q, block_kv = mask.block_size
        mask_left, mask_right = _window(mask.window, "mask.window")
        left, right = _narrower(left, mask_left), _narrower(right, mask_right)
    if sinks is not None:
        _check_sinks(sinks, q)
    return Geometry(
        *lists,
        None,
        None,
        block_q,
        block_kv,
        seq.q_start,
        seq.q_end,
        seq.k_start,
        seq.k_end,
        seq.batch,
        seq.max_q,
        seq.max_k,
        seq.packed,
        is_causal,
        left,
        # Causal attention sees nothing to the right anyway.
        -1 if is_causal else right,
        q.shape[-1] ** -0.5 if scale is None else _number("scale", scale),
        _softcap(softcap),
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in _DTYPES:
        raise argument_error("q", "bfloat16, float16, float32 or float64", q.dtype, kind=TypeError)
    if v.dim() != k.dim():
        raise argument_error("v", f"{k.dim()} dimensions like k", f"shape {tuple(v.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise argument_error(name, f"{q.dtype} like q", t.dtype, "Convert with .to(q.dtype).", kind=TypeError)
        if t.device != q.device:
            raise argument_error(name, f"device {q.device} like q", t.device)
    if k.shape[-1] != q.shape[-1]:
        raise argument_error("k", f"head_dim {q.shape[-1]} like q", k.shape[-1])
    if v.shape[:-1] != k.shape[:-1]:
        raise argument_error("v", f"shape {(*k.shape[:-1], 'head_dim')} like k", tuple(v.shape))
    for name, t in (("q", q), ("v", v)):
        if t.shape[-1] == 0 or t.shape[-2] == 0:
            raise argument_error(name, "at least one head and a head_dim of at least 1", f"shape {tuple(t.shape)}")
    if q.shape[-2] % k.shape[-2]:
        raise argument_error(
            "q",
            f"a number of heads that is a multiple of k's {k.shape[-2]}",
            q.shape[-2],
            "KV heads serve equal groups.",
        )


def _check_mask(mask: BlockMask, q: Tensor, k: Tensor, seq: Any) -> None:
    if not isinstance(mask, BlockMask):
        hint = "Build one with BlockMask.from_dense." if isinstance(mask, Tensor) else ""
        raise argument_error("mask", "a BlockMask or None", type(mask).__name__, hint, kind=TypeError)
    if mask.device != q.device:
        raise argument_error("mask", f"device {q.device} like q", mask.device, "Move it with mask.to().")
    heads = mask.heads
    if tuple(mask.seq_lens) != (seq.max_q, seq.max_k):
        hint = "Packed masks are built for max_seqlen_q and max_seqlen_k." if seq.packed else ""
        raise argument_error("mask", f"lengths (Sq, Sk) = {(seq.max_q, seq.max_k)}", tuple(mask.seq_lens), hint)
    if mask.batch not in (1, seq.batch):
        raise argument_error("mask", f"batch size 1 or {seq.batch}", mask.batch)
    allowed = (1, k.shape[-2], q.shape[-2])
    if heads not in allowed:
        raise argument_error("mask", f"1, Hkv = {allowed[1]} or Hq = {allowed[2]} heads", heads)
    if (mask.seqused_q is not None and seq.q_start is None) or (mask.seqused_k is not None and seq.k_start is None):
        raise argument_error(
            "mask",
            "a mask for whole rows, since no ranges were given",
            "one for a ragged batch (seqused_q/seqused_k)",
            "Pass the same ranges_q/ranges_k or cu_seqlens that selected it.",
        )


def _check_sinks(sinks: Tensor, q: Tensor) -> None:
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        got = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise argument_error("sinks", "a floating-point tensor", got, kind=TypeError)
    if sinks.dim() != 1 or sinks.shape[0] != q.shape[-2]:
        raise argument_error("sinks", f"shape ({q.shape[-2]},), a logit per query head", tuple(sinks.shape))
    if sinks.device != q.device:
        raise argument_error("sinks", f"device {q.device} like q", sinks.device)


def _number(name: str, value: float) -> float:
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float):
        hint = "A learnable scale belongs into q: pass q * scale and scale=1." if isinstance(value, Tensor) else ""
        raise argument_error(name, "a finite number", type(value).__name__, hint, kind=TypeError)
    if not math.isfinite(value):
        raise argument_error(name, "a finite number", value)
    return float(value)


def _softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    value = _number("softcap", softcap)
    if value < 0:
        raise argument_error("softcap", "a positive number, or None for no cap", softcap)
    return value


def _window(window: tuple[int | None, int | None] | None, name: str) -> tuple[int, int]:
    """``(left, right)`` with -1 for unbounded."""
    if window is None:
        return -1, -1
    expected = "(left, right) token counts, each at least 0 or None"
    if not isinstance(window, tuple | list):
        raise argument_error(name, expected, repr(window), "(w, 0) keeps w keys before each query.", kind=TypeError)
    if len(window) != 2:
        raise argument_error(name, expected, repr(window))
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise argument_error(name, expected, repr(window), kind=TypeError)
        if side is not None and side < 0:
            raise argument_error(name, expected, repr(window), "None is unbounded.")
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def _narrower(a: int, b: int) -> int:
    return max(a, b) if a < 0 or b < 0 else min(a, b)


# -------------------------------------------------------------------------------------------------------- dispatch


def _choose(q: Tensor, impl: str) -> str:
    """The implementation that "auto" means: one per device, so that nothing is ever slow without being asked to."""
    if impl != "auto":
        return impl
    return "triton" if q.is_cuda else "reference"


def _wants_transposed(q: Tensor, impl: str) -> bool:
    return _choose(q, impl) == "triton"


def _load(name: str, q: Tensor, k: Tensor, v: Tensor, g: Geometry) -> tuple[Any, str | None]:
    """The implementation's module and why it cannot run this call. Triton is imported here and not before."""
    if name == "reference":
        from sparseattn.ops.block_sparse import reference

        return reference, reference.unsupported_reason(q, k, v, g)
    reason = _triton_missing()
    if reason is not None:
        return None, reason
    from sparseattn.ops.block_sparse import triton

    return triton, triton.unsupported_reason(q, k, v, g)


def _triton_missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return None if (major, minor) >= (3, 6) else f"Triton {triton.__version__} is older than 3.6"


def _resolve(q: Tensor, k: Tensor, v: Tensor, g: Geometry, impl: str) -> Any:
    name = _choose(q, impl)
    module, reason = _load(name, q, k, v, g)
    if reason is not None:
        raise argument_error(
            "impl",
            "an implementation that can run this call",
            f"{impl!r}, where {name} cannot: {reason}",
            'impl="reference" runs anything, slowly.',
        )
    return module


# ------------------------------------------------------------------------------------------- the operator boundary

_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
_GEOMETRY = (
    "Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? q_num_blocks, Tensor? q_indices, "
    "SymInt block_q, SymInt block_kv, Tensor? q_start, Tensor? q_end, Tensor? k_start, Tensor? k_end, "
    "SymInt batch, SymInt max_q, SymInt max_k, bool packed, bool causal, SymInt window_left, SymInt window_right, "
    "float scale, float softcap"
)
_LIBRARY.define(
    f"block_sparse_fwd(Tensor q, Tensor k, Tensor v, Tensor? sinks, str impl, {_GEOMETRY}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "block_sparse_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? sinks, "
    f"str impl, {_GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=lse_dtype, device=q.device)
    return o, lse


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dsinks = q.new_empty(0) if sinks is None else torch.empty(sinks.shape, dtype=sinks.dtype, device=sinks.device)
    return dq, dk, dv, dsinks


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, impl: str, *geometry: Any) -> tuple[Tensor, Tensor]:
    g = Geometry(*geometry)
    module = _resolve(q, k, v, g, impl)
    if q.numel() == 0 or k.numel() == 0:
        o, lse = _empty_results(q, v)
        return o.zero_(), lse.fill_(-math.inf)
    return module.forward(q, k, v, sinks, g)


def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    impl: str,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = Geometry(*geometry)
    module = _resolve(q, k, v, g, impl)
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv, dsinks = _empty_gradients(q, k, v, sinks)
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks.zero_()
    # lse.sum() sends back one number with zero strides; the kernels index it like the LSE itself.
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dsinks = module.backward(do, dlse, q, k, v, o, lse, sinks, g)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


def _backward_fake(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v, sinks)


_LIBRARY.impl("block_sparse_fwd", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("block_sparse_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("sparseattn::block_sparse_fwd", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sparseattn::block_sparse_bwd", _backward_fake, lib=_LIBRARY)
_forward_op = torch.ops.sparseattn.block_sparse_fwd.default
_backward_op = torch.ops.sparseattn.block_sparse_bwd.default


def _with_transposed(g: Geometry, mask: BlockMask) -> Geometry:
    q_num_blocks, q_indices = mask.transposed()
    return g._replace(q_num_blocks=q_num_blocks, q_indices=q_indices)


def _without_transposed(g: Geometry) -> Geometry:
    return g._replace(q_num_blocks=None, q_indices=None)


class _BlockSparse(torch.autograd.Function):
    """Ties the two operators together; arguments after ``impl`` are a Geometry, flattened."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, impl: str, *geometry: Any
    ) -> tuple[Tensor, Tensor]:
        g = Geometry(*geometry)
        o, lse = _forward_op(q, k, v, sinks, impl, *_without_transposed(g))
        ctx.save_for_backward(q, k, v, o, lse, sinks, *g[:4], *g[6:10])
        ctx.numbers = (impl, g[4:6], g[10:])
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, o, lse, sinks, *tensors = ctx.saved_tensors
        impl, blocks, rest = ctx.numbers
        if do is None:
            do = torch.zeros_like(o)
        dq, dk, dv, dsinks = _backward_op(
            do, dlse, q, k, v, o, lse, sinks, impl, *tensors[:4], *blocks, *tensors[4:], *rest
        )
        return dq, dk, dv, None if sinks is None else dsinks, None, *([None] * len(Geometry._fields))
