"""The time of a training step as numbers, table and flame graph: what `launch.profile` shows."""

import html
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.table import Table

from trainer.metrics import Row
from trainer.phases import MARK, PHASES

BETWEEN = "between steps"
"""Metrics that are copied and written, the log: the loop outside its steps, without evaluation and checkpoints."""
_MAX_OPERATIONS = 12  # of a part in the flame graph; the others are one box


class Operation(NamedTuple):
    """One operation of torch in the recorded step."""

    name: str
    start_us: float
    self_us: float
    """Without what it calls: on the host, or of its kernels on CUDA."""


@dataclass
class StepProfile:
    """Mean seconds of a step by phase (`forward`) and part (`forward/attention`), over steps and ranks."""

    seconds: dict[str, float]
    steps: int
    tokens_per_s: float
    operations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Seconds of torch's operations in each part (or undivided phase), from a step that was recorded apart."""

    @property
    def total(self) -> float:
        """Seconds of a step with what lies between two."""
        return sum(value for name, value in self.seconds.items() if "/" not in name)

    def parts(self, phase: str) -> dict[str, float]:
        """Parts of a phase, the longest first; empty if it is not divided."""
        found = {name: value for name, value in self.seconds.items() if name.startswith(f"{phase}/")}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def step_profile(rows: Sequence[Row], wall_s: float) -> StepProfile:
    """From the rows of measured steps and the seconds they took together, by the clock on the wall."""
    keys = [key for key in rows[0] if key.startswith("time/") and key.endswith("_s") and key != "time/step_s"]
    mean = {
        key.removeprefix("time/").removesuffix("_s"): sum(row.get(key, 0.0) for row in rows) / len(rows) for key in keys
    }
    mean[BETWEEN] = max(0.0, wall_s / len(rows) - sum(row["time/step_s"] for row in rows) / len(rows))
    return StepProfile(mean, len(rows), sum(row["tokens_per_s"] for row in rows) / len(rows))


def mean_over_ranks(profiles: Sequence[StepProfile]) -> StepProfile:
    """What an average rank does; operations are those of the first."""
    names = dict.fromkeys(name for profile in profiles for name in profile.seconds)
    mean = {name: sum(profile.seconds.get(name, 0.0) for profile in profiles) / len(profiles) for name in names}
    return StepProfile(mean, profiles[0].steps, profiles[0].tokens_per_s, profiles[0].operations)


def operations_by_part(events: Iterable[Any], *, on_cuda: bool) -> dict[str, dict[str, float]]:
    """Share of each part's time that each operation takes, by torch profiler's events of one step.

    An operation belongs to the part that was on when it began: on CUDA with its kernels, whenever they ran.
    """
    marks, operations, end = [], [], 0.0
    for event in events:
        end = max(end, event.time_range.end)
        if event.name.startswith(MARK):
            marks.append((event.time_range.start, event.name.removeprefix(MARK)))
        elif event.name.partition("/")[0] not in PHASES and "cuda" not in str(event.device_type).lower():
            own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            operations.append(Operation(event.name, event.time_range.start, own))
    marks.sort()
    starts, length = [start for start, _ in marks], dict[str, float]()
    for (start, name), following in zip(marks, [*starts[1:], end], strict=True):
        length[name] = length.get(name, 0.0) + following - start
    sums: dict[str, dict[str, float]] = {}
    for operation in operations:
        index = bisect_right(starts, operation.start_us) - 1
        if index >= 0 and operation.self_us > 0:
            part = sums.setdefault(marks[index][1], {})
            part[operation.name] = part.get(operation.name, 0.0) + operation.self_us
    # Recording lengthens everything: only shares of it mean something.
    return {
        part: {name: own / max(length[part], sum(by_name.values())) for name, own in by_name.items()}
        for part, by_name in sums.items()
    }


