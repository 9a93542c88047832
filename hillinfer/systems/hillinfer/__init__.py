"""HillInfer (arXiv 2602.18750): the drive that scores, the split between it and the host, CEC; and InstAttention."""
