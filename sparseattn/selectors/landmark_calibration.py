"""Landmark thresholds from data: the largest ones that keep a wanted share of attention mass."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.ops.scores import landmark_scores
from sparseattn.ops.scores.landmark_problem import LandmarkProblem, landmark_bounds
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.selectors.base import check_config
from sparseattn.selectors.landmark import LandmarkConfig

_STEPS = 24  # halvings of the logarithm of tau: its last digits do not matter


def calibrate_landmark(
    q: Tensor,
    k: Tensor,
    recall: float = 0.95,
    config: LandmarkConfig | None = None,
    *,
    per_head: bool = True,
    every: int = 8,
    scale: float | None = None,
    impl: str = "auto",
) -> LandmarkConfig:
    """Choose ``tau`` so that the kept blocks hold a share of the attention mass, on queries and keys of one layer.

    The exact block masses of some query blocks are computed once, their scores as well; since masks nest in ``tau``,
    the rest is bisection. Run it on a few prompts of the kind that matters and take the smallest thresholds; rows of a
    ``[layers][heads]`` table come from one call a layer. Mean recall says little about answers: docs/selectors.md.

    Args:
        q: ``[B, Sq, Hq, D]``, causal, dense attention's own.
        k: ``[B, Sk, Hkv, D]``.
        recall: Mean share of the attention mass of the sampled rows to keep, in (0, 1].
        config: Everything but ``tau``, which is replaced.
        per_head: One threshold per query head; otherwise one for all, at which their mean recall suffices.
        every: Look at one in so many query blocks, the last one among them.
        scale: Factor on q . k; default ``1 / sqrt(D)``.
        impl: Of the scores, as in :func:`sparseattn.selectors.landmark`.

    Returns:
        ``config`` with the largest ``tau`` that reach the recall, 0 where only everything does.

    Raises:
        ValueError: A recall that is not in (0, 1], ``every`` below 1, or a config with a density or shared lists.
        TypeError: A config of another method.
    """
    config = LandmarkConfig() if config is None else config
    check_config(config, LandmarkConfig)
    if not 0.0 < recall <= 1.0:
        raise argument_error("recall", "a number in (0, 1]", recall)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise argument_error("every", "an int of at least 1", repr(every))
    if config.density is not None or config.group_shared:
        raise argument_error("config", "a config without density and group_shared", config, "Calibrate tau by head.")
    size = config.block_size
    clusters, rows = config.clusters or size // 16, size if config.rows == "all" else config.rows or size // 2
    keep_sink = config.keep_sink is not False
    score = landmark_scores(
        q, k, block_size=size, clusters=clusters, rows=rows, keep_sink=keep_sink, fp8=config.fp8,  # type: ignore[arg-type]
        scale=scale, impl=impl,
    )  # fmt: skip
    s = resolve_sequences(q, k)
    p = LandmarkProblem(s, size, clusters, int(rows), True, keep_sink, config.floor, config.fp8, False, 1.0)
    bounds = landmark_bounds(p, q.device)
    mass, kept_at = [], []
    n = torch.arange(p.num_kv_blocks, device=q.device)
    for m in range(p.num_q_blocks - 1, -1, -every):
        mass.append(_mean_block_mass(q, k, m, size, scale))  # [B, Hq, NB]
        free = (n >= p.first_free) & (n < bounds.recent[0, m])
        kept_at.append(torch.where(free, score[:, :, m].double(), math.inf))
    exact, scores = torch.stack(mass, 2), torch.stack(kept_at, 2)
    heads = q.shape[2] if per_head else 1
    low = torch.full((heads,), -60.0, dtype=torch.float64, device=q.device)
    high = torch.zeros_like(low)
    everything = torch.zeros_like(low, dtype=torch.bool)
    for step in range(_STEPS + 1):
        middle = low if step == 0 else (low + high) / 2
        held = (exact * (scores >= middle[None, :, None, None])).sum(-1)
        seen = exact.sum(-1)  # 1 per sampled block, less for rows that see nothing
        dims = (0, 2) if per_head else (0, 1, 2)
        enough = (held.sum(dims) >= recall * seen.sum(dims) - 1e-9).view(-1)
        if step == 0:
            everything = ~enough
        else:
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    taus = torch.where(everything, 0.0, low.exp()).tolist()
    return replace(config, tau=tuple(taus) if per_head else taus[0])


def _mean_block_mass(q: Tensor, k: Tensor, m: int, size: int, scale: float | None) -> Tensor:
    """Share of attention mass that each key block has from query block ``m``, mean over its rows: ``[B, Hq, NB]``."""
    (batch, sq, _, dim), (_, sk, kv_heads, _) = q.shape, k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = dim**-0.5 if scale is None else scale
    tile = q[:, m * size : (m + 1) * size].to(dtype).transpose(1, 2)  # [B, Hq, R, D]
    keys = k.to(dtype).transpose(1, 2)  # [B, Hkv, Sk, D]
    logits = (tile.reshape(batch, kv_heads, -1, dim) @ keys.mT).view(*tile.shape[:3], sk) * scale
    rows = torch.arange(m * size, min((m + 1) * size, sq), device=q.device) + sk - sq
    hidden = torch.arange(sk, device=q.device) > rows[:, None]
    share = logits.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0.0)
    share = torch.nn.functional.pad(share, (0, -sk % size)).unflatten(-1, (-1, size))
    return share.sum(-1).mean(2).double()
