"""What a run folder says, in a form that stays small for a run of any length.

Numbers become columns, one value a row. Rows that carry arrays (loads, biases, the samples of a step) are thinned while
they are read, to an even selection that always holds the first and the last.
"""

import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from launch.report_sections._log import LogEvent, read_log
from trainer.errors import ConfigError
from trainer.metrics import EvenRows, Row

Floats = NDArray[np.float64]


class Columns:
    """Numbers of rows by key; NaN where a row lacks one."""

    def __init__(self) -> None:
        self.count = 0
        self._columns: dict[str, array[float]] = {}

    def add(self, row: Row) -> None:
        """Take the numbers of one row."""
        for key, value in row.items():
            if isinstance(value, (int, float)):
                column = self._columns.get(key)
                if column is None:
                    column = self._columns[key] = array("d")
                if len(column) < self.count:
                    column.extend([math.nan] * (self.count - len(column)))
                column.append(value)
        self.count += 1

    def names(self) -> Iterator[str]:
        """Names of the columns, in the order in which they were met."""
        return iter(self._columns)

    def __contains__(self, key: str) -> bool:
        return key in self._columns

    def __getitem__(self, key: str) -> Floats:
        """The column as float64 [rows]; all NaN if there is none."""
        found = np.full(self.count, math.nan)
        column = self._columns.get(key, ())
        found[: len(column)] = column
        return found

    def line(self, key: str) -> tuple[Floats, Floats]:
        """Steps and values where the column has one."""
        values = self[key]
        there = np.isfinite(values)
        return self["step"][there], values[there]

    def last(self, key: str) -> float | None:
        """The newest value, or None."""
        values = self.line(key)[1]
        return float(values[-1]) if len(values) else None

    def first(self, key: str) -> float | None:
        """The oldest value, or None."""
        values = self.line(key)[1]
        return float(values[0]) if len(values) else None


@dataclass
class RunRecord:
    """One run: its metrics, configuration and log."""

    name: str
    folder: Path | None = None
    steps: Columns = field(default_factory=Columns)
    """Training steps."""
    evals: Columns = field(default_factory=Columns)
    """Evaluations."""
    _evaluations: EvenRows = field(default_factory=EvenRows)
    _samples: EvenRows = field(default_factory=EvenRows)
    unreadable_lines: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration by full key, for instance `train.steps`; empty if the folder has none."""
    log: Sequence[LogEvent] = ()
    is_running: bool = False
    """Whether a process of this machine has the folder open for writing."""
    variant: str = ""
    """Name of the grid's variant; empty outside a grid."""
    seed: int | None = None

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Raises ConfigError if the folder has no metrics. Lines that are not JSON are counted and left out."""
        run = cls(
            folder.resolve().name, folder, config=read_config(folder), log=read_log(folder), is_running=in_use(folder)
        )
        path = folder / "metrics.jsonl"
        try:
            with path.open(errors="replace") as lines:
                for line in lines:
                    run.add_line(line)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; name a run folder") from error
        if not run.steps.count and not run.evals.count:
            raise ConfigError(f"{folder}: metrics.jsonl is empty; nothing to report yet")
        return run

    def add_line(self, line: str) -> None:
        """Take one line of metrics.jsonl; the last one of a run that crashed may be cut short."""
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            self.unreadable_lines += bool(line.strip())
            return
        self.add(row)

    def add(self, row: Row) -> None:
        """Take one row of metrics."""
        if "loss" in row:
            self.steps.add(row)
            if "reweight/samples/loss" in row:
                self._samples.add(row)
        elif "eval/loss" in row:
            self.evals.add(row)
            self._evaluations.add(row)

    @property
    def evaluations(self) -> list[Row]:
        """An even selection of evaluations, with their arrays."""
        return self._evaluations.rows()

    @property
    def samples(self) -> list[Row]:
        """An even selection of the steps whose samples were recorded."""
        return self._samples.rows()

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains in their order."""
        trained = [match[1] for key in self.steps.names() if (match := re.fullmatch(r"domain/(.+)/tokens", key))]
        return trained or self.heldout_domains

    @property
    def heldout_domains(self) -> list[str]:
        """Names of the domains that have held-out text."""
        return [match[1] for key in self.evals.names() if (match := re.fullmatch(r"eval/(.+)/ppl", key))]

    @property
    def layers(self) -> list[int]:
        """Numbers of the MoE layers."""
        keys = [*self.steps.names(), *(self.evaluations[-1] if self.evaluations else ())]
        return sorted({int(match[1]) for key in keys if (match := re.match(r"moe/layer(\d+)/", key))})

    @property
    def last_step(self) -> int:
        """The newest step of which anything is known."""
        return int(max((c["step"][-1] for c in (self.steps, self.evals) if c.count), default=0))

    @property
    def planned_steps(self) -> int | None:
        """Steps of the configuration, or None."""
        return self.config.get("train.steps")

    @property
    def status(self) -> str:
        """In words."""
        planned = self.planned_steps
        if self.is_running:
            return "training"
        if planned is None:
            return "as recorded"
        return "finished" if self.last_step >= planned else "stopped early"

    @property
    def hours(self) -> Floats:
        """Hours of training up to the end of each step, [steps]: the sum of step times."""
        return np.nancumsum(self.steps["time/step_s"]) / 3600

    def on_axis(self, axis: str, steps: Floats) -> Floats:
        """Steps as tokens or hours of training, exact at recorded steps."""
        known = np.concatenate(([0.0], self.steps["step"]))
        values = self.hours if axis == "hours" else self.steps["tokens"]
        return np.interp(steps, known, np.concatenate(([0.0], values)))


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run by full key; empty if it is missing or no YAML mapping."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return dict(_flat(tree, "")) if isinstance(tree, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def in_use(folder: Path) -> bool:
    """Whether a living process of this machine trains in the folder: it holds the lock file.

    Asked of the kernel's list, and not by trying the lock: a trainer that starts at this moment would be refused.
    """
    try:
        inode = str((folder / ".lock").stat().st_ino)
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    return any("FLOCK" in line and "->" not in line and f":{inode} " in line for line in locks)
