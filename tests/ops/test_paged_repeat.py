"""Repeated attention: numbers of every repetition, and launches that are those of an ordinary call."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from paged_cases import CASES, Case, build, by_the_book

from sparseattn.ops.paged import RepeatedAttention
from sparseattn.testing import assert_close_to_oracle

ROOT = Path(__file__).resolve().parents[2]
IDS = {case.id: case for case in CASES}


def repeated(problem, impl: str, fixed: bool = False) -> RepeatedAttention:
    cache = problem.cache
    options = {n: x for n, x in problem.kwargs.items() if n not in ("scale", "sinks", "k_scale", "v_scale")}
    table = (cache.seq_lens, cache.page_table, cache.indptr, cache.indices)
    return RepeatedAttention(*table, layout=cache.layout, impl=impl, fixed=fixed, **options)


def parts(problem) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """q, k and v of a call, and the rotary columns of q and of a latent cache."""
    cache, dim = problem.cache, problem.cache.k.shape[-1]
    rest = {} if cache.k_rope is None else {"q_rope": problem.q[..., dim:], "k_rope": cache.k_rope}
    return (problem.q[..., :dim], cache.k, cache.v), rest


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "name",
    [
        "mixed", "decode-window-sinks", "page5-hnd-combined", "dim80-value96", "e4m3-scales", "e5m2-decode", "alibi",
        "mla", "mla-joined-e4m3",
    ],
)  # fmt: skip
def test_other_tensors_of_the_same_form(name: str, impl: str, device: str):
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    case = IDS[name]
    attention = None
    for seed in (0, 1, 2):
        problem = build(case, torch.float16, device, seed=0)
        kept = problem.cache
        latent = [] if kept.k_rope is None else [kept.k_rope]
        values = [] if kept.v is kept.k else [kept.v, *problem.values]  # those of a latent cache are its keys
        for t in (problem.q, kept.k, *latent, *problem.keys, *values):
            if t.element_size() > 1:  # a factor that float16 multiplies by exactly: the page table stays
                t.mul_(2.0**-seed)
        if problem.sinks is not None:
            problem.sinks = problem.kwargs["sinks"] = problem.sinks - seed
        attention = attention or repeated(problem, impl)
        options = {n: problem.kwargs.get(n) for n in ("scale", "sinks", "k_scale", "v_scale")}
        tensors, rest = parts(problem)
        o, lse = attention(*tensors, **rest, **options)
        oracle, eager = by_the_book(problem, torch.float64), by_the_book(problem, torch.float16)
        assert_close_to_oracle(o, oracle[0], eager[0], "o")
        assert_close_to_oracle(lse, oracle[1], eager[1], "lse", eps=2**-10)
        out = torch.empty_like(o)
        assert attention(*tensors, **rest, out=out, **options)[0] is out
        assert torch.equal(out, o)


def test_every_form_is_checked():
    problem = build(Case("decode", ((1, 50), (1, 3))), torch.float16)
    attention = repeated(problem, "auto")
    q, k, v = problem.q, problem.cache.k, problem.cache.v
    attention(q, k, v)
    with pytest.raises(TypeError, match="cache: expected"):
        attention(q.float(), k, v)
    with pytest.raises(ValueError, match="q: expected head_dim 16"):
        attention(q[..., :8], k, v)
    with pytest.raises(ValueError, match="out: expected shape"):
        attention(q, k, v, out=q[:1])
    with pytest.raises(ValueError, match="gradient"):
        attention(q.clone().requires_grad_(), k, v)
    with pytest.raises(ValueError, match="sinks"):
        attention(q, k, v, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="gradient"):
        attention(q, k, v, sinks=torch.zeros(q.shape[1], requires_grad=True))
    out = torch.empty_like(q)
    attention(q, k, v, out=out)
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        attention(q, k, v, out=q)
    empty = attention(q, k[:0], v[:0])
    assert (empty[0] == 0).all()
    assert (empty[1] == -torch.inf).all()


@pytest.mark.parametrize("custom", ["", "little"])
def test_contents_of_tables_and_masks_may_change(custom: str, device: str):
    """Lengths change in place; a mask whose offsets are computed from them follows."""
    case = Case("decode", ((1, 50), (1, 40), (1, 9)), custom=custom, causal=False)
    problem = build(case, torch.float32, device)
    attention = repeated(problem, "reference")
    q, k, v = problem.q, problem.cache.k, problem.cache.v
    attention(q, k, v)
    problem.cache.seq_lens.copy_(torch.tensor([17, 40, 3]))
    got, new = attention(q, k, v), repeated(problem, "reference")(q, k, v)
    assert torch.equal(got[0], new[0])
    assert torch.equal(got[1], new[1])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_joined_latent_queries_and_strided_sinks(impl: str, device: str):
    if impl == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    problem = build(IDS["mla"], torch.float16, device)
    attention, cache, scale = repeated(problem, impl), problem.cache, problem.kwargs["scale"]
    tensors, rest = parts(problem)
    sinks = torch.randn(2, problem.q.shape[1], 2, device=device)[..., 0]
    for sink in sinks:
        expected = repeated(problem, impl)(*tensors, **rest, scale=scale, sinks=sink.contiguous())
        got = attention(problem.q, cache.k, cache.v, k_rope=cache.k_rope, scale=scale, sinks=sink)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_nothing_of_a_call_is_kept_alive():
    problem = build(Case("decode", ((1, 50), (1, 3))), torch.float16)
    attention = repeated(problem, "reference")
    k = problem.cache.k.clone()
    attention(problem.q, k, problem.cache.v)
    gone = weakref.ref(k)
    del k
    assert gone() is None


LAUNCHES = """
import torch, triton
from triton.backends.compiler import GPUTarget

