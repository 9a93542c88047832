"""Proofs of the kernel's small parts."""
