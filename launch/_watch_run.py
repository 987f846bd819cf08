"""What `launch.watch` shows of one run: figures, courses, loads, domains and events, as one rich renderable."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.report_sections._log import read_log
from launch.report_sections._parts import number, si
from launch.report_sections._record import Columns, RunRecord, in_use, read_config
from launch.report_sections.events import events_of
from trainer.line_tail import LineTail

_BLOCKS = "▁▂▃▄▅▆▇█"
_RECENT = 50  # steps that speed is measured on
_QUIET_S = 60.0  # without a new line a run that trains is said to be quiet
_FIGURE_WIDTH = 42  # columns beside a sparkline
_KEPT_EVENTS = 5
_HEAD_LINES, _BORDERS = 2, 2
_SPIKES_WITHIN = 5000  # steps: more would be counted again at every look


class RunView:
    """A run as far as its files have come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = LineTail(folder / "metrics.jsonl")
        self._log_size = -1
        self.run = self._new_record()

    def _new_record(self) -> RunRecord:
        return RunRecord(self.folder.resolve().name, self.folder, config=read_config(self.folder))

    def poll(self) -> bool:
        """Read what is new; returns whether anything was."""
        changed, lines = False, [""]
        while lines:
            lines, began_anew = self._metrics.poll()
            if began_anew:  # a resumed run rewrites its file up to the checkpoint
                self.run, self._log_size = self._new_record(), -1
            changed = changed or began_anew or bool(lines)
            for line in lines:
                self.run.add_line(line)
        if not self.run.config:
            self.run.config = read_config(self.folder)
        self.run.is_running = in_use(self.folder)
        size = sum(path.stat().st_size for path in self.folder.glob("log.txt*"))
        if size != self._log_size:
            self.run.log, self._log_size = read_log(self.folder), size
        return changed

    @property
    def quiet_s(self) -> float:
        """Seconds since the last line of metrics."""
        try:
            return max(0.0, time.time() - (self.folder / "metrics.jsonl").stat().st_mtime)
        except OSError:
            return 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the speed of the last steps; None if that is not known."""
        times = self.run.steps.line("time/step_s")[1][-_RECENT:]
        if self.run.planned_steps is None or not len(times):
            return None
        return float(times.mean()) * max(0, self.run.planned_steps - self.run.last_step)

    @property
    def status(self) -> str:
        """In words; a run on another machine is known by its file alone."""
        if not self.run.is_running and self.run.status == "stopped early" and self.quiet_s < _QUIET_S:
            return "writing"
        return self.run.status

    def show(self, width: int, height: int) -> RenderableType:
        """The dashboard for a terminal of this size."""
        run = self.run
        if not run.steps.count and not run.evals.count:
            return Panel(Text(f"waiting for the first line of {self.folder}/metrics.jsonl"), title=Text(run.name))
        events, shown = _events(run)
        # What a low terminal has no room for goes: domains first, then layers.
        room = height - _HEAD_LINES - len(_COURSES) - _BORDERS - shown - _BORDERS
        num_loads = min(_num_layers(run), max(1, room - _BORDERS))
        room -= num_loads + _BORDERS
        parts = [
            self._head(width), _courses(run, width), _loads(run, width, num_loads),
            _domains(run) if room >= len(run.domain_names) + 1 + _BORDERS else None, events,
        ]  # fmt: skip
        return Group(*(part for part in parts if part is not None))

    def _head(self, width: int) -> RenderableType:
        run = self.run
        done = run.last_step / run.planned_steps if run.planned_steps else None
        style = {"training": "green", "writing": "green", "finished": "cyan"}.get(self.status, "yellow")
        words = Text.assemble((run.name, "bold"), "  ", (self.status, style), f"  step {run.last_step:,}")
        if run.planned_steps:
            words.append(f" of {run.planned_steps:,}")
        speed = run.steps.line("tokens_per_s")[1][-_RECENT:]
        words.append(f"  {si(run.steps.last('tokens'))} tokens")
        if len(speed):
            words.append(f"  {si(float(np.median(speed)))} tokens/s")
        if self.status in ("training", "writing"):
            if self.eta_s is not None:
                words.append(f"  ETA {clock(self.eta_s)}")
            if self.quiet_s > _QUIET_S:
                words.append(f"  no new line for {clock(self.quiet_s)}", style="yellow")
        if done is None:
            return words
        bar = Table.grid()  # a bar alone ends without a new line
        bar.add_row(ProgressBar(total=1.0, completed=done, width=min(width, 100), complete_style=style))
        return Group(words, bar)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def sparkline(values: Any, width: int) -> str:
    """The course of values in at most `width` characters: means over equal stretches, from the least to the largest."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values) or width < 1:
        return ""
    pieces = np.array([piece.mean() for piece in np.array_split(values, min(width, len(values)))])
    low, high = pieces.min(), pieces.max()
    if high - low < 1e-12 * max(1.0, abs(high)):
        return _BLOCKS[0] * len(pieces)
    return "".join(_BLOCKS[round(float((value - low) / (high - low)) * (len(_BLOCKS) - 1))] for value in pieces)


