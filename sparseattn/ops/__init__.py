"""Operators: one folder a mathematical operation, each with a reference that defines it and the kernels that do it fast."""
