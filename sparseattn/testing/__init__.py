"""What the test suite and the benchmarks are made of, for other people's too.

Inputs (random and structured), an oracle, the tolerance rule, NaN poison; further modules, imported by their names:
``sampled`` (the rule at any length), ``timing`` and ``baselines`` (what torch itself offers, to compare with).
"""

from sparseattn.testing.inputs import QKV as QKV
from sparseattn.testing.inputs import dense_attention as dense_attention
from sparseattn.testing.inputs import make_qkv as make_qkv
from sparseattn.testing.inputs import poison_unselected as poison_unselected
from sparseattn.testing.inputs import random_block_mask as random_block_mask
from sparseattn.testing.inputs import random_blocks as random_blocks
from sparseattn.testing.structured import structured_qkv as structured_qkv
from sparseattn.testing.tolerance import assert_close_to_oracle as assert_close_to_oracle
