"""Attention over listed blocks of keys: prefill and training."""

from sparseattn.ops.block_sparse.api import block_sparse_attention as block_sparse_attention
from sparseattn.ops.block_sparse.api import repeated_blocks as repeated_blocks
from sparseattn.ops.block_sparse.api import unsupported_reason as unsupported_reason
from sparseattn.ops.block_sparse.checks import IMPLEMENTATIONS as IMPLEMENTATIONS
from sparseattn.ops.block_sparse.repeat import RepeatedBlocks as RepeatedBlocks
