"""Courses of the temperature."""

import math

import pytest

from reweighting.temperature import TemperatureConfig, temperature


def test_warms_up_then_holds() -> None:
    config = TemperatureConfig(value=0.4, warmup_steps=3, warmup_value=50.0)
    assert [temperature(config, n) for n in range(5)] == [50.0, 50.0, 50.0, 0.4, 0.4]


def test_skipped_steps_come_first_and_are_uniform() -> None:
    config = TemperatureConfig(value=0.4, skip_steps=2, warmup_steps=1, warmup_value=50.0)
    assert [temperature(config, n) for n in range(4)] == [math.inf, math.inf, 50.0, 0.4]


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.6), ("cosine", 0.6)])
def test_falls_from_value_to_final_over_the_rest_of_the_run(shape: str, middle: float) -> None:
    config = TemperatureConfig(value=1.0, final=0.2, shape=shape, warmup_steps=2)  # type: ignore[arg-type]
    course = [temperature(config, n, 13) for n in range(13)]
    assert course[:2] == [100.0, 100.0]
    assert course[2] == 1.0
    assert course[7] == pytest.approx(middle)
    assert course[12] == pytest.approx(0.2)
    assert course[2:] == sorted(course[2:], reverse=True)
    assert temperature(config, 40, 13) == pytest.approx(0.2), "a run that is extended stays at the end"


def test_points_are_joined_by_lines() -> None:
    config = TemperatureConfig(shape="piecewise", points={10: 1.0, 0: 2.0, 20: 0.5})
    assert [temperature(config, n) for n in (0, 5, 10, 15, 20, 99)] == pytest.approx([2, 1.5, 1, 0.75, 0.5, 0.5])


def test_contradictions_are_refused() -> None:
    assert len(TemperatureConfig(value=math.nan, warmup_steps=-1, warmup_value=0.0).problems()) == 3
    assert TemperatureConfig(shape="linear").problems()[0].startswith("final:")
    assert TemperatureConfig(final=0.5).problems() == ["final: shape constant does not read it; remove it"]
    assert TemperatureConfig(shape="piecewise").problems()[0].startswith("points:")
    assert TemperatureConfig(points={0: 1.0}).problems()[0].startswith("points:")
    assert len(TemperatureConfig(shape="piecewise", points={-1: 1.0, 5: 0.0}).problems()) == 2
