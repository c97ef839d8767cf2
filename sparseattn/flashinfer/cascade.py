"""Attention over parts of the keys, by FlashInfer's names: merging by base-2 LSE, cascades, shared prefixes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._buffers import TableBuffers, check_fits, fill
from sparseattn.flashinfer._checks import described
from sparseattn.flashinfer._common import Options, Table, csr_table, dense_cache, resolve_dtypes
from sparseattn.flashinfer._wrapper import PagedPlan, Wrapper, attend, query_rows
from sparseattn.kernels.quick import Lengths, QuickCalls
from sparseattn.ops import merge

_Cache = Tensor | tuple[Tensor, Tensor]
_Dtype = torch.dtype | str | None


def _tokens(first: Tensor, *others: Tensor) -> tuple[int] | None:
    """The first size of all tensors."""
    count = first.shape[0]
    for t in others:
        if t.shape[0] != count:
            return None
    return (count,) if count else None


_TOKENS = Lengths(_tokens, ("length",), "TOKENS")
_two, _many = QuickCalls(_TOKENS, 0, 2), QuickCalls(_TOKENS, 0, 1)
_in_place, _in_place_natural = QuickCalls(_TOKENS, 0, 2), QuickCalls(_TOKENS, 0, 2)


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each.

    A state over no keys (``s`` of -inf) changes nothing, and two of them give 0 and -inf.

    Args:
        v_a: ``[tokens, H, D]``.
        s_a: ``[tokens, H]``, base-2 LSE; taken as float32.
        v_b: As ``v_a``.
        s_b: As ``s_a``.

    Returns:
        The merged ``v`` in its dtype and ``s`` in float32 (float64 for float64).
    """
    merged, made = _two(v_a, v_b, s_a, s_b)
    if made:
        return merged
    sums_a = _sums("s_a", s_a, "v_a", v_a)
    _check_other("v_b", v_b, "v_a", v_a)
    sums_b = _sums("s_b", s_b, "v_b", v_b)

    def call() -> tuple[Tensor, Tensor]:
        v, s = merge.merge_state(v_a, sums_a, v_b, sums_b, base=2, tokens_first=True)
        return v, s.transpose(-1, -2)

    return _two.learn((v_a, v_b, s_a, s_b), call) if v_a.dim() == 3 else call()


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """``merge_state`` of ``(v, s)`` and another, written over ``v`` and ``s``, whatever the dtype of ``s``.

    Args:
        v: ``[tokens, H, D]``, overwritten.
        s: ``[tokens, H]``, base-2 LSE, overwritten.
        v_other: As ``v``.
        s_other: As ``s``.
        mask: bool ``[tokens]``; rows where it is False stay as they are. None: all are merged.
    """
    _merge_in_place(v, s, v_other, s_other, mask, 2)


