"""The section that compares the variants of a grid with its baseline."""

import numpy as np

from launch.report_sections._grid import GridRecord
from launch.report_sections._grid_charts import Values, variant_charts
from launch.report_sections._measures import MEASURES, Measure
from launch.report_sections._parts import Chart, Section, Table, Tile, number, si
from launch.report_sections._statistics import Difference, compare, first_reached, what_can_be_said


def comparison(grid: GridRecord) -> list[Section]:
    """Two sections: the headline; and differences with intervals and tests, dots of seeds, costs, what failed."""
    items: list[Table] = []
    every: dict[str, Values] = {}
    differences: dict[str, dict[str, Difference]] = {}
    for measure in MEASURES:
        values = {variant: _values(grid, variant, measure) for variant in grid.variants}
        if any(values.values()):
            found = compare(values, grid.baseline) if grid.baseline else {}
            every[measure.label], differences[measure.label] = values, found
            items.append(_table(grid, measure, values, found))
    charts, cost = variant_charts(grid, every, differences), _cost(grid)
    tables: list[Chart | Table] = [
        *items[:1],
        *charts,
        *([cost] if cost else []),
        *_crossed(grid),
        *items[1:],
        *_unfinished(grid),
    ]
    intro = (
        "Only runs that reached their last step are compared. A run is paired with the baseline's run of the same "
        "seed, which had the same initial weights and samples unless the variant changes model or data."
    )
    headline = _headline(grid, every, differences.get(MEASURES[0].label, {}))
    return [Section("Overview", "", [headline]), Section("Variants", intro, tables)]


