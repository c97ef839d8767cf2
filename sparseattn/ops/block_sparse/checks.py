"""What block-sparse attention accepts, and its arguments brought to one form."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32, float64

from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.ops.arguments import check_number, check_sinks, check_softcap, check_window, narrower
from sparseattn.ops.block_sparse.geometry import Geometry
from sparseattn.ops.block_sparse.tiles import tile_size, tiling_of
from sparseattn.ops.sequences import Sequences

IMPLEMENTATIONS = ("gluon", "triton", "reference")
_DTYPES = (bfloat16, float16, float32, float64)
# Rows and columns of a block where there is no mask; implementations tile dense attention as they like.
_DENSE_BLOCK = 128


def make_geometry(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | VariableBlockMask | None,
    causal: bool | None,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    sinks: Tensor | None,
    impl: str,
    seq: Sequences,
    mean_correction: bool = False,
) -> Geometry:
    """Check everything but the layout (``resolve_sequences`` did) and bring it to one form."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise argument_error("impl", f"one of {('auto', *IMPLEMENTATIONS)}", repr(impl))
    _check_tensors(q, k, v)
    if causal is not None and not isinstance(causal, bool):
        raise argument_error("causal", "True, False or None", repr(causal), kind=TypeError)
    if not isinstance(mean_correction, bool):
        raise argument_error("mean_correction", "True or False", repr(mean_correction), kind=TypeError)
    left, right = check_window(window, "window")
    columns: tuple[Tensor | None, Tensor | None] = (None, None)
    pieces = None
    if mask is None:
        is_causal = causal is not False
        lists: tuple[Tensor | None, Tensor | None] = (None, None)
        block_q = block_kv = _DENSE_BLOCK
    else:
        _check_mask(mask, q, k, seq)
        if causal is False and mask.causal:
            raise argument_error(
                "causal", "None or True with a causal mask", False, "Build the mask with causal=False instead."
            )
        is_causal = bool(causal) or mask.causal
        if isinstance(mask, VariableBlockMask):
            _check_variable(seq, mean_correction)
            block_q, block_kv = tile_size(mask)
            tiling = tiling_of(mask, (block_q, block_kv))
            pieces, lists = tiling.pieces, (tiling.counts, tiling.tiles)
        else:
            lists = (mask.kv_num_blocks, mask.kv_indices)
            if mask.column_indices is not None and mask.column_indices.shape[-1] > 0:
                columns = (mask.column_counts(), mask.column_indices)
            block_q, block_kv = mask.block_size
        mask_left, mask_right = check_window(mask.window, "mask.window")
        left, right = narrower(left, mask_left), narrower(right, mask_right)
    if sinks is not None:
        check_sinks(sinks, q.shape[-2], q)
    return Geometry(
        *lists,
        None,
        None,
        block_q,
        block_kv,
        seq.q_start,
        seq.q_end,
        seq.k_start,
        seq.k_end,
        seq.batch,
        seq.max_q,
        seq.max_k,
        seq.packed,
        is_causal,
        left,
        # Causal attention sees nothing to the right anyway.
        -1 if is_causal else right,
        q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale),
        check_softcap(softcap),
        *columns,
        # Without a mask nothing is skipped.
        mean_correction and mask is not None,
        pieces,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in _DTYPES:
        raise argument_error("q", "bfloat16, float16, float32 or float64", q.dtype, kind=TypeError)
    if v.dim() != k.dim():
        raise argument_error("v", f"{k.dim()} dimensions like k", f"shape {tuple(v.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise argument_error(name, f"{q.dtype} like q", t.dtype, "Convert with .to(q.dtype).", kind=TypeError)
        if t.device != q.device:
            raise argument_error(name, f"device {q.device} like q", t.device)
    if k.shape[-1] != q.shape[-1]:
        raise argument_error("k", f"head_dim {q.shape[-1]} like q", k.shape[-1])
    if v.shape[:-1] != k.shape[:-1]:
        raise argument_error("v", f"shape {(*k.shape[:-1], 'head_dim')} like k", tuple(v.shape))
    for name, t in (("q", q), ("v", v)):
        if t.shape[-1] == 0 or t.shape[-2] == 0:
            raise argument_error(name, "at least one head and a head_dim of at least 1", f"shape {tuple(t.shape)}")
    if q.shape[-2] % k.shape[-2]:
        raise argument_error(
            "q",
            f"a number of heads that is a multiple of k's {k.shape[-2]}",
            q.shape[-2],
            "KV heads serve equal groups.",
        )


def _check_mask(mask: BlockMask | VariableBlockMask, q: Tensor, k: Tensor, seq: Sequences) -> None:
    if not isinstance(mask, BlockMask | VariableBlockMask):
        hint = "Build one with BlockMask.from_dense." if isinstance(mask, Tensor) else ""
        expected = "a BlockMask, a VariableBlockMask or None"
        raise argument_error("mask", expected, type(mask).__name__, hint, kind=TypeError)
    if mask.device != q.device:
        raise argument_error("mask", f"device {q.device} like q", mask.device, "Move it with mask.to().")
    heads = mask.heads
    if tuple(mask.seq_lens) != (seq.max_q, seq.max_k):
        hint = "Packed masks are built for max_seqlen_q and max_seqlen_k." if seq.packed else ""
        raise argument_error("mask", f"lengths (Sq, Sk) = {(seq.max_q, seq.max_k)}", tuple(mask.seq_lens), hint)
    if mask.batch not in (1, seq.batch):
        raise argument_error("mask", f"batch size 1 or {seq.batch}", mask.batch)
    allowed = (1, k.shape[-2], q.shape[-2])
    if heads not in allowed:
        raise argument_error("mask", f"1, Hkv = {allowed[1]} or Hq = {allowed[2]} heads", heads)
    if isinstance(mask, VariableBlockMask):
        return
    # One side may be whole while the other is not; a mask that is ragged states both.
    if not seq.ragged and (mask.seqused_q is not None or mask.seqused_k is not None):
        raise argument_error(
            "mask",
            "a mask for whole rows, since no ranges were given",
            "one for a ragged batch (seqused_q/seqused_k)",
            "Pass the same ranges_q/ranges_k or cu_seqlens that selected it.",
        )


def _check_variable(seq: Sequences, mean_correction: bool) -> None:
    """Raise for what masks of variable blocks do not go with."""
    if seq.ragged:
        hint = "Its blocks are those of whole rows: call sequence by sequence, or use blocks of one size."
        raise argument_error("mask", "a BlockMask with cu_seqlens or ranges", "a VariableBlockMask", hint)
    if mean_correction:
        hint = "Means are taken over blocks of one size."
        raise argument_error("mean_correction", "False with a VariableBlockMask", True, hint)
