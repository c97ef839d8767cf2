"""``sparseattn doctor``, and the entry point."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest
import torch

import sparseattn

pytest.importorskip("typer")
pytest.importorskip("rich")
doctor = importlib.import_module("sparseattn.cli.doctor")


def test_reports_and_succeeds(invoke) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    for word in ("Versions", "Device", "Implementations", "block_sparse, reference", "scores, triton"):
        assert word in result.stdout
    assert "Nothing is broken." in result.stdout


def test_every_operator_is_asked() -> None:
    """The folders of ``ops``, and the selector that has kernels of its own for Hopper."""
    ops = importlib.import_module("sparseattn.ops")
    folders = {module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg}
    found = [f for f in doctor._implementations() if f.section == "Implementations"]
    assert {f.name.partition(",")[0] for f in found} == folders | {"landmark"}
    assert {f.status for f in found} <= {doctor.OK, doctor.ABSENT}
    assert {f.name for f in found if f.status == doctor.OK} >= {f"{name}, reference" for name in folders}


def test_json(invoke) -> None:
    pytest.importorskip("transformers")
    findings = {(f["section"], f["name"]): f for f in json.loads(invoke("doctor", "--json").stdout)}
    assert findings["Versions", "sparseattn"]["detail"] == sparseattn.__version__
    assert findings["Versions", "torch"]["status"] == doctor.OK
    assert findings["Implementations", "block_sparse, reference"]["status"] == doctor.OK
    assert "sparseattn_xattention" in findings["Transformers", "attention"]["detail"]


def test_a_cpu_says_why_triton_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    found = {f.name: f for f in doctor._implementations()}
    assert found["block_sparse, triton"].status == doctor.ABSENT
    assert "CUDA" in found["block_sparse, triton"].detail


def test_conflicts_are_named(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    versions = {"torch": "2.13.0+cpu", "triton": "3.5.1", "transformers": "5.16.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = {f.name: f for f in [*doctor._versions(), *doctor._conflicts()]}
    assert found["TRITON_INTERPRET"].status == doctor.WARNING
    assert found["triton"].status == found["transformers"].status == doctor.WARNING
    assert "older than 3.6" in found["triton"].detail
    assert found["torch"].status == doctor.OK
    assert found["matplotlib"].status == doctor.ABSENT


def test_what_is_broken_fails(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernels today")

    monkeypatch.setattr(sparseattn, "xattention", explode)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "failed: RuntimeError: no kernels today" in result.stdout
    assert "Nothing is broken" not in result.stdout


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['sparseattn', '--help']\n"
        "try:\n    runpy.run_module('sparseattn.cli', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'transformers', 'matplotlib', 'triton'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "run", "bench", "inspect", "doctor"):
        assert command in done.stdout


def test_without_typer_the_message_names_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from sparseattn.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == "the sparseattn command needs typer: pip install 'sparseattn[cli]'"
