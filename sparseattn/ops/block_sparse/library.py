"""The operators as torch knows them: choice of implementation, schemas, shapes for tracing, and autograd.

One registered operator forward and one backward, however many kernels run inside; the implementation is chosen inside
them, so a traced graph holds no trace of Triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse.geometry import Geometry


def choose(q: Tensor, impl: str) -> str:
    """The implementation that "auto" means: one per device, so that nothing is ever slow without being asked to."""
    if impl != "auto":
        return impl
    return "triton" if q.is_cuda else "reference"


def load_implementation(name: str, q: Tensor, k: Tensor, v: Tensor, g: Geometry) -> tuple[Any, str | None]:
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
    name = choose(q, impl)
    module, reason = load_implementation(name, q, k, v, g)
    if reason is not None:
        raise argument_error(
            "impl",
            "an implementation that can run this call",
            f"{impl!r}, where {name} cannot: {reason}",
            'impl="reference" runs anything, slowly.',
        )
    return module


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


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: BlockMask | None, g: Geometry, impl: str
) -> tuple[Tensor, Tensor]:
    """Run the forward operator, tied to the backward one only if a gradient will be asked for."""
    wanted = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    if not (torch.is_grad_enabled() and wanted):
        return _forward_op(q, k, v, sinks, impl, *g)
    if mask is not None and choose(q, impl) == "triton":
        g = with_transposed(g, mask)
    return BlockSparse.apply(q, k, v, sinks, impl, *g)


def with_transposed(g: Geometry, mask: BlockMask) -> Geometry:
    """Add the lists that the backward kernels walk; the reference needs none."""
    q_num_blocks, q_indices = mask.transposed()
    return g._replace(q_num_blocks=q_num_blocks, q_indices=q_indices)


class BlockSparse(torch.autograd.Function):
    """Ties the two operators together; arguments after ``impl`` are a Geometry, flattened."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, impl: str, *geometry: Any
    ) -> tuple[Tensor, Tensor]:
        g = Geometry(*geometry)
        o, lse = _forward_op(q, k, v, sinks, impl, *g._replace(q_num_blocks=None, q_indices=None))
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
