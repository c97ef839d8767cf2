"""Small calls for the table of names: tensors under the names that its forms use, and what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from oracle import Batch, attention, check, make_batch
from torch import Tensor

LOW = torch.float16
Names = dict[str, Any]
Pair = tuple[Tensor, Tensor]


class Scene(NamedTuple):
    """Tensors, and what a call with them should give.

    Attributes:
        names: What a form may say.
        check: Raises AssertionError if a result is wrong.
    """

    names: Names
    check: Callable[[Any], None]


def held_against(right: Callable[[torch.dtype], Pair]) -> Callable[[Any], None]:
    """A check by the tolerance rule of outputs, or outputs and LSE, in any shape with the oracle's elements."""

    def compare(got: Any) -> None:
        exact, eager = right(torch.float64), right(LOW)
        if isinstance(got, Tensor):
            check(got.reshape(exact[0].shape), exact, eager)
        else:
            o, lse = got
            check((o.reshape(exact[0].shape), lse.reshape(exact[1].shape)), exact, eager)

    return compare


def equals(*right: Tensor) -> Callable[[Any], None]:
    """A check for the same elements, bit by bit."""

    def compare(got: Any) -> None:
        for one, expected in zip(got if isinstance(got, tuple) else (got,), right, strict=True):
            assert torch.equal(one.cpu(), expected.cpu()), (one, expected)

    return compare


def int32(*values: int, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def of_batch(b: Batch, **more: Any) -> Names:
    """The names of a paged batch."""
    device = b.q.device
    total = b.q.shape[0]
    return {
        "q": b.q, "cache": b.combined, "k_cache": b.k, "v_cache": b.v,
        "qo_indptr": b.qo_indptr, "indptr": b.indptr, "indices": b.indices, "last_page_len": b.last_page_len,
        "kv_len": b.seq_lens, "block_tables": b.block_tables, "seq_lens": b.seq_lens,
        "Hq": b.q.shape[1], "Hkv": 2, "D": b.q.shape[2], "page": b.page_size, "B": len(b.kv_lens),
        "scale": b.q.shape[2] ** -0.5, "max_kv": max(b.kv_lens), "max_q": max(b.qo_lens),
        "ws": torch.zeros(1024, dtype=torch.uint8, device=device), "torch": torch,
        "out": torch.empty(total, *b.q.shape[1:], dtype=LOW, device=device), **more,
    }  # fmt: skip


def decode(device: str, layout: str = "NHD") -> Scene:
    """Three requests of one query, in pages of 16."""
    b = make_batch([37, 5, 48], layout=layout, device=device)
    buffers = {"indptr_buf": torch.zeros_like(b.indptr), "last_buf": torch.zeros_like(b.last_page_len)}
    buffers["indices_buf"] = torch.zeros(32, dtype=torch.int32, device=device)
    return Scene(of_batch(b, **buffers), held_against(b.attention))


def decode_hnd(device: str) -> Scene:
    """The same with heads before tokens in a page."""
    return decode(device, "HND")


def decode_twice(device: str) -> Scene:
    """One combined cache given for keys and for values, as in the XQA example."""
    b = make_batch([37, 5, 48], device=device)
    names = of_batch(b)
    return Scene({**names, "k_cache": names["cache"], "v_cache": names["cache"].clone()}, held_against(b.attention))


def append(device: str, layout: str = "NHD") -> Scene:
    """Three requests of several queries, causal."""
    b = make_batch([37, 5, 48], [20, 5, 1], layout=layout, device=device)
    return Scene(of_batch(b), held_against(lambda dtype: b.attention(dtype, causal=True)))


def append_hnd(device: str) -> Scene:
    return append(device, "HND")


def sinks(device: str) -> Scene:
    """With a logit a head that joins the denominator."""
    b = make_batch([37, 5, 48], [20, 5, 1], device=device)
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device)
    options = {"causal": True, "sinks": sink}
    return Scene(of_batch(b, sink=sink), held_against(lambda dtype: b.attention(dtype, **options)))


