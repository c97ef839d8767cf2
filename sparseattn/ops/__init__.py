"""Operators: a folder a mathematical operation, with the reference that defines it and the kernels that are fast."""

from sparseattn.ops import lists as lists
