"""InstAttention (arXiv 2409.04992, first called InstInfer), its dense form: the drive attends to all that it holds.

Its sparse form (SparF) is not here. On a drive that only stores, and in memory, this is full attention.
"""

from hillinfer.evaluator.policies.full import Full


class InstAttention(Full):
    """Exact attention, computed by the drive over its own keys and values."""

    in_drive = True
