"""Published methods that are a policy and no more, by name."""

from hillinfer.evaluator.policy import Policy
from hillinfer.systems.baselines.h2o import H2O
from hillinfer.systems.baselines.infinigen import InfiniGen
from hillinfer.systems.baselines.quest import Quest
from hillinfer.systems.baselines.snapkv import SnapKV

BASELINES: dict[str, type[Policy]] = {"h2o": H2O, "snapkv": SnapKV, "quest": Quest, "infinigen": InfiniGen}
