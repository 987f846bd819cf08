"""What a person sees while the run trains: a live line in a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("evenkeel")

_PLAIN_EVERY_S = 10.0
_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("lr", "lr", "{:.2e}"),
    ("tokens_per_s", "tok/s", "{:,.0f}"),
    ("moe/maxvio_batch", "maxvio", "{:.3f}"),
    ("reweight/ess", "ess", "{:.3f}"),
)


class ProgressDisplay:
    """Shows training rows as they come. Without a terminal: one line every ten seconds, and the first and last."""

    def __init__(self, total_steps: int, start_step: int, console: Console | None = None) -> None:
        self._total = total_steps
        self._start_step, self._started = start_step, time.monotonic()
        self._last_plain = -_PLAIN_EVERY_S
        console = console or Console(file=sys.stderr)
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._live.add_task("train", total=total_steps, completed=start_step, figures="")
            self._live.start()

    def show(self, row: Mapping[str, Any]) -> None:
        """Show one training row."""
        if self._live is not None:
            self._live.update(self._task, completed=row["step"], figures=figures(row))
            return
        now = time.monotonic()
        if now - self._last_plain >= _PLAIN_EVERY_S or row["step"] == self._total:
            self._last_plain = now
            log.info("step %d/%d %s eta %s", row["step"], self._total, figures(row), self._remaining(row["step"], now))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def _remaining(self, step: int, now: float) -> str:
        done = step - self._start_step
        seconds = round((now - self._started) / max(done, 1) * (self._total - step))
        return f"{seconds // 3600:d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def figures(row: Mapping[str, Any]) -> str:
    """The figures of a row that are worth a glance, as one line."""
    shown = [f"{label} {form.format(row[key])}" for key, label, form in _SHOWN if row.get(key) is not None]
    return " ".join(shown if row.get("step/applied", 1) else [*shown, "SKIPPED"])
