"""Block-sparse attention: what a user calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.ops.block_sparse.checks import make_geometry
from sparseattn.ops.block_sparse.library import attend, gradients_form, resolve_call
from sparseattn.ops.block_sparse.repeat import RepeatedBlocks
from sparseattn.ops.sequences import resolve_sequences


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | VariableBlockMask | None = None,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    ranges_q: Tensor | None = None,
    ranges_k: Tensor | None = None,
    mean_correction: bool = False,
    return_lse: bool = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over exactly the key blocks and columns that a mask lists; dense attention without one.

    Differentiable in q, k, v and sinks, through the output and through the LSE. Works under
    ``torch.compile(fullgraph=True)`` and, with the Triton kernels, in a CUDA graph. A query row that sees no key gives
    output 0 and LSE -inf; empty tensors give empty (or all-zero) results.

    Args:
        q: Queries ``[B, Sq, Hq, D]`` in bfloat16, float16, float32 or float64 (the last on the reference only), any
            strides; packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``.
        k: Keys ``[B, Sk, Hkv, D]`` of the same dtype; Hq must be a multiple of Hkv.
        v: Values ``[B, Sk, Hkv, Dv]``; Dv may differ from D.
        mask: Which key blocks, and which single keys besides, every query block attends, with 1, Hkv or Hq heads and
            batch 1 or B, for exactly these lengths (of ragged batches, the longest). None: every key. A
            ``VariableBlockMask`` has blocks of sizes of their own, and goes with whole rows only.
        causal: Query i sees key j only if ``j <= i + Sk - Sq`` (bottom-right aligned, lengths of the sequence itself).
            None: as the mask says, or True without a mask. True on a mask that is not causal applies both; False on
            one that is causal is an error.
        scale: Factor on the scores ``q . k``; default ``1 / sqrt(D)``.
        window: ``(left, right)``, how many keys before and after the aligned diagonal stay visible, None meaning
            unbounded. Intersected with the mask's own window.
        softcap: Scaled scores become ``softcap * tanh(score / softcap)``; None or 0: not at all.
        sinks: Learnable logits [Hq], any float dtype, that join the softmax denominator only.
        cu_seqlens_q: int32 [B + 1], cumulative query lengths of packed tensors.
        cu_seqlens_k: int32 [B + 1], cumulative key lengths; default ``cu_seqlens_q``.
        max_seqlen_q: Longest packed query length; default ``total_q``, which is right, but with it "gluon" looks for
            many tiles that nobody has, and "triton" is slower where all sequences have few queries.
        max_seqlen_k: Longest packed key length; default ``total_k``.
        ranges_q: int32 [B, 2], valid rows ``[start, end)`` of every row of a padded batch (left or right padding).
            Rows outside give output 0, LSE -inf and gradient 0.
        ranges_k: int32 [B, 2], likewise for keys and values (padding, caches longer than their content).
        mean_correction: Attend the blocks that the mask skips by their means, the zero-order correction of
            FlashPrefill v2: to query i, every key block j that is not listed for its row of blocks and that it sees
            whole (all n of its keys lie before the end, under the diagonal and in the window; a block cut short by the
            end of its sequence is whole with fewer) is one more key, the mean of the block's keys, with the mean of
            its values, counted n times. Its score is that of any key plus log n:
            ``softcap(scale * q_i . mean_j) + log n``, in output and LSE alike. Keys that the row attends as columns are
            not counted again: they are taken off n, not out of the mean. Gradients flow through the means. Blocks that
            the diagonal or a window cuts contribute nothing. Without a mask nothing is skipped.
        return_lse: Also return the LSE.
        deterministic: Gradients must be the same bits in every run, which "gluon" then computes by another, slower
            kernel. Outputs always are, and so are gradients of the other implementations.
        impl: "auto" (on CUDA Gluon where it can, else Triton, for either pass by itself; reference on CPU), "gluon"
            (Hopper; no gradients of head dims past 128 and of variable blocks), "triton" or "reference".

    Returns:
        ``o`` ``[B, Sq, Hq, Dv]`` (packed ``[total_q, Hq, Dv]``) in q's dtype, contiguous; with ``return_lse`` also
        the natural-log LSE of the scaled, soft-capped scores, without the sink: float32 (float64 for float64 inputs)
        ``[B, Hq, Sq]`` (packed ``[Hq, total_q]``).

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or numbers that do not fit; or ``impl`` cannot run this call, with the reason.
    """
    g = make_geometry(
        q, k, v, mask, causal, scale, window, softcap, sinks, impl,
        resolve_sequences(
            q, k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, ranges_q=ranges_q, ranges_k=ranges_k,
        ),
        mean_correction,
    )  # fmt: skip
    if not isinstance(deterministic, bool):
        raise argument_error("deterministic", "a bool", repr(deterministic), kind=TypeError)
    o, lse = attend(q, k, v, sinks, mask, g, impl, deterministic)
    return (o, lse) if return_lse else o


def repeated_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | VariableBlockMask | None = None,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    fixed: bool = False,
    **layout: Any,
) -> RepeatedBlocks:
    """The forward pass of ``block_sparse_attention`` for these tensors and others of the same shapes and dtypes.

    Arguments are those of ``block_sparse_attention``, and ``fixed``: contents of masks and lengths will not change.
    """
    sequences = resolve_sequences(q, k, **layout)
    return RepeatedBlocks(
        make_geometry(q, k, v, mask, causal, scale, window, softcap, None, impl, sequences, False), impl, fixed
    )


def unsupported_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | VariableBlockMask | None = None,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    ranges_q: Tensor | None = None,
    ranges_k: Tensor | None = None,
    mean_correction: bool = False,
    gradients: bool = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> str | None:
    """Why ``block_sparse_attention`` with these arguments and this ``impl`` would not run, or None if it would.

    Arguments are those of ``block_sparse_attention``, and ``gradients``: whether some will be asked for. Ones that no
    implementation accepts raise, as they do there.
    """
    g = make_geometry(
        q, k, v, mask, causal, scale, window, softcap, sinks, impl,
        resolve_sequences(
            q, k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, ranges_q=ranges_q, ranges_k=ranges_k,
        ),
        mean_correction,
    )  # fmt: skip
    return resolve_call(q, k, v, g, impl, gradients_form(deterministic) if gradients else None)[1]
