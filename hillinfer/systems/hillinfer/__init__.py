"""HillInfer (arXiv 2602.18750): the drive that scores (emulated, or a SmartSSD), balance, CEC; and InstAttention."""
