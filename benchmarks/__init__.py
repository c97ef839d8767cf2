"""Benchmarks: a row is data with its environment, and every row passed a correctness gate before it was timed."""
