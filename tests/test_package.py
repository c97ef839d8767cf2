"""What importing and installing the package may need, touch and change; each claim in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import sparseattn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparseattn"

BLOCK_IMPORTS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *, blocked: tuple[str, ...] = (), env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter where the ``blocked`` packages cannot be imported; its output."""
    source = f"BLOCKED = {blocked!r}\n{BLOCK_IMPORTS if blocked else ''}\n{textwrap.dedent(code)}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    environment.update(env or {})
    command = [sys.executable, "-W", "error", "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


EXTRAS = ("numpy", "transformers", "accelerate", "safetensors", "typer", "rich", "tqdm", "matplotlib")


def test_import_needs_torch_alone() -> None:
    # torch itself imports numpy where it finds it and does without elsewhere, so numpy may be blocked, too.
    code = """
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on numpy's absence
            import torch
        import sparseattn
        loaded = {name.split(".")[0] for name in sys.modules}
        assert not loaded & set(BLOCKED), loaded & set(BLOCKED)
    """
    python(code, blocked=(*EXTRAS, "triton"))


def test_import_loads_no_optional_package() -> None:
    code = """
        import sys, torch
        before = {name.split(".")[0] for name in sys.modules}
        import sparseattn
        new = {name.split(".")[0] for name in sys.modules} - before
        third_party = {n for n in new if n not in sys.stdlib_module_names and not n.startswith("_")}
        print(sorted(third_party - {"sparseattn", "typing_extensions"}))
    """
    assert python(code).strip() == "[]"


def test_reference_attention_works_without_triton() -> None:
    code = """
        import torch
        from sparseattn import XAttentionConfig, block_sparse_attention, xattention
        q, k, v = torch.randn(1, 256, 4, 16), torch.randn(1, 256, 2, 16), torch.randn(1, 256, 2, 16)
        mask = xattention(q, k, XAttentionConfig(threshold=1.0, block_size=64))
        o = block_sparse_attention(q, k, v, mask)
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        torch.testing.assert_close(o, dense)
        try:
            block_sparse_attention(q, k, v, mask, impl="triton")
        except ValueError as error:
            assert "riton" in str(error), error
        else:
            raise AssertionError("impl='triton' ran without Triton")
    """
    python(code, blocked=("triton",))


def test_adapters_say_what_is_missing() -> None:
    code = """
        import sparseattn
        with sparseattn.record(), sparseattn.options(threshold=0.5):
            pass
        try:
            sparseattn.register()
        except ModuleNotFoundError as error:
            print(error)
    """
    assert "transformers" in python(code, blocked=("transformers",))


def test_documented_functions_need_torch_alone() -> None:
    code = """
        import torch
        from sparseattn import threshold
        from sparseattn.src.load_llama import FastPrefillConfig, load_model
        from sparseattn.src.Xattention import Xattention_prefill
        q = torch.randn(1, 2, 200, 16)
        assert Xattention_prefill(q, q, q).shape == q.shape
        assert threshold.available()
        try:
            load_model(FastPrefillConfig(), "some/model")
        except ModuleNotFoundError as error:
            print(error)
    """
    assert "transformers" in python(code, blocked=("transformers", "typer", "rich", "triton"))


def test_flashinfers_names_need_torch_alone() -> None:
    code = """
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on numpy's absence
            import torch
        import sparseattn.flashinfer as flashinfer
        from sparseattn.flashinfer import attention, cascade, decode, mla, page, prefill, sparse
        q, k, v = torch.randn(4, 64), torch.randn(40, 2, 64), torch.randn(40, 2, 64)
        o = flashinfer.single_decode_with_kv_cache(q, k, v)
        dense = torch.nn.functional.scaled_dot_product_attention(
            q[:, None], k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True
        )[:, 0]
        torch.testing.assert_close(o, dense)
        merged = flashinfer.merge_state(o[None], torch.zeros(1, 4), o[None], torch.zeros(1, 4))[0]
        torch.testing.assert_close(merged[0], o)
        loaded = {name.split(".")[0] for name in sys.modules}
        assert not loaded & set(BLOCKED), loaded & set(BLOCKED)
    """
    python(code, blocked=(*EXTRAS, "triton", "flashinfer"))


@pytest.mark.parametrize("module", ["sparseattn", "sparseattn.flashinfer"])
def test_import_touches_no_device(module: str) -> None:
    code = f"""
        import torch

        def refuse(*args, **kwargs):
            raise AssertionError("import initialised CUDA")

        torch.cuda._lazy_init = refuse
        torch._C._cuda_init = refuse
        import {module}
        assert not torch.cuda.is_initialized()
    """
    python(code)


def test_import_changes_no_global_state() -> None:
    code = """
        import json, logging, os, signal, sys, threading, warnings
        import torch

        def loggers():
            names = [None, *logging.root.manager.loggerDict]
            return {str(n): (len(logging.getLogger(n).handlers), logging.getLogger(n).level) for n in names}

        def registered():
            return sorted(s.name for s in torch._C._jit_get_all_schemas() if s.name.split("::")[0] != "sparseattn")

        def state():
            return {
                "environment": dict(os.environ),
                "directory": os.getcwd(),
                "path": list(sys.path),
                "finders": [repr(f) for f in sys.meta_path],
                "filters": [repr(f) for f in warnings.filters],
                "loggers": {n: v for n, v in loggers().items() if not n.startswith("torch")},
                "threads": threading.active_count(),
                "signals": [repr(signal.getsignal(s)) for s in signal.valid_signals()],
                "hooks": [repr(sys.excepthook), repr(sys.displayhook)],
                "recursion": sys.getrecursionlimit(),
                "dtype": str(torch.get_default_dtype()),
                "device": str(torch.get_default_device()),
                "grad": torch.is_grad_enabled(),
                "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
                "random": torch.random.get_rng_state().tolist(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "precision": torch.get_float32_matmul_precision(),
                "tf32": [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark],
                "print": repr(torch._tensor_str.PRINT_OPTS),
                "operators": registered(),
            }

        before = state()
        import sparseattn
        after = state()
        changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
        assert not changed, json.dumps(changed, default=str)[:2000]
    """
    python(code)


@pytest.mark.slow
def test_import_leaves_transformers_alone() -> None:
    pytest.importorskip("transformers")
    code = """
        import warnings
        warnings.simplefilter("ignore")  # what Transformers' own imports warn about is not ours
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        def names():
            return [sorted(kind().keys()) for kind in (AttentionInterface, AttentionMaskInterface)]

        before = names()
        import sparseattn
        sparseattn.options, sparseattn.record
        assert names() == before
        sparseattn.register()
        assert any("sparseattn" in name for name in names()[0])
        assert any("sparseattn" in name for name in names()[1])
    """
    python(code)


def test_public_names_are_the_explicit_ones() -> None:
    assert sparseattn.__all__ == sorted(sparseattn.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for name in sparseattn.__all__:
        assert getattr(sparseattn, name) is not None
        assert name in dir(sparseattn)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sparseattn.no_such_name


# ---- layers: who may import whom (DESIGN section 1) ----

ADAPTERS = ("integrations", "flashinfer", "ascend", "src", "threshold", "hf", "cli")
IMPLEMENTATIONS = ("reference", "triton", "gluon")
# Kernels and launches that the Triton and the Gluon implementation of an operator share; nobody else may import them.
SHARED = (
    "extra", "extra_backward", "cut_triton", "lists_triton", "landmark_launches", "landmark_triton_choice",
    "landmark_triton_features", "landmark_triton_order",
)  # fmt: skip


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Absolute names of what a file imports, inside functions, too, if ``lazy``, but never under ``TYPE_CHECKING``."""
    package = list(path.relative_to(ROOT).parent.parts)

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def own(path: Path) -> set[str]:
    """The parts of this package that a file imports, ``sparseattn.ops.scores.api`` as ``ops.scores.api``."""
    return {n.removeprefix("sparseattn.") for n in imports(path) if n.startswith("sparseattn.")}


def starts(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


ALLOWED = {
    "errors": (),
    "masks": ("errors", "masks"),
    "kernels": ("errors", "kernels"),
    "ops": ("errors", "masks", "kernels", "ops"),
    "selectors": ("errors", "masks", "kernels", "ops", "selectors"),
    "fidelity": ("errors", "masks", "kernels", "ops", "fidelity"),
}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    allowed = ALLOWED.get(layer(path))
    if allowed is not None:
        assert not {n for n in own(path) if not starts(n, allowed)}
    if layer(path) not in (*ADAPTERS, "__init__"):
        adapters = {n for n in own(path) if starts(n, ADAPTERS)}
        assert not adapters, "only adapters may import adapters"


def test_masks_need_torch_alone() -> None:
    for path in (PACKAGE / "masks").rglob("*.py"):
        third_party = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        drawing = {"matplotlib"}  # plot() imports it when it is called
        assert third_party - drawing <= {"torch", "sparseattn", "typing_extensions"}, path


def implementation_of(stem: str) -> str | None:
    """``triton_forward`` and ``landmark_triton`` are Triton's, ``landmark`` is nobody's."""
    return next((part for part in stem.split("_") if part in IMPLEMENTATIONS), None)


@pytest.mark.parametrize("operator", sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "api.py").exists()))
def test_implementations_do_not_know_each_other(operator: str) -> None:
    folder = PACKAGE / "ops" / operator
    shared = {path: f"ops.{operator}.{path.stem}" for path in folder.glob("*.py") if path.stem in SHARED}
    files = {path: implementation_of(path.stem) for path in folder.glob("*.py") if path not in shared}
    for path in shared:
        kinds = tuple(f"ops.{operator}.{other.stem}" for other, kind in files.items() if kind is not None)
        assert not {n for n in own(path) if starts(n, (*kinds, f"ops.{operator}.api"))}, path
    for path, implementation in files.items():
        if implementation is not None:
            others = [
                f"ops.{operator}.{other.stem}" for other, kind in files.items() if kind not in (None, implementation)
            ]
            assert not {n for n in own(path) if starts(n, tuple(others))}, path
            assert f"ops.{operator}.api" not in own(path), path
    for path, implementation in files.items():
        if implementation not in ("triton", "gluon"):
            at_import = set(imports(path, lazy=False))
            assert not {n for n in at_import if "triton" in n.split(".")}, f"{path} must import without Triton"
            assert not {n for n in own(path) if starts(n, tuple(shared.values()))}, path
    reference = {n.split(".")[0] for n in imports(folder / "reference.py")} - set(sys.stdlib_module_names)
    assert reference <= {"torch", "sparseattn"}, "the reference needs torch alone"


# ---- the wheel ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_is_pure_python_and_complete(wheel: Path) -> None:
    assert wheel.name == f"sparseattn-{sparseattn.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("METADATA"))).decode())
    assert "sparseattn/py.typed" in names
    weights = [n for n in names if n.startswith("sparseattn/models/") and n.endswith(".safetensors")]
    assert weights, "the retrieval model ships with the package"
    assert any(n.startswith("sparseattn/threshold/data/") for n in names), "tables ship with the package"
    top = {n.split("/")[0] for n in names}
    assert top == {"sparseattn", f"sparseattn-{sparseattn.__version__}.dist-info"}
    assert not [n for n in names if n.endswith((".so", ".pyd", ".cu", ".pyc"))]
    hard = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert [r.split(">")[0] for r in hard] == ["torch"]
    assert {"hf", "viz", "train", "bench", "dev", "all"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["License-Expression"] == "MIT"


@pytest.mark.slow
def test_wheel_installs_and_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--target", str(target)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    code = """
        import json, sparseattn
        print(json.dumps([sparseattn.__version__, sparseattn.__file__]))
    """
    version, file = json.loads(python(code, env={"PYTHONPATH": str(target)}, cwd=tmp_path))
    assert version == sparseattn.__version__
    assert Path(file).is_relative_to(target)
