"""From which length of prompt on selecting blocks costs no more than it saves, by method and device.

``break_even.json`` holds what was measured, ``{device: {method: tokens}}``: prefill by a method with its defaults
against dense attention, 32 query and 8 KV heads of 128, batch 1, bfloat16 (the set ``short`` of
``benchmarks.selectors``; ``python -m benchmarks.report --break-even`` writes the file from its rows). Where nobody
measured, lengths are assumed on the safe side: ``ASSUMED``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

DATA = Path(__file__).with_name("break_even.json")
#: Tokens by device where nothing was measured. On a GPU selecting is a dozen launches, and dense attention over a few
#: thousand tokens takes no longer than those; elsewhere the PyTorch reference selects and attends.
ASSUMED = {"cuda": 8192}
_ELSEWHERE = 1024
#: Calls of fewer queries never select: the rows of blocks do not fill a device, and every key is looked at for them.
LEAST_QUERIES = 1024


@functools.cache
def measured() -> dict[str, dict[str, int]]:
    """The table that ships with the package."""
    found: dict[str, dict[str, int]] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


@torch._dynamo.assume_constant_result
def tokens(method: str, device: torch.device) -> int:
    """The shortest prompt for which a method selects blocks on a device."""
    known = measured().get(_name(device), {})
    return known.get(method, ASSUMED.get(device.type, _ELSEWHERE))


@torch._dynamo.assume_constant_result
def reason(method: str, device: torch.device) -> str:
    """Why a call below the break-even is dense, as its record says."""
    name = _name(device)
    how = "measured" if method in measured().get(name, {}) else "assumed"
    return f"below the break-even of {method} on {name}, {tokens(method, device)} tokens ({how})"


def pays(least: int, q_len: int, k_len: int, causal: bool) -> bool:
    """Whether a call is worth selecting for where prompts of ``least`` tokens are.

    A chunk of a long prompt has few queries and many keys. It is judged by its work: it needs at least as many pairs of
    a query and a key that it sees as the shortest whole prompt that pays, and no fewer than ``LEAST_QUERIES`` queries.

    Example:
        >>> pays(8192, 2048, 4096, causal=True), pays(8192, 2048, 65536, causal=True)
        (False, True)

    Args:
        least: Tokens, as :func:`tokens` gives them.
        q_len: Queries of a sequence.
        k_len: Its keys, those of earlier chunks included.
        causal: Whether query i sees keys up to ``i + k_len - q_len`` alone.
    """
    if q_len < min(least, LEAST_QUERIES):
        return False
    rows = min(q_len, k_len)
    pairs = rows * k_len - rows * (rows - 1) // 2 if causal else q_len * k_len
    return pairs >= least * (least + 1) // 2


def _name(device: torch.device) -> str:
    """A device as the table names it: GPUs by their product."""
    return _gpu_name(device.index) if device.type == "cuda" else device.type


@functools.cache
def _gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)