def ragged(device: str, q_lens: tuple[int, ...] = (20, 5, 1), kv_lens: tuple[int, ...] = (37, 5, 48)) -> Scene:
    """Packed queries, keys and values without pages, causal."""
    q = torch.randn(sum(q_lens), 4, 32, dtype=LOW, device=device)
    k, v = (torch.randn(sum(kv_lens), 2, 32, dtype=LOW, device=device) for _ in range(2))

    def right(dtype: torch.dtype) -> Pair:
        parts = zip(q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True)
        o, lse = zip(*(attention(*part, causal=True, dtype=dtype) for part in parts), strict=True)
        return torch.cat(o), torch.cat(lse)

    def bounds(lens: tuple[int, ...]) -> Tensor:
        return int32(*(sum(lens[:b]) for b in range(len(lens) + 1)), device=device)

    names = {
        "q": q, "k": k, "v": v, "qo_indptr": bounds(q_lens), "kv_indptr": bounds(kv_lens), "Hq": 4, "Hkv": 2, "D": 32,
        "kv_indices": torch.arange(sum(kv_lens), dtype=torch.int32, device=device),
        "kv_len": int32(*kv_lens, device=device),
        "ws": torch.zeros(1024, dtype=torch.uint8, device=device), "device": device, "torch": torch,
    }  # fmt: skip
    return Scene(names, held_against(right))


def single(device: str, rows: int = 1, **options: Any) -> Scene:
    """One request: a query ``[Hq, D]`` or several ``[n, Hq, D]``."""
    q = torch.randn(rows, 4, 32, dtype=LOW, device=device)
    k, v = (torch.randn(50, 2, 32, dtype=LOW, device=device) for _ in range(2))
    names = {"q": q[0] if rows == 1 else q, "k": k, "v": v}
    return Scene(names, held_against(lambda dtype: attention(q, k, v, dtype=dtype, **options)))


def single_rope(device: str) -> Scene:
    return single(device, positions="ROPE_LLAMA")


def several(device: str) -> Scene:
    return single(device, 9, causal=True)


def several_rope(device: str) -> Scene:
    return single(device, 9, causal=True, positions="ROPE_LLAMA")


def latent(device: str, rows: tuple[int, ...] = (1, 1, 1), heads: int = 4) -> Scene:
    """A latent cache of 512 + 64 columns, in two tensors and joined; scaled by 1 / sqrt(192)."""
    b = make_batch([37, 5, 48], list(rows), heads=(heads, 1), dim=576, dim_v=576, device=device)
    b.v = b.k
    names = of_batch(b)
    joined = names["k_cache"][:, :, 0]
    names |= {
        "q_nope": b.q[..., :512].contiguous(), "q_pe": b.q[..., 512:].contiguous(), "H": heads,
        "ckv": joined[..., :512].contiguous(), "kpe": joined[..., 512:].contiguous(),
        "kv_cache": joined, "scale": 192**-0.5,
        "out": torch.empty(sum(rows), heads, 512, dtype=LOW, device=device),
    }  # fmt: skip

    def right(dtype: torch.dtype) -> Pair:
        o, lse = b.attention(dtype, causal=True, scale=192**-0.5)
        return o[..., :512], lse

    return Scene(names, held_against(right))


def latent_heads(device: str) -> Scene:
    """With DeepSeek's 128 heads."""
    return latent(device, heads=128)


# ---- sparse ----


