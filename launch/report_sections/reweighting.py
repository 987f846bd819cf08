"""The section on sample weights: how sharp they were, which losses and which documents they favoured."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from launch.report_sections._parts import (
    Chart,
    Frame,
    Section,
    Table,
    Trace,
    View,
    axis,
    digits,
    frames_that_fit,
    line,
    log_axis,
    menu,
)  # fmt: skip
from launch.report_sections._record import RunRecord
from launch.report_sections._runs import over_runs
from trainer.metrics import Row

_BINS = 40
_TABLES = 3  # evaluations whose documents are shown


def reweighting(runs: Sequence[RunRecord]) -> Section | None:
    """Sharpness, losses and weights over time, and documents; None for runs without weights."""
    weighed = [(i, run) for i, run in enumerate(runs) if "reweight/ess" in run.steps]
    if not weighed:
        return None
    items: list[Chart | Table] = [_ess(runs, weighed), _temperature(runs, weighed)]
    recorded = [(i, run.samples) for i, run in weighed if run.samples]
    if recorded:
        kept = [(i, frames_that_fit(rows, 2 * _BINS, len(recorded))) for i, rows in recorded]
        items += [_histograms(runs, kept, "loss"), _histograms(runs, kept, "weight"), _against_loss(runs, recorded)]
    items += [table for i, run in weighed for table in _documents(runs, i)][: 2 * _TABLES]
    return Section(
        "Sample weights",
        "Each optimizer step gives every sample of its global batch a weight from its loss; a weight of 1 (times B) is "
        "that of a plain mean.",
        items,
    )


def _ess(runs: Sequence[RunRecord], weighed: Sequence[tuple[int, RunRecord]]) -> Chart:
    if len(runs) > 1:
        views = [View(over_runs(runs, "reweight/ess"))]
    else:
        series = (
            ("reweight/ess", "effective sample size / B", "--s1", 1.6),
            ("reweight/max_weight", "largest weight (B w)", "--s2", 1.0),
            ("reweight/audit_kl", "audit: KL(true || used)", "--s4", 1.2),
            ("moe/starved_experts", "starved experts", "--s6", 1.2),
        )
        run = weighed[0][1]
        views = [View([*chain.from_iterable(
            line(run.steps, key, name, run=0, color=color, width=width) for key, name, color, width in series
            if key in ("reweight/ess", "reweight/max_weight") or run.steps[key][~np.isnan(run.steps[key])].any()
        )])]  # fmt: skip
    return Chart(
        "Effective sample size",
        "1 / (B sum w²): 1 is a plain mean; 0.5 a batch in which half of the samples count. Below about 0.3 most "
        "of a batch is work thrown away.",
        views, {"yaxis": axis("", rangemode="tozero")}, direct=len(runs) > 1,
    )  # fmt: skip


def _temperature(runs: Sequence[RunRecord], weighed: Sequence[tuple[int, RunRecord]]) -> Chart:
    traces = over_runs(runs, "reweight/temperature")
    return Chart("Temperature", "Large: every sample alike; small: the favoured losses alone.",
                 [View(traces, layout={"yaxis": log_axis("temperature", traces)})], direct=len(runs) > 1)  # fmt: skip


def _histograms(runs: Sequence[RunRecord], recorded: Sequence[tuple[int, Sequence[Row]]], column: str) -> Chart:
    views = []
    for i, rows in recorded:
        values = [np.array(_numbers(row, column)) for row in rows]
        every = np.concatenate(values) if values else np.zeros(0)
        if not len(every):
            continue
        low, high = (0.0 if column == "weight" else float(every.min())), float(every.max())
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        middles, width = digits((edges[1:] + edges[:-1]) / 2), float(edges[1] - edges[0])
        counts = [np.histogram(each, edges)[0].tolist() for each in values]
        frames = [
            Frame(
                f"{row['step']:,}",
                [{"type": "bar", "name": column, "x": middles, "y": count, "width": width * 0.94,
                  "marker": {"color": "--s1" if column == "loss" else "--s2", "line": {"width": 0}},
                  "hovertemplate": "%{y} samples at %{x}<extra></extra>"}],
            )
            for row, count in zip(rows, counts, strict=True)
        ]  # fmt: skip
        top = max(map(max, counts))
        layout = {"xaxis": {"range": [float(edges[0]), float(edges[-1])]}, "yaxis": {"range": [0, top * 1.05]}}
        views.append(View(labels=menu(runs, i), frames=frames, layout=layout))
    title, unit = {"loss": ("Losses of a step", "loss, nats a token"), "weight": ("Weights of a step", "weight (B w)")}[
        column
    ]
    return Chart(title, "Samples of one step in each bin; move the slider through the run.", views,
                 {"xaxis": axis(unit), "yaxis": axis("samples"), "bargap": 0})  # fmt: skip


def _against_loss(runs: Sequence[RunRecord], recorded: Sequence[tuple[int, Sequence[Row]]]) -> Chart:
    views = []
    for i, rows in recorded:
        size = max(len(row["reweight/samples/loss"]) for row in rows)
        frames = [Frame(f"{row['step']:,}", [_dots(row)]) for row in frames_that_fit(rows, 2 * size, len(recorded))]
        drawn = [frame.traces[0] for frame in frames]
        losses = [x for trace in drawn for x in trace["x"]] or [0.0]
        weights = [y for trace in drawn for y in trace["y"]] or [1.0]
        margin = 0.03 * (max(losses) - min(losses)) or 1
        layout = {
            "xaxis": {"range": [min(losses) - margin, max(losses) + margin]},
            "yaxis": {"range": [0, 1.05 * max(weights)]},
        }
        views.append(View(labels=menu(runs, i), frames=frames, layout=layout))
    return Chart("Weight against loss", "What the strategy made of each loss; a dot is a sample of the step.", views,
                 {"xaxis": axis("loss, nats a token"), "yaxis": axis("weight (B w)")}, wide=True)  # fmt: skip


def _dots(row: Row) -> Trace:
    return {
        "type": "scatter", "mode": "markers", "name": "samples", "x": digits(_numbers(row, "loss")),
        "y": digits(_numbers(row, "weight")), "marker": {"color": "--s1", "size": 7, "opacity": 0.65},
    }  # fmt: skip


def _documents(runs: Sequence[RunRecord], number: int) -> list[Table]:
    run = runs[number]
    shown = [row for row in run.evaluations if row.get("reweight/documents")]
    shown = shown[-_TABLES if len(runs) == 1 else -1 :]
    whose = f"{run.name}, " if len(runs) > 1 else ""
    return [
        Table(
            f"Most and least weighted samples, {whose}step {row['step']:,}",
            "Of the last step before this evaluation, with the beginning of the text.",
            ["weight (B w)", "loss", "domain", "sample", "text"],
            [
                [f"{e['weight']:.3f}", f"{e['loss']:.3f}", str(e["domain"]), f"{e['sample']:,}", str(e["text"])]
                for e in row["reweight/documents"]
            ],
            folded=True,
        )
        for row in reversed(shown)
    ]


def _numbers(row: Row, column: str) -> list[float]:
    """A column of the samples of a step, without samples that have no target."""
    values, tokens = row[f"reweight/samples/{column}"], row["reweight/samples/tokens"]
    losses = row["reweight/samples/loss"]
    return [
        value
        for value, count, loss in zip(values, tokens, losses, strict=True)
        if count and value is not None and loss is not None
    ]
