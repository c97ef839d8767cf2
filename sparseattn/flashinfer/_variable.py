"""What a plan of attention over variable blocks holds, and FlashInfer's own way to count positions in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import Options, base2, capturing, check_dtype, check_heads, check_output
from sparseattn.kernels.launches import differentiable, repeatable
from sparseattn.kernels.usual import UsualCalls
from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.masks.lists import compact
from sparseattn.masks.tilings import block_spans
from sparseattn.ops.arguments import starts_with
from sparseattn.ops.block_sparse import RepeatedBlocks, block_sparse_attention, repeated_blocks
from sparseattn.ops.paged import PagedCache, paged_attention


@dataclass(frozen=True)
class Pattern:
    """What a plan selects: everything, or blocks.

    Attributes:
        blocks: bool ``[B|1, H, MB, NB]``, or None for dense attention.
        row_sizes: int32 ``[H, MB]``.
        col_sizes: int32 ``[H, NB]``.
        lengths: What the sizes add up to, where the host knows.
        masks: Masks made so far, by lengths.
    """

    blocks: Tensor | None = None
    row_sizes: Tensor | None = None
    col_sizes: Tensor | None = None
    lengths: tuple[int, int] | None = None
    masks: dict[tuple[int, int], VariableBlockMask] = field(default_factory=dict)

    def mask(self, seq_lens: tuple[int, int]) -> VariableBlockMask | None:
        """The mask for these lengths; its tiles are cut when it is first used, and kept."""
        if self.blocks is None or self.row_sizes is None or self.col_sizes is None:
            return None
        if seq_lens not in self.masks:
            self.masks[seq_lens] = BlockMask.from_variable_blocks(
                self.blocks, self.row_sizes, self.col_sizes, seq_lens=seq_lens
            )
        return self.masks[seq_lens]


@dataclass
class VariablePlan:
    """A plan: everything but the tensors of a layer.

    Attributes:
        pattern: Which blocks.
        heads: (Hq, Hkv).
        head_dim: Of all tensors.
        options: Causality, scale, soft cap, positions.
        dtype: Of all tensors.
        batched: Tensors are ``[B, S, H, D]`` of these shapes (q, k), not ``[H, L, D]``; or None.
        gathered: Positions count along what a row of blocks selects.
        impl: See ``block_sparse_attention``.
    """

    pattern: Pattern
    heads: tuple[int, int]
    head_dim: int
    options: Options
    dtype: torch.dtype
    batched: tuple[tuple[int, ...], tuple[int, ...]] | None
    gathered: bool
    impl: str

    def __post_init__(self) -> None:
        check_heads(*self.heads)
        mode = self.options.pos_encoding_mode
        if mode != "NONE" and not (mode == "ROPE_LLAMA" and self.gathered):
            hint = "Rotate q and k before the call"
            hint += "; with gathered_causal=True ROPE_LLAMA counts as FlashInfer does." if mode == "ROPE_LLAMA" else "."
            raise argument_error("pos_encoding_mode", "'NONE' with variable blocks", repr(mode), hint)
        device = torch.device("cpu")  # of slopes, which no mode here has
        self._arguments = self.options.arguments(self.heads[0], self.head_dim, device)
        self._blocks: dict[tuple[Any, ...], RepeatedBlocks] = {}
        self.again = UsualCalls()

    def replaced(self, **options: Any) -> VariablePlan:
        """The plan with other options."""
        return replace(self, options=self.options._replace(**options))

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention; results in the layout of q, LSE ``[Hq, Lq]`` or ``[B, S, Hq]`` in base 2."""
        self._check(q, k, v)
        batched = self.batched is not None
        check_output("out", out, (*q.shape[:-1], v.shape[-1]), self.dtype, q)
        check_output("lse", lse, q.shape[:-1], torch.float32, q)
        tensors = (q, k, v) if batched else (_batched(q), _batched(k), _batched(v))
        blocks = self._repeated(*tensors)
        if blocks is None:
            o, natural = self._attend(*tensors)
            o = o if batched else o[0].transpose(0, 1)
            result = o.contiguous() if out is None else out.copy_(o)
        else:
            result = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
            if out is not None and starts_with(out, q, k, v):
                result = torch.empty_like(out)
            view = result if batched else _batched(result)
            _, natural = blocks(*tensors, None, view)
            if out is lse is None and not return_lse and blocks in self._blocks.values():
                self.again.learn((q, k, v), lambda: blocks.usual((q, k, v), *tensors, view, result, natural))
            result = result if out is None or result is out else out.copy_(result)
        natural = natural if batched else natural[0].transpose(0, 1)
        if not return_lse and lse is None:
            return result
        sums = base2(natural, lse)
        return (result, sums) if return_lse else result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, Hq, D]`` and the natural-log LSE ``[B, Hq, S]``, from ``[B, S, H, D]``."""
        mask = self.pattern.mask((q.shape[1], k.shape[1]))
        if self.gathered and mask is not None:
            return _attend_gathered(q[0], k[0], v[0], mask, self._arguments, self.impl)
        a = {n: self._arguments[n] for n in ("causal", "scale", "softcap")}
        result = block_sparse_attention(q, k, v, mask, **a, return_lse=True, impl=self.impl)
        assert isinstance(result, tuple)
        return result

    def _repeated(self, q: Tensor, k: Tensor, v: Tensor) -> RepeatedBlocks | None:
        """What makes the call of these tensors again and again; None where it must be an ordinary one.

        Tiles that are cut while a graph is captured are the graph's: other calls cut their own.
        """
        if self.gathered or not repeatable(q, k, v) or differentiable(q, k, v):
            return None
        form = (q.dtype, q.device, k.device, v.device, q.shape, k.shape, v.shape)
        if form not in self._blocks:
            a = {n: self._arguments[n] for n in ("causal", "scale", "softcap")}
            mask = self.pattern.mask((q.shape[1], k.shape[1]))
            blocks = repeated_blocks(q, k, v, mask, **a, impl=self.impl, fixed=True)
            if capturing(q.device):
                return blocks
            self._blocks[form] = blocks
        return self._blocks[form]

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise unless tensors are as planned."""
        layout = "[Hq, Lq, D]" if self.batched is None else "[B, S, Hq, D]"
        for name, t, heads in (("q", q, self.heads[0]), ("k", k, self.heads[1]), ("v", v, self.heads[1])):
            if not isinstance(t, Tensor):
                raise argument_error(name, "a tensor", type(t).__name__, kind=TypeError)
            check_dtype(name, t, self.dtype)
            if self.batched is not None:
                fits = tuple(t.shape) == self.batched[name != "q"]
            else:
                fits = t.dim() == 3 and (t.shape[0], t.shape[2]) == (heads, self.head_dim)
            if not fits:
                expected = f"{layout.replace('q', 'kv') if name != 'q' else layout} of {heads} heads and head_dim "
                expected += f"{self.head_dim}, as planned"
                raise argument_error(name, expected, f"shape {tuple(t.shape)}")
        if self.batched is None and k.shape[1] != v.shape[1]:
            raise argument_error("v", f"{k.shape[1]} tokens like k", v.shape[1])
        got = (q.shape[1], k.shape[1])
        if self.batched is None and self.pattern.lengths is not None and got != self.pattern.lengths:
            expected = f"(Lq, Lk) = {self.pattern.lengths}, what the planned sizes add up to"
            raise argument_error("q and k", expected, got)


