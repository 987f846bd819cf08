"""Figures of a finished run by which the variants of a grid are compared."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from launch.report_sections._record import RunRecord


class Measure(NamedTuple):
    """A figure of a finished run."""

    label: str
    of: Callable[[RunRecord], float | None]
    form: str
    less_is_better: bool = True


def _mean(key: str) -> Callable[[RunRecord], float | None]:
    def of(run: RunRecord) -> float | None:
        values = run.steps.line(key)[1]
        return float(values.mean()) if len(values) else None

    return of


def _speed(run: RunRecord) -> float | None:
    values = run.steps.line("tokens_per_s")[1]
    return float(np.median(values)) if len(values) else None


MEASURES = (
    Measure("held-out loss", lambda run: run.evals.last("eval/loss"), ".4f"),
    Measure("MaxVio, held-out", lambda run: run.evals.last("eval/maxvio_global"), ".3f"),
    Measure("MaxVio of a batch, mean over the run", _mean("moe/maxvio_batch"), ".3f"),
    Measure("tokens / s, median", _speed, ",.0f", less_is_better=False),
)
