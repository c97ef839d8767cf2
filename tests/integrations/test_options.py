"""Where options come from, who wins, and what is refused."""

from __future__ import annotations

import json
import threading

import pytest

from sparseattn.integrations.options import AttentionOptions, merge, options, resolve


def test_defaults() -> None:
    chosen = resolve()
    assert chosen == AttentionOptions()
    assert chosen.method == "landmark"
    assert chosen.min_seq_len == "auto"
    assert chosen.config.tau == 0.3


def test_call_beats_context_beats_name_beats_config() -> None:
    config = {"method": "xattention", "threshold": 0.5, "min_seq_len": 7, "block_size": 64}
    assert resolve(None, config).config.threshold == 0.5
    with options(threshold=0.6, dense_layers=[1]):
        with options(threshold=0.7):
            inner = resolve(None, config)
            assert (inner.config.threshold, inner.config.block_size, inner.min_seq_len) == (0.7, 64, 7)
            assert inner.dense_layers == (1,)
            assert resolve(None, config, {"threshold": 0.8}).config.threshold == 0.8
        assert resolve(None, config).config.threshold == 0.6
        with options(method="dense"):
            assert resolve("xattention", config).method == "dense"
            assert resolve("xattention", config, {"method": "streaming"}).method == "streaming"
    streaming = resolve("streaming", config)
    assert streaming.method == "streaming"
    assert streaming.min_seq_len == 7


def test_another_method_drops_the_options_of_the_first() -> None:
    assert merge({"tau": 0.5, "min_seq_len": 3}, {"method": "streaming"}) == {
        "min_seq_len": 3,
        "method": "streaming",
    }
    assert merge({"method": "xattention", "threshold": 0.5}, {"method": "xattention"})["threshold"] == 0.5
    assert merge({"tau": 0.5}, {"method": "landmark"})["tau"] == 0.5, "the default method, named"


def test_options_restore_and_stay_in_their_thread() -> None:
    seen = []

    def fail() -> None:
        with options(tau=0.25):
            worker = threading.Thread(target=lambda: seen.append(resolve().config.tau))
            worker.start()
            worker.join()
            raise RuntimeError("out")

    with pytest.raises(RuntimeError, match="out"):
        fail()
    assert seen == [0.3]
    assert resolve().config.tau == 0.3


def test_layers() -> None:
    chosen = resolve(
        None,
        {
            "tau": 0.3,
            "block_size": 64,
            "dense_layers": [0],
            "layers": {"2": {"method": "streaming", "num_sink_tokens": 64}, "3": {"tau": 0.1, "min_seq_len": 5}},
        },
    )
    assert chosen.for_layer(0).method == "dense"
    assert chosen.for_layer(1) == chosen.for_layer(None) == chosen
    assert chosen.for_layer(2).config.num_sink_tokens == 64
    assert (chosen.for_layer(3).config.tau, chosen.for_layer(3).config.block_size) == (0.1, 64)
    assert chosen.for_layer(3).min_seq_len == 5
    assert chosen.for_layer(3) is chosen.for_layer(3)


def test_json_round_trip() -> None:
    flat = {
        "tau": [[0.5, 0.6], [0.7, 0.8]],
        "dense_layers": [1],
        "layers": {"0": {"method": "streaming", "num_local_tokens": 256}},
        "min_seq_len": 9,
        "impl": "reference",
        "sliding_layers": "sparse",
        "mean_correction": True,
    }
    chosen = AttentionOptions.from_dict(json.loads(json.dumps(flat)))
    again = AttentionOptions.from_dict(json.loads(json.dumps(chosen.to_dict())))
    assert again == chosen
    assert chosen.config.tau == ((0.5, 0.6), (0.7, 0.8))


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"method": "quantum"}, r"method: expected one of landmark, xattention, streaming.*dense, got 'quantum'"),
        ({"method": None}, "method: expected one of"),
        ({"taw": 0.5}, r"tau.*got taw"),
        ({"method": "dense", "threshold": 0.5}, "of method 'dense'.*got threshold"),
        ({"method": "streaming", "threshold": 0.5}, "of method 'streaming'.*num_sink_tokens.*got threshold"),
        ({"tau": 1.5}, r"tau: expected .*\[0, 1\]"),
        ({"tau": float("nan")}, r"tau: expected .*\[0, 1\]"),
        ({"min_seq_len": 0}, "min_seq_len: expected 'auto' or an int of at least 1, got 0"),
        ({"min_seq_len": "always"}, "min_seq_len"),
        ({"min_seq_len": True}, "min_seq_len"),
        ({"dense_layers": "01"}, "dense_layers: expected a list of layer indices, got '01'"),
        ({"dense_layers": [-1]}, "dense_layers: expected layer indices of at least 0, got -1"),
        ({"layers": [1]}, "layers: expected a dict"),
        ({"layers": {"first": {}}}, "layers: expected layer indices of at least 0, got 'first'"),
        ({"layers": {0: {"layers": {}}}}, r"layers\[0\]: expected options of one layer, got layers"),
        ({"layers": {0: {"nonsense": 1}}}, r"layers\[0\]: expected options among .*got nonsense"),
        ({"layers": {0: {"num_sink_tokens": 1}}}, "of method 'landmark'.*got num_sink_tokens"),
        ({"sliding_layers": "window"}, "sliding_layers: expected 'dense' or 'sparse'"),
        ({"mean_correction": 1}, "mean_correction: expected True or False"),
        ({"impl": "cuda"}, "impl: expected one of auto, .*triton, reference, got 'cuda'"),
    ],
)
def test_bad_options(flat: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(None, None, flat)
    # A context may leave the method open: what depends on it is refused when a call settles it.
    general = message.replace("of method 'landmark'.*", "").replace("threshold.*got", "got")
    with pytest.raises(ValueError, match=general), options(**flat):
        resolve()


@pytest.mark.parametrize("bad", [0.9, "xattention", [("threshold", 1)]])
def test_options_are_dicts(bad: object) -> None:
    with pytest.raises(TypeError, match=r"config.sparseattn: expected a dict of options"):
        resolve(None, bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"sparseattn: expected a dict of options"):
        resolve(None, None, bad)  # type: ignore[arg-type]


def test_selectors_of_a_gluon_operator_choose_for_themselves():
    """Landmark has kernels for Hopper, too, which ``"triton"`` would pass by."""
    assert AttentionOptions(impl="gluon").selector_impl == "auto"
    assert AttentionOptions(impl="reference").selector_impl == "reference"