def _merge_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None, base: float) -> None:
    tensors = (v, v_other, s, s_other) if mask is None else (v, v_other, s, s_other, mask)
    quick = _in_place if base == 2 else _in_place_natural
    if quick(*tensors)[1]:
        return
    sums = _sums("s", s, "v", v)
    _check_other("v_other", v_other, "v", v)
    others = _sums("s_other", s_other, "v_other", v_other)

    def call() -> None:
        merge.merge_state_(v, sums, v_other, others, mask=mask, base=base)

    if v.dim() == 3:
        quick.learn(tensors, call)
    else:
        call()
    if sums.dtype != s.dtype:
        s.copy_(sums.transpose(-1, -2))


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``merge_state`` of n states.

    Args:
        v: ``[tokens, n, H, D]``.
        s: ``[tokens, n, H]``, base-2 LSE.

    Returns:
        ``[tokens, H, D]``, and ``[tokens, H]`` in float32.
    """
    found, made = _many(v, s)
    if made:
        return found
    for name, t, expected in (("v", v, "[tokens, n, H, D]"), ("s", s, "[tokens, n, H]")):
        if not isinstance(t, Tensor) or t.dim() != expected.count(",") + 1:
            raise argument_error(name, expected, described(t))
    sums = _sums("s", s, "v", v).transpose(0, 2)

    def call() -> tuple[Tensor, Tensor]:
        merged, lse = merge.merge_states(v.movedim(1, 0), sums, base=2, tokens_first=True)
        return merged, lse.t()

    return _many.learn((v, s), call)


def _sums(name: str, s: Tensor, of: str, v: Tensor) -> Tensor:
    """LSE ``[..., tokens, H]`` as ``[..., H, tokens]``, in the dtype that goes with ``v``; a view where it can be."""
    for what, t, rank in ((of, v, 3), (name, s, 2)):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() < rank:
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise argument_error(what, f"a float tensor of {rank} dimensions", got, kind=TypeError)
    if s.shape != v.shape[:-1]:
        raise argument_error(name, f"shape {tuple(v.shape[:-1])} like {of}, tokens first", tuple(s.shape))
    return s.to(torch.float64 if v.dtype == torch.float64 else torch.float32).transpose(-1, -2)


def _check_other(name: str, other: Tensor, of: str, v: Tensor) -> None:
    """Raise unless two states can be merged."""
    if not isinstance(other, Tensor) or other.dtype != v.dtype:
        raise argument_error(
            name, f"{v.dtype} like {of}", getattr(other, "dtype", type(other).__name__), kind=TypeError
        )
    if other.shape != v.shape:
        raise argument_error(name, f"shape {tuple(v.shape)} like {of}", tuple(other.shape))


class MultiLevelCascadeAttentionWrapper(Wrapper):
    """Attention over keys in levels, all in one paged cache: shared ones first, each request's own last.

    Every level cuts the same queries into requests of its own, and its keys are read once for all of them; states are
    merged. With ``use_cuda_graph`` plans are copied into the caller's buffers in place.

    Args:
        num_levels: How many.
        float_workspace_buffer: Says the device; not written to, any size.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: Keep indices in the buffers below, one a level.
        qo_indptr_buf_arr: int32 ``[batch + 1]`` each.
        paged_kv_indptr_buf_arr: int32 ``[batch + 1]`` each.
        paged_kv_indices_buf_arr: int32, as many entries as a plan may ever have.
        paged_kv_last_page_len_buf_arr: int32 ``[batch]`` each.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_indptr_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_indices_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        if isinstance(num_levels, bool) or not isinstance(num_levels, int) or num_levels < 1:
            raise argument_error("num_levels", "a number of at least 1", repr(num_levels))
        self._num_levels = num_levels
        self._buffers: list[tuple[Tensor, TableBuffers]] | None = None
        if use_cuda_graph:
            arrays = {
                "qo_indptr_buf_arr": qo_indptr_buf_arr,
                "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
                "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
                "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
            }
            levels = zip(*self._levels(arrays), strict=True)
            self._buffers = [(rows, TableBuffers(*table)) for rows, *table in levels]

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._buffers is not None

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffers: Any = None) -> None:
        """Name another workspace, and one of integers a level, none of which is used."""
        super().reset_workspace_buffer(float_workspace_buffer)

    def _levels(self, arrays: Mapping[str, Sequence[Tensor] | None]) -> list[Sequence[Tensor]]:
        """The arrays, if each has a tensor a level."""
        found = []
        for name, array in arrays.items():
            if array is None or len(array) != self._num_levels:
                got = None if array is None else len(array)
                raise argument_error(name, f"{self._num_levels} tensors, one a level", got)
            found.append(array)
        return found

    def plan(
        self,
        qo_indptr_arr: Sequence[Tensor],
        paged_kv_indptr_arr: Sequence[Tensor],
        paged_kv_indices_arr: Sequence[Tensor],
        paged_kv_last_page_len: Sequence[Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: _Dtype = None,
        kv_data_type: _Dtype = None,
    ) -> None:
        """Say what the next runs work on.

        Args:
            qo_indptr_arr: int32 ``[batch + 1]`` a level: rows of q of each of its requests; all end at the same row.
            paged_kv_indptr_arr: int32 ``[batch + 1]`` a level.
            paged_kv_indices_arr: int32 ``[nnz]`` a level.
            paged_kv_last_page_len: int32 ``[batch]`` a level.
            num_qo_heads: Hq, a multiple of the next.
            num_kv_heads: Hkv.
            head_dim: D.
            page_size: Tokens of a page.
            causal: At the last level; keys of the others are seen by all queries.
            pos_encoding_mode: "NONE" where there is more than one level, since a level does not know how many keys
                come before it (FlashInfer counts positions from 0 in each).
            use_fp16_qk_reduction: Accepted.
            sm_scale: Factor on the scores; default ``1 / sqrt(D)``.
            window_left: Negative where there is more than one level, for the same reason.
            logits_soft_cap: Cap of the scores; None or 0: none.
            rope_scale: With RoPE.
            rope_theta: With RoPE.
            q_data_type: Of the queries; default float16.
            kv_data_type: Of the cache; default as the queries.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: Shapes or numbers that do not fit, or positions between levels.
        """
        if self._num_levels > 1:
            hint = "Positions of keys are not known across levels; rotate keys before they are stored."
            if pos_encoding_mode != "NONE":
                raise argument_error("pos_encoding_mode", "'NONE' with several levels", repr(pos_encoding_mode), hint)
            if window_left >= 0:
                raise argument_error("window_left", "-1 with several levels", window_left, hint)
        arrays = {
            "qo_indptr_arr": qo_indptr_arr,
            "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        options = Options(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size, self._kv_layout)
        dtypes = resolve_dtypes(q_data_type, kv_data_type)
        plans = []
        for level, (qo_indptr, *tensors) in enumerate(zip(*self._levels(arrays), strict=True)):
            last = level == self._num_levels - 1
            rows, longest, total, table = self._tables(level, qo_indptr, tensors, page_size)
            plan = PagedPlan(
                table, *shape, options if last else options._replace(causal=False), self.device, dtypes,
                cu_seqlens_q=rows, max_seqlen_q=longest, total_q=total, follows=self._buffers is not None,
            )  # fmt: skip
            plans.append(plan.after(None if self._planned is None else self._planned[level]))
        self._planned = plans

    def _tables(
        self, level: int, qo_indptr: Tensor, tensors: Sequence[Tensor], page_size: int
    ) -> tuple[Tensor, int | None, int | None, Table]:
        """Rows of a level's requests, the most of them, of all of them, and its page table."""
        indptr, indices, last_page_len = tensors
        rows, longest, total = query_rows(qo_indptr, self.device)
        if self._buffers is None:
            return rows, longest, total, csr_table(indptr, indices, last_page_len, page_size, self.device)
        buffer, tables = self._buffers[level]
        check_fits("qo_indptr", buffer, qo_indptr, exact=True)
        table = tables.fill(indptr, indices, last_page_len, page_size)
        fill("qo_indptr", buffer, qo_indptr)
        return buffer, None, None, table  # a captured graph must fit every plan

    def run(self, q: Tensor, paged_kv_cache: _Cache) -> Tensor:
        """Attention over the keys of all levels.

        Args:
            q: ``[tokens, Hq, D]``.
            paged_kv_cache: ``[P, 2, page, Hkv, D]`` ("HND": ``[P, 2, Hkv, page, D]``), or keys and values apart.

        Returns:
            ``[tokens, Hq, D]``.
        """
        *shared, own = self._plan()
        if not shared:
            o: Tensor = own.run(q, paged_kv_cache)
            return o
        o, lse = _state(own, q, paged_kv_cache)
        for plan in shared:
            _merge_in_place(o, lse, *_state(plan, q, paged_kv_cache), None, math.e)
        return o

    forward = run


def _state(plan: PagedPlan, q: Tensor, cache: _Cache) -> tuple[Tensor, Tensor]:
    """Attention over one level, and its natural-log LSE ``[tokens, Hq]``."""
    known = plan.again(q, cache, (None, None, None), None, natural_lse=True)
    o, lse = plan.run(q, cache, natural_lse=True) if known is None else known
    return o, lse.t()


class _SharedPrefix(Wrapper):
    """Keys that all requests share, dense, before those of each request in pages."""

    def _attend(
        self, q: Tensor, k_shared: Tensor, v_shared: Tensor, plan: PagedPlan, unique_kv_cache: _Cache
    ) -> Tensor:
        o, lse = plan.run(q, unique_kv_cache, return_lse=True)
        rows = torch.arange(2, dtype=torch.int32, device=q.device) * q.shape[0]
        shared = attend(
            q, dense_cache(k_shared, v_shared, self._kv_layout), return_lse=True, causal=False, cu_seqlens_q=rows,
            scale=plan.options.arguments(q.shape[1], q.shape[2], q.device)["scale"],
        )  # fmt: skip
        merge_state_in_place(o, lse, *shared)
        return o


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Decode over a dense prefix that all requests share, and a paged cache of what follows it.

    Deprecated in FlashInfer, like the next: ``MultiLevelCascadeAttentionWrapper`` does the same.
    """

    def begin_forward(
        self,
        unique_kv_indptr: Tensor,
        unique_kv_indices: Tensor,
        unique_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: _Dtype = "float16",
    ) -> None:
        """As ``BatchDecodeWithPagedKVCacheWrapper.plan``, of what is not shared."""
        table = csr_table(unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, page_size, self.device)
        dtypes = resolve_dtypes(data_type=data_type)
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size, self._kv_layout)
        self._planned = PagedPlan(table, *shape, Options(causal=True), self.device, dtypes)

    def forward(self, q: Tensor, k_shared: Tensor, v_shared: Tensor, unique_kv_cache: _Cache) -> Tensor:
        """Attention of ``q [B, Hq, D]`` over ``k_shared`` ``[L, Hkv, D]`` ("HND": ``[Hkv, L, D]``) and the cache."""
        return self._attend(q, k_shared, v_shared, self._plan(), unique_kv_cache)

    plan, run = begin_forward, forward


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Prefill over a dense prefix that all requests share, and a paged cache of what follows it."""

    def begin_forward(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """As ``BatchPrefillWithPagedKVCacheWrapper.plan``, of what is not shared; dtypes are those of the tensors."""
        table = csr_table(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, self.device)
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size, self._kv_layout)
        plan = PagedPlan(table, *shape, Options(), self.device)
        plan.cu_seqlens_q, plan.max_seqlen_q, plan.total_q = query_rows(qo_indptr, self.device)
        self._planned = plan

    def forward(
        self,
        q: Tensor,
        k_shared: Tensor,
        v_shared: Tensor,
        unique_kv_cache: _Cache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """Attention of packed ``q``; ``causal`` among each request's own keys, with the shared ones before them."""
        plan = self._plan().replaced(causal=causal, sm_scale=sm_scale)
        return self._attend(q, k_shared, v_shared, plan, unique_kv_cache)

    plan, run = begin_forward, forward
