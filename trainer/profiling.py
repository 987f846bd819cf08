"""What a run measures of itself beside its metrics: traces of chosen steps, the parts of a step, ranks that lag.

Off by default, and then nothing of it exists: the metrics' coarse phases (trainer/phases.py) are always there.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from trainer import ranks
from trainer.breakdown import Breakdown
from trainer.engine import Engine
from trainer.phases import PhaseClock

log = logging.getLogger("evenkeel")

FOLDER = "profile"
"""Folder of traces and snapshots, below the run's."""
_HISTORY_ENTRIES = 100_000
_LAGGING_STEPS = 10  # in a row: a single one is the machine's noise, and on record as `time/rank_spread`


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What is measured beyond the metrics that every run has."""

    trace_steps: tuple[int, ...] = ()
    """Steps that torch's profiler records, each into profile/step-XXXXXXXX-rankN.json.gz, for Perfetto or Chrome."""
    trace_ranks: tuple[int, ...] = (0,)
    """Ranks that record them."""
    breakdown: bool = False
    """Divide forward, backward and optimizer into their parts: time/forward/attention_s and so on in every row."""
    memory_history: bool = False
    """On CUDA: remember who allocated what, for the snapshot that is written when memory runs out."""
    slow_rank_factor: float = 1.5
    """A rank this many times slower than the median rank, ten steps in a row, is named in the log; 0: never."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if any(step < 1 for step in self.trace_steps):
            found.append(f"trace_steps: {min(self.trace_steps)} is no step; they count from 1")
        if any(rank < 0 for rank in self.trace_ranks) or (self.trace_steps and not self.trace_ranks):
            found.append(f"trace_ranks: {list(self.trace_ranks)} must be ranks, counted from 0, at least one")
        if self.slow_rank_factor and not self.slow_rank_factor > 1:
            found.append(f"slow_rank_factor: {self.slow_rank_factor} must be above 1, or 0 to name nobody")
        return found

    def run_problems(self, *, steps: int, world_size: int | None) -> list[str]:
        """What would be ignored silently in a run of so many steps and ranks."""
        late = [step for step in self.trace_steps if step > steps]
        absent = [rank for rank in self.trace_ranks if world_size is not None and rank >= world_size]
        found = [f"trace_steps: {late[0]} is beyond the last step ({steps})"] if late else []
        if self.trace_steps and absent:
            found.append(f"trace_ranks: there is no rank {absent[0]} among {world_size}")
        return found


class StepProfiler:
    """Measures the steps of one run as configured."""

    def __init__(
        self, config: ProfileConfig, engine: Engine, clock: PhaseClock, run_dir: Path, *, start_step: int = 0
    ) -> None:
        """`start_step`: steps done before this start. Those of `trace_steps` among them are gone, which is logged."""
        self._config, self._clock, self._folder = config, clock, run_dir / FOLDER
        self._steps = set(config.trace_steps) if ranks.rank() in config.trace_ranks else set()
        self._trace: torch.profiler.profile | None = None
        self._breakdown = Breakdown(engine, clock) if config.breakdown else None
        if config.memory_history and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
        if ranks.is_main() and (missed := self._missed(start_step)):
            log.warning(
                "profile.trace_steps: no trace of %s: this start goes on after step %d",
                *(", ".join(f"step {step}" for step in missed), start_step),
            )

    def _missed(self, start_step: int) -> list[int]:
        """Steps that no start has traced and this one will not come to."""
        steps = sorted({step for step in self._config.trace_steps if step <= start_step})
        return [step for step in steps if not any(self._folder.glob(f"step-{step:08d}-rank*"))]

    def start_step(self, step: int) -> None:
        """Called before a step's data is asked for."""
        if step not in self._steps:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._trace = torch.profiler.profile(activities=activities, record_shapes=True)
        self._trace.start()
        self._clock.is_traced = True

    def end_step(self, step: int) -> None:
        """Called when a step is over. A trace that cannot be written is no reason to end a run."""
        if self._trace is None:
            return
        self._clock.is_traced = False
        trace, self._trace = self._trace, None
        trace.stop()
        path = self._folder / f"step-{step:08d}-rank{ranks.rank()}.json.gz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            log.warning("no trace of step %d: %s: %s", step, path, error)
        else:
            log.info("trace of step %d: %s", step, path)

    def close(self) -> None:
        """Leave engine and process as they were."""
        if self._trace is not None:
            self._trace.stop()
        if self._breakdown is not None:
            self._breakdown.detach()
        if self._config.memory_history and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)


class SlowRankWatch:
    """Names a rank that holds the others up, from the rows of metrics."""

    def __init__(self, factor: float, names: Sequence[str]) -> None:
        """`names`: of all ranks, by number."""
        self._factor, self._names = factor, names
        self._rank, self._steps = -1, 0

    def look(self, row: Mapping[str, Any]) -> str | None:
        """What is to be said after this row, or None; once for as long as the same rank lags."""
        spread, rank = row.get("time/rank_spread"), row.get("time/slowest_rank")
        if spread is None or rank is None or not self._factor:
            return None
        if spread < self._factor or (rank != self._rank and self._rank >= 0):
            self._rank, self._steps = -1, 0
        if spread < self._factor:
            return None
        self._rank, self._steps = rank, self._steps + 1
        if self._steps != _LAGGING_STEPS:
            return None
        return (
            f"step {row['step']}: rank {rank} ({self._names[rank]}) takes {spread:.1f} times as long as the median "
            f"rank to read and forward its data, for {_LAGGING_STEPS} steps now; all others wait for it"
        )
