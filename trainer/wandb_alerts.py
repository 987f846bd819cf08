"""What is worth an alert, from rows of metrics: pure rules, and how often each may speak.

Rules (each named by what it says):
- loss spike: the run says that a step's loss is one (trainer/spikes.py);
- step skipped: a loss or gradient was not finite, or the spike was not to be applied;
- dead experts: some expert got no token, thirty steps in a row.
What else a run has to say (a slow rank, how it ended) comes with `said`. A kind speaks once in `every_s` seconds; what
it had to say in between is counted and told with its next alert.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from trainer.errors import NumericError

Level = Literal["INFO", "WARN", "ERROR"]

_DEAD_STEPS = 30


class Alert(NamedTuple):
    """A title that names the kind, and one line."""

    title: str
    text: str
    level: Level


@dataclass
class AlertRules:
    """Watches the rows of one run."""

    every_s: float
    """Seconds between two alerts of a kind; 0 lets none through."""
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._dead_steps = 0
        self._last: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def look(self, row: Mapping[str, Any]) -> list[Alert]:
        """Alerts after one row; rows of evaluations have nothing to alert about."""
        if "loss" not in row:
            return []
        found = [self._skipped(row), self._spike(row), self._dead(row)]
        return [alert for each in found if each is not None and (alert := self.said(*each)) is not None]

    def said(self, title: str, text: str, level: Level = "WARN") -> Alert | None:
        """The alert, unless its kind has just spoken."""
        now = self.clock()
        if not self.every_s or now - self._last.get(title, -math.inf) < self.every_s:
            self._held_back[title] = self._held_back.get(title, 0) + 1
            return None
        self._last[title] = now
        more = self._held_back.pop(title, 0)
        return Alert(title, text + (f" ({more} more since the last alert of this kind)" if more else ""), level)

    def _skipped(self, row: Mapping[str, Any]) -> tuple[str, str, Level] | None:
        if row.get("step/applied", 1) or row.get("step/spike"):
            return None
        return "step skipped", f"step {row['step']}: a loss or gradient was not finite; nothing was changed", "WARN"

    def _spike(self, row: Mapping[str, Any]) -> tuple[str, str, Level] | None:
        if not row.get("step/spike"):
            return None
        return "loss spike", f"step {row['step']}: loss {row['loss']:.4f}, lately {row['loss/ema']:.4f}", "WARN"

    def _dead(self, row: Mapping[str, Any]) -> tuple[str, str, Level] | None:
        dead = row.get("moe/dead_experts") or 0
        self._dead_steps = self._dead_steps + 1 if dead else 0
        if self._dead_steps < _DEAD_STEPS:
            return None
        self._dead_steps = 0
        return "dead experts", f"step {row['step']}: {dead:g} experts without a token; {_DEAD_STEPS} steps now", "WARN"


def ending(error: BaseException) -> tuple[str, str, Level]:
    """What to say when a run ends with an error, under a title of its own for failed certificates.

    Only what is wrong with its numbers is told; other messages hold paths and hosts.
    """
    line = (str(error).splitlines() or [""])[0]
    title = "balance certificate failed" if "balance certificate" in line else "run failed"
    told = line[:300] if isinstance(error, NumericError) else "log.txt says more"
    return title, f"{type(error).__name__}: {told}", "ERROR"
