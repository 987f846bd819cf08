"""Where the time of a step goes, one state of the code under the other: phases in their order, and their parts below.

Like a flame graph of two levels: forward, backward and the rest; inside them the parts, the longest first. Parts have
the same colour in forward and backward.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.palette import CARD, INK, LINE, SERIES, layout
from tests.bench.report import hardware

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Profile = Mapping[str, Any]

COLORS = dict(
    zip(("attention", "head", "experts", "dense", "norm", "shared", "router", "backbone"), SERIES, strict=False)
)
OTHER, PALE = "#c3c7cb", "#e4e6e8"
"""Of parts without a colour of their own, and of phases."""
PHASES = ("data", "forward", "losses", "hooks", "backward", "optimizer", "other", "between steps")
WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 1040, 20, 20, 88, 150, 105
LETTER = 6.9  # pixels of a letter of a label


class Box(NamedTuple):
    """A stretch of the step, in milliseconds."""

    name: str
    start: float
    length: float


def take_profiles(labelled: Sequence[str], path: Path) -> None:
    """Put files of launch.profile, each `LABEL=FILE`, into one. ValueError for a file that is none of them."""
    profiles = []
    for one in labelled:
        label, _, file = one.partition("=")
        found = json.loads(Path(file).read_text()) if file else {}
        if not isinstance(found.get("seconds"), dict) or "forward" not in found["seconds"]:
            raise ValueError(f"--breakdown {one}: wants LABEL=FILE, the profile.json of a launch.profile")
        kept = {key: found[key] for key in ("title", "torch", "steps", "seconds")}
        kept["seconds"] = {name: float(f"{value:.4g}") for name, value in found["seconds"].items()}
        profiles.append({"label": label} | kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"hardware": hardware(), "profiles": profiles}, indent=1) + "\n")


def total_ms(profile: Profile) -> float:
    """A step with what lies between two."""
    return 1e3 * sum(value for name, value in profile["seconds"].items() if "/" not in name)


def part_ms(profile: Profile) -> dict[str, float]:
    """Milliseconds of each part of the model, forward and backward together, the longest first."""
    sums: dict[str, float] = {}
    for name, value in profile["seconds"].items():
        phase, _, part = name.partition("/")
        if part and phase in ("forward", "backward"):
            sums[part] = sums.get(part, 0.0) + 1e3 * value
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def boxes(profile: Profile) -> tuple[list[Box], list[Box]]:
    """Phases in the order of a step, and their parts; a phase without parts is its own."""
    seconds, at = profile["seconds"], 0.0
    phases, parts = [], []
    for phase in PHASES:
        length = 1e3 * seconds.get(phase, 0.0)
        phases.append(Box(phase, at, length))
        inside = {name.partition("/")[2]: 1e3 * s for name, s in seconds.items() if name.startswith(f"{phase}/")}
        start = at
        for name, part in sorted((inside or {phase: length}).items(), key=lambda item: -item[1]):
            parts.append(Box(name, start, part))
            start += part
        at += length
    return phases, parts


def breakdown_figure(found: Mapping[str, Any]) -> "Figure":
    """All profiles on one scale of time."""
    import plotly.graph_objects as go

    profiles = found["profiles"]
    longest = max(map(total_ms, profiles))
    figure = go.Figure()
    for number, profile in enumerate(profiles):
        top = -number * 1.5
        phases, parts = boxes(profile)
        for level, inside, height in ((top, phases, 0.3), (top - 0.5, parts, 0.6)):
            figure.add_trace(
                go.Bar(
                    orientation="h", y=[level] * len(inside), x=[box.length for box in inside],
                    base=[box.start for box in inside], width=height,
                    marker={
                        "color": [COLORS.get(box.name, OTHER) if inside is parts else PALE for box in inside],
                        "line": {"color": CARD, "width": 1.2},
                    },
                )
            )  # fmt: skip
            for box in inside:
                _label(figure, box, level, longest, light=inside is parts and box.name in COLORS)
        head = f"<b>{profile['label']}</b>: {total_ms(profile):.0f} ms a step"
        figure.add_annotation(x=0, y=top + 0.36, text=head, xanchor="left", yanchor="middle", showarrow=False,
                              font={"size": 14, "color": INK})  # fmt: skip
    figure.update_xaxes(range=[0, longest * 1.002], ticksuffix=" ms", showgrid=False, linecolor=LINE, ticks="outside",
                        tickcolor=LINE, zeroline=False)  # fmt: skip
    figure.add_annotation(xref="paper", yref="paper", x=0, y=0, yshift=-32, text=_legend(profiles[-1]), xanchor="left",
                          yanchor="top", align="left", showarrow=False, font={"size": 13, "color": INK})  # fmt: skip
    figure.update_yaxes(visible=False, range=[-1.5 * len(profiles) + 0.6, 0.55])
    last = profiles[-1]
    under = (
        f"{last['title'][0].upper()}{last['title'][1:]}. Mean of {last['steps']} steps by the clock on the wall of a "
        f"shared machine: compare shares.<br>{found['hardware']}, torch {last['torch']}"
    )
    figure.update_layout(
        **layout(_finding(profiles), under, width=WIDTH, barmode="overlay",
                 height=ROW * len(profiles) + TOP + BOTTOM, margin={"l": LEFT, "r": RIGHT, "t": TOP, "b": BOTTOM})
    )  # fmt: skip
    return figure


def _label(figure: "Figure", box: Box, level: float, longest: float, *, light: bool) -> None:
    """Name and milliseconds where they fit, else the name, else nothing."""
    room = box.length / longest * (WIDTH - LEFT - RIGHT) - 4
    full = f"{box.name} {box.length:.0f}"
    stacked = f"{box.name}<br>{box.length:.0f}"
    wide = LETTER * len(box.name)
    text = full if room > LETTER * len(full) else stacked if light and room > wide else box.name if room > wide else ""
    if text:
        figure.add_annotation(x=box.start + box.length / 2, y=level, text=text, showarrow=False,
                              font={"size": 12, "color": CARD if light else INK})  # fmt: skip


def _legend(profile: Profile) -> str:
    """Parts with their colours, milliseconds and shares; all that has no colour is one of them."""
    total, shown = total_ms(profile), {name: ms for name, ms in part_ms(profile).items() if name in COLORS}
    shown["embedding, engine, optimizer, data, hooks"] = total - sum(shown.values())
    items = [
        f"<span style='color:{COLORS.get(name, OTHER)}'>\u25a0</span> {name} {ms:.0f} ms, {ms / total:.0%}"
        for name, ms in shown.items()
    ]
    lines = ("&nbsp;&nbsp;&nbsp;&nbsp;".join(items[at : at + 5]) for at in range(0, len(items), 5))
    return f"{profile['label']}, forward and backward:<br>" + "<br>".join(lines)


def _finding(profiles: Sequence[Profile]) -> str:
    last = profiles[-1]
    (first, one), (second, other) = list(part_ms(last).items())[:2]
    text = f"{first.capitalize()} and {second} take {(one + other) / total_ms(last):.0%} of a step"
    if len(profiles) < 2:
        return text
    before, after = ({name: ms / total_ms(p) for name, ms in part_ms(p).items()} for p in (profiles[0], last))
    moved = max(after, key=lambda name: abs(after[name] - before.get(name, 0.0)))
    return f"{text}; {moved} {after[moved]:.0%}, before {before.get(moved, 0.0):.0%}"
