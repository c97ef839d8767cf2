"""Attention over masks of variable blocks, against the oracle and what must hold whatever the numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.ops.block_sparse.checks import make_geometry
from sparseattn.ops.block_sparse.library import with_transposed
from sparseattn.ops.sequences import resolve_sequences
from sparseattn.testing import assert_close_to_oracle, dense_attention, make_qkv

# torch's own, while it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
implementations = pytest.mark.parametrize("impl", ["reference", "triton"])
OPS = torch.ops.sparseattn
F16 = torch.float16


@dataclass(frozen=True)
class Case:
    """One call; ``rows`` and ``cols`` are the sizes of blocks, of all heads of the mask or of each."""

    id: str
    rows: tuple[tuple[int, ...], ...]
    cols: tuple[tuple[int, ...], ...]
    mask_heads: int = 1
    heads: tuple[int, int] = (2, 2)
    batch: int = 1
    mask_batch: int = 1
    density: float = 0.5
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    sinks: bool = False
    dim: tuple[int, int] = (16, 16)
    dtype: torch.dtype = F16
    seq: tuple[int, int] | None = None  # where sizes do not add up to it
    interpret: bool = True

    def __str__(self) -> str:
        return self.id


CASES = [
    Case("sizes-0-and-1", ((10, 0, 1, 29),), ((20, 1, 0, 30, 1, 19),), heads=(4, 2), mask_heads=2),
    Case(
        "each-query-head-its-own", ((10, 0, 1, 29), (1, 8, 30, 1), (0, 0, 40, 0), (10, 10, 10, 10)),
        ((20, 1, 0, 30, 20), (1, 1, 1, 1, 67), (70, 1, 0, 0, 0), (14, 14, 14, 14, 15)), mask_heads=4, heads=(4, 2),
        causal=True, sinks=True,
    ),
    Case("tiles-of-128", ((100, 60),), ((200, 90, 16),), heads=(2, 1), density=0.7, window=(200, None)),
    Case(
        "window-softcap-by-batch", ((13, 20, 7),), ((9, 17, 30),), batch=2, mask_batch=2, window=(20, 9), softcap=3.0,
        dim=(16, 32), density=0.8, interpret=False,
    ),
    Case("causal", ((13, 20, 17),), ((9, 11, 30),), causal=True, interpret=False),
    Case("bf16", ((30, 3, 17),), ((9, 41),), heads=(4, 1), causal=True, dtype=torch.bfloat16, interpret=False),
    Case("all-selected", ((13, 20, 7),), ((9, 17, 30),), density=1.0, heads=(4, 2), interpret=False),
    Case("none-selected", ((13, 20, 7),), ((9, 17, 30),), density=0.0, heads=(4, 2)),
    Case("sizes-that-do-not-add-up", ((13, 10),), ((9, 60),), seq=(40, 50), density=1.0),
    Case("one-row", ((1,),), ((5, 12, 3, 40),), heads=(8, 2), mask_heads=2, causal=True, interpret=False),
]  # fmt: skip


def sizes(partitions: tuple[tuple[int, ...], ...], heads: int, device: str) -> Tensor:
    return torch.tensor(partitions, dtype=torch.int32, device=device).expand(heads, -1)


def shown(blocks: Tensor, rows: Tensor, cols: Tensor, seq: tuple[int, int]) -> Tensor:
    """bool ``[B, H, Sq, Sk]`` of the blocks alone; tokens past the last block see nothing."""
    out = torch.zeros(*blocks.shape[:2], *seq, dtype=torch.bool, device=blocks.device)
    for h in range(blocks.shape[1]):
        part = blocks[:, h].repeat_interleave(rows[h].long(), 1).repeat_interleave(cols[h].long(), 2)
        part = part[:, : seq[0], : seq[1]]
        out[:, h, : part.shape[1], : part.shape[2]] = part
    return out


def framed(case: Case, seq: tuple[int, int], device: str) -> Tensor:
    """bool ``[Sq, Sk]``: what causality and the window leave."""
    i = torch.arange(seq[0], device=device)[:, None] + seq[1] - seq[0]
    j = torch.arange(seq[1], device=device)
    seen = j <= i if case.causal else torch.ones(seq, dtype=torch.bool, device=device)
    left, right = case.window or (None, None)
    seen = seen & (j >= i - (max(seq) if left is None else left))
    return seen & (j <= i + (2 * max(seq) if right is None else right))


def build(case: Case, device: str) -> tuple[VariableBlockMask, Tensor, list[Tensor], Tensor | None]:
    """The mask, what it shows, q, k, v, and sinks."""
    rows, cols = (sizes(t, case.mask_heads, device) for t in (case.rows, case.cols))
    seq = case.seq or (sum(case.rows[0]), sum(case.cols[0]))
    generator = torch.Generator().manual_seed(3)
    shape = (case.mask_batch, case.mask_heads, rows.shape[1], cols.shape[1])
    blocks = (torch.rand(shape, generator=generator) < case.density).to(device)
    mask = BlockMask.from_variable_blocks(
        blocks, rows, cols, seq_lens=seq, causal=case.causal, window=case.window
    )  # fmt: skip
    q, k, v = make_qkv(case.batch, *seq, *case.heads, *case.dim, dtype=case.dtype, device=device)
    sinks = torch.linspace(-1, 1, case.heads[0], dtype=case.dtype, device=device) if case.sinks else None
    return mask, shown(blocks, rows, cols, seq) & framed(case, seq, device), [q, k, v], sinks


def gradients(run, inputs: list[Tensor], sinks: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of ``run(q, k, v, sinks) -> (o, lse)`` in ``dtype``, and all gradients, through o and LSE."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*inputs, *([] if sinks is None else [sinks]))]
    o, lse = run(*leaves[:3], leaves[3] if sinks is not None else None)
    generator = torch.Generator().manual_seed(7)
    do, dlse = (torch.randn(t.shape, generator=generator).to(inputs[0].dtype).to(t) for t in (o, lse))
    loss = (o * do).sum() + (torch.where(lse.isfinite(), lse, 0.0) * dlse).sum()
    names = ("dq", "dk", "dv", "dsinks")[: len(leaves)]
    found = torch.autograd.grad(loss, leaves)
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip(names, found, strict=True))}


@implementations
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle_forward_and_backward(case: Case, impl: str, device: str) -> None:
    if impl == "triton" and device == "cpu" and not case.interpret:
        pytest.skip("not worth its time under the interpreter")
    mask, allowed, inputs, sinks = build(case, device)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(q, k, v, mask, softcap=case.softcap, sinks=sinks, return_lse=True, impl=impl)

    def dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return dense_attention(q, k, v, allowed, softcap=case.softcap, sinks=sinks)

    got = gradients(run, inputs, sinks, case.dtype)
    oracle = gradients(dense, inputs, sinks, torch.float64)
    eager = gradients(dense, inputs, sinks, case.dtype)
    for name, t in got.items():
        assert_close_to_oracle(t, oracle[name], eager[name], f"{case}: {name}")
    empty = ~allowed.any(-1)
    if empty.shape[1] != case.heads[0]:
        empty = empty.repeat_interleave(case.heads[0] // empty.shape[1], 1)
    empty = empty.expand(case.batch, -1, -1)
    assert torch.all(got["lse"][empty] == -torch.inf)
    assert not got["o"].transpose(1, 2)[empty].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_exact_in_float64(case: Case) -> None:
    mask, allowed, inputs, sinks = build(case, "cpu")

    def run(q, k, v, sinks):
        return block_sparse_attention(q, k, v, mask, softcap=case.softcap, sinks=sinks, return_lse=True)

    def dense(q, k, v, sinks):
        return dense_attention(q, k, v, allowed, softcap=case.softcap, sinks=sinks)

    assert_close(*(gradients(f, inputs, sinks, torch.float64) for f in (run, dense)))


# ------------------------------------------------------------------------------------------------------ invariants


@implementations
def test_what_is_not_selected_is_not_read(impl: str, device: str) -> None:
    rows, cols = sizes(((20, 17),), 2, device), sizes(((5, 3, 30, 1, 20),), 2, device)
    blocks = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 1, 0]], dtype=torch.bool, device=device).expand(2, 2, 5)
    mask = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=(37, 59))
    q, k, v = make_qkv(1, 37, 59, 2, 2, 16, dtype=F16, device=device)
    unread = ~mask.to_dense().any(2)[0, 0]
    assert unread.sum() == 23
    expected = block_sparse_attention(q, k, v, mask, impl=impl)
    got = block_sparse_attention(
        q, *(t.masked_fill(unread[:, None, None], math.nan) for t in (k, v)), mask, impl=impl
    )  # fmt: skip
    assert torch.equal(got, expected)


@implementations
@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_selected_is_dense(impl: str, causal: bool, device: str) -> None:
    rows, cols = sizes(((20, 17),), 1, device), sizes(((5, 3, 30, 1, 20),), 1, device)
    everything = torch.ones(1, 2, 5, dtype=torch.bool, device=device)
    mask = BlockMask.from_variable_blocks(everything, rows, cols, seq_lens=(37, 59), causal=causal)
    q, k, v = make_qkv(1, 37, 59, 2, 1, 16, device=device)
    got = block_sparse_attention(q, k, v, mask, return_lse=True, impl=impl)
    assert_close(got, block_sparse_attention(q, k, v, causal=causal, return_lse=True, impl=impl))


def test_equal_blocks_are_those_of_a_block_mask(device: str) -> None:
    blocks = torch.rand(1, 4, 5, 4, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    rows, cols = (torch.full((4, n), s, dtype=torch.int32, device=device) for n, s in ((5, 16), (4, 32)))
    q, k, v = make_qkv(2, 80, 128, 4, 2, 16, device=device)
    mask = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=(80, 128), causal=True)
    plain = BlockMask.from_blocks(blocks, seq_lens=(80, 128), block_size=(16, 32), causal=True)
    assert torch.equal(mask.to_dense(), plain.to_dense())
    assert_close(block_sparse_attention(q, k, v, mask), block_sparse_attention(q, k, v, plain))


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (9, 3)}, {"causal": True, "window": (20, None)}])
def test_a_call_may_hide_more_than_the_mask(options: dict, device: str) -> None:
    rows, cols = sizes(((20, 17),), 1, device), sizes(((5, 3, 30, 1, 20),), 1, device)
    blocks = torch.rand(1, 2, 5, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
    q, k, v = make_qkv(1, 37, 59, 2, 1, 16, device=device)
    plain = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=(37, 59))
    same = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=(37, 59), **options)
    assert_close(block_sparse_attention(q, k, v, plain, **options), block_sparse_attention(q, k, v, same))


@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 10), (10, 0)])
def test_no_query_or_no_key(seq_q: int, seq_k: int, device: str) -> None:
    blocks = torch.ones(1, 2, 2, dtype=torch.bool, device=device)
    rows, cols = (torch.tensor([[n, 0]], dtype=torch.int32, device=device) for n in (seq_q, seq_k))
    mask = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=(seq_q, seq_k))
    q, k, v = (t.requires_grad_() for t in make_qkv(1, seq_q, seq_k, 2, 1, 16, device=device))
    o, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert o.shape == (1, seq_q, 2, 16)
    assert not o.any()
    assert torch.all(lse == -torch.inf)
    o.sum().backward()
    assert not k.grad.any()


# ------------------------------------------------------------------------------------------------------ refusals


def small(device: str = "cpu", **changes) -> tuple[list[Tensor], VariableBlockMask]:
    blocks = torch.ones(1, 2, 2, dtype=torch.bool, device=device)
    half = torch.tensor([[10, 22]], dtype=torch.int32, device=device)
    mask = BlockMask.from_variable_blocks(blocks, half, half, seq_lens=32, **changes)
    return list(make_qkv(2, 32, 32, 4, 2, 16, dtype=F16, device=device)), mask


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges_k": torch.tensor([[0, 32], [4, 32]], dtype=torch.int32)}, "mask: expected a BlockMask with cu_seq"),
        ({"mean_correction": True}, "mean_correction: expected False with a VariableBlockMask"),
        ({"causal": False}, "causal: expected None or True with a causal mask"),
    ],
)
def test_refuses_what_does_not_go_with_variable_blocks(options: dict, message: str) -> None:
    inputs, mask = small(causal=True)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*inputs, mask, **options)


def test_refuses_other_lengths_and_heads() -> None:
    (q, k, v), mask = small()
    with pytest.raises(ValueError, match=r"mask: expected lengths .* \(31, 32\), got \(32, 32\)"):
        block_sparse_attention(q[:, :31], k, v, mask)
    blocks = torch.ones(3, 1, 1, dtype=torch.bool)
    one = torch.full((3, 1), 32, dtype=torch.int32)
    with pytest.raises(ValueError, match="mask: expected 1, Hkv = 2 or Hq = 4 heads, got 3"):
        block_sparse_attention(q, k, v, BlockMask.from_variable_blocks(blocks, one, one, seq_lens=32))


# ------------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_opcheck(impl: str, device: str) -> None:
    if impl == "triton" and device == "cpu":
        pytest.skip("the schema is the same, and the interpreter slow")
    inputs, mask = small(device, causal=True)
    g = make_geometry(*inputs, mask, None, None, None, None, None, impl, resolve_sequences(*inputs[:2]))
    torch.library.opcheck(OPS.block_sparse_fwd.default, (*inputs, None, impl, *g))
    o, lse = OPS.block_sparse_fwd(*inputs, None, impl, *g)
    g = with_transposed(g, mask)
    arguments = (torch.randn_like(o), torch.randn_like(lse), *inputs, o, lse, None, impl, False, *g)
    torch.library.opcheck(OPS.block_sparse_bwd.default, arguments)


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", True), *(pytest.param("inductor", d, marks=pytest.mark.gpu) for d in (None, True))],
)
def test_compiles_whole_and_matches_eager(backend: str, dynamic: bool | None, device: str) -> None:
    torch._dynamo.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        mask = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=(q.shape[1], k.shape[1]), causal=True)
        o, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
        return o.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (70, 96):  # of the same tile sizes, so that one graph serves both
        leaves = make_qkv(1, length, length, 4, 2, 16, device=device).requires_grad_()
        blocks = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(length)).to(device) < 0.6
        rows = torch.tensor([[10, 20, length - 30]], dtype=torch.int32, device=device).expand(2, -1)
        cols = torch.tensor([[1, 9, 30, length - 40]], dtype=torch.int32, device=device).expand(2, -1)
        got, expected = (f(*leaves, blocks, rows, cols) for f in (compiled, loss))
        assert_close(got, expected)
        assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))
    torch._dynamo.reset()


def test_a_mask_crosses_a_compiled_boundary(device: str) -> None:
    inputs, mask = small(device)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs, mask), block_sparse_attention(*inputs, mask))


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_contents() -> None:
    """A captured call cuts its blocks anew: other patterns and other sizes of as many blocks may be copied in."""
    q, k, v = make_qkv(1, 700, 900, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    blocks = torch.ones(2, 5, 7, dtype=torch.bool, device="cuda")
    rows, cols = (partition(2, n, m, "cuda", seed=0) for n, m in ((700, 5), (900, 7)))
    mask = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=(700, 900))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        block_sparse_attention(q, k, v, mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        o = block_sparse_attention(q, k, v, mask)
    blocks.copy_(torch.rand(2, 5, 7) < 0.5)
    rows.copy_(partition(2, 700, 5, "cuda", seed=1))
    cols.copy_(partition(2, 900, 7, "cuda", seed=2))
    graph.replay()
    fresh = BlockMask.from_variable_blocks(blocks.clone(), rows.clone(), cols.clone(), seq_lens=(700, 900))
    assert torch.equal(o, block_sparse_attention(q, k, v, fresh))


# ------------------------------------------------------------------------------------------ FlashInfer's own grid


def partition(heads: int, length: int, count: int, device: str, seed: int) -> Tensor:
    """int32 ``[heads, count]``: random sizes of at least 1 that add up to ``length``, each head its own."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.stack(
        [torch.randperm(length - 1, generator=generator)[: count - 1].sort()[0] + 1 for _ in range(heads)]
    )
    edges = torch.nn.functional.pad(cuts, (1, 0)), torch.nn.functional.pad(cuts, (0, 1), value=length)
    return (edges[1] - edges[0]).to(device, torch.int32)


