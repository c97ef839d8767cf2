"""Hopper implementation of landmark scores (sm_90a) in Gluon: what launches ``kernels/hopper_landmarks.py``.

Landmarks, the choice of rows and lists are the Triton implementation's (``landmark_launches``). Scores less a threshold
exist for some query blocks at a time; what cannot reach the threshold is never written.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparseattn.kernels import LAUNCH
from sparseattn.kernels.hopper import row_tiles, tile_layout
from sparseattn.kernels.hopper_landmarks import Facts, landmark_scores_kernel
from sparseattn.kernels.hopper_tiles import batch_rows, padded, processors_of, unmappable
from sparseattn.kernels.launches import launch
from sparseattn.ops.scores.cut_triton import batch_stride
from sparseattn.ops.scores.landmark_launches import (
    all_scores,
    choose_by_cut,
    choose_by_density,
    chosen_rows,
    empty_lists,
    score_chunks,
)
from sparseattn.ops.scores.landmark_launches import features as features
from sparseattn.ops.scores.landmark_problem import LandmarkFeatures, LandmarkProblem, log_taus_on
from sparseattn.ops.scores.landmark_triton_order import TILE, ordered_landmarks
from sparseattn.ops.scores.problem import RowBounds

# Entries of a thread's ring of candidates, as long as they take no more memory than all masses would.
MOST_ENTRIES = 64


class Tiles(NamedTuple):
    """Shape of a program.

    Attributes:
        consumers: Warpgroups that compute.
        stages: Tiles in flight.
        registers: Of a thread that computes.
        in_turn: Warpgroups start their products one after another, each under the others' exponentials. Left alone,
            they fall into step: all multiply, then all weigh.
    """

    consumers: int
    stages: int
    registers: int
    in_turn: bool


def config_for() -> Tiles:
    """Tiles: three warpgroups beat two and four on an H200 at D = 128."""
    return Tiles(3, 4, 160, True)


def unsupported_reason(q: Tensor, k: Tensor, fp8: bool) -> str | None:
    """Why these kernels cannot score q and k, or None."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"the Gluon kernels need a Hopper GPU (compute capability 9.0), not {q.device}"
    return refusal(q, k, fp8)


