"""Block masks: the one format in which selectors say what operators compute."""

from sparseattn.masks.block_mask import BlockMask as BlockMask

__all__ = ["BlockMask"]
