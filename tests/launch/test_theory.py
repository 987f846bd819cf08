"""The theory command draws every rule, and refuses what it cannot simulate."""

import csv
from pathlib import Path

import pytest

from launch import theory
from launch._cli import run_command
from moe.rules import RULES


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("online", [False, True])
def test_draws_every_rule(rule: str, online: bool, tmp_path: Path) -> None:
    arguments = ["--rule", rule, "--rate", "0.01", "--steps", "60", "--tokens", "128", "--out", str(tmp_path)]
    assert run_command(theory.main, [*arguments, *(["--online"] if online else [])]) == 0
    rows = list(csv.DictReader((tmp_path / "theory.csv").open()))
    assert len(rows) == 60
    assert float(rows[-1]["maxvio"]) < float(rows[0]["maxvio"])
    page = (tmp_path / "theory.html").read_text()
    assert "plotly" in page
    assert 'src="http' not in page, "the page needs no network"


def test_wrong_options_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(theory.main, ["--rule", "signn", "--top-k", "16", "--out", str(tmp_path / "x")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not (tmp_path / "x").exists()
