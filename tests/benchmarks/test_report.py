"""Tables and plots are made of rows, and documents show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, paged, paged_report, paged_sets, report, selector_report

ROOT = Path(__file__).resolve().parents[2]


def row(impl: str, tflops: float, density: float = 0.1, **more: Any) -> harness.Row:
    """A row as ``benchmarks.block_sparse`` writes them."""
    common = {
        "bench": "block_sparse", "set": "targets", "op": "forward", "n": 16384, "nq": 16384, "heads": 32,
        "kv_heads": 8, "mask_heads": 32, "head_dim": 128, "head_dim_v": 128, "block": 128, "block_q": 128,
        "dtype": "bf16", "selected": density,
    }  # fmt: skip
    env = {"device": "GPU", "torch": "2.11", "triton": "3.6", "commit": "abc", "time": more.pop("run", "noon")}
    return {**common, "impl": impl, "density": density, "tflops": tflops, "ms": 100 / tflops, "env": env, **more}


def lines(text: str) -> list[list[str]]:
    """Cells of the lines of a markdown table, its header first."""
    found = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [line for line in found if not set("".join(line)) <= {"-", " "}]


def test_ratios_are_those_of_one_run() -> None:
    rows = [
        row("sparseattn_gluon", 600), row("fa4", 500), row("sparseattn_triton", 400),
        row("sparseattn_gluon", 300, 0.02, run="later"), row("fa4", 320, 0.02), row("cudnn_dense", 550, 1.0),
    ]  # fmt: skip
    header, *body = lines(report.block_sparse(rows))
    assert header == ["pass", "tokens", "", "density 1", "density 0.1", "density 0.02"]
    cells = {line[2]: line[3:] for line in body}
    assert cells["**sparseattn** (Gluon)"] == ["", "600 (0.167 ms, 1.20x)", "300 (0.333 ms)"]
    assert cells["**sparseattn** (Triton)"][1] == "400 (0.25 ms, 0.80x)"
    assert cells["FlashAttention-4"] == ["", "500 (0.2 ms)", "320 (0.312 ms)"]
    assert cells["cuDNN, dense"][0] == "550 (0.182 ms)"
    assert [line[2] for line in body] == [name for name in dict.fromkeys(report.NAMES.values()) if name in cells]


def test_rows_without_a_set_are_the_targets() -> None:
    old = row("sparseattn", 479, 1.0)
    del old["set"], old["nq"], old["mask_heads"], old["head_dim_v"], old["block_q"]
    assert "| forward | 16K | **sparseattn** (Triton) | 479 (0.209 ms) |" in report.tables([old])
    assert report.details([old]).startswith("No rows of these sets yet")
    other = row("sparseattn_gluon", 600, 1.0, set="shared")
    assert "600" not in report.tables([old, other])
    assert "600" in report.details([old, other])


def test_first_calls_and_clocks_are_said() -> None:
    call = {"bench": "block_sparse", "set": "targets", "op": "forward", "impl": "sparseattn_gluon", "first_call_s": 3.2}
    busy = [row("sparseattn_gluon", 600, gpu={"sm_mhz": 1755.0}), row("fa4", 500, gpu={"sm_mhz": 1980.0})]
    for one in busy:
        one["env"]["rivals"] = {"flash-attn-4": "4.0", "flashinfer-python": None}
    text = report.block_sparse([*busy, call])
    assert "GPU, torch 2.11, Triton 3.6, flash-attn-4 4.0, commit abc;" in text
    assert "nothing compiled: forward 3.2 s (**sparseattn** (Gluon))" in text
    assert "SM clock right after a measurement 1755 to 1980 MHz." in text


def test_details() -> None:
    rows = [
        row("sparseattn_gluon", 600, set="shared", mask_heads=1), row("fa4", 500, set="shared", mask_heads=1),
        row("sparseattn_gluon", 640, set="shared", mask_heads=8),
        row("sparseattn_gluon", 610, set="short", nq=128, mask_heads=32),
        row("sparseattn_gluon", 510, set="dims", head_dim=192),
        row("sparseattn_gluon", 505, set="dims", head_dim=64, head_dim_v=64, op="backward"),
        row("sparseattn_gluon", 410, set="blocks", block=64, block_q=128),
        row("sparseattn_gluon", 310, set="flashinfer", n=12800, kv_heads=32, build_ms=0.012),
        row("flashinfer_variable", 210, set="flashinfer", n=12800, kv_heads=32, plan_ms=37.0),
    ]  # fmt: skip
    found = [line for line in lines(report.details(rows)) if "sparseattn" in "".join(line) or "FlashInfer" in line[2]]
    assert ["16K", "one for all", "**sparseattn** (Gluon)", "600 (0.167 ms, 1.20x)"] in found
    assert ["16K", "by KV head", "**sparseattn** (Gluon)", "640 (0.156 ms)"] in found
    assert ["128", "by head", "**sparseattn** (Gluon)", "610 (0.164 ms)"] in found
    assert ["forward", "192, values 128", "**sparseattn** (Gluon)", "510 (0.196 ms)"] in found
    assert ["backward", "64", "**sparseattn** (Gluon)", "505 (0.198 ms)"] in found
    assert ["forward", "128 x 64", "**sparseattn** (Gluon)", "410 (0.244 ms)"] in found
    assert ["12800", "by head", "**sparseattn** (Gluon)", "310 (0.323 ms + 0.012 ms)"] in found
    assert ["12800", "by head", "FlashInfer, variable blocks", "210 (0.476 ms + 37 ms)"] in found


def test_break_even_is_read_from_the_rows() -> None:
    def at(impl: str, density: float, ms: float, n: int = 16384) -> harness.Row:
        return {**row(impl, 1, density, set="breakeven", n=n), "ms": ms}

    rows = [at("cudnn_dense", 1.0, 4.0), at("sparseattn_gluon_dense", 1.0, 4.9), at("sparseattn_gluon", 1.0, 5.0)]
    rows += [at("sparseattn_gluon", 0.5, 3.0), at("sparseattn_triton", 0.5, 4.5), at("sparseattn_triton", 1.0, 6.0)]
    _, gluon, triton = lines(report.breakeven(rows))
    assert gluon == ["16K", "**sparseattn** (Gluon)", "4", "4.9", "5", "+2.0%", "0.75"]
    assert triton[-1] == "none: dense is faster at every measured density"


def test_serving_has_a_column_for_everybody() -> None:
    def served(impl: str, **more: Any) -> harness.Row:
        env = row("x", 1)["env"]
        return {"bench": "paged", "set": "decode", "kind": "decode", "impl": impl, "ms": 0.5, "env": env, **more}

    decode = {"batch": 64, "length": 8192, "page": 16, "tbps": 4.385, "tflops": 30.0}
    rows = [served("flashinfer_fa3", **decode), served("sparseattn_flashinfer", **{**decode, "tbps": 4.5})]
    header, line = lines(report.details(rows))
    assert header == ["batch", "pages", "**sparseattn.flashinfer**", "FlashInfer, fa3"]
    assert line == ["64 x 8K", "16", "4.50 (0.5 ms, 1.00x)", "4.38 (0.5 ms)"]
    blocks = {"set": "bsr", "R": 64, "C": 1, "density": 0.25, "tflops": 400.4, "plan_run_ms": 37.2}
    fa2 = served("flashinfer_fa2", **blocks)
    ours = served("sparseattn_flashinfer", **{**blocks, "ms": 0.4, "plan_run_ms": 0.93})
    slow = served("flashinfer_fa3", **{**blocks, "ms": 0.6, "plan_run_ms": 40.0})
    cells = lines(report.details([fa2, ours, slow]))[1][2:]
    assert cells == ["400 (0.4 ms, 1.25x; 0.93 ms, 40.00x)", "400 (0.6 ms; 40 ms)", "400 (0.5 ms; 37.2 ms)"]
    calls = {"set": "host", "run_host_us": 11.6, "plan_host_us": 80.2, "plan_waits": 3}
    text = report.details(
        [served("flashinfer_fa2", **calls), served("sparseattn_flashinfer", set="host", run_host_us=9)]
    )
    assert lines(text)[1] == ["decode", "9", "12 / 80, 3 waits"]


def test_every_serving_set_has_a_table() -> None:
    assert set(paged_report.TABLES) == set(paged_sets.SETS)
    servers = {
        impl for name in paged_sets.SETS for case in paged.cases(name, torch.device("cpu")) for impl in case.impls
    }
    assert servers <= set(paged_report.NAMES)


def test_documents_are_rewritten_between_marks(tmp_path: Path) -> None:
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.inject(document, "new")
    assert once == report.inject(once, "new") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        report.inject("no markers", "new")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plot.png"
    rows = [row("sparseattn_gluon", 600), row("sparseattn_gluon", 650, 1.0), row("fa4", 500), row("fa4", 9, set="dims")]
    report.plot(rows, picture)
    assert picture.stat().st_size > 1000
    assert report.digest(rows).encode() in picture.read_bytes()
    assert report.digest(rows) == report.digest(rows[::-1])
    assert report.digest(rows) != report.digest(rows[1:])


def test_lines_of_the_plot_look_alike_in_all_panels() -> None:
    """And one legend names them all, whichever panel they are in."""
    pytest.importorskip("matplotlib")
    forward = [row("sparseattn_gluon", 600), row("sparseattn_triton", 500)]
    backward = [row(name, 400, op="backward") for name in ("sparseattn_gluon_deterministic", "sparseattn_triton")]
    figure = report.drawing([*forward, *backward])
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    colors = {str(line.get_label()): line.get_color() for line in lines}
    assert len(lines) == 4
    assert len(set(colors.values())) == len(colors) == 3
    assert all(line.get_color() == colors[str(line.get_label())] for line in lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(dict.fromkeys(
        str(line.get_label()) for line in lines
    ))  # fmt: skip


def test_main_writes_all_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = tmp_path / "rows.jsonl"
    with harness.Writer(rows, "block_sparse") as writer:
        writer.measure(row("sparseattn_gluon", 600), dict)
        writer.measure(row("fa4", 432, set="dims"), dict)
        writer.measure(row("fa4", 1, set="dims", density=0.5) | {"ms": 1}, lambda: 1 / 0)  # type: ignore[arg-type]
    documents = [tmp_path / "README.md", tmp_path / "benchmarks.md"]
    for document in documents:
        document.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.main([str(rows), "--readme", str(documents[0]), "--docs", str(documents[1]), "--plot", f"{tmp_path}/a.png"])
    main, details = (document.read_text() for document in documents)
    assert "600" in main
    assert "432" in details
    assert "432" not in main
    assert (tmp_path / "a.png").exists()


def test_readme_and_docs_show_the_committed_rows() -> None:
    rows = report.read(harness.RESULTS.glob("*.jsonl"))
    main, details = report.tables(rows), report.details(rows)
    advice = "run: python -m benchmarks.report --readme README*.md --docs docs/benchmarks.md --plot docs/benchmarks.png"
    for name, text in (("README.md", main), ("README_ZH.md", main), ("docs/benchmarks.md", details)):
        document = (ROOT / name).read_text(encoding="utf-8")
        assert document == report.inject(document, text), advice
    picture = (ROOT / "docs" / "benchmarks.png").read_bytes()
    assert report.digest(rows).encode() in picture, "the plot is of other rows"


def test_the_chinese_page_says_what_every_table_is() -> None:
    """Tables are generated in English; what stands above them is not."""
    text, _, tables = (ROOT / "README_ZH.md").read_text(encoding="utf-8").partition(report.BEGIN)
    shown = tables.partition(report.END)[0].count("\n| ---")
    assert [f"第{number}张表" in text for number in "一二三四五六"] == [i < shown for i in range(6)]


def test_every_committed_row_has_a_name() -> None:
    for one in report.read(harness.RESULTS.glob("*.jsonl")):
        names = {"paged": paged_report.NAMES, "selectors": selector_report.NAMES}.get(one["bench"], report.NAMES)
        assert one["impl"] in names
