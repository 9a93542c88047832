"""Twelve unlike model families with every system; `make families` runs all that transformers has."""

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.families import verdict
from benchmarks.family_checks import Family, Script, SystemCheck, check
from benchmarks.tiny_models import names, table

OLDER = Version(transformers.__version__) < Version("5.23")
SHORT = Script(prompt=60, steps=6, turn=5, more=2, crop=6, padding=20)
FAMILIES = (
    "llama",
    "qwen3_moe",
    "qwen3_next",  # gated delta-net layers between
    "gemma3_text",
    "gemma4_text",  # layers of unequal head dims
    "gpt_oss",  # attention sinks
    "deepseek_v3",  # latent attention
    "ministral@mixed",
    "olmo3",
    "gpt2",
    "qwen2_5_vl",
    "granitemoehybrid",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    if name.partition("@")[0] not in CONFIG_MAPPING:
        pytest.skip("not in this release of transformers")
    outcome = check(name, SHORT)
    said, why = verdict(outcome)
    if OLDER and said in ("refused", "not tested"):  # hybrids had cache classes of their own
        pytest.skip(why)
    assert said == "equal", why
    hillinfer = outcome["exact"]["hillinfer"]
    assert hillinfer["drive"] > 0.8  # so the equality is about the drive
    assert not hillinfer["said"], "looking ahead turned itself off"


def test_the_checks_notice_a_lost_token():
    """A selection's logits are not those of full attention, so the tolerance is not too wide."""
    family = Family("llama", SHORT)
    selecting = SystemCheck(family, "streaming", 0.2, {})
    selecting.exact = True
    assert any("WRONG" in fault for fault in selecting.run()["faults"])


def test_overrides_name_registered_families():
    unknown = {name for name in table()["overrides"] if name.partition("@")[0] not in CONFIG_MAPPING}
    assert (OLDER or not unknown) and len(names()) > (150 if OLDER else 200)