def refusal(q: Tensor, k: Tensor, fp8: bool) -> str | None:
    """Why these kernels could not score q and k on any GPU, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the Gluon kernels take bfloat16 and float16, not {q.dtype}"
    if fp8:
        return "the Gluon kernels multiply landmarks in their own dtype, not in float8"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"the Gluon kernels take head dimensions up to 128 in multiples of 8, not {q.shape[-1]}"
    if q.stride(-1) != 1:
        return f"the Gluon kernels need rows of q of stride 1, not strides {tuple(q.stride())}"
    return unmappable("k", k)


def ring_entries(tau: float) -> int:
    """Candidates of a row after which an older one cannot reach ``tau`` any more, rounded up to a power of two."""
    tau *= 0.99  # sums are rounded
    return triton.next_power_of_2(math.ceil(-math.log(tau) / math.log1p(tau)) + 1)


class _Scoring:
    """Launches over one problem's query blocks; with ``taus``, only scores above a threshold are of interest."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        f: LandmarkFeatures,
        p: LandmarkProblem,
        bounds: RowBounds,
        taus: tuple[float, ...] | None = None,
    ) -> None:
        self.q, self.k, self.p = q, k, p
        self.tiles = config_for()
        self.visible, self.recent = bounds.visible.contiguous(), bounds.recent.contiguous()
        self.rows = None if p.rows == p.block_size else chosen_rows(q, f, p, bounds)
        reach = torch.empty(f.centroids.shape[:3], dtype=torch.float32, device=q.device)
        self.landmarks, self.spreads = ordered_landmarks(f, p.first_free, TILE, reach)
        # Of a block and of those before it, so that a row's numbers do not depend on what comes after it.
        self.reach = torch.cummax(reach, -1).values
        self.taus = None if taus is None else log_taus_on(q.device, taus)
        self.strip_rows = triton.cdiv(p.num_kv_blocks, 128) * 16
        self.candidates = False
        if taus is not None and min(taus) > 0:
            entries, entry_rows = ring_entries(min(taus)), TILE // p.clusters // 8 + 1
            self.candidates = entries <= MOST_ENTRIES or entries * entry_rows <= self.strip_rows
            if self.candidates:
                self.strip_rows = entries * entry_rows
        self.shares = triton.cdiv(q.shape[-2] // k.shape[-2] * p.rows, 64)
        self.programs = min(self._items(p.num_q_blocks), processors_of(q.device))
        strip = (self.programs, self.tiles.consumers, self.strip_rows, 512)
        self.strip = torch.empty(strip, dtype=torch.float32, device=q.device)

    def _items(self, rows: int) -> int:
        groups = self.p.sequences.batch * self.k.shape[-2]
        return triton.cdiv(rows * self.shares, self.tiles.consumers) * groups

    def facts(self) -> Facts:
        """What the kernel is compiled for."""
        p, (heads, dim) = self.p, self.q.shape[-2:]
        return Facts(
            heads, heads // self.k.shape[-2], heads // p.mask_heads(self.q, self.k), dim, padded(dim), p.block_size,
            p.clusters, p.rows, p.first_free, p.causal, p.sequences.q_start is not None,
            p.sequences.k_start is not None, self.taus is not None, self.taus is not None and self.taus.numel() > 1,
            self.candidates, self.tiles.consumers, self.tiles.stages, self.tiles.in_turn, p.scale < 0,
        )  # fmt: skip

    def scores(self, out: Tensor, first: int) -> None:
        """Fill ``out [B, H, rows, NB]`` (contiguous, where free) with the scores of the query blocks from ``first``.

        With thresholds: scores less theirs, those below 0 being anything below 0.
        """
        q, k, p, s, tiles = self.q, self.k, self.p, self.p.sequences, self.tiles
        facts = self.facts()
        if facts.MEETS:
            out.fill_(-torch.inf)
        rows, dim = out.shape[2], padded(q.shape[-1])
        items = self._items(rows)
        c_desc = TensorDescriptor(
            self.landmarks, list(self.landmarks.shape), list(self.landmarks.stride()), [TILE, dim], tile_layout(2)
        )
        launch(
            landmark_scores_kernel, (min(items, self.programs),),
            q, row_tiles(k, 1, TILE, dim), c_desc, self.spreads, self.reach, self.rows, self.visible, self.recent,
            self.taus, self.strip, out, s.q_start, s.q_end, s.k_start, s.k_end, 0 if s.packed else q.stride(0),
            q.stride(-3), q.stride(-2), batch_stride(self.visible), s.max_q, s.max_k, batch_rows(k), p.num_q_blocks,
            p.num_kv_blocks, self.landmarks.shape[0] // (s.batch * k.shape[-2]), self.reach.shape[-1], self.strip_rows,
            first, rows, items, s.batch, p.scale,
            facts, tiles.registers, num_warps=4, **LAUNCH,
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
    if 0 in shape:
        return counts, indices
    if density is not None:
        choose_by_density(_Scoring(q, k, f, p, bounds), shape, density, bounds, counts, indices)
        return counts, indices
    chunks = score_chunks(_Scoring(q, k, f, p, bounds, taus), shape, q.device, False)
    least = torch.zeros(shape[0], dtype=torch.int32, device=q.device)  # the key of 0
    choose_by_cut(chunks, p, bounds, least, p.cap(None), counts, indices)
    return counts, indices


def compile_cases() -> list[tuple[Any, ...]]:
    """Kernels as (name, function, signature, constexprs, attributes, warps, stages), to compile without a GPU."""
    plain = {"HEADS": 32, "GROUP": 4, "BLOCK": 128, "CLUSTERS": 8, "ROWS": 64, "FIRST": 1, "CAUSAL": True, "D": 128}
    plain |= {"SHARED": 1, "RAGGED": False, "LISTS": True, "HEAD_TAUS": False, "CANDIDATES": True}
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("half", {}),
        ("all", {"ROWS": 128}),
        ("scores", {"LISTS": False, "CANDIDATES": False}),
        ("shared-64-ragged", {"D": 64, "SHARED": 4, "RAGGED": True, "HEAD_TAUS": True, "BLOCK": 64, "ROWS": 32}),
    )
    return [(f"gluon-landmarks-{name}", *_offline(plain | facts)) for name, facts in cases]


def _offline(facts: dict[str, Any]) -> tuple[Any, ...]:
    tiles, dim, ragged = config_for(), padded(facts["D"]), facts.pop("RAGGED")
    f = Facts(
        BLOCK_D=dim,
        RAGGED_Q=ragged,
        RAGGED_K=ragged,
        CONSUMERS=tiles.consumers,
        STAGES=tiles.stages,
        IN_TURN=tiles.in_turn,
        FLIP=False,
        **facts,
    )
    absent = set() if ragged else {"q_start_ptr", "q_end_ptr", "k_start_ptr", "k_end_ptr"}
    absent |= set() if facts["LISTS"] else {"taus_ptr"}
    absent |= {"rows_ptr"} if facts["ROWS"] == facts["BLOCK"] else set()
    boxes = {"k_desc": (f"1, 1, 1, {TILE}, {dim}", 5), "c_desc": (f"{TILE}, {dim}", 2)}
    floats = ("spreads_ptr", "reach_ptr", "taus_ptr", "strip_ptr", "scores_ptr")
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, param in enumerate(landmark_scores_kernel.params):
        name = param.name
        if param.is_constexpr or name in absent:
            signature[name] = "constexpr"
            constexprs[(i,)] = {"F": f, "REGISTERS": tiles.registers}.get(name)
        elif name in boxes:
            signature[name] = f"tensordesc<bf16[{boxes[name][0]}],{tile_layout(boxes[name][1])!r}>"
        elif name.endswith("_ptr"):
            signature[name] = "*bf16" if name == "q_ptr" else "*fp32" if name in floats else "*i32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name.startswith("q_stride"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return landmark_scores_kernel, signature, constexprs, attributes, 4, 1
