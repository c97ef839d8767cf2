"""SparseAttn's documented functions do what its README says, checked block by block and against dense softmax."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn import src
from sparseattn.masks import BlockMask
from sparseattn.src import FastPrefillConfig, Flexprefill_prefill, Full_prefill, Minference_prefill, Xattention_prefill
from sparseattn.src import utils as src_utils

DOCUMENT = Path(__file__).with_name("documented.txt").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SIGNATURES = [code for code in PYTHON if code.startswith("def ")]
USES = [code for code in PYTHON if not code.startswith("def ")]
(CONFIG,) = [code for language, code in BLOCKS if language == "json"]
FUNCTIONS = (Xattention_prefill, Flexprefill_prefill, Minference_prefill, Full_prefill)


def qkv(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    sq: int = 300,
    sk: int | None = None,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``[B, H, S, D]`` tensors, attention a little peaked."""
    sk = sq if sk is None else sk
    shapes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, dim))
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    return 2 * q, k, v


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, in float64 on the CPU: softmax over visible keys, 0 where there are none."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias.double()
    weights = scores.masked_fill(~visible.cpu(), -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ v.repeat_interleave(group, 1)


def causal(sq: int, sk: int) -> Tensor:
    return torch.arange(sk) <= torch.arange(sq)[:, None] + sk - sq


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """The masks that calls hand to the operator."""
    seen: list[BlockMask] = []
    operator = src_utils.block_sparse_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **more: Any) -> Any:
        seen.append(mask)
        return operator(q, k, v, mask, **more)

    monkeypatch.setattr(src_utils, "block_sparse_attention", watched)
    return seen


def test_the_document_has_all_its_blocks() -> None:
    assert [len(USES), len(SIGNATURES)] == [3, 4]


def test_usage_blocks_run(device: str) -> None:
    namespace: dict[str, Any] = {}
    for code in USES:
        if device == "cpu":  # the document's own sizes are a GPU's
            code = code.replace("'cuda'", "'cpu'").replace("1, 32, 4096, 128", "1, 4, 500, 64")
        exec(code, namespace)
        output, value = namespace["output"], namespace["value"]
        assert output.shape == namespace["query"].shape
        assert output.isfinite().all()
        torch.testing.assert_close(output[:, :, 0], value[:, :, 0], msg="the first query sees its own key alone")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_signatures_are_the_documented_ones(function: Any) -> None:
    documented = SIGNATURES[FUNCTIONS.index(function)]
    namespace: dict[str, Any] = {"torch": torch}
    exec(f"{documented.rstrip()}: ...", namespace)
    promised = inspect.signature(namespace[function.__name__]).parameters.values()
    found = list(inspect.signature(function).parameters.values())
    kinds = [(p.name, p.default, p.kind) for p in found if p.kind is not p.KEYWORD_ONLY]
    assert kinds == [(p.name, p.default, p.kind) for p in promised]
    assert all(p.default is not p.empty for p in found[len(kinds) :])


def test_config_file_is_loaded_and_every_key_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(__file__).resolve().parents[2] / "config/xattn_config.json"
    assert shipped.read_text() == CONFIG
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="xattn_config"):
        FastPrefillConfig.from_json()
    (tmp_path / "config").mkdir()
    (tmp_path / "config/xattn_config.json").write_text(CONFIG)
    config = FastPrefillConfig.from_json()
    documented = json.loads(CONFIG)
    assert {name: getattr(config, name) for name in documented} == documented

    def options(**more: Any) -> list[Any]:
        merged = {**documented, **more}
        return [FastPrefillConfig.from_dict({**merged, "metric": m}).options() for m in ("xattn", "flex", "minfer")]

    others = {"stride": 8, "threshold": 0.5, "block_size": 128, "sparsity_ratio": 0.5, "adaptive_budget": 0.5}
    assert set(others) == set(documented)
    for name, other in others.items():
        assert options() != options(**{name: other}), name
    q, k, v = qkv()
    want = Flexprefill_prefill(q, k, v, block_size=64, sparsity_ratio=0.2)
    assert torch.equal(FastPrefillConfig.from_dict({**documented, "metric": "flex"}).prefill(q, k, v), want)
    want = Xattention_prefill(q, k, v, threshold=0.5)
    assert torch.equal(FastPrefillConfig(threshold=0.5).prefill(q, k, v), want)
    want = Minference_prefill(q, k, v, adaptive_budget=0.1)
    assert torch.equal(FastPrefillConfig(metric="minfer", adaptive_budget=0.1).prefill(q, k, v), want)
    assert torch.equal(FastPrefillConfig(metric="full").prefill(q, k, v, causal=False), Full_prefill(q, k, v, False))


