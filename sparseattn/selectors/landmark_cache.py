"""Landmarks kept beside a KV cache: each block of keys is clustered once, when its last key arrives."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.scores import LandmarkFeatures, landmark_features
from sparseattn.selectors.base import check_config
from sparseattn.selectors.landmark import LandmarkConfig


class LandmarkCache:
    """The landmarks of the keys seen so far, for chunked prefill and decoding. One per layer.

    Lists selected with its features are, bit for bit, those selected without, since the landmarks of a complete block
    depend on its keys alone and causal calls look at no others. All sequences of the batch grow together; ragged
    batches select without a cache.

    Example:
        >>> cache = LandmarkCache()
        >>> for q, k in chunks:
        ...     keys = torch.cat([keys, k], 1)
        ...     mask = landmark(q, keys, features=cache.append(k))

    Args:
        config: The options of the calls it serves; default ``LandmarkConfig()``.
        impl: As in :func:`sparseattn.selectors.landmark`.

    Attributes:
        num_keys: Keys seen so far.
    """

    def __init__(self, config: LandmarkConfig | None = None, impl: str = "auto") -> None:
        self.config = LandmarkConfig() if config is None else config
        check_config(self.config, LandmarkConfig)
        self.impl = impl
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.num_keys = 0
        self._features: LandmarkFeatures | None = None
        self._tail: Tensor | None = None

    @property
    def features(self) -> LandmarkFeatures:
        """The landmarks of the complete blocks seen so far.

        Raises:
            ValueError: Nothing was appended yet.
        """
        if self._features is None:
            raise argument_error("features", "keys appended before", "an empty cache")
        return self._features

    def append(self, k: Tensor) -> LandmarkFeatures:
        """Take the next keys.

        Args:
            k: ``[B, S, Hkv, D]``, the keys that follow those appended before; S may be anything.

        Returns:
            The landmarks of all complete blocks, the ``features`` of a call with all keys so far.

        Raises:
            ValueError: A shape, dtype or device that does not follow the keys before.
        """
        size = self.config.block_size
        k = k.detach()
        if k.dim() != 4:
            raise argument_error("k", "[B, S, Hkv, D]", f"shape {tuple(k.shape)}", "Packed batches need no cache.")
        if self._tail is not None:
            known = self._tail
            for name, expected, got in (
                ("batch, heads and head_dim", (known.shape[0], *known.shape[2:]), (k.shape[0], *k.shape[2:])),
                ("dtype", known.dtype, k.dtype),
                ("device", known.device, k.device),
            ):
                if expected != got:
                    raise argument_error("k", f"{name} {expected} like the keys before", got, "reset() starts anew.")
            self.num_keys += k.shape[1]
            k = torch.cat([known, k], 1)
        else:
            self.num_keys = k.shape[1]
        whole = k.shape[1] // size * size
        if whole or self._features is None:
            new = landmark_features(k[:, :whole], block_size=size, clusters=self.config.clusters, impl=self.impl)
            if self._features is not None:
                new = LandmarkFeatures(*(torch.cat(pair, 2) for pair in zip(self._features, new, strict=True)))
            self._features = new
        self._tail = k[:, whole:].clone()  # a view would keep the whole chunk alive
        return self.features
