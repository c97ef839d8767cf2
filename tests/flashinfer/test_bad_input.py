"""Every argument of every form, made into what it must not be: a named error, never one from deep inside."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import ENTRIES, Form
from scenes import Scene
from torch import Tensor

import sparseattn.flashinfer as flashinfer

FORMS = {f"{entry.name}-{kind}": form for entry in ENTRIES for kind, form in entry.forms.items()}
# Names that a form itself computes with, or that its scene only holds results against.
COMPUTED = {"torch", "device", "ws", "out"}
# What is not looked at, or may be anything.
FREE = {
    "trtllm_batch_context_with_kv_cache-real": {"indptr text", "indptr number", "indptr dtype"},
    "convert_bsr_mask_layout-real": {"mask dtype"},
    "packbits-real": {"x dtype"},
    "segment_packbits-real": {"x dtype"},
}


def wrong(value: Any) -> dict[str, Any]:
    """What cannot take the value's place."""
    if isinstance(value, Tensor):
        other = torch.complex64 if value.is_floating_point() else torch.float64
        return {"text": "x", "number": value.flatten()[0], "dtype": value.to(other)}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"text": "x", "list": [value]}
    return {}


def misuses(form: Form) -> dict[str, Callable[[Scene], Any]]:
    """Ways to spoil one of a form's arguments, by its name and what it becomes."""
    used = {node.id for node in ast.walk(ast.parse(form.code)) if isinstance(node, ast.Name)}
    # An argument that the form indexes or computes with fails there.
    used -= {
        inner.id
        for node in ast.walk(ast.parse(form.code))
        if isinstance(node, ast.Subscript | ast.BinOp | ast.Attribute)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name)
    }
    scene = form.scene("cpu")
    return {
        f"{name} {kind}": lambda scene, name=name, kind=kind: {name: wrong(scene.names[name])[kind]}
        for name in sorted((used & set(scene.names)) - COMPUTED)
        for kind in wrong(scene.names[name])
    }


def run(form: Form, names: dict[str, Any]) -> None:
    exec(compile(ast.parse(form.code), "<form>", "exec"), {**vars(flashinfer), **names})


@pytest.mark.parametrize("name", FORMS)
def test_arguments_of_other_kinds(name: str) -> None:
    form = FORMS[name]
    for what, spoiled in misuses(form).items():
        if what in FREE.get(name, set()) or what.startswith("max_kv "):
            continue
        scene = form.scene("cpu")
        print(what)  # shown if it fails
        with pytest.raises((TypeError, ValueError), match=r"^[\w., ]+: expected "):
            run(form, {**scene.names, **spoiled(scene)})


def contents(name: str, change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> Any:
    return pytest.param(name, change, message, id=f"{name}-{message.split(':')[0]}")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        contents("trtllm_batch_decode_with_kv_cache-real", lambda n: {"scale": torch.ones(3)}, "q_scale: expected"),
        contents("trtllm_batch_context_with_kv_cache-real", lambda n: {"scale": torch.ones(3)}, "q_scale: expected"),
        contents("trtllm_batch_decode_with_kv_cache_mla-real", lambda n: {"scale": torch.ones(3)}, "q_scale: expected"),
        contents(
            "xqa-documented", lambda n: {"seq_lens": n["seq_lens"] - 20}, "seq_lens: expected lengths of at least"
        ),
        contents("xqa_mla-real", lambda n: {"out": n["out"].int()}, "output: expected a float dtype"),
        contents("cudnn_batch_prefill_with_kv_cache-real", lambda n: {"Hq": 3}, "batch_offsets_q: expected multiples"),
        contents(
            "cudnn_batch_prefill_with_kv_cache-real",
            lambda n: {"qo_indptr": n["qo_indptr"].flip(0)},
            "(actual_seq_lens|batch_offsets)_q: expected",
        ),
        contents("merge_state-real", lambda n: {"s_b": n["s_b"].int()}, "s_b: expected a float tensor"),
        contents("get_batch_indices_positions-real", lambda n: {"nnz": -1}, "nnz: expected"),
        contents(
            "BatchAttentionWithAttentionSinkWrapper-real", lambda n: {"scale": torch.ones(1)}, "sm_scale: expected"
        ),
    ],
)
def test_contents_that_do_not_fit(name: str, change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    names = FORMS[name].scene("cpu").names
    with pytest.raises((TypeError, ValueError), match=message):
        run(FORMS[name], {**names, **change(names)})


def test_a_draft_mask_has_a_row_for_every_query() -> None:
    q, cache = torch.randn(3, 2, 32, dtype=torch.float16), torch.randn(4, 2, 1, 16, 32, dtype=torch.float16)
    table = torch.arange(2, dtype=torch.int32)[:, None]
    lens, starts = torch.tensor([5, 9], dtype=torch.int32), torch.tensor([0, 2, 3], dtype=torch.int32)
    mask = torch.ones(2, 2, 1).to(torch.uint16)  # one row too many for the second request
    with pytest.raises(ValueError, match=r"mask: expected .* of 3 rows like the queries"):
        flashinfer.trtllm_batch_decode_with_kv_cache(
            q, cache, None, table, lens, 16, mask=mask, cum_seq_lens_q=starts, max_q_len=2
        )


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def planned(name: str) -> tuple[Callable[..., Any], tuple[Tensor, Tensor, Tensor]]:
    """A wrapper's ``run`` of q, k and v, and these."""
    wrapper = getattr(flashinfer, name)(torch.empty(8, dtype=torch.uint8))
    q, k, v = torch.randn(3, 64, 2, 64, dtype=torch.float16)
    if name == "BatchPrefillWithRaggedKVCacheWrapper":
        wrapper.plan(numbers(0, 40, 64), numbers(0, 40, 64), 2, 2, 64)
    elif name == "BlockSparseAttentionWrapper":
        wrapper.plan(numbers(0, 1, 2), numbers(0, 1), 64, 64, 32, 32, 2, 2, 64)
    elif name == "VariableBlockSparseAttentionWrapper":
        sizes = numbers(40, 24).expand(2, 2)
        wrapper.plan(torch.ones(2, 2, 2, dtype=torch.bool), sizes, sizes, 2, 2, 64)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    else:
        wrapper.plan(numbers(0, 2, 4), numbers(0, 1, 3, 2), numbers(16, 16), 2, 2, 64, 16)
        return lambda q, k, v: wrapper.run(q, (k, v)), (q[:2], k.view(4, 16, 2, 64), v.view(4, 16, 2, 64))
    return wrapper.run, (q, k, v)


@pytest.mark.parametrize(
    "name",
    [
        "BatchPrefillWithRaggedKVCacheWrapper",
        "BlockSparseAttentionWrapper",
        "VariableBlockSparseAttentionWrapper",
        "BatchDecodeWithPagedKVCacheWrapper",
    ],
)
def test_a_tensor_on_another_device_after_calls_that_were_right(name: str) -> None:
    """What a plan has accepted before is not looked at in full again, but kernels must not get such an address."""
    run, tensors = planned(name)
    run(*tensors)
    for i in range(3):
        moved = [t.to("meta") if i == j else t for j, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=r"expected .*(device|on) (meta|cpu)"):
            run(*moved)
    run(*tensors)