def seen_by(blocks: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """bool [M, N] of blocks [MB, NB] of these sizes."""
    return blocks.repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def pattern(device: str, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, **names: Any) -> Scene:
    """One sequence ``[n, H, D]`` where ``seen`` bool [Hq or 1, M, N] says what is visible."""
    workspace = torch.zeros(1024, dtype=torch.uint8, device=device)
    shape = {"Hq": q.shape[1], "Hkv": k.shape[1], "D": q.shape[2]}
    return Scene(
        {"q": q, "k": k, "v": v, "ws": workspace, "torch": torch, **shape, **names},
        held_against(lambda dtype: attention(q, k, v, mask=seen, dtype=dtype)),
    )


def one(device: str, rows: int = 48, cols: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(rows, 4, 32, dtype=LOW, device=device)
    k, v = (torch.randn(cols, 2, 32, dtype=LOW, device=device) for _ in range(2))
    return q, k, v


def bsr(device: str) -> Scene:
    """Blocks of 16 x 8, some of them holes of single tokens besides; one block row is empty."""
    blocks = torch.rand(3, 8) < 0.4
    blocks[1] = False
    inside = torch.rand(3, 16, 8, 8) < 0.7
    rows, cols = torch.full((3,), 16), torch.full((8,), 8)
    indptr = torch.nn.functional.pad(blocks.sum(1).cumsum(0), (1, 0)).int().to(device)
    indices = blocks.nonzero()[:, 1].int().to(device)
    holes = seen_by(blocks, rows, cols) & inside.reshape(48, 64)
    mask = inside.transpose(1, 2)[blocks].to(device)
    return pattern(device, *one(device), holes, indptr=indptr, indices=indices, mask=mask, M=48, N=64, R=16, C=8)


def batched(device: str, blocks: Tensor | None = None) -> Scene:
    """Two sequences of 3 x 3 blocks of 16, as the documents have them."""
    blocks = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool) if blocks is None else blocks
    q = torch.randn(2, 48, 4, 32, dtype=LOW, device=device)
    k, v = (torch.randn(2, 48, 2, 32, dtype=LOW, device=device) for _ in range(2))
    seen = seen_by(blocks, torch.full((3,), 16), torch.full((3,), 16))

    def right(dtype: torch.dtype) -> Pair:
        o, lse = zip(*(attention(q[b], k[b], v[b], mask=seen, dtype=dtype) for b in range(2)), strict=True)
        return torch.stack(o), torch.stack(lse)

    names = {
        "q": q, "k": k, "v": v, "sparse_mask": blocks[None].expand(2, -1, -1).to(device), "Hq": 4, "Hkv": 2, "D": 32,
        "ws": torch.zeros(1024, dtype=torch.uint8, device=device),
    }  # fmt: skip
    return Scene(names, held_against(right))


def dense_batch(device: str) -> Scene:
    """The same without a pattern: everything is visible."""
    return batched(device, torch.ones(3, 3, dtype=torch.bool))


def variable(device: str) -> Scene:
    """Blocks of other sizes and another pattern for each KV head, heads before tokens."""
    blocks = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=torch.bool)
    rows, cols = torch.tensor([[20, 28], [41, 7]]), torch.tensor([[11, 30, 23], [1, 60, 3]])
    seen = torch.stack([seen_by(blocks[h], rows[h], cols[h]) for h in range(2)]).repeat_interleave(2, 0)
    q, k, v = one(device)

    def right(dtype: torch.dtype) -> Pair:
        o, lse = attention(q, k, v, mask=seen, dtype=dtype)
        return o.transpose(0, 1), lse.t()

    names = {
        **{n: t.transpose(0, 1).contiguous() for n, t in zip("qkv", (q, k, v), strict=True)},
        "block_mask_map": blocks.to(device), "block_row_sz": rows.int().to(device),
        "block_col_sz": cols.int().to(device), "Hq": 4, "Hkv": 2, "D": 32,
        "ws": torch.zeros(1024, dtype=torch.uint8, device=device),
    }  # fmt: skip
    return Scene(names, held_against(right))


def mask_layout(device: str) -> Scene:
    """Masks of stored blocks; row-major over rows and gathered columns of each block row."""
    mask = torch.rand(4, 2, 3) < 0.5
    right = torch.cat([mask[i:j].transpose(0, 1).reshape(-1) for i, j in ((0, 1), (1, 4))])
    return Scene({"mask": mask.to(device), "indptr": int32(0, 1, 4, device=device)}, equals(right))


# ---- pages, bits, merging ----


def appending(device: str) -> Scene:
    """Two and one new tokens of two requests; the cache before is zero."""
    cache = torch.zeros(4, 2, 4, 2, 8, dtype=LOW, device=device)
    k, v = (torch.randn(3, 2, 8, dtype=LOW, device=device) for _ in range(2))
    right = torch.zeros_like(cache)
    for token, (page, row) in enumerate(((3, 3), (1, 0), (2, 1))):
        right[page, 0, row], right[page, 1, row] = k[token], v[token]

    def compare(got: Any) -> None:
        assert got is None
        assert torch.equal(cache, right)

    indices, indptr = int32(3, 1, 2, device=device), int32(0, 2, 3, device=device)
    last, append_indptr = int32(1, 2, device=device), int32(0, 2, 3, device=device)
    names = {
        "k": k, "v": v, "cache": cache, "indices": indices, "indptr": indptr, "last_page_len": last,
        "batch_indices": int32(0, 0, 1, device=device), "positions": int32(3, 4, 1, device=device),
        "append_indptr": append_indptr, "page": 4,
    }  # fmt: skip
    return Scene(names, compare)


def appending_latent(device: str) -> Scene:
    """One new token each of two requests in a latent cache of 6 + 2 columns."""
    ckv, kpe = (torch.zeros(3, 4, n, dtype=LOW, device=device) for n in (6, 2))
    new = {
        "new_ckv": torch.randn(2, 6, dtype=LOW, device=device),
        "new_kpe": torch.randn(2, 2, dtype=LOW, device=device),
    }

    def compare(got: Any) -> None:
        assert got is None
        for cache, tokens in zip((ckv, kpe), new.values(), strict=True):
            right = torch.zeros_like(cache)
            right[0, 2], right[1, 0] = tokens[0], tokens[1]
            assert torch.equal(cache, right)

    names = {
        "ckv": ckv, "kpe": kpe, **new, "batch_indices": int32(0, 1, device=device),
        "positions": int32(2, 4, device=device), "indices": int32(0, 2, 1, device=device),
        "indptr": int32(0, 1, 3, device=device), "last_page_len": int32(3, 1, device=device),
    }  # fmt: skip
    return Scene(names, compare)


