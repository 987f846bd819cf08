"""One chart over several runs: which colour a run has, and a metric of all of them."""

from collections.abc import Sequence

from launch.report_sections._parts import Trace, color_of, line, marked
from launch.report_sections._record import RunRecord

MAX_LEGEND = 12


def names_of_variants(runs: Sequence[RunRecord]) -> list[str]:
    """Variants in the order of their first run; a run outside a grid is its own."""
    return list(dict.fromkeys(run.variant or run.name for run in runs))


def hue(runs: Sequence[RunRecord], number: int) -> str:
    """The colour of a run: runs of one variant share it."""
    return color_of(names_of_variants(runs).index(runs[number].variant or runs[number].name))


def over_runs(runs: Sequence[RunRecord], key: str, *, evaluations: bool = False) -> list[Trace]:
    """A metric of every run; a variant's runs are drawn alike and named once."""
    traces: list[Trace] = []
    seen: set[str] = set()
    for number, run in enumerate(runs):
        name = run.variant or run.name
        columns = run.evals if evaluations else run.steps
        draw = marked if evaluations else line
        found = draw(columns, key, name, run=number, color=hue(runs, number), width=1.6 if len(runs) < 9 else 1.1)
        for trace in found:
            trace["legendgroup"] = name
            trace["showlegend"] = name not in seen and len(runs) > 1
            trace["hovertemplate"] = f"{run.name}: %{{y}}<extra></extra>"
            seen.add(name)
        traces += found
    return traces
