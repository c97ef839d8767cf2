"""``flashinfer.sparse``: block-sparse attention, with blocks of one size and of any sizes."""

from sparseattn.flashinfer.block_sparse import BlockSparseAttentionWrapper as BlockSparseAttentionWrapper
from sparseattn.flashinfer.block_sparse import convert_bsr_mask_layout as convert_bsr_mask_layout
from sparseattn.flashinfer.variable import (
    VariableBlockSparseAttentionWrapper as VariableBlockSparseAttentionWrapper,
)
