"""``sparseattn run``: a prompt through a model, dense and sparse."""

from __future__ import annotations

import json as json_format
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparseattn.cli.common import (
    Loaded,
    UserError,
    clean_errors,
    describe_device,
    load_model,
    notes,
    parse_options,
    pick_device,
    read_prompt,
    settle_threads,
    sparse,
)
from sparseattn.integrations.options import DEFAULT_METHOD

ModelArgument = Annotated[
    str, typer.Argument(help="A folder, a hub id, or a shipped model: retrieval-d64, retrieval-d128.")
]
PromptOption = Annotated[Path, typer.Option(help="UTF-8 text; a newline at its end is dropped.")]
MethodOption = Annotated[str, typer.Option(help="How blocks are chosen: landmark, xattention, ..., dense.")]
OptionOption = Annotated[
    list[str] | None,
    typer.Option(help="name=value, repeatable: tau=0.1, block_size=64, min_seq_len=2048, dense_layers=[0] ..."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="auto: the checkpoint's on a GPU, float32 on a CPU.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@clean_errors
def run(
    model: ModelArgument,
    prompt_file: PromptOption,
    method: MethodOption = DEFAULT_METHOD,
    option: OptionOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, greedily.")] = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    chat: ChatOption = False,
    json: JsonOption = False,
) -> None:
    """Generate from a prompt with dense and with sparse prefill: answers, time to first token, density, memory."""
    options = parse_options(method, option or ())
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected at least 1, got {max_new_tokens}.")
    text = read_prompt(prompt_file)
    place = pick_device(device)
    settle_threads(place)
    loaded = load_model(model, place, dtype)
    prompt = loaded.encode(text, chat).to(place)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and prompt.shape[1] + max_new_tokens > limit:
        notes.print(
            f"[yellow]{prompt.shape[1] + max_new_tokens:,} tokens are more than the model's {limit:,} positions.[/]"
        )
    if not json:
        notes.print(f"[bold]{model}[/], {prompt.shape[1]:,} prompt tokens, {describe_device(place)}")

    dense = _generate(loaded, prompt, max_new_tokens, None)
    with sparse(loaded.model, options):
        from sparseattn.integrations.records import record

        with record() as calls:
            found = _generate(loaded, prompt, max_new_tokens, calls)
    prefills = [call for call in calls if call.q_len == prompt.shape[1]]
    density = sum(call.density for call in prefills) / len(prefills)
    reasons = sorted({call.reason for call in prefills if call.reason and call.reason != "dense"})
    result = {
        "model": model,
        "prompt_tokens": prompt.shape[1],
        "device": describe_device(place),
        "method": method,
        "options": options.to_dict(),
        "density": density,
        "dense_reasons": reasons,
        "ttft_speedup": dense["ttft_seconds"] / found["ttft_seconds"],
        "dense": dense,
        "sparse": found,
    }
    if json:
        print(json_format.dumps(result, indent=1))
    else:
        _report(result)


def _generate(loaded: Loaded, prompt: Tensor, max_new_tokens: int, calls: list[Any] | None) -> dict[str, Any]:
    """Greedy generation: the answer, the time to its first token and the memory that took."""
    import transformers

    class FirstToken(transformers.generation.BaseStreamer):
        """Notes when the first generated token reaches the host; the prompt is put before it."""

        def __init__(self) -> None:
            self.puts, self.at = 0, 0.0

        def put(self, value: Tensor) -> None:
            self.puts += 1
            if self.puts == 2:
                self.at = time.perf_counter()

        def end(self) -> None:
            pass

    model, on_gpu = loaded.model, prompt.is_cuda
    common = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    if model.generation_config.pad_token_id is None:
        end = model.generation_config.eos_token_id
        common["pad_token_id"] = end[0] if isinstance(end, list) else end if end is not None else 0
    if on_gpu:  # kernels compile on the first call
        model.generate(prompt, max_new_tokens=1, **common)
        if calls is not None:
            calls.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    streamer = FirstToken()
    start = time.perf_counter()
    with torch.no_grad():
        tokens = model.generate(prompt, max_new_tokens=max_new_tokens, streamer=streamer, **common)
    return {
        "answer": loaded.decode(tokens[0, prompt.shape[1] :]),
        "ttft_seconds": streamer.at - start,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else _peak_memory(),
    }


def _peak_memory() -> int | None:
    """The process's largest resident size so far, bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(result: dict[str, Any]) -> None:
    dense, found = result["dense"], result["sparse"]
    console = Console(highlight=False)
    table = Table(header_style="bold")
    for name in ("prefill", "first token after", "density", "peak memory"):
        table.add_column(name, justify="left" if name == "prefill" else "right")
    for name, part, density in (("dense (sdpa)", dense, 1.0), (result["method"], found, result["density"])):
        memory = part["peak_memory_bytes"]
        table.add_row(
            name,
            f"{part['ttft_seconds']:.3f} s",
            f"{100 * density:.1f} %",
            "unknown" if memory is None else f"{memory / 2**20:,.0f} MiB",
        )
    console.print(table)
    if result["device"].startswith("CPU"):
        console.print("Memory is the process's peak so far, so the second line includes the first.", style="dim")
    for reason in result["dense_reasons"]:
        console.print(f"Some layers ran dense: {reason}.", style="yellow", soft_wrap=True)
    speedup = result["ttft_speedup"]
    pace = f"{speedup:.2f} times as fast" if speedup >= 1 else f"slower ({speedup:.2f} times the speed)"
    console.print(f"First token with {result['method']}: {pace}.")
    same = dense["answer"] == found["answer"]
    console.print("[bold]Answer[/]" + (", the same with dense prefill:" if same else ":"))
    console.print(found["answer"], markup=False, soft_wrap=True)
    if not same:
        console.print("[bold]Answer with dense prefill:[/]")
        console.print(dense["answer"], markup=False, soft_wrap=True)