def _batched(t: Tensor) -> Tensor:
    """``[H, L, D]`` as ``[1, L, H, D]``."""
    return t.transpose(0, 1)[None]


def make_pattern(
    block_mask_map: Tensor | None,
    block_row_sz: Tensor | None,
    block_col_sz: Tensor | None,
    device: torch.device,
    non_blocking: bool,
    validate: bool,
) -> Pattern:
    """A copy of the pattern on the device; sizes are checked where they lie on the CPU, or everywhere."""
    named = {"block_mask_map": block_mask_map, "block_row_sz": block_row_sz, "block_col_sz": block_col_sz}
    copies, lengths = [], []
    for name, t in named.items():
        dtype, rank = (torch.bool, (3, 4)) if name == "block_mask_map" else (torch.int32, (2,))
        if not isinstance(t, Tensor) or t.dtype != dtype:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise argument_error(name, f"a tensor of {dtype}", got, kind=TypeError)
        if t.dim() not in rank or 0 in t.shape:
            raise argument_error(name, f"{' or '.join(str(r) for r in rank)} dimensions", f"shape {tuple(t.shape)}")
        if dtype == torch.int32 and (validate or t.device.type == "cpu"):
            lengths.append(_total(name, t))
        # A copy in any case: what was planned must not change with the caller's tensors.
        copies.append(t.clone() if t.device == device else t.to(device, non_blocking=non_blocking))
    blocks, rows, cols = copies
    heads = max(blocks.shape[-3], rows.shape[0])
    for name, t, count in (("block_row_sz", rows, blocks.shape[-2]), ("block_col_sz", cols, blocks.shape[-1])):
        if t.shape[1] != count or t.shape[0] not in (1, heads) or blocks.shape[-3] not in (1, heads):
            expected = f"shape {(blocks.shape[-3], count)} like block_mask_map"
            raise argument_error(name, expected, f"shape {tuple(t.shape)}")
    return Pattern(blocks, rows, cols, (lengths[0], lengths[1]) if len(lengths) == 2 else None)