def places(device: str) -> Scene:
    names = {"append_indptr": int32(0, 2, 3, device=device), "seq_lens": int32(5, 2, device=device), "nnz": 4}
    right = int32(0, 0, 1, -1, device=device), int32(3, 4, 1, -1, device=device)

    def compare(got: Any) -> None:
        b, positions = got
        equals(right[0])(b)
        equals(right[1][:3])(positions[:3])

    return Scene(names, compare)


def lengths(device: str) -> Scene:
    names = {"indptr": int32(0, 2, 2, 5, device=device), "last_page_len": int32(3, 1, 16, device=device), "page": 16}
    return Scene(names, equals(int32(19, 0, 48, device=device)))


def bits(device: str) -> Scene:
    x = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool, device=device)
    return Scene({"x": x}, equals(torch.tensor([128, 192], dtype=torch.uint8)))


def little_bits(device: str) -> Scene:
    return Scene(bits(device).names, equals(torch.tensor([1, 3], dtype=torch.uint8)))


def segments(device: str) -> Scene:
    names = {**bits(device).names, "indptr": int32(0, 1, 10, device=device)}

    def compare(got: Any) -> None:
        packed, starts = got
        assert starts.tolist() == [0, 1, 3]
        assert packed[:3].tolist() == [1, 128, 1]

    return Scene(names, compare)


def states(device: str, count: int = 2) -> Scene:
    """States of disjoint keys; merged they are attention over all of them."""
    q, k, v = one(device, 5, 12 * count)
    parts = [attention(q, *(t[12 * i : 12 * i + 12] for t in (k, v)), dtype=torch.float64) for i in range(count)]
    o = torch.stack([part[0] for part in parts], 1).to(device, LOW)
    lse = torch.stack([part[1] for part in parts], 1).to(device, torch.float32)

    def right(dtype: torch.dtype) -> Pair:
        total = (lse.cpu().double()).exp2().sum(1).log2()
        weights = (lse.cpu() - total[:, None]).exp2().to(dtype)
        return (weights[..., None] * o.cpu().to(dtype)).sum(1), total

    names = {"v": o, "s": lse}
    for i, letter in enumerate("ab"):
        names |= {f"v_{letter}": o[:, i].contiguous(), f"s_{letter}": lse[:, i].contiguous()}
    return Scene(names, held_against(right))


def many_states(device: str) -> Scene:
    return states(device, 4)


def cascade(device: str) -> Scene:
    """Two requests that share a prefix of two pages and own the rest."""
    shared, own = 32, (7, 20)
    b = make_batch([shared, *own], [0, 1, 1], device=device)
    prefix = b.keys(0)

    def right(dtype: torch.dtype) -> Pair:
        found = []
        for i in (1, 2):
            k, v = (torch.cat(pair) for pair in zip(prefix, b.keys(i), strict=True))
            found.append(attention(b.q[i - 1 : i], k, v, dtype=dtype))
        o, lse = zip(*found, strict=True)
        return torch.cat(o), torch.cat(lse)

    def table(*requests: int) -> tuple[Tensor, Tensor, Tensor]:
        pages = [b.numbers[i] for i in requests]
        starts = [sum(len(p) for p in pages[:i]) for i in range(len(pages) + 1)]
        last = [(b.kv_lens[i] - 1) % b.page_size + 1 for i in requests]
        numbers = [page for p in pages for page in p]
        return int32(*starts, device=device), int32(*numbers, device=device), int32(*last, device=device)

    names = of_batch(b)
    both = zip(table(0), table(1, 2), strict=True)
    names |= dict(zip(("indptrs", "indices", "last_page_lens"), (list(pair) for pair in both), strict=True))
    names |= {"k_shared": prefix[0].to(device), "v_shared": prefix[1].to(device)}
    names |= dict(zip(("own_indptr", "own_indices", "own_last"), table(1, 2), strict=True))
    names["qo_indptrs"] = [int32(0, 2, device=device), int32(0, 1, 2, device=device)]
    names["qo_indptr"] = names["qo_indptrs"][1]
    return Scene(names, held_against(right))
