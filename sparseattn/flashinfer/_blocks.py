"""What a plan of block-sparse attention holds, and the forms in which FlashInfer's patterns come."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._checks import check_count
from sparseattn.flashinfer._common import (
    FLOAT8,
    Dtypes,
    Options,
    as_queries,
    check_dtype,
    check_output,
    fold_scales,
)
from sparseattn.flashinfer._wrapper import as_results, plain_options
from sparseattn.kernels.launches import form_of
from sparseattn.kernels.usual import UsualCalls
from sparseattn.masks.lists import compact
from sparseattn.ops.bsr import BlockRows, RepeatedRows
from sparseattn.ops.paged import CustomMask


@dataclass
class BlockPlan:
    """A plan of block-sparse attention: everything but the tensors of a layer.

    Attributes:
        rows: The pattern.
        shapes: Of q and k: [M, Hq, D] and [N, Hkv, D], or with a batch in front.
        options: Causality, scale, positions.
        gathered: Positions count along what a block row lists.
        masked: A mask has taken the place of causality.
        kv_layout: "NHD" or "HND".
        dtypes: Declared ones, checked at every run.
        impl: See ``bsr_attention``.
        again: Calls of ``q``, ``k`` and ``v`` alone that were made before.
    """

    rows: BlockRows
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    options: Options
    gathered: bool
    masked: bool
    kv_layout: str
    dtypes: Dtypes
    impl: str
    _scale: float = field(init=False, repr=False)
    _attend: RepeatedRows = field(init=False, repr=False)
    _accepted: set[tuple[Any, ...]] = field(init=False, repr=False, default_factory=set)
    again: UsualCalls = field(init=False, repr=False, default_factory=UsualCalls)

    def __post_init__(self) -> None:
        heads, dim = self.shapes[0][-2:]
        arguments = self.options.arguments(heads, dim, self.rows.device)
        self._scale = arguments.pop("scale")
        arguments |= {"causal": arguments["causal"] and not self.masked, "gathered": self.gathered}
        self._attend = RepeatedRows(self.rows, **arguments, impl=self.impl)

    @functools.cached_property
    def _likeness(self) -> tuple[Any, ...] | None:
        """All that calls of block-sparse attention depend on but addresses and contents; None for other calls."""
        lists = self.rows.lists
        if lists is None or self.masked or not plain_options(self.options):
            return None
        tensors = form_of(lists.kv_num_blocks), form_of(lists.kv_indices)
        own = self.shapes, self.options, self.gathered, self.kv_layout, self.dtypes, self.impl
        return *own, lists.block_size, lists.seq_lens, *tensors

    def after(self, before: BlockPlan | None) -> BlockPlan:
        """This plan, which knows from the one before it what calls come to, if only their contents differ."""
        alike = self._likeness
        if before is not None and alike is not None and alike == before._likeness:
            self._take_over(before)
        return self

    def following(self, rows: BlockRows) -> BlockPlan:
        """This plan over rows of ``follow_rows``."""
        plan = object.__new__(BlockPlan)
        plan.__dict__.update(self.__dict__)
        plan.rows, plan._attend = rows, self._attend.over(rows)
        plan._take_over(self)
        return plan

    def _take_over(self, before: BlockPlan) -> None:
        """Know what calls come to from a plan whose lists differ in their contents only."""
        lists = self.rows.lists
        if lists is not None:
            named = {"kv_num_blocks": lists.kv_num_blocks, "kv_indices": lists.kv_indices}
            self.again = before.again.moved({name: t.data_ptr() for name, t in named.items()})

    def replaced(self, **options: Any) -> BlockPlan:
        """The plan with other options."""
        return replace(self, options=self.options._replace(**options))

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scales: tuple[float | Tensor | None, float | Tensor | None, float | Tensor | None],
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of q ``[..., M, Hq, D]``; the output ``[..., M, Hq, Dv]``, and base-2 LSE ``[..., M, Hq]``."""
        given = q, k, v
        form = tuple([(t.dtype, t.shape) for t in (q, k, v) if isinstance(t, Tensor)])
        if form not in self._accepted:
            self._check(q, k, v)
            self._accepted.add(form)
        if self.kv_layout == "HND":
            k, v = k.transpose(-3, -2), v.transpose(-3, -2)
        o_dtype = self.dtypes.o
        if out is not None or lse is not None:
            check_output("out", out, (*q.shape[:-1], v.shape[-1]), o_dtype, q)
            check_output("lse", lse, q.shape[:-1], torch.float32, q)
        scale_q, scale_k, scale_v = scales
        if scale_q is None and scale_k is None and scale_v is None and q.dtype not in FLOAT8:
            o, natural = self._attend(q, k, v, scale=self._scale, out=out if o_dtype == q.dtype else None)
        else:
            folded = fold_scales(self._scale, *scales)
            q = as_queries(q, folded.q)
            direct = out if o_dtype == q.dtype else None
            o, natural = self._attend(q, k, v, scale=folded.scale, k_scale=folded.k, v_scale=folded.v, out=direct)
        plain = scale_q is scale_k is scale_v is out is lse is None and not return_lse
        if plain and q is given[0] and o.dtype == o_dtype:
            self.again.learn(given, lambda: self._attend.usual(given, q, k, v, self._scale, o, natural))
        return as_results(o, natural, o_dtype, out, lse, return_lse)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise unless all tensors are as planned."""
        for name, t in (("q", q), ("k", k), ("v", v)):
            if not isinstance(t, Tensor):
                raise argument_error(name, "a tensor", type(t).__name__, kind=TypeError)
            check_dtype(name, t, self.dtypes.q if name == "q" else self.dtypes.kv)
        expected_q, expected_k = self.shapes
        if tuple(q.shape) != expected_q:
            raise argument_error("q", f"shape {expected_q}, as planned", f"shape {tuple(q.shape)}")
        if self.kv_layout == "HND" and k.dim() >= 3 and v.dim() >= 3:
            k, v = k.transpose(-3, -2), v.transpose(-3, -2)
        if tuple(k.shape) != expected_k:
            got = f"shape {tuple(k.shape)}, tokens first"
            raise argument_error("k", f"shape {expected_k} ({self.kv_layout}), as planned", got)
        if v.shape[:-1] != k.shape[:-1]:
            got = f"shape {tuple(v.shape)}, tokens first"
            raise argument_error("v", f"shape {[*k.shape[:-1]]} + [Dv] ({self.kv_layout}) like k", got)


def check_ascending(indptr: Tensor) -> None:
    """Raise unless numbers on the CPU ascend from 0."""
    if int(indptr[0]) != 0 or bool((indptr.diff() < 0).any()):
        raise argument_error("indptr", "numbers that ascend from 0", indptr.tolist())


def listed_rows(
    device: torch.device, indptr: Tensor | None, indices: Tensor | None, n: int, columns: int, non_blocking: bool
) -> tuple[Tensor, Tensor]:
    """``indptr`` and ``indices`` on the device; contents are checked where they lie on the CPU."""
    check_count("N", n, 0)
    check_count("C", columns, 1)
    for name, t in (("indptr", indptr), ("indices", indices)):
        if not isinstance(t, Tensor) or t.dtype != torch.int32:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise argument_error(name, "an int32 tensor", got, "Convert with .int().", kind=TypeError)
        if t.dim() != 1 or (name == "indptr" and t.shape[0] == 0):
            expected = "[MB + 1]" if name == "indptr" else "[nnz]"
            raise argument_error(name, expected, f"shape {tuple(t.shape)}")
    assert indptr is not None
    assert indices is not None
    if indptr.device.type == "cpu":
        check_ascending(indptr)
        if int(indptr[-1]) > indices.shape[0]:
            raise argument_error("indptr", f"an end of at most nnz = {indices.shape[0]}", int(indptr[-1]))
    if indices.device.type == "cpu" and indices.numel() and isinstance(columns, int) and columns > 0:
        least, most = (int(t) for t in indices.aminmax())
        if least < 0 or most >= -(-n // columns):
            wrong = least if least < 0 else most
            raise argument_error(
                "indices", f"column blocks in 0..{-(-n // columns) - 1}, N = {n} and C = {columns}", wrong
            )
    return indptr.to(device, non_blocking=non_blocking), indices.to(device, non_blocking=non_blocking)


def inner_mask(
    mask: Tensor | None, packed_mask: Tensor | None, device: torch.device, non_blocking: bool
) -> Tensor | CustomMask | None:
    """What is kept inside the blocks, on the device."""
    if mask is not None and packed_mask is not None:
        raise argument_error("packed_mask", "None beside mask", "a tensor")
    for name, t, dtype in (("mask", mask, torch.bool), ("packed_mask", packed_mask, torch.uint8)):
        if t is not None and (not isinstance(t, Tensor) or t.dtype != dtype):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise argument_error(name, str(dtype), got, kind=TypeError)
    if packed_mask is not None:
        return CustomMask(packed_mask.reshape(-1).to(device, non_blocking=non_blocking))
    return None if mask is None else mask.to(device, non_blocking=non_blocking)


def head_lists(
    block_mask: Tensor, heads: tuple[int, int], device: torch.device, non_blocking: bool
) -> tuple[Tensor, Tensor]:
    """Counts ``[1, H, MB]`` and ascending lists ``[1, H, MB, NB]`` of a dense pattern."""
    if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool:
        got = block_mask.dtype if isinstance(block_mask, Tensor) else type(block_mask).__name__
        raise argument_error("block_mask", "a bool tensor", got, kind=TypeError)
    if block_mask.dim() != 3 or block_mask.shape[0] not in (1, *heads):
        expected = f"[H, MB, NB] with 1, Hkv = {heads[1]} or Hq = {heads[0]} heads"
        raise argument_error("block_mask", expected, f"shape {tuple(block_mask.shape)}")
    return compact(block_mask[None].to(device, non_blocking=non_blocking))


def batched_blocks(sparse_mask: Tensor, q: Tensor, k: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
    """``[B|1, H, MB, NB]``; what is expanded over the batch or the heads is there once."""
    if not isinstance(sparse_mask, Tensor) or sparse_mask.dtype != torch.bool:
        got = sparse_mask.dtype if isinstance(sparse_mask, Tensor) else type(sparse_mask).__name__
        raise argument_error("sparse_mask", "a bool tensor, one entry a block", got, kind=TypeError)
    batch = q.shape[0] if q.dim() == 4 else 1
    blocks = sparse_mask
    if blocks.dim() == 3:
        blocks = blocks[:, None]
    elif blocks.dim() == 2:
        blocks = blocks[None, None]
    if not isinstance(size, tuple | list) or len(size) != 2 or min(size) < 1:
        raise argument_error("block_size", "a number of tokens of at least 1, or a pair of them", size)
    grid = -(-q.shape[-3] // size[0]), -(-k.shape[-3] // size[1])
    heads = (1, k.shape[-2], q.shape[-2])
    if (
        blocks.dim() != 4
        or blocks.shape[0] not in (1, batch)
        or blocks.shape[1] not in heads
        or blocks.shape[2:] != grid
    ):
        expected = f"[MB, NB], [B, MB, NB] or [B, H, MB, NB] with MB, NB = {grid}, B = {batch} and H in {heads}"
        raise argument_error("sparse_mask", expected, f"shape {tuple(sparse_mask.shape)}")
    for dim in (0, 1):
        if blocks.stride(dim) == 0:
            blocks = blocks.narrow(dim, 0, 1)
    return blocks.to(device)
