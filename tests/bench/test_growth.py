"""Exponents are those that were put in, a curve above theory is marked, and the committed curves read as they say."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.growth import CURVES, table
from tests.bench.growth_fit import MARGIN, Curve, exponent, read_curves, write_curves

COMMITTED = Path(__file__).parent / "results" / "growth.json"
SIZES = (8, 16, 32, 64, 128)


def curve(power: float, *, fixed: float = 0.0, theory: float = 1.0) -> Curve:
    return Curve(SIZES, [fixed + 1e-3 * size**power for size in SIZES], [2e-6 * size**theory for size in SIZES])


@given(
    power=st.floats(-1, 3), factor=st.floats(1e-6, 1e6), noise=st.lists(st.floats(0.95, 1.05), min_size=5, max_size=5)
)
def test_an_exponent_is_found_through_noise(power: float, factor: float, noise: list[float]) -> None:
    values = [factor * size**power for size in SIZES]
    assert exponent(SIZES, values) == pytest.approx(power, abs=1e-6)
    noisy = [value * times for value, times in zip(values, noise, strict=True)]
    assert exponent(SIZES, noisy) == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(
    ("sizes", "values"), [((8,), (1.0,)), ((8, 8), (1.0, 2.0)), ((8, 16), (0.0, 1.0)), ((8, 16), (1.0,))]
)
def test_what_has_no_exponent_is_refused(sizes: tuple[int, ...], values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be positive|needs two sizes"):
        exponent(sizes, values)


def test_only_a_curve_above_theory_is_a_defect() -> None:
    assert not curve(1.0).is_steep
    assert not curve(0.5).is_steep, "cheaper than theory is no defect"
    assert not curve(1 + MARGIN - 0.01).is_steep
    assert curve(1 + MARGIN + 0.01).is_steep
    hidden = curve(1.5, fixed=0.05)
    assert hidden.exponents[0] < 1 + MARGIN, "a fixed cost hides the slope of the whole"
    assert hidden.is_steep, "but not that of its end"


def test_the_table_marks_defects(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=120).print(table({"layers": curve(1.0), "experts": curve(1.6)}))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "DEFECT" in lines["experts"]
    assert "DEFECT" not in lines["layers"]
    assert "1.60" in lines["experts"]


def test_a_file_of_curves_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "growth.json"
    write_curves(path, {"hardware": "a"}, {"layers": curve(1.5)})
    facts, found = read_curves(path)
    assert facts == {"hardware": "a", "margin": MARGIN}
    assert found["layers"].exponents == pytest.approx((1.5, 1.0), abs=1e-3)
    assert json.loads(path.read_text())["curves"]["layers"]["above_theory"] is True


def test_the_committed_curves_are_all_there_and_fit_their_exponents() -> None:
    facts, curves = read_curves(COMMITTED)
    assert set(curves) == {*CURVES, "ranks"}
    assert {"torch", "deepspeed"} <= set(facts["versions"])
    for name, row in json.loads(COMMITTED.read_text())["curves"].items():
        assert row["exponent"] == pytest.approx(curves[name].exponents[0], abs=0.01)
        assert row["above_theory"] == curves[name].is_steep
        assert name == "ranks" or row["size"] == list(CURVES[name])
    assert not re.search(r"/(home|root|tmp|work|usr)\b", COMMITTED.read_text()), "no path of a machine"
