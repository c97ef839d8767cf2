"""Models with sparse prefill, by SparseAttn's name: whatever Transformers can run, not Llama alone."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

import torch

import sparseattn
from sparseattn import models, threshold
from sparseattn.errors import argument_error
from sparseattn.src.utils import THRESHOLD
from sparseattn.src.utils import FastPrefillConfig as FastPrefillConfig


def load_model(
    fastprefillconfig: FastPrefillConfig | None = None, name_or_path: str | PathLike[str] = "", **kwargs: Any
) -> tuple[Any, Any]:
    """A model whose long prompts are prefilled as a config says, and its tokenizer.

    The model is Transformers' own, with nothing replaced: its attention goes through the registered name
    ``sparseattn``, and its options are ``model.config.sparseattn``. ``sparseattn.options`` and ``sparseattn.record``
    work on it, ``model.set_attn_implementation("sdpa")`` undoes it.

    Args:
        fastprefillconfig: Method and options; default ``FastPrefillConfig()``, XAttention.
        name_or_path: A hub id, a folder, or the name of a model that ships with this package.
        **kwargs: For ``AutoModelForCausalLM.from_pretrained``. By default the model is bfloat16 and spread over the
            GPUs where there are any, float32 elsewhere.

    Returns:
        The model in evaluation mode and its tokenizer; None for the shipped models, which read bytes
        (``sparseattn.testing.retrieval.encode``).

    Raises:
        ModuleNotFoundError: Transformers is not installed: ``pip install sparseattn[hf]``.
        OSError: Transformers finds no such model.
        TypeError: No config.
        ValueError: No name, or thresholds for another number of layers or heads than the model has.
    """
    config = FastPrefillConfig() if fastprefillconfig is None else fastprefillconfig
    if not isinstance(config, FastPrefillConfig):
        raise argument_error("fastprefillconfig", "a FastPrefillConfig", type(config).__name__, kind=TypeError)
    name = fspath(name_or_path)
    if not name:
        raise argument_error("name_or_path", "a hub id or a folder", repr(name_or_path))
    sparseattn.register()
    import transformers

    shipped = name in models.names()
    source = str(models.path(name)) if shipped else name
    model_config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(source)
    text_config = model_config.get_text_config()
    text_config.sparseattn = _options(config, name, text_config)
    if torch.cuda.is_available():
        kwargs = {"dtype": torch.bfloat16, "device_map": "auto", **kwargs}
    else:
        kwargs = {"dtype": torch.float32, **kwargs}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, config=model_config, attn_implementation="sparseattn", **kwargs
    )
    return model.eval(), None if shipped else transformers.AutoTokenizer.from_pretrained(source)


def _options(config: FastPrefillConfig, name: str, model_config: Any) -> dict[str, Any]:
    """The model's options, JSON-able, with thresholds that fit it."""
    options = {**config.options(), "min_seq_len": config.min_seq_len}
    if config.metric != "xattn":
        return options
    if config.threshold is None:
        own = {"stride": config.stride, "block_size": config.block_size or 128}
        table = threshold.find(name, "xattention", own)
        options["threshold"] = THRESHOLD if table is None else table.values
    threshold.check_shape(options["threshold"], model_config)
    options["threshold"] = _lists(options["threshold"])
    return options


def _lists(values: Any) -> Any:
    return [_lists(value) for value in values] if isinstance(values, tuple) else values
