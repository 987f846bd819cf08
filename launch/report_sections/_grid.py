"""What the folder of a grid says: which runs belong together, how far they are, what they recorded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.report_sections._record import RunRecord
from trainer.errors import ConfigError

GRID, STATE = "grid.json", "state.json"
FORMAT = 1


@dataclass(frozen=True)
class GridRun:
    """One planned run."""

    folder: Path
    variant: str
    seed: int
    settings: Mapping[str, Any]
    status: str
    """waiting, running, done, failed or stopped."""
    reason: str
    """Of a failure or a stop, in words."""


@dataclass(frozen=True)
class GridRecord:
    """A grid and those of its runs that have recorded something."""

    name: str
    folder: Path
    baseline: str | None
    axes: Mapping[str, Sequence[Any]]
    plan: Sequence[GridRun]
    runs: Sequence[RunRecord]

    @classmethod
    def read(cls, folder: Path) -> "GridRecord":
        """Raises ConfigError if grid.json is broken, or if no run has recorded anything yet."""
        described, plan = read_plan(folder)
        runs = []
        for planned in plan:
            try:
                run = RunRecord.read(planned.folder)
            except ConfigError:
                continue  # not begun
            run.variant, run.seed = planned.variant, planned.seed
            runs.append(run)
        if not runs:
            raise ConfigError(f"{folder}: none of its {len(plan)} runs has recorded anything yet")
        baseline = described.get("baseline")
        return cls(
            described.get("name") or folder.resolve().name, folder, baseline, described.get("axes") or {}, plan, runs
        )

    @property
    def variants(self) -> list[str]:
        """Names of the variants, in the order of the plan."""
        return list(dict.fromkeys(run.variant for run in self.plan))

    def complete(self, variant: str) -> dict[int, RunRecord]:
        """Runs of a variant that reached their last step, by seed: the ones that may be compared."""
        return {
            run.seed: run
            for run in self.runs
            if run.variant == variant and run.seed is not None and run.last_step >= (run.planned_steps or 0)
        }

    @property
    def lead(self) -> str:
        """One line under the name."""
        seeds = len({run.seed for run in self.plan})
        complete = sum(len(self.complete(variant)) for variant in self.variants)
        return (
            f"{len(self.variants)} variants x {seeds} seed{'s' if seeds > 1 else ''}; {complete} of "
            f"{len(self.plan)} runs are complete; baseline: {self.baseline or 'none'}."
        )


def is_grid(folder: Path) -> bool:
    """Whether the folder is of a grid and not of a run."""
    return (folder / GRID).is_file()


def read_plan(folder: Path) -> tuple[dict[str, Any], list[GridRun]]:
    """grid.json as it is, and its runs with their state. Raises ConfigError if it is not of this format."""
    path = folder / GRID
    try:
        described = json.loads(path.read_text())
        if described["format"] != FORMAT:
            raise ConfigError(f"{path}: format {described['format']} is not {FORMAT}; use the version that wrote it")
        state = read_state(folder)
        plan = [
            GridRun(
                folder / run["folder"], run["variant"], int(run["seed"]), run.get("settings") or {},
                str(state.get(run["folder"], {}).get("status", "waiting")),
                str(state.get(run["folder"], {}).get("reason") or ""),
            )
            for run in described["runs"]
        ]  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name the folder of a grid") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is not the description of a grid ({type(error).__name__}: {error})") from error
    if not plan:
        raise ConfigError(f"{path}: has no runs")
    return described, plan


def read_state(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """state.json of a grid by run; empty if there is none yet."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
