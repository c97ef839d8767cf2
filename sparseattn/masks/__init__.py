"""Block masks: the format in which selectors say what operators compute, and its kin of variable blocks."""

from sparseattn.masks.block_mask import BlockMask as BlockMask
from sparseattn.masks.variable import VariableBlockMask as VariableBlockMask

__all__ = ["BlockMask", "VariableBlockMask"]
