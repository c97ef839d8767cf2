"""Registration, options in models, records, other kinds of attention, and everything that must be refused."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import tiny_models as tiny
import transformers
from tiny_models import SEQ, everything_selected, make_config, make_model, padding, tokens

import sparseattn
import sparseattn.hf as hf
from sparseattn.integrations.layout import row_mask
from sparseattn.integrations.options import implementation_name
from sparseattn.integrations.transformers import attention_forward, register
from sparseattn.testing import dense_attention, make_qkv

SHORT = dict(min_seq_len=16, block_size=64)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_names_are_in_both_registries_and_survive_a_second_call() -> None:
    names = register()
    assert names == register()
    assert names == ["sparseattn", *(implementation_name(method) for method in (*sparseattn.SELECTORS, "dense"))]
    assert {"sparseattn_landmark", "sparseattn_fprefill", "sparseattn_dense"} <= set(names)
    functions, masks = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    for name in names:
        assert functions[name] is not None
        assert masks[name] is not None
        # Transformers gives other meanings to names with these in them.
        assert not any(part in name for part in ("flash", "sdpa", "flex_attention", "eager", "/", "|"))
    assert not any(name.startswith("paged|sparseattn") for name in functions)


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, sparseattn; sparseattn.options, sparseattn.record; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def stripes(model: torch.nn.Module, seq: int = 512) -> Tensor:
    """Ids with structure: a token that repeats, so that scores differ much between blocks."""
    ids = tokens(1, seq)
    ids[:, : seq // 4] = 5
    return ids


def test_sparse_prefill_skips_blocks_and_says_so(device: str) -> None:
    model = make_model("llama", device)
    ids = stripes(model).to(device)
    with hf.options(density=0.5, **SHORT), hf.record(timing=True, masks=True, fidelity=True) as calls:
        sparse = model(ids).logits
    dense = tiny.attention(model, "sparseattn_dense")(ids).logits
    assert not torch.equal(sparse, dense)
    assert [call.layer for call in calls] == [0, 1]
    for call in calls:
        assert (call.method, call.reason, call.q_len, call.k_len) == ("landmark", None, 512, 512)
        assert 0.1 < call.density < 0.9
        assert call.mask.density == pytest.approx(call.density)
        assert 0.3 < call.recall < 1
        assert 0 < call.output_error < 1
        assert call.selection_seconds > 0
        assert call.attention_seconds > 0
        assert call.seconds == call.selection_seconds + call.attention_seconds
        json.dumps(call.to_dict())


def test_skipped_blocks_may_be_attended_by_their_means() -> None:
    model = make_model("llama")
    ids = stripes(model)
    found = {}
    for corrected in (False, True):
        with (
            hf.options(method="streaming", num_sink_tokens=64, num_local_tokens=64, mean_correction=corrected, **SHORT),
            hf.record(fidelity=True) as calls,
        ):
            found[corrected] = model(ids).logits, calls
    assert not torch.equal(found[True][0], found[False][0])
    first = [found[corrected][1][0] for corrected in (False, True)]
    assert first[0].recall == pytest.approx(first[1].recall)
    assert first[0].output_error > first[1].output_error > 0


def test_records_of_dense_calls() -> None:
    model = make_model("qwen3-sliding")
    ids = tokens(1, SEQ)
    with hf.options(**SHORT), hf.record(fidelity=True) as calls:
        out = model(ids)
        model(ids[:, :1], past_key_values=out.past_key_values)
    assert [call.method for call in calls] == ["landmark", "dense", "dense", "dense"]
    assert [call.reason for call in calls[1:]] == [
        "sliding window",
        "fewer than min_seq_len=16 queries",
        "fewer than min_seq_len=16 queries",
    ]
    for call in calls[1:]:
        assert (call.density, call.recall, call.output_error, call.seconds, call.mask) == (1.0, 1.0, 0.0, None, None)
    assert (calls[2].q_len, calls[2].k_len) == (1, SEQ + 1)


def test_nothing_is_recorded_outside_the_block() -> None:
    model = make_model("llama")
    with sparseattn.record() as outer:
        with sparseattn.record() as inner:
            model(tokens(1, 20))
        assert len(inner) == 2
    model(tokens(1, 20))
    assert (len(inner), len(outer)) == (2, 0)


def methods(model: torch.nn.Module, **call: object) -> list[str]:
    with hf.record() as calls:
        model(tokens(1, SEQ), **call)
    return [call.method for call in calls]


def test_precedence_in_a_model() -> None:
    model = make_model("llama", sparseattn={"method": "streaming", "min_seq_len": 16, "block_size": 64})
    assert methods(model) == ["streaming", "streaming"]
    assert methods(tiny.attention(model, "sparseattn_dense")) == ["dense", "dense"]
    assert methods(tiny.attention(model, "sparseattn_xattention")) == ["xattention", "xattention"]
    with hf.options(method="streaming", block_size=64):
        assert methods(model) == ["streaming", "streaming"]
        assert methods(model, sparseattn={"method": "dense"}) == ["dense", "dense"]
        assert methods(model, sparseattn={"min_seq_len": SEQ + 1}) == ["dense", "dense"]


def test_short_prompts_are_dense_by_default() -> None:
    assert methods(make_model("llama")) == ["dense", "dense"]


def test_layers_of_their_own() -> None:
    model = make_model("llama", num_hidden_layers=4)
    model.config.sparseattn = {
        **SHORT,
        "dense_layers": [0],
        "layers": {"2": {"method": "streaming", "block_size": 32}, "3": {"min_seq_len": 1000}},
    }
    assert methods(model) == ["dense", "landmark", "streaming", "dense"]


def test_thresholds_per_layer_and_head() -> None:
    model = make_model("llama")
    ids = stripes(model)
    with hf.options(tau=[[0.0] * 4, [0.9] * 4], **SHORT), hf.record() as calls:
        model(ids)
    assert calls[0].density == 1.0
    assert calls[1].density < 0.9


def test_config_round_trip(tmp_path) -> None:
    own = {"method": "xattention", "threshold": 0.8, "layers": {"1": {"method": "dense"}}, **SHORT}
    make_model("llama", sparseattn=own).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparseattn")
    assert again.config.sparseattn == own
    assert methods(again) == ["xattention", "dense"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sparseattn", {"tau": 2}, r"tau: expected"),
        ("sparseattn", {"taw": 0.5}, r"options of method 'landmark' \(.*tau.*got taw"),
        ("sparseattn", {"method": "quantum"}, r"method: expected one of landmark, xattention"),
        ("sparseattn_threshold", 0.5, r"sparseattn_threshold: expected one argument sparseattn=\{\.\.\.\}"),
    ],
)
def test_bad_options_of_a_call(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model("llama")(tokens(1, 20), **{name: value})


def test_a_method_that_cannot_run_names_the_layer_argument() -> None:
    with (
        hf.options(tau=[0.5] * 3, **SHORT),
        pytest.raises(ValueError, match="tau: expected 4 values, one per query head"),
    ):
        make_model("llama")(tokens(1, SEQ))


_ENCODER = dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_encoders(kind: str, side: str | None) -> None:
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(**_ENCODER, attention_probs_dropout_prob=0.0)
    else:
        config = transformers.ModernBertConfig(**_ENCODER, local_attention=50, pad_token_id=2, cls_token_id=3)
    model = transformers.AutoModel.from_config(config, attn_implementation="sparseattn").eval()
    ids = tokens(2, SEQ)
    mask = None if side is None else padding([SEQ, 120], side)
    keep = torch.ones_like(ids).bool() if mask is None else mask.bool()
    with everything_selected(sliding_layers="sparse"), hf.record() as calls:
        tiny.assert_like_eager(
            model,
            lambda m: m(ids, attention_mask=mask).last_hidden_state[keep],
            kind,
            # Rotary positions do not mind a shift; learned ones do, but then eager in float64 gives no NaN.
            oracle=(lambda m: tiny.alone(m, ids, keep)) if kind == "modernbert" else None,
        )
    assert {call.method for call in calls} == {"xattention"}


def test_a_decoder_made_bidirectional() -> None:
    model = make_model("llama", is_causal=False)
    ids = tokens(1, SEQ)
    with everything_selected():
        tiny.assert_like_eager(model, lambda m: m(ids, use_cache=False).logits, "bidirectional")
        causal = make_model("llama")(ids, use_cache=False).logits
        assert not torch.allclose(model(ids, use_cache=False).logits[:, 0], causal[:, 0])


def test_cross_attention() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=256, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=0, forced_eos_token_id=1,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config, attn_implementation="sparseattn").eval()
    ids, mask = tokens(2, SEQ), padding([SEQ, 90], "right")
    target = tokens(2, 70, seed=1)
    with everything_selected():
        tiny.assert_like_eager(
            model,
            lambda m: m(ids, attention_mask=mask, decoder_input_ids=target, use_cache=False).last_hidden_state,
            "bart",
        )


class Module(torch.nn.Module):
    """What the attention function reads of a module."""

    layer_idx = 3

    def __init__(self, dtype: torch.dtype = torch.float32, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.q_proj = torch.nn.Linear(4, 4, dtype=dtype)


def qkv(dtype: torch.dtype = torch.float32, seq: int = 40) -> list[Tensor]:
    return [t.transpose(1, 2) for t in make_qkv(2, seq, seq, 4, 2, 16, dtype=dtype)]


def test_a_raw_padding_mask_is_understood() -> None:
    """Models outside the mask interface, and wrappers, hand the 2-D mask to the layers."""
    q, k, v = qkv()
    mask = padding([40, 25], "left", 40)
    out, weights = attention_forward(Module(), q, k, v, mask, scaling=0.3)
    assert weights is None
    seen = torch.ones(40, 40).tril().bool() & mask.bool()[:, None, None]
    expected, _ = dense_attention(*(t.transpose(1, 2) for t in (q, k, v)), seen, scale=0.3)
    torch.testing.assert_close(out, expected * mask[..., None, None])
    # A cache longer than its content: the mask is as wide as the content.
    longer = [torch.nn.functional.pad(t, (0, 0, 0, 9), value=5.0) for t in (k, v)]
    static, _ = attention_forward(Module(), q, *longer, mask, scaling=0.3)
    torch.testing.assert_close(static, out)
    # A sliding cache: keys are the last columns of the mask.
    # A window that hides one key from one query.
    close, _ = attention_forward(Module(), q, k, v, None, scaling=0.3, sliding_window=39)
    assert not torch.equal(close, attention_forward(Module(), q, k, v, None, scaling=0.3)[0])
    late, _ = attention_forward(
        Module(), q[:, :, 30:], k[:, :, 10:], v[:, :, 10:], mask, scaling=0.3, sliding_window=21
    )
    seen &= torch.ones(40, 40).triu(-20).bool()
    expected, _ = dense_attention(*(t.transpose(1, 2) for t in (q, k, v)), seen, scale=0.3)
    torch.testing.assert_close(late, expected[:, 30:])


def test_packing_is_read_from_positions_when_no_mask_was_made() -> None:
    """Sequence-parallel wrappers drop the mask and keep the positions."""
    q, k, v = qkv()
    positions = torch.cat([torch.arange(25), torch.arange(15)]).expand(2, -1)
    out, _ = attention_forward(Module(), q, k, v, None, position_ids=positions)
    parts = [attention_forward(Module(), *(t[:, :, s] for t in (q, k, v)), None)[0] for s in (slice(25), slice(25, 40))]
    torch.testing.assert_close(out, torch.cat(parts, dim=1))
    plain, _ = attention_forward(Module(), q, k, v, None)
    for harmless in (torch.arange(7, 47)[None], torch.arange(40).expand(3, 1, 40)):
        assert torch.equal(attention_forward(Module(), q, k, v, None, position_ids=harmless)[0], plain)


def test_positions_changed_in_place_are_read_again() -> None:
    q, k, v = qkv()
    positions = torch.arange(40)[None].clone()
    plain, _ = attention_forward(Module(), q, k, v, None, position_ids=positions)
    positions[:, 20:] -= 20
    assert not torch.equal(attention_forward(Module(), q, k, v, None, position_ids=positions)[0], plain)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_float32_from_layer_norms_is_cast_to_the_weights_dtype(half: torch.dtype) -> None:
    q, k, v = qkv(half)
    expected, _ = attention_forward(Module(half), q, k, v, None)
    for mixed in ((q.float(), k.float(), v), (q.float(), k.float(), v.float())):
        out, _ = attention_forward(Module(half), *mixed, None)
        assert out.dtype == half
        assert torch.equal(out, expected)
    with torch.autocast("cpu", dtype=half):
        out, _ = attention_forward(Module(torch.float32), q.float(), k.float(), v.float(), None)
    assert out.dtype == half
    assert attention_forward(Module(), q.float(), k.float(), v.float(), None)[0].dtype == torch.float32
    assert attention_forward(Module(), q.double(), k.double(), v.double(), None)[0].dtype == torch.float64


def test_sinks_softcap_and_value_dim() -> None:
    q, k, v = make_qkv(2, 40, 40, 4, 2, 16, 24)
    sinks = torch.randn(4)
    out, _ = attention_forward(
        Module(), *(t.transpose(1, 2) for t in (q, k, v)), None, scaling=0.5, softcap=3.0, s_aux=sinks
    )
    expected, _ = dense_attention(q, k, v, torch.ones(1, 1, 40, 40).tril().bool(), 0.5, 3.0, sinks)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dropout=0.1), "dropout: expected 0, got 0.1. Set config.attention_dropout = 0"),
        (dict(position_bias=torch.zeros(1)), "position_bias: expected None.*attn_implementation='sdpa'"),
        (dict(block_indices=torch.zeros(1)), "block_indices: expected None.*config.layer_types"),
        (dict(indices=torch.zeros(1)), "indices: expected None.*config.layer_types"),
        (dict(cache=object()), "cache: expected None.*Continuous batching"),
        (dict(block_table=torch.zeros(1)), "block_table: expected None.*Paged"),
        (dict(cu_seq_lens_k={"full": 1}, cu_seq_lens_q=torch.tensor([0, 80])), "cu_seq_lens_k: expected a tensor"),
        (dict(cu_seq_lens_k=torch.tensor([0, 80])), "cu_seq_lens_q: expected given together with cu_seq_lens_k"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_forward(Module(), *qkv(), None, **arguments)


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(2, 1, 40, 40, dtype=torch.bool), ValueError, r"attention_mask: expected None or a 2-D.*sdpa"),
        (torch.zeros(2, 1, 40, 40), ValueError, r"got a torch.float32 mask of shape \(2, 1, 40, 40\)"),
        (object(), TypeError, r"attention_mask: expected None or a 2-D padding mask \[batch, seq\], got object"),
        (torch.tensor([[1] * 10 + [0] * 10 + [1] * 20] * 2), ValueError, "one run of ones per row.*padding_side"),
        (torch.ones(2, 30), ValueError, "attention_mask: expected a mask over all tokens, at least 40, got width 30"),
        (torch.tensor([[0] + [1] * 39] * 3), ValueError, "attention_mask: expected 2 rows like the query, got 3"),
    ],
    ids=["4d-bool", "4d-float", "object", "holes", "narrow", "batch"],
)
def test_masks_that_row_ranges_cannot_express(mask: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        attention_forward(Module(), *qkv(), mask)


def test_padding_beside_cu_seq_lens_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask: expected None beside cu_seq_lens_q"):
        attention_forward(Module(), *qkv(), padding([40, 3], "left", 40), cu_seq_lens_q=torch.tensor([0, 40, 80]))


def test_attention_weights_are_none_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr("sparseattn.integrations.transformers.logger.warning_once", said.append)
    _, weights = attention_forward(Module(), *qkv(), None, output_attentions=True)
    assert weights is None
    assert "attn_implementation='eager'" in said[0]


def make_mask(**arguments: object) -> object:
    from transformers.masking_utils import create_causal_mask

    config = make_config("llama")
    config._attn_implementation = "sparseattn"
    arguments = {"attention_mask": None, "past_key_values": None, **arguments}
    return create_causal_mask(config, torch.empty(2, 40, 0), **arguments)


def test_masks_take_no_memory() -> None:
    """A forward over a million tokens must not make an [S, S] or [B, S] mask."""
    mask = padding([40, 25], "left", 40)
    assert make_mask() is None
    assert make_mask(attention_mask=torch.ones(2, 40)).shape == (0, 1, 1, 4)
    assert make_mask(attention_mask=mask)[:, 0, 0].tolist() == [[0, 40, 0, 40], [15, 40, 15, 40]]
    # 7 more queries over a static cache of 100, 40 of which are filled.
    step = padding([47, 32], "left", 47).bool()
    rows = row_mask(2, 7, 100, torch.tensor(40), 0, attention_mask=step)
    assert rows[:, 0, 0].tolist() == [[0, 7, 0, 47], [0, 7, 15, 47]]
    assert row_mask(2, 7, 100, torch.tensor(40), 0)[:, 0, 0].tolist() == [[0, 7, 0, 47]] * 2
    # A mask as wide as the cache says nothing about the keys that are not there yet.
    assert row_mask(1, 7, 100, 40, 0, attention_mask=padding([98], "left", 100).bool())[0, 0, 0].tolist() == [
        0,
        7,
        2,
        47,
    ]
    # Right padding that swallows the whole second chunk of a row; a row of padding alone.
    step = padding([47, 38, 0], "right", 47).bool()
    assert row_mask(3, 7, 47, 40, 0, attention_mask=step)[:, 0, 0].tolist() == [[0, 7, 0, 47], [0, 0, 0, 38], [0] * 4]
    # A sliding cache that has dropped the first 30 keys.
    step = padding([47, 10], "left", 47).bool()
    assert row_mask(2, 7, 17, 40, 30, attention_mask=step)[:, 0, 0].tolist() == [[0, 7, 0, 17], [0, 7, 7, 17]]


def test_packing_is_found_when_the_mask_is_made() -> None:
    """For models that do not hand position_ids to their layers."""
    positions = torch.stack([torch.arange(40), torch.cat([torch.arange(25), torch.arange(15)])])
    packed = make_mask(position_ids=positions)
    assert packed.cu_seqlens.tolist() == [0, 40, 65, 80]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 40
    out, _ = attention_forward(Module(), *qkv(), packed)
    assert torch.equal(out, attention_forward(Module(), *qkv(), None, position_ids=positions)[0])


def test_patterns_that_row_ranges_cannot_express() -> None:
    def extra(batch, head, q, k):
        return k == 0

    with pytest.raises(ValueError, match=r"got an extra or/and mask function\. Use attn_implementation='sdpa'"):
        make_mask(or_mask_function=extra)
    with pytest.raises(ValueError, match="got an extra or/and mask function"):
        make_mask(and_mask_function=extra)
    with pytest.raises(ValueError, match="got blocks of bidirectional tokens"):
        make_mask(block_sequence_ids=torch.zeros(2, 40, dtype=torch.long))
    with pytest.raises(ValueError, match="all 40 tokens seen so far, cached ones included, got width 30"):
        row_mask(2, 7, 40, 33, 0, attention_mask=torch.ones(2, 30, dtype=torch.bool))


def test_chunked_attention_is_refused() -> None:
    from transformers.masking_utils import create_chunked_causal_mask

    config = make_config("llama")
    config._attn_implementation, config.attention_chunk_size = "sparseattn", 16
    with pytest.raises(ValueError, match=r"config\.attention_chunk_size"):
        create_chunked_causal_mask(config, torch.empty(2, 40, 0), attention_mask=None, past_key_values=None)


def test_models_with_their_own_sparsity_are_refused() -> None:
    config = make_config("llama")
    config.layer_types = ["indexed_attention", "full_attention"]
    with pytest.raises(
        ValueError, match=r"config\.layer_types: expected full and sliding attention, got indexed_attention"
    ):
        row_mask(2, 40, 40, config=config)


def test_right_padded_prompts_cannot_go_on_generating() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        model.generate(tokens(2, 30), attention_mask=padding([30, 20], "right", 30), max_new_tokens=3)


@pytest.mark.gpu
def test_layers_never_wait_for_the_gpu() -> None:
    q, k, v = (t.cuda() for t in qkv(torch.bfloat16, 512))
    module = Module(torch.bfloat16).cuda()
    mask = row_mask(2, 512, 512, attention_mask=padding([512, 300], "left", 512).bool().cuda())

    def layer() -> Tensor:
        with hf.options(tau=0.1, **SHORT), hf.record(timing=True):
            return attention_forward(module, q, k, v, mask, sliding_window=4096)[0]

    expected = layer()
    with warnings.catch_warnings():  # "a prototype feature"
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        out = layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about other people's code
def test_compiled_generation() -> None:
    """With a static cache on a GPU, generate compiles the decoding step."""
    model = make_model("llama", "cuda")
    ids, mask = tokens(2, 300, device="cuda"), padding([300, 200], "left", 300, "cuda")
    arguments = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    with everything_selected():
        dynamic = model.generate(ids, **arguments)
        assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), dynamic)
