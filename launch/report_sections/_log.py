"""What log.txt says happened: starts, resumes, warnings, errors, phases of the data."""

import re
from pathlib import Path
from typing import NamedTuple

_MAX_EVENTS = 500
_LINE = re.compile(r"(?P<clock>\d\d:\d\d:\d\d) (?P<level>[A-Z]+) \[\d+\] (?P<text>.*)")
_STEP = re.compile(r"\bstep (\d+)")
_OWN_STEP = re.compile(r"^step \d+: ")  # it has a column of its own
_KINDS = (
    ("resume", re.compile(r"resumed from step (\d+)")),
    ("skip", re.compile(r"step (\d+) skipped")),
    ("phase", re.compile(r"step (\d+): data phase")),
    ("rewind", re.compile(r"\(rewind \d+ of")),
    ("spike", re.compile(r"\bspike", re.IGNORECASE)),
    ("config", re.compile(r"config changed since")),
    ("error", re.compile(r"the run ended with an error")),
)


class LogEvent(NamedTuple):
    """One thing that happened."""

    step: int | None
    """None where the log does not name it."""
    kind: str
    """resume, skip, phase, rewind, spike, config, warning or error."""
    text: str
    clock: str
    """Time of day, HH:MM:SS."""


def read_log(folder: Path) -> list[LogEvent]:
    """Events of a run's log.txt and of older parts of it (log.txt.1, ...), oldest first; empty if there is none."""
    events: list[LogEvent] = []
    for path in sorted(folder.glob("log.txt*"), key=_age, reverse=True):
        try:
            with path.open(errors="replace") as lines:
                events += [event for line in lines if (event := event_of(line)) is not None]
        except OSError:
            continue
    return events[-_MAX_EVENTS:]


def event_of(line: str) -> LogEvent | None:
    """The event that a line of the log speaks of; None for the many that report progress."""
    match = _LINE.match(line)
    if match is None:
        return None
    text, level = match["text"], match["level"]
    kind = next((kind for kind, pattern in _KINDS if pattern.search(text)), None)
    if kind is None:
        kind = {"WARNING": "warning", "ERROR": "error", "CRITICAL": "error"}.get(level)
    if kind is None:
        return None
    step = _STEP.search(text)
    return LogEvent(int(step[1]) if step else None, kind, _OWN_STEP.sub("", text), match["clock"])


def _age(path: Path) -> int:
    """log.txt is the newest, log.txt.1 older."""
    suffix = path.name.removeprefix("log.txt").lstrip(".")
    return int(suffix) if suffix.isdigit() else 0
