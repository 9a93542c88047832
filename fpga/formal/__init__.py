"""Formal proofs of the kernel's building blocks."""
