"""A prompt for the shipped models, and the command line as tests call it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseattn.testing.retrieval import decode, make_batch


@pytest.fixture(autouse=True)
def _few_threads():
    """Small work gains nothing from threads and loses much where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Call the command line in this process; the result has exit_code, stdout and stderr."""
    from typer.testing import CliRunner

    from sparseattn.cli.app import app

    runner = CliRunner()

    def call(*args: object) -> Any:
        result = runner.invoke(app, [str(a) for a in args], catch_exceptions=True)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file with a question at its end, and the answer."""
    batch = make_batch("single", 700, seed=11)
    start = int(batch.question_starts[0, 0])
    text, answer = decode(batch.tokens[0, : start + 32]), decode(batch.tokens[0, start + 32 : start + 40])
    assert text.endswith(" is ")
    file = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    file.write_text(text + "\n", encoding="utf-8")
    return file, answer
