"""Profiles: all that ship can be used, each number has its source, and a bad one is refused with its fix."""

import pytest

from hillinfer import UsageError
from hillinfer.whatif.devices import THIS, Cost, Profile, Rate, find_profile, list_profiles

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
    from hillinfer.whatif import calibrate

    monkeypatch.setattr(calibrate, "BLOCKS", (4096, 1 << 16, 1 << 22))
    found = calibrate._drive(tmp_path, "measured: here")
    assert set(found) == {"read", "read_one", "write"} and not list(tmp_path.iterdir())
    for name, rate in found.items():
        assert rate.blocks == (4096, 1 << 16, 1 << 22)
        assert rate.values[0] < rate.values[-1], name


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
        ("value = 1e9, source = \"assumed", "value = -1, source = \"assumed", "must be a number above zero"),
        ("value = 1e9, source = \"assumed", "value = true, source = \"assumed", "must be a number above zero"),
        ("value = 1e9, source = \"assumed", "valeu = 1e9, source = \"assumed", "drive.write must be { value, source }"),
        ("[4096, 8192]", "[8192, 4096]", "drive.read needs its blocks in ascending order"),
        ("[4096, 8192]", "[4096]", "as many rates as blocks"),
        ("[drive]", "[disk]", "no part 'disk'"),
        ("flops", "flop", "[cpu] lacks flops"),
        ("write =", "speed = { value = 1, source = 'assumed: x' }\nwrite =", "[drive] has no 'speed'"),
        ("[drive]", "[gpu]\n[drive]", "add a part [link]"),
        ("[10, 1000]", "[1000, 10]", "kinds.full.dense must have numbers above zero, its sizes in ascending"),
        ("[10, 1000]", "[10]", "kinds.full.dense needs as many seconds as sizes"),
        ("[cpu]", "[cpu", "is no profile"),
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
    with pytest.raises(UsageError, match="is no profile"):
        find_profile(tmp_path / "none.toml")
