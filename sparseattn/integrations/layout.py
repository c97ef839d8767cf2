"""Where the sequences of a Transformers call lie: from padding masks, caches and packed positions to row ranges.

Transformers asks the registered mask function once per forward and hands its result to every layer. Ours answers in
O(batch) memory, with what operators and selectors want:

- ``None``: nobody stated a padding mask, and keys end where queries end. The attention function then looks for packing
  in ``position_ids``.
- int32 ``[0, 1, 1, 4]``: every row is whole.
- int32 ``[B, 1, 1, 4]``: ``(q_start, q_end, k_start, k_end)`` of every sequence (padding, static caches).
- ``Packed``: several sequences in one row.

Tensors are 4-D because ``generate`` feeds the result of a compileable cache back as ``attention_mask``, and
Transformers passes 4-D masks on untouched; their shape does not grow with the cache, so compiled decoding is not
recompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparseattn.errors import argument_error
from sparseattn.integrations.mask_patterns import USE_SDPA, read_pattern, refuse_own_sparsity


class Packed(NamedTuple):
    """Sequences laid end to end; a batch counts as flattened to ``[B * S]`` first.

    Attributes:
        cu_seqlens: int32 [n + 1], cumulative lengths.
        max_seqlen: The longest length.
    """

    cu_seqlens: Tensor
    max_seqlen: int


Spans = tuple[tuple[int, int], ...]


class Layout(NamedTuple):
    """Arguments that tell an operator or selector where the sequences lie.

    Attributes:
        arguments: ``ranges_*`` or ``cu_seqlens_*`` and ``max_seqlen_*`` keywords; empty when every row is whole.
        packed: Tensors must be flattened to ``[total, heads, head_dim]``.
        spans: The valid keys ``[start, end)`` of every row, where the host knows them; else None.
        seen: Tokens seen at the end of the call, this call's queries included, likewise.
    """

    arguments: dict[str, Any]
    packed: bool
    spans: Spans | None = None
    seen: int | None = None


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | Packed | None:
    """The mask function registered in ``AttentionMaskInterface``.

    Positions count from the start of the sequence: queries are ``q_offset ... q_offset + q_length - 1``, keys
    ``kv_offset ... kv_offset + kv_length - 1``, of which a static cache has filled only those up to the last query.

    Args:
        batch_size: Rows.
        q_length: Queries of this forward.
        kv_length: Keys the layers will see.
        q_offset: Position of the first query; a tensor under a static cache.
        kv_offset: Position of the first key (sliding caches drop the oldest).
        mask_function: Transformers' index function of the pattern; inspected, never evaluated.
        attention_mask: bool [B, W] padding mask from position 0, or None.
        use_vmap: The caller added a mask function of its own.
        local_size: Window or chunk size.
        config: The text config.
        device: Where the result belongs.
        **kwargs: Ignored hints meant for other implementations.

    Returns:
        See the module's docstring.

    Raises:
        ValueError: A pattern or padding mask that row ranges cannot express.
    """
    refuse_own_sparsity(config)
    if use_vmap:
        raise argument_error(
            "attention mask", "plain causal or sliding attention", "an extra or/and mask function", USE_SDPA
        )
    causal, packed = read_pattern(mask_function, local_size, config)
    if packed is not None:
        return pack(packed)
    if attention_mask is None:
        if isinstance(q_offset, int) and isinstance(kv_offset, int):
            ends_together = kv_offset + kv_length == q_offset + q_length
            if ends_together or not causal:
                return None
        start = torch.zeros(batch_size, dtype=torch.int32, device=device)
        end = start + (q_offset + q_length if causal else kv_length)
    else:
        seen = q_offset + q_length if causal else attention_mask.shape[-1]
        start, end = _run_of_ones(attention_mask)
        if not _unreadable(attention_mask):
            whole, seen, spans = _check_padding(attention_mask, start, end, seen, causal)
            known = isinstance(q_offset, int) and isinstance(kv_offset, int)
            if whole and known and (not causal or kv_offset + kv_length == seen):
                return torch.empty(0, 1, 1, 4, dtype=torch.int32, device=attention_mask.device)
            ranges = _ranges(start, end, q_length, kv_length, q_offset, kv_offset, causal, local_size is not None)
            if causal and isinstance(kv_offset, int):
                clamped = (tuple(min(max(min(x, seen) - kv_offset, 0), kv_length) for x in span) for span in spans)
                _known[ranges] = tuple(clamped), seen
            return ranges
    return _ranges(start, end, q_length, kv_length, q_offset, kv_offset, causal, local_size is not None)


def resolve(
    mask: Any,
    query: Tensor,
    key: Tensor,
    causal: bool,
    windowed: bool,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
) -> Layout:
    """What the attention function does with the mask it is handed, and with the packing arguments beside it.

    Besides this module's own masks it takes a 2-D padding mask (models that skip the mask interface pass it on), as
    wide as the tokens seen so far. Precedence: padding, then ``cu_seq_lens_*``, then resets in ``position_ids``; these
    are looked at when no mask was stated and the call starts at an empty cache.

    Args:
        mask: Result of ``row_mask``, or [B, W] of any dtype, or None.
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Sk, D]``.
        causal: Of the call.
        windowed: The call has a sliding window.
        position_ids: ``[B, Sq]`` or ``[1, Sq]``, or None.
        cu_seq_lens_q: [n + 1] cumulative lengths in the flattened rows, or None.
        cu_seq_lens_k: Likewise for keys; defaults to ``cu_seq_lens_q``.
        max_length_q: Longest query length; computed (waiting for the device) when missing.
        max_length_k: Longest key length, likewise.

    Raises:
        ValueError: A mask that row ranges cannot express.
        TypeError: A mask of another kind.
    """
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        width = mask.shape[1]
        if causal and width < q_length:
            raise argument_error("attention_mask", f"a mask over all tokens, at least {q_length}", f"width {width}")
        mask = row_mask(
            batch,
            q_length,
            kv_length,
            # A mask of another width than the queries of a non-causal call is that of cross-attention's keys.
            q_offset=width - q_length if causal else 0,
            kv_offset=max(width - kv_length, 0),
            mask_function=None if causal else _bidirectional,
            attention_mask=mask.to(query.device, torch.bool),
            local_size=1 if windowed else None,
        )
    is_ours = isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 4
    if not (mask is None or isinstance(mask, Packed) or is_ours):
        got = f"a {mask.dtype} mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        kind = ValueError if isinstance(mask, Tensor) else TypeError
        raise argument_error("attention_mask", "None or a 2-D padding mask [batch, seq]", got, USE_SDPA, kind)

    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if is_ours and mask.shape[0] > 0:
            raise argument_error("attention_mask", "None beside cu_seq_lens_q", "a padding mask", "Drop one of them.")
        return _from_cu_seq_lens(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if mask is None and 1 < q_length == kv_length and position_ids is not None and position_ids.dim() == 2:
        mask = packed_positions(position_ids.expand(batch, -1) if position_ids.shape[0] == 1 else position_ids)
    if isinstance(mask, Packed):
        lengths = {"max_seqlen_q": mask.max_seqlen, "max_seqlen_k": mask.max_seqlen}
        return Layout({"cu_seqlens_q": mask.cu_seqlens, "cu_seqlens_k": mask.cu_seqlens, **lengths}, True)
    if mask is None or mask.shape[0] == 0:
        return Layout({}, False, ((0, kv_length),) * batch, kv_length)
    rows = mask.view(-1, 4)
    # A mask made from another batch's metadata (beam search, expanded inputs) must not silently broadcast.
    if rows.shape[0] != batch:
        raise argument_error("attention_mask", f"{batch} rows like the query", rows.shape[0])
    ranges = {"ranges_q": rows[:, :2].contiguous(), "ranges_k": rows[:, 2:].contiguous()}
    return Layout(ranges, False, *(None, None) if _unreadable(mask) else _known.get(mask, (None, None)))


def pack(sequence_ids: Tensor) -> Packed:
    """Cumulative lengths from the sequence each token belongs to. Waits for the device.

    Example: ids ``[[0, 0, 1], [0, 0, 0]]`` give ``cu_seqlens = [0, 2, 3, 6]``, ``max_seqlen = 3``.

    Args:
        sequence_ids: [B, S], constant within a sequence; rows never share one.
    """
    first = torch.ones_like(sequence_ids, dtype=torch.bool)
    first[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    starts = first.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([starts, starts.new_full((1,), sequence_ids.numel())])
    return Packed(cu_seqlens.int(), int(cu_seqlens.diff().max()))


@torch.compiler.disable
def packed_positions(position_ids: Tensor) -> Packed | None:
    """Packing that positions reveal: a new sequence wherever they do not rise by one. None when they always do.

    Reads the device, once per ``position_ids`` tensor: the layers of a forward share the answer.

    Args:
        position_ids: [B, S].
    """
    # Inference tensors carry no version, so a remembered answer could be about what a buffer held before.
    remember = not position_ids.is_inference()
    if remember:
        version, answer = _packed_memo.get(position_ids, (None, None))
        if version == position_ids._version:
            return answer
    jumps = position_ids.diff(dim=-1) != 1
    answer = pack(torch.nn.functional.pad(jumps.cumsum(-1), (1, 0))) if bool(jumps.any()) else None
    if remember:
        _packed_memo[position_ids] = (position_ids._version, answer)
    return answer


_packed_memo: Any = WeakTensorKeyDictionary()
# Of the ranges that ``row_mask`` returned: the spans of the keys, and how many tokens were seen.
_known: Any = WeakTensorKeyDictionary()


def _from_cu_seq_lens(
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | Tensor | None, max_k: int | Tensor | None
) -> Layout:
    if isinstance(cu_k, dict):
        raise argument_error(
            "cu_seq_lens_k", "a tensor", "a dict (continuous batching)", "Paged attention is not supported."
        )
    if cu_q is None:
        raise argument_error("cu_seq_lens_q", "given together with cu_seq_lens_k", None)
    cu_k = cu_q if cu_k is None else cu_k
    if max_q is None:
        max_q = cu_q.diff().max()
    if max_k is None:
        max_k = max_q if cu_k is cu_q else cu_k.diff().max()
    return Layout(
        {
            "cu_seqlens_q": cu_q.int(),
            "cu_seqlens_k": cu_k.int(),
            "max_seqlen_q": int(max_q),
            "max_seqlen_k": int(max_k),
        },
        True,
    )


def _ranges(
    start: Tensor,
    end: Tensor,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int | Tensor,
    causal: bool,
    windowed: bool,
) -> Tensor:
    """Valid positions [start, end) of every sequence -> int32 [B, 1, 1, 4] rows of q and k."""
    if causal:
        # The last valid query and the last valid key are the same token, so bottom-right alignment holds.
        end = torch.minimum(end, torch.as_tensor(q_offset + q_length, device=end.device))
    k_start, k_end = ((x - kv_offset).clamp(0, kv_length) for x in (start, end))
    if causal or (windowed and q_length == kv_length):
        q_start, q_end = ((x - q_offset).clamp(0, q_length) for x in (start, end))
    else:
        # Every query of a bidirectional call sees all valid keys; the mask may be that of other tokens (an encoder's).
        q_start, q_end = torch.zeros_like(start), torch.full_like(end, q_length)
    return torch.stack([q_start, q_end, k_start, k_end], dim=-1).int()[:, None, None, :]


def _run_of_ones(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First one and one past the last one of every row; (0, 0) for a row of zeros."""
    count = mask.sum(-1)
    start = torch.where(count > 0, mask.int().argmax(-1), 0)
    return start, start + count


