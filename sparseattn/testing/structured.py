"""Queries and keys with the structure that trained attention heads have, planted, so that one knows what to find.

On a background of unit normal q and k, a planted logit L adds ``sqrt(L * sqrt(D))`` times a common unit direction to
the queries and the keys that should meet, which raises their scaled score by L. The background scores are then about
normal with a standard deviation between 1 and 1.5, so N background keys weigh some e ^ 1.2 N together, and a single
key needs a logit of ln N and a few to outweigh them.

================  ====================================================================  =======================
kind              which keys a query wants                                              planted logit
================  ====================================================================  =======================
``sink``          the first 4                                                           ln N + 4
``local``         those near itself: a bump around the diagonal, falling by half over   ln N + 4 at its top
                  some hundreds of tokens
``vertical``      12 spans of 16 keys (columns), the same for all queries               ln N + 1
``slash``         those a fixed offset back: the same bump, around another diagonal     ln N + 4 at its top
``block_topic``   segments of 256 tokens about the query's topic, of 6 topics           8
``needle``        8 single keys, each wanted by 16 queries far behind it, which look    ln N + 6, and ln N + 4
                  nowhere else; all other queries are local                             for the local ones
``blend``         a sink, a band, columns and topics at once; from the first KV head    ln N + 4 (sink), others
                  to the last the weight moves from band to columns and topics          below ln N + 1.1
================  ====================================================================  =======================

Harder families, and mixes of them as published head statistics have them, are in ``families``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.testing import families
from sparseattn.testing.inputs import QKV
from sparseattn.testing.plots import SEGMENT, SINK_KEYS, SPAN, Planted, Plot

#: Kinds of heads that plant one pattern each.
KINDS = ("sink", "local", "vertical", "slash", "block_topic", "needle")

NEEDLES, ASKERS = 8, 16


def _sink(plot: Plot) -> Planted:
    gain = plot.gain(plot.floor + 4)
    wanted = plot.position < SINK_KEYS
    queries = (gain * plot.sink).expand(plot.n, -1)
    return Planted(queries, queries * wanted[:, None], lambda rows: wanted.expand(len(rows), -1), plot.position)


def _diagonal(plot: Plot, offset: int) -> Planted:
    """A bump around the keys ``offset`` tokens before the query; queries before there want nothing."""
    keys = plot.gain(plot.floor + 4) * plot.band
    queries = keys.roll(offset, 0) * (plot.position >= offset)[:, None]

    def wanted(rows: Tensor) -> Tensor:
        return (plot.position[None, :] - (rows[:, None] - offset)).abs() <= SEGMENT

    return Planted(queries, keys, wanted, plot.position[offset:])


def _local(plot: Plot) -> Planted:
    return _diagonal(plot, 0)


def _slash(plot: Plot) -> Planted:
    return _diagonal(plot, max(1, plot.n // 3))


def _vertical(plot: Plot) -> Planted:
    wanted = plot.in_span()
    queries = (plot.gain(plot.floor + 1) * plot.column).expand(plot.n, -1)
    seen = plot.position[int(plot.spans.min()) + SPAN :]
    return Planted(queries, queries * wanted[:, None], lambda rows: wanted.expand(len(rows), -1), seen)


def _block_topic(plot: Plot) -> Planted:
    topic = plot.segment_topics().repeat_interleave(SEGMENT)[: plot.n]
    both = plot.gain(8.0) * plot.topics[topic]
    return Planted(both, both, lambda rows: topic[rows][:, None] == topic[None, :], plot.position)


def _needle(plot: Plot) -> Planted:
    needles = min(NEEDLES, plot.n)
    # Needles in the first quarter, and those who ask for them in the last one.
    key = torch.randperm(max(needles, plot.n // 4), device=plot.device, generator=plot.generator)[:needles]
    last = max(1, plot.n // 4)
    askers = plot.n - 1 - torch.randperm(last, device=plot.device, generator=plot.generator)[: needles * ASKERS]
    needle_of = torch.arange(len(askers), device=plot.device) % needles
    local = plot.gain(plot.floor + 4) * plot.band
    call = plot.gain(plot.floor + 6) * plot.direction(needles)
    queries, keys = local.clone(), local.clone()
    queries[askers] = call[needle_of]
    keys[key] = call
    asks = torch.full((plot.n,), -1, device=plot.device)
    asks[askers] = key[needle_of]
    return Planted(queries, keys, lambda rows: asks[rows][:, None] == plot.position[None, :], askers.sort().values)


def _blend(plot: Plot, share: float) -> Planted:
    """A sink, a band, columns and topics at once; ``share`` 0 is mostly band, 1 mostly columns and topics."""
    topic = plot.segment_topics().repeat_interleave(SEGMENT)[: plot.n]
    strength = plot.gain(plot.floor + 1 - 3 * share)
    far = plot.gain(plot.floor * (0.35 + 0.75 * share))
    sink = plot.gain(plot.floor + 4) * plot.sink
    common = strength * plot.band + far * plot.topics[topic]
    in_span = plot.in_span()
    keys = common + far * plot.column * in_span[:, None]
    keys[:SINK_KEYS] += sink

    def wanted(rows: Tensor) -> Tensor:
        near = (plot.position[None, :] - rows[:, None]).abs() <= SEGMENT
        return near | in_span | (plot.position < SINK_KEYS) | (topic[rows][:, None] == topic[None, :])

    return Planted(common + sink + far * plot.column, keys, wanted, plot.position)


_PLANT: dict[str, Callable[[Plot], Planted]] = {
    "sink": _sink,
    "local": _local,
    "vertical": _vertical,
    "slash": _slash,
    "block_topic": _block_topic,
    "needle": _needle,
}


def plant(plot: Plot, kind: str, share: float = 0.0) -> Planted:
    """The pattern of one KV head.

    Args:
        plot: What the heads of one call share.
        kind: One of ``KINDS``, "blend", or one of ``families``.
        share: Of a blend: 0 mostly band, 1 mostly columns and topics.

    Raises:
        ValueError: An unknown kind.
    """
    if kind == "blend":
        return _blend(plot, share)
    if kind in _PLANT:
        return _PLANT[kind](plot)
    return families.plant(plot, kind, known=(*KINDS, "blend"))


def structured_qkv(
    n: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    *,
    kinds: Sequence[str] = ("blend",),
) -> QKV:
    """Queries and keys whose attention looks like a trained model's, so that a selector has something to find.

    Args:
        n: Tokens.
        heads: Query heads; a multiple of ``kv_heads``. The query heads of a group share a pattern, not their noise.
        kv_heads: KV heads.
        head_dim: D, of the values too.
        dtype: What the numbers are rounded to.
        device: Where they are drawn: the same seed gives other numbers on another kind of device.
        seed: Of the generator.
        kinds: Which pattern the KV heads have, one after the other and then from the start again; see the module and
            ``families``, whose ``mixed_kinds`` draws them by published shares. The default gives every head a blend of
            several, each another one, so that densities differ by head.

    Returns:
        ``q [1, N, Hq, D]``, ``k [1, N, Hkv, D]``, ``v [1, N, Hkv, D]`` (values are plain noise).

    Raises:
        ValueError: An unknown kind, or heads that do not divide.
    """
    if not kinds:
        raise argument_error("kinds", f"at least one of {(*KINDS, 'blend')}", "none")
    if heads % kv_heads:
        raise argument_error("heads", f"a multiple of kv_heads ({kv_heads})", heads)
    plot = Plot(n, head_dim, device, seed)
    group = heads // kv_heads
    q = torch.empty((1, n, heads, head_dim), dtype=dtype, device=device)
    k = torch.empty((1, n, kv_heads, head_dim), dtype=dtype, device=device)
    for h in range(kv_heads):
        planted = plant(plot, kinds[h % len(kinds)], share=h / max(1, kv_heads - 1))
        k[0, :, h] = (plot.normal(n, head_dim) + planted.keys).to(dtype)
        for member in range(h * group, (h + 1) * group):
            q[0, :, member] = (plot.normal(n, head_dim) + planted.queries).to(dtype)
    v = torch.randn((1, n, kv_heads, head_dim), dtype=dtype, device=device, generator=plot.generator)
    return QKV(q, k, v)
