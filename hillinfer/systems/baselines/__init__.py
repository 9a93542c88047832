"""Published methods that are a policy and no more, and controls, by name."""

from hillinfer.evaluator.policy import Policy
from hillinfer.systems.baselines.h2o import H2O
from hillinfer.systems.baselines.infinigen import InfiniGen
from hillinfer.systems.baselines.oracle import Oracle
from hillinfer.systems.baselines.quest import Quest
from hillinfer.systems.baselines.random import Random
from hillinfer.systems.baselines.snapkv import SnapKV
from hillinfer.systems.baselines.streaming import Streaming

BASELINES: dict[str, type[Policy]] = {
    **{"streaming": Streaming, "oracle": Oracle, "random": Random},
    **{"h2o": H2O, "snapkv": SnapKV, "quest": Quest, "infinigen": InfiniGen},
}
