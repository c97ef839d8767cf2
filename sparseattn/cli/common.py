"""What the commands share: errors a user can read, options, devices, models and prompts."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor

import sparseattn
from sparseattn import models
from sparseattn.testing import retrieval

if TYPE_CHECKING:
    from sparseattn.integrations.options import AttentionOptions

#: Results go to stdout, everything else here, so that ``--json`` can be piped.
notes = Console(stderr=True, highlight=False)


class UserError(Exception):
    """Bad input: reported in one line, exit code 2."""


class MissingExtra(Exception):
    """A package that an extra of ours brings: reported with the command to run, exit code 1."""


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Report bad input and missing packages without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (UserError, MissingExtra) as error:
            notes.print("[bold red]Error:[/]", str(error), markup=True, soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from None

    return wrapped


def need(extra: str, *modules: str) -> None:
    """Check that the packages of an extra are there.

    Raises:
        MissingExtra: The first one that is not, and how to get it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtra(f"this needs {module} ({error}): pip install 'sparseattn\\[{extra}]'") from error


def parse_options(method: str, pairs: Iterable[str]) -> AttentionOptions:
    """``--method`` and ``--option name=value`` as validated options. Values are JSON, or else plain strings.

    Raises:
        UserError: An unknown method, option or value; the message lists what there is.
    """
    need("hf", "transformers")
    from sparseattn.integrations.options import AttentionOptions

    flat: dict[str, Any] = {"method": method}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--option: expected name=value, got {pair!r}.")
        try:
            flat[name] = json.loads(value)
        except json.JSONDecodeError:
            flat[name] = value
    try:
        return AttentionOptions.from_dict(flat)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


@contextmanager
def sparse(model: Any, options: AttentionOptions) -> Iterator[None]:
    """Run a model with these options inside the block, and with what it had before after it."""
    sparseattn.register()
    before = model.config._attn_implementation
    model.set_attn_implementation("sparseattn")
    try:
        with sparseattn.options(**options.to_dict()):
            yield
    finally:
        model.set_attn_implementation(before)


def pick_device(name: str) -> torch.device:
    """``auto``, or a torch device name.

    Raises:
        UserError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, got {name!r}.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name!r} is not to be had here ({str(error).splitlines()[0]}).") from error
    return device


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (GPU)"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def settle_threads(device: torch.device) -> None:
    """Use one thread where others keep every core busy: several would wait for each other, many times slower."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > 1.5 * cores and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        notes.print(f"[yellow]This machine is busy[/] (load {load:.1f} on {cores} cores): using one thread.")


class Loaded(NamedTuple):
    """A model and how to speak to it; ``tokenizer`` None stands for plain bytes."""

    name: str
    model: Any
    tokenizer: Any

    def encode(self, text: str, chat: bool = False) -> Tensor:
        """Token ids int64 [1, L], on the CPU."""
        if self.tokenizer is None:
            return retrieval.encode(text)
        if chat:
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids

    def decode(self, tokens: Tensor) -> str:
        if self.tokenizer is None:
            return retrieval.decode(tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def load_model(name: str, device: torch.device, dtype: str = "auto") -> Loaded:
    """A shipped model by its name, or whatever ``from_pretrained`` takes: a folder or a hub id.

    Args:
        name: Model.
        device: Where to put it.
        dtype: ``auto`` (the checkpoint's on a GPU, float32 on a CPU) or a torch dtype's name.

    Raises:
        UserError: It cannot be loaded; the reason is that of Transformers.
        MissingExtra: Transformers is not installed.
    """
    need("hf", "transformers")
    import transformers

    shipped = name in models.names() and not Path(name).exists()
    source = str(models.path(name)) if shipped else name
    dtypes = {d: getattr(torch, d) for d in ("float32", "bfloat16", "float16")}
    if dtype not in ("auto", *dtypes):
        raise UserError(f"--dtype: expected auto, {', '.join(dtypes)}, got {dtype!r}.")
    chosen = dtypes.get(dtype, "auto" if device.type == "cuda" else torch.float32)
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=chosen, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"MODEL: expected a folder, a hub id or one of {', '.join(models.names())}, got {name!r}. "
            f"Transformers says: {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        transformers.utils.logging.enable_progress_bar()
    model = torch.nn.Module.to(model, device).eval()
    return Loaded(name, model, _tokenizer(source, config))


def _tokenizer(source: str, config: Any) -> Any:
    import transformers

    # Models of examples/train_retrieval.py read bytes and come without tokenizer files.
    if config.vocab_size == retrieval.VOCAB_SIZE:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"MODEL: {source!r} has no tokenizer that loads: {str(error).splitlines()[0]}") from error


def read_prompt(file: Path) -> str:
    """The text of a file, without the newline that editors put at the end.

    Raises:
        UserError: It cannot be read as UTF-8 text, or is empty.
    """
    try:
        text = file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file: expected a UTF-8 text file, got {str(file)!r} ({error}).") from error
    if not text:
        raise UserError(f"--prompt-file: expected some text, got an empty file {str(file)!r}.")
    return text


def check_writable(option: str, path: Path) -> None:
    """See that a file can be written before minutes are spent on what goes into it.

    Raises:
        UserError: It cannot.
    """
    there = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option}: cannot write {str(path)!r} ({error.strerror}).") from error


def make_folder(folder: Path) -> Path:
    """Create a folder for results.

    Raises:
        UserError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot create {str(folder)!r} ({error.strerror}).") from error
    return folder
