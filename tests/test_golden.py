"""Every system on every tier gives the tokens, hits, bytes and memory of the golden record, to the bit."""

import json

import pytest

from hillinfer import native
from tests.golden import RECORD, SETTINGS, TIERS, cases, differences, measure

OLD = json.loads(RECORD.read_text())
same_sums = pytest.mark.skipif(
    native.isa() != OLD["instruction set"], reason=f"recorded with {OLD['instruction set']}: sums may differ"
)


@same_sums
@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("tier", TIERS)
def test_nothing_differs(models, tier, how):
    chosen = [case for case in cases() if case[1:] == (tier, how)]
    found = {" ".join(case): measure(models("llama"), *case) for case in chosen}
    assert not differences({name: OLD["cases"][name] for name in found}, found)


def test_the_record_has_every_case():
    assert set(OLD["cases"]) == {" ".join(case) for case in cases()}
