"""The section on the objective: training loss, held-out loss, gradient norm and learning rate."""

from collections.abc import Sequence

import numpy as np

from launch.report_sections._parts import (
    INK,
    MUTED,
    Chart,
    Section,
    Trace,
    View,
    axis,
    digits,
    line,
    log_axis,
    marked,
    means,
    thin,
)  # fmt: skip
from launch.report_sections._record import RunRecord
from launch.report_sections._runs import SEEDS, curve, has_seeds, over_runs
from launch.report_sections.events import events_of

_SMOOTH_POINTS = 120
_MARKED = ("resume", "skipped", "spike", "rewind")


def training(runs: Sequence[RunRecord]) -> Section | None:
    """Loss against step, tokens or time; None where no step and no evaluation was recorded."""
    charts = []
    if any(run.steps.count for run in runs):
        charts.append(_loss(runs))
    if any(run.evals.count for run in runs):
        charts.append(_heldout(runs))
    norms = over_runs(runs, "grad_norm")
    if norms:
        charts.append(
            Chart(
                "Gradient norm", "Before clipping, with all ranks' gradients reduced.",
                [View(norms, layout={"yaxis": log_axis("norm", norms)})], direct=len(runs) > 1,
            )
        )  # fmt: skip
    if any("lr" in run.steps for run in runs):
        traces = over_runs(runs, "lr")
        charts.append(
            Chart("Learning rate", "Of the step that was taken.",
                  [View(traces, layout={"yaxis": axis("rate", rangemode="tozero")})],
                  direct=len(runs) > 1)
        )  # fmt: skip
    if not charts:
        return None
    return Section("Loss", "The horizontal axis of these charts is chosen at the top of the page.", charts)


def _loss(runs: Sequence[RunRecord]) -> Chart:
    if len(runs) > 1:
        traces = over_runs(runs, "loss", smooth=True)
        note = SEEDS if has_seeds(runs) else "Averaged over stretches of the run, so that runs can be told apart."
    else:
        run = runs[0]
        traces = [
            *_band(run),
            *_each_step(run),
            *curve(*means(run.steps, "loss", min(_SMOOTH_POINTS, run.steps.count // 10 + 2)), "training", 0, "--s1"),
        ]
        traces += marked(run.evals, "eval/loss", "held-out", run=0, color="--s2")
        marks = _events(run)
        traces += marks
        note = "Every step (faint), its mean over stretches of the run, and held-out text."
        note += " Triangles are restarts, skipped steps and spikes: see the events below." if marks else ""
    return Chart("Training loss", note, [View(traces, layout={"yaxis": axis("loss, nats a token")})], wide=True,
                 direct=True, height=400)  # fmt: skip


def _each_step(run: RunRecord) -> list[Trace]:
    return line(run.steps, "loss", "each step", run=0, color="--s1/0.35", width=1, showlegend=False, hoverinfo="skip")


def _band(run: RunRecord) -> list[Trace]:
    """Least and largest loss of each stretch, where a long run is thinned."""
    x, mean, low, high = thin(*run.steps.line("loss"))
    if low is mean:
        return []
    common = {"type": "scatter", "mode": "lines", "run": 0, "x": x.astype(int).tolist(), "line": {"width": 0},
              "showlegend": False, "hoverinfo": "skip"}  # fmt: skip
    return [
        {**common, "name": "least", "y": digits(low)},
        {**common, "name": "largest", "y": digits(high), "fill": "tonexty", "fillcolor": "--s1/0.15"},
    ]


def _events(run: RunRecord) -> list[Trace]:
    """Restarts, skips and spikes, where they were."""
    steps, losses = run.steps.line("loss")
    found = [event for event in events_of(run) if event.kind in _MARKED and event.step is not None]
    if not found or not len(steps):
        return []
    at = np.array([float(event.step or 0) for event in found])
    return [
        {"type": "scatter", "mode": "markers", "name": "events", "run": 0, "x": digits(at, 8),
         "y": digits(np.interp(at, steps, losses)), "text": [f"{event.kind}, step {event.step:,}" for event in found],
         "hovertemplate": "%{text}<extra></extra>", "showlegend": False,
         "marker": {"symbol": "triangle-down", "size": 10, "color": "--bad"}}
    ]  # fmt: skip


def _heldout(runs: Sequence[RunRecord]) -> Chart:
    if len(runs) > 1:
        traces = over_runs(runs, "eval/loss", evaluations=True)
        return Chart("Held-out loss", f"All domains. {SEEDS}" if has_seeds(runs) else "All domains.",
                     [View(traces, layout={"yaxis": axis("loss, nats a token")})], wide=True, direct=True)  # fmt: skip
    run = runs[0]
    names = run.heldout_domains
    traces = [
        trace
        for i, name in enumerate(names)
        for trace in marked(run.evals, f"eval/{name}/ppl", name, run=0, color=f"--s{i % 8 + 1}", width=1.5)
    ]
    traces += marked(run.evals, "eval/ppl", "all", run=0, color=INK if names else MUTED, width=2.5)
    return Chart(
        "Held-out perplexity by domain", "exp of the mean loss a token; the scale is logarithmic.",
        [View(traces, layout={"yaxis": log_axis("perplexity", traces)})],
        wide=True, direct=True, height=400,
    )  # fmt: skip
