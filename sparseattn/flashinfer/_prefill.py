"""What the two batch prefill wrappers share: rows of queries and masks of a plan, also at fixed addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.errors import argument_error
from sparseattn.flashinfer._buffers import check_fits, fill
from sparseattn.flashinfer._common import FLOAT8, implementation, unsupported
from sparseattn.flashinfer._masks import MaskBuffers, item_mask, prepare_mask
from sparseattn.flashinfer._wrapper import Wrapper, query_rows
from sparseattn.ops.paged import CustomMask


class Rows(NamedTuple):
    """Rows of queries that requests own.

    Attributes:
        indptr: int32 [B + 1] on the device.
        longest: Longest query length, or a bound; None: the host does not know.
        total: Number of rows; None likewise.
        lengths: Query lengths; None likewise.
    """

    indptr: Tensor
    longest: int | None
    total: int | None
    lengths: list[int] | None


class Masking(NamedTuple):
    """What a plan says of single tokens, in FlashInfer's words: a mask, or the items of multi-item scoring."""

    custom_mask: Tensor | None = None
    packed_custom_mask: Tensor | None = None
    prefix_len_ptr: Tensor | None = None
    token_pos_in_items_ptr: Tensor | None = None
    token_pos_in_items_len: int = 0

    @property
    def any(self) -> bool:
        return self.by_tokens or self.prefix_len_ptr is not None

    @property
    def by_tokens(self) -> bool:
        return self.custom_mask is not None or self.packed_custom_mask is not None

    def causal(self, causal: bool) -> bool:
        """Whether causality counts: not beside a custom mask, always with items."""
        return self.prefix_len_ptr is not None or (causal and not self.by_tokens)

    def prepare(
        self, rows: Rows, kv_lens: Tensor, kv_host: list[int] | None, device: torch.device, non_blocking: bool
    ) -> CustomMask | None:
        """The mask of a plan. Items wait for the device, unless all lengths were given on the CPU."""
        if self.prefix_len_ptr is not None:
            if self.by_tokens:
                hint = "Put both into one mask."
                raise argument_error("custom_mask", "None with prefix_len_ptr", "a mask", hint)
            q_lens = rows.indptr.diff().tolist() if rows.lengths is None else rows.lengths
            kv = kv_lens.tolist() if kv_host is None else kv_host
            items = self.token_pos_in_items_ptr, self.token_pos_in_items_len
            return item_mask(self.prefix_len_ptr, *items, q_lens, kv, device)
        sizes = None
        if rows.lengths is not None and kv_host is not None:
            sizes = [a * b for a, b in zip(rows.lengths, kv_host, strict=True)]
        masks = self.custom_mask, self.packed_custom_mask
        return prepare_mask(*masks, rows.indptr.diff(), kv_lens, sizes, device, non_blocking)


class PrefillWrapper(Wrapper):
    """Base of the batch prefill wrappers.

    Attributes:
        is_cuda_graph_enabled: Whether plans are copied into tensors of the caller, where a captured ``run`` finds them
            when it is replayed: of one batch size, and of no more rows than the first plan had.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        qo_indptr_buf: Tensor | None,
        custom_mask_buf: Tensor | None,
        mask_indptr_buf: Tensor | None,
        backend: str,
        **jit: Any,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        unsupported("Variants that are compiled from CUDA code need FlashInfer.", **jit)
        self.is_cuda_graph_enabled = use_cuda_graph
        self._backend, self._impl = backend, implementation(backend)
        self._most_rows: int | None = None
        if use_cuda_graph:
            if not isinstance(qo_indptr_buf, Tensor) or qo_indptr_buf.dtype != torch.int32:
                raise argument_error("qo_indptr_buf", "an int32 tensor [B + 1] with use_cuda_graph", qo_indptr_buf)
            self._qo_indptr_buf = qo_indptr_buf
            self._mask_buffers = MaskBuffers(custom_mask_buf, mask_indptr_buf)

    def _rows(self, qo_indptr: Tensor, longest: int | None, non_blocking: bool) -> Rows:
        """The rows of a plan; ``longest`` is a bound that the caller knows."""
        indptr, known, total = query_rows(qo_indptr, self.device, non_blocking)
        if longest is not None and known is not None and known > longest:
            raise argument_error("max_token_per_sequence", f"at least {known}, as in qo_indptr", longest)
        lengths = None if total is None else qo_indptr.diff().tolist()
        if not self.is_cuda_graph_enabled:
            return Rows(indptr, longest if known is None else known, total, lengths)
        check_fits("qo_indptr", self._qo_indptr_buf, qo_indptr, exact=True)
        if total is not None and self._most_rows is not None and total > self._most_rows:
            hint = "A captured graph cannot grow."
            raise argument_error("qo_indptr", f"at most {self._most_rows} rows, as the first plan", total, hint)
        # Replays follow later plans, whose queries may be longer: the rows of q bound them.
        return Rows(indptr, longest, total, lengths)

    def _mask(
        self, masking: Masking, rows: Rows, kv_lens: Tensor, kv_host: list[int] | None, non_blocking: bool
    ) -> CustomMask | None:
        """The mask of a plan."""
        if not masking.any:
            return None
        mask = masking.prepare(rows, kv_lens, kv_host, self.device, non_blocking)
        if mask is None or not self.is_cuda_graph_enabled:
            return mask
        return self._mask_buffers.packed(mask, kv_lens, rows.indptr.diff())

    def _keep(self, rows: Rows, mask: CustomMask | None, non_blocking: bool) -> tuple[Rows, CustomMask | None]:
        """The same, in the caller's tensors if there are any; last, when all of a plan has turned out well."""
        if not self.is_cuda_graph_enabled:
            return rows, mask
        if mask is not None:
            mask = self._mask_buffers.keep(mask, non_blocking)
        fill("qo_indptr", self._qo_indptr_buf, rows.indptr, non_blocking)
        if self._most_rows is None:
            self._most_rows = rows.total
        self._least_rows = rows.total or 0
        return rows._replace(indptr=self._qo_indptr_buf, total=None, lengths=None), mask

    def _check_rows(self, q: Tensor) -> None:
        """Under CUDA graphs q may have more rows than the plan, which stay 0 (LSE -inf), but not fewer."""
        if q.shape[0] < self._least_rows:
            raise argument_error("q", f"at least {self._least_rows} rows, as planned", q.shape[0])


def float8_scales(
    args: tuple[Any, ...], q: Tensor, scales: tuple[Any, Any, Any]
) -> tuple[float | Tensor | None, float | Tensor | None, float | Tensor | None]:
    """Scales of q, k and v from the positional arguments that follow a float8 cache, and from the named ones."""
    if not args:
        return scales
    if len(args) != 3 or q.dtype not in FLOAT8:
        hint = "Sinks go by name: sinks=."
        raise argument_error("run", "no further arguments, or scale_q, scale_k, scale_v with float8 q", len(args), hint)
    if any(scale is not None for scale in scales):
        raise argument_error("q_scale, k_scale, v_scale", "None beside positional scales", scales)
    return args
