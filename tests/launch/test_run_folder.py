"""What a start leaves in a run folder: a log that does not grow without end, and the settings it goes on with."""

import logging
import re
from pathlib import Path

import pytest

from configs.loader import load_run_config
from launch import _run_folder
from launch._console import terminal
from launch.report_sections._log import read_log
from tests.harness import ROOT, tiny_config
from trainer.data.config import DataConfig
from trainer.metrics import JsonlLog


def test_the_log_rotates(tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run_folder, "_LOG_BYTES", 2000)
    _run_folder.start_logging(tmp_path)
    for number in range(1000):
        logger.debug("line %d", number)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["log.txt", "log.txt.1", "log.txt.2", "log.txt.3", "log.txt.4"]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert (tmp_path / "log.txt").read_text().endswith("line 999\n"), "the newest lines are in log.txt"


@pytest.mark.parametrize("name", ["x[/b]", "lr[bold]", "a:bug:b"])
def test_a_name_is_no_markup(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    JsonlLog(folder / "metrics.jsonl").append({"step": n, "eval/loss": 2.0, f"eval/{name}/ppl": 7.0} for n in (0, 2))
    _run_folder.print_summary(folder, [name], "completed")
    shown = "".join(capsys.readouterr().out.split())
    assert f"{name}(report.html" in shown
    assert f"│{name}" in shown, "in the table, too"


def test_every_command_writes_to_that_terminal() -> None:
    own = [path for path in (ROOT / "launch").rglob("*.py") if re.search(r"\bConsole\(", path.read_text())]
    assert [path.name for path in own] == ["_console.py"]
    assert not terminal()._markup


def test_every_changed_setting_is_logged_by_its_key(
    tmp_path: Path, logger: logging.Logger, data_config: DataConfig
) -> None:
    """Also one whose new line stands elsewhere in the file (`every: 6` is evaluation's), and one that is gone."""
    path = tiny_config(tmp_path, data_config)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    _run_folder.start_logging(run_dir)
    _run_folder.take_config(run_dir, load_run_config(path, ["data.weights={prose: 3}"]))
    assert read_log(run_dir) == [], "the first start changes nothing"
    (run_dir / "metrics.jsonl").touch()
    changed = load_run_config(
        path, ["checkpoint.every=6", "hooks.sample_reweight.temperature.value=0.7", "data.weights={code: 2}"]
    )
    _run_folder.take_config(run_dir, changed)
    assert load_run_config(run_dir / "config.yaml") == changed
    _run_folder.take_config(run_dir, changed)
    (run_dir / "config.yaml").write_text("a: [")
    _run_folder.take_config(run_dir, changed)
    events = read_log(run_dir)
    said = [event.text.removeprefix("config changed since the last start of this run: ") for event in events]
    assert {event.kind for event in events[:-1]} == {"config"}
    assert said[:-1] == [
        "checkpoint.every: 4 -> 6",
        "data.weights.code: absent -> 2.0",
        "data.weights.prose: 3.0 -> absent",
        "hooks.sample_reweight.temperature.value: 0.5 -> 0.7",
    ]
    assert "config.yaml: is not valid YAML" in said[-1]
    assert load_run_config(run_dir / "config.yaml") == changed
