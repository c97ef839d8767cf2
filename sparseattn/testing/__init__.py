"""What the test suite is made of, for other people's tests too: inputs, an oracle, the tolerance rule, NaN poison."""

from sparseattn.testing.inputs import QKV as QKV
from sparseattn.testing.inputs import dense_attention as dense_attention
from sparseattn.testing.inputs import make_qkv as make_qkv
from sparseattn.testing.inputs import poison_unselected as poison_unselected
from sparseattn.testing.inputs import random_block_mask as random_block_mask
from sparseattn.testing.tolerance import assert_close_to_oracle as assert_close_to_oracle
