"""The names of ``sparseattn.flashinfer``, each with the calls that a test executes and ``docs/flashinfer.md`` shows.

    python tests/flashinfer/compatibility.py     # rewrites the table in docs/flashinfer.md

A form is code over the names of its scene (``scenes.py``); its last expression is the result that is held against the
oracle, or, where that is None, what was written into ``out``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import scenes
from scenes import Scene

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flashinfer.md"
BEGIN = "<!-- names: begin (written by python tests/flashinfer/compatibility.py) -->"
END = "<!-- names: end -->"
#: Implementations that every form runs on, on any machine: Triton's interpreter takes the place of a GPU.
IMPLEMENTATIONS = ("triton", "reference")
PAGED, PACKED, BSR, MERGE, TORCH = ("paged",), ("block_sparse",), ("bsr",), ("merge",), ()


@dataclass(frozen=True)
class Form:
    """A way to call.

    Attributes:
        code: Statements, the last one an expression.
        scene: Makes the tensors, on a device.
        operators: Folders of ``sparseattn/ops`` with the operators whose implementation is chosen for it; none where
            there is nothing to choose.
    """

    code: str
    scene: Callable[[str], Scene]
    operators: tuple[str, ...] = PAGED

    def run(self, api: Any, device: str) -> None:
        """Execute it with the names of ``api`` and hold the result against the oracle."""
        scene = self.scene(device)
        names = {**vars(api), **scene.names}
        *statements, last = ast.parse(self.code).body
        assert isinstance(last, ast.Expr)
        exec(compile(ast.Module(statements, []), "<form>", "exec"), names)
        result = eval(compile(ast.Expression(last.value), "<form>", "eval"), names)
        scene.check(names["out"] if result is None and "out" in names else result)


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        name: As ``sparseattn.flashinfer`` has it, with its submodule where it is not at the top.
        real: As FlashInfer's own signature has it.
        documented: As the documents call it, where that is another form.
        notes: What a caller should know.
    """

    name: str
    real: Form
    documented: Form | None = None
    notes: str = ""

    @property
    def forms(self) -> dict[str, Form]:
        return {"real": self.real} | ({"documented": self.documented} if self.documented else {})


