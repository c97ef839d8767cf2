"""Landmark scores: what a few clusters of each key block say about the largest probability a query gives the block.

Validation, dispatch and the registered operator; ``landmark_reference`` defines the numbers and ``landmark_triton``
computes them on a GPU. The method is this library's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.kernels.rehearsal import rehearse
from sparseattn.ops.dispatch import check_impl, implementations, on_its_device, require, resolve
from sparseattn.ops.scores.landmark_problem import LandmarkFeatures, LandmarkProblem, landmark_bounds
from sparseattn.ops.scores.problem import check_max_blocks
from sparseattn.ops.sequences import LAYOUT_SCHEMA, Sequences, flatten, resolve_sequences, unflatten

BLOCK_SIZES = (64, 128)
CLUSTERS = (2, 4, 8, 16)
ROWS = (16, 32, 64, 128)
IMPLEMENTATIONS = ("gluon", "triton", "reference")
_MODULES = "sparseattn.ops.scores.landmark_{}"


@on_its_device
def landmark_features(
    k: Tensor,
    *,
    block_size: int = 128,
    clusters: int | None = None,
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> LandmarkFeatures:
    """Cluster the keys of every block by content: the part of the method that depends on keys alone.

    Of the n keys of a block, the one nearest to their mean is the first centre and the one farthest from all centres
    the next, ``clusters`` times (greedy k-center). Keys go to their nearest centre, then once more to the nearest mean
    (one Lloyd pass), and the means of the result are the landmarks. An outlier, such as a sink, ends as a cluster of
    its own and is exact. Each block is on its own: the landmarks of a complete block never change as a sequence grows.

    Args:
        k: ``[B, Sk, Hkv, D]``, or packed ``[total_k, Hkv, D]`` with ``sequences``; any float dtype.
        block_size: 64 or 128.
        clusters: Clusters of a block: 2, 4, 8 or 16; default ``block_size // 16``.
        sequences: The layout of a ragged batch; its queries are not looked at. Default: every row is valid.
        impl: "auto" (on CUDA Gluon where it can, else Triton; reference elsewhere), "gluon" (Hopper), "triton" or
            "reference".

    Returns:
        The features of ``ceil(max_k / block_size)`` blocks.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: A dtype that is not floating point.
    """
    s = resolve_sequences(k, k) if sequences is None else sequences
    _check_keys(k, s)
    clusters = _check_sizes(block_size, clusters)
    return _implementation(impl, k, k, False).features(k.detach(), s, block_size, clusters)


@on_its_device
def landmark_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 128,
    clusters: int | None = None,
    rows: int | None = None,
    causal: bool = True,
    keep_sink: bool | None = None,
    fp8: bool = False,
    group_shared: bool = False,
    scale: float | None = None,
    sequences: Sequences | None = None,
    features: LandmarkFeatures | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log of the largest estimated probability that a scored row of each query block gives each key block.

    A cluster with centroid c, n keys and variance v per dimension weighs as much for a query q as the largest of n keys
    spread around c like an isotropic Gaussian would: ``scale * q.c + |scale| * |q| * sqrt(2 ln(n) v)``. A block weighs
    the logsumexp over its clusters. Forced blocks (the first one and the diagonal's) weigh what they do exactly,
    causality included. With a row's denominator over all of them, the score is the maximum over the scored rows.

    Memory is ``4 * B * H * MB * NB`` bytes; :func:`landmark_blocks` with a threshold needs none of it.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``sequences``; any float dtype.
        k: ``[B, Sk, Hkv, D]`` or packed; Hq a multiple of Hkv.
        block_size: 64 or 128.
        clusters: As in :func:`landmark_features`.
        rows: Scored rows of a query block: a power of two from 16 to ``block_size``, which scores all of them; default
            half of them. Those are scored whose distance from their block's mean, weighed by the covariance of the
            landmarks before the block, is largest (ties: earlier first).
        causal: Bottom-right aligned causality.
        keep_sink: The first block is forced, hence exact. None: in causal calls.
        fp8: Round centroids and queries to float8_e4m3fn, each with a scale of its own, before their product.
        group_shared: Maxima over the query heads of each KV head.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        sequences: The layout of a ragged batch.
        features: Those of ``k``, if they are known already. Causal calls need those of complete blocks alone.
        impl: As in :func:`landmark_features`.

    Returns:
        float32 ``[B, H, MB, NB]`` (the reference keeps float64 for float64 inputs), H = Hq or, shared, Hkv. -inf for
        blocks that are forced or not visible, and for probabilities below about 1e-38.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    p = _problem(q, k, block_size, clusters, rows, causal, keep_sink, 0, fp8, group_shared, scale, sequences)
    _check_features(features, k, p)
    module = _implementation(impl, q, k, fp8)
    q, k = q.detach(), k.detach()
    if features is None:
        features = module.features(k, p.sequences, p.block_size, p.clusters)
    return module.scores(q, k, features, p, landmark_bounds(p, q.device))


def landmark_blocks(
    q: Tensor,
    k: Tensor,
    tau: float | Sequence[float] = 0.3,
    *,
    density: float | None = None,
    block_size: int = 128,
    clusters: int | None = None,
    rows: int | None = None,
    causal: bool = True,
    keep_sink: bool | None = None,
    floor: int = 4,
    fp8: bool = False,
    group_shared: bool = False,
    max_blocks: int | None = None,
    scale: float | None = None,
    sequences: Sequences | None = None,
    features: LandmarkFeatures | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Keep the forced blocks and those that some scored row gives at least ``tau`` of its mass, by estimate.

    The operator is ``torch.ops.sparseattn.landmark_blocks``.

    Args:
        q: As in :func:`landmark_scores`, like the arguments not named here.
        k: Keys.
        tau: Probability in [0, 1], one number or one per query head. 0 keeps every visible block.
        density: Share in (0, 1] of the visible blocks of a sequence to keep, all heads together, forced ones included;
            replaces ``tau`` by the threshold that keeps as many. Blocks that tie at it are kept if all of them fit.
        block_size: 64 or 128.
        clusters: Clusters of a block.
        rows: Scored rows of a query block.
        causal: Bottom-right aligned causality; the diagonal's blocks are forced.
        keep_sink: The first block is forced. None: in causal calls.
        floor: Query blocks that see at most this many blocks keep them all.
        fp8: Products of centroids and queries in float8_e4m3fn.
        group_shared: One list for the query heads of a KV head: a block is kept if any of them keeps it (density: by
            the largest score).
        max_blocks: No list is longer, but for its forced blocks: the blocks stay whose probability is most over ``tau``
            (which counts as e^-128 where it is 0), the lower ones among equals. None: ``MAX_BLOCKS``, or
            ``density`` of all blocks if that is more.
        scale: Factor on q . k.
        sequences: The layout of a ragged batch.
        features: Those of ``k``, if known.
        impl: The implementation.

    Returns:
        counts int32 ``[B, H, MB]`` and indices int32 ``[B, H, MB, K]``: ascending, undefined past the count; K is the
        cap where there are more blocks. Rows past the end of a sequence, and rows that see no key, have count 0.

    Raises:
        ValueError: A shape, value or implementation that does not fit.
        TypeError: dtypes that differ or are not floating point.
    """
    p = _problem(q, k, block_size, clusters, rows, causal, keep_sink, floor, fp8, group_shared, scale, sequences)
    _check_features(features, k, p)
    taus = check_taus(tau, q.shape[-2])
    check_density(density)
    check_max_blocks(max_blocks)
    # The rest of the choice happens inside the operator, where a compiler does not look.
    check_impl(impl, IMPLEMENTATIONS)
    s = p.sequences
    centroids, spreads, sizes = (None, None, None) if features is None else features
    return torch.ops.sparseattn.landmark_blocks(
        q.detach(), k.detach(), centroids, spreads, sizes, *flatten(s), list(taus), density,
        p.block_size, p.clusters, p.rows, p.causal, p.keep_sink, p.floor, p.fp8,
        p.group_shared, p.scale, max_blocks, impl,
    )  # fmt: skip