def _check_padding(
    mask: Tensor, start: Tensor, end: Tensor, seen: int | Tensor, causal: bool
) -> tuple[bool, int, Spans]:
    """Refuse masks that are not one run of ones per row, or too short. One device read.

    Returns:
        Whether nothing is masked, the tokens seen, and every row's run ``[start, end)``.
    """
    rises = mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(-1)
    tokens = torch.as_tensor(seen, device=mask.device)
    facts = torch.stack([mask.all(), (rises > 1).any(), tokens]).long()
    whole, holes, tokens_seen, *runs = torch.cat([facts, start, end]).tolist()
    if causal and tokens_seen > mask.shape[-1]:
        raise argument_error(
            "attention_mask",
            f"a mask over all {tokens_seen} tokens seen so far, cached ones included",
            f"width {mask.shape[-1]}",
        )
    if holes:
        raise argument_error(
            "attention_mask",
            "one run of ones per row (left or right padding)",
            "a row with zeros between ones",
            "Generating after a right-padded prompt does this: set tokenizer.padding_side = 'left'.",
        )
    rows = mask.shape[0]
    return bool(whole), tokens_seen, tuple(zip(runs[:rows], runs[rows:], strict=True))


def _unreadable(tensor: Tensor) -> bool:
    """Whether values cannot be looked at here: under compilation, or while a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _bidirectional() -> None:
    """Stands for Transformers' function in calls of our own."""


_bidirectional.__name__ = "bidirectional_mask_function"