calls = []


class Utils:  # a driver that compiles for a GPU and notes what would be launched
    def load_binary(self, name, kernel, shared, device):
        return object(), name, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def unload_module(self, module):
        pass


class Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        calls.append((function, (x, y, z), args))


class Driver:
    utils, launcher_cls = Utils(), Launcher
    get_current_device = get_current_stream = lambda self, *args: 0
    get_current_target = lambda self: GPUTarget("cuda", 80, 32)
    get_active_torch_device = lambda self: torch.device("cpu")
    is_active = lambda self: True


triton.runtime.driver.set_active(Driver())
import paged_cases
import sparseattn.ops.paged.repeat as repeat
import sparseattn.ops.paged.triton as kernels
from test_paged_repeat import parts
from sparseattn.ops.paged import RepeatedAttention

kernels.triton_device_reason = lambda t: None
kernels._LEAST_TILES, kernels._LONG = 1, 0  # shares, and two ways for mixed batches


def places(named, args):
    def place(x):
        if isinstance(x, torch.Tensor):
            x = x.data_ptr()
        if not isinstance(x, int) or x < 1 << 32:
            return x  # a size, or a stride
        near = [(x - t.data_ptr(), name) for name, t in named.items() if 0 <= x - t.data_ptr() < t.nbytes]
        return min(near, default="scratch")
    return [place(x) for x in args]


for name in CHOSEN:
    case = next(c for c in paged_cases.CASES if c.id == name)
    seen = {}
    one, two = (paged_cases.build(case, torch.float16, seed=s) for s in (0, 0))
    table = (one.cache.seq_lens, one.cache.page_table, one.cache.indptr, one.cache.indices)
    names = ("scale", "sinks", "k_scale", "v_scale")
    options = {n: x for n, x in one.kwargs.items() if n not in names}
    rest = {n: x for n, x in two.kwargs.items() if n in names}
    plain = not any(rest.get(n) is not None for n in ("sinks", "k_scale", "v_scale"))
    for way in ("ordinary", "again", "known", *(["usual", "usually", "usual with LSE"] if plain else [])):
        fixed = way.startswith("usual")
        attention = RepeatedAttention(*table, layout=one.cache.layout, impl="triton", fixed=fixed, **options)
        first = {n: x for n, x in one.kwargs.items() if n in names}
        tensors, latent = parts(one)
        if way == "ordinary":
            repeat._recorded.clear()
        elif way != "known":  # as a plan of the same shapes, whose first call it is
            attention(*tensors, **latent, **first)
        if way.startswith("usual"):
            every = [*tensors, *latent.values()]
            given = list({id(t): t for t in every}.values())  # keys that are the values are given once
            at = tuple(next(i for i, t in enumerate(given) if t is x) for x in every)
            both = way.endswith("LSE")
            usual = attention.usual(tuple(given), at, *every, scales=(first.get("scale"), None, None), lse=both)
            assert usual is not None
            if way != "usual":
                assert usual(*given) is not None
        calls.clear()
        tensors, latent = parts(two)
        if way.startswith("usual"):
            o = usual(*{id(t): t for t in (*tensors, *latent.values())}.values())
            [ready] = usual._ready.values()
            o, lse = o if both else (o, ready.held[0])
        else:
            o, lse = attention(*tensors, **latent, **rest)
        named = {"q": two.q, "k": two.cache.k, "v": two.cache.v, "o": o, "lse": lse, **latent}
        named |= {f"table {i}": t for i, t in enumerate(table) if t is not None}
        if two.cache.k_rope is not None:
            named["k_rope"] = two.cache.k_rope
        named |= {n: x for n, x in [*rest.items(), *options.items()] if isinstance(x, torch.Tensor)}
        seen[way] = [(function, grid, places(named, args)) for function, grid, args in calls]
        [known] = attention._known.values()
        assert known.launches is not None
        if way != "ordinary":
            assert all(not isinstance(x, torch.Tensor) for _, _, args in calls for x in args), "was not repeated"
        assert seen["ordinary"] == seen[way], (name, way, seen)
    print(name, len(seen["again"]), *(["usual"] if plain else []))
"""


@pytest.mark.slow
def test_launches_are_those_of_an_ordinary_call():
    """Compiled for a GPU, launched nowhere: kernels, grids and every argument, addresses as places in their tensors."""
    pytest.importorskip("triton", reason="needs Triton")
    chosen = ("mixed", "decode-window-sinks", "page5-hnd-combined", "dim80-value96", "mla", "mla-joined-e4m3")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests" / "ops"), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES.replace("CHOSEN", repr(chosen))],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    launched = {name: ways for name, *ways in (line.split() for line in done.stdout.splitlines())}
    assert set(launched) == set(chosen)
    assert int(launched["mixed"][0]) >= 3, "two ways, one of them with shares and their merge"
    assert "usual" in launched["mixed"]
    assert "usual" in launched["mla"]
