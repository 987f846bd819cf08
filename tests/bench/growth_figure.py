"""Growth curves as small multiples: measured points, the line fitted through them, and theory, all on doublings.

A doubling has the same length on every axis of every panel, so that slopes can be compared by eye: 45 degrees is
proportional.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.growth_fit import MARGIN, Curve
from tests.bench.palette import BAD, GRID, INK, LINE, MUTED, SERIES, layout

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLUMNS, WIDTH, ROW, TOP, BOTTOM = 3, 1040, 250, 105, 30
ACROSS, UP = 6.6, 7.0
"""Doublings a panel is wide and high."""
NAMES = {
    "experts": "experts, active size alike", "top_k": "experts a token uses",
    "sequence, tokens alike": "row length, tokens alike", "sequence, one row": "row length, one row",
    "documents": "documents in a row", "ranks": "ranks, work of each alike",
}  # fmt: skip


def growth_figure(facts: Mapping[str, Any], curves: Mapping[str, Curve]) -> "Figure":
    """All curves in one figure, each relative to its first point."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = math.ceil(len(curves) / COLUMNS)
    titles = [_title(name, curve) for name, curve in curves.items()]
    figure = make_subplots(rows, COLUMNS, subplot_titles=titles, horizontal_spacing=0.065, vertical_spacing=0.1)
    for number, curve in enumerate(curves.values()):
        row, column = number // COLUMNS + 1, number % COLUMNS + 1
        color = BAD if curve.is_steep else SERIES[0]
        x = np.log2(curve.size)
        fitted = np.polyval(np.polyfit(x, np.log2(curve.seconds), 1), x) - np.log2(curve.seconds[0])
        theory = np.log2(curve.theory) - np.log2(curve.theory[0])
        for y, line in (
            (theory, {"color": MUTED, "width": 1.8, "dash": "dot"}),
            (fitted, {"color": color, "width": 2.2}),
        ):
            figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line), row, column)
        measured = np.log2(curve.seconds) - np.log2(curve.seconds[0])
        figure.add_trace(go.Scatter(x=x, y=measured, mode="markers", marker={"color": color, "size": 8}), row, column)
        figure.update_xaxes(
            range=[x[0] - 0.3, x[0] - 0.3 + ACROSS], tickvals=x, ticktext=_ticks(curve), row=row, col=column
        )
        figure.update_yaxes(range=[-0.6, UP - 0.6], row=row, col=column)
    figure.update_yaxes(tickvals=[0, 2, 4, 6], ticktext=["1×", "4×", "16×", "64×"])
    axis = {"gridcolor": GRID, "linecolor": LINE, "zeroline": False, "showline": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_annotations(font={"size": 13, "color": INK}, xanchor="center")
    for number, note in enumerate(figure.layout.annotations):
        domain = figure.layout[f"xaxis{number + 1 if number else ''}"].domain
        note.update(x=domain[0], xanchor="left", align="left")
    margin = {"l": 50, "r": 20, "t": 125, "b": 35}
    figure.update_layout(**layout(_finding(curves), _under(facts), margin=margin, width=1040, height=rows * 265 + 130))
    return figure


def _finding(curves: Mapping[str, Curve]) -> str:
    steep = [name for name, curve in curves.items() if curve.is_steep]
    if not steep:
        return f"A step grows no faster than theory along all {len(curves)} axes, to {MARGIN} in the exponent"
    return f"A step grows faster than theory along {len(steep)} of {len(curves)} axes: {', '.join(steep)}"


def _under(facts: Mapping[str, Any]) -> str:
    return (
        "CPU time of forward and backward over that of the first point. Points: measured; line and exponent: fitted; "
        "dots and (exponent): theory,<br>from FLOPs and bytes. Equal lengths are equal doublings. "
        f"{facts['hardware']}, one thread, torch {facts['versions']['torch']}"
    )


def _title(name: str, curve: Curve) -> str:
    measured, expected = curve.exponents
    color = BAD if curve.is_steep else SERIES[0]
    power = f"<b style='color:{color}'>{measured:.2f}</b>"
    return (
        f"<b>{NAMES.get(name, name)}</b>  {power} <span style='color:{MUTED}'>({round(expected, 2) + 0.0:.2f})</span>"
    )


def _ticks(curve: Curve) -> list[str]:
    return [f"{size // 1024}k" if size >= 1024 else str(size) for size in curve.size]
