"""Block-sparse attention by FlashInfer's names, with blocks of any sizes and a pattern for each KV head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._common import FLOAT8, Dtypes, Options, implementation, resolve_dtypes
from sparseattn.flashinfer._variable import Pattern, VariablePlan, make_pattern
from sparseattn.flashinfer._wrapper import Wrapper


class VariableBlockSparseAttentionWrapper(Wrapper):
    """Attention over blocks whose sizes, and whose pattern, differ from KV head to KV head.

    Neither planning nor running waits for a device. What FlashInfer leaves open or gets wrong, and what happens here:

    - ``causal`` acts where tokens stand: query i sees key j if ``j <= i + Lk - Lq``. FlashInfer counts along the keys
      that a row of blocks selects; ``gathered_causal=True`` does that.
    - Sizes of 0 are allowed. Sizes on the CPU must add up to the same lengths for all heads, which ``run`` compares
      with its tensors. Sizes on a GPU are not looked at (``validate=True`` does, and waits): queries past the last
      block then see nothing, keys past it are seen by nobody, and what lies past the end is cut off.
    - ``out`` has q's layout and is the result; so has ``lse``.
    - Patterns are bool tensors, and q, k and v must have the planned dtype. ``forward`` keeps what was planned.
    - A query that sees no key gives 0 and LSE -inf. LSE is base 2.

    Args:
        float_workspace_buffer: Says the device; not written to.
        backend: FlashInfer's names, all of which mean this library's choice; or "triton", "reference".
        kv_layout: None or "NHD". It says nothing: ``run`` takes ``[H, L, D]``, or the layout of a plan from tensors.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, numbers or combinations that do not fit.
    """

    _tensors = 3
    _forward = (
        "pos_encoding_mode", "use_fp16_qk_reduction", "logits_soft_cap", "sm_scale", "rope_scale", "rope_theta",
    )  # fmt: skip

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto", kv_layout: str | None = None) -> None:
        if kv_layout not in (None, "NHD"):
            hint = "run() takes [H, L, D] whatever it says, and [B, S, H, D] after a plan from tensors."
            raise argument_error("kv_layout", "None or 'NHD'", repr(kv_layout), hint)
        super().__init__(float_workspace_buffer)
        self._impl = implementation(backend)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """What ``run`` will compute, until the next plan; in one of two forms, told apart by the first argument.

        ``plan(block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None, rope_scale=None,
        rope_theta=None, non_blocking=True, q_data_type="float16", kv_data_type=None)``: see ``plan_blocks``.

        ``plan(q, k, v, num_qo_heads=..., num_kv_heads=..., head_dim=...)``, for a batch: see ``plan_batch``.
        """
        first = args[0] if args else kwargs.get("q")
        if isinstance(first, Tensor) and first.is_floating_point() and first.dim() == 4:
            self.plan_batch(*args, **kwargs)
        else:
            self.plan_blocks(*args, **kwargs)

    def plan_blocks(
        self,
        block_mask_map: Tensor,
        block_row_sz: Tensor,
        block_col_sz: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        *,
        gathered_causal: bool = False,
        validate: bool = False,
    ) -> None:
        """One sequence; lengths are those of the tensors of ``run``.

        The pattern is copied, so that its tensors may be filled anew at once.

        Args:
            block_mask_map: bool ``[Hkv, MB, NB]``, which blocks are computed; the query heads of a group share it. Also
                with 1 or Hq heads.
            block_row_sz: int32 ``[Hkv, MB]``, queries of each row of blocks, which add up to Lq.
            block_col_sz: int32 ``[Hkv, NB]``, keys of each column of blocks, which add up to Lk.
            num_qo_heads: Hq, a multiple of Hkv.
            num_kv_heads: Hkv.
            head_dim: Of q, k and v.
            causal: Query i sees key j only if ``j <= i + Lk - Lq``.
            pos_encoding_mode: "NONE"; with ``gathered_causal`` also "ROPE_LLAMA".
            use_fp16_qk_reduction: Sums are float32 all the same.
            logits_soft_cap: Scores become ``cap * tanh(score / cap)``; None or 0: not at all.
            sm_scale: Factor on the scores; default ``1 / sqrt(head_dim)``.
            rope_scale: Positions are divided by it; default 1.
            rope_theta: Base of the frequencies; default 1e4.
            non_blocking: How tensors on the CPU are copied.
            q_data_type: Of q, checked at every run.
            kv_data_type: Of k and v: as q.
            gathered_causal: ``causal`` and positions count as FlashInfer counts them: along the T keys that a row of R
                queries selects, of which its query r sees the first ``r + 1 + T - R``. Takes memory of Hkv * MB * Lk
                token numbers.
            validate: Check sizes on a GPU, too, and wait for that.
        """
        dtype = _one_dtype(resolve_dtypes(q_data_type, kv_data_type))
        pattern = make_pattern(block_mask_map, block_row_sz, block_col_sz, self.device, non_blocking, validate)
        assert pattern.blocks is not None
        allowed = (1, num_kv_heads, num_qo_heads)
        if pattern.blocks.dim() != 3 or pattern.blocks.shape[0] not in (allowed[:2] if gathered_causal else allowed):
            expected = f"[Hkv, MB, NB] of Hkv = {num_kv_heads} heads"
            raise argument_error("block_mask_map", expected, f"shape {tuple(block_mask_map.shape)}")
        options = Options(causal, pos_encoding_mode, -1, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        self._planned = VariablePlan(
            pattern, (num_qo_heads, num_kv_heads), head_dim, options, dtype, None, gathered_causal, self._impl
        )

    def plan_batch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num_qo_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        block_mask_map: Tensor | None = None,
        block_row_sz: Tensor | None = None,
        block_col_sz: Tensor | None = None,
        causal: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """A batch of sequences whose shapes and dtype are those of ``q``, ``k`` and ``v``; contents are not looked at.

        Args:
            q: ``[B, Sq, Hq, D]``.
            k: ``[B, Sk, Hkv, D]``.
            v: Likewise.
            num_qo_heads: Hq, checked against q.
            num_kv_heads: Hkv, checked against k.
            head_dim: D, checked against q.
            block_mask_map: bool ``[H, MB, NB]`` or ``[B, H, MB, NB]`` with 1, Hkv or Hq heads; None, and no sizes:
                every query sees every key.
            block_row_sz: int32 ``[H, MB]``.
            block_col_sz: int32 ``[H, NB]``.
            causal: Query i sees key j only if ``j <= i + Sk - Sq``.
            logits_soft_cap: As in ``plan_blocks``.
            sm_scale: As in ``plan_blocks``.
        """
        for name, t in (("q", q), ("k", k), ("v", v)):
            if not isinstance(t, Tensor) or t.dim() != 4:
                got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                raise argument_error(name, "[B, S, H, D]", got)
        if v.shape != k.shape:
            raise argument_error("v", f"shape {tuple(k.shape)} like k", f"shape {tuple(v.shape)}")
        for name, said, is_ in (
            ("num_qo_heads", num_qo_heads, q.shape[2]),
            ("num_kv_heads", num_kv_heads, k.shape[2]),
            ("head_dim", head_dim, q.shape[3]),
        ):
            if said is not None and said != is_:
                raise argument_error(name, f"{is_}, as the tensors have it", said)
        pattern = Pattern()
        if block_mask_map is not None or block_row_sz is not None or block_col_sz is not None:
            pattern = make_pattern(block_mask_map, block_row_sz, block_col_sz, self.device, True, False)
            lengths = (q.shape[1], k.shape[1])
            if pattern.lengths not in (None, lengths):
                raise argument_error("block_row_sz and block_col_sz", f"sums {lengths}", pattern.lengths)
        options = Options(causal, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale)
        dtype = _one_dtype(resolve_dtypes(q.dtype, k.dtype))
        shapes = tuple(q.shape), tuple(k.shape)
        heads = (q.shape[2], k.shape[2])
        self._planned = VariablePlan(pattern, heads, q.shape[3], options, dtype, shapes, False, self._impl)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the planned blocks.

        Args:
            q: ``[Hq, Lq, D]``; after a plan from tensors ``[B, Sq, Hq, D]``.
            k: ``[Hkv, Lk, D]``, or ``[B, Sk, Hkv, D]``.
            v: Likewise.
            out: Where to write, q's shape and dtype, any strides.
            lse: Where to write the LSE, float32, any strides.
            return_lse: Also return the LSE.
            enable_pdl: Not used.

        Returns:
            The output, like q; with ``return_lse`` also the base-2 LSE, float32 ``[Hq, Lq]`` or ``[B, Sq, Hq]``.

        Raises:
            RuntimeError: There is no plan.
            TypeError: A dtype that is not the planned one.
            ValueError: A shape that is not the planned one.
        """
        plan = self._planned
        if out is lse is None and not (return_lse or plan is None):
            o: Tensor | None = plan.again(q, k, v)
            if o is not None:
                return o
        return self._plan().run(q, k, v, out, lse, return_lse)


def _one_dtype(dtypes: Dtypes) -> torch.dtype:
    """The dtype of queries, keys and values."""
    if dtypes.kv != dtypes.q or dtypes.q in FLOAT8:
        hint = "Variable blocks are computed in the tensors' dtype."
        raise argument_error("kv_data_type", f"{dtypes.q} like q_data_type, not float8", dtypes.kv, hint, TypeError)
    return dtypes.q
