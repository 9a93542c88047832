"""The policies by name. Add a file here and a line below; every table, test and notebook then includes it."""

from hillinfer.evaluator.policies.full import Full
from hillinfer.evaluator.policies.h2o import H2O
from hillinfer.evaluator.policies.infinigen import InfiniGen
from hillinfer.evaluator.policies.oracle import Oracle
from hillinfer.evaluator.policies.quest import Quest
from hillinfer.evaluator.policies.random import Random
from hillinfer.evaluator.policies.snapkv import SnapKV
from hillinfer.evaluator.policies.streaming import Streaming
from hillinfer.evaluator.policies.topk import TopK
from hillinfer.evaluator.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "streaming": Streaming,
    "topk": TopK,
    "oracle": Oracle,
    "random": Random,
    "h2o": H2O,
    "snapkv": SnapKV,
    "quest": Quest,
    "infinigen": InfiniGen,
}
