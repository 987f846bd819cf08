"""The section on events: starts, skipped steps, spikes of the loss, phases of the data, warnings."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from launch.report_sections._log import LogEvent
from launch.report_sections._parts import Section, Table
from launch.report_sections._record import RunRecord

SPIKE_WINDOW = 50
SPIKE_SIGMAS = 6.0
_MAX_ROWS = 200
_FLAG = "step/spike"


def events(runs: Sequence[RunRecord]) -> Section | None:
    """What happened in each run; a run in which nothing happened says so."""
    rows = []
    for run in runs:
        whose = [run.name] if len(runs) > 1 else []
        rows += [[*whose, f"{e.step:,}" if e.step is not None else "–", e.kind, e.clock, e.text]
                 for e in events_of(run)]  # fmt: skip
    intro = (
        "Restarts, skipped steps, spikes, phases of the data and warnings, from log.txt and metrics.jsonl. A spike is "
        "what train.spikes calls one; or, where that was not recorded, a loss more than "
        f"{SPIKE_SIGMAS:g} robust standard deviations above the median of the {SPIKE_WINDOW} steps before."
    )
    if not rows:
        return Section("Events", intro + " There was none of these.", [])
    note = f"The last {_MAX_ROWS} of {len(rows):,}." if len(rows) > _MAX_ROWS else ""
    columns = [*(["run"] if len(runs) > 1 else []), "step", "what", "time", ""]
    table = Table("What happened", note, columns, rows[-_MAX_ROWS:], folded=len(rows) > 40)
    return Section("Events", intro, [table])


def events_of(run: RunRecord, *, spikes_within: int | None = None) -> list[LogEvent]:
    """Events of a run in the order of their steps; those without a step keep their place in the log.

    `spikes_within`: look for spikes in so many last steps only.
    """
    found, step = [], 0
    for event in run.log:
        step = event.step if event.step is not None else step
        if event.kind == "skip" or (event.kind == "spike" and _FLAG in run.steps):
            continue  # metrics have every one
        found.append((step, event))
    for event in [*_skips(run), *_spikes(run, spikes_within)]:
        assert event.step is not None
        found.append((event.step, event))
    if run.unreadable_lines:
        text = f"{run.unreadable_lines} line(s) of metrics.jsonl were cut short or are not JSON, and left out"
        found.append((run.last_step, LogEvent(None, "warning", text, "")))
    return [event for _, event in sorted(found, key=lambda pair: pair[0])]


def _skips(run: RunRecord) -> Iterator[LogEvent]:
    steps = run.steps["step"][run.steps["step/applied"] == 0].astype(int)
    reasons = {event.step: event.text.partition("skipped: ")[2] for event in run.log if event.kind == "skip"}
    for first, last in _stretches(steps):
        many = f"{last - first + 1} steps, to {last:,}; " if last > first else ""
        yield LogEvent(first, "skipped", many + (reasons.get(first) or "nothing was changed"), "")


def _spikes(run: RunRecord, within: int | None) -> Iterator[LogEvent]:
    steps, losses = run.steps.line("loss")
    if _FLAG in run.steps:  # a run that watches for spikes has flagged them by its own settings
        found = run.steps["step"][run.steps[_FLAG] == 1]
    else:
        recent = slice(-within if within else None, None)
        found = steps[recent][spikes(losses[recent])]
    for first, last in _stretches(found.astype(int)):
        peak = losses[(steps >= first) & (steps <= last)].max(initial=-np.inf)
        before = losses[steps < first][-SPIKE_WINDOW:]
        rise = f", {peak - np.median(before):+.3f} over the steps before" if len(before) else ""
        yield LogEvent(first, "spike", f"loss {peak:.3f}{rise}", "")


def spikes(losses: np.ndarray) -> np.ndarray:
    """Which losses [N] lie more than SPIKE_SIGMAS above the median of the SPIKE_WINDOW before them, bool [N].

    The standard deviation is 1.4826 times the median absolute deviation of the window. The first window is never one.
    """
    found = np.zeros(len(losses), dtype=bool)
    if len(losses) <= SPIKE_WINDOW:
        return found
    windows = np.lib.stride_tricks.sliding_window_view(losses, SPIKE_WINDOW)[:-1]
    # In pieces: a window for each of 10^5 steps at once would take tens of megabytes, several times over.
    for start in range(0, len(windows), 20_000):
        piece = windows[start : start + 20_000]
        median = np.median(piece, axis=1)
        deviation = 1.4826 * np.median(np.abs(piece - median[:, None]), axis=1)
        now = losses[SPIKE_WINDOW + start : SPIKE_WINDOW + start + len(piece)]
        found[SPIKE_WINDOW + start : SPIKE_WINDOW + start + len(piece)] = now > median + SPIKE_SIGMAS * deviation + 1e-9
    return found


def _stretches(steps: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last of each stretch of steps that lie at most two apart."""
    if not len(steps):
        return
    first = int(steps[0])
    for before, after in pairwise(steps):
        if after - before > 2:
            yield first, int(before)
            first = int(after)
    yield first, int(steps[-1])
