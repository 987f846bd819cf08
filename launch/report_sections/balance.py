"""The section on balance: how even the experts' loads were, and what it took."""

import re
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from launch.report_sections._parts import Chart, RunRecord, Section, choose, evenly, line
from trainer.metrics import Row

_MAX_FRAMES = 60


def balance(run: RunRecord) -> Section | None:
    """Loads, biases, specialisation and duality gap; None for a run that did not measure them."""
    layers = _layers(run.rows)
    if not layers:
        return None
    charts = [_violations(run, layers)]
    with_loads = [row for row in run.evaluations if row.get("moe/loads")]
    if with_loads:
        charts += [_load_map(evenly(with_loads, _MAX_FRAMES)), _biases(evenly(with_loads, _MAX_FRAMES), layers)]
        charts.append(_specialisation(with_loads[-1], layers, run.domain_names))
    if any(row.get("moe/duality_gap") is not None for row in run.evaluations):
        charts.append(_gap(run.evaluations, layers))
    return Section("Balance of the experts", _certificate(run.evaluations), charts)


def _layers(rows: Sequence[Row]) -> list[int]:
    """Numbers of the MoE layers, from the names of their metrics."""
    found = {match.group(1) for row in (*rows[:2], *rows[-2:]) for key in row if (match := _LAYER.match(key))}
    return sorted(map(int, found))


_LAYER = re.compile(r"moe/layer(\d+)/")


def _certificate(evaluations: Sequence[Row]) -> str:
    certified = sum(row.get("moe/certificate") == 1 for row in evaluations)
    if not certified:
        return "No balance certificate: the rule of this run moves no bias."
    return (
        f"Balance certificate: {certified} of {len(evaluations)} evaluations. Each says that every MoE layer is "
        "balanced, loads were tokens x K at every step, and biases are float32, alike on all ranks and moved by their "
        "hook alone."
    )


def _violations(run: RunRecord, layers: Sequence[int]) -> Chart:
    figure = go.Figure()
    for layer in layers:
        x, y = line(run.steps, f"moe/layer{layer}/maxvio")
        figure.add_scatter(x=x, y=y, name=f"layer {layer}", line={"width": 1}, opacity=0.6)
    x, y = line(run.steps, "moe/maxvio_batch")
    figure.add_scatter(x=x, y=y, name="mean", line={"color": "black"})
    x, y = line(run.evaluations, "eval/maxvio_global")
    figure.add_scatter(x=x, y=y, name="held-out, mean", mode="lines+markers", line={"color": "crimson"})
    figure.update_layout(xaxis_title="step", yaxis_title="MaxVio")
    return Chart(
        "MaxVio",
        "How far the busiest expert of a layer lies above the mean load: of each training batch, and over all held-out "
        "text. 0 is perfect balance.",
        figure,
    )


def _load_map(evaluations: Sequence[Row]) -> Chart:
    largest = max(value for row in evaluations for loads in row["moe/loads"] for value in loads if value is not None)

    def heat(row: Row) -> go.Heatmap:
        return go.Heatmap(
            z=row["moe/loads"], zmin=0, zmid=1, zmax=max(largest, 2.0), colorscale="RdBu_r", hoverongaps=False,
            hovertemplate="layer %{y}, expert %{x}: %{z:.3f}<extra></extra>",
        )  # fmt: skip

    names = [str(row["step"]) for row in evaluations]
    figure = go.Figure(
        data=[heat(evaluations[-1])],
        frames=[go.Frame(data=[heat(row)], name=name) for row, name in zip(evaluations, names, strict=True)],
    )
    now = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": name, "method": "animate", "args": [[name], now]} for name in names]
    figure.update_layout(
        sliders=[{"steps": steps, "active": len(steps) - 1, "currentvalue": {"prefix": "step "}}],
        xaxis_title="expert",
        yaxis={"title": "layer", "autorange": "reversed", "dtick": 1},
    )
    return Chart(
        "Held-out load of each expert",
        "Relative to the layer's mean: 1 (white) is an even share. Move the slider through the evaluations.",
        figure,
    )


def _biases(evaluations: Sequence[Row], layers: Sequence[int]) -> Chart:
    figure, groups = go.Figure(), {}
    steps = [row["step"] for row in evaluations]
    for layer in layers:
        courses: list[list[Any]] = [row[f"moe/layer{layer}/bias"] for row in evaluations]
        first = len(figure.data)
        for expert in range(len(courses[0])):
            figure.add_scatter(
                x=steps, y=[course[expert] for course in courses], name=f"expert {expert}", line={"width": 1}
            )
        groups[f"layer {layer}"] = range(first, len(figure.data))
    choose(figure, groups)
    figure.update_layout(xaxis_title="step", yaxis_title="bias")
    return Chart("Selection biases", "One line an expert; choose the layer in the menu.", figure)


def _specialisation(evaluation: Row, layers: Sequence[int], domain_names: Sequence[str]) -> Chart:
    figure, groups = go.Figure(), {}
    for layer in layers:
        loads = evaluation.get(f"moe/layer{layer}/domain_loads") or []
        names = domain_names if len(domain_names) == len(loads) else [f"domain {i}" for i in range(len(loads))]
        shown = [(name, row) for name, row in zip(names, loads, strict=True) if sum(row)]
        if not shown:
            continue  # a layer that only trains
        groups[f"layer {layer}"] = [len(figure.data)]
        figure.add_heatmap(
            z=[[load * len(row) / sum(row) for load in row] for _, row in shown], y=[name for name, _ in shown],
            zmin=0, zmid=1, colorscale="RdBu_r", hovertemplate="%{y}, expert %{x}: %{z:.2f}<extra></extra>",
        )  # fmt: skip
    choose(figure, groups)
    figure.update_layout(xaxis_title="expert", yaxis={"autorange": "reversed"})
    return Chart(
        f"Experts and domains, step {evaluation['step']}",
        "How much of a domain's held-out text an expert takes, relative to an even share: a row of ones is a domain "
        "without specialists.",
        figure,
    )


def _gap(evaluations: Sequence[Row], layers: Sequence[int]) -> Chart:
    figure = go.Figure()
    for layer in layers:
        x, y = line(evaluations, f"moe/layer{layer}/duality_gap")
        figure.add_scatter(x=x, y=y, name=f"layer {layer}", line={"width": 1}, opacity=0.6)
    x, y = line(evaluations, "moe/duality_gap")
    figure.add_scatter(x=x, y=y, name="mean", mode="lines+markers", line={"color": "black"})
    figure.update_layout(xaxis_title="step", yaxis_title="score a token")
    return Chart(
        "Duality gap",
        "d(p) less the value of the best balanced assignment, for each token of a held-out sample: an upper bound on "
        "the score that perfect balance would still cost at these biases.",
        figure,
    )
