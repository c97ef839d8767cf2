"""``sparseattn doctor``: what works on this machine, what does not, and why."""

from __future__ import annotations

import json as json_format
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.markup import escape

import sparseattn

PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "matplotlib", "typer", "rich")
OLDEST = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17)}

OK, ABSENT, WARNING, BROKEN = "ok", "absent", "warning", "broken"
_SIGNS = {
    OK: "[green]ok[/]     ",
    ABSENT: "[dim]-[/]      ",
    WARNING: "[yellow]warning[/]",
    BROKEN: "[bold red]broken[/] ",
}


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        section: Heading.
        name: What was looked at.
        status: ``OK``, ``ABSENT`` (not here, and that is fine), ``WARNING`` or ``BROKEN``.
        detail: What was found, and what to do about it.
    """

    section: str
    name: str
    status: str
    detail: str


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Report versions, the GPU, and which implementations run here. Exit code 1 if something is broken."""
    findings = [*_versions(), *_device(), *_implementations(), *_registration(), *_conflicts()]
    if json:
        print(json_format.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        _report(findings)
    if any(finding.status == BROKEN for finding in findings):
        raise typer.Exit(1)


def _report(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            console.print(f"\n[bold]{section}[/]")
        console.print(f"  {_SIGNS[finding.status]} {finding.name:<24} {escape(finding.detail)}", soft_wrap=True)
    console.print()
    broken = [finding.name for finding in findings if finding.status == BROKEN]
    console.print(f"[bold red]Broken:[/] {', '.join(broken)}" if broken else "[green]Nothing is broken.[/]")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _versions() -> Iterator[Finding]:
    section = "Versions"
    yield Finding(section, "sparseattn", OK, sparseattn.__version__)
    yield Finding(section, "python", OK, f"{platform.python_version()} on {platform.platform(terse=True)}")
    for package in PACKAGES:
        version = _version(package)
        oldest = OLDEST.get(package)
        if version is None:
            yield Finding(section, package, ABSENT, "not installed")
        elif oldest is not None and _numbers(version) < oldest:
            wanted = ".".join(map(str, oldest))
            yield Finding(section, package, WARNING, f"{version}; older than {wanted}, the oldest that is tested")
        else:
            yield Finding(section, package, OK, version)


def _device() -> Iterator[Finding]:
    section = "Device"
    yield Finding(section, "cpu", OK, f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        yield Finding(section, "gpu", ABSENT, f"none ({why})")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        detail = f"{properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB"
        old = properties.major < 8
        yield Finding(
            section, f"gpu {index}", WARNING if old else OK, detail + ("; the Triton kernels need 8.0" if old else "")
        )


class Operator(NamedTuple):
    """An operator on a small problem.

    Attributes:
        name: Its folder, or what it is for.
        implementations: Whom to ask.
        unsupported: ``unsupported(impl)``: why it would not run, or None.
        call: ``call(impl)``: run it.
    """

    name: str
    implementations: tuple[str, ...]
    unsupported: Callable[[str], str | None]
    call: Callable[[str], Any]


def _operators(device: str) -> tuple[Operator, ...]:
    from sparseattn.ops import block_sparse, bsr, dispatch, merge, paged, scores

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k = (torch.randn(1, 128, heads, 64, device=device, dtype=dtype) for heads in (2, 1))
    numbers = torch.arange(9, dtype=torch.int32, device=device)
    pages = k.view(8, 16, 1, 64)
    cache = paged.PagedCache(pages, pages, torch.full_like(numbers[:1], 128), numbers[None, :8])
    token, lse = q[0, :1], torch.zeros((2, 1), device=device)
    rows = bsr.make_rows(numbers, 4 * numbers[:8], (16, 4), seq_lens=(128, 128))
    portable, everything = dispatch.IMPLEMENTATIONS, block_sparse.IMPLEMENTATIONS
    return (
        Operator(
            "block_sparse", everything, lambda impl: block_sparse.unsupported_reason(q, k, k, impl=impl),
            lambda impl: block_sparse.block_sparse_attention(q, k, k, impl=impl),
        ),
        Operator(
            "paged", paged.IMPLEMENTATIONS, lambda impl: paged.unsupported_reason(token, cache, impl=impl),
            lambda impl: paged.paged_attention(token, cache, impl=impl),
        ),
        Operator(
            "bsr", everything, lambda impl: bsr.unsupported_reason(q, k, k, rows, impl=impl),
            lambda impl: bsr.attend_rows(q, k, k, rows, impl=impl),
        ),
        Operator(
            "merge", portable, lambda impl: merge.unsupported_reason(token, impl),
            lambda impl: merge.merge_state(token, lse, token, lse, impl=impl),
        ),
        Operator(
            "landmark", everything, lambda impl: scores.unsupported_landmark_reason(q, k, impl=impl),
            lambda impl: sparseattn.landmark(q, k, impl=impl),
        ),
        Operator(
            "scores", portable, lambda impl: scores.unsupported_reason(q, k, impl=impl),
            lambda impl: sparseattn.xattention(q, k, impl=impl),
        ),
    )  # fmt: skip


def _implementations() -> Iterator[Finding]:
    """Ask every implementation of every operator whether it would run, and let those that would run."""
    section = "Implementations"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for operator in _operators(device):
        for impl in operator.implementations:
            line = f"{operator.name}, {impl}"
            reason = _attempt(partial(operator.unsupported, impl))
            if isinstance(reason, Exception):
                yield Finding(section, line, BROKEN, f"asking it failed: {_first_line(reason)}")
            elif reason is not None:
                # Hopper's kernels are one chip's, but without Triton a GPU has nothing that runs at speed.
                status = WARNING if device == "cuda" and impl == "triton" else ABSENT
                yield Finding(section, line, status, reason)
            else:
                failure = _attempt(partial(operator.call, impl))
                broken = isinstance(failure, Exception)
                detail = f"failed: {_first_line(failure)}" if broken else f"runs on {device}"
                yield Finding(section, line, BROKEN if broken else OK, detail)


def _attempt(call: Any) -> Any:
    """The result of a call, or what it raised: a report must come out whatever is broken."""
    try:
        return call()
    except Exception as error:
        return error


def _first_line(error: Any) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _registration() -> Iterator[Finding]:
    section = "Transformers"
    if _version("transformers") is None:
        yield Finding(section, "registration", ABSENT, "transformers is not installed: pip install 'sparseattn[hf]'")
        return
    failure = _attempt(lambda: import_module("sparseattn.hf"))
    if isinstance(failure, Exception):
        yield Finding(section, "registration", BROKEN, f"import sparseattn.hf failed: {_first_line(failure)}")
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    from sparseattn.integrations.options import implementation_name, method_names

    expected = {implementation_name(method) for method in (None, *method_names())}
    for name, registry in (("attention", AttentionInterface()), ("masks", AttentionMaskInterface())):
        missing = expected - set(registry.valid_keys())
        yield Finding(
            section,
            name,
            BROKEN if missing else OK,
            f"missing: {', '.join(sorted(missing))}" if missing else f"registered: {', '.join(sorted(expected))}",
        )


def _conflicts() -> Iterator[Finding]:
    section = "Known conflicts"
    found = False
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        found = True
        yield Finding(
            section,
            "TRITON_INTERPRET",
            WARNING,
            "is set: Triton kernels run in its interpreter, thousands of times slower",
        )
    if torch.cuda.is_available() and torch.version.hip is not None:
        found = True
        yield Finding(section, "ROCm", WARNING, "the kernels are not tested on AMD GPUs")
    triton = _version("triton")
    if torch.cuda.is_available() and triton is None:
        found = True
        yield Finding(section, "triton", BROKEN, "is not installed: on a GPU nothing runs at speed without it")
    if not found:
        yield Finding(section, "none", OK, "no known conflict")
