"""Block-sparse attention by FlashInfer's names: one pattern of R x C blocks for all heads, or one a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._blocks import (
    BlockPlan,
    batched_blocks,
    check_ascending,
    head_lists,
    inner_mask,
    listed_rows,
)
from sparseattn.flashinfer._checks import described
from sparseattn.flashinfer._common import FLOAT8, Options, check_heads, implementation, resolve_dtypes
from sparseattn.flashinfer._wrapper import Wrapper
from sparseattn.masks.lists import compact
from sparseattn.ops.bsr import follow_rows, make_rows

# Types of what two plans may say alike: a tensor's contents would have to be waited for.
_PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device))


class BlockSparseAttentionWrapper(Wrapper):
    """Attention over blocks of R queries by C keys, R and C from 1 up.

    Planning and running never wait for a device. What FlashInfer leaves open or gets wrong, and what happens here:

    - ``causal`` and positional encodings act where tokens stand in their sequence. FlashInfer counts along what a block
      row lists, which is the same only for rows that end in their diagonal block; ``gathered_causal=True`` does that.
    - Any M, N, R and C: the last blocks may be short. Any number of heads. R = 2 and 3 are right, too.
    - nnz = 0, and empty rows: 0 and LSE -inf.
    - A block number that is negative or past the last block names no block. On the CPU it is an error.
    - A block listed twice in a row counts twice.
    - LSE is base 2 whatever the backend (FlashInfer's ``vsa_*`` have the natural logarithm).
    - Outputs are of the queries' dtype unless ``o_data_type`` says otherwise, and tensors must have the planned dtypes.
    - ``forward`` keeps what was planned.

    Args:
        float_workspace_buffer: Says the device; not written to.
        backend: FlashInfer's names, all of which mean this library's choice; or "triton", "gluon", "reference".
        kv_layout: "NHD", or "HND" for keys and values with heads before tokens.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, numbers or combinations that do not fit.
    """

    _tensors = 3
    _forward = (
        "scale_q", "scale_k", "scale_v", "pos_encoding_mode", "use_fp16_qk_reduction", "logits_soft_cap", "sm_scale",
        "rope_scale", "rope_theta",
    )  # fmt: skip

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto", kv_layout: str = "NHD") -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self._impl = implementation(backend)
        # What the last plan of lists said besides these, the types of that, and the plan.
        self._said: tuple[tuple[Any, ...], tuple[type, ...], BlockPlan | None] = ((), (), None)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """What ``run`` will compute, until the next plan; in one of two forms, told apart by the first argument.

        ``plan(indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, mask=None, packed_mask=None,
        causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None, o_data_type=None,
        non_blocking=True, block_mask=None, gathered_causal=False)``, for one sequence: see ``plan_rows``.

        ``plan(q, k, v, sparse_mask, num_qo_heads=..., num_kv_heads=..., head_dim=..., block_size=...)``, for a batch:
        see ``plan_batch``.
        """
        first = args[0] if args else kwargs.get("q")
        batched = isinstance(first, Tensor) and first.is_floating_point() and first.dim() > 1
        if batched or not {"q", "sparse_mask", "block_size"}.isdisjoint(kwargs):
            self.plan_batch(*args, **kwargs)
        else:
            self.plan_rows(*args, **kwargs)

    def plan_rows(
        self,
        indptr: Tensor | None,
        indices: Tensor | None,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: Tensor | None = None,
        packed_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        block_mask: Tensor | None = None,
        gathered_causal: bool = False,
    ) -> None:
        """One sequence of M queries and N keys, blocks listed as SciPy's ``bsr_matrix`` does.

        Args:
            indptr: int32 ``[MB + 1]``, MB = ceil(M / R): row m lists ``indices[indptr[m]:indptr[m + 1]]``.
            indices: int32 ``[nnz]``, column blocks in any order, each once a row.
            M: Queries.
            N: Keys.
            R: Queries of a block.
            C: Keys of a block.
            num_qo_heads: Hq, a multiple of Hkv.
            num_kv_heads: Hkv.
            head_dim: Of q and k.
            mask: bool ``[nnz, R, C]``, tokens kept inside the listed blocks (or flat, as ``convert_bsr_mask_layout``
                returns them). It takes the place of ``causal``, as in FlashInfer.
            packed_mask: uint8, the flat form in bits, "little" order, every block row from a byte of its own:
                ``segment_packbits(convert_bsr_mask_layout(mask, indptr), indptr * R * C, "little")[0]``. All R rows of
                a block are there even if the last is short.
            causal: Query i sees key j only if ``j <= i + N - M``.
            pos_encoding_mode: "NONE", "ROPE_LLAMA" (q and k are rotated in the kernel) or "ALIBI".
            use_fp16_qk_reduction: Sums are float32 all the same.
            logits_soft_cap: Scores become ``cap * tanh(score / cap)``; None or 0: not at all.
            sm_scale: Factor on the scores; default ``1 / sqrt(head_dim)``.
            rope_scale: Positions are divided by it; default 1.
            rope_theta: Base of the frequencies; default 1e4.
            q_data_type: Of q, checked at every run. float8 queries are computed in bfloat16.
            kv_data_type: Of k and v: as q, or float8; None: as q.
            o_data_type: Of the output; None: as q (bfloat16 for float8).
            non_blocking: How index tensors on the CPU are copied.
            block_mask: bool ``[Hq, MB, NB]``, ``[Hkv, MB, NB]`` or ``[1, MB, NB]``: a pattern for each head, any
                backend, in place of ``indptr`` and ``indices``, which are not read then and may be None.
            gathered_causal: ``causal`` and positional encodings count along what a block row lists, as in FlashInfer:
                its keys in the order of ``indices``, its queries at their end. N must be a multiple of C.
        """
        said: tuple[Any, ...] = ()
        if mask is packed_mask is block_mask is None:
            said = (
                M, N, R, C, num_qo_heads, num_kv_heads, head_dim, causal, pos_encoding_mode, logits_soft_cap, sm_scale,
                rope_scale, rope_theta, q_data_type, kv_data_type, o_data_type, gathered_causal, self.device,
            )  # fmt: skip
            if self._follow(indptr, indices, said):
                return
        check_heads(num_qo_heads, num_kv_heads)
        dtypes = resolve_dtypes(q_data_type, kv_data_type, o_data_type)
        options = Options(causal, pos_encoding_mode, -1, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        inside = inner_mask(mask, packed_mask, self.device, non_blocking)
        # Where block-sparse attention does not take the call, its lists need not be made.
        lists = dtypes.q == dtypes.kv not in FLOAT8 and pos_encoding_mode == "NONE" and not gathered_causal
        ascending = block_mask is not None
        if block_mask is not None:
            if inside is not None:
                raise argument_error("block_mask", "None beside mask or packed_mask", "a tensor")
            bounds, numbers = head_lists(block_mask, (num_qo_heads, num_kv_heads), self.device, non_blocking)
        else:
            bounds, numbers = listed_rows(self.device, indptr, indices, N, C, non_blocking)
        rows = make_rows(bounds, numbers, (R, C), (M, N), inside, lists=lists, ascending=ascending)
        if gathered_causal and N % C:
            raise argument_error("gathered_causal", f"N a multiple of C = {C}", N)
        shapes = (M, num_qo_heads, head_dim), (N, num_kv_heads, head_dim)
        self._planned = BlockPlan(
            rows, shapes, options, gathered_causal, inside is not None, self._kv_layout, dtypes, self._impl
        ).after(self._planned)
        types = tuple(map(type, said))
        self._said = said, types, self._planned if _PLAIN.issuperset(types) else None

    def _follow(self, indptr: Tensor | None, indices: Tensor | None, said: tuple[Any, ...]) -> bool:
        """Plan what was ``said`` of the lists planned before, too, if these are like them; whether that was done."""
        before, types, plan = self._said
        if plan is None or plan is not self._planned or types != tuple(map(type, said)) or before != said:
            return False
        if not isinstance(indptr, Tensor) or not isinstance(indices, Tensor):
            return False
        rows = follow_rows(plan.rows, indptr, indices)
        if rows is None:
            return False
        self._planned = plan.following(rows)
        self._said = said, types, self._planned
        return True

    def plan_batch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sparse_mask: Tensor,
        num_qo_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        block_size: int | tuple[int, int] = 64,
        causal: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """A batch of sequences whose shapes and dtypes are those of ``q``, ``k`` and ``v``; contents are not looked at.

        Args:
            q: ``[B, M, Hq, D]``; or ``[M, Hq, D]``.
            k: ``[B, N, Hkv, D]`` ("HND": ``[B, Hkv, N, D]``); or without B.
            v: Likewise.
            sparse_mask: bool, which blocks to compute: ``[MB, NB]``, ``[B, MB, NB]`` or ``[B, Hq | Hkv | 1, MB, NB]``,
                MB = ceil(M / R), NB = ceil(N / C). What is the same for a whole batch may be expanded.
            num_qo_heads: Hq, checked against q.
            num_kv_heads: Hkv, checked against k.
            head_dim: D, checked against q.
            block_size: R and C, or one number for both. The last blocks may be short.
            causal: Query i sees key j only if ``j <= i + N - M``.
            logits_soft_cap: As in ``plan_rows``.
            sm_scale: As in ``plan_rows``.
        """
        for name, t in (("q", q), ("k", k), ("v", v)):
            if not isinstance(t, Tensor) or t.dim() not in (3, 4) or t.dim() != q.dim():
                got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                raise argument_error(name, "[B, S, H, D] or [S, H, D], like the others", got)
        if self._kv_layout == "HND":
            k, v = k.transpose(-3, -2), v.transpose(-3, -2)
        for name, said, is_ in (
            ("num_qo_heads", num_qo_heads, q.shape[-2]),
            ("num_kv_heads", num_kv_heads, k.shape[-2]),
            ("head_dim", head_dim, q.shape[-1]),
        ):
            if said is not None and said != is_:
                raise argument_error(name, f"{is_}, as the tensors have it", said)
        check_heads(q.shape[-2], k.shape[-2])
        size = (block_size, block_size) if isinstance(block_size, int) else block_size
        lengths = q.shape[-3], k.shape[-3]
        blocks = batched_blocks(sparse_mask, q, k, size, self.device)
        rows = make_rows(*compact(blocks), size, lengths, lists=q.dtype == k.dtype, ascending=True)
        options = Options(causal, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale)
        dtypes = resolve_dtypes(q.dtype, k.dtype)
        shapes = tuple(q.shape), tuple(k.shape)
        plan = BlockPlan(rows, shapes, options, False, False, self._kv_layout, dtypes, self._impl)
        self._planned = plan.after(self._planned)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale_q: float | Tensor | None = None,
        scale_k: float | Tensor | None = None,
        scale_v: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the planned blocks.

        Args:
            q: ``[M, Hq, D]``, or ``[B, M, Hq, D]`` after a plan for a batch.
            k: ``[N, Hkv, D]`` ("HND": ``[Hkv, N, D]``), or ``[B, ...]``.
            v: Likewise.
            scale_q: What queries are multiplied by: a number, or float32 ``[1]`` or ``[Hq]``.
            scale_k: Likewise for keys, ``[1]`` or ``[Hkv]``.
            scale_v: Likewise for values.
            out: Where to write, of the planned output's dtype.
            lse: Where to write the LSE, float32, any strides.
            return_lse: Also return the LSE.
            enable_pdl: Not used.

        Returns:
            The output, q's shape with v's head dimension; with ``return_lse`` also the base-2 LSE, float32 ``[M, Hq]``
            or ``[B, M, Hq]``.

        Raises:
            RuntimeError: There is no plan.
            TypeError: A dtype that is not the planned one.
            ValueError: A shape that is not the planned one.
        """
        plan = self._planned
        if scale_q is scale_k is scale_v is out is lse is None and not (return_lse or plan is None):
            o: Tensor | None = plan.again(q, k, v)
            if o is not None:
                return o
        return self._plan().run(q, k, v, (scale_q, scale_k, scale_v), out, lse, return_lse)


def convert_bsr_mask_layout(mask: Tensor, indptr: Tensor) -> Tensor:
    """Masks of blocks in the order in which attention reads them: by block row, then query, then key.

    Row m's blocks ``mask[indptr[m]:indptr[m + 1]]`` become ``[R, blocks * C]``, flat, one row after the other. Blocks
    past the end of ``mask``, which an ``indptr`` may name, do not exist; blocks of no row become zeros.

    Args:
        mask: ``[nnz, R, C]``, any dtype.
        indptr: int32 ``[MB + 1]``, ascending from 0.

    Returns:
        ``[nnz * R * C]`` of the same dtype.

    Raises:
        TypeError: ``indptr`` holds no integers.
        ValueError: Shapes that do not fit; or, where ``indptr`` is on the CPU, numbers that do not ascend from 0, or
            leave blocks over.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 3:
        raise argument_error("mask", "[nnz, R, C]", described(mask))
    if not isinstance(indptr, Tensor) or indptr.dtype not in (torch.int32, torch.int64):
        got = indptr.dtype if isinstance(indptr, Tensor) else type(indptr).__name__
        raise argument_error("indptr", "int32", got, kind=TypeError)
    if indptr.dim() != 1 or indptr.shape[0] < 1:
        raise argument_error("indptr", "[MB + 1]", f"shape {tuple(indptr.shape)}")
    nnz, rows, columns = mask.shape
    if indptr.device.type == "cpu":
        check_ascending(indptr)
        if int(indptr[-1]) < nnz:
            raise argument_error("indptr", f"an end of at least nnz = {nnz}", int(indptr[-1]))
    ends = indptr.to(mask.device).long().clamp(0, nnz)
    block = torch.arange(nnz, device=mask.device)
    row = torch.searchsorted(ends, block, right=True)  # one more than the row of a block; ends has a place before
    last = ends.shape[0] - 1
    first, end = ends[(row - 1).clamp(min=0)], ends[row.clamp(max=last)]
    owned = (row >= 1) & (row <= last)
    first, count = torch.where(owned, first, block), torch.where(owned, end - first, 1)
    # Where each row of each block goes, counted in rows of C entries.
    place = (first * rows + block - first)[:, None] + torch.arange(rows, device=mask.device) * count[:, None]
    flat = torch.empty((nnz * rows, columns), dtype=mask.dtype, device=mask.device)
    flat[place.reshape(-1)] = mask.masked_fill(~owned[:, None, None], 0).reshape(nnz * rows, columns)
    return flat.reshape(-1)
