"""Profiles: all bundled ones are valid, every number has a source, and invalid ones are rejected with the fix."""

import pytest

from hillinfer import UsageError
from hillinfer.systems.hillinfer.profile import THIS, Cost, Profile, Rate, check_replaceable
from hillinfer.whatif.devices import find_profile, list_profiles

SHIPPED = ["h200", "laptop-igpu", "rtx4090-gen4-nvme", "rtx4090-smartssd", "rtx5060ti-16gb-gen5"]


def test_these_ship():
    assert list_profiles() == [*SHIPPED, THIS]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile(name, tmp_path):
    profile = find_profile(name)
    assert profile.name == name and profile.about
    assert sum(profile.sources().values()) == sum(map(len, profile.parts.values()))
    for path in ("drive.read", "drive.read_one", "drive.write", "link.to_gpu", "link.from_gpu"):
        part, number = path.split(".")
        blocks = profile.parts[part][number].blocks
        assert (blocks[0], blocks[-1]) == (4 << 10, 128 << 20), path
        rates = [profile.get(path, 4096 << i) for i in range(16)]
        assert rates == pytest.approx(sorted(rates)), path  # a larger piece is never slower
    assert profile.get("drive.read_one", 4096) < profile.get("drive.read_one", 128 << 20) / 10
    assert Profile.load(profile.save(tmp_path / "copy.toml")) == profile


def test_this_drive_is_measured_by_size(tmp_path, monkeypatch):
    from hillinfer.whatif import measure

    monkeypatch.setattr(measure, "BLOCKS", (4096, 1 << 16, 1 << 22))
    found = measure._drive(tmp_path)
    assert set(found) == {"read", "read_one", "write"} and not list(tmp_path.iterdir())
    for name, rate in found.items():
        assert rate.blocks == (4096, 1 << 16, 1 << 22)
        assert rate.values[0] < rate.values[-1] and rate.source.startswith("measured: "), name


def test_between_points_a_curve_is_straight_in_logarithms():
    rate = Rate((1e6, 1e8), "measured: here", (4096.0, 4096.0 * 256))
    assert rate.at(4096 * 16) == pytest.approx(1e7)
    assert rate.at(1) == pytest.approx(1e6) and rate.at(1e12) == rate.at() == 1e8


def test_a_measured_cost():
    cost = Cost((10, 1000), (1e-5, 1e-3))
    assert cost.at(1) == cost.at(10) == 1e-5  # a call takes at least that
    assert cost.at(100) == pytest.approx(1e-4)
    assert Cost((10, 1000), (5e-4, 1e-3)).at(505) == pytest.approx(7.5e-4)  # a fixed part and one that grows
    assert cost.at(3000) == pytest.approx(3e-3) and cost.at(2000, calls=2) == pytest.approx(2e-3)


def test_what_if():
    profile = find_profile("rtx4090-smartssd")
    other = profile.with_numbers("twice", drive_read=6.4e9, link_to_gpu=profile.parts["link"]["to_gpu"])
    assert other.get("drive.read", 4096) == 6.4e9 and profile.get("drive.read", 1 << 30) == 3.2e9
    assert other.name == "twice" and other.parts["drive"]["read"].source.startswith("assumed")


GOOD = """
name = "a"
about = "b"
[cpu]
memory = { value = 1e9, source = "measured: x" }
bandwidth = { value = 1e9, source = "measured: x" }
flops = { value = 1e9, source = "measured: x" }
[drive]
read = { block = [4096, 8192], rate = [1e8, 2e8], source = "published: x" }
write = { value = 1e9, source = "assumed: x" }
[kinds]
"full.dense" = { size = [10, 1000], seconds = [1e-5, 1e-3], source = "measured: x" }
"""