def table(profile: StepProfile, title: str) -> Table:
    """Parts by forward and backward, then the other phases, with shares of the whole."""
    total = profile.total
    shown = Table(title=title)
    shown.add_column("part")
    for name in ("forward", "backward", "together", "share"):
        shown.add_column(name, justify="right")

    def add(name: str, forward: float | None, backward: float | None, both: float) -> None:
        shown.add_row(name, _ms(forward), _ms(backward), _ms(both), f"{both / total:.1%}")

    halves = {half: profile.parts(half) for half in ("forward", "backward")}
    names = dict.fromkeys(name.partition("/")[2] for half in halves.values() for name in half)
    both = {name: sum(halves[half].get(f"{half}/{name}", 0.0) for half in halves) for name in names}
    for name in sorted(both, key=lambda name: -both[name]):
        add(name, halves["forward"].get(f"forward/{name}"), halves["backward"].get(f"backward/{name}"), both[name])
    shown.add_section()
    forward, backward = (profile.seconds.get(half, 0.0) for half in halves)
    add("forward and backward", forward, backward, forward + backward)
    for name in profile.parts("optimizer"):
        add(name, None, None, profile.seconds[name])
    for name in [*PHASES, BETWEEN]:
        if name not in (*halves, "optimizer"):
            add(name, None, None, profile.seconds.get(name, 0.0))
    shown.add_section()
    add("step", None, None, total)
    return shown


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"


def boxes(profile: StepProfile) -> list[tuple[str, str, str, float]]:
    """The flame graph as (id, id of the parent, label, seconds): step, phase, part, operation."""
    found = [("step", "", "step", profile.total)]
    for phase in [*PHASES, BETWEEN]:
        value = profile.seconds.get(phase, 0.0)
        found.append((phase, "step", phase, value))
        parts = profile.parts(phase)
        found += [(name, phase, name.partition("/")[2], seconds) for name, seconds in parts.items()]
        for name, seconds in (parts or {phase: value}).items():
            found += _operation_boxes(name, seconds, _shares(profile.operations, name))
    return found


def _shares(operations: Mapping[str, Mapping[str, float]], name: str) -> Mapping[str, float]:
    # A divided phase is on under its own name where the metrics call it engine.
    return operations.get(name) or operations.get(name.removesuffix("/engine"), {})


def _operation_boxes(parent: str, seconds: float, shares: Mapping[str, float]) -> list[tuple[str, str, str, float]]:
    largest = sorted(shares.items(), key=lambda item: -item[1])
    shown = dict(largest[:_MAX_OPERATIONS])
    if rest := sum(share for _, share in largest[_MAX_OPERATIONS:]):
        shown["smaller operations"] = rest
    if shown and (idle := 1 - sum(shown.values())) > 1e-3:
        shown["between operations"] = idle
    return [(f"{parent}:{name}", parent, name, share * seconds) for name, share in shown.items()]


def page(profile: StepProfile, title: str, note: str) -> str:
    """One HTML file with the flame graph and the figures under it; plotly's script is inside, nothing is fetched."""
    import plotly.graph_objects as go

    ids, parents, labels, values = zip(*boxes(profile), strict=True)
    figure = go.Figure(
        go.Icicle(
            ids=ids,
            parents=parents,
            labels=labels,
            values=[value * 1e3 for value in values],
            branchvalues="total",
            root_color="lightgray",
            tiling={"orientation": "v"},
            sort=False,
            hovertemplate="%{label}: %{value:.2f} ms, %{percentRoot:.1%}<extra></extra>",
            texttemplate="%{label}<br>%{value:.2f} ms",
        ),
        {"height": 640, "margin": {"t": 10, "b": 10, "l": 10, "r": 10}},
    )
    drawn = figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    lines = "".join(
        f"<tr><td>{html.escape(name)}<td>{value * 1e3:.3f}<td>{value / profile.total:.1%}"
        for name, value in sorted(profile.seconds.items())
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem}"
        "td{padding-right:2rem;font-variant-numeric:tabular-nums}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>{drawn}"
        f"<table><tr><th>phase or part<th>ms<th>share{lines}</table></body></html>\n"
    )
