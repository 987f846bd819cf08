"""Statistics of grids: by hand, by property, and on a page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import report
from launch._cli import run_command
from launch.report_sections._statistics import compare, difference, first_reached, holm, what_can_be_said
from launch.report_sections.events import spikes
from tests.launch.run_folders import training_rows, write_grid, write_run
from tests.launch.test_report import charts, draw, sections

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_a_difference_by_hand() -> None:
    found = difference([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    # t quantile of 2 degrees of freedom times sd / sqrt(3), from a table.
    assert found.t_interval == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert found.bootstrap == (1.0, 3.0), "1/27 of the resamples at each end: more than 2.5 %"
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9), (
        "the t distribution of 2 degrees of freedom"
    )
    assert difference([0.5]).t_interval is None
    same = difference([0.25, 0.25, 0.25])
    assert (same.t_interval, same.bootstrap, same.p) == ((0.25, 0.25), (0.25, 0.25), None)


@given(probabilities)
def test_holm_is_between_the_raw_value_and_bonferroni(ps: list[float]) -> None:
    adjusted = holm(ps)
    assert all(p <= a <= min(1.0, len(ps) * p) or math.isclose(p, a) for p, a in zip(ps, adjusted, strict=True))
    assert adjusted[ps.index(min(ps))] == min(1.0, len(ps) * min(ps))
    order = np.argsort(ps, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_holm_of_a_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_runs_are_paired_by_seed() -> None:
    values = {"base": {1: 10.0, 2: 20.0, 3: 30.0}, "better": {3: 29.0, 1: 9.0}, "alone": {7: 1.0}}
    found = compare(values, "base")
    assert set(found) == {"better"}
    assert found["better"].values_N.tolist() == [-1.0, -1.0]


@given(st.lists(st.floats(1, 10), min_size=2, max_size=20), st.floats(1, 10))
def test_first_reached_is_where_a_falling_curve_meets_its_target(falls: list[float], target: float) -> None:
    y = np.array(sorted(falls, reverse=True))
    x = np.arange(len(y), dtype=float)
    at = first_reached(x, y, target)
    if at is None:
        assert (y > target).all()
    else:
        assert np.interp(at, x, y) <= target + 1e-9
        assert at == 0 or np.interp(at - 1e-6, x, y) >= target - 1e-5


def test_what_few_seeds_can_say() -> None:
    assert "no interval" in what_can_be_said(1, 3)
    three = what_can_be_said(3, 2)
    assert "10 distinct resamples" in three
    assert "at most 75 %" in three
    assert "p = 0.25" in three
    assert "2 comparisons" in three
    assert "not as proof" not in what_can_be_said(8, 1)


def test_the_bootstrap_of_three_covers_as_little_as_is_said() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(20_000, 3))
    covered = ((samples.min(axis=1) <= 0) & (samples.max(axis=1) >= 0)).mean()
    assert covered == pytest.approx(0.75, abs=0.01)


def test_spikes_stand_out_and_noise_does_not() -> None:
    rng = np.random.default_rng(1)
    losses = 3 + 0.1 * rng.normal(size=5000)
    losses[[1000, 1001, 4000]] += 2
    assert np.flatnonzero(spikes(losses)).tolist() == [1000, 1001, 4000]
    assert not spikes(np.full(500, 2.0)).any()
    assert not spikes(np.linspace(9, 2, 500)).any(), "a falling loss"
    assert len(spikes(np.zeros(3))) == 3


def cells(page: str, title: str) -> dict[str, list[str]]:
    """Rows of a table of the page by their first cell."""
    import re

    body = page[page.index(f">{title}<") :]
    body = body[: body.index("</table>")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", body)]
    return {row[0]: row[1:] for row in rows if row}


def test_the_page_of_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {"none": [4.0, 4.1, 4.2], "sign": [3.5, 3.61, 3.69], "quantile": [4.01, 4.08, 4.22]}
    folder = write_grid(tmp_path / "grid", losses)
    write_run(folder / "quantile-3", training_rows(7), steps=20)
    state = json.loads((folder / "state.json").read_text())
    state["quantile-3"] |= {"status": "failed", "exit_code": 4, "reason": "10 steps in a row were skipped"}
    (folder / "state.json").write_text(json.dumps(state))
    page = draw(capsys, folder, "--csv", tmp_path / "csv")
    assert sections(page)[:3] == ["overview", "variants", "runs"]
    assert "8 of 9 runs are complete" in page
    table = cells(page, "Held-out loss")
    assert table["none"][:3] == ["3", "4.1000", "0.1000"]
    assert table["none"][-1] == "baseline"
    assert table["sign"][3] == "-0.5000"
    assert table["sign"][5] == "-0.5100 to -0.4900"
    assert table["sign"][-1] == "better"
    assert table["quantile"][0] == "2", "the run that failed is not compared"
    assert table["quantile"][-1] == "no difference shown"
    assert cells(page, "Not compared")["quantile-3"] == ["failed", "7 of 20", "10 steps in a row were skipped"]
    assert cells(page, "Cost to reach the baseline&#x27;s loss")["sign"][0] == "3 of 3"
    costs = cells(page, "Cost to reach the baseline&#x27;s loss")["none"]
    assert costs[:3] == ["3 of 3", "10.2 k", "100.0%"]
    dots = charts(page)["Every run"]["views"][0]["traces"]
    assert dots[0]["x"] == [4.0, 4.1, 4.2]
    # Seeds that have come equally far are a mean and a band; others a line each, along their own tokens.
    drawn = charts(page)["Training loss"]["views"][0]["traces"]
    assert [(t["name"], t["run"]) for t in drawn if t["name"].startswith(("sign", "quantile"))] == [
        ("sign, least", 3), ("sign, largest", 3), ("sign", 3), ("quantile", 6), ("quantile", 7), ("quantile", 8)
    ]  # fmt: skip
    assert [t["showlegend"] for t in drawn if t["name"] == "quantile"] == [True, False, False]
    csv = (tmp_path / "csv" / "grid.csv").read_text().splitlines()
    assert len(csv) == 1 + 9
    assert csv[1].startswith("none-1,none,1,done,20,4.0,")


def test_one_seed_is_said_to_prove_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = draw(capsys, write_grid(tmp_path / "grid", {"a": [4.0], "b": [3.0]}))
    assert "One seed: there is no interval and no test." in page
    assert cells(page, "Held-out loss")["b"] == ["1", "3.0000", "–", "-1.0000", "–", "–", "–", "–", "one seed"]


def test_a_grid_without_a_baseline_or_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_grid(tmp_path / "grid", {"a": [4.0, 4.1], "b": [3.0, 3.2]})
    described = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps(described | {"baseline": None}))
    assert cells(draw(capsys, folder), "Held-out loss")["b"] == ["2", "3.1000", "0.1414"]
    (folder / "grid.json").write_text(json.dumps(described | {"format": 2}))
    assert run_command(report.main, [str(folder)]) == 2
    assert "format 2 is not 1" in capsys.readouterr().err
    (folder / "grid.json").write_text('{"format": 1')
    assert run_command(report.main, [str(folder)]) == 2
    assert "is not the description of a grid" in capsys.readouterr().err
    (folder / "grid.json").write_text(json.dumps(described))
    for run in described["runs"]:
        (folder / run["folder"] / "metrics.jsonl").unlink()
    assert run_command(report.main, [str(folder)]) == 2
    assert "none of its 4 runs has recorded anything yet" in capsys.readouterr().err
    assert run_command(report.main, [str(folder), str(tmp_path)]) == 2
    assert "is a grid, and is drawn alone" in capsys.readouterr().err