_COURSES = (
    ("loss", "steps", "loss", ".4f"),
    ("held-out loss", "evals", "eval/loss", ".4f"),
    ("MaxVio, batch", "steps", "moe/maxvio_batch", ".3f"),
    ("MaxVio, held-out", "evals", "eval/maxvio_global", ".3f"),
    ("ESS / B", "steps", "reweight/ess", ".3f"),
    ("gradient norm", "steps", "grad_norm", ".3g"),
    ("tokens / s", "steps", "tokens_per_s", ",.0f"),
)


def _courses(run: RunRecord, width: int) -> RenderableType | None:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="crop")
    table.add_column(style="dim", no_wrap=True)
    for label, kind, key, form in _COURSES:
        columns: Columns = getattr(run, kind)
        values = columns.line(key)[1]
        if len(values):
            ends = f"{values.min():{form}} to {values.max():{form}}"
            table.add_row(label, f"{values[-1]:{form}}", sparkline(values, width - _FIGURE_WIDTH - 8), ends)
    return Panel(table, title="courses", title_align="left", border_style="dim") if table.row_count else None


def _num_layers(run: RunRecord) -> int:
    return max((len(row.get("moe/loads") or ()) for row in run.evaluations[-1:]), default=0)


def _loads(run: RunRecord, width: int, rows: int) -> RenderableType | None:
    """Held-out loads of the last evaluation: a bar an expert, half of the height for an even share."""
    measured = [row for row in run.evaluations if row.get("moe/loads")]
    if not measured:
        return None
    table = Table.grid(padding=(0, 1))
    for layer, loads in list(enumerate(measured[-1]["moe/loads"]))[:rows]:
        known = [(expert, load) for expert, load in enumerate(loads) if load is not None]
        if not known:
            continue
        busiest, most = max(known, key=lambda pair: pair[1])
        table.add_row(
            f"layer {layer}", _bars([load for _, load in known], max(8, width - 46)), f"busiest {busiest}: {most:.2f}x",
            f"idle {sum(load == 0 for _, load in known)}",
        )  # fmt: skip
    more = len(measured[-1]["moe/loads"]) - rows
    title = f"held-out loads, step {measured[-1]['step']:,} (half height: even share)"
    return Panel(table, title=title, title_align="left", border_style="dim",
                 subtitle=f"{more} more layers" if more > 0 else None)  # fmt: skip


def _bars(loads: list[float], width: int) -> Text:
    """A block an expert; where they do not fit, the largest of neighbours."""
    text = Text()
    for piece in np.array_split(np.array(loads), min(width, len(loads))):
        load = float(piece.max())
        style = "red" if load > 2 else "blue" if load < 0.5 else ""
        text.append(" " if load == 0 else _BLOCKS[min(7, int(load * 4 - 1e-9))], style=style)
    return text


def _domains(run: RunRecord) -> RenderableType | None:
    names = run.domain_names
    if not names:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("domain", no_wrap=True)
    for title in ("training loss", "held-out ppl", "from", "of tokens", "of objective"):
        table.add_column(title, justify="right")
    tokens = {name: np.nan_to_num(run.steps[f"domain/{name}/tokens"]) for name in names}
    total = sum(column.sum() for column in tokens.values()) or 1.0
    for name in names:
        losses = run.steps.line(f"domain/{name}/loss")[1][-_RECENT:]
        weights = run.steps.line(f"domain/{name}/weight")[1]
        table.add_row(
            name, number(float(losses.mean()) if len(losses) else None),
            number(run.evals.last(f"eval/{name}/ppl"), ",.1f"),
            number(run.evals.first(f"eval/{name}/ppl"), ",.0f"), number(tokens[name].sum() / total, ".1%"),
            number(float(weights.mean()) if len(weights) else None, ".1%"),
        )  # fmt: skip
    return Panel(table, title="domains", title_align="left", border_style="dim")


def _events(run: RunRecord) -> tuple[RenderableType, int]:
    """The newest events, and how many lines they take."""
    found = events_of(run, spikes_within=_SPIKES_WITHIN)[-_KEPT_EVENTS:]
    text = Text("none so far", style="dim") if not found else Text(no_wrap=True, overflow="ellipsis")
    for i, event in enumerate(found):
        style = {"error": "red", "spike": "yellow", "skipped": "yellow", "warning": "yellow"}.get(event.kind, "")
        text.append(("\n" if i else "") + (f"step {event.step:,} " if event.step is not None else ""), style="dim")
        text.append(event.kind, style=style)
        text.append(f" {event.text}")
    return Panel(text, title="events", title_align="left", border_style="dim"), max(1, len(found))
