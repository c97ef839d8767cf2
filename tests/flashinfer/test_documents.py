"""Every code block of FlashInfer's two documents runs with one import changed, and computes attention by the book.

``documented_sparse.txt`` and ``documented_attention.txt`` hold the blocks word for word. On a GPU they run as they are.
On a CPU ``CPU_SIZES`` says which words of a block are others there, and nothing else is changed: the device, and sizes
that a GPU is for. Where a document leaves names or a pattern out, ``SUPPLIED`` and the checks say what stands there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import attention, check, gathered, visible
from torch import Tensor

import sparseattn.flashinfer

FOLDER = Path(__file__).parent
Names = dict[str, Any]


def blocks(document: str) -> list[str]:
    text = (FOLDER / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


SPARSE, ATTENTION = blocks("documented_sparse.txt"), blocks("documented_attention.txt")
CODE = dict(
    zip(
        (
            "fixed-blocks", "variable-blocks", "mask-layout", "layer",
            "single-decode", "batch-decode", "xqa", "single-prefill", "batch-prefill", "batch-attention", "mla",
        ),
        (*SPARSE, *ATTENTION),
        strict=True,
    )
)  # fmt: skip

EVERYWHERE = {'"cuda:0"': '"cpu"', "128 * 1024 * 1024": "1024"}
SMALLER = {
    "batch_size = 8": "batch_size = 2",
    "seq_len = 4096": "seq_len = 512",
    "num_qo_heads = 32": "num_qo_heads = 8",
}
CPU_SIZES: dict[str, dict[str, str]] = {
    "fixed-blocks": {**SMALLER, "num_kv_heads = 8": "num_kv_heads = 2"},
    "variable-blocks": {**SMALLER, "num_kv_heads = 8": "num_kv_heads = 2"},
    "mask-layout": {},
    "layer": {
        "num_qo_heads=32, num_kv_heads=8, head_dim=128": "num_qo_heads=8, num_kv_heads=2, head_dim=128",
        "seq_len = 4096": "seq_len = 512",
        "(8, seq_len, 32, 128)": "(2, seq_len, 8, 128)",
        "(8, seq_len, 8, 128)": "(2, seq_len, 2, 128)",
    },
    "single-decode": {"kv_len = 2048": "kv_len = 512"},
    "batch-decode": {"num_layers = 32": "num_layers = 2"},
    "xqa": {"batch_size = 32": "batch_size = 4"},
    "single-prefill": {"kv_len = 2048": "kv_len = 300", "qo_len = 2048": "qo_len = 300", "qo_len = 128": "qo_len = 40"},
    "batch-prefill": {"num_qo_heads = 32": "num_qo_heads = 16"},
    "batch-attention": {},
    "mla": {},
}
for _sizes in CPU_SIZES.values():
    _sizes |= EVERYWHERE


def for_cpu(name: str) -> str:
    code = CODE[name]
    for old, new in CPU_SIZES[name].items():
        assert old in code or old in EVERYWHERE, f"{name} does not say {old!r}"
        code = code.replace(old, new)
    return code


# ---- what is right ----


def some(n: int, count: int = 24) -> Tensor:
    """``count`` of ``n`` rows, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, count)).long().unique()


