"""Benchmarks of selectors: everything is gated and measured at toy sizes, and tables say what the rows say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import harness, report, selector_gates, selector_report, selector_sets
from benchmarks import selectors as bench
from benchmarks.rivals import selection as rivals
from benchmarks.selector_problems import Case, Problem, Setting, measure
from sparseattn import BlockMask, selectors
from sparseattn.ops.scores import unsupported_reason
from sparseattn.testing import sampled
from sparseattn.testing.baselines import Unsupported

CPU = torch.device("cpu")
TOY = ["--device", "cpu", "--dtype", "fp32", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--budget", ".001"]
# Settings that choose some blocks and leave others at a few hundred tokens.
SMALL = {
    "landmark": {"block_size": 64, "floor": 1},
    "flashprefill": {"block_size": 64, "num_sink_tokens": 1, "num_local_tokens": 0, "num_last_tokens": 0},
    "flexprefill": {"block_size": 64, "min_budget": 64},
    "minference": {
        "block_size": 64,
        "vertical_size": 8,
        "slash_size": 3,
        "num_sink_tokens": 1,
        "num_local_tokens": 1,
    },
    "xattention": {"block_size": 64},
    "bound": {"block_size": 64},
    "streaming": {"block_size": 64, "num_sink_tokens": 1, "num_local_tokens": 64},
}


def problem(n: int = 512, dtype: str = "fp32") -> Problem:
    return Problem(n, 2, 1, 16, dtype, CPU)


def small(method: str) -> Setting:
    return Setting(method, "small", SMALL[method])


# ---- running ----


def test_rows_of_every_method(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    rows = bench.main([*TOY, "--set", "table", "--n", "256", "--out", str(out)])
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    timed = [row for row in rows if "ms" in row and "method" in row]
    wanted = {(s.method, s.label, phase) for s in selector_sets.table(256) for phase in selector_sets.PHASES}
    assert {(row["method"], row["setting"], row["phase"]) for row in timed} == wanted
    assert all(row["gate"] and 0 < row["recall"] <= 1 and 0 < row["selected"] <= 1 for row in timed)
    for row in timed:
        gate = set(row["gate"])
        assert ("o" in gate) == (row["phase"] != "selection")
        assert bool(gate & {"mass", "differing"}) == (row["phase"] != "attention")
        assert ("list_bytes" in row) == (row["phase"] == "selection")
    # Those who are not installed, or need a GPU, leave a row that says so.
    skipped = {row["impl"]: row["skipped"] for row in rows if "skipped" in row}
    assert set(skipped) == {"cudnn_dense", *rivals.RIVALS}
    assert [row["impl"] for row in rows if "method" not in row and "ms" in row] == ["sparseattn_reference_dense"]


def test_short_rows_have_both_clocks_and_memory_rows_no_attention(tmp_path: Path) -> None:
    some = [*TOY, "--method", "streaming", "--out", str(tmp_path / "rows.jsonl")]
    rows = [row for row in bench.main([*some, "--set", "short", "--n", "128"]) if "ms" in row]
    assert [(row["phase"], row["auto"]) for row in rows] == [("attention", True), ("both", True)]
    assert all(row["wall_ms"] > 0 for row in rows)
    (row,) = bench.main([*some, "--set", "memory", "--n", "128"])
    assert row["list_bytes"] > 0
    assert row["peak_bytes"] is None
    assert "recall" not in row


def test_methods_that_a_set_lacks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--set", "short", "--method", "landmark", "oracle"])
    assert "expected some of bound, " in capsys.readouterr().err


@pytest.mark.parametrize("name", list(selector_sets.SETS))
def test_sets_hold_settings_that_exist(name: str) -> None:
    plan = selector_sets.SETS[name]
    settings = plan.settings(plan.lengths[0])
    assert len({(s.method, s.label) for s in settings}) == len(settings)
    for setting in settings:
        selectors.configure(setting.method, setting.options)
    assert bench.parse(["--set", name]).out == harness.RESULTS / f"selectors_{name}.jsonl"


def test_equal_densities_are_equal() -> None:
    case = problem(1024)
    settings = {s.method: s for s in selector_sets.prefill(case.n) if s.label == "density 0.2"}
    del settings["streaming"], settings["flashprefill"]  # which forces most of so few blocks
    for setting in settings.values():
        own = {"block_size": 64, **({"floor": 1} if setting.method == "landmark" else {}), **setting.options}
        assert Case(case, Setting(setting.method, "", own)).mask.density == pytest.approx(0.2, abs=0.09), setting
    long = torch.empty(1, 131072, 1, 1)
    for setting in selector_sets.prefill(131072):
        if setting.method == "streaming" and setting.label != "default":
            mask = selectors.streaming(long, long, selectors.configure("streaming", setting.options))
            assert mask.density == pytest.approx(float(setting.label.split()[1]), abs=0.004)


# ---- gates ----


@pytest.mark.parametrize("method", SMALL)
def test_right_selections_pass(method: str) -> None:
    case = Case(problem(), small(method))
    assert 0.1 < case.mask.density < 0.9
    assert case.selection_gate["n"] == 512


@pytest.mark.parametrize("method", ["landmark", "minference", "xattention"])
def test_a_wrong_selection_is_not_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = selectors.get(method)

    def wrong(q: Any, k: Any, config: Any = None, *, impl: str = "auto", **options: Any) -> BlockMask:
        if impl != "reference":  # keys in another order: lists of the same lengths, about
            k = k.roll(100, 1)
        return right.select(q, k, config, impl=impl, **options)

    monkeypatch.setitem(selectors.SELECTORS, method, right._replace(select=wrong))
    monkeypatch.setattr(selector_gates, "xattention", wrong)
    with pytest.raises(ArithmeticError, match="gate failed"):
        measure(Case(problem(), small(method)), "selection", "", 1.0)


def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(problem(), small("streaming"))
    monkeypatch.setattr("benchmarks.selector_problems.attend_blocks", lambda q, k, v, mask, impl: v.expand_as(q))
    with pytest.raises(AssertionError, match="o: largest error"):
        measure(case, "both", "reference", 1.0)


def test_budgets_shrink_with_the_prefix() -> None:
    config = selectors.configure("minference", {"vertical_size": 1000, "slash_size": 6096})
    shrunk = selector_gates.shrunk(config, 1 / 32)
    assert (shrunk.vertical_size, shrunk.slash_size, shrunk.num_queries) == (31, 190, 64)
    assert selector_gates.shrunk(selectors.configure("flexprefill"), 0.25).min_budget == 256
    assert selector_gates.shrunk(selectors.configure("landmark"), 0.25) == selectors.configure("landmark")


@pytest.mark.parametrize("method", ["minference", "landmark"])
def test_kernels_pass(method: str) -> None:
    case = Case(problem(320, "fp16"), small(method), "triton")
    if unsupported_reason(*case.problem.qkv[:2], impl="triton") is not None:
        pytest.skip("no interpreter here")
    assert case.selected_by == "sparseattn_triton"
    assert case.selection_gate["listed"] < 0.9


# ---- rivals ----


def test_authors_code_needs_its_package_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rival = rivals.RIVALS["flex_prefill"]
    with pytest.raises(Unsupported, match="flex_prefill is not installed"):
        rivals.measure_rival(problem(), rival, 1.0)
    monkeypatch.setattr(rivals, "find_spec", lambda name: True)
    with pytest.raises(Unsupported, match="flex_prefill needs a CUDA GPU"):
        rivals.measure_rival(problem(), rival, 1.0)
    for name, one in rivals.RIVALS.items():
        assert one.name == name
        assert name in selector_report.RIVALS
        assert (one.listed is None) == (one.phase == "both")


def dense(q: Any, k: Any, v: Any) -> Any:
    """Output ``[1, S, H, D]`` of dense causal attention."""
    return sampled.attend(q, k, v, sampled.Selected(None), torch.arange(q.shape[1]), torch.float32)[0][None]


class FakeFlashPrefill:
    """Lists every tile, and attends accordingly."""

    def __init__(self, *, k_block_m: int, causal: bool, **options: Any) -> None:
        assert (k_block_m, causal, options["k_block_n"]) == (128, True, 128)

    def index_select(self, q: Any, k: Any, pages: Any, lengths: Any, offsets: Any, *, q_lens: Any, **_: Any) -> Any:
        (n,), (heads, kv_heads) = q_lens, (q.shape[1], k.shape[2])
        assert k.shape[:2] == (n, 1)
        assert pages.tolist() == [list(range(n))]
        assert (lengths.tolist(), offsets.tolist()) == ([n], [0, n])
        tiles = n * heads // kv_heads // 128
        cu = torch.arange(kv_heads * tiles + 1, dtype=torch.int32) * (n // 64)
        idx = torch.arange(n // 64, dtype=torch.int32).repeat(kv_heads * tiles)
        return SimpleNamespace(block_sparse_cu=cu, block_sparse_idx=idx, total_q_tiles=tiles)

    def block_sparse_attention(self, q: Any, k: Any, v: Any, pages: Any, *_: Any, max_seqlen_q: int) -> Any:
        assert pages is None
        assert max_seqlen_q == q.shape[0]
        return dense(q[None], k, v)[0]


def fake_packages() -> dict[str, ModuleType]:
    """Every author's package, attending everything."""

    def heads_first(q: Any, k: Any, v: Any, *_: Any, **options: Any) -> Any:
        assert q.shape == k.shape
        if options:  # XAttention's says its density
            print("density: 1")
        return dense(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def estimate(q: Any, k: Any, *, stride: int, chunk_size: int, **_: Any) -> Any:
        padded = -(-q.shape[2] // chunk_size) * chunk_size // 128
        return None, torch.ones(1, q.shape[1], padded, padded, dtype=torch.bool).tril()

    def in_place(q: Any, k: Any, v: Any, o: Any, *, alpha: float, **_: Any) -> None:
        o.copy_(dense(q, k, v))

    contents = {
        "ops.flashprefill_native_forward": {"flash_prefill": in_place},
        "flex_prefill": {"flex_prefill_attention": lambda q, k, v, gamma, tau, min_budget: dense(q, k, v)},
        "minference.modules.minference_forward": {"minference_prefill_forward": heads_first},
        "xattn.src.Xattention": {"Xattention_prefill": heads_first, "xattn_estimate": estimate},
        "flashprefill": {"FlashPrefill": FakeFlashPrefill},
    }
    found = {}
    for name, functions in contents.items():
        for end in range(1, len(name.split(".")) + 1):
            part = ".".join(name.split(".")[:end])
            found[part] = ModuleType(part)
        vars(found[name]).update(functions)
    return found


def test_authors_code_is_called_as_it_wants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, module in fake_packages().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(rivals.Rival, "missing", lambda self, device: None)
    for rival in rivals.RIVALS.values():
        found = rivals.measure_rival(problem(256), rival, 1.0)
        assert found["ms"] > 0, rival.name
        assert found["gate"]
        if rival.phase == "both":
            assert found["output_error"] < 1e-4
        else:
            assert (found["selected"], found["recall_min"]) == (1.0, pytest.approx(1.0, abs=1e-4))
    assert capsys.readouterr().out == ""


def test_lists_of_packed_rows() -> None:
    # 2 query heads on 1 KV head: a tile of 128 packed rows is 64 tokens. 192 tokens are 3 tiles of 3 times 64 keys.
    index = SimpleNamespace(
        total_q_tiles=3,
        block_sparse_cu=torch.tensor([0, 1, 3, 5, 99], dtype=torch.int32),
        block_sparse_idx=torch.tensor([0, 0, 1, 1, 2, 7], dtype=torch.int32),
    )
    selected = rivals._flashprefill_blocks(problem(192), index)
    assert selected.block_size == (64, 64)
    assert selected.blocks is not None
    assert selected.blocks[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    said = rivals._gate_selection(problem(192), selected, True)
    assert said["selected"] == round(5 / 6, 4)
    assert 0 < said["recall_min"] <= said["recall"] < 1
    selected.blocks[0, 0, 1, 1] = False
    with pytest.raises(ArithmeticError, match="64 rows of tokens"):
        rivals._gate_selection(problem(192), selected, True)


def test_outputs_of_others_are_dense_where_they_must_be() -> None:
    case = Case(problem(), small("streaming"))
    q, k, v = case.problem.qkv
    o = sampled.attend(q, k, v, sampled.Selected.of(case.mask), torch.arange(512), torch.float32)[0][None]
    found = rivals._gate_output(case.problem, o)
    assert 0 < found["output_error"] < 1
    o[0, 3] += 0.1
    with pytest.raises(AssertionError, match="o: largest error"):
        rivals._gate_output(case.problem, o)


# ---- tables ----


def row(impl: str, ms: float, method: str = "", phase: str = "both", n: int = 8192, **more: Any) -> harness.Row:
    env = {"device": "GPU", "torch": "2", "triton": "3", "commit": "c", "time": more.pop("run", "noon")}
    own = {"method": method, "setting": "default", "selected": 0.1, "recall": 0.9, "recall_min": 0.5} if method else {}
    common = {"bench": "selectors", "set": "table", "n": n, "impl": impl, "phase": phase, "ms": ms, "env": env}
    return {**common, **own, "auto": impl.startswith("sparseattn_triton"), "wall_ms": ms, **more}


def cells(text: str) -> list[list[str]]:
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [found[0], *found[2:]]


def test_tables_of_selectors() -> None:
    rows = [
        row("cudnn_dense", 10.0, phase="attention"),
        row("cudnn_dense", 20.0, phase="attention", run="later"),
        row("sparseattn_triton", 1.0, "landmark", "selection", peak_bytes=3 << 20),
        *(row(f"sparseattn_{i}", ms, "landmark", "attention") for i, ms in (("triton", 2.0), ("gluon", 1.5))),
        *(row(f"sparseattn_{i}", ms, "landmark") for i, ms in (("triton", 3.0), ("gluon", 2.5))),
        row("flex_prefill", 40.0, "flexprefill", selected=None),
    ]
    for one in rows[-1:]:
        for name in ("selected", "recall", "recall_min"):
            del one[name]
    header, triton, gluon, other = cells(report.selectors(rows, "table"))
    assert header == [name for name in selector_report.HEADER if name]  # no column for settings: nobody has one
    quality = ["8K", "landmark"], ["10.0%", "0.900 (0.50)"]
    assert triton == [*quality[0], "Triton", *quality[1], "1", "2", "3", "3.3x", "3 MiB"]
    assert gluon == [*quality[0], "Gluon", *quality[1], "1", "1.5", "2.5", "4.0x", "3 MiB"]
    assert other == ["8K", "flexprefill", "FlexPrefill's code", "", "", "", "", "40", "0.2x", ""]
    assert [line[2] for line in cells(report.selectors(rows, "table", best=True))[1:]] == ["Gluon", other[2]]
    assert report.selectors(rows, "table", shortest=10000) == ""
    assert "Dense: 8K in 10 ms (cuDNN), 20 ms (cuDNN)." in report.selectors(rows, "table")
    assert report.selectors(rows, "short") == ""


def test_short_prompts_are_compared_with_dense() -> None:
    rows = [row("cudnn_dense", 1.0, phase="attention"), row("sparseattn_gluon", 1.2, "landmark")]
    text = report.selectors([{**one, "set": "short"} for one in rows], "short")
    assert cells(text) == [["method", "kernels", "8K"], ["landmark", "Gluon", "1.20 (1.2 ms)"]]


def test_break_even_is_where_nothing_longer_is_slower() -> None:
    def short(impl: str, ms: float, n: int, method: str = "", **more: Any) -> harness.Row:
        phase = "both" if method else "attention"
        return row(impl, ms, method, phase, n, set="short", **more)

    rows = [short("sparseattn_triton_dense", n / 1024, n) for n in (1024, 2048, 4096)]
    rows += [short("cudnn_dense", 0.1, n) for n in (1024, 2048, 4096)]  # not what a model would run instead
    rows += [short("sparseattn_gluon", 0.1, 1024, "landmark")]  # not what "auto" takes
    times = {"landmark": (0.5, 2.1, 3.0), "bound": (2.0, 3.0, 4.1), "streaming": (0.5, 0.6, 0.7)}
    for method, taken in times.items():
        lengths = zip((1024, 2048, 4096), taken, strict=True)
        rows += [short("sparseattn_triton", ms, n, method) for n, ms in lengths]
    rows += [short("sparseattn_triton", 0.1, 1024, "flexprefill", wall_ms=1.5)]  # the clock counts, too
    rows += [short("sparseattn_triton", 0.1, 1024, "topk", run="later")]  # no dense row in its run
    expected = {"bound": 4097, "flexprefill": 1025, "landmark": 4096, "streaming": 1024}
    assert selector_report.break_even(rows) == {"GPU": expected}
