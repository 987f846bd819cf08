"""What is logged in the folder of a run, and what is shown of it."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import _run_folder
from launch._console import terminal
from tests.harness import ROOT
from trainer.metrics import JsonlLog


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("evenkeel")
    handlers, level, propagate = found.handlers, found.level, found.propagate
    yield found
    for handler in found.handlers:
        handler.close()
    found.handlers, found.level, found.propagate = handlers, level, propagate


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
