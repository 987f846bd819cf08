"""The log of a run does not grow without end."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import _run_folder


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
