"""Full attention: the reference for all others."""

from hillinfer.evaluator.policy import Policy


class Full(Policy):
    """Every token, every step."""

    selects = needs_codes = False
