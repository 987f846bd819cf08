"""What sections are made of: the record of a run, charts, and the small things that all of them need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go

from trainer.errors import ConfigError
from trainer.metrics import Row, read_jsonl, rows_with

MAX_POINTS = 1000
"""Points of a line: more cannot be told apart on a screen, and would make the file heavy."""


class Chart(NamedTuple):
    """One figure with its title, and a note on how to read it."""

    title: str
    note: str
    figure: go.Figure


class Section(NamedTuple):
    """A titled part of the report."""

    title: str
    intro: str
    charts: Sequence[Chart]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about a run."""

    name: str
    rows: Sequence[Row]

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Raises ConfigError if the folder has no readable metrics."""
        rows = read_jsonl(run_dir / "metrics.jsonl")
        if not rows:
            raise ConfigError(f"{run_dir}: metrics.jsonl is empty; nothing to report yet")
        return cls(run_dir.resolve().name, rows)

    @cached_property
    def steps(self) -> list[Row]:
        """Rows of training steps."""
        return rows_with(self.rows, "loss")

    @cached_property
    def evaluations(self) -> list[Row]:
        """Rows of evaluations."""
        return rows_with(self.rows, "eval/loss")

    @cached_property
    def domain_names(self) -> list[str]:
        """Names of the domains in their order, which training rows keep; empty before the first step."""
        keys = self.steps[0] if self.steps else {}
        return [key.removeprefix("domain/").removesuffix("/tokens") for key in keys if _is_domain_tokens(key)]


SectionOf = Callable[[RunRecord], Section | None]


def line(rows: Sequence[Row], key: str) -> tuple[list[int], list[Any]]:
    """Steps and values of a metric, as (x, y); a long run is averaged over stretches of equal length."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    stretch = -(-len(points) // MAX_POINTS) or 1
    pieces = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return [piece[-1][0] for piece in pieces], [sum(y for _, y in piece) / len(piece) for piece in pieces]


def evenly(rows: Sequence[Row], at_most: int) -> list[Row]:
    """At most so many of the rows, first and last among them."""
    if len(rows) <= at_most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (at_most - 1))] for i in range(at_most)]


def choose(figure: go.Figure, groups: Mapping[str, Sequence[int]]) -> None:
    """A menu that shows one group of traces at a time, beginning with the first; `groups`: trace numbers by label."""
    first = next(iter(groups.values()), ())
    for number, trace in enumerate(figure.data):
        trace.visible = number in first
    buttons = [
        {"label": label, "method": "update", "args": [{"visible": [n in shown for n in range(len(figure.data))]}]}
        for label, shown in ((label, frozenset(numbers)) for label, numbers in groups.items())
    ]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.15, "yanchor": "bottom"}])


def _is_domain_tokens(key: str) -> bool:
    return key.startswith("domain/") and key.endswith("/tokens")
