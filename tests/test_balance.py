"""The closed form balances host and drive; a profile that cannot be used is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hillinfer
from hillinfer.pipeline.balance import Speeds

positive = st.floats(1e6, 1e12)


@given(fc=positive, fs=positive, bc=positive, bs=positive, alpha=st.floats(0.01, 1))
def test_both_sides_take_equally_long(fc, fs, bc, bs, alpha):
    speeds, code, record = Speeds(fc, fs, bc, bs), 1024, 4096
    share = speeds.host_share(alpha, code, record)
    host = share * (code / fc + alpha * record / bc)
    drive = (1 - share) * (code / fs + alpha * record / bs)
    assert 0 < share <= 1
    if share < 1 - 1e-9:
        assert host == pytest.approx(drive, rel=1e-4)


def test_a_worked_example():
    """Equal speeds on both sides are half and half; a drive that is half as fast holds a third."""
    assert Speeds(1e9, 1e9, 1e9, 1e9).beta(0.2, 1024, 4096) == 1
    assert Speeds(1e9, 0.5e9, 1e9, 0.5e9).host_share(0.2, 1024, 4096) == pytest.approx(2 / 3)


def test_a_profile_is_read_back_and_sets_the_pool(models, prompt, tmp_path):
    path, drive = tmp_path / "new" / "profile.toml", tmp_path / "drive"
    drive.mkdir()
    Speeds(3e9, 1e9, 3e9, 1e9).save(path, ["three to one"])
    assert Speeds.load(path) == Speeds(3e9, 1e9, 3e9, 1e9)
    model = models("llama")
    options = dict(alpha=0.1, drive=drive, drive_kind="emulated", profile=path)
    with hillinfer.make_cache(model, "hillinfer", **options) as cache:
        model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert cache.run.pool_tokens(1000) == 751
        assert "75%" in cache.run.why_split()
    with hillinfer.make_cache(model, "hillinfer", host_budget=2**18, **options) as cache:
        model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert cache.run.pool_tokens(1000) == 2**18 // (3 * 2 * 2 * 16 * 4)  # M0 caps it
    hillinfer.disable(model)


@pytest.mark.parametrize("text", ["", "fc = 1", "fc = 1\nfs = 0\nbc = 1\nbs = 1", "fc = [", "fc='a'\nfs=1\nbc=1\nbs=1"])
def test_a_bad_profile_names_the_command(tmp_path, text):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(hillinfer.UsageError, match="hillinfer profile"):
        Speeds.load(path)
