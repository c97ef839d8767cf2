"""Code in the READMEs and docs/ runs: every ```python block, in order, one namespace a page.

A block whose info string says ``gpu`` or ``download`` after ``python`` needs what no test machine must have; it is
parsed and skipped.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "README_ZH.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"gpu": "needs a GPU", "download": "needs a model from the hub"}
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, list[str], str]]:
    """(line, words of the info string, code) of every Python block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(2)].count("\n"), m[1].split(), m[2]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    found = blocks(page)
    ran = 0
    namespace: dict[str, object] = {"__name__": "docs"}
    for line, words, code in found:
        assert set(words) <= set(NEEDS), f"{page.name}:{line}: unknown words {words}"
        source = "\n" * line + code  # so that a traceback names the line of the page
        ast.parse(source, filename=str(page))
        if not words:
            exec(compile(source, str(page), "exec"), namespace)
            ran += 1
    if found and not ran:
        pytest.skip("; ".join(sorted({NEEDS[word] for _, words, _ in found for word in words})))


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readmes_run_the_same_code() -> None:
    def trees(page: Path) -> list[tuple[list[str], str]]:
        return [(words, ast.dump(ast.parse(code))) for _, words, code in blocks(page)]

    assert trees(ROOT / "README.md") == trees(ROOT / "README_ZH.md"), "comments may differ, code may not"
