"""The section on balance: how even the experts' loads were, and what it took."""

from collections.abc import Sequence
from typing import Any

from launch.report_sections._parts import (
    INK,
    MUTED,
    Chart,
    Frame,
    Section,
    Trace,
    View,
    axis,
    digits,
    frames_that_fit,
    line,
    marked,
    menu,
)  # fmt: skip
from launch.report_sections._record import RunRecord
from launch.report_sections._runs import over_runs
from trainer.metrics import Row


def balance(runs: Sequence[RunRecord]) -> Section | None:
    """Loads, biases, specialisation and duality gap; None for runs that did not measure them."""
    measured = [(i, run) for i, run in enumerate(runs) if run.layers]
    if not measured:
        return None
    charts = [_violations(runs, measured)]
    loaded = [(i, [row for row in run.evaluations if row.get("moe/loads")]) for i, run in measured]
    loaded = [(i, rows) for i, rows in loaded if rows]
    if loaded:
        charts += [_load_map(runs, loaded), _biases(runs, loaded), _specialisation(runs, loaded)]
    entropies = over_runs(runs, "moe/load_entropy") if len(runs) > 1 else _entropy(runs[0])
    if entropies:
        charts.append(
            Chart("Evenness", "Entropy of a step's loads relative to that of even ones: 1 is perfect balance.",
                  [View(entropies, layout={"yaxis": axis("relative entropy")})], direct=len(runs) > 1)
        )  # fmt: skip
    if any("moe/duality_gap" in run.evals for _, run in measured):
        charts.append(_gap(runs, measured))
    return Section("Balance of the experts", " ".join(filter(None, (_certificate(runs), _dead(runs)))), charts)


