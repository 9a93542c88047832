"""Random calls at the caches of every system, each against transformers' own; `make fuzz` makes many more."""

from benchmarks import fuzz_cache


def test_random_calls_equal_those_of_the_full_cache(tmp_path):
    done, failures = fuzz_cache.run(range(50), 7, tmp_path)
    assert not failures and done["calls"] > 1000 and done["refused"] > 100
