"""The section on sample weights: how sharp they were, which losses and which documents they favoured."""

from collections.abc import Sequence

import plotly.graph_objects as go

from launch.report_sections._parts import Chart, RunRecord, Section, choose, evenly, line
from trainer.metrics import Row, rows_with

_MAX_FRAMES = 40
_TABLES = 5  # evaluations whose documents are shown


def reweighting(run: RunRecord) -> Section | None:
    """Sharpness, losses and weights over time, domains and documents; None for a run without weights."""
    weighed = rows_with(run.steps, "reweight/ess")
    if not weighed and not any(_alphas(run)):
        return None
    charts = []
    if weighed:
        charts.append(_sharpness(weighed))
    recorded = rows_with(run.steps, "reweight/samples/loss")
    if recorded:
        frames = evenly(recorded, _MAX_FRAMES)
        charts += [_over_time(frames), _against_loss(frames)]
    charts.append(_domains(run))
    shown = rows_with(run.evaluations, "reweight/documents")[-_TABLES:]
    if shown:
        charts.append(_documents(shown))
    return Section(
        "Weights of samples",
        "Each optimizer step gives every sample of its global batch a weight from its loss; a weight of 1 (times B) is "
        "that of a plain mean.",
        charts,
    )


def _sharpness(rows: Sequence[Row]) -> Chart:
    figure = go.Figure()
    for key, name in (
        ("reweight/ess", "effective sample size / B"),
        ("reweight/max_weight", "largest weight (B w)"),
        ("reweight/audit_kl", "audit: KL(true || used), nats"),
        ("moe/starved_experts", "experts whose tokens weigh less than half"),
    ):
        x, y = line(rows, key)
        if x:
            figure.add_scatter(x=x, y=y, name=name)
    x, y = line(rows, "reweight/temperature")
    figure.add_scatter(x=x, y=y, name="temperature", yaxis="y2", line={"dash": "dot", "color": "grey"})
    figure.update_layout(
        xaxis_title="step", yaxis2={"overlaying": "y", "side": "right", "type": "log", "title": "temperature"}
    )
    return Chart(
        "Sharpness", "An effective sample size of 1 is a plain mean; the temperature (right axis) sets it.", figure
    )


def _over_time(frames: Sequence[Row]) -> Chart:
    low = min(min(_numbers(row, "loss")) for row in frames)
    high = max(max(_numbers(row, "loss")) for row in frames)
    heaviest = max(max(_numbers(row, "weight")) for row in frames)

    def bars(row: Row) -> list[go.Histogram]:
        return [
            go.Histogram(
                x=_numbers(row, "loss"), name="loss",
                xbins={"start": low, "end": high + 1e-9, "size": (high - low) / 40 or 1},
            ),
            go.Histogram(
                x=_numbers(row, "weight"), name="weight (B w)", xaxis="x2", yaxis="y2",
                xbins={"start": 0, "end": heaviest + 1e-9, "size": heaviest / 40 or 1},
            ),
        ]  # fmt: skip

    figure = _slider(frames, bars)
    figure.update_layout(
        xaxis={"domain": [0, 0.47], "title": "loss", "range": [low, high]},
        xaxis2={"domain": [0.53, 1], "title": "weight (B w)", "range": [0, heaviest * 1.05]},
        yaxis2={"anchor": "x2"},
    )
    return Chart(
        "Losses and weights of a step", "Samples of one step in each bin; move the slider through the run.", figure
    )


def _against_loss(frames: Sequence[Row]) -> Chart:
    def dots(row: Row) -> list[go.Scatter]:
        return [go.Scatter(x=_numbers(row, "loss"), y=_numbers(row, "weight"), mode="markers", name="samples")]

    figure = _slider(frames, dots)
    figure.update_layout(xaxis_title="loss", yaxis_title="weight (B w)")
    return Chart("Weight against loss", "What the strategy made of each sample's loss.", figure)


def _domains(run: RunRecord) -> Chart:
    figure, groups = go.Figure(), {}
    series = {"share of the objective": "weight", "share of the tokens": "tokens", "loss": "loss"}
    if any(_alphas(run)):
        series["weight set (alpha)"] = "alpha"
    for label, key in series.items():
        first = len(figure.data)
        for name in run.domain_names:
            x, y = line(run.steps, f"domain/{name}/{key}")
            figure.add_scatter(x=x, y=y, name=name)
        groups[label] = range(first, len(figure.data))
    choose(figure, groups)
    figure.update_layout(xaxis_title="step")
    return Chart(
        "Domains", "Choose in the menu; a domain whose share of the objective is above its tokens' gains.", figure
    )


def _documents(evaluations: Sequence[Row]) -> Chart:
    figure, groups = go.Figure(), {}
    for row in reversed(evaluations):
        table = row["reweight/documents"]
        groups[f"step {row['step']}"] = [len(figure.data)]
        columns = ("weight", "loss", "domain", "sample", "text")
        cells = [[entry[column] for entry in table] for column in columns]
        figure.add_table(
            header={"values": ["weight (B w)", *columns[1:]], "align": "left"},
            cells={"values": cells, "align": "left", "format": [".3f", ".3f", None, None, None]},
            columnwidth=[1, 1, 1.5, 1, 8],
        )
    choose(figure, groups)
    return Chart(
        "Most and least weighted", "Of the last step before an evaluation, with the beginning of the text.", figure
    )


def _slider(frames: Sequence[Row], draw) -> go.Figure:  # type: ignore[no-untyped-def]
    names = [str(row["step"]) for row in frames]
    figure = go.Figure(
        data=draw(frames[-1]),
        frames=[go.Frame(data=draw(row), name=name) for row, name in zip(frames, names, strict=True)],
    )
    now = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": name, "method": "animate", "args": [[name], now]} for name in names]
    figure.update_layout(sliders=[{"steps": steps, "active": len(steps) - 1, "currentvalue": {"prefix": "step "}}])
    return figure


def _numbers(row: Row, column: str) -> list[float]:
    """A column of the samples of a step, without samples that have no target."""
    values, tokens = row[f"reweight/samples/{column}"], row["reweight/samples/tokens"]
    return [value for value, count in zip(values, tokens, strict=True) if count and value is not None]


def _alphas(run: RunRecord) -> list[bool]:
    return [f"domain/{name}/alpha" in row for row in run.steps[:1] for name in run.domain_names]
