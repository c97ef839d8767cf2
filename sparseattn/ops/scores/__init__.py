"""What selectors are made of: block scores, and the choice of blocks from scores."""

from sparseattn.ops.scores.api import antidiagonal_scores, top_p_blocks, unsupported_reason, xattention_blocks
from sparseattn.ops.scores.problem import RowBounds, ScoreProblem, diagonal_blocks, row_bounds

__all__ = [
    "RowBounds",
    "ScoreProblem",
    "antidiagonal_scores",
    "diagonal_blocks",
    "row_bounds",
    "top_p_blocks",
    "unsupported_reason",
    "xattention_blocks",
]
