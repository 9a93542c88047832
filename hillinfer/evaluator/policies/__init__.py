"""The core's policies by name. Add a file here and a line below; every table, test and notebook then includes it."""

from hillinfer.evaluator.policies.full import Full
from hillinfer.evaluator.policies.oracle import Oracle
from hillinfer.evaluator.policies.random import Random
from hillinfer.evaluator.policies.streaming import Streaming
from hillinfer.evaluator.policies.topk import TopK
from hillinfer.evaluator.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "streaming": Streaming,
    "topk": TopK,
    "oracle": Oracle,
    "random": Random,
}
