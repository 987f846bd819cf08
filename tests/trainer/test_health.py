"""Verdicts of the health checks: who is named, and when."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.health import HealthConfig
from trainer.health_probes import code_digest
from trainer.health_verdicts import clocks_apart, odd_one_out, slow_ranks

HOSTS = ["a", "a", "b", "b"]


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=9))
def test_the_odd_one_out_is_the_first_rank_of_a_minority(values: list[str]) -> None:
    found = odd_one_out(values)
    if len(set(values)) == 1:
        assert found is None
        return
    assert found is not None
    odd, usual = found
    assert values.count(values[usual]) == max(map(values.count, values))
    assert values[odd] != values[usual]
    assert all(value == values[usual] for value in values[:odd]), "no lower rank differs"


def test_of_two_ranks_the_first_is_the_reference() -> None:
    assert odd_one_out(["old", "new"]) == (1, 0)


@given(st.lists(st.floats(1e-4, 1e2), min_size=1, max_size=9), st.floats(1.01, 9))
def test_only_ranks_beyond_the_factor_are_slow_and_never_most(seconds: list[float], factor: float) -> None:
    hosts = [f"h{rank}" for rank in range(len(seconds))]
    named = [int(re.search(r"rank (\d+)", line)[1]) for line in slow_ranks(hosts, seconds, factor)]  # type: ignore[index]
    median = sorted(seconds)[(len(seconds) - 1) // 2]
    assert named == [rank for rank, each in enumerate(seconds) if each > factor * median]
    assert len(named) <= len(seconds) / 2


def test_one_of_two_ranks_can_be_slow() -> None:
    (line,) = slow_ranks(["a", "b"], [0.004, 0.012], 2.0)
    assert line.startswith("health: rank 1 (b) is slow: a matrix product takes 12.0 ms, 3.0 times the median")


def test_the_clock_that_is_off_is_named_with_its_sign() -> None:
    assert clocks_apart(HOSTS, [100.0, 100.4, 100.1, 100.2], 1.0) == []
    (line,) = clocks_apart(HOSTS, [100.0, 100.4, 40.0, 100.2], 1.0)
    assert line.startswith("health: the clock of rank 2 (b) is -60.0 s off the median")


def test_the_code_has_one_digest() -> None:
    assert re.fullmatch(r"[0-9a-f]{12}", code_digest())
    assert code_digest() == code_digest()


@pytest.mark.parametrize("field", ["slow_factor", "max_clock_skew_s", "min_bandwidth_gb_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_limits_are_numbers_that_can_be_met(field: str, value: float) -> None:
    (problem,) = HealthConfig(**{field: value}).problems()
    assert problem.startswith(f"{field}: ")