def unsupported_landmark_reason(q: Tensor, k: Tensor, *, fp8: bool = False, impl: str) -> str | None:
    """Why ``impl`` cannot score q and k, or None."""
    check_impl(impl, IMPLEMENTATIONS)
    return resolve(_MODULES, implementations(impl, q), q, k, fp8)[1]


def check_taus(tau: float | Sequence[float], heads: int) -> tuple[float, ...]:
    """Validate a threshold or one per head; a tuple of one number or of ``heads``."""
    values = tuple(tau) if isinstance(tau, Sequence) else (tau,)
    if isinstance(tau, Sequence) and len(values) != heads:
        raise argument_error("tau", f"a number or {heads} numbers, one per query head", f"{len(values)} numbers")
    for value in values:
        check_tau(value)
    return tuple(float(value) for value in values)


def check_tau(value: object) -> None:
    """Raise unless ``value`` is a number in [0, 1]; NaN is not."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise argument_error("tau", "a number in [0, 1]", repr(value))


def check_density(value: object) -> None:
    """Raise unless ``value`` is None or a number in (0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and (not number or not 0.0 < value <= 1.0):  # type: ignore[operator]
        raise argument_error("density", "None or a number in (0, 1]", repr(value))


def _check_sizes(block_size: int, clusters: int | None) -> int:
    if block_size not in BLOCK_SIZES:
        raise argument_error("block_size", f"one of {BLOCK_SIZES}", block_size)
    clusters = block_size // 16 if clusters is None else clusters
    if isinstance(clusters, bool) or clusters not in CLUSTERS:
        raise argument_error("clusters", f"one of {CLUSTERS}", clusters)
    return clusters


def _check_keys(k: Tensor, s: Sequences) -> None:
    if not k.is_floating_point():
        raise argument_error("k", "a floating-point tensor", k.dtype, kind=TypeError)
    if k.dim() != (3 if s.packed else 4):
        raise argument_error("k", "[B, Sk, Hkv, D], or [total, Hkv, D] when packed", f"shape {tuple(k.shape)}")
    if k.shape[-1] == 0 or k.shape[-2] == 0:
        raise argument_error("k", "at least one head and a positive head_dim", f"shape {tuple(k.shape)}")


def _problem(
    q: Tensor,
    k: Tensor,
    block_size: int,
    clusters: int | None,
    rows: int | None,
    causal: bool,
    keep_sink: bool | None,
    floor: int,
    fp8: bool,
    group_shared: bool,
    scale: float | None,
    sequences: Sequences | None,
) -> LandmarkProblem:
    s = resolve_sequences(q, k) if sequences is None else sequences
    _check_keys(k, s)
    if not q.is_floating_point():
        raise argument_error("q", "a floating-point tensor", q.dtype, kind=TypeError)
    if k.dtype != q.dtype:
        raise argument_error("k", f"dtype {q.dtype} like q", k.dtype, "Cast one of them.", kind=TypeError)
    if k.device != q.device:
        raise argument_error("k", f"device {q.device} like q", k.device)
    if k.shape[-1] != q.shape[-1]:
        raise argument_error("k", f"a positive head_dim equal to q's {q.shape[-1]}", k.shape[-1])
    if q.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise argument_error("q", f"heads that are a multiple of k's {k.shape[-2]}", q.shape[-2])
    clusters = _check_sizes(block_size, clusters)
    rows = block_size // 2 if rows is None else rows
    if isinstance(rows, bool) or rows not in ROWS or rows > block_size:
        choices = tuple(r for r in ROWS if r <= block_size)
        raise argument_error("rows", f"one of {choices}, {block_size} being all of them", rows)
    if isinstance(floor, bool) or not isinstance(floor, int) or floor < 0:
        raise argument_error("floor", "an int >= 0", repr(floor))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise argument_error("scale", "a finite number", scale)
    keep_sink = causal if keep_sink is None else keep_sink
    return LandmarkProblem(s, block_size, clusters, rows, causal, keep_sink, floor, fp8, group_shared, scale)


def _check_features(features: LandmarkFeatures | None, k: Tensor, p: LandmarkProblem) -> None:
    if features is None:
        return
    needed = p.sequences.max_k // p.block_size if p.causal else p.num_kv_blocks
    blocks = features.centroids.shape[2] if features.centroids.dim() == 5 else -1
    shape = (p.sequences.batch, k.shape[-2], max(blocks, needed), p.clusters)
    for name, t, expected in (
        ("centroids", features.centroids, (*shape, k.shape[-1])),
        ("spreads", features.spreads, shape),
        ("sizes", features.sizes, shape),
    ):
        if tuple(t.shape) != expected:
            hint = f"The landmarks of {needed} blocks are needed, with {p.clusters} clusters each."
            raise argument_error(f"features.{name}", f"shape {expected}", f"shape {tuple(t.shape)}", hint)
        if t.device != k.device:
            raise argument_error(f"features.{name}", f"device {k.device} like k", t.device)
    if features.centroids.dtype != k.dtype:
        raise argument_error("features.centroids", f"{k.dtype} like k", features.centroids.dtype, kind=TypeError)


def _implementation(impl: str, q: Tensor, k: Tensor, fp8: bool) -> ModuleType:
    """The implementation asked for, or the device's; raises if it refuses."""
    check_impl(impl, IMPLEMENTATIONS)
    return require(_MODULES, impl, implementations(impl, q), q, k, fp8)


class _Call(NamedTuple):
    """Arguments of the registered operator after q and k."""

    centroids: Tensor | None
    spreads: Tensor | None
    sizes: Tensor | None
    q_start: Tensor | None
    q_end: Tensor | None
    k_start: Tensor | None
    k_end: Tensor | None
    batch: int
    max_q: int
    max_k: int
    tau: list[float]
    density: float | None
    block_size: int
    clusters: int
    rows: int
    causal: bool
    keep_sink: bool
    floor: int
    fp8: bool
    group_shared: bool
    scale: float
    max_blocks: int | None
    impl: str

    def problem(self, s: Sequences) -> LandmarkProblem:
        """The problem of a layout."""
        return LandmarkProblem(s, *(getattr(self, name) for name in LandmarkProblem._fields[1:]))


torch.library.define(
    "sparseattn::landmark_blocks",
    f"(Tensor q, Tensor k, Tensor? centroids, Tensor? spreads, Tensor? sizes, {LAYOUT_SCHEMA}, float[] tau, "
    "float? density, int block_size, int clusters, int rows, bool causal, bool keep_sink, int floor, bool fp8, "
    "bool group_shared, float scale, int? max_blocks, str impl) -> (Tensor, Tensor)",
)


@torch.library.impl("sparseattn::landmark_blocks", "CompositeExplicitAutograd")
@on_its_device
def _landmark_blocks(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    c = _Call(*arguments)
    s = unflatten(q, c)
    module = _implementation(c.impl, q, k, c.fp8)
    given = (c.centroids is None, c.q_start is None, c.k_start is None, len(c.tau), c.density is None, c.max_blocks)
    kind = (q.dtype, q.shape[-2:], k.shape[-2], *given, *c.problem(s)[1:-1])
    rehearse(module, kind, q.device, lambda: _choose(module, q, k, c, s))
    return _choose(module, q, k, c, s)


def _choose(module: ModuleType, q: Tensor, k: Tensor, c: _Call, s: Sequences) -> tuple[Tensor, Tensor]:
    p = c.problem(s)
    if c.centroids is None or c.spreads is None or c.sizes is None:
        features = module.features(k, s, c.block_size, c.clusters)
    else:
        features = LandmarkFeatures(c.centroids, c.spreads, c.sizes)
    bounds = landmark_bounds(p, q.device)
    return module.blocks(q, k, features, p, bounds, tuple(c.tau), c.density)


@torch.library.register_fake("sparseattn::landmark_blocks")
def _landmark_blocks_fake(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    c = _Call(*arguments)
    p = c.problem(unflatten(q, c))
    shape = (c.batch, p.mask_heads(q, k), p.num_q_blocks)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty((*shape, p.width(c.density)), dtype=torch.int32)