def check_upstream(
    heads: tuple[int, int], dim: int, length: int, grid: tuple[int, int], dropped: float, device: str
) -> None:
    """FlashInfer's test of its wrapper: KV heads' own random partitions and patterns; at a sample of the rows."""
    (mb, nb), kv = grid, heads[1]
    rows, cols = partition(kv, length, mb, device, 0), partition(kv, length, nb, device, 1)
    blocks = torch.rand(1, kv, mb, nb, generator=torch.Generator().manual_seed(2)).to(device) > dropped
    q, k, v = make_qkv(1, length, length, *heads, dim, dtype=F16, device=device)
    mask = BlockMask.from_variable_blocks(blocks, rows, cols, seq_lens=length)
    o, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    sample = torch.randperm(length, generator=torch.Generator().manual_seed(3))[:48].to(device)
    allowed = torch.stack(
        [
            blocks[0, h][torch.repeat_interleave(torch.arange(mb, device=device), rows[h].long())[sample]]
            .repeat_interleave(cols[h].long(), 1)
            for h in range(kv)
        ]
    )[None]  # fmt: skip
    exact = dense_attention(q[:, sample].double(), k.double(), v.double(), allowed)
    eager = dense_attention(q[:, sample], k, v, allowed)
    assert_close_to_oracle(o[:, sample], exact[0], eager[0], "o")
    assert_close_to_oracle(lse[:, :, sample], exact[1], eager[1], "lse")


@pytest.mark.parametrize(
    ("heads", "dim", "grid", "dropped"),
    [((4, 4), 64, (10, 50), 0.2), ((16, 4), 128, (20, 100), 0.9), ((4, 1), 64, (20, 50), 0.7)],
)
def test_samples_of_flashinfers_grid(heads: tuple[int, int], dim: int, grid: tuple[int, int], dropped: float) -> None:
    check_upstream(heads, dim, 256, grid, dropped, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dropped", [0.2, 0.7, 0.9])
@pytest.mark.parametrize("grid", list(itertools.product((10, 20), (50, 100))), ids=str)
@pytest.mark.parametrize("length", [256, 4096, 8192])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [(q, k) for q, k in itertools.product((1, 4, 16), (1, 4, 16)) if q % k == 0], ids=str)
def test_flashinfers_grid(heads: tuple[int, int], dim: int, length: int, grid: tuple[int, int], dropped: float) -> None:
    check_upstream(heads, dim, length, grid, dropped, "cuda")
