"""Triton landmark scores (Ampere and newer; the CPU under the interpreter): what launches ``landmark_kernels``.

With a threshold, nothing as large as the scores ever exists. A fixed number of programs take one query block of one
head after another; each has a private strip of memory, small enough for the L2 cache, that holds the logits of its rows
until their denominator is known. So every product is computed once. With a density four counting passes over the bits
of all scores find the threshold and a last kernel makes the lists; the scores are kept in between where they fit into
1 GiB, and computed anew, some rows at a time, where they do not.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparseattn.kernels import LAUNCH
from sparseattn.ops.scores.chunks import ScoreChunks, chunk_rows
from sparseattn.ops.scores.cut_triton import batch_stride, find_cut
from sparseattn.ops.scores.landmark_problem import (
    FP8,
    FP8_MAX,
    LandmarkFeatures,
    LandmarkProblem,
    free_budget,
    num_snapshots,
)
from sparseattn.ops.scores.landmark_triton_choice import choose_kernel
from sparseattn.ops.scores.landmark_triton_features import covariance_kernel, features_kernel, rows_kernel
from sparseattn.ops.scores.landmark_triton_scores import score_kernel
from sparseattn.ops.scores.problem import RowBounds
from sparseattn.ops.scores.rules_triton import empty_lists
from sparseattn.ops.sequences import Sequences

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tiles(NamedTuple):
    """Sizes of the kernels.

    Attributes:
        landmarks: Landmarks of one product in ``score_kernel``.
        keys: Keys of one product with the forced blocks.
        columns: Columns of one step of the products with covariances.
        wide_landmarks: Landmarks of one step of ``covariance_kernel``.
        num_warps: Warps of ``score_kernel``.
        num_stages: Its pipeline stages.
        programs: Programs of it a multiprocessor; 0: a fixed few (the interpreter).
    """

    landmarks: int
    keys: int
    columns: int
    wide_landmarks: int
    num_warps: int
    num_stages: int
    programs: int


def config_for(dtype: torch.dtype, head_dim: int, rows: int, capability: tuple[int, int]) -> Tiles:
    """Tiles by GPU generation: a quarter of the shared memory for each of two programs where tiles are small."""
    large = dtype == torch.float32 or head_dim > 128
    landmarks = 64 if large or capability[0] < 9 else 128
    stages = 2 if large else 3
    return Tiles(landmarks, 32 if large else 64, 32, 32, 8 if rows > 64 else 4, stages, 1 if large or rows > 64 else 2)


def _tiles(q: Tensor, p: LandmarkProblem) -> Tiles:
    if not q.is_cuda:
        return Tiles(32, 32, 16, 16, 1, 1, 0)  # the interpreter: small tiles reach every branch at small shapes
    return config_for(q.dtype, q.shape[-1], p.rows, torch.cuda.get_device_capability(q.device))


def unsupported_reason(q: Tensor, k: Tensor, fp8: bool) -> str | None:
    """Why these kernels cannot score q and k, or None."""
    if q.dtype not in _DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"head_dim {q.shape[-1]} is above 256"
    if q.is_cuda:
        capability = torch.cuda.get_device_capability(q.device)
        if fp8 and capability < (8, 9):
            return "float8 products need a GPU of compute capability 8.9 or newer"
        if capability >= (10, 0) and triton.__version__.startswith("3.6."):
            return "the compiler of Triton 3.6 fails on the clustering of keys for this GPU; newer ones do not"
        return None
    if triton.knobs.runtime.interpret:
        return None
    return f"Triton runs on {q.device.type} only under TRITON_INTERPRET=1"


def features(k: Tensor, s: Sequences, block_size: int, clusters: int) -> LandmarkFeatures:
    """Landmarks of every block. See ``landmark.landmark_features``."""
    heads, dim = k.shape[-2:]
    shape = (s.batch, heads, -(-s.max_k // block_size), clusters)
    centroids = torch.empty((*shape, dim), dtype=k.dtype, device=k.device)
    spreads = torch.empty(shape, dtype=torch.float32, device=k.device)
    sizes = torch.empty(shape, dtype=torch.int32, device=k.device)
    if spreads.numel():
        features_kernel[(shape[2], heads, s.batch)](
            k, centroids, spreads, sizes, s.k_start, s.k_end, _strides(k, s.packed), s.max_k, shape[2],
            D=dim, BLOCK=block_size, CLUSTERS=clusters, BLOCK_D=_padded(dim), RAGGED=s.k_start is not None,
            PRECISION=_precision(k.dtype), num_warps=8 if block_size > 64 else 4, num_stages=1, **LAUNCH,
        )  # fmt: skip
    return LandmarkFeatures(centroids, spreads, sizes)


def _chosen_rows(q: Tensor, f: LandmarkFeatures, p: LandmarkProblem, bounds: RowBounds, tiles: Tiles) -> Tensor:
    """int32 ``[B, Hq, MB, rows]``: rows of each block to score, -1 past the last; undefined where nothing is free."""
    s = p.sequences
    batch, kv_heads, blocks, _, dim = f.centroids.shape
    heads = q.shape[-2]
    snapshots = num_snapshots(blocks)
    block_d, columns = _padded(dim), min(tiles.columns, _padded(dim))
    covariances = torch.empty((batch, kv_heads, snapshots, dim, dim), dtype=torch.float32, device=q.device)
    covariance_kernel[(snapshots, triton.cdiv(dim, columns), batch * kv_heads)](
        f.centroids, f.sizes, covariances, blocks, snapshots, D=dim, CLUSTERS=p.clusters, BLOCK_D=block_d,
        COLUMNS=columns, BLOCK_L=tiles.wide_landmarks, num_warps=4, num_stages=2, **LAUNCH,
    )  # fmt: skip
    rows = torch.empty((batch, heads, p.num_q_blocks, p.rows), dtype=torch.int32, device=q.device)
    recent = bounds.recent.contiguous()
    rows_kernel[(p.num_q_blocks, heads, batch)](
        q, covariances, rows, recent, s.q_start, s.q_end, _strides(q, s.packed), s.max_q, snapshots,
        batch_stride(recent), GROUP=heads // kv_heads, D=dim, BLOCK=p.block_size, ROWS=p.rows,
        FIRST=p.first_free, BLOCK_D=block_d, COLUMNS=columns, RAGGED=s.q_start is not None,
        PRECISION=_precision(q.dtype), num_warps=8, num_stages=1, **LAUNCH,
    )  # fmt: skip
    return rows


class _Scoring:
    """Launches of ``score_kernel``, writing scores or lists."""

    def __init__(self, q: Tensor, k: Tensor, f: LandmarkFeatures, p: LandmarkProblem, bounds: RowBounds) -> None:
        self.q, self.k, self.p = q, k, p
        self.tiles = _tiles(q, p)
        self.visible, self.recent = bounds.visible.contiguous(), bounds.recent.contiguous()
        self.heads = p.mask_heads(q, k)
        f = LandmarkFeatures(*(t.contiguous() for t in f))
        whole = p.rows == p.block_size
        self.rows = None if whole else _chosen_rows(q, f, p, bounds, self.tiles)
        self.scales: Tensor | None = None
        centroids = f.centroids
        if p.fp8:
            centroids, self.scales = _to_fp8(f.centroids)
        self.f = f._replace(centroids=centroids)
        self.programs = min(p.sequences.batch * self.heads * p.num_q_blocks, _programs(q.device, self.tiles.programs))
        self.chunk = self.tiles.landmarks // p.clusters
        strip = (self.programs, triton.cdiv(p.num_kv_blocks, self.chunk), p.rows, self.chunk)
        self.strip = torch.empty(strip, dtype=torch.float32, device=q.device)

    def scores(self, out: Tensor, first: int) -> None:
        """Fill ``out [B, H, rows, NB]`` (contiguous, where free) with the scores of the query blocks from ``first``."""
        self._launch(out, None, None, None, first, out.shape[2])

    def lists(self, log_tau: Tensor, counts: Tensor, indices: Tensor) -> None:
        """Fill the lists of all query blocks."""
        scratch = torch.empty((self.programs, self.p.num_kv_blocks), dtype=torch.float32, device=self.q.device)
        self._launch(scratch, log_tau, counts, indices, 0, self.p.num_q_blocks)

    def _launch(
        self,
        scores: Tensor,
        log_tau: Tensor | None,
        counts: Tensor | None,
        indices: Tensor | None,
        first: int,
        rows: int,
    ) -> None:
        p, s, f, tiles, q, k = self.p, self.p.sequences, self.f, self.tiles, self.q, self.k
        items = s.batch * self.heads * rows
        score_kernel[(min(items, self.programs),)](
            q, k, f.centroids, self.scales, f.spreads, f.sizes, self.rows, self.visible, self.recent, log_tau,
            self.strip, scores, counts, indices, s.q_start, s.q_end, s.k_start, s.k_end, _strides(q, s.packed),
            _strides(k, s.packed), s.max_q, s.max_k, p.num_q_blocks, p.num_kv_blocks, f.centroids.shape[2],
            batch_stride(self.visible), first, rows, 0 if indices is None else indices.shape[3], p.cap(None), items,
            p.scale, HEADS=self.heads, SHARED=q.shape[-2] // self.heads, GROUP=q.shape[-2] // k.shape[-2],
            D=q.shape[-1], BLOCK=p.block_size, CLUSTERS=p.clusters, ROWS=p.rows, FIRST=p.first_free, CAUSAL=p.causal,
            RAGGED_Q=s.q_start is not None, RAGGED_K=s.k_start is not None, FP8=p.fp8, LISTS=log_tau is not None,
            HEAD_TAUS=log_tau is not None and log_tau.numel() > 1, PRECISION=_precision(q.dtype),
            BLOCK_D=_padded(q.shape[-1]), KEYS=tiles.keys, CHUNK=self.chunk, BLOCK_S=1024 if q.is_cuda else 16,
            CAPPED=log_tau is not None and p.cap(None) < p.num_kv_blocks, num_warps=tiles.num_warps,
            num_stages=tiles.num_stages, **LAUNCH,
        )  # fmt: skip


def scores(q: Tensor, k: Tensor, f: LandmarkFeatures, p: LandmarkProblem, bounds: RowBounds) -> Tensor:
    """float32 ``[B, H, MB, NB]``. See ``landmark.landmark_scores``."""
    shape = (p.sequences.batch, p.mask_heads(q, k), p.num_q_blocks, p.num_kv_blocks)
    out = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    if out.numel():
        _Scoring(q, k, f, p, bounds).scores(out, 0)
    return out


def blocks(
    q: Tensor,
    k: Tensor,
    f: LandmarkFeatures,
    p: LandmarkProblem,
    bounds: RowBounds,
    log_tau: Tensor,
    density: float | None,
) -> tuple[Tensor, Tensor]:
    """Lists by threshold or density. See ``landmark.landmark_blocks``."""
    shape = (p.sequences.batch, p.mask_heads(q, k), p.num_q_blocks, p.num_kv_blocks)
    counts, indices = empty_lists(shape, p.width(density), q.device)
    if 0 not in shape:
        scoring = _Scoring(q, k, f, p, bounds)
        if density is None:
            scoring.lists(log_tau, counts, indices)
        else:
            _choose(scoring, shape, density, bounds, counts, indices)
    return counts, indices


def _choose(
    scoring: _Scoring, shape: tuple[int, ...], density: float, bounds: RowBounds, counts: Tensor, indices: Tensor
) -> None:
    """Write the lists of the forced blocks and the best free ones of each sequence, ``density`` of all."""
    p, (batch, heads, rows, columns) = scoring.p, shape
    budget = free_budget(p, bounds, heads, density).expand(batch)
    step = chunk_rows(rows, 4 * batch * heads * columns, True)
    buffer = torch.empty(batch * heads * step * columns, dtype=torch.float32, device=counts.device)

    def score(first: int, count: int) -> Tensor:
        out = buffer[: batch * heads * count * columns].view(batch, heads, count, columns)
        scoring.scores(out, first)
        return out

    chunks = ScoreChunks(score, rows, step)
    key, ties, fit = find_cut(chunks, scoring.visible, scoring.recent, p.first_free, budget)
    # What ties at the threshold is in if all of it fits; without a budget nothing is.
    cut = torch.where(fit >= ties, key, key + 1)
    least = torch.where(budget > 0, cut - 2**31, 2**31 - 1).clamp(max=2**31 - 1).int()
    for first, scores in chunks:
        choose_kernel[(scores.shape[2], heads, batch)](
            scores, least, counts, indices, scoring.visible, scoring.recent, rows, first, scores.shape[2], columns,
            indices.shape[3], p.cap(density), batch_stride(scoring.visible), FIRST=p.first_free,
            CAPPED=p.cap(density) < columns, BLOCK=1024 if scores.is_cuda else 32, num_warps=4, **LAUNCH,
        )  # fmt: skip


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., D]`` in float8 with one scale a vector: float8 and float32 ``[...]`` scales."""
    x = x.float()
    scale = (x.abs().amax(-1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale[..., None]).to(FP8), scale


@functools.lru_cache(maxsize=64)
def _programs(device: torch.device, per_processor: int) -> int:
    if per_processor == 0:
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * per_processor


def _strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """(batch, row, head, dim) strides; packed rows are counted from the start of the tensor."""
    return (0, *x.stride()) if packed else x.stride()


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    bf16 = torch.bfloat16
    shape = {"D": 128, "BLOCK": 128, "CLUSTERS": 8, "BLOCK_D": 128, "GROUP": 4, "PRECISION": "tf32"}
    small = {"D": 96, "BLOCK": 64, "CLUSTERS": 4, "BLOCK_D": 128, "GROUP": 4, "PRECISION": "tf32"}
    cases = [
        ("landmark_features", *_offline(features_kernel, shape | {"RAGGED": False}), 8, 1),
        ("landmark_features-96-ragged-sm80", *_offline(features_kernel, small | {"RAGGED": True}), 4, 1),
        ("landmark_covariance", *_offline(covariance_kernel, shape | {"COLUMNS": 32, "BLOCK_L": 32}), 4, 2),
        (
            "landmark_rows",
            *_offline(rows_kernel, shape | {"ROWS": 64, "FIRST": 1, "COLUMNS": 32, "RAGGED": False}),
            8,
            1,
        ),
        ("landmark_choose", *_offline(choose_kernel, {"FIRST": 1, "CAPPED": True, "BLOCK": 1024}), 4, 1),
    ]
    common = {"FIRST": 1, "CAUSAL": True, "HEAD_TAUS": False, "FP8": False, "BLOCK_S": 1024, "HEADS": 32, "SHARED": 1}
    for name, major, constants in (
        ("half", 8, shape | {"ROWS": 64, "LISTS": True}),
        ("half", 9, shape | {"ROWS": 64, "LISTS": True}),
        ("all", 9, shape | {"ROWS": 128, "LISTS": False}),
        ("fp8", 9, shape | {"ROWS": 64, "LISTS": True, "FP8": True}),
        ("shared-96-ragged", 8, small | {"ROWS": 32, "LISTS": True, "HEADS": 8, "SHARED": 4, "HEAD_TAUS": True}),
    ):
        tiles = config_for(bf16, 128, int(constants["ROWS"]), (major, 0))  # type: ignore[call-overload]
        ragged = "ragged" in name
        constants = (
            common
            | constants
            | {
                "CAPPED": name in ("fp8", "shared-96-ragged"),
                "RAGGED_Q": ragged,
                "RAGGED_K": ragged,
                "KEYS": tiles.keys,
            }
        )
        constants["CHUNK"] = tiles.landmarks // int(constants["CLUSTERS"])  # type: ignore[call-overload]
        case = _offline(score_kernel, constants)
        cases.append((f"landmark_score-{name}-sm{major}0", *case, tiles.num_warps, tiles.num_stages))
    return cases


def _offline(function: object, constants: dict) -> tuple[object, dict, dict, dict]:
    """Signature, constexprs and attributes of a bfloat16 call with contiguous tensors."""
    types = {
        "q_ptr": "*bf16", "k_ptr": "*bf16", "centroids_ptr": "*fp8e4nv" if constants.get("FP8") else "*bf16",
        "scale": "fp32",
    }  # fmt: skip
    floats = ("spreads_ptr", "covariances_ptr", "scales_ptr", "log_tau_ptr", "strip_ptr", "scores_ptr")
    whole = {"scales_ptr": not constants.get("FP8"), "rows_ptr": constants.get("ROWS") == constants.get("BLOCK")}
    absent = {name for name, gone in whole.items() if gone and "LISTS" in constants}
    if constants.get("LISTS") is False:
        absent |= {"counts_ptr", "indices_ptr", "log_tau_ptr"}
    signature: dict[str, object] = {}
    constexprs: dict[object, object] = {}
    attributes: dict[object, object] = {}
    for i, param in enumerate(function.params):  # type: ignore[attr-defined]
        if param.is_constexpr or param.name in absent:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = constants[param.name] if param.is_constexpr else None
        elif param.name.startswith("stride_"):
            signature[param.name] = ("i64", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif param.name.endswith("_ptr"):
            signature[param.name] = types.get(param.name, "*fp32" if param.name in floats else "*i32")
            if "start" not in param.name and "end" not in param.name:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = types.get(param.name, "i32")
    return function, signature, constexprs, attributes
