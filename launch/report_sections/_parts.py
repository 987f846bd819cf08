"""What sections are made of: charts, tables, tiles, and the small things that all of them need.

A figure is what plotly.js takes, as plain dicts and lists, with three agreements that page.js keeps:
- a colour may be the name of a CSS variable, such as "--s1", or "--s1/0.2" with an opacity: it follows the theme;
- a trace with `run` has steps as x: the page shows them as steps, tokens or hours of that run;
- a heat map with `ratio` holds multiples of an even share: it is drawn on a log2 scale around 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from launch.report_sections._record import Columns, Floats, RunRecord

MAX_POINTS = 1000
"""Points of a line: more cannot be told apart on a screen, and would make the file heavy."""

MAX_CELLS = 250_000
"""Numbers in all frames of one chart."""

SERIES = tuple(f"--s{i}" for i in range(1, 9))
"""Colours of series, told apart by people who see colours differently, in the order of use."""
INK, MUTED = "--ink", "--muted"

Trace = dict[str, Any]


class Frame(NamedTuple):
    """One position of a chart's slider."""

    label: str
    traces: Sequence[Trace]


@dataclass
class View:
    """What a chart shows at one setting of its menus."""

    traces: Sequence[Trace] = ()
    labels: Sequence[str] = ()
    """The setting of each menu; empty if the chart has one view."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    frames: Sequence[Frame] = ()
    """With frames there is a slider, and no `traces`."""


@dataclass
class Chart:
    """One figure with its title, and a note on how to read it."""

    title: str
    note: str
    views: Sequence[View]
    layout: Mapping[str, Any] = field(default_factory=dict)
    """Common to all views."""
    wide: bool = False
    """Over the whole width of the page."""
    direct: bool = False
    """Name lines at their ends instead of in a legend, where there is room."""
    height: int = 340
    slider: str = "step"
    """What the slider moves through."""


class Table(NamedTuple):
    """Rows of text; columns that begin with a number are set flush right."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    emphasis: frozenset[int] = frozenset()
    """Numbers of rows in bold."""
    folded: bool = False
    """Shown when it is asked for."""


class Tile(NamedTuple):
    """One figure of the headline."""

    label: str
    value: str
    note: str = ""
    spark: Sequence[float] = ()


class Section(NamedTuple):
    """A titled part of the report."""

    title: str
    intro: str
    items: Sequence[Chart | Table | Sequence[Tile]]


def thin(x: Floats, y: Floats, at_most: int = MAX_POINTS) -> tuple[Floats, Floats, Floats, Floats]:
    """x of the last point, and mean, least and largest y, of stretches of equal length: at most so many."""
    stretch = -(-len(x) // at_most) or 1
    if stretch == 1:
        return x, y, y, y
    starts = np.arange(0, len(x), stretch)
    ends = np.minimum(starts + stretch, len(x))
    means = np.add.reduceat(y, starts) / (ends - starts)
    return x[ends - 1], means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def line(
    columns: Columns,
    key: str,
    name: str,
    *,
    run: int,
    color: str,
    width: float = 1.8,
    at_most: int = MAX_POINTS,
    **more: Any,
) -> list[Trace]:
    """A metric over the run, as no trace or one; a long run is averaged over stretches of equal length."""
    x, y, _, _ = thin(*columns.line(key), at_most)
    if not len(x):
        return []
    return [
        {
            "type": "scatter", "mode": "lines" if len(x) > 1 else "markers", "name": name, "run": run,
            "x": x.astype(int).tolist(), "y": digits(y), "line": {"color": color, "width": width},
            "marker": {"color": color, "size": 6}, **more,
        }
    ]  # fmt: skip


def marked(columns: Columns, key: str, name: str, *, run: int, color: str, **more: Any) -> list[Trace]:
    """A metric that is measured now and then: a line with its points."""
    traces = line(columns, key, name, run=run, color=color, **more)
    for trace in traces:
        trace["mode"] = "lines+markers" if len(trace["x"]) <= 100 else trace["mode"]
        trace["marker"]["size"] = 5
    return traces


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis of a layout."""
    return {"title": {"text": title}, **more}


def log_axis(title: str, traces: Sequence[Trace]) -> dict[str, Any]:
    """A logarithmic vertical axis with ticks at 1, 2, 5, or at decades where there are several; linear if there is no
    decade to speak of."""
    values = [y for trace in traces for y in trace.get("y", ()) if y and y > 0]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    if high < 3 * low:
        return axis(title)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in decades for m in ((1, 2, 5) if high < 200 * low else (1,))]
    return axis(title, type="log", tickvals=ticks, ticktext=[f"{tick:,.10g}" for tick in ticks])


def means(columns: Columns, key: str, pieces: int) -> tuple[Floats, Floats]:
    """Last step and mean of a metric, over so many stretches of the run; stretches without a value are left out."""
    values, steps = columns[key], columns["step"]
    pieces = max(1, min(pieces, len(values)))
    cuts = np.linspace(0, len(values), pieces + 1).round().astype(int)[:-1]
    there = np.isfinite(values)
    counts = np.add.reduceat(there.astype(float), cuts)
    sums = np.add.reduceat(np.where(there, values, 0.0), cuts)
    ends = np.append(cuts[1:], len(values)) - 1
    return steps[ends][counts > 0], sums[counts > 0] / counts[counts > 0]


def evenly(rows: Sequence[Any], at_most: int) -> list[Any]:
    """At most so many of the rows, first and last among them."""
    if len(rows) <= at_most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (max(at_most, 2) - 1))] for i in range(max(at_most, 2))]


def frames_that_fit(rows: Sequence[Any], cells: int, charts: int) -> list[Any]:
    """An even selection of rows of `cells` numbers, so that `charts` such selections stay below MAX_CELLS."""
    return evenly(rows, max(2, MAX_CELLS // max(1, cells * charts)))


def digits(values: Iterable[float | None], count: int = 5) -> list[float | None]:
    """Rounded to so many significant digits, which no screen shows more of; None for what is not finite."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.{count}g}") for v in values]


def color_of(number: int) -> str:
    """The colour of the n-th series."""
    return SERIES[number % len(SERIES)]


def menu(runs: Sequence[RunRecord], number: int, *more: str) -> tuple[str, ...]:
    """Settings of the menus of a view of one run: the run is named where there are several."""
    return ((runs[number].name,) if len(runs) > 1 else ()) + more


def si(value: float | None, digits_: int = 3) -> str:
    """A large number for people: 1.23 M; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits_}g}{unit}"
    return f"{value:.{digits_}g}"


def number(value: float | None, form: str = ".3f") -> str:
    """A number in a table; a dash for None."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)
