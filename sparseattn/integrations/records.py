"""What the attention calls inside a ``with record()`` block did: method, density, time, and how faithful they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseattn import fidelity
from sparseattn.errors import argument_error
from sparseattn.masks import BlockMask

Select = Callable[[], BlockMask] | None
Attend = Callable[..., Any]
Bounds = Callable[[BlockMask], fidelity.RecallBounds]

#: What ``record(fidelity=...)`` takes.
FIDELITY = (False, True, "bounds")


@dataclass
class CallRecord:
    """One attention call. Reading a number waits for the device; until then nothing does.

    Attributes:
        layer: The module's ``layer_idx``, or None.
        method: What ran: a selector's name or ``"dense"``.
        reason: Why a call ran dense although the method is another; None otherwise.
        q_len: Query rows of the call (of all sequences together when packed).
        k_len: Key rows, including the unused tail of a static cache.
        landmarks: With method "landmark": how many complete blocks of keys had landmarks from earlier calls with the
            same cache ("12 of 16 blocks kept"), or why all were computed. None for other methods.
        mask: The selected blocks, kept under ``record(masks=True)``.
        heads: Density, recall (mean, 5th percentile, worst row), deficit and output error of every query head, under
            ``record(fidelity=True)``; with ``fidelity="bounds"`` also what random and the best blocks would keep. None
            for dense calls.
    """

    layer: int | None
    method: str
    q_len: int
    k_len: int
    reason: str | None = None
    landmarks: str | None = None
    mask: BlockMask | None = None
    heads: fidelity.HeadFidelity | None = None
    _density: Tensor | None = field(default=None, repr=False)
    _recall: Tensor | float | None = field(default=None, repr=False)
    _output_error: Tensor | float | None = field(default=None, repr=False)
    _selection: Stopwatch | None = field(default=None, repr=False)
    _attention: Stopwatch | None = field(default=None, repr=False)

    def run(
        self,
        recorder: Recorder,
        device: torch.device,
        select: Select,
        attend: Attend,
        bounds: Bounds | None = None,
        corrected: bool = False,
    ) -> Tensor:
        """Make the call this record is about, and note what the recorder asks for.

        Args:
            recorder: Where the record goes.
            device: Of the tensors.
            select: Chooses the blocks; None for a call that is to run dense.
            attend: ``attend(mask, return_lse=..., mean_correction=...)``, the operator on this call's tensors.
            bounds: ``recall_bounds`` of this call's tensors.
            corrected: Means stand for skipped blocks in ``attend`` unless it is told otherwise. They are no recall.

        Returns:
            The attention output.
        """
        selection, attention = Stopwatch(device), Stopwatch(device)
        mask = None if select is None else selection.run(select)
        if recorder.fidelity and mask is not None:
            out, lse = attention.run(lambda: attend(mask, return_lse=True))
            with torch.no_grad():
                dense, dense_lse = attend(None, return_lse=True)
                if corrected:
                    _, lse = attend(mask, return_lse=True, mean_correction=False)
                self._recall = torch.exp(-fidelity.deficit_from_lse(lse, dense_lse)).nanmean()
                self._output_error = fidelity.relative_error(out, dense)
                self.heads = fidelity.head_statistics(mask, lse, dense_lse, (out, dense))
                if recorder.fidelity == "bounds" and bounds is not None:
                    self.heads = self.heads.with_bounds(bounds(mask))
        else:
            out = attention.run(lambda: attend(mask))
            if recorder.fidelity:
                self._recall, self._output_error = 1.0, 0.0
        if mask is not None:
            self._density = mask.densities().mean()
            self.mask = mask if recorder.masks else None
        if recorder.timing:
            self._selection, self._attention = selection, attention
        recorder.calls.append(self)
        return out

    @property
    def density(self) -> float:
        """Computed share of the causally visible blocks, mean over sequences and heads; 1 for dense calls."""
        return 1.0 if self._density is None else float(self._density)

    @property
    def recall(self) -> float | None:
        """Mean attention mass that the selected blocks hold, in [0, 1]; None unless ``record(fidelity=True)``."""
        return None if self._recall is None else float(self._recall)

    @property
    def output_error(self) -> float | None:
        """Relative L2 distance of the output from dense attention's; None unless ``record(fidelity=True)``."""
        return None if self._output_error is None else float(self._output_error)

    @property
    def selection_seconds(self) -> float | None:
        """Time of choosing the blocks; 0 for dense calls, None unless ``record(timing=True)``."""
        return None if self._selection is None else self._selection.seconds

    @property
    def attention_seconds(self) -> float | None:
        """Time of the operator; None unless ``record(timing=True)``."""
        return None if self._attention is None else self._attention.seconds

    @property
    def seconds(self) -> float | None:
        """Selection and attention together; None unless ``record(timing=True)``."""
        if self._selection is None or self._attention is None:
            return None
        return self._selection.seconds + self._attention.seconds

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain, JSON-able values."""
        names = ("layer", "method", "reason", "landmarks", "q_len", "k_len", "density", "recall", "output_error")
        return {name: getattr(self, name) for name in (*names, "selection_seconds", "attention_seconds", "seconds")}


@dataclass(frozen=True)
class Recorder:
    """What the attention function is asked to note, and where."""

    calls: list[CallRecord]
    timing: bool
    masks: bool
    fidelity: bool | str


@contextmanager
def record(*, timing: bool = False, masks: bool = False, fidelity: bool | str = False) -> Iterator[list[CallRecord]]:
    """Collect one ``CallRecord`` per attention call of this library's Transformers functions.

    Calls inside compiled regions are not recorded, nor those that gradient checkpointing repeats in the backward pass.

    Example:
        >>> with record() as calls:
        ...     model(input_ids)
        >>> sum(call.density for call in calls) / len(calls)

    Args:
        timing: Measure time as well: CUDA events on a GPU (no synchronisation until read), a clock elsewhere.
        masks: Keep each sparse call's ``BlockMask`` in its record. Memory grows with the number of calls.
        fidelity: Run dense attention beside every sparse call and note recall and output error, of the call and of
            every head. ``"bounds"`` adds what random and the best blocks would keep, by all scores in plain PyTorch.
            For studying short runs: it costs more than the dense model.

    Yields:
        The list, filled while the block runs; usable after it.

    Raises:
        ValueError: Another ``fidelity``.
    """
    if fidelity not in FIDELITY:
        raise argument_error("fidelity", f"one of {FIDELITY}", repr(fidelity))
    calls: list[CallRecord] = []
    token = _recorder.set(Recorder(calls, timing, masks, fidelity))
    try:
        yield calls
    finally:
        _recorder.reset(token)


def current() -> Recorder | None:
    """The innermost recorder in force."""
    return _recorder.get()


_recorder: ContextVar[Recorder | None] = ContextVar("sparseattn_recorder", default=None)


class Stopwatch:
    """Time of one function call on a device. On a GPU ``seconds`` waits for it; calling does not."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def run(self, call: Callable[[], Any]) -> Any:
        self._mark()
        result = call()
        self._mark()
        return result

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        if not self._marks:
            return 0.0
        start, end = self._marks
        if self._cuda:
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        return end - start
