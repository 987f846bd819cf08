"""The command of the GPU bench, and the files it leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from launch._cli import run_command
from tests.bench.gpu import __main__ as command
from tests.bench.gpu import results
from tests.bench.gpu.results import Result, load, newest, save
from tests.bench.gpu.targets import AT_LEAST, AT_MOST
from tests.bench.report import Report, Row
from trainer.errors import ConfigError

RESULT = Result(
    schema=1, date="2026-01-02T03:04:05+00:00", commit="0" * 40, hardware={"gpu": "NVIDIA H200"},
    versions={"torch": "2.11.0"}, settings={"allocator": "none"},
    figures={
        "gpu/hooks/bias": Row(1.5, 1.25, "much")._asdict(), "gpu/host_syncs/hooks": Row(0, None, "")._asdict(),
    },
    missing={"gpu/loss_head/peer/liger": "not run: ModuleNotFoundError"},
)  # fmt: skip


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_recorded_run_is_valid() -> None:
    for path in results.FOLDER.glob(results.FILES):
        load(path)


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    path = save(RESULT, tmp_path)
    assert path.name == "nvidia-h200-2026-01-02-030405.json"
    assert load(path) == RESULT
    later = save(replace(RESULT, date="2026-01-02T04:00:00+00:00"), tmp_path)
    (tmp_path / "growth.json").write_text("of another bench")
    assert newest(tmp_path) == later
    assert newest(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2 is not 1"),
        ({"date": "yesterday"}, "date 'yesterday' is not ISO 8601"),
        ({"commit": "main"}, "commit 'main'"),
        ({"hardware": {}}, "hardware.gpu is missing"),
        ({"figures": {"hooks/bias": RESULT.figures["gpu/hooks/bias"]}}, "does not begin with gpu/"),
        ({"figures": {"gpu/x": {"median": 1.0}}}, "must have median, minimum, note"),
        ({"figures": {"gpu/x": {"median": float("nan"), "minimum": None, "note": ""}}}, "not a finite number"),
        ({"figures": {"gpu/x": {"median": True, "minimum": None, "note": ""}}}, "not a finite number"),
        ({"missing": []}, "missing must be an object"),
        ({"more": 1}, "the keys must be commit, date"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(RESULT, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message) as refused:
        load(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_damaged_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"schema": 1')
    for name, message in (("cut.json", "not JSON"), ("none.json", "No such file")):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / name)


def test_what_was_not_measured_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.show(Console(width=160), Path("there/is/none")) == 0
    lines = capsys.readouterr().out.splitlines()
    for key in [*AT_LEAST, *AT_MOST]:
        (line,) = (line for line in lines if f" {key} " in line)
        assert "not measured" in line


def test_a_result_is_shown_with_targets_misses_and_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(RESULT, tmp_path)
    assert command.show(Console(width=160), tmp_path) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA H200" in shown
    (miss,) = (line for line in shown.splitlines() if "gpu/hooks/bias" in line)
    assert "1.500" in miss
    assert "<= 1.001" in miss
    assert "MISS much" in miss
    (met,) = (line for line in shown.splitlines() if "gpu/host_syncs/hooks" in line)
    assert "MISS" not in met
    (peer,) = (line for line in shown.splitlines() if "peer/liger" in line)
    assert "ModuleNotFoundError" in peer
    assert "not measured" in shown


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("argv", "message"), [([], "no CUDA GPU"), (["layer"], "no family 'layer'; there are train_step")]
)
def test_without_a_gpu_or_such_a_family_it_says_so(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command.main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_figures_before_a_failure_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(report: Report, device: torch.device) -> None:
        report.not_run("gpu/b", "no reason")
        report.add("gpu/a", 2.0, 1.0, note="well")
        raise RuntimeError("out of memory")

    monkeypatch.setitem(command.FAMILIES, "skew", command.Family(breaks, 1))
    with pytest.raises(RuntimeError):
        command.measure_family("skew", tmp_path / "kept.json", torch.device("cpu"))
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept == {"rows": {"gpu/a": [2.0, 1.0, "well"]}, "missing": {"gpu/b": "not run: no reason"}}


def test_a_family_that_fails_is_listed_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real child process: on this machine without a GPU it ends with one line, which the table then shows."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so the family would run")
    monkeypatch.setattr(command, "LOG", tmp_path / "gpu-bench.log")
    report = Report({}, {})
    reason = command.run_family("skew", report, timeout_s=60)
    assert reason.startswith("exit code 2: error: torch sees no CUDA GPU")
    assert not report.rows
    assert command.run_family("skew", report, timeout_s=0.1).startswith("the time was up")


def test_a_run_is_written_and_shown_though_a_family_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the command does around its child processes, which need a GPU."""

    def run_family(name: str, report: Report, *, timeout_s: float) -> str:
        assert timeout_s == pytest.approx(command.FAMILIES["skew"].seconds + 40 * (name == "loss_head"), abs=5)
        report.add(f"gpu/{name}/x", 1.0)
        return "exit code 1: RuntimeError" if name == "loss_head" else ""

    def result_of(report: Report, *, seconds: float) -> Result:
        figures = {key: row._asdict() for key, row in report.rows.items()}
        return replace(RESULT, figures=figures, missing=dict(report.missing))

    monkeypatch.setattr(command, "LOG", tmp_path / "log" / "gpu-bench.log")
    monkeypatch.setattr(command, "run_family", run_family)
    monkeypatch.setattr(results, "result_of", result_of)
    assert command.measure(["skew", "loss_head"], Console(width=160), tmp_path) == 1
    path = newest(tmp_path)
    assert path is not None
    assert load(path).figures.keys() == {"gpu/skew/x", "gpu/loss_head/x"}
    captured = capsys.readouterr()
    assert "not run: exit code 1: RuntimeError" in captured.out
    assert "loss_head failed" in captured.err
    assert str(path) in captured.err
