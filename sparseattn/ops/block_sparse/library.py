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

from sparseattn.kernels.launches import repeatable
from sparseattn.kernels.rehearsal import rehearse
from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.block_sparse.repeat import PACKAGE, RepeatedBlocks, kind_of
from sparseattn.ops.block_sparse.tiles import tiling_of
from sparseattn.ops.dispatch import implementations, on_its_device, require, resolve
from sparseattn.ops.results import empty_results


def _tried(impl: str, q: Tensor, v: Tensor, g: Geometry, gradients: str | None) -> tuple[str, ...]:
    """What a call tries, in this order.

    For gradients of small blocks at head dims up to 64 "auto" tries Triton first: of 64 x 64 at 16K tokens on an H200
    it takes .66 to .80 of the time of Gluon, whose tiles hold several blocks of which a step may need one.
    """
    names = implementations(impl, q)
    blocks = g.kv_num_blocks is not None and g.row_pieces is None and bool(g.block_q % 64 or g.block_kv % 128)
    if impl == "auto" and gradients is not None and blocks and max(q.shape[-1], v.shape[-1]) <= 64:
        names = (*(name for name in names if name != "gluon"), *(name for name in names if name == "gluon"))
    return names


def resolve_call(
    q: Tensor, k: Tensor, v: Tensor, g: Geometry, impl: str, gradients: str | None = None
) -> tuple[Any, str | None]:
    """The module of the implementation that ``impl`` means for a call, or why there is none.

    ``gradients`` asks for the backward pass as well: in the "fast" or the "deterministic" form.
    """
    return resolve(PACKAGE, _tried(impl, q, v, g, gradients), q, k, v, g, gradients)


def _require(q: Tensor, k: Tensor, v: Tensor, g: Geometry, impl: str, gradients: str | None = None) -> Any:
    of = "call, gradients included" if gradients else "call"
    return require(PACKAGE, impl, _tried(impl, q, v, g, gradients), q, k, v, g, gradients, of=of)


def gradients_form(deterministic: bool) -> str:
    """Which backward pass a call asks for."""
    return "deterministic" if deterministic else "fast"


_LIBRARY = torch.library.Library("sparseattn", "FRAGMENT")
_GEOMETRY = (
    "Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? q_num_blocks, Tensor? q_indices, "
    "SymInt block_q, SymInt block_kv, Tensor? q_start, Tensor? q_end, Tensor? k_start, Tensor? k_end, "
    "SymInt batch, SymInt max_q, SymInt max_k, bool packed, bool causal, SymInt window_left, SymInt window_right, "
    "float scale, float softcap, Tensor? column_counts, Tensor? column_indices, bool mean_correction, "
    "Tensor? row_pieces, Tensor? key_pieces"
)
_LIBRARY.define(
    f"block_sparse_fwd(Tensor q, Tensor k, Tensor v, Tensor? sinks, str impl, {_GEOMETRY}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "block_sparse_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? sinks, "
    f"str impl, bool deterministic, {_GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dsinks = q.new_empty(0) if sinks is None else torch.empty(sinks.shape, dtype=sinks.dtype, device=sinks.device)
    return dq, dk, dv, dsinks


@on_its_device
def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, impl: str, *geometry: Any) -> tuple[Tensor, Tensor]:
    g = Geometry(*geometry)
    module = _require(q, k, v, g, impl)
    if q.numel() == 0 or k.numel() == 0:
        o, lse = empty_results(q, v.shape[-1])
        return o.zero_(), lse.fill_(-math.inf)
    return module.forward(q, k, v, sinks, g)


