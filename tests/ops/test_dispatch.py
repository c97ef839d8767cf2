"""Which implementation a call gets."""

from __future__ import annotations

import pytest
import torch

from sparseattn.ops import dispatch

pytest.importorskip("triton", reason="needs Triton")


def test_auto_passes_over_what_an_operator_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    o = torch.zeros(2, 3, 1, 8)
    monkeypatch.setitem(dispatch.AUTO, "cpu", ("gluon", "reference"))
    names = dispatch.implementations("auto", o)
    module, reason = dispatch.resolve("sparseattn.ops.merge", names, o)
    assert reason is None
    assert module is not None
    assert module.__name__ == "sparseattn.ops.merge.reference"


def test_auto_takes_the_first_that_can_and_says_why_none_does() -> None:
    q = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    package = "sparseattn.ops.merge"
    module, reason = dispatch.resolve(package, ("triton", "reference"), q)
    assert reason is None
    assert module is not None
    assert module.__name__ == "sparseattn.ops.merge.reference"
    assert "Triton" in str(dispatch.resolve(package, ("gluon", "triton"), q)[1])


def test_a_name_asked_for_is_never_passed_over() -> None:
    with pytest.raises(ModuleNotFoundError):
        dispatch.resolve("sparseattn.ops.merge", ("gluon",), torch.zeros(1))
