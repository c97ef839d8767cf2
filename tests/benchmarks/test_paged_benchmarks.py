"""Benchmarks of serving at toy sizes: every set is built, gated and timed, by whoever is there."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, paged, paged_problems, paged_sets, report
from benchmarks.paged_blocks import BSR, Variable
from benchmarks.paged_problems import Decode, Latent, Prefill, Workload
from benchmarks.paged_states import Append, Merge
from benchmarks.rivals import paged as servers
from benchmarks.rivals.paged import SERVERS, Call
from sparseattn.testing.baselines import Unsupported

CPU = torch.device("cpu")
ADAPTER, REFERENCE = "sparseattn_flashinfer", "sparseattn_reference"
# Each form of each kind once, and ugly lengths.
TOYS: dict[str, Workload] = {
    "decode": Decode(CPU, batch=5, length=37, page=16, heads=4, kv_heads=2, head_dim=64),
    "decode-token-pages": Decode(CPU, batch=2, length=9, page=1, heads=8, kv_heads=2, head_dim=64),
    "prefill": Prefill(CPU, batch=3, length=21, page=16, heads=4, kv_heads=2, head_dim=64),
    "prefill-chunk": Prefill(CPU, batch=2, length=40, chunk=7, page=8, heads=4, kv_heads=4, head_dim=64),
    "ragged": Prefill(CPU, batch=3, length=21, ragged=True, heads=4, kv_heads=2, head_dim=64),
    "ragged-device": Prefill(CPU, length=9, ragged=True, lengths_on="device", heads=4, kv_heads=2, head_dim=64),
    "mla": Latent(CPU, batch=2, length=19, heads=4, page=16),
    "bsr": BSR(CPU, n=128, R=16, C=32, density=0.4, heads=4, kv_heads=2, head_dim=64),
    "bsr-tokens": BSR(CPU, n=32, R=1, C=1, density=0.3, heads=4, kv_heads=2, head_dim=64),
    "variable": Variable(CPU, n=107, grid=(4, 5), density=0.4, heads=4, kv_heads=2, head_dim=64),
    "append": Append(CPU, batch=3, tokens=5, before=14, page=8, kv_heads=2, head_dim=16),
    "merge": Merge(CPU, rows=7, heads=4, head_dim=16),
    "merge-many": Merge(CPU, rows=7, states=5, heads=4, head_dim=16),
}


def toy(name: str) -> Workload:
    return TOYS[name].copy()


def swapped(monkeypatch: pytest.MonkeyPatch, name: str, prepare: Callable[[Any], Call], kind: str) -> None:
    monkeypatch.setitem(SERVERS, name, servers.Server(name, lambda: None, servers.anywhere, {kind: prepare}))


@pytest.mark.parametrize("name", TOYS)
def test_the_adapter_is_right_and_has_a_row(name: str) -> None:
    row = paged.measure(toy(name), ADAPTER, 0.01)
    assert row["gate"]
    assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
    assert row["run_host_us"] > 0
    assert ("plan_run_ms" in row) == (TOYS[name].kind not in ("append", "merge"))
    assert row["tbps"] >= 0


@pytest.mark.parametrize("name", ["decode", "prefill", "ragged", "mla", "bsr", "bsr-tokens", "variable"])
def test_operators_are_measured_as_they_are(name: str) -> None:
    assert paged.measure(toy(name), REFERENCE, 0.01)["gate"]
    with pytest.raises(Unsupported):  # bfloat16 under the interpreter, or no interpreter of Gluon
        SERVERS["sparseattn_gluon"].call(toy(name))


@pytest.mark.parametrize("impl", ["flashinfer_fa2", "flashinfer_fa3", "flashinfer_cuda_cores"])
def test_rivals_are_called_by_the_same_code(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our adapter stands in for the package, whose API it has."""
    with pytest.raises(Unsupported, match="not installed"):
        SERVERS[impl].call(toy("decode"))
    import sparseattn.flashinfer

    monkeypatch.setitem(sys.modules, "flashinfer", sparseattn.flashinfer)
    there = servers.Server(impl, lambda: None, servers.anywhere, SERVERS[impl].prepare)
    monkeypatch.setitem(SERVERS, impl, there)
    for name, workload in TOYS.items():
        if workload.kind in there.prepare:
            one = toy(name)
            assert one.gate(there.call(one).run())["gate"]


def test_rivals_say_what_they_need() -> None:
    with pytest.raises(Unsupported, match="CUDA"):
        servers.on_hopper(toy("decode"))
    with pytest.raises(Unsupported, match="on a CPU only"):
        servers.on_cpu(Decode(torch.device("cuda")))
    with pytest.raises(Unsupported, match="has no append"):
        SERVERS[REFERENCE].call(toy("append"))


# ---- gates ----


