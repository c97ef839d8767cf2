"""What selectors are made of: block scores, and the choice of blocks from scores."""

from sparseattn.ops.scores.api import antidiagonal_scores, top_p_blocks, unsupported_reason, xattention_blocks
from sparseattn.ops.scores.flexprefill import flexprefill_blocks
from sparseattn.ops.scores.landmark import (
    landmark_blocks,
    landmark_features,
    landmark_scores,
    unsupported_landmark_reason,
)
from sparseattn.ops.scores.landmark_problem import LandmarkFeatures, LandmarkProblem
from sparseattn.ops.scores.minference import HeadBudget, minference_blocks
from sparseattn.ops.scores.pooled import pool_pages, pooled_blocks, pooled_scores, pooled_unsupported_reason
from sparseattn.ops.scores.problem import RowBounds, ScoreProblem, diagonal_blocks, row_bounds
from sparseattn.ops.scores.rules import choose_blocks
from sparseattn.ops.scores.rules_problem import Forced, Rule
from sparseattn.ops.scores.vertical_slash import coverage_counts, largest, last_query_mass

__all__ = [
    "Forced",
    "HeadBudget",
    "LandmarkFeatures",
    "LandmarkProblem",
    "RowBounds",
    "Rule",
    "ScoreProblem",
    "antidiagonal_scores",
    "choose_blocks",
    "coverage_counts",
    "diagonal_blocks",
    "flexprefill_blocks",
    "landmark_blocks",
    "landmark_features",
    "landmark_scores",
    "largest",
    "last_query_mass",
    "minference_blocks",
    "pool_pages",
    "pooled_blocks",
    "pooled_scores",
    "pooled_unsupported_reason",
    "row_bounds",
    "top_p_blocks",
    "unsupported_landmark_reason",
    "unsupported_reason",
    "xattention_blocks",
]
