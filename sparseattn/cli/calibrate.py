"""``sparseattn calibrate``: thresholds per layer and head that keep a share of a model's attention mass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import Tensor

from sparseattn.cli.common import (
    Loaded,
    UserError,
    check_writable,
    clean_errors,
    describe_device,
    load_model,
    notes,
    parse_options,
    pick_device,
    read_prompt,
    settle_threads,
)
from sparseattn.cli.run import DeviceOption, DtypeOption, ModelArgument
from sparseattn.testing.retrieval import make_batch


@clean_errors
def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The table, JSON.")],
    method: Annotated[str, typer.Option(help="xattention, landmark or flashprefill.")] = "xattention",
    target: Annotated[float, typer.Option(help="Recall of attention mass that every head keeps.")] = 0.95,
    statistic: Annotated[str, typer.Option(help="mean, or p05: nineteen of twenty rows reach the target.")] = "mean",
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text, repeatable; as long as what the model will read.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the prompts drawn for a shipped model.")] = 4096,
    prompts: Annotated[int, typer.Option(help="And how many.")] = 2,
    option: Annotated[
        list[str] | None, typer.Option(help="name=value, repeatable: other options of the method, stride=16 ...")
    ] = None,
    steps: Annotated[int, typer.Option(help="Bisections; the model runs once more than that.")] = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Fit a threshold for every layer and head of a model; every prompt keeps its share of attention mass."""
    own = parse_options(method, option or ()).method_options
    check_writable("--out", out)
    place = pick_device(device)
    settle_threads(place)
    loaded = load_model(model, place, dtype)
    texts = _prompts(loaded, prompt_file or [], length, prompts)
    tokens = sum(text.shape[1] for text in texts)
    notes.print(f"[bold]{model}[/], {len(texts)} prompts, {tokens:,} tokens, {describe_device(place)}")
    from sparseattn.threshold.calibration import calibrate as fit

    try:
        table = fit(
            loaded.model, texts, method, target=target, statistic=statistic, options=own, steps=steps, name=model
        )
        table.save(out)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    console = Console(highlight=False)
    found, values = table.measured, [value for row in table.values for value in row]
    console.print(f"{table.option} from {min(values):.4g} to {max(values):.4g} in {len(values)} heads.")
    console.print(
        f"Recall {found['recall']:.3f} (lowest head {found['lowest_recall']:.3f}), density {found['density']:.1%}."
    )
    console.print(f"Written to {out}", soft_wrap=True)


def _prompts(loaded: Loaded, files: list[Path], length: int, count: int) -> list[Tensor]:
    """What files hold, or for models that read bytes questions spread through a text."""
    if files:
        return [loaded.encode(read_prompt(file)) for file in files]
    if loaded.tokenizer is not None:
        raise UserError("--prompt-file: expected at least one text, got none. Only shipped models have prompts drawn.")
    if count < 1:
        raise UserError(f"--prompts: expected at least 1, got {count}.")
    try:
        # Seeds that evaluation, which counts from 0, does not reach.
        return [make_batch("stream", length, seed=1000 + i).tokens for i in range(count)]
    except ValueError as error:
        raise UserError(f"--length: {error}") from error