DECODE_PLAN = "w.plan(indptr, indices, last_page_len, Hq, Hkv, D, page)"
ENTRIES = (
    Entry(
        "single_decode_with_kv_cache",
        Form("single_decode_with_kv_cache(q, k, v, return_lse=True)", scenes.single),
        Form('single_decode_with_kv_cache(q, k, v, pos_encoding_mode="ROPE_LLAMA")', scenes.single_rope),
    ),
    Entry(
        "single_prefill_with_kv_cache",
        Form("single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True)", scenes.several, PACKED),
        Form('single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode="ROPE_LLAMA")', scenes.several_rope),
    ),
    Entry(
        "single_prefill_with_kv_cache_return_lse",
        Form("single_prefill_with_kv_cache_return_lse(q, k, v, causal=True)", scenes.several, PACKED),
    ),
    Entry(
        "BatchDecodeWithPagedKVCacheWrapper",
        Form(f'w = BatchDecodeWithPagedKVCacheWrapper(ws, "NHD")\n{DECODE_PLAN}\nw.run(q, cache)', scenes.decode),
        Form(
            'w = BatchDecodeWithPagedKVCacheWrapper(ws, kv_layout="NHD")\n'
            "w.plan(indptr, indices, last_page_len, Hq, Hkv, D, page, data_type=torch.float16)\nw.run(q, cache)",
            scenes.decode,
        ),
        "`data_type` means queries and cache.",
    ),
    Entry(
        "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
        Form(
            "w = CUDAGraphBatchDecodeWithPagedKVCacheWrapper(ws, indptr_buf, indices_buf, last_buf)\n"
            f"{DECODE_PLAN}\nw.run(q, cache)",
            scenes.decode,
        ),
        notes="Plans between replays may change everything but the batch size.",
    ),
    Entry(
        "fast_decode_plan",
        Form(
            "w = BatchDecodeWithPagedKVCacheWrapper(ws)\n"
            "fast_decode_plan(w, indptr, indices, last_page_len, Hq, Hkv, D, page)\nw.run(q, cache)",
            scenes.decode,
        ),
        notes="`plan` by another name: neither copies anything from the device.",
    ),
    Entry(
        "BatchPrefillWithPagedKVCacheWrapper",
        Form(
            "w = BatchPrefillWithPagedKVCacheWrapper(ws)\n"
            "w.plan(qo_indptr, indptr, indices, last_page_len, Hq, Hkv, D, page, causal=True)\n"
            "w.run(q, cache, return_lse=True)",
            scenes.append,
        ),
        Form(
            'w = BatchPrefillWithPagedKVCacheWrapper(ws, kv_layout="NHD")\n'
            "w.plan(qo_indptr, indptr, indices, last_page_len, Hq, Hkv, D, page, causal=True, "
            "data_type=torch.float16)\nw.run(q, cache)",
            scenes.append,
        ),
    ),
    Entry(
        "BatchPrefillWithRaggedKVCacheWrapper",
        Form(
            "w = BatchPrefillWithRaggedKVCacheWrapper(ws)\n"
            "w.plan(qo_indptr, kv_indptr, Hq, Hkv, D, causal=True)\nw.run(q, k, v, return_lse=True)",
            scenes.ragged,
            PACKED,
        ),
    ),
    Entry(
        "BatchAttention",
        Form(
            "w = BatchAttention()\n"
            "w.plan(qo_indptr, indptr, indices, kv_len, Hq, Hkv, D, D, page, causal=True, "
            "q_data_type=torch.float16, kv_data_type=torch.float16)\nw.run(q, cache)",
            scenes.append,
        ),
        Form(
            'w = BatchAttention(kv_layout="NHD", device=device)\n'
            "w.plan(qo_indptr, kv_indptr, kv_indices, kv_len, Hq, Hkv, D, D, 16, causal=True)\nw.forward(q, k, v)",
            scenes.ragged,
        ),
    ),
    Entry(
        "BatchAttentionWithAttentionSinkWrapper",
        Form(
            "w = BatchAttentionWithAttentionSinkWrapper(ws, q_data_type=torch.float16, kv_data_type=torch.float16, "
            "head_dim_qk=D, head_dim_vo=D)\n"
            "w.plan(qo_indptr, indptr, indices, last_page_len, Hq, Hkv, D, page, causal=True, "
            "q_data_type=torch.float16)\nw.run(q, cache, sink, scale)",
            scenes.sinks,
        ),
    ),
    Entry(
        "mla.BatchMLAPagedAttentionWrapper",
        Form(
            "w = BatchMLAPagedAttentionWrapper(ws)\n"
            "w.plan(qo_indptr, indptr, indices, kv_len, H, 512, 64, page, True, scale, torch.float16, torch.float16)\n"
            "w.run(q_nope, q_pe, ckv, kpe, return_lse=True)",
            scenes.latent,
        ),
        Form(
            'w = BatchMLAPagedAttentionWrapper(ws, kv_layout="NHD")\nw.forward(q, kv_cache, block_tables, seq_lens)',
            scenes.latent,
        ),
    ),
    Entry(
        "BlockSparseAttentionWrapper",
        Form(
            "w = BlockSparseAttentionWrapper(ws)\n"
            "w.plan(indptr, indices, M, N, R, C, Hq, Hkv, D, mask=mask)\nw.run(q, k, v, return_lse=True)",
            scenes.bsr,
            BSR,
        ),
        Form(
            'w = BlockSparseAttentionWrapper(ws, kv_layout="NHD")\n'
            "w.plan(q, k, v, sparse_mask, num_qo_heads=Hq, num_kv_heads=Hkv, head_dim=D, block_size=16)\n"
            "w.forward(q, k, v)",
            scenes.batched,
            BSR,
        ),
    ),
    Entry(
        "VariableBlockSparseAttentionWrapper",
        Form(
            "w = VariableBlockSparseAttentionWrapper(ws)\n"
            "w.plan(block_mask_map, block_row_sz, block_col_sz, Hq, Hkv, D)\nw.run(q, k, v, return_lse=True)",
            scenes.variable,
            PACKED,
        ),
        Form(
            'w = VariableBlockSparseAttentionWrapper(ws, kv_layout="NHD")\n'
            "w.plan(q, k, v, num_qo_heads=Hq, num_kv_heads=Hkv, head_dim=D)\nw.forward(q, k, v)",
            scenes.dense_batch,
            PACKED,
        ),
        "Without sizes and a pattern it is dense.",
    ),
    Entry(
        "convert_bsr_mask_layout",
        Form("convert_bsr_mask_layout(mask, indptr)", scenes.mask_layout, TORCH),
    ),
    Entry(
        "xqa",
        Form(
            "out = torch.empty_like(q[:, None])\n"
            "xqa(q[:, None], k_cache, v_cache, block_tables, seq_lens[:, None].to(torch.uint32), out, ws, ws, Hkv, "
            "page)",
            scenes.decode,
        ),
        Form("xqa(q, k_cache, v_cache, block_tables, seq_lens, head_dim=D, page_size=page)", scenes.decode_twice),
        "Without `output` it allocates one. A combined cache may be given twice.",
    ),
    Entry(
        "xqa_mla",
        Form(
            "xqa_mla(q[:, None], kv_cache[:, :, None], kv_cache[:, :, None], block_tables, "
            "seq_lens[:, None].to(torch.uint32), out[:, None], ws, ws, page, q_scale=scale)",
            scenes.latent_heads,
        ),
    ),
    Entry(
        "cudnn_batch_decode_with_kv_cache",
        Form(
            "cudnn_batch_decode_with_kv_cache(q, k_cache, v_cache, scale, ws, max_sequence_kv=max_kv, "
            "actual_seq_lens_kv=seq_lens.view(-1, 1, 1, 1), block_tables=block_tables)",
            scenes.decode_hnd,
        ),
    ),
    Entry(
        "cudnn_batch_prefill_with_kv_cache",
        Form(
            "cudnn_batch_prefill_with_kv_cache(q, k_cache, v_cache, scale, ws, max_token_per_sequence=max_q, "
            "max_sequence_kv=max_kv, actual_seq_lens_q=qo_indptr.diff().view(-1, 1, 1, 1), "
            "actual_seq_lens_kv=seq_lens.view(-1, 1, 1, 1), block_tables=block_tables, causal=True, "
            "return_lse=False, batch_offsets_q=qo_indptr * Hq * D, batch_offsets_o=qo_indptr * Hq * D)[0]",
            scenes.append_hnd,
        ),
    ),
    Entry(
        "trtllm_batch_decode_with_kv_cache",
        Form(
            "trtllm_batch_decode_with_kv_cache(q, cache, ws, block_tables, seq_lens, max_kv, bmm1_scale=scale)",
            scenes.decode_hnd,
        ),
        notes='The layout is "HND" unless said, and `bmm1_scale` has 1 / sqrt(D) in it.',
    ),
    Entry(
        "xqa_batch_decode_with_kv_cache",
        Form(
            "xqa_batch_decode_with_kv_cache(q, cache, ws, block_tables, seq_lens, max_kv, bmm1_scale=scale)",
            scenes.decode,
        ),
    ),
    Entry(
        "trtllm_batch_decode_with_kv_cache_mla",
        Form(
            "trtllm_batch_decode_with_kv_cache_mla(q[:, None], kv_cache, ws, 128, 512, 64, block_tables, seq_lens, "
            "max_kv, bmm1_scale=scale)",
            scenes.latent,
        ),
        notes="LSE in base 2 whatever the backend.",
    ),
    Entry(
        "trtllm_batch_context_with_kv_cache",
        Form(
            "trtllm_batch_context_with_kv_cache(q, cache, ws, block_tables, seq_lens, max_q, max_kv, scale, 1.0, B, "
            "qo_indptr, indptr)",
            scenes.append_hnd,
        ),
        notes='The layout is "HND" unless said; causal unless said.',
    ),
    Entry(
        "MultiLevelCascadeAttentionWrapper",
        Form(
            'w = MultiLevelCascadeAttentionWrapper(2, ws, "NHD")\n'
            "w.plan(qo_indptrs, indptrs, indices, last_page_lens, Hq, Hkv, D, page)\nw.run(q, cache)",
            scenes.cascade,
            (*PAGED, *MERGE),
        ),
    ),
    Entry(
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
        Form(
            "w = BatchDecodeWithSharedPrefixPagedKVCacheWrapper(ws)\n"
            "w.begin_forward(own_indptr, own_indices, own_last, Hq, Hkv, D, page)\n"
            "w.forward(q, k_shared, v_shared, cache)",
            scenes.cascade,
            (*PAGED, *MERGE),
        ),
        notes="Deprecated in FlashInfer.",
    ),
    Entry(
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
        Form(
            "w = BatchPrefillWithSharedPrefixPagedKVCacheWrapper(ws)\n"
            "w.begin_forward(qo_indptr, own_indptr, own_indices, own_last, Hq, Hkv, D, page)\n"
            "w.forward(q, k_shared, v_shared, cache, causal=True)",
            scenes.cascade,
            (*PAGED, *MERGE),
        ),
        notes="Deprecated in FlashInfer.",
    ),
    Entry("merge_state", Form("merge_state(v_a, s_a, v_b, s_b)", scenes.states, MERGE), notes="LSE in base 2."),
    Entry(
        "merge_state_in_place",
        Form("merge_state_in_place(v_a, s_a, v_b, s_b)\n(v_a, s_a)", scenes.states, MERGE),
    ),
    Entry("merge_states", Form("merge_states(v, s)", scenes.many_states, MERGE)),
    Entry(
        "append_paged_kv_cache",
        Form(
            "append_paged_kv_cache(k, v, batch_indices, positions, cache, indices, indptr, last_page_len)",
            scenes.appending,
            TORCH,
        ),
        notes="Triton on a GPU.",
    ),
    Entry(
        "append_paged_mla_kv_cache",
        Form(
            "append_paged_mla_kv_cache(new_ckv, new_kpe, batch_indices, positions, ckv, kpe, indices, indptr, "
            "last_page_len)",
            scenes.appending_latent,
            TORCH,
        ),
        notes="Any numbers of columns. Triton on a GPU.",
    ),
    Entry(
        "get_batch_indices_positions",
        Form("get_batch_indices_positions(append_indptr, seq_lens, nnz)", scenes.places, TORCH),
    ),
    Entry("get_seq_lens", Form("get_seq_lens(indptr, last_page_len, page)", scenes.lengths, TORCH)),
    Entry(
        "packbits",
        Form("packbits(x)", scenes.bits, TORCH),
        notes='`bitorder` is "big" unless said, as in FlashInfer; `packed_custom_mask` takes "little".',
    ),
    Entry(
        "segment_packbits",
        Form('segment_packbits(x, indptr, bitorder="little")', scenes.segments, TORCH),
    ),
)


def cell(form: Form | None) -> str:
    """Code in a table: a line a statement."""
    return "" if form is None else "<br>".join(f"`{line}`" for line in form.code.splitlines())


def implementations(operators: list[str]) -> list[str]:
    """Who may compute a name: Gluon where some of its operators have kernels for Hopper."""
    hopper = any(find_spec(f"sparseattn.ops.{operator}.gluon") for operator in operators)
    return [*(["Gluon"] if hopper else []), "Triton", "PyTorch"]


def table() -> str:
    """The table of ``docs/flashinfer.md``, in markdown."""
    lines = [["name", "FlashInfer's form", "the documents' form", "computed by", "notes"], ["---"] * 5]
    for entry in ENTRIES:
        operators = sorted({operator for form in entry.forms.values() for operator in form.operators})
        computed = f"{', '.join(operators)}: {', '.join(implementations(operators))}" if operators else "PyTorch"
        cells = [cell(entry.real), cell(entry.documented), computed, entry.notes]
        lines.append([f"`{entry.name}`", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def written(document: str) -> str:
    """``document`` with the table between its markers."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin, BEGIN
    assert end, END
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