def _total(name: str, sizes: Tensor) -> int:
    """What the sizes of each head add up to. Reads them."""
    least, totals = int(sizes.min()), sizes.sum(-1).tolist()
    if least < 0:
        raise argument_error(name, "sizes of at least 0", least)
    if len(set(totals)) > 1:
        raise argument_error(name, "sizes that add up to the same length for all heads", totals)
    return totals[0]


def _attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, mask: VariableBlockMask, arguments: dict[str, Any], impl: str
) -> tuple[Tensor, Tensor]:
    """FlashInfer's own form: each row of blocks of each KV head is a request, whose cache are the keys it selects.

    Tokens are pages of one. Takes q ``[Lq, Hq, D]``, k and v ``[Lk, Hkv, D]``; returns ``[1, Lq, Hq, D]`` and the LSE
    ``[1, Hq, Lq]``.
    """
    (lq, hq, dim), (lk, hkv) = q.shape, k.shape[:2]
    # One more row and column of blocks hold the tokens past the last block: they see nothing and are not seen.
    blocks = torch.nn.functional.pad(mask.blocks[0], (0, 1, 0, 1)).expand(hkv, -1, -1)
    _, row_ends = block_spans(mask.row_sizes, lq)
    _, col_ends = block_spans(mask.col_sizes, lk)
    token = torch.arange(lk, dtype=torch.int32, device=q.device).expand(hkv, lk).contiguous()
    column = torch.searchsorted(col_ends.expand(hkv, -1).contiguous(), token, right=True)
    counts, tokens = compact(blocks.gather(-1, column[:, None].expand(-1, blocks.shape[1], -1)))
    head = torch.arange(hkv, dtype=torch.int32, device=q.device)[:, None]
    pages = tokens + head[:, None] * lk
    ends = torch.nn.functional.pad(row_ends.expand(hkv, -1), (0, 1), value=lq) + head * lq
    offsets = torch.nn.functional.pad(ends.flatten(), (1, 0))
    keys, values = (t.transpose(0, 1).reshape(hkv * lk, 1, 1, dim) for t in (k, v))
    folded = q.unflatten(1, (hkv, -1)).transpose(0, 1).reshape(hkv * lq, hq // hkv, dim)
    result = paged_attention(
        folded, PagedCache(keys, values, counts.flatten(), pages.flatten(0, 1)), cu_seqlens_q=offsets,
        max_seqlen_q=lq, causal=arguments["causal"], scale=arguments["scale"], softcap=arguments["softcap"],
        positions=arguments["positions"], return_lse=True, impl=impl,
    )  # fmt: skip
    assert isinstance(result, tuple)
    o, natural = result
    o = o.view(hkv, lq, hq // hkv, dim).transpose(0, 1).reshape(1, lq, hq, dim)
    return o, natural.view(hq // hkv, hkv, lq).transpose(0, 1).reshape(1, hq, lq)
