"""The section on balance: how even the experts' loads were, and what it took."""

from collections.abc import Sequence

from launch.report_sections._experts import expert_charts
from launch.report_sections._parts import (
    INK,
    MAX_POINTS,
    MUTED,
    Chart,
    Section,
    Trace,
    View,
    axis,
    line,
    marked,
    menu,
)  # fmt: skip
from launch.report_sections._record import RunRecord
from launch.report_sections._runs import over_runs

_MAX_LINE_POINTS = 60_000  # of the layers' lines of all runs


def balance(runs: Sequence[RunRecord]) -> Section | None:
    """Loads, biases, specialisation and duality gap; None for runs that did not measure them."""
    measured = [(i, run) for i, run in enumerate(runs) if run.layers]
    if not measured:
        return None
    charts = [_violations(runs, measured)]
    charts += expert_charts(runs)
    entropies = over_runs(runs, "moe/load_entropy") if len(runs) > 1 else _entropy(runs[0])
    if entropies:
        charts.append(
            Chart("Evenness", "Entropy of a step's loads relative to that of even ones: 1 is perfect balance.",
                  [View(entropies, layout={"yaxis": axis("relative entropy")})], direct=len(runs) > 1)
        )  # fmt: skip
    if any("moe/duality_gap" in run.evals for _, run in measured):
        charts.append(_gap(runs, measured))
    return Section("Expert balance", " ".join(filter(None, (_certificate(runs), _dead(runs)))), charts)


def _certificate(runs: Sequence[RunRecord]) -> str:
    """How many evaluations are certified, over all runs."""
    certified = sum(int((run.evals["moe/certificate"] == 1).sum()) for run in runs)
    if not certified:
        return "No balance certificate: no rule moved a bias."
    return (
        f"Balance certificate: {certified} of {sum(run.evals.count for run in runs)} evaluations. Each says that "
        "every MoE layer is balanced, loads were tokens x K at every step, and biases are float32, alike on all "
        "ranks and moved by their hook alone."
    )


def _dead(runs: Sequence[RunRecord]) -> str:
    dead = [(run, run.steps.line("moe/dead_experts")[1]) for run in runs]
    ended = [
        f"{run.name if len(runs) > 1 else 'the run'} {int(values[-1])}"
        for run, values in dead
        if len(values) and values[-1]
    ]
    return f"Experts without a token in the last step: {', '.join(ended)}." if ended else ""


def _violations(runs: Sequence[RunRecord], measured: Sequence[tuple[int, RunRecord]]) -> Chart:
    views, points = [], MAX_POINTS
    if len(runs) > 1:
        points = max(100, _MAX_LINE_POINTS // sum(len(run.layers) for _, run in measured))
        views = [
            View(over_runs(runs, "eval/maxvio_global", evaluations=True), ("held-out, all runs", "mean")),
            View(over_runs(runs, "moe/maxvio_batch"), ("training batches, all runs", "mean")),
        ]
    for i, run in measured:
        traces: list[Trace] = []
        many = len(run.layers) > 8
        for layer in run.layers:
            traces += line(
                run.steps, f"moe/layer{layer}/maxvio", f"layer {layer}", run=i, width=0.8, at_most=points,
                color="--muted/0.35" if many else f"--s{layer % 8 + 1}/0.45", showlegend=False,
            )  # fmt: skip
        if len(run.layers) > 1:
            traces += line(run.steps, "moe/maxvio_batch", "batch", run=i, color=INK, width=1.4, at_most=points)
        traces += marked(run.evals, "eval/maxvio_global", "held-out", run=i, color="--s2", width=2.4)
        views.append(View(traces, menu(runs, i, *(("by layer",) if len(runs) > 1 else ()))))
    return Chart(
        "MaxVio",
        "How far the busiest expert of a layer lies above the mean load: of each training batch (thin: one layer; "
        "dark: their mean), and over all held-out text. 0 is perfect balance.",
        [view for view in views if view.traces], {"yaxis": axis("MaxVio", rangemode="tozero")}, wide=True, direct=True,
        height=380,
    )  # fmt: skip


def _entropy(run: RunRecord) -> list[Trace]:
    return line(run.steps, "moe/load_entropy", "mean of layers", run=0, color="--s1", width=1.2)


def _gap(runs: Sequence[RunRecord], measured: Sequence[tuple[int, RunRecord]]) -> Chart:
    views = [View(over_runs(runs, "moe/duality_gap", evaluations=True), ("all runs",))] if len(runs) > 1 else []
    if len(runs) == 1:
        for i, run in measured:
            traces: list[Trace] = []
            for layer in run.layers if len(run.layers) > 1 else ():
                traces += line(run.evals, f"moe/layer{layer}/duality_gap", f"layer {layer}", run=i, width=1,
                               color=MUTED, showlegend=False)  # fmt: skip
            views.append(View([*traces, *marked(run.evals, "moe/duality_gap", "mean", run=i, color="--s1", width=2.2)]))
    return Chart(
        "Duality gap",
        "d(p) less the value of the best balanced assignment, for each token of a held-out sample: an upper bound on "
        "the score that perfect balance would still cost at these biases.",
        views, {"yaxis": axis("score a token", rangemode="tozero")}, direct=len(runs) > 1,
    )  # fmt: skip
