"""Triton landmark scores (Ampere and newer; the CPU under the interpreter): what launches ``landmark_triton_scores``.

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
from sparseattn.kernels.launches import launch
from sparseattn.ops.scores.cut_triton import batch_stride
from sparseattn.ops.scores.landmark_launches import (
    all_scores,
    choose_by_density,
    chosen_rows,
    dot_precision,
    empty_lists,
    padded_dim,
    row_strides,
)
from sparseattn.ops.scores.landmark_launches import features as features
from sparseattn.ops.scores.landmark_problem import FP8, FP8_MAX, LandmarkFeatures, LandmarkProblem, log_taus_on
from sparseattn.ops.scores.landmark_triton_choice import choose_kernel
from sparseattn.ops.scores.landmark_triton_features import (
    covariance_kernel,
    features_kernel,
    moments_kernel,
    rows_kernel,
    sharpness_kernel,
    tiles_for,
)
from sparseattn.ops.scores.landmark_triton_order import ordered_landmarks
from sparseattn.ops.scores.landmark_triton_scores import score_kernel
from sparseattn.ops.scores.problem import RowBounds

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tiles(NamedTuple):
    """Sizes of the kernels.

    Attributes:
        landmarks: Landmarks of one product in ``score_kernel``.
        keys: Keys of one product with the forced blocks.
        num_warps: Warps of ``score_kernel``.
        num_stages: Its pipeline stages.
        programs: Programs of it a multiprocessor; 0: a fixed few (the interpreter).
    """

    landmarks: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int


def config_for(dtype: torch.dtype, head_dim: int, rows: int, capability: tuple[int, int]) -> Tiles:
    """Tiles by GPU generation. Half the rows of a block at 128 landmarks: measured on an H200."""
    large = dtype == torch.float32 or head_dim > 128
    landmarks = 64 if large or capability[0] < 9 else 128
    if landmarks == 128 and rows <= 64:
        return Tiles(128, 64, 4, 2, 3)
    stages = 2 if large else 3
    return Tiles(landmarks, 32 if large else 64, 8 if rows > 64 else 4, stages, 1 if large or rows > 64 else 2)


def _tiles(q: Tensor, p: LandmarkProblem) -> Tiles:
    if not q.is_cuda:
        return Tiles(32, 32, 1, 1, 0)  # the interpreter: small tiles reach every branch at small shapes
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


class _Scoring:
    """Launches of ``score_kernel``, writing scores or lists."""

    def __init__(self, q: Tensor, k: Tensor, f: LandmarkFeatures, p: LandmarkProblem, bounds: RowBounds) -> None:
        self.q, self.k, self.p = q, k, p
        self.tiles = _tiles(q, p)
        self.visible, self.recent = bounds.visible.contiguous(), bounds.recent.contiguous()
        self.heads = p.mask_heads(q, k)
        f = LandmarkFeatures(*(t.contiguous() for t in f))
        whole = p.rows == p.block_size
        self.rows = None if whole else chosen_rows(q, f, p, bounds)
        columns = max(self.tiles.landmarks, 4 * p.clusters)
        self.landmarks, self.spreads = ordered_landmarks(f, p.first_free, columns)
        self.scales: Tensor | None = None
        if p.fp8:
            self.landmarks, self.scales = _to_fp8(self.landmarks)
        self.programs = min(p.sequences.batch * self.heads * p.num_q_blocks, _programs(q.device, self.tiles.programs))
        self.chunk = columns // p.clusters
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
        p, s, tiles, q, k = self.p, self.p.sequences, self.tiles, self.q, self.k
        items = s.batch * self.heads * rows
        launch(
            score_kernel, (min(items, self.programs),),
            q, k, self.landmarks, self.scales, self.spreads, self.rows, self.visible, self.recent, log_tau,
            self.strip, scores, counts, indices, s.q_start, s.q_end, s.k_start, s.k_end, row_strides(q, s.packed),
            row_strides(k, s.packed), s.max_q, s.max_k, p.num_q_blocks, p.num_kv_blocks,
            self.landmarks.shape[0] // (s.batch * k.shape[-2]),
            batch_stride(self.visible), first, rows, 0 if indices is None else indices.shape[3], p.cap(None), items,
            p.scale, HEADS=self.heads, SHARED=q.shape[-2] // self.heads, GROUP=q.shape[-2] // k.shape[-2],
            D=q.shape[-1], BLOCK=p.block_size, CLUSTERS=p.clusters, ROWS=p.rows, FIRST=p.first_free, CAUSAL=p.causal,
            RAGGED_Q=s.q_start is not None, RAGGED_K=s.k_start is not None, FP8=p.fp8, LISTS=log_tau is not None,
            HEAD_TAUS=log_tau is not None and log_tau.numel() > 1, PRECISION=dot_precision(q.dtype),
            BLOCK_D=max(padded_dim(q.shape[-1]), 32 if p.fp8 else 16), KEYS=tiles.keys, CHUNK=self.chunk,
            BLOCK_S=1024 if q.is_cuda else 16,
            CAPPED=log_tau is not None and p.cap(None) < p.num_kv_blocks, num_warps=tiles.num_warps,
            num_stages=tiles.num_stages, **LAUNCH,
        )  # fmt: skip


def scores(q: Tensor, k: Tensor, f: LandmarkFeatures, p: LandmarkProblem, bounds: RowBounds) -> Tensor:
    """float32 ``[B, H, MB, NB]``. See ``landmark.landmark_scores``."""
    return all_scores(_Scoring, q, k, f, p, bounds)


def blocks(
    q: Tensor,
    k: Tensor,
    f: LandmarkFeatures,
    p: LandmarkProblem,
    bounds: RowBounds,
    taus: tuple[float, ...],
    density: float | None,
) -> tuple[Tensor, Tensor]:
    """Lists by threshold or density. See ``landmark.landmark_blocks``."""
    shape = (p.sequences.batch, p.mask_heads(q, k), p.num_q_blocks, p.num_kv_blocks)
    counts, indices = empty_lists(shape, p.width(density), q.device)
    if 0 not in shape:
        scoring = _Scoring(q, k, f, p, bounds)
        if density is None:
            scoring.lists(log_taus_on(q.device, taus), counts, indices)
        else:
            choose_by_density(scoring, shape, density, bounds, counts, indices)
    return counts, indices


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


def compile_cases() -> list[tuple[str, object, dict, dict, dict, int, int]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    bf16 = torch.bfloat16
    shape = {"D": 128, "BLOCK": 128, "CLUSTERS": 8, "BLOCK_D": 128, "GROUP": 4, "PRECISION": "tf32"}
    small = {"D": 96, "BLOCK": 64, "CLUSTERS": 4, "BLOCK_D": 128, "GROUP": 4, "PRECISION": "tf32"}
    cases = [
        ("landmark_features-96-ragged-sm80", *_offline(features_kernel, small | {"RAGGED": True}), 4, 1),
        ("landmark_moments", *_offline(moments_kernel, shape | {"COLUMNS": 32, "BLOCK_L": 32}), 4, 2),
        ("landmark_covariance", *_offline(covariance_kernel, shape | {"ROWS": 8}), 4, 1),
        ("landmark_rows", *_offline(rows_kernel, shape | {"ROWS": 64, "FIRST": 1}), 2, 1),
        ("landmark_choose", *_offline(choose_kernel, {"FIRST": 1, "CAPPED": True, "BLOCK": 1024}), 4, 1),
    ]
    for major in (8, 9):
        own = tiles_for(bf16, 128, 128, (major, 0))
        case = _offline(features_kernel, shape | {"RAGGED": False})
        cases.append((f"landmark_features-sm{major}0", *case, own.cluster_warps, 1))
        sharp = shape | {"FIRST": 1, "COLUMNS": own.columns, "TERMS": own.terms, "RAGGED": False}
        cases.append((f"landmark_sharpness-sm{major}0", *_offline(sharpness_kernel, sharp), 8, own.num_stages))
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
        "q_ptr": "*bf16", "k_ptr": "*bf16", "centroids_ptr": "*bf16",
        "landmarks_ptr": "*fp8e4nv" if constants.get("FP8") else "*bf16",
        "scale": "fp32",
    }  # fmt: skip
    floats = (
        "spreads_ptr",
        "covariances_ptr",
        "moments_ptr",
        "sharpness_ptr",
        "scales_ptr",
        "log_tau_ptr",
        "strip_ptr",
        "scores_ptr",
    )
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
