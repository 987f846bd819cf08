"""launch.reweight_lab on a real run's losses, and launch.domain_weights with both rules."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from launch import domain_weights
from launch._cli import run_command
from tests.harness import losses, rows, run, tiny_config
from trainer.data.config import DataConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    config = tiny_config(
        tmp_path_factory.mktemp("lab"), data_config,
        hooks={"sample_reweight": {"record_every": 4, "show_documents": 2, "temperature": {"value": 0.5}}},
    )  # fmt: skip
    done = run("launch.train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    return config


def test_lab_replays_a_run(trained: Path, tmp_path: Path) -> None:
    run_dir = trained.parent / "run"
    done = run(
        "launch.reweight_lab", "--strategy", "quadratic", "--strategy", "linupper", "--temperature", "0.5",
        "--replay", str(run_dir), "--out", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no weight above 2/B for r >= 1.4427" in done.stdout
    replayed = list(csv.DictReader((tmp_path / "replay.csv").open()))
    assert {row["step"] for row in replayed} == {"1", "5", "9"}
    assert len(replayed) == 3 * 3
    metrics = {row["step"]: row for row in rows(run_dir) if "loss" in row}
    for row in replayed:
        if row["way"] == "linupper, r = 0.5":
            # What the run used, by its own account: the replay must agree with it.
            assert float(row["ess"]) == pytest.approx(metrics[int(row["step"])]["reweight/ess"], rel=1e-5)
            assert float(row["kl_from_trained"]) == pytest.approx(0, abs=1e-9)
        if row["way"] == "quadratic, r = 0.5":
            assert float(row["kl_from_trained"]) > 1e-4
    page = (tmp_path / "lab.html").read_text()
    assert "weight against loss" in page
    assert not re.search(r'<(script|img)[^>]*\ssrc="|<link', page), "nothing is fetched"
    toy = {row["way"]: row for row in csv.DictReader((tmp_path / "toy.csv").open())}
    assert float(toy["linupper, r = 0.5"]["correction"]) < 0


def test_lab_says_what_is_wrong(tmp_path: Path, trained: Path) -> None:
    done = run("launch.reweight_lab", "--strategy", "quadratc", "--temperature", "-1", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "did you mean 'quadratic'" in done.stderr
    assert "--temperature: -1.0 must be finite and positive" in done.stderr
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0}) + "\n")
    done = run("launch.reweight_lab", "--replay", str(bare), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "record_every" in done.stderr


def test_extreme_documents_are_recorded_with_their_text(trained: Path) -> None:
    evaluations = [row for row in rows(trained.parent / "run") if "eval/loss" in row]
    assert "reweight/documents" not in evaluations[0], "before the first step there is nothing to show"
    table = evaluations[-1]["reweight/documents"]
    assert len(table) == 4
    assert all(row["text"] and row["domain"] in ("code", "prose", "table") for row in table)
    assert [row["weight"] for row in table] == sorted((row["weight"] for row in table), reverse=True)


def test_proxies_find_domain_weights_that_a_run_can_include(trained: Path, tmp_path: Path) -> None:
    for rule, extra in (("doge", []), ("doremi", ["--reference", str(trained.parent / "run")])):
        out = tmp_path / f"{rule}.yaml"
        done = run(
            "launch.domain_weights", str(trained), "train.steps=6", "seed=5", "--rule", rule, *extra, "--out", str(out),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        weights = yaml.safe_load(out.read_text())["data"]["weights"]
        assert set(weights) == {"code", "prose", "table"}
        assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-5)
        assert len(set(weights.values())) == 3, "they moved apart"
        course = list(csv.DictReader(out.with_suffix(".csv").open()))
        assert len(course) == 6
        mean = math.fsum(float(row["code"]) for row in course) / 6
        assert weights["code"] == pytest.approx(mean, abs=1e-5)
    using = tmp_path / "using.yaml"
    using.write_text(
        f"include: [{trained}, {tmp_path / 'doge.yaml'}]\nrun_dir: {tmp_path / 'run'}\ntrain: {{steps: 3}}\n"
    )
    done = run("launch.train", str(using))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(tmp_path / "run")) == 3


def test_proxy_says_what_is_wrong(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "w.yaml")]
    done = run("launch.domain_weights", str(trained), "--rule", "doremi", *out)
    assert done.returncode == 2
    assert "--reference: rule doremi needs the run of a reference model" in done.stderr
    done = run("launch.domain_weights", str(trained), "model.aux_loss.z=0.1", "--rule", "doge", *out)
    assert done.returncode == 2
    assert "auxiliary losses" in done.stderr
    for place, code in (("dw.csv", 2), ("file/dw.yaml", 6), ("folder.yaml", 6)):
        (tmp_path / "file").touch()
        (tmp_path / "folder.yaml").mkdir(exist_ok=True)
        words = [str(trained), "--rule", "doge", "--out", str(tmp_path / place)]
        assert run_command(domain_weights.main, words) == code
        assert f"error: --out: {tmp_path / place}" in capsys.readouterr().err