def check_rows(got: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """Hold ``got`` for queries ``q [n, Hq, D]`` over ``k``, ``v`` ``[L, Hkv, D]`` against the oracle."""
    check(got, *(attention(q, k, v, dtype=dtype, **options) for dtype in (torch.float64, torch.float16)))


def check_batch(o: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> None:
    """``o`` and ``q`` ``[B, S, Hq, D]``, one mask bool [S, S] for all of them; the first and last of the batch."""
    assert o.shape == q.shape
    assert o.dtype == q.dtype
    rows = some(q.shape[1])
    for b in (0, -1):
        check_rows(o[b].cpu()[rows], q[b].cpu()[rows], k[b], v[b], mask=seen[rows])


def by_blocks(chosen: Tensor, size: int) -> Tensor:
    return chosen.cpu().repeat_interleave(size, 0).repeat_interleave(size, 1)


def fixed_blocks(names: Names) -> None:
    count = names["seq_len"] // 64
    band = torch.eye(count, dtype=torch.bool) | torch.eye(count, dtype=torch.bool).roll(1, 0).tril()
    assert torch.equal(names["sparse_mask"][0].cpu(), band)
    check_batch(*(names[n] for n in "oqkv"), by_blocks(band, 64))


def variable_blocks(names: Names) -> None:
    """The document names no sizes and no pattern; what is not sparse is dense."""
    n = names["seq_len"]
    check_batch(*(names[n] for n in "oqkv"), torch.ones(n, n, dtype=torch.bool))


def mask_layout(names: Names) -> None:
    """The offsets end past the 8 blocks that there are: all of them stand in the first block row."""
    assert torch.equal(names["converted_mask"], names["mask"].transpose(0, 1).reshape(-1))


def layer(names: Names) -> None:
    count = names["seq_len"] // 64
    near = (torch.arange(count)[:, None] - torch.arange(count)).abs() <= 2
    check_batch(names["output"], *(names[n] for n in "qkv"), by_blocks(near, 64))
    strided = names["layer"].create_sparse_pattern(names["seq_len"], pattern_type="strided")
    output = names["layer"].forward(*(names[n] for n in "qkv"), strided)
    fourth = (torch.arange(count) % 4 == 0).expand(count, count)
    check_batch(output, *(names[n] for n in "qkv"), by_blocks(fourth, 64))


def single_decode(names: Names) -> None:
    q, k, v = (names[n] for n in "qkv")
    check_rows(names["o"][None], q[None], k, v)
    check_rows(names["o_rope"][None], q[None], k, v, positions="ROPE_LLAMA")


def request(names: Names, cache: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Keys and values of request ``b`` of a block that has ``kv_page_indptr`` and its like."""
    first, end = names["kv_page_indptr"][b : b + 2].tolist()
    pages = names["kv_page_indices"][first:end].tolist()
    length = (end - first - 1) * names["page_size"] + int(names["kv_last_page_len"][b])
    k, v = (gathered(t.cpu(), pages, length, "NHD") for t in cache.unbind(1))
    return k, v


def batch_decode(names: Names) -> None:
    assert len(names["outputs"]) == names["num_layers"]
    for b in range(names["batch_size"]):
        check_rows(names["o"][b : b + 1], names["q"][b : b + 1], *request(names, names["kv_cache"], b))


def xqa(names: Names) -> None:
    """One combined cache given twice: keys are the first half of one, values the second half of the other."""
    assert names["output"].shape == names["q"].shape
    for b in range(names["batch_size"]):
        pages, length = names["page_table"][b].tolist(), int(names["seq_lens"][b])
        k = gathered(names["k_cache"][:, 0].cpu(), pages, length, "NHD")
        v = gathered(names["v_cache"][:, 1].cpu(), pages, length, "NHD")
        check_rows(names["output"][b : b + 1], names["q"][b : b + 1], k, v)


def single_prefill(names: Names) -> None:
    q, k, v = (names[n] for n in "qkv")
    rows = some(q.shape[0])
    check_rows(names["o"].cpu()[rows], q.cpu()[rows], k, v)
    check_rows(names["o_append"], names["q_append"], k, v, causal=True, positions="ROPE_LLAMA")
    assert names["lse"].shape == q.shape[:2]
    both = names["o_with_lse"].cpu()[rows], names["lse"].cpu()[rows]
    check_rows(both, q.cpu()[rows], k, v, mask=visible(len(q), len(k), causal=True)[rows])


def batch_prefill(names: Names) -> None:
    bounds = names["qo_indptr"].tolist()
    for b in (0, names["batch_size"] - 1):
        rows = slice(*bounds[b : b + 2])
        check_rows(names["o"][rows], names["q"][rows], *request(names, names["kv_cache"], b), causal=True)


def batch_attention(names: Names) -> None:
    """Keys and values are packed, a token an index, whatever ``page_size`` says."""
    assert names["o"].shape == names["q"].shape
    for b in range(3):
        rows, keys = slice(64 * b, 64 * b + 64), slice(100 * b, 100 * b + 100)
        check_rows(names["o"][rows], names["q"][rows], names["k"][keys], names["v"][keys], causal=True)


def mla_names(device: str) -> Names:
    """Absorbed queries and a joined latent cache, 512 columns and 64 rotary ones."""
    return {
        "q": torch.randn(8, 32, 576).half().to(device),
        "kv_cache": torch.randn(256, 16, 576).half().to(device),
        "page_table": torch.randperm(256).view(8, 32).int().to(device),
        "seq_lens": torch.randint(1, 513, (8,)).int().to(device),
    }


def mla(names: Names) -> None:
    """Scores are scaled by the head dimension before absorption, DeepSeek's 128 + 64."""
    for b in range(names["batch_size"]):
        pages, length = names["page_table"][b].tolist(), int(names["seq_lens"][b])
        keys = gathered(names["kv_cache"].cpu()[:, :, None], pages, length, "NHD")
        check_rows(names["o"][b : b + 1], names["q"][b : b + 1], keys, keys[..., :512], scale=(128 + 64) ** -0.5)


CHECKS: dict[str, Callable[[Names], None]] = {
    "fixed-blocks": fixed_blocks,
    "variable-blocks": variable_blocks,
    "mask-layout": mask_layout,
    "layer": layer,
    "single-decode": single_decode,
    "batch-decode": batch_decode,
    "xqa": xqa,
    "single-prefill": single_prefill,
    "batch-prefill": batch_prefill,
    "batch-attention": batch_attention,
    "mla": mla,
}
SUPPLIED: dict[str, Callable[[str], Names]] = {"mla": mla_names}


# ---- the tests ----


@pytest.mark.parametrize("name", CODE)
def test_blocks_compute_what_they_say(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", sparseattn.flashinfer)
    names = SUPPLIED.get(name, lambda device: {})(device)
    exec(for_cpu(name) if device == "cpu" else CODE[name], names)
    CHECKS[name](names)


def test_documents_have_all_their_blocks() -> None:
    assert [len(SPARSE), len(ATTENTION)] == [4, 7]
    assert set(CPU_SIZES) == set(CHECKS) == set(CODE)


@pytest.mark.gpu
def test_the_graph_of_our_own_page_follows_its_plans() -> None:
    page = (FOLDER.parents[1] / "docs" / "flashinfer.md").read_text(encoding="utf-8")
    names: Names = {"torch": torch, "flashinfer": sparseattn.flashinfer, "workspace": torch.empty(8)}
    (code,) = re.findall(r"^```python gpu\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(code, names)
    for b in range(4):  # the last plan: 16 tokens in page b
        k, v = (gathered(t.cpu(), [b], 16, "NHD") for t in names["kv_cache"].unbind(1))
        check_rows(names["o"][b : b + 1], names["q"][b : b + 1], k, v)


def cut(total: int, parts: int, heads: int) -> Tensor:
    """int32 [heads, parts], random sizes of at least 1 that add up to ``total``."""
    marks = torch.stack([torch.randperm(total - 1)[: parts - 1].sort().values + 1 for _ in range(heads)])
    return torch.nn.functional.pad(marks, (1, 1)).index_fill(1, torch.tensor([parts]), total).diff(dim=1).int()


def test_variable_blocks_are_those_of_their_pull_request(device: str) -> None:
    """FlashInfer's pull request 1177: masks [num_kv_heads, MB, NB], row sizes [num_kv_heads, MB], column sizes
    [num_kv_heads, NB], the query heads of a group alike; its benchmark has 20 rows and 50 columns of blocks."""
    heads, group, n, rows, columns = 2, 3, 300, 20, 50
    row_sizes, column_sizes = cut(n, rows, heads), cut(n, columns, heads)
    blocks = torch.rand(heads, rows, columns) < 0.2
    q = torch.randn(heads * group, n, 64).half().to(device)
    k, v = (torch.randn(heads, n, 64).half().to(device) for _ in range(2))
    wrapper = sparseattn.flashinfer.VariableBlockSparseAttentionWrapper(torch.empty(8, device=device))
    wrapper.plan(
        block_mask_map=blocks.to(device), block_row_sz=row_sizes.to(device), block_col_sz=column_sizes.to(device),
        num_qo_heads=heads * group, num_kv_heads=heads, head_dim=64, q_data_type=torch.float16,
    )  # fmt: skip
    o, lse = wrapper.run(q, k, v, return_lse=True)
    assert (o.shape, lse.shape) == (q.shape, q.shape[:2])
    seen = torch.stack(
        [
            blocks[h].repeat_interleave(row_sizes[h], 0).repeat_interleave(column_sizes[h], 1)
            for h in range(heads)
            for _ in range(group)
        ]
    )
    check_rows((o.transpose(0, 1), lse.t()), *(t.transpose(0, 1) for t in (q, k, v)), mask=seen)
