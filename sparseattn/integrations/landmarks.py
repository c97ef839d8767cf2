"""Landmarks kept beside a Transformers KV cache, so that a chunk of a prompt clusters its own keys and no others.

An attention function is handed keys, not the cache they come from. A forward pre-hook on the attention modules that
select by landmarks therefore looks at the cache before the layer updates it. Where it still holds the very tensor that
was seen last (the same object and version; a crop shows as a view of it), all that was seen is still there, and
an update by one of the cache layers known here appends to it. Whatever else happened to a cache, it holds another
tensor then, and all landmarks are computed again. What is kept hangs on the layer of the cache, and goes with it.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparseattn.integrations.layout import Layout, Spans
from sparseattn.ops.scores import LandmarkFeatures, landmark_features
from sparseattn.ops.sequences import Sequences
from sparseattn.selectors import LandmarkConfig


class _Kept:
    """Landmarks of one layer of a cache.

    Attributes:
        kind: What they were made with.
        spans: Of the keys seen; their complete blocks have landmarks.
        features: With room for more blocks.
        keys: The cache's tensor when it was last seen, weakly.
        version: Its version then.
    """

    def __init__(self, kind: tuple[Any, ...], spans: Spans, features: LandmarkFeatures, keys: Tensor) -> None:
        self.kind, self.spans, self.features = kind, spans, features
        self.see(keys)

    def see(self, keys: Tensor) -> None:
        """Remember the cache's tensor."""
        self.keys, self.version = weakref.ref(keys), keys._version

    def still(self, t: Tensor | None) -> int:
        """How many of the keys seen last ``t`` still begins with; 0 where that is not known."""
        old = self.keys()
        if t is None or old is None or t.is_inference() or t._version != self.version:
            return 0
        # A crop is a view of what was there.
        view = t._base is old and t.storage_offset() == old.storage_offset() and t.stride() == old.stride()
        if t is old or (view and t.shape[:2] == old.shape[:2] and t.shape[3] == old.shape[3]):
            return int(t.shape[2])
        return 0


class _Call(NamedTuple):
    """One forward of an attention module, as its pre-hook saw it; weakly, since it outlives the call.

    Attributes:
        module: The module.
        cache: The cache it was given.
        still: How many keys that were seen before the cache held then.
    """

    module: weakref.ref[nn.Module]
    cache: weakref.ref[Any]
    still: int


class Found(NamedTuple):
    """Landmarks for one call.

    Attributes:
        features: Of all complete blocks, or None: to be computed by the selector.
        how: What was kept, or why nothing was; for the records.
    """

    features: LandmarkFeatures | None
    how: str


_kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()
_call: ContextVar[_Call | None] = ContextVar("sparseattn_landmarks_call", default=None)


def _look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """The pre-hook: note the cache of this forward, and the keys it holds."""
    if torch.compiler.is_compiling():
        return
    cache, index = kwargs.get("past_key_values"), getattr(module, "layer_idx", None)
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or not isinstance(index, int):
        _call.set(None)
        return
    layer = layers[index] if index < len(layers) else None
    kept = None if layer is None else _kept.get(layer)
    still = 0 if layer is None or kept is None else kept.still(layer.keys)
    _call.set(_Call(weakref.ref(module), weakref.ref(cache), still))


