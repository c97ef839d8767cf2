"""One block-sparse forward pass made again and again with other tensors, as a model's layers do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.kernels.launches import Kept, Launches, Recorded, Room, Store, form_of, recording
from sparseattn.kernels.rehearsal import rehearse
from sparseattn.kernels.usual import Usual
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.dispatch import implementations, on_its_device, require
from sparseattn.ops.results import empty_lse, empty_results

PACKAGE = "sparseattn.ops.block_sparse"


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
        self._g, self._impl, self._room = g, impl, Room() if fixed else None
        self._fixed = {name: x for name, x in zip(g._fields, g, strict=True) if isinstance(x, Tensor)}
        self._places = {name: t.data_ptr() for name, t in self._fixed.items()}
        self._form = (impl, *(form_of(x) if isinstance(x, Tensor) else x for x in g))
        self._known: dict[tuple[Any, ...], Recorded] = {}

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

    def usual(
        self, tensors: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, result: Tensor,
        lse: Tensor,
    ) -> Usual | None:  # fmt: skip
        """What makes again a call without sinks, where nobody wants its LSE; None if nothing can.

        Args:
            tensors: Queries, keys and values as the caller's caller gives them, by which calls will be known.
            q: As in the call, like ``k``, ``v`` and ``out``.
            k: As there.
            v: As there.
            out: As there.
            result: What later outputs look like; it lies where the call's output does.
            lse: The call's LSE.
        """
        known = self._known.get(_key(q, k, v, None, out))
        if known is None or known.kept is None or not result.is_contiguous() or lse.dtype != torch.float32:
            return None
        names = zip(("q", "k", "v"), (q, k, v), tensors, strict=True)
        origins = {name: (at, t.data_ptr() - of.data_ptr()) for at, (name, t, of) in enumerate(names)}
        return Usual(known, tensors, origins, self._places, tuple(result.shape), ("o", "lse"), lse.numel())

    @on_its_device
    def _slowly(
        self, q: Tensor, key: tuple[Any, ...], k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A call of a form that this geometry has not recorded, or on another GPU than the current one."""
        known = self._known.get(key) or _recorded.get((self._form, key))
        if known is None:
            return self._first(key, q, k, v, sinks, out)
        if self._room and known.kept is None:
            known = known._replace(kept=Kept(self._room))
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
        kind = kind_of(q, k, v, sinks, self._g)
        rehearse(module, kind, q.device, lambda: into(*tensors, sinks, self._g))
        record = Launches(_moving(q, k, v, sinks, o, lse) | self._fixed)
        with recording(record):
            into(*tensors, sinks, self._g)
        closed = record.close()
        if closed is not None:
            found = Recorded(closed, v.shape[-1])
            _recorded.keep((self._form, key), found)
            self._known[key] = found._replace(kept=Kept(self._room)) if self._room else found
        return o, lse


def kind_of(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, g: Geometry) -> tuple[Any, ...]:
    """What of a call decides which kernels it launches, and no number that changes with a prompt."""
    heads = None if g.kv_num_blocks is None else g.kv_num_blocks.shape[1]
    given = [x if isinstance(x, bool) else x is None for x in g if x is None or isinstance(x, (bool, Tensor))]
    numbers = (g.block_q, g.block_kv, g.window_left >= 0, g.window_right >= 0, g.softcap > 0)
    return q.dtype, q.shape[-2:], k.shape[-2], v.shape[-1], sinks is None, heads, *given, *numbers


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
