"""Charts of single experts: their loads over the run, their biases, and the domains that they take."""

from collections.abc import Sequence

from launch.report_sections._parts import (
    Chart,
    Frame,
    Trace,
    View,
    axis,
    digits,
    frames_that_fit,
    menu,
)  # fmt: skip
from launch.report_sections._record import RunRecord
from trainer.metrics import Row

_MAX_LINES = 12_000
"""Experts of all runs that are drawn: each costs some two hundred bytes, however short its line."""


def expert_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Load maps, biases and specialisation; none for runs that did not evaluate their balance."""
    measured = [(i, [row for row in run.evaluations if row.get("moe/loads")]) for i, run in enumerate(runs)]
    loaded = _affordable(runs, [(i, rows) for i, rows in measured if rows])
    return [_load_map(runs, loaded), _biases(runs, loaded), _specialisation(runs, loaded)] if loaded else []


def _affordable(
    runs: Sequence[RunRecord], loaded: Sequence[tuple[int, Sequence[Row]]]
) -> list[tuple[int, Sequence[Row]]]:
    """All runs; or where that is too much the first of each variant, and of these as many as can be drawn."""

    def cost(chosen: Sequence[tuple[int, Sequence[Row]]]) -> int:
        return sum(len(loads) for _, rows in chosen for loads in rows[-1]["moe/loads"])

    chosen = list(loaded)
    if cost(chosen) > _MAX_LINES:
        first = {runs[i].variant or runs[i].name: (i, rows) for i, rows in reversed(loaded)}
        chosen = sorted(first.values(), key=lambda each: each[0])
    while len(chosen) > 1 and cost(chosen) > _MAX_LINES:
        chosen.pop()
    return chosen


def _load_map(runs: Sequence[RunRecord], loaded: Sequence[tuple[int, Sequence[Row]]]) -> Chart:
    views = []
    for i, rows in loaded:
        shape = rows[-1]["moe/loads"]
        kept = frames_that_fit(rows, 2 * sum(map(len, shape)), len(loaded))  # every number is drawn twice
        frames = [Frame(f"{row['step']:,}", [_map(row["moe/loads"], "layer %{y}, expert %{x}")]) for row in kept]
        views.append(View(labels=menu(runs, i, "all layers"), frames=frames))
        for layer in range(len(shape)) if len(kept) > 1 else ():
            course = [list(each) for each in zip(*(row["moe/loads"][layer] for row in kept), strict=True)]
            if any(load is not None for load in course[0]):  # not a layer that only trains
                trace = _map(course, "expert %{y}") | {"run": i, "x": [row["step"] for row in kept]}
                layout = {"xaxis": {}, "yaxis": axis("expert", dtick=None)}
                views.append(View([trace], menu(runs, i, f"layer {layer} over time"), layout))
    layers = max(len(rows[-1]["moe/loads"]) for _, rows in loaded)
    return Chart(
        "Held-out load of each expert",
        "Relative to an even share of the layer's tokens; blue gets less, red more. Move the slider through the "
        "evaluations, or choose a layer in the menu and see its whole course.",
        views, {"xaxis": axis("expert"), "yaxis": axis("layer", autorange="reversed", dtick=1 if layers < 16 else 4)},
        wide=True, height=200 + min(24 * layers, 420),
    )  # fmt: skip


def _map(loads: Sequence[Sequence[float | None]], what: str) -> Trace:
    """Relative loads as a map."""
    return {
        "type": "heatmap", "ratio": True, "z": [digits(row, 4) for row in loads],
        "hovertemplate": f"{what}: %{{customdata:.3f}} of an even share<extra></extra>",
    }  # fmt: skip


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
        "How much of a domain's held-out text an expert takes, relative to an even share: a row without colour is "
        "a domain without specialists.",
        views, {"xaxis": axis("expert"), "yaxis": {"autorange": "reversed"}}, height=200 + _height(runs, loaded),
    )  # fmt: skip


def _height(runs: Sequence[RunRecord], loaded: Sequence[tuple[int, Sequence[Row]]]) -> int:
    """Of a map with a row for each domain, in pixels."""
    return min(26 * max((len(runs[i].domain_names) for i, _ in loaded), default=1), 420)


def _domain_map(run: RunRecord, row: Row, layer: int) -> Trace | None:
    loads = row.get(f"moe/layer{layer}/domain_loads") or []
    names = run.domain_names if len(run.domain_names) == len(loads) else [f"domain {i}" for i in range(len(loads))]
    shown = [(name, counts) for name, counts in zip(names, loads, strict=True) if sum(counts)]
    if not shown:
        return None  # a layer that only trains
    loads = [[count * len(counts) / sum(counts) for count in counts] for _, counts in shown]
    return _map(loads, "%{y}, expert %{x}") | {"y": [name for name, _ in shown]}
