"""PagedCache: keys and values in pages, and which pages a sequence owns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseattn.errors import argument_error

LAYOUTS = ("NHD", "HND")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, *FLOAT8)
MAX_PAGE = 256


@dataclass(frozen=True, eq=False, repr=False)
class PagedCache:
    """Keys and values in pages of ``page_size`` tokens, and for every sequence the pages that hold its tokens.

    Token j of sequence b lies in row ``j % page_size`` of page ``table[b, j // page_size]``. Building a cache checks
    shapes, dtypes and devices and never waits for a device; :meth:`validate` checks the contents. Pages may be shared
    between sequences, strides are free, and what lies in pages or rows that no sequence owns is never read.

    The table is either dense (``page_table``) or in CSR form (``indptr`` and ``indices``). Keys without a page, because
    the entry is negative or past the last page, or because the table ends before the sequence does, are hidden from
    every query, as if the sequence had lost them; positions do not move.

    Attributes:
        k: Keys ``[P, page_size, Hkv, D]`` (layout "NHD", and how :meth:`views` gives them) or ``[P, Hkv, page_size,
            D]`` ("HND"), in bfloat16, float16, float32, float64, float8_e4m3fn or float8_e5m2. page_size is 1..256.
        v: Values, likewise, with a head dimension of their own. May be a view of ``k``.
        seq_lens: int32 ``[B]``, tokens of each sequence in the cache.
        page_table: int32 ``[B, max_pages]``, padded with -1.
        indptr: int32 ``[B + 1]``, ascending from 0: sequence b owns ``indices[indptr[b]:indptr[b + 1]]``.
        indices: int32 ``[nnz]``, page numbers.
        k_rope: Further columns of the keys, ``[P, page_size, Hkv, R]`` in the same layout, which scores see behind
            those of ``k``: the rotary part of a latent (MLA) cache. None: ``k`` is whole.
        layout: "NHD" or "HND".

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: Shapes, devices or combinations that do not fit.
    """

    k: Tensor
    v: Tensor
    seq_lens: Tensor
    page_table: Tensor | None = None
    indptr: Tensor | None = None
    indices: Tensor | None = None
    k_rope: Tensor | None = None
    layout: str = "NHD"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise argument_error("layout", f"one of {LAYOUTS}", repr(self.layout))
        token = 1 if self.layout == "NHD" else 2
        form = "[P, page, Hkv, D]" if token == 1 else "[P, Hkv, page, D]"
        for name, t in (("k", self.k), ("v", self.v), ("k_rope", self.k_rope)):
            if t is None and name == "k_rope":
                continue
            if not isinstance(t, Tensor):
                raise argument_error(name, f"a tensor {form}", type(t).__name__, kind=TypeError)
            if t.dim() != 4 or min(t.shape[1:]) == 0:
                hint = "A combined [P, 2, ...] cache goes through PagedCache.combined." if t.dim() == 5 else ""
                raise argument_error(name, f"a tensor {form} ({self.layout})", f"shape {tuple(t.shape)}", hint)
            if t.dtype not in _DTYPES:
                raise argument_error(name, "a float dtype, float8_e4m3fn or float8_e5m2", t.dtype, kind=TypeError)
            if t.shape[:3] != self.k.shape[:3] or t.device != self.k.device:
                expected = f"shape {[*self.k.shape[:3]]} + [D] on {self.k.device} like k"
                raise argument_error(name, expected, f"shape {tuple(t.shape)} on {t.device}")
            if t.dtype != self.k.dtype:
                raise argument_error(name, f"{self.k.dtype} like k", t.dtype, kind=TypeError)
        if not 1 <= self.k.shape[token] <= MAX_PAGE:
            raise argument_error("k", f"pages of 1..{MAX_PAGE} tokens", self.k.shape[token], f"The layout is {form}.")
        self._check_table()

    def _check_table(self) -> None:
        check_int32("seq_lens", self.seq_lens, 1, self.device)
        if (self.page_table is None) == (self.indices is None) or (self.indptr is None) != (self.indices is None):
            got = [n for n in ("page_table", "indptr", "indices") if getattr(self, n) is not None]
            raise argument_error("page_table", "either page_table, or indptr and indices", " and ".join(got) or "none")
        if self.page_table is not None:
            check_int32("page_table", self.page_table, 2, self.device)
            if self.page_table.shape[0] != self.batch:
                expected = f"{self.batch} rows like seq_lens"
                raise argument_error("page_table", expected, f"shape {tuple(self.page_table.shape)}")
        else:
            check_int32("indptr", self.indptr, 1, self.device)
            check_int32("indices", self.indices, 1, self.device)
            if self.indptr is not None and self.indptr.shape[0] != self.batch + 1:
                expected = f"shape ({self.batch + 1},), one more than seq_lens"
                raise argument_error("indptr", expected, f"shape {tuple(self.indptr.shape)}")

    @classmethod
    def combined(
        cls,
        kv: Tensor,
        seq_lens: Tensor,
        page_table: Tensor | None = None,
        *,
        indptr: Tensor | None = None,
        indices: Tensor | None = None,
        layout: str = "NHD",
    ) -> PagedCache:
        """From one tensor: ``[P, 2, page, Hkv, D]`` ("NHD") or ``[P, 2, Hkv, page, D]`` ("HND"), keys before values."""
        if not isinstance(kv, Tensor) or kv.dim() != 5 or kv.shape[1] != 2:
            got = f"shape {tuple(kv.shape)}" if isinstance(kv, Tensor) else type(kv).__name__
            raise argument_error("kv", "a tensor [P, 2, ...] of 5 dimensions", got)
        return cls(kv[:, 0], kv[:, 1], seq_lens, page_table, indptr, indices, layout=layout)

    @classmethod
    def latent(
        cls,
        ckv: Tensor,
        kpe: Tensor | None,
        seq_lens: Tensor,
        page_table: Tensor | None = None,
        *,
        indptr: Tensor | None = None,
        indices: Tensor | None = None,
        value_dim: int = 512,
    ) -> PagedCache:
        """A multi-head latent (MLA) cache: one KV head whose values are the first columns of its keys.

        Args:
            ckv: ``[P, page, value_dim]``, latent keys and values; with ``kpe`` None the joined cache ``[P, page,
                value_dim + R]``, rotary columns last.
            kpe: ``[P, page, R]``, the rotary columns of the keys; R of 0 is none.
            seq_lens: As above.
            page_table: As above.
            indptr: As above.
            indices: As above.
            value_dim: Columns that are values, too.
        """
        for name, t in (("ckv", ckv), ("kpe", kpe)):
            if t is not None and (not isinstance(t, Tensor) or t.dim() != 3):
                got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                raise argument_error(name, "a tensor [P, page, D]", got)
        if ckv.shape[-1] < value_dim or (kpe is not None and ckv.shape[-1] != value_dim):
            expected = f"{value_dim} columns" + (" or more" if kpe is None else "; kpe has the others")
            raise argument_error("ckv", expected, ckv.shape[-1], "value_dim says how many columns are values.")
        if kpe is None:
            ckv, kpe = ckv[..., :value_dim], ckv[..., value_dim:]
        k = ckv[:, :, None]
        return cls(k, k, seq_lens, page_table, indptr, indices, kpe[:, :, None] if kpe.shape[-1] else None)

    @property
    def batch(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def page_size(self) -> int:
        return self.k.shape[1 if self.layout == "NHD" else 2]

    @property
    def num_pages(self) -> int:
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2 if self.layout == "NHD" else 1]

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def capacity(self) -> int:
        """Tokens that the longest sequence can have: of a dense table its width, of a CSR table all of its pages."""
        table = self.page_table if self.page_table is not None else self.indices
        assert table is not None
        return table.shape[-1] * self.page_size

    def views(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``k``, ``v`` and ``k_rope`` as ``[P, page, Hkv, D]``, whatever the layout; no copies."""
        if self.layout == "NHD":
            return self.k, self.v, self.k_rope
        return (
            self.k.transpose(1, 2),
            self.v.transpose(1, 2),
            None if self.k_rope is None else self.k_rope.transpose(1, 2),
        )

    def table(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``page_table``, ``indptr`` and ``indices`` as kernels read them: the entries of a row side by side."""
        rows = self.page_table
        if rows is not None and rows.stride(1) != 1:
            rows = rows.contiguous()
        indptr, indices = (None if t is None else t.contiguous() for t in (self.indptr, self.indices))
        return rows, indptr, indices

    def validate(self) -> PagedCache:
        """Check the contents of the table and return the cache. Waits for the device.

        Raises:
            ValueError: A negative length, a page number past the last page, an ``indptr`` that does not ascend from 0
                to at most nnz, or a table that ends before its sequence; the message names the field.
        """
        lengths = self.seq_lens.tolist()
        table = self.page_table if self.page_table is not None else self.indices
        assert table is not None
        if min(lengths, default=0) < 0:
            raise argument_error("seq_lens", "lengths of at least 0", min(lengths))
        name = "page_table" if self.page_table is not None else "indices"
        if table.numel() and int(table.max()) >= self.num_pages:
            raise argument_error(name, f"page numbers below {self.num_pages}", int(table.max()))
        if self.indptr is not None:
            bounds = self.indptr.tolist()
            if bounds[0] != 0 or bounds[-1] > table.shape[0] or bounds != sorted(bounds):
                raise argument_error("indptr", f"numbers ascending from 0 to at most {table.shape[0]}", bounds)
            owned = [b - a for a, b in itertools.pairwise(bounds)]
        else:
            owned = [table.shape[1]] * self.batch
        for b, (length, pages) in enumerate(zip(lengths, owned, strict=True)):
            if length > pages * self.page_size:
                expected = f"pages for the {length} tokens of sequence {b}"
                raise argument_error(name, expected, f"{pages} of {self.page_size} tokens")
        return self

    def __repr__(self) -> str:
        table = "page_table" if self.page_table is not None else "csr"
        return (
            f"PagedCache(batch={self.batch}, pages={self.num_pages}x{self.page_size}, kv_heads={self.num_kv_heads}, "
            f"dims=({self.k.shape[-1]}{f'+{self.k_rope.shape[-1]}' if self.k_rope is not None else ''}, "
            f"{self.v.shape[-1]}), {self.k.dtype}, {self.layout}, {table}, device={self.device})"
        )


def check_int32(name: str, t: object, rank: int, device: torch.device) -> None:
    """Raise unless ``t`` is an int32 tensor of ``rank`` dimensions on ``device``."""
    if not isinstance(t, Tensor) or t.dtype != torch.int32:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise argument_error(name, "an int32 tensor", got, "Convert with .int().", kind=TypeError)
    if t.dim() != rank:
        raise argument_error(name, f"a {rank}-D tensor", f"shape {tuple(t.shape)}")
    if t.device != device:
        raise argument_error(name, f"device {device} like the cache", t.device)