CALLS = {
    "xattention": lambda *x: Xattention_prefill(*x, threshold=0.7),
    "flexprefill": lambda *x: Flexprefill_prefill(*x, sparsity_ratio=0.5),
    "flexprefill-gamma": lambda *x: Flexprefill_prefill(*x, 32, None, gamma=0.6, tau=0.3),
    "minference": lambda *x: Minference_prefill(*x, vertical_size=20, slash_size=40),
    "minference-adaptive": lambda *x: Minference_prefill(*x, adaptive_budget=0.2),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_are_softmax_over_what_was_selected(name: str, masks: list[BlockMask], device: str) -> None:
    q, k, v = qkv(sq=700, device=device)
    out = CALLS[name](q, k, v)
    visible = masks[0].expand_heads(4).to_dense().cpu()
    assert masks[0].density < 0.95 or name in ("flexprefill-gamma", "minference-adaptive")  # budgets past 700 tokens
    assert not (visible & ~causal(700, 700)).any()
    torch.testing.assert_close(out.cpu().double(), softmax_attention(q, k, v, visible), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_batches_and_repeated_heads_change_nothing(name: str) -> None:
    q, k, v = qkv()
    out = CALLS[name](q, k, v)
    alone = [CALLS[name](*(x[b : b + 1] for x in (q, k, v))) for b in range(2)]
    torch.testing.assert_close(out, torch.cat(alone))
    torch.testing.assert_close(out, CALLS[name](q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    q, k, v = qkv(1, sq=200, dtype=dtype, device=device)
    for call in (
        *CALLS.values(),
        Full_prefill,
        lambda *x: Full_prefill(*x, attention_mask=causal(200, 200).to(device)),
    ):
        out = call(q, k, v)
        assert (out.dtype, out.shape) == (dtype, q.shape)
        assert out.isfinite().all()


def test_everything_kept_is_dense_attention(device: str) -> None:
    q, k, v = qkv(sq=100, sk=333, device=device)
    want = softmax_attention(q, k, v, causal(100, 333))
    for out in (
        Xattention_prefill(q, k, v, threshold=1.0),
        Flexprefill_prefill(q, k, v, sparsity_ratio=1.0),
        Minference_prefill(q, k, v),
        Full_prefill(q, k, v),
    ):
        torch.testing.assert_close(out.cpu().double(), want, atol=1e-5, rtol=1e-5)
    both = softmax_attention(q, k, v, torch.ones(100, 333, dtype=torch.bool))
    for out in (Xattention_prefill(q, k, v, 1.0, causal=False), Full_prefill(q, k, v, causal=False)):
        torch.testing.assert_close(out.cpu().double(), both, atol=1e-5, rtol=1e-5)


def test_gradients_flow() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, sq=150))
    Xattention_prefill(q, k, v, 0.5).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_they_compile_whole(function: Any) -> None:
    q, k, v = qkv(1, sq=150)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), function(q, k, v))


def test_thresholds_per_head(masks: list[BlockMask]) -> None:
    q, k, v = qkv(1, sq=1500)
    Xattention_prefill(q, k, v, threshold=torch.tensor([0.0, 0.3, 0.9, 1.0]))
    density = masks[0].densities()[0].tolist()
    assert density == sorted(density)
    assert density[0] < 0.3
    assert density[3] == 1


@pytest.mark.parametrize("ratio", [0.2, 0.35])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.9], ids="tau{}".format)
def test_sparsity_ratio_is_the_share_kept(ratio: float, tau: float, masks: list[BlockMask], device: str) -> None:
    q, k, v = qkv(1, sq=64 * 30, device=device)
    Flexprefill_prefill(q, k, v, sparsity_ratio=ratio, tau=tau)
    rows = torch.arange(1, 31)  # so many blocks a row sees; its own and the first are always kept
    want = torch.maximum((rows * ratio).ceil(), rows.clamp(max=2)).int()
    assert (masks[0].kv_num_blocks.cpu() == want).all()
    assert masks[0].block_size == (64, 64)


def test_gamma_covers_instead(masks: list[BlockMask]) -> None:
    q, k, v = qkv(1, sq=3000)
    for gamma in (0.1, 1.0):
        Flexprefill_prefill(q, k, v, sparsity_ratio=None, gamma=gamma)
    assert masks[0].density < masks[1].density == 1
    Flexprefill_prefill(q, k, v, sparsity_ratio=None)
    assert masks[0].density <= masks[2].density


# ---- masks of Full_prefill ----