def _values(grid: GridRecord, variant: str, measure: Measure) -> dict[int, float]:
    found = {seed: measure.of(run) for seed, run in grid.complete(variant).items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _table(grid: GridRecord, measure: Measure, values: Values, found: dict[str, Difference]) -> Table:
    form, rows = measure.form, []
    signed = f"+{form}"
    for variant in grid.variants:
        numbers = np.array(list(values[variant].values()))
        each = found.get(variant)
        rows.append(
            [
                variant, str(len(numbers)), number(float(numbers.mean()) if len(numbers) else None, form),
                number(float(numbers.std(ddof=1)) if len(numbers) > 1 else None, form),
                *(
                    [
                        number(each.mean, signed), _interval(each.t_interval, signed),
                        _interval(each.bootstrap, signed),
                        _p(each.p), _p(each.p_holm), _verdict(each, measure),
                    ]
                    if each
                    else ["–"] * 5 + ["baseline" if variant == grid.baseline else "–"]
                ),
            ]
        )  # fmt: skip
    pairs = max((len(each.values_N) for each in found.values()), default=0)
    note = what_can_be_said(pairs, len(found)) if found else "No baseline: means only."
    means = {variant: np.mean(list(by_seed.values())) for variant, by_seed in values.items() if by_seed}
    best = (min if measure.less_is_better else max)(means, key=means.__getitem__)
    columns = ["variant", "seeds", "mean", "sd", "difference", "95 % t", "95 % bootstrap", "p", "p (Holm)", "verdict"]
    if not found:
        columns, rows = columns[:4], [row[:4] for row in rows]
    title = measure.label[0].upper() + measure.label[1:]
    return Table(title, note, columns, rows, frozenset({grid.variants.index(best)}), folded=measure is not MEASURES[0])


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return "–" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _p(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else number(value)


def _verdict(each: Difference, measure: Measure) -> str:
    if len(each.values_N) < 2:
        return "one seed"
    if not each.values_N.any():
        return "identical"
    if not each.is_shown:
        return "no difference shown"
    return "better" if (each.mean < 0) == measure.less_is_better else "worse"


def _headline(grid: GridRecord, values: dict[str, Values], found: dict[str, Difference]) -> list[Tile]:
    """The figures of a grid: how far it is, what was best, and how many differences stand."""
    complete = sum(len(grid.complete(variant)) for variant in grid.variants)
    tiles = [Tile("runs complete", f"{complete} of {len(grid.plan)}", f"{len(grid.variants)} variants")]
    for measure, short in zip(MEASURES, ("loss", "MaxVio"), strict=False):
        means = {v: float(np.mean(list(n.values()))) for v, n in values.get(measure.label, {}).items() if n}
        if grid.baseline in means:
            tiles.append(Tile(f"baseline {short}", number(means[grid.baseline], measure.form), grid.baseline))
        if means:
            best = min(means, key=means.__getitem__)
            tiles.append(Tile(f"least {short}", number(means[best], measure.form), best))
    if found:
        shown = sum(each.is_shown for each in found.values())
        tiles.append(Tile("differences that stand", f"{shown} of {len(found)}", "loss, after Holm"))
    tokens = sum(run.steps.last("tokens") or 0.0 for run in grid.runs)
    return [
        *tiles,
        Tile(
            "tokens trained",
            si(tokens),
            f"{sum(float(run.hours[-1]) for run in grid.runs if run.steps.count):.2g} h of steps",
        ),
    ]


def _cost(grid: GridRecord) -> Table | None:
    """Tokens at which a run's held-out loss first comes to what its seed's baseline ended with."""
    base = grid.complete(grid.baseline) if grid.baseline else {}
    rows = []
    for variant in grid.variants:
        tokens, shares, hours, pairs = [], [], [], 0
        for seed, run in grid.complete(variant).items():
            target = base[seed].evals.last("eval/loss") if seed in base else None
            if target is None:
                continue
            pairs += 1
            step = first_reached(*run.evals.line("eval/loss"), target)
            if step is not None:
                at = [float(run.on_axis(name, np.array([step]))[0]) for name in ("tokens", "hours")]
                tokens.append(at[0])
                hours.append(at[1])
                shares.append(at[0] / (base[seed].steps.last("tokens") or np.nan))
        if pairs:
            mean = [float(np.mean(each)) if each else None for each in (tokens, shares, hours)]
            rows.append([variant, f"{len(tokens)} of {pairs}", si(mean[0]), number(mean[1], ".1%"),
                         number(None if mean[2] is None else mean[2] * 60, ".2f")])  # fmt: skip
    if not rows:
        return None
    return Table(
        "Cost to reach the baseline's loss",
        "Tokens and minutes of training steps until the held-out loss first came to what the baseline of the same "
        "seed ended with, linearly between evaluations; means over the seeds that reached it.",
        ["variant", "reached", "tokens", "of the baseline's", "minutes"], rows,
    )  # fmt: skip


def _crossed(grid: GridRecord) -> list[Table]:
    """Means of held-out loss over two axes that are crossed, as a square."""
    keys = [key for key in grid.axes if all(key in run.settings for run in grid.plan)]
    if len(keys) != 2:
        return []
    cells: dict[tuple[str, str], list[float]] = {}
    for planned in grid.plan:
        run = grid.complete(planned.variant).get(planned.seed)
        loss = run.evals.last("eval/loss") if run else None
        if loss is not None:
            cells.setdefault((str(planned.settings[keys[0]]), str(planned.settings[keys[1]])), []).append(loss)
    downs, across = ([str(value) for value in grid.axes[key]] for key in keys)
    rows = [[down, *(number(float(np.mean(cells[down, a])) if (down, a) in cells else None, ".4f") for a in across)]
            for down in downs]  # fmt: skip
    short = [key.rsplit(".", 1)[-1] for key in keys]
    return [
        Table(
            f"Held-out loss: {keys[0]} by {keys[1]}", "Means over seeds.", [f"{short[0]} \\ {short[1]}", *across], rows
        )
    ]


def _unfinished(grid: GridRecord) -> list[Table]:
    """Runs that are left out of the comparison, and why."""
    complete = {run.folder for variant in grid.variants for run in grid.complete(variant).values()}
    by_folder = {run.folder: run for run in grid.runs}
    rows = []
    for planned in grid.plan:
        if planned.folder not in complete:
            run = by_folder.get(planned.folder)
            at = f"{run.last_step:,} of {run.planned_steps:,}" if run and run.planned_steps else "–"
            rows.append([planned.folder.name, planned.status, at, planned.reason or "–"])
    return (
        [Table("Not compared", "Runs that are not complete.", ["run", "status", "step", "reason"], rows)]
        if rows
        else []
    )
