"""The closed form balances host and drive; unusable profiles are rejected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hillinfer
from hillinfer.systems.hillinfer.balance import SelectionRates, Speeds
from hillinfer.systems.hillinfer.profile import THIS, Profile, Rate

positive = st.floats(1e6, 1e12)


def write(path, speeds: Speeds):
    """A profile of this machine with these speeds."""
    numbers = dict(cpu_score=speeds.fc, emulated_score=speeds.fs, cpu_gather=speeds.bc, emulated_fetch=speeds.bs)
    parts = {"cpu": ("memory", "bandwidth", "flops"), "drive": ("read", "write")}
    rates = {part: {name: Rate((1e9,), "assumed: a test") for name in names} for part, names in parts.items()}
    return Profile(THIS, "a test", rates).with_numbers(THIS, **numbers).save(path)


@given(fc=positive, fs=positive, bc=positive, bs=positive, alpha=st.floats(0.01, 1))
def test_the_papers_form_lets_both_sides_take_equally_long(fc, fs, bc, bs, alpha):
    speeds, code, record = Speeds(fc, fs, bc, bs), 1024, 4096
    beta = speeds.beta(alpha, code, record)
    host = beta * (code / fc + alpha * record / bc)
    assert host == pytest.approx(code / fs + alpha * record / bs, rel=1e-6)


@given(fc=positive, fs=positive, bc=positive, bs=positive, host=st.floats(0.01, 1), drive=st.floats(0.01, 1))
def test_no_share_is_faster_than_the_chosen_one(fc, fs, bc, bs, host, drive):
    speeds, chosen = Speeds(fc, fs, bc, bs), SelectionRates(host, drive)
    best = speeds.step_seconds(speeds.host_share(chosen, 1024, 4096), chosen, 1024, 4096)
    assert all(speeds.step_seconds(i / 50, chosen, 1024, 4096) >= best * (1 - 1e-9) for i in range(51))


def test_worked_examples():
    """Equal speeds on both sides are half and half by the paper; a drive that is half as fast holds a third.

    Where both sides score before either sends: a side's share is its scoring speed's, unless transfers decide.
    """
    assert Speeds(1e9, 1e9, 1e9, 1e9).beta(0.2, 1024, 4096) == 1
    assert Speeds(1e9, 0.5e9, 1e9, 0.5e9).beta(0.2, 1024, 4096) == pytest.approx(2)
    assert Speeds(1e9, 3e9, 1e9, 1e9).host_share(SelectionRates(0.1, 0.1), 1024, 4096) == pytest.approx(0.25)
    slow = Speeds(1e9, 3e9, 1e9, 1e8)  # sending costs more than scoring
    assert slow.host_share(SelectionRates(0.1, 0.1), 1024, 4096) == 1
    assert slow.host_share(SelectionRates(0.1, 0.01), 1024, 4096) == pytest.approx(0.25)


def test_a_profile_is_read_back_and_sets_the_pool(models, prompt, tmp_path):
    path, drive = tmp_path / "new" / "profile.toml", tmp_path / "drive"
    drive.mkdir()
    assert Profile.load(write(path, Speeds(3e9, 1e9, 3e9, 3e9))).speeds(4096) == Speeds(3e9, 1e9, 3e9, 3e9)
    model = models("llama")
    options = dict(alpha=0.1, drive=drive, drive_kind="emulated", profile=path)
    with hillinfer.make_cache(model, "hillinfer", **options) as cache:
        model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert cache.run.pool_tokens(1000) == 751
        assert "75%" in cache.run.why_split()
    with hillinfer.make_cache(model, "hillinfer", host_budget=2**18, **options) as cache:
        model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert cache.run.pool_tokens(1000) == 2**18 // (3 * 2 * 2 * 16 * 4)  # M0 caps it


@pytest.mark.parametrize("text", ["", "fc = 1", "fc = 1\nfs = 0\nbc = 1\nbs = 1", "fc = [", "fc='a'\nfs=1\nbc=1\nbs=1"])
def test_a_bad_profile_names_the_command(tmp_path, text):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(hillinfer.UsageError, match="hillinfer profile"):
        Profile.load(path)


def test_the_split_follows_what_is_selected(models, prompt, tmp_path):
    """Cold tokens are hardly selected: the pool shrinks to its share of the scoring, and answers stay the same."""
    path, drive = tmp_path / "profile.toml", tmp_path / "drive"
    drive.mkdir()
    write(path, Speeds(1e9, 3e9, 1e9, 1e8))  # with alpha from both sides all belongs in memory
    model, answers = models("llama"), []
    for split in ("shortest", "paper"):
        options = dict(alpha=0.1, drive=drive, drive_kind="emulated", profile=path, split=split)
        with hillinfer.make_cache(model, "hillinfer", **options) as cache:
            cache.run.chosen = SelectionRates(0.1, 0.001)
            out = model.generate(prompt, past_key_values=cache, max_new_tokens=24, do_sample=False)
            answers.append(out.tolist())
            sizes = [len(layer.layer.store.pools[0].token_of) for layer in cache.layers]
            n = cache.get_seq_length()
            if split == "paper":
                share = (beta := cache.run.speeds.beta(0.1, 32, 256)) / (1 + beta)
                assert sizes == [int(share * n) + 1] * 3
            else:
                assert cache.run.chosen != SelectionRates(0.1, 0.001)  # corrected on the way
                assert "in the last steps" in cache.run.why_split()
    assert answers[0] == answers[1]
