"""The theory command draws every rule, and refuses what it cannot simulate."""

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch import theory
from launch._cli import run_command
from moe import theory as balance_theory
from moe.rules import RULES
from moe.score_sample import RecordedScores, save_scores


def draw(folder: Path, *arguments: str) -> list[dict[str, str]]:
    steps = ["--rate", "0.01", "--steps", "60", "--out", str(folder)]
    assert run_command(theory.main, [*steps, *arguments]) == 0
    rows = list(csv.DictReader((folder / "theory.csv").open()))
    assert len(rows) == 60
    page = (folder / "theory.html").read_text()
    assert "plotly" in page
    assert 'src="http' not in page, "the page needs no network"
    assert page.count('"type":"log"') == 4 + 3, "n everywhere, and all but the dual value"
    assert (folder / "theory.png").read_bytes().startswith(b"\x89PNG")
    return rows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("online", [False, True])
def test_every_rule_balances(rule: str, online: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    skew_E = torch.linspace(-1, 1, 16)
    batches = [(torch.randn(128, 16, generator=generator) + skew_E).sigmoid() for _ in range(20 if online else 1)]
    rows = theory.simulate(theory.Source(batches, 4, "a test"), rule, 0.01, 60)
    violations, gaps, regrets = (
        [row[key] for row in rows if row[key] is not None] for key in ("maxvio", "gap", "regret")
    )
    assert violations[-1] < violations[0]
    assert len(gaps) >= 20
    assert min(gaps) >= -1e-9
    assert gaps[-1] < gaps[0]
    assert regrets[-1] > 0
    if not online:  # no prices lose against the best fixed ones of scores that stay the same
        assert all(later >= earlier - 1e-9 for earlier, later in pairwise(regrets))


def test_random_scores_are_drawn(tmp_path: Path) -> None:
    rows = draw(tmp_path, "--rule", "decay_linear", "--tokens", "128", "--online")
    assert float(rows[-1]["maxvio"]) < float(rows[0]["maxvio"])


def test_recorded_scores(tmp_path: Path) -> None:
    """Layer 1 of the file is routed, in its own order, with its own K."""
    generator = torch.Generator().manual_seed(1)
    layers = {i: torch.rand(256, e, generator=generator) ** torch.arange(1, e + 1) for i, e in ((0, 4), (1, 8))}
    file = tmp_path / "scores.safetensors"
    save_scores(file, RecordedScores(layers, 3, "a test"))
    arguments = ["--scores", str(file), "--layer", "1", "--rule", "proportional"]
    static, online = draw(tmp_path / "a", *arguments), draw(tmp_path / "b", *arguments, "--online", "--tokens", "64")
    counts_E = layers[1].topk(3).indices.flatten().bincount(minlength=8)
    assert float(static[0]["maxvio"]) == pytest.approx(float(counts_E.max() * 8 / counts_E.sum()) - 1)
    first_E = layers[1][:64].topk(3).indices.flatten().bincount(minlength=8)
    assert float(online[0]["maxvio"]) == pytest.approx(float(first_E.max() * 8 / first_E.sum()) - 1)
    assert float(static[0]["dual"]) == pytest.approx(float(layers[1].topk(3).values.sum()) / 256)


def test_the_best_fixed_bias_is_the_best() -> None:
    """Its dual value is that of the best balanced assignment: no bias has a lower one."""
    scores_TE = torch.rand(64, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** torch.arange(1, 9)
    best_E = theory.best_fixed_bias([scores_TE[:32], scores_TE[32:]], 2)
    assert balance_theory.duality_gap(scores_TE, best_E, 2) <= 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "2"], "has no layer 2; it has 0, 1"),
        (["--tokens", "300"], "has 256 tokens, not 300"),
        (["--experts", "8"], "--experts: is for random scores"),
        (["--top-k", "4"], "--top-k: 4 must be between 1 and experts - 1 (3)"),
        (["--rule", "quantile"], "quantile needs scores in [0, 1]"),
    ],
)
def test_wrong_recordings_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores.safetensors"
    save_scores(file, RecordedScores({0: torch.rand(256, 4) + 1, 1: torch.rand(256, 8)}, 3, "a test"))
    assert run_command(theory.main, ["--scores", str(file), "--out", str(tmp_path / "x"), *arguments]) == 2
    assert message in capsys.readouterr().err
    file.write_bytes(b"something else")
    assert run_command(theory.main, ["--scores", str(file), "--out", str(tmp_path / "x")]) == 2
    assert "cannot be read as recorded scores" in capsys.readouterr().err
    save_file({"scores.0": torch.rand(4, 4)}, file)
    assert run_command(theory.main, ["--scores", str(file), "--out", str(tmp_path / "x")]) == 2
    assert "is no file of recorded scores" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_wrong_options_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(theory.main, ["--rule", "signn", "--top-k", "16", "--out", str(tmp_path / "x")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not (tmp_path / "x").exists()
