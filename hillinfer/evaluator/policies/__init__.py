"""The core's policies by name. Add a file here and a line below; every table, test and notebook then includes it."""

from hillinfer.evaluator.policies.full import Full
from hillinfer.evaluator.policies.topk import TopK
from hillinfer.evaluator.policy import Policy

POLICIES: dict[str, type[Policy]] = {"full": Full, "topk": TopK}
