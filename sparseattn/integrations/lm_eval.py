"""lm-evaluation-harness with sparse attention: our names registered, everything else passed through.

The harness hands ``model_args`` to ``from_pretrained``, so a name of ours there is all it needs:

    sparseattn lm-eval --method landmark --option tau=0.3 -- \\
        --model hf --model_args pretrained=MODEL --tasks niah_single_1 --limit 20
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sparseattn.errors import argument_error
from sparseattn.integrations import transformers as hf
from sparseattn.integrations.options import AttentionOptions, options

ATTENTION = "attn_implementation"


def run(arguments: Sequence[str], flat: Mapping[str, Any] | None = None) -> None:
    """Run the harness's command line with this library's attention.

    Args:
        arguments: The harness's own, as on its command line. ``--model`` must be ``hf`` (its default) or another that
            loads Transformers models; ``attn_implementation=sparseattn`` is added to ``--model_args`` unless an
            ``attn_implementation`` is there.
        flat: Options, flat, as ``sparseattn.options`` takes them.

    Raises:
        ModuleNotFoundError: The harness is not installed.
        ValueError: ``arguments`` without ``--model_args``, or options that do not fit.
    """
    chosen = AttentionOptions.from_dict(flat or {})
    passed = with_attention(arguments)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"lm-eval needs the lm-evaluation-harness ({error}): pip install lm-eval", name=error.name
        ) from error
    hf.register()
    before = sys.argv
    sys.argv = ["lm_eval", *passed]
    try:
        with options(**chosen.to_dict()):
            cli_evaluate()
    finally:
        sys.argv = before


def with_attention(arguments: Sequence[str]) -> list[str]:
    """The harness's arguments with our attention in ``--model_args``.

    Raises:
        ValueError: There is no ``--model_args``.
    """
    passed = list(arguments)
    for i, argument in enumerate(passed):
        name, equals, value = argument.partition("=")
        if name not in ("--model_args", "-a"):
            continue
        if equals:
            passed[i] = f"{name}={_added(value)}"
        elif i + 1 < len(passed):
            passed[i + 1] = _added(passed[i + 1])
        else:
            break
        return passed
    raise argument_error("arguments", "lm-eval's --model_args pretrained=...", " ".join(passed) or "nothing")


def _added(model_args: str) -> str:
    return model_args if f"{ATTENTION}=" in model_args else f"{model_args},{ATTENTION}={hf.PREFIX}"