@pytest.mark.parametrize("name", TOYS)
def test_wrong_results_are_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = SERVERS[ADAPTER].call(toy(name))

    def wrong(workload: Workload) -> Call:
        def run() -> Any:
            found = SERVERS[ADAPTER].call(workload).run()
            if isinstance(workload, Append):
                workload.cache[-1, 0] += 1
                return found
            first = found[0] if isinstance(found, tuple) else found
            first[0] += 0.1
            return found

        return Call(run)

    assert call.run is not None
    swapped(monkeypatch, "wrong", wrong, TOYS[name].kind)
    with pytest.raises(AssertionError):
        paged.measure(toy(name), "wrong", 0.01)


def test_an_earlier_implementation_leaves_nothing_that_a_later_one_passes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = toy("append")
    paged.measure(workload, ADAPTER, 0.01)
    swapped(monkeypatch, "idle", lambda w: Call(lambda: None), "append")
    with pytest.raises(AssertionError, match="tokens are missing"):
        paged.measure(workload, "idle", 0.01)


def test_operations_and_bytes() -> None:
    prefill = Prefill(CPU, batch=2, length=10, chunk=4, heads=4, kv_heads=2, head_dim=8)
    assert prefill.pairs == 2 * (7 + 8 + 9 + 10)
    assert prefill.flops == 4 * prefill.pairs * 4 * 8
    decode = Decode(CPU, batch=64, length=8192)
    assert decode.moved == 64 * 8192 * 8 * 128 * 2 * 2 + 64 * 32 * 128 * 2 * 2
    assert Latent(CPU, batch=2, length=5, heads=3).flops == 2 * 2 * 5 * 3 * (576 + 512)
    bsr = toy("bsr")
    assert isinstance(bsr, BSR)
    assert bsr.flops == 4 * 64 * 4 * 16 * 32 * int(bsr.blocks.sum())
    variable = toy("variable")
    assert isinstance(variable, Variable)
    chosen = sum(
        int(variable.sizes[0][h, m]) * int(variable.sizes[1][h, n]) for h, m, n in variable.blocks[0].nonzero().tolist()
    )
    assert variable.flops == 4 * 64 * 2 * chosen
    assert [int(t.sum()) for t in variable.sizes] == [2 * 107] * 2


# ---- sets and the command ----


@pytest.mark.parametrize("name", paged_sets.SETS)
def test_sets_hold_workloads_that_exist(name: str) -> None:
    cases = list(paged.cases(name, CPU))
    assert len({case.workload for case in cases}) == len(cases) > 1
    for workload, impls in cases:
        assert set(impls) <= set(SERVERS)
        assert impls[0] == ADAPTER
        assert all(workload.kind in SERVERS[impl].prepare for impl in impls)
        assert not {"q", "cache", "blocks", "qkv", "kv", "v"} & set(vars(workload)), "drawn before it is its turn"


def test_targets_are_in_the_sets() -> None:
    def has(name: str, **shape: Any) -> bool:
        return any(shape.items() <= case.workload.row().items() for case in paged.cases(name, CPU))

    for batch, length in ((64, 8192), (16, 32768), (1, 131072), (128, 1024)):
        assert all(has("decode", batch=batch, length=length, page=page, heads=32, kv_heads=8) for page in (1, 16))
    for batch, length in ((128, 1024), (32, 4096), (8, 16384), (1, 32768)):
        assert all(has("prefill", batch=batch, length=length, ragged=ragged) for ragged in (False, True))
    assert all(has("bsr", R=n, C=n, density=d, n=16384) for n in (128, 64, 16, 1) for d in (0.05, 0.25, 0.5, 1.0))
    assert all(has("mla", batch=b, length=n, heads=128) for b in (64, 256, 768) for n in (1024, 4096, 8192))
    assert has("variable", n=16384, grid=(20, 50))
    assert has("append")
    assert has("merge")


def test_every_set_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    small = ["--set", "all", "--toy", "--quick", "--device", "cpu", "--budget", "0.001", "--out", str(out)]
    rows = paged.main([*small, "--impl", ADAPTER])
    assert [json.loads(line) for line in out.read_text().splitlines()] == json.loads(json.dumps(rows))
    assert not [row["error"] for row in rows if "error" in row]
    assert {row["kind"] for row in rows} == {one.kind for one in TOYS.values()}
    for row in rows:
        assert row["bench"] == "paged"
        assert row["env"]["torch"] == torch.__version__
        assert row["gate"]
    assert len(report.read([out])) == len(rows)


def test_default_files_are_those_that_the_report_reads() -> None:
    assert paged.parse(["--set", "decode"]).out == harness.RESULTS / "paged_decode.jsonl"


def test_toys_keep_their_form() -> None:
    workload = Decode(CPU, batch=64, length=8192, page=1).toy()
    assert isinstance(workload, paged_problems.Decode)
    assert (workload.batch, workload.length, workload.page) == (3, 70, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TOYS)
def test_neither_run_nor_plan_waits_for_the_device(name: str) -> None:
    on_device = {"lengths_on": "device"} if isinstance(TOYS[name], Prefill) else {}
    row = paged.measure(dataclasses.replace(TOYS[name], device=torch.device("cuda"), **on_device), ADAPTER, 1.0)
    assert row["run_waits"] == 0
    assert row.get("plan_waits", 0) == 0
