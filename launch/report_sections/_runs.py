"""One chart over several runs: which colour a run has, and a metric of all of them."""

from collections.abc import Sequence

import numpy as np

from launch.report_sections._parts import Trace, color_of, digits, line, marked, means
from launch.report_sections._record import Columns, Floats, RunRecord

SEEDS = "Line: mean over the seeds of a variant; band: from the least to the largest of them."
_STRETCHES = 80


def names_of_variants(runs: Sequence[RunRecord]) -> list[str]:
    """Variants in the order of their first run; a run outside a grid is its own."""
    return list(dict.fromkeys(run.variant or run.name for run in runs))


def has_seeds(runs: Sequence[RunRecord]) -> bool:
    """Whether some variant was run with several seeds."""
    return len(names_of_variants(runs)) < len(runs)


def over_runs(runs: Sequence[RunRecord], key: str, *, evaluations: bool = False, smooth: bool = False) -> list[Trace]:
    """A metric of every variant: a line, or the mean and the range of its seeds.

    `smooth` averages over stretches of the run; seeds always are, so that they can be told from noise.
    """
    traces: list[Trace] = []
    names = names_of_variants(runs)
    for color, name in enumerate(names):
        members = [i for i, run in enumerate(runs) if (run.variant or run.name) == name]
        if len(members) > 1:
            opacity = 0.13 if len(names) < 5 else 0.07
            traces += _seeds(runs, members, key, name, color_of(color), evaluations, opacity)
            continue
        columns = runs[members[0]].evals if evaluations else runs[members[0]].steps
        if smooth:
            traces += curve(
                *means(columns, key, min(_STRETCHES, columns.count // 10 + 2)), name, members[0], color_of(color)
            )
            continue
        draw = marked if evaluations else line
        traces += draw(columns, key, name, run=members[0], color=color_of(color), width=1.6 if len(names) < 9 else 1.1)
    for trace in traces:
        trace.setdefault("showlegend", len(names) > 1)
    return traces


def curve(x: Floats, y: Floats, name: str, run: int, color: str, **more: object) -> list[Trace]:
    """A smooth line of one run, as no trace or one."""
    if not len(x):
        return []
    return [
        {"type": "scatter", "mode": "lines" if len(x) > 1 else "markers", "name": name, "run": run, "x": digits(x, 8),
         "y": digits(y), "line": {"color": color, "width": 2}, "marker": {"color": color}, **more}
    ]  # fmt: skip


def _seeds(
    runs: Sequence[RunRecord],
    members: Sequence[int],
    key: str,
    name: str,
    color: str,
    evaluations: bool,
    opacity: float,
) -> list[Trace]:
    """Range and mean over seeds, as far as all of them have come; a line each where they were measured at other steps.

    `members`: numbers of the variant's runs.
    """
    tables = [runs[i].evals if evaluations else runs[i].steps for i in members]
    lines = [(i, *_line(table, key, evaluations, tables[0].count)) for i, table in zip(members, tables, strict=True)]
    lines = [(i, x, y) for i, x, y in lines if len(x)]
    if not lines:
        return []
    number, first, _ = lines[0]
    length = min(len(x) for _, x, _ in lines)
    if any(not np.array_equal(x[:length], first[:length]) for _, x, _ in lines):
        return [
            {**trace, "showlegend": run == number, "legendgroup": name}
            for run, x, y in lines
            for trace in curve(x, y, name, run, color)
        ]
    x, table_SN = first[:length], np.stack([y[:length] for _, _, y in lines])
    edge: Trace = {"type": "scatter", "mode": "lines", "run": number, "x": digits(x, 8), "line": {"width": 0},
                   "showlegend": False, "hoverinfo": "skip"}  # fmt: skip
    return [
        {**edge, "name": f"{name}, least", "y": digits(table_SN.min(axis=0))},
        {
            **edge,
            "name": f"{name}, largest",
            "y": digits(table_SN.max(axis=0)),
            "fill": "tonexty",
            "fillcolor": f"{color}/{opacity}",
        },
        *curve(x, table_SN.mean(axis=0), name, number, color),
    ]


def _line(table: Columns, key: str, evaluations: bool, count: int) -> tuple[Floats, Floats]:
    return table.line(key) if evaluations else means(table, key, min(_STRETCHES, count // 5 + 2))
