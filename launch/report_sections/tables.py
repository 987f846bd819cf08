"""The numbers of runs as CSV files, none of them thinned."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.report_sections._grid import GridRecord
from launch.report_sections._measures import MEASURES
from launch.report_sections._record import Columns, RunRecord
from trainer.errors import StorageError


def write_csv(folder: Path, runs: Sequence[RunRecord], grid: GridRecord | None) -> list[Path]:
    """`<run>-steps.csv` and `<run>-evaluations.csv` of each run, and `grid.csv`; returns their paths.

    Raises StorageError if the disk refuses.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            name = re.sub(r"[^\w.-]+", "-", run.name)
            for kind, columns in (("steps", run.steps), ("evaluations", run.evals)):
                if columns.count:
                    written.append(_write(folder / f"{name}-{kind}.csv", *_columns(columns)))
        if grid is not None:
            head = ["run", "variant", "seed", "status", "step", *(measure.label for measure in MEASURES)]
            by_folder = {run.folder: run for run in runs}
            rows = []
            for planned in grid.plan:
                begun = by_folder.get(planned.folder)
                figures = [measure.of(begun) if begun else None for measure in MEASURES]
                step = begun.last_step if begun else 0
                rows.append([planned.folder.name, planned.variant, planned.seed, planned.status, step, *figures])
            written.append(_write(folder / "grid.csv", head, rows))
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}; free space or choose another --csv") from error
    return written


def _columns(columns: Columns) -> tuple[list[str], Iterable[Sequence[Any]]]:
    keys = ["step", *(key for key in columns.names() if key != "step")]
    table = np.stack([columns[key] for key in keys], axis=1)
    return keys, ([int(row[0]), *(None if np.isnan(value) else float(value) for value in row[1:])] for row in table)


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
    return path