@on_its_device
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
    deterministic: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = Geometry(*geometry)
    module = _require(q, k, v, g, impl, gradients_form(deterministic))
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv, dsinks = _empty_gradients(q, k, v, sinks)
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks.zero_()
    # lse.sum() sends back one number with zero strides; the kernels index it like the LSE itself.
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dsinks = module.backward(do, dlse, q, k, v, o, lse, sinks, g, deterministic=deterministic)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_results(q, v.shape[-1])


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    mask: BlockMask | VariableBlockMask | None,
    g: Geometry,
    impl: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Run the forward operator, tied to the backward one only if a gradient will be asked for."""
    sinks = None if sinks is None else sinks.contiguous()  # kernels count on it
    wanted = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    if not (torch.is_grad_enabled() and wanted):
        return _attend(q, k, v, sinks, impl, g)
    module = None
    if not torch.compiler.is_compiling():
        # Said now, not when gradients are asked for.
        module = _require(q, k, v, g, impl, gradients_form(deterministic))
    if mask is not None and implementations(impl, q) != ("reference",):
        g = with_transposed(g, mask)
    if module is not None and repeatable(q, k, v, sinks):
        _rehearse_gradients(module, q, k, v, sinks, g, impl, deterministic)
    return BlockSparse.apply(q, k, v, sinks, impl, deterministic, *g)


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, impl: str, g: Geometry) -> tuple[Tensor, Tensor]:
    """The forward operator, past PyTorch's dispatcher where nobody traces the call."""
    if repeatable(q, k, v, sinks):
        return RepeatedBlocks(g, impl)(q, k, v, sinks)
    return _forward_op(q, k, v, sinks, impl, *g)


@on_its_device
def _rehearse_gradients(
    module: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, g: Geometry, impl: str, deterministic: bool
) -> None:
    """Compile the kernels of both passes side by side; see ``rehearse``. ``module`` is the backward pass's."""
    alone = g._replace(q_num_blocks=None, q_indices=None, key_pieces=None)

    def backward() -> None:
        o, lse = empty_results(q, v.shape[-1])
        module.backward(torch.empty_like(o), None, q, k, v, o, lse, sinks, g, deterministic=deterministic)

    def forward() -> None:
        _require(q, k, v, alone, impl).forward(q, k, v, sinks, alone)

    if not g.extra_keys and q.numel() > 0 and k.numel() > 0:
        rehearse(module, (deterministic, *kind_of(q, k, v, sinks, g)), q.device, backward, forward)


def with_transposed(g: Geometry, mask: BlockMask | VariableBlockMask) -> Geometry:
    """Add the lists that the backward kernels walk; the reference needs none."""
    if isinstance(mask, VariableBlockMask):
        tiling = tiling_of(mask, (g.block_q, g.block_kv), transposed=True)
        return g._replace(q_num_blocks=tiling.counts, q_indices=tiling.tiles, key_pieces=tiling.pieces)
    q_num_blocks, q_indices = mask.transposed()
    return g._replace(q_num_blocks=q_num_blocks, q_indices=q_indices)


# Fields of a Geometry that autograd must keep as tensors.
_TENSORS = tuple(i for i, field in enumerate(_GEOMETRY.split(", ")) if field.startswith("Tensor"))


class BlockSparse(torch.autograd.Function):
    """Ties the two operators together; arguments after ``deterministic`` are a Geometry, flattened."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, impl: str, deterministic: bool, *geometry: Any
    ) -> tuple[Tensor, Tensor]:
        g = Geometry(*geometry)
        forward = g._replace(q_num_blocks=None, q_indices=None, key_pieces=None)
        o, lse = _attend(q, k, v, sinks, impl, forward)
        ctx.save_for_backward(q, k, v, o, lse, sinks, *(g[i] for i in _TENSORS))
        ctx.numbers = (impl, deterministic, [None if i in _TENSORS else x for i, x in enumerate(g)])
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, o, lse, sinks, *tensors = ctx.saved_tensors
        impl, deterministic, geometry = ctx.numbers
        geometry = list(geometry)
        for i, t in zip(_TENSORS, tensors, strict=True):
            geometry[i] = t
        if do is None:
            do = torch.zeros_like(o)
        dq, dk, dv, dsinks = _backward_op(do, dlse, q, k, v, o, lse, sinks, impl, deterministic, *geometry)
        return dq, dk, dv, None if sinks is None else dsinks, None, None, *([None] * len(Geometry._fields))