def test_a_small_one(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(GOOD)
    profile = find_profile(path)
    assert profile.sources() == {"measured": 4, "published": 1, "assumed": 1}
    assert profile.kinds == {"full.dense": Cost((10, 1000), (1e-5, 1e-3), "measured: x")}
    assert profile.score_rate == 1e9 and profile.gather_rate == 5e8
    with pytest.raises(KeyError, match=r"profile a has no gpu\.flops"):
        profile.get("gpu.flops")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "a"', "", 'add name = "..."'),
        (', source = "published: x"', "", "drive.read has no source"),
        ("published: x", "somewhere", "the source of drive.read must begin with one of measured:"),
        ("{ value = 1e9, source = \"assumed: x\" }", "1e9", "drive.write has no source"),
        ("value = 1e9, source = \"assumed", "value = -1, source = \"assumed", "must have numbers above zero"),
        ("value = 1e9, source = \"assumed", "value = true, source = \"assumed", "must have numbers above zero"),
        ("value = 1e9, source = \"assumed", "valeu = 1e9, source = \"assumed", "drive.write must be { value, source }"),
        ("[4096, 8192]", "[8192, 4096]", "drive.read needs its block in ascending order"),
        ("[4096, 8192]", "[4096]", "with block and rate lists of the same length"),
        ("[drive]", "[disk]", "no part 'disk'"),
        ("flops", "flop", "[cpu] lacks flops"),
        ("write =", "speed = { value = 1, source = 'assumed: x' }\nwrite =", "[drive] has no 'speed'"),
        ("[drive]", "[gpu]\n[drive]", "add a part [link]"),
        ("[10, 1000]", "[1000, 10]", "kinds.full.dense needs its size in ascending order"),
        ("[10, 1000]", "[10]", "with size and seconds lists of the same length"),
        ("10, 1000", "-10, 1000", "kinds.full.dense must have numbers above zero"),
        ("1e-5", "nan", "kinds.full.dense must have numbers above zero"),
        ("1e-5", "inf", "kinds.full.dense must have numbers above zero"),
        ("size", "sizes", "kinds.full.dense must be { size, seconds, source }"),
        ("[kinds]", "[[kinds]]", "kinds is not a table"),
        ("[drive]", "[[drive]]", "drive is not a table"),
        ("[cpu]", "[cpu", "is not a device profile"),
    ],
)  # fmt: skip
def test_a_bad_profile_is_refused(tmp_path, old, new, says):
    assert old in GOOD
    path = tmp_path / "p.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        Profile.load(path)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="choose h200"):
        find_profile("rtx9090")
    with pytest.raises(UsageError, match="hillinfer profile"):
        find_profile(THIS, tmp_path / "none.toml")
    with pytest.raises(UsageError, match="is not a device profile"):
        find_profile(tmp_path / "none.toml")


def test_the_balance_of_host_and_drive(tmp_path):
    """Of a drive that scores: a computational one as its profile states, or the emulated one as it was measured."""
    smart = find_profile("rtx4090-smartssd").speeds(4096)
    link = 1 / 25.6e9
    assert (smart.fc, smart.fs) == (20e9, 15.4e9)
    assert (smart.bc, smart.bs) == pytest.approx((1 / (1 / 45e9 + link), 1 / (1 / 1.6e9 + link)))
    path = tmp_path / "p.toml"
    path.write_text(GOOD)
    with pytest.raises(UsageError, match=r"no drive that scores .* hillinfer profile --drive FOLDER"):
        Profile.load(path).speeds(4096)
    numbers = dict(cpu_score=3e9, cpu_gather=2e9, emulated_score=4e9, emulated_fetch=1e9)
    found = Profile.load(Profile.load(path).with_numbers(THIS, **numbers).save(path)).speeds(4096)
    assert (found.fc, found.fs, found.bc, found.bs) == pytest.approx((3e9, 4e9, 2e9, 1e9))


RETIRED = "# measured\nfc = 1e9\nfs = 2e9\nbc = 3e9\nbs = 4e8\n"


def test_the_advice_for_a_file_in_the_retired_format_works(tmp_path):
    """It is refused; what the message says to do writes another file, and may also write over this one."""
    path = tmp_path / "profile.toml"
    path.write_text(RETIRED)
    with pytest.raises(UsageError, match=r"earlier version .* hillinfer profile --drive FOLDER, which writes out/"):
        Profile.load(path)
    check_replaceable(path)


@pytest.mark.parametrize("text", [GOOD, "", "not a profile", "[project]\nname = 'mine'", "name = 'h200'"])
def test_no_other_file_is_replaced(tmp_path, text):
    """A new profile replaces this machine's own; no notes, no project file, no other machine's profile."""
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"p.toml is not a profile of this machine; .* --out"):
        check_replaceable(path)
    check_replaceable(tmp_path / "new.toml")
    find_profile("h200").with_numbers(THIS).save(path)
    check_replaceable(path)
