"""The charts that compare variants: a dot for each seed, and differences from the baseline with their intervals."""

from collections.abc import Mapping, Sequence

import numpy as np

from launch.report_sections._grid import GridRecord
from launch.report_sections._parts import Chart, Trace, View, axis, digits
from launch.report_sections._statistics import Difference

Values = Mapping[str, Mapping[int, float]]
"""A figure by variant and seed."""


def variant_charts(
    grid: GridRecord, every: Mapping[str, Values], differences: Mapping[str, Mapping[str, Difference]]
) -> list[Chart]:
    """Differences from the baseline, if there is one, and every run; both by the name of the measure."""
    height = 130 + 30 * len(grid.variants)
    layout = {"yaxis": {"autorange": "reversed", "automargin": True, "type": "category"}}
    gaps = [
        View(_intervals(found), (name,), {"xaxis": _span(found, f"difference in {name}")})
        for name, found in differences.items()
        if found
    ]
    dots = [View(_dots(grid, values), (name,), {"xaxis": axis(name)}) for name, values in every.items()]
    charts = []
    if gaps:
        charts.append(
            Chart("Difference from the baseline", "Dots: paired seeds; line: 95 % t interval; bar: mean.", gaps,
                  {**layout, "shapes": [_zero()]}, height=height)
        )  # fmt: skip
    if dots:
        charts.append(Chart("Every run", "A dot for each seed; bar: mean of the variant.", dots, layout, height=height))
    return charts


def _dots(grid: GridRecord, values: Values) -> list[Trace]:
    traces: list[Trace] = []
    for variant in grid.variants:
        by_seed = values[variant]
        color = "--s2" if variant == grid.baseline else "--s1"
        traces += _seeds(variant, list(by_seed), list(by_seed.values()), color)
    return traces


def _intervals(found: Mapping[str, Difference]) -> list[Trace]:
    traces: list[Trace] = []
    for variant, each in found.items():
        color = "--s1" if each.is_shown else "--muted"
        if each.t_interval is not None:
            traces.append(
                {"type": "scatter", "mode": "lines", "showlegend": False, "name": f"{variant}, 95 % t",
                 "x": digits(each.t_interval),
                 "y": [variant, variant], "line": {"color": color, "width": 2}, "hoverinfo": "x"}
            )  # fmt: skip
        traces += _seeds(variant, range(len(each.values_N)), each.values_N.tolist(), color)
    return traces


def _seeds(variant: str, seeds: Sequence[int], values: Sequence[float], color: str) -> list[Trace]:
    if not values:
        return []
    bar = {"symbol": "line-ns", "size": 18, "line": {"width": 3, "color": color}}
    return [
        {"type": "scatter", "mode": "markers", "showlegend": False, "name": variant,
         "x": digits(values), "y": [variant] * len(values),
         "marker": {"color": f"{color}/0.55", "size": 9}, "text": [f"seed {seed}" for seed in seeds],
         "hovertemplate": "%{x}, %{text}<extra></extra>"},
        {"type": "scatter", "mode": "markers", "showlegend": False, "name": f"{variant}, mean",
         "x": digits([float(np.mean(values))]),
         "y": [variant], "marker": bar, "hovertemplate": "mean %{x}<extra></extra>"},
    ]  # fmt: skip


def _span(found: Mapping[str, Difference], title: str) -> dict[str, object]:
    """An axis that holds zero, every dot and every interval, with some room."""
    ends = [0.0, *(x for each in found.values() for x in (*each.values_N.tolist(), *(each.t_interval or ())))]
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    return axis(title, range=[min(ends) - room, max(ends) + room])


def _zero() -> dict[str, object]:
    return {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "--ink", "width": 1}}
