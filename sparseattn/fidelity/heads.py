"""What a mask keeps of each head: density, recall and its tail, output error, and where that lies between bounds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.fidelity.bounds import RecallBounds, recall_bounds
from sparseattn.fidelity.mass import deficit_from_lse, window_intersection
from sparseattn.masks import BlockMask
from sparseattn.ops.block_sparse import block_sparse_attention


class HeadFidelity(NamedTuple):
    """Of every query head: float32 [Hq] each, on the device. NaN for heads of which no row sees a key.

    Attributes:
        density: Computed share of the visible blocks, mean over sequences.
        recall: Share of attention mass kept, mean over all rows that see a key.
        p05: Its 5th percentile: nineteen of twenty rows keep more.
        worst: Its least value.
        deficit: Mean LSE deficit, ``-log(recall)``, in nats; infinite where a row keeps nothing.
        output_error: Relative L2 distance of the output from dense attention's; None without values.
        random: Mean recall of as many blocks drawn at random; None unless asked for. See ``recall_bounds``.
        oracle: Mean recall of as many of the best blocks; likewise.
    """

    density: Tensor
    recall: Tensor
    p05: Tensor
    worst: Tensor
    deficit: Tensor
    output_error: Tensor | None = None
    random: Tensor | None = None
    oracle: Tensor | None = None

    @property
    def normalised(self) -> Tensor | None:
        """Where recall lies between random (0) and oracle (1); 1 where the two coincide. None without bounds."""
        if self.random is None or self.oracle is None:
            return None
        room = self.oracle - self.random
        # Where every block is kept, or all blocks are alike, there is nothing to choose and nothing to lose.
        return torch.where(room > 1e-6, (self.recall - self.random) / room, torch.ones_like(room))

    def with_bounds(self, bounds: RecallBounds) -> HeadFidelity:
        """The same with ``random`` and ``oracle``."""
        return self._replace(random=bounds.random, oracle=bounds.oracle)

    def to_dict(self) -> dict[str, list[float]]:
        """Lists of numbers by head, those that are there. Waits for the device."""
        values = {**self._asdict(), "normalised": self.normalised}
        return {name: value.tolist() for name, value in values.items() if value is not None}

    def summary(self) -> dict[str, float]:
        """Means over heads, and the worst row of any head; heads without rows left out. Waits for the device."""
        found = {}
        for name, values in self.to_dict().items():
            defined = [value for value in values if not math.isnan(value)]
            if defined:
                found[name] = min(defined) if name == "worst" else sum(defined) / len(defined)
        return found


def head_fidelity(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: BlockMask,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bounds: bool = False,
    impl: str = "auto",
    **layout: Any,
) -> HeadFidelity:
    """Measure a mask against dense attention on the same queries, keys and values, head by head.

    Memory grows with the sequence, not with its square. With ``bounds`` one number a block of one head is added, and
    the time of dense attention in plain PyTorch.

    Args:
        q: Queries ``[B, Sq, Hq, D]``, or packed ``[total, Hq, D]``.
        k: Keys ``[B, Sk, Hkv, D]``, or packed.
        v: Values, for the output error; None to leave it out.
        mask: The selection, of any method.
        causal: As in ``block_sparse_attention``; None: as the mask says.
        scale: Likewise; default ``1 / sqrt(D)``.
        window: Likewise; intersected with the mask's.
        softcap: Likewise.
        bounds: Also compute what random and the best blocks would keep at this density (``recall_bounds``).
        impl: As in ``block_sparse_attention``.
        **layout: ``cu_seqlens_*``, ``max_seqlen_*``, ``ranges_*`` of a ragged batch, as the operator takes them.

    Returns:
        One number a query head; rows of all sequences count alike.

    Raises:
        TypeError: As ``block_sparse_attention``.
        ValueError: Likewise.
    """
    if not isinstance(mask, BlockMask):
        raise argument_error("mask", "a BlockMask", type(mask).__name__, kind=TypeError)
    common: dict[str, Any] = {"scale": scale, "softcap": softcap, "impl": impl, "return_lse": True, **layout}
    values = k[..., :16] if v is None else v  # the LSE does not depend on them
    with torch.no_grad():
        out, lse = block_sparse_attention(q, k, values, mask, causal=causal, window=window, **common)
        dense_causal = mask.causal if causal is None else causal
        dense_window = window_intersection(mask.window, window)
        dense_out, dense_lse = block_sparse_attention(
            q, k, values, None, causal=dense_causal, window=dense_window, **common
        )
        outputs = None if v is None else (out, dense_out)
        found = head_statistics(mask, lse, dense_lse, outputs)
        if bounds:
            found = found.with_bounds(
                recall_bounds(q, k, mask, causal=causal, scale=scale, window=window, softcap=softcap, **layout)
            )
    return found


def head_statistics(
    mask: BlockMask, lse_sparse: Tensor, lse_dense: Tensor, outputs: tuple[Tensor, Tensor] | None = None
) -> HeadFidelity:
    """The statistics of every head from LSEs, and outputs, at hand. Never waits for the device.

    Args:
        mask: The selection.
        lse_sparse: float32 ``[B, Hq, Sq]``, or packed ``[Hq, total]``.
        lse_dense: Dense attention's, of the same shape.
        outputs: Sparse and dense attention's outputs ``[B, Sq, Hq, Dv]``, or packed ``[total, Hq, Dv]``.
    """
    deficit = deficit_from_lse(lse_sparse, lse_dense)
    by_head = deficit.transpose(0, 1).flatten(1) if deficit.dim() == 3 else deficit  # [Hq, rows]
    heads, rows = by_head.shape
    kept = torch.exp(-by_head)
    defined = (~kept.isnan()).sum(-1, keepdim=True)
    # Ascending, NaN last: the 5th percentile is the row that a twentieth of the defined ones do not exceed.
    ordered = kept.sort(-1).values if rows else kept.new_full((heads, 1), math.nan)
    at = ((defined + 19) // 20 - 1).clamp(min=0)
    densities = mask.densities().mean(0).to(kept.device)
    error = None
    if outputs is not None:
        axes = tuple(i for i in range(outputs[0].dim()) if i != outputs[0].dim() - 2)
        difference = torch.linalg.vector_norm(outputs[0].float() - outputs[1].float(), dim=axes)
        norm = torch.linalg.vector_norm(outputs[1].float(), dim=axes)
        error = torch.where(difference == 0, 0.0, difference / norm)
    return HeadFidelity(
        density=densities.repeat_interleave(heads // densities.shape[0]),
        recall=kept.nanmean(-1),
        p05=ordered.gather(-1, at)[:, 0],
        worst=ordered[:, 0],
        deficit=by_head.nanmean(-1),
        output_error=error,
    )