SHOWN = {
    "rows": lambda b, h, sq, sk: torch.rand(sq, sk) > 0.3,
    "padding": lambda b, h, sq, sk: (torch.arange(sk) < torch.tensor([sk - 50, sk])[:, None])[:, None, None],
    "all": lambda b, h, sq, sk: torch.rand(b, h, sq, sk) > 0.3,
    "heads": lambda b, h, sq, sk: torch.rand(1, h, 1, sk) > 0.3,
}


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("sk", [120, 200])
def test_masks_of_bools_keep_and_masks_of_floats_add(kind: str, is_causal: bool, sk: int, device: str) -> None:
    q, k, v = qkv(sq=120, sk=sk, device=device)
    keep = SHOWN[kind](2, 4, 120, sk)
    visible = keep & causal(120, sk) if is_causal else keep
    want = softmax_attention(q, k, v, visible)
    hidden = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    for mask in (keep, hidden, hidden.masked_fill(~keep, -torch.inf), hidden.double()):
        out = Full_prefill(q, k, v, is_causal, mask.to(device))
        torch.testing.assert_close(out.cpu().double(), want, atol=1e-5, rtol=1e-5)
    bias = torch.randn(keep.shape)
    out = Full_prefill(q, k, v, is_causal, (bias + hidden).to(device))
    torch.testing.assert_close(out.cpu().double(), softmax_attention(q, k, v, visible, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hide", [torch.finfo(torch.float32).min, -torch.inf, -1e9], ids=str)
def test_rows_that_see_nothing_are_zero(hide: float, device: str) -> None:
    q, k, v = (x.half().requires_grad_() for x in qkv(1, sq=64, device=device))
    mask = torch.zeros(1, 1, 64, 64, device=device)
    mask[..., :10, :] = hide
    out = Full_prefill(q, k, v, attention_mask=mask)
    out.float().sum().backward()
    assert (out[:, :, :10] == 0).all()
    assert (out[:, :, 10:] != 0).all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "name", "kind"),
    [
        (lambda q, k, v: (q[0], k, v), "query_states", ValueError),
        (lambda q, k, v: (q, k.half(), v), "key_states", TypeError),
        (lambda q, k, v: (q, k, None), "value_states", TypeError),
        (lambda q, k, v: (q[:, :3], k, v), "key_states", ValueError),
        (lambda q, k, v: (q, k[:1], v[:1]), "key_states", ValueError),
        (lambda q, k, v: (q, k[..., :16], v), "key_states", ValueError),
        (lambda q, k, v: (q, k, v[:, :, 1:]), "value_states", ValueError),
    ],
)
def test_bad_tensors_are_named(change: Any, name: str, kind: type[Exception]) -> None:
    q, k, v = change(*qkv(sq=64))
    for function in FUNCTIONS:
        with pytest.raises(kind, match=f"^{name}: expected"):
            function(q, k, v)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *x: Xattention_prefill(*x, threshold=1.5), "threshold"),
        (lambda *x: Xattention_prefill(*x, threshold=[0.5]), "threshold.*4 values, one per query head"),
        (lambda *x: Flexprefill_prefill(*x, block_size=48), r"block_size.*\(32, 64, 128\)"),
        (lambda *x: Flexprefill_prefill(*x, sparsity_ratio=0), "sparsity_ratio.*0.2 keeps a fifth"),
        (lambda *x: Flexprefill_prefill(*x, sparsity_ratio=True), "sparsity_ratio"),
        (lambda *x: Flexprefill_prefill(*x, gamma=0.9), "gamma.*sparsity_ratio=None"),
        (lambda *x: Minference_prefill(*x, adaptive_budget=0.0), "adaptive_budget"),
        (lambda *x: Minference_prefill(*x, vertical_size=0), "vertical_size"),
        (lambda *x: Full_prefill(*x, attention_mask=torch.ones(2, 64)), r"attention_mask.*padding\[:, None, None"),
        (lambda *x: Full_prefill(*x, attention_mask=torch.ones(3, 1, 64, 64).bool()), "attention_mask"),
    ],
)
def test_bad_values_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*qkv(sq=64))


def test_masks_of_integers_could_mean_either() -> None:
    with pytest.raises(TypeError, match=r"attention_mask.*integers could mean either"):
        Full_prefill(*qkv(sq=64), attention_mask=torch.ones(64, 64, dtype=torch.long))
    with pytest.raises(TypeError, match="attention_mask"):
        Full_prefill(*qkv(sq=64), attention_mask="causal")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "xattention"}, "metric.*xattn, flex, minfer, full"),
        ({"strides": 8}, "strides: expected a key among threshold, metric, stride"),
        ({"stride": 5}, "stride"),
        ({"threshold": 2}, "threshold"),
        ({"metric": "flex", "sparsity_ratio": 2}, "sparsity_ratio"),
        ({"metric": "minfer", "slash_size": 0}, "slash_size"),
    ],
)
def test_bad_configs_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastPrefillConfig.from_dict(options)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_bad_config_files_are_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"path: expected a JSON .*{file.name}"):
        FastPrefillConfig.from_json(file)


def test_names() -> None:
    assert {f.__name__ for f in FUNCTIONS} <= set(dir(src))
