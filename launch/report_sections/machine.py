"""The section on the machine: tokens a second, where a step's time went, memory."""

from collections.abc import Sequence

import numpy as np

from launch.report_sections._parts import Chart, Section, View, axis, color_of, digits, line, menu
from launch.report_sections._record import RunRecord
from launch.report_sections._runs import over_runs

_WHOLE = "time/step_s"
_STRETCHES = 150


def machine(runs: Sequence[RunRecord]) -> Section | None:
    """Speed and memory; None where no step was timed."""
    if not any(_WHOLE in run.steps for run in runs):
        return None
    charts = [_speed(runs), _time(runs)]
    for key, title, note, unit in (
        (
            "memory/gib",
            "Memory",
            "Highest so far: of the accelerator's allocator, or of a rank's process on a CPU.",
            "GiB",
        ),
        ("mfu", "Model FLOPs utilisation", "Of the accelerator's dense peak.", "share"),
    ):
        traces = over_runs(runs, key)
        if traces:
            layout = {"yaxis": axis(unit, rangemode="tozero")}
            charts.append(Chart(title, note, [View(traces, layout=layout)], direct=len(runs) > 1))
    return Section("Speed and memory", _words(runs), charts)


def _words(runs: Sequence[RunRecord]) -> str:
    run = runs[0]
    times = run.steps.line(_WHOLE)[1]
    if len(runs) > 1 or len(times) < 20:
        return "Time of training steps; evaluations, checkpoints and restarts are not in it."
    median, slow = np.median(times), int((times > 3 * np.median(times)).sum())
    return (
        f"Median step {median:.3g} s, slowest {times.max():.3g} s; {slow:,} of {len(times):,} steps took more "
        "than three "
        "times the median. Evaluations, checkpoints and restarts are not in it."
    )


def _speed(runs: Sequence[RunRecord]) -> Chart:
    return Chart(
        "Throughput", "Target tokens a second, all ranks together.",
        [View(over_runs(runs, "tokens_per_s"), layout={"yaxis": axis("tokens / s", rangemode="tozero")})],
        direct=len(runs) > 1,
    )  # fmt: skip


def _time(runs: Sequence[RunRecord]) -> Chart:
    """Parts of a step's time, stacked: whatever `time/..._s` the run has recorded; the rest of the step on top."""
    views = []
    for i, run in enumerate(runs):
        if _WHOLE not in run.steps:
            continue
        parts = [key for key in run.steps.names() if key.startswith("time/") and key.endswith("_s") and key != _WHOLE]
        columns = {key.removeprefix("time/").removesuffix("_s"): np.nan_to_num(run.steps[key]) for key in parts}
        whole = np.nan_to_num(run.steps[_WHOLE])
        # Parts that overlap (a breakdown within another) would stack above the step: then they are drawn as lines.
        overlap = sum(columns.values(), np.zeros_like(whole)).sum() > 1.02 * whole.sum()
        if not overlap:
            columns["rest of the step"] = np.maximum(whole - sum(columns.values(), np.zeros_like(whole)), 0)
        cuts = np.linspace(0, run.steps.count, min(_STRETCHES, run.steps.count) + 1).round().astype(int)[:-1]
        counts = np.diff(np.append(cuts, run.steps.count))
        x = digits(run.steps["step"][np.append(cuts[1:], run.steps.count) - 1], 8)
        traces = [
            {
                "type": "scatter", "mode": "lines", "name": name, "run": i, "x": x,
                "y": digits(np.add.reduceat(values, cuts) / counts),
                "line": {"color": color_of(d), "width": 1.2 if overlap else 0.5},
                **({} if overlap else {"stackgroup": "all", "fillcolor": f"{color_of(d)}/0.55"}),
            }
            for d, (name, values) in enumerate(columns.items())
        ]  # fmt: skip
        if overlap:
            traces += line(run.steps, _WHOLE, "whole step", run=i, color="--ink")
        views.append(View(traces, menu(runs, i)))
    return Chart("Time of a step", "Means over stretches of the run, by what the time went into.", views,
                 {"yaxis": axis("seconds", rangemode="tozero")})  # fmt: skip
