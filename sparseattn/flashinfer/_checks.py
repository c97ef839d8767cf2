"""What arguments by FlashInfer's names must be; nothing here waits for a device."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from sparseattn.errors import argument_error


def described(t: object) -> str:
    """The shape of a tensor, or the type of what is none."""
    return f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__


def check_dtype(name: str, t: Tensor, planned: torch.dtype) -> None:
    """Raise unless ``t`` has the dtype that the plan declared."""
    if t.dtype != planned:
        raise argument_error(name, f"{planned}, as planned", t.dtype, "Say the dtype in plan().", kind=TypeError)


def check_count(name: str, number: int, least: int) -> None:
    """Raise unless ``number`` is a whole one of at least ``least``."""
    if isinstance(number, bool) or not isinstance(number, int | torch.SymInt):
        raise argument_error(name, "a whole number", repr(number), kind=TypeError)
    if number < least:
        raise argument_error(name, f"a number of at least {least}", number)


def number_of(name: str, value: Any) -> float:
    """A finite float from any number, a tensor of one element included."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise argument_error(name, "a finite number", repr(value))
    return number


def check_heads(num_qo_heads: int, num_kv_heads: int) -> None:
    """Raise unless query heads are a positive multiple of KV heads."""
    for name, number in (("num_qo_heads", num_qo_heads), ("num_kv_heads", num_kv_heads)):
        check_count(name, number, 1)
    if num_qo_heads % num_kv_heads:
        raise argument_error("num_qo_heads", f"a multiple of num_kv_heads = {num_kv_heads}", num_qo_heads)


def check_output(name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """Raise unless ``t``, where a caller wants a result, is None or has this shape, dtype and ``like``'s device."""
    if t is None:
        return
    if t.dtype != dtype:
        raise argument_error(name, f"{dtype}", t.dtype, kind=TypeError)
    if tuple(t.shape) != tuple(shape) or t.device != like.device:
        raise argument_error(name, f"shape {tuple(shape)} on {like.device}", f"shape {tuple(t.shape)} on {t.device}")


def unsupported(hint: str, **arguments: object) -> None:
    """Raise if one of the arguments, which would change results and which nothing here serves, is given."""
    for name, value in arguments.items():
        if value is not None:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise argument_error(name, "None (not supported)", got, hint)


def readable(*tensors: Tensor) -> bool:
    """Whether contents can be looked at without waiting for a device, and are there at all."""
    return all(t.device.type == "cpu" for t in tensors) and not torch.compiler.is_compiling()


def check_indptr(name: str, indptr: Tensor, end: int | None = None) -> None:
    """Raise unless an ``indptr`` on the CPU ascends from 0, to at most ``end`` if that is given."""
    if not isinstance(indptr, Tensor) or indptr.dtype not in (torch.int32, torch.int64):
        got = indptr.dtype if isinstance(indptr, Tensor) else type(indptr).__name__
        raise argument_error(name, "an int32 tensor", got, kind=TypeError)
    if indptr.dim() != 1 or indptr.shape[0] < 1:
        raise argument_error(name, "[batch + 1]", f"shape {tuple(indptr.shape)}")
    if not readable(indptr):
        return
    bounds = indptr.tolist()
    if bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)):
        raise argument_error(name, "numbers that ascend from 0", bounds)
    if end is not None and bounds[-1] > end:
        raise argument_error(name, f"numbers of at most {end}", bounds[-1])


def check_last_pages(name: str, indptr: Tensor, last_page_len: Tensor, page_size: int) -> None:
    """Raise unless lengths of last pages on the CPU are 1..page_size, where there is a page."""
    check_count("page_size", page_size, 1)
    if not isinstance(last_page_len, Tensor) or last_page_len.dim() != 1 or last_page_len.dtype != torch.int32:
        got = (
            f"shape {tuple(last_page_len.shape)}" if isinstance(last_page_len, Tensor) else type(last_page_len).__name__
        )
        raise argument_error(name, "a flat int32 tensor", got, kind=TypeError)
    if last_page_len.shape[0] != indptr.shape[0] - 1:
        expected = f"shape ({indptr.shape[0] - 1},), one less than indptr"
        raise argument_error(name, expected, f"shape {tuple(last_page_len.shape)}")
    if not readable(indptr, last_page_len):
        return
    bounds = indptr.tolist()
    for b, length in enumerate(last_page_len.tolist()):
        if bounds[b] < bounds[b + 1] and not 1 <= length <= page_size:
            raise argument_error(name, f"1..{page_size}", f"{length} (request {b})")
