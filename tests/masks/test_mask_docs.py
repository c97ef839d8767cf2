"""The page about masks runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "masks.md"


def test_every_example_runs():
    pytest.importorskip("matplotlib")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) == 5
    scope: dict = {}
    for example in examples:
        exec(example, scope)