def _certificate(runs: Sequence[RunRecord]) -> str:
    """How many evaluations are certified, over all runs."""
    certified = sum(int((run.evals["moe/certificate"] == 1).sum()) for run in runs)
    if not certified:
        return "No balance certificate: no rule moved a bias."
    return (
        f"Balance certificate: {certified} of {sum(run.evals.count for run in runs)} evaluations. Each says "
        "that every MoE "
        "layer is balanced, loads were tokens x K at every step, and biases are float32, alike on all ranks "
        "and moved by "
        "their hook alone."
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
    views = []
    if len(runs) > 1:
        views = [
            View(over_runs(runs, "eval/maxvio_global", evaluations=True), ("held-out, all runs", "mean")),
            View(over_runs(runs, "moe/maxvio_batch"), ("training batches, all runs", "mean")),
        ]
    for i, run in measured:
        traces: list[Trace] = []
        many = len(run.layers) > 8
        for layer in run.layers:
            traces += line(
                run.steps, f"moe/layer{layer}/maxvio", f"layer {layer}", run=i, width=0.8,
                color="--muted/0.35" if many else f"--s{layer % 8 + 1}/0.45", showlegend=False,
            )  # fmt: skip
        if len(run.layers) > 1:
            traces += line(run.steps, "moe/maxvio_batch", "batch", run=i, color=INK, width=1.4)
        traces += marked(run.evals, "eval/maxvio_global", "held-out", run=i, color="--s2", width=2.4)
        views.append(View(traces, menu(runs, i, *(("by layer",) if len(runs) > 1 else ()))))
    return Chart(
        "MaxVio",
        "How far the busiest expert of a layer lies above the mean load: of each training batch (thin: one "
        "layer; dark: their "
        "mean), and over all held-out text. 0 is perfect balance.",
        [view for view in views if view.traces], {"yaxis": axis("MaxVio", rangemode="tozero")}, wide=True, direct=True,
        height=380,
    )  # fmt: skip


def _load_map(runs: Sequence[RunRecord], loaded: Sequence[tuple[int, Sequence[Row]]]) -> Chart:
    views = []
    for i, rows in loaded:
        shape = rows[-1]["moe/loads"]
        frames = [
            Frame(
                f"{row['step']:,}",
                [
                    {
                        "type": "heatmap", "ratio": True, "z": [digits(loads, 4) for loads in row["moe/loads"]],
                        "hovertemplate": "layer %{y}, expert %{x}: %{customdata:.3f} of an even share<extra></extra>",
                    }
                ],
            )
            for row in frames_that_fit(rows, sum(map(len, shape)), len(loaded))
        ]  # fmt: skip
        views.append(View(labels=menu(runs, i), frames=frames))
    layers = max(len(rows[-1]["moe/loads"]) for _, rows in loaded)
    return Chart(
        "Held-out load of each expert",
        "Relative to an even share of the layer's tokens; blue gets less, red more. Move the slider through "
        "the evaluations.",
        views, {"xaxis": axis("expert"), "yaxis": axis("layer", autorange="reversed", dtick=1 if layers < 16 else 4)},
        wide=True, height=200 + min(24 * layers, 420),
    )  # fmt: skip


def _biases(runs: Sequence[RunRecord], loaded: Sequence[tuple[int, Sequence[Row]]]) -> Chart:
    views = []
    for i, rows in loaded:
        layers = [layer for layer in runs[i].layers if rows[-1].get(f"moe/layer{layer}/bias")]
        cells = sum(len(rows[-1][f"moe/layer{layer}/bias"]) for layer in layers)
        kept = frames_that_fit(rows, cells, len(loaded))
        for layer in layers:
            views.append(View(_courses(kept, f"moe/layer{layer}/bias", i), menu(runs, i, f"layer {layer}")))
    return Chart(
        "Selection biases",
        "One line an expert; those that end highest and lowest are named. Choose the layer in the menu.",
        views, {"yaxis": axis("bias")}, direct=True, height=240 + _height(runs, loaded),
    )  # fmt: skip


def _courses(rows: Sequence[Row], key: str, run: int) -> list[Trace]:
    """A line for each expert: all alike, but for the two that end at the extremes."""
    last: list[float] = rows[-1][key]
    extremes = {
        max(range(len(last)), key=last.__getitem__): "--high",
        min(range(len(last)), key=last.__getitem__): "--low",
    }
    if len(set(last)) == 1:
        extremes = {}  # a bias that never moved
    steps = [row["step"] for row in rows]

    def course(expert: int) -> Trace:
        color = extremes.get(expert)
        return {
            "type": "scatter", "mode": "lines", "name": f"expert {expert}", "run": run, "x": steps,
            "y": digits((row[key][expert] for row in rows), 4), "showlegend": color is not None,
            "line": {"color": color or "--muted/0.4", "width": 2 if color else 1},
        }  # fmt: skip

    order = sorted(range(len(last)), key=lambda expert: expert in extremes)  # the named ones on top
    return [course(expert) for expert in order]


def _specialisation(runs: Sequence[RunRecord], loaded: Sequence[tuple[int, Sequence[Row]]]) -> Chart:
    views = []
    for i, rows in loaded:
        run = runs[i]
        cells = sum(len(row) for layer in run.layers for row in rows[-1].get(f"moe/layer{layer}/domain_loads") or ())
        kept = frames_that_fit(rows, cells, len(loaded))
        for layer in run.layers:
            frames = [Frame(f"{row['step']:,}", [trace]) for row in kept if (trace := _domain_map(run, row, layer))]
            if frames:
                views.append(View(labels=menu(runs, i, f"layer {layer}"), frames=frames))
    return Chart(
        "Experts and domains",
        "How much of a domain's held-out text an expert takes, relative to an even share: a row without "
        "colour is a domain "
        "without specialists.",
        views, {"xaxis": axis("expert"), "yaxis": {"autorange": "reversed"}}, height=200 + _height(runs, loaded),
    )  # fmt: skip


def _height(runs: Sequence[RunRecord], loaded: Sequence[tuple[int, Sequence[Row]]]) -> int:
    """Of a map with a row for each domain, in pixels."""
    return min(26 * max((len(runs[i].domain_names) for i, _ in loaded), default=1), 420)


def _domain_map(run: RunRecord, row: Row, layer: int) -> dict[str, Any] | None:
    loads = row.get(f"moe/layer{layer}/domain_loads") or []
    names = run.domain_names if len(run.domain_names) == len(loads) else [f"domain {i}" for i in range(len(loads))]
    shown = [(name, counts) for name, counts in zip(names, loads, strict=True) if sum(counts)]
    if not shown:
        return None  # a layer that only trains
    return {
        "type": "heatmap", "ratio": True, "y": [name for name, _ in shown],
        "z": [digits((count * len(counts) / sum(counts) for count in counts), 4) for _, counts in shown],
        "hovertemplate": "%{y}, expert %{x}: %{customdata:.3f} of an even share<extra></extra>",
    }  # fmt: skip


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
