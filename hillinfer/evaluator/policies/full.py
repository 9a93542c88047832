"""Every token, every step: the reference that the others are judged by."""

from hillinfer.evaluator.policy import Policy


class Full(Policy):
    """Every token, every step."""

    selects = needs_codes = False
