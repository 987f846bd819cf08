"""The section on the machine: tokens a second, where a step's time went, memory."""

from collections.abc import Sequence

import numpy as np

from launch.report_sections._parts import Chart, Section, Trace, View, axis, color_of, digits, means, menu
from launch.report_sections._record import RunRecord
from launch.report_sections._runs import over_runs

_WHOLE = "time/step_s"
_STRETCHES = 150
_NEGLIGIBLE = 0.002


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
        f"Median step {median:.3g} s, slowest {times.max():.3g} s; {slow:,} of {len(times):,} steps took more than "
        "three times the median. Evaluations, checkpoints and restarts are not in it."
    )


def _speed(runs: Sequence[RunRecord]) -> Chart:
    return Chart(
        "Throughput", "Target tokens a second, all ranks together.",
        [View(over_runs(runs, "tokens_per_s"), layout={"yaxis": axis("tokens / s", rangemode="tozero")})],
        direct=len(runs) > 1,
    )  # fmt: skip


def _time(runs: Sequence[RunRecord]) -> Chart:
    """Parts of a step's time, stacked: whatever `time/..._s` the run has recorded, the rest of the step on top."""
    views = []
    for i, run in enumerate(runs):
        names = [key for key in run.steps.names() if key.startswith("time/") and key.endswith("_s") and key != _WHOLE]
        phases = [name for name in names if name.count("/") == 1]
        # A phase may be divided: time/forward_s into time/forward/experts_s and others.
        parts = [name for name in names if name.count("/") == 2]
        divided = {part.rpartition("/")[0] + "_s" for part in parts}
        if _WHOLE in run.steps:
            views.append(View(_stack(run, i, phases), menu(runs, i, *(["phases"] if parts else []))))
        if parts:
            whole = [phase for phase in phases if phase not in divided]
            views.append(View(_stack(run, i, [*whole, *parts]), menu(runs, i, "their parts")))
    return Chart("Time of a step", "Means over stretches of the run, by what the time went into.", views,
                 {"yaxis": axis("seconds", rangemode="tozero")})  # fmt: skip


def _stack(run: RunRecord, number: int, keys: Sequence[str]) -> list[Trace]:
    x, whole = means(run.steps, _WHOLE, _STRETCHES)
    columns = {}
    for key in keys:
        steps, values = means(run.steps, key, _STRETCHES)
        if len(steps):  # a stretch that was not divided, of a run whose configuration changed, counts as none
            columns[key.removeprefix("time/").removesuffix("_s")] = np.where(
                np.isin(x, steps), np.interp(x, steps, values), 0.0
            )
    rest = np.maximum(whole - sum(columns.values(), np.zeros_like(whole)), 0.0)
    if rest.sum() > _NEGLIGIBLE * whole.sum():
        columns["rest of the step"] = rest
    return [
        {
            "type": "scatter", "mode": "lines", "name": name, "run": number, "x": digits(x, 8), "y": digits(values),
            "line": {"color": color_of(d), "width": 0.5}, "stackgroup": "all", "fillcolor": f"{color_of(d)}/0.55",
        }
        for d, (name, values) in enumerate(columns.items())
    ]  # fmt: skip
