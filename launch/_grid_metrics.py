"""Evaluations out of the metrics files of many runs, which may be long and still growing."""

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from launch._grid_state import METRICS
from trainer.errors import ConfigError
from trainer.line_tail import LineTail

_MARK = '"eval/loss"'


class Evaluations:
    """The evaluations of one run as they are written: each call of `read` looks only at what is new."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS
        self.rewind()

    def rewind(self) -> None:
        """Forget everything: a run that starts again writes some of its lines anew."""
        self._tail = LineTail(self._path)
        self.rows: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """All evaluations so far; a last line that is still being written is left for the next call."""
        if not self._path.exists():
            self.rewind()
        while True:
            lines, began_anew = self._tail.poll()
            if began_anew:
                self.rows = []
            if not lines:
                return self.rows
            self.rows += [row for line in lines if _MARK in line and (row := _parsed(line)) is not None]

    def at(self, step: int, key: str) -> float | None:
        """A value of the evaluation at `step`, infinite if it is not finite there; None before that.

        Raises ConfigError if that evaluation has no such number.
        """
        for row in self.read():
            if row["step"] == step:
                if not isinstance(row.get(key, ""), (int, float, type(None))):
                    numbers = [name for name, value in row.items() if isinstance(value, float)]
                    close = get_close_matches(key, numbers, n=1)
                    raise ConfigError(
                        f"halving.metric: {self._path} has no number {key} at step {step}"
                        + (f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(numbers[:8])}")
                    )
                return float("inf") if row[key] is None else float(row[key])
        return None


def _parsed(line: str | bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # what a power cut left: the run will write it again
    return row if isinstance(row, dict) and "step" in row else None


def step_seconds(run_dir: Path) -> float | None:
    """Median time of a step as the run has measured it, without its first steps; None if there are too few."""
    found = []
    try:
        with (run_dir / METRICS).open("rb") as file:
            for line in file:
                if b'"time/step_s"' in line and (row := _parsed(line)) is not None:
                    found.append(float(row["time/step_s"]))
    except FileNotFoundError:
        return None
    later = sorted(found[3:])
    return later[len(later) // 2] if later else None
