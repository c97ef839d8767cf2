"""Scores of some query blocks at a time, so that those of all never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

#: Memory for scores where any number of rows at a time will do.
WORKSPACE_BYTES = 512 << 20
#: Memory for all scores of a call that needs them several times over. Above it they are computed anew each time.
WHOLE_BYTES = 1 << 30


class ScoreChunks:
    """All rows of scores, from the first, ``step`` at a time; may be gone through more than once.

    Args:
        score: ``score(first, rows)`` gives the scores ``[B, H, rows, NB]`` of the query blocks from ``first`` on; they
            hold until the next call.
        rows: MB.
        step: Rows of a chunk. All of them: scores are computed once.
    """

    def __init__(self, score: Callable[[int, int], Tensor], rows: int, step: int) -> None:
        self.score, self.rows, self.step = score, rows, max(1, step)
        self._only: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, scores) of each chunk."""
        if self.step >= self.rows:
            if self._only is None:
                self._only = self.score(0, self.rows)
            yield 0, self._only
            return
        for first in range(0, self.rows, self.step):
            yield first, self.score(first, min(self.step, self.rows - first))


def chunk_rows(rows: int, row_bytes: int, whole: bool) -> int:
    """Rows of a chunk: all if they fit, else equally many each, since a short last chunk would idle the GPU.

    Args:
        rows: MB.
        row_bytes: Of the scores of one query block, all heads and sequences.
        whole: The scores are needed several times over.
    """
    if whole and rows * row_bytes <= WHOLE_BYTES:
        return max(1, rows)
    fit = max(1, WORKSPACE_BYTES // max(1, row_bytes))
    return -(-rows // max(1, -(-rows // fit)))