def find(
    module: nn.Module,
    key: Tensor,
    k: Tensor,
    q_len: int,
    causal: bool,
    where: Layout,
    config: LandmarkConfig,
    impl: str,
) -> Found:
    """The landmarks of the keys of this call: those kept, and those of the blocks that became complete.

    Args:
        module: The attention module.
        key: ``[B, Hkv, Sk, D]`` as the module handed it over.
        k: ``[B, Sk, Hkv, D]``, in the dtype that is scored.
        q_len: Queries of the call.
        causal: Of the call.
        where: Its layout.
        config: The selector's options.
        impl: The selector's implementation.
    """
    if all(hook is not _look for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_look, with_kwargs=True)
        return Found(None, "first call of this module")
    if not causal or where.packed:
        return Found(None, "packed rows" if where.packed else "not causal")
    layer, still, reason = _layer_of(module, key)
    if reason or where.spans is None:
        return Found(None, reason or "lengths that the device alone knows")
    size, clusters = config.block_size, config.clusters
    if k.shape[1] < size:
        return Found(None, "no complete block")
    kind = (size, clusters, impl, k.dtype, k.device, k.shape[0], *k.shape[2:])
    kept = _kept.get(layer)
    spans, known = where.spans, [0] * k.shape[0]
    if kept is not None and kept.kind == kind and _aligned(kept.spans, spans):
        seen = _still_there(kept, still, key, q_len, where)
        known = [max(0, end - start) // size for start, end in seen]
    needed = [max(0, end - start) // size for start, end in spans]
    known = [min(pair) for pair in zip(known, needed, strict=True)]
    features = _with_room(kept.features if kept is not None and any(known) else None, k, config)
    if needed != known:
        _add(features, k, known, needed, where, config, impl)
    _kept[layer] = _Kept(kind, spans, features, key)
    return Found(features, f"{sum(known)} of {sum(needed)} blocks kept")


def _aligned(kept: Spans, spans: Spans) -> bool:
    """Whether sequences begin where they did, which blocks are counted from; empty ones may begin later."""
    return all(end <= start or start == now for (start, end), (now, _) in zip(kept, spans, strict=True))


def note(module: nn.Module, key: Tensor, q_len: int, where: Layout) -> None:
    """Tell of a call that does not select by landmarks but whose keys join the cache."""
    if _call.get() is None:
        return
    layer, still, reason = _layer_of(module, key)
    kept = None if layer is None else _kept.get(layer)
    if kept is None:
        return
    seen = () if reason else _still_there(kept, still, key, q_len, where)
    if any(end > start for start, end in seen):
        kept.spans = seen
        kept.see(key)
    else:
        del _kept[layer]


def _layer_of(module: nn.Module, key: Tensor) -> tuple[Any, int, str]:
    """The layer of the cache that holds these keys, how many it held before, and why neither is known, if so."""
    if key.is_cuda and torch.cuda.is_current_stream_capturing():
        return None, 0, "a graph that is replayed"
    call = _call.get()
    _call.set(None)  # it speaks of one forward
    cache = None if call is None or call.module() is not module else call.cache()
    if call is None or cache is None or torch._C._current_graph_task_id() != -1:
        return None, 0, "no cache"
    index: Any = module.layer_idx
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is None or type(layer) not in (DynamicLayer, StaticLayer):
        return layer, 0, f"a cache layer of another kind ({type(layer).__name__})"
    if key.is_inference() or torch.is_inference_mode_enabled():
        return layer, 0, "inference mode, which keeps no versions"
    if layer.keys is not key:
        return layer, 0, "keys that are not the cache's own"
    return layer, call.still, ""


def _still_there(kept: _Kept, still: int, key: Tensor, q_len: int, where: Layout) -> Spans:
    """What of the kept spans is still the beginning of ``key``, which is the cache's after its update."""
    if key is kept.keys():
        # The tensor of a static layer, written in place once a call, where the queries of the mask say.
        written = key._version - kept.version
        if still and written:
            still = where.seen - q_len if written == 1 and where.seen is not None else 0
    return tuple((start, max(start, min(end, still))) for start, end in kept.spans)


def _with_room(features: LandmarkFeatures | None, k: Tensor, config: LandmarkConfig) -> LandmarkFeatures:
    """Features for all complete blocks of ``k``, with those given at the start; a growing cache gets some to spare."""
    blocks = k.shape[1] // config.block_size
    if features is not None and features.centroids.shape[2] >= blocks:
        return features
    if features is not None:
        blocks = max(blocks, features.centroids.shape[2] * 5 // 4)
    clusters = config.clusters or config.block_size // 16
    shape = (k.shape[0], k.shape[2], blocks, clusters)
    spread_dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    room = LandmarkFeatures(
        k.new_zeros((*shape, k.shape[3])), k.new_zeros(shape, dtype=spread_dtype), k.new_zeros(shape, dtype=torch.int32)
    )
    if features is not None:
        for new, old in zip(room, features, strict=True):
            new[:, :, : old.shape[2]] = old
    return room


def _add(
    features: LandmarkFeatures, k: Tensor, known: list[int], needed: list[int], where: Layout, config: LandmarkConfig,
    impl: str,
) -> None:  # fmt: skip
    """Write the landmarks of the blocks ``known .. needed`` of every sequence."""
    size, clusters = config.block_size, config.clusters
    ranges = where.arguments.get("ranges_k")
    if ranges is None:
        first, last = known[0], needed[0]
        new = landmark_features(k[:, first * size : last * size], block_size=size, clusters=clusters, impl=impl)
        for target, part in zip(features, new, strict=True):
            target[:, :, first:last] = part
        return
    # Numbers go to the device as arguments of kernels: a tensor of them would have to be waited for.
    start = torch.stack([ranges[b, 0] + n * size for b, n in enumerate(known)])
    stop = torch.stack([ranges[b, 0] + n * size for b, n in enumerate(needed)])
    longest = max(n - m for m, n in zip(known, needed, strict=True)) * size
    s = Sequences(k.shape[0], longest, longest, start, stop, start, stop, False)
    new = landmark_features(k, block_size=size, clusters=clusters, sequences=s, impl=impl)
    for b, (first, last) in enumerate(zip(known, needed, strict=True)):
        for target, part in zip(features, new, strict=True):
            target[b, :, first:last] = part[b, :, : last - first]
