"""Masks of variable blocks in the Hopper forward: on that chip the kernels, without a GPU their logic, emulated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sparseattn.masks import BlockMask, VariableBlockMask
from sparseattn.ops.block_sparse import block_sparse_attention
from sparseattn.testing import assert_close_to_oracle, dense_attention, make_qkv

gluon = pytest.importorskip("sparseattn.ops.block_sparse.gluon", reason="needs Triton")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
DEVICE = "cuda" if ON_HOPPER else "cpu"


@dataclass(frozen=True)
class Case:
    """Lengths, numbers of blocks and options of a call; sizes are drawn."""

    id: str
    seq: tuple[int, int]
    blocks: tuple[int, int]
    heads: tuple[int, int] = (2, 1)
    mask_heads: int = 2
    mask_batch: int = 1
    batch: int = 1
    dims: tuple[int, int] = (64, 64)
    density: float = 0.6
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    sinks: bool = False

    def __str__(self) -> str:
        return self.id


CASES = [
    Case("128s", (300, 700), (2, 5)),
    Case("causal-packed-batch", (200, 330), (1, 2), (4, 1), 1, 2, 2, causal=True),
    Case("many-ends", (140, 2000), (2, 25), density=0.5),
    Case("causal-ends", (300, 1300), (3, 15), causal=True, sinks=True),
    Case("gathered-16s", (100, 150), (6, 9), sinks=True),
    Case("gathered-64s-window", (150, 300), (3, 6), (4, 2), 2, dims=(128, 128), window=(90, 20)),
    Case("parts-of-tiles", (70, 300), (2, 2), (2, 2), 2, dims=(192, 128), causal=True),
    Case("shares", (9, 900), (1, 3), (4, 1), 1, density=1.0),
    Case("one-key", (5, 1), (1, 1), density=1.0),
]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch):
    """The kernel under the emulator where there is no GPU."""
    if not ON_HOPPER:
        from gluon_emulator import Emulated

        monkeypatch.setattr(gluon, "forward_kernel", Emulated(gluon.forward_kernel))
        monkeypatch.setattr(gluon, "unsupported_reason", lambda q, k, v, g, gradients=None: gluon.refusal(q, k, v, g))


def cut(length: int, blocks: int, generator: torch.Generator) -> Tensor:
    """int32 [blocks] sizes, zero among them, that add up to ``length``."""
    borders = torch.randint(0, length + 1, (blocks - 1,), generator=generator).sort().values
    return torch.diff(torch.cat([torch.tensor([0]), borders, torch.tensor([length])])).int()


def build(case: Case, dtype: torch.dtype) -> tuple[VariableBlockMask, Tensor, tuple[Tensor, ...], Tensor | None]:
    """The mask, what it shows [B|1, H, Sq, Sk], q, k and v, and sinks."""
    g = torch.Generator().manual_seed(5)
    counts = zip(case.seq, case.blocks, strict=True)
    sizes = [torch.stack([cut(n, blocks, g) for _ in range(case.mask_heads)]) for n, blocks in counts]
    pattern = torch.rand((case.mask_batch, case.mask_heads, *case.blocks), generator=g) < case.density
    on_device = (t.to(DEVICE) for t in (pattern, *sizes))
    mask = BlockMask.from_variable_blocks(*on_device, seq_lens=case.seq, causal=case.causal, window=case.window)
    qkv = make_qkv(case.batch, *case.seq, *case.heads, *case.dims, dtype=dtype, device=DEVICE)
    sinks = torch.linspace(-1, 1, case.heads[0], device=DEVICE) if case.sinks else None
    return mask, mask.to_dense(), (qkv.q, qkv.k, qkv.v), sinks


def check(case: Case, dtype: torch.dtype = torch.float16) -> None:
    mask, seen, (q, k, v), sinks = build(case, dtype)
    group = case.heads[0] // case.heads[1]
    # Keys of blocks that no query of a KV head's group attends: they may hold anything.
    chosen = replace(mask, causal=False, window=None).to_dense()
    unseen = ~chosen.repeat_interleave(case.heads[0] // chosen.shape[1], 1).unflatten(1, (-1, group)).any(3).any(2)
    unseen = unseen.expand(case.batch, -1, -1).transpose(1, 2)
    dirty = [t.masked_fill(unseen[..., None], torch.nan) for t in (k, v)]
    o, lse = block_sparse_attention(q, *dirty, mask, sinks=sinks, return_lse=True, impl="gluon")
    oracle = dense_attention(*(t.double() for t in (q, k, v)), seen, sinks=None if sinks is None else sinks.double())
    eager = dense_attention(q, k, v, seen, sinks=sinks)
    for name, actual, exact, low in zip(("o", "lse"), (o, lse), oracle, eager, strict=True):
        assert_close_to_oracle(actual, exact, low, name=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [((2, 2), 2), ((8, 2), 2), ((8, 2), 8), ((4, 1), 1)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (192, 128)])
def test_grid(heads: tuple[tuple[int, int], int], dims: tuple[int, int]) -> None:
    """Every head dimension with every kind of heads; sizes of blocks, and with them of tiles, in turn."""
    causal = dims[0] >= 192
    for blocks in ((3, 7), (20, 50)) if causal else ((1, 1), (60, 130)):
        case = Case("grid", (1500, 2100), blocks, *heads, mask_batch=2, batch=2, dims=dims, causal=causal)
        check(case, torch.float16 if heads[1] == 2 else torch.bfloat16)


@pytest.mark.gpu
def test_gradients_are_refused() -> None:
    mask, _, (q, k, v), _ = build(CASES[0], torch.float16)
    with pytest.raises(ValueError, match="the Hopper backward takes blocks of one size"):
        block_sparse_attention(q.requires_grad_(), k, v, mask, impl="gluon")
