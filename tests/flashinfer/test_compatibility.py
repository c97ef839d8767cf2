"""The table of names is executed, complete, and what ``docs/flashinfer.md`` shows."""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any

import compatibility
import pytest
from compatibility import ENTRIES, IMPLEMENTATIONS, Entry

import sparseattn.flashinfer
from sparseattn.ops import dispatch

SUBMODULES = ("attention", "cascade", "decode", "mla", "page", "prefill", "quantization", "sparse")
FORMS = [(entry, kind) for entry in ENTRIES for kind in entry.forms]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Implementations of operators that calls resolve to, ``ops.paged.triton``, not what helps a plan along."""
    seen: set[str] = set()

    def watched(name: str) -> Any:
        if name.rpartition(".")[2] in IMPLEMENTATIONS:
            seen.add(name.removeprefix("sparseattn."))
        return importlib.import_module(name)

    monkeypatch.setattr(dispatch, "importlib", SimpleNamespace(import_module=watched))
    return seen


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("entry", "kind"), FORMS, ids=[f"{entry.name}-{kind}" for entry, kind in FORMS])
def test_forms_compute_what_they_should(
    entry: Entry, kind: str, impl: str, device: str, ran: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = entry.forms[kind]
    if not form.operators and impl != IMPLEMENTATIONS[0]:
        pytest.skip("nothing to choose")
    monkeypatch.setitem(dispatch.AUTO, device, (impl,))
    form.run(sparseattn.flashinfer, device)
    assert ran == {f"ops.{operator}.{impl}" for operator in form.operators}


@pytest.mark.gpu
@pytest.mark.parametrize(("entry", "kind"), FORMS, ids=[f"{entry.name}-{kind}" for entry, kind in FORMS])
def test_forms_run_on_what_a_gpu_chooses(entry: Entry, kind: str) -> None:
    """Hopper's kernels among it, which are nobody's choice above."""
    entry.forms[kind].run(sparseattn.flashinfer, "cuda")


def public(module: Any) -> set[str]:
    """Functions and classes that a module shows."""
    return {name for name, value in vars(module).items() if callable(value) and not name.startswith("_")}


def test_every_name_is_in_the_table() -> None:
    names = [entry.name.split(".")[-1] for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert set(names) == public(sparseattn.flashinfer)


def test_names_are_where_flashinfer_has_them() -> None:
    found = {m.name for m in pkgutil.iter_modules(sparseattn.flashinfer.__path__) if not m.name.startswith("_")}
    assert found >= {*SUBMODULES, "xqa"}
    for name in SUBMODULES:
        module = importlib.import_module(f"sparseattn.flashinfer.{name}")
        assert getattr(sparseattn.flashinfer, name) is module
        own = {n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and n[0] != "_"}
        assert own <= public(sparseattn.flashinfer), "what a submodule defines is at the top, too"
    assert callable(sparseattn.flashinfer.xqa), "the function hides its module, as in FlashInfer"
    for name in (
        "decode.single_decode_with_kv_cache", "decode.trtllm_batch_decode_with_kv_cache",
        "decode.cudnn_batch_decode_with_kv_cache", "decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
        "prefill.single_prefill_with_kv_cache", "prefill.trtllm_batch_context_with_kv_cache",
        "prefill.cudnn_batch_prefill_with_kv_cache", "prefill.BatchPrefillWithRaggedKVCacheWrapper",
        "attention.BatchAttention", "attention.BatchAttentionWithAttentionSinkWrapper",
        "sparse.BlockSparseAttentionWrapper", "sparse.VariableBlockSparseAttentionWrapper",
        "sparse.convert_bsr_mask_layout", "mla.BatchMLAPagedAttentionWrapper", "xqa.xqa", "xqa.xqa_mla",
        "page.append_paged_kv_cache", "cascade.merge_state", "cascade.MultiLevelCascadeAttentionWrapper",
        "quantization.packbits",
    ):  # fmt: skip
        module, _, leaf = name.partition(".")
        assert getattr(getattr(sparseattn.flashinfer, module), leaf) is getattr(sparseattn.flashinfer, leaf), name


def test_the_page_shows_the_table() -> None:
    page = compatibility.PAGE.read_text(encoding="utf-8")
    assert page == compatibility.written(page), "run: python tests/flashinfer/compatibility.py"


def test_a_wrong_result_is_seen() -> None:
    api = SimpleNamespace(**vars(sparseattn.flashinfer))
    right = sparseattn.flashinfer.single_decode_with_kv_cache
    api.single_decode_with_kv_cache = lambda q, k, v, **options: right(q, k, v.flip(0), **options)
    with pytest.raises(AssertionError, match="largest error"):
        ENTRIES[0].real.run(api, "cpu")
