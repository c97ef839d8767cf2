"""One block-sparse forward pass made again and again with other tensors, as a model's layers do."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.kernels.launches import (
    Launches,
    Recorded,
    Store,
    differentiable,
    form_of,
    free_stream,
    recording,
    repeatable,
)
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.dispatch import implementations, on_its_device, require
from sparseattn.ops.results import empty_lse, empty_results

PACKAGE = "sparseattn.ops.block_sparse"


class _Usual(NamedTuple):
    """A recorded call of queries, keys and values whose LSE, of so many rows, nobody wants: sums by stream take it."""

    recorded: Recorded
    shape: tuple[int, ...]
    rows: int
    sums: dict[int, Tensor]


# Recorded calls of all geometries: what one costs must not be paid again by the next of the same shapes.
_recorded = Store()


class RepeatedBlocks:
    """The forward pass of one geometry, which a caller has checked against the tensors of its calls.

    The first call of a form (shapes, strides, dtypes, devices and alignments of all tensors, and the geometry's
    numbers) finds the implementation. Launches of its kernels are recorded and serve calls like it, of other
    geometries, too.

    Args:
        g: The geometry.
        impl: As in ``block_sparse_attention``.
        fixed: Contents of the geometry's tensors do not change, so that what follows from them alone is computed once.
    """

    def __init__(self, g: Geometry, impl: str, fixed: bool = False) -> None:
        self._g, self._impl, self._kept = g, impl, fixed
        self._fixed = {name: x for name, x in zip(g._fields, g, strict=True) if isinstance(x, Tensor)}
        self._places = {name: t.data_ptr() for name, t in self._fixed.items()}
        self._form = (impl, *(form_of(x) if isinstance(x, Tensor) else x for x in g))
        self._known: dict[tuple[Any, ...], Recorded] = {}
        self._usual: dict[tuple[Any, ...], _Usual] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs and natural-log LSE, without gradients.

        Args:
            q: ``[B, Sq, Hq, D]`` or packed; ``[Sq, Hq, D]`` where the geometry has a batch of 1.
            k: Likewise.
            v: Likewise.
            sinks: float, contiguous, ``[Hq]``, or None.
            out: Where to write; it must fit, and be none of the others.
        """
        device = q.device
        key = _key(q, k, v, sinks, out)
        known = self._known.get(key)
        if known is None or (device.type == "cuda" and device.index != torch._C._cuda_getDevice()):
            return self._slowly(q, key, k, v, sinks, out)
        o, lse = empty_results(q, known.dim) if out is None else (out, empty_lse(q))
        places = {
            "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "o": o.data_ptr(), "lse": lse.data_ptr(),
            **self._places,
        }  # fmt: skip
        if sinks is not None:
            places["sinks"] = sinks.data_ptr()
        if not known.launches.repeat(device, places, known.kept):
            return self._first(key, q, k, v, sinks, out)
        return o, lse

    def again(self, form: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """The contiguous output of a call in a form that ``learn`` knows; None where something is unusual.

        Args:
            form: What the caller calls it: all that launches depend on, which are shapes, strides, dtypes, devices and
                alignments, and what else it varies.
            q: Queries, which lie where those of the call do.
            k: Keys, likewise.
            v: Values, likewise.
        """
        usual = self._usual.get(form)
        if usual is None or not repeatable(q, k, v) or differentiable(q, k, v):
            return None
        device, stream = q.device, free_stream(q.device)
        if stream is None:
            return None
        o = torch.empty(usual.shape, dtype=q.dtype, device=device)
        lse = usual.sums.get(stream)
        if lse is None:
            lse = usual.sums[stream] = torch.empty(usual.rows, dtype=torch.float32, device=device)
        places = {
            "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "o": o.data_ptr(), "lse": lse.data_ptr(),
            **self._places,
        }  # fmt: skip
        return o if usual.recorded.launches.repeat(device, places, usual.recorded.kept) else None

    def learn(
        self, form: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, result: Tensor, lse: Tensor
    ) -> None:
        """Have ``again`` know by ``form`` the call, without sinks, that was made with these tensors.

        Outputs of ``again`` look like ``result``, which lies where the call's output does.
        """
        known = self._known.get(_key(q, k, v, None, out))
        if known is not None and known.kept is not None and result.is_contiguous() and lse.dtype == torch.float32:
            self._usual[form] = _Usual(known, tuple(result.shape), lse.numel(), {})

    @on_its_device
    def _slowly(
        self, q: Tensor, key: tuple[Any, ...], k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A call of a form that this geometry has not recorded, or on another GPU than the current one."""
        known = self._known.get(key) or _recorded.get((self._form, key))
        if known is None:
            return self._first(key, q, k, v, sinks, out)
        if self._kept and known.kept is None:
            known = known._replace(kept={})
        self._known[key] = known
        o, lse = empty_results(q, known.dim) if out is None else (out, empty_lse(q))
        places = {name: t.data_ptr() for name, t in _moving(q, k, v, sinks, o, lse).items()} | self._places
        return (
            (o, lse) if known.launches.repeat(q.device, places, known.kept) else self._first(key, q, k, v, sinks, out)
        )

    def _first(
        self, key: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A call of a form that is not known yet, or that cannot be recorded."""
        o, lse = empty_results(q, v.shape[-1]) if out is None else (out, empty_lse(q))
        tensors = _batched(self._g, q, k, v, o, lse)
        module = require(PACKAGE, self._impl, implementations(self._impl, q), *tensors[:3], self._g, None)
        if q.numel() == 0 or k.numel() == 0:
            return o.zero_(), lse.fill_(-math.inf)
        into = getattr(module, "forward_into", None)
        if into is None or self._g.extra_keys or not module.writable(o):
            results = module.forward(*tensors[:3], sinks, self._g)
            if self._g.packed or q.dim() == 4:
                return results if out is None else (out.copy_(results[0]), results[1])
            return results[0][0] if out is None else out.copy_(results[0][0]), results[1][0]
        record = Launches(_moving(q, k, v, sinks, o, lse) | self._fixed)
        with recording(record):
            into(*tensors, sinks, self._g)
        closed = record.close()
        if closed is not None:
            found = Recorded(closed, v.shape[-1])
            _recorded.keep((self._form, key), found)
            self._known[key] = found._replace(kept={}) if self._kept else found
        return o, lse


def _batched(g: Geometry, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors with a batch dimension, where the geometry has one."""
    return tensors if g.packed or tensors[0].dim() == 4 else tuple(t[None] for t in tensors)


def _moving(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """Tensors whose places change from call to call."""
    named = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "sinks": sinks}
    return {name: t for name, t in named.items() if t is not None}


def _key(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor | None) -> tuple[Any, ...]:
    """All of a call's tensors that launches depend on."""
    return (
        q.shape, q.stride(), q.dtype, q.device, q.data_ptr() & 15, k.shape, k.stride(), k.dtype, k.data_ptr() & 15,
        v.shape, v.stride(), v.dtype, v.data_ptr() & 15, None if sinks is None else form_of(sinks),
        None if out is None else form_of(out),
    )  # fmt: skip
